"""What every baseline is given, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from mtrain.baseline.rows import TaskRows
from mtrain.config import Config
from mtrain.data.inputs import MemoryInputs
from mtrain.data.loader import Part
from mtrain.data.prepare import Prepared
from mtrain.errors import UserError
from mtrain.tasks import TaskTable
from mtrain.train.loop import joined


@dataclass(frozen=True)
class Problem:
    """Tasks, inputs `x_NF` and labels of one split; `codes`: what inputs are that are no quantities.

    Raises (`of`):
        UserError: the inputs are not all in memory.
    """

    config: Config
    tasks: TaskTable
    x_NF: Tensor
    parts: dict[str, Part]
    codes: str | None = None

    @staticmethod
    def of(config: Config, data: Prepared) -> Problem:
        if not isinstance(data.inputs, MemoryInputs):
            raise UserError(
                f"data.memory_gb: baselines need all inputs in memory, but they take more than {config.data.memory_gb:g} GB "
                "or are read by the chunk; raise it, and with layout files set data.streaming to false"
            )
        codes = "numbers of nodes" if config.model.trunk.class_path == "NodeGraph" else None
        codes = next((item.feature.packed for item in data.features if item.feature.packed), codes)
        return Problem(config, data.tasks, data.inputs.x_NF, data.parts, codes)

    @cached_property
    def rows(self) -> dict[str, TaskRows]:
        """Labels of each part; `final` are those to learn from where the test part is scored: with split.refit also the
        valid part's."""
        rows = {name: TaskRows.of(part) for name, part in self.parts.items()}
        final = rows["train"]
        if self.config.split.refit:
            final = TaskRows.of(joined([self.parts["train"], self.parts["valid"]], len(self.tasks)))
        return rows | {"final": final}

    @property
    def scored(self) -> list[str]:
        """Parts to score."""
        return [name for name in ("valid", "test") if name in self.parts]


@dataclass(frozen=True)
class Fitted:
    """A baseline's logits `[P, O]` for the labels of each part that is scored, in the order of `TaskRows`.

    columns: what else is known of each task, `[T]`.
    parameters: how many it has, of all tasks.
    """

    logits: dict[str, Tensor]
    columns: dict[str, NDArray[Any]]
    parameters: int

"""Tasks and the table of all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtrain.components import Spec, build
from mtrain.errors import UserError
from mtrain.model.kinds import KINDS, Kind


@dataclass(frozen=True)
class Task:
    """One thing to predict.

    Args:
        name: unique; everything that belongs to the task is keyed by it.
        kind: owns loss, metrics and constant predictor.
        label: where its labels are: the column (grid) or the value in the task column (routed, pairs).
        classes: names of the classes of a multiclass task, in the order of its outputs.
        weight: static weight in the objective.
    """

    name: str
    kind: Kind
    label: str = ""
    classes: tuple[str, ...] = ()
    weight: float = 1.0

    @property
    def num_outputs(self) -> int:
        return self.kind.num_outputs(len(self.classes))


@dataclass(frozen=True)
class TaskTable(Sequence[Task]):
    """All tasks of a run, in the user's order.

    `stats` holds one array `[T]` per name: what is known of each task's training labels, and how to bring its
    predictions back to original units (`center`, `scale`).

    Raises:
        UserError: two tasks have the same name.
    """

    tasks: tuple[Task, ...]
    stats: dict[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for task in self.tasks:
            if task.name in seen:
                raise UserError(f"task '{task.name}': the name occurs twice, expected unique task names; rename one")
            seen.add(task.name)

    def __getitem__(self, index: Any) -> Any:
        return self.tasks[index]

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @property
    def num_outputs_T(self) -> NDArray[np.int64]:
        return np.array([task.num_outputs for task in self.tasks], dtype=np.int64)

    @property
    def weight_T(self) -> NDArray[np.float64]:
        return np.array([task.weight for task in self.tasks])

    def take(self, at: NDArray[np.int64]) -> TaskTable:
        """Some of the tasks, with their statistics."""
        return TaskTable(tuple(self.tasks[t] for t in at.tolist()), {name: value_T[at] for name, value_T in self.stats.items()})

    def by_kind(self) -> dict[Kind, NDArray[np.int64]]:
        """Positions of the tasks of each kind (with its options)."""
        positions: dict[Kind, list[int]] = {}
        for i, task in enumerate(self.tasks):
            positions.setdefault(task.kind, []).append(i)
        return {kind: np.array(at) for kind, at in positions.items()}

    def to_arrow(self) -> pa.Table:
        columns: dict[str, Any] = {
            "task": self.names,
            "kind": [task.kind.name for task in self.tasks],
            "label": [task.label for task in self.tasks],
            "outputs": self.num_outputs_T,
            "weight": self.weight_T,
            "classes": pa.array([list(task.classes) for task in self.tasks], pa.list_(pa.string())),
            "kind_spec": [_kind_to_json(task.kind) for task in self.tasks],
        }
        return pa.table(columns | self.stats)

    @staticmethod
    def load(path: Path) -> TaskTable:
        table = pq.read_table(path)
        rows = table.select(["task", "label", "classes", "weight", "kind_spec"]).to_pylist()
        kinds: dict[str, Kind] = {}
        tasks = []
        for row in rows:
            spec = row["kind_spec"]
            if spec not in kinds:
                kinds[spec] = build(Spec.model_validate_json(spec), KINDS, "kind")
            tasks.append(Task(row["task"], kinds[spec], row["label"], tuple(row["classes"]), row["weight"]))
        known = {"task", "kind", "label", "outputs", "weight", "classes", "kind_spec"}
        stats = {name: table[name].to_numpy() for name in table.column_names if name not in known}
        return TaskTable(tuple(tasks), stats)


def _kind_to_json(kind: Kind) -> str:
    short = next((name for name, cls in KINDS.items() if cls is type(kind)), None)
    path = short or f"{type(kind).__module__}.{type(kind).__qualname__}"
    return json.dumps({"class_path": path, "init_args": asdict(kind)})

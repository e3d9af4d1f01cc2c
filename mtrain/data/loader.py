"""Training batches: the rows of step k are a pure function of (seed, k) and, for sampled tasks, of the cursors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrain.data.batch import Batch, Labels
from mtrain.data.order import name_key, shuffled
from mtrain.errors import UserError

_BLOCK = 64
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Part:
    """Rows of one part of the split that have labels: `row_R` are rows of the inputs, `labels` go with them.

    `original` are the same labels in the user's units and float64, which metrics read: equal values must stay equal.
    """

    row_R: Tensor
    labels: Labels
    original: Labels | None = None

    @property
    def num_rows(self) -> int:
        return len(self.row_R)

    def batch(self, x_NF: Tensor, at_B: Tensor) -> Batch:
        row_B = self.row_R[at_B]
        return Batch(x_NF[row_B], row_B, self.labels.take(at_B))


class Loader(Protocol):
    """What the training loop needs of its data."""

    steps_per_epoch: int

    def batch(self, step: int) -> Batch:
        """The global batch of a step; steps are asked for in order, starting from the restored one."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands after the last batch."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RowLoader:
    """Grid and pairs: an endless stream of shuffled epochs, cut into full batches; a step needs no state."""

    def __init__(self, x_NF: Tensor, part: Part, batch_size: int, seed: int):
        self.x_NF, self.part, self.seed = x_NF, part, seed
        self.batch_size = min(batch_size, part.num_rows)
        self.steps_per_epoch = -(-part.num_rows // self.batch_size)
        self._block: tuple[int, NDArray[np.int64]] | None = None

    def batch(self, step: int) -> Batch:
        number = step // _BLOCK
        if self._block is None or self._block[0] != number:
            size = _BLOCK * self.batch_size
            rows = shuffled(self.seed, name_key("rows"), np.arange(number * size, (number + 1) * size), self.part.num_rows)
            self._block = number, rows.reshape(_BLOCK, self.batch_size)
        return self.part.batch(self.x_NF, torch.from_numpy(self._block[1][step % _BLOCK]))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class RoutedLoader:
    """Rows of sampled tasks, each task in its own shuffled order.

    The counts of a step are systematic samples of the probabilities, not multinomial draws: B equidistant points
    with a low-discrepancy offset fall into the tasks' shares of [0, 1), so a task's rows per step differ by at most
    one, and over many steps its share is met almost exactly. Tasks are laid out anew for each block of steps.
    """

    def __init__(
        self, x_NF: Tensor, part: Part, names: list[str], probability_T: NDArray[np.float64], batch_size: int, seed: int
    ):
        self.x_NF, self.part, self.seed, self.names, self.batch_size = x_NF, part, seed, names, batch_size
        task_R = part.labels.pairs().task_P.numpy()
        self.by_task_R = np.argsort(task_R, kind="stable")
        self.rows_T = np.bincount(task_R, minlength=len(names))
        self.start_T = np.cumsum(self.rows_T) - self.rows_T
        self.key_T = np.array([name_key(name) for name in names], dtype=np.uint64)
        probability_T = np.asarray(probability_T, dtype=np.float64)
        if probability_T.shape != (len(names),) or not (np.isfinite(probability_T) & (probability_T >= 0)).all():
            raise UserError(f"sampler: gave {probability_T!r:.80}, expected {len(names)} numbers >= 0, one for each task")
        self.probability_T = np.where(self.rows_T > 0, probability_T, 0.0)
        if not self.probability_T.any():
            raise UserError("sampler: gave probability 0 to every task with rows, expected some above 0")
        self.probability_T /= self.probability_T.sum()
        self.steps_per_epoch = -(-part.num_rows // batch_size)
        self.cursor_T = np.zeros(len(names), dtype=np.int64)
        self._block: tuple[int, NDArray[np.int64]] | None = None

    def counts(self, step: int) -> NDArray[np.int64]:
        """Rows of each task `[T]` in a step."""
        number = step // _BLOCK
        if self._block is None or self._block[0] != number:
            self._block = number, self._count_block(number)
        return self._block[1][step % _BLOCK]

    def _count_block(self, number: int) -> NDArray[np.int64]:
        generator = np.random.default_rng([self.seed, number])
        layout = generator.permutation(len(self.names))
        edges = np.cumsum(self.probability_T[layout])
        edges[edges >= edges[-1]] = np.inf  # rounding must not draw a task of probability 0 behind the last
        steps = np.arange(number * _BLOCK, (number + 1) * _BLOCK)
        offset_K = (steps * _GOLDEN + np.random.default_rng(self.seed).random()) % 1.0
        point_KB = (np.arange(self.batch_size) + offset_K[:, None]) / self.batch_size
        task_KB = layout[np.searchsorted(edges, point_KB, side="right")]
        flat = task_KB + np.arange(_BLOCK)[:, None] * len(self.names)
        return np.bincount(flat.ravel(), minlength=_BLOCK * len(self.names)).reshape(_BLOCK, len(self.names))

    def batch(self, step: int) -> Batch:
        count_T = self.counts(step)
        active = np.flatnonzero(count_T)
        count_A = count_T[active]
        task_B = np.repeat(active, count_A)
        within_B = np.arange(len(task_B)) - np.repeat(np.cumsum(count_A) - count_A, count_A)
        chosen_B = shuffled(self.seed, self.key_T[task_B], self.cursor_T[task_B] + within_B, self.rows_T[task_B])
        self.cursor_T[active] += count_A
        at_B = self.by_task_R[self.start_T[task_B] + chosen_B]
        return self.part.batch(self.x_NF, torch.from_numpy(at_B))

    def state_dict(self) -> dict[str, Any]:
        return {"cursors": dict(zip(self.names, self.cursor_T.tolist(), strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        cursors = state["cursors"]
        unknown = next((name for name in self.names if name not in cursors), None)
        if unknown is not None:
            raise UserError(f"checkpoint: holds no data position of task '{unknown}'; start a new run")
        self.cursor_T = np.array([cursors[name] for name in self.names], dtype=np.int64)

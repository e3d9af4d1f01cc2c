"""Labels of a part, and of a batch: the same two containers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrain.parallel.shard import Deal


@dataclass(frozen=True)
class Grid:
    """A row may have a label for any task: `y_BT` with NaN = missing; `weight_B` are sample weights."""

    y_BT: Tensor
    weight_B: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return len(self.y_BT)

    @property
    def num_tasks(self) -> int:
        return self.y_BT.shape[1]

    def count_T(self) -> Tensor:
        return (~self.y_BT.isnan()).sum(0)

    def take(self, row_B: Tensor) -> Grid:
        return Grid(self.y_BT[row_B], None if self.weight_B is None else self.weight_B[row_B])

    def split(self, sizes: Sequence[int]) -> list[Grid]:
        """Consecutive pieces of so many rows."""
        weights = [None] * len(sizes) if self.weight_B is None else self.weight_B.split(list(sizes))
        return [Grid(y_BT, weight_B) for y_BT, weight_B in zip(self.y_BT.split(list(sizes)), weights, strict=True)]

    def of_tasks(self, own: NDArray[np.int64]) -> Grid:
        """The labels of some tasks only, which are numbered anew."""
        return replace(self, y_BT=self.y_BT[:, torch.from_numpy(own)])

    def without(self, row_B: NDArray[np.int64]) -> Grid:
        """With no labels in some rows."""
        y_BT = self.y_BT.clone()
        y_BT[torch.from_numpy(row_B)] = torch.nan
        return replace(self, y_BT=y_BT)

    def pairs(self) -> Pairs:
        """The labels that are there, one entry each."""
        row_P, task_P = (~self.y_BT.isnan()).nonzero(as_tuple=True)
        weight_P = None if self.weight_B is None else self.weight_B[row_P]
        return Pairs.of(row_P, task_P, self.y_BT[row_P, task_P], weight_P, *self.y_BT.shape)

    def to(self, device: torch.device) -> Grid:
        return _to(self, device)


@dataclass(frozen=True)
class Pairs:
    """One entry per label, sorted by row: routed data (one label a row) and very sparse grids.

    Row r has the labels `start_R[r]` to `start_R[r + 1]`.
    """

    row_P: Tensor
    task_P: Tensor
    y_P: Tensor
    start_R: Tensor
    num_tasks: int
    weight_P: Tensor | None = None

    @staticmethod
    def of(row_P: Tensor, task_P: Tensor, y_P: Tensor, weight_P: Tensor | None, num_rows: int, num_tasks: int) -> Pairs:
        order = row_P.argsort(stable=True)
        row_P = row_P[order]
        start_R = torch.searchsorted(row_P, torch.arange(num_rows + 1))
        weight_P = None if weight_P is None else weight_P[order]
        return Pairs(row_P, task_P[order], y_P[order], start_R, num_tasks, weight_P)

    @property
    def num_rows(self) -> int:
        return len(self.start_R) - 1

    def count_T(self) -> Tensor:
        return torch.bincount(self.task_P, minlength=self.num_tasks)

    def take(self, row_B: Tensor) -> Pairs:
        first_B = self.start_R[row_B]
        count_B = self.start_R[row_B + 1] - first_B
        start_R = torch.cat([count_B.new_zeros(1), count_B.cumsum(0)])
        # numpy's: torch's repeat_interleave starts threads also for a few rows
        new_row_P = torch.from_numpy(np.repeat(np.arange(len(row_B)), count_B.numpy()))
        at_P = torch.arange(len(new_row_P)) + (first_B - start_R[:-1])[new_row_P]
        return Pairs(
            new_row_P,
            self.task_P[at_P],
            self.y_P[at_P],
            start_R,
            self.num_tasks,
            None if self.weight_P is None else self.weight_P[at_P],
        )

    def split(self, sizes: Sequence[int]) -> list[Pairs]:
        """Consecutive pieces of so many rows."""
        pieces = []
        ends = np.cumsum(sizes).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            first, last = int(self.start_R[start]), int(self.start_R[end])
            pieces.append(
                Pairs(
                    self.row_P[first:last] - start,
                    self.task_P[first:last],
                    self.y_P[first:last],
                    self.start_R[start : end + 1] - first,
                    self.num_tasks,
                    None if self.weight_P is None else self.weight_P[first:last],
                )
            )
        return pieces

    def of_tasks(self, own: NDArray[np.int64]) -> Pairs:
        """The labels of some tasks only, which are numbered anew."""
        new_T = torch.full((self.num_tasks,), -1)
        new_T[torch.from_numpy(own)] = torch.arange(len(own))
        return self._only(new_T[self.task_P] >= 0, new_T[self.task_P], len(own))

    def without(self, row_B: NDArray[np.int64]) -> Pairs:
        """With no labels in some rows."""
        return self._only(~torch.isin(self.row_P, torch.from_numpy(row_B)), self.task_P, self.num_tasks)

    def _only(self, keep_P: Tensor, task_P: Tensor, num_tasks: int) -> Pairs:
        weight_P = None if self.weight_P is None else self.weight_P[keep_P]
        return Pairs.of(self.row_P[keep_P], task_P[keep_P], self.y_P[keep_P], weight_P, self.num_rows, num_tasks)

    def pairs(self) -> Pairs:
        return self

    def grid(self) -> Grid:
        """As a dense matrix; no row may have two labels of one task, or labels of different weights."""
        y_BT = self.y_P.new_full((self.num_rows, self.num_tasks), torch.nan)
        y_BT[self.row_P, self.task_P] = self.y_P
        weight_B = None
        if self.weight_P is not None:
            weight_B = self.weight_P.new_zeros(self.num_rows)
            weight_B[self.row_P] = self.weight_P
        return Grid(y_BT, weight_B)

    def to(self, device: torch.device) -> Pairs:
        return _to(self, device)


Labels = Grid | Pairs


@dataclass(frozen=True)
class Batch:
    """B rows that this rank reads: inputs `x_BF`, row ids (they key dropout), and the task of each where it has one; and the
    labels of the rows that its heads read.

    Those are the same rows, in the same order, or (several ranks) the rows `row_H` of all, as `deal` says.
    """

    x_BF: Tensor
    row_B: Tensor
    labels: Labels
    row_H: Tensor | None = None
    deal: Deal | None = None
    task_B: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return _to(self, device)

    def arguments(self, keys_B: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """What the shared network is called with, `keys_B` for its dropout."""
        if self.task_B is not None:
            return self.x_BF, keys_B, self.task_B
        return (self.x_BF,) if keys_B is None else (self.x_BF, keys_B)


C = TypeVar("C", Grid, Pairs, Batch)


def _to(container: C, device: torch.device) -> C:
    if device.type == "cpu":
        return container
    tensors = {k: v.to(device, non_blocking=True) for k, v in vars(container).items() if isinstance(v, Tensor)}
    labels = {k: v.to(device) for k, v in vars(container).items() if isinstance(v, Grid | Pairs)}
    return replace(container, **tensors, **labels)  # type: ignore[arg-type]

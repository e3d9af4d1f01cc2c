"""Labels of a part by task, and the scores of logits for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrain.data.batch import Grid
from mtrain.data.loader import Part
from mtrain.model.kinds import Kind, Params
from mtrain.tasks import TaskTable
from mtrain.train.evaluate import Counted

BUDGET = 256e6  # bytes of what a chunk of tasks takes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TaskRows:
    """Labels sorted by task: input row, task, label, and sample weight of each; `original_P` in the user's units.

    row_R: the input rows of the part; `place_P` says which of them a label's is.
    is_grid: no task has two labels on one row.
    """

    row_R: Tensor
    place_P: Tensor
    task_P: Tensor
    y_P: Tensor
    weight_P: Tensor
    original_P: Floats | None
    num_tasks: int
    is_grid: bool

    @staticmethod
    def of(part: Part) -> TaskRows:
        pairs = part.labels.pairs()
        order = pairs.task_P.argsort(stable=True)
        weight_P = torch.ones(len(order)) if pairs.weight_P is None else pairs.weight_P[order]
        original_P = None if part.original is None else part.original.pairs().y_P[order].double().numpy()
        labels = (pairs.row_P[order], pairs.task_P[order], pairs.y_P[order].float(), weight_P.float(), original_P)
        return TaskRows(part.row_R, *labels, pairs.num_tasks, isinstance(part.labels, Grid))

    @property
    def row_P(self) -> Tensor:
        return self.row_R[self.place_P]

    @property
    def count_T(self) -> Tensor:
        return torch.bincount(self.task_P, minlength=self.num_tasks)

    def at(self, task_A: Ints) -> Tensor:
        """Which labels are of some tasks, in the order of these."""
        count_T = self.count_T
        start_T, count_A = count_T.cumsum(0) - count_T, count_T[task_A]
        first_A = count_A.cumsum(0) - count_A
        return torch.arange(int(count_A.sum())) + (start_T[task_A] - first_A).repeat_interleave(count_A)

    def take(self, task_A: Ints) -> TaskRows:
        """The labels of some tasks, which are numbered anew."""
        at = self.at(task_A)
        return replace(
            self,
            place_P=self.place_P[at],
            task_P=torch.arange(len(task_A)).repeat_interleave(self.count_T[task_A]),
            y_P=self.y_P[at],
            weight_P=self.weight_P[at],
            original_P=None if self.original_P is None else self.original_P[at.numpy()],
            num_tasks=len(task_A),
        )

    def padded(self) -> tuple[Tensor, Tensor]:
        """For each task its labels' places in the order of labels `[T, R]`, and which of them are there."""
        count_T = self.count_T
        slot_R = torch.arange(int(count_T.max()))
        present_TR = slot_R < count_T[:, None]
        return torch.where(present_TR, (count_T.cumsum(0) - count_T)[:, None] + slot_R, 0), present_TR


def task_groups(tasks: TaskTable, same_classes: bool = False) -> list[tuple[Kind, int, Ints]]:
    """Kind, number of outputs and tasks of each group that has them in common, and if asked for the classes' names."""
    found: dict[Any, list[int]] = {}
    for t, task in enumerate(tasks):
        found.setdefault((task.kind, task.num_outputs, task.classes if same_classes else ()), []).append(t)
    return [(kind, outputs, np.array(own)) for (kind, outputs, _), own in found.items()]


def chunks(rows: TaskRows, task_A: Ints, bytes_per_label: float, bytes_per_task: float = 0.0) -> Iterator[Ints]:
    """Tasks of similar size together, the largest first, so many that they take at most `BUDGET`."""
    count_A = rows.count_T.numpy()[task_A]
    left = task_A[np.argsort(-count_A, kind="stable")]
    count_T = rows.count_T.numpy()
    while len(left):
        size = max(1, int(BUDGET / (count_T[left[0]] * bytes_per_label + bytes_per_task + 1)))
        yield left[:size]
        left = left[size:]


def in_chunks(count: int) -> str:
    return "all at once" if count == 1 else f"in {count} chunks"


def constant_logits(tasks: TaskTable) -> Tensor:
    """Of each task's best constant predictor, `[T, O]`; 0 for a task without training labels."""
    constant_TO = np.zeros((len(tasks), int(tasks.num_outputs_T.max())), dtype=np.float32)
    for row, logits in zip(constant_TO, tasks.stats["constant"], strict=True):
        row[: len(logits)] = np.nan_to_num(logits)
    return torch.from_numpy(constant_TO)


def kind_params(kind: Kind, tasks: TaskTable, task: Tensor | slice = slice(None)) -> Params:
    """What a kind's functions need of each task, or of the task of each label."""
    found = {name: torch.tensor(tasks.stats[name], dtype=torch.float32)[task] for name in kind.param_names}
    return found | {"num_outputs": torch.tensor(tasks.num_outputs_T)[task]}


def count(tasks: TaskTable, rows: TaskRows, logits_PO: Tensor) -> Counted:
    """What logits, a row for each label, give: for `mtrain.train.evaluate.scores_of` and `predictions`."""
    deviance_T, constant_T = np.zeros((2, len(tasks)))
    collected: dict[str, list[tuple[NDArray[Any], ...]]] = defaultdict(list)
    constant_TO = constant_logits(tasks)
    for kind, own in tasks.by_kind().items():
        at = rows.at(own)
        if not len(at):
            continue
        task_P, y_P, width = rows.task_P[at], rows.y_P[at], int(tasks.num_outputs_T[own].max())
        params, logits = kind_params(kind, tasks, task_P), logits_PO[at, :width].float()
        task = task_P.numpy()
        each = [kind.deviances(of, y_P, params).double().numpy() for of in (logits, constant_TO[task_P, :width])]
        for total_T, deviance_P in zip((deviance_T, constant_T), each, strict=True):
            total_T += np.bincount(task, deviance_P, len(tasks))
        prediction = kind.predict(logits, params)
        pred_P = (prediction if kind.family == "multiclass" else kind.point(prediction)).double().numpy()
        label_P = y_P.double().numpy()
        if kind.standardized:
            pred_P = pred_P * tasks.stats["scale"][task] + tasks.stats["center"][task]
            assert rows.original_P is not None
            label_P = rows.original_P[at.numpy()]
        collected[kind.family].append((task, rows.row_P[at].numpy(), label_P, pred_P, *each))
    return Counted(deviance_T, constant_T, rows.count_T.numpy(), dict(collected))

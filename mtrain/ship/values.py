"""A loaded model as one function from rows to the numbers that a person reads."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mtrain.model.kinds import Kind, Quantile
from mtrain.ship.calibrate import LARGEST, PARAMETERS, SMALLEST, Calibration
from mtrain.ship.columns import Output
from mtrain.tasks import Task, TaskTable
from mtrain.train.evaluate import EVAL_ROWS, Evaluator


def output_of(task: Task) -> Output:
    """The numbers that a model gives for a task."""
    names = [task.name]
    if task.kind.has_classes:
        names = [f"{task.name}={label}" for label in task.classes]
    elif isinstance(task.kind, Quantile):
        names += [f"{task.name}@{level:g}" for level in task.kind.levels]
    return Output(task.name, task.kind.name, tuple(names), task.classes if task.kind.has_classes else ())


class Values(nn.Module):
    """Rows `x_BF` to the numbers `[B, V]` of all tasks, float64: values in original units, probabilities, mean counts.

    Where the trunk reads each row's task (`takes_tasks`), `task_B` says it (-1: none), and the numbers of others are NaN.

    Args:
        evaluator: of the model, its heads and all its tasks.
        width: of the inputs.
        calibration: of the tasks' probabilities; None: as the model gives them.

    Attributes:
        outputs: what the V numbers are, task by task.
        takes_tasks: whether the trunk reads each row's task; the numbers for other tasks are then NaN.
    """

    place_V: Tensor
    slope: Tensor
    intercept: Tensor
    temperature: Tensor

    def __init__(self, evaluator: Evaluator, width: int, calibration: Calibration | None = None):
        super().__init__()
        self.shared, self.bank = evaluator.model.eval(), evaluator.bank.eval()
        self._evaluator = evaluator
        tasks: TaskTable = evaluator.tasks
        self.outputs = [output_of(task) for task in tasks]
        self.calibrated = calibration is not None
        parameters = (calibration or Calibration.none(tasks.names)).of(tasks.names)
        for name in PARAMETERS:
            self.register_buffer(name, torch.tensor(getattr(parameters, name)), persistent=False)
        places: dict[int, range] = {}
        start = 0
        self.takes_tasks: bool = getattr(self.shared, "takes_tasks", False)
        with torch.no_grad():
            none = torch.zeros(1, dtype=torch.int64) if self.takes_tasks else None
            for task_A, value_BAW in self._blocks(self.shared(torch.zeros(1, width), None, none)):
                for a, t in enumerate(task_A.tolist()):
                    first = start + a * value_BAW.shape[2]
                    places[t] = range(first, first + len(self.outputs[t].values))
                start += value_BAW[0].numel()
        self.register_buffer("place_V", torch.tensor([place for t in range(len(tasks)) for place in places[t]]))

    def forward(self, x_BF: Tensor, task_B: Tensor | None = None) -> Tensor:
        z_BD = self.shared(x_BF) if task_B is None else self.shared(x_BF, None, task_B.clamp(min=0))
        blocks = [value_BAW.flatten(1) for _, value_BAW in self._blocks(z_BD)]
        value_BV = torch.cat(blocks, 1).index_select(1, self.place_V)
        if task_B is None:
            return value_BV
        sizes = torch.tensor([len(output.values) for output in self.outputs], device=task_B.device)
        task_V = torch.arange(len(sizes), device=task_B.device).repeat_interleave(sizes)
        return torch.where(task_V == task_B[:, None], value_BV, torch.nan)

    @torch.no_grad()
    def all_rows(self, x_NF: Tensor, task_N: Tensor | None = None) -> Tensor:
        """The numbers of many rows, some at a time."""
        tasks = [None] * len(x_NF) if task_N is None else task_N.split(EVAL_ROWS)
        return torch.cat([self(x_BF, task_B) for x_BF, task_B in zip(x_NF.split(EVAL_ROWS), tasks, strict=False)])

    def _blocks(self, z_BD: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Of each head group the tasks `[A]` and their numbers `[B, A, W]`, padded to the largest task."""
        for kind, task_A, value_BAO in self._evaluator.predict(z_BD.float()):
            yield task_A, self._numbers(kind, task_A, value_BAO)

    def _numbers(self, kind: Kind, task_A: Tensor, value_BAO: Tensor) -> Tensor:
        if kind.has_classes:
            return (value_BAO.log() / self.temperature[task_A, None]).softmax(-1) if self.calibrated else value_BAO
        point_BA1 = kind.point(value_BAO).unsqueeze(-1)
        if self.calibrated and kind.family == "binary":
            p = point_BA1.clamp(SMALLEST, LARGEST)
            return (self.slope[task_A, None] * (p.log() - (-p).log1p()) + self.intercept[task_A, None]).sigmoid()
        return torch.cat([point_BA1, value_BAO], -1) if isinstance(kind, Quantile) else point_BA1

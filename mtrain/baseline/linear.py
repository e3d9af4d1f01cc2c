"""Linear models of all tasks: ridge regression where the loss is a squared error, else the kind's own loss with the same
penalty (logistic, softmax, Poisson, ... regression), batched over tasks.

A penalty p means what it means in scikit-learn: `sum of squared errors + p |w|^2`, and `sum of losses + p / 2 |w|^2`, which is
its `C = 1 / p`. Biases are not penalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from mtrain.baseline.lbfgs import minimize
from mtrain.baseline.problem import Fitted, Problem
from mtrain.baseline.rows import Floats, Ints, TaskRows, chunks, constant_logits, count, in_chunks, kind_params, task_groups
from mtrain.model.kinds import Kind, Params, Regression
from mtrain.report.progress import ShownProgress
from mtrain.report.say import say
from mtrain.tasks import TaskTable
from mtrain.train.evaluate import SKILL_FLOOR, scores_of

PENALTIES = np.logspace(4, -1, 11)
ALONE = 30  # validation labels from which on a task's penalty is chosen by them alone
UNTUNED = 5  # number of the penalty where there is no validation label: about 32
DENSE = 0.2  # share of a grid's cells with a label from which on all of its rows are computed with

Solver = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a penalty for each task `[A]` to weights `[A, O, F]` (`[1, O, F]`: the same for all tasks) and biases `[A, O]`."""


def fit_linear(problem: Problem, console: Console, pooled: bool) -> Fitted:
    """Linear models, with penalties chosen by the skill on the validation part. Says what it does, and how far it is.

    Args:
        pooled: one model for all tasks: where rows belong to tasks (or to pairs) one weight for all of a kind, with a bias for
            each; of a grid, where a row has all tasks, one linear model with many outputs, which have one penalty. Without it
            each task has weights of its own, and with `ALONE` validation labels a penalty of its own.
    """
    tasks, rows = problem.tasks, problem.rows
    shared = pooled and problem.config.data.layout != "grid"
    skill_TL = np.full((len(tasks), len(PENALTIES)), np.nan)
    blocks, learnt = list(_blocks(problem, shared)), sources(problem)
    name, penalties = "pooled" if pooled else "linear", len(PENALTIES) if "valid" in rows else 0
    say(console, f"{name}: {len(tasks)} tasks, {in_chunks(len(blocks))}, {penalties} penalties to choose from")
    fits, done = len(blocks) * (penalties + len(learnt)), 0
    logits = {part: torch.zeros(len(rows[part].y_P), int(tasks.num_outputs_T.max())) for part in problem.scored}
    parameters = 0
    with ShownProgress(console, name, 0, fits, "fit {:,} of {:,}") as progress:
        if "valid" in rows:
            for kind, own in blocks:
                solve = _solver(problem, "train", kind, own, shared)
                some_tasks, some_rows = tasks.take(own), rows["valid"].take(own)
                for number, penalty in enumerate(PENALTIES):
                    logits_PO = logits_of(
                        problem.x_NF, some_rows, *solve(torch.full((len(own),), penalty, dtype=torch.float64))
                    )
                    skill_TL[own, number] = _skill(some_tasks, some_rows, logits_PO)
                    progress.show(done := done + 1)
        alone_T = np.zeros(len(tasks), dtype=bool)
        if "valid" in rows and not pooled:
            alone_T = rows["valid"].count_T.numpy() >= ALONE
        chosen_T = _choose(skill_TL, [own for _, own in blocks] if shared else [np.arange(len(tasks))], alone_T)
        for kind, own in blocks:
            penalty_A = torch.from_numpy(PENALTIES[chosen_T[own]])
            for source, parts in learnt.items():
                weight, bias_AO = _solver(problem, source, kind, own, shared)(penalty_A)
                for part in parts:
                    found_PO = logits_of(problem.x_NF, rows[part].take(own), weight, bias_AO)
                    logits[part][rows[part].at(own), : found_PO.shape[1]] = found_PO
                progress.show(done := done + 1)
            parameters += weight.numel() + bias_AO.numel()
    return Fitted(logits, {"penalty": PENALTIES[chosen_T]}, parameters)


def sources(problem: Problem) -> dict[str, list[str]]:
    """Which labels to learn from for which parts."""
    if not problem.config.split.refit:
        return {"train": problem.scored}
    return {"train": ["valid"], "final": ["test"]} if "test" in problem.scored else {"train": ["valid"]}


def _blocks(problem: Problem, shared: bool) -> Iterator[tuple[Kind, Ints]]:
    """Tasks that are solved together."""
    rows, width = problem.rows["final"], problem.x_NF.shape[1]
    for kind, outputs, own in task_groups(problem.tasks, same_classes=shared):
        if shared:
            yield kind, own
            continue
        cells = 32.0 * outputs
        if not _all_rows(rows, own, kind):
            cells += 8.0 * width
        ridge = 24.0 * width**2 if is_ridge(kind) else 0.0
        for some in chunks(rows, own, cells, ridge):
            yield kind, some


def is_ridge(kind: Kind) -> bool:
    return isinstance(kind, Regression) and kind.loss == "mse"


def _all_rows(rows: TaskRows, own: Ints, kind: Kind) -> bool:
    """Whether tasks are solved on all rows of a part, with labels missing, and not each on a copy of its own."""
    share = rows.count_T[own].double() / len(rows.row_R)
    return rows.is_grid and bool(share.min() == 1 if is_ridge(kind) else share.mean() >= DENSE)


def _choose(skill_TL: Floats, groups: list[Ints], alone_T: NDArray[np.bool_]) -> Ints:
    """The best penalty of a task in `alone_T` that can be scored; else the one with the best mean over its group."""
    chosen_T = np.full(len(skill_TL), UNTUNED)
    scored_T = np.isfinite(skill_TL[:, 0])
    for own in groups:
        scored = own[scored_T[own]]
        if len(scored):
            chosen_T[own] = np.maximum(skill_TL[scored], SKILL_FLOOR).mean(0).argmax()
    alone = np.flatnonzero(alone_T & scored_T)
    chosen_T[alone] = skill_TL[alone].argmax(1)
    return chosen_T


def _skill(tasks: TaskTable, rows: TaskRows, logits_PO: Tensor) -> Floats:
    return scores_of([count(tasks, rows, logits_PO)], tasks, 1, only=()).per_task["skill"]


def logits_of(x_NF: Tensor, rows: TaskRows, weight: Tensor, bias_AO: Tensor) -> Tensor:
    """Logits `[P, O]` of linear models for labels."""
    weight, bias_AO = weight.float(), bias_AO.float()
    if len(weight) == 1:
        blocks = [x_NF[row_P] @ weight[0].T for row_P in rows.row_P.split(1 << 15)]
        return torch.cat(blocks) + bias_AO[rows.task_P]
    logits_PO = torch.zeros(len(rows.y_P), bias_AO.shape[1])
    for own in chunks(rows, np.arange(rows.num_tasks), 4.0 * x_NF.shape[1]):
        some = rows.take(own)
        at_AR, present_AR = some.padded()
        if not present_AR.any():
            continue
        x_ARF = x_NF[some.row_P[at_AR]]
        logits_ARO = torch.baddbmm(bias_AO[own, None], x_ARF, weight[own].mT)
        logits_PO[rows.at(own)] = logits_ARO[present_AR]
    return logits_PO


def _solver(problem: Problem, source: str, kind: Kind, own: Ints, shared: bool) -> Solver:
    """What fits the tasks `own` to the labels of `source`."""
    tasks, every = problem.tasks.take(own), problem.rows[source]
    rows = every.take(own)
    if shared:
        x_PF = problem.x_NF[rows.row_P].double()
        y_P, weight_P = rows.y_P.double(), rows.weight_P.double()
        if is_ridge(kind):
            return _shared_ridge(x_PF, y_P, weight_P, rows.task_P, rows.num_tasks)
        params = kind_params(kind, tasks, rows.task_P)
        return _SharedLosses(kind, params, x_PF, y_P, weight_P, rows.task_P, constant_logits(tasks))
    if _all_rows(every, own, kind):
        x = problem.x_NF[rows.row_R].double()
        y_AR = torch.zeros(rows.num_tasks, len(x), dtype=torch.float64)
        weight_AR = torch.zeros_like(y_AR)
        y_AR[rows.task_P, rows.place_P] = rows.y_P.double()
        weight_AR[rows.task_P, rows.place_P] = rows.weight_P.double()
    else:
        at_AR, present_AR = rows.padded()
        if not present_AR.any():
            return lambda penalty_A: (torch.zeros(len(own), *_shape(tasks, problem)), constant_logits(tasks).double())
        x = problem.x_NF[rows.row_P[at_AR]].double()
        y_AR = torch.where(present_AR, rows.y_P[at_AR], 0).double()
        weight_AR = torch.where(present_AR, rows.weight_P[at_AR], 0).double()
    if is_ridge(kind):
        return ridge(x if x.dim() == 3 else x[None], y_AR, weight_AR)
    return _Losses(kind, kind_params(kind, tasks), x, y_AR, weight_AR, constant_logits(tasks))


def _shape(tasks: TaskTable, problem: Problem) -> tuple[int, int]:
    return int(tasks.num_outputs_T.max()), problem.x_NF.shape[1]


def ridge(x: Tensor, y_AR: Tensor, weight_AR: Tensor) -> Solver:
    """Ridge regressions of A tasks, in closed form by one eigendecomposition for all penalties.

    Args:
        x: `[A, R, F]`, or `[1, R, F]` where all tasks have all rows, with the same weights.
        weight_AR: of each label; 0 where there is none.
    """
    weight = weight_AR[: len(x), :, None]
    total = weight.sum(1, keepdim=True).clamp(min=1e-300)
    x_mean = (x * weight).sum(1, keepdim=True) / total
    y_mean_A = ((y_AR * weight_AR).sum(1, keepdim=True) / total[:, 0])[:, 0]
    centered = (x - x_mean) * weight.sqrt()
    y_A1R = ((y_AR - y_mean_A[:, None]) * weight_AR.sqrt())[:, None]
    wide = centered.shape[1] < centered.shape[2]
    value, vector = torch.linalg.eigh(centered @ centered.mT if wide else centered.mT @ centered)
    seen = (y_A1R if wide else y_A1R @ centered) @ vector  # [A, 1, min(R, F)]

    def solve(penalty_A: Tensor) -> tuple[Tensor, Tensor]:
        found = (seen / (value.clamp(min=0) + penalty_A[:, None])[:, None]) @ vector.mT
        weight_A1F = found @ centered if wide else found
        return weight_A1F, y_mean_A[:, None] - (weight_A1F * x_mean).sum(2)

    return solve


def _shared_ridge(x_PF: Tensor, y_P: Tensor, weight_P: Tensor, task_P: Tensor, num_tasks: int) -> Solver:
    """One weight for all tasks and a bias for each: a ridge regression of what is centred within tasks."""

    def sum_T(value: Tensor) -> Tensor:
        return torch.zeros(num_tasks, *value.shape[1:], dtype=value.dtype).index_add_(0, task_P, value)

    total_T = sum_T(weight_P).clamp(min=1e-300)
    x_mean_TF = sum_T(x_PF * weight_P[:, None]) / total_T[:, None]
    y_mean_T = sum_T(y_P * weight_P) / total_T
    one = ridge((x_PF - x_mean_TF[task_P])[None], (y_P - y_mean_T[task_P])[None], weight_P[None])

    def solve(penalty_A: Tensor) -> tuple[Tensor, Tensor]:
        weight, _ = one(penalty_A[:1])
        return weight, (y_mean_T - x_mean_TF @ weight[0, 0])[:, None]

    return solve


def _doubles(params: Params) -> Params:
    return {name: value.double() if value.is_floating_point() else value for name, value in params.items()}


class _Losses:
    """Each task's own weights and bias by its kind's losses; each penalty starts from the result of the last."""

    def __init__(self, kind: Kind, params: Params, x: Tensor, y_AR: Tensor, weight_AR: Tensor, start_AO: Tensor):
        self.kind, self.x, self.y_AR, self.weight_AR = kind, x, y_AR, weight_AR
        self.params = {name: value_A[:, None] for name, value_A in _doubles(params).items()}
        self.outputs = start_AO.shape[1]
        weights = torch.zeros(len(start_AO), self.outputs * x.shape[-1], dtype=torch.float64)
        self.at_AD = torch.cat([weights, start_AO.double()], 1)

    def split(self, at_AD: Tensor) -> tuple[Tensor, Tensor]:
        return at_AD[:, : -self.outputs].unflatten(1, (self.outputs, -1)), at_AD[:, -self.outputs :]

    def __call__(self, penalty_A: Tensor) -> tuple[Tensor, Tensor]:
        def value(at_AD: Tensor) -> Tensor:
            weight_AOF, bias_AO = self.split(at_AD)
            loss_AR = self.kind.losses(self.x @ weight_AOF.mT + bias_AO[:, None], self.y_AR, self.params)
            loss_AR = torch.where(self.weight_AR > 0, loss_AR * self.weight_AR, 0)
            return loss_AR.sum(1) + penalty_A / 2 * weight_AOF.square().sum((1, 2))

        self.at_AD = minimize(value, self.at_AD)
        return self.split(self.at_AD)


class _SharedLosses:
    """The same with one weight for all tasks."""

    def __init__(
        self,
        kind: Kind,
        params: Params,
        x_PF: Tensor,
        y_P: Tensor,
        weight_P: Tensor,
        task_P: Tensor,
        start_TO: Tensor,
    ):
        self.kind, self.params, self.task_P = kind, _doubles(params), task_P
        self.x_PF, self.y_P, self.weight_P = x_PF, y_P, weight_P
        self.tasks, self.outputs = start_TO.shape
        weights = torch.zeros(self.outputs * x_PF.shape[1], dtype=torch.float64)
        self.at_1D = torch.cat([weights, start_TO.double().flatten()])[None]

    def split(self, at_1D: Tensor) -> tuple[Tensor, Tensor]:
        biases = self.tasks * self.outputs
        weight_1OF = at_1D[:, :-biases].unflatten(1, (self.outputs, -1))
        return weight_1OF, at_1D[0, -biases:].view(self.tasks, self.outputs)

    def __call__(self, penalty_A: Tensor) -> tuple[Tensor, Tensor]:
        def value(at_1D: Tensor) -> Tensor:
            weight_1OF, bias_TO = self.split(at_1D)
            loss_P = self.kind.losses(self.x_PF @ weight_1OF[0].mT + bias_TO[self.task_P], self.y_P, self.params)
            return (loss_P * self.weight_P).sum()[None] + penalty_A[0] / 2 * weight_1OF.square().sum()

        self.at_1D = minimize(value, self.at_1D)
        return self.split(self.at_1D)

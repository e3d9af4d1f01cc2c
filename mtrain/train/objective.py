"""The objective: from logits and labels to losses per task, and to the gradient at the logits.

J = 1/N * sum over labels of  weight * w_t * share_t * loss / scale_t        N = labels in the global batch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrain.config import ObjectiveConfig
from mtrain.data.batch import Grid, Labels
from mtrain.model.heads import HeadBank, HeadGroup, Route
from mtrain.model.kinds import Kind, Params
from mtrain.tasks import TaskTable

SCALE_FLOOR = 1e-3  # a task whose constant predictor is almost perfect does not get an endless weight


@dataclass(frozen=True)
class Piece:
    """The labels of one head group in a batch, with the logits for them.

    Grid: logits `[B, A, O]`, labels `[B, A]` with NaN = missing, and where they are `present`. Routed and pairs: logits
    `[P, O]`, labels `[P]`, sorted by task, and `slot_P` says which of the A active tasks a label belongs to.
    `active_A` are the tasks' places in the group, on the CPU, as the optimizer wants them; None: all.

    `tap` is where all paths from z to the heads pass, once for each task: the first layer of a grid `[A * H, B]`, the padded
    rows `[N, D]` of a route.
    """

    number: int
    group: HeadGroup
    task_A: Tensor
    active_A: Tensor | None
    params: Sequence[Tensor]
    logits: Tensor
    y: Tensor
    weight: Tensor | None
    slot_P: Tensor | None
    present: Tensor | None
    tap: Tensor
    route: Route | None = None

    @property
    def behind_tap(self) -> Sequence[Tensor]:
        """The parameters between tap and logits."""
        if self.route is not None:
            return self.params
        layers = len(self.group.weights)
        return [p for i, p in enumerate(self.params) if i % layers]

    def scale_tap(self, grad: Tensor, weight_T: Tensor) -> Tensor:
        """A gradient at the tap, times each task's weight."""
        if self.route is None:
            return (grad.view(len(self.task_A), -1) * weight_T[self.task_A].to(grad.dtype)[:, None]).view(grad.shape)
        task_N = self.group.task_ids[self.route.padded_head_N] % len(weight_T)
        return grad * weight_T[task_N].to(grad.dtype)[:, None]

    def count_A(self) -> Tensor:
        """Labels of each active task."""
        return self.sum(torch.ones_like(self.y) if self.present is None else self.present)

    def sum(self, value: Tensor) -> Tensor:
        """Per active task, a value per label that is 0 where the label is missing."""
        if self.slot_P is None:
            return value.sum(0)
        return value.new_zeros(len(self.task_A)).index_add_(0, self.slot_P, value)

    def spread(self, value_A: Tensor) -> Tensor:
        """A value per active task, in a shape that broadcasts against the labels."""
        return value_A if self.slot_P is None else value_A[self.slot_P]


def routes(bank: HeadBank, labels: Labels) -> list[Route]:
    """Which heads the labels of a batch need; computed on the CPU, before the batch moves to the device."""
    if isinstance(labels, Grid) or not bank.names:
        return []
    members = len(bank.names) // labels.num_tasks
    offset_M1 = torch.arange(members).unsqueeze(1) * labels.num_tasks
    return bank.route((labels.task_P + offset_M1).flatten(), labels.row_P.repeat(members))


def pieces(
    bank: HeadBank,
    z_BD: Tensor,
    labels: Labels,
    routes: list[Route],
    keys_B: Tensor | None = None,
    tapped: bool = False,
) -> Iterator[Piece]:
    """Run the heads that a batch's labels need: grid kernels for grids, routed kernels for pairs. `tapped`: gradients at taps
    will be asked for.

    Each member of an ensemble (`z` is `[B, M, D]`) has its own heads: head t of member m is number m * T + t of the bank.
    """
    num_tasks = labels.num_tasks

    def of_member(number: int) -> tuple[Tensor, int]:
        member = int(bank.ids[number][0]) // num_tasks
        return (z_BD if z_BD.dim() == 2 else z_BD[:, member]), member * num_tasks

    if isinstance(labels, Grid):
        weight = None if labels.weight_B is None else labels.weight_B[:, None]
        y_TB = labels.y_BT.t().contiguous()  # as the grid kernel lays out its logits: element-wise passes are then fast
        for number, group in enumerate(bank.groups):
            if not group.names:
                continue
            z, first = of_member(number)
            task_A = group.task_ids - first
            y = (y_TB if len(task_A) == num_tasks else y_TB[task_A]).t()
            stacks = list(group.parameters())
            tap = group.grid_first(z, stacks)
            x = tap.clone() if tapped and len(group.weights) > 1 else tap  # activations work in place
            logits = group.grid_rest(x, stacks, keys_B, slice(None))
            yield Piece(number, group, task_A, None, stacks, logits, y, weight, None, ~y.isnan(), tap)
        return
    for planned in routes:
        z, first = of_member(planned.group)
        route = planned.to(z.device)
        group = bank.groups[route.group]
        params = group.gather(route.active_A)
        tap = group.routed_first(z, route)
        yield Piece(
            route.group,
            group,
            route.task_A - first,
            planned.active_A,
            params,
            group.routed_rest(tap, route, params, keys_B),
            labels.y_P[route.label_P % len(labels.y_P)],
            None if labels.weight_P is None else labels.weight_P[route.label_P % len(labels.y_P)],
            route.slot_P,
            None,
            tap,
            route,
        )


class Objective:
    """Kinds and their parameters of all tasks, as tensors on the device.

    Args:
        tasks: of the bank's heads, with their training statistics.
        bank: its groups are of one kind each.
    """

    def __init__(
        self,
        tasks: TaskTable,
        bank: HeadBank,
        device: torch.device,
    ):
        self.kinds: dict[HeadGroup, Kind] = {
            group: tasks[int(group.task_ids[0]) % len(tasks)].kind for group in bank.groups if group.names
        }
        names = {name for kind in self.kinds.values() for name in kind.param_names}
        self.params_T = {name: torch.tensor(tasks.stats[name], dtype=torch.float32, device=device) for name in names}
        self.params_T["num_outputs"] = torch.tensor(tasks.num_outputs_T, device=device)

    def params(self, piece: Piece) -> Params:
        names = ("num_outputs", *self.kinds[piece.group].param_names)
        return {name: piece.spread(self.params_T[name][piece.task_A]) for name in names}

    def losses(self, piece: Piece) -> Tensor:
        """Weighted loss of each label; 0, with a gradient of 0, where it is missing."""
        return self._each(piece, self.kinds[piece.group].losses)

    def deviances(self, piece: Piece) -> Tensor:
        """Deviance of each label, unweighted; 0 where it is missing."""
        return self._each(piece, self.kinds[piece.group].deviances, weighted=False)

    def predict(self, piece: Piece) -> Tensor:
        return self.kinds[piece.group].predict(piece.logits.float(), self.params(piece))

    def _each(self, piece: Piece, function: Any, weighted: bool = True) -> Tensor:
        logits, y, present = piece.logits.float(), piece.y, piece.present
        if present is not None:  # no value or gradient of a missing label is looked at, so none can be NaN
            y = torch.where(present, y, 0)
            logits = torch.where(present.unsqueeze(-1), logits, 0)
        value = function(logits, y, self.params(piece))
        if weighted and piece.weight is not None:
            value = value * piece.weight
        return value if present is None else torch.where(present, value, 0)


def coefficients(tasks: TaskTable, config: ObjectiveConfig, sampling_T: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """weight_t * share_t / scale_t of each task, `[T]`; 0 for tasks without training labels."""
    count_T = tasks.stats["train_labels"].astype(np.float64)
    share_T = np.ones(len(tasks))
    if config.share == "tasks":
        probability_T = count_T / count_T.sum() if sampling_T is None else sampling_T
        with np.errstate(divide="ignore"):
            share_T = np.where(probability_T > 0, 1 / (probability_T * np.count_nonzero(probability_T)), 0.0)
    scale_T = np.ones(len(tasks))
    if config.scale != "none":
        scale_T = tasks.stats["typical_loss" if config.scale == "kind" else "constant_loss"]
        scale_T = np.maximum(np.nan_to_num(scale_T, nan=1.0), SCALE_FLOOR)
    return np.where(count_T > 0, tasks.weight_T * share_T / scale_T, 0.0)


def expected_share(tasks: TaskTable, config: ObjectiveConfig, sampling_T: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Expected share `[T]` of each task in the objective: sampling x share x weight, summing to 1."""
    count_T = tasks.stats["train_labels"].astype(np.float64)
    sampled_T = count_T / count_T.sum() if sampling_T is None else sampling_T
    share_T = coefficients(tasks, config.model_copy(update={"scale": "none"}), sampling_T) * sampled_T
    return share_T / share_T.sum()

"""The objective: from logits and labels to losses per task, and to the gradient at the logits.

J = 1/N * sum over labels of  weight * w_t * share_t * loss / scale_t        N = labels in the global batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrain.config import ObjectiveConfig
from mtrain.data.batch import Grid, Labels
from mtrain.model.heads import HeadBank, HeadGroup
from mtrain.model.kinds import Kind, Params
from mtrain.model.routes import Route
from mtrain.tasks import TaskTable

SCALE_FLOOR = 1e-3  # a task whose constant predictor is almost perfect does not get an endless weight


@dataclass(frozen=True)
class Piece:
    """The labels of one head group in a batch, with the logits for them.

    Grid: logits `[B, A, O]`, labels `[B, A]` with NaN = missing, and where they are `present`. Routed and pairs: logits
    `[P, O]`, labels `[P]`, sorted by task, and `slot_P` says which of the A active tasks a label belongs to.
    `active_A` are the tasks' places in the group, on the CPU, as the optimizer wants them; None: all.

    `tap` is where all paths from z to the heads pass, once for each task: the first layer of a grid `[A * H, B]`, the padded
    rows `[N, D]` of a route. (Heads that read other heads' logits have further paths.)

    `children_A` says which tasks' logits are read by a head that has labels in the batch; None: none.
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
    children_A: Tensor | None = None

    @property
    def behind_tap(self) -> Sequence[Tensor]:
        """The parameters between tap and logits."""
        if self.route is not None:
            return self.params
        layers = len(self.group.weights)
        return [p for i, p in enumerate(self.params[: 2 * layers]) if i % layers]

    def scale_tap_(self, grad: Tensor, weight_T: Tensor) -> None:
        """Multiply a gradient at the tap by each task's weight."""
        if self.route is None:
            grad.view(len(self.task_A), -1).mul_(weight_T[self.task_A].to(grad.dtype)[:, None])
            return
        task_N = self.group.task_ids[self.route.padded_head_N] % len(weight_T)
        grad.mul_(weight_T[task_N].to(grad.dtype)[:, None])

    def count_A(self) -> Tensor:
        """Labels of each active task."""
        return self.sum(torch.ones_like(self.y) if self.present is None else self.present)

    def has_gradient_A(self, count_A: Tensor) -> Tensor:
        """Which tasks' heads have a gradient: by `count_A` labels of their own, or of a head that reads their logits."""
        own_A = count_A > 0
        return own_A if self.children_A is None else own_A | self.children_A

    def sum(self, value: Tensor) -> Tensor:
        """Per active task, a value per label that is 0 where the label is missing."""
        if self.slot_P is None:
            return value.sum(0)
        return value.new_zeros(len(self.task_A)).index_add_(0, self.slot_P, value)

    def spread(self, value_A: Tensor) -> Tensor:
        """A value per active task, in a shape that broadcasts against the labels."""
        return value_A if self.slot_P is None else value_A[self.slot_P]


@dataclass(frozen=True)
class PieceLoss:
    """The losses of a piece's A tasks, and the gradient of their sum at its logits."""

    piece: Piece
    sum_A: Tensor
    count_A: Tensor
    finite_A: Tensor
    grad: Tensor


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
) -> list[Piece]:
    """Run the heads that a batch's labels need: grid kernels for grids, routed kernels for pairs; in the order of groups.
    `tapped`: gradients at taps will be asked for.

    Each member of an ensemble (`z` is `[B, M, D]`) has its own heads: head t of member m is number m * T + t of the bank.
    """
    num_tasks = labels.num_tasks

    def of_member(number: int) -> tuple[Tensor, int]:
        member = bank.first_ids[number] // num_tasks
        return (z_BD if z_BD.dim() == 2 else z_BD[:, member]), member * num_tasks

    found: dict[int, Piece] = {}
    if isinstance(labels, Grid):
        weight = None if labels.weight_B is None else labels.weight_B[:, None]
        y_TB = labels.y_BT.t().contiguous()  # as the grid kernel lays out its logits: element-wise passes are then fast
        logits: dict[int, Tensor] = {}
        for number in bank.order:
            group = bank.groups[number]
            if not group.names:
                continue
            z, first = of_member(number)
            task_A = group.task_ids - first
            y = (y_TB if len(task_A) == num_tasks else y_TB[task_A]).t()
            stacks = list(group.parameters())
            trained = [] if group.fixed else stacks
            tap = group.grid_first(z, stacks, parents=bank.grid_parents(number, logits))
            logits[number] = group.grid_rest(tap, stacks, keys_B, slice(None), keep=tapped)
            found[number] = Piece(number, group, task_A, None, trained, logits[number], y, weight, None, ~y.isnan(), tap)
        if torch.is_grad_enabled():
            _mark_parents(bank, found)
        return [found[number] for number in sorted(found)]
    planned = {route.group: route for route in routes}
    out: dict[int, Tensor] = {}
    for number in bank.order:
        if number not in planned:
            continue
        z, first = of_member(number)
        route = planned[number].to(z.device)
        group = bank.groups[number]
        params = group.gather(route.active_A)
        tap = group.routed_first(z, route)
        out[number] = group.routed_rest(tap, route, params, keys_B, bank.routed_parents(route, out))
        found[number] = Piece(
            number,
            group,
            route.task_A - first,
            planned[number].active_A,
            [] if group.fixed else params,
            group.of_labels(out[number], route),
            labels.y_P[route.label_P % len(labels.y_P)],
            None if labels.weight_P is None else labels.weight_P[route.label_P % len(labels.y_P)],
            route.slot_P,
            None,
            tap,
            route,
            None if route.fed is None else torch.ones_like(route.active_A, dtype=torch.bool),
        )
    return [found[number] for number in sorted(found)]


def _mark_parents(bank: HeadBank, found: dict[int, Piece]) -> None:
    """Say in the pieces of a grid which heads' logits a head with labels reads."""
    for number in reversed(bank.order):
        for parent, local_A in bank.parents[number] if number in found else ():
            piece, of_parent = found[number], found[parent]
            active_A = piece.has_gradient_A(piece.count_A())
            children_A = of_parent.children_A
            if children_A is None:
                children_A = torch.zeros_like(of_parent.task_A, dtype=torch.bool)
            children_A[local_A.to(active_A.device)[active_A]] = True
            found[parent] = replace(of_parent, children_A=children_A)


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

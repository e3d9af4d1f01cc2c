"""One optimizer step: the heads' phase from the features to losses and gradients, then one backward of the trunk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from mtrain.config import HeadConfig, TrainConfig
from mtrain.data.batch import Batch
from mtrain.model.dropout import row_keys
from mtrain.model.heads import HeadBank
from mtrain.train.objective import Objective, Piece, pieces, routes
from mtrain.train.optim import HeadAdamW, HeadUpdate
from mtrain.train.shared_head import SharedHeads


class LossScale:
    """Dynamic scale of fp16 gradients (Micikevicius et al. 2018): halved by an overflow, doubled after many good steps.

    One value for trunk and heads, because an overflow skips the step of both.
    """

    def __init__(self, value: float = 2.0**16, growth_interval: int = 2000):
        self.value, self.growth_interval, self.good_steps = value, growth_interval, 0

    def update(self, finite: bool) -> None:
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps % self.growth_interval == 0:
            self.value *= 2


class Totals:
    """What happened since the last line of the curve; tensors stay on the device until then.

    `loss` is the objective J summed over steps; `bad_T` counts the steps in which a task's loss was not finite.
    """

    def __init__(self, num_tasks: int, device: torch.device):
        self.loss = torch.zeros((), device=device)
        self.bad_T = torch.zeros(num_tasks, dtype=torch.int64, device=device)
        self.steps = self.skipped = self.rows = 0
        self.seconds = self.waited = 0.0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.loss.device
        vars(self).update({k: v.to(device) if isinstance(v, Tensor) else v for k, v in state.items()})


class Window:
    """Sums over the micro-batches of one step: the objective J, and for each task its losses, weights and whether one of
    its losses was not finite; and whether all features were finite."""

    def __init__(self, num_tasks: int, device: torch.device):
        self.loss = torch.zeros((), device=device)
        self.loss_T, self.weight_T, self.bad_T = torch.zeros(3, num_tasks, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    @property
    def mean_loss_T(self) -> Tensor:
        """NaN where the task is absent."""
        return self.loss_T / self.weight_T


@dataclass(frozen=True)
class PieceLoss:
    """The losses of a piece's A tasks, and the gradient of their sum at its logits."""

    piece: Piece
    sum_A: Tensor
    count_A: Tensor
    finite_A: Tensor
    grad: Tensor


class Stepper:
    """Holds what one step needs; calling it with a global batch trains once.

    Args:
        model: the shared network as `accelerator.prepare` returned it; `model(x_BF, keys_B)` gives `z_BD`.
        trunk_optimizer, head_optimizer: None where that part is frozen or has no parameters.
        head: the pull of heads towards their group's mean.
        train_labels_T: training labels of each task, for that pull.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        bank: HeadBank,
        objective: Objective,
        balancer: Any,
        trunk_optimizer: torch.optim.Optimizer | None,
        head_optimizer: HeadAdamW | None,
        config: TrainConfig,
        head: HeadConfig,
        train_labels_T: NDArray[np.int64],
    ):
        self.accelerator, self.model, self.bank, self.objective = accelerator, model, bank, objective
        self.balancer, self.trunk_optimizer, self.head_optimizer = balancer, trunk_optimizer, head_optimizer
        self.config = config
        self.trunk_parameters = [p for p in model.parameters() if p.requires_grad]
        self.scale = LossScale() if accelerator.mixed_precision == "fp16" else None
        self.weight_T = torch.ones_like(objective.coefficient_T)
        self.last_loss_T: Tensor | None = None
        self.shared_heads = SharedHeads(bank, head, torch.tensor(train_labels_T, device=self.weight_T.device))
        self.members = len(bank.names) // len(train_labels_T)

    def state_dict(self) -> dict[str, Any]:
        return {
            "weight_T": self.weight_T,
            "last_loss_T": self.last_loss_T,
            "scale": None if self.scale is None else vars(self.scale),
            "shared_heads": self.shared_heads.state_dict(),
            "balancer": self.balancer.state_dict() if hasattr(self.balancer, "state_dict") else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.weight_T.device
        self.weight_T = state["weight_T"].to(device)
        self.last_loss_T = None if state["last_loss_T"] is None else state["last_loss_T"].to(device)
        self.shared_heads.load_state_dict(state["shared_heads"])
        if self.scale is not None and state["scale"] is not None:
            vars(self.scale).update(state["scale"])
        if state["balancer"]:
            self.balancer.load_state_dict(state["balancer"])

    def __call__(self, batch: Batch, step: int, totals: Totals) -> None:
        """Train on the global batch `batch`; what happened is added to `totals`."""
        micro_batches = batch.micro_batches(self.config.micro_batch or len(batch.row_B))
        num_labels = int(batch.labels.count_T().sum())
        if num_labels == 0:
            return
        seed = (self.config.seed * 1_000_003 + step) % 2**63  # for random modules of the user's own trunk
        torch.default_generator.manual_seed(seed)
        if self.weight_T.device.type != "cpu":
            torch.manual_seed(seed)
        single = len(micro_batches) == 1
        if not single and self.last_loss_T is not None:  # a window's weights come from the statistics of the one before
            self._balance(self.last_loss_T)
        window = Window(len(self.weight_T), self.weight_T.device)
        updates = [self._micro(micro, step, num_labels, window, rebalance=single) for micro in micro_batches]
        self.last_loss_T = window.mean_loss_T
        self._apply(_merged(updates), window, totals)
        totals.loss += window.loss
        totals.bad_T += window.bad_T > 0
        totals.steps += 1
        totals.rows += len(batch.row_B)

    def _balance(self, loss_T: Tensor) -> None:
        self.weight_T = self.balancer.weights(loss_T, ~loss_T.isnan())

    def _micro(self, batch: Batch, step: int, num_labels: int, window: Window, rebalance: bool) -> list[HeadUpdate]:
        """Both phases of a micro-batch; the trunk's gradient is added to `.grad`, the heads' is returned."""
        needed = routes(self.bank, batch.labels)
        batch = batch.to(self.weight_T.device)
        keys_B = row_keys(self.config.seed, step, batch.row_B)
        features_BD = self.model(batch.x_BF, keys_B)
        z_BD = features_BD.detach().requires_grad_(features_BD.requires_grad)
        window.finite &= z_BD.detach().isfinite().all()
        with self.accelerator.autocast():
            found = [self._loss(piece, window) for piece in pieces(self.bank, z_BD, batch.labels, needed, keys_B)]
        if not found:
            return []
        if rebalance:
            self._balance(window.mean_loss_T)
        coefficient_T = self.objective.coefficient_T * self.weight_T / num_labels
        grad_logits = [self._grad_logits(loss, coefficient_T, window) for loss in found]

        wanted = [z_BD] if z_BD.requires_grad else []
        if self.head_optimizer is not None:
            wanted += [p for loss in found for p in loss.piece.params]
        grads = list(torch.autograd.grad([loss.piece.logits for loss in found], wanted, grad_logits))
        if z_BD.requires_grad:
            features_BD.backward(grads.pop(0))
        return [] if self.head_optimizer is None else self._head_updates(found, grads, coefficient_T)

    def _loss(self, piece: Piece, window: Window) -> PieceLoss:
        """Losses of a piece's tasks, added to the window. A task whose loss or gradient is not finite counts as bad."""
        leaf = piece.logits.detach().float().requires_grad_()
        sum_A = piece.sum(self.objective.losses(replace(piece, logits=leaf)))
        (grad,) = torch.autograd.grad(sum_A.sum(), leaf)
        finite_A = sum_A.detach().isfinite() & piece.sum(grad.sum(-1)).isfinite()
        sum_A = torch.where(finite_A, sum_A.detach(), 0)
        count_A = piece.count_A()
        weight_A = count_A
        if piece.weight is not None:
            weight_A = piece.sum(piece.weight if piece.present is None else piece.weight * piece.present)
        window.loss_T.index_add_(0, piece.task_A, sum_A)
        window.weight_T.index_add_(0, piece.task_A, torch.where(finite_A, weight_A, 0).to(sum_A.dtype))
        window.bad_T.index_add_(0, piece.task_A, (~finite_A).to(sum_A.dtype))
        return PieceLoss(piece, sum_A, count_A, finite_A, grad)

    def _grad_logits(self, loss: PieceLoss, coefficient_T: Tensor, window: Window) -> Tensor:
        """The gradient of the (fp16: scaled) objective at the logits; 0 for tasks whose loss is not finite."""
        piece, coefficient_A = loss.piece, coefficient_T[loss.piece.task_A]
        window.loss += (coefficient_A * loss.sum_A).sum() / self.members
        if self.scale is not None:
            coefficient_A = coefficient_A * self.scale.value
        keep, factor = (piece.spread(value_A).unsqueeze(-1) for value_A in (loss.finite_A, coefficient_A))
        return torch.where(keep, loss.grad * factor, 0).to(piece.logits.dtype)

    def _head_updates(self, found: list[PieceLoss], grads: list[Tensor], coefficient_T: Tensor) -> list[HeadUpdate]:
        """Updates of the tasks that have labels in the batch and a finite loss."""
        moves = [loss.finite_A & (loss.count_A > 0) for loss in found]
        moves = list(torch.cat(moves).cpu().split([len(moves_A) for moves_A in moves]))  # one transfer for all groups
        updates = []
        for loss, moves_A in zip(found, moves, strict=True):
            piece = loss.piece
            own, grads = grads[: len(piece.params)], grads[len(piece.params) :]
            strength_A = coefficient_T[piece.task_A] * loss.count_A * (1.0 if self.scale is None else self.scale.value)
            self.shared_heads.pull(piece.number, piece.task_A, piece.active_A, own, strength_A)
            active_A, dense = piece.active_A, False
            if not moves_A.all():
                at = moves_A.nonzero().squeeze(1)
                dense = active_A is None
                if active_A is not None:
                    own = [grad[at.to(grad.device)] for grad in own]
                active_A = at if active_A is None else active_A[at]
            updates.append(HeadUpdate(piece.number, own, active_A, dense))
        return updates

    def _apply(self, updates: list[HeadUpdate], window: Window, totals: Totals) -> None:
        """Step both optimizers, or neither where the features or the trunk's gradient are not finite."""
        unscale = 1.0 if self.scale is None else 1 / self.scale.value
        grads = [p.grad for p in self.trunk_parameters if p.grad is not None]
        norm = float(torch.where(window.finite, torch.nn.utils.get_total_norm(grads), torch.nan)) * unscale
        finite = math.isfinite(norm)
        if self.scale is not None:  # in fp16 the gradients of heads overflow too
            finite = finite and math.isfinite(torch.nn.utils.get_total_norm([g for u in updates for g in u.grads]))
        if finite and self.trunk_optimizer is not None:
            factor = unscale * (1.0 if self.config.clip is None else min(1.0, self.config.clip / (norm + 1e-6)))
            if factor != 1.0 and grads:
                torch._foreach_mul_(grads, factor)
            self.trunk_optimizer.step()
        if self.trunk_optimizer is not None:
            self.trunk_optimizer.zero_grad(set_to_none=True)
        if finite and self.head_optimizer is not None:
            if unscale != 1.0:
                updates = [replace(update, grads=[grad * unscale for grad in update.grads]) for update in updates]
            with self.shared_heads.following(updates):
                self.head_optimizer.step(updates)
        if not finite:  # while the fp16 scale can still fall, an overflow is part of finding it
            totals.skipped += self.scale is None or self.scale.value <= 1.0
        if self.scale is not None:
            self.scale.update(finite)


def _merged(updates: Sequence[Sequence[HeadUpdate]]) -> list[HeadUpdate]:
    """Sum the updates of several micro-batches, head by head."""
    if len(updates) == 1:
        return list(updates[0])
    by_group: dict[int, list[HeadUpdate]] = {}
    for update in (update for micro in updates for update in micro):
        by_group.setdefault(update.group, []).append(update)
    merged = []
    for group, parts in by_group.items():
        stacks = list(zip(*(part.grads for part in parts), strict=True))  # for each parameter, of each micro-batch
        if all(part.active_A is None for part in parts):
            merged.append(HeadUpdate(group, [torch.stack(grads).sum(0) for grads in stacks]))
            continue
        ids = [torch.arange(len(p.grads[0])) if p.active_A is None else p.active_A for p in parts]
        active_A, slot = torch.unique(torch.cat(ids), return_inverse=True)
        rows = [[_rows(grad, part) for grad, part in zip(grads, parts, strict=True)] for grads in stacks]
        merged.append(HeadUpdate(group, [_sum_rows(grads, slot, len(active_A)) for grads in rows], active_A))
    return merged


def _rows(grad: Tensor, update: HeadUpdate) -> Tensor:
    """Gradients of the active heads only."""
    return grad[update.active_A.to(grad.device)] if update.dense and update.active_A is not None else grad


def _sum_rows(grads: Sequence[Tensor], slot: Tensor, length: int) -> Tensor:
    every = torch.cat(list(grads))
    return every.new_zeros(length, *every.shape[1:]).index_add_(0, slot.to(every.device), every)

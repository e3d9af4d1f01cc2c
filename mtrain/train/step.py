"""One optimizer step: the heads' phase from the features to losses and gradients, then one backward of the trunk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
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


class LossScale:
    """Dynamic scale of fp16 gradients (Micikevicius et al. 2018): halved by an overflow, doubled after many good steps.

    One value for trunk and heads, because an overflow skips the step of both.
    """

    def __init__(self, value: float = 2.0**16, growth_interval: int = 2000):
        self.value, self.growth_interval, self.good_steps = value, growth_interval, 0

    def update(self, finite: bool) -> None:
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps % self.growth_interval == 0:
            self.value *= 2


class Totals:
    """Sums over steps, kept on the device and read when a line is logged.

    `loss` is the objective J summed over steps; `loss_T` and `weight_T` give a task's mean loss; `bad_T` counts the
    steps in which a task's loss was not finite.
    """

    def __init__(self, num_tasks: int, device: torch.device):
        self.loss = torch.zeros((), device=device)
        self.loss_T, self.weight_T, self.bad_T = torch.zeros(3, num_tasks, device=device)
        self.steps = self.skipped = self.rows = self.labels = 0


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
        self.window_loss_T = torch.full_like(self.weight_T, torch.nan)
        self.label_T = torch.tensor(train_labels_T, device=self.weight_T.device).clamp(min=1).float()
        bias = head.toward_shared if head.toward_shared_bias is None else head.toward_shared_bias
        self.pulls = {3: head.toward_shared, 2: bias}  # by the dimensions of a stack: weights, biases
        pulled = head.toward_shared or bias
        self.mean_heads = [[p.detach().mean(0) for p in g.parameters()] for g in bank.groups] if pulled else None
        self.bad_steps = 0

    def state_dict(self) -> dict[str, Any]:
        scale = None if self.scale is None else vars(self.scale)
        return {
            "weight_T": self.weight_T,
            "window_loss_T": self.window_loss_T,
            "scale": scale,
            "bad_steps": self.bad_steps,
            "balancer": self.balancer.state_dict() if hasattr(self.balancer, "state_dict") else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.weight_T.device
        self.weight_T, self.window_loss_T = state["weight_T"].to(device), state["window_loss_T"].to(device)
        self.bad_steps = state["bad_steps"]
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
        single = len(micro_batches) == 1
        if not single:  # the window's weights come from the statistics of the window before
            self._balance()
        window = Totals(len(self.weight_T), self.weight_T.device)
        updates = [self._micro(micro, step, num_labels, window, rebalance=single) for micro in micro_batches]
        self.window_loss_T = window.loss_T / window.weight_T
        self._apply(updates, totals)
        for name in ("loss", "loss_T", "weight_T", "bad_T"):
            getattr(totals, name).add_(getattr(window, name))
        totals.steps += 1
        totals.rows += len(batch.row_B)
        totals.labels += num_labels

    def _balance(self) -> None:
        active_T = ~self.window_loss_T.isnan()
        if active_T.any():
            self.weight_T = self.balancer.weights(self.window_loss_T, active_T)

    def _micro(self, batch: Batch, step: int, num_labels: int, window: Totals, rebalance: bool) -> list[HeadUpdate]:
        needed = routes(self.bank, batch.labels)
        batch = batch.to(self.weight_T.device)
        keys_B = row_keys(self.config.seed, step, batch.row_B)
        features_BD = self.model(batch.x_BF, keys_B)
        z_BD = features_BD.detach().requires_grad_()
        with self.accelerator.autocast():
            found = list(pieces(self.bank, z_BD, batch.labels, needed, keys_B))
        if not found:
            return []
        leaves = [piece.logits.detach().float().requires_grad_() for piece in found]
        sums = []
        for piece, leaf in zip(found, leaves, strict=True):
            sum_A = piece.sum(self.objective.losses(replace(piece, logits=leaf)))
            sums.append(sum_A)
            weight = 1.0 if piece.weight is None else piece.weight
            present = (~piece.y.isnan()) if piece.slot_P is None else torch.ones_like(piece.y)
            finite_A = sum_A.detach().isfinite()
            window.loss_T.index_add_(0, piece.task_A, torch.where(finite_A, sum_A.detach(), 0))
            window.weight_T.index_add_(0, piece.task_A, torch.where(finite_A, piece.sum(present * weight), 0))
            window.bad_T.index_add_(0, piece.task_A, (~finite_A).to(window.bad_T.dtype))
        if rebalance:
            self.window_loss_T = window.loss_T / window.weight_T
            self._balance()
        grad_leaves = torch.autograd.grad([sum_A.sum() for sum_A in sums], leaves)

        coefficient_T = self.objective.coefficient_T * self.weight_T / num_labels
        grad_logits = []
        for piece, sum_A, grad in zip(found, sums, grad_leaves, strict=True):
            coefficient_A = coefficient_T[piece.task_A]
            finite_A = sum_A.detach().isfinite()
            window.loss += (coefficient_A * torch.where(finite_A, sum_A.detach(), 0)).sum()
            if self.scale is not None:
                coefficient_A = coefficient_A * self.scale.value
            keep = piece.spread(finite_A).unsqueeze(-1)
            grad = torch.where(keep, grad * piece.spread(coefficient_A).unsqueeze(-1), 0)
            grad_logits.append(grad.to(piece.logits.dtype))
        wanted = [z_BD] if features_BD.requires_grad else []
        if self.head_optimizer is not None:
            wanted += [p for piece in found for p in piece.params]
        grads = list(torch.autograd.grad([piece.logits for piece in found], wanted, grad_logits)) if wanted else []
        if features_BD.requires_grad:
            features_BD.backward(grads.pop(0))
        if self.head_optimizer is None:
            return []
        updates = []
        for piece, sum_A in zip(found, sums, strict=True):
            own, grads = grads[: len(piece.params)], grads[len(piece.params) :]
            self._pull(piece, own, coefficient_T)
            updates.append(_head_update(piece, own, sum_A.detach().isfinite()))
        return updates

    def _pull(self, piece: Piece, grads: list[Tensor], coefficient_T: Tensor) -> None:
        """Add the gradient of `pull / n_t * |w_t - mean|^2` for each label of task t: of a ridge worth `pull` rows.

        Evgeniou and Pontil 2004, "Regularized multi-task learning"; the shared head is the mean at the step's start.
        """
        if self.mean_heads is None:
            return
        labels_A = piece.sum(torch.ones_like(piece.y) if piece.slot_P is not None else (~piece.y.isnan()).float())
        strength_A = 2 * coefficient_T[piece.task_A] * labels_A / self.label_T[piece.task_A]
        if self.scale is not None:
            strength_A = strength_A * self.scale.value
        for grad, param, mean in zip(grads, piece.params, self.mean_heads[piece.number], strict=True):
            strength = strength_A.view(-1, *[1] * (param.dim() - 1)) * self.pulls[param.dim()]
            grad += strength * (param.detach() - mean)

    def _apply(self, updates: Sequence[Sequence[HeadUpdate]], totals: Totals) -> None:
        """Step both optimizers, or neither where the trunk's gradient is not finite."""
        unscale = 1.0 if self.scale is None else 1 / self.scale.value
        factor, finite = unscale, True
        if self.trunk_parameters and self.trunk_optimizer is not None:
            grads = [p.grad for p in self.trunk_parameters if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads)) * unscale
            finite = math.isfinite(norm)
            if finite and self.config.clip is not None:
                factor *= min(1.0, self.config.clip / (norm + 1e-6))
            if finite and factor != 1.0:
                torch._foreach_mul_(grads, factor)
            if finite:
                self.trunk_optimizer.step()
            self.trunk_optimizer.zero_grad(set_to_none=True)
        if self.scale is not None:
            self.scale.update(finite)
        if not finite:
            totals.skipped += self.scale is None  # an fp16 overflow is part of finding the scale
            return
        if self.head_optimizer is not None and updates:
            self._step_heads(_scaled(_merged(updates), unscale))

    def _step_heads(self, updates: list[HeadUpdate]) -> None:
        assert self.head_optimizer is not None
        if self.mean_heads is None:
            self.head_optimizer.step(updates)
            return
        before = [self._heads(update) for update in updates]
        self.head_optimizer.step(updates)
        for update, old in zip(updates, before, strict=True):  # the means follow without a pass over absent heads
            for mean, was, now in zip(self.mean_heads[update.group], old, self._heads(update), strict=True):
                mean += (now - was).sum(0) / len(self.bank.groups[update.group].task_ids)

    def _heads(self, update: HeadUpdate) -> list[Tensor]:
        stacks = [p.detach() for p in self.bank.groups[update.group].parameters()]
        return [stack.clone() if update.active_A is None else stack[update.active_A] for stack in stacks]


def _head_update(piece: Piece, grads: list[Tensor], finite_A: Tensor) -> HeadUpdate:
    """The update of the tasks that have labels in the batch and a finite loss."""
    moves_A = finite_A if piece.slot_P is not None else finite_A & (~piece.y.isnan()).any(0)
    if bool(moves_A.all()):
        return HeadUpdate(piece.number, grads, piece.active_A)
    at = moves_A.nonzero().squeeze(1)
    return HeadUpdate(piece.number, [g[at] for g in grads], at if piece.active_A is None else piece.active_A[at])


def _merged(updates: Sequence[Sequence[HeadUpdate]]) -> list[HeadUpdate]:
    """Sum the updates of several micro-batches, head by head."""
    if len(updates) == 1:
        return list(updates[0])
    by_group: dict[int, list[HeadUpdate]] = {}
    for update in (update for micro in updates for update in micro):
        by_group.setdefault(update.group, []).append(update)
    merged = []
    for group, parts in by_group.items():
        if all(part.active_A is None for part in parts):
            merged.append(
                HeadUpdate(group, [sum(grads[1:], grads[0]) for grads in zip(*(p.grads for p in parts), strict=True)])
            )
            continue
        ids = [torch.arange(len(p.grads[0]), device=p.grads[0].device) if p.active_A is None else p.active_A for p in parts]
        active_A, slot = torch.unique(torch.cat(ids), return_inverse=True)
        merged.append(
            HeadUpdate(
                group,
                [
                    grads[0].new_zeros(len(active_A), *grads[0].shape[1:]).index_add_(0, slot, torch.cat(grads))
                    for grads in zip(*(p.grads for p in parts), strict=True)
                ],
                active_A,
            )
        )
    return merged


def _scaled(updates: list[HeadUpdate], factor: float) -> list[HeadUpdate]:
    if factor == 1.0:
        return updates
    return [replace(update, grads=[grad * factor for grad in update.grads]) for update in updates]

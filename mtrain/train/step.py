"""One optimizer step: the heads' phase from the features to losses and gradients, then one backward of the trunk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from mtrain.components import is_own
from mtrain.config import HeadConfig, TrainConfig
from mtrain.data.batch import Batch
from mtrain.errors import UserError
from mtrain.model.dropout import row_keys
from mtrain.model.heads import HeadBank
from mtrain.parallel.shard import Shard
from mtrain.parallel.wrap import sharded, unsynchronised
from mtrain.train.balancing import Balancing
from mtrain.train.hot_heads import HotHeads
from mtrain.train.objective import Objective, Piece, PieceLoss, pieces, routes
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

    `loss` is the objective J summed over steps; `labels_T` counts each task's labels, `bad_T` the steps in which its loss was
    not finite.
    """

    def __init__(self, num_tasks: int, device: torch.device):
        self.loss = torch.zeros((), device=device)
        self.bad_T, self.labels_T = torch.zeros(2, num_tasks, dtype=torch.int64, device=device)
        self.steps = self.skipped = self.rows = 0
        self.seconds = self.waited = 0.0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.loss.device
        vars(self).update({k: v.to(device) if isinstance(v, Tensor) else v for k, v in state.items()})


class Window:
    """Sums over the micro-batches of one step: for each task of this rank its losses, weights and whether one of its losses
    was not finite, and labels `[4, T]`; and whether features were not finite. After `sum_up` those of all tasks and ranks.
    `finite_rows` are the rows of this rank whose features were finite, in the first step."""

    def __init__(self, num_tasks: int, device: torch.device):
        self.sums_4T = torch.zeros(4, num_tasks, device=device)
        self.bad_features = torch.zeros((), device=device)
        self.finite_rows = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, loss: PieceLoss) -> None:
        piece, weight_A = loss.piece, loss.count_A
        if piece.weight is not None:
            weight_A = piece.sum(piece.weight if piece.present is None else piece.weight * piece.present)
        values = (loss.sum_A, torch.where(loss.finite_A, weight_A, 0), ~loss.finite_A, loss.count_A)
        self.sums_4T.index_add_(1, piece.task_A, torch.stack([value.to(loss.sum_A.dtype) for value in values]))

    def sum_up(self, shard: Shard) -> None:
        self.sums_4T, self.bad_features = shard.everywhere(self.sums_4T, self.bad_features)

    @property
    def loss_T(self) -> Tensor:
        return self.sums_4T[0]

    @property
    def mean_loss_T(self) -> Tensor:
        """NaN where the task is absent."""
        return self.sums_4T[0] / self.sums_4T[1]

    @property
    def count_T(self) -> Tensor:
        return self.sums_4T[3]

    @property
    def bad_T(self) -> Tensor:
        return self.sums_4T[2]


def count(batch: Sequence[Batch]) -> tuple[int, int]:
    """Labels and rows of a batch's micro-batches on this rank."""
    return sum(int(micro.labels.count_T().sum()) for micro in batch), sum(len(micro.row_B) for micro in batch)


class Stepper:
    """Holds what one step needs; calling it with a global batch trains once.

    Args:
        model: the shared network as `accelerator.prepare` returned it; `model(x_BF, keys_B, task_B)` gives `z_BD`.
        bank: the heads of this rank's tasks.
        shard: which tasks those are; how features reach them.
        coefficient_T: weight, share and scale of every task in the objective.
        trunk_optimizer, head_optimizer: None where that part is frozen or has no parameters.
        head: the pull of heads towards their group's mean.
        train_labels_T: training labels of each task of this rank, for that pull.
        takes_step: whether the model takes `step_key`, a key `[1]` that no row has part in.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        bank: HeadBank,
        shard: Shard,
        objective: Objective,
        coefficient_T: Tensor,
        balancing: Balancing,
        trunk_optimizer: torch.optim.Optimizer | None,
        head_optimizer: HeadAdamW | None,
        config: TrainConfig,
        head: HeadConfig,
        train_labels_T: NDArray[np.int64],
        members: int = 1,
        takes_step: bool = False,
    ):
        self.accelerator, self.model, self.bank, self.objective = accelerator, model, bank, objective
        self.balancing, self.trunk_optimizer, self.head_optimizer = balancing, trunk_optimizer, head_optimizer
        self.config, self.members, self.takes_step = config, members, takes_step
        self.trunk_parameters = [p for p in model.parameters() if p.requires_grad]
        self.scale = LossScale() if accelerator.mixed_precision == "fp16" else None
        self.shard, self.coefficient_T = shard, coefficient_T
        self.device = coefficient_T.device
        self.any_row = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.shared_heads = SharedHeads(bank, head, torch.tensor(train_labels_T, device=self.device), shard)
        self.hot_heads = HotHeads(bank, shard) if shard.hot.any() else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": None if self.scale is None else vars(self.scale),
            "shared_heads": self.shared_heads.state_dict(),
            "balancing": self.balancing.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], same_tasks: bool = True) -> None:
        """After the heads: with other tasks than when the state was taken, their means are computed anew."""
        self.shared_heads.load_state_dict(state["shared_heads"] if same_tasks else None)
        if self.scale is not None and state["scale"] is not None:
            vars(self.scale).update(state["scale"])
        self.balancing.load_state_dict(state["balancing"])

    def __call__(self, batch: Sequence[Batch], step: int, totals: Totals, num_labels: int, num_rows: int) -> None:
        """Train on a global batch, given as this rank's rows of its micro-batches; what happened is added to `totals`.

        Args:
            num_labels, num_rows: of the global batch, on all ranks.
        """
        if num_labels == 0:
            return
        seed = (self.config.seed * 1_000_003 + step + self.shard.world.rank * 7_919) % 2**63
        torch.default_generator.manual_seed(seed)  # for random modules of the user's own trunk
        if self.device.type != "cpu":
            torch.manual_seed(seed)
        single = len(batch) == 1
        window = Window(len(self.shard.own), self.device)
        if self.balancing.gradients is not None:
            self.balancing.gradients.start(step, self.balancing.due(step))
        updates = []
        for i, micro in enumerate(batch):
            last = i == len(batch) - 1
            with nullcontext() if last else unsynchronised(self.model):
                updates.append(self._micro(micro, step, num_labels, window, rebalance=single))
        if not single:
            window.sum_up(self.shard)
        if step == 0:
            self._check_features(window)
        self._apply(_merged(updates), window, totals)
        weight_T = self.coefficient_T * self.balancing.weight_T
        totals.loss += (weight_T * window.loss_T).sum() / (num_labels * self.members)
        totals.bad_T += window.bad_T > 0
        totals.labels_T += window.count_T.long()
        totals.steps += 1
        totals.rows += num_rows
        if not single:  # the weights of the next window
            self.balancing.update(step, window.mean_loss_T, window.count_T)
        if self.balancing.balancer.second_forward:
            again = self._losses(batch, step)
            self.balancing.after(step, again.mean_loss_T, again.count_T)

    def _check_features(self, window: Window) -> None:
        """Refuse a trunk whose features are finite in no row of the first step."""
        if bool(window.bad_features) and not any(self.shard.world.sum_numbers(int(window.finite_rows))):
            raise UserError(
                f"model.trunk: the features of {type(self._trunk()).__name__} are finite in no row of the first step, though "
                "all inputs are; look for what overflows or divides by 0 in its forward, or in how it is initialised"
            )

    def _trunk(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False).trunk

    @contextmanager
    def _trunk_failures(self) -> Iterator[None]:
        """What the user's own trunk raises, as a UserError; not what torch raises for want of memory or of another process."""
        try:
            yield
        except Exception as error:
            trunk, several = self._trunk(), self.shard.world.size > 1
            elsewhere = isinstance(error, RuntimeError) and (several or "memory" in str(error))
            if isinstance(error, UserError | MemoryError) or elsewhere or not is_own(trunk):
                raise
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"model.trunk: {type(trunk).__name__} fails in training with {what}") from error

    @torch.no_grad()
    def _losses(self, batch: Sequence[Batch], step: int) -> Window:
        """The losses of a global batch with the model as it is now, with the same dropout."""
        window = Window(len(self.shard.own), self.device)
        for micro in batch:
            self._forward(micro, step, window)
        window.sum_up(self.shard)
        return window

    def _forward(self, batch: Batch, step: int, window: Window, tapped: bool = False) -> tuple[Tensor, Tensor, list[PieceLoss]]:
        """Features of the rows that this rank reads, those that its heads read, and their losses, added to the window."""
        needed = routes(self.bank, batch.labels)
        batch = batch.to(self.device)
        keys_B = row_keys(self.config.seed, step, batch.row_B)
        keys_H = keys_B if batch.row_H is None else row_keys(self.config.seed, step, batch.row_H)
        own = {"step_key": row_keys(self.config.seed, step, self.any_row)} if self.takes_step else {}
        with self._trunk_failures():
            features_BD = self.model(*batch.arguments(keys_B), **own)
        window.bad_features += ~features_BD.detach().isfinite().all()
        if step == 0:
            window.finite_rows += features_BD.detach().flatten(1).isfinite().all(1).sum()
        z_HD = self.shard.to_heads(features_BD.detach(), batch.deal).requires_grad_(features_BD.requires_grad)
        with self.accelerator.autocast():
            found = [self._loss(piece) for piece in pieces(self.bank, z_HD, batch.labels, needed, keys_H, tapped)]
        if self.hot_heads is not None:
            found = self.hot_heads.agreed(found)
        for loss in found:
            window.add(loss)
        return features_BD, z_HD, found

    def _micro(self, batch: Batch, step: int, num_labels: int, window: Window, rebalance: bool) -> list[HeadUpdate]:
        """Both phases of a micro-batch; the trunk's gradient is added to `.grad`, the heads' is returned."""
        gradients = self.balancing.gradients if self.balancing.due(step) else None
        weighs_heads = self.balancing.balancer.weighs_heads
        tapped = gradients is not None or not weighs_heads
        features_BD, z_HD, found = self._forward(batch, step, window, tapped)
        unit_T = self.shard.local(self.coefficient_T) / num_labels
        staged = [self._to_tap(loss, unit_T) for loss in found] if tapped else []
        if gradients is not None:
            taps = [(loss.piece, grads[0]) for loss, grads in zip(found, staged, strict=True)]
            gradients.add(features_BD, taps, batch.deal, 1.0 if self.scale is None else self.scale.value)
        if rebalance:
            window.sum_up(self.shard)
            self.balancing.update(step, window.mean_loss_T, window.count_T)
        weight_T = self.shard.local(self.balancing.weight_T)
        coefficient_T = unit_T * weight_T

        params = [] if self.head_optimizer is None else [p for loss in found for p in loss.piece.params]
        shared = [z_HD] if z_HD.requires_grad else []
        grads: list[Tensor] = []
        if staged:
            grads = self._from_taps(found, staged, shared, params, weight_T, weighs_heads)
        elif found:
            grad_logits = [self._grad_logits(loss, coefficient_T) for loss in found]
            grads = list(torch.autograd.grad([loss.piece.logits for loss in found], [*shared, *params], grad_logits))
        if z_HD.requires_grad:  # also without labels here: other ranks wait for this one's part
            grad_HD = grads.pop(0) if found else torch.zeros_like(z_HD)
            grad_BD = self.shard.from_heads(grad_HD, batch.deal)
            features_BD.backward(grad_BD * self.shard.world.size)  # DDP and FSDP average over ranks, J is a sum
        if self.head_optimizer is None:
            return []
        return self._head_updates(found, grads, coefficient_T if weighs_heads else unit_T)

    def _to_tap(self, loss: PieceLoss, unit_T: Tensor) -> list[Tensor]:
        """Gradients of the tasks' terms, before any weight, at the tap and at the parameters behind it."""
        piece = loss.piece
        return list(torch.autograd.grad(piece.logits, [piece.tap, *piece.behind_tap], self._grad_logits(loss, unit_T)))

    def _from_taps(
        self,
        found: list[PieceLoss],
        staged: list[list[Tensor]],
        shared: list[Tensor],
        params: list[Tensor],
        weight_T: Tensor,
        weighs_heads: bool,
    ) -> list[Tensor]:
        """Gradients of the weighted objective at the `shared` features, and of the weighted or the plain one at the heads'
        `params`, from those that `_to_tap` gave."""
        behind: dict[int, Tensor] = {}
        for loss, (_, *others) in zip(found, staged, strict=True):
            weight_A = weight_T[loss.piece.task_A]
            for p, grad in zip(loss.piece.behind_tap, others, strict=True):
                behind[id(p)] = grad * weight_A.to(grad).view(-1, *[1] * (grad.dim() - 1)) if weighs_heads else grad
        first = [p for p in params if id(p) not in behind]
        outputs, taps = [loss.piece.tap for loss in found], [tap for tap, *_ in staged]
        weighted = [*shared, *first] if weighs_heads else shared
        plain = () if weighs_heads or not first else torch.autograd.grad(outputs, first, taps, retain_graph=True)
        for loss, tap in zip(found, taps, strict=True):
            loss.piece.scale_tap_(tap, weight_T)
        given = torch.autograd.grad(outputs, weighted, taps) if weighted else ()
        behind |= dict(zip(map(id, first), (*given[len(shared) :], *plain), strict=True))
        return [*given[: len(shared)], *(behind[id(p)] for p in params)]

    @torch.enable_grad()
    def _loss(self, piece: Piece) -> PieceLoss:
        """Losses of a piece's tasks. A task whose loss or gradient is not finite counts as bad."""
        leaf = piece.logits.detach().float().requires_grad_()
        sum_A = piece.sum(self.objective.losses(replace(piece, logits=leaf)))
        (grad,) = torch.autograd.grad(sum_A.sum(), leaf)
        finite_A = sum_A.detach().isfinite() & piece.sum(grad.sum(-1)).isfinite()
        return PieceLoss(piece, torch.where(finite_A, sum_A.detach(), 0), piece.count_A(), finite_A, grad)

    def _grad_logits(self, loss: PieceLoss, coefficient_T: Tensor) -> Tensor:
        """The gradient of the (fp16: scaled) objective at the logits; 0 for tasks whose loss is not finite."""
        piece, coefficient_A = loss.piece, coefficient_T[loss.piece.task_A]
        if self.scale is not None:
            coefficient_A = coefficient_A * self.scale.value
        keep, factor = (piece.spread(value_A).unsqueeze(-1) for value_A in (loss.finite_A, coefficient_A))
        return torch.where(keep, loss.grad * factor, 0).to(piece.logits.dtype)

    def _head_updates(self, found: list[PieceLoss], grads: list[Tensor], coefficient_T: Tensor) -> list[HeadUpdate]:
        """Updates of the tasks that have labels in the batch and a finite loss."""
        if not found:
            return []
        moves = [loss.finite_A & loss.piece.has_gradient_A(loss.count_A) for loss in found]
        moves = list(torch.cat(moves).cpu().split([len(moves_A) for moves_A in moves]))  # one transfer for all groups
        updates = []
        for loss, moves_A in zip(found, moves, strict=True):
            piece = loss.piece
            if not piece.params:  # fixed heads
                continue
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
        total = torch.nn.utils.get_total_norm(grads)
        if sharded(total):
            total = total.full_tensor()
        norm = float(torch.where(window.bad_features == 0, total, torch.nan)) * unscale
        finite = math.isfinite(norm)
        if self.scale is not None:  # in fp16 the gradients of heads overflow too
            heads = float(torch.nn.utils.get_total_norm([g for u in updates for g in u.grads]))
            (overflows,) = self.shard.world.sum_numbers(not math.isfinite(heads))
            finite = finite and not overflows
        if finite and self.trunk_optimizer is not None:
            factor = unscale * (1.0 if self.config.clip is None else min(1.0, self.config.clip / (norm + 1e-6)))
            if factor != 1.0 and grads:
                torch._foreach_mul_(grads, factor)
            self.trunk_optimizer.step()
        if self.trunk_optimizer is not None:
            self.trunk_optimizer.zero_grad(set_to_none=True)
        if finite and self.head_optimizer is not None:
            if self.hot_heads is not None:
                updates = self.hot_heads.summed(updates)
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

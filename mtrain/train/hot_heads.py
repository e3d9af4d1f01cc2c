"""Heads of hot tasks: replicated, each rank with some of their rows, one update from the sum of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtrain.model.heads import HeadBank
from mtrain.parallel.shard import Shard
from mtrain.train.objective import Piece
from mtrain.train.optim import HeadUpdate


@dataclass(frozen=True)
class PieceLoss:
    """The losses of a piece's A tasks, and the gradient of their sum at its logits."""

    piece: Piece
    sum_A: Tensor
    count_A: Tensor
    finite_A: Tensor
    grad: Tensor


class HotHeads:
    """What ranks tell each other of the tasks that all of them hold."""

    def __init__(self, bank: HeadBank, shard: Shard):
        self.world, self.num_tasks = shard.world, len(shard.own)
        self.device = next(iter(bank.parameters())).device
        self.hot = torch.from_numpy(shard.hot)
        self.stacks = [[p.detach() for p in group.parameters()] for group in bank.groups]
        self.heads = [self.hot[ids % self.num_tasks].nonzero().squeeze(1) for ids in bank.ids]
        """The hot heads of each group."""

    def agreed(self, found: Sequence[PieceLoss]) -> list[PieceLoss]:
        """A hot task whose loss is not finite on one rank is left out on all."""
        bad_T = torch.zeros(self.num_tasks, device=self.device)
        for loss in found:
            bad_T.index_add_(0, loss.piece.task_A, (~loss.finite_A).float())
        hot = self.hot.to(self.device)
        bad_T[hot] = self.world.sum(bad_T[hot])
        agreed = []
        for loss in found:
            finite_A = bad_T[loss.piece.task_A] == 0
            agreed.append(replace(loss, finite_A=finite_A, sum_A=torch.where(finite_A, loss.sum_A, 0)))
        return agreed

    def summed(self, updates: Sequence[HeadUpdate]) -> list[HeadUpdate]:
        """With the gradients of hot heads summed over ranks, in one all-reduce."""
        of_group = {update.group: update for update in updates}
        flat, shapes = [], []
        for group, heads in enumerate(self.heads):
            shapes += [(len(heads), *stack.shape[1:]) for stack in self.stacks[group]] + [(len(heads),)]
            update = of_group.get(group)
            if update is None:
                flat += [torch.zeros(shape, device=self.device) for shape in shapes[-len(self.stacks[group]) - 1 :]]
                continue
            active_A = torch.arange(len(self.stacks[group][0])) if update.active_A is None else update.active_A.cpu()
            slot = torch.full((len(self.stacks[group][0]),), -1)
            slot[heads] = torch.arange(len(heads))
            at = (slot[active_A] >= 0).nonzero().squeeze(1)
            place, rows = slot[active_A[at]].to(self.device), (active_A[at] if update.dense else at).to(self.device)
            for grad, shape in zip(update.grads, shapes[-len(self.stacks[group]) - 1 : -1], strict=True):
                flat.append(torch.zeros(shape, device=self.device).index_copy_(0, place, grad[rows].float()))
            flat.append(torch.zeros(len(heads), device=self.device).index_fill_(0, place, 1.0))
        total = self.world.sum(torch.cat([part.flatten() for part in flat]))
        pieces = iter([part.view(shape) for part, shape in zip(total.split([p.numel() for p in flat]), shapes, strict=True)])
        merged = []
        for group, heads in enumerate(self.heads):
            hot_grads, active = [next(pieces) for _ in self.stacks[group]], next(pieces).cpu() > 0
            update = of_group.get(group)
            own, rest = [], torch.zeros(0, dtype=torch.int64)
            if update is not None:
                active_A = torch.arange(len(self.stacks[group][0])) if update.active_A is None else update.active_A.cpu()
                at = (~torch.isin(active_A, heads)).nonzero().squeeze(1)
                rest = active_A[at]
                own = [grad[(rest if update.dense else at).to(self.device)] for grad in update.grads]
            if active.any():
                chosen = active.nonzero().squeeze(1).to(self.device)
                hot_grads = [grad[chosen] for grad in hot_grads]
                own = [torch.cat(both) for both in zip(own, hot_grads, strict=True)] if own else hot_grads
                rest = torch.cat([rest, heads[active]])
            if len(rest):
                merged.append(HeadUpdate(group, own, rest))
        return merged

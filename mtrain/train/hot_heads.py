"""Heads of hot tasks: replicated, each rank with some of their rows, one update from the sum of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mtrain.model.heads import HeadBank
from mtrain.parallel.shard import Shard
from mtrain.train.objective import PieceLoss
from mtrain.train.optim import HeadUpdate


class HotHeads:
    """What ranks tell each other of the tasks that all of them hold."""

    def __init__(self, bank: HeadBank, shard: Shard):
        self.world, self.num_tasks = shard.world, len(shard.own)
        self.stacks = [[p.detach() for p in group.parameters()] for group in bank.groups]
        self.device = self.stacks[0][0].device
        self.hot_T = torch.from_numpy(shard.hot).to(self.device)
        self.heads = [(self.hot_T.cpu()[ids % self.num_tasks]).nonzero().squeeze(1) for ids in bank.ids]
        """The hot heads of each group."""

    def agreed(self, found: Sequence[PieceLoss]) -> list[PieceLoss]:
        """A hot task whose loss is not finite on one rank is left out on all."""
        bad_T = torch.zeros(self.num_tasks, device=self.device)
        for loss in found:
            bad_T.index_add_(0, loss.piece.task_A, (~loss.finite_A).float())
        bad_T[self.hot_T] = self.world.sum(bad_T[self.hot_T])
        agreed = []
        for loss in found:
            finite_A = bad_T[loss.piece.task_A] == 0
            agreed.append(replace(loss, finite_A=finite_A, sum_A=torch.where(finite_A, loss.sum_A, 0)))
        return agreed

    def summed(self, updates: Sequence[HeadUpdate]) -> list[HeadUpdate]:
        """With the gradients of hot heads summed over ranks, in one all-reduce."""
        sums: list[Tensor] = []  # for each group its hot heads' gradients `[H, ...]` and on how many ranks they moved
        rest: list[HeadUpdate | None] = []
        of_group = {update.group: update for update in updates}
        for group, (heads, stacks) in enumerate(zip(self.heads, self.stacks, strict=True)):
            totals = [stack.new_zeros(len(heads), *stack.shape[1:]) for stack in stacks]
            totals.append(torch.zeros(len(heads), device=self.device))
            update = of_group.get(group)
            if update is not None:
                active_A = torch.arange(len(stacks[0])) if update.active_A is None else update.active_A.cpu()
                hot_A = torch.isin(active_A, heads)
                slot = torch.searchsorted(heads, active_A[hot_A]).to(self.device)
                for total, grad in zip(totals, update.grads, strict=False):
                    total[slot] = grad[active_A[hot_A] if update.dense else hot_A].to(total.dtype)
                totals[-1][slot] = 1
                own = [grad[active_A[~hot_A] if update.dense else ~hot_A] for grad in update.grads]
                update = HeadUpdate(group, own, active_A[~hot_A])
            sums += totals
            rest.append(update)
        summed = iter(self.world.sum_each(sums))
        merged = []
        for group, (heads, stacks, update) in enumerate(zip(self.heads, self.stacks, rest, strict=True)):
            grads = [next(summed) for _ in stacks]
            moved = next(summed) > 0
            grads, active_A = [grad[moved] for grad in grads], heads[moved.cpu()]
            if update is not None and update.active_A is not None:
                grads = [torch.cat(both) for both in zip(update.grads, grads, strict=True)]
                active_A = torch.cat([update.active_A, active_A])
            if len(active_A):
                merged.append(HeadUpdate(group, grads, active_A))
        return merged

"""Heads regularised towards a shared head: the mean of their group (Evgeniou and Pontil 2004, "Regularized multi-task
learning")."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mtrain.config import HeadConfig
from mtrain.model.heads import HeadBank, HeadGroup
from mtrain.parallel.shard import Shard
from mtrain.train.optim import HeadUpdate


class SharedHeads:
    """The mean head of each group, kept up to date without a pass over absent heads.

    Every label of task t carries the penalty `pull / n_t * |w_t - mean|^2`, with n_t the task's training labels and the
    mean as it is when the step starts: a ridge that weighs as much as `pull` rows. Tasks without training labels and
    padded outputs are not part of the mean.

    Args:
        config: its `toward_shared` pulls weights, `toward_shared_bias` biases.
        label_T: training labels of each of the bank's tasks, on its device.
        shard: the mean is one of all ranks; in it hot tasks count once.
    """

    def __init__(self, bank: HeadBank, config: HeadConfig, label_T: Tensor, shard: Shard):
        bias = config.toward_shared if config.toward_shared_bias is None else config.toward_shared_bias
        self.active = bool(config.toward_shared or bias)
        self.pulls = {3: config.toward_shared, 2: bias}  # by the dimensions of a stack
        self.label_T = label_T.clamp(min=1).float()
        self.stacks = [[p.detach() for p in group.parameters()] for group in bank.groups] if self.active else []
        self.world = shard.world
        groups = bank.groups if self.active else []
        self.starts = [bank.common_start(number) for number in range(len(groups))]
        tasks = [group.task_ids % max(1, len(label_T)) for group in groups]
        self.owned = [_owned(group, label_T[at] > 0) for group, at in zip(groups, tasks, strict=True)]
        counts_T = torch.from_numpy(shard.counts).to(label_T.device)
        self.counted = [_owned(group, (label_T[at] > 0) & counts_T[at]) for group, at in zip(groups, tasks, strict=True)]
        self.counts = self._summed([[own.sum(0) for own in counted] for counted in self.counted])
        self.means = self._mean()

    def _mean(self) -> list[list[Tensor]]:
        """The mean of the heads as they are, by their distance from where they started: then it is exact while they are
        equal, and no rounding, which AdamW would blow up, pulls them."""
        sums = [
            [((stack - start) * own).sum(0) for stack, start, own in zip(*of_group, strict=True)]
            for of_group in zip(self.stacks, self.starts, self.counted, strict=True)
        ]
        return [
            [start + total / count.clamp(min=1) for start, total, count in zip(*of_group, strict=True)]
            for of_group in zip(self.starts, self._summed(sums), self.counts, strict=True)
        ]

    def _summed(self, values: list[list[Tensor]]) -> list[list[Tensor]]:
        """Sums over ranks of values for each group and parameter."""
        summed = iter(self.world.sum_each([value for of_group in values for value in of_group]))
        return [[next(summed) for _ in of_group] for of_group in values]

    def pull(self, number: int, task_A: Tensor, active_A: Tensor | None, grads: Sequence[Tensor], per_label_A: Tensor) -> None:
        """Add the penalty's gradient to the gradients `[A, ...]` of a group's active heads.

        Args:
            per_label_A: the task's coefficient in the objective, times its labels in the batch.
        """
        if not self.active:
            return
        at = slice(None) if active_A is None else active_A
        strength_A = 2 * per_label_A / self.label_T[task_A]
        for grad, stack, own, mean in zip(grads, self.stacks[number], self.owned[number], self.means[number], strict=True):
            strength = strength_A.view(-1, *[1] * (stack.dim() - 1)) * self.pulls[stack.dim()]
            grad += strength * own[at] * (stack[at] - mean)

    @contextmanager
    def following(self, updates: Sequence[HeadUpdate]) -> Iterator[None]:
        """The means follow the heads that the optimizer moves inside the block."""
        if not self.active:
            yield
            return
        at = [slice(None) if update.active_A is None else update.active_A for update in updates]
        before = [[stack[a].clone() for stack in self.stacks[u.group]] for u, a in zip(updates, at, strict=True)]
        yield
        moved = [[torch.zeros_like(mean) for mean in means] for means in self.means]
        for update, a, old in zip(updates, at, before, strict=True):
            g = update.group
            for total, stack, own, was in zip(moved[g], self.stacks[g], self.counted[g], old, strict=True):
                total += ((stack[a] - was) * own[a]).sum(0)
        for means, counts, totals in zip(self.means, self.counts, self._summed(moved), strict=True):
            for mean, count, total in zip(means, counts, totals, strict=True):
                mean += total / count.clamp(min=1)

    def state_dict(self) -> list[list[Tensor]]:
        return self.means

    def load_state_dict(self, means: list[list[Tensor]] | None) -> None:
        """None: of the heads as they are."""
        if means is None:
            self.means = self._mean()
            return
        for own, saved in zip(self.means, means, strict=True):
            for mean, value in zip(own, saved, strict=True):
                mean.copy_(value)


def _owned(group: HeadGroup, member_T: Tensor) -> list[Tensor]:
    """For each parameter, 1 at the entries that are part of the mean, in a shape that broadcasts."""
    owned = []
    for stack, pad in zip(group.parameters(), group.padding(), strict=True):
        own = member_T.view(-1, *[1] * (stack.dim() - 1))
        owned.append((own if pad is None else own & ~pad).to(stack.dtype))
    return owned

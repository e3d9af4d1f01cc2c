"""Dynamic weight average: tasks whose loss falls slowly weigh more."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Facts, Seen
from mtrain.balance.common import LOSS_FLOOR, require


class DWA(Balancer):
    """w_t = A softmax_t(r_t / temperature) over the A active tasks, where r_t is the ratio of the task's last two mean losses.

    Liu, Johns and Davison 2019, arXiv:1803.10704, equation 7. r_t is 1 until there are two means.

    Deviations: the means are over windows of a task's own appearances instead of epochs, so that windows of tasks end at
    different steps; a window counts from the step after its end. Losses count as at least 1e-8.

    Args:
        temperature: large ones even weights out.
        every: appearances of a task in a window.
    """

    def __init__(self, *, temperature: float = 2.0, every: int = 100):
        require(0 < temperature < math.inf, "temperature", temperature, "a positive, finite number")
        require(every >= 1, "every", every, "a number of steps, at least 1")
        self.temperature, self.every = temperature, every

    def begin(self, facts: Facts) -> None:
        super().begin(facts)
        self.sum_T, self.last_T, self.before_T = (torch.zeros(facts.num_tasks, device=facts.device) for _ in range(3))
        self.seen_T = torch.zeros(facts.num_tasks, dtype=torch.int64, device=facts.device)

    def weights(self, seen: Seen) -> Tensor:
        task_A = seen.task_A
        seen_A, last_A, before_A = self.seen_T[task_A], self.last_T[task_A], self.before_T[task_A]
        rate_A = torch.where(seen_A >= 2 * self.every, last_A / before_A, 1.0)

        seen_A = seen_A + 1
        sum_A = self.sum_T[task_A] + seen.loss_A.clamp_min(LOSS_FLOOR)
        ends_A = seen_A % self.every == 0
        self.before_T[task_A] = torch.where(ends_A, last_A, before_A)
        self.last_T[task_A] = torch.where(ends_A, sum_A / self.every, last_A)
        self.sum_T[task_A] = torch.where(ends_A, 0, sum_A)
        self.seen_T[task_A] = seen_A
        return len(rate_A) * torch.softmax((rate_A - rate_A.max()) / self.temperature, 0)

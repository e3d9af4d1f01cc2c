"""Smooth Tchebycheff scalarisation: the step goes to the worst tasks, smoothly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Facts, Seen
from mtrain.balance.common import LOSS_FLOOR, require


class STCH(Balancer):
    """w_t = A softmax_t(y_t / mu) dy_t/dL_t over the A active tasks: the gradient of A mu log(sum exp(y_t / mu)).

    Lin et al. 2024, arXiv:2402.19078, with y_t = (L_t - ideal) / reference_t, or its logarithm, which their code
    for multi-task learning takes (`log`, the default). reference_t is the task's mean of L_t - ideal over its warm-up; until
    that ends the task has w_t = 1 / (L_t - ideal), the gradient of the sum of logarithms, as in their code.

    Deviations: the warm-up counts the task's own appearances, all of which enter its reference, instead of epochs, of which
    the last does; the softmax is over active tasks past their warm-up, and A is the number of these. L_t - ideal counts as at
    least 1e-8.

    Args:
        mu: smoothing; small ones leave only the worst task a weight. The paper tries 0.01 to 1.
        warmup: appearances of a task before it takes part.
        ideal: the least loss thought possible (z* of the paper), of every task.
        log: whether y_t is the logarithm.
    """

    def __init__(self, *, mu: float = 1.0, warmup: int = 100, ideal: float = 0.0, log: bool = True):
        require(0 < mu < math.inf, "mu", mu, "a positive, finite number")
        require(warmup >= 1, "warmup", warmup, "a number of steps, at least 1")
        require(math.isfinite(ideal), "ideal", ideal, "a finite number")
        self.mu, self.warmup, self.ideal, self.log = mu, warmup, ideal, log

    def begin(self, facts: Facts) -> None:
        super().begin(facts)
        self.reference_T = torch.zeros(facts.num_tasks, device=facts.device)
        self.seen_T = torch.zeros(facts.num_tasks, dtype=torch.int64, device=facts.device)

    def weights(self, seen: Seen) -> Tensor:
        task_A = seen.task_A
        excess_A = (seen.loss_A - self.ideal).clamp_min(LOSS_FLOOR)
        reference_A, seen_A = self.reference_T[task_A], self.seen_T[task_A]
        ready_A = seen_A >= self.warmup
        running_A = reference_A + (excess_A - reference_A) / (seen_A + 1)
        self.reference_T[task_A] = torch.where(ready_A, reference_A, running_A)
        self.seen_T[task_A] = torch.where(ready_A, seen_A, seen_A + 1)

        ratio_A = excess_A / reference_A
        y_A = torch.where(ready_A, ratio_A.log() if self.log else ratio_A, -math.inf)
        # the largest is taken off before the division by mu; with no task ready there is none
        part_A = torch.softmax(torch.where(ready_A, (y_A - y_A.max()) / self.mu, -math.inf), 0)
        slope_A = 1 / (excess_A if self.log else reference_A)
        return torch.where(ready_A, ready_A.sum() * part_A * slope_A, 1 / excess_A)

"""Uncertainty weighting: each task's noise is learned along with the model."""

from __future__ import annotations

import torch
from torch import Tensor

from mtrain.balance.base import Seen
from mtrain.balance.common import LOSS_FLOOR, Learned, Optimizer, require

STEEPEST = 100.0  # how far below 0 the slope in s may be; a loss of 200 times that at which s rests reaches it


class Uncertainty(Learned):
    """Learned log-variances s_t: w_t = exp(-s_t) / 2 for regression, exp(-s_t) for other tasks.

    Kendall et al. 2018, arXiv:1705.07115, equations 7 and 10 with s = log sigma^2. s_t descends

        T share_t (w_t L_t + s_t / 2),    whose slope is    T share_t (1/2 - w_t L_t)    in both forms,

    on active tasks only: with the regulariser masked like the loss and both under the task's expected share of the objective,
    s rests at w_t = 1 / (2 L_t) with either share dial, however often a task is there. The weights of a step are those from
    before its update of s.

    Deviations: an optimizer of its own instead of the model's (the paper says nothing of rates; these defaults are ours),
    without weight decay; the slope is at least -100 T share_t, so that one huge loss does not throw s away; losses count as
    at least 1e-8.

    Args:
        initial: s of a task that was not there yet, from -20 to 20.
        lr: step size; of Adam about the relative change of a weight in a step.
        optimizer: `adam`; or `sgd`, where tasks of a small share learn more slowly.
    """

    def __init__(self, *, initial: float = 0.0, lr: float = 0.01, optimizer: Optimizer = "adam"):
        require(-20 <= initial <= 20, "initial", initial, "a log-variance from -20 to 20")
        super().__init__(initial, lr, optimizer)

    def weights(self, seen: Seen) -> Tensor:
        task_A = seen.task_A
        s_A = self._values(task_A)
        weight_A = torch.where(self.facts.regression_T[task_A], 0.5, 1.0) * torch.exp(-s_A)
        slope_A = (0.5 - weight_A * seen.loss_A.clamp_min(LOSS_FLOOR)).clamp_min(-STEEPEST)
        self._descend(task_A, s_A, self.facts.num_tasks * self.facts.share_T[task_A] * slope_A)
        return weight_A

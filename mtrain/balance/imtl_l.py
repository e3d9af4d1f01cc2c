"""Impartial multi-task learning, the part on losses: scales that bring every loss to 1."""

from __future__ import annotations

import torch
from torch import Tensor

from mtrain.balance.base import Seen
from mtrain.balance.common import LOSS_FLOOR, Learned, Optimizer, require

STEEPEST = 100.0


class IMTLL(Learned):
    """Learned scales x_t: w_t = exp(x_t), where x_t descends exp(x_t) L_t - x_t and rests at w_t = 1 / L_t.

    Liu et al. 2021, "Towards Impartial Multi-task Learning" (ICLR), with base e. Active tasks only, both terms
    under T times the task's expected share of the objective. The weights of a step are those from before its update of x.

    Deviations: an optimizer of its own instead of the model's (these defaults are ours), without weight decay; the slope is
    at most 100 T share_t, so that one huge loss does not throw x away; losses count as at least 1e-8.

    Args:
        initial: x of a task that was not there yet, from -20 to 20.
        lr: step size; of Adam about the relative change of a weight in a step.
        optimizer: `adam`; or `sgd`, where tasks of a small share learn more slowly.
    """

    def __init__(self, *, initial: float = 0.0, lr: float = 0.01, optimizer: Optimizer = "adam"):
        require(-20 <= initial <= 20, "initial", initial, "the logarithm of a weight, from -20 to 20")
        super().__init__(initial, lr, optimizer)

    def weights(self, seen: Seen) -> Tensor:
        task_A = seen.task_A
        x_A = self._values(task_A)
        weight_A = torch.exp(x_A)
        slope_A = (weight_A * seen.loss_A.clamp_min(LOSS_FLOOR) - 1).clamp_max(STEEPEST)
        self._descend(task_A, x_A, self.facts.num_tasks * self.facts.share_T[task_A] * slope_A)
        return weight_A

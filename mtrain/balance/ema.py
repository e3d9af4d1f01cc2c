"""Losses divided by their moving average."""

from __future__ import annotations

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Facts, Seen
from mtrain.balance.common import LOSS_FLOOR, require


class EMA(Balancer):
    """w_t = 1 / m_t, where m_t is the exponential moving average of the task's loss over its own appearances.

    Lakkapragada et al. 2023, arXiv:2211.12999. m_t begins with the task's first loss and has this step's in it:
    m_t <- beta m_t + (1 - beta) L_t.

    Deviation: losses count as at least 1e-8. The default of beta is ours.

    Args:
        beta: from 0 (each loss divided by itself) to below 1.
    """

    def __init__(self, *, beta: float = 0.9):
        require(0 <= beta < 1, "beta", beta, "at least 0 and below 1")
        self.beta = beta

    def begin(self, facts: Facts) -> None:
        super().begin(facts)
        self.mean_T = torch.zeros(facts.num_tasks, device=facts.device)  # 0: not seen yet

    def weights(self, seen: Seen) -> Tensor:
        loss_A, mean_A = seen.loss_A.clamp_min(LOSS_FLOOR), self.mean_T[seen.task_A]
        mean_A = torch.where(mean_A > 0, mean_A.lerp(loss_A, 1 - self.beta), loss_A)
        self.mean_T[seen.task_A] = mean_A
        return 1 / mean_A

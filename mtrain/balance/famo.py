"""Fast adaptive multitask optimization: every loss falls at the same rate."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from mtrain.balance.base import Seen
from mtrain.balance.common import LOSS_FLOOR, Learned, require


class FAMO(Learned):
    """w_t = A z_t / L_t / sum(z / L), z = softmax(x) over the A active tasks; x is learned from how far a step takes log L.

    Liu et al. 2023, arXiv:2306.03792: after the step, with d_t = log L_t before - log L_t after on the same batch,
    x descends along z_t (d_t - sum(z d)) + gamma x_t, by Adam as in the authors' code.

    Deviations: times A, because J is a mean over labels where the paper has weights that sum to 1; losses count as at least
    1e-8 (their code adds it). Tasks that are in only one of the two looks at the batch do not move.

    Args:
        gamma: pull of x towards equal logits. The authors' code has 0.01 or 1e-5, their paper 0.001.
        lr: step size of Adam.
    """

    second_forward: ClassVar[bool] = True

    def __init__(self, *, gamma: float = 0.001, lr: float = 0.025):
        require(0 <= gamma < math.inf, "gamma", gamma, "a finite number, at least 0")
        super().__init__(0.0, lr, "adam")
        self.gamma = gamma
        self._before: Seen | None = None

    def weights(self, seen: Seen) -> Tensor:
        self._before = seen
        logit_A = self._values(seen.task_A) - seen.loss_A.clamp_min(LOSS_FLOOR).log()  # z / L, normalised, is a softmax
        return len(logit_A) * torch.softmax(logit_A, 0)

    def after(self, seen: Seen) -> None:
        before, self._before = self._before, None
        if before is None:
            return
        place_A = torch.searchsorted(before.task_A, seen.task_A).clamp_max(len(before.task_A) - 1)
        in_both_A = before.task_A[place_A] == seen.task_A
        task_A, after_A, before_A = seen.task_A[in_both_A], seen.loss_A[in_both_A], before.loss_A[place_A][in_both_A]
        fall_A = before_A.clamp_min(LOSS_FLOOR).log() - after_A.clamp_min(LOSS_FLOOR).log()
        logit_A = self._values(task_A)
        z_A = torch.softmax(logit_A, 0)
        self._descend(task_A, logit_A, z_A * (fall_A - (z_A * fall_A).sum()) + self.gamma * logit_A)

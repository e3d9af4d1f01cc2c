"""GradNorm: gradient norms are brought to a common size, larger for tasks that learn slowly."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from mtrain.balance.base import Facts, Need, Seen
from mtrain.balance.common import LOSS_FLOOR, Learned, Optimizer, require

Mode = Literal["learned", "closed"]

LEAST_WEIGHT = 1e-6  # a step that would make a weight 0 or negative stops here
LEAST_NORM = 1e-3  # of the mean norm: smaller ones count as this in the closed form
PULL = 1e6  # r^alpha is kept from 1e-6 to 1e6
ROUNDING = 1e-6  # the sign of a smaller relative difference would be that of rounding


class GradNorm(Learned):
    """w_t n_t is drawn to mean(w n) r_t^alpha, where n_t = |g_t| and r_t = (L_t / L_t0) / mean(L / L_0), over active tasks.

    Chen et al. 2018, arXiv:1711.02257, equations 1 and 2 and algorithm 1. n_t and r_t need no second backward: the gradient of
    sum |w_t n_t - target_t| with respect to w_t, targets held constant, is n_t sign(w_t n_t - target_t).

    `learned` takes an optimizer's step along it; the weights returned are those from before the step. `closed` returns the
    fixed point, w_t ~ r_t^alpha / n_t, from moving averages of n_t^2 and L_t over a task's own appearances, this step's
    included; a task without gradient gets weight 1, and norms below 1e-3 of the mean count as that.

    Absent tasks: means are over the A active tasks, and returned weights sum to A. A learned step leaves the sum of the active
    tasks' weights as it was, so that all T sum to T at all times, as in the paper, and those of absent tasks stay as they are.

    Deviations: r_t^alpha is kept from 1e-6 to 1e6, learned weights above 1e-6; losses count as at least 1e-8.

    Args:
        mode: `learned` (the paper) or `closed`.
        alpha: strength of the pull towards a common rate of learning; 0 equalises norms. The paper has 0.12 to 1.5.
        lr, optimizer: of `learned`.
        beta: of the moving averages of `closed`, from 0 to below 1.
        initial_loss: L_t0 of all tasks, such as log K for K classes; None: the task's first loss.
        initial_steps: over how many first appearances a task's first loss is averaged.
    """

    needs: ClassVar[Need] = "norms"

    def __init__(
        self,
        *,
        mode: Mode = "learned",
        alpha: float = 1.5,
        lr: float = 0.025,
        optimizer: Optimizer = "adam",
        beta: float = 0.9,
        initial_loss: float | None = None,
        initial_steps: int = 1,
    ):
        super().__init__(1.0, lr, optimizer)
        require(mode in get_args(Mode), "mode", mode, f"one of {', '.join(get_args(Mode))}")
        require(0 <= alpha < math.inf, "alpha", alpha, "a finite number, at least 0")
        require(0 <= beta < 1, "beta", beta, "at least 0 and below 1")
        known = initial_loss is None or 0 < initial_loss < math.inf
        require(known, "initial_loss", initial_loss, "a positive, finite number")
        require(initial_steps >= 1, "initial_steps", initial_steps, "a number of steps, at least 1")
        self.mode, self.alpha, self.beta = mode, alpha, beta
        self.initial_loss, self.initial_steps = initial_loss, initial_steps

    def begin(self, facts: Facts) -> None:
        super().begin(facts)
        self.first_T, self.loss_T, self.norm2_T = (torch.zeros(facts.num_tasks, device=facts.device) for _ in range(3))
        self.seen_T = torch.zeros(facts.num_tasks, dtype=torch.int64, device=facts.device)

    def weights(self, seen: Seen) -> Tensor:
        assert seen.norm2_A is not None
        task_A, norm2_A = seen.task_A, seen.norm2_A.clamp_min(0)  # an unbiased estimate may be below 0
        seen_A, first_A = self.seen_T[task_A], self.first_T[task_A]
        self.seen_T[task_A] = seen_A + 1
        running_A = first_A + (seen.loss_A - first_A) / (seen_A + 1)
        first_A = torch.where(seen_A < self.initial_steps, running_A, first_A)
        self.first_T[task_A] = first_A
        if self.initial_loss is not None:
            first_A = torch.full_like(first_A, self.initial_loss)
        if self.mode == "learned":
            return self._learned(task_A, norm2_A.sqrt(), self._pull(seen.loss_A, first_A))

        new_A = seen_A == 0
        loss_A = torch.where(new_A, seen.loss_A, self.loss_T[task_A].lerp(seen.loss_A, 1 - self.beta))
        norm2_A = torch.where(new_A, norm2_A, self.norm2_T[task_A].lerp(norm2_A, 1 - self.beta))
        self.loss_T[task_A], self.norm2_T[task_A] = loss_A, norm2_A
        return _closed(norm2_A.sqrt(), self._pull(loss_A, first_A))

    def _pull(self, loss_A: Tensor, first_A: Tensor) -> Tensor:
        """r_t^alpha, from logarithms."""
        log_A = loss_A.clamp_min(LOSS_FLOOR).log() - first_A.clamp_min(LOSS_FLOOR).log()
        log_A = log_A - (log_A.logsumexp(0) - math.log(len(log_A)))
        return torch.exp((self.alpha * log_A).clamp(-math.log(PULL), math.log(PULL)))

    def _learned(self, task_A: Tensor, norm_A: Tensor, pull_A: Tensor) -> Tensor:
        weight_A = self._values(task_A)
        size_A = weight_A * norm_A
        gap_A = size_A - size_A.mean() * pull_A
        sign_A = torch.where(gap_A.abs() > ROUNDING * size_A, gap_A.sign(), 0)
        new_A = self._descend(task_A, weight_A, norm_A * sign_A).clamp_min(LEAST_WEIGHT)
        self.value_T[task_A] = new_A * (weight_A.sum() / new_A.sum())
        return weight_A / weight_A.mean()


def _closed(norm_A: Tensor, pull_A: Tensor) -> Tensor:
    moves_A = norm_A > 0
    count = moves_A.sum().clamp_min(1)
    norm_A = (norm_A / (norm_A.sum() / count)).clamp_min(LEAST_NORM)
    wanted_A = torch.where(moves_A, pull_A / norm_A, 0)
    return torch.where(moves_A, wanted_A * (count / wanted_A.sum()), 1.0)

"""What balancers from losses share: checks of options, and a learned number for each task."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Facts
from mtrain.errors import UserError

LOSS_FLOOR = 1e-8  # losses below count as this one wherever one is divided by or its logarithm taken

Optimizer = Literal["adam", "sgd"]

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # of Adam, as torch.optim has them


def require(valid: bool, option: str, value: object, expected: str) -> None:
    """
    Raises:
        UserError: unless `valid`.
    """
    if not valid:
        raise UserError(f"balancer: {option} is {value}, expected {expected}")


class Learned(Balancer):
    """A number x_t for each task, learned by an optimizer of the balancer's own from gradients in closed form.

    Steps are taken on active tasks only, with a step count per task: what is absent does not move, bit by bit. There is no
    weight decay but what a subclass adds to the gradient. A state of zeros is that of a new task.

    Args:
        initial: x_t of a task that had no step yet.
        lr: step size; of Adam (betas 0.9 and 0.999) about how far x_t moves in a step.
        optimizer: `adam` or plain `sgd`.
    """

    def __init__(self, initial: float, lr: float, optimizer: Optimizer):
        require(0 < lr < math.inf, "lr", lr, "a positive, finite number")
        require(optimizer in ("adam", "sgd"), "optimizer", optimizer, "adam or sgd")
        self.initial, self.lr, self.optimizer = initial, lr, optimizer

    def begin(self, facts: Facts) -> None:
        super().begin(facts)
        self.value_T, self.moment_T, self.square_T = (torch.zeros(facts.num_tasks, device=facts.device) for _ in range(3))
        self.steps_T = torch.zeros(facts.num_tasks, dtype=torch.int64, device=facts.device)

    def _values(self, task_A: Tensor) -> Tensor:
        return torch.where(self.steps_T[task_A] > 0, self.value_T[task_A], self.initial)

    def _descend(self, task_A: Tensor, value_A: Tensor, grad_A: Tensor) -> Tensor:
        """Takes a step of the active tasks from their x `[A]` and returns the new ones."""
        steps_A = self.steps_T[task_A] + 1
        step_A = grad_A
        if self.optimizer == "adam":
            moment_A = self.moment_T[task_A].lerp(grad_A, 1 - _BETAS[0])
            square_A = self.square_T[task_A].lerp(grad_A.square(), 1 - _BETAS[1])
            self.moment_T[task_A], self.square_T[task_A] = moment_A, square_A
            bias_1, bias_2 = (1 - torch.exp(steps_A * math.log(beta)) for beta in _BETAS)
            step_A = moment_A / bias_1 / ((square_A / bias_2).sqrt() + _EPSILON)
        value_A = value_A - self.lr * step_A
        self.value_T[task_A], self.steps_T[task_A] = value_A, steps_A
        return value_A

"""Many small minimisations at once: L-BFGS (Liu and Nocedal 1989, "On the limited memory BFGS method for large scale
optimization") with each problem's own step length and end."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HISTORY = 10
STEPS, HALVINGS = 100, 20
ENOUGH = 1e-4  # share of the fall that the slope promises (Armijo's condition)
CONVERGED = 1e-6  # largest element of the gradient, relative to 1 + |value|
STUCK = 1e-10  # fall of the value in a step, likewise


def minimize(function: Callable[[Tensor], Tensor], start_AD: Tensor) -> Tensor:
    """Where each of A functions of D numbers is least.

    Args:
        function: values `[A]` at `[A, D]`, differentiable; problem a depends on row a alone. Sums, not means: the bound of
            convergence is relative to the value.
        start_AD: where to begin.
    """
    at_AD, value_A, grad_AD = start_AD, *_evaluate(function, start_AD)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    scale_A1 = 1 / grad_AD.norm(dim=1, keepdim=True).clamp(min=1)
    moving_A = torch.ones_like(value_A, dtype=torch.bool)
    for _ in range(STEPS):
        moving_A = moving_A & (grad_AD.abs().amax(1) > CONVERGED * (1 + value_A.abs()))
        if not moving_A.any():
            break
        direction_AD = -_times_inverse(grad_AD, pairs, scale_A1)
        slope_A = (direction_AD * grad_AD).sum(1)
        length_A = moving_A.to(value_A)
        for _ in range(HALVINGS):
            new_AD = at_AD + length_A[:, None] * direction_AD
            new_value_A, new_grad_AD = _evaluate(function, new_AD)
            enough_A = (new_value_A <= value_A + ENOUGH * length_A * slope_A) | ~moving_A
            if enough_A.all():
                break
            length_A = torch.where(enough_A, length_A, length_A / 2)
        moving_A = moving_A & enough_A
        kept_A1 = moving_A[:, None]
        step_AD = torch.where(kept_A1, new_AD - at_AD, 0)
        turn_AD = torch.where(kept_A1, new_grad_AD - grad_AD, 0)
        both_A1, square_A1 = (step_AD * turn_AD).sum(1, keepdim=True), turn_AD.square().sum(1, keepdim=True)
        usable_A1 = both_A1 > 1e-12 * square_A1
        pairs = [*pairs, (step_AD, turn_AD, torch.where(usable_A1, 1 / both_A1, 0))][-HISTORY:]
        scale_A1 = torch.where(usable_A1, both_A1 / square_A1, scale_A1)
        at_AD, grad_AD = torch.where(kept_A1, new_AD, at_AD), torch.where(kept_A1, new_grad_AD, grad_AD)
        fallen_A = torch.where(moving_A, value_A - new_value_A, 0)
        value_A = value_A - fallen_A
        moving_A = moving_A & (fallen_A > STUCK * (1 + value_A.abs()))
    return at_AD


def _evaluate(function: Callable[[Tensor], Tensor], at_AD: Tensor) -> tuple[Tensor, Tensor]:
    at_AD = at_AD.detach().requires_grad_()
    with torch.enable_grad():
        value_A = function(at_AD)
        (grad_AD,) = torch.autograd.grad(value_A.sum(), at_AD)
    return value_A.detach(), grad_AD


def _times_inverse(grad_AD: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]], scale_A1: Tensor) -> Tensor:
    """The gradient times the inverse Hessian as the last steps show it; a pair of factor 0 is left out."""
    weights = []
    for step_AD, turn_AD, factor_A1 in reversed(pairs):
        weights.append(factor_A1 * (step_AD * grad_AD).sum(1, keepdim=True))
        grad_AD = grad_AD - weights[-1] * turn_AD
    grad_AD = grad_AD * scale_A1
    for (step_AD, turn_AD, factor_A1), weight_A1 in zip(pairs, reversed(weights), strict=True):
        grad_AD = grad_AD + (weight_A1 - factor_A1 * (turn_AD * grad_AD).sum(1, keepdim=True)) * step_AD
    return grad_AD

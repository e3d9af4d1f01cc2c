"""Nash-MTL: the tasks' bargaining solution."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Need, Seen
from mtrain.balance.solvers import expect, fair_weights, gram_of, solve


class Nash(Balancer):
    """The positive w with G w = 1/w (Navon et al. 2022, arXiv:2202.01017, claim 3.1 and eq. 2), to a residual of 1e-9: the
    direction is long sqrt(A), and does not change when a task's loss is scaled.

    Args:
        normalization: `frobenius` solves for G / |G|_F as the authors' code does, so that the direction's length follows that
            of the gradients; `none` solves for G.
        max_norm: longest direction; w is scaled down where it is longer. 0: any. The authors' code has 1.

    Deviations: Newton's method on the equation in place of a sequence of convex programs cut off after 20; a ridge of 1.2e-7 A
    of each task's squared norm, the rounding of G, without which there is no solution at a Pareto-stationary point. How often
    to update is the trainer's option.
    """

    needs: ClassVar[Need] = "gram"
    weighs_heads = False

    def __init__(self, normalization: Literal["frobenius", "none"] = "frobenius", max_norm: float = 1.0):
        expect(normalization in ("frobenius", "none"), "balancer nash: normalization", normalization, "frobenius or none")
        expect(0 <= max_norm < torch.inf, "balancer nash: max_norm", max_norm, "a number >= 0")
        self.normalization, self.max_norm = normalization, max_norm

    def weights(self, seen: Seen) -> Tensor:
        gram_AA = gram_of(seen.gram_AA)
        w_A = solve(gram_AA, self._weights, degree=0 if self.normalization == "frobenius" else -1)
        if self.max_norm == 0:
            return w_A
        w = w_A.double()
        length = (w @ gram_AA.double() @ w).clamp(min=0).sqrt()
        return (w * (self.max_norm / length).clamp(max=1)).float()

    def _weights(self, gram: Tensor) -> Tensor:
        scale = gram.norm().sqrt() if self.normalization == "frobenius" else 1.0
        return scale * fair_weights(gram, 1.0)

"""FairGrad: alpha-fair shares of the decrease of the losses."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Need, Seen
from mtrain.balance.solvers import expect, fair_weights, gram_of, solve


class FairGrad(Balancer):
    """The positive w with G w = w^(-1/alpha) (Ban and Ji 2024, arXiv:2402.15638, eq. 4), to a residual of 1e-9.

    Args:
        alpha: 1 is proportional fairness (Nash-MTL without its scaling), 2 favours tasks that are served worse (the authors'
            choice in most experiments), large is max-min; 0 is w = 1.

    Deviations: Newton's method in place of bounded least squares; a ridge of 1.2e-7 A of each task's squared norm, the
    rounding of G, without which there is no solution at a Pareto-stationary point.
    """

    needs: ClassVar[Need] = "gram"
    weighs_heads = False

    def __init__(self, alpha: float = 2.0):
        expect(alpha == 0 or 0.2 <= alpha <= 20, "balancer fairgrad: alpha", alpha, "0, or a number from 0.2 to 20")
        self.alpha = alpha

    def weights(self, seen: Seen) -> Tensor:
        gram_AA = gram_of(seen.gram_AA)
        if self.alpha == 0:
            return torch.ones_like(gram_AA[0])
        return solve(gram_AA, lambda gram: fair_weights(gram, self.alpha), degree=-2 * self.alpha / (1 + self.alpha))

"""Conflict-averse gradient descent: near the mean gradient, best for the task that is served worst."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Need, Seen
from mtrain.balance.solvers import expect, gram_of, simplex_minimum, solve

SMOOTHING = 1e-8  # of the mean squared norm, added to |g_w|^2


class CAGrad(Balancer):
    """d = g_0 + c |g_0| g_w / |g_w|, with g_0 the mean gradient and w on the simplex the minimum of
    <g_w, g_0> + c |g_0| |g_w| (Liu et al. 2021, arXiv:2110.14048, eq. 4 and algorithm 1): weights 1/A + c |g_0| / |g_w| w.

    Args:
        c: radius of the ball around g_0, in |g_0|: 0 is the mean gradient; large is MGDA's direction. The paper's theory
            has c < 1, its experiments 0.2 to 0.5.

    Deviations: as in the authors' code |g_w|^2 has 1e-8 of the mean squared norm added, so that w is continuous where g_w
    vanishes; d is not divided by 1 + c^2 as there. The minimum is found by an interior-point method, to 1e-10 |g_0|^2.
    """

    needs: ClassVar[Need] = "gram"
    weighs_heads = False

    def __init__(self, c: float = 0.5):
        expect(0 <= c < torch.inf, "balancer cagrad: c", c, "a number >= 0")
        self.c = c

    def weights(self, seen: Seen) -> Tensor:
        return solve(gram_of(seen.gram_AA), self._weights)

    def _weights(self, gram: Tensor) -> Tensor:
        mean = gram.new_full((len(gram),), 1 / len(gram))
        with_mean = gram @ mean
        square = (mean @ with_mean).clamp(min=0)
        radius = self.c * square.sqrt()
        if radius == 0:
            return mean

        def length(w: Tensor) -> Tensor:
            return ((w @ gram @ w).clamp(min=0) + SMOOTHING).sqrt()

        def model(w: Tensor) -> tuple[Tensor, Tensor]:
            unit = gram @ w / length(w)
            return with_mean + radius * unit, radius / length(w) * (gram - torch.outer(unit, unit))

        w = simplex_minimum(model, mean, lambda w, gap: gap <= 1e-10 * square)
        return mean + radius / length(w) * w

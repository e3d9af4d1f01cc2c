"""DB-MTL: logarithms of losses, and gradients all as long as the longest."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Need, Seen
from mtrain.balance.solvers import expect


class DBMTL(Balancer):
    """With h_t = g_t / L_t the gradients of log L_t, the direction is max_s |h_s| * sum_t h_t / |h_t| (Lin et al. 2023,
    arXiv:2308.12029, eq. 2 to 4): w_t = max_s (|g_s| / L_s) / |g_t|. From norms alone, without the Gram matrix.

    Args:
        eps: least loss, as the authors' code adds to a loss before its logarithm.

    Deviations: the paper's moving average of the gradients themselves (its beta, 0.9 at first) would take a gradient for each
    task and is left out; smooth the squared norms over steps in its place. A task without a gradient gets the mean weight of
    the others.
    """

    needs: ClassVar[Need] = "norms"
    weighs_heads = False

    def __init__(self, eps: float = 1e-8):
        expect(0 < eps < torch.inf, "balancer db_mtl: eps", eps, "a number > 0")
        self.eps = eps

    def weights(self, seen: Seen) -> Tensor:
        assert seen.norm2_A is not None, "a balancer that needs norms was not given them"
        norm_A = seen.norm2_A.double().clamp(min=0).sqrt()
        alive_A = norm_A > 0
        if not alive_A.any():
            return torch.ones_like(seen.norm2_A)
        longest = (norm_A / seen.loss_A.double().clamp(min=self.eps)).max()
        w_A = longest / norm_A
        return torch.where(alive_A, w_A, w_A[alive_A].mean()).clamp(max=1e37).float()

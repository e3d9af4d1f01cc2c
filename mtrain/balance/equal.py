"""Plain scalarisation: every task's weight is 1."""

from __future__ import annotations

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Seen


class Equal(Balancer):
    """w_t = 1: the objective's `share` and `scale` alone decide (Xin et al. 2022, arXiv:2209.11379: hard to beat)."""

    def weights(self, seen: Seen) -> Tensor:
        return torch.ones_like(seen.loss_A)

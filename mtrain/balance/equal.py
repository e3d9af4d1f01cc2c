"""Plain scalarisation: every task's weight is 1."""

from __future__ import annotations

import torch
from torch import Tensor


class Equal:
    """w_t = 1: the objective's `share` and `scale` alone decide (Xin et al. 2022, arXiv:2209.11379: hard to beat)."""

    def weights(self, loss_T: Tensor, active_T: Tensor) -> Tensor:
        return torch.ones_like(loss_T)

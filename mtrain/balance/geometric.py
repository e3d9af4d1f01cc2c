"""The geometric mean of losses instead of their mean."""

from __future__ import annotations

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Seen
from mtrain.balance.common import LOSS_FLOOR


class Geometric(Balancer):
    """w_t = GM / L_t, with GM the geometric mean of the A active tasks' losses, from the mean of their logarithms.

    Chennupati et al. 2019, arXiv:1904.08492 (geometric loss strategy). The gradient of GM is the sum of GM / (A L_t) times
    those of L_t; J has the 1/A already, as it is a mean, so that this is its gradient where tasks have equal shares.

    Deviation: losses count as at least 1e-8.
    """

    def weights(self, seen: Seen) -> Tensor:
        log_A = seen.loss_A.clamp_min(LOSS_FLOOR).log()
        return torch.exp(log_A.mean() - log_A)

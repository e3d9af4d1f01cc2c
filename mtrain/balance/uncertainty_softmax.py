"""Uncertainty weighting with its optimum in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Seen
from mtrain.balance.common import LOSS_FLOOR, require


class UncertaintySoftmax(Balancer):
    """w_t = A softmax_t(1 / (L_t temperature)) over the A active tasks.

    Kirchdorfer et al. 2024, arXiv:2408.07985 (UW-SO): the learned variances of uncertainty weighting are replaced by those
    that minimise it for the losses at hand, and the inverse losses go through a softmax.

    Deviations: times A, because J is a mean over labels where the paper has a sum of weights that sum to 1; losses count as
    at least 1e-8. The paper tunes the temperature for each data set; the default is ours.

    Args:
        temperature: large ones even weights out; it has the unit of 1 / loss.
    """

    def __init__(self, *, temperature: float = 10.0):
        require(0 < temperature < math.inf, "temperature", temperature, "a positive, finite number")
        self.temperature = temperature

    def weights(self, seen: Seen) -> Tensor:
        inverse_A = 1 / seen.loss_A.clamp_min(LOSS_FLOOR)
        return len(inverse_A) * torch.softmax((inverse_A - inverse_A.max()) / self.temperature, 0)

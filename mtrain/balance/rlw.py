"""Random loss weighting: a baseline that fancier methods should beat."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Seen
from mtrain.balance.common import require

Distribution = Literal["normal", "uniform", "dirichlet", "bernoulli"]


class RLW(Balancer):
    """Weights drawn anew at each step, with a mean of 1 over the active tasks.

    Lin et al. 2022, arXiv:2111.10603: draws of a standard normal or uniform distribution go through a softmax; of Dirichlet(1)
    they sum to 1 by themselves; of Bernoulli(1/2) they are divided by their sum (all 1 where every draw is 0).

    Deviation: times A, because J is a mean over labels where the paper has a sum of weights that sum to 1. Draws are a
    function of seed and step, made on the CPU: alike on every rank, device and after a resume.

    Args:
        distribution: of the draws.
        seed: another one gives other weights.
    """

    def __init__(self, *, distribution: Distribution = "normal", seed: int = 0):
        known = get_args(Distribution)
        require(distribution in known, "distribution", distribution, f"one of {', '.join(known)}")
        self.distribution, self.seed = distribution, seed

    def weights(self, seen: Seen) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + seen.step) % 2**63)
        draw_A = torch.empty(len(seen.task_A))
        if self.distribution == "normal":
            draw_A = draw_A.normal_(generator=generator).softmax(0)
        elif self.distribution == "uniform":
            draw_A = draw_A.uniform_(generator=generator).softmax(0)
        elif self.distribution == "dirichlet":
            draw_A = draw_A.exponential_(generator=generator)
        else:
            draw_A = draw_A.bernoulli_(0.5, generator=generator)
            draw_A = draw_A if draw_A.any() else torch.ones_like(draw_A)
        return (draw_A / draw_A.mean()).to(seen.loss_A.device)

"""PCGrad: gradients without what they have against one another."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Need, Seen
from mtrain.balance.solvers import gram_of, shuffled, solve, sweep, unit


class PCGrad(Balancer):
    """The sum over tasks of g_i, from which in turn, for each other g_j in random order, the part along g_j is taken out where
    it is negative (Yu et al. 2020, arXiv:2001.06782, algorithm 1). Without conflicts all weights are 1.

    Deviations: one random order a step for all i, not one for each. Every i still sees a uniform order, so the expected
    weights are the paper's, and a thousand tasks take one blocked pass. Seeded by the step.
    """

    needs: ClassVar[Need] = "gram"
    weighs_heads = False

    def weights(self, seen: Seen) -> Tensor:
        return solve(gram_of(seen.gram_AA), lambda gram: projected(gram, shuffled(len(gram), seen.step, gram.device)))


def projected(gram: Tensor, order: Tensor) -> Tensor:
    """Weights `[A]` with the tasks taken in this order."""
    cosine, norm = unit(gram[order][:, order])
    weight = torch.eye(len(norm), dtype=gram.dtype, device=gram.device)

    def rule(task: int, old: Tensor, inner: Tensor) -> Tensor:
        new = (-inner).clamp(min=0)
        new[task] = old[task]
        return new

    sweep(cosine, weight, rule)
    result = torch.empty_like(norm)
    result[order] = weight @ norm / norm
    return result

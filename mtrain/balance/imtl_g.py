"""IMTL-G: a direction with equal projections onto all gradients."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Need, Seen
from mtrain.balance.solvers import eigen, gram_of, solve, unit


class IMTLG(Balancer):
    """The w, sum 1, for which sum_t w_t g_t has the same projection onto every g_t / |g_t|: w ~ C^+ 1 / |g|, with C the
    cosines (Liu et al. 2021, "Towards Impartial Multi-task Learning", ICLR, eq. 4 to 6; the pseudoinverse for dependent
    gradients as in Quinton and Rey 2024, arXiv:2406.16232, there of G). Weights may be negative.

    Deviations: divided by |sum|, so that the projections are never negative (the paper's sum of 1 may ask for a step that
    raises every loss); eigenvalues within float32 rounding of 0 are left out; where the sum vanishes, 1/A each.
    """

    needs: ClassVar[Need] = "gram"
    weighs_heads = False

    def weights(self, seen: Seen) -> Tensor:
        return solve(gram_of(seen.gram_AA), equal_projections)


def equal_projections(gram: Tensor) -> Tensor:
    cosine, norm = unit(gram)
    value, vector = eigen(cosine)
    w = vector @ (vector.sum(0) / value) / norm
    total = w.sum().abs()
    rounding = 1e-7 * torch.maximum(w.abs().sum(), (1 / norm).sum() / value[-1])
    return torch.where(total > rounding, w / total, 1 / len(w))

"""Aligned-MTL: the gradients' principal components made equally long."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from mtrain.balance.base import Balancer, Need, Seen
from mtrain.balance.solvers import eigen, expect, gram_of, solve


class AlignedMTL(Balancer):
    """w = sigma V Lambda^(-1/2) V^T 1/A, with V, Lambda the eigenvectors and eigenvalues of G: the combination, with equal
    preferences, of the nearest gradients that are orthogonal and equally long (Senushkin et al. 2023, CVPR,
    arXiv:2305.19000, eq. 11 to 13 and algorithm 1). Weights may be negative.

    Args:
        scale: sigma^2 is the `min` (the paper), `median` or mean (`rmse`) of the eigenvalues.

    Deviations: eigenvalues within float32 rounding of 0 are left out.
    """

    needs: ClassVar[Need] = "gram"
    weighs_heads = False

    def __init__(self, scale: Literal["min", "median", "rmse"] = "min"):
        expect(scale in ("min", "median", "rmse"), "balancer aligned: scale", scale, "min, median or rmse")
        self.scale = scale

    def weights(self, seen: Seen) -> Tensor:
        return solve(gram_of(seen.gram_AA), self._weights)

    def _weights(self, gram: Tensor) -> Tensor:
        value, vector = eigen(gram)
        sigma = {"min": value[0], "median": value.median(), "rmse": value.mean()}[self.scale].sqrt()
        return sigma * vector @ (vector.mean(0) / value.sqrt()) * (len(gram) / len(vector))

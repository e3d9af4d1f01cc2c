"""Multiple-gradient descent: the shortest vector in the convex hull of the gradients."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mtrain.balance.base import Balancer, Need, Seen
from mtrain.balance.solvers import gram_of, least_norm, simplex_minimum, solve


class MGDA(Balancer):
    """w = argmin |sum_t w_t g_t|^2 over the simplex: weights sum to 1 (Desideri 2012, doi:10.1016/j.crma.2012.03.014; Sener
    and Koltun 2018, arXiv:1810.04650, eq. 3 to 5).

    Deviations: Sener and Koltun run Frank-Wolfe, which nears the minimum slowly; here active sets find it, or where they do not
    settle an interior-point method goes on until the gap to the minimum is below 1e-6 of it, or 1e-10 of the smallest squared
    norm. Tasks without a gradient, one of which would stop all, are left out.
    """

    needs: ClassVar[Need] = "gram"
    weighs_heads = False

    def weights(self, seen: Seen) -> Tensor:
        return solve(gram_of(seen.gram_AA), min_norm)


def min_norm(gram: Tensor) -> Tensor:
    if (found := least_norm(gram)) is not None:
        return found
    smallest = gram.diagonal().min()
    gram = gram / smallest
    start = 1 / gram.diagonal()

    def enough(x: Tensor, gap: Tensor) -> Tensor:
        return gap <= (1e-6 * (x @ gram @ x)).clamp(min=1e-10)

    return simplex_minimum(lambda x: (gram @ x, gram), start / start.sum(), enough)

"""UPGrad: each gradient projected to where no task loses, then the mean."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mtrain.balance.base import Balancer, Need, Seen
from mtrain.balance.solvers import cone_minimum, expect, gram_of, solve, unit

EXACT_TASKS = 256  # up to here in float64


class UPGrad(Balancer):
    """The mean of the gradients' projections onto the dual cone {d: <d, g_t> >= 0 for all t}: w = 1/A sum_i v_i with v_i the
    minimum of v^T G v over v >= e_i (Quinton and Rey 2024, arXiv:2406.16232, eq. 5 and proposition 1).

    Args:
        ridge: added to the diagonal of G / trace G, as in TorchJD: it makes the solution unique, and bounds |v_i| by
            1 / sqrt(ridge). A thousand equally long gradients have a ridge of 0.1 of their squares at the default.

    Deviations: TorchJD solves A programs with an active-set solver; here all at once, until the residual
    |min(v - e_i, (G + ridge) v)|, in units of the gradients' lengths, is below 1e-9 (1e-4 above 256 tasks, where float32 is
    used). Iterations are bounded: with a ridge of 1e-5 or less the programs of single tasks may end at 0.1.
    """

    needs: ClassVar[Need] = "gram"
    weighs_heads = False

    def __init__(self, ridge: float = 1e-4):
        expect(1e-6 <= ridge <= 1, "balancer upgrad: ridge", ridge, "a number from 1e-6 to 1")
        self.ridge = ridge

    def weights(self, seen: Seen) -> Tensor:
        return solve(gram_of(seen.gram_AA), self._weights)

    def _weights(self, gram: Tensor) -> Tensor:
        gram = gram.clone()
        gram.diagonal().add_(self.ridge * gram.trace())
        cosine, norm = unit(gram)
        exact = len(gram) <= EXACT_TASKS
        u = cone_minimum(cosine if exact else cosine.float(), 1e-9 if exact else 1e-4)
        return norm @ u.double() / norm / len(gram)

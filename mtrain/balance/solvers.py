"""Small dense problems that balancers solve: on the simplex, over a cone, in sequence over tasks; in torch on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mtrain.errors import UserError

RANK_CUTOFF = torch.finfo(torch.float32).eps  # times the size: below this share of the largest, an eigenvalue is rounding
BLOCK = 32  # tasks of a sweep that are taken together: one matrix product for their gradients, the rest within them


def solve(gram_AA: Tensor, method: Callable[[Tensor], Tensor], degree: float = 0.0) -> Tensor:
    """Weights `[A]` in float32 from `method`, which gets the Gram matrix of the tasks whose gradient is not zero, in
    float64, symmetric, with a mean diagonal of 1.

    A task without a gradient says nothing of the direction: it gets the mean weight of the others, so that its head is
    neither frozen nor flung. With no gradient at all every weight is 1.

    Args:
        degree: the weights' degree in the gradients' overall scale s: w(s^2 G) = s^degree w(G).
    """
    weight_A = torch.ones(len(gram_AA), dtype=torch.float64, device=gram_AA.device)
    gram = gram_AA.double()
    alive_A = gram.diagonal() > 0
    if alive_A.any():
        gram = gram[alive_A][:, alive_A]
        scale = gram.diagonal().mean()
        weight = method((gram + gram.T) / (2 * scale)) * scale ** (degree / 2)
        weight_A = torch.where(alive_A, weight_A, weight.mean())
        weight_A[alive_A] = weight
    return weight_A.clamp(-1e37, 1e37).float()


def unit(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix of cosines `[A, A]`, with a diagonal of 1, and the norms `[A]`: G = n C n."""
    norm = gram.diagonal().sqrt()
    cosine = (gram / norm / norm[:, None]).clamp(-1, 1)
    return cosine, norm


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[R]`, ascending, and eigenvectors `[A, R]` of a positive semidefinite matrix, those of rounding left out."""
    value, vector = torch.linalg.eigh(matrix)
    kept = value > value[-1] * len(matrix) * RANK_CUTOFF
    return value[kept], vector[:, kept]


def least_norm(matrix: Tensor, rounds: int = 12) -> Tensor | None:
    """The x on the simplex where x^T M x is least, by primal-dual active sets (Hintermueller, Ito and Kunisch 2002): guess
    which entries are not 0, solve for them, and correct the guess by the signs; a guess that stays is the minimum.

    Args:
        matrix: positive semidefinite `[A, A]`.
        rounds: bound on the guesses.

    Returns:
        None where the guesses do not settle, or leave a matrix that may be singular but for the rounding of M: then there may
        be many minima.
    """
    free = torch.ones_like(matrix[0], dtype=torch.bool)
    for _ in range(rounds):
        factored = _factor(matrix[free][:, free])
        if factored is None or factored[0].diagonal().min().square() < 10 * len(matrix) * RANK_CUTOFF:
            return None
        x = torch.zeros_like(matrix[0])
        x[free] = _solved(factored, torch.ones_like(x[free])[:, None])[:, 0]
        x /= x.sum()
        slope = matrix @ x
        better = torch.where(free, x > 0, slope < (1 - 1e-9) * (x @ slope))
        if torch.equal(better, free):
            return x
        free = better
    return None


def simplex_minimum(
    model: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, enough: Callable[[Tensor, Tensor], Tensor], steps: int = 60
) -> Tensor:
    """The minimum of a convex function over the simplex, by a primal-dual interior-point method (Nocedal and Wright 2006,
    section 14.2 with the centring of Mehrotra): one Cholesky factorisation a step, whatever the condition.

    Where many points are minima it goes to the middle of them: equal tasks get equal weights.

    Args:
        model: from `x` the gradient `[A]` and the Hessian `[A, A]`.
        start: a point with positive entries that sum to 1.
        enough: from `x` and the gap, x^T grad - min grad >= f(x) - min f, whether to stop.
        steps: bound on the iterations.

    Returns:
        `x` with the least gap, not negative, sum 1.
    """
    x = start
    grad, hessian = model(x)
    level = grad.min() - (grad - grad.min()).mean() - grad.abs().max() * 1e-3
    z = grad - level
    best, least = x, torch.full((), torch.inf, dtype=x.dtype, device=x.device)
    for _ in range(steps):
        point = x / x.sum()
        gap = point @ grad - grad.min()
        if gap < least:
            best, least = point, gap
        if enough(point, gap):
            break
        mu = (x @ z) / len(x)
        factored = _factor(hessian, z / x)
        if factored is None:
            break
        target = torch.zeros_like(x)  # of x z: 0 at first, to see how far that step goes, then between 0 and as it is
        for ahead in (True, False):
            right = torch.stack([level + target / x - grad, torch.ones_like(x)], dim=1)
            solved = _solved(factored, right)
            d_level = (1 - x.sum() - solved[:, 0].sum()) / solved[:, 1].sum()
            d_x = solved[:, 0] + d_level * solved[:, 1]
            d_z = (target - x * z - z * d_x) / x
            if ahead:
                reach = torch.minimum(_reach(x, d_x), _reach(z, d_z))
                share = ((x + reach * d_x) @ (z + reach * d_z)) / (len(x) * mu)
                target = share**3 * mu - d_x * d_z
        reach = 0.995 * torch.minimum(_reach(x, d_x), _reach(z, d_z))
        x, z, level = x + reach * d_x, z + reach * d_z, level + reach * d_level
        grad, hessian = model(x)
    return best


def _reach(x: Tensor, step: Tensor) -> Tensor:
    """The longest step, at most 1, that leaves x >= 0."""
    return torch.where(step < 0, -x / step, torch.ones_like(x)).min().clamp(max=1)


def fair_point(matrix: Tensor, constant: Tensor, alpha: float, steps: int = 100, tolerance: float = 1e-9) -> Tensor:
    """The positive y with M y = c y^(-1/alpha): where the strictly convex y^T M y / 2 - sum c u(y) is least, u' = y^(-1/alpha),
    by Newton's method with backtracking.

    Args:
        matrix: positive definite `[A, A]`.
        constant: c, positive `[A]`.
        tolerance: of y^(1/alpha) (M y) / c, which is to be 1.
    """
    power = 1 - 1 / alpha

    def value(y: Tensor) -> Tensor:
        return y @ matrix @ y / 2 - (constant * (y.log() if power == 0 else y**power / power)).sum()

    y = (constant / matrix.diagonal()) ** (alpha / (1 + alpha))
    y *= ((constant * y**power).sum() / (y @ matrix @ y)) ** (alpha / (1 + alpha))  # the least along it
    for _ in range(steps):
        made, wanted = matrix @ y, constant * y ** (-1 / alpha)
        if (made / wanted - 1).abs().max() <= tolerance:
            break
        factored = _factor(matrix, wanted / (alpha * y))
        if factored is None:
            break
        step = _solved(factored, (wanted - made)[:, None])[:, 0]
        slope, now = (made - wanted) @ step, value(y)
        reach = torch.where(step < 0, -0.95 * y / step, torch.ones_like(y)).min().clamp(max=1)
        for _ in range(30 if -slope > 1e-10 * (y @ made) else 0):  # below that the values differ by rounding only
            if value(y + reach * step) <= now + 1e-4 * reach * slope:
                break
            reach = reach / 2
        y = y + reach * step
    return y


def fair_weights(gram: Tensor, alpha: float) -> Tensor:
    """The positive w with G w = w^(-1/alpha), G with a ridge of each task's squared norm that covers its rounding.

    Solved for y = |g| w with the matrix of cosines, whose condition does not depend on the gradients' scales.
    """
    cosine, norm = unit(gram)
    cosine.diagonal().add_(len(gram) * RANK_CUTOFF)
    return fair_point(cosine, norm ** (1 / alpha - 1), alpha) / norm


def _factor(matrix: Tensor, more: Tensor | float = 0.0) -> tuple[Tensor, Tensor] | None:
    """The Cholesky factor of a matrix with more on its diagonal, scaled to a diagonal of 1, and the scaling: what is added may
    span many decades. None where it is not positive definite."""
    root = (matrix.diagonal() + more).rsqrt()
    scaled = (matrix * root).mul_(root[:, None])
    scaled.diagonal().fill_(1)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    return None if failed else (factor, root)


def _solved(factored: tuple[Tensor, Tensor], right: Tensor) -> Tensor:
    factor, root = factored
    return root[:, None] * torch.cholesky_solve(root[:, None] * right, factor)


def sweep(matrix: Tensor, weight: Tensor, rule: Callable[[int, Tensor, Tensor], Tensor]) -> None:
    """Visit the tasks in turn, and give each its new coefficients in all combinations at once, in place.

    Args:
        matrix: inner products `[A, A]` of the tasks' gradients.
        weight: `[A, P]`: column p is a combination of them.
        rule: from a task, its coefficients `[P]` and its inner products with the P combinations as they are, the new ones.
    """
    for begin in range(0, len(matrix), BLOCK):
        rows = slice(begin, begin + BLOCK)
        inner, within = matrix[rows] @ weight, matrix[rows, rows]
        for j in range(len(inner)):
            old = weight[begin + j]
            new = rule(begin + j, old, inner[j])
            if j + 1 < len(inner):
                inner[j + 1 :].addr_(within[j + 1 :, j], new - old)
            weight[begin + j] = new


def shuffled(size: int, step: int, device: torch.device) -> Tensor:
    """An order of `size` tasks, drawn alike on every rank and device for this step."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(step)).to(device)


def expect(ok: bool, option: str, value: object, expected: str) -> None:
    if not ok:
        raise UserError(f"{option}: found {value}; expected {expected}")


def gram_of(gram_AA: Tensor | None) -> Tensor:
    assert gram_AA is not None, "a balancer that needs the Gram matrix was not given it"
    return gram_AA


def cone_minimum(matrix: Tensor, tolerance: float, rounds: int = 24) -> Tensor:
    """For each task i the u that makes u^T M u least over u >= e_i: `[A, A]`, one a row.

    All rows at once. Two sweeps of coordinate descent, then semismooth Newton steps (Hintermueller, Ito and Kunisch 2002,
    primal-dual active sets): guess which bounds hold, and solve for the other coefficients by conjugate gradients, a matrix
    product an iteration. Each row keeps its lowest iterate; where the guesses do not settle, longer descents go on from there.

    Args:
        matrix: positive definite, with a diagonal of 1.
        tolerance: of the residual max |min(u - e_i, M u)|, which is 0 at the solution.
    """
    bound = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    best, least = bound.clone(), torch.full_like(matrix[0], torch.inf)
    lowest = torch.full_like(least, torch.inf)

    def keep(found: Tensor) -> None:
        """Of the unsolved rows those that are solved now, or lower than before: from there a descent never goes back."""
        slope = found @ matrix
        off, value = torch.minimum(found - bound[unsolved], slope).abs().amax(1), (slope * found).sum(1)
        better = (off <= tolerance) | (value < lowest[unsolved])
        rows = unsolved[better]
        best[rows], least[rows], lowest[rows] = found[better], off[better], value[better]

    unsolved = torch.arange(len(matrix), device=matrix.device)
    u = bound
    for i in range(rounds):
        own = bound[unsolved]
        if i % 6 == 0:
            columns, floor = best[unsolved].T.contiguous(), own.T.contiguous()

            def descend(task: int, old: Tensor, inner: Tensor, floor: Tensor = floor) -> Tensor:
                return torch.maximum(old - inner, floor[task])

            for _ in range(2 << (i // 6)):
                sweep(matrix, columns, descend)
            u = columns.T.contiguous()
            keep(u)
        free = u - u @ matrix > own
        u = _conjugate_gradients(matrix, torch.where(free, u, own), free.to(u.dtype), tolerance)
        keep(torch.maximum(u, own))
        wrong = least[unsolved] > tolerance
        unsolved, u = unsolved[wrong], u[wrong]
        if not len(unsolved):
            break
    return best


def _conjugate_gradients(matrix: Tensor, u: Tensor, free: Tensor, tolerance: float) -> Tensor:
    """Rows of u with u^T M u lower over their free coefficients: until the gradients fell to 3 %, or to the tolerance."""
    residual = -(u @ matrix) * free
    step, square = residual, residual.square().sum(1, keepdim=True)
    enough = (9e-4 * square.max()).clamp(min=tolerance**2 / 16)
    smallest = torch.finfo(u.dtype).tiny
    for _ in range(40):
        if square.max() <= enough:
            break
        made = (step @ matrix) * free
        length = square / (step * made).sum(1, keepdim=True).clamp(min=smallest)
        u, residual = torch.addcmul(u, length, step), torch.addcmul(residual, length, made, value=-1)
        last, square = square, residual.square().sum(1, keepdim=True)
        step = torch.addcmul(residual, square / last.clamp(min=smallest), step)
    return u

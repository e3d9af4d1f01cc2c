"""Norms and inner products of the tasks' gradients at the neck, from what one backward leaves behind.

The neck is a linear layer z = x W^T, where x `[B, I]` is its input with a column of ones for the bias (`neck_inputs`). The
gradient of task t at W is a sum of outer products over units n that belong to t,

    g_t = sum over n in t of  y_n x_n^T        [D, I]

and every layout is a choice of units (`Factors`):

- routed and pairs: a label; x_n is its row of x, y_n the gradient of its loss at its row of z (`routed_factors`);
- grid: a unit of the first layer of a head; y_n is its weight v_n, and x_n = sum over rows b of g_nb x_b with g_nb the gradient
  at that unit's output (`grid_sums`, `grid_factors`). No gradient at z is built for each task. With x = identity, that is
  `grid_factors(g_AHB, v_AHD)`, the same expressions give norms and inner products of the gradients at the features z.

Then <g_s, g_t> = sum over m in s, n in t of <x_m, x_n> <y_m, y_n>. Gradients of a task add up over ranks and micro-batches,
their norms do not: what may be added is `grid_sums` and `task_gradients`.
Norms and Gram matrices of several linear layers of a trunk add up to those of all their weights; every task's gradient at an
inner layer is at hand in the routed layout only, where rows are independent.

All in float32 at least. Not differentiable.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mtrain.errors import UserError

MEMORY = 256 * 2**20  # bytes for intermediate results
CACHE = 32 * 2**20  # bytes of small pieces: an allocator uses these again where it maps larger ones anew
SKETCH = 128  # random vectors on each side of a projection
BLOCK = 8  # of them are multiplied all with all
SAMPLE = 128  # tasks that the error of a projection is estimated from


@dataclass(frozen=True)
class Factors:
    """Units of A tasks, sorted by task.

    Attributes:
        x_NI, y_ND: the outer products' sides.
        count_A: units of each task, on the CPU; may be 0, and the gradient is then 0.
    """

    x_NI: Tensor
    y_ND: Tensor
    count_A: Tensor


def neck_inputs(h_BI: Tensor, bias: bool = True) -> Tensor:
    """x: the neck's inputs `[B, D_in]` as float32 (float64 stays), with a column of ones where the neck has a bias."""
    x_BI = _full(h_BI)
    return torch.cat([x_BI, x_BI.new_ones(len(x_BI), 1)], 1) if bias else x_BI


@torch.no_grad()
def routed_factors(x_PI: Tensor, delta_PD: Tensor, slot_P: Tensor, num_tasks: int) -> Factors:
    """The units of P labels.

    Args:
        x_PI: what each label's row has as inputs of the neck.
        delta_PD: gradient at each label's row of z of its term of the objective.
        slot_P: its task.
    """
    order_P = torch.argsort(slot_P, stable=True)
    count_A = torch.bincount(slot_P, minlength=num_tasks).cpu()
    return Factors(x_PI.index_select(0, order_P), _full(delta_PD.index_select(0, order_P)), count_A)


@torch.no_grad()
def grid_sums(g_AHB: Tensor, x_BI: Tensor, memory: int = MEMORY) -> Tensor:
    """C_t = g_t x `[A, H, I]`, of each first unit of the heads; to be added over micro-batches and ranks.

    Args:
        g_AHB: gradient of each task's term of the objective at its head's first layer, task-major as in the grid kernel.
        x_BI: `neck_inputs`, or their projection `x_BI @ sketch.x_IR`.
    """
    units, rows = g_AHB.shape[:2].numel(), g_AHB.shape[2]
    g_NB = g_AHB.reshape(units, rows)
    if g_NB.dtype == x_BI.dtype:
        return (g_NB @ x_BI).view(*g_AHB.shape[:2], -1)
    chunk = max(1, memory // (rows * x_BI.element_size()))
    return torch.cat([part.to(x_BI.dtype) @ x_BI for part in g_NB.split(chunk)]).view(*g_AHB.shape[:2], -1)


@torch.no_grad()
def grid_factors(c_AHI: Tensor, v_AHD: Tensor) -> Factors:
    """The units of heads with H first units each, from `grid_sums` and the weights of those units."""
    heads, hidden = v_AHD.shape[:2]
    x_NI, y_ND = (_full(each).reshape(heads * hidden, -1) for each in (c_AHI, v_AHD))
    return Factors(x_NI, y_ND, torch.full((heads,), hidden))


@torch.no_grad()
def norms2(factors: Factors, memory: int = MEMORY) -> Tensor:
    """|g_t|^2 `[A]`, exact. For each task the cheaper of inner products between its n units, n^2 (I + D), and its gradient,
    n I D multiply-adds."""
    width_x, width_y = factors.x_NI.shape[1], factors.y_ND.shape[1]
    norm2_A = factors.x_NI.new_zeros(len(factors.count_A))
    for task_a, x, y in _padded(factors, memory):
        units = x.shape[1]
        if units == 1:
            norm2_a = _norm2(x) * _norm2(y)
        elif units * (width_x + width_y) <= width_x * width_y:
            norm2_a = ((x @ x.mT) * (y @ y.mT)).sum((1, 2)).clamp(min=0)
        else:
            norm2_a = (y.mT @ x).square().sum((1, 2))
        norm2_A[task_a] = norm2_a.view(-1)
    return norm2_A


@torch.no_grad()
def task_gradients(factors: Factors, memory: int = MEMORY) -> Tensor:
    """g_t `[A, D, I]` themselves; to be added over micro-batches and ranks."""
    gradient_ADI = factors.x_NI.new_zeros(len(factors.count_A), factors.y_ND.shape[1], factors.x_NI.shape[1])
    for task_a, x, y in _padded(factors, memory):
        gradient_ADI[task_a] = y.mT @ x
    return gradient_ADI


def gram_cost(num_units: int, num_tasks: int, width_x: int, width_y: int) -> tuple[float, float]:
    """Multiply-adds of the exact Gram matrix: by inner products between N units, N^2 (I + D) / 2, and by the tasks'
    gradients, N I D + A^2 I D / 2."""
    by_units = num_units**2 * (width_x + width_y) / 2
    return by_units, (num_units + num_tasks**2 / 2) * width_x * width_y


@torch.no_grad()
def gram(factors: Factors, memory: int = MEMORY) -> Tensor:
    """<g_s, g_t> `[A, A]`, exact, by the cheaper way of `gram_cost`. Blocks of `memory` bytes hold at least one task."""
    num_units, width_x = factors.x_NI.shape
    num_tasks, width_y = len(factors.count_A), factors.y_ND.shape[1]
    by_units, by_gradients = gram_cost(num_units, num_tasks, width_x, width_y)
    return _gram_by_units(factors, memory) if by_units <= by_gradients else _gram_by_gradients(factors, memory)


def _gram_by_units(factors: Factors, memory: int) -> Tensor:
    """Block by block of tasks, in the upper triangle only."""
    x_NI, y_ND, count_A = factors.x_NI, factors.y_ND, factors.count_A
    num_units, num_tasks = len(x_NI), len(count_A)
    gram_AA = x_NI.new_zeros(num_tasks, num_tasks)
    alone = bool((count_A == 1).all())
    end_A = count_A.cumsum(0)
    first_A = (end_A - count_A).to(x_NI.device)
    size = max(1, min(memory // (4 * x_NI.element_size() * max(1, num_units)), max(256, num_units // 8)))
    end, a, start = end_A.tolist(), 0, 0
    while a < num_tasks:
        stop_a = max(a + 1, bisect_right(end, start + size))
        stop = end[stop_a - 1]
        product = x_NI[start:] @ x_NI[start:stop].T
        product *= y_ND[start:] @ y_ND[start:stop].T  # [units from start on, units of the block]
        if not alone:
            for tasks in (slice(a, None), slice(a, stop_a)):
                product = _sum_rows(product, first_A[tasks] - start).T.contiguous()
        gram_AA[a:, a:stop_a] = product
        gram_AA[a:stop_a, a:] = product.T
        a, start = stop_a, stop
    return gram_AA


def _sum_rows(value_NK: Tensor, first_A: Tensor) -> Tensor:
    """Sums `[A, K]` of consecutive rows, from `first_A` on to the next one's. In the same order each time, on CUDA as well."""
    if not len(value_NK):
        return value_NK.new_zeros(len(first_A), value_NK.shape[1])
    return F.embedding_bag(torch.arange(len(value_NK), device=value_NK.device), value_NK, first_A, mode="sum")


def _gram_by_gradients(factors: Factors, memory: int) -> Tensor:
    """Summed over slices of the D columns of y."""
    x_NI, y_ND, count_A = factors.x_NI, factors.y_ND, factors.count_A
    columns = max(1, memory // (2 * x_NI.element_size() * len(count_A) * x_NI.shape[1]))
    gram_AA = x_NI.new_zeros(len(count_A), len(count_A))
    for y in y_ND.split(columns, dim=1):
        gram_AA += _products(task_gradients(Factors(x_NI, y, count_A), memory).flatten(1))
    return gram_AA


def _products(y_AF: Tensor) -> Tensor:
    """Y Y^T, in the upper triangle only."""
    gram_AA = y_AF.new_empty(len(y_AF), len(y_AF))
    size = max(128, -(-len(y_AF) // 8))
    for a in range(0, len(y_AF), size):
        block = slice(a, a + size)
        product = y_AF[a:] @ y_AF[block].T
        gram_AA[a:, block] = product
        gram_AA[block, a:] = product.T
    return gram_AA


@dataclass(frozen=True)
class Sketch:
    """What both sides of the units are projected to: K random signs each, in K / `BLOCK` independent groups, and on the x side
    behind them Q orthonormal directions that are kept exactly and taken out of the random ones."""

    x_IR: Tensor  # R = K + Q
    y_DK: Tensor

    @property
    def num_random(self) -> int:
        return self.y_DK.shape[1]


def check_vectors(vectors: int, option: str) -> None:
    """Raises UserError for a number of random vectors that a sketch cannot have."""
    if vectors < 2 * BLOCK or vectors % BLOCK:
        raise UserError(f"{option}: {vectors} random vectors, expected a multiple of {BLOCK} from {2 * BLOCK} on")


def make_sketch(
    width_x: int, width_y: int, seed: int, like: Tensor, vectors: int = SKETCH, exact_IQ: Tensor | None = None
) -> Sketch:
    """The same on every rank and machine for the same seed; of the device and type of `like`.

    Args:
        vectors: K, of each side; a multiple of `BLOCK`, at least two of it.
        exact_IQ: few directions that the sketch is to be exact in, of any length; the same for all that is added up. Behind a
            ReLU the mean row of x, `[I, 1]`, holds most of every gradient, and errors are several times smaller with it.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(0, 2, (width, vectors), generator=generator) * 2 - 1 for width in (width_x, width_y))
    x_IR = x.to(like)
    if exact_IQ is not None:
        basis_IQ = torch.linalg.qr(exact_IQ.to(like)).Q
        x_IR = torch.cat([x_IR - basis_IQ @ (basis_IQ.T @ x_IR), basis_IQ], 1)
    return Sketch(x_IR, y.to(like))


@torch.no_grad()
def project(c_AHR: Tensor, v_AHD: Tensor, sketch: Sketch, memory: int = MEMORY) -> Tensor:
    """Y `[A, F]` with E[Y Y^T] = the Gram matrix, F = K * `BLOCK` + Q * D; of heads with H first units each.

    In each of the K / `BLOCK` groups, with vectors a_i (x side) and b_j (y side): b_j^T g_t a_i = sum over units of
    <a_i, x_n> <b_j, y_n> for all i and j, scaled. Neither g_t nor its x_n are built: x is projected before the sum over rows.
    The estimate of <g_s, g_t> is the mean of the groups', unbiased. Its variance with signs is at most that with normal
    vectors: for k = `BLOCK`, M = g_s, N = g_t without their parts in exact directions, and sym(S) = (S + S^T) / 2

        1 / (K k) * [ |M|^2 |N|^2 + <M, N>^2 + 2 |M N^T|^2 + 2 |M^T N|^2 + 2 tr(M^T N M^T N)
                      + 2 (k - 1) (|sym(M^T N)|^2 + |sym(M N^T)|^2) ]   <=   4 (k + 1) / (K k) |M|^2 |N|^2,

    with equality for M and N of rank one that are multiples of one another.

    Args:
        c_AHR: `grid_sums(g_AHB, x_BI @ sketch.x_IR)`, added over micro-batches and ranks.
    """
    heads, hidden, vectors = *c_AHR.shape[:2], sketch.num_random
    groups, v_AHD = (vectors // BLOCK, BLOCK), _full(v_AHD)
    exact = (c_AHR.shape[2] - vectors) * v_AHD.shape[2]
    y_AF = c_AHR.new_empty(heads, vectors * BLOCK + exact)
    chunk = max(1, memory // (4 * hidden * (vectors + v_AHD.shape[2]) * c_AHR.element_size()))
    for start in range(0, heads, chunk):
        part = slice(start, start + chunk)
        c, c_exact = c_AHR[part, :, :vectors], c_AHR[part, :, vectors:]
        v = (v_AHD[part].flatten(0, 1) @ sketch.y_DK).view(c.shape)
        product = c.unflatten(2, groups).permute(0, 2, 3, 1) @ v.unflatten(2, groups).permute(0, 2, 1, 3)
        y_AF[part, : vectors * BLOCK] = product.flatten(1).mul_((vectors * BLOCK) ** -0.5)
        if exact:
            y_AF[part, vectors * BLOCK :] = (c_exact.mT @ v_AHD[part]).flatten(1)
    return y_AF


@torch.no_grad()
def projected_gram(y_AF: Tensor, sketch: Sketch) -> tuple[Tensor, Tensor]:
    """The Gram matrix `[A, A]` estimated from `project`'s Y (those of several head groups one below the other), positive
    semidefinite; and its standard error relative to |g_s| |g_t|: root mean square over all pairs of up to `SAMPLE` tasks,
    from the spread of the independent groups.
    """
    gram_AA = _products(y_AF)
    groups = sketch.num_random // BLOCK
    every = -(-len(y_AF) // SAMPLE)
    sample = y_AF[::every, : groups * BLOCK**2].unflatten(1, (groups, BLOCK**2)).transpose(0, 1)
    norm_a = gram_AA.diagonal()[::every].sqrt()
    variance = (groups * sample @ sample.mT).var(0) / groups / (norm_a[:, None] * norm_a).square()
    error = variance[norm_a > 0][:, norm_a > 0].mean().sqrt().nan_to_num(0)
    return gram_AA, error


@torch.no_grad()
def gram_of_rows(
    y_PD: Tensor, row_P: Tensor, slot_P: Tensor, num_tasks: int, norms: bool = False, memory: int = MEMORY
) -> Tensor:
    """Sum over rows of <y_s, y_t> `[A, A]`, where y_t is the sum of the vectors of task t's labels at the row; with `norms` its
    diagonal `[A]` only. The Gram matrix of gradients at the features, if y are gradients at labels' rows of z."""
    order_P = torch.argsort(row_P, stable=True)
    row_P, slot_P1 = row_P[order_P], slot_P[order_P, None].double()
    count_R = torch.unique_consecutive(row_P, return_counts=True)[1].cpu()
    total = y_PD.new_zeros(num_tasks if norms else num_tasks**2, dtype=torch.promote_types(y_PD.dtype, torch.float32))
    for _, slot, y in _padded(Factors(slot_P1, _full(y_PD[order_P]), count_R), memory):
        first, second = slot.long(), slot.mT.long()
        product = y @ y.mT
        if norms:
            total.index_add_(0, first.expand_as(product).flatten(), torch.where(first == second, product, 0).flatten())
        else:
            total.index_add_(0, (first * num_tasks + second).flatten(), product.flatten())
    return total if norms else total.view(num_tasks, num_tasks)


@torch.no_grad()
def unbiased_rows(whole: Tensor, same: Tensor, pairs: Tensor, common: Tensor) -> Tensor:
    """Estimates of |E g_t|^2 or <E g_s, E g_t> from pairs of different rows; NaN where there is none.

    A norm counts each row's own noise: n independent labels have E|g_t|^2 = |E g_t|^2 + n Var, and so has an inner product of
    tasks that share rows. Without what rows have with themselves, (whole - same) * pairs / (pairs - common) is unbiased. It can
    be negative, a matrix of it indefinite: average over steps first.

    Args:
        whole, same: from all pairs of labels (`norms2`, `gram`), and from those at one row (`gram_of_rows` of |x| y).
        pairs, common: how many those are.
    """
    return torch.where(pairs > common, (whole - same) * pairs / (pairs - common).clamp(min=1), torch.nan)


def unbiased_grid(whole: Tensor, opposed: Tensor, first: int, second: int) -> Tensor:
    """Estimates of |E g_t|^2 or <E g_s, E g_t> from products across the two halves of a batch's rows, for the grid.

    With g = g' + g'', `norms2`, `gram` or `projected_gram` of g (`whole`) minus that of g' - g'' (`opposed`) is 4 <g', g''>, or
    2 <g_s', g_t''> + 2 <g_s'', g_t'>: no row meets itself. Can be negative, the matrix indefinite: average over steps first.

    Args:
        first, second: rows of the halves in the global batch.
    """
    if not (first and second):
        return torch.full_like(whole, torch.nan)
    return (whole - opposed) * ((first + second) ** 2 / (4 * first * second))


def _full(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _norm2(value: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value, dim=-1).square()  # several times faster than summing squares


def _padded(factors: Factors, memory: int) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """Tasks with similar numbers of units n together: which, x `[a, n, I]` and y `[a, n, D]`, with zeros in y where a task has
    fewer. Tasks without units are left out."""
    x_NI, y_ND, count_A = factors.x_NI, factors.y_ND, factors.count_A
    width_x, width_y, device = x_NI.shape[1], y_ND.shape[1], x_NI.device
    first_A = count_A.cumsum(0) - count_A
    bucket_A = torch.where(count_A > 0, count_A.clamp(min=1).double().log2().ceil().long(), -1)
    for bucket in range(int(bucket_A.max()) + 1 if len(bucket_A) else 0):
        task_a = (bucket_A == bucket).nonzero().squeeze(1)
        if not len(task_a):
            continue
        units = int(count_A[task_a].max())
        alike = bool((count_A[task_a] == units).all())
        each = units * (width_x + width_y) + min(2 * units**2, width_x * width_y)
        for tasks in task_a.split(max(1, min(memory, CACHE) // (each * x_NI.element_size()))):
            start = int(first_A[tasks[0]])
            if alike and int(first_A[tasks[-1]]) - start == (len(tasks) - 1) * units:  # they lie together: no copies
                x, y = (value[start : start + len(tasks) * units] for value in (x_NI, y_ND))
            else:
                step = torch.arange(units)
                real = step < count_A[tasks, None]
                index = torch.where(real, first_A[tasks, None] + step, first_A[tasks, None]).flatten().to(device)
                x, y = x_NI.index_select(0, index), y_ND.index_select(0, index)
                y.index_fill_(0, (~real).flatten().nonzero().squeeze(1).to(device), 0)
            contiguous = int(tasks[-1]) - int(tasks[0]) == len(tasks) - 1
            which = slice(int(tasks[0]), int(tasks[-1]) + 1) if contiguous else tasks.to(device)
            yield which, x.view(len(tasks), units, width_x), y.view(len(tasks), units, width_y)

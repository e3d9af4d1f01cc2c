"""Statistics of the tasks' gradients against a backward for each task down to the neck."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from mtrain.balance.gradients import (
    BLOCK,
    Factors,
    check_vectors,
    gram,
    gram_cost,
    gram_of_rows,
    grid_factors,
    grid_sums,
    make_sketch,
    neck_inputs,
    norms2,
    project,
    projected_gram,
    routed_factors,
    task_gradients,
    unbiased_grid,
    unbiased_rows,
)
from mtrain.errors import UserError
from mtrain.model.heads import HeadBank

IN, WIDTH, ROWS = 7, 6, 24
OUTPUTS = [1, 3, 2, 12, 1, 10, 2, 1, 3]  # two groups or more, with padding
TASKS = len(OUTPUTS)


@dataclass
class Problem:
    """A neck, heads, inputs of the neck and a squared error with a weight for each label, all float64."""

    neck: nn.Linear
    bank: HeadBank
    h_BI: Tensor
    y_BT: Tensor
    weight_BT: Tensor  # 0 where a label is missing

    def loss(self, logits_XO: Tensor, y_X: Tensor, weight_X: Tensor) -> Tensor:
        return weight_X * (logits_XO.sin() - y_X.unsqueeze(-1)).square().sum(-1)

    def gradients(self, losses_T: list[Tensor]) -> Tensor:
        """`[T, D * I]` by one backward for each task."""
        parameters = list(self.neck.parameters())
        grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses_T]
        return torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads])


def problem(hidden: tuple[int, ...] = (), bias: bool = True, missing: float = 0.4, tasks: int = TASKS) -> Problem:
    torch.manual_seed(len(hidden) + 10 * bias)
    bank = HeadBank([f"t{i}" for i in range(tasks)], (OUTPUTS * tasks)[:tasks], WIDTH, hidden=hidden, activation="tanh")
    weight_BT = torch.rand(ROWS, tasks).double() * (torch.rand(ROWS, tasks) > missing)
    h_BI, y_BT = torch.randn(ROWS, IN).double(), torch.randn(ROWS, tasks).double()
    return Problem(nn.Linear(IN, WIDTH, bias=bias).double(), bank.double(), h_BI, y_BT, weight_BT)


def assert_same(ours: Tensor, naive: Tensor, rtol: float = 1e-9) -> None:
    """Entries of a Gram matrix or squared norms, relative to the norms they belong to."""
    scale = naive.diagonal().sqrt() if naive.dim() == 2 else naive.sqrt()
    scale = scale[:, None] * scale if naive.dim() == 2 else scale.square()
    assert ((ours - naive).abs() <= rtol * scale).all()


def naive_grid(p: Problem) -> Tensor:
    losses_BT = p.loss(p.bank(p.neck(p.h_BI)), p.y_BT, p.weight_BT)
    # outputs beyond a task's own are 0 and without gradient: their constant loss does not matter
    return p.gradients(list(losses_BT.sum(0)))


def first_layer(p: Problem, rows: slice, number: int) -> Tensor:
    """g `[A, H, B]` of a head group: the gradient at its first layer's output, all tasks in one backward."""
    group = p.bank.groups[number]
    layers, params = len(group.weights), list(group.parameters())
    z_BD = p.neck(p.h_BI[rows]).detach()
    x = first = torch.einsum("ahd,bd->ahb", params[0], z_BD) + params[layers][:, :, None]
    for layer in range(1, layers):
        x = params[layer] @ x.tanh() + params[layers + layer][:, :, None]
    x = x.permute(2, 0, 1)
    if group.pad_TO is not None:
        x = x.masked_fill(group.pad_TO, 0)
    loss = p.loss(x, p.y_BT[rows][:, group.task_ids], p.weight_BT[rows][:, group.task_ids])
    return torch.autograd.grad(loss.sum(), first)[0]


def join(parts: list[tuple[Tensor, Factors]]) -> Factors:
    """The units of all parts, each of some tasks, whose gradients add up."""
    slot_N = torch.cat([task_A.repeat_interleave(part.count_A) for task_A, part in parts])
    x_NI, y_ND = (torch.cat([getattr(part, side) for _, part in parts]) for side in ("x_NI", "y_ND"))
    return routed_factors(x_NI, y_ND, slot_N, TASKS)


def grid(p: Problem, num_micro: int = 1) -> Factors:
    parts = []
    for number, group in enumerate(p.bank.groups):
        rows = [slice(m * ROWS // num_micro, (m + 1) * ROWS // num_micro) for m in range(num_micro)]
        bias = p.neck.bias is not None
        sums = torch.stack([grid_sums(first_layer(p, r, number), neck_inputs(p.h_BI[r], bias)) for r in rows]).sum(0)
        parts.append((group.task_ids, grid_factors(sums, group.weights[0].detach())))
    return join(parts)


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_micro", [1, 3])
def test_grid_equals_a_backward_per_task(hidden, bias, num_micro):
    p = problem(hidden, bias)
    assert len(p.bank.groups) > 1
    assert any(group.pad_TO is not None for group in p.bank.groups)
    g = naive_grid(p)
    factors = grid(p, num_micro)
    assert_same(norms2(factors), g.square().sum(1))
    assert_same(gram(factors), g @ g.T)


@pytest.mark.parametrize("memory", [1, 3000, 2**28])
def test_a_memory_budget_changes_nothing(memory):
    p = problem((5,))
    g, factors = naive_grid(p), grid(p)
    assert_same(norms2(factors, memory), g.square().sum(1))
    assert_same(gram(factors, memory=memory), g @ g.T)


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_micro", [1, 3])
def test_routed_equals_a_backward_per_task(hidden, bias, num_micro):
    p = problem(hidden, bias, missing=0)
    # tasks with 0, 1, 2, ... rows, in no order
    task_B = torch.randperm(TASKS).repeat(9)[torch.arange(9 * TASKS) % 9 < torch.arange(9 * TASKS) // TASKS][:ROWS]
    task_B = task_B[torch.randperm(ROWS)]
    assert len(set(torch.bincount(task_B, minlength=TASKS).tolist())) > 2
    y_B, weight_B = p.y_BT.gather(1, task_B[:, None])[:, 0], p.weight_BT.gather(1, task_B[:, None])[:, 0]
    losses_B = p.loss(p.bank(p.neck(p.h_BI), task_B), y_B, weight_B)
    g = p.gradients([losses_B[task_B == t].sum() for t in range(TASKS)])

    parts = []
    for rows in torch.arange(ROWS).split(ROWS // num_micro):
        z_BD = p.neck(p.h_BI[rows]).detach().requires_grad_()
        (delta,) = torch.autograd.grad(p.loss(p.bank(z_BD, task_B[rows]), y_B[rows], weight_B[rows]).sum(), z_BD)
        parts.append((torch.arange(TASKS), routed_factors(neck_inputs(p.h_BI[rows], bias), delta, task_B[rows], TASKS)))
    assert_same(norms2(join(parts)), g.square().sum(1))
    assert_same(gram(join(parts)), g @ g.T)
    summed = torch.stack([task_gradients(part) for _, part in parts]).sum(0)
    assert_same(summed.square().sum((1, 2)), g.square().sum(1))


@pytest.mark.parametrize("missing", [0.3, 0.95])
@pytest.mark.parametrize("hidden", [(), (5,)])
def test_pairs_equal_a_backward_per_task(hidden, missing):
    p = problem(hidden, missing=missing, tasks=30)
    g = naive_grid(p)
    pair = p.weight_BT.nonzero()
    row_P, task_P = pair[torch.randperm(len(pair))].T
    z_PD = p.neck(p.h_BI).detach()[row_P].requires_grad_()
    losses_P = p.loss(p.bank(z_PD, task_P), p.y_BT[row_P, task_P], p.weight_BT[row_P, task_P])
    (delta_PD,) = torch.autograd.grad(losses_P.sum(), z_PD)
    factors = routed_factors(neck_inputs(p.h_BI)[row_P], delta_PD, task_P, 30)
    by_units, by_gradients = gram_cost(len(pair), 30, IN + 1, WIDTH)
    assert (by_units > by_gradients) == (missing < 0.5)  # both ways are reached
    for memory in (1, 10_000, 2**28):
        assert_same(norms2(factors, memory), g.square().sum(1))
        assert_same(gram(factors, memory=memory), g @ g.T)


def test_identity_inputs_give_gradients_at_the_features():
    p = problem((5,))
    z_BD = p.neck(p.h_BI).detach().requires_grad_()
    losses_T = p.loss(p.bank(z_BD), p.y_BT, p.weight_BT).sum(0)
    g = torch.stack([torch.autograd.grad(loss, z_BD, retain_graph=True)[0].flatten() for loss in losses_T])
    whole = slice(None)
    factors = join(
        [
            (group.task_ids, grid_factors(first_layer(p, whole, number), group.weights[0].detach()))
            for number, group in enumerate(p.bank.groups)
        ]
    )
    assert_same(norms2(factors), g.square().sum(1))
    assert_same(gram(factors), g @ g.T)


def test_statistics_of_layers_add_up_to_those_of_the_whole_trunk():
    torch.manual_seed(0)
    layers = [nn.Linear(IN, 8).double(), nn.Linear(8, WIDTH).double()]
    bank = HeadBank([f"t{i}" for i in range(TASKS)], OUTPUTS, WIDTH, hidden=(3,)).double()
    x_BI, task_B = torch.randn(ROWS, IN).double(), torch.randint(TASKS, (ROWS,))
    inner = layers[0](x_BI)
    h = inner.tanh()
    z = layers[1](h)
    losses_B = bank(z, task_B).square().sum(1)
    deltas = torch.autograd.grad(losses_B.sum(), [inner, z], retain_graph=True)
    parameters = [p for layer in layers for p in layer.parameters()]
    grads = [torch.autograd.grad(losses_B[task_B == t].sum(), parameters, retain_graph=True) for t in range(TASKS)]
    g = torch.stack([torch.cat([part.flatten() for part in grad]) for grad in grads])
    factors = [routed_factors(neck_inputs(a.detach()), d, task_B, TASKS) for a, d in zip((x_BI, h), deltas, strict=True)]
    assert_same(torch.stack([norms2(f) for f in factors]).sum(0), g.square().sum(1))
    assert_same(torch.stack([gram(f) for f in factors]).sum(0), g @ g.T)


def test_tasks_with_very_many_labels_and_with_none():
    torch.manual_seed(0)
    slot_P = torch.cat([torch.zeros(300), torch.full((40,), 3), torch.tensor([5.0])]).long()[torch.randperm(341)]
    x_PI, delta_PD = torch.randn(341, 5).double(), torch.randn(341, 4).double()
    g = torch.stack([(delta_PD[slot_P == t].T @ x_PI[slot_P == t]).flatten() for t in range(7)])
    factors = routed_factors(x_PI, delta_PD, slot_P, 7)
    assert factors.count_A.tolist() == [300, 0, 0, 40, 0, 1, 0]
    assert_same(norms2(factors), g.square().sum(1))
    assert_same(gram(factors), g @ g.T)
    assert not norms2(factors)[[1, 2, 4, 6]].any()


def test_without_any_label_all_is_zero():
    factors = routed_factors(torch.empty(0, 5), torch.empty(0, 3), torch.empty(0).long(), 3)
    assert not norms2(factors).any()
    assert not gram(factors).any()


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    h, g, v = (torch.randn(shape).bfloat16() for shape in ((40, 8), (6, 3, 40), (6, 3, 9)))
    low = grid_factors(grid_sums(g, neck_inputs(h), memory=1000), v)
    full = grid_factors(grid_sums(g.double(), neck_inputs(h.double())), v.double())
    assert norms2(low).dtype == torch.float32
    assert_same(gram(low).double(), gram(full), 1e-5)
    delta, slot = torch.randn(40, 9).half(), torch.randint(6, (40,))
    low, full = (routed_factors(neck_inputs(a), b, slot, 6) for a, b in ((h, delta), (h.double(), delta.double())))
    assert_same(norms2(low).double(), norms2(full), 1e-5)


def heads_problem(tasks: int = 40, hidden: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x `[50, 21]`, g `[A, H, 50]`, v `[A, H, 16]` and the exact Gram matrix."""
    generator = torch.Generator().manual_seed(1)
    x, g, v = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((50, 21), (tasks, hidden, 50), (tasks, hidden, 16))
    )
    x += 1
    gradients = torch.einsum("ahb,bi,ahd->adi", g, x, v).flatten(1)
    return x, g, v, gradients @ gradients.T


def estimate(
    x: Tensor, g: Tensor, v: Tensor, seed: int, vectors: int = 64, exact: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    sketch = make_sketch(x.shape[1], v.shape[2], seed, x, vectors, exact)
    return projected_gram(project(grid_sums(g, x @ sketch.x_IR), v, sketch), sketch)


@pytest.mark.parametrize("deflate", [False, True])
def test_projections_are_unbiased_and_as_exact_as_they_say(deflate):
    x, g, v, exact = heads_problem()
    norms = exact.diagonal().sqrt()
    scale = norms[:, None] * norms
    found = [estimate(x, g, v, seed, exact=x.mean(0)[:, None] if deflate else None) for seed in range(200)]
    errors = torch.stack([(estimated - exact) / scale for estimated, _ in found])
    stated = torch.stack([error for _, error in found])
    rms = errors.square().mean((1, 2)).sqrt()
    assert 0.8 < float(stated.square().mean().sqrt() / rms.square().mean().sqrt()) < 1.2
    assert (rms < 5 * stated).all()
    assert (errors.mean(0).abs() < 5 * errors.std(0) / 200**0.5).all()


def test_the_variance_of_a_projection_is_within_the_formula_and_the_bound():
    x, g, v, exact = heads_problem(tasks=12, hidden=2)
    vectors, k = 16, BLOCK
    gradient = torch.einsum("ahb,bi,ahd->adi", g, x, v)
    m, n = gradient[:, None], gradient[None]
    inner, outer = m.mT @ n, m @ n.mT
    norm2 = exact.diagonal()

    def square(a: Tensor) -> Tensor:
        return a.square().sum((-1, -2))

    trace = (inner @ inner).diagonal(dim1=-1, dim2=-2).sum(-1)
    symmetric = square((inner + inner.mT) / 2) + square((outer + outer.mT) / 2)
    formula = norm2[:, None] * norm2 + exact.square() + 2 * square(outer) + 2 * square(inner) + 2 * trace
    formula = (formula + 2 * (k - 1) * symmetric) / (vectors * k)
    bound = 4 * (k + 1) / (vectors * k) * norm2[:, None] * norm2
    assert (formula <= bound * (1 + 1e-9)).all()
    estimates = torch.stack([estimate(x, g, v, seed, vectors)[0] for seed in range(1000)])
    ratio = (estimates - exact).square().mean(0) / formula
    assert ratio.max() < 1.4  # signs have less variance than normal vectors, which have this one
    assert 0.8 < ratio.mean() < 1.03


def test_a_projection_is_exact_in_its_exact_directions():
    x, g, v, _ = heads_problem()
    direction = x[:2].T
    coordinates = torch.randn(50, 2, dtype=torch.float64)
    inside = coordinates @ direction.T  # all gradients lie in them
    estimated, error = estimate(inside, g, v, 0, exact=direction)
    gradients = torch.einsum("ahb,bi,ahd->adi", g, inside, v).flatten(1)
    assert_same(estimated, gradients @ gradients.T)
    assert error < 1e-9


def test_projections_add_up_over_micro_batches_and_stay_semidefinite():
    x, g, v, exact = heads_problem(tasks=150)
    sketch = make_sketch(21, 16, 3, x, 32, x.mean(0)[:, None])
    parts = [grid_sums(g[:, :, rows], x[rows] @ sketch.x_IR) for rows in torch.arange(50).split(20)]
    y = project(torch.stack(parts).sum(0), v, sketch)
    estimated, error = projected_gram(y, sketch)
    torch.testing.assert_close(y, project(grid_sums(g, x @ sketch.x_IR), v, sketch, memory=100_000))
    assert torch.linalg.eigvalsh(estimated).min() > -1e-9 * exact.diagonal().max()
    assert 0 < error < 0.3
    y[7] = 0
    estimated, error = projected_gram(y, sketch)
    assert not estimated[7].any()
    assert estimated.isfinite().all()
    assert error > 0


def test_a_sketch_is_the_same_for_the_same_seed_only():
    like = torch.zeros(1)
    one, same, other = (make_sketch(5, 4, seed, like, 16) for seed in (1, 1, 2))
    assert torch.equal(one.x_IR, same.x_IR)
    assert not torch.equal(one.y_DK, other.y_DK)
    with pytest.raises(UserError, match="here: 20 random vectors, expected a multiple of 8 from 16 on"):
        check_vectors(20, "here")


def test_the_unbiased_norm_of_routed_labels_is_that_of_the_expectation():
    torch.manual_seed(0)
    x, delta = torch.randn(3, 4).double(), torch.randn(3, 5).double()  # a population of three labels
    mean = torch.einsum("nd,ni->di", delta, x) / 3
    for n in (2, 3):
        draws = [torch.tensor(draw) for draw in itertools.product(range(3), repeat=n)]
        slot = torch.arange(len(draws)).repeat_interleave(n)
        factors = routed_factors(x[torch.cat(draws)], delta[torch.cat(draws)], slot, len(draws) + 1)
        count = factors.count_A.double()
        each = torch.arange(len(slot))
        size = factors.x_NI.square().sum(1, keepdim=True).sqrt()
        own = gram_of_rows(factors.y_ND * size, each, slot, len(draws) + 1, norms=True)
        found = unbiased_rows(norms2(factors), own, count**2, count)
        assert found[-1].isnan()  # a task without labels
        torch.testing.assert_close(found[:-1].mean(), (n * mean).square().sum())
        assert norms2(factors)[:-1].mean() > 1.5 * (n * mean).square().sum()


def test_the_unbiased_gram_matrix_of_labels_that_share_rows_is_that_of_the_expectation():
    torch.manual_seed(0)
    x, delta = torch.randn(3, 4).double(), torch.randn(3, 2, 5).double()  # three rows, each with labels of both tasks
    mean = torch.einsum("ntd,ni->tdi", delta, x).flatten(1) / 3
    row, slot, found = torch.arange(3).repeat_interleave(2), torch.tensor([0, 1] * 3), []
    for draw in map(list, itertools.product(range(3), repeat=3)):
        x_PI, y_PD = x[draw][row], delta[draw].flatten(0, 1)
        same = gram_of_rows(y_PD * x_PI.square().sum(1, keepdim=True).sqrt(), row, slot, 2)
        common = gram_of_rows(torch.ones(6, 1), row, slot, 2)
        assert torch.equal(common, torch.full((2, 2), 3.0))
        found.append(unbiased_rows(gram(routed_factors(x_PI, y_PD, slot, 2)), same, torch.tensor(9.0), common))
    torch.testing.assert_close(torch.stack(found).mean(0), (3 * mean) @ (3 * mean).T)


@pytest.mark.parametrize("memory", [1, 2**28])
def test_products_at_the_features_are_those_of_labels_that_share_rows(memory):
    torch.manual_seed(0)
    row, slot, y = (
        torch.randint(9, (60,)),
        torch.randint(5, (60,)),
        torch.randn(60, 4).double(),
    )  # some of a task twice in a row
    g = torch.zeros(5, 9, 4).double().index_put_((slot, row), y, accumulate=True).flatten(1)
    assert_same(gram_of_rows(y, row, slot, 5, memory=memory), g @ g.T)
    assert_same(gram_of_rows(y, row, slot, 5, norms=True, memory=memory), g.square().sum(1))
    assert not gram_of_rows(y[:0], row[:0], slot[:0], 5).any()


def test_the_unbiased_gram_matrix_of_a_grid_is_that_of_the_expectation():
    torch.manual_seed(0)
    x, g, v = torch.randn(3, 4).double(), torch.randn(2, 2, 3).double(), torch.randn(2, 2, 5).double()  # three rows
    mean = torch.einsum("ahb,bi,ahd->adi", g, x, v).flatten(1) / 3
    for second_B in (torch.tensor([False, True]), torch.tensor([True, False, False])):
        rows = len(second_B)
        matrices, norms = [], []
        for draw in map(list, itertools.product(range(3), repeat=rows)):
            whole, other = (
                grid_factors(grid_sums(g[:, :, draw], inputs), v)
                for inputs in (x[draw], torch.where(second_B[:, None], -x[draw], x[draw]))
            )
            sizes = (rows - 1, 1)
            matrices.append(unbiased_grid(gram(whole), gram(other), *sizes))
            norms.append(unbiased_grid(norms2(whole), norms2(other), *sizes))
        expected = (rows * mean) @ (rows * mean).T
        torch.testing.assert_close(torch.stack(matrices).mean(0), expected)
        torch.testing.assert_close(torch.stack(norms).mean(0), expected.diagonal())
        assert unbiased_grid(gram(whole), gram(other), 1, 0).isnan().all()

import pytest
import torch

from mtrain.balance.solvers import (
    RANK_CUTOFF,
    cone_minimum,
    eigen,
    fair_point,
    fair_weights,
    least_norm,
    shuffled,
    simplex_minimum,
    solve,
    sweep,
    unit,
)


def gram(tasks, rank, seed=0, spread=0.0):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, rank, generator=g, dtype=torch.float64)
    return (lambda j: j @ j.T)(rows * 10 ** (spread * torch.rand(tasks, 1, generator=g, dtype=torch.float64)))


def quadratic(matrix, linear, tolerance=1e-10):
    start = torch.full_like(linear, 1 / len(linear))
    return simplex_minimum(lambda x: (matrix @ x + linear, matrix), start, lambda x, gap: gap <= tolerance)


@pytest.mark.parametrize(("tasks", "rank"), [(2, 5), (5, 2), (40, 80), (40, 7), (3, 1)])
def test_no_vertex_of_the_simplex_is_lower_in_gradient_than_the_minimum(tasks, rank):
    matrix, linear = gram(tasks, rank), torch.randn(tasks, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = quadratic(matrix, linear)
    grad = matrix @ x + linear
    assert x.min() >= 0
    assert x.sum() == pytest.approx(1, abs=1e-12)
    assert x @ grad - grad.min() <= 1e-9


def test_two_tasks_have_the_closed_form():
    for seed in range(20):
        g = gram(2, 3, seed)
        first = ((g[1, 1] - g[0, 1]) / (g[0, 0] + g[1, 1] - 2 * g[0, 1])).clamp(0, 1)
        x = quadratic(g, torch.zeros(2, dtype=torch.float64), 1e-13)
        torch.testing.assert_close(x, torch.stack([first, 1 - first]), atol=1e-6, rtol=0)


def test_equal_tasks_share_their_weight_equally():
    g = gram(4, 6)
    twice = [0, 1, 1, 2, 3, 3, 3]
    x = quadratic(g[twice][:, twice], torch.zeros(7, dtype=torch.float64))
    torch.testing.assert_close(x[1], x[2], atol=1e-7, rtol=0)
    torch.testing.assert_close(x[4], x[6], atol=1e-7, rtol=0)


@pytest.mark.parametrize(("tasks", "rank", "common"), [(1, 3, 0), (40, 80, 0), (40, 80, 5), (300, 400, 30)])
def test_active_sets_find_the_minimum_on_the_simplex(tasks, rank, common):
    matrix = gram(tasks, rank, spread=0.5) + common * torch.ones(tasks, tasks, dtype=torch.float64)
    x = least_norm(matrix)
    grad = matrix @ x
    assert x.min() >= 0
    assert x.sum() == pytest.approx(1, abs=1e-12)
    assert x @ grad - grad.min() <= 1e-8 * (x @ grad)
    torch.testing.assert_close(x, quadratic(matrix, torch.zeros_like(x)), atol=1e-5, rtol=0)


def test_active_sets_leave_a_matrix_with_many_minima_though_rounding_hides_it():
    assert least_norm(gram(40, 7)) is None
    for seed in range(20):
        twins = gram(4, 6, seed)[[0, 1, 1, 2, 3]][:, [0, 1, 1, 2, 3]]
        noise = 1e-7 * torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = least_norm(twins * (1 + noise + noise.T))
        assert found is None or found[1] == found[2] == 0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize(("tasks", "rank", "spread"), [(2, 3, 0.0), (30, 5, 0.0), (60, 90, 0.0), (30, 5, 3.0)])
def test_fair_weights_solve_their_equation(alpha, tasks, rank, spread):
    g = gram(tasks, rank, spread=spread)
    g = g / g.diagonal().mean()
    w = fair_weights(g, alpha)
    ridged = g + tasks * RANK_CUTOFF * torch.diag(g.diagonal())
    assert w.min() > 0
    torch.testing.assert_close(ridged @ w * w ** (1 / alpha), torch.ones_like(w), atol=1e-6, rtol=0)


def test_the_fair_point_of_one_task_is_its_closed_form():
    for alpha in (0.2, 1.0, 3.0, 20.0):
        y = fair_point(torch.tensor([[4.0]]).double(), torch.tensor([3.0]).double(), alpha)
        assert y.item() == pytest.approx((3 / 4) ** (alpha / (1 + alpha)), rel=1e-9)


def literal_cone_minimum(matrix, i):
    """Coordinate descent on one problem, until nothing moves."""
    u = torch.zeros(len(matrix), dtype=matrix.dtype)
    u[i] = 1
    for _ in range(5000):
        before = u.clone()
        for j in range(len(u)):
            u[j] = max(float(u[j] - matrix[j] @ u / matrix[j, j]), float(i == j))
        if (u - before).abs().max() < 1e-13:
            break
    return u


@pytest.mark.parametrize(("tasks", "rank"), [(2, 2), (6, 3), (12, 30)])
def test_the_cone_minimum_of_each_task_is_that_of_coordinate_descent(tasks, rank):
    matrix, _ = unit(gram(tasks, rank) + 0.05 * torch.eye(tasks, dtype=torch.float64))
    expected = torch.stack([literal_cone_minimum(matrix, i) for i in range(tasks)])
    torch.testing.assert_close(cone_minimum(matrix, 1e-10), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize("rank", [10, 400])
def test_the_cone_minimum_meets_its_residual(rank, shift):
    rows = torch.randn(200, rank, generator=torch.Generator().manual_seed(0)) + shift
    g = rows @ rows.T
    matrix, _ = unit(g + 1e-4 * g.trace() * torch.eye(200))
    u = cone_minimum(matrix, 1e-4)
    assert torch.minimum(u - torch.eye(200), u @ matrix).abs().max() <= 1e-4
    assert (u >= torch.eye(200)).all()


def test_a_sweep_in_blocks_is_a_loop_over_tasks():
    matrix, weight = gram(75, 20), torch.randn(75, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def rule(task, old, inner):
        return old - 0.01 * inner.clamp(max=task)

    expected = weight.clone()
    for j in range(75):
        expected[j] = rule(j, expected[j], matrix[j] @ expected)
    sweep(matrix, weight, rule)
    torch.testing.assert_close(weight, expected)


def test_eigenvalues_of_rounding_are_left_out():
    value, vector = eigen(gram(20, 3).float().double())
    assert value.shape == (3,)
    torch.testing.assert_close((vector * value) @ vector.T, gram(20, 3), atol=1e-4, rtol=1e-5)


def test_a_task_without_a_gradient_gets_the_mean_weight():
    g = torch.zeros(3, 3)
    g[0, 0], g[2, 2] = 1, 4
    torch.testing.assert_close(solve(g, lambda gram: gram.diagonal()), torch.tensor([0.4, 1.0, 1.6]))
    torch.testing.assert_close(solve(torch.zeros(3, 3), lambda gram: gram.diagonal()), torch.ones(3))


def test_an_order_is_of_its_step():
    device = torch.device("cpu")
    assert shuffled(50, 3, device).tolist() == shuffled(50, 3, device).tolist() != shuffled(50, 4, device).tolist()
    assert sorted(shuffled(50, 3, device).tolist()) == list(range(50))

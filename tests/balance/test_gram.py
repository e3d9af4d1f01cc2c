"""Balancers from the Gram matrix: golden values from TorchJD, literal implementations on gradients, and properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrain.balance.aligned import AlignedMTL
from mtrain.balance.base import Facts, Seen
from mtrain.balance.cagrad import CAGrad
from mtrain.balance.db_mtl import DBMTL
from mtrain.balance.fairgrad import FairGrad
from mtrain.balance.gradvac import GradVac
from mtrain.balance.imtl_g import IMTLG
from mtrain.balance.mgda import MGDA
from mtrain.balance.nash import Nash
from mtrain.balance.pcgrad import PCGrad
from mtrain.balance.solvers import cone_minimum, shuffled
from mtrain.balance.upgrad import UPGrad
from mtrain.errors import UserError

METHODS = {
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "gradvac": GradVac,
    "cagrad": CAGrad,
    "nash": Nash,
    "nash none": lambda: Nash(normalization="none", max_norm=0),
    "fairgrad": FairGrad,
    "imtl_g": IMTLG,
    "aligned": AlignedMTL,
    "upgrad": UPGrad,
    "db_mtl": DBMTL,
}
SIZES = [(2, 5), (3, 3), (10, 40), (50, 200)]


def rows(tasks, rank, seed=0):
    return torch.randn(tasks, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def begun(balancer, names):
    share_T = torch.full((len(names),), 1 / len(names))
    balancer.begin(Facts(list(names), torch.zeros(len(names), dtype=torch.bool), share_T, torch.device("cpu")))
    return balancer


def seen(gram, step=0, task_A=None):
    ones, task_A = torch.ones(len(gram)), torch.arange(len(gram)) if task_A is None else task_A
    return Seen(step, task_A, ones, ones, gram.diagonal().clone(), gram)


def weights(balancer, gram, step=0):
    return begun(balancer, [str(i) for i in range(len(gram))]).weights(seen(gram, step)).double()


def aggregation():
    return pytest.importorskip("torchjd.aggregation")


def fixed_order(monkeypatch, order, whole):
    """Let TorchJD's draws for task 0, 1, ... be this order: of all tasks, or as places among the others."""
    task = iter(range(len(order)))

    def draw(size):
        if whole:
            return order
        own = next(task)
        return torch.tensor([j - (j > own) for j in order.tolist() if j != own])

    monkeypatch.setattr(torch, "randperm", draw)


@pytest.mark.parametrize("size", SIZES)
class TestGolden:
    """Against TorchJD on the same float64 Gram matrix; our weights are float32."""

    def test_mgda_is_where_frank_wolfe_goes_and_not_above_it(self, size):
        gram = rows(*size) @ rows(*size).T
        theirs = aggregation().MGDA(epsilon=1e-9, max_iters=1500).gramian_weighting(gram)
        ours = weights(MGDA(), gram)
        assert ours @ gram @ ours <= (theirs @ gram @ theirs) * (1 + 1e-6)
        torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)

    def test_pcgrad(self, size, monkeypatch):
        gram = rows(*size) @ rows(*size).T
        order = shuffled(size[0], 7, gram.device)
        ours = weights(PCGrad(), gram, step=7)
        fixed_order(monkeypatch, order, whole=True)
        torch.testing.assert_close(ours, aggregation().PCGrad().gramian_weighting(gram), atol=0, rtol=1e-6)

    def test_gradvac_over_two_steps(self, size, monkeypatch):
        theirs = aggregation().GradVac(beta=0.2, eps=0.0).gramian_weighting
        ours = begun(GradVac(beta=0.2), [str(i) for i in range(size[0])])
        for step in range(3):
            gram = rows(*size, seed=step) @ rows(*size, seed=step).T
            order = shuffled(size[0], step, gram.device)
            got = ours.weights(seen(gram, step)).double()
            with monkeypatch.context() as patch:
                fixed_order(patch, order, whole=False)
                torch.testing.assert_close(got, theirs(gram), atol=0, rtol=1e-5)
        torch.testing.assert_close(ours.cosine_TT.double(), theirs._phi_t, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("c", [0.2, 0.5, 2.0])
    def test_cagrad(self, size, c):
        pytest.importorskip("clarabel")
        gram = rows(*size) @ rows(*size).T
        theirs, ours = aggregation().CAGrad(c=c).gramian_weighting(gram), weights(CAGrad(c), gram)
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)
        mean, lowest = gram.mean(1), []
        for weight in (ours, theirs):
            w = weight - 1 / size[0]
            w = w / w.sum()
            lowest.append(mean @ w + c * gram.mean().sqrt() * (w @ gram @ w).sqrt())
        assert lowest[0] <= lowest[1] + 1e-6 * gram.mean()

    def test_nash(self, size):
        pytest.importorskip("ecos")
        matrix = rows(*size)
        theirs = aggregation().NashMTL(n_tasks=size[0], max_norm=1.0, update_weights_every=1, optim_niter=100)
        expected = theirs.weighting(matrix)
        torch.testing.assert_close(weights(Nash(), matrix @ matrix.T), expected, atol=0, rtol=2e-4)

    @pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
    def test_fairgrad(self, size, alpha):
        pytest.importorskip("scipy")
        gram = rows(*size) @ rows(*size).T
        theirs = aggregation().FairGrad(alpha=alpha).gramian_weighting(gram)
        torch.testing.assert_close(weights(FairGrad(alpha), gram), theirs, atol=0, rtol=5e-5)

    def test_imtl_g(self, size):
        gram = rows(*size) @ rows(*size).T
        theirs = aggregation().IMTLG().gramian_weighting(gram)
        torch.testing.assert_close(weights(IMTLG(), gram), theirs, atol=1e-7, rtol=1e-6)

    @pytest.mark.parametrize("scale", ["min", "median", "rmse"])
    def test_aligned(self, size, scale):
        gram = rows(*size) @ rows(*size).T
        theirs = aggregation().AlignedMTL(scale_mode=scale).gramian_weighting(gram)
        torch.testing.assert_close(weights(AlignedMTL(scale), gram), theirs, atol=1e-7, rtol=1e-6)

    @pytest.mark.parametrize("ridge", [1e-4, 1e-6])
    def test_upgrad(self, size, ridge):
        pytest.importorskip("quadprog")
        from torchjd.linalg import QuadprogProjector

        gram = rows(*size) @ rows(*size).T
        theirs = aggregation().UPGrad(projector=QuadprogProjector(reg_eps=ridge)).gramian_weighting(gram)
        torch.testing.assert_close(weights(UPGrad(ridge), gram), theirs, atol=1e-7, rtol=1e-6)

    def test_upgrad_of_dependent_gradients(self, size):
        pytest.importorskip("quadprog")
        gram = rows(size[0], 2) @ rows(size[0], 2).T
        torch.testing.assert_close(
            weights(UPGrad(), gram), aggregation().UPGrad().gramian_weighting(gram), atol=1e-6, rtol=1e-5
        )


class TestLiteral:
    """Against the papers' algorithms on gradient vectors."""

    def test_pcgrad_on_vectors(self):
        matrix, order = rows(8, 5), shuffled(8, 3, torch.device("cpu")).tolist()
        total = torch.zeros(5, dtype=torch.float64)
        for i in range(8):
            g = matrix[i].clone()
            for j in order:
                if j != i and g @ matrix[j] < 0:
                    g -= (g @ matrix[j]) / (matrix[j] @ matrix[j]) * matrix[j]
            total += g
        torch.testing.assert_close(weights(PCGrad(), matrix @ matrix.T, step=3) @ matrix, total, atol=1e-5, rtol=1e-5)

    def test_gradvac_turns_a_gradient_to_the_running_cosine(self):
        matrix = torch.tensor([[1.0, 0.0], [-0.6, 0.8]])
        balancer = begun(GradVac(), "ab")
        balancer.cosine_TT.fill_(0.3)
        first, second = matrix.double()
        w = balancer.weights(seen(matrix @ matrix.T)).double()
        # each is turned, alone, until its cosine with the other is 0.3: x + a y with a from the law of sines
        a = (0.3 * (1 - 0.36) ** 0.5 + 0.6 * (1 - 0.09) ** 0.5) / (1 - 0.09) ** 0.5
        turned = first + a * second
        assert torch.cosine_similarity(turned, second, dim=0).item() == pytest.approx(0.3)
        torch.testing.assert_close(w, torch.tensor([1 + a, 1 + a], dtype=torch.float64))
        assert balancer.cosine_TT[0, 1].item() == pytest.approx(0.99 * 0.3 - 0.01 * 0.6)

    def test_imtl_g_projects_equally_and_downwards(self):
        matrix = rows(6, 9) * torch.tensor([1.0, 2, 3, 10, 0.1, 1]).double()[:, None]
        projections = (weights(IMTLG(), matrix @ matrix.T) @ matrix) @ (matrix / matrix.norm(dim=1, keepdim=True)).T
        assert projections.min() > 0
        torch.testing.assert_close(projections, projections.mean().expand(6), atol=0, rtol=1e-4)

    def test_aligned_gradients_are_orthogonal_and_equally_long(self):
        matrix = rows(6, 9)
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
        expected = (u @ vh * sigma.min()).mean(0)
        torch.testing.assert_close(weights(AlignedMTL(), matrix @ matrix.T) @ matrix, expected, atol=1e-6, rtol=1e-5)

    def test_db_mtl_makes_gradients_of_logarithms_as_long_as_the_longest(self):
        matrix, loss = rows(6, 9), torch.rand(6, generator=torch.Generator().manual_seed(0)) + 0.1
        gram = matrix @ matrix.T
        w = DBMTL().weights(Seen(0, torch.arange(6), loss, torch.ones(6), gram.diagonal())).double()
        of_log = matrix / loss[:, None]
        expected = (of_log / of_log.norm(dim=1, keepdim=True)).sum(0) * of_log.norm(dim=1).max()
        torch.testing.assert_close(w @ matrix, expected, atol=1e-5, rtol=1e-5)

    def test_cagrad_stays_in_its_ball_and_serves_the_worst_task_better_than_the_mean(self):
        matrix = rows(20, 8)
        mean, direction = matrix.mean(0), weights(CAGrad(0.5), rows(20, 8) @ rows(20, 8).T) @ matrix
        assert (direction - mean).norm() <= 0.5 * mean.norm() * (1 + 1e-5)
        assert (matrix @ direction).min() > (matrix @ mean).min()

    def test_no_task_loses_by_upgrad_where_gradients_are_independent(self):
        matrix = rows(12, 60) - 0.2
        assert (matrix @ (weights(UPGrad(1e-6), matrix @ matrix.T) @ matrix)).min() >= -1e-2
        assert (matrix @ matrix.mean(0)).min() < -0.1 or (matrix @ matrix.T).min() < -1

    def test_nash_direction_has_the_largest_allowed_norm(self):
        gram = rows(9, 30) @ rows(9, 30).T
        for most in (0.5, 2.0):
            w = weights(Nash(max_norm=most), gram)
            assert (w @ gram @ w).sqrt().item() == pytest.approx(most, rel=1e-5)
        w = weights(Nash("none", max_norm=0), gram)
        torch.testing.assert_close(gram @ w * w, torch.ones(9).double(), atol=1e-5, rtol=0)


tasks_and_rank = st.tuples(st.integers(2, 9), st.integers(1, 12), st.integers(0, 10**6))
HOMOGENEOUS = {"nash none": -1.0, "fairgrad": -4 / 3}  # degree of the weights in the gradients' scale; 0 for the others


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("pcgrad", "gradvac")])
@settings(deadline=None, max_examples=15)
@given(case=tasks_and_rank, more=st.randoms(use_true_random=False))
def test_the_direction_does_not_depend_on_the_order_of_tasks(name, case, more):
    tasks, rank, seed = case
    matrix = rows(tasks, rank, seed)
    order = list(range(tasks))
    more.shuffle(order)
    w = weights(METHODS[name](), matrix @ matrix.T)
    moved = weights(METHODS[name](), matrix[order] @ matrix[order].T)
    length = (w.abs() @ matrix.norm(dim=1)).item()
    torch.testing.assert_close(moved @ matrix[order], w @ matrix, atol=2e-4 * length, rtol=0)


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=15)
@given(case=tasks_and_rank, exponent=st.integers(-15, 15))
def test_weights_follow_the_scale_of_all_gradients_as_the_method_says(name, case, exponent):
    tasks, rank, seed = case
    gram = (rows(tasks, rank, seed) @ rows(tasks, rank, seed).T).float()
    scale = 2.0 ** (3 * exponent)
    method = (lambda: Nash(max_norm=0)) if name == "nash" else METHODS[name]
    w, scaled = weights(method(), gram), weights(method(), gram * scale**2)
    assert scaled.isfinite().all()
    expected = w * scale ** HOMOGENEOUS.get(name, 0.0)
    torch.testing.assert_close(scaled, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=25)
@given(
    case=tasks_and_rank,
    exponents=st.lists(st.integers(-15, 15), min_size=9, max_size=9),
    zero=st.integers(0, 8),
    twin=st.integers(0, 8),
)
def test_weights_are_finite_for_mixed_scales_zero_gradients_and_equal_tasks(name, case, exponents, zero, twin):
    tasks, rank, seed = case
    matrix = rows(tasks, rank, seed) * 10.0 ** torch.tensor(exponents[:tasks]).double()[:, None]
    matrix[zero % tasks] = 0
    matrix[twin % tasks] = matrix[0]
    w = weights(METHODS[name](), (matrix @ matrix.T).float())
    assert w.isfinite().all()
    if name not in ("imtl_g", "aligned"):
        assert w.min() >= 0


@pytest.mark.parametrize("name", METHODS)
def test_opposite_gradients_and_no_gradients_at_all_are_handled(name):
    for matrix in (torch.tensor([[1.0, 0], [-1, 0]]), torch.tensor([[1.0], [-2], [0]]), torch.zeros(3, 2), torch.ones(4, 1)):
        w = weights(METHODS[name](), matrix @ matrix.T)
        assert w.isfinite().all()
    torch.testing.assert_close(w, w[0].expand(4), atol=1e-5, rtol=1e-4)  # of four equal tasks


@pytest.mark.parametrize("name", METHODS)
def test_a_matrix_that_smoothing_left_indefinite_gives_finite_weights(name):
    noise = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    gram = rows(12, 3).float() @ rows(12, 3).float().T + 0.3 * (noise + noise.T)
    gram.diagonal().abs_()
    assert weights(METHODS[name](), gram).isfinite().all()


@pytest.mark.parametrize("name", ["mgda", "pcgrad", "cagrad", "nash", "fairgrad", "imtl_g", "aligned", "gradvac"])
def test_a_thousand_tasks_of_rank_64(name):
    matrix = rows(1000, 64).float()
    gram = matrix @ matrix.T
    w = weights(METHODS[name](), gram)
    assert w.isfinite().all()
    if name == "mgda":
        v = gram.double() @ w
        assert w @ v - v.min() <= 1e-4 * gram.diagonal().min()


def test_upgrad_of_a_thousand_tasks_meets_its_residual(monkeypatch):
    solved = {}

    def watched(matrix, tolerance):
        solved["matrix"], solved["u"] = matrix, cone_minimum(matrix, tolerance)
        return solved["u"]

    monkeypatch.setattr("mtrain.balance.upgrad.cone_minimum", watched)
    matrix = rows(1000, 64).float()
    w = weights(UPGrad(), matrix @ matrix.T)
    assert w.isfinite().all()
    assert w.min() >= 0
    matrix, u, one = solved["matrix"].double(), solved["u"].double(), torch.eye(1000).double()
    assert torch.minimum(u - one, u @ matrix).abs().max() <= 1.1e-4  # computed in float32
    # u^T M u is above its least by at most <M u, u - e_i> + |negative part of M u| |u - u*|: the first, as a share
    gap = ((u @ matrix) * (u - one)).sum(1) / (u @ matrix * u).sum(1)
    assert gap.abs().max() <= 1e-3


def test_running_cosines_are_kept_by_name_and_of_active_pairs_only():
    balancer = begun(GradVac(beta=0.5), "abcd")
    matrix = rows(3, 5)
    balancer.weights(seen(matrix @ matrix.T, task_A=torch.tensor([0, 1, 3])))
    assert (balancer.cosine_TT[2] == 0).all()
    assert (balancer.cosine_TT[[0, 0, 1], [1, 3, 3]] != 0).all()
    assert (balancer.cosine_TT.diagonal() == 0).all()
    other = begun(GradVac(beta=0.5), "dxa")
    other.load_state_dict(balancer.state_dict())
    assert other.cosine_TT[0, 2] == balancer.cosine_TT[3, 0]
    assert other.cosine_TT[2, 0] == balancer.cosine_TT[0, 3]
    assert other.cosine_TT.count_nonzero() == 2


def test_pcgrad_is_the_same_for_a_step_and_leaves_agreeing_gradients_alone():
    gram = rows(9, 4) @ rows(9, 4).T
    assert weights(PCGrad(), gram, 5).tolist() == weights(PCGrad(), gram, 5).tolist()
    torch.testing.assert_close(weights(PCGrad(), gram.abs()), torch.ones(9).double())


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: CAGrad(-1), "balancer cagrad: c: found -1; expected a number >= 0"),
        (lambda: CAGrad(float("nan")), "balancer cagrad: c: found nan; expected a number >= 0"),
        (lambda: GradVac(2), "balancer gradvac: beta: found 2; expected a number from 0 to 1"),
        (lambda: FairGrad(-1), "balancer fairgrad: alpha: found -1; expected 0, or a number from 0.2 to 20"),
        (lambda: Nash(max_norm=-1), "balancer nash: max_norm: found -1; expected a number >= 0"),
        (lambda: Nash("l2"), "balancer nash: normalization: found l2; expected frobenius or none"),
        (lambda: AlignedMTL("max"), "balancer aligned: scale: found max; expected min, median or rmse"),
        (lambda: UPGrad(0), "balancer upgrad: ridge: found 0; expected a number from 1e-6 to 1"),
        (lambda: DBMTL(0), "balancer db_mtl: eps: found 0; expected a number > 0"),
        (lambda: begun(GradVac(), [str(i) for i in range(9000)]), "gradvac: tasks: found 9000; expected at most 8192"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(make, line):
    with pytest.raises(UserError, match=line.replace("(", r"\(")):
        make()

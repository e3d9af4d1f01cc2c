import numpy as np
import pytest
import torch
from problems import (
    D,
    Recorder,
    head_gradients,
    make_bank,
    make_batch,
    make_stepper,
    make_tasks,
    naive_objective,
    run_step,
    totals_of,
)  # fmt: skip
from torch import nn

from mtrain.balance.base import Balancer
from mtrain.config import BalancingConfig, ObjectiveConfig
from mtrain.data.batch import Batch
from mtrain.errors import UserError
from mtrain.model.trunks import MLP, Identity, SharedModel
from mtrain.parallel.plan import Plan
from mtrain.parallel.shard import Shard
from mtrain.parallel.world import World
from mtrain.train.task_gradients import make_task_gradients


def make_shared():
    torch.manual_seed(3)
    return SharedModel(MLP(D, [5], "tanh"), 5, D)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3)
        self.out_features = D - 2


class Given(Balancer):
    """Gives fixed weights, and keeps what it saw."""

    def __init__(self, needs, weight_T):
        self.needs, self.fixed, self.seen = needs, weight_T, []

    def weights(self, seen):
        self.seen.append(seen)
        return self.fixed[seen.task_A]


def trained(needs, layout, hidden, weighted=False, pieces=1, weight_T=None, **balancing):
    rng = np.random.default_rng(0)
    tasks = make_tasks(rng)
    batch, bank, shared = make_batch(rng, tasks, layout, weighted=weighted), make_bank(tasks, hidden), make_shared()
    balancer = Given(needs, torch.ones(len(tasks)) if weight_T is None else weight_T[: len(tasks)])
    trunk, heads = Recorder(shared), Recorder()
    config = ObjectiveConfig(balancing=BalancingConfig(**balancing))
    stepper = make_stepper(tasks, bank, shared, trunk, heads, config, balancer=balancer, layout=layout)
    totals = totals_of(tasks)
    run_step(stepper, batch, 0, totals, pieces)
    return tasks, batch, bank, shared, balancer, totals, trunk.grads, head_gradients(bank, heads.grads)


@pytest.mark.parametrize("layout", ["grid", "pairs", "routed"])
@pytest.mark.parametrize("hidden", [(), (4,), (4, 3)], ids=["linear", "one", "two"])
@pytest.mark.parametrize(("weighted", "pieces"), [(False, 1), (True, 3)], ids=["plain", "weighted-accumulated"])
def test_norms_and_products_are_those_of_a_backward_for_each_task(layout, hidden, weighted, pieces):
    tasks, batch, bank, shared, balancer, *_ = trained("gram", layout, hidden, weighted, pieces)
    (seen,) = balancer.seen
    modules, shared = bank.to_modules().double(), shared.double()
    parameters = list(shared.linear_neck.parameters())
    labels = batch.labels.pairs()
    gradients = []
    for t in seen.task_A.tolist():
        only = batch.labels.pairs()._only(labels.task_P == t, labels.task_P, len(tasks))
        z = shared(batch.x_BF.double())
        own = naive_objective(
            tasks, modules, z, type(batch)(batch.x_BF, batch.row_B, only), ObjectiveConfig(), None, len(labels.y_P)
        )
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(own, parameters)]))
    expected = torch.stack(gradients) @ torch.stack(gradients).T
    size = expected.diagonal().sqrt().clamp(min=1e-9)  # 0 where a head's units are all off
    assert float(((seen.gram_AA - expected) / (size[:, None] * size)).abs().max()) < 1e-5
    torch.testing.assert_close(seen.norm2_A.double(), expected.diagonal(), rtol=1e-5, atol=0)
    norms = trained("norms", layout, hidden, weighted, pieces)[4].seen[0]
    torch.testing.assert_close(norms.norm2_A.double(), expected.diagonal(), rtol=1e-5, atol=0)
    assert set(seen.task_A.tolist()) == set(labels.task_P.tolist())


def task_gradients_at(level, tasks, batch, bank, shared, task_A):
    """Of each task's term by a backward of its own in float64, `[A, F]`."""
    modules, shared, labels = bank.to_modules().double(), shared.double(), batch.labels.pairs()
    gradients = []
    for t in task_A.tolist():
        z = shared(batch.x_BF.double())
        at = [z] if level == "features" else [p for p in shared.parameters()]
        only = Batch(batch.x_BF, batch.row_B, labels._only(labels.task_P == t, labels.task_P, len(tasks)))
        own = naive_objective(tasks, modules, z, only, ObjectiveConfig(), None, len(labels.y_P))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(own, at)]))
    return torch.stack(gradients)


@pytest.mark.parametrize("hidden", [(), (4,)], ids=["linear", "hidden"])
@pytest.mark.parametrize("pieces", [1, 3], ids=["whole", "accumulated"])
@pytest.mark.parametrize(
    ("level", "layout"), [("features", "grid"), ("features", "pairs"), ("features", "routed"), ("trunk", "routed")]
)
def test_levels_other_than_the_neck_equal_a_backward_for_each_task(level, layout, pieces, hidden):
    tasks, batch, bank, shared, balancer, *_ = trained("gram", layout, hidden, True, pieces, level=level)
    (seen,) = balancer.seen
    g = task_gradients_at(level, tasks, batch, bank, shared, seen.task_A)
    expected = g @ g.T
    size = expected.diagonal().sqrt().clamp(min=1e-9)
    assert float(((seen.gram_AA - expected) / (size[:, None] * size)).abs().max()) < 1e-5
    norms = trained("norms", layout, hidden, True, pieces, level=level)[4].seen[0]
    torch.testing.assert_close(norms.norm2_A.double(), expected.diagonal(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["grid", "pairs"])
@pytest.mark.parametrize("level", ["neck", "features"])
def test_projections_are_those_of_the_exact_products_in_every_layout_and_level(layout, level):
    if (layout, level) == ("pairs", "features"):
        return  # exact, as rows have few labels each
    exact = trained("gram", layout, (4,), pieces=2, level=level)[4].seen[0].gram_AA
    size = exact.diagonal().sqrt()
    found = trained("gram", layout, (4,), pieces=2, level=level, projections=2048)[4].seen[0].gram_AA
    error = ((found - exact) / (size[:, None] * size)).square().mean().sqrt()
    assert 0 < float(error) < 0.1


@pytest.mark.parametrize("layout", ["grid", "pairs", "routed"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_unbiased_statistics_leave_out_what_rows_have_with_themselves(layout, pieces):
    options = {"unbiased": True, "smoothing": 0.5, "projections": "never"}
    tasks, batch, bank, shared, balancer, *_ = trained("norms", layout, (4,), pieces=pieces, **options)
    (seen,) = balancer.seen
    modules, neck, labels = bank.to_modules().double(), list(shared.double().linear_neck.parameters()), batch.labels.pairs()
    g_RAF = torch.zeros(24, len(seen.task_A), sum(p.numel() for p in neck)).double()
    count_RA = torch.zeros(24, len(seen.task_A)).double()
    for row in range(24):
        for a, t in enumerate(seen.task_A.tolist()):
            here = (labels.task_P == t) & (labels.row_P == row)
            if here.any():
                only = Batch(batch.x_BF, batch.row_B, labels._only(here, labels.task_P, len(tasks)))
                own = naive_objective(
                    tasks, modules, shared(batch.x_BF.double()), only, ObjectiveConfig(), None, len(labels.y_P)
                )
                g_RAF[row, a] = torch.cat([g.flatten() for g in torch.autograd.grad(own, neck)])
                count_RA[row, a] = 1
    if layout == "grid":  # across halves of each micro-batch
        second = torch.cat([torch.arange(24 // pieces) >= 12 // pieces] * pieces)
        one, two = g_RAF[~second].sum(0), g_RAF[second].sum(0)
        expected = 2 * (one @ two.T + two @ one.T)
    else:
        whole, same = g_RAF.sum(0) @ g_RAF.sum(0).T, torch.einsum("raf,rbf->ab", g_RAF, g_RAF)
        count, common = count_RA.sum(0), torch.einsum("ra,rb->ab", count_RA, count_RA)
        pairs = count[:, None] * count
        expected = (whole - same) * pairs / (pairs - common)
    known = expected.diagonal().isfinite()
    size = torch.einsum("raf,raf->a", g_RAF, g_RAF)
    found = seen.norm2_A.double()
    assert ((found - expected.diagonal().clamp(min=0)).abs() <= 1e-5 * size)[known].all()
    assert found[~known].isnan().all()
    gram_AA = trained("gram", layout, (4,), pieces=pieces, **options)[4].seen[0].gram_AA.double()
    value, vector = torch.linalg.eigh(torch.where(known[:, None] & known, expected, 0))
    expected = (vector * value.clamp(min=0)) @ vector.T
    error = (gram_AA - expected)[known][:, known] / (size[known][:, None] * size[known]).sqrt().clamp(min=1e-12)
    assert float(error.abs().max()) < 5e-5  # of an eigendecomposition in float32


@pytest.mark.parametrize("layout", ["grid", "pairs", "routed"])
@pytest.mark.parametrize("hidden", [(), (4, 3)], ids=["linear", "two"])
def test_weights_that_come_after_the_backward_scale_every_gradient_alike(layout, hidden):
    weight_T = torch.rand(40, generator=torch.Generator().manual_seed(1))
    weight_T[2] = 0
    *_, totals, trunk, heads = trained("losses", layout, hidden, weight_T=weight_T)
    *_, totals_after, trunk_after, heads_after = trained("norms", layout, hidden, weight_T=weight_T)
    assert float(totals_after.loss) == pytest.approx(float(totals.loss), rel=1e-6)
    for found, expected in zip(trunk_after, trunk, strict=True):
        torch.testing.assert_close(found, expected)
    assert heads_after.keys() == heads.keys()
    for name in heads:
        torch.testing.assert_close(heads_after[name], heads[name])


@pytest.mark.parametrize("layout", ["grid", "pairs"])
@pytest.mark.parametrize("hidden", [(), (4, 3)], ids=["linear", "two"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_methods_for_shared_parameters_leave_the_heads_to_their_own_losses(layout, hidden, pieces, monkeypatch):
    weight_T = torch.rand(40, generator=torch.Generator().manual_seed(1))
    weight_T[2] = 0
    *_, weighted_trunk, _ = trained("losses", layout, hidden, pieces=1, weight_T=weight_T)
    *_, plain_heads = trained("losses", layout, hidden, pieces=pieces)
    monkeypatch.setattr(Given, "weighs_heads", False)
    for every in (1, 7):  # with gradients in this step, or without
        *_, trunk, heads = trained("gram", layout, hidden, pieces=pieces, weight_T=weight_T, every=every)
        if pieces == 1:  # else the weights are those of the window before
            for found, expected in zip(trunk, weighted_trunk, strict=True):
                torch.testing.assert_close(found, expected)
        assert heads.keys() == plain_heads.keys()
        for name in heads:
            torch.testing.assert_close(heads[name], plain_heads[name])


def test_projected_products_have_an_error_near_the_one_reported():
    exact = trained("gram", "grid", (4,))[4].seen[0].gram_AA
    size = exact.diagonal().sqrt()
    rng = np.random.default_rng(0)
    tasks = make_tasks(rng)
    batch, bank, shared = make_batch(rng, tasks, "grid"), make_bank(tasks, (4,)), make_shared()
    balancer, config = Given("gram", torch.ones(len(tasks))), ObjectiveConfig(balancing=BalancingConfig(projections=64))
    stepper = make_stepper(tasks, bank, shared, Recorder(shared), Recorder(), config, balancer=balancer, layout="grid")
    for step in range(5):
        run_step(stepper, batch, step, totals_of(tasks))
        error = ((balancer.seen[step].gram_AA - exact) / (size[:, None] * size)).square().mean().sqrt()
        assert 0 < float(error) < 3 * stepper.balancing.gradients.error < 1
    mean = torch.stack([seen.gram_AA for seen in balancer.seen]).mean(0)
    assert ((mean - exact) / (size[:, None] * size)).square().mean().sqrt() < error  # they are drawn anew in each step


def test_a_rank_without_tasks_gets_the_projected_products_of_the_others():
    rng = np.random.default_rng(0)
    tasks = make_tasks(rng)
    batch, bank, shared = make_batch(rng, tasks, "grid"), make_bank(tasks, (4,)), make_shared()
    balancer, config = Given("gram", torch.ones(len(tasks))), ObjectiveConfig(balancing=BalancingConfig(projections=64))
    stepper = make_stepper(tasks, bank, shared, Recorder(shared), Recorder(), config, balancer=balancer, layout="grid")
    gradients, gathered = stepper.balancing.gradients, []

    class Recording(World):
        def gather_rows(self, x_ND):
            gathered.append(x_ND)
            return x_ND

    class Alone(World):
        def gather_rows(self, x_ND):
            assert x_ND.shape == (0, *gathered[0].shape[1:])
            return gathered.pop(0)

    gradients.shard.world = Recording()
    run_step(stepper, batch, 0, totals_of(tasks))
    (seen,) = balancer.seen
    gradients.shard, gradients.sums, gradients.num_tasks = (
        Shard(Alone(), Plan(tasks.names, np.ones(len(tasks)), np.ones(2))),
        {},
        0,
    )
    assert torch.equal(gradients.finish(seen.task_A)[1], seen.gram_AA)


def test_gradients_are_taken_every_few_steps_and_smoothed_in_their_squares():
    rng = np.random.default_rng(0)
    tasks = make_tasks(rng)
    bank, shared = make_bank(tasks), make_shared()
    balancer = Given("norms", torch.ones(len(tasks)))
    config = ObjectiveConfig(balancing=BalancingConfig(every=3, smoothing=0.75))
    stepper = make_stepper(tasks, bank, shared, Recorder(shared), Recorder(), config, balancer=balancer)
    for step in range(7):
        run_step(stepper, make_batch(np.random.default_rng(step), tasks, "routed"), step, totals_of(tasks))
    assert [seen.step for seen in balancer.seen] == [0, 3, 6]
    every_step, model = Given("norms", torch.ones(len(tasks))), make_shared()
    single = make_stepper(tasks, make_bank(tasks), model, Recorder(model), Recorder(), balancer=every_step)
    raw = {}
    for step in (0, 3, 6):
        run_step(single, make_batch(np.random.default_rng(step), tasks, "routed"), step, totals_of(tasks))
        seen = every_step.seen[-1]
        for t, value in zip(seen.task_A.tolist(), seen.norm2_A.tolist(), strict=True):
            raw[t] = value if t not in raw else 0.75 * raw[t] + 0.25 * value
    last = balancer.seen[-1]
    assert last.norm2_A.tolist() == pytest.approx([raw[t] for t in last.task_A.tolist()], rel=1e-5)


@pytest.mark.parametrize(
    ("model", "layout", "needs", "options", "message"),
    [
        (
            SharedModel(MLP(D, [D]), D, None),
            "grid",
            "gram",
            {},
            r"mine needs .* at a linear neck, .* model\.neck to a width",
        ),
        (make_shared().requires_grad_(False), "grid", "gram", {}, "but the trunk is frozen"),
        (make_shared(), "pairs", "gram", {"level": "trunk"}, "rows of one task each, as of layouts routed and files"),
        (SharedModel(Conv(), D, D), "routed", "norms", {"level": "trunk"}, "linear layers, but trunk.conv is a Conv1d"),
        (SharedModel(Identity(D), D, None), "routed", "norms", {"level": "trunk"}, "frozen"),
        (SharedModel(MLP(D, [D], members=2), D, None), "grid", "gram", {"level": "features"}, "has several members"),
        (make_shared(), "grid", "gram", {"unbiased": True}, "smoothing is 0; expected .* smoothing above 0"),
        (
            make_shared(),
            "grid",
            "gram",
            {"unbiased": True, "smoothing": 0.9, "level": "features"},
            "unbiased: level is features",
        ),
        (
            make_shared(),
            "grid",
            "gram",
            {"projections": 20},
            "projections: 20 random vectors, expected a multiple of 8 from 16",
        ),
        (make_shared(), "grid", "norms", {"projections": 64}, "64 vectors for inner products, but mine needs norms only"),
    ],
)
def test_gradients_that_cannot_be_had_are_refused_in_a_line(model, layout, needs, options, message):
    bank, config = make_bank(make_tasks(np.random.default_rng(0))), BalancingConfig(**options)
    with pytest.raises(UserError, match=message):
        make_task_gradients("mine", needs == "gram", model, bank, None, layout == "routed", False, config, 24)


def test_a_trunk_that_is_compiled_or_sharded_gives_no_gradients_of_inner_layers():
    bank, config = make_bank(make_tasks(np.random.default_rng(0))), BalancingConfig(level="trunk")
    with pytest.raises(UserError, match="neither compiled nor sharded by FSDP"):
        make_task_gradients("mine", False, make_shared(), bank, None, True, False, config, 24, whole_trunk=False)

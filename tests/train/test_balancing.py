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

from mtrain.balance.base import Balancer
from mtrain.config import BalancingConfig, ObjectiveConfig
from mtrain.errors import UserError
from mtrain.model.trunks import MLP, SharedModel
from mtrain.parallel.plan import Plan
from mtrain.parallel.shard import Shard
from mtrain.parallel.world import World
from mtrain.train.balancing import NeckGradients


class Given(Balancer):
    """Gives fixed weights, and keeps what it saw."""

    def __init__(self, needs, weight_T):
        self.needs, self.fixed, self.seen = needs, weight_T, []

    def weights(self, seen):
        self.seen.append(seen)
        return self.fixed[seen.task_A]


def make_shared():
    torch.manual_seed(3)
    return SharedModel(MLP(D, [5], "tanh"), 5, D)


def trained(needs, layout, hidden, weighted=False, pieces=1, weight_T=None, **balancing):
    rng = np.random.default_rng(0)
    tasks = make_tasks(rng)
    batch, bank, shared = make_batch(rng, tasks, layout, weighted=weighted), make_bank(tasks, hidden), make_shared()
    balancer = Given(needs, torch.ones(len(tasks)) if weight_T is None else weight_T[: len(tasks)])
    trunk, heads = Recorder(shared), Recorder()
    config = ObjectiveConfig(balancing=BalancingConfig(**balancing))
    stepper = make_stepper(tasks, bank, shared, trunk, heads, config, balancer=balancer, grid=layout == "grid")
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


def test_projected_products_have_an_error_near_the_one_reported():
    exact = trained("gram", "grid", (4,))[4].seen[0].gram_AA
    size = exact.diagonal().sqrt()
    rng = np.random.default_rng(0)
    tasks = make_tasks(rng)
    batch, bank, shared = make_batch(rng, tasks, "grid"), make_bank(tasks, (4,)), make_shared()
    balancer, config = Given("gram", torch.ones(len(tasks))), ObjectiveConfig(balancing=BalancingConfig(projections=64))
    stepper = make_stepper(tasks, bank, shared, Recorder(shared), Recorder(), config, balancer=balancer, grid=True)
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
    stepper = make_stepper(tasks, bank, shared, Recorder(shared), Recorder(), config, balancer=balancer, grid=True)
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


def test_a_trunk_without_a_linear_end_is_refused_for_gradient_methods():
    tasks = make_tasks(np.random.default_rng(0))
    shared = SharedModel(MLP(D, [D]), D, None)
    with pytest.raises(UserError, match=r"mine needs .* at a linear neck, but .* set model\.neck to a width"):
        NeckGradients("mine", Given("gram", None), shared, make_bank(tasks), None, True, BalancingConfig())
    shared = make_shared().requires_grad_(False)
    with pytest.raises(UserError, match="but the trunk is frozen"):
        NeckGradients("mine", Given("gram", None), shared, make_bank(tasks), None, True, BalancingConfig())

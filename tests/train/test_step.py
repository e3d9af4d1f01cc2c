"""The objective, its gradients and the step against loops over labels and tasks in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from problems import (
    KINDS,
    D,
    Recorder,
    Rows,
    head_gradients,
    make_bank,
    make_batch,
    make_stepper,
    make_tasks,
    naive_objective,
    rows_as_inputs,
    run_step,
    totals_of,
)
from torch import nn

from mtrain.balance.base import Balancer
from mtrain.config import ObjectiveConfig
from mtrain.data.batch import Batch, Grid, Pairs
from mtrain.model.kinds import Binary, Kind, Poisson, Regression
from mtrain.train.objective import Objective, coefficients, expected_share, pieces, routes
from mtrain.train.optim import HeadAdamW
from mtrain.train.step import LossScale

LAYOUTS = ["grid", "pairs", "routed"]


def recorded(tasks, bank, batch, pieces=1, **options):
    """One step without moving anything: totals, gradients of features, gradients of heads."""
    model = Rows(len(batch.row_B))
    trunk, heads = Recorder(model), Recorder()
    stepper = make_stepper(tasks, bank, model, trunk, heads, **options)
    totals = totals_of(tasks)
    run_step(stepper, rows_as_inputs(batch), 0, totals, pieces)
    return totals, model, trunk.grads[0], head_gradients(bank, heads.grads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("hidden", "share", "scale", "weighted"),
    [
        ((), "rows", "none", False),
        ((), "tasks", "kind", True),
        ((4,), "rows", "constant", True),
        ((4, 3), "tasks", "constant", False),
        ((4,), "rows", "kind", False),
    ],
)
def test_the_objective_and_its_gradients_equal_a_loop_over_labels(layout, hidden, share, scale, weighted):
    rng = np.random.default_rng(0)
    tasks = make_tasks(rng)
    batch = make_batch(rng, tasks, layout, weighted=weighted)
    bank = make_bank(tasks, hidden)
    config = ObjectiveConfig(share=share, scale=scale)
    sampling_T = None
    if layout == "routed":
        sampling_T = rng.random(len(tasks))
        sampling_T /= sampling_T.sum()
    totals, model, grad_z, grad_heads = recorded(tasks, bank, batch, config=config, sampling_T=sampling_T)

    modules = bank.to_modules().double()
    z = model.z.detach().double().requires_grad_()
    objective = naive_objective(tasks, modules, z, batch, config, sampling_T)
    objective.backward()
    assert float(totals.loss) == pytest.approx(objective.item(), rel=1e-5)
    torch.testing.assert_close(grad_z.double(), z.grad, rtol=1e-4, atol=1e-7)
    present = {tasks[t].name for t in batch.labels.pairs().task_P.unique().tolist()}
    assert set(grad_heads) == present
    assert len(present) < len(tasks)
    for name in present:
        for found, p in zip(grad_heads[name], modules[name].parameters(), strict=True):
            torch.testing.assert_close(found.double(), p.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"toward_shared": 20.0}], ids=["plain", "toward_shared"])
def test_micro_batches_give_the_update_of_the_whole_batch(layout, options):
    rng = np.random.default_rng(1)
    tasks = make_tasks(rng)
    bank = make_bank(tasks, (3,))
    batch = make_batch(rng, tasks, layout, weighted=True)
    whole, _, z_whole, heads_whole = recorded(tasks, bank, batch, **options)
    parts, _, z_parts, heads_parts = recorded(tasks, bank, batch, pieces=5, **options)
    assert float(parts.loss) == pytest.approx(float(whole.loss), rel=1e-5)
    torch.testing.assert_close(z_parts, z_whole)
    assert heads_parts.keys() == heads_whole.keys()
    for name, grads in heads_whole.items():
        torch.testing.assert_close(heads_parts[name], grads)


def test_micro_batches_without_labels_and_batches_without_labels_change_nothing():
    rng = np.random.default_rng(1)
    tasks = make_tasks(rng)
    bank = make_bank(tasks)
    batch = make_batch(rng, tasks, "pairs", rows=12)
    labels = batch.labels
    keep = labels.row_P < 6
    few = Pairs.of(labels.row_P[keep], labels.task_P[keep], labels.y_P[keep], None, 12, len(tasks))
    whole, _, z_whole, _ = recorded(tasks, bank, Batch(batch.x_BF, batch.row_B, few))
    parts, _, z_parts, _ = recorded(tasks, bank, Batch(batch.x_BF, batch.row_B, few), pieces=2)
    assert float(parts.loss) == pytest.approx(float(whole.loss), rel=1e-5)
    torch.testing.assert_close(z_parts, z_whole)

    model, heads = Rows(12), Recorder()
    none = Pairs.of(labels.row_P[:0], labels.task_P[:0], labels.y_P[:0], None, 12, len(tasks))
    totals = totals_of(tasks)
    stepper = make_stepper(tasks, bank, model, Recorder(model), heads)
    run_step(stepper, Batch(batch.row_B[:, None].float(), batch.row_B, none), 0, totals)
    assert heads.steps == totals.steps == 0


@pytest.mark.parametrize("layout", ["grid", "routed"])
def test_a_balancers_weights_scale_the_losses_and_see_mean_losses_of_present_tasks(layout):
    rng = np.random.default_rng(2)
    tasks = make_tasks(rng)
    bank = make_bank(tasks)
    batch = make_batch(rng, tasks, layout, weighted=True)
    weight_T = torch.from_numpy(rng.random(len(tasks))).float()
    seen = {}

    class Fixed(Balancer):
        def weights(self, step):
            seen.update(zip(step.task_A.tolist(), zip(step.loss_A.tolist(), step.count_A.tolist(), strict=True), strict=True))
            return weight_T[step.task_A]

    totals, model, grad_z, _ = recorded(tasks, bank, batch, balancer=Fixed())
    modules, z = bank.to_modules().double(), model.z.detach().double().requires_grad_()
    objective = naive_objective(tasks, modules, z, batch, ObjectiveConfig(), balance_T=weight_T.tolist())
    assert float(totals.loss) == pytest.approx(objective.item(), rel=1e-5)
    torch.testing.assert_close(grad_z.double(), torch.autograd.grad(objective, z)[0], rtol=1e-4, atol=1e-7)

    labels, plain = batch.labels.pairs(), ObjectiveConfig(scale="none")
    for t in range(len(tasks)):
        at = labels.task_P == t
        assert (t in seen) == bool(at.any())
        if at.any():
            assert seen[t][1] == at.sum()
            own = Batch(
                batch.x_BF,
                batch.row_B,
                Pairs.of(labels.row_P[at], labels.task_P[at], labels.y_P[at], labels.weight_P[at], 24, len(tasks)),
            )
            total = naive_objective(tasks, modules, z, own, plain, num_labels=1) / tasks[t].weight
            mean = total / labels.weight_P[at].sum()
            assert seen[t][0] == pytest.approx(mean.item(), rel=1e-4)


def test_weights_of_an_accumulated_window_come_from_the_window_before():
    rng = np.random.default_rng(2)
    tasks = make_tasks(rng)
    model, seen = Rows(24), []

    class Counting(Balancer):
        def weights(self, step):
            seen.append(step.step)
            return torch.full_like(step.loss_A, float(len(seen) + 1))

    stepper = make_stepper(tasks, make_bank(tasks), model, Recorder(model), Recorder(), balancer=Counting())
    batch = rows_as_inputs(make_batch(rng, tasks, "grid"))
    losses = []
    for step in range(3):
        totals = totals_of(tasks)
        run_step(stepper, batch, step, totals, pieces=4)
        losses.append(float(totals.loss))
    np.testing.assert_allclose(np.array(losses) / losses[0], [1, 2, 3], rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_toward_shared_adds_the_gradient_of_its_penalty(layout):
    """Of pull / n_t * |w_t - mean|^2 for each label, the mean taken over heads with training labels, padding apart."""
    rng = np.random.default_rng(3)
    tasks = make_tasks(rng)
    tasks.stats["train_labels"][13] = 0
    bank = make_bank(tasks, (4,))
    batch = make_batch(rng, tasks, layout)
    _, _, z_plain, plain = recorded(tasks, bank, batch)
    _, _, z_pulled, pulled = recorded(tasks, bank, batch, toward_shared=30.0, toward_shared_bias=7.0)
    torch.testing.assert_close(z_plain, z_pulled)

    coefficient_T, count_T = coefficients(tasks, ObjectiveConfig(), None), batch.labels.count_T().numpy()
    modules = bank.to_modules()
    for group in bank.groups:
        layers = len(group.weights)
        for t, name in zip(group.task_ids.tolist(), group.names, strict=True):
            if name not in plain:
                continue
            own = [p.detach().double().requires_grad_() for p in modules[name].parameters()]
            penalty = torch.zeros((), dtype=torch.float64)
            for i, p in enumerate(own):
                layer, is_bias = i // 2, i % 2
                rows = [
                    list(modules[other].parameters())[i].detach().double()
                    for other, u in zip(group.names, group.task_ids.tolist(), strict=True)
                    if tasks.stats["train_labels"][u] > 0
                ]
                for o in range(len(p)):
                    sharing = [row[o] for row in rows if len(row) > o]
                    if layer < layers - 1 or sharing:
                        mean = torch.stack(sharing).mean(0)
                        penalty = penalty + (7.0 if is_bias else 30.0) * (p[o] - mean).square().sum()
            factor = coefficient_T[t] * count_T[t] / max(tasks.stats["train_labels"][t], 1) / count_T.sum()
            expected = torch.autograd.grad(penalty * factor, own)
            for a, b, e in zip(pulled[name], plain[name], expected, strict=True):
                torch.testing.assert_close((a - b).double(), e, rtol=1e-3, atol=1e-6)


def test_the_shared_head_follows_the_heads_and_padding_stays_zero():
    rng = np.random.default_rng(4)
    tasks = make_tasks(rng)
    bank = make_bank(tasks, (3,))
    model = Rows(24)
    optimizer = HeadAdamW(bank, lr=0.1)
    stepper = make_stepper(tasks, bank, model, None, optimizer, toward_shared=50.0)
    for step in range(6):
        run_step(stepper, rows_as_inputs(make_batch(rng, tasks, "routed")), step, totals_of(tasks))
    for group, means in zip(bank.groups, stepper.shared_heads.means, strict=True):
        for stack, mean in zip(group.parameters(), means, strict=True):
            pad = group.pad_TO if group.pad_TO is not None and stack.shape[1] == group.outputs else None
            count = len(stack) if pad is None else (~pad).sum(0).view(-1, *[1] * (stack.dim() - 2))
            torch.testing.assert_close(mean, stack.detach().sum(0) / count, rtol=1e-4, atol=1e-6)
            if pad is not None:
                assert not stack[pad].any()


def naive_training(tasks, trunk, modules, batches, lr, decay, head_clip=None, clip=None):
    """A plain loop: one optimizer for the trunk, one for each head, stepped when the head has a label."""
    trunk_optimizer = torch.optim.AdamW(trunk.parameters(), lr=lr, weight_decay=decay)
    own = {name: torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=decay) for name, head in modules.items()}
    losses = []
    for batch in batches:
        trunk_optimizer.zero_grad()
        modules.zero_grad()
        objective = naive_objective(tasks, modules, trunk(batch.x_BF.double()), batch, ObjectiveConfig())
        objective.backward()
        losses.append(objective.item())
        if clip is not None:
            nn.utils.clip_grad_norm_(trunk.parameters(), clip)
        trunk_optimizer.step()
        for t in batch.labels.pairs().task_P.unique().tolist():
            head = modules[tasks[t].name]
            if head_clip is not None:
                nn.utils.clip_grad_norm_(head.parameters(), head_clip)
            own[tasks[t].name].step()
    return losses


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("clips", [{}, {"clip": 0.05, "head_clip": 0.02}], ids=["plain", "clipped"])
def test_a_training_equals_a_loop_with_separate_heads_and_optimizers(layout, clips):
    rng = np.random.default_rng(5)
    tasks = make_tasks(rng)
    batches = [make_batch(rng, tasks, layout, rows=12, missing=0.8) for _ in range(8)]
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    bank = make_bank(tasks, (3,))
    reference, modules = copy.deepcopy(trunk).double(), bank.to_modules().double()
    expected = naive_training(tasks, reference, modules, batches, lr=0.01, decay=0.1, **clips)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = trunk

        def forward(self, x, keys):
            return self.trunk(x)

    trunk_optimizer = torch.optim.AdamW(trunk.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    head_optimizer = HeadAdamW(bank, lr=0.01, weight_decay=0.1, max_norm=clips.get("head_clip"))
    stepper = make_stepper(tasks, bank, Shared(), trunk_optimizer, head_optimizer, clip=clips.get("clip"))
    losses = []
    for step, batch in enumerate(batches):
        totals = totals_of(tasks)
        run_step(stepper, batch, step, totals)
        losses.append(float(totals.loss))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for p, q in zip(trunk.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-3, atol=1e-5)
    for name, head in bank.to_modules().items():
        for p, q in zip(head.parameters(), modules[name].parameters(), strict=True):
            torch.testing.assert_close(p.double(), q, rtol=1e-3, atol=1e-5)


class Exploding(Kind):
    """A user's kind whose loss is infinite for one label, with NaN gradients for missing ones (y = 0)."""

    family = "regression"

    def losses(self, logits, y, params):
        return (logits[..., 0] - y).square() / y.abs().sqrt() + torch.where(y == 9, torch.inf, 0.0)

    def constant(self, labels):
        return labels.mean()[:, None]


def exploding_problem(layout, bad):
    """Tasks 0 and 1 of the user's kind and two others; a label of task 0 is bad."""
    rng = np.random.default_rng(6)
    tasks = make_tasks(rng, kinds=[Exploding(), Exploding(), Regression(), Binary()])
    batch = make_batch(rng, tasks, "pairs", rows=8, missing=0.0, absent=None)
    labels = batch.labels
    y_P = torch.where((labels.task_P == 3), (labels.y_P > 0).float(), labels.y_P.abs() + 1)
    y_P[(labels.task_P == 0) & (labels.row_P == 2)] = 9.0 if bad else 2.0
    keep = (labels.row_P != 4) | (labels.task_P == 2)
    if layout == "routed":
        keep = labels.row_P % 4 == labels.task_P if not bad else (labels.row_P + 2) % 4 == labels.task_P
    pairs = Pairs.of(labels.row_P[keep], labels.task_P[keep], y_P[keep], None, 8, 4)
    return tasks, Batch(batch.x_BF, batch.row_B, pairs.grid() if layout == "grid" else pairs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_task_with_an_infinite_loss_is_left_out_and_nothing_else_notices(layout):
    tasks, batch = exploding_problem(layout, bad=True)
    bank = make_bank(tasks)
    totals, _, grad_z, heads = recorded(tasks, bank, batch, config=ObjectiveConfig(scale="none"))
    assert totals.bad_T.tolist() == [1, 0, 0, 0]
    assert totals.skipped == 0
    assert math.isfinite(totals.loss)

    labels = batch.labels.pairs()
    keep = labels.task_P != 0
    rest = Pairs.of(labels.row_P[keep], labels.task_P[keep], labels.y_P[keep], None, 8, 4)
    rest = Batch(batch.x_BF, batch.row_B, rest.grid() if layout == "grid" else rest)
    _, _, z_rest, heads_rest = recorded(tasks, bank, rest, config=ObjectiveConfig(scale="none"))
    factor = len(rest.labels.pairs().y_P) / len(labels.y_P)  # N counts the bad labels too
    torch.testing.assert_close(grad_z, z_rest * factor)
    assert heads.keys() == heads_rest.keys() == {"t1", "t2", "t3"}
    for name in heads:
        torch.testing.assert_close(heads[name], [grad * factor for grad in heads_rest[name]])


def test_missing_labels_never_bring_nan_gradients_whatever_their_logits_are():
    tasks = make_tasks(np.random.default_rng(0), kinds=[Poisson(), Exploding(), Regression()])
    bank = make_bank(tasks)
    y = torch.tensor([[torch.nan, torch.nan, 1.0], [2.0, 1.0, 1.0]])
    labels = Grid(y)
    z = torch.zeros(2, D)
    objective = Objective(tasks, bank, torch.device("cpu"))
    for piece in pieces(bank, z, labels, routes(bank, labels)):
        leaf = torch.tensor([[[200.0]], [[0.5]]]).expand(piece.logits.shape).clone().requires_grad_()
        losses = objective.losses(type(piece)(**(vars(piece) | {"logits": leaf})))
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        assert losses.isfinite().all()
        assert grad.isfinite().all()
        assert not grad[y[:, piece.task_A].isnan()].any()


@pytest.mark.parametrize("where", ["features", "gradient"])
def test_a_step_with_a_trunk_that_is_not_finite_moves_neither_trunk_nor_heads(where):
    rng = np.random.default_rng(7)
    tasks = make_tasks(rng)
    bank = make_bank(tasks)

    class Broken(Rows):
        def forward(self, x, keys=None):
            z = super().forward(x)
            if where == "features":
                return torch.where(x[:, :1] == 3, torch.inf, z)
            z.register_hook(lambda grad: torch.where(x[:, :1] == 3, torch.nan, grad))
            return z

    model, heads = Broken(24), Recorder()
    trunk = Recorder(model)
    totals = totals_of(tasks)
    run_step(make_stepper(tasks, bank, model, trunk, heads), rows_as_inputs(make_batch(rng, tasks, "grid")), 0, totals)
    assert trunk.steps == heads.steps == 0
    assert totals.skipped == 1
    assert model.z.grad is None


def test_fp16_losses_are_scaled_for_trunk_and_heads_and_gradients_come_back_unscaled():
    rng = np.random.default_rng(8)
    tasks = make_tasks(rng)
    bank = make_bank(tasks, (3,))
    batch = make_batch(rng, tasks, "grid")
    _, _, z_plain, plain = recorded(tasks, bank, batch, toward_shared=5.0)
    _, _, z_scaled, scaled = recorded(tasks, bank, batch, toward_shared=5.0, precision="fp16")
    torch.testing.assert_close(z_scaled, z_plain)
    for name in plain:
        torch.testing.assert_close(scaled[name], plain[name])


def test_an_fp16_overflow_of_trunk_or_heads_skips_both_and_halves_the_scale_until_it_counts_as_bad():
    rng = np.random.default_rng(8)
    tasks = make_tasks(rng)
    bank = make_bank(tasks)
    batch = rows_as_inputs(make_batch(rng, tasks, "grid"))

    class Overflows(Rows):
        def forward(self, x, keys=None):
            z = super().forward(x)
            z.register_hook(lambda grad: grad * torch.inf)
            return z

    model, heads = Overflows(24), Recorder()
    stepper = make_stepper(tasks, bank, model, Recorder(model), heads, precision="fp16")
    totals = totals_of(tasks)
    for step in range(18):
        run_step(stepper, batch, step, totals)
    assert stepper.scale.value == 1.0
    assert totals.skipped == 2  # 16 halvings, then the scale is not to blame
    assert heads.steps == 0

    identity = Recorder(None)
    stepper = make_stepper(tasks, bank, nn.Identity(), None, identity, precision="fp16")
    stepper.model = lambda x, keys: torch.full((len(x), D), 1e38)  # finite features, heads' gradients overflow
    run_step(stepper, batch, 0, totals_of(tasks))
    assert identity.steps == 0


def test_the_loss_scale_doubles_after_many_good_steps():
    scale = LossScale(8.0, growth_interval=3)
    for finite in (True, True, False, True, True, True):
        scale.update(finite)
    assert scale.value == 8.0


@pytest.mark.parametrize("layout", ["grid", "routed"])
@pytest.mark.parametrize("share", ["rows", "tasks"])
def test_expected_shares_are_what_labels_weights_and_sampling_give(layout, share):
    rng = np.random.default_rng(9)
    tasks = make_tasks(rng)
    sampling_T = None
    if layout == "routed":
        sampling_T = rng.random(len(tasks))
        sampling_T /= sampling_T.sum()
    found = expected_share(tasks, ObjectiveConfig(share=share, scale="kind"), sampling_T)
    count_T = tasks.stats["train_labels"]
    drawn = count_T / count_T.sum() if sampling_T is None else sampling_T
    raw = tasks.weight_T * (drawn if share == "rows" else 1.0)
    np.testing.assert_allclose(found, raw / raw.sum())


def test_a_weighted_and_a_plain_binary_task_can_be_mixed():
    """Each kind sees its own parameters only."""
    tasks = make_tasks(np.random.default_rng(0), kinds=KINDS[:5])
    batch = make_batch(np.random.default_rng(0), tasks, "grid", missing=0.0)
    totals, *_ = recorded(tasks, make_bank(tasks), batch)
    assert not totals.bad_T.any()

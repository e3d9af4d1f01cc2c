"""Steps of heads that are more than layers (parents, gates, scales, ragged layers) against autograd in float64."""

import copy

import numpy as np
import pytest
import torch
from problems import (
    D,
    Recorder,
    Rows,
    make_batch,
    make_stepper,
    make_tasks,
    naive_objective,
    rows_as_inputs,
    run_step,
    totals_of,
)

from mtrain.balance.base import Balancer
from mtrain.config import BalancingConfig, ObjectiveConfig
from mtrain.data.batch import Batch, Pairs
from mtrain.errors import UserError
from mtrain.model.head_forms import Gate, HeadForm
from mtrain.model.heads import HeadBank
from mtrain.train.checkpoint import Checkpoints, Snapshot
from mtrain.train.optim import HeadAdamW
from mtrain.train.state import head_stacks

PARENTS = {2: (0,), 5: (2,), 8: (1, 3), 13: (0,)}  # task 5 reads 2, which reads 0; 8 reads two of different kinds
FEATURES = {"left": (2,), "experts": (2, 2)}
LAYOUTS = ["grid", "pairs", "routed"]
CASES = {
    "dependent": ({"features": (D,)}, {"scale_shift": True}),
    "gated": (FEATURES, {"gate": Gate("experts", "left"), "scale_shift": True}),
    "ragged": ({"features": (D,)}, {}),
}


def make_forms(case, tasks):
    if case == "gated":
        return [HeadForm((3,), "left" if t % 4 == 3 else None, (), (0,) if t == 6 else None) for t in range(len(tasks))]
    return [HeadForm(("2x",) if case == "ragged" else (4,), None, PARENTS.get(t, ())) for t in range(len(tasks))]


def make_bank(case, tasks, **options):
    features, own = CASES[case]
    keys = [task.kind.group_key for task in tasks]
    forms = make_forms(case, tasks)
    return HeadBank(tasks.names, tasks.num_outputs_T.tolist(), features, keys=keys, forms=forms, **own, **options)


def recorded(tasks, bank, batch, pieces=1, layout="pairs", **options):
    model = Rows(len(batch.row_B))
    trunk, heads = Recorder(model), Recorder()
    stepper = make_stepper(tasks, bank, model, trunk, heads, layout=layout, **options)
    totals = totals_of(tasks)
    run_step(stepper, rows_as_inputs(batch), 0, totals, pieces)
    return float(totals.loss), model.z.detach(), trunk.grads[0], by_name(bank, heads.grads)


def by_name(bank, updates):
    """Gradients of the heads that move, with their padding."""
    found = {}
    for update in updates:
        names = bank.groups[update.group].names
        active = range(len(names)) if update.active_A is None else update.active_A.tolist()
        for a, local in enumerate(active):
            assert names[local] not in found
            found[names[local]] = [grad[local if update.dense else a] for grad in update.grads]
    return found


def naive(tasks, bank, batch, z):
    """J, and its gradients at z and all heads by name, from the bank as a plain module in float64."""
    exact, z = copy.deepcopy(bank).double(), z.double().requires_grad_()
    exact.zero_grad()
    logits = exact(z)
    at = {float(row[0]): b for b, row in enumerate(z.detach())}
    modules = {
        name: lambda row, t=t: logits[at[float(row.detach()[0])], t, : bank.outputs[t]] for t, name in enumerate(bank.names)
    }
    objective = naive_objective(tasks, modules, z, batch, ObjectiveConfig())
    objective.backward()
    grads = {}
    for group in exact.groups:
        for local, name in enumerate(group.names):
            grads[name] = [p.grad[local] for p in group.parameters()]
    return objective.item(), z.grad, grads


def ancestors(tasks):
    every = set(tasks)
    while more := {p for t in every for p in PARENTS.get(t, ())} - every:
        every |= more
    return every


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_the_objective_and_its_gradients_equal_autograd(layout, case):
    rng = np.random.default_rng(0)
    tasks = make_tasks(rng)
    batch, bank = make_batch(rng, tasks, layout, rows=12, weighted=True), make_bank(case, tasks)
    loss, z, grad_z, grad_heads = recorded(tasks, bank, batch)
    expected, expected_z, expected_heads = naive(tasks, bank, batch, z)
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(grad_z.double(), expected_z, rtol=1e-4, atol=1e-7)
    present = set(batch.labels.pairs().task_P.unique().tolist())
    assert set(grad_heads) == {tasks[t].name for t in (present if case == "gated" else ancestors(present))}
    for name, grads in grad_heads.items():
        for found, wanted in zip(grads, expected_heads[name], strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-7)
    parts = recorded(tasks, bank, batch, pieces=4)
    assert parts[0] == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(parts[2].double(), expected_z, rtol=1e-4, atol=1e-7)
    assert parts[3].keys() == grad_heads.keys()
    for name, grads in grad_heads.items():
        for found, wanted in zip(parts[3][name], grads, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", ["grid", "pairs"])
def test_a_parent_without_labels_moves_with_its_children_and_only_then(layout):
    rng = np.random.default_rng(1)
    tasks = make_tasks(rng)
    bank = make_bank("dependent", tasks)
    moved = {}
    for t in (5, 4):  # task 5 reads 2, which reads 0; task 4 reads none
        labels = Pairs.of(torch.arange(3), torch.full((3,), t), torch.ones(3), None, 3, len(tasks))
        batch = Batch(torch.zeros(3, D), torch.arange(3), labels.grid() if layout == "grid" else labels)
        own, optimizer = copy.deepcopy(bank), None
        optimizer = HeadAdamW(own, lr=0.1)
        stepper = make_stepper(tasks, own, Rows(3), None, optimizer)
        run_step(stepper, rows_as_inputs(batch), 0, totals_of(tasks))
        counts = {}
        for group in own.groups:
            for p in group.parameters():
                counts |= dict(zip(group.names, optimizer.state[p]["step"].tolist(), strict=True))
        moved[t] = {name for name, steps in counts.items() if steps}
    assert moved == {5: {"t0", "t2", "t5"}, 4: {"t4"}}


@pytest.mark.parametrize("case", CASES)
def test_heads_are_saved_by_name_and_loaded_into_other_groups(case, tmp_path):
    rng = np.random.default_rng(2)
    tasks = make_tasks(rng)
    bank = make_bank(case, tasks)
    optimizer = HeadAdamW(bank, lr=0.1)
    stepper = make_stepper(tasks, bank, Rows(12), None, optimizer)
    for step in range(2):
        run_step(stepper, rows_as_inputs(make_batch(rng, tasks, "pairs", rows=12)), step, totals_of(tasks))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, Snapshot({}, head_stacks(bank, optimizer)), {"best": 1, "final": None})
    assert checkpoints.finish() is None
    saved = checkpoints.newest()
    keep = [t for t in range(len(tasks)) if t not in (6, 11, 9)]  # what is left of the classes' groups is padded less
    few, forms = tasks.take(np.array(keep)), make_forms(case, tasks)
    moved = [HeadForm(f.hidden, f.reads, tuple(keep.index(p) for p in f.parents), f.experts) for f in (forms[t] for t in keep)]
    features, options = CASES[case]
    keys = [task.kind.group_key for task in few]
    other = HeadBank(few.names, few.num_outputs_T.tolist(), features, keys=keys, forms=moved, seed=1, **options)
    second = HeadAdamW(other)
    assert saved.copy_heads(head_stacks(other, second)) == set(few.names)
    z = torch.randn(4, D)
    width = int(few.num_outputs_T.max())
    torch.testing.assert_close(other(z), bank(z)[:, keep, :width])
    heads = saved.heads()
    for name, own in zip(bank.names, bank._heads(), strict=True):
        weights, biases, rest = own
        assert all(torch.equal(heads[name][f"weights.{i}"], w) for i, w in enumerate(weights))
        assert all(torch.equal(heads[name][f"biases.{i}"], b) for i, b in enumerate(biases))
        inputs = bank.groups[int(bank.group_T[bank.names.index(name)])].inputs
        assert all(torch.equal(heads[name][f"inputs.{key}"], p) for key, p in zip(inputs, rest, strict=True))
    for group in other.groups:
        for p, pad in zip(group.parameters(), group.padding(), strict=True):
            for what in ("exp_avg", "exp_avg_sq"):
                moment = second.state[p][what]
                assert pad is None or not moment[pad.expand_as(moment)].any()
                assert moment.any()
    if case == "ragged":
        wider = HeadBank(few.names, few.num_outputs_T.tolist(), D, keys=keys, hidden=("3x",), forms=None)
        with pytest.raises(UserError, match=r"differs: has hidden layers \[2\] there and \[3\] here"):
            saved.copy_heads(head_stacks(wider))


class Norms(Balancer):
    needs = "norms"

    def weights(self, seen):
        self.seen = seen
        return torch.ones(len(seen.task_A))


class Shared(Rows):
    """Stands for a shared network whose features are parameters."""

    linear_neck, members = None, 1


@pytest.mark.parametrize("layout", ["grid", "pairs"])
@pytest.mark.parametrize("reads", ["left", None])
def test_norms_of_gradients_at_the_features_count_scales_and_columns(layout, reads):
    rng = np.random.default_rng(3)
    tasks = make_tasks(rng)
    features = FEATURES if reads else {"features": (D,)}
    keys, forms = [task.kind.group_key for task in tasks], [HeadForm((4,), reads)] * len(tasks)
    bank = HeadBank(tasks.names, tasks.num_outputs_T.tolist(), features, keys=keys, forms=forms, scale_shift=True)
    with torch.no_grad():
        for group in bank.groups:
            group.inputs["scale"].mul_(torch.rand_like(group.inputs["scale"]) + 0.5)
    batch, model, balancer = make_batch(rng, tasks, layout, rows=8), Shared(8), Norms()
    config = ObjectiveConfig(balancing=BalancingConfig(level="features"))
    stepper = make_stepper(tasks, bank, model, Recorder(model), Recorder(), config=config, balancer=balancer, layout=layout)
    run_step(stepper, rows_as_inputs(batch), 0, totals_of(tasks))
    labels = batch.labels.pairs()
    for t, norm2 in zip(balancer.seen.task_A.tolist(), balancer.seen.norm2_A.tolist(), strict=True):
        only = Batch(batch.x_BF, batch.row_B, labels._only(labels.task_P == t, labels.task_P, len(tasks)))
        _, grad_z, _ = naive(tasks, bank, only, model.z.detach())
        share = len(only.labels.y_P) / len(labels.y_P)
        assert norm2 == pytest.approx(float(grad_z.square().sum()) * share**2, rel=1e-4)


@pytest.mark.parametrize(
    ("case", "layout", "why"),
    [("dependent", "pairs", "task 't(2|5|8|13)' reads the logits of another"), ("gated", "grid", "mixes experts by a gate")],
)
def test_balancers_of_gradients_are_refused_where_taps_are_not_all_paths(case, layout, why):
    tasks = make_tasks(np.random.default_rng(4))
    config = ObjectiveConfig(balancing=BalancingConfig(level="features"))
    with pytest.raises(UserError, match=f"balancer needs the gradient of each task at the features, but .*{why}"):
        make_stepper(tasks, make_bank(case, tasks), Shared(4), None, Recorder(), config, balancer=Norms(), layout=layout)


def test_heads_of_any_form_are_pulled_towards_their_mean():
    rng = np.random.default_rng(5)
    tasks = make_tasks(rng)
    for case in CASES:
        bank = make_bank(case, tasks)
        stepper = make_stepper(tasks, bank, Rows(12), None, HeadAdamW(bank, lr=0.1), toward_shared=50.0)
        for step in range(3):
            run_step(stepper, rows_as_inputs(make_batch(rng, tasks, "pairs", rows=12)), step, totals_of(tasks))
        for group, means in zip(bank.groups, stepper.shared_heads.means, strict=True):
            for stack, mean, pad in zip(group.parameters(), means, group.padding(), strict=True):
                real = torch.ones_like(stack) if pad is None else (~pad).expand_as(stack).to(stack)
                count = real.sum(0)
                torch.testing.assert_close(mean, (stack.detach() * real).sum(0) / count.clamp(min=1), rtol=1e-4, atol=1e-6)
                assert not (stack * (1 - real)).any()

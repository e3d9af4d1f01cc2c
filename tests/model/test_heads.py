"""Head banks against naive loops over separate modules, in float64."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mtrain.errors import UserError
from mtrain.model.dropout import row_keys
from mtrain.model.head_forms import group_by_size
from mtrain.model.head_kernels import PaddedRows, SegmentLinear
from mtrain.model.heads import HeadBank
from mtrain.model.routes import plan_route

SHAPES = [(), (5,), (6, 4)]


def make_bank(outputs=(1, 3, 2, 10, 1, 9, 10), hidden=(5,), **options):
    return HeadBank([f"task{i}" for i in range(len(outputs))], outputs, 4, hidden=hidden, **options).double()


def labels(bank, count, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tasks = torch.randint(len(bank.names), (count,), generator=generator)
    return tasks, torch.randint(rows, (count,), generator=generator)


def grads_of_modules(modules, bank):
    """The modules' gradients as the bank's padded stacks, group by group."""
    result = []
    for group in bank.groups:
        stacks = [torch.zeros_like(p) for p in group.parameters()]
        layers = len(group.weights)
        for local, task in enumerate(group.task_ids.tolist()):
            linears = [m for m in modules[bank.names[task]].modules() if isinstance(m, nn.Linear)]
            for layer, linear in enumerate(linears):
                if linear.weight.grad is not None:
                    stacks[layer][local, : linear.out_features] = linear.weight.grad
                    stacks[layers + layer][local, : linear.out_features] = linear.bias.grad
        result += stacks
    return result


@pytest.mark.parametrize("activation", ["relu", "elu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("hidden", SHAPES)
def test_the_grid_equals_a_loop_over_modules_in_outputs_and_gradients(hidden, activation):
    bank = make_bank(hidden=hidden, activation=activation)
    modules = bank.to_modules()
    z, z_loop = (torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    z.requires_grad_(), z_loop.requires_grad_()
    logits = bank(z)
    targets = torch.randn(6, 7, 10, dtype=torch.float64)
    loss_loop = 0
    for t, name in enumerate(bank.names):
        out = modules[name](z_loop)
        torch.testing.assert_close(logits[:, t, : bank.outputs[t]], out)
        assert not logits[:, t, bank.outputs[t] :].any()
        loss_loop = loss_loop + (out - targets[:, t, : bank.outputs[t]]).square().sum()
    loss_loop.backward()
    (logits - targets).square().sum().backward()  # the padding's own loss must not pass a gradient
    torch.testing.assert_close(z.grad, z_loop.grad)
    for p, expected in zip(bank.parameters(), grads_of_modules(modules, bank), strict=True):
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("hidden", SHAPES)
def test_routed_labels_equal_a_loop_over_modules_in_outputs_and_gradients(hidden):
    bank = make_bank(hidden=hidden)
    modules = bank.to_modules()
    task_P, row_P = labels(bank, 40, 6)
    task_P[:20] = 3  # one task has many labels, some rows several, task 6 none
    task_P[task_P == 6] = 5
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    z_loop = z.detach().clone().requires_grad_()
    targets = torch.randn(40, 10, dtype=torch.float64)
    loss, inputs, parameters = 0, [z], []
    for route in bank.route(task_P, row_P):
        group = bank.groups[route.group]
        params = group.gather(route.active_A)
        logits = group.routed(z, route, params)
        assert torch.equal(route.task_A[route.slot_P], task_P[route.label_P])
        assert torch.equal(route.row_P, row_P[route.label_P])
        for p, (logit, label) in enumerate(zip(logits, route.label_P.tolist(), strict=True)):
            size = bank.outputs[task_P[label]]
            expected = modules[bank.names[task_P[label]]](z[row_P[label]])
            torch.testing.assert_close(logit[:size], expected, msg=f"label {p}")
        loss = loss + (logits - targets[route.label_P, : group.outputs]).square().sum()
        inputs += params
        parameters.append((group, route))
    grads = list(torch.autograd.grad(loss, inputs))
    loss_loop = 0
    for label, (task, row) in enumerate(zip(task_P.tolist(), row_P.tolist(), strict=True)):
        out = modules[bank.names[task]](z_loop[row])
        loss_loop = loss_loop + (out - targets[label, : len(out)]).square().sum()
    loss_loop.backward()
    torch.testing.assert_close(grads.pop(0), z_loop.grad)
    expected = grads_of_modules(modules, bank)
    for group, route in parameters:
        start = sum(len(list(g.parameters())) for g in list(bank.groups)[: route.group])
        for stack in expected[start : start + len(list(group.parameters()))]:
            torch.testing.assert_close(grads.pop(0), stack[route.active_A])
    assert not grads


def test_the_plain_module_routes_each_row_to_its_task_with_ordinary_gradients():
    bank = make_bank()
    task_B = torch.tensor([3, 0, 3, 6, 1, 0])
    z = torch.randn(6, 4, dtype=torch.float64)
    all_logits = bank(z)
    torch.testing.assert_close(bank(z, task_B), all_logits[torch.arange(6), task_B])
    bank(z, task_B).square().sum().backward()
    routed = [torch.zeros_like(p) if p.grad is None else p.grad for p in bank.parameters()]
    bank.zero_grad()
    bank(z)[torch.arange(6), task_B].square().sum().backward()
    for p, grad in zip(bank.parameters(), routed, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_the_grid_of_some_active_heads_is_those_columns_of_the_whole_grid():
    bank = make_bank(dropout=0.4)
    z, keys = torch.randn(6, 4, dtype=torch.float64), row_keys(0, 0, torch.arange(6))
    for group in bank.groups:
        active = torch.arange(len(group.names))[1:]
        part = group.grid(z, group.gather(active), keys, active)
        torch.testing.assert_close(part, group.grid(z, None, keys)[:, active])


@pytest.mark.parametrize("task", [None, torch.empty(0, dtype=torch.int64)])
def test_zero_rows_give_zero_logits_that_can_be_differentiated(task):
    bank = make_bank()
    z = torch.randn(0, 4, dtype=torch.float64, requires_grad=True)
    logits = bank(z, task)
    assert logits.shape == ((0, 7, 10) if task is None else (0, 10))
    logits.sum().backward()
    assert z.grad.shape == (0, 4)
    assert bank.route(torch.empty(0, dtype=torch.int64)) == []


def test_the_segment_product_and_its_gather_pass_gradcheck():
    task_P, row_P = torch.tensor([2, 0, 2, 1, 2, 2, 2]), torch.tensor([0, 1, 2, 3, 3, 0, 1])
    route = plan_route(0, task_P, row_P, torch.arange(7), torch.arange(3), smallest=1)
    assert len(route.segments) == 2
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def kernel(z, weight, bias):
        return SegmentLinear.apply(PaddedRows.apply(z, route), weight, bias, route.segments)[route.place_P]

    torch.autograd.gradcheck(kernel, (z, weight, bias))


def test_a_row_of_nans_reaches_its_own_task_only():
    bank = make_bank(outputs=[2] * 4)
    task_B = torch.tensor([0, 1, 1, 1, 2, 3])
    z = torch.randn(6, 4, dtype=torch.float64)
    z[0] = torch.nan
    (route,) = bank.route(task_B)
    params = bank.groups[0].gather(route.active_A)
    for grad in torch.autograd.grad(bank.groups[0].routed(z, route, params)[1:].sum(), params):
        assert grad[1:].isfinite().all()


def test_heads_start_within_the_bound_of_a_linear_layer():
    bank = HeadBank([f"t{i}" for i in range(200)], [4] * 200, 16, hidden=(8,))
    for weight, bias in zip(bank.groups[0].weights, bank.groups[0].biases, strict=True):
        bound = 1 / math.sqrt(weight.shape[2])
        for stack in (weight, bias):
            assert 0.98 * bound < stack.abs().max() <= bound
            assert abs(stack.mean()) < 0.05 * bound
            assert abs(stack.std() / (bound / math.sqrt(3)) - 1) < 0.05


def test_a_head_starts_the_same_whatever_the_order_the_groups_and_the_other_tasks():
    names, outputs = [f"t{i}" for i in range(12)], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10]
    modules = HeadBank(names, outputs, 4, hidden=(5,), seed=3).to_modules()
    alone = HeadBank(["t4"], [5], 4, hidden=(5,), seed=3).to_modules()
    turned = HeadBank(names[::-1], outputs[::-1], 4, hidden=(5,), seed=3, keys=["a", "b"] * 6).to_modules()
    other_seed = HeadBank(["t4"], [5], 4, hidden=(5,), seed=4).to_modules()
    for name in names:
        for p, q in zip(modules[name].parameters(), turned[name].parameters(), strict=True):
            assert torch.equal(p, q)
    for p, q, r in zip(*(m["t4"].parameters() for m in (modules, alone, other_seed)), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, r)


@settings(deadline=None)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=60))
def test_groups_hold_every_task_once_waste_at_most_30_percent_and_are_few(sizes):
    groups = group_by_size(sizes)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    assert len(groups) <= 1 + math.log(max(sizes)) / math.log(1 / 0.7)
    for group in groups:
        assert group == sorted(group)
        largest = max(sizes[i] for i in group)
        assert sum(largest - sizes[i] for i in group) <= 0.3 * largest * len(group) + 1e-9


def test_tasks_of_different_keys_share_no_group():
    bank = HeadBank(["a", "b", "c", "d"], [1, 1, 1, 1], 3, keys=["binary", "regression", "binary", "regression"])
    assert [group.names for group in bank.groups] == [["a", "c"], ["b", "d"]]
    assert [group.task_ids.tolist() for group in bank.groups] == [[0, 2], [1, 3]]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=300), st.integers(1, 8))
def test_a_route_pads_a_segment_to_less_than_twice_its_shortest_head_above_the_smallest_size(tasks, smallest):
    task_P = torch.tensor(tasks)
    route = plan_route(0, task_P, torch.arange(len(tasks)), torch.arange(len(tasks)), torch.arange(10), smallest)
    assert torch.equal(route.padded_row_N[route.place_P], route.row_P)
    assert torch.equal(task_P[route.padded_row_N], route.padded_head_N)  # padding repeats a row of the same head
    for s in route.segments:
        counts = torch.bincount(route.slot_P)[s.heads]
        assert counts.max() == s.size <= max(smallest, 2 * counts.min() - 1)


def test_skewed_counts_pad_little():
    task_P = torch.cat([torch.zeros(1000, dtype=torch.int64), torch.arange(1, 501)])
    (route,) = HeadBank([f"t{i}" for i in range(501)], [1] * 501, 4).route(task_P)
    assert len(route.padded_row_N) == 1500


@pytest.mark.parametrize("hidden", [(5,), (6, 4)])
def test_dropout_masks_are_equal_between_grid_and_routed_and_differ_between_tasks(hidden):
    bank = make_bank(outputs=[2] * 7, hidden=hidden, dropout=0.5)
    group, z = bank.groups[0], torch.randn(6, 4, dtype=torch.float64)
    keys = row_keys(0, 5, torch.arange(100, 106))
    task_P, row_P = torch.arange(7).repeat(6), torch.arange(6).repeat_interleave(7)
    (route,) = bank.route(task_P, row_P)
    grid = group.grid(z, None, keys)
    torch.testing.assert_close(group.routed(z, route, None, keys), grid[route.row_P, route.task_A[route.slot_P]])
    assert not torch.allclose(grid, group.grid(z, None, row_keys(0, 6, torch.arange(100, 106))))
    one = make_bank(outputs=[2], hidden=hidden, dropout=0.5)  # task0 alone draws task0's masks
    torch.testing.assert_close(one.groups[0].grid(z, None, keys)[:, 0], grid[:, 0])
    bank.eval()
    torch.testing.assert_close(group.grid(z, None, keys), group.grid(z))


def test_dropout_masks_depend_on_the_row_and_not_on_the_batch():
    bank = make_bank(dropout=0.5)
    z, rows = torch.randn(6, 4, dtype=torch.float64), torch.arange(6)
    whole = bank(z, None, row_keys(1, 2, rows))
    torch.testing.assert_close(bank(z[[4, 1]], None, row_keys(1, 2, rows[[4, 1]])), whole[[4, 1]])


def test_unkeyed_dropout_is_drawn_in_training_only():
    bank = make_bank(dropout=0.5)
    z = torch.randn(6, 4, dtype=torch.float64)
    assert not torch.allclose(bank(z), bank(z))
    assert not torch.allclose(bank(z, torch.zeros(6, dtype=torch.int64)), bank(z, torch.zeros(6, dtype=torch.int64)))
    bank.eval()
    torch.testing.assert_close(bank(z), bank(z))


@pytest.mark.parametrize("hidden", SHAPES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_conversion_to_modules_and_back_keeps_weights_names_and_options(hidden, dropout):
    bank = make_bank(hidden=hidden, dropout=dropout, activation="silu").eval()
    back = HeadBank.from_modules(bank.to_modules()).eval()
    assert (back.names, back.outputs, back.hidden) == (bank.names, bank.outputs, bank.hidden)
    if hidden:
        assert (back.activation, back.dropout) == (bank.activation, bank.dropout)
    z = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(back(z), bank(z))
    for p, q in zip(bank.parameters(), back.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_module_list_converts_by_position():
    heads = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, o)) for o in (2, 1, 7)])
    bank, z = HeadBank.from_modules(heads), torch.randn(3, 4)
    assert bank.names == ["0", "1", "2"]
    for t, head in enumerate(heads):
        torch.testing.assert_close(bank(z)[:, t, : bank.outputs[t]], head(z))


@pytest.mark.parametrize(
    "second",
    [
        nn.Linear(5, 1),
        nn.Linear(4, 1, bias=False),
        nn.Conv1d(4, 1, 1),
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)),
        nn.Sequential(nn.Linear(4, 1), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 1), nn.Sigmoid(), nn.Linear(1, 1)),
        nn.Sequential(nn.Linear(4, 3), nn.GELU("tanh"), nn.Linear(3, 1)),
        nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(2, 1)),
        nn.Sequential(),
    ],
)
def test_a_head_that_does_not_fit_is_named(second):
    with pytest.raises(UserError, match="head 'bad'"):
        HeadBank.from_modules(nn.ModuleDict({"good": nn.Linear(4, 1), "bad": second}))


def test_a_name_that_a_module_dict_cannot_hold_is_named():
    with pytest.raises(UserError, match=r"task 'a\.b'"):
        HeadBank(["a.b"], [1], 3).to_modules()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["a", "a"]}, "'a' is named twice"),
        ({"outputs": [1, 0]}, "task 'b' has 0 outputs"),
        ({"outputs": [1]}, "2 names, 1 numbers of outputs"),
        ({"activation": "relo"}, "did you mean 'relu'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_impossible_banks_are_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message):
        HeadBank(**{"names": ["a", "b"], "outputs": [1, 1], "in_features": 3, **options})


def test_a_bank_can_be_copied_pickled_and_loaded():
    bank = make_bank(dropout=0.1)
    z = torch.randn(3, 4, dtype=torch.float64)
    for other in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        torch.testing.assert_close(other.eval()(z), bank.eval()(z))
    fresh = make_bank(dropout=0.1, seed=1).eval()
    fresh.load_state_dict(bank.state_dict())
    torch.testing.assert_close(fresh(z), bank.eval()(z))


def test_autocast_runs_both_kernels_in_its_precision():
    bank = make_bank().float()
    z, task_B = torch.randn(6, 4), torch.arange(6)
    exact = bank(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grid, routed = bank(z), bank(z, task_B)
    assert grid.dtype == routed.dtype == torch.bfloat16
    torch.testing.assert_close(grid.float(), exact, atol=0.05, rtol=0.05)
    torch.testing.assert_close(routed.float(), exact[torch.arange(6), task_B], atol=0.05, rtol=0.05)
    (grid.float().sum() + routed.float().sum()).backward()
    assert all(p.grad.dtype == torch.float32 for p in bank.parameters())


def test_heads_of_tasks_with_equal_names_and_shapes_are_copied_from_another_bank():
    mine = HeadBank(["a", "b", "c", "d"], [1, 3, 2, 1], 4, hidden=(5,), seed=0)
    other = HeadBank(["d", "x", "b", "c"], [1, 1, 3, 4], 4, hidden=(5,), seed=1)
    before = mine.to_modules()
    assert mine.copy_heads(other) == ["b", "d"]
    theirs = other.to_modules()
    for name, head in mine.to_modules().items():
        expected = theirs[name] if name in "bd" else before[name]
        for p, q in zip(head.parameters(), expected.parameters(), strict=True):
            assert torch.equal(p, q)
    assert mine.copy_heads(other, {"d", "c"}) == ["d"]
    assert mine.copy_heads(HeadBank(["a"], [1], 4, hidden=(5, 5))) == []
    assert mine.copy_heads(HeadBank(["a"], [1], 3, hidden=(5,))) == []

"""Heads that read features by name, mix experts, scale and shift, read other heads, or are as wide as their outputs, against
loops over tasks in float64."""

import pytest
import torch
from torch import nn

from mtrain.errors import UserError
from mtrain.model.dropout import row_keys
from mtrain.model.head_forms import Gate, HeadForm, plan_groups
from mtrain.model.heads import HeadBank
from mtrain.train.optim import HeadAdamW, HeadUpdate

FEATURES = {"left": (4,), "experts": (3, 5), "by": (2,)}
OUTPUTS = [2, 1, 3, 2, 1, 2]
ROWS = 7


def columns(z, features, name):
    start = 0
    for key, shape in features.items():
        stop = start + torch.Size(shape).numel()
        if key == name:
            return z[:, start:stop].unflatten(1, shape)
        start = stop
    raise KeyError(name)


class Heads:
    """One head after the other, with leaf copies of a bank's parameters."""

    def __init__(self, bank, features, gate=None, activation=torch.relu):
        self.bank, self.features, self.gate, self.activation = bank, features, gate, activation
        self.params = [[[p.detach().clone().requires_grad_() for p in part] for part in own] for own in bank._heads()]

    def __call__(self, task, z, depth=0):
        form, (weights, biases, rest) = self.bank.forms[task], self.params[task]
        rest = dict(zip(self.bank.groups[int(self.bank.group_T[task])].inputs, rest, strict=True))
        gated = self.gate is not None and form.reads in (None, self.gate.experts)
        name = self.gate.experts if gated else form.reads or next(iter(self.features))
        x = columns(z, self.features, name)
        if gated:
            by = columns(z, self.features, self.gate.by).flatten(1)
            logits = by @ rest["gate_weight"].T + rest["gate_bias"]
            closed = [e for e in range(logits.shape[1]) if form.experts is not None and e not in form.experts]
            logits[:, closed] = -torch.inf
            gates = logits.softmax(1)
            x = sum(gates[:, e, None] * x[:, e] for e in range(x.shape[1]))
        x = x.flatten(1)
        if "scale" in rest:
            x = x * rest["scale"] + rest["shift"]
        x = torch.cat([x, *(self(parent, z) for parent in form.parents)], 1)
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            x = (self.activation(x) if layer else x) @ weight.T + bias
        return x


def disturbed(bank):
    """With values that are nowhere at their start, but where they are padding."""
    with torch.no_grad():
        for group in bank.groups:
            for p, pad in zip(group.parameters(), group.padding(), strict=True):
                p.add_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(3)).mul_(0.3))
                if pad is not None:
                    p.masked_fill_(pad, 0)
    return bank


def check_both_kernels(bank, heads, width):
    """Logits and all gradients of the grid, and of labels in pairs, equal those of the loop."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(ROWS, width, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.randn(ROWS, len(bank.names), max(bank.outputs), dtype=torch.float64, generator=generator)
    leaves = [p for own in heads.params for part in own for p in part]

    def expected(labels):
        loss = sum((heads(t, z[r : r + 1])[0] - target[r, t, : bank.outputs[t]]).square().sum() for r, t in labels)
        return loss, torch.autograd.grad(loss, [z, *leaves], allow_unused=True)

    def check(loss, labels):
        wanted, grads = expected(labels)
        torch.testing.assert_close(loss, wanted)
        bank.zero_grad()
        z.grad = None
        loss.backward()
        torch.testing.assert_close(z.grad, grads[0])
        rest = iter(grads[1:])
        for own, copies in zip(own_gradients(bank), heads.params, strict=True):
            for part, of_part in zip(own, copies, strict=True):
                for grad in part:
                    theirs = next(rest)
                    torch.testing.assert_close(grad, torch.zeros_like(grad) if theirs is None else theirs)
                assert len(part) == len(of_part)

    real = torch.arange(max(bank.outputs)) < torch.tensor(bank.outputs)[:, None]
    logits = bank(z)
    assert not logits[:, ~real].any()
    check(((logits - target) * real).square().sum(), [(r, t) for r in range(ROWS) for t in range(len(bank.names))])
    task_B = torch.tensor([0, 4, 2, 2, 3, 5, 4])
    picked = target[torch.arange(ROWS), task_B] * real[task_B]
    check((bank(z, task_B) - picked).square().sum(), list(enumerate(task_B.tolist())))


def own_gradients(bank):
    """The bank's gradients as its heads, without padding; what is padding has none."""
    values = [p.detach().clone() for p in bank.parameters()]
    with torch.no_grad():
        for p in bank.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    found = [[[p.clone() for p in part] for part in own] for own in bank._heads()]
    for group in bank.groups:
        for p, pad in zip(group.parameters(), group.padding(), strict=True):
            assert pad is None or not p[pad.expand_as(p)].any()
    with torch.no_grad():
        for p, value in zip(bank.parameters(), values, strict=True):
            p.copy_(value)
    return found


def make_bank(forms, features=FEATURES, outputs=OUTPUTS, **options):
    names = [f"task{t}" for t in range(len(outputs))]
    return disturbed(HeadBank(names, outputs, features, forms=forms, **options).double())


@pytest.mark.parametrize("hidden", [(), (5,)])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_heads_read_the_feature_they_name(hidden, scale_shift):
    reads = ["left", "by", "experts", "left", "by", "experts"]
    bank = make_bank([HeadForm(hidden, name) for name in reads], scale_shift=scale_shift)
    assert [group.source.width for group in bank.groups] == [4, 2, 15]
    check_both_kernels(bank, Heads(bank, FEATURES), 21)


@pytest.mark.parametrize("hidden", [(), (4,)])  # products of experts with the layer, and mixtures
@pytest.mark.parametrize("scale_shift", [False, True])
def test_gates_mix_the_experts_that_a_task_may_read(hidden, scale_shift):
    gate = Gate("experts", "by")
    forms = [HeadForm(hidden, experts=(0, 2)), HeadForm(hidden, "left"), HeadForm(hidden), HeadForm(hidden, experts=(1,))]
    features = FEATURES | {"experts": (3, 9)}
    bank = make_bank([*forms, HeadForm(hidden), HeadForm(hidden, "by")], features, gate=gate, scale_shift=scale_shift)
    assert "gate_weight" not in bank.groups[int(bank.group_T[1])].inputs
    check_both_kernels(bank, Heads(bank, features, gate), 4 + 27 + 2)


@pytest.mark.parametrize("hidden", [(), (4,)])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_heads_read_the_logits_of_their_parents(hidden, scale_shift):
    """A chain of three, two parents at once, and a parent that reads another feature."""
    parents = [(), (0,), (1, 5), (0,), (), ()]
    forms = [HeadForm(hidden, "by" if t == 5 else "left", of_one) for t, of_one in enumerate(parents)]
    bank = make_bank(forms, scale_shift=scale_shift, keys=list("abbaab"))
    check_both_kernels(bank, Heads(bank, FEATURES), 21)
    half = make_bank(forms, scale_shift=scale_shift, keys=list("abbaab"), here=[0, 1, 2, 3, 5])
    z = torch.randn(3, 21, dtype=torch.float64)
    torch.testing.assert_close(half(z)[:, 2].shape, bank(z)[:, 2].shape)


def test_a_gated_head_reads_a_parent_too():
    gate = Gate("experts", "experts")
    bank = make_bank([HeadForm((3,), parents=(5,) if t < 3 else ()) for t in range(6)], gate=gate, scale_shift=True)
    check_both_kernels(bank, Heads(bank, FEATURES, gate), 21)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_hidden_layers_as_wide_as_a_multiple_of_the_outputs(dropout):
    outputs = [1, 2, 3, 10, 12, 11]
    forms = [HeadForm(("2x", 3, "1x"))] * 6
    bank = make_bank(forms, {"z": (4,)}, outputs, activation="silu", dropout=dropout)
    assert [group.names for group in bank.groups] == [["task2", "task3", "task4", "task5"], ["task0", "task1"]]
    assert [[tuple(w.shape) for w in own[0]] for own in bank._heads()][3] == [(20, 4), (3, 20), (10, 3), (10, 10)]
    modules = bank.to_modules()
    assert [m.out_features for m in modules["task4"].modules() if isinstance(m, nn.Linear)] == [24, 3, 12, 12]
    back = HeadBank.from_modules(modules)
    assert back.hidden == ("2x", 3, "1x")
    z = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(back.eval()(z), bank.eval()(z))
    alone = disturbed(HeadBank(["task4"], [12], {"z": (4,)}, forms=forms[:1], activation="silu", dropout=dropout).double())
    alone.copy_heads(bank)
    keys = row_keys(0, 0, torch.arange(5))  # padding does not change the masks of dropout
    torch.testing.assert_close(alone.train()(z, None, keys)[:, 0], bank.train()(z, None, keys)[:, 4])
    if not dropout:
        check_both_kernels(bank, Heads(bank, {"z": (4,)}, activation=nn.functional.silu), 4)


def test_ragged_heads_start_as_if_they_were_alone_and_padding_stays_zero():
    names, outputs = ["a", "b", "c"], [8, 7, 6]
    bank = HeadBank(names, outputs, 4, hidden=("2x",), seed=5)
    assert len(bank.groups) == 1
    for name, size, own in zip(names, outputs, bank._heads(), strict=True):
        alone = next(HeadBank([name], [size], 4, hidden=(2 * size,), seed=5)._heads())
        assert all(torch.equal(p, q) for part, other in zip(own, alone, strict=True) for p, q in zip(part, other, strict=True))
        assert 0.5 * (2 * size) ** -0.5 < float(own[0][1].detach().abs().max()) <= (2 * size) ** -0.5
    optimizer, z = HeadAdamW(bank, lr=0.1), torch.randn(9, 4)
    for _ in range(3):
        bank(z).square().sum().backward()
        optimizer.step([HeadUpdate(0, [p.grad for p in bank.groups[0].parameters()])])
        bank.zero_grad()
    for p, pad in zip(bank.groups[0].parameters(), bank.groups[0].padding(), strict=True):
        assert p[pad.expand_as(p)].numel()
        assert not p[pad.expand_as(p)].any()


def test_scales_start_at_one_and_gates_as_a_linear_layer():
    bank = HeadBank(["a", "b"], [1, 1], {"e": (3, 4)}, gate=Gate("e", "e"), scale_shift=True, seed=1)
    inputs = bank.groups[0].inputs
    assert (inputs["scale"] == 1).all()
    assert not inputs["shift"].any()
    assert 0.8 * 12**-0.5 < float(inputs["gate_weight"].detach().abs().max()) <= 12**-0.5
    alone = HeadBank(["b"], [1], {"e": (3, 4)}, gate=Gate("e", "e"), scale_shift=True, seed=1)
    assert torch.equal(alone.groups[0].inputs["gate_weight"][0], inputs["gate_weight"][1])


def test_the_heads_of_some_tasks_are_those_of_all():
    forms = [HeadForm(("2x",), parents=(2,) if t in (0, 3) else ()) for t in range(5)]
    options = {"forms": forms, "keys": list("xyxyx"), "scale_shift": True}
    whole = HeadBank(list("abcde"), [1, 2, 3, 2, 1], 4, **options)
    part = HeadBank(list("abcde"), [1, 2, 3, 2, 1], 4, here=[0, 2, 3], **options)
    z = torch.randn(6, 4)
    torch.testing.assert_close(part(z), whole(z)[:, [0, 2, 3]])
    task_B = torch.tensor([0, 1, 2, 2, 1, 0])
    torch.testing.assert_close(part(z, task_B), whole(z, torch.tensor([0, 2, 3])[task_B]))


@pytest.mark.parametrize(
    ("forms", "gate", "message"),
    [
        ([HeadForm(reads="lft"), HeadForm(reads="left")], None, "task 'a' reads feature 'lft'.*did you mean 'left'"),
        ([HeadForm(reads="left"), HeadForm()], None, "task 'b' does not say which feature it reads.*left, experts, by"),
        ([HeadForm()] * 2, Gate("experts", "bi"), "model.head.gate.by: the trunk gives no feature 'bi'; did you mean 'by'"),
        ([HeadForm()] * 2, Gate("left", "by"), r"model.head.gate.experts: 'left' is \[4\] for a row, expected \[E, D\]"),
        ([HeadForm(reads="experts", experts=(0,))] * 2, None, "task 'a' chooses .* no gate; set model.head.gate"),
        (
            [HeadForm(reads="by", experts=(0,)), HeadForm()],
            Gate("experts", "by"),
            "task 'a' chooses from experts, but reads the feature 'by'; let it read experts, or leave experts out",
        ),
        (
            [HeadForm(reads="", parents=(1,), experts=(0,)), HeadForm()],
            Gate("experts", "by"),
            "task 'a' chooses from experts, but reads other tasks alone; let it read experts",
        ),
        ([HeadForm(), HeadForm(experts=(0, 3))], Gate("experts", "by"), r"task 'b' .* \[0, 3\], expected numbers from 0 to 2"),
        ([HeadForm(reads="by", parents=(1,)), HeadForm(reads="by", parents=(0,))], None, "'a' reads 'b' reads 'a'"),
        ([HeadForm(reads="by", parents=(0,)), HeadForm(reads="by")], None, "'a' reads 'a': a head cannot"),
    ],
)
def test_forms_that_cannot_be_are_refused_in_one_line(forms, gate, message):
    with pytest.raises(UserError, match=message):
        HeadBank(["a", "b"], [1, 1], FEATURES, forms=forms, gate=gate)


def test_parameters_of_a_head_are_counted():
    gate, forms = Gate("experts", "by"), [HeadForm(("2x",), experts=(0,)), HeadForm((3,), "left", (0,))]
    bank = HeadBank(["a", "b"], [2, 1], FEATURES, forms=forms, gate=gate, scale_shift=True)
    for plan in plan_groups(bank.names, bank.outputs, forms, [None, None], FEATURES, gate):
        (i,) = plan.ids
        own = list(bank._heads())[i]
        assert plan.source.num_params(plan.widths, True) == sum(p.numel() for part in own for p in part)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"scale_shift": True}, "a scale and shift"),
        ({"gate": Gate("e", "e")}, "a gate"),
        ({"forms": [HeadForm(parents=(1,)), HeadForm()]}, "parents"),
    ],
)
def test_heads_that_are_more_than_layers_do_not_become_modules(options, what):
    with pytest.raises(UserError, match=f"the head of task '[ab]' has {what}"):
        HeadBank(["a", "b"], [1, 1], {"e": (2, 3)}, **options).to_modules()

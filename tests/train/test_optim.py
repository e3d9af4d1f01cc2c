"""HeadAdamW against one torch.optim.AdamW for each head, in float64."""

import copy

import pytest
import torch
from torch import nn

from mtrain.model.heads import HeadBank
from mtrain.train import optim
from mtrain.train.optim import HeadAdamW, HeadUpdate

OUTPUTS = [1, 3, 2, 10, 1, 9, 10, 3]
OPTIONS = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1}


def make_bank():
    return HeadBank([f"t{i}" for i in range(len(OUTPUTS))], OUTPUTS, 4, hidden=(5,)).double()


def assert_equal_heads(bank, modules):
    for name, head in bank.to_modules().items():
        for p, q in zip(head.parameters(), modules[name].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def step_routed(bank, optimizer, z, task_B, target_B):
    updates, loss, params = [], 0, []
    for route in bank.route(task_B):
        group = bank.groups[route.group]
        stacks = group.gather(route.active_A)
        loss = loss + (group.routed(z, route, stacks)[:, 0] - target_B[route.label_P]).square().sum()
        params.append((route, stacks))
    for route, stacks in params:
        updates.append(HeadUpdate(route.group, torch.autograd.grad(loss, stacks, retain_graph=True), route.active_A))
    optimizer.step(updates)


@pytest.fixture(params=[1, 1024], ids=["fused slices", "rows"], autouse=True)
def large_head(request, monkeypatch):
    """Every test runs with each head's slice given to the fused kernel, and with all heads updated by rows."""
    monkeypatch.setattr(optim, "LARGE_HEAD", request.param)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_twenty_steps_with_random_absences_equal_an_optimizer_for_each_head(max_norm):
    torch.manual_seed(0)
    bank = make_bank()
    modules = bank.to_modules()
    optimizers = {name: torch.optim.AdamW(head.parameters(), **OPTIONS) for name, head in modules.items()}
    optimizer = HeadAdamW(bank, **OPTIONS, max_norm=max_norm)
    for step in range(20):
        lr = 0.05 / (1 + step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        active = torch.randperm(8)[: 1 + step % 8]
        task_B = active[torch.randint(len(active), (12,))]
        z, target_B = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
        step_routed(bank, optimizer, z, task_B, target_B)
        for t in task_B.unique().tolist():
            head, own = modules[f"t{t}"], optimizers[f"t{t}"]
            own.param_groups[0]["lr"] = lr
            own.zero_grad()
            rows = task_B == t
            (head(z[rows])[:, 0] - target_B[rows]).square().sum().backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(head.parameters(), max_norm)
            own.step()
        assert_equal_heads(bank, modules)


def test_a_plain_step_moves_all_heads_as_their_own_optimizers_do_before_and_after_absences():
    torch.manual_seed(0)
    bank = make_bank()
    modules = bank.to_modules()
    own = {name: torch.optim.AdamW(head.parameters(), **OPTIONS) for name, head in modules.items()}
    optimizer = HeadAdamW(bank, **OPTIONS)
    for step in range(9):
        z = torch.randn(6, 4, dtype=torch.float64)
        active = range(8) if step != 4 else [0, 3]
        if step == 4:
            step_routed(bank, optimizer, z[:2], torch.tensor([0, 3]), torch.zeros(2, dtype=torch.float64))
        else:
            optimizer.zero_grad()
            bank(z).square().sum().backward()
            optimizer.step()
        for t in active:
            own[f"t{t}"].zero_grad()
            out = modules[f"t{t}"](z if step != 4 else z[[0 if t == 0 else 1]])
            (out if step != 4 else out[:, 0]).square().sum().backward()
            own[f"t{t}"].step()
        assert_equal_heads(bank, modules)


def test_absent_heads_and_padding_do_not_move_at_all():
    bank = make_bank()
    optimizer = HeadAdamW(bank, weight_decay=0.5)
    for _ in range(2):
        bank(torch.randn(4, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    before = copy.deepcopy(bank.to_modules())
    step_routed(bank, optimizer, torch.randn(1, 4).double(), torch.tensor([2]), torch.zeros(1).double())
    for name, head in bank.to_modules().items():
        for p, q in zip(head.parameters(), before[name].parameters(), strict=True):
            assert torch.equal(p, q) == (name != "t2")
    for group in bank.groups:
        if group.pad_TO is not None:
            assert not group.weights[-1][group.pad_TO].any()
            assert not group.biases[-1][group.pad_TO].any()
    counts = {int(s["step"][i]) for s in optimizer.state.values() for i in range(len(s["step"]))}
    assert counts == {2, 3}


def test_a_loaded_optimizer_continues_as_the_saved_one():
    torch.manual_seed(0)
    bank = make_bank()
    optimizer = HeadAdamW(bank, **OPTIONS)
    data = [(torch.randn(4, 4).double(), torch.randint(8, (4,)), torch.randn(4).double()) for _ in range(6)]
    for z, task, target in data[:3]:
        step_routed(bank, optimizer, z, task, target)
    other = make_bank()
    other.load_state_dict(bank.state_dict())
    loaded = HeadAdamW(other, lr=1.0)
    step_routed(other, loaded, *data[0])  # the loaded state replaces stacks that were already in use
    other.load_state_dict(bank.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for z, task, target in data[3:]:
        step_routed(bank, optimizer, z, task, target)
        step_routed(other, loaded, z, task, target)
    assert_equal_heads(other, bank.to_modules())


def test_a_scheduler_moves_the_learning_rate_of_every_group():
    bank = make_bank()
    optimizer = HeadAdamW(bank, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    optimizer.step([])
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1] * len(bank.groups))


def test_dense_gradients_move_the_active_heads_only_whatever_the_others_hold():
    torch.manual_seed(0)
    bank, twin = make_bank(), make_bank()
    twin.load_state_dict(bank.state_dict())
    dense, rows = HeadAdamW(bank, **OPTIONS), HeadAdamW(twin, **OPTIONS)
    for share in (0.9, 0.9, 0.3, 0.9, 0.6, 1.0, 0.95):
        updates = [[], []]
        for number, group in enumerate(bank.groups):
            active_A = (torch.rand(len(group.names)) < share).nonzero().squeeze(1)
            grads = [torch.randn_like(p) for p in group.parameters()]
            updates[1].append(HeadUpdate(number, [grad[active_A] for grad in grads], active_A))
            absent = torch.ones(len(group.names), dtype=torch.bool).index_fill_(0, active_A, False)
            for grad in grads:
                grad[absent] = torch.nan
            updates[0].append(HeadUpdate(number, grads, active_A, dense=True))
        dense.step(updates[0])
        rows.step(updates[1])
        for mine, theirs in zip(bank.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_an_update_without_active_heads_changes_nothing():
    bank = make_bank()
    optimizer = HeadAdamW(bank, max_norm=1.0)
    before = [p.clone() for p in bank.parameters()]
    none = torch.empty(0, dtype=torch.int64)
    optimizer.step([HeadUpdate(0, [p[:0] for p in bank.groups[0].parameters()], none)])
    optimizer.step()  # no parameter has a .grad
    assert all(torch.equal(p, q) for p, q in zip(bank.parameters(), before, strict=True))

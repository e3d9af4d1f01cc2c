import pytest
import torch
import torchjd.scalarization as peer
from shown import begun, shown

from mtrain.balance.uncertainty import Uncertainty


def draws(steps, num_tasks):
    return torch.exp(torch.randn(steps, num_tasks, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_regression_form_takes_the_steps_of_torchs_optimizer_on_torchjds_objective(optimizer):
    theirs = peer.UW(5)
    torchs = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer](theirs.parameters(), lr=0.05)
    balancer = begun(Uncertainty(lr=0.05, optimizer=optimizer), 5)
    for loss_T in draws(50, 5):
        expected = torch.exp(-theirs.log_var.detach()) / 2  # those from before this step's update
        torch.testing.assert_close(balancer.weights(shown(loss_T)), expected, rtol=1e-5, atol=1e-6)
        torchs.zero_grad()
        theirs(loss_T).backward()
        torchs.step()


def test_the_classification_form_takes_the_steps_of_autograd_on_its_objective():
    s_T = torch.full((4,), 0.3, requires_grad=True)
    torchs = torch.optim.Adam([s_T], lr=0.05)
    balancer = begun(Uncertainty(initial=0.3, lr=0.05), 4, regression=False)
    for loss_T in draws(50, 4):
        torch.testing.assert_close(balancer.weights(shown(loss_T)), torch.exp(-s_T.detach()), rtol=1e-5, atol=1e-6)
        torchs.zero_grad()
        (torch.exp(-s_T) * loss_T + s_T / 2).sum().backward()
        torchs.step()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("share", [[1.0, 1.0, 1.0, 1.0], [0.1, 0.2, 0.3, 0.4]])
def test_s_rests_at_half_the_inverse_loss_with_either_share_dial(optimizer, share):
    regression = torch.tensor([True, True, False, False])
    balancer = begun(Uncertainty(lr=0.1, optimizer=optimizer), 4, regression=regression, share=share)
    loss_T = torch.tensor([0.01, 5.0, 0.7, 30.0])
    for _ in range(1000):
        weight_T = balancer.weights(shown(loss_T))
    torch.testing.assert_close(weight_T, 1 / (2 * loss_T), rtol=1e-2, atol=0)


def test_a_task_rests_at_its_own_point_however_rarely_it_is_there():
    balancer = begun(Uncertainty(lr=0.05), 3)
    for step in range(2500):
        seen = shown([0.1, 3.0], [0, 1]) if step % 10 else shown([0.1, 3.0, 8.0])
        weight_A = balancer.weights(seen)
        if step % 10 == 0:
            last = weight_A
    torch.testing.assert_close(last, 1 / (2 * torch.tensor([0.1, 3.0, 8.0])), rtol=1e-2, atol=0)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_absent_tasks_do_not_drift(optimizer):
    balancer = begun(Uncertainty(optimizer=optimizer), 4)
    for loss_T in draws(10, 4):
        balancer.weights(shown(loss_T))
    before = {name: value[[1, 3]].clone() for name, value in balancer.state_dict().items()}
    for loss_T in draws(100, 4):
        balancer.weights(shown(loss_T[[0, 2]], [0, 2]))
    assert all(torch.equal(value[[1, 3]], before[name]) for name, value in balancer.state_dict().items())
    assert len(before) == 4


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_one_huge_loss_is_forgotten(optimizer):
    balancer = begun(Uncertainty(lr=0.05, optimizer=optimizer), 2)
    for step in range(1500):
        weight_T = balancer.weights(shown([1e15 if step == 300 else 1.0, 1.0]))
    torch.testing.assert_close(weight_T, torch.tensor([0.5, 0.5]), rtol=2e-2, atol=0)

import copy
import time

import pytest
import torch
import torchjd.scalarization as peer
from shown import begun, facts, shown

from mtrain.balance.dwa import DWA
from mtrain.balance.ema import EMA
from mtrain.balance.equal import Equal
from mtrain.balance.famo import FAMO
from mtrain.balance.geometric import Geometric
from mtrain.balance.gradnorm import GradNorm
from mtrain.balance.imtl_l import IMTLL
from mtrain.balance.rlw import RLW
from mtrain.balance.static import Static
from mtrain.balance.stch import STCH
from mtrain.balance.uncertainty import Uncertainty
from mtrain.balance.uncertainty_softmax import UncertaintySoftmax
from mtrain.errors import UserError


def draws(steps, num_tasks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(torch.randn(steps, num_tasks, generator=generator))


def peers_weights(scalarizer, loss_T):
    leaf = loss_T.clone().requires_grad_()
    scalarizer(leaf).backward()
    return leaf.grad


def test_equal_gives_one():
    assert begun(Equal(), 5).weights(shown([1.0, 2.0], [1, 4])).tolist() == [1.0, 1.0]


def test_static_takes_a_name_before_patterns_and_the_first_pattern_that_matches():
    given = {"task1?": 3.0, "task1": 0.5, "task*[02]": 7.0}
    balancer = begun(Static(weights=given, default=2.0), 13)
    assert balancer.weights(shown(torch.ones(13))).tolist() == [7, 0.5, 7, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3]
    assert balancer.weights(shown([1.0, 1.0], [1, 12])).tolist() == [0.5, 3.0]
    assert balancer.state_dict() == {}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"tesk3": 1.0}, "no task is named or matches 'tesk3'; did you mean 'task3'"),
        ({"other*": 1.0}, "no task is named or matches 'other\\*'"),
        ({"task*": 0.0}, "every task has weight 0"),
    ],
)
def test_static_refuses_tasks_that_are_not_there(weights, words):
    with pytest.raises(UserError, match=words):
        Static(weights=weights).begin(facts(4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Static(weights={"a": -1.0}), "that of 'a' is -1.0, expected a finite number, at least 0"),
        (lambda: Static(weights={"a": float("nan")}), "that of 'a' is nan"),
        (lambda: Static(weights={}, default=float("inf")), "default is inf"),
        (lambda: Uncertainty(lr=0.0), "lr is 0.0, expected a positive, finite number"),
        (lambda: Uncertainty(initial=21.0), "initial is 21.0"),
        (lambda: Uncertainty(optimizer="adamw"), "optimizer is adamw, expected adam or sgd"),
        (lambda: UncertaintySoftmax(temperature=0.0), "temperature is 0.0"),
        (lambda: DWA(temperature=-1.0), "temperature is -1.0"),
        (lambda: DWA(every=0), "every is 0"),
        (lambda: RLW(distribution="cauchy"), "distribution is cauchy, expected one of normal, uniform"),
        (lambda: IMTLL(lr=float("inf")), "lr is inf"),
        (lambda: FAMO(gamma=-0.1), "gamma is -0.1"),
        (lambda: STCH(mu=0.0), "mu is 0.0"),
        (lambda: STCH(warmup=0), "warmup is 0"),
        (lambda: STCH(ideal=float("nan")), "ideal is nan"),
        (lambda: EMA(beta=1.0), "beta is 1.0"),
        (lambda: GradNorm(mode="open"), "mode is open, expected one of learned, closed"),
        (lambda: GradNorm(alpha=-1.0), "alpha is -1.0"),
        (lambda: GradNorm(initial_loss=0.0), "initial_loss is 0.0"),
        (lambda: GradNorm(initial_steps=0), "initial_steps is 0"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_uncertainty_softmax_follows_its_formula():
    balancer = begun(UncertaintySoftmax(temperature=2.0), 3)
    power = torch.exp(torch.tensor([1 / 0.5, 1 / 2.0, 1 / 4.0]) / 2)
    torch.testing.assert_close(balancer.weights(shown([0.5, 2.0, 4.0])), 3 * power / power.sum())
    assert balancer.weights(shown([1e-30, 1.0])).tolist() == [2.0, 0.0]


def test_dwa_equals_torchjd_where_all_tasks_are_there():
    balancer, theirs = begun(DWA(every=4), 6), peer.DWA()
    for i, loss_T in enumerate(draws(20, 6)):
        torch.testing.assert_close(balancer.weights(shown(loss_T)), peers_weights(theirs, loss_T))
        if i % 4 == 3:
            theirs.step()


def test_dwa_counts_each_tasks_own_appearances():
    balancer = begun(DWA(every=2, temperature=1.0), 3)
    for loss in (4.0, 6.0, 1.0, 3.0):
        balancer.weights(shown([loss, 1.0], [0, 2]))
    balancer.weights(shown([9.0], [1]))  # its first
    rate = torch.tensor([2.0 / 5.0, 1.0, 1.0])
    torch.testing.assert_close(balancer.weights(shown([1.0, 1.0, 1.0])), 3 * torch.softmax(rate, 0))


@pytest.mark.parametrize("distribution", ["normal", "uniform", "dirichlet", "bernoulli"])
def test_random_weights_are_a_function_of_seed_and_step(distribution):
    balancer = RLW(distribution=distribution)
    loss_A = torch.ones(1000)
    first, other = (balancer.weights(shown(loss_A, step=step)) for step in (7, 8))
    assert torch.equal(first, RLW(distribution=distribution).weights(shown(loss_A, step=7)))
    assert not torch.equal(first, other)
    assert not torch.equal(first, RLW(distribution=distribution, seed=1).weights(shown(loss_A, step=7)))
    assert first.mean().item() == pytest.approx(1)
    assert (first >= 0).all()
    assert all(RLW(distribution=distribution).weights(shown([1.0], step=step)).tolist() == [1.0] for step in range(8))


def test_random_weights_are_a_softmax_of_normal_draws():
    log_A = RLW().weights(shown(torch.ones(20000))).log()
    assert log_A.std().item() == pytest.approx(1, abs=0.02)
    skew = ((log_A - log_A.mean()) ** 3).mean().item()
    assert skew == pytest.approx(0, abs=0.1)


def test_geometric_weights_are_the_gradient_of_the_geometric_mean_times_its_number_of_tasks():
    (loss_T,) = draws(1, 8)
    weight_T = Geometric().weights(shown(loss_T))
    torch.testing.assert_close(weight_T, 8 * peers_weights(peer.GeometricMean(), loss_T))


def test_a_geometric_mean_of_ten_thousand_small_losses_does_not_underflow():
    loss_T = torch.full((10000,), 1e-6)
    torch.testing.assert_close(Geometric().weights(shown(loss_T)), torch.ones(10000), rtol=1e-4, atol=0)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_imtl_l_takes_the_steps_of_torchs_optimizer_on_torchjds_objective(optimizer):
    theirs = peer.IMTLL(5)
    # the mean over tasks times their number, as T share_t = 1
    torchs = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer](theirs.parameters(), lr=0.05)
    balancer = begun(IMTLL(lr=0.05, optimizer=optimizer), 5)
    for loss_T in draws(50, 5):
        torch.testing.assert_close(balancer.weights(shown(loss_T)), theirs.log_scale.detach().exp(), rtol=1e-5, atol=1e-6)
        torchs.zero_grad()
        theirs(loss_T).backward()
        torchs.step()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_imtl_l_rests_at_the_inverse_loss(optimizer):
    balancer = begun(IMTLL(lr=0.05, optimizer=optimizer), 3, share=[1.0, 2.0, 3.0])
    loss = torch.tensor([0.05, 1.0, 30.0])
    for _ in range(1000):
        weight_T = balancer.weights(shown(loss))
    torch.testing.assert_close(weight_T, 1 / loss, rtol=1e-2, atol=0)


def test_famo_equals_torchjd_where_all_tasks_are_there():
    balancer, theirs = begun(FAMO(gamma=0.01), 6), peer.FAMO(6, weight_decay=0.01)
    for before_T, after_T in zip(draws(40, 6), draws(40, 6, seed=1), strict=True):
        weight_T = balancer.weights(shown(before_T))
        torch.testing.assert_close(weight_T, 6 * peers_weights(theirs, before_T), rtol=1e-4, atol=1e-6)
        balancer.after(shown(after_T))
        theirs.update(after_T)


def test_famo_moves_the_tasks_that_were_seen_before_and_after_the_step_only():
    balancer = begun(FAMO(), 5)
    balancer.weights(shown([1.0, 2.0, 3.0], [0, 2, 4]))
    balancer.after(shown([0.5, 3.0, 2.0], [1, 2, 4]))
    balancer.after(shown([0.5, 3.0, 2.0], [1, 2, 4]))  # nothing was seen before
    assert balancer.steps_T.tolist() == [0, 0, 1, 0, 1]
    weight_A = balancer.weights(shown(torch.ones(5)))
    assert weight_A[2] > weight_A[0] == weight_A[1] == weight_A[3] > weight_A[4]  # the loss of 2 rose, that of 4 fell


@pytest.mark.parametrize("log", [True, False])
def test_stch_weights_are_the_gradient_of_its_scalarisation(log):
    balancer = begun(STCH(mu=0.3, warmup=5, ideal=0.01, log=log), 6)
    losses = draws(9, 6)
    for loss_T in losses[:5]:
        torch.testing.assert_close(balancer.weights(shown(loss_T)), 1 / (loss_T - 0.01))
    reference_T = (losses[:5] - 0.01).mean(0)
    for loss_T in losses[5:]:
        leaf = loss_T.clone().requires_grad_()
        if log:
            total = peer.STCH(0.3, torch.ones(6))(((leaf - 0.01) / reference_T).log())
        else:
            total = peer.STCH(0.3, 1 / reference_T, torch.full((6,), 0.01))(leaf)
        total.backward()
        torch.testing.assert_close(balancer.weights(shown(loss_T)), 6 * leaf.grad, rtol=1e-4, atol=1e-6)


def test_stch_begins_with_each_task_after_the_tasks_own_warmup():
    balancer = begun(STCH(warmup=2), 3)
    for _ in range(2):
        balancer.weights(shown([2.0, 4.0], [0, 1]))
    weight_A = balancer.weights(shown([4.0, 4.0, 5.0]))
    # of the two that are ready, the first is at twice its reference, the other at it
    torch.testing.assert_close(weight_A, torch.tensor([2 * (2 / 3) / 4, 2 * (1 / 3) / 4, 1 / 5]))


def test_ema_divides_by_the_moving_average_over_a_tasks_own_appearances():
    balancer = begun(EMA(beta=0.75), 3)
    assert balancer.weights(shown([2.0, 8.0], [0, 2])).tolist() == [0.5, 0.125]
    assert balancer.weights(shown([6.0, 5.0], [0, 1])).tolist() == pytest.approx([1 / 3, 1 / 5])
    assert balancer.weights(shown([3.0, 8.0], [0, 2])).tolist() == pytest.approx([1 / 3, 1 / 8])


FRESH = [Uncertainty, IMTLL, FAMO, EMA, lambda: DWA(every=2), lambda: STCH(warmup=2)]
FRESH += [GradNorm, lambda: GradNorm(mode="closed"), Equal, UncertaintySoftmax, RLW, Geometric]


def run(balancer, steps, num_tasks, active=lambda step: None, start=0):
    weights = []
    for step in range(start, start + steps):
        loss_T, norm2_T, after_T = (draws(1, num_tasks, seed=3 * step + i)[0] for i in range(3))
        task = torch.arange(num_tasks) if active(step) is None else active(step)
        weights.append(balancer.weights(shown(loss_T[task], task, step, norm2_T[task])))
        balancer.after(shown(after_T[task], task, step))
    return weights


@pytest.mark.parametrize("make", FRESH)
def test_what_is_resumed_goes_on_as_if_it_had_not_stopped(make):
    whole, first, second = (begun(make(), 6) for _ in range(3))
    expected = run(whole, 20, 6)[10:]
    run(first, 10, 6)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(map(torch.equal, run(second, 10, 6, start=10), expected))


@pytest.mark.parametrize("make", FRESH)
def test_a_state_of_zeros_is_that_of_a_new_task(make):
    balancer = begun(make(), 6)
    run(balancer, 10, 6)
    other = begun(make(), 6)
    other.load_state_dict({name: torch.zeros_like(value) for name, value in balancer.state_dict().items()})
    assert all(map(torch.equal, run(other, 5, 6), run(begun(make(), 6), 5, 6)))


@pytest.mark.parametrize("make", FRESH)
def test_ten_thousand_tasks_take_milliseconds(make):
    balancer = begun(make(), 10000)
    run(balancer, 2, 10000)
    seen = shown(torch.rand(10000) + 0.1, norm2=torch.rand(10000))
    best = min(_timed(balancer, seen) for _ in range(10))
    assert best < 0.02  # a Python loop over the tasks would take longer; measured: below 2 ms


def _timed(balancer, seen):
    start = time.perf_counter()
    balancer.weights(seen)
    return time.perf_counter() - start

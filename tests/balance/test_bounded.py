import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shown import begun, shown

from mtrain.balance.base import Balancer, Facts
from mtrain.balance.bounded import Bounded
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

SYMMETRIC = {
    "equal": Equal,
    "uncertainty": Uncertainty,
    "uncertainty_sgd": lambda: Uncertainty(optimizer="sgd", lr=0.1),
    "uncertainty_softmax": UncertaintySoftmax,
    "dwa": lambda: DWA(every=2),
    "geometric": Geometric,
    "imtl_l": IMTLL,
    "imtl_l_sgd": lambda: IMTLL(optimizer="sgd", lr=0.1),
    "famo": FAMO,
    "stch": lambda: STCH(warmup=2),
    "stch_plain": lambda: STCH(warmup=2, mu=0.01, log=False),
    "ema": EMA,
    "gradnorm": GradNorm,
    "gradnorm_sgd": lambda: GradNorm(optimizer="sgd"),
    "gradnorm_closed": lambda: GradNorm(mode="closed"),
}
ALL = SYMMETRIC | {"rlw": RLW, "static": lambda: Static(weights={"task0": 5.0})}
T = 7

SPECIAL = [0.0, 1e-15, 1.0, 2.0, 1e15, math.nan, math.inf]


def steps(seed, low=-15.0, high=15.0, special=SPECIAL, count=5):
    """Some steps: the active tasks, and of every task a loss, a squared norm and a loss after the step."""
    random = Random(seed)

    def value():
        return random.choice(special) if random.random() < 0.3 else 10 ** random.uniform(low, high)

    for step in range(count):
        active = random.sample(range(T), random.randint(1, T))
        yield step, active, [(value(), value(), value()) for _ in range(T)]


def show(balancer, step, active, numbers, order=None):
    """`order`: where each task is now."""
    place = list(range(T)) if order is None else order
    tasks = sorted(place[t] for t in active)
    back = {place[t]: t for t in range(T)}
    loss, norm2, after = ([numbers[back[p]][i] for p in tasks] for i in range(3))
    seen = shown(loss, tasks, step, norm2)
    weight_A = balancer.weights(seen)
    balancer.after(shown(after, tasks, step))
    return dict(zip((back[p] for p in tasks), weight_A.tolist(), strict=True))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), low=st.floats(1e-6, 1), high=st.floats(1, 1e6))
def test_weights_are_finite_and_bounded_whatever_is_seen(name, seed, low, high):
    bare = begun(Bounded(ALL[name]()), T)
    bounded = begun(Bounded(ALL[name](), min=low, max=high, normalize=True), T)
    for step, active, numbers in steps(seed):
        weights = show(bare, step, active, numbers)
        assert all(math.isfinite(weight) and weight >= 0 for weight in weights.values())
        weights = list(show(bounded, step, active, numbers).values())
        assert sum(weights) / len(weights) == pytest.approx(1, rel=1e-4)
        assert min(weights) * high >= max(weights) * low * (1 - 1e-4)
        state = bare.state_dict()
        assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_absent_tasks_keep_their_state_bit_by_bit(name, seed):
    balancer = begun(Bounded(ALL[name]()), T)
    for step, active, numbers in steps(seed):
        before = {key: value.clone() for key, value in balancer.state_dict().items()}
        show(balancer, step, active, numbers)
        absent = [t for t in range(T) if t not in active]
        assert all(torch.equal(value[absent], before[key][absent]) for key, value in balancer.state_dict().items())


@pytest.mark.parametrize("name", SYMMETRIC)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), order=st.permutations(range(T)))
def test_the_order_of_tasks_does_not_matter(name, seed, order):
    one, other = (Bounded(SYMMETRIC[name](), min=0.01, max=100.0) for _ in range(2))
    regression, share = torch.arange(T) % 2 == 0, torch.arange(1.0, T + 1)
    back = torch.argsort(torch.tensor(order))
    begun(one, T, regression=regression, share=share)
    begun(other, T, regression=regression[back], share=share[back])
    for step, active, numbers in steps(seed, -3, 3, [1.0, 2.0]):
        weights, moved = show(one, step, active, numbers), show(other, step, active, numbers, order)
        assert moved == pytest.approx(weights, rel=1e-3)


class Given(Balancer):
    """Gives what it is told to, and remembers what it was shown."""

    def __init__(self, *weights):
        self.given, self.seen = [torch.tensor(w) for w in weights], []

    def begin(self, facts: Facts) -> None:
        super().begin(facts)
        self.count_T = torch.zeros(facts.num_tasks)

    def weights(self, seen):
        self.seen.append(seen)
        self.count_T[seen.task_A] += 1
        return self.given[len(self.seen) - 1]


def test_without_options_weights_pass_unchanged():
    weight = [0.1, 3.0, -2.0, 0.0]
    assert begun(Bounded(Given(weight)), 4).weights(shown(torch.ones(4))).tolist() == torch.tensor(weight).tolist()


def test_weights_are_one_in_warmup_while_the_balancer_learns():
    inner = Given(*[[2.0, 4.0]] * 3)
    balancer = begun(Bounded(inner, warmup=2), 2)
    assert [balancer.weights(shown([1.0, 1.0], step=step)).tolist() for step in range(3)] == [[1, 1], [1, 1], [2, 4]]
    assert inner.count_T.tolist() == [3, 3]


def test_weights_that_are_not_finite_become_the_mean_of_the_others_and_are_counted():
    balancer = begun(Bounded(Given([1.0, math.nan, 3.0, -math.inf], [math.nan, math.inf])), 5)
    assert balancer.weights(shown(torch.ones(4), [0, 1, 2, 4])).tolist() == [1, 2, 3, 2]
    assert balancer.weights(shown(torch.ones(2), [1, 3])).tolist() == [1, 1]
    assert balancer.replaced_T.tolist() == [0, 2, 0, 1, 1]


def test_tasks_with_a_loss_norm_or_gram_that_is_not_finite_are_not_shown():
    inner = Given([5.0, 7.0])
    balancer = begun(Bounded(inner), 6)
    gram = torch.eye(5)
    gram[3, 3] = math.inf
    seen = shown([1.0, math.nan, 3.0, 4.0, 5.0], [0, 1, 2, 3, 5], norm2=[1.0, 1.0, math.inf, 1.0, 1.0], gram=gram)
    assert balancer.weights(seen).tolist() == [5, 6, 6, 6, 7]
    (inside,) = inner.seen
    assert inside.task_A.tolist() == [0, 5]
    assert inside.loss_A.tolist() == [1, 5]
    assert inside.gram_AA.tolist() == [[1, 0], [0, 1]]
    assert balancer.replaced_T.tolist() == [0, 1, 1, 1, 0, 0]


def test_no_active_task_or_none_with_a_finite_loss_is_no_error():
    balancer = begun(Bounded(Uncertainty(), normalize=True), 3)
    assert balancer.weights(shown([], torch.empty(0, dtype=torch.int64))).tolist() == []
    assert balancer.weights(shown([math.nan, math.inf])).tolist() == [1, 1]


def test_bounds_are_ratios_to_the_mean_and_normalising_comes_after():
    weight = [0.0, 2.0, 10.0]
    assert begun(Bounded(Given(weight), min=0.5, max=2.0), 3).weights(shown(torch.ones(3))).tolist() == [2, 2, 8]
    both = begun(Bounded(Given(weight), min=0.5, max=2.0, normalize=True), 3)
    assert both.weights(shown(torch.ones(3))).tolist() == [0.5, 0.5, 2]


def test_negative_weights_stay_unless_a_least_ratio_is_given():
    weight = [-3.0, 1.0, 2.0, 2.0]
    assert begun(Bounded(Given(weight), max=1.25), 4).weights(shown(torch.ones(4))).tolist() == [-2.5, 1, 2, 2]
    assert begun(Bounded(Given(weight), min=0.0), 4).weights(shown(torch.ones(4))).tolist() == [0, 1, 2, 2]


def test_weights_whose_sum_overflows_are_normalised():
    weight_A = begun(Bounded(Given([3e38, 3e38, 3e38]), min=0.5, max=2.0, normalize=True), 3).weights(shown(torch.ones(3)))
    torch.testing.assert_close(weight_A, torch.ones(3))


def test_weights_of_zero_stay_zero():
    balancer = begun(Bounded(Given([0.0, 0.0]), min=0.5, max=2.0, normalize=True), 2)
    assert balancer.weights(shown([1.0, 1.0])).tolist() == [0, 0]


def test_state_passes_through_without_a_prefix():
    balancer = begun(Bounded(Uncertainty()), 3)
    balancer.weights(shown([1.0, math.nan], [0, 2]))
    state = {name: value.clone() for name, value in balancer.state_dict().items()}
    assert set(state) == {"value_T", "moment_T", "square_T", "steps_T", "replaced_T"}
    other = begun(Bounded(Uncertainty()), 3)
    other.load_state_dict(state)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())
    assert other.replaced_T.tolist() == [0, 0, 1]


class Fails(Balancer):
    def weights(self, seen):
        raise ValueError("no\nsuch task")


@pytest.mark.parametrize(
    ("balancer", "words"),
    [
        (Given([1.0]), r"Given gives a tensor of shape \[1\], expected a tensor \[3\], a weight for each active task"),
        (Given([[1.0, 1.0, 1.0]]), r"Given gives a tensor of shape \[1, 3\]"),
        (Given([-1.0, 0.0, -2.0]), r"Given gives no weight above 0 and some below \(least: -2\)"),
        (Fails(), "Fails fails with ValueError: no such task"),
    ],
)
def test_a_users_balancer_that_breaks_its_contract_is_refused_in_one_line(balancer, words):
    with pytest.raises(UserError, match=f"objective.balancer: {words}"):
        begun(Bounded(balancer), 3).weights(shown(torch.ones(3)))


def test_a_users_balancer_that_gives_a_list_or_fails_elsewhere_is_refused_in_one_line():
    inner = Given()
    inner.given = [[1.0, 1.0]]
    with pytest.raises(UserError, match="Given gives a list, expected a tensor"):
        begun(Bounded(inner), 2).weights(shown(torch.ones(2)))
    inner.begin = inner.after = lambda given: {}["nope"]
    for call in (lambda: begun(Bounded(inner), 2), lambda: Bounded(inner).after(shown(torch.ones(2)))):
        with pytest.raises(UserError, match="Given fails with KeyError: 'nope'"):
            call()


def test_needs_are_those_of_the_balancer():
    assert (Bounded(GradNorm()).needs, Bounded(GradNorm()).second_forward) == ("norms", False)
    assert (Bounded(FAMO()).needs, Bounded(FAMO()).second_forward) == ("losses", True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup": -1}, "warmup is -1, expected a number of steps"),
        ({"min": 1.5}, "min is 1.5, expected a ratio"),
        ({"min": -0.1}, "min is -0.1"),
        ({"max": 0.5}, "max is 0.5"),
        ({"max": math.nan}, "max is nan"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(options, words):
    with pytest.raises(UserError, match=words):
        Bounded(Equal(), **options)

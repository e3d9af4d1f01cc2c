import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrain.components import Spec, build
from mtrain.data.samplers import (
    SAMPLERS,
    Capped,
    Equal,
    Proportional,
    Sqrt,
    StatefulSampler,
    Temperature,
    UniMax,
    checked,
)
from mtrain.errors import UserError

ROWS = st.lists(st.integers(0, 10**6), min_size=1, max_size=30).filter(any).map(np.array)
TAU = st.floats(0.5, 20)
CAP = st.integers(1, 10**6)
BUDGET = st.integers(1, 10**8)
EPOCHS = st.floats(0.1, 100)
SAMPLER = st.one_of(
    st.sampled_from([Proportional(), Sqrt(), Equal()]),
    st.builds(Temperature, TAU),
    st.builds(Capped, CAP, TAU),
    st.builds(UniMax, BUDGET, EPOCHS),
)


def by_weight(rows, weight):
    weights = [weight(float(n)) if n else 0.0 for n in rows.tolist()]
    return [w / sum(weights) for w in weights]


def algorithm_1(rows, budget, epochs):
    """The paper's loop: from the smallest task on, an equal part of what is left, or all epochs of the task if fewer."""
    present = sorted((n, t) for t, n in enumerate(rows.tolist()) if n)
    drawn, left = [0.0] * len(rows), float(budget)
    for i, (n, t) in enumerate(present):
        equal = left / (len(present) - i)
        drawn[t] = n * epochs if equal / n > epochs else equal
        left -= drawn[t]
    return [u / sum(drawn) for u in drawn]


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, tau=TAU, cap=CAP)
def test_probabilities_follow_the_formulas(rows, tau, cap):
    for sampler, weight in (
        (Proportional(), lambda n: n),
        (Temperature(tau), lambda n: n ** (1 / tau)),
        (Sqrt(), lambda n: n**0.5),
        (Equal(), lambda n: 1.0),
        (Capped(cap), lambda n: min(n, cap)),
        (Capped(cap, tau), lambda n: min(n, cap) ** (1 / tau)),
    ):
        np.testing.assert_allclose(sampler.probabilities(rows), by_weight(rows, weight), rtol=1e-9)


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, budget=BUDGET, epochs=EPOCHS)
def test_unimax_is_the_loop_of_the_paper(rows, budget, epochs):
    np.testing.assert_allclose(UniMax(budget, epochs).probabilities(rows), algorithm_1(rows, budget, epochs), rtol=1e-6)


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, sampler=SAMPLER)
def test_probabilities_sum_to_1_and_never_fall_with_the_rows_of_a_task(rows, sampler):
    before = rows.copy()
    p = sampler.probabilities(rows)
    np.testing.assert_array_equal(rows, before)
    assert p.shape == rows.shape
    assert p.sum() == pytest.approx(1)
    np.testing.assert_array_equal(p > 0, rows > 0)
    assert (np.diff(p[np.argsort(rows)]) >= 0).all()


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, sampler=SAMPLER, random=st.randoms(use_true_random=False))
def test_the_order_of_tasks_and_tasks_without_rows_do_not_matter(rows, sampler, random):
    order = np.array(random.sample(range(len(rows)), len(rows)))
    p = sampler.probabilities(rows)
    np.testing.assert_allclose(sampler.probabilities(rows[order]), p[order], rtol=1e-9)
    np.testing.assert_allclose(sampler.probabilities(np.append(rows, [0, 0])), np.append(p, [0, 0]), rtol=1e-9)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, factor=st.integers(2, 1000), tau=TAU, cap=CAP, budget=BUDGET, epochs=EPOCHS)
def test_rows_in_another_unit_give_the_same_probabilities(rows, factor, tau, cap, budget, epochs):
    for sampler, scaled in (
        (Temperature(tau), Temperature(tau)),
        (Equal(), Equal()),
        (Capped(cap, tau), Capped(cap * factor, tau)),
        (UniMax(budget, epochs), UniMax(budget * factor, epochs)),
    ):
        np.testing.assert_allclose(scaled.probabilities(rows * factor), sampler.probabilities(rows), rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, tau=TAU)
def test_a_cap_acts_only_on_tasks_above_it(rows, tau):
    np.testing.assert_allclose(Capped(int(rows.max()), tau).probabilities(rows), Temperature(tau).probabilities(rows))
    np.testing.assert_array_equal(Capped(1, tau).probabilities(rows), Equal().probabilities(rows))


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, epochs=EPOCHS, part=st.floats(0.001, 0.99) | st.floats(1, 2))
def test_unimax_keeps_every_cap_and_is_equal_below_them(rows, epochs, part):
    most = epochs * rows.sum()
    budget = max(1, int(part * most))
    p = UniMax(budget, epochs).probabilities(rows)
    if budget >= most * (1 - 1e-5):  # or so close that no task is clearly below its cap
        np.testing.assert_allclose(p, Proportional().probabilities(rows), rtol=1e-3)
        return
    seen = budget * p
    assert (seen <= epochs * rows * (1 + 1e-9)).all()
    below = (rows > 0) & (seen < epochs * rows * (1 - 1e-6))
    assert below.any()
    assert len(set(p[below].tolist())) == 1
    assert p[below][0] == p.max()


def test_unimax_in_numbers():
    rows = np.array([10, 100, 1000, 0])  # 400 rows: 2 x 10, then 190 each
    np.testing.assert_allclose(UniMax(400, 2).probabilities(rows) * 400, [20, 190, 190, 0])


def test_extreme_temperatures_stay_finite():
    rows = np.array([0, 1, 1000, 10**9])
    assert Temperature(1e-3).probabilities(rows).tolist() == [0, 0, 0, 1]
    assert Temperature(float("inf")).probabilities(rows).tolist() == Equal().probabilities(rows).tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_is_built_by_name_and_quick_for_10000_tasks(name):
    sampler = build(Spec(class_path=name), SAMPLERS, "sampler", budget=10**7)
    assert type(sampler).__name__ == name
    rows = np.random.default_rng(0).integers(0, 10**6, 10_000)
    start = time.perf_counter()
    p = sampler.probabilities(rows)
    assert time.perf_counter() - start < 0.1
    assert p.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Temperature", {"tau": 0}, "sampler: tau is 0.0, expected a positive number"),
        ("Temperature", {"tau": float("nan")}, "sampler: tau is nan, expected a positive number"),
        ("Capped", {"cap": 0}, "sampler: cap is 0, expected a positive number of rows"),
        ("Capped", {"tau": -1}, "sampler: tau is -1.0, expected a positive number"),
        ("Capped", {"cap": "many"}, "sampler.init_args.cap: found 'many'"),
        ("UniMax", {"epochs": 0}, "sampler: epochs is 0.0, expected a positive, finite number"),
        ("UniMax", {"epochs": float("inf")}, "sampler: epochs is inf, expected a positive, finite number"),
        ("UniMax", {"budget": 5}, "sampler.init_args.budget: unknown option"),
        ("Sqrt", {"tau": 2}, "sampler.init_args.tau: unknown option"),
    ],
)
def test_bad_options_end_in_one_line(name, options, message):
    with pytest.raises(UserError) as error:
        build(Spec(class_path=name, init_args=options), SAMPLERS, "sampler", budget=100)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_budget_of_no_rows_is_refused():
    with pytest.raises(UserError, match="sampler: budget is 0, expected a positive number of rows"):
        UniMax(0)


class Annealed:
    """p ~ n^a, where a falls from 1 to 0.2 (Stickland and Murray 2019): a call moves it on by a block."""

    def __init__(self, blocks: int):
        self.blocks, self.block = blocks, 0

    def probabilities(self, rows_T):
        power = 1 - 0.8 * min(self.block / (self.blocks - 1), 1)
        self.block += 1
        return Temperature(1 / power).probabilities(rows_T)

    def state_dict(self):
        return {"block": self.block}

    def load_state_dict(self, state):
        self.block = state["block"]


def test_a_sampler_with_state_goes_on_from_the_state_at_the_start_of_a_block():
    rows, sampler = np.array([1, 10, 100]), Annealed(5)
    assert isinstance(sampler, StatefulSampler)
    assert not isinstance(Capped(), StatefulSampler)
    states, blocks = [], []
    for _ in range(7):
        states.append(sampler.state_dict())
        blocks.append(sampler.probabilities(rows))
    np.testing.assert_allclose(blocks[0], rows / 111)
    np.testing.assert_allclose(blocks[4], rows**0.2 / (rows**0.2).sum())
    for at in range(7):
        resumed = Annealed(5)
        resumed.load_state_dict(states[at])
        for expected in blocks[at:]:
            np.testing.assert_array_equal(resumed.probabilities(rows), expected)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, sampler=SAMPLER)
def test_what_samplers_give_passes_the_check_unchanged(rows, sampler):
    p = sampler.probabilities(rows)
    np.testing.assert_allclose(checked(p, rows), p, rtol=1e-12)


def test_checked_leaves_out_tasks_without_rows_and_divides_by_the_sum():
    rows = np.array([5, 0, 7])
    for given_T in ([1, 9, 3], (1.0, 9.0, 3.0), np.array([1, 9, 3]), torch.tensor([1.0, 9.0, 3.0])):
        assert checked(given_T, rows).tolist() == [0.25, 0, 0.75]
    assert checked([1e-320, 0, 1e-320], rows).tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize(
    "given_T",
    [
        [1.0, 2.0],
        [[1.0, 2.0, 3.0]],
        1.0,
        None,
        "equal",
        ["a", "b", "c"],
        [1.0, float("nan"), 1.0],
        [1.0, float("inf"), 1.0],
        [1.0, -0.1, 1.0],
        [1e308, 1e308, 1e308],
        torch.ones(3, requires_grad=True),
        np.array([[1.0], [2.0], [3.0]]),
    ],
    ids=repr,
)
def test_what_is_not_a_number_for_each_task_ends_in_one_line(given_T):
    with pytest.raises(UserError, match=r"sampler: gave .*, expected 3 numbers >= 0, one for each task$"):
        checked(given_T, np.array([5, 0, 7]))


def test_probability_0_for_every_task_with_rows_is_refused():
    with pytest.raises(UserError, match="sampler: gave probability 0 to every task with rows, expected some above 0"):
        checked([0.0, 1.0, 0.0], np.array([5, 0, 7]))

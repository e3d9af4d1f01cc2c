import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrain.parallel.plan import assign

WHOLE = st.integers(0, 50)  # sums of whole numbers are exact
LOADS = st.dictionaries(st.text(max_size=3), WHOLE, max_size=30)


def naive(load_of, ranks):
    """The owner of each task, by a look at all ranks for each task."""
    totals, owner_of = [0.0] * ranks, {}
    for name in sorted(sorted(load_of), key=lambda name: load_of[name], reverse=True):  # both sorts are stable
        owner_of[name] = totals.index(min(totals))
        totals[owner_of[name]] += load_of[name]
    return owner_of


@settings(max_examples=200, deadline=None)
@given(load_of=LOADS, ranks=st.integers(1, 12))
def test_each_task_goes_to_the_rank_that_a_plain_loop_finds(load_of, ranks):
    plan = assign(list(load_of), np.array(list(load_of.values()), dtype=float), ranks)
    assert plan.names == tuple(load_of)
    assert dict(zip(plan.names, plan.owner_T.tolist(), strict=True)) == naive(load_of, ranks)
    by_rank = [sum(load_of[n] for n, owner in zip(plan.names, plan.owner_T, strict=True) if owner == r) for r in range(ranks)]
    assert plan.load_R.tolist() == by_rank


@settings(max_examples=100, deadline=None)
@given(
    load_of=st.dictionaries(st.text(max_size=3), st.floats(0, 1e6), max_size=30),
    ranks=st.integers(1, 12),
    random=st.randoms(use_true_random=False),
)
def test_the_order_in_which_tasks_are_listed_does_not_matter(load_of, ranks, random):
    names = list(load_of)
    other = random.sample(names, len(names))
    one, two = (assign(order, np.array([load_of[n] for n in order], dtype=float), ranks) for order in (names, other))
    assert dict(zip(one.names, one.owner_T.tolist(), strict=True)) == dict(zip(two.names, two.owner_T.tolist(), strict=True))
    assert one.load_R.tolist() == two.load_R.tolist()  # to the last bit


@settings(max_examples=100, deadline=None)
@given(load=st.lists(WHOLE, min_size=1, max_size=40), ranks=st.integers(1, 12))
def test_no_rank_has_more_than_the_mean_and_the_largest_task(load, ranks):
    plan = assign([str(i) for i in range(len(load))], np.array(load, dtype=float), ranks)
    assert plan.load_R.sum() == sum(load)
    assert plan.load_R.max() <= sum(load) / ranks + max(load)
    if sum(load):
        assert plan.imbalance == pytest.approx(plan.load_R.max() * ranks / sum(load))


@settings(max_examples=60, deadline=None)
@given(load=st.lists(st.integers(1, 20), min_size=1, max_size=7), ranks=st.integers(1, 3))
def test_the_largest_load_is_within_a_third_of_the_best_possible(load, ranks):
    plan = assign([str(i) for i in range(len(load))], np.array(load, dtype=float), ranks)
    best = min(
        max(sum(n for n, o in zip(load, owner, strict=True) if o == rank) for rank in range(ranks))
        for owner in itertools.product(range(ranks), repeat=len(load))
    )
    assert best <= plan.load_R.max() <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


def test_with_more_ranks_than_tasks_each_task_has_a_rank_of_its_own():
    plan = assign(["b", "a", "c"], np.array([1.0, 1.0, 5.0]), 5)
    assert plan.owner_T.tolist() == [2, 1, 0]
    assert plan.load_R.tolist() == [5, 1, 1, 0, 0]
    assert plan.imbalance == pytest.approx(5 / (7 / 5))


def test_no_load_and_no_tasks_are_balanced():
    assert assign(["a", "b"], np.zeros(2), 3).imbalance == 1
    assert assign([], np.zeros(0), 3).imbalance == 1


def test_a_plan_of_10000_tasks_on_4096_ranks_is_quick():
    load_T = 1 / np.arange(1, 10_001)
    names = [f"task {i}" for i in range(10_000)]
    start = time.perf_counter()
    assign(names, load_T, 4096)
    assert time.perf_counter() - start < 1

"""Affinity of tasks: means over steps, and groups."""

from itertools import pairwise

import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from mtrain.report.affinity import affinity_tables, silhouette


def blocks(sizes, within=0.6, between=-0.2):
    group = np.repeat(np.arange(len(sizes)), sizes)
    cosine = np.where(group[:, None] == group, within, between)
    np.fill_diagonal(cosine, 1)
    return group, cosine


def test_groups_are_found_from_the_largest_down_and_like_stands_by_like():
    group, cosine = blocks([3, 9, 5])
    shuffle = np.random.default_rng(0).permutation(len(group))
    cosine = cosine[shuffle][:, shuffle] + np.random.default_rng(1).normal(0, 0.02, cosine.shape)
    names = [f"task {i}" for i in shuffle]
    steps = np.full(cosine.shape, 4.0)
    pairs, tasks = affinity_tables(names, (cosine + cosine.T) / 2 * 4, steps)
    expected = {0: 2, 1: 0, 2: 1}
    assert tasks["group"].to_pylist() == [expected[group[i]] for i in shuffle]
    by_order = [tasks["group"].to_pylist()[i] for i in np.argsort(tasks["order"].to_numpy())]
    assert sum(a != b for a, b in pairwise(by_order)) == 2
    assert pairs.num_rows == 17 * 16 // 2
    first = pairs.to_pylist()[0]
    assert (first["task_a"], first["task_b"], first["steps"]) == (names[0], names[1], 4)
    assert first["affinity"] == pytest.approx((cosine[0, 1] + cosine[1, 0]) / 2)


def test_pairs_that_never_met_are_left_out():
    _, cosine = blocks([2, 2])
    steps = np.ones((4, 4))
    steps[0, 3] = steps[3, 0] = 0
    pairs, tasks = affinity_tables(list("abcd"), np.where(steps > 0, cosine, 0), steps)
    assert ("a", "d") not in zip(pairs["task_a"].to_pylist(), pairs["task_b"].to_pylist(), strict=True)
    assert pairs.num_rows == 5
    assert tasks["group"].to_pylist() == [0, 0, 1, 1]


def test_few_tasks_are_one_group():
    for number in (1, 2):
        pairs, tasks = affinity_tables(list("ab")[:number], np.eye(number), np.ones((number, number)))
        assert tasks["group"].to_pylist() == [0] * number
        assert pairs.num_rows == number - 1


def test_the_silhouette_is_that_of_a_peer():
    rng = np.random.default_rng(0)
    distance = rng.random((30, 30))
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0)
    group = np.append(rng.integers(4, size=29), 9)  # the last one is alone
    assert silhouette(distance, group) == pytest.approx(silhouette_score(distance, group, metric="precomputed"))

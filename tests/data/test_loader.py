import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrain.data.batch import Grid, Pairs
from mtrain.data.loader import Part, RoutedLoader, RowLoader
from mtrain.data.order import name_key, shuffled
from mtrain.data.samplers import Equal, Proportional, Temperature
from mtrain.errors import UserError


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**64), name=st.text(), epoch=st.integers(0, 1000))
def test_each_epoch_of_a_shuffled_stream_is_a_permutation(size, seed, name, epoch):
    rows = shuffled(seed, name_key(name), np.arange(size) + epoch * size, size)
    np.testing.assert_array_equal(np.sort(rows), np.arange(size))


@settings(max_examples=20, deadline=None)
@given(size=st.integers(30, 3000), seed=st.integers(0, 2**32))
def test_orders_differ_between_epochs_seeds_and_names(size, seed):
    orders = [
        shuffled(s, name_key(name), np.arange(size) + epoch * size, size)
        for s, name, epoch in ((seed, "a", 0), (seed, "a", 1), (seed + 1, "a", 0), (seed, "b", 0), (seed + 1, "b", 1))
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.3


def test_many_streams_at_once_are_the_streams_one_by_one():
    rng = np.random.default_rng(0)
    size, position = rng.integers(1, 100, 500), rng.integers(0, 1000, 500)
    key = np.array([name_key(f"task {i}") for i in range(500)], dtype=np.uint64)
    one_by_one = [shuffled(3, int(k), np.array([p]), int(s))[0] for k, p, s in zip(key, position, size, strict=True)]
    np.testing.assert_array_equal(shuffled(3, key, position, size), one_by_one)


def test_each_row_is_equally_often_at_each_place():
    size, epochs = 8, 4000
    order = shuffled(0, 1, np.arange(size * epochs), size).reshape(epochs, size)
    count = np.stack([np.bincount(order[:, place], minlength=size) for place in range(size)])
    assert abs(count - epochs / size).max() < 5 * np.sqrt(epochs / size)


def random_pairs(rng, rows=30, tasks=7, labels=80):
    cell = rng.choice(rows * tasks, labels, replace=False)
    y = torch.from_numpy(rng.normal(size=labels))
    weight = torch.from_numpy(rng.random(rows)[cell // tasks])
    return Pairs.of(torch.from_numpy(cell // tasks), torch.from_numpy(cell % tasks), y, weight, rows, tasks)


@pytest.mark.parametrize("seed", range(5))
def test_taking_rows_gives_the_same_labels_from_pairs_as_from_a_grid(seed):
    rng = np.random.default_rng(seed)
    pairs = random_pairs(rng)
    grid = pairs.grid()
    for row, task, y in zip(pairs.row_P, pairs.task_P, pairs.y_P, strict=True):
        assert grid.y_BT[row, task] == y
    assert int((~grid.y_BT.isnan()).sum()) == len(pairs.y_P)
    assert pairs.count_T().tolist() == grid.count_T().tolist()
    row_B = torch.from_numpy(rng.integers(0, 30, 12))  # repeated and without labels too
    taken, from_grid = pairs.take(row_B), grid.take(row_B)
    torch.testing.assert_close(taken.grid().y_BT, from_grid.y_BT, equal_nan=True)
    torch.testing.assert_close(taken.grid().weight_B, from_grid.weight_B)
    torch.testing.assert_close(from_grid.weight_B, grid.weight_B[row_B])
    back = from_grid.pairs()
    for mine, other in ((taken.row_P, back.row_P), (taken.start_R, back.start_R), (taken.y_P.sort()[0], back.y_P.sort()[0])):
        torch.testing.assert_close(mine, other)
    assert taken.num_rows == from_grid.num_rows == 12


def test_micro_batches_are_consecutive_pieces_of_the_batch():
    rng = np.random.default_rng(0)
    labels = random_pairs(rng)
    batch = Part(torch.arange(30), labels).batch(torch.randn(30, 3), torch.arange(30))
    pieces = batch.micro_batches(8)
    assert [len(piece.row_B) for piece in pieces] == [8, 8, 8, 6]
    torch.testing.assert_close(torch.cat([piece.x_BF for piece in pieces]), batch.x_BF)
    torch.testing.assert_close(torch.cat([piece.labels.grid().y_BT for piece in pieces]), labels.grid().y_BT, equal_nan=True)
    assert batch.micro_batches(30) == [batch]


def grid_part(rows):
    """Inputs that are their own row number; the part holds every second row."""
    x = torch.arange(2 * rows, dtype=torch.float32)[:, None]
    row_R = torch.arange(0, 2 * rows, 2)
    return x, Part(row_R, Grid(row_R[:, None].float() * 10))


@pytest.mark.parametrize(("rows", "size"), [(12, 4), (13, 5), (3, 100), (100, 1)])
def test_a_row_loader_gives_every_row_once_in_each_epoch_with_its_own_labels(rows, size):
    x, part = grid_part(rows)
    loader = RowLoader(x, part, size, seed=1)
    assert loader.steps_per_epoch == -(-rows // min(size, rows))
    seen = []
    for step in range(3 * rows):
        batch = loader.batch(step)
        assert len(batch.row_B) == min(size, rows)
        assert batch.x_BF[:, 0].tolist() == batch.row_B.tolist()
        assert (batch.labels.y_BT[:, 0] / 10).tolist() == batch.row_B.tolist()
        seen += batch.row_B.tolist()
    for epoch in range(len(seen) // rows):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == part.row_R.tolist()


def test_a_row_loaders_step_needs_no_state():
    x, part = grid_part(50)
    first = [RowLoader(x, part, 8, seed=1).batch(step).row_B.tolist() for step in range(20)]
    loader = RowLoader(x, part, 8, seed=1)
    loader.load_state_dict(loader.state_dict())
    assert loader.batch(13).row_B.tolist() == first[13]
    assert RowLoader(x, part, 8, seed=2).batch(0).row_B.tolist() != first[0]


def routed(rows_T, probability_T=None, size=32, seed=0):
    rng = np.random.default_rng(1)
    task = rng.permutation(np.repeat(np.arange(len(rows_T)), rows_T))
    rows = len(task)
    pairs = Pairs.of(torch.arange(rows), torch.from_numpy(task), torch.arange(rows).double(), None, rows, len(rows_T))
    p = Proportional().probabilities(np.array(rows_T)) if probability_T is None else np.asarray(probability_T)
    names = [f"task {t}" for t in range(len(rows_T))]
    x = torch.arange(rows, dtype=torch.float32)[:, None]
    return RoutedLoader(x, Part(torch.arange(rows), pairs), names, p, size, seed), task


@settings(max_examples=30, deadline=None)
@given(data=st.data(), size=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_a_tasks_rows_in_a_step_are_its_expected_number_rounded_up_or_down(data, size, seed):
    rows_T = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(any))
    p_T = np.array(data.draw(st.lists(st.floats(0.001, 1), min_size=len(rows_T), max_size=len(rows_T))))
    loader, _ = routed(rows_T, p_T, size, seed)
    p_T = np.where(np.array(rows_T) > 0, p_T, 0)
    p_T = p_T / p_T.sum()
    total = np.zeros(len(rows_T))
    for step in range(130):
        count_T = loader.counts(step)
        assert count_T.sum() == size
        assert (abs(count_T - size * p_T) < 1 + 1e-6).all()
        assert (count_T[p_T == 0] == 0).all()
        total += count_T
    assert abs(total / 130 - size * p_T).max() < 0.25  # a multinomial draw would be off by several times that


def test_a_routed_loader_gives_every_row_of_a_task_once_in_each_of_its_epochs():
    rows_T = [1, 3, 20, 0, 100, 7]
    loader, task = routed(rows_T, [1, 1, 1, 5, 1, 1])
    seen = [[] for _ in rows_T]
    for step in range(200):
        batch = loader.batch(step)
        assert len(batch.row_B) == 32
        assert batch.x_BF[:, 0].long().tolist() == batch.row_B.tolist() == batch.labels.y_P.long().tolist()
        assert batch.labels.task_P.tolist() == task[batch.row_B].tolist()
        for row in batch.row_B.tolist():
            seen[task[row]].append(row)
    assert seen[3] == []
    for t, rows in enumerate(rows_T):
        own = np.flatnonzero(task == t).tolist()
        epochs = len(seen[t]) // rows if rows else 0
        for epoch in range(epochs):
            assert sorted(seen[t][epoch * rows : (epoch + 1) * rows]) == own
        assert epochs > 0 or not rows


def test_tasks_of_probability_zero_are_never_drawn():
    loader, _ = routed([5] * 30, [0] * 10 + [1e-12] * 10 + [0.1] * 10)
    assert sum(loader.counts(step)[:10].sum() for step in range(200)) == 0


@pytest.mark.parametrize(("stop", "seed"), [(0, 0), (1, 1), (63, 2), (64, 3), (97, 4)])
def test_a_restored_routed_loader_continues_exactly(stop, seed):
    rows_T = [1, 3, 20, 100, 7]
    whole, _ = routed(rows_T, seed=seed)
    batches = [whole.batch(step).row_B.tolist() for step in range(stop + 70)]
    before, _ = routed(rows_T, seed=seed)
    for step in range(stop):
        before.batch(step)
    after, _ = routed(rows_T, seed=seed)
    after.load_state_dict(before.state_dict())
    assert [after.batch(step).row_B.tolist() for step in range(stop, stop + 70)] == batches[stop:]


def test_cursors_are_kept_by_name():
    loader, _ = routed([4, 6])
    loader.batch(0)
    cursors = loader.state_dict()["cursors"]
    assert sum(cursors.values()) == 32
    loader.load_state_dict({"cursors": dict(reversed(cursors.items()))})
    assert loader.state_dict()["cursors"] == cursors
    with pytest.raises(UserError, match="no data position of task 'task 1'"):
        loader.load_state_dict({"cursors": {"task 0": 1}})


@pytest.mark.parametrize("bad", [[0.5], [0.5, -0.5], [0.5, np.nan], [0.0, 1.0]])
def test_probabilities_that_cannot_be_are_refused(bad):
    with pytest.raises(UserError, match="sampler: gave"):
        routed([5, 0], bad)


def test_samplers_follow_their_formulas():
    rows_T = np.array([100, 0, 1, 899])
    np.testing.assert_allclose(Proportional().probabilities(rows_T), rows_T / 1000)
    root = np.sqrt([100, 0, 1, 899])
    np.testing.assert_allclose(Temperature(2.0).probabilities(rows_T), root / root.sum())
    np.testing.assert_allclose(Temperature(5.0).probabilities(rows_T)[3], 899**0.2 / (100**0.2 + 1 + 899**0.2))
    np.testing.assert_allclose(Equal().probabilities(rows_T), [1 / 3, 0, 1 / 3, 1 / 3])
    with pytest.raises(UserError, match="tau is 0, expected a positive number"):
        Temperature(0)

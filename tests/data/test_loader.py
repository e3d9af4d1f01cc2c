import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrain.data.batch import Grid, Pairs
from mtrain.data.features import Numeric
from mtrain.data.inputs import ChunkedInputs, FeatureColumn, MemoryInputs
from mtrain.data.loader import BLOCK, Loader, Part, build_streams
from mtrain.data.order import mix, name_key, shuffled
from mtrain.data.samplers import Equal, Proportional
from mtrain.data.tables import ReadError
from mtrain.errors import UserError
from mtrain.parallel.plan import HOT, Plan
from mtrain.parallel.shard import Shard
from mtrain.parallel.world import World


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


@pytest.mark.parametrize("layout", ["grid", "pairs"])
def test_labels_split_into_consecutive_pieces_of_their_rows(layout):
    labels = random_pairs(np.random.default_rng(0))
    labels = labels.grid() if layout == "grid" else labels
    micro_batches = labels.split([8, 0, 13, 9])
    assert [piece.num_rows for piece in micro_batches] == [8, 0, 13, 9]
    for piece, start in zip(micro_batches, (0, 8, 8, 21), strict=True):
        wanted = labels.take(torch.arange(start, start + piece.num_rows))
        assert vars(piece).keys() == vars(wanted).keys()
        for name, value in vars(wanted).items():
            torch.testing.assert_close(getattr(piece, name), value, equal_nan=True)


@pytest.mark.parametrize("layout", ["grid", "pairs"])
def test_labels_of_some_tasks_are_numbered_anew_and_rows_without_labels_stay(layout):
    labels = random_pairs(np.random.default_rng(0))
    y_BT, own, unused = labels.grid().y_BT, np.array([1, 4, 6]), np.array([3, 29])
    labels = labels.grid() if layout == "grid" else labels
    found = labels.of_tasks(own)
    assert (found.num_rows, found.num_tasks) == (30, 3)
    torch.testing.assert_close(found.pairs().grid().y_BT, y_BT[:, own], equal_nan=True)
    y_BT[unused] = torch.nan
    assert labels.without(unused).num_rows == 30
    torch.testing.assert_close(labels.without(unused).pairs().grid().y_BT, y_BT, equal_nan=True)
    assert labels.of_tasks(own[:0]).count_T().tolist() == []


def grid_part(rows):
    """Inputs that are their own row number; the part holds every second row."""
    x = torch.arange(2 * rows, dtype=torch.float32)[:, None]
    row_R = torch.arange(0, 2 * rows, 2)
    return MemoryInputs(x), Part(row_R, Grid(row_R[:, None].float() * 10))


def row_loader(inputs, part, size, seed=1, **options):
    return Loader(inputs, part, build_streams(part, inputs, None, seed), Equal(), size, seed, **options)


@pytest.mark.parametrize(("rows", "size"), [(12, 4), (13, 5), (100, 1), (7, 7)])
def test_a_loader_gives_every_row_once_in_each_epoch_with_its_own_labels(rows, size):
    inputs, part = grid_part(rows)
    loader = row_loader(inputs, part, size)
    assert loader.steps_per_epoch == -(-rows // size)
    seen = []
    for step in range(3 * rows):
        (batch,) = loader.batch(step)
        assert len(batch.row_B) == size
        assert batch.x_BF[:, 0].tolist() == batch.row_B.tolist()
        assert (batch.labels.y_BT[:, 0] / 10).tolist() == batch.row_B.tolist()
        seen += batch.row_B.tolist()
    for epoch in range(len(seen) // rows):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == part.row_R.tolist()
    assert row_loader(inputs, part, size, seed=2).batch(0)[0].row_B.tolist() != seen[:size] or size == 1


def test_micro_batches_are_consecutive_pieces_of_the_batch_of_about_equal_size():
    inputs, part = grid_part(50)
    whole, loader = row_loader(inputs, part, 30), row_loader(inputs, part, 30, micro_batches=4)
    for step in range(10):
        (batch,), micro_batches = whole.batch(step), loader.batch(step)
        assert [len(piece.row_B) for piece in micro_batches] == [8, 8, 7, 7]
        for name in ("x_BF", "row_B"):
            torch.testing.assert_close(torch.cat([getattr(piece, name) for piece in micro_batches]), getattr(batch, name))
        torch.testing.assert_close(torch.cat([piece.labels.y_BT for piece in micro_batches]), batch.labels.y_BT)


class Fixed:
    def __init__(self, probability_T):
        self.probability_T = np.asarray(probability_T)

    def probabilities(self, rows_T):
        return self.probability_T


class Annealed:
    """Probabilities that change from block to block with the sampler's own state."""

    def __init__(self):
        self.calls = 0

    def probabilities(self, rows_T):
        self.calls += 1
        return rows_T ** (1 / self.calls)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


class Numbers:
    """A table whose column x holds the row's number, in chunks of given sizes; `broken` chunks cannot be read."""

    column_names = ("x",)

    def __init__(self, sizes, broken=(), delay=0.0):
        self.start_C = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.key_C = mix(np.arange(1, len(sizes) + 1, dtype=np.uint64))
        self.broken, self.delay, self.reads, self.threads = set(broken), delay, [], set()

    def __len__(self):
        return int(self.start_C[-1])

    def read_chunk(self, chunk, columns):
        self.reads.append(chunk)
        self.threads.add(threading.get_ident())
        time.sleep(self.delay)
        if chunk in self.broken:
            raise ReadError(f"chunk {chunk} is broken")
        return pa.table({"x": np.arange(self.start_C[chunk], self.start_C[chunk + 1], dtype=np.float32)})

    def where(self, row):
        return f"row {row + 1}"


def chunked(table, row_N=None, budget=1e9, **options):
    feature = Numeric(standardize=False)
    feature.fit(np.arange(2.0)[:, None], ["x"])
    row_N = np.arange(len(table)) if row_N is None else row_N
    return ChunkedInputs(
        table, row_N, [FeatureColumn(["x"], "Numeric", feature)], budget, 0, **{"skip_failed": False} | options
    )


def routed_part(task_R, num_tasks, row_R=None):
    rows = len(task_R)
    row_R = np.arange(rows) if row_R is None else row_R
    y_R = torch.from_numpy(row_R).double()
    pairs = Pairs.of(torch.arange(rows), torch.from_numpy(task_R), y_R, None, rows, num_tasks)
    return Part(torch.from_numpy(row_R), pairs)


def routed(rows_T, sampler=None, size=32, seed=0):
    """A long table in memory with its tasks in random order."""
    task = np.random.default_rng(1).permutation(np.repeat(np.arange(len(rows_T)), rows_T))
    part = routed_part(task, len(rows_T))
    inputs = MemoryInputs(torch.arange(len(task), dtype=torch.float32)[:, None])
    streams = build_streams(part, inputs, [f"task {t}" for t in range(len(rows_T))], seed)
    return Loader(inputs, part, streams, sampler or Proportional(), size, seed), task


@settings(max_examples=30, deadline=None)
@given(data=st.data(), size=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_a_tasks_rows_in_a_step_are_its_expected_number_rounded_up_or_down(data, size, seed):
    rows_T = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(any))
    p_T = np.array(data.draw(st.lists(st.floats(0.001, 1), min_size=len(rows_T), max_size=len(rows_T))))
    loader, _ = routed(rows_T, Fixed(p_T), size, seed)
    p_T = np.where(np.array(rows_T) > 0, p_T, 0)
    p_T = p_T / p_T.sum()
    count_KT = np.concatenate([loader.counts(first, {}) for first in (0, 64, 128)])
    assert (count_KT.sum(1) == size).all()
    assert (abs(count_KT - size * p_T) < 1 + 1e-6).all()
    assert (count_KT[:, p_T == 0] == 0).all()
    assert abs(count_KT.mean(0) - size * p_T).max() < 0.25  # a multinomial draw would be off by several times that
    np.testing.assert_array_equal(loader.counts(75, {}), count_KT[75:128])


def test_a_loader_gives_every_row_of_a_task_once_in_each_of_its_epochs():
    rows_T = [1, 3, 20, 0, 100, 7]
    loader, task = routed(rows_T, Fixed([1, 1, 1, 5, 1, 1]))
    seen = [[] for _ in rows_T]
    for step in range(200):
        (batch,) = loader.batch(step)
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
    loader, _ = routed([5] * 30, Fixed([0] * 10 + [1e-12] * 10 + [0.1] * 10))
    assert sum(loader.counts(first, {})[:, :10].sum() for first in range(0, 640, BLOCK)) == 0


@pytest.mark.parametrize("bad", [[0.5], [0.5, -0.5], [0.5, np.nan], [0.0, 1.0]])
def test_probabilities_that_cannot_be_are_refused(bad):
    with pytest.raises(UserError, match="sampler: gave"):
        routed([5, 0], Fixed(bad))[0].batch(0)


@st.composite
def problems(draw):
    """Tasks with files of their own, or a long table whose chunks hold rows of all tasks; some rows are not in the part."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows_T = rng.integers(1, draw(st.sampled_from([3, 40, 300])), draw(st.integers(1, 12)))
    sizes = []
    most = draw(st.sampled_from([1, 7, 50, 1000]))
    for rows in rows_T if (own_files := draw(st.booleans())) else [rows_T.sum()]:
        while rows:
            sizes.append(min(int(rng.integers(1, most + 1)), rows))
            rows -= sizes[-1]
    task = np.repeat(np.arange(len(rows_T)), rows_T)
    task = task if own_files else rng.permutation(task)
    row_R = np.flatnonzero(rng.random(len(task)) < draw(st.sampled_from([0.3, 1.0])))
    row_R = row_R if len(row_R) else np.array([0])
    return {
        "sizes": sizes, "task": task, "row_R": row_R, "num_tasks": len(rows_T), "by_task": draw(st.booleans()),
        "size": draw(st.integers(1, 60)), "seed": draw(st.integers(0, 2**32)), "budget": draw(st.sampled_from([0, 400, 1e9])),
    }  # fmt: skip


def loader_of(problem, memory=False, **options):
    table = Numbers(problem["sizes"])
    row_R, task_R = problem["row_R"], problem["task"][problem["row_R"]]
    part = routed_part(task_R, problem["num_tasks"], row_R)
    inputs = chunked(table, budget=problem["budget"])
    if memory:
        inputs = MemoryInputs(torch.arange(len(table), dtype=torch.float32)[:, None])
    names = [f"task {t}" for t in range(problem["num_tasks"])] if problem["by_task"] else None
    streams = build_streams(part, inputs, names, problem["seed"])
    sampler = Annealed() if problem["by_task"] else Equal()
    return Loader(inputs, part, streams, sampler, problem["size"], problem["seed"], **options)


def rows_of(loader, steps):
    rows = []
    for step in steps:
        (batch,) = loader.batch(step)
        assert batch.x_BF[:, 0].long().tolist() == batch.row_B.tolist() == batch.labels.y_P.long().tolist()
        rows.append(batch.row_B.tolist())
    loader.close()
    return rows


@settings(max_examples=60, deadline=None)
@given(problem=problems(), stops=st.lists(st.integers(0, 150), max_size=3))
def test_streams_give_every_row_once_in_each_epoch_also_after_restores_at_random_steps(problem, stops):
    whole = rows_of(loader_of(problem), range(160))
    stream = problem["task"] if problem["by_task"] else np.zeros_like(problem["task"])
    for s in np.unique(stream[problem["row_R"]]):
        seen = [row for rows in whole for row in rows if stream[row] == s]
        own = sorted(problem["row_R"][stream[problem["row_R"]] == s].tolist())
        for epoch in range(len(seen) // len(own)):
            assert sorted(seen[epoch * len(own) : (epoch + 1) * len(own)]) == own
    micro_batches, state, at = [], None, 0
    for stop in [*sorted(stops), 160]:
        loader = loader_of(problem)
        if state is not None:
            loader.load_state_dict(state)
        micro_batches += rows_of(loader, range(at, stop))
        state, at = loader.state_dict(), stop
    assert micro_batches == whole


class Rank(World):
    """One of several ranks that are threads of this process."""

    def __init__(self, rank, size, meeting, given):
        super().__init__()
        self.rank, self.size, self.meeting, self.given = rank, size, meeting, given

    def gather_objects(self, value):
        self.given[self.rank] = value
        self.meeting.wait(60)
        every = list(self.given)
        self.meeting.wait(60)
        return every


def on_ranks(ranks, function):
    """What the function gives for the world of each rank."""
    meeting, given = threading.Barrier(ranks), [None] * ranks

    def one(rank):
        try:
            return function(Rank(rank, ranks, meeting, given))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))


MODES = {True: ["owners", "hot", "exchange", "gather"], False: ["gather", "replicated"]}


def plan_of(num_tasks, ranks, mode):
    """Tasks at ranks in turn; mode hot: owners, with the first and last tasks on all ranks."""
    owner_T = np.arange(num_tasks) % ranks
    owner_T[{"hot": [0, -1], "replicated": slice(None)}.get(mode, [])] = HOT
    names = tuple(f"task {t}" for t in range(num_tasks))
    return Plan(names, owner_T, np.ones(ranks), mode if mode in ("exchange", "gather") else "owners")


def check_ranks(batches, shards, task):
    """The batches of one step and micro-batch of all ranks: each row is read by one of them, in dealt modes as many by each,
    and each label is where its head is, once. Returns the rows in the order of the batch, where ranks tell it, else sorted."""
    ranks, plan = len(batches), shards[0].plan
    read = [batch.row_B.tolist() for batch in batches]
    rows = sorted(row for rows in read for row in rows)
    for batch in batches:
        assert batch.x_BF[:, 0].long().tolist() == batch.row_B.tolist()
    heads = [batch.row_B if batch.row_H is None else batch.row_H for batch in batches]
    labels = []
    for rank, (batch, row_H, shard) in enumerate(zip(batches, heads, shards, strict=True)):
        assert batch.labels.num_rows == len(row_H)
        assert batch.labels.num_tasks == len(shard.own)
        pairs = batch.labels.pairs()
        found = row_H[pairs.row_P].tolist()
        assert pairs.y_P.long().tolist() == found
        assert shard.own[pairs.task_P.numpy()].tolist() == task[found].tolist()
        assert set(plan.owner_T[task[found]].tolist()) <= {rank, HOT}
        labels += found
    assert sorted(labels) == rows
    if plan.mode == "owners":
        assert all(batch.row_H is None for batch in batches)
        return rows
    assert max(map(len, read)) - min(map(len, read)) <= 1
    if plan.mode == "gather":
        order = heads[0].tolist()
        assert all(row_H.tolist() == order for row_H in heads)
        assert [order[rank::ranks] for rank in range(ranks)] == read
        assert all(batch.deal.total == len(order) for batch in batches)
        return order
    sent = [row_B.split(batch.deal.sent_R) for row_B, batch in zip((b.row_B for b in batches), batches, strict=True)]
    for rank, (batch, row_H) in enumerate(zip(batches, heads, strict=True)):  # as an all-to-all lays out what it gets
        assert torch.cat([of_rank[rank] for of_rank in sent]).tolist() == row_H.tolist()
        assert batch.deal.received_R == [len(of_rank[rank]) for of_rank in sent]
        assert batch.labels.pairs().row_P.tolist() == list(range(len(row_H)))
    return rows


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rows=st.integers(0, 60), ranks=st.integers(1, 7), micro_batches=st.integers(1, 5))
def test_a_deal_gives_each_place_of_a_batch_to_one_rank_and_each_label_to_its_owner(data, rows, ranks, micro_batches):
    num_tasks = data.draw(st.integers(1, 9))
    task = np.random.default_rng(data.draw(st.integers(0, 2**32))).integers(num_tasks, size=rows)
    mode = data.draw(st.sampled_from(["owners", "hot", "exchange", "gather"]))
    plan = plan_of(num_tasks, ranks, mode)
    shards = [Shard(Rank(rank, ranks, None, None), plan) for rank in range(ranks)]
    dealt = [list(shard.deal(task, rows, micro_batches)) for shard in shards]
    assert all(len(deals) == micro_batches for deals in dealt)
    for places, deals in zip(np.array_split(np.arange(rows), micro_batches), zip(*dealt, strict=True), strict=True):
        read = np.concatenate([deal.read for deal in deals])
        if plan.mode != "owners":  # a micro-batch is the same on any number of ranks
            np.testing.assert_array_equal(np.sort(read), places)
            assert {deal.total for deal in deals} == {len(places)}
            for rank, deal in enumerate(deals):
                owned = plan.owner_T[task[places]] == rank
                np.testing.assert_array_equal(np.sort(deal.heads), places if mode == "gather" else places[owned])
    for rank, deals in enumerate(dealt):
        sizes = [len(deal.read) for deal in deals]
        if plan.mode == "owners":
            assert max(sizes) - min(sizes) <= 1
            owner_P = plan.owner_T[task[np.concatenate([deal.read for deal in deals])]]
            assert set(owner_P.tolist()) <= {rank, HOT}
    read = np.concatenate([deal.read for deals in dealt for deal in deals])
    np.testing.assert_array_equal(np.sort(read), np.arange(rows))
    counted = np.concatenate([shard.own[shard.counts] for shard in shards])
    assert sorted(counted.tolist()) == list(range(num_tasks))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rows_of_hot_tasks_are_dealt_evenly(ranks):
    task = np.zeros(60, dtype=np.int64)
    plan = replace(plan_of(2, ranks, "owners"), owner_T=np.array([HOT, 0]))
    sizes = [len(next(Shard(Rank(rank, ranks, None, None), plan).deal(task, 60)).read) for rank in range(ranks)]
    assert sizes == [60 // ranks] * ranks


@settings(max_examples=10, deadline=None)
@given(problem=problems(), data=st.data(), stop=st.integers(0, 50), micro_batches=st.sampled_from([1, 1, 3]))
def test_any_number_of_ranks_sees_the_rows_of_one_process(problem, data, stop, micro_batches):
    task, num_tasks = problem["task"], problem["num_tasks"]
    one = loader_of(problem, micro_batches=micro_batches)
    whole = [[micro.row_B.tolist() for micro in one.batch(step)] for step in range(50)]
    one.close()
    state = None
    for ranks, steps in ((4, range(stop)), (2, range(stop, 50)), (3, range(stop, 50)), (7, range(stop, 50))):
        plan = plan_of(num_tasks, ranks, data.draw(st.sampled_from(MODES[problem["by_task"]])))

        def batches_of(world, plan=plan, steps=steps, state=state):
            loader = loader_of(problem, shard=Shard(world, plan), micro_batches=micro_batches)
            if state is not None:  # saved on 4 ranks
                loader.load_state_dict(state)
            batches = [loader.batch(step) for step in steps]
            loader.close()
            return loader, batches

        loaders, found = zip(*on_ranks(ranks, batches_of), strict=True)
        shards = [loader.shard for loader in loaders]
        for i, step in enumerate(steps):
            seen = [check_ranks(micro, shards, task) for micro in zip(*(of_rank[i] for of_rank in found), strict=True)]
            assert Counter(row for rows in seen for row in rows) == Counter(row for rows in whole[step] for row in rows)
            if plan.mode == "gather":
                assert seen == whole[step]
            elif plan.mode == "exchange":
                assert seen == [sorted(rows) for rows in whole[step]]
        states = [loader.state_dict() for loader in loaders]
        assert all(of_rank == states[0] for of_rank in states)
        if state is None:
            state = states[-1]
        if plan.mode == "owners" and problem["by_task"]:  # a rank reads the chunks of its own tasks only
            for loader in loaders:
                own = np.isin(task, loader.shard.own)
                assert set(loader.inputs.table.reads) <= set(loader.inputs.chunk_N[own].tolist())


@settings(max_examples=25, deadline=None)
@given(problem=problems(), data=st.data(), ranks=st.integers(2, 5), size=st.integers(1, 50))
def test_scoring_reads_every_row_once_over_all_ranks(problem, data, ranks, size):
    task, row_R = problem["task"], problem["row_R"]
    plan = plan_of(problem["num_tasks"], ranks, data.draw(st.sampled_from(MODES[problem["by_task"]])))
    part = routed_part(task[row_R], problem["num_tasks"], row_R)
    part = replace(part, original=part.labels)

    def batches_of(world):
        inputs, shard = chunked(Numbers(problem["sizes"])), Shard(world, plan)
        return shard, list(part.batches(inputs, size, shard, problem["by_task"]))

    shards, found = zip(*on_ranks(ranks, batches_of), strict=True)
    rows = []
    for number, of_ranks in enumerate(zip(*found, strict=True)):
        for batch, original in of_ranks:
            assert original.y_P.tolist() == batch.labels.y_P.tolist()
        seen = check_ranks([batch for batch, _ in of_ranks], shards, task)
        assert sorted(seen) == row_R[number * size : (number + 1) * size].tolist()
        rows += seen
    assert sorted(rows) == row_R.tolist()


class Even(Numeric):
    """A user's feature: odd numbers cannot be used."""

    on_invalid = "skip"

    def encode(self, table):
        encoded = super().encode(table)
        return replace(encoded, valid=encoded.values[:, 0] % 2 == 0)


@pytest.mark.parametrize("mode", ["owners", "hot", "exchange", "gather"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_rows_that_cannot_be_used_stay_as_zeros_without_labels_on_all_ranks(mode, ranks):
    task = np.random.default_rng(0).integers(5, size=300)
    plan = plan_of(5, ranks, mode if ranks > 1 else "owners")
    part = routed_part(task, 5)

    def batches_of(world):
        feature = Even(standardize=False)
        feature.fit(np.arange(2.0)[:, None], ["x"])
        inputs = ChunkedInputs(Numbers([50] * 6), np.arange(300), [FeatureColumn(["x"], "Even", feature)], 1e9, 1e9, False)
        streams = build_streams(part, inputs, [f"task {t}" for t in range(5)], 0)
        shard = Shard(world, plan)
        loader = Loader(inputs, part, streams, Proportional(), 20, 0, shard=shard, micro_batches=2)
        batches = [micro for step in range(20) for micro in loader.batch(step)]
        loader.close()
        return batches + [batch for batch, _ in part.batches(inputs, 64, shard, True)]

    num_lost = 0
    for of_ranks in zip(*on_ranks(ranks, batches_of), strict=True):
        read, labelled = [], []
        for batch in of_ranks:
            torch.testing.assert_close(batch.x_BF[:, 0], torch.where(batch.row_B % 2 == 0, batch.row_B, 0).float())
            pairs = batch.labels.pairs()
            row_H = batch.row_B if batch.row_H is None else batch.row_H
            assert pairs.y_P.long().tolist() == row_H[pairs.row_P].tolist()
            assert pairs.num_rows == len(row_H)
            read += batch.row_B.tolist()
            labelled += row_H[pairs.row_P].tolist()
        assert sorted(labelled) == sorted(row for row in read if row % 2 == 0)
        num_lost += len(read) - len(labelled)
    assert num_lost > 150


@pytest.mark.parametrize("mode", ["owners", "hot", "exchange", "gather"])
def test_a_task_that_one_rank_cannot_read_is_left_out_by_all_at_the_step_of_one_process(mode):
    task = np.repeat(np.arange(3), 200)
    part = routed_part(task, 3)

    def batches_of(world, plan=None):
        inputs = chunked(Numbers([100] * 6, broken=[3]), skip_failed=True)
        shard = None if plan is None else Shard(world, plan)
        streams = build_streams(part, inputs, ["a", "b", "c"], 0)
        loader = Loader(inputs, part, streams, Proportional(), 30, 0, shard=shard)
        rows = [loader.batch(step)[0].row_B.tolist() for step in range(100)]
        loader.close()
        return rows, loader.dropped

    whole, dropped = batches_of(None)
    assert list(dropped) == ["b"]
    for ranks in (2, 4):
        plan = plan_of(3, ranks, mode)
        found = on_ranks(ranks, lambda world, plan=plan: batches_of(world, plan))
        assert all(of_rank == dropped for _, of_rank in found)
        for step, rows in enumerate(whole):
            assert sorted(row for of_rank, _ in found for row in of_rank[step]) == sorted(rows)


@settings(max_examples=20, deadline=None)
@given(problem=problems())
def test_a_stream_of_one_chunk_has_the_order_of_memory(problem):
    problem["sizes"] = [len(problem["task"])]
    assert rows_of(loader_of(problem), range(80)) == rows_of(loader_of(problem, memory=True), range(80))


def test_chunks_follow_each_other_so_that_few_are_in_use():
    table = Numbers([50] * 40)
    loader = Loader(
        inputs := chunked(table, budget=20 * 50 * 4), part := routed_part(np.zeros(2000, dtype=np.int64), 1),
        build_streams(part, inputs, ["a"], 0), Proportional(), 10, 0,
    )  # fmt: skip
    orders = []
    for rows in np.concatenate(rows_of(loader, range(400))).reshape(2, -1):
        chunk = rows.reshape(40, 50) // 50
        assert (chunk == chunk[:, :1]).all()
        orders.append(chunk[:, 0].tolist())
        within = rows.reshape(40, 50) % 50
        assert len({tuple(each) for each in within.tolist()}) == 40
    assert orders[0] != orders[1]
    slab = 64 * 10 // 50 + 1
    assert len(table.reads) < 2 * 40 + 2 * slab + 400 // 64  # each once, what is read ahead, and one again for each slab


def test_the_rows_of_a_grid_are_mixed_over_several_chunks():
    table = Numbers([50] * 40)
    inputs = chunked(table)
    part = Part(torch.arange(2000), Grid(torch.arange(2000.0)[:, None]))
    rows = row_loader(inputs, part, 400).batch(0)[0].row_B.numpy()
    assert len(np.unique(rows // 50)) == 8
    assert len(set(rows.tolist())) == 400


def test_restoring_reads_nothing_of_what_went_before():
    def made(table):
        inputs, part = chunked(table), routed_part(np.zeros(10_000, dtype=np.int64), 1)
        return Loader(inputs, part, build_streams(part, inputs, ["a"], 0), Proportional(), 10, 0)

    first = made(Numbers([50] * 200))
    consumed = np.concatenate(rows_of(first, range(500))) // 50
    table = Numbers([50] * 200)
    after = made(table)
    after.load_state_dict(first.state_dict())
    rows_of(after, range(500, 505))
    assert set(consumed.tolist()).isdisjoint(table.reads)
    assert 0 < len(table.reads) <= 3 * 14


def test_reading_ahead_is_bounded_and_off_the_training_thread():
    table = Numbers([1000] * 30, delay=0.001)
    inputs, part = chunked(table, budget=8000), routed_part(np.zeros(30_000, dtype=np.int64), 1)
    loader = Loader(inputs, part, build_streams(part, inputs, ["a"], 0), Proportional(), 50, 0)
    loader.batch(0)
    time.sleep(0.3)
    assert len(table.reads) <= 14  # a slab in use and two ahead, of 64 steps each: 9,600 rows
    assert threading.get_ident() not in table.threads
    assert inputs._kept_bytes <= 8000
    loader.close()
    reads = len(table.reads)
    time.sleep(0.1)
    assert len(table.reads) == reads


def test_chunks_that_do_not_fit_do_not_push_out_those_that_do():
    table = Numbers([100] * 20)
    inputs = chunked(table, budget=10 * 400)
    for _ in range(5):
        x, ok = inputs.gather(np.arange(2000))
        assert ok is None
        assert x[:, 0].tolist() == list(range(2000))
    assert len(table.reads) == 20 + 4 * 10


def test_a_chunk_that_cannot_be_read_stops_the_run_or_leaves_its_tasks_out():
    task = np.repeat(np.arange(3), 200)

    def made(skip):
        inputs, part = chunked(Numbers([100] * 6, broken=[3]), skip_failed=skip), routed_part(task, 3)
        return Loader(inputs, part, build_streams(part, inputs, ["a", "b", "c"], 0), Proportional(), 30, 0)

    with pytest.raises(ReadError, match="chunk 3 is broken"):
        rows_of(made(skip=False), range(100))
    whole = made(skip=True)
    batches = rows_of(whole, range(130))
    assert list(whole.dropped) == ["b"]
    gone = whole.dropped["b"]
    tasks = [set(task[rows].tolist()) for rows in batches]
    assert set.union(*tasks[:gone]) == {0, 1, 2}
    assert {row // 100 for rows in batches[:gone] for row in rows if task[row] == 1} <= {2}
    assert all(found == {0, 2} for found in tasks[gone:])
    assert {len(rows) for rows in batches[BLOCK:]} == {30}  # in the next block the others take its place
    assert "chunk 3 is broken" in whole.inputs.notes()[0]
    for stop in (gone, gone + 5, 100):
        before = made(skip=True)
        rows_of(before, range(stop))
        after = made(skip=True)
        after.load_state_dict(before.state_dict())
        assert rows_of(after, range(stop, 130)) == batches[stop:]


def test_a_task_whose_rows_changed_since_the_checkpoint_is_named_or_left_out():
    def made(rows_T):
        task = np.repeat(np.arange(2), rows_T)
        inputs, part = MemoryInputs(torch.zeros(len(task), 1)), routed_part(task, 2)
        return Loader(inputs, part, build_streams(part, inputs, ["task 0", "task 1"], 0), Proportional(), 32, 0)

    loader = made([4, 6])
    loader.batch(0)
    state = loader.state_dict()
    assert sum(state["cursors"].values()) == 32
    for rows_T, named in (([4, 7], "task 1"), ([3, 6], "task 0"), ([6, 4], "task 0")):
        other = made(rows_T)
        with pytest.raises(UserError, match=f"checkpoint: task '{named}' has .* the data have changed"):
            other.load_state_dict(state)
    other.skip_changed = True
    other.load_state_dict(state)
    assert list(other.dropped) == ["task 0", "task 1"]


def test_tasks_that_are_new_since_the_checkpoint_begin_and_those_that_are_gone_leave_nothing():
    def made(names):
        task = np.repeat(np.arange(3), 5)
        inputs, part = MemoryInputs(torch.arange(15.0)[:, None]), routed_part(task, 3)
        return Loader(inputs, part, build_streams(part, inputs, names, 0), Proportional(), 30, 0)

    loader = made(["a", "b", "c"])
    loader.batch(0)
    state = loader.state_dict()
    assert state["cursors"] == {"a": 10, "b": 10, "c": 10}
    other = made(["new", "c", "b"])
    other.load_state_dict(state)
    assert other.state_dict()["cursors"] == {"new": 0, "c": 10, "b": 10}
    assert other.state_dict()["rows"].keys() == {"new", "c", "b"}
    other.batch(1)
    assert other.state_dict()["cursors"] == {"new": 10, "c": 20, "b": 20}


def test_the_state_of_a_thousand_tasks_is_small():
    import pickle

    loader, _ = routed([3] * 1000)
    loader.batch(0)
    assert len(pickle.dumps(loader.state_dict())) < 100_000

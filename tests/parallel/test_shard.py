"""What ranks read, and what their heads read: properties, with all ranks of a plan in one process."""

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrain.parallel.plan import HOT, Plan
from mtrain.parallel.shard import Shard


def shards(owner_T, ranks, mode):
    plan = Plan(tuple(f"t{t}" for t in range(len(owner_T))), np.array(owner_T, dtype=np.int64), np.ones(ranks), mode)
    worlds = [SimpleNamespace(rank=rank, size=ranks, is_first=rank == 0, sum=lambda x: x) for rank in range(ranks)]
    return [Shard(world, plan) for world in worlds]


@st.composite
def batches(draw, modes=("owners", "exchange", "gather")):
    """Shards of all ranks, the task of each row (None: of many), rows and pieces."""
    ranks, mode = draw(st.integers(1, 9)), draw(st.sampled_from(modes))
    owners = st.integers(HOT if mode == "owners" else 0, ranks - 1)
    owner_T = draw(st.lists(owners, min_size=1, max_size=7))
    task_P = np.array(draw(st.lists(st.integers(0, len(owner_T) - 1), max_size=40)), dtype=np.int64)
    given_task_P = None if mode == "gather" else task_P
    return shards(owner_T, ranks, mode), given_task_P, len(task_P), draw(st.integers(1, 4))


def dealt(batch):
    """For each piece, the deals of all ranks."""
    every, task_P, rows, pieces = batch
    return list(zip(*(list(shard.deal(task_P, rows, pieces)) for shard in every), strict=True))


@settings(max_examples=300, deadline=None)
@given(batches())
def test_every_row_is_read_once_by_one_rank(batch):
    _, _, rows, pieces = batch
    found = dealt(batch)
    assert len(found) == pieces
    assert sorted(place for deals in found for deal in deals for place in deal.read.tolist()) == list(range(rows))


@settings(max_examples=300, deadline=None)
@given(batches(("owners", "exchange")))
def test_each_head_reads_the_rows_of_its_task_once(batch):
    every, task_P, rows, _ = batch
    times_P = np.zeros(rows, dtype=int)
    for deals in dealt(batch):
        for shard, deal in zip(every, deals, strict=True):
            heads = deal.read if deal.heads is None else deal.heads
            assert np.isin(task_P[heads], shard.own).all()
            times_P[heads] += 1
    assert (times_P == 1).all()


@settings(max_examples=200, deadline=None)
@given(batches(("owners",)))
def test_rows_of_hot_tasks_are_read_in_turn_and_others_by_their_owner(batch):
    every, task_P, rows, pieces = batch
    ranks, owner_T = len(every), every[0].plan.owner_T
    for rank, shard in enumerate(every):
        wanted = [p for p in range(rows) if (p % ranks if owner_T[task_P[p]] == HOT else owner_T[task_P[p]]) == rank]
        found = [deal.read.tolist() for deal in shard.deal(task_P, rows, pieces)]
        assert [place for piece in found for place in piece] == wanted
        assert max(map(len, found)) - min(map(len, found)) <= 1


@settings(max_examples=200, deadline=None)
@given(batches(("exchange", "gather")))
def test_dealt_rows_are_shared_evenly_in_every_piece(batch):
    _, _, rows, pieces = batch
    totals = []
    for deals in dealt(batch):
        sizes = [len(deal.read) for deal in deals]
        assert {deal.total for deal in deals} == {sum(sizes)}
        assert max(sizes) - min(sizes) <= 1
        totals.append(sum(sizes))
    assert sum(totals) == rows
    assert max(totals) - min(totals) <= 1
    assert len(totals) == pieces


@settings(max_examples=300, deadline=None)
@given(batches(("exchange",)))
def test_exchanged_rows_arrive_where_and_in_the_order_that_heads_expect(batch):
    for deals in dealt(batch):
        sent = [np.split(deal.read, np.cumsum(deal.sent_R)[:-1]) for deal in deals]
        for rank, deal in enumerate(deals):
            arrived = [runs[rank] for runs in sent]
            assert [len(run) for run in arrived] == deal.received_R
            assert np.concatenate(arrived).tolist() == deal.heads.tolist()
            assert len(deal.sent_R) == len(deals)
            assert sum(deal.sent_R) == len(deal.read)


@settings(max_examples=200, deadline=None)
@given(batches(("gather",)))
def test_gathered_rows_are_those_of_the_piece_in_order_on_every_rank(batch):
    for deals in dealt(batch):
        for rank, deal in enumerate(deals):
            assert deal.heads.tolist() == deals[0].heads.tolist()
            assert deal.read.tolist() == deal.heads[rank :: len(deals)].tolist()  # as `World.gather_dealt` expects


@settings(max_examples=100, deadline=None)
@given(batches())
def test_each_task_is_counted_once_and_held_where_the_plan_says(batch):
    every = batch[0]
    owner_T, counted, held = every[0].plan.owner_T, [], []
    for rank, shard in enumerate(every):
        counted += shard.own[shard.counts].tolist()
        held += shard.own.tolist()
        assert set(shard.own.tolist()) == {t for t, owner in enumerate(owner_T.tolist()) if owner in (rank, HOT)}
        assert shard.has_all == (len(shard.own) == len(owner_T))
        values = torch.arange(10.0, 10.0 + len(owner_T))
        assert shard.local(values).tolist() == values[shard.own].tolist()
    assert sorted(counted) == list(range(len(owner_T)))
    assert len(held) == len(owner_T) + (len(every) - 1) * int((owner_T == HOT).sum())


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(1, 3))
def test_the_parts_of_all_ranks_add_up_to_the_values_everywhere(batch, rows):
    """With a world that adds nothing, each rank gives its own part."""
    every = batch[0]
    owner_T, ranks = every[0].plan.owner_T, len(every)
    values = torch.randint(-9, 9, (ranks, rows, len(owner_T)), generator=torch.Generator().manual_seed(0)).float()
    parts = [shard.everywhere(values[rank][:, shard.own], torch.tensor(2.0)) for rank, shard in enumerate(every)]
    for t, owner in enumerate(owner_T.tolist()):
        expected = values[:, :, t].sum(0) if owner == HOT else values[owner, :, t]
        assert torch.equal(sum(part for part, _ in parts)[:, t], expected)
    assert float(sum(number for _, number in parts)) == 2 * ranks


def test_a_batch_of_no_rows_gives_every_rank_empty_pieces():
    for mode in ("owners", "exchange", "gather"):
        for shard in shards([0, 1, 2], 3, mode):
            task_P = None if mode == "gather" else np.zeros(0, dtype=np.int64)
            assert [len(deal.read) for deal in shard.deal(task_P, 0, 2)] == [0, 0]


def test_replicated_heads_are_all_on_every_rank_with_rows_in_turn():
    world = SimpleNamespace(rank=1, size=3, is_first=False)
    shard = Shard.replicated(world, ["a", "b"])
    assert shard.has_all
    assert shard.hot.all()
    assert not shard.counts.any()
    (deal,) = shard.deal(None, 8)
    assert (deal.read.tolist(), deal.heads) == ([1, 4, 7], None)

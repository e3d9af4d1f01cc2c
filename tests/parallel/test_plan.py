import itertools
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mtrain.errors import UserError
from mtrain.parallel.plan import (
    EVEN,
    HEAD_BYTES,
    HOT,
    Plan,
    Workload,
    _by_load,
    _greedy,
    flows,
    make_plan,
    plain_ddp,
    wire_bytes,
)

WHOLE = st.integers(0, 50)  # sums of whole numbers are exact
LOADS = st.dictionaries(st.text(max_size=3), WHOLE, max_size=30)


def assign(names, load_T, ranks):
    """Owners by load alone, whatever heads take of memory."""
    return Plan(tuple(names), *_greedy(_by_load(names, load_T), load_T, ranks, np.zeros(len(names)), np.inf))


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


def workload(rows, params, *, by_task=True, names=None, width=64, trunk=1000, trained=None, batch=None, **more):
    return Workload(
        [f"task {i}" for i in range(len(rows))] if names is None else names,
        np.array(rows, dtype=float),
        np.array(params, dtype=np.int64),
        by_task,
        batch=round(sum(rows)) if batch is None else batch,
        width=width,
        trunk_params=trunk,
        trunk_trained=trunk if trained is None else trained,
        **more,
    )


def zipf(tasks, batch=1024, head=65, **more):
    share = 1 / np.arange(1, tasks + 1)
    return workload(share / share.sum() * batch, [head] * tasks, batch=batch, **more)


@st.composite
def workloads(draw, most=30, by_task=None):
    """Small whole numbers, whose sums are exact."""
    names = draw(st.lists(st.text(max_size=3), min_size=1, max_size=most, unique=True))
    rows = [draw(st.integers(0, 40)) for _ in names]
    params = [draw(st.integers(1, 9)) for _ in names]
    by_task = draw(st.booleans()) if by_task is None else by_task
    return workload(
        rows, params, by_task=by_task, names=names, width=draw(st.sampled_from([1, 8, 100])), trunk=draw(st.integers(0, 30))
    )


def bytes_by_rank(plan, work):
    """Bytes of the heads that each rank holds, by a plain loop."""
    held = [0] * plan.ranks
    for owner, params in zip(plan.owner_T.tolist(), work.head_params_T.tolist(), strict=True):
        for rank in range(plan.ranks) if owner == HOT else [owner]:
            held[rank] += HEAD_BYTES * params
    return held


def work_by_rank(plan, work):
    """Multiply-adds of each rank, by a plain loop."""
    deals = plan.mode != "owners"
    done = [work.trunk_params * work.batch / plan.ranks if deals else 0.0 for _ in range(plan.ranks)]
    for owner, rows, head in zip(plan.owner_T.tolist(), work.rows_T.tolist(), work.head_params_T.tolist(), strict=True):
        cost = head + (0 if deals else work.trunk_params)
        for rank in range(plan.ranks) if owner == HOT else [owner]:
            done[rank] += rows * cost / (plan.ranks if owner == HOT else 1)
    return done


@settings(max_examples=300, deadline=None)
@given(work=workloads(), ranks=st.integers(1, 9))
def test_every_task_has_one_owner_or_is_hot_and_the_work_is_all_there(work, ranks):
    plan = make_plan(work, ranks)
    assert plan.names == tuple(work.names)
    assert plan.ranks == ranks
    assert ((plan.owner_T == HOT) | ((plan.owner_T >= 0) & (plan.owner_T < ranks))).all()
    assert plan.load_R == pytest.approx(work_by_rank(plan, work))
    assert plan.mode == ("gather" if ranks > 1 and not work.by_task else plan.mode)
    if plan.mode != "owners" or ranks == 1:
        assert HOT not in plan.owner_T
    if HOT in plan.owner_T:
        assert plan.imbalance <= EVEN
        hot_bytes = 2 * 4 * work.head_params_T[plan.hot].sum()
        assert hot_bytes <= 2 * 4 * work.batch / ranks * work.width  # no more than features there and back
        coldest = min(work.rows_T[plan.hot] * (work.head_params_T[plan.hot] + work.trunk_params))
        assert coldest >= max((work.rows_T * (work.head_params_T + work.trunk_params))[plan.owner_T != HOT], default=0)


@settings(max_examples=100, deadline=None)
@given(work=workloads(), ranks=st.integers(1, 9), random=st.randoms(use_true_random=False))
def test_the_order_of_the_tasks_does_not_change_a_plan(work, ranks, random):
    at = random.sample(range(len(work.names)), len(work.names))
    names = [work.names[t] for t in at]
    other = workload(
        work.rows_T[at], work.head_params_T[at], by_task=work.by_task, names=names, width=work.width, trunk=work.trunk_params
    )
    one, two = make_plan(work, ranks), make_plan(other, ranks)
    assert one.owner_T[at].tolist() == two.owner_T.tolist()
    assert one.load_R.tolist() == two.load_R.tolist()
    assert (one.mode, one.why) == (two.mode, two.why)


def naive_plan(work, ranks):
    """(mode, owners) as the rules say, trying every number of hot tasks in turn."""
    rows, head, trunk = work.rows_T, work.head_params_T, work.trunk_params
    whole = rows * (head + trunk)
    order = sorted(range(len(rows)), key=lambda t: (-whole[t], work.names[t]))

    def greedy(order, load, start):
        totals, owner = [start] * ranks, [HOT] * len(rows)
        for task in order:
            owner[task] = totals.index(min(totals))
            totals[owner[task]] += load[task]
        return owner, max(totals)

    by_head = sorted(range(len(rows)), key=lambda t: (-(rows * head)[t], work.names[t]))
    if not work.by_task:
        return "gather" if ranks > 1 else "owners", greedy(by_head, rows * head, 0)[0]
    for number in range(len(rows) + 1):
        hot = order[:number]
        if head[hot].sum() * ranks <= work.batch * work.width:
            owner, busiest = greedy(order[number:], whole, whole[hot].sum() / ranks)
            even = EVEN * whole.sum() / ranks
            assume(even == 0 or abs(busiest / even - 1) > 1e-9)  # else rounding decides
            if busiest <= even:
                return "owners", owner
    owner, busiest = greedy(by_head, rows * head, trunk * work.batch / ranks)
    at_owners, most = greedy(order, whole, 0.0)
    return ("exchange", owner) if busiest < most else ("owners", at_owners)


@settings(max_examples=300, deadline=None)
@given(work=workloads(most=10), ranks=st.integers(1, 5))
def test_a_plan_is_what_trying_every_number_of_hot_tasks_gives(work, ranks):
    plan = make_plan(work, ranks)
    assert (plan.mode, plan.owner_T.tolist()) == naive_plan(work, ranks)


@settings(max_examples=60, deadline=None)
@given(work=workloads(most=6), ranks=st.integers(1, 3))
def test_no_other_owners_make_a_busiest_rank_much_less_busy(work, ranks):
    plan = make_plan(work, ranks)
    plans = itertools.product(range(ranks), repeat=len(work.names))
    best = min(max(work_by_rank(replace(plan, owner_T=np.array(owner)), work)) for owner in plans)
    assert plan.load_R.max() <= max(4 / 3 * best, EVEN * plan.load_R.mean()) * (1 + 1e-12)


def test_on_one_rank_everything_is_on_it():
    for by_task in (True, False):
        plan = make_plan(zipf(9, by_task=by_task), 1)
        assert plan.mode == "owners"
        assert plan.owner_T.tolist() == [0] * 9


def test_a_task_larger_than_a_rank_is_hot_and_the_others_stay_with_their_owners():
    plan = make_plan(workload([600, *[10] * 40], [65] * 41, width=512), 4)
    assert plan.mode == "owners"
    assert plan.hot.tolist() == [0]
    assert plan.load_R.tolist() == [250 * 1065] * 4
    assert "1 hot task " in plan.why


def test_features_are_exchanged_where_hot_heads_would_send_more():
    heads = [100_000] + [65] * 40
    assert make_plan(workload([600, *[10] * 40], heads, width=512), 4).mode == "owners"  # 128,000 numbers of features
    assert make_plan(workload([600, *[10] * 40], heads, width=384), 4).mode == "exchange"  # 96,000


def test_where_the_work_is_in_the_heads_features_stay_at_home():
    work = workload([600, *[10] * 40], [1_000_000] * 41, width=1, trunk=0)
    plan = make_plan(work, 4)
    assert (plan.mode, len(plan.hot)) == ("owners", 0)
    assert plan.imbalance == pytest.approx(2.4)


def test_five_tasks_on_seven_ranks_leave_ranks_without_tasks_or_are_hot():
    grid = make_plan(workload([70] * 5, [65] * 5, by_task=False, batch=70), 7)
    assert sorted(grid.owner_T.tolist()) == [0, 1, 2, 3, 4]
    assert make_plan(workload([14] * 5, [65] * 5), 7).hot.tolist() == [0, 1, 2, 3, 4]
    exchanged = make_plan(workload([14] * 5, [6500] * 5), 7)
    assert exchanged.mode == "exchange"
    assert sorted(exchanged.owner_T.tolist()) == [0, 1, 2, 3, 4]


def test_the_same_number_of_tasks_and_ranks_gives_each_rank_one():
    assert sorted(make_plan(workload([20, 19, 21, 20, 20], [65] * 5), 5).owner_T.tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("ranks", "mode", "hot"), [(8, "owners", 0), (64, "owners", 10), (512, "exchange", 0)])
def test_a_thousand_tasks_of_zipf_sizes(ranks, mode, hot):
    plan = make_plan(zipf(1000, trunk=1_048_576), ranks)
    assert (plan.mode, len(plan.hot)) == (mode, hot)
    assert plan.imbalance <= EVEN


def test_a_whole_plan_of_10000_tasks_on_4096_ranks_is_quick():
    work = zipf(10_000, batch=1_000_000, width=10_000)
    start = time.perf_counter()
    make_plan(work, 4096)
    assert time.perf_counter() - start < 5


@settings(max_examples=200, deadline=None)
@given(work=workloads(), ranks=st.integers(1, 6), memory=st.integers(1, 100).map(lambda n: n * HEAD_BYTES))
def test_no_rank_holds_more_than_its_memory(work, ranks, memory):
    size = [HEAD_BYTES * n for n in work.head_params_T.tolist()]
    try:
        plan = make_plan(work, ranks, memory)
    except UserError as error:
        assert memory < sum(size) / ranks + max(size)  # with more, each task finds a rank
        others = re.search(r" or (\d+) ranks would do", str(error))
        assert (others is None) == (max(size) > memory)
        if others is not None:
            assert max(bytes_by_rank(make_plan(work, int(others[1]), memory), work)) <= memory
        enough = float(re.findall(r"them; (\S+) GB", str(error))[0]) * 1e9
        assert max(bytes_by_rank(make_plan(work, ranks, enough), work)) <= enough < 1.02 * (sum(size) / ranks + max(size))
    else:
        assert max(bytes_by_rank(plan, work)) <= memory


def test_a_rank_that_is_full_takes_no_more_tasks():
    work = workload([10, 1, 1, 1, 1, 1], [1] * 6, by_task=False)
    assert make_plan(work, 2).owner_T.tolist() == [0, 1, 1, 1, 1, 1]
    assert make_plan(work, 2, 4 * HEAD_BYTES).owner_T.tolist() == [0, 1, 1, 1, 1, 0]


def test_heads_that_no_rank_order_by_work_can_hold_are_packed_by_size():
    work = workload([9, 5, 5, 1], [1, 3, 3, 4], by_task=False)  # the last to be placed is the largest
    assert bytes_by_rank(make_plan(work, 2, 6 * HEAD_BYTES), work) in ([96, 80], [80, 96])


def test_heads_that_do_not_fit_say_what_would_do():
    work = workload([10] * 10, [10_000_000] * 10)
    with pytest.raises(UserError) as error:
        make_plan(work, 2, 0.5e9)
    assert str(error.value) == (
        "memory: the heads need 1.6 GB with gradients and moments, the largest ('task 0') 0.16 GB; 2 ranks with 0.5 GB "
        "each beside the trunk cannot hold them; 0.804 GB or 4 ranks would do"
    )


def ring(ranks, payload, rounds):
    """Bytes that a rank sends in a ring that passes a chunk of 1 / ranks on to its neighbour in each round."""
    return sum(payload / ranks for _ in range(rounds))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_bytes_on_the_wire_are_those_of_rings(ranks):
    assert wire_bytes("all-gather", 120.0, ranks) == pytest.approx(ring(ranks, 120, ranks - 1))
    assert wire_bytes("reduce-scatter", 120.0, ranks) == pytest.approx(ring(ranks, 120, ranks - 1))
    assert wire_bytes("all-reduce", 120.0, ranks) == pytest.approx(ring(ranks, 120, 2 * (ranks - 1)))
    assert wire_bytes("all-to-all", 120.0, ranks) == pytest.approx(120 - 120 / ranks)


def sent(plan, work, **more):
    return {what: flow.sent(plan.ranks) for what, flow in flows(plan, work, **more).items()}


def test_a_step_at_the_owners_sends_the_trunks_gradients_and_the_losses():
    work = workload([10] * 8, [65] * 8)
    plan = make_plan(work, 4)
    assert plan.mode == "owners"
    assert sent(plan, work) == {"trunk gradients": 6000, "losses": 1.5 * 4 * 33, "control": 48}
    assert sent(plan, work, fsdp=True) == {
        "trunk parameters": 6000,
        "trunk gradients": 3000,
        "losses": 1.5 * 4 * 33,
        "control": 48,
    }
    assert plain_ddp(work).sent(4) == 1.5 * 4 * (1000 + 8 * 65)


def test_hot_and_shared_heads_are_all_reduced_unless_heads_are_frozen():
    work = workload([600, *[10] * 40], [65] * 41, width=512, shared_params=70)
    plan = make_plan(work, 4)
    found = sent(plan, work)
    assert (found["hot heads"], found["shared heads"]) == (1.5 * 4 * 67, 1.5 * 4 * 70)
    frozen = replace(work, heads_trained=False)
    assert set(sent(plan, frozen)) == {"trunk gradients", "losses", "control"}
    assert plain_ddp(frozen).payload == 4 * 1000


def test_gathered_features_are_padded_to_equal_numbers_of_rows():
    work = workload([10] * 8, [65] * 8, by_task=False, batch=10)
    found = sent(make_plan(work, 4), work)
    assert found["features"] == found["feature gradients"] == 3 / 4 * 12 * 64 * 4


def test_a_trunk_that_is_not_trained_gets_no_gradients():
    work = workload([10] * 8, [65] * 8, by_task=False, batch=10, trained=0)
    assert set(flows(make_plan(work, 4), work)) == {"features", "losses", "control"}


def test_exchanged_rows_are_those_whose_owner_is_another_rank():
    work = zipf(200, batch=64, trunk=100_000, head=6500)
    plan = make_plan(work, 8)
    assert plan.mode == "exchange"
    rng, moved = np.random.default_rng(0), 0
    for _ in range(500):
        task_B = rng.choice(200, 64, p=work.rows_T / 64)
        moved += sum(plan.owner_T[task] != position % 8 for position, task in enumerate(task_B.tolist()))
    assert moved / 500 / 8 * 64 * 4 == pytest.approx(sent(plan, work)["features"], rel=0.02)


def test_the_designs_sizes_send_less_than_a_tenth_of_plain_ddp():
    heads = [512 * 64 + 64 + 64 + 1] * 1000
    for rows in ([1.024] * 1000, zipf(1000).rows_T):
        for ranks in (2, 8, 64, 512):
            work = workload(rows, heads, batch=1024, width=512, trunk=4 * (512 * 512 + 512))
            assert sum(sent(make_plan(work, ranks), work).values()) < 0.1 * plain_ddp(work).sent(ranks)


@pytest.mark.parametrize("by_task", [True, False])
@pytest.mark.parametrize("ranks", [2, 5])
def test_tasks_that_read_one_another_are_on_one_rank(by_task, ranks):
    parents = [(), (0,), (), (1,), (), (2, 4), (), *[()] * 13]
    work = workload([10 + i % 4 for i in range(20)], [65] * 20, by_task=by_task, parents_T=parents)
    plan = make_plan(work, ranks)
    owner = plan.owner_T.tolist()
    assert plan.names == tuple(work.names)
    assert owner[0] == owner[1] == owner[3] >= 0
    assert owner[2] == owner[4] == owner[5] >= 0
    assert set(owner) == set(range(ranks))
    assert plan.load_R.sum() == pytest.approx(sum(work.rows_T) * (65 + 1000))

"""Each collective against a plain computation: every process makes what all of them hold from their ranks.

`python test_world.py FILE` under torchrun runs the checks and writes what failed.
"""

import json
import os
import subprocess
import sys
import traceback
from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mtrain.errors import UserError
from mtrain.parallel.plan import HOT, Plan
from mtrain.parallel.shard import Shard
from mtrain.parallel.world import World
from mtrain.train.stop import leave

CHECKS = {}
TOTALS = (0, 1, 2, 3, 5, 8, 13)
SHAPES = ((), (4,), (2, 3))


def check(function):
    CHECKS[function.__name__] = function
    return function


def made(rank, *shape, dtype=torch.float64):
    """What a rank holds: whole numbers, whose sums are exact."""
    return torch.randint(-99, 99, shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def sent_by(world, function):
    world.sent.clear()
    function()
    return dict(world.sent)


@check
def sums_are_of_all_ranks_and_in_place(world):
    for dtype in (torch.float32, torch.int64):
        for shape in ((5,), (2, 3), (0,), ()):
            own = made(world.rank, *shape, dtype=dtype)
            assert world.sum(own) is own
            assert torch.equal(own, sum(made(rank, *shape, dtype=dtype) for rank in range(world.size)))


@check
def several_tensors_are_summed_at_once(world):
    shapes = [(3,), (), (2, 2), (0, 4)]
    found = world.sum_each([made(world.rank + 10 * i, *shape) for i, shape in enumerate(shapes)])
    for i, (shape, total) in enumerate(zip(shapes, found, strict=True)):
        assert total.shape == shape
        assert torch.equal(total, sum(made(rank + 10 * i, *shape) for rank in range(world.size)))
    assert world.sum_each([]) == []


@check
def numbers_are_summed_in_double_precision(world):
    large = 2**40 + world.rank
    expected = [sum(2**40 + rank for rank in range(world.size)), world.size, 0.5 * world.size]
    assert world.sum_numbers(large, True, 0.5) == expected


@check
def dealt_rows_are_gathered_in_their_order(world):
    for total in TOTALS:
        for shape in SHAPES:
            every = made(1000 + total, total, *shape)
            own = every[world.rank :: world.size]
            assert len(own) == world.count_dealt(total)
            found = world.gather_dealt(own, total)
            assert torch.equal(found, every)
        assert world.count_dealt(total) == len(range(world.rank, total, world.size))


@check
def each_rank_gets_its_dealt_rows_of_the_sum(world):
    for total in TOTALS:
        for shape in SHAPES:
            own = made(world.rank + 7 * total, total, *shape)
            every = sum(made(rank + 7 * total, total, *shape) for rank in range(world.size))
            before = own.clone()
            assert torch.equal(world.scatter_dealt(own), every[world.rank :: world.size])
            assert torch.equal(own, before)


@check
def rows_of_all_ranks_follow_each_other(world):
    for base in (0, 1, 4):
        for shape in SHAPES:
            every = [made(rank, base * (rank % 2) + base // 2, *shape) for rank in range(world.size)]
            assert torch.equal(world.gather_rows(every[world.rank]), torch.cat(every))


@check
def runs_of_rows_are_exchanged(world):
    rng, ranks = np.random.default_rng(0), range(world.size)
    tables = [rng.integers(0, 4, (world.size, world.size)) for _ in range(5)]  # rows from each rank (row) to each (column)
    tables.append(np.zeros((world.size, world.size), dtype=int))
    only = np.zeros((world.size, world.size), dtype=int)
    only[0, -1] = 3
    for rows in (*tables, only):
        for shape in SHAPES:
            every = [made(rank, int(rows[rank].sum()), *shape) for rank in ranks]
            runs = [every[rank].split(rows[rank].tolist()) for rank in ranks]
            found = world.exchange(every[world.rank], rows[world.rank].tolist(), rows[:, world.rank].tolist())
            assert torch.equal(found, torch.cat([runs[rank][world.rank] for rank in ranks]))
            back = world.exchange(found, rows[:, world.rank].tolist(), rows[world.rank].tolist())
            assert torch.equal(back, every[world.rank])
    columns = made(world.rank, 3, world.size).t()  # not contiguous
    ones = [1] * world.size
    expected = torch.stack([made(rank, 3, world.size)[:, world.rank] for rank in ranks])
    assert torch.equal(world.exchange(columns, ones, ones), expected)


@check
def objects_of_all_ranks_are_on_every_rank_or_on_the_first(world):
    own = {"rank": world.rank, "text": "x" * 1000 * world.rank}
    every = [{"rank": rank, "text": "x" * 1000 * rank} for rank in range(world.size)]
    assert world.gather_objects(own) == every
    assert world.gather_to_first(own) == (every if world.is_first else None)
    assert world.from_first(own) == every[0]


@check
def a_mistake_on_one_rank_ends_all_and_is_said_once(world):
    assert world.together(lambda: world.rank) == world.rank

    def fails_on_the_last():
        if world.rank == world.size - 1:
            raise UserError("no such file")

    with pytest.raises(UserError if world.is_first else SystemExit) as found:
        world.together(fails_on_the_last)
    assert str(found.value) == ("no such file" if world.is_first else "2")


@check
def payloads_are_counted_in_bytes(world):
    padded = -(-5 // world.size) * world.size
    assert sent_by(world, lambda: world.sum(torch.zeros(3))) == {"all_reduce": 12}
    assert sent_by(world, lambda: world.sum_each([torch.zeros(3), torch.zeros(2, 2)])) == {"all_reduce": 28}
    assert sent_by(world, lambda: world.sum_numbers(1, 2.0, True)) == {"control": 24}
    dealt = torch.zeros(world.count_dealt(5), 2)
    assert sent_by(world, lambda: world.gather_dealt(dealt, 5)) == {"all_gather": 8 * padded}
    assert sent_by(world, lambda: world.scatter_dealt(torch.zeros(5, 2))) == {"reduce_scatter": 8 * padded}
    rows = [world.rank + to for to in range(world.size)]
    assert sent_by(world, lambda: world.exchange(torch.zeros(sum(rows), 2), rows, rows)) == {"all_to_all": 8 * sum(rows)}


@check
def features_reach_the_heads_and_gradients_come_back(world):
    """`from_heads` is the adjoint of `to_heads`, whatever the mode."""
    rng = np.random.default_rng(1)
    for mode in ("owners", "exchange", "gather"):
        for rows, pieces in ((11, 1), (14, 3), (2, 2), (0, 1)):
            owner_T = rng.integers(0, world.size, 6)
            if mode == "owners":
                owner_T[2] = HOT
            plan = Plan(tuple("abcdef"), owner_T, np.ones(world.size), mode)
            task_P = None if mode == "gather" else rng.integers(0, 6, rows)
            shard, features = Shard(world, plan), made(3, rows, 4)
            for deal in shard.deal(task_P, rows, pieces):
                heads = deal.read if deal.heads is None else deal.heads
                found = shard.to_heads(features[deal.read], deal)
                assert torch.equal(found, features[heads])
                gradient = made(50 + world.rank, len(heads), 4)
                back = shard.from_heads(gradient, deal)
                assert back.shape == (len(deal.read), 4)
                ours = (found * gradient).sum() - (features[deal.read] * back).sum()
                assert float(world.sum(ours)) == 0


@check
def values_of_all_tasks_are_everywhere(world):
    owner_T = np.array([0, world.size - 1, HOT, 0, HOT])
    shard = Shard(world, Plan(tuple("abcde"), owner_T, np.ones(world.size)))
    values = [made(rank, 2, 5) for rank in range(world.size)]
    expected = sum(value * torch.from_numpy((owner_T == rank) | (owner_T == HOT)) for rank, value in enumerate(values))
    found, number = shard.everywhere(values[world.rank][:, shard.own], torch.tensor(world.rank + 1.0))
    assert torch.equal(found, expected)
    assert float(number) == sum(range(1, world.size + 1))


@cache
def failures(processes, folder):
    """What failed on so many processes: by check, the traceback of some rank."""
    file = folder / f"{processes}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(file)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("processes", [2, 3])
def test_collectives(processes, name, folder):
    found = failures(processes, folder)
    assert found[name] is None, found[name]


def test_with_one_process_everything_is_the_identity():
    world = World()
    x, numbers = made(0, 5, 3), [1.0, 2.0]
    assert (world.rank, world.size, world.is_first) == (0, 1, True)
    same = (world.sum(x), world.gather_dealt(x, 5), world.scatter_dealt(x), world.gather_rows(x), world.exchange(x, [5], [5]))
    assert all(found is x for found in same)
    assert torch.equal(x, made(0, 5, 3))
    assert all(a is b for a, b in zip(world.sum_each([x, x]), [x, x], strict=True))
    assert world.sum_numbers(*numbers) == numbers
    assert world.count_dealt(5) == 5
    assert world.gather_objects(x)[0] is x
    assert world.from_first(x) is x
    assert world.gather_to_first(x)[0] is x
    assert world.together(lambda: x) is x
    assert not world.sent
    with pytest.raises(UserError, match="no such file"):
        world.together(lambda: (_ for _ in ()).throw(UserError("no such file")))


def main(file):
    dist.init_process_group("gloo")
    world, found = World(), {}
    for name, function in CHECKS.items():
        error = None
        try:
            function(world)
        except Exception:
            error = traceback.format_exc()
        errors = [text for text in world.gather_objects(error) if text is not None]
        found[name] = errors[0] if errors else None
    if world.is_first:
        with open(file, "w") as out:
            json.dump(found, out)
    leave(0, together=True)


if __name__ == "__main__":
    main(sys.argv[1])

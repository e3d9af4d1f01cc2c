"""Checkpoints are whole or absent, and any number of ranks loads what any other number saved."""

import errno
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from ports import free_port
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from mtrain.errors import UserError
from mtrain.train import shards
from mtrain.train.checkpoint import Checkpoints, Snapshot, Stacks
from mtrain.train.stop import leave

HIDDEN, FEATURES = 3, 5


class ThreadWorld:
    """A rank of several in one process."""

    def __init__(self, rank, size, barrier, slots):
        self.rank, self.size, self.barrier, self.slots = rank, size, barrier, slots

    def gather_objects(self, value):
        self.slots[self.rank] = value
        self.barrier.wait(20)
        gathered = list(self.slots)
        self.barrier.wait(20)
        return gathered


def on_ranks(size, work):
    """What `work(world)` returns on each rank, or raises."""
    barrier, slots, results = threading.Barrier(size), [None] * size, [None] * size

    def run(rank):
        try:
            results[rank] = work(ThreadWorld(rank, size, barrier, slots))
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, UserError):
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, UserError):
            raise result
    return results


def tensor(name, *shape):
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 31 * len(name))
    return torch.randn(*shape, generator=generator)


def make_stacks(names, outputs, written=None, empty=False):
    """Two-layer heads whose values depend on the task's name only; `empty`: NaN everywhere, to be filled."""
    sizes = [outputs[name] for name in names]
    largest = max(sizes, default=1)
    tensors = {}
    for layer, (out, d_in) in enumerate([(HIDDEN, FEATURES), (largest, HIDDEN)]):
        for key, shape in (("weights", (out, d_in)), ("biases", (out,))):
            for suffix in ("", ".exp_avg"):
                stack = torch.zeros(len(names), *shape)
                for row, name in enumerate(names):
                    rows = outputs[name] if layer else out
                    stack[row, :rows] = tensor(f"{name} {key} {layer} {suffix}", rows, *shape[1:])
                tensors[f"{key}.{layer}{suffix}"] = stack
            tensors[f"{key}.{layer}.step"] = torch.tensor([float(sum(map(ord, name))) for name in names])
    if empty:
        tensors = {key: torch.full_like(value, math.nan) for key, value in tensors.items()}
    return Stacks(list(names), sizes, tensors, written)


def snapshot(value, heads=()):
    return Snapshot({"model.w": torch.full((40, 3), float(value))}, list(heads), {"value": value})


def value_of(saved):
    """The one value that all of a `snapshot` holds."""
    w = torch.empty(40, 3)
    saved.copy_into({"model.w": w})
    assert (w == saved.state["value"]).all()
    assert saved.step == saved.state["value"]
    return saved.state["value"]


def save(checkpoints, step, **about):
    assert checkpoints.save(step, snapshot(step), about) is None
    assert checkpoints.finish() is None


def test_what_is_read_is_what_was_written(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
    tensors = {f"model.{i}": (torch.arange(7 * i) % 3).view(7, i).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"model.scalar": torch.tensor(3.0), "model.turned": tensor("x", 4, 6).t()}
    state = {
        "numbers": [1, -2.5, math.inf, -math.inf, True, None, 2**100, 1e-300],
        "nan": math.nan,
        "pair": ("a", ("b", [])),
        "deep": {"x.y/z": {"t": torch.arange(3), "u": [torch.tensor(2.0), torch.zeros(0, 2)]}, "": {}},
        "$tensor": "a text",
        "unicode": "\u00b5 \ud800",
    }
    wanted = {name: value.clone() for name, value in tensors.items()}
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.newest() is None
    stacks = make_stacks(["b", "a"], {"a": 2, "b": 4})
    checkpoints.save(100, Snapshot(tensors, [stacks], state), {"phase": "fit", "best": None})
    for value in tensors.values():  # what happens after save is not in it
        value.zero_()
    state["deep"]["x.y/z"]["t"].zero_()
    assert checkpoints.in_flight
    assert checkpoints.finish() is None
    assert not checkpoints.in_flight
    assert not checkpoints.writing

    saved = Checkpoints(tmp_path / "run" / "checkpoints").newest()
    assert saved.path == tmp_path / "run" / "checkpoints" / "step-000000100"
    assert (saved.step, saved.about, saved.names) == (100, {"phase": "fit", "best": None}, {"a", "b"})
    found = {name: torch.ones_like(value) for name, value in tensors.items()}
    saved.copy_into(found)
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name
    assert math.isnan(saved.state.pop("nan"))
    deep = saved.state["deep"].pop("x.y/z")
    assert torch.equal(deep["t"], torch.arange(3))
    assert torch.equal(deep["u"][0], torch.tensor(2.0))
    assert deep["u"][1].shape == (0, 2)
    assert saved.state["numbers"] == state["numbers"]
    assert saved.state["pair"] == ("a", ("b", []))
    assert saved.state["$tensor"] == "a text"
    assert saved.state["unicode"] == state["unicode"]
    assert saved.state["deep"] == {"": {}}


def test_the_files_are_plain_safetensors_with_a_readable_manifest(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3, best=3)
    folder = tmp_path / "step-000000003"
    assert sorted(os.listdir(folder)) == ["manifest.json", "shard-00000-of-00001.safetensors"]
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
    assert (manifest["version"], manifest["step"], manifest["about"]) == (1, 3, {"best": 3})
    with safe_open(folder / "shard-00000-of-00001.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("tensors/model.w"), torch.full((40, 3), 3.0))


def test_a_state_that_json_does_not_have_is_refused_by_its_place(tmp_path):
    with pytest.raises(TypeError, match=r"state\.a cannot be written: set"):
        Checkpoints(tmp_path).save(1, Snapshot(state={"a": {1, 2}}), {})
    with pytest.raises(TypeError, match="complex64"):
        Checkpoints(tmp_path).save(1, Snapshot({"c": torch.zeros(2, dtype=torch.complex64)}), {})


OUTPUTS = {f"task {t}": 1 + t % 4 for t in range(23)}
HOT = ["task 3", "task 8"]


def deal(rank, size, seed, grouped):
    """The heads of a rank: hot ones, which rank 0 writes, and a random share, in random order and groups."""
    order = random.Random(seed)
    owner = {name: order.randrange(size) for name in OUTPUTS}
    names = [name for name in OUTPUTS if owner[name] == rank or name in HOT]
    order.shuffle(names)
    parts = [[n for n in names if OUTPUTS[n] > 2], [n for n in names if OUTPUTS[n] <= 2]] if grouped else [names]
    return [make_stacks(part, OUTPUTS, [name not in HOT or rank == 0 for name in part]) for part in parts]


@pytest.mark.parametrize("saving", [1, 2, 3, 4])
def test_heads_saved_on_n_ranks_load_by_name_on_m(tmp_path, saving):
    def write(world):
        checkpoints = Checkpoints(tmp_path, world=world)
        checkpoints.save(1, snapshot(1, deal(world.rank, world.size, seed=saving, grouped=True)), {})
        return checkpoints.finish()

    assert on_ranks(saving, write) == [None] * saving
    assert len(os.listdir(tmp_path / "step-000000001")) == saving + 1

    def read(world):
        saved = Checkpoints(tmp_path, world=world).newest()
        assert value_of(saved) == 1
        assert saved.names == set(OUTPUTS)
        for wanted in deal(world.rank, world.size, seed=99, grouped=world.size % 2 == 0):
            outputs = OUTPUTS | {"new": 5}
            names = [*wanted.names[:2], "new", *wanted.names[2:]]
            stacks = make_stacks(names, outputs, empty=True)
            assert saved.copy_heads([stacks]) == set(wanted.names)
            old = [row for row, name in enumerate(names) if name != "new"]
            for key, expected in wanted.tensors.items():
                found = stacks.tensors[key]
                assert found[names.index("new")].isnan().all()
                width = expected.shape[1] if expected.dim() > 1 else None
                assert torch.equal(found[old] if width is None else found[old, :width], expected), key
                if width is not None:
                    assert (found[old, width:] == 0).all()

    for loading in (1, 2, 3, 4):
        on_ranks(loading, read)


def test_heads_without_their_optimizer_and_ranks_without_heads(tmp_path):
    def write(world):
        checkpoints = Checkpoints(tmp_path, world=world)
        names = list(OUTPUTS) if world.rank == 1 else []
        checkpoints.save(1, snapshot(1, [make_stacks(names, OUTPUTS)]), {})
        return checkpoints.finish()

    assert on_ranks(3, write) == [None] * 3
    wanted = make_stacks(["task 5"], OUTPUTS)
    stacks = make_stacks(["task 5"], OUTPUTS, empty=True)
    stacks.tensors = {key: value for key, value in stacks.tensors.items() if key.count(".") == 1}
    saved = Checkpoints(tmp_path).newest()
    assert saved.copy_heads([stacks]) == {"task 5"}
    assert saved.copy_heads([]) == saved.copy_heads([make_stacks([], OUTPUTS), make_stacks(["x"], {"x": 1})]) == set()
    for key, value in stacks.tensors.items():
        assert torch.equal(value, wanted.tensors[key])


def test_a_head_that_differs_is_refused_by_its_task_on_all_ranks(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, snapshot(1, [make_stacks(["a", "b"], {"a": 2, "b": 3})]), {})
    checkpoints.finish()

    def read(world):
        saved = Checkpoints(tmp_path, world=world).newest()
        stacks = make_stacks(["a"], {"a": 2}) if world.rank == 0 else make_stacks(["c", "b"], {"b": 4, "c": 1})
        before = {key: value.clone() for key, value in stacks.tensors.items()}
        with pytest.raises(UserError, match="head of task 'b' differs: has 3 outputs there and 4 here"):
            saved.copy_heads([stacks])
        assert all(torch.equal(value, before[key]) for key, value in stacks.tensors.items())

    on_ranks(2, read)
    saved = checkpoints.newest()
    stacks = make_stacks(["c", "b"], {"b": 3, "c": 1})
    stacks.tensors["weights.0"] = torch.zeros(2, 7, FEATURES)
    with pytest.raises(UserError, match=r"task 'b' differs: 'weights.0' is \[3, 5\] there and \[7, 5\] here"):
        saved.copy_heads([stacks])
    stacks = Stacks(["a"], [2], {"weights.0": torch.zeros(1, 2, FEATURES), "biases.0": torch.zeros(1, 2)})
    with pytest.raises(UserError, match="task 'a' differs"):  # one layer here, two there
        saved.copy_heads([stacks])


def test_another_model_is_refused_with_the_differing_shapes(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    tensors = {"model.a": torch.zeros(2), "model.b": torch.zeros(3, 4), "model.c": torch.zeros(1), "moments.a": torch.zeros(2)}
    checkpoints.save(1, Snapshot(tensors), {})
    checkpoints.finish()
    saved = checkpoints.newest()
    saved.copy_into({name: torch.ones_like(value) for name, value in tensors.items() if name.startswith("model.")})
    with pytest.raises(UserError) as caught:
        saved.copy_into({"model.a": torch.zeros(2), "model.b": torch.zeros(4, 4), "model.d": torch.zeros(5)})
    assert "another model" in str(caught.value)
    assert "'model.b' is [3, 4] there and [4, 4] here" in str(caught.value)
    assert "'model.d' is absent there and [5] here" in str(caught.value)
    assert "'model.c' is [1] there and absent here" in str(caught.value)
    assert "moments" not in str(caught.value)


def _sharded_model(wrapped):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7))
    if wrapped:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    return model


def _fsdp_rank(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)

    class World:
        size = 2

        def gather_objects(self, value):
            gathered = [None, None]
            dist.all_gather_object(gathered, value)
            return gathered

    world = World()
    world.rank = rank
    mesh = init_device_mesh("cpu", (2,))
    plain, sharded = _sharded_model(False), _sharded_model(True)
    other = {
        "other.columns": distribute_tensor(torch.arange(15.0).view(3, 5), mesh, [Shard(1)]),
        "other.copies": distribute_tensor(torch.arange(6.0), mesh, [Replicate()]),
        "other.one": distribute_tensor(torch.arange(4.0).view(1, 4), mesh, [Shard(0)]),  # nothing on rank 1
    }
    checkpoints = Checkpoints(folder, world=world)
    checkpoints.save(1, Snapshot({f"model.{n}": p for n, p in sharded.named_parameters()} | other), {})
    assert checkpoints.finish() is None
    with torch.no_grad():
        for parameter in [*sharded.parameters(), *other.values()]:
            parameter.zero_()
    saved = checkpoints.newest()
    saved.copy_into({f"model.{n}": p for n, p in sharded.named_parameters()} | other)
    for (name, ours), theirs in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs), name
    assert torch.equal(other["other.columns"].full_tensor(), torch.arange(15.0).view(3, 5))
    assert torch.equal(other["other.copies"].to_local(), torch.arange(6.0))
    assert torch.equal(other["other.one"].full_tensor(), torch.arange(4.0).view(1, 4))
    turned = distribute_tensor(torch.zeros(3, 5), mesh, [Shard(0)])
    columns = {"other.columns": turned, "other.copies": torch.zeros(6), "other.one": torch.zeros(1, 4)}
    saved.copy_into(columns)
    assert torch.equal(turned.full_tensor(), torch.arange(15.0).view(3, 5))

    loaded = {f"model.{n}": torch.zeros_like(p) for n, p in plain.named_parameters()}  # to plain tensors
    saved.copy_into(loaded)
    for name, parameter in plain.named_parameters():
        assert torch.equal(loaded[f"model.{name}"], parameter)
    checkpoints.save(2, Snapshot({name: value * 2 for name, value in loaded.items()}), {})  # and from them
    assert checkpoints.finish() is None
    checkpoints.newest().copy_into({f"model.{n}": p for n, p in sharded.named_parameters()})
    for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs * 2)
    with pytest.raises(UserError, match=r"'model.0.weight' is \[3, 5\] there and \[2, 5\] here"):
        checkpoints.newest().copy_into({"model.0.weight": distribute_tensor(torch.zeros(2, 5), mesh, [Shard(0)])})
    leave(0, together=True)


def test_sharded_tensors_come_back_sharded_or_plain(tmp_path):
    torch.multiprocessing.spawn(_fsdp_rank, (free_port(), tmp_path), nprocs=2)


def test_the_newest_the_best_and_the_final_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30, 40, 50):
        save(checkpoints, step, best=20 if step >= 20 else 10)
    assert checkpoints.steps() == [20, 40, 50]
    save(checkpoints, 60, best=60, final=50)
    save(checkpoints, 70, best=60, final=50)
    save(checkpoints, 80, best=60, final=50)
    assert checkpoints.steps() == [50, 60, 70, 80]
    assert value_of(checkpoints.at(50)) == 50
    assert value_of(checkpoints.newest()) == 80
    with pytest.raises(UserError, match="no checkpoint of step 10; there are: 50, 60, 70, 80"):
        checkpoints.at(10)


def test_a_run_that_goes_back_replaces_what_came_later(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (10, 20, 30):
        save(checkpoints, step)
    save(checkpoints, 20)
    assert checkpoints.steps() == [10, 20]
    assert value_of(checkpoints.newest()) == 20
    assert sorted(os.listdir(tmp_path)) == ["step-000000010", "step-000000020"]


DAMAGES = {
    "cut": (lambda path: os.truncate(path, path.stat().st_size // 2), r"shard-00000.*: is damaged, it has \d+ bytes and \d+"),
    "flipped": (lambda path: flip(path), r"shard-00000.*: is damaged, its checksum is"),
    "missing": (lambda path: path.unlink(), r"shard-00000.*: is missing"),
    "empty": (lambda path: path.write_bytes(b""), r"shard-00000.*: is damaged, it has 0 bytes"),
    "manifest cut": (lambda path: os.truncate(path.with_name("manifest.json"), 50), r"manifest\.json: is damaged"),
    "manifest flipped": (lambda path: flip(path.with_name("manifest.json")), r"manifest\.json: is damaged"),
}


def flip(path):
    content = bytearray(path.read_bytes())
    at = content.find(b'"size": ') + 8 if path.suffix == ".json" else len(content) // 2
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("size", [1, 3])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_taken(tmp_path, damage, size):
    def write(world):
        checkpoints = Checkpoints(tmp_path, keep=2, world=world)
        for step in (1, 2):
            save(checkpoints, step)

    on_ranks(size, write)
    break_it, said = DAMAGES[damage]
    break_it(tmp_path / "step-000000002" / f"shard-00000-of-0000{size}.safetensors")

    def read(world):
        checkpoints = Checkpoints(tmp_path, keep=2, world=world)
        with pytest.raises(UserError, match=said + ".*take that of another step: 1"):
            checkpoints.at(2)
        assert value_of(checkpoints.newest()) == 1
        (line,) = checkpoints.refused
        assert "\n" not in line
        save(checkpoints, 3)
        return line

    for line in on_ranks(size, read):
        assert re.search(r"step-000000002/" + said, line)
    assert Checkpoints(tmp_path).steps() == [1, 3]  # a damaged one takes no place


def test_a_checkpoint_without_a_manifest_is_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        save(checkpoints, step)
    (tmp_path / "step-000000002" / "manifest.json").unlink()
    assert value_of(checkpoints.newest()) == 1
    assert checkpoints.refused == []
    with pytest.raises(UserError, match="no checkpoint of step 2"):
        checkpoints.at(2)


def test_a_checkpoint_of_a_later_version_is_not_passed_over(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr("mtrain.train.checkpoint.VERSION", 2)
    save(checkpoints, 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="is of format 2, this mtrain reads 1"):
        checkpoints.newest()


def test_leftovers_of_a_killed_process_are_removed_and_a_complete_one_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        save(checkpoints, step)
    (tmp_path / "step-000000002").rename(tmp_path / ".step-000000002.0123abcd")  # killed before the last rename
    half = tmp_path / ".step-000000003.4567abcd"
    half.mkdir()
    (half / "shard-00000-of-00001.safetensors").write_bytes(b"x")
    assert value_of(Checkpoints(tmp_path).newest()) == 2  # reading changes nothing
    assert half.is_dir()
    again = Checkpoints(tmp_path, keep=3)
    save(again, 3)
    assert sorted(os.listdir(tmp_path)) == ["step-000000001", "step-000000002", "step-000000003"]


@pytest.mark.parametrize("name", ["rename", "fsync"])
def test_a_crash_before_the_rename_leaves_the_one_before_and_no_rubbish_later(tmp_path, monkeypatch, name):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    checkpoints.save(2, snapshot(2), {})
    checkpoints._done.wait(20)
    monkeypatch.setattr(os, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.commit()
    monkeypatch.undo()
    again = Checkpoints(tmp_path)
    assert value_of(again.newest()) == 2  # whole but for its name
    save(again, 3)
    assert os.listdir(tmp_path) == ["step-000000003"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_is_said_in_one_line_and_the_one_before_stays(tmp_path, monkeypatch, failing):
    full = threading.Event()
    write = shards.ShardBuffer.write

    def write_or_fail(self, path, layout):
        if full.is_set() and path.name.startswith(f"shard-0000{failing}"):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, path, layout)

    monkeypatch.setattr(shards.ShardBuffer, "write", write_or_fail)

    def work(world):
        checkpoints = Checkpoints(tmp_path, world=world)
        save(checkpoints, 1)
        world.gather_objects(None)
        full.set()
        assert checkpoints.save(2, snapshot(2), {}) is None
        line = checkpoints.finish()
        world.gather_objects(None)
        full.clear()
        left = os.listdir(tmp_path)
        world.gather_objects(None)
        save(checkpoints, 3)
        assert value_of(checkpoints.newest()) == 3
        return line, left

    (line, left), (same, _) = on_ranks(2, work)
    assert line == same
    assert f"step-000000002 was not written: shard-0000{failing}-of-00002.safetensors: No space left on device" in line
    assert "step 1 is intact" in line
    assert left == ["step-000000001"]
    assert os.listdir(tmp_path) == ["step-000000003"]


def test_a_failure_of_a_save_in_flight_is_said_by_the_next_save(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EDQUOT, "Disk quota exceeded")))
    assert checkpoints.save(1, snapshot(1), {}) is None
    checkpoints._done.wait(20)
    monkeypatch.undo()
    line = checkpoints.save(2, snapshot(2), {})
    assert "step-000000001 was not written" in line
    assert "Disk quota exceeded; there is none before it" in line
    assert checkpoints.finish() is None
    assert value_of(checkpoints.newest()) == 2


def test_a_full_disk_leaves_the_one_before_and_the_next_save_works(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted: needs root and the right to mount")
    try:
        checkpoints = Checkpoints(disk / "checkpoints")
        save(checkpoints, 1)
        large = Snapshot({"model.w": torch.zeros(1 << 20)}, [], {})
        assert checkpoints.save(2, large, {}) is None
        line = checkpoints.finish()
        assert "shard-00000-of-00001.safetensors: No space left on device; the one of step 1 is intact" in line
        assert os.listdir(disk / "checkpoints") == ["step-000000001"]
        assert value_of(checkpoints.newest()) == 1
        save(checkpoints, 3)
        assert value_of(checkpoints.newest()) == 3
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_that_may_not_grow_is_said_in_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        checkpoints.save(2, Snapshot({"model.w": torch.zeros(1 << 20)}), {})
        line = checkpoints.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large; the one of step 1 is intact" in line
    save(checkpoints, 3)
    assert os.listdir(tmp_path) == ["step-000000003"]


def test_what_goes_on_during_a_save_is_not_in_it_and_memory_is_reused(tmp_path, monkeypatch):
    go = threading.Event()
    write = shards.ShardBuffer.write

    def late(self, path, layout):
        go.wait(20)
        return write(self, path, layout)

    monkeypatch.setattr(shards.ShardBuffer, "write", late)
    checkpoints = Checkpoints(tmp_path)
    w = torch.full((40, 3), 1.0)
    checkpoints.save(1, Snapshot({"model.w": w}, [], {"value": 1}), {})
    where = checkpoints._buffer._bytes.data_ptr()
    assert checkpoints.writing
    w.fill_(7)
    go.set()
    assert checkpoints.finish() is None
    assert value_of(checkpoints.newest()) == 1
    save(checkpoints, 2)
    assert checkpoints._buffer._bytes.data_ptr() == where


SAVER = """
import sys
from pathlib import Path
import torch
from mtrain.train.checkpoint import Checkpoints, Snapshot
torch.set_num_threads(1)
checkpoints = Checkpoints(Path(sys.argv[1]))
saved = checkpoints.newest()
assert not checkpoints.refused, checkpoints.refused
step = saved.step if saved else 0
while True:
    step += 1
    w = torch.full((40, 3), float(step))
    assert checkpoints.save(step, Snapshot({"model.w": w, "more.w": torch.zeros(100_000)}, [], {"value": step}), {}) is None
    if step % 3:
        assert checkpoints.finish() is None
    print(step, flush=True)
"""


def kill_while_saving(folder, times):
    last, moments = 0, random.Random(0)
    for _ in range(times):
        saver = subprocess.Popen([sys.executable, "-c", SAVER, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        first = saver.stdout.readline()
        time.sleep(moments.random() * 0.1)
        saver.kill()
        out, err = saver.communicate()
        assert first, err.decode()
        said = int((first + out).split(b"\n")[-2])
        checkpoints = Checkpoints(folder)
        now = value_of(checkpoints.newest())
        assert checkpoints.refused == []
        assert now >= max(last, said - 1)  # at most the save in flight is lost
        last = now


def test_a_process_killed_while_saving_leaves_a_complete_checkpoint(tmp_path):
    kill_while_saving(tmp_path, 2)


@pytest.mark.slow
def test_a_process_killed_thirty_times_always_leaves_a_complete_checkpoint(tmp_path):
    kill_while_saving(tmp_path, 30)

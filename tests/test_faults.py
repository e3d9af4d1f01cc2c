"""What a run of two processes survives: signals, killed processes, a full disk, damaged and wrong checkpoints."""

import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from parallel.test_invariance import check_alike
from ports import free_port

from mtrain.cli import main
from mtrain.train.checkpoint import Checkpoints

STEPS = 60
SLOW = """
import os, sys, time
import torch
from torch import nn

if "HOLD" in os.environ:
    sys.setswitchinterval(100)  # a thread gets the interpreter only when the main one waits

class Slow(nn.Module):
    def __init__(self, in_features: int, width: int = 16, ballast: int = 1):
        super().__init__()
        self.ballast = nn.Parameter(torch.ones(ballast))
        self.layers = nn.Sequential(nn.Linear(in_features, width), nn.Tanh(), nn.Linear(width, width), nn.Linear(width, 8))

    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return self.layers(x) + 0 * self.ballast.sum()
"""
CONFIG = {
    "data": {"path": "grid.csv", "layout": "grid"},
    "inputs": {"x*": "Numeric"},
    "model": {"trunk": {"class_path": "slow.Slow"}},
    "train": {"steps": STEPS, "global_batch": 16, "lr": 0.003, "log_every": 1, "save_every": 10, "eval_every": 100.0},
}
LARGE = {"model": {"trunk": {"class_path": "slow.Slow", "init_args": {"ballast": 1_500_000}}}}  # 18 MB with moments


def write_problem(folder, **sections):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 5))
    y = x @ rng.normal(size=(5, 7)) + 0.1 * rng.normal(size=(120, 7))
    columns = {f"x{i}": x[:, i] for i in range(5)} | {f"t{i}": y[:, i] for i in range(7)}
    pd.DataFrame(columns).to_csv(folder / "grid.csv", index=False)
    (folder / "slow.py").write_text(SLOW)
    config = {key: value | sections.get(key, {}) for key, value in CONFIG.items()}
    (folder / "c.yaml").write_text(yaml.safe_dump(config | {k: v for k, v in sections.items() if k not in CONFIG}))


class Started:
    """Processes of `mtrain train` in a folder, without a launcher so that each one's exit status is seen, or with torchrun.

    `each` are more words for a rank, `seen` more of its environment.

    Attributes:
        processes: one for each rank, or torchrun's.
    """

    def __init__(self, folder, processes=2, words=(), slow=0.0, torchrun=(), each=None, seen=None):
        self.folder, self.run = folder, folder / "run"
        env = {k: v for k, v in os.environ.items() if k != "MTRAIN_DATA"} | {"OMP_NUM_THREADS": "1", "SLOW": f"{slow}"}
        env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), env.get("PYTHONPATH", "")])
        command = ["-m", "mtrain", "train", "c.yaml", "--run_dir", "run", *map(str, words)]
        if torchrun:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", f"{processes}", *torchrun]
            ranks = [(launcher + command, {})]
        elif processes == 1:
            ranks = [(command, {})]
        else:
            where = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": f"{processes}"}
            ranks = [
                (command + (each or {}).get(r, []), where | {"RANK": f"{r}", "LOCAL_RANK": f"{r}"} | (seen or {}).get(r, {}))
                for r in range(processes)
            ]
        self.begun = time.time()
        self.processes = [
            subprocess.Popen(
                [sys.executable, *words],
                cwd=folder,
                env=env | more,
                stdout=(folder / f"out-{rank}").open("w"),
                stderr=(folder / f"err-{rank}").open("w"),
                start_new_session=True,
            )
            for rank, (words, more) in enumerate(ranks)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def said(self, rank=0):
        """What a rank wrote to its output, and to its errors."""
        return (self.folder / f"out-{rank}").read_text(), (self.folder / f"err-{rank}").read_text()

    def wait(self, timeout=120):
        """Exit status of each, as a number that is negative where a signal ended it."""
        until = time.monotonic() + timeout
        return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]

    def wait_for(self, condition, timeout=120):
        until = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < until, "too late"
            assert all(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.01)

    def reaches(self, step):
        """Wait until the curve has this step."""
        path = self.run / "metrics.jsonl"
        self.wait_for(lambda: path.exists() and path.stat().st_mtime > self.begun and last_step(self.run) >= step)

    def kill(self, number, *ranks):
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].send_signal(number)


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n")[:-1]]


def last_step(run):
    return max((line["step"] for line in lines_of(run)), default=0)


def train_here(folder, *words, status=0):
    """In this process, as one."""
    with pytest.raises(SystemExit) as done:
        main(["train", str(folder / "c.yaml"), "--run_dir", str(folder / "run"), *map(str, words)])
    assert done.value.code == status


def check_same(straight, run):
    check_alike(straight, run)
    steps = [line["step"] for line in lines_of(run) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert not (run / "preempted").exists()


@pytest.fixture(autouse=True)
def importable(monkeypatch, problems):
    monkeypatch.syspath_prepend(str(problems))


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """A folder with the straight runs of the small and of the large model, made when asked for."""
    folder = tmp_path_factory.mktemp("problems")
    (folder / "slow.py").write_text(SLOW)
    return folder


@pytest.fixture(scope="module")
def straight(problems):
    def run(**sections):
        folder = problems / ("large" if sections.get("model") else "small")
        if not folder.exists():
            folder.mkdir()
            write_problem(folder, **sections)
            train_here(folder)
        return folder / "run"

    return run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a run that a signal to one of two processes has stopped."""
    folder = tmp_path_factory.mktemp("stopped")
    write_problem(folder, train={"keep_checkpoints": 3})
    hold = {"HOLD": "1"}
    with Started(folder, slow=0.02, seen={0: hold, 1: hold}) as started:
        started.reaches(25)
        started.kill(signal.SIGUSR1, 1)
        assert started.wait() == [128 + signal.SIGUSR1] * 2, [started.said(), started.said(1)]
        out, err = started.said()
        assert err == "mtrain: stopped by SIGUSR1\n"
        assert started.said(1) == ("", "")
        assert "is saved; the same command continues the run" in out
    return folder


def copied(stopped, folder):
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    return folder / "run"


def test_processes_that_do_not_meet_say_where_in_one_line(tmp_path):
    write_problem(tmp_path)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        at = {"MASTER_PORT": f"{taken.getsockname()[1]}"}
        with Started(tmp_path, seen={0: at, 1: at}) as started:
            assert started.processes[0].wait(120) == 2
    line = started.said()[1]
    assert line.startswith(f"mtrain: the 2 processes do not meet at localhost:{at['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT): ")
    assert line.count("\n") == 1


def test_a_signal_to_one_of_two_processes_stops_both_at_a_saved_step(straight, stopped, tmp_path, capsys):
    run = copied(stopped, tmp_path)
    step = last_step(run)
    assert 25 <= step < STEPS
    assert (run / "preempted").read_text() == f"SIGUSR1 at step {step}\n"
    assert Checkpoints(run / "checkpoints").newest().step == step
    train_here(tmp_path)
    assert f"continuing at step {step} of {STEPS}" in capsys.readouterr().out
    check_same(straight(), run)


@pytest.mark.slow
def test_every_signal_to_one_or_all_stops_and_the_same_command_continues(straight, tmp_path):
    write_problem(tmp_path)
    ways = [(signal.SIGTERM, ()), (signal.SIGINT, (0,)), (signal.SIGUSR1, ()), (signal.SIGINT, ()), (signal.SIGTERM, (1,))]
    for n, (number, ranks) in enumerate(ways):
        with Started(tmp_path, slow=0.05) as started:
            started.reaches(10 * n + 5)
            started.kill(number, *ranks)
            assert started.wait() == [128 + number] * 2
            assert started.said()[1] == f"mtrain: stopped by {signal.Signals(number).name}\n"
        step = last_step(started.run)
        assert (started.run / "preempted").read_text() == f"{signal.Signals(number).name} at step {step}\n"
        assert Checkpoints(started.run / "checkpoints").newest().step == step < STEPS
    with Started(tmp_path) as started:
        assert started.wait() == [0, 0]
        assert started.said()[1] == ""
    check_same(straight(), started.run)


@pytest.mark.slow
def test_a_second_signal_ends_both_processes_at_once(tmp_path):
    write_problem(tmp_path)
    with Started(tmp_path, slow=60.0) as started:
        started.wait_for(lambda: "training" in started.said()[0] or (started.run / "features.json").exists())
        time.sleep(3)  # into the step
        started.kill(signal.SIGTERM)
        time.sleep(2.5)
        started.kill(signal.SIGTERM)
        assert started.wait(timeout=5) == [128 + signal.SIGTERM] * 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_or_to_its_terminal_stops_the_run(straight, tmp_path, number):
    write_problem(tmp_path)
    with Started(tmp_path, slow=0.05, torchrun=["--max-restarts", "0"]) as started:
        started.reaches(5)
        if number == signal.SIGTERM:
            started.kill(number)
        else:  # Ctrl-C comes to all processes of the terminal, and torchrun passes it on
            os.killpg(started.processes[0].pid, number)
        assert started.wait() != [0]
    step = last_step(started.run)
    assert (started.run / "preempted").read_text() == f"{number.name} at step {step}\n"
    with Started(tmp_path, torchrun=["--max-restarts", "0"]) as started:
        assert started.wait() == [0]
    check_same(straight(), started.run)


@pytest.mark.slow
def test_torchrun_restarts_the_processes_after_one_was_killed_and_they_continue(straight, tmp_path):
    write_problem(tmp_path)
    with Started(tmp_path, slow=0.03, torchrun=["--max-restarts", "2"]) as started:
        started.reaches(15)
        workers = Path(f"/proc/{started.processes[0].pid}/task/{started.processes[0].pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        assert started.wait(200) == [0]
        assert "continuing at step" in started.said()[0]
    check_same(straight(), started.run)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_when_one_process_dies_the_other_ends_soon_and_says_so(tmp_path, rank):
    write_problem(tmp_path)
    with Started(tmp_path, slow=0.05) as started:
        started.reaches(12)
        started.kill(signal.SIGKILL, rank)
        killed_at = time.monotonic()
        status = started.wait(60)
        assert time.monotonic() - killed_at < 30
        assert status[rank] == -signal.SIGKILL
        assert status[1 - rank] == 2
        err = started.said(1 - rank)[1]
    assert err.startswith(f"mtrain: rank {1 - rank}: another process of the run cannot be reached any more")
    assert len(err.splitlines()) == 1
    assert Checkpoints(started.run / "checkpoints").newest().step == 10


def check_nothing_lost(run, before, interval):
    """The newest checkpoint is whole, and at most an interval and the save in flight before the last step."""
    checkpoints = Checkpoints(run / "checkpoints")
    newest = checkpoints.newest()
    step = 0 if newest is None else newest.step
    assert checkpoints.refused == []
    assert step >= before
    assert last_step(run) - step <= 2 * interval
    return step


def kill_often(folder, times, straight):
    """Kill one or both processes at random moments, then let the run end; returns how often a save was in work."""
    write_problem(folder, train={"save_every": 3}, **LARGE)
    moments, before, in_save = random.Random(0), 0, 0
    for _ in range(times):
        with Started(folder, slow=0.03) as started:
            most = max(0, min(before + 6, STEPS - 20))
            started.reaches(before + 1 + moments.randrange(4) if before < most else before + 1)
            time.sleep(moments.random() * 0.3)
            ranks = moments.choice([(), (), (0,), (1,)])
            started.kill(signal.SIGKILL, *ranks)
            started.wait(60)
        in_save += any(path.name.startswith(".") for path in (started.run / "checkpoints").glob(".step-*"))
        before = check_nothing_lost(started.run, before, 3)
        if last_step(started.run) > STEPS - 15:  # begin again
            check_alike_so_far(straight, started.run)
            shutil.rmtree(started.run)
            before = 0
    with Started(folder) as started:
        assert started.wait() == [0, 0]
    check_same(straight, started.run)
    assert not list((started.run / "checkpoints").glob(".step-*"))
    return in_save


def check_alike_so_far(straight, run):
    loss = {line["step"]: line["loss"] for line in lines_of(straight) if "loss" in line}
    for line in lines_of(run):
        if "loss" in line:
            assert line["loss"] == pytest.approx(loss[line["step"]], rel=1e-5)


@pytest.mark.slow
def test_a_run_that_was_killed_ends_on_the_undisturbed_curve(straight, tmp_path):
    kill_often(tmp_path, 1, straight(**LARGE))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_so_does_one_that_was_killed_thirty_times(straight, tmp_path):
    assert kill_often(tmp_path, 30, straight(**LARGE)) > 0


@contextmanager
def small_disk(folder, megabytes):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted: needs root and the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_said_the_checkpoint_before_stays_and_the_run_goes_on(straight, tmp_path):
    write_problem(tmp_path)
    with small_disk(tmp_path / "run", 8), Started(tmp_path, slow=0.05) as started:
        started.reaches(12)
        started.wait_for(lambda: Checkpoints(started.run / "checkpoints").steps() == [10])
        ballast = started.run / ".ballast"
        with ballast.open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(1 << 12))
                except OSError:
                    break
        started.wait_for(lambda: "was not written" in started.said()[0])
        assert Checkpoints(started.run / "checkpoints").newest().step == 10
        ballast.unlink()
        assert started.wait() == [0, 0]
        out, err = started.said()
        line = next(line for line in out.splitlines() if "was not written" in line)
        assert re.search(r"step-000000020 was not written: .*No space left on device; the one of step 10 is intact", line)
        assert line.endswith("training goes on")
        assert err == ""
        check_same(straight(), started.run)


@pytest.mark.parametrize("how", ["cut short", "a flipped bit"])
def test_a_damaged_file_of_one_rank_is_named_and_the_checkpoint_before_is_taken(straight, stopped, tmp_path, capsys, how):
    run = copied(stopped, tmp_path)
    *_, before, newest = sorted((run / "checkpoints").glob("step-*"))
    file = newest / "shard-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data[:300] if how == "cut short" else data)
    train_here(tmp_path)
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if "it is not used" in line)
    assert f"{newest.name}/{file.name}: is damaged" in line
    assert f"continuing at step {int(before.name.removeprefix('step-'))} of" in out
    check_same(straight(), run)


def test_a_checkpoint_of_another_model_is_refused_with_the_shapes_that_differ(stopped, tmp_path, capsys):
    *_, newest = sorted((stopped / "run" / "checkpoints").glob("step-*"))
    write_problem(tmp_path, model={"trunk": {"class_path": "slow.Slow", "init_args": {"width": 12}}})
    train_here(tmp_path, "--resume", newest, status=2)
    err = capsys.readouterr().err
    assert "is of another model: 'trunk." in err
    assert "is [16, 5] there and [12, 5] here" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_processes_with_different_configs_are_refused_in_one_line(tmp_path):
    write_problem(tmp_path)
    with Started(tmp_path, each={1: ["--train.lr", "0.5"]}) as started:
        assert started.wait() == [2, 2]
        said = "rank 1 and rank 0 have another config (train.lr: 0.003 -> 0.5): give all processes the same"
        assert started.said() == ("", f"mtrain: {said}\n")
        assert started.said(1) == ("", "")
    assert not started.run.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("other", "words"), [("table", "another task table"), ("nothing", "no such file")])
def test_so_are_processes_that_find_other_data(tmp_path, other, words):
    write_problem(tmp_path)
    (tmp_path / "other").mkdir()
    table = pd.read_csv(tmp_path / "grid.csv")
    (tmp_path / "grid.csv").rename(tmp_path / "other" / "grid.csv")
    (tmp_path / "mine").mkdir()
    table.drop(columns="t3").to_csv(tmp_path / "mine" / "grid.csv", index=False)
    if other == "nothing":
        (tmp_path / "mine" / "grid.csv").unlink()
    folders = {rank: {"MTRAIN_DATA": str(tmp_path / name)} for rank, name in enumerate(("other", "mine"))}
    with Started(tmp_path, seen=folders) as started:
        assert started.wait() == [2, 2]
        errors = started.said()[1] + started.said(1)[1]
    assert words in errors
    assert len(errors.splitlines()) == 1


def log_records(data):
    """Records of a file of W&B, which is LevelDB's log format after a header of 7 bytes, up to where it was cut off."""
    at, record = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        piece = data[at + 7 : at + 7 + length]
        if kind not in range(1, 5) or len(piece) < length:
            return
        at, record = at + 7 + length, record + piece
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def history(run):
    """Ids of the runs, and the losses of each step, in all offline files."""
    from wandb.proto import wandb_internal_pb2

    ids, losses = set(), {}
    for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
            elif kind == "history":
                items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                if "loss" in items:
                    losses.setdefault(items["_step"], []).append(items["loss"])
    return ids, losses


@pytest.mark.slow
def test_wandb_has_one_run_with_every_step_of_two_processes_that_were_killed_and_stopped(tmp_path):
    write_problem(tmp_path, tracker={"class_path": "Wandb"})
    for how, step in ((signal.SIGKILL, 24), (signal.SIGTERM, 40), (None, None)):
        with Started(tmp_path, slow=0.05 if how else 0.0) as started:
            if how:
                started.reaches(step)
                started.kill(how)
            status = started.wait()
            assert status == ([0, 0] if how is None else [-how if how == signal.SIGKILL else 128 + how] * 2)
    assert len(list((started.run / "wandb").glob("offline-run-*"))) == 3  # of rank 0 only
    ids, losses = history(started.run)
    assert len(ids) == 1
    assert Checkpoints(started.run / "checkpoints").newest().state["run_id"] in ids
    assert sorted(losses) == list(range(1, STEPS + 1))
    repeated = [values for values in losses.values() if len(values) > 1]
    assert repeated
    assert all(value == pytest.approx(values[0], rel=1e-6) for values in repeated for value in values)
    expected = {line["step"]: line["loss"] for line in lines_of(started.run) if "loss" in line}
    assert {step: values[-1] for step, values in losses.items()} == pytest.approx(expected, rel=1e-6)

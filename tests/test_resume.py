"""A run goes on with another number of processes, another wrapper, other tasks, or from a checkpoint that is named.

As a program it is one process of several: `python test_resume.py JOBS` under torchrun.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from io import StringIO
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from parallel import worker
from parallel.test_invariance import check_alike, curve, weights, write_tables
from rich.console import Console
from safetensors.torch import load_file, save_file

from mtrain import runs
from mtrain.errors import UserError
from mtrain.parallel import wrap
from mtrain.train.checkpoint import Checkpoints
from mtrain.train.loop import Trainer
from mtrain.train.state import head_stacks
from mtrain.train.step import Stepper
from mtrain.train.stop import Preempted, stop_signals

STOP = 20
CASES = ("grid", "owners", "exchange", "hot-shared")
WRAPPED = [("grid", "grid-fsdp"), ("grid-fsdp", "grid"), ("owners-fsdp", "owners"), ("owners", "owners-fsdp")]


def train(case, data, run, stop=None, resume="auto", **changes):
    """Train a case of the worker; at step `stop` a signal to the last process stops it. What is said goes into a file, and
    the heads before and after a checkpoint is loaded into others, beside the run."""
    run = Path(run)
    config = worker.config_of(case, data)
    config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    call, load = Stepper.__call__, Trainer._load_state

    def stepping(self, batch, step, *rest):
        if stop is not None and step == stop - 2 and self.shard.world.rank == self.shard.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        call(self, batch, step, *rest)

    def loading(self, *arguments):
        save_heads(self, f"{run}-fresh")
        load(self, *arguments)
        save_heads(self, f"{run}-loaded")

    accelerator = worker.FSDPOnCPU if case.endswith("-fsdp") else wrap.Accelerator
    console = Console(file=StringIO(), width=200)
    with (
        mock.patch.object(wrap, "Accelerator", accelerator),
        mock.patch.object(Stepper, "__call__", stepping),
        mock.patch.object(Trainer, "_load_state", loading),
    ):
        try:
            with stop_signals("SIGTERM") as asked:
                runs.train(config, Path(data), run, console, resume, asked)
            stopped = None
        except Preempted as preempted:
            stopped = preempted.number
    assert stopped == (None if stop is None else signal.SIGTERM)
    if os.environ.get("RANK", "0") == "0":
        run.with_name(f"{run.name}.txt").write_text(console.file.getvalue())


def save_heads(trainer, name):
    heads = {}
    for each in head_stacks(trainer.bank, trainer.head_optimizer):
        for row, task in enumerate(each.names):
            heads |= {f"{task}/{key}": stack[row].clone() for key, stack in each.tensors.items()}
    save_file(heads, f"{name}-{trainer.world.rank}.safetensors")


def heads_of(run, what):
    """Heads with moments and step counts by task and name, of all ranks."""
    return {k: v for path in sorted(run.parent.glob(f"{run.name}-{what}-*")) for k, v in load_file(path).items()}


def heads_in(saved):
    """The same from a checkpoint."""
    return {
        f"{name}/{key}": saved._tensor(file, f"heads/{group['group']}/{key}")[row]
        for file, group in saved._groups
        for row, name in enumerate(group["names"])
        for key in group["shapes"]
    }


def train_all(processes, jobs):
    """Jobs, arguments of `train`, on so many processes."""
    if processes == 1:
        for job in jobs:
            train(**job)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    text = json.dumps(jobs, default=str)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, __file__, text], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[:5000]


def check_each_step_once(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 51))
    evaluated = [line["step"] for line in lines if "loss" not in line]
    assert len(evaluated) == len(set(evaluated))
    assert not (run / "preempted").exists()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_tables(folder)
    return folder


@pytest.fixture(scope="module")
def straight(root):
    """The run of a case that was not stopped, in one process."""

    @cache
    def run(case):
        train(case, root, root / "straight" / case)
        return root / "straight" / case

    return run


@pytest.fixture(scope="module")
def saved(root):
    """Runs of all cases that so many processes were stopped in, after some steps; gives their folder."""

    @cache
    def run(processes):
        cases = (*CASES, "grid-fsdp", "owners-fsdp") if processes == 2 else CASES
        train_all(
            processes, [{"case": case, "data": root, "run": root / f"{processes}" / case, "stop": STOP} for case in cases]
        )
        for case in cases:
            assert (root / f"{processes}" / case / "preempted").read_text() == f"SIGTERM at step {STOP}\n"
            assert Checkpoints(root / f"{processes}" / case / "checkpoints").newest().step == STOP
        return root / f"{processes}"

    return run


def changed_table(data, case, rows_too):
    """The table of a case in a folder of its own, with tasks added and removed."""
    folder = data / "changed"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(7)
    if case == "grid":
        table = pd.read_csv(data / "grid.csv")
        table = table.drop(columns=sorted(GONE[case])).assign(new=rng.normal(size=len(table)))
        if rows_too:  # these have no label any more
            table.loc[:40, [name for name in table if not name.startswith("x")]] = np.nan
    else:
        table = pd.read_csv(data / "even.csv")
        more = table[table["task"] == "task 1"].assign(task="new")
        table = pd.concat([table[~table["task"].isin(GONE[case])], more])
    folder = folder / f"{case}{'-rows' * rows_too}"
    folder.mkdir(exist_ok=True)
    table.to_csv(folder / ("grid.csv" if case == "grid" else "even.csv"), index=False)
    return folder


GONE = {"grid": {"t3", "t5"}, "owners": {"task 3", "task 5"}}
CHANGES = {"grid": ("grid", False), "grid-rows": ("grid", True), "owners": ("owners", False)}


@pytest.fixture(scope="module")
def continued(root, saved):
    """Gives a folder in which so many processes have continued what others, or other wrappers, or other tasks, had left."""

    @cache
    def run(processes, saving):
        folder = root / f"on-{processes}-of-{'-'.join(map(str, saving))}"
        jobs = [(root, case, saved(n) / case, folder / f"{n}-{case}") for n in saving for case in CASES]
        if (processes, saving) == (2, (1,)):
            jobs += [(root, new, saved(2) / old, folder / f"{old}-{new}") for old, new in WRAPPED]
        if len(saving) == 1:
            for name, (case, rows_too) in CHANGES.items():
                jobs.append((changed_table(root, case, rows_too), case, saved(1) / case, folder / f"changed-{name}"))
        for _, _, old, new in jobs:
            shutil.copytree(old, new)
        train_all(processes, [{"case": case, "data": data, "run": new} for data, case, _, new in jobs])
        return folder

    return run


def check_continued(straight, folder, saving):
    for case in CASES:
        check_alike(straight(case), folder / f"{saving}-{case}")
        check_each_step_once(folder / f"{saving}-{case}")


@pytest.mark.parametrize(("saving", "loading"), [(1, 2), (2, 1)])
def test_what_one_process_saved_two_continue_and_back(straight, continued, saving, loading):
    check_continued(straight, continued(loading, (saving,)), saving)


@pytest.mark.slow
@pytest.mark.parametrize("loading", [1, 2, 3, 4])
@pytest.mark.parametrize("saving", [1, 2, 3, 4])
def test_what_any_number_of_processes_saved_any_other_continues(straight, continued, saving, loading):
    check_continued(straight, continued(loading, (1, 2, 3, 4)), saving)


@pytest.mark.parametrize(("old", "new"), WRAPPED)
def test_what_a_replicated_trunk_saved_a_sharded_one_continues_and_back(straight, continued, old, new):
    run = continued(2, (1,)) / f"{old}-{new}"
    check_alike(straight(new.removesuffix("-fsdp")), run)
    check_each_step_once(run)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize(("saving", "loading"), [(1, 2), (2, 1)])
def test_heads_of_tasks_that_stay_are_identical_and_new_ones_fresh_by_name(saved, continued, name, saving, loading):
    run, case = continued(loading, (saving,)) / f"changed-{name}", CHANGES[name][0]
    said = run.with_name(f"{run.name}.txt").read_text()
    assert "1 tasks are new, their heads start fresh: new" in said
    assert f"2 tasks are gone, their heads are left behind: {', '.join(sorted(GONE[case]))}" in said
    assert ("the epoch begins anew" in said) == (name == "grid-rows")
    before = heads_in(Checkpoints(saved(1) / case / "checkpoints").at(STOP))
    fresh, loaded = heads_of(run, "fresh"), heads_of(run, "loaded")
    assert {key.split("/")[0] for key in loaded} == {key.split("/")[0] for key in before} - GONE[case] | {"new"}
    assert any(key.endswith("exp_avg_sq") for key in loaded)
    for key, tensor in loaded.items():
        assert torch.equal(tensor, fresh[key] if key.startswith("new/") else before[key]), key
    assert all(not tensor.any() for key, tensor in loaded.items() if key.startswith("new/") and key.count(".") == 2)
    check_each_step_once(run)
    other = continued(saving, (loading,)) / f"changed-{name}"
    check_alike(other, run)
    assert all(torch.equal(tensor, heads_of(other, "loaded")[key]) for key, tensor in loaded.items())


def test_the_same_tasks_with_other_rows_are_refused(root, saved, tmp_path):
    table = pd.read_csv(root / "grid.csv")
    table.loc[:40, [name for name in table if name.startswith("t")]] = np.nan
    table.to_csv(tmp_path / "grid.csv", index=False)
    shutil.copytree(saved(1) / "grid", tmp_path / "run")
    with pytest.raises(UserError, match=r"the table has \d+ training rows now"):
        train("grid", tmp_path, tmp_path / "run")


def test_a_checkpoint_that_is_named_is_continued_from(root, straight, tmp_path):
    run = tmp_path / "run"
    train("grid", root, run, save_every=10, keep_checkpoints=3)
    check_alike(straight("grid"), run)
    steps = Checkpoints(run / "checkpoints").steps()
    assert len(steps) >= 3
    end, lines = weights(run), curve(run)
    back = steps[-3]
    train("grid", root, run, resume=str(run / "checkpoints" / f"step-{back:09d}"), save_every=10, keep_checkpoints=3)
    assert f"continuing at step {back} of 50" in run.with_name("run.txt").read_text()
    assert curve(run) == lines
    check_each_step_once(run)
    assert all(torch.equal(end[name], tensor) for name, tensor in weights(run).items())
    for resume, words in (
        ("never", "--resume never: .* holds checkpoints"),
        ("latest", "expected auto, never, or a directory RUN/checkpoints/step-NUMBER"),
        (str(run / "checkpoints" / "step-000000007"), "there is no checkpoint of step 7; there are: "),
    ):
        with pytest.raises(UserError, match=words):
            train("grid", root, run, resume=resume)
    train("grid", root, tmp_path / "other", resume="never", stop=STOP)
    at = str(tmp_path / "other" / "checkpoints" / f"step-{STOP:09d}")
    train("grid", root, tmp_path / "elsewhere", resume=at)  # a checkpoint of another run
    expected = {key: value for key, value in curve(straight("grid")).items() if key[1] > STOP}
    assert curve(tmp_path / "elsewhere") == pytest.approx(expected, rel=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_all(1, json.loads(sys.argv[1]))

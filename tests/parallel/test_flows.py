"""What the planner says that a step sends, against what real trainings send, by counters and by torch's profiler.

`python test_flows.py FOLDER` under torchrun trains the cases.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from math import prod
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mtrain.parallel.plan import flows
from mtrain.train.stop import leave

STEPS = range(2, 5)  # those that are counted: DDP arranges its buckets anew after the first
# the mode, and whether there are hot tasks
CASES = {
    "owners": ("owners", False), "owners-shared": ("owners", False), "hot": ("owners", True), "hot-shared": ("owners", True),
    "exchange": ("exchange", False), "grid": ("gather", False), "members": ("gather", False),
}  # fmt: skip
COUNTED = {
    "trunk gradients": "gradients", "hot heads": "all_reduce", "shared heads": "all_reduce", "losses": "all_reduce",
    "control": "control", "all-gather": "all_gather", "reduce-scatter": "reduce_scatter", "all-to-all": "all_to_all",
}  # fmt: skip
PROCESSES = [2, pytest.param(4, marks=pytest.mark.slow)]
BYTES = {"float": 4, "double": 8}


def expected_of(plan, work):
    """The flows as `World.sent` counts them."""
    found = Counter()
    for what, flow in flows(plan, work).items():
        found[COUNTED.get(what) or COUNTED[flow.collective]] += flow.payload
    return dict(found)


@cache
def trained(processes, folder):
    """By case the mode, the planner's flows, and what was counted and profiled, on average over ranks and steps."""
    from test_invariance import write_tables

    write_tables(folder)
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(17), [600] + [20] * 10 + [5] * 6)  # one task has more than 1.2 x half of the rows
    columns = {f"x{i}": rng.normal(size=len(task)) for i in range(6)}
    frame = pd.DataFrame({"task": [f"task {t}" for t in task], "y": rng.normal(size=len(task))} | columns)
    frame.to_csv(folder / "skewed.csv", index=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{processes}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("flows")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("processes", PROCESSES)
def test_a_step_sends_what_the_planner_says(processes, case, folder):
    found = trained(processes, folder)[case]
    assert (found["mode"], found["hot"] > 0) == CASES[case]
    assert found["counted"] == pytest.approx(found["expected"], rel=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("processes", PROCESSES)
def test_and_nothing_else_travels(processes, case, folder):
    found = trained(processes, folder)[case]
    counted = dict(found["counted"])
    reduced = sum(counted.pop(what, 0) for what in ("gradients", "all_reduce", "control", "reduce_scatter"))
    gathered = counted.pop("all_gather", 0) / processes  # the profiler has the part of one rank
    profiled = {"gloo:all_reduce": reduced, "gloo:all_gather": gathered, "gloo:all_to_all": counted.pop("all_to_all", 0)}
    assert not counted
    assert found["profiled"] == pytest.approx({what: payload for what, payload in profiled.items() if payload}, rel=1e-12)


def train(case, folder):
    """The case's own trainer, watched where it begins each step."""
    from rich.console import Console
    from worker import config_of

    from mtrain import runs
    from mtrain.parallel.world import count_gradients
    from mtrain.train.loop import Trainer

    config = config_of(case, folder)
    short = config.train.model_copy(update={"steps": STEPS.stop + 1, "eval_every": 1000.0, "micro_batch": None})
    before, after, watch, trainers = Counter(), Counter(), profile(activities=[ProfilerActivity.CPU], record_shapes=True), []
    set_lr = Trainer._set_lr

    def spied(self, step, total):
        """After a step's control numbers and before the rest of it."""
        if step == 0:
            trainers.append(self)
            count_gradients(self.stepper.model, self.world.sent)
        if step == STEPS.start:
            before.update(self.world.sent)
            watch.start()
        if step == STEPS.stop:
            watch.stop()
            after.update(self.world.sent)
        set_lr(self, step, total)

    with mock.patch.object(Trainer, "_set_lr", spied):
        path = folder / f"{case}-{os.environ['WORLD_SIZE']}"
        runs.train(config.model_copy(update={"train": short}), folder, path, Console(quiet=True))
    (trainer,) = trainers
    profiled = Counter()
    for event in watch.events():
        if event.name.startswith("gloo:"):
            kinds = [kind for kind in event.input_dtypes if kind]
            profiled[event.name] += sum(prod(s) * BYTES[kind] for s, kind in zip(event.input_shapes, kinds, strict=True))
    world = trainer.world
    of_ranks = world.gather_objects([{k: v for k, v in (after - before).items() if v}, dict(profiled)])

    def mean(number):
        names = dict.fromkeys(name for one in of_ranks for name in one[number])
        return {name: sum(one[number].get(name, 0) for one in of_ranks) / len(of_ranks) / len(STEPS) for name in names}

    return {
        "mode": trainer.plan.mode,
        "hot": len(trainer.plan.hot),
        "expected": expected_of(trainer.plan, trainer.work),
        "counted": mean(0),
        "profiled": mean(1),
    }


def main(folder):
    import datasets

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    found = {case: train(case, folder) for case in CASES}
    if os.environ["RANK"] == "0":
        (folder / f"{os.environ['WORLD_SIZE']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0, together=True)

"""Trackers."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from mtrain.components import Spec, build
from mtrain.train.tracker import TRACKERS, NoTracker


def test_none_is_a_tracker_that_keeps_the_runs_id():
    tracker = build(Spec(class_path="none"), TRACKERS, "tracker")
    assert isinstance(tracker, NoTracker)
    assert tracker.start(None, None, {}, "abc") == "abc"
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()


def test_no_part_of_the_trainer_imports_wandb():
    code = "import sys, mtrain.runs, mtrain.train.loop; assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wandb_is_offline_unless_asked_and_keeps_its_id_and_steps(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    del wandb
    monkeypatch.delenv("WANDB_MODE", raising=False)
    calls = []
    run = SimpleNamespace(config=SimpleNamespace(update=lambda config, **_: calls.append(("config", config))))
    accelerator = SimpleNamespace(
        init_trackers=lambda project, config, init_kwargs: calls.append((project, init_kwargs["wandb"])),
        get_tracker=lambda name, unwrap: run,
        log=lambda values, step: calls.append((values, step)),
        trackers=[SimpleNamespace(finish=lambda: calls.append("end"))],
    )
    tracker = build(Spec(class_path="Wandb", init_args={"project": "p"}), TRACKERS, "tracker")
    run_id = tracker.start(accelerator, tmp_path / "r", {"a": 1}, None)
    tracker.log({"loss": 1.0}, 20)
    tracker.finish()
    (project, options), config, log, end = calls
    assert (project, options["mode"], options["id"], options["resume"]) == ("p", "offline", run_id, "allow")
    assert (config, log, end) == (("config", {"a": 1}), ({"loss": 1.0}, 20), "end")
    assert tracker.start(accelerator, tmp_path / "r", {}, run_id) == run_id

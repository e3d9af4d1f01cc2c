"""Trackers."""

import json
import subprocess
import sys
import time
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from mtrain import runs
from mtrain.components import Spec, build
from mtrain.config import check_config
from mtrain.errors import UserError
from mtrain.train.run_dir import RunDir
from mtrain.train.tracker import TRACKERS, NoTracker, TensorBoard


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


def run_of_many_tasks(tmp_path, tracker, num_tasks=1000):
    """A short training of so many tasks with a tracker."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 3))
    table = {f"x{i}": x[:, i] for i in range(3)} | {f"task {t}": x @ rng.normal(size=3) for t in range(num_tasks)}
    pq.write_table(pa.table(table), tmp_path / "table.parquet")
    tree = {
        "data": {"path": str(tmp_path / "table.parquet"), "layout": "grid"},
        "inputs": {"x*": "Numeric"},
        "tasks": {"kind": "regression"},
        "model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [8]}}, "neck": 4},
        "objective": {"balancer": "dwa"},
        "train": {"epochs": 2, "global_batch": 48, "log_every": 1},
        "tracker": tracker,
    }
    runs.train(check_config(tree, "test"), tmp_path, tmp_path / "run", Console(quiet=True))
    return RunDir(tmp_path / "run")


def logged(folder):
    """Values by key, and the files, that an offline W&B run has written: records in LevelDB's log format. W&B's own process
    writes them, and may be slower than the run."""
    (path,) = folder.rglob("*.wandb")
    for _ in range(300):
        keys, files, complete = records(path.read_bytes())
        if complete:
            break
        time.sleep(0.1)
    return keys, files


def records(data):
    from wandb.proto import wandb_internal_pb2

    at, whole, complete = 7, b"", False
    keys, files = defaultdict(list), []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, part = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]  # part: 1 whole, 2 first, 3 middle, 4 last
        piece, at = data[at + 7 : at + 7 + size], at + 7 + size
        whole = piece if part in (1, 2) else whole + piece
        if part in (1, 4):
            record = wandb_internal_pb2.Record.FromString(whole)
            for item in record.history.item:
                keys[item.key or "/".join(item.nested_key)].append(json.loads(item.value_json))
            files += [file.path for file in record.files.files]
            complete |= record.WhichOneof("record_type") == "exit"
    return keys, files, complete


def test_a_wandb_run_of_1000_tasks_has_few_keys(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("plotly", reason="needs the extra mtrain[report]")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    options = {"report": True, "checkpoint": True}
    run = run_of_many_tasks(tmp_path, {"class_path": "wandb", "init_args": options})
    keys, files = logged(run.path / "wandb")
    assert 20 < len(keys) < 100
    assert not any("task 17" in key for key in keys)
    assert {"loss", "lr", "valid/skill/median", "final/test/skill/median", "report/path", "tasks/final/path"} <= keys.keys()
    assert len(keys["valid/skill/median"]) == 2
    assert [len(counts) for counts in keys["tasks/skill/values"]] == [50, 50]
    assert [sum(counts) for counts in keys["tasks/weight/values"]] == [1000, 1000]
    assert keys["tasks/valid/nrows"] == [1000, 1000]
    assert any("report" in file and file.endswith(".html") for file in files)
    assert (run.path / "report.html").stat().st_size > 4e6


def test_a_tensorboard_run_has_aggregates_histograms_and_tables(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra mtrain[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_of_many_tasks(tmp_path, "tensorboard", num_tasks=30)
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    tags = events.Tags()
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(losses)
    assert set(tags["histograms"]) == {"tasks/skill", "tasks/weight", "tasks/labels_per_step"}
    assert events.Histograms("tasks/skill")[-1].histogram_value.num == 30
    text = events.Tensors("tasks/valid/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert text.count("\n") == 21
    worst = run.history().to_pandas().query("step == step.max()").sort_values("skill")["task"].iloc[0]
    assert text.splitlines()[2].startswith(f"| {worst} |")


def test_a_trackers_histograms_leave_out_what_is_not_a_number(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra mtrain[tensorboard]")
    found = []
    tracker = TensorBoard()
    tracker.writer = SimpleNamespace(add_histogram=lambda *given: found.append(given))
    tracker.log_histogram("skill", [np.nan, 1.0, np.inf, 2.0], 3)
    tracker.log_histogram("skill", [np.nan], 4)
    ((name, values, step),) = found
    assert (name, values.tolist(), step) == ("skill", [1.0, 2.0], 3)


def test_a_missing_tensorboard_is_said_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r'tensorboard is not installed; pip install "mtrain\[tensorboard\]"'):
        TensorBoard()


@pytest.mark.parametrize(
    ("tracker", "missing", "words"),
    [
        ("wandb", "wandb", 'tracker: wandb is not installed; pip install "wandb"'),
        ({"class_path": "wandb", "init_args": {"report": True}}, "plotly.offline", "plotly, which is not installed"),
        ("tensorboard", "tensorboard", "tracker: tensorboard is not installed"),
        ("torch.nn.Identity", "none", "tracker: 'torch.nn.Identity' is not a mtrain.train.tracker.Tracker"),
    ],
)
def test_a_tracker_that_cannot_be_is_refused_before_data_are_read(tmp_path, monkeypatch, tracker, missing, words):
    if missing == "plotly.offline":
        pytest.importorskip("wandb")
    monkeypatch.setitem(sys.modules, missing, None)
    tree = {"data": {"path": "nowhere.csv", "layout": "grid"}, "inputs": {"x": "Numeric"}, "tracker": tracker}
    with pytest.raises(UserError, match=words):
        runs.train(check_config(tree, "test"), tmp_path, tmp_path / "run", Console(quiet=True))
    assert not (tmp_path / "run").exists()

"""A data set for each task, through the commands: trained while it streams, killed, resumed, damaged."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import mtrain
from mtrain.cli import main
from mtrain.config import Config
from mtrain.data.batch import Pairs
from mtrain.data.prepare import prepare, read_source
from mtrain.train.loop import Trainer
from mtrain.train.run_dir import RunDir

TASKS = 12
CONFIG = {
    "data": {"layout": "files", "path": "tasks", "label": "y", "streaming": True, "chunk_rows": 50},
    "inputs": {"x*": "Numeric"},
    "tasks": {"kind": "regression"},
    "split": {"by": "within_task", "parts": {"train": 0.6, "valid": 0.2, "test": 0.2}},
    "model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [16], "dropout": 0.2}}},
    "train": {"epochs": 6, "global_batch": 32, "log_every": 5, "lr": 0.01},
}


def frames():
    rng = np.random.default_rng(0)
    slope = rng.normal(size=4)
    for t in range(TASKS):
        x = rng.normal(size=(int(rng.integers(20, 200)), 4))
        y = x @ (slope + 0.3 * rng.normal(size=4)) + t
        yield f"task {t}", pd.DataFrame(x, columns=[f"x{i}" for i in range(4)]).assign(y=y)


def write_files(folder=Path("tasks")):
    folder.mkdir()
    for name, frame in frames():
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), folder / f"{name}.parquet", row_group_size=30)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *words, code=0):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    out = capsys.readouterr()
    assert stopped.value.code == code, out.err
    return out.err if code else out.out


def save(config, name="c.yaml", **changes):
    tree = {key: value | changes.get(key, {}) if isinstance(value, dict) else value for key, value in config.items()}
    Path(name).write_text(yaml.safe_dump(tree | {k: v for k, v in changes.items() if k not in config}))
    return name


def curve(path):
    lines = [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("rows_per_second", "data_wait")} for line in lines]


def test_rows_of_a_few_files_have_one_label_each_and_no_empty_ones(here):
    """A table of 12 tasks, one in twelve of whose labels is there, must not be taken for a grid of missing labels."""
    write_files()
    source = read_source(Config.model_validate(CONFIG), Path())
    labels = prepare(source, 0).parts["train"].labels
    assert isinstance(labels, Pairs)
    assert torch.equal(labels.row_P, torch.arange(labels.num_rows))


def losses(path):
    return [line["loss"] for line in curve(path) if "loss" in line]


def test_streamed_memory_mapped_and_joined_tables_train_alike(capsys):
    write_files()
    long = pd.concat([frame.assign(task=name) for name, frame in frames()])
    long.to_parquet("long.parquet", row_group_size=100)
    one_chunk = {"data": {"chunk_rows": 1000}, "model": {"trunk": "Identity"}}
    run(capsys, "train", save(CONFIG, **one_chunk), "--run_dir", "streamed")
    run(capsys, "train", "c.yaml", "--run_dir", "mapped", "--data.streaming", "false")
    assert curve("streamed") == curve("mapped")
    run(capsys, "train", "c.yaml", "--run_dir", "small memory", "--data.memory_gb", "1e-9")
    assert curve("small memory") == curve("streamed")
    config = save(CONFIG | one_chunk | {"data": {"layout": "routed", "path": "long.parquet", "task": "task", "label": "y"}})
    run(capsys, "train", config, "--run_dir", "long")
    np.testing.assert_allclose(losses("long"), losses("streamed"), rtol=1e-5)
    # a long table that streams takes its rows in another order, of the same length and kind
    run(capsys, "train", config, "--run_dir", "long streamed", "--data.streaming", "true", "--data.chunk_rows", "200")
    np.testing.assert_allclose(losses("long streamed")[-1], losses("long")[-1], rtol=0.2)
    assert losses("long streamed") != losses("long")


def test_a_killed_run_continues_to_the_same_curve_without_noise(tmp_path):
    write_files()
    save(CONFIG, train={"epochs": 40, "eval_every": 2})
    env = os.environ | {"PYTHONPATH": str(Path(mtrain.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "mtrain", "train", "c.yaml", "--run_dir"]
    whole = subprocess.run([*words, "whole"], env=env, capture_output=True, text=True, timeout=300)
    assert (whole.returncode, whole.stderr) == (0, "")
    process = subprocess.Popen([*words, "killed"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while not list(Path("killed/checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not Path("killed/summary.json").exists()
    again = subprocess.run([*words, "killed"], env=env, capture_output=True, text=True, timeout=300)
    assert (again.returncode, again.stderr) == (0, "")
    assert "continuing at step" in again.stdout
    assert curve("killed") == curve("whole")
    table = pq.read_table("whole/per_task.parquet")
    assert sum(table["expected_share"].to_pylist()) == pytest.approx(1)
    rows = np.array(table["train_labels"].to_pylist())
    np.testing.assert_allclose(table["expected_share"].to_pylist(), rows / rows.sum())


def test_a_task_table_maps_tasks_with_other_columns_kinds_and_vocabularies_to_the_same_inputs(capsys):
    rng = np.random.default_rng(0)
    rows = []
    for t, (own, label, values) in enumerate(
        [("a", "y", [0, 1]), ("b", "stars", ["low", "high", "mid"]), ("c", "target", None), ("d", "class", ["x", "y"])]
    ):
        x = rng.normal(size=200)
        y = x * (t + 1) if values is None else np.array(values)[(x > 0) * 1 + (x > 1) * (len(values) > 2)]
        pd.DataFrame({own: x, f"{own}2": rng.normal(size=200), label: y}).to_csv(f"{own}.csv", index=False)
        rows.append(
            {"name": f"task {own}", "data": f"{own}.csv", "label": label, "inputs": {"first": own, "second": f"{own}2"}}
        )
    Path("tasks.yaml").write_text(yaml.safe_dump(rows))
    config = {
        "data": {"layout": "files", "table": "tasks.yaml", "streaming": True},
        "inputs": {"first": "Numeric", "second": "Numeric"},
    }
    shown = run(capsys, "tasks", save(config | {"train": {"epochs": 5}}))
    for name, kind in (("a", "binary"), ("b", "multiclass"), ("c", "regression"), ("d", "multiclass")):
        assert any(f"task {name}" in line and kind in line for line in shown.splitlines())
    run(capsys, "train", "c.yaml", "--run_dir", "run")
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["tasks"] == 4
    assert summary["test"]["skill"]["median"] > 0.3
    pd.DataFrame({"first": [-2.0, 2.0], "second": [0.0, 0.0]}).to_csv("new.csv", index=False)
    run(capsys, "predict", "run", "new.csv", "-o", "out.csv")
    found = pd.read_csv("out.csv")
    assert found["task b"].tolist() == ["low", "mid"]
    assert found["task c"][0] < 0 < found["task c"][1]
    run(capsys, "eval", "run")


DAMAGES = {
    "a corrupt Parquet file": lambda path: path.write_bytes(b"PAR1" + path.read_bytes()[10:]),
    "a truncated Parquet file": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "an empty file": lambda path: path.write_bytes(b""),
    "a column that is missing": lambda path: pq.write_table(pq.read_table(path).drop_columns("x2"), path),
    "another type of a column": lambda path: pq.write_table(
        pq.read_table(path).drop_columns("x2").append_column("x2", pa.array(["oops"] * pq.read_metadata(path).num_rows)), path
    ),
    "text among labels": lambda path: pq.write_table(
        pq.read_table(path).drop_columns("y").append_column("y", pa.array(["oops"] * pq.read_metadata(path).num_rows)), path
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_task_stops_the_run_with_its_name_or_is_left_out_and_counted(damage, capsys):
    write_files()
    DAMAGES[damage](Path("tasks/task 7.parquet"))
    line = run(capsys, "train", save(CONFIG), "--run_dir", "run", code=2)
    assert line.count("\n") == 1
    assert "task 7" in line
    assert not Path("run").exists()
    for streaming in ("true", "false"):
        words = ("--data.on_error", "skip_task", "--data.streaming", streaming)
        out = run(capsys, "train", "c.yaml", "--run_dir", f"run {streaming}", *words)
        assert "task 7" in out
        trained = pq.read_table(f"run {streaming}/per_task.parquet").to_pylist()
        assert {row["task"] for row in trained if row["test_labels"]} == {f"task {t}" for t in range(TASKS) if t != 7}
        assert "task 7" in " ".join(json.loads(Path(f"run {streaming}", "summary.json").read_text())["notes"])


@pytest.mark.parametrize("change", ["grew", "shrank"])
def test_data_that_changed_since_the_checkpoint_are_named_or_left_out(change, capsys):
    write_files()
    for on_error in ("stop", "skip_task"):
        config = save(CONFIG, data={"on_error": on_error}, name=f"{on_error}.yaml")
        run(capsys, "train", config, "--run_dir", on_error)
    path = Path("tasks/task 3.parquet")
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table]) if change == "grew" else table.slice(0, len(table) // 2), path)
    line = run(capsys, "train", "stop.yaml", "--run_dir", "stop", "--train.epochs", 8, code=2)
    assert "task 'task 3' has" in line
    assert "the data have changed" in line
    out = run(capsys, "train", "skip_task.yaml", "--run_dir", "skip_task", "--train.epochs", 8)
    assert "without 1 tasks that are left out: task 3" in out
    notes = json.loads(Path("skip_task/summary.json").read_text())["notes"]
    assert "1 tasks were left out while training: task 3" in notes


def binary_labels(path):
    table = pq.read_table(path)
    labels = pa.array(np.arange(len(table)) % 2)
    pq.write_table(table.drop_columns("y").append_column("y", labels), path)


GONE = "1 tasks are gone, their heads are left behind: task 3"
NEW = "1 tasks are new, their heads start fresh: new"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.unlink(), [GONE]),
        (lambda path: path.with_name("new.parquet").write_bytes(path.read_bytes()), [NEW]),
        (lambda path: path.rename(path.with_name("new.parquet")), [NEW, GONE]),
    ],
    ids=["gone", "new", "renamed"],
)
def test_a_run_continues_with_tasks_that_were_added_or_removed(change, said, capsys, monkeypatch):
    heads, save_it, load_it = {}, Trainer._save, Trainer._load_state

    def saving(self, *arguments):
        save_it(self, *arguments)
        heads["saved"] = self.bank.to_modules()

    def loading(self, *arguments):
        heads["fresh"] = self.bank.to_modules()
        load_it(self, *arguments)
        heads["loaded"] = self.bank.to_modules()

    write_files()
    config = save(CONFIG | {"tasks": {}})
    monkeypatch.setattr(Trainer, "_save", saving)
    run(capsys, "train", config, "--run_dir", "run")
    before = RunDir(Path("run")).checkpoints.newest()
    earlier = before.state["loader"]["cursors"]
    monkeypatch.setattr(Trainer, "_save", save_it)
    monkeypatch.setattr(Trainer, "_load_state", loading)
    change(Path("tasks/task 3.parquet"))
    out = run(capsys, "train", config, "--run_dir", "run", "--train.epochs", 8)
    assert [line for line in (NEW, GONE) if line in out] == said
    assert f"continuing at step {before.step} of " in out
    expected = set(before.names) - ({"task 3"} if GONE in said else set()) | ({"new"} if NEW in said else set())
    after = RunDir(Path("run")).checkpoints.newest()
    assert after.names == expected == set(pq.read_table("run/per_task.parquet")["task"].to_pylist())
    assert after.step > before.step
    cursors = after.state["loader"]["cursors"]
    assert cursors.keys() == heads["loaded"].keys() == expected
    for name, head in heads["loaded"].items():  # those that stay are identical, new ones are fresh
        wanted = heads["fresh" if name == "new" else "saved"][name]
        assert all(torch.equal(p, q) for p, q in zip(head.parameters(), wanted.parameters(), strict=True))
    assert all(cursors[name] > earlier.get(name, 0) for name in expected)
    RunDir(Path("run")).check_kinds(RunDir(Path("run")).tasks())


def test_a_run_is_not_continued_with_a_task_of_another_kind(capsys):
    write_files()
    config = save(CONFIG | {"tasks": {}})
    run(capsys, "train", config, "--run_dir", "run")
    before = Path("run/tasks.parquet").read_bytes()
    binary_labels(Path("tasks/task 3.parquet"))
    line = run(capsys, "train", config, "--run_dir", "run", "--train.epochs", 8, code=2)
    assert "task 'task 3' has another kind " in line
    assert Path("run/tasks.parquet").read_bytes() == before


class Failing:
    """A user's own sampler."""

    def probabilities(self, rows_T):
        raise RuntimeError("boom")


def test_a_sampler_that_fails_is_one_line(capsys, monkeypatch):
    write_files()
    monkeypatch.syspath_prepend(Path(__file__).parent)
    line = run(capsys, "train", save(CONFIG), "--sampler", "test_streams.Failing", "--run_dir", "run", code=2)
    assert "sampler: Failing fails with RuntimeError: boom" in line


@pytest.mark.parametrize("odd", range(4))  # whichever is read first
def test_lists_of_another_length_in_one_task_are_named_or_its_task_left_out(odd, capsys):
    Path("tasks").mkdir()
    for t in range(4):
        rng = np.random.default_rng(t)
        x = rng.normal(size=(40, 3 if t != odd else 4))
        pq.write_table(pa.table({"v": list(x), "y": x[:, 0]}), f"tasks/t{t}.parquet")
    config = save(CONFIG | {"inputs": {"v": "Array"}, "train": {"epochs": 2}})
    assert f"task 't{odd}', tasks/t{odd}.parquet, row 1: column 'v': 4 values in a row, expected 3" in run(
        capsys, "train", config, "--run_dir", "run", code=2
    )
    run(capsys, "train", config, "--run_dir", "run", "--data.on_error", "skip_task")
    scored = {row["task"] for row in pq.read_table("run/per_task.parquet").to_pylist() if row["test_labels"]}
    assert scored == {f"t{t}" for t in range(4) if t != odd}


def test_a_file_that_breaks_during_the_run_is_named(capsys, monkeypatch):
    write_files()
    evaluate = Trainer._evaluate

    def breaking(self, *arguments):
        Path("tasks/task 5.parquet").write_bytes(b"PAR1 gone")
        evaluate(self, *arguments)

    monkeypatch.setattr(Trainer, "_evaluate", breaking)
    little = ("--data.memory_gb", "1e-9", "--train.epochs", 30)  # not all of it is read before the first evaluation
    line = run(capsys, "train", save(CONFIG), "--run_dir", "run", *little, code=2)
    assert "task 'task 5'" in line
    assert "task 5.parquet" in line
    Path("tasks/task 5.parquet").unlink()
    for name, frame in frames():
        if name == "task 5":
            frame.to_parquet(f"tasks/{name}.parquet", row_group_size=30)
    out = run(capsys, "train", "c.yaml", "--run_dir", "other", *little, "--data.on_error", "skip_task")
    assert "1 tasks are left out from here on, 1 in all: task 5" in out
    assert "task 5.parquet" in " ".join(json.loads(Path("other/summary.json").read_text())["notes"])


def test_parts_that_are_scored_can_be_bounded(capsys):
    write_files()
    run(capsys, "train", save(CONFIG, split={"eval_rows": 5}), "--run_dir", "run")
    table = pq.read_table("run/per_task.parquet")
    sizes = [len(frame) for _, frame in frames()]
    for part in ("valid", "test"):
        expected = [min(5, round(0.2 * size)) for size in sizes]
        assert np.abs(np.array(table[f"{part}_labels"].to_pylist()) - expected).max() <= 1
        assert max(table[f"{part}_labels"].to_pylist()) == 5

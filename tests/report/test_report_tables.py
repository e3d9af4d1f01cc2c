"""What the commands print: names as they are, and the tasks that a person should look at."""

from io import StringIO

import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console

from mtrain import runs
from mtrain.cli import main
from mtrain.config import load_config

ODD = ["crack [red]", "crack [ja] :car:", "[/bold] hard"]
PRESSURE = "pressure [bar] :dna:"


def printed(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def write(folder, frame, **sections):
    folder.mkdir()
    frame.to_csv(folder / "table.csv", index=False)
    tree = {
        "data": {"path": "table.csv", "layout": "grid"},
        "model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [4]}}},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(tree | sections))
    return folder / "c.yaml"


@pytest.fixture
def odd(tmp_path):
    """A config of tasks and an input whose names look like markup and emoji."""
    x = np.random.default_rng(0).normal(size=(90, 1 + len(ODD)))
    x[::9, 0] = np.nan
    inputs = {PRESSURE: "Numeric"}
    tasks = {"labels": ODD, "kind": "regression"}
    return write(tmp_path / "odd", pd.DataFrame(x, columns=[PRESSURE, *ODD]), inputs=inputs, tasks=tasks, train={"epochs": 2})


def test_names_that_look_like_markup_are_shown_as_they_are(odd, tmp_path, capsys):
    out = printed(capsys, "tasks", odd)
    assert all(any(line.startswith(f"{name} ") for line in out.splitlines()) for name in ODD)
    assert f"input: {PRESSURE}: Numeric, 1 numbers" in out
    run = tmp_path / "runs [x]" / "a:car:b"
    out = printed(capsys, "train", odd, "--run_dir", run)
    assert f"note: filled missing training values with the median: {PRESSURE} (" in out
    assert f"MB, run {run}" in out
    assert "skill" in printed(capsys, "eval", run)


def test_the_progress_of_a_training_shows_names_as_they_are(odd, tmp_path, monkeypatch):
    monkeypatch.setattr("mtrain.report.progress.LIVE_EVERY_S", 0.0)
    console = Console(file=StringIO(), width=120, force_terminal=True)
    runs.train(load_config(odd, []), odd.parent, tmp_path / "run", console)
    screens = console.file.getvalue()
    assert "worst tasks" in screens
    assert all(name in screens for name in ODD)


@pytest.fixture
def long(tmp_path):
    """A config of a long table of 30 tasks, the last of which has four labels."""
    sizes = [60] * 29 + [4]
    task = np.repeat([f"shop {t:02d}" for t in range(30)], sizes)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"shop": task, "x": rng.normal(size=len(task)), "y": rng.normal(size=len(task))})
    frame.loc[frame["shop"] == "shop 17", "y"] = 0.5
    data = {"path": "table.csv", "layout": "routed", "task": "shop", "label": "y"}
    split = {"by": "within_task"}
    return write(tmp_path / "long", frame, data=data, tasks={"kind": "regression"}, inputs={"x": "Numeric"}, split=split)


def test_of_many_tasks_the_suspicious_ones_come_first_and_all_are_shown_on_demand(long, capsys):
    lines = printed(capsys, "tasks", long).splitlines()
    shown = [line.split()[1] for line in lines if line.startswith("shop ")]
    assert shown[:4] == ["17", "29", "00", "01"]
    assert len(shown) == 20
    assert "and 10 more tasks (suspicious ones come first; --all shows every task)" in lines
    assert "suspicious: 1 tasks have a constant target in training: shop 17" in lines
    assert "suspicious: 1 tasks have fewer than 5 labels in train: shop 29" in lines
    (scored,) = (line for line in lines if line.startswith("suspicious: ") and "in test" in line)
    assert scored == "suspicious: 1 tasks have fewer than 5 labels in test (1 of them none): shop 29"
    every = printed(capsys, "tasks", long, "--all").splitlines()
    assert [line.split()[1] for line in every if line.startswith("shop ")] == [f"{t:02d}" for t in range(30)]
    assert not any("more tasks" in line for line in every)


def test_a_long_table_is_said_to_have_rows_and_no_missing_labels(long, odd, capsys):
    out = printed(capsys, "tasks", long)
    assert "layout routed, 1,744 rows of 1 numbers" in out
    assert "labels: 1,744, one a row" in out
    assert "missing" not in out
    assert "labels: 270, 0% of rows x tasks have none; computed as a grid" in printed(capsys, "tasks", odd)

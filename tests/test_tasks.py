import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from mtrain.cli import main
from mtrain.config import TargetsConfig
from mtrain.data.statistics import with_statistics
from mtrain.errors import UserError
from mtrain.model.kinds import Binary, Multiclass, Poisson, Quantile, Regression
from mtrain.tasks import Task, TaskTable

TASKS = (
    Task("a", Regression(loss="huber", delta=0.5), label="a", weight=2.0),
    Task("b", Multiclass(label_smoothing=0.1), label="b", classes=("no", "maybe", "yes")),
    Task("c", Binary(pos_weight="balanced"), label="c"),
    Task("d", Quantile((0.25, 0.75)), label="d"),
    Task("e", Poisson(), label="e"),
    Task("f", Multiclass(label_smoothing=0.1), label="f", classes=("x",)),
)


class Own(Regression):
    """A user's kind, named by its import path."""


def test_a_table_comes_back_from_its_file_as_it_was(tmp_path):
    tasks = TaskTable((*TASKS, Task("g", Own(delta=0.1), label="g")))
    task_P = np.repeat(np.arange(7), 4)
    tasks = with_statistics(tasks, task_P, np.tile([0.0, 1.0, 1.0, 0.0], 7), TargetsConfig(), False)
    pq.write_table(tasks.to_arrow(), tmp_path / "tasks.parquet")
    back = TaskTable.load(tmp_path / "tasks.parquet")
    assert back.tasks == tasks.tasks
    assert back.stats.keys() == tasks.stats.keys()
    for name, values in tasks.stats.items():
        for mine, other in zip(values, back.stats[name], strict=True):
            np.testing.assert_array_equal(mine, other)


def test_a_table_is_a_sequence_of_tasks_with_arrays_of_their_numbers():
    tasks = TaskTable(TASKS)
    assert (len(tasks), tasks[1], tasks.names) == (6, TASKS[1], list("abcdef"))
    assert tasks.num_outputs_T.tolist() == [1, 3, 1, 2, 1, 2]
    assert tasks.weight_T.tolist() == [2, 1, 1, 1, 1, 1]
    assert {kind.name: at.tolist() for kind, at in tasks.by_kind().items()} == {
        "regression": [0], "multiclass": [1, 5], "binary": [2], "quantile": [3], "poisson": [4],
    }  # fmt: skip


def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(UserError, match="task 'a': the name occurs twice"):
        TaskTable((TASKS[0], TASKS[0]))


def test_the_command_shows_kinds_counts_and_what_is_suspicious(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.normal(size=100)})
    frame["good"] = rng.normal(size=100)
    frame["empty"] = np.nan
    frame["always"] = 1
    frame["flat"] = 0.1 + rng.integers(0, 1, 100)
    frame["CYP-3A4"] = rng.integers(0, 2, 100)
    frame["cyp_3a4"] = rng.integers(0, 2, 100)
    frame["color"] = rng.choice(["red", "blue"], 100)
    frame.to_csv("t.csv", index=False)
    tree = {
        "data": {"path": "t.csv", "layout": "grid"},
        "inputs": {"x": "Numeric"},
        "tasks": {"by_name": {"flat": {"kind": "regression"}}},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(SystemExit) as stopped:
        main(["tasks", "c.yaml"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    assert lines["good"][1:4] == ["regression", "real", "numbers"]
    assert lines["color"][1:5] == ["multiclass", "text,", "2", "classes"]
    assert lines["flat"][1:4] == ["regression", "as", "configured"]
    assert lines["always"][1:10] == ["binary", "only", "0", "and", "1", "1", "100", "80", "10"]
    for text in (
        "note: 1 tasks have no label and are skipped: empty",
        "suspicious: 1 tasks have only one class in training: always",
        "suspicious: 1 tasks have a constant target in training: flat",
        "suspicious: 1 names are almost the same: CYP-3A4 ~ cyp_3a4",
        "test inputs that also occur in training: 0.0%",
        "6 tasks (2 regression, 3 binary, 1 multiclass)",
    ):
        assert text in out, out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "t.csv"]

import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from small_runs import mtrain, predictions, table, trained

from mtrain.errors import UserError
from mtrain.ship import predict as module
from mtrain.ship.columns import Output, check_names, to_table

NUMBERS = ("height", "sick", "risk", "visits", "spread", "spread@0.9", "grade=low", "level=b")


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_rows_predicted_some_at_a_time_are_those_predicted_at_once(folder, tmp_path, monkeypatch, ending):
    whole = predictions(folder, folder / "run", folder / "new.parquet")
    new = pq.read_table(folder / "new.parquet")
    data = tmp_path / f"new.{ending}"
    pq.write_table(new, data, row_group_size=64) if ending == "parquet" else pacsv.write_csv(new, data)
    monkeypatch.setattr(module, "MOST", 40)
    monkeypatch.setattr(module, "FEWEST", 1)
    parts = predictions(folder, folder / "run", data)
    assert parts.column_names == whole.column_names
    assert parts["id"].to_pylist() == whole["id"].to_pylist()
    assert parts["grade"].to_pylist() == whole["grade"].to_pylist()
    for name in NUMBERS:
        np.testing.assert_allclose(parts[name].to_numpy(), whole[name].to_numpy(), rtol=1e-5, atol=1e-7)


def test_several_runs_predict_with_the_mean_of_probabilities_and_original_units(folder):
    run, other, both = (
        predictions(folder, *(folder / name for name in names), folder / "new.parquet")
        for names in (["run"], ["other"], ["run", "other"])
    )
    for name in NUMBERS:
        one, two = run[name].to_numpy(), other[name].to_numpy()
        assert not np.allclose(one, two)
        np.testing.assert_allclose(both[name].to_numpy(), (one + two) / 2, rtol=1e-9)
    probability = np.stack([both[f"grade={name}"].to_numpy() for name in ("high", "low", "mid")], 1)
    assert both["grade"].to_pylist() == np.array(["high", "low", "mid"])[probability.argmax(1)].tolist()


@pytest.mark.slow
def test_tasks_in_another_order_are_averaged_by_name(folder):
    labels = ["level", "grade", "spread", "visits", "risk", "sick", "height"]
    trained(folder, "turned", "--tasks.labels", str(labels), "--train.epochs", "1")
    run, turned, both = (
        predictions(folder, *(folder / name for name in names), folder / "new.parquet")
        for names in (["run"], ["turned"], ["run", "turned"])
    )
    np.testing.assert_allclose(both["risk"].to_numpy(), (run["risk"].to_numpy() + turned["risk"].to_numpy()) / 2, rtol=1e-9)


@pytest.mark.slow
def test_runs_of_other_tasks_or_kinds_are_not_averaged(folder, capsys):
    trained(folder, "fewer", "--tasks.labels", "[height, sick]", "--tasks.by_name", "{}", "--train.epochs", "1")
    trained(folder, "counts", "--tasks.by_name", "{visits: {kind: regression}}", "--train.epochs", "1")
    capsys.readouterr()
    for name, words in (("fewer", "only runs of the same tasks can be averaged"), ("counts", "task 'visits': is poisson in")):
        assert mtrain("predict", folder / "run", folder / name, folder / "new.parquet", "-o", folder / "no.csv") == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) == 1
        assert not list(folder.glob("*no.csv"))


def test_a_bad_value_late_in_the_table_is_named_and_leaves_nothing_behind(folder, tmp_path, capsys, monkeypatch):
    new = pq.read_table(folder / "new.parquet")
    x0 = new["x0"].to_numpy().copy()
    x0[120] = np.inf
    new = new.set_column(new.column_names.index("x0"), "x0", pa.array(x0))
    pacsv.write_csv(new, tmp_path / "new.csv")
    monkeypatch.setattr(module, "MOST", 50)
    monkeypatch.setattr(module, "FEWEST", 1)
    capsys.readouterr()
    assert mtrain("predict", folder / "run", tmp_path / "new.csv", "-o", tmp_path / "out.parquet") == 2
    error = capsys.readouterr().err
    assert "column 'x0'" in error
    assert "new.csv, row 121" in error
    assert [path.name for path in tmp_path.iterdir()] == ["new.csv"]


def test_a_rows_own_task_is_null_where_unknown_or_of_classes():
    outputs = [
        Output("a", "binary", ("a",)),
        Output("b", "multiclass", ("b=x", "b=y"), ("x", "y")),
        Output("c", "poisson", ("c",)),
    ]
    value_NV = np.array([[0.1, 0.2, 0.8, 5.0], [0.2, 0.6, 0.4, 6.0], [0.3, 0.5, 0.5, np.nan], [0.4, 0.5, 0.5, 7.0]])
    found = to_table(outputs, value_NV, pa.table({"task": ["c", "b", "c", "never seen"]}), "task")
    assert found["prediction"].to_pylist() == [5.0, None, None, None]
    assert found["b"].to_pylist() == ["y", "x", "x", "x"]
    assert found["c"].to_pylist() == [5.0, 6.0, None, 7.0]


@pytest.mark.parametrize(
    ("table", "own_task", "message"),
    [
        (
            {"task": ["prediction"]},
            False,
            "the prediction for each row's own task and a prediction of task 'prediction' would both be named 'prediction'; "
            "rename one, or leave column 'task' out, or the tasks (--own-task)",
        ),
        ({"prediction": [1], "task": ["b=x"]}, True, "column 'prediction' of the table and the prediction for each row's own"),
        ({"b=y": ["P-1"]}, False, "column 'b=y' of the table and a prediction of task 'b' would both be named 'b=y'; rename"),
        ({}, False, "a prediction of task 'b=x' and a prediction of task 'b' would both be named 'b=x'; rename one"),
    ],
)
def test_columns_of_one_name_are_refused_not_lost(table, own_task, message):
    outputs = [Output("b", "multiclass", ("b=x", "b=y"), ("x", "y")), Output("prediction", "binary", ("prediction",))]
    if not table:
        outputs = [Output("b=x", "binary", ("b=x",)), outputs[0]]
    with pytest.raises(UserError) as refused:
        check_names(outputs, list(table), "task", own_task)
    assert str(refused.value).startswith(message)


def test_a_task_named_prediction_is_the_rows_own_where_that_alone_is_written():
    outputs = [Output("prediction", "binary", ("prediction",)), Output("a", "binary", ("a",))]
    found = to_table(outputs, np.array([[0.1, 0.2], [0.3, 0.4]]), pa.table({"task": ["a", "prediction"]}), "task", True)
    assert found["prediction"].to_pylist() == [0.2, 0.3]


@pytest.fixture(scope="session")
def routed(folder):
    """A run with tasks a and b of a long table, `routed`, and its rows in `long.parquet`."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    task = rng.choice(["a", "b"], 200)
    rows = {"x0": x, "task": task, "y": 3 * x, "id": [f"P-{i}" for i in range(200)], "day": rng.integers(31, size=200)}
    pq.write_table(pa.table(rows | {"parts": [[1.0, 2.0]] * 200, "prediction": x}), folder / "long.parquet")
    data = {"path": "long.parquet", "layout": "routed", "task": "task", "label": "y", "workers": 1}
    changes = {"data": data, "inputs": {"x0": "Numeric"}, "tasks": {"kind": "regression"}}
    return trained(folder, "routed", **changes, train={"epochs": 1, "global_batch": 64})


def test_columns_of_the_table_come_along_with_the_predictions_some_at_a_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST", 40)
    monkeypatch.setattr(module, "FEWEST", 1)
    plain = predictions(folder, folder / "run", folder / "new.parquet")
    kept = predictions(folder, folder / "run", folder / "new.parquet", "--keep", "x[23]", "colour", "id")
    new = pq.read_table(folder / "new.parquet")
    assert kept.column_names[:4] == ["id", "colour", "x2", "x3"]
    assert kept.select(["id", "colour", "x2", "x3"]).to_pylist() == new.select(["id", "colour", "x2", "x3"]).to_pylist()
    assert kept.drop_columns(["colour", "x2", "x3"]).equals(plain)


def test_each_rows_own_task_alone_is_written_where_asked(folder, routed):
    every = predictions(folder, routed, folder / "long.parquet")
    own = predictions(folder, routed, folder / "long.parquet", "--own-task", "--keep", "id", "y")
    assert sorted(every.column_names) == ["a", "b", "prediction", "task"]
    assert own.column_names == ["task", "y", "id", "prediction"]
    expected = np.where(np.array(every["task"]) == "a", every["a"], every["b"])
    np.testing.assert_array_equal(own["prediction"].to_numpy(), expected)


def test_columns_that_cannot_be_kept_and_runs_named_twice_are_said_in_a_line(folder, routed, tmp_path, capsys):
    table = pq.read_table(folder / "table.parquet")
    pq.write_table(
        table.rename_columns(["grade=low" if name == "x0" else name for name in table.column_names]), tmp_path / "t.parquet"
    )
    first, second = tmp_path / "parts" / "0.parquet", tmp_path / "parts" / "1.parquet"
    first.parent.mkdir()
    long = pq.read_table(folder / "long.parquet")
    pq.write_table(long, first)
    pq.write_table(long.set_column(4, "day", pa.array(["first"] * 200)), second)
    for words, expected in (
        ([routed, folder / "long.parquet", "--keep", "dya"], "--keep dya: no such column in"),
        ([routed, folder / "long.parquet", "--keep", "pre*"], "column 'prediction' of"),
        ([folder / "run", folder / "table.parquet", "--keep", "sick"], "column 'sick' of"),
        ([folder / "run", tmp_path / "t.parquet", "--keep", "grade=low"], "no column 'x0'"),
        ([routed, folder / "long.parquet", "--keep", "parts"], "column 'parts' holds list<element: double>, which CSV cannot"),
        ([routed, first.parent, "--keep", "day"], "expected one type"),
        ([folder / "run", folder / "table.parquet", "--own-task"], "do not say their task"),
        ([folder / "run", folder / "run" / ".", folder / "table.parquet"], "is named twice"),
        ([folder / "run", folder / "table.parquet", "--all-tasks"], "--all-tasks: rows of a grid name no task"),
    ):
        capsys.readouterr()
        assert mtrain("predict", *words, "-o", tmp_path / "no.csv") == 2
        error = capsys.readouterr().err
        assert expected in error
        assert len(error.splitlines()) == 1
        assert not list(tmp_path.glob("*no.csv"))


def test_the_table_that_is_read_is_not_overwritten_and_a_folder_must_be_there(folder, tmp_path, capsys):
    shutil.copy(folder / "table.parquet", tmp_path / "t.parquet")
    for output, expected in ((tmp_path / "t.parquet", "is the table that is read"), (tmp_path / "no" / "t.csv", "no folder")):
        capsys.readouterr()
        assert mtrain("predict", folder / "run", tmp_path / "t.parquet", "-o", output) == 2
        assert expected in capsys.readouterr().err
    assert pq.read_table(tmp_path / "t.parquet").equals(pq.read_table(folder / "table.parquet"))
    assert list(tmp_path.iterdir()) == [tmp_path / "t.parquet"]


def test_how_many_of_several_runs_are_calibrated_is_said(folder, tmp_path, capsys):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    assert mtrain("calibrate", run, "--force") == 0
    capsys.readouterr()
    predictions(folder, run, folder / "other", folder / "new.parquet")
    assert "mean of 2 models, 1 of them calibrated" in capsys.readouterr().out


PEAK = """
import resource, sys
from mtrain.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(folder, tmp_path):
    peak = {}
    small = table(20_000).select(["id", "colour", "x0", "x1", "x2", "x3"])
    for times in (5, 50):
        with pq.ParquetWriter(tmp_path / "new.parquet", small.schema) as writer:
            for _ in range(times):
                writer.write_table(small)
        words = ["predict", folder / "run", tmp_path / "new.parquet", "-o", tmp_path / "out.parquet"]
        done = subprocess.run([sys.executable, "-c", PEAK, *map(str, words)], capture_output=True, text=True)
        assert pq.ParquetFile(tmp_path / "out.parquet").metadata.num_rows == times * len(small), done.stderr
        peak[times] = float(done.stdout.split("peak")[1])
    assert peak[50] < 1.1 * peak[5]

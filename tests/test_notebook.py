"""mtrain from Python: fit a table, look at the run, predict."""

import gc
import threading

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import mtrain
from mtrain.notebook import _to_arrow
from mtrain.runs import evaluate

rng = np.random.default_rng(0)
QUICK = {"steps": 40, "global_batch": 32, "decay": "constant", "lr": 0.01}


def frame(rows=200):
    x = rng.normal(size=(rows, 3))
    table = pd.DataFrame(x, columns=["x1", "x2", "x3"])
    for i in range(3):
        table[f"y{i}"] = x[:, i] * 2 + 0.1 * rng.normal(size=rows)
    return table


def fit(table, **options):
    return mtrain.fit(table, **{"train": QUICK, "show": False, **options})


def test_the_five_lines_of_the_readme():
    from sklearn.datasets import load_digits

    table = load_digits(as_frame=True).frame
    run = mtrain.fit(table, tasks=["target", "pixel_7_*"], train={"steps": 20})
    assert set(run.per_task.columns) >= {"task", "kind", "test_skill"}
    assert "target=3" in run.predict(table.head()).columns


@pytest.fixture(scope="module")
def table():
    return frame()


@pytest.fixture(scope="module")
def run(table):
    return fit(table, inputs=["x*"], tasks=["y*"])


def test_a_run_has_its_tasks_its_summary_and_predictions(run, table):
    assert run.per_task.task.tolist() == ["y0", "y1", "y2"]
    assert run.summary["tasks"] == 3
    assert run.summary["test"]["skill"]["median"] > 0.3
    predicted = run.predict(table)
    assert predicted.columns.tolist() == ["y0", "y1", "y2"]
    assert np.corrcoef(predicted.y0, table.y0)[0, 1] > 0.8
    assert "Run(3 tasks, median skill 0." in repr(run)


@pytest.mark.parametrize("kind", [pa.Table.from_pandas, datasets.Dataset.from_pandas, "csv"])
def test_every_kind_of_table_is_the_same(run, table, tmp_path, kind):
    expected = run.predict(table)
    if kind == "csv":
        table.to_csv(tmp_path / "t.csv", index=False)
        given = tmp_path / "t.csv"
    else:
        given = kind(table)
        assert _to_arrow(given).equals(_to_arrow(table))
    pd.testing.assert_frame_equal(run.predict(given), expected)


def test_a_path_stays_where_it_is(table, tmp_path):
    table.to_csv(tmp_path / "t.csv", index=False)
    run = fit(tmp_path / "t.csv", inputs=["x*"], run_dir=tmp_path / "r")
    assert not (run.path / "data.parquet").exists()
    assert run.summary["tasks"] == 3


def test_a_report_is_one_file(run, tmp_path):
    pytest.importorskip("plotly")
    assert "<html" in run.report(tmp_path / "r.html").read_text()


def test_sections_of_a_config_are_keywords(tmp_path):
    table = frame().assign(who=np.repeat(np.arange(50), 4))
    run = fit(
        table,
        inputs={"x1": "Numeric", "x2": {"class_path": "Numeric", "init_args": {"standardize": False}}},
        tasks={"labels": ["y0", "y1"], "kind": {"class_path": "regression", "init_args": {"loss": "mae"}}},
        data={"key": "who"},
        model={"trunk": {"class_path": "MLP", "init_args": {"widths": [8]}}},
        split={"seeds": [1, 2]},
        run_dir=tmp_path / "r",
    )
    text = (tmp_path / "r" / "config.yaml").read_text()
    assert "key: who" in text
    assert "loss: mae" in text
    assert "sd" in run.summary["test"]["skill"]
    assert (tmp_path / "r" / "split-1" / "per_task.parquet").is_file()
    assert len(run.predict(table.head(3))) == 3


def test_a_run_directory_tells_everything_also_after_it_was_moved(table, tmp_path, capsys):
    fit(table, inputs=["x*"], run_dir=tmp_path / "a")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "a" / "data.parquet"), table)
    (tmp_path / "a").rename(tmp_path / "b")
    from rich.console import Console

    evaluate(tmp_path / "b", Console())
    assert "skill" in capsys.readouterr().out


def test_the_same_call_continues_a_run_and_another_table_is_refused(table, tmp_path):
    first = fit(table, inputs=["x*"], run_dir=tmp_path / "r").summary
    longer = fit(table, inputs=["x*"], run_dir=tmp_path / "r", train={**QUICK, "steps": 60}).summary
    assert longer["seconds"] > first["seconds"] > 0
    with pytest.raises(mtrain.UserError, match="holds a run on another table"):
        fit(frame(), inputs=["x*"], run_dir=tmp_path / "r")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(mtrain.UserError, match="exists and is not a run"):
        fit(table, inputs=["x*"], run_dir=tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_temporary_run_goes_with_its_last_reference(table):
    run = fit(table, inputs=["x*"])
    path = run.path
    assert path.is_dir()
    del run
    gc.collect()
    assert not path.exists()


def test_it_works_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(fit(frame(), inputs=["x*"])))
    thread.start()
    thread.join()
    assert found[0].summary["tasks"] == 3


def test_an_interrupt_is_a_keyboard_interrupt_and_the_same_call_continues(tmp_path, monkeypatch):
    import signal

    from mtrain.train.step import Stepper

    table, calls, before = frame(), [], Stepper.__call__

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 10:
            signal.raise_signal(signal.SIGINT)
        return before(self, *args, **kwargs)

    monkeypatch.setattr(Stepper, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 1"):
        fit(table, inputs=["x*"], run_dir=tmp_path / "r")
    run = fit(table, inputs=["x*"], run_dir=tmp_path / "r")
    assert len(calls) == 40
    assert run.summary["tasks"] == 3


@pytest.mark.parametrize(
    ("table", "options", "line"),
    [
        ([1, 2], {}, "table: found list, expected a pandas DataFrame"),
        (frame().rename(columns={"x2": "x1"}), {}, "two columns are named 'x1'"),
        (frame().assign(x1=[1, "a"] * 100), {}, "x1.*expected one type in a column"),
        (frame(5), {}, "has 5 rows, expected at least 10"),
        (frame(), {"inputs": ["z"]}, "inputs: no column 'z'"),
        (frame(), {"modle": {}}, "modle: unknown option; did you mean 'model'"),
        (frame(), {"data": 3}, "data: found 3, expected a dict"),
        (frame(), {"train": {"epochs": -1}}, "train.epochs"),
        (frame(), {"train": {"stps": 3}}, "^mtrain.fit: train.stps: unknown option; did you mean 'steps'"),
        (frame(5), {}, "^the table: has 5 rows"),
        ("nothere.csv", {}, "data.path nothere.csv: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_no_exit(table, options, line):
    with pytest.raises(mtrain.UserError, match=line) as error:
        fit(table, **options)
    assert "\n" not in str(error.value)


def test_a_mistake_leaves_nothing_in_the_run_directory_and_overwrites_no_table(table, tmp_path):
    for options in ({"tasks": ["nope"]}, {"tasks": {"y0"}, "train": {"stepz": 2}}, {"tasks": ("y0",), "resume": True}):
        with pytest.raises(mtrain.UserError):
            mtrain.fit(table, show=False, run_dir=tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()
    own = tmp_path / "own" / "data.parquet"
    own.parent.mkdir()
    pd.DataFrame({"a": [1]}).to_parquet(own)
    with pytest.raises(mtrain.UserError, match="holds another table"):
        mtrain.fit(table, show=False, run_dir=own.parent)
    assert pd.read_parquet(own).columns.tolist() == ["a"]
    (tmp_path / "file").write_text("")
    with pytest.raises(mtrain.UserError, match="cannot be written"):
        mtrain.fit(table, show=False, run_dir=tmp_path / "file" / "run")
    with pytest.raises(mtrain.UserError, match="beside the table that was given"):
        mtrain.fit(table, show=False, data={"path": "x.csv"})


def test_a_table_that_cannot_be_predicted_is_called_the_table(run, table):
    with pytest.raises(mtrain.UserError, match=r"^no column 'x1' in the table"):
        run.predict(table.drop(columns="x1"))
    with pytest.raises(mtrain.UserError, match=r"^column 'x1', the table, row 1: found inf"):
        run.predict(table.assign(x1=np.inf))


def test_a_launcher_with_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(mtrain.UserError, match="one process"):
        fit(frame())


def test_importing_the_package_is_quick_and_lists_its_names():
    assert {"fit", "Run", "UserError"} <= set(mtrain.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fti'"):
        mtrain.fti  # noqa: B018

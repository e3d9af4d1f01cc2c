"""What a careless user can do on the command line: one clear line, exit status 2, nothing left behind."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import mtrain
from mtrain.cli import main

N = 100
GRID = {
    "data": {"path": "t.csv", "layout": "grid"},
    "inputs": {"x*": "Numeric"},
    "tasks": {"labels": ["flag", "real", "color"]},
    "model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [4]}}},
    "train": {"epochs": 1},
}
ROUTED = {"data": {"path": "t.csv", "layout": "routed", "task": "task", "label": "y"}, "inputs": {"x*": "Numeric"}}
PAIRS = {"data": {"path": "t.csv", "layout": "pairs", "task": "task", "label": "y", "key": "id"}, "inputs": {"x*": "Numeric"}}


def table():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "x1": rng.normal(size=N),
            "x2": rng.normal(size=N),
            "flag": rng.integers(0, 2, N),
            "real": rng.normal(size=N),
            "color": rng.choice(["red", "green", "blue"], N),
            "w": rng.random(N),
            "part": rng.choice(["train", "valid", "test"], N),
            "task": rng.choice(["t1", "t2"], N),
            "y": rng.normal(size=N),
            "id": [f"k{i}" for i in range(N)],
        }
    )


def merged(tree, changes):
    out = dict(tree)
    for key, value in changes.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a command that must fail; returns its one line."""
    monkeypatch.chdir(tmp_path)

    def run(changes=(), frame=None, words=(), base=GRID, argv=None):
        if not Path("t.csv").exists():
            (table() if frame is None else frame).to_csv("t.csv", index=False)
        if not Path("c.yaml").exists():
            Path("c.yaml").write_text(yaml.safe_dump(merged(base, dict(changes))))
        before = set(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(["train", "c.yaml", "--run_dir", "run", *words] if argv is None else argv)
        line = capsys.readouterr().err
        assert stopped.value.code == 2, line
        assert line.startswith("mtrain: ")
        assert line.count("\n") == 1
        assert "Traceback" not in line
        assert set(tmp_path.rglob("*")) == before
        return line

    return run


def changed(column, value, row=None):
    frame = table()
    if row is None:
        frame[column] = value
    else:
        frame[column] = frame[column].astype(object)
        frame.loc[row, column] = value
    return frame


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"path": "nope.csv"}}, "data.path nope.csv: no such file"),
        ({"tasks": {"labels": ["flag", "reel"]}}, "tasks.labels: 'reel' matches no column or task; did you mean 'real'?"),
        ({"inputs": {"x9": "Numeric"}}, "inputs: no column 'x9' in the data"),
        ({"tasks": {"labels": ["flag", "real", "flag"]}}, "tasks.labels: 'flag' occurs twice"),
        ({"tasks": {"labels": ["x1", "flag"]}}, "column 'x1' is also an input"),
        ({"data": {"streaming": "maybe"}}, "c.yaml: data.streaming: found 'maybe'"),
        ({"data": {"memory_gb": 1e308}}, "data.memory_gb: found 1e+308; input should be less than"),
        ({"data": {"key": "idd"}}, "data.key: no column 'idd' in the data; did you mean 'id'?"),
        ({"data": {"weight": "task"}}, "data.weight: column 'task' is not numeric"),
        ({"split": {"parts": {"train": 0.5, "test": 0.2}}}, "sum to 0.7, expected 1"),
        ({"split": {"parts": {"train": 0.0, "test": 1.0}}}, "no training rows"),
        (
            {"split": {"by": "column", "column": "part", "parts": {"train": "trian", "valid": "valid", "test": "test"}}},
            "split.parts.train: no value 'trian' in column 'part'; did you mean 'train'?",
        ),
        ({"split": {"by": "column", "column": "part", "parts": {"train": "train"}}}, "also holds"),
        ({"split": {"by": "within_task"}}, "within_task needs rows that belong to a task"),
        ({"split": {"by": "scaffold", "column": "color"}}, "'color' holds no SMILES"),
        ({"split": {"by": "kfold", "fold": 7}}, "fold is 7"),
        ({"tasks": {"kind": "regresion"}}, "tasks.kind: 'regresion' is unknown; did you mean 'regression'?"),
        ({"tasks": {"by_name": {"flagg": {"kind": "binary"}}}}, "'flagg' matches no task; did you mean 'flag'?"),
        ({"model": {"trunk": "MPL"}}, "model.trunk: 'MPL' is unknown; did you mean 'MLP'?"),
        ({"model": {"trunk": {"class_path": "MLP", "init_args": {"width": 3}}}}, "did you mean 'widths'?"),
        ({"model": {"trunk": "nomodule.Net"}}, "cannot import 'nomodule.Net'"),
        ({"objective": {"balancer": "equall"}}, "objective.balancer: 'equall' is unknown; did you mean 'equal'?"),
        ({"inputs": {"x*": "Numerc"}}, "inputs.x1: 'Numerc' is unknown; did you mean 'Numeric'?"),
        ({"inputs": {"x*": {"class_path": "Numeric", "init_args": {"impute": "meen"}}}}, "impute: found 'meen'"),
        ({"tracker": "wandbb"}, "tracker: 'wandbb' is unknown; did you mean 'wandb'?"),
        ({"select": {"metric": "roc_aucc"}}, "select.metric: 'roc_aucc' is not a metric"),
        ({"train": {"ephocs": 3}}, "c.yaml: train.ephocs: unknown option; did you mean 'epochs'?"),
        ({"objective": {"balancing": {"level": "trunk"}}}, "objective.balancing.level: equal takes no gradients of tasks"),
        ({"objective": {"balancing": {"every": 2}}}, "objective.balancing.every: equal takes no gradients of tasks"),
        ({"init_from": "nowhere"}, "holds no config.yaml"),
        ({"freeze": ["trunk", "heads"]}, "nothing is left to train"),
        ({"tasks": {"by_name": {"flag": {"reads": []}}}}, "flag.reads: found []; expected at least one"),
        ({"tasks": {"by_name": {"flag": {"experts": [1, 1]}}}}, "experts: found [1, 1]; expected each once"),
        (
            {"tasks": {"by_name": {"flag": {"experts": [True]}}}},
            "experts: found [True]; expected another type than true or false",
        ),
        (
            {"tasks": {"by_name": {"flag": {"reads": "task:real", "combine": [0.0]}}}},
            "combine: found [0.0]; expected weights, not only zeros",
        ),
        (
            {"tasks": {"by_name": {"flag": {"reads": "task:real", "combine": [1.0], "hidden": [4]}}}},
            "task 'flag' combines the logits of others by weights, and has hidden layers",
        ),
    ],
)
def test_a_config_that_cannot_be_trained_leaves_nothing_behind(refused, changes, message):
    assert message in refused(changes)


@pytest.mark.parametrize(
    ("column", "value", "row", "changes", "message"),
    [
        ("real", "oops", 90, {}, "label column 'real', row 91: found 'oops', expected a number as in 99 other rows"),
        ("flag", 2, 5, {"tasks": {"kind": "binary", "labels": ["flag"]}}, "task 'flag', row 6: found 2, expected 0 or 1"),
        ("flag", -2, 5, {"tasks": {"kind": "poisson", "labels": ["flag"]}}, "row 6: found -2, expected a count"),
        ("real", np.inf, 5, {}, "label column 'real', row 6: found inf"),
        ("real", np.nan, None, {"tasks": {"labels": ["real"]}}, "none of the 1 tasks has a label"),
        ("x1", np.inf, 5, {}, "column 'x1', row 6: found inf"),
        ("x1", "oops", 5, {}, "column 'x1', row 6: found text 'oops', expected a number"),
        (
            "x1", np.nan, 5, {"inputs": {"x*": {"class_path": "Numeric", "init_args": {"impute": "error"}}}},
            "column 'x1', row 6: missing value",
        ),
        ("w", -1, 7, {"data": {"weight": "w"}}, "column 'w', row 8: found -1.0, expected >= 0"),
        ("w", 0, None, {"data": {"weight": "w"}}, "column 'w' is 0 in every training row"),
        ("real", [f"{i},5" for i in range(N)], None, {}, "label column 'real', row 1: found '0,5'"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_its_column_and_row(refused, column, value, row, changes, message):
    assert message in refused(changes, changed(column, value, row))


@pytest.mark.parametrize(
    ("base", "column", "value", "row", "changes", "message"),
    [
        (ROUTED, "task", None, 4, {}, "column 'task', row 5: found no task name"),
        (ROUTED, "y", "oops", 90, {}, "label column 'y', row 91: found 'oops'"),
        (ROUTED, "w", 0, None, {"data": {"label": "yy"}}, "data.label: no column 'yy' in the data; did you mean 'y'?"),
        (ROUTED, "w", 0, None, {"inputs": {"y": "Numeric"}}, "inputs: column 'y' holds the labels"),
        (ROUTED, "w", 0, None, {"sampler": "Temprature"}, "sampler: 'Temprature' is unknown; did you mean 'Temperature'?"),
        (ROUTED, "w", 0, None, {"tasks": {"labels": ["u*"]}}, "tasks.labels: 'u*' matches no column or task"),
        (PAIRS, "id", None, 4, {}, "data.key: column 'id' has 1 missing value"),
        (PAIRS, "id", "k0", 4, {}, "column 'x1', row 5: another value than in row 1, which has the same id 'k0'"),
        (PAIRS, "w", 0, None, {"sampler": "Equal"}, "sampler is for layouts routed and files"),
    ],
)
def test_long_tables_are_checked_too(refused, base, column, value, row, changes, message):
    assert message in refused(changes, changed(column, value, row), base=base)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.csv: the file is empty"),
        (b"x1,x2,flag\n", "t.csv: no rows"),
        (np.random.default_rng(0).bytes(3000), "t.csv: cannot be read"),
        (b"x1,x1,flag\n1,2,3\n", "two columns are named 'x1'"),
        (b"x1;x2;flag\n1;2;3\n", "separated by ';'"),
        ("x1,x2,flag,real,color\n1,2,1,1,gr\xfcn\n".encode("latin-1"), "not UTF-8 text"),
    ],
)
def test_a_broken_file_is_named(refused, content, message):
    Path("t.csv").write_bytes(content)
    assert message in refused()


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        ({"v": [[1.0, 2.0]] * 5 + [[1.0]], "y": [0, 1] * 3}, {}, "column 'v', row 6: a list of 1, expected 2 as in row 1"),
        ({"v": [["p"]] * 6, "y": [0, 1] * 3}, {}, "column 'v' has type list"),
        ({"v": [[1.0]] * 6, "y": [[1.0]] * 6}, {}, "label column 'y': found type list"),
    ],
)
def test_lists_are_checked(refused, columns, changes, message):
    pq.write_table(pa.table(columns), "t.parquet")
    base = {"data": {"path": "t.parquet", "layout": "grid"}, "inputs": {"v": "Array"}, "tasks": {"labels": ["y"]}}
    assert message in refused(changes, base=base)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.lr"], "--train.lr: a value is missing"),
        (["--train.epochs=abc"], "command line: train.epochs: found 'abc'"),
        (["--train.lrr=1"], "train.lrr: unknown option; did you mean 'lr'?"),
        (["train.lr=1"], "'train.lr=1': expected an override such as --train.epochs 10"),
        (["--train.precision=fp32"], "train.precision: found 'fp32'"),
        (["--run_dir", "t.csv"], "run_dir t.csv: exists and is not a run"),
        (["--run_dir", "t.csv/run"], "run_dir t.csv/run: cannot be written"),
        (["--run_dir", "."], "run_dir .: exists and is not a run"),
        (["--resume", "last"], "--resume last: expected auto, never, or a directory RUN/checkpoints/step-NUMBER"),
    ],
)
def test_wrong_words_on_the_command_line_are_named(refused, words, message):
    assert message in refused(words=words)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "arguments are required: COMMAND"),
        (["trian", "c.yaml"], "invalid choice: 'trian'"),
        (["train"], "arguments are required: config"),
        (["train", "none.yaml"], "config none.yaml: No such file"),
        (["train", "."], "config .: Is a directory"),
        (["eval", "nowhere"], "nowhere: holds no config.yaml"),
        (["eval", "nowhere", "--train.lr", "3"], "unrecognized arguments: --train.lr 3"),
        (["predict", "nowhere", "t.csv"], "arguments are required: -o/--output"),
        (["predict", "nowhere", "t.csv", "-o", "out.xls"], "--output out.xls: expected a name that ends in"),
        (["bench", "hedas"], "invalid choice: 'hedas'"),
        (["bench", "heads", "--json", "nowhere/f.json"], "--json nowhere/f.json: no folder nowhere; make it first"),
        (["plan", "c.yaml", "--ranks", "2", "--memory", "nan"], "--memory is nan, expected GB of a process, above 0"),
        (["plan", "c.yaml", "--ranks", "1000000000"], "--ranks is 1000000000, expected 1 to 100,000"),
    ],
)
def test_wrong_commands_are_refused(refused, argv, message):
    assert message in refused(argv=argv)


def test_a_command_of_one_process_is_refused_under_a_launcher(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(argv=["baseline", "c.yaml"])
    assert "baseline runs in one process, found 2 of a launcher; start it as: mtrain baseline ..." in line


def test_a_run_with_another_configuration_is_not_overwritten(refused, tmp_path):
    table().to_csv("t.csv", index=False)
    Path("o.yaml").write_text(yaml.safe_dump(GRID))
    with contextlib.suppress(SystemExit):
        main(["train", "o.yaml", "--run_dir", "run"])
    assert (tmp_path / "run" / "summary.json").is_file()
    line = refused({"train": {"lr": 0.5, "epochs": 2}})
    assert "run_dir run: holds a run with another configuration: train.lr: 0.001 -> 0.5; choose another" in line
    Path("new.csv").write_text("x1\n1\n")
    assert "no column 'x2' in new.csv" in refused(argv=["predict", "run", "new.csv", "-o", "out.csv"])


def test_a_process_prints_one_line_and_exits_with_2(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(GRID))
    env = os.environ | {"PYTHONPATH": str(Path(mtrain.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "mtrain", "train", "c.yaml"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mtrain: data.path t.csv: no such file")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["c.yaml"]

"""The commands from end to end on small tables of each layout."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import yaml

from mtrain import runs
from mtrain.cli import main
from mtrain.train.run_dir import RunDir

ROOT = Path(__file__).parents[1]
LAYOUTS = ["grid", "routed", "pairs"]
INPUTS = [f"x{i}" for i in range(4)]
KINDS = {"height": "regression", "sick": {"class_path": "binary", "init_args": {"pos_weight": 4.0}}, "visits": "poisson"}
GRADES = np.array(["low", "mid", "high"])


def tables(rows=120):
    """Inputs [N, 4], and labels by task that follow from them; a quarter is missing."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, len(INPUTS)))
    y = {
        "height": 170 + 12 * x[:, 0],
        "sick": (x[:, 1] > 0.8).astype(float),
        "visits": rng.poisson(np.exp(0.8 * x[:, 2])).astype(float),
        "spread": 3 * x[:, 0] - 2 * x[:, 1],
        "grade": np.digitize(x[:, 3], [-0.5, 0.5]).astype(float),
    }
    for values in y.values():
        values[rng.random(rows) < 0.25] = np.nan
    return x, y


def write_problem(folder, layout):
    """A table and its config in a folder; returns the config's path."""
    x, y = tables()
    by_name = {name: {"kind": kind} for name, kind in KINDS.items()}
    by_name["spread"] = {"kind": {"class_path": "quantile", "init_args": {"levels": [0.1, 0.5, 0.9]}}}
    by_name["grade"] = {"kind": "multiclass"}
    inputs = {f"x{i}": x[:, i] for i in range(4)}
    if layout == "grid":
        grade = pa.array([None if np.isnan(v) else GRADES[int(v)] for v in y["grade"]])
        labels = {name: pa.array(v, from_pandas=True) for name, v in y.items()} | {"grade": grade}
        pq.write_table(pa.table({"id": np.arange(len(x))} | inputs | labels), folder / "table.parquet")
        data = {"path": "table.parquet", "layout": "grid", "key": "id"}
        tasks = {"labels": list(y), "by_name": by_name}
    else:
        values = np.stack(list(y.values()), 1)
        row, task = np.nonzero(~np.isnan(values))
        long = {"id": row, "what": np.array(list(y))[task], "value": values[row, task]}
        pacsv.write_csv(pa.table(long | {name: v[row] for name, v in inputs.items()}), folder / "table.csv")
        data = {"path": "table.csv", "layout": layout, "key": "id", "task": "what", "label": "value"}
        tasks = {"by_name": by_name}
    config = {
        "data": data,
        "inputs": {"x*": "Numeric"},
        "tasks": tasks,
        "model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [24]}}},
        "train": {"epochs": 25, "global_batch": 32, "lr": 0.02, "decay": "cosine"},
        "select": {"reduce": "mean"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def mtrain(*words):
    """Run a command in this process; returns its exit status."""
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return done.value.code


@pytest.fixture(scope="module", params=LAYOUTS)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    assert mtrain("train", write_problem(folder, request.param), "--run_dir", folder / "run") == 0
    return request.param, folder


def new_rows(folder, rows=7):
    """A table of inputs without labels, in the folder."""
    x = np.random.default_rng(5).normal(size=(rows, len(INPUTS)))
    pq.write_table(pa.table({"id": np.arange(100, 100 + rows)} | {f"x{i}": x[:, i] for i in range(4)}), folder / "new.parquet")
    return x, folder / "new.parquet"


def summary_of_eval(run, monkeypatch):
    """What `mtrain eval` would print."""
    printed = {}
    monkeypatch.setattr(runs.tables, "print_summary", lambda summary, *_: printed.update(summary))
    assert mtrain("eval", run) == 0
    return printed


def assert_same_figures(found, expected):
    for part in ("valid", "test"):
        assert found[part].keys() == expected[part].keys()
        for metric, values in expected[part].items():
            for name, value in values.items():
                if name != "sd":
                    same = value if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)
                    assert found[part][metric][name] == same, (part, metric, name)


def test_training_learns_what_is_there(trained):
    _, folder = trained
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["tasks"] == 5
    assert summary["test"]["skill"]["mean"] > 0.2
    assert summary["valid"]["skill"]["scored"] == 5


def test_eval_reproduces_the_summary_from_anywhere(trained, tmp_path, monkeypatch):
    """The data lie beside the config, which is another folder than the one in which eval runs."""
    _, folder = trained
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MTRAIN_DATA", raising=False)
    found = summary_of_eval(folder / "run", monkeypatch)
    assert_same_figures(found, json.loads((folder / "run" / "summary.json").read_text()))


def test_predict_writes_a_column_for_each_task_in_original_units(trained, tmp_path):
    layout, folder = trained
    x, path = new_rows(tmp_path)
    assert mtrain("predict", folder / "run", path, "-o", tmp_path / "out.parquet") == 0
    out = pq.read_table(tmp_path / "out.parquet")
    names = GRADES if layout == "grid" else np.array(["0", "1", "2"])
    quantiles = ["spread", "spread@0.1", "spread@0.5", "spread@0.9"]
    expected = {"id", "height", "sick", "visits", *quantiles, "grade", *(f"grade={name}" for name in names)}
    assert set(out.column_names) == expected
    assert out["id"].to_pylist() == list(range(100, 107))
    np.testing.assert_allclose(out["height"].to_numpy(), 170 + 12 * x[:, 0], atol=12)
    assert ((out["sick"].to_numpy() > 0) & (out["sick"].to_numpy() < 1)).all()
    assert (out["visits"].to_numpy() > 0).all()
    probability = np.stack([out[f"grade={name}"].to_numpy() for name in sorted(names)], 1)
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-6)
    assert out["grade"].to_pylist() == np.array(sorted(names))[probability.argmax(1)].tolist()
    np.testing.assert_array_equal(out["spread"].to_numpy(), out["spread@0.5"].to_numpy())

    assert mtrain("predict", folder / "run", path, "-o", tmp_path / "out.csv") == 0
    again = pacsv.read_csv(tmp_path / "out.csv")
    assert again.column_names == out.column_names
    np.testing.assert_allclose(again["height"].to_numpy(), out["height"].to_numpy())


def test_predictions_of_training_rows_have_the_scores_of_the_summary(trained, tmp_path):
    """The figure in summary.json again, from the written predictions and the split that the run stored."""
    layout, folder = trained
    table = folder / ("table.parquet" if layout == "grid" else "table.csv")
    assert mtrain("predict", folder / "run", table, "-o", tmp_path / "out.parquet") == 0
    out, labels = pq.read_table(tmp_path / "out.parquet"), pq.read_table(table) if layout == "grid" else pacsv.read_csv(table)
    part = pq.read_table(folder / "run" / "split.parquet")
    test = part["row"].to_numpy()[part["part"].to_numpy(zero_copy_only=False) == "test"]
    if layout == "grid":
        y = labels["height"].to_numpy()[test]
    else:
        y = np.where(labels["what"].to_numpy(zero_copy_only=False) == "height", labels["value"].to_numpy(), np.nan)[test]
    error = out["height"].to_numpy()[test] - y
    per_task = pq.read_table(folder / "run" / "per_task.parquet")
    at = per_task["task"].to_pylist().index("height")
    assert per_task["test_mse"][at].as_py() == pytest.approx(np.nanmean(error**2), rel=1e-4)


def test_routed_predictions_and_pairs_have_a_column_for_the_rows_own_task(trained, tmp_path, capsys):
    layout, folder = trained
    if layout == "grid":
        pytest.skip("rows of a grid have all tasks")
    table = pacsv.read_csv(folder / "table.csv")
    own = table["what"].to_pylist()
    own[3] = "never seen"
    pq.write_table(table.set_column(table.column_names.index("what"), "what", pa.array(own)), tmp_path / "in.parquet")
    words = ["predict", folder / "run", tmp_path / "in.parquet", "-o", tmp_path / "out.parquet"]
    capsys.readouterr()
    if layout == "routed":
        assert mtrain(*words) == 2
        assert "in.parquet, row 4: found 'never seen', expected one of the run's tasks" in capsys.readouterr().err
    assert mtrain(*words, "--all-tasks") == 0
    out = pq.read_table(tmp_path / "out.parquet")
    for row, (task, value) in enumerate(zip(own, out["prediction"].to_pylist(), strict=True)):
        expected = None if task in ("never seen", "grade") else out[task][row].as_py()
        assert value == expected


@pytest.mark.parametrize(
    ("data", "output", "words"),
    [
        ("new.parquet", "out.xlsx", "expected a name that ends in .parquet or .csv"),
        ("missing.parquet", "out.csv", "no such file"),
        ("narrow.parquet", "out.csv", "no column 'x3'"),
        ("new.parquet", "no/such/folder/out.csv", "no folder"),
    ],
)
def test_predictions_that_cannot_be_made_are_refused_in_one_line(trained, tmp_path, capsys, data, output, words):
    layout, folder = trained
    if layout != "grid":
        pytest.skip("the same for all layouts")
    _, path = new_rows(tmp_path)
    pq.write_table(pq.read_table(path).drop_columns(["x3"]), tmp_path / "narrow.parquet")
    assert mtrain("predict", folder / "run", tmp_path / data, "-o", tmp_path / output) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("*out*"))


def test_a_directory_that_is_no_run_is_refused(tmp_path, capsys):
    assert mtrain("eval", tmp_path) == 2
    assert "expected the directory of a run" in capsys.readouterr().err


def test_a_run_that_was_stopped_early_cannot_predict_yet_and_says_so(tmp_path, capsys, monkeypatch):
    config = write_problem(tmp_path, "grid")
    monkeypatch.setattr(runs.Trainer, "run", lambda self, start: (_ for _ in ()).throw(KeyboardInterrupt))
    assert mtrain("train", config, "--run_dir", tmp_path / "run") == 130
    _, path = new_rows(tmp_path)
    assert mtrain("predict", tmp_path / "run", path, "-o", tmp_path / "out.csv") == 2
    assert "continue it with mtrain train" in capsys.readouterr().err


def test_several_seeds_and_a_refit_are_evaluated_again_and_predict_with_their_mean(tmp_path, monkeypatch):
    config = write_problem(tmp_path, "grid")
    words = ["--split.seeds", "[0, 1]", "--split.refit", "true", "--train.epochs", "4"]
    assert mtrain("train", config, *words, "--run_dir", tmp_path / "run") == 0
    found = summary_of_eval(tmp_path / "run", monkeypatch)
    assert_same_figures(found, json.loads((tmp_path / "run" / "summary.json").read_text()))
    _, path = new_rows(tmp_path)
    single = []
    for name in ("run", "run/split-0", "run/split-1"):
        assert mtrain("predict", tmp_path / name, path, "-o", tmp_path / "out.parquet") == 0
        out = pq.read_table(tmp_path / "out.parquet")
        single.append([out[c].to_numpy() for c in ("height", "sick", "visits", "grade=low", "spread")])
    for both, first, second in zip(*single, strict=True):
        np.testing.assert_allclose(both, (first + second) / 2, rtol=1e-6)
    assert not np.allclose(single[1][0], single[2][0])


def test_molecules_that_do_not_parse_are_predicted_as_null(tmp_path, capsys):
    pytest.importorskip("rdkit")
    carbons = ["C" * n + end for n in range(1, 16) for end in ("", "O", "N", "F")]
    y = np.array([len(s) for s in carbons], dtype=float)
    table = pa.table({"smiles": carbons, "size": y, "long": (y > 8).astype(float)})
    pq.write_table(table, tmp_path / "mols.parquet")
    config = {
        "data": {"path": "mols.parquet", "layout": "grid", "key": "smiles", "workers": 1},
        "inputs": {"smiles": {"class_path": "ECFP", "init_args": {"bits": 64, "on_invalid": "skip"}}},
        "tasks": {"labels": ["size", "long"]},
        "model": {"trunk": "Identity"},
        "train": {"epochs": 2},
    }
    (tmp_path / "mols.yaml").write_text(yaml.safe_dump(config))
    assert mtrain("train", tmp_path / "mols.yaml", "--run_dir", tmp_path / "run") == 0
    pq.write_table(pa.table({"smiles": ["CCO", "not a molecule", "CCN"]}), tmp_path / "new.parquet")
    capsys.readouterr()
    assert mtrain("predict", tmp_path / "run", tmp_path / "new.parquet", "-o", tmp_path / "out.csv") == 0
    out = pacsv.read_csv(tmp_path / "out.csv")
    for name in ("size", "long"):
        assert [value is None for value in out[name].to_pylist()] == [False, True, False]
    assert out["smiles"].to_pylist() == ["CCO", "not a molecule", "CCN"]
    assert "1 of 3 rows have inputs that cannot be used: no prediction" in capsys.readouterr().out


def test_a_trained_run_cannot_be_made_shorter_and_keeps_its_record(tmp_path, capsys):
    words = ["train", "configs/digits.yaml", "--run_dir", str(tmp_path / "run"), "--train.epochs"]
    for epochs, status in (("2", 0), ("1", 2)):
        with pytest.raises(SystemExit) as exit:
            main([*words, epochs])
        assert exit.value.code == status
    assert "train.epochs: 2 -> 1; a run can be made longer, not shorter" in capsys.readouterr().err
    assert "epochs: 2.0" in (tmp_path / "run" / "config.yaml").read_text()


def test_the_embedded_default_trains_for_a_few_epochs(tmp_path):
    words = ["--train.epochs", "6", "--train.decay", "constant"]
    assert mtrain("train", ROOT / "configs" / "digits.yaml", *words, "--run_dir", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tasks"] > 90
    assert summary["test"]["skill"]["median"] > 0.3
    assert summary["test"]["roc_auc"]["scored"] == 55


def test_a_run_with_another_configuration_is_not_overwritten(trained, capsys):
    _, folder = trained
    before = RunDir(folder / "run").config()
    words = ["--run_dir", folder / "run", "--model.neck", "5"]
    assert mtrain("train", folder / "config.yaml", *words) == 2
    assert "model.neck: null -> 5" in capsys.readouterr().err
    assert RunDir(folder / "run").config() == before


@pytest.mark.slow
def test_wandb_offline_keeps_one_id_over_restarts_and_explicit_steps(tmp_path):
    config = write_problem(tmp_path, "grid")
    command = [sys.executable, "-m", "mtrain", "train", config, "--tracker", "Wandb", "--run_dir", tmp_path / "run"]
    for epochs in ("2", "4"):
        done = subprocess.run([*map(str, command), "--train.epochs", epochs], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    ids = {path.name.rpartition("-")[2] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")}
    assert len(ids) == 1
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2
    assert RunDir(tmp_path / "run").checkpoints.newest().state["run_id"] == ids.pop()

import json
import shutil
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_runs import mtrain, predictions, trained

from mtrain.errors import UserError
from mtrain.ship import Predictor
from mtrain.ship import export as module
from mtrain.tasks import TaskTable


class Fickle(torch.nn.Module):
    """Goes another way for other values, which no graph can follow."""

    def __init__(self, in_features: int, width: int = 4):
        super().__init__()
        self.linear = torch.nn.Linear(in_features, width)
        self.out_features = width

    def forward(self, x_BF):
        return self.linear(x_BF) if x_BF.sum() > 0 else -self.linear(x_BF)


@pytest.fixture(scope="session")
def exported(folder):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert mtrain("export", folder / "run", "-o", folder / "exported") == 0
    return folder / "exported"


def assert_same(found, expected):
    """Tables of the same columns and texts, and numbers to 1e-5."""
    assert found.column_names == expected.column_names
    for name, kind in zip(expected.column_names, expected.schema.types, strict=True):
        if pa.types.is_floating(kind):
            np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), rtol=1e-5, atol=1e-5)
        else:
            assert found[name].to_pylist() == expected[name].to_pylist()


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_the_predictor_gives_the_numbers_of_mtrain_predict_for_all_kinds(folder, exported, backend):
    expected = predictions(folder, folder / "run", folder / "new.parquet")
    predictor = Predictor.load(exported, backend)
    assert set(predictor.columns) == {"x0", "x1", "x2", "x3", "colour"}
    assert_same(predictor.predict(folder / "new.parquet"), expected)
    table = pq.read_table(folder / "new.parquet")
    assert_same(predictor.predict(table.slice(3, 1)), expected.slice(3, 1))
    assert len(predictor.predict(table.slice(0, 0))) == 0
    frame = table.to_pandas().set_index(np.arange(10, 160)).drop(columns="id")
    found = predictor.predict(frame)
    assert isinstance(found, pd.DataFrame)
    assert found.index.tolist() == frame.index.tolist()
    np.testing.assert_allclose(found["height"], expected["height"].to_numpy(), rtol=1e-5)


def test_the_folder_says_what_the_model_is(folder, exported):
    tasks = pq.read_table(exported / "tasks.parquet")
    per_task = pq.read_table(folder / "run" / "per_task.parquet")
    assert tasks["task"].to_pylist() == per_task["task"].to_pylist()
    np.testing.assert_array_equal(tasks["threshold"].to_numpy(), per_task["threshold"].to_numpy())
    assert TaskTable.load(exported / "tasks.parquet").names == tasks["task"].to_pylist()
    thresholds = Predictor.load(exported).thresholds
    assert thresholds.keys() == {"sick", "risk"}
    assert json.loads((exported / "features.json").read_text()) == json.loads((folder / "run" / "features.json").read_text())
    card = (exported / "model_card.md").read_text()
    skill = np.maximum(per_task["test_skill"].to_numpy(), -1)
    assert f"| skill | {np.mean(skill):.4f} | {np.median(skill):.4f} |" in card
    for words in ("7 tasks of 7", "`table.parquet`, layout grid", "not calibrated", "## Limits", "torch", "onnx"):
        assert words in card


@pytest.mark.slow
def test_the_predictor_needs_neither_the_trainer_nor_its_libraries(folder, exported):
    code = """
        import sys
        gone, blocked = {"accelerate", "wandb", "datasets", "sklearn", "torchmetrics", "rich"}, set(sys.argv[3:])
        sys.modules |= dict.fromkeys(gone)  # cannot be imported, and are not found by who only looks for them
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in blocked:
                    raise ImportError(f"{name} is blocked")
        sys.meta_path.insert(0, Block())
        from mtrain.ship import Predictor
        found = Predictor.load(sys.argv[1], "onnx" if "torch" in blocked else "torch").predict(sys.argv[2])
        assert not any(sys.modules[name] for name in gone) and not blocked & sys.modules.keys()
        print(found["height"][0].as_py())
        """
    expected = predictions(folder, folder / "run", folder / "new.parquet")["height"][0].as_py()
    for more in ([], ["torch", "pandas"]):
        words = [sys.executable, "-c", textwrap.dedent(code), exported, folder / "new.parquet", *more]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == pytest.approx(expected, rel=1e-5)


def test_some_tasks_with_a_calibration_and_without_onnx(folder):
    run = trained(folder, "shipped")
    assert mtrain("calibrate", run, "--force") == 0
    words = ["--tasks", "ri*", "grade", "--no-onnx"]
    assert mtrain("export", run, "-o", folder / "some", *words) == 0
    expected = predictions(folder, run, folder / "new.parquet")
    predictor = Predictor.load(folder / "some")
    found = predictor.predict(folder / "new.parquet")
    assert found.column_names == ["id", "risk", "grade", "grade=high", "grade=low", "grade=mid"]
    assert_same(found, expected.select(found.column_names))
    calibration = json.loads((run / "calibration.json").read_text())
    t = calibration["task"].index("risk")
    threshold = pq.read_table(run / "per_task.parquet")["threshold"][t].as_py()
    odds = calibration["slope"][t] * np.log(threshold / (1 - threshold)) + calibration["intercept"][t]
    assert predictor.thresholds == {"risk": pytest.approx(1 / (1 + np.exp(-odds)))}
    assert not (folder / "some" / "model.onnx").exists()
    with pytest.raises(UserError, match=r"holds no model\.onnx"):
        Predictor.load(folder / "some", "onnx")
    assert mtrain("export", run, "-o", folder / "plain", "--no-calibration", *words) == 0
    plain = predictions(folder, run, folder / "new.parquet", "--no-calibration")
    assert_same(Predictor.load(folder / "plain").predict(folder / "new.parquet"), plain.select(found.column_names))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "by_name"),
    [
        ({"trunk": {"class_path": "MLP", "init_args": {"widths": [8], "members": 2, "norm": "layer"}}}, {}),
        (
            {"trunk": {"class_path": "MLP", "init_args": {"widths": [8]}}, "neck": 6, "head": {"scale_shift": True}},
            {"risk": {"reads": ["features", "task:sick"]}, "sick": {"hidden": ["2x"]}},
        ),
    ],
    ids=["members", "dependents"],
)
def test_ensembles_and_heads_that_read_others_are_exported(folder, model, by_name):
    name = "members" if "neck" not in model else "dependents"
    trained(folder, name, "--tasks.by_name", json.dumps(by_name), "--train.epochs", "1", model=model)
    assert mtrain("export", folder / name, "-o", folder / f"{name}-out", "--tasks", "risk", "--no-onnx") == 0
    expected = predictions(folder, folder / name, folder / "new.parquet")
    found = Predictor.load(folder / f"{name}-out").predict(folder / "new.parquet")
    assert found.column_names == (["id", "sick", "risk"] if name == "dependents" else ["id", "risk"])
    assert_same(found, expected.select(found.column_names))


@pytest.mark.slow
def test_what_cannot_be_exported_is_said_in_one_line(folder, capsys):
    trunk = {"trunk": {"class_path": "test_export.Fickle"}}
    trained(folder, "fickle", "--train.epochs", "1", model=trunk)
    trained(folder, "seeds", "--split.seeds", "[0, 1]", "--train.epochs", "1")
    for words, expected in (
        ([folder / "fickle", "-o", folder / "no", "--no-onnx"], "trunk test_export.Fickle cannot be exported"),
        ([folder / "seeds", "-o", folder / "no", "--no-onnx"], "name one of them"),
        ([folder / "run", "-o", folder / "other", "--no-onnx"], "exists; expected the name of a new folder"),
        ([folder / "run", "-o", folder / "no", "--no-onnx", "--tasks", "rusk"], "did you mean 'risk'"),
    ):
        capsys.readouterr()
        assert mtrain("export", *words) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert len(error.splitlines()) == 1
        assert not list(folder.glob("*no"))


@pytest.mark.slow
def test_a_program_with_other_numbers_is_not_written(folder, capsys, monkeypatch):
    class Wrong(Predictor):
        @staticmethod
        def load(path, backend="torch"):
            predictor = Predictor.load(path, backend)
            right = predictor.model
            predictor.model = lambda x_BF: right(x_BF) * 1.001
            return predictor

    monkeypatch.setattr(module, "Predictor", Wrong)
    assert mtrain("export", folder / "run", "-o", folder / "wrong", "--no-onnx") == 2
    assert "torch gives 'height'" in capsys.readouterr().err
    assert not list(folder.glob("*wrong"))


def test_rows_of_tasks_that_the_model_has_not_are_warned_of(monkeypatch):
    tasks = [{"task": name, "kind": "poisson", "values": [name], "classes": [], "threshold": None} for name in ("1", "2")]
    predictor = Predictor(None, [], {"tasks": tasks, "key": None, "task": "shop"})
    monkeypatch.setattr(predictor, "values", lambda rows: np.ones((len(rows), 2)))
    with pytest.warns(UserWarning, match=r"column 'shop': 2 of 4 rows name no task of the model, the first 3") as found:
        values = predictor.predict(pa.table({"shop": [1, 3, None, 2]}))
    assert found[0].filename == __file__
    assert values["prediction"].to_pylist() == [1.0, None, None, 1.0]
    with warnings.catch_warnings(action="error"):
        predictor.predict(pa.table({"shop": [1, 2]}))
        predictor.predict(pa.table({"other": [3]}))


def test_a_prediction_that_would_be_lost_under_the_name_of_another_is_refused(monkeypatch):
    task = {"task": "prediction", "kind": "poisson", "values": ["prediction"], "classes": [], "threshold": None}
    predictor = Predictor(None, [], {"tasks": [task], "key": None, "task": "shop"})
    monkeypatch.setattr(predictor, "values", lambda rows: np.ones((len(rows), 1)))
    with pytest.raises(UserError, match=r"would both be named 'prediction'; rename one, or leave column 'shop' out"):
        predictor.predict(pa.table({"shop": ["prediction"]}))
    assert predictor.predict(pa.table({"other": [3]}))["prediction"].to_pylist() == [1.0]


def test_wrong_folders_tables_and_columns_are_said(folder, exported, tmp_path):
    predictor = Predictor.load(exported)
    table = pq.read_table(folder / "new.parquet")
    for call, words in (
        (lambda: Predictor.load(folder / "run"), "holds no predictor.json"),
        (lambda: Predictor.load(exported, "onxx"), "did you mean 'onnx'"),
        (lambda: predictor.predict(table.drop_columns(["x2"])), "no column 'x2'"),
        (lambda: predictor.predict(tmp_path / "none.csv"), "no such file"),
        (lambda: predictor.predict([1, 2]), "expected a data frame"),
        (lambda: predictor.predict({"x0": [1.0]}), "found dict, expected a data frame"),
        (lambda: predictor.predict(table.append_column("x2", table["x2"])), "2 columns of the table are named 'x2'"),
        (lambda: predictor.predict(pd.DataFrame([[1, 2]], columns=["x0", "x0"])), "the data frame cannot be used, ValueError"),
        (lambda: predictor.predict(pd.DataFrame({"x0": [1.0, "a"]})), "the data frame cannot be used, Arrow"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_a_csv_file_is_read_as_mtrain_predict_reads_it(folder, exported, tmp_path):
    head = "id,colour,x0,x1,x2,x3"
    cells = ["7,red,1,2,3,4", "8,,1,2,3,4", "9,NA,1,None,3,4", "9,None,1,2,3,4"]
    (tmp_path / "t.csv").write_text("\n".join([head, *cells]))
    (tmp_path / "t.tsv").write_text("\n".join([head, *cells]).replace(",", "\t"))
    expected = predictions(folder, folder / "run", tmp_path / "t.csv")
    for name in ("t.csv", "t.tsv"):
        assert_same(Predictor.load(exported).predict(tmp_path / name), expected)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("predictor.json", b'{"format": 1, "tas'),
        ("predictor.json", b"[1]"),
        ("predictor.json", b'{"format": 1}'),
        ("features.json", None),
        ("features.json", b'[{"feature": 1}]'),
        ("model.pt2", b"PK\3\4 cut short"),
        ("model.onnx", b"cut short"),
    ],
)
def test_a_damaged_folder_is_said_in_one_line(exported, tmp_path, file, content):
    copy = shutil.copytree(exported, tmp_path / "model")
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}: cannot be read, \w+: .*; export the run again$") as refused:
        Predictor.load(copy, "onnx" if file == "model.onnx" else "torch")
    assert "\n" not in str(refused.value)

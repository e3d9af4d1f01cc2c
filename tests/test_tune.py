import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mtrain.cli import main
from mtrain.config import load_config
from mtrain.errors import UserError
from mtrain.train.run_dir import RunDir
from mtrain.tune import default_space, read_space

optuna = pytest.importorskip("optuna")


def mtrain(*words):
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return done.value.code


@pytest.fixture
def config(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    y = {f"y{t}": x @ rng.normal(size=3) for t in range(3)}
    pq.write_table(pa.table({f"x{i}": x[:, i] for i in range(3)} | y), tmp_path / "table.parquet")
    tree = {
        "data": {"path": "table.parquet", "layout": "grid"},
        "inputs": {"x*": "Numeric"},
        "tasks": {"labels": ["y*"], "kind": "regression"},
        "model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [8]}}},
        "train": {"epochs": 2, "global_batch": 32},
        "select": {"predictions": 0},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "space.yaml").write_text(
        "train.lr: {low: 1.0e-5, high: 3.0e-2, log: true}\nmodel.head.hidden: {choices: [[], [4]]}\n"
    )
    return tmp_path / "c.yaml"


@pytest.mark.slow
def test_trials_go_on_where_they_stopped_and_the_best_is_a_config(config, tmp_path, capsys):
    words = ["tune", config, "--space", tmp_path / "space.yaml", "--run_dir", tmp_path / "tuned"]
    assert mtrain(*words, "--trials", "2") == 0
    assert mtrain(*words, "--trials", "4") == 0
    study = optuna.load_study(study_name="mtrain", storage=f"sqlite:///{tmp_path / 'tuned' / 'study.db'}")
    assert len(study.trials) == 4
    values = [
        RunDir(tmp_path / "tuned" / f"trial-{n:04d}").load_json("summary.json")["valid"]["skill"]["median"] for n in range(4)
    ]
    assert [trial.value for trial in study.trials] == pytest.approx(values)
    best = load_config(tmp_path / "tuned" / "best.yaml")
    assert best.train.lr == pytest.approx(study.best_trial.params["train.lr"])
    assert mtrain("train", tmp_path / "tuned" / "best.yaml", "--run_dir", tmp_path / "run") == 0
    found = RunDir(tmp_path / "run").load_json("summary.json")["valid"]["skill"]["median"]
    assert found == pytest.approx(max(values))
    capsys.readouterr()
    assert mtrain("tune", config, "--trials", "5", "--run_dir", tmp_path / "tuned") == 2
    assert "another space" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ("train.lr: {low: 1, high: 0.1}", "low below high"),
        ("train.lr: {low: 0, high: 1, log: true}", "above 0 with log"),
        ("train.lr: {lo: 0}", "train.lr.lo: unknown option"),
        ("train.lr: 3", "expected keys of the config"),
        ("train.lrr: {low: 0.1, high: 0.2}", "train.lrr"),
        ("train.global_batch: {choices: [32, many]}", "train.global_batch"),
    ],
)
def test_a_wrong_space_is_said_before_anything_is_trained(config, tmp_path, capsys, space, words):
    (tmp_path / "wrong.yaml").write_text(space)
    assert mtrain("tune", config, "--space", tmp_path / "wrong.yaml", "--run_dir", tmp_path / "tuned") == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "tuned").exists()


def test_the_default_space_is_about_the_config(config):
    space = default_space(load_config(config))
    assert (space["train.lr"].low, space["train.lr"].high) == (pytest.approx(1e-4), pytest.approx(1e-2))
    assert space["model.trunk.init_args.widths"].choices == [[8], [16], [8, 8]]


def test_without_optuna_the_extra_is_named(config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert mtrain("tune", config) == 2
    assert 'pip install "mtrain[tune]"' in capsys.readouterr().err


def test_a_space_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_space(Path(tmp_path) / "none.yaml")

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
from mtrain.tune import Range, default_space, own_value, read_space

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


@pytest.fixture
def trainings(monkeypatch):
    """No training: a trial's value is 1 - |lr - 0.001|; gives the configs."""
    found = []

    def train(config, beside, run_path, console):
        RunDir(run_path).start(config)
        found.append(config)
        return {"valid": {"skill": {"median": 1 - abs(config.train.lr - 0.001)}}}

    monkeypatch.setattr("mtrain.runs.train", train)
    return found


def trials(folder):
    return optuna.load_study(study_name="mtrain", storage=f"sqlite:///{folder / 'study.db'}").trials


def test_the_first_trial_has_the_configs_own_settings_and_is_marked(config, tmp_path, trainings, capsys):
    words = ["tune", config, "--run_dir", tmp_path / "tuned", "--trials"]
    assert mtrain(*words, "3") == 0
    own = load_config(config)
    assert trainings[0].train == own.train
    assert trainings[0].model.trunk.init_args == {"widths": [8], "dropout": 0.0}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("trial 0, as configured: lr 0.001, weight_decay 0.01, global_batch 32, widths [8], dropout 0")
    assert lines[1] == "trial 0: skill 1.0000"
    assert [line.split()[:3] for line in lines if "as configured " in line] == [["0,", "as", "configured"]]
    assert "no trial is better than the config as it is" in lines
    assert mtrain(*words, "5") == 0
    assert [one.train.lr for one in trainings].count(own.train.lr) == 1
    assert len({one.train.lr for one in trainings}) == 5  # a search that goes on draws new ones


def test_the_trial_as_configured_is_shown_where_others_are_better(config, tmp_path, trainings, capsys, monkeypatch):
    monkeypatch.setattr("mtrain.tune.SHOWN", 1)
    assert mtrain("tune", config, "--train.lr", "0.1", "--run_dir", tmp_path / "tuned", "--trials", "4") == 0
    lines = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("best of 4 trials"))
    best, own = (line.split()[0] for line in lines[begin + 2 : -1])
    assert best in ("1", "2", "3")
    assert own == "0,"
    assert "no trial is better" not in " ".join(lines)


def test_a_first_trial_that_was_stopped_is_tried_again_as_configured(config, tmp_path, trainings, capsys, monkeypatch):
    words = ["tune", config, "--run_dir", tmp_path / "tuned", "--trials", "2"]

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as once:
        once.setattr("mtrain.runs.train", stopped)
        assert mtrain(*words) == 130
    assert mtrain(*words) == 0
    assert [trial.user_attrs for trial in trials(tmp_path / "tuned")] == [{"as_configured": True}, {"as_configured": True}, {}]
    assert "1, as configured" in capsys.readouterr().out


def test_a_config_that_could_not_be_trained_is_the_first_trial_when_it_is_mended(config, tmp_path, trainings, monkeypatch):
    words = ["tune", config, "--run_dir", tmp_path / "tuned", "--trials", "2"]

    def refused(*_):
        raise UserError("data.path: no such file")

    with monkeypatch.context() as once:
        once.setattr("mtrain.runs.train", refused)
        assert mtrain(*words) == 2
    assert mtrain(*words) == 0
    assert [one.train.lr for one in trainings].index(load_config(config).train.lr) == 0
    assert [trial.user_attrs for trial in trials(tmp_path / "tuned")] == [{"as_configured": True}, {"as_configured": True}, {}]


def test_a_run_dir_that_cannot_hold_a_study_is_said_in_a_line(config, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "study.db").write_text("garbage" * 1000)
    for name, words in (
        ("file", "exists and is not of mtrain tune"),
        ("damaged", "study.db cannot be opened: file is not a database"),
        ("a?b", "expected a name without '?'"),
    ):
        assert mtrain("tune", config, "--trials", "1", "--run_dir", tmp_path / name) == 2
        error = capsys.readouterr().err
        assert f"run_dir {tmp_path / name}: " in error
        assert words in error
        assert len(error.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_settings_that_the_space_has_not_are_named(config, tmp_path, trainings, capsys):
    words = ["--space", tmp_path / "space.yaml", "--run_dir", tmp_path / "tuned", "--trials", "1"]
    assert mtrain("tune", config, *words, "--train.lr", "0.2", "--model.head.hidden", "[16]") == 0
    out = capsys.readouterr().out
    assert "no trial has the config's own settings, which are not in the space: train.lr 0.2, model.head.hidden [16]" in out
    assert "as configured" not in out


@pytest.mark.parametrize(
    ("key", "allowed", "expected"),
    [
        ("train.epochs", {"low": 1, "high": 5}, 2),
        ("train.epochs", {"low": 3, "high": 5}, None),
        ("train.lr", {"low": 1e-4, "high": 1e-2}, 1e-3),
        ("train.head_lr", {"low": 1e-4, "high": 1e-2}, None),
        ("train.head_lr", {"choices": [None, 0.1]}, "null"),
        ("model.head.hidden", {"choices": [[4], []]}, "[]"),
        ("model.trunk.init_args.dropout", {"low": 0, "high": 0.5}, 0.0),
        ("model.trunk.init_args.norm", {"choices": ["layer", "none"]}, '"none"'),
        ("objective.balancer", {"choices": ["famo", "equal"]}, '"equal"'),
        ("sampler.init_args.tau", {"low": 1.0, "high": 4.0}, 1.0),
        ("tasks.by_name.y1.weight", {"low": 1.0, "high": 4.0}, None),
    ],
)
def test_what_a_config_says_of_a_key_is_found_in_the_space(config, key, allowed, expected):
    assert Range(**allowed).parameter(own_value(load_config(config), key)) == expected


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ("train.lr: {low: 1, high: 0.1}", "low below high"),
        ("train.lr: {low: 0, high: 1, log: true}", "above 0 with log"),
        ("train.lr: {lo: 0}", "train.lr.lo: unknown option"),
        ("train.lr: 3", "expected keys of the config"),
        ("train.lrr: {low: 0.1, high: 0.2}", "train.lrr"),
        ("train.global_batch: {choices: [32, many]}", "train.global_batch"),
        ("train.lr: {low: .nan, high: 1}", "wrong.yaml: train.lr: "),
        ("train.lr: {choices: []}", "wrong.yaml: train.lr: "),
        ("split.seeds: {choices: [[0], [1]]}", "split.seeds: cannot be searched, trials would be scored on other rows"),
    ],
)
def test_a_wrong_space_is_said_before_anything_is_trained(config, tmp_path, capsys, space, words):
    (tmp_path / "wrong.yaml").write_text(space)
    assert mtrain("tune", config, "--space", tmp_path / "wrong.yaml", "--run_dir", tmp_path / "tuned") == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("trials", [0, -1])
def test_at_least_one_trial_is_expected(config, tmp_path, capsys, trials):
    assert mtrain("tune", config, "--trials", trials, "--run_dir", tmp_path / "tuned") == 2
    assert capsys.readouterr().err == f"mtrain: --trials {trials}: expected at least 1\n"
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

"""Mistakes in the user's own classes, on the command line: one clear line, exit status 2, before a run is written."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from mtrain.cli import main
from mtrain.data.features import Encoded, Feature
from mtrain.errors import UserError
from mtrain.ship import Predictor

N = 60


class Trunk(nn.Module):
    out_features = 4

    def __init__(self, in_features: int, fails: str):
        super().__init__()
        self.layer, self.fails = nn.Linear(in_features, 4), fails

    def forward(self, x):
        z = self.layer(x)
        if self.fails == "nan":
            return z * torch.nan
        if self.fails == "inf":
            return z + torch.inf
        if self.fails == "one row" and self.training:
            return torch.where(torch.arange(len(x))[:, None] == 0, torch.nan, z)
        if self.fails == "key" and self.training:
            return {}["nope"]
        if self.fails == "shape" and self.training:
            return z @ z
        if self.fails == "memory" and self.training:
            raise RuntimeError("not enough memory: you tried to allocate memory for it")
        return z


class Necked(nn.Module):
    """Ends in its neck, or not."""

    def __init__(self, in_features: int, fails: bool):
        super().__init__()
        self.first, self.neck, self.fails = nn.Linear(in_features, 8), nn.Linear(8, 4), fails

    def forward(self, x):
        z = self.neck(self.first(x).relu())
        return z.relu() if self.fails else z


class Own(Feature):
    def __init__(self, fails: str):
        self.fails = fails

    def encode(self, table):
        x = np.stack([column.to_numpy() for column in table.columns], 1)
        valid = np.ones(len(x), bool)
        if self.fails == "encode":
            raise ValueError("two\nlines")
        if self.fails == "nothing":
            return None
        if self.fails == "rows":
            return Encoded(x[:3], valid[:3])
        if self.fails == "flat":
            return Encoded(x[:, 0], valid)
        if self.fails == "no bools":
            return Encoded(x, valid * 1.0)
        if self.fails in ("nan", "nan not valid"):
            x[x[:, 0] == 17, 1] = np.nan
            self.on_invalid = "skip"
            valid = (x[:, 0] != 17) | (self.fails == "nan")
        if self.fails == "below 0":
            x[x[:, 0] < 0, 1] = np.nan
        return Encoded(x, valid)

    def fit(self, values, columns):
        super().fit(values, columns)
        if self.fails == "fit":
            raise KeyError("nope")

    def transform(self, values):
        if self.fails == "transform":
            return values[:, :1].astype(np.float32)
        if self.fails == "inf":
            return values * 1e300
        return super().transform(values)


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Train a config; returns the exit status and what was said on standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "own_code", sys.modules[__name__])
    rng = np.random.default_rng(0)
    pd.DataFrame({"x1": np.arange(N) * 1.0, "x2": rng.normal(size=N), "y": rng.normal(size=N)}).to_csv("t.csv", index=False)

    def run(sections):
        tree = {
            "data": {"path": "t.csv", "layout": "grid"},
            "inputs": {"x*": "Numeric"},
            "tasks": {"labels": ["y"]},
            "model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [4]}}},
            "train": {"steps": 1},
        }
        tree |= {name: tree.get(name, {}) | section for name, section in sections.items() if name != "inputs"}
        Path("c.yaml").write_text(yaml.safe_dump(tree | {name: sections[name] for name in ("inputs",) if name in sections}))
        with pytest.raises(SystemExit) as stopped:
            main(["train", "c.yaml", "--run_dir", "run"])
        return stopped.value.code, capsys.readouterr().err

    return run


def own(name, fails):
    return {"class_path": f"own_code.{name}", "init_args": {"fails": fails}}


@pytest.mark.parametrize("fails", ["nan", "inf"])
def test_a_trunk_that_gives_no_finite_feature_is_named(train, fails):
    code, said = train({"model": {"trunk": own("Trunk", fails)}})
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith(
        "mtrain: model.trunk: the features of Trunk are finite in no row of the first step, though all inputs"
    )


@pytest.mark.parametrize(
    ("fails", "words"), [("key", "KeyError: 'nope'"), ("shape", "RuntimeError: mat1 and mat2 shapes cannot be multiplied")]
)
def test_a_trunk_that_fails_in_training_is_named(train, fails, words):
    code, said = train({"model": {"trunk": own("Trunk", fails)}})
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith(f"mtrain: model.trunk: Trunk fails in training with {words}")


NORMS = {"balancer": "gradnorm"}


def test_gradients_are_taken_at_the_neck_of_a_trunk(train):
    trunk = own("Necked", fails=False)
    assert train({"model": {"trunk": trunk}, "objective": NORMS})[0] == 0


def test_a_neck_that_does_not_give_the_features_is_refused_where_gradients_are_taken(train):
    trunk = own("Necked", fails=True)
    code, said = train({"model": {"trunk": trunk}, "objective": NORMS})
    assert (code, said.count("\n")) == (2, 1)
    assert "mtrain: model.trunk: its `neck`, where gradients per task are taken, does not give what forward returns;" in said
    shutil.rmtree("run")
    assert train({"model": {"trunk": trunk}, "objective": NORMS | {"balancing": {"level": "features"}}})[0] == 0


def test_memory_that_does_not_suffice_is_no_mistake_of_the_trunk(train):
    assert "out of memory: lower train.micro_batch" in train({"model": {"trunk": own("Trunk", "memory")}})[1]


def test_a_row_of_the_first_step_whose_features_are_not_finite_does_not_stop_the_run(train):
    assert train({"model": {"trunk": own("Trunk", "one row")}})[0] == 0


COLUMNS = "columns 'x1', 'x2'"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("encode", f"{COLUMNS}: Own fails with ValueError: two lines"),
        ("nothing", f"{COLUMNS}: Own encodes 60 rows as None, expected an Encoded with values [60, k] and valid bool [60]"),
        ("rows", f"{COLUMNS}: Own encodes 60 rows as values float64 [3, 2] and valid bool [3], expected an Encoded"),
        ("flat", f"{COLUMNS}: Own encodes 60 rows as values float64 [60] and valid bool [60]"),
        ("no bools", f"{COLUMNS}: Own encodes 60 rows as values float64 [60, 2] and valid float64 [60]"),
        ("fit", f"{COLUMNS}: Own fails with KeyError: 'nope'"),
        ("transform", f"{COLUMNS}: Own transforms to float32 [60, 1], expected float32 [60, 2]"),
        ("nan", "row 18: Own gives nan at position 2, expected finite numbers that fit float32"),
        ("inf", "row 1: Own gives inf at position 2, expected finite numbers"),
    ],
)
def test_a_feature_that_breaks_its_contract_is_named(train, fails, words, streaming):
    code, said = train({"inputs": {"x*": own("Own", fails)}, "data": {"streaming": streaming}})
    assert (code, said.count("\n")) == (2, 1)
    assert words in said
    assert not Path("run").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_are_not_valid_may_hold_anything(train, streaming):
    data = {"streaming": streaming, "max_invalid": 0.5}
    assert train({"inputs": {"x*": own("Own", "nan not valid")}, "data": data})[0] == 0


def test_new_rows_whose_features_are_not_finite_are_named(train, capsys):
    assert train({"inputs": {"x*": own("Own", "below 0")}})[0] == 0
    new = pd.DataFrame({"x1": [1.0, 2.0, -3.0], "x2": 0.5})
    new.to_csv("new.csv", index=False)
    words = "row 3: Own gives nan at position 2, expected finite numbers that fit float32"
    with pytest.raises(SystemExit) as stopped:
        main(["predict", "run", "new.csv", "-o", "p.csv"])
    said = capsys.readouterr().err
    assert (stopped.value.code, said.count("\n"), Path("p.csv").exists()) == (2, 1, False)
    assert words in said
    with pytest.raises(SystemExit) as stopped:
        main(["export", "run", "-o", "shipped", "--no-onnx"])
    assert stopped.value.code == 0
    with pytest.raises(UserError, match=words):
        Predictor.load("shipped").predict(new)


def test_a_feature_that_is_none_is_refused(train):
    code, said = train({"inputs": {"x*": "torch.nn.Identity"}})
    assert (code, said.count("\n")) == (2, 1)
    assert "inputs.x1: 'torch.nn.Identity' is not a mtrain.data.features.Feature; derive it from that class" in said
    assert not Path("run").exists()

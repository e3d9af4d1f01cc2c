"""The benches of balancing, on small cases."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mtrain.bench import balance, study
from mtrain.errors import UserError


def test_every_method_is_measured_beside_equal_and_a_peer(monkeypatch, tmp_path):
    settings = [
        replace(
            one, case=replace(one.case, tasks=12, width=16, layers=2, batch=32, rows=64, steps=2), hidden=one.hidden and [4]
        )
        for one in balance.CASES
    ]
    monkeypatch.setattr(balance, "CASES", settings)
    monkeypatch.setattr(balance, "BALANCERS", dict.fromkeys(["uncertainty", "gradnorm", "upgrad"]))
    results = balance.run(tmp_path / "balance.json")
    assert json.loads((tmp_path / "balance.json").read_text()) == results
    found = {(result["case"], result["method"]): result for result in results}
    methods = ("equal", "uncertainty", "gradnorm", "upgrad")
    assert list(found) == [(case, method) for case in ("routed", "grid-linear", "grid-hidden") for method in methods]
    for (_, method), result in found.items():
        assert result["step_ms"] > 0
        assert result["weights_ms"] > 0
        assert (result["statistics"] is None) == (method in ("equal", "uncertainty"))
        assert (result["torchjd_ms"] is None) == (method != "upgrad")
    with pytest.raises(UserError, match="there is no case 'grid'; did you mean 'grid-"):
        balance.run(cases=["grid"])


def test_a_study_compares_methods_on_the_same_splits(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(400, 3)), columns=["f0", "f1", "f2"])
    frame["task"] = rng.integers(8, size=400)
    frame["y"] = frame.f0 + frame.task * frame.f1 / 4 + rng.normal(size=400) / 2
    frame["task"] = "t" + frame["task"].astype(str)
    (tmp_path / "school").mkdir()
    frame.to_csv(tmp_path / "school" / "school_long.csv.gz", index=False)
    monkeypatch.setenv("MTRAIN_DATA", str(tmp_path))
    short = study.SCHOOL.replace("epochs: 15, global_batch: 256", "epochs: 3, global_batch: 64")
    monkeypatch.setattr(study, "CASES", [study.Study("school", short)])
    monkeypatch.setattr(study, "METHODS", {"equal": {}, "uncertainty": {}, "cagrad": {"every": 5}})
    monkeypatch.setattr(study, "TRIALS", [(0.5, "rows"), (2.0, "tasks")])
    results = study.run(tmp_path / "study.json", ["school"])
    assert json.loads((tmp_path / "study.json").read_text()) == results
    equal, *others = results
    assert (equal["method"], equal["difference"], equal["better"], equal["tasks"]) == ("equal", 0, None, 8)
    for result in others:
        assert result["low"] < result["difference"] < result["high"]
        assert result["difference"] == pytest.approx(result["test"] - equal["test"])
        assert 0 <= result["better"] <= 1
        assert (result["lr_factor"], result["share"]) in study.TRIALS

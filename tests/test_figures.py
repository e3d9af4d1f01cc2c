"""The figures of the README on public data: minutes each, so `slow`."""

import json

import pytest

from mtrain.cli import main

pytestmark = pytest.mark.slow


def summary(config, run_dir, *overrides):
    with pytest.raises(SystemExit) as exit:
        main(["train", f"configs/{config}.yaml", "--run_dir", str(run_dir), *overrides])
    assert exit.value.code == 0
    return json.loads((run_dir / "summary.json").read_text())


PLAIN = """
--inputs.smiles={class_path: ECFP, init_args: {bits: 1024, on_invalid: skip}}
--model={trunk: {class_path: MLP, init_args: {widths: [1500], dropout: 0.5}}}
--train={epochs: 40, global_batch: 128, lr: 1e-3, weight_decay: 0.01}
--select.patience=8
""".strip().splitlines()


def test_digits_beat_the_constant_on_nearly_all_tasks(tmp_path):
    test = summary("digits", tmp_path / "run")["test"]
    assert test["skill"]["scored"] >= 90
    assert test["skill"]["median"] > 0.75


def test_toxcast_is_well_above_a_plain_multi_task_network_on_the_same_splits(tmp_path, real_data):
    ours = summary("toxcast", tmp_path / "ours")["test"]["roc_auc"]["mean"]
    plain = summary("toxcast", tmp_path / "plain", *PLAIN)["test"]["roc_auc"]["mean"]
    assert ours >= plain + 0.015
    assert ours >= 0.742


def test_tox21_reaches_its_figure(tmp_path, real_data):
    assert summary("tox21", tmp_path / "run")["test"]["roc_auc"]["mean"] >= 0.854


def test_school_reaches_its_figure(tmp_path, real_data):
    assert summary("school", tmp_path / "run")["test"]["ev"]["pooled"] >= 0.370


def test_kiba_reaches_its_figure(tmp_path, real_data):
    test = summary("kiba", tmp_path / "run")["test"]
    assert test["mse"]["pooled"] <= 0.141
    assert test["ci"]["pooled"] >= 0.872


def test_bibtex_reaches_its_figure(tmp_path, real_data):
    assert summary("bibtex", tmp_path / "run")["test"]["p_at_1"]["pooled"] >= 0.626

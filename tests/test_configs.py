"""Every config that ships, from the real command line: a few steps, a stop and a resume, two processes, predictions, and
balancers that read losses, norms and inner products of gradients."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mtrain.cli import main
from mtrain.config import load_config
from mtrain.data.sources import open_data
from mtrain.ship import Predictor
from mtrain.train.step import Stepper

ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
NEED_THE_HUB = {"nlp600": "its data and encoder come from the hub"}
NEED_DATA = {"bibtex", "cora", "kiba", "school", "school_files", "tox21", "tox21_graph", "toxcast"}  # under $MTRAIN_DATA
NEED_PACKAGES = dict.fromkeys(("kiba", "tox21", "toxcast"), "rdkit") | dict.fromkeys(("cora", "tox21_graph"), "torch_geometric")
NO_GRADIENTS = {"dependent", "fusion_decision", "mmoe", "bibtex", "kiba"}  # heads that read others or mix, several members
QUICK = {"many_heads", "treatment"}
NOT_EXPORTED = {"cora": "its nodes are those of one graph", "task_inputs": "reads each row's task"}
STEPS, SIGNALLED = 6, 3
SHORT = ["--train.steps", str(STEPS), "--split.seeds", "[0]", "--train.log_every", "1", "--split.refit", "false"]

EVERY = sorted(CONFIGS.keys() - NEED_THE_HUB)
MARKED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]
BALANCERS = ("uncertainty", "gradnorm", "upgrad")  # from losses, norms and inner products


def mtrain(*words):
    """Run a command in this process; returns its exit status."""
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return done.value.code


@pytest.fixture
def config(request, tmp_path, monkeypatch):
    """The path of a config, where its data and packages are there."""
    name = request.param
    if name in NEED_PACKAGES:
        pytest.importorskip(NEED_PACKAGES[name])
    if name in NEED_DATA:
        request.getfixturevalue("real_data")
    if name == "school_files":
        assert mtrain("partition", CONFIGS["school"], "-o", tmp_path / "school_files") == 0
        monkeypatch.chdir(tmp_path)
    return CONFIGS[name]


def tensors(run):
    """Numbers of the newest checkpoint; beside them it holds texts with times."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    every = {key: value for file in sorted(newest.glob("*.safetensors")) for key, value in load_file(file).items()}
    return {key: value for key, value in every.items() if value.is_floating_point()}


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def signal_at(step):
    """Inside, a signal comes while this step is computed."""
    call = Stepper.__call__

    def stepping(self, batch, number, *rest):
        if number == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        call(self, batch, number, *rest)

    return mock.patch.object(Stepper, "__call__", stepping)


def rows_to_predict(config, folder):
    """What `mtrain predict` gets: the table of the config, or the first file of its first task."""
    tree = yaml.safe_load(config.read_text())["data"]
    if tree["layout"] != "files":
        return tree["path"]
    return folder / "school_files" / "tasks" / sorted(os.listdir(folder / "school_files" / "tasks"))[0]


@pytest.mark.parametrize("config", MARKED, indirect=True)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been_and_predicts(config, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert mtrain("train", config, *SHORT, "--run_dir", whole) == 0
    with signal_at(SIGNALLED):
        assert mtrain("train", config, *SHORT, "--run_dir", stopped) == 128 + signal.SIGTERM
    assert max(losses(stopped)) < STEPS
    assert mtrain("train", config, *SHORT, "--run_dir", stopped) == 0
    assert losses(stopped) == losses(whole)
    assert len(losses(whole)) == STEPS
    ours, theirs = tensors(stopped), tensors(whole)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name

    out = tmp_path / "out.parquet"
    assert mtrain("predict", whole, rows_to_predict(config, tmp_path), "-o", out) == 0
    table = pq.read_table(out)
    numbers = [column for column in table.columns if pa.types.is_floating(column.type)]
    assert numbers
    assert all(math.isfinite(value) for column in numbers for value in column.drop_null().slice(0, 50).to_pylist())


@pytest.mark.slow
@pytest.mark.parametrize("config", EVERY, indirect=True)
def test_an_exported_run_gives_the_numbers_of_predict_or_says_why_there_is_none(config, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "model"
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    assert mtrain("train", config, *SHORT, "--run_dir", run) == 0
    capsys.readouterr()
    status, error = mtrain("export", run, "-o", out), capsys.readouterr().err
    if config.stem in NOT_EXPORTED:
        assert status == 2
        assert NOT_EXPORTED[config.stem] in error
        assert len(error.splitlines()) == 1
        return
    assert status == 0, error
    rows = tmp_path / "rows.parquet"
    data = load_config(config, []).data
    if data.layout == "files":
        rows = rows_to_predict(config, tmp_path)
    else:
        table = open_data(data, None)[0]
        pq.write_table(table.read_chunk(0, table.column_names).slice(0, 50), rows)
    assert mtrain("predict", run, rows, "-o", tmp_path / "out.parquet") == 0
    expected = pq.read_table(tmp_path / "out.parquet")
    for backend in ("torch", "onnx"):
        found = Predictor.load(out, backend).predict(rows)
        assert found.column_names == expected.column_names
        for name, kind in zip(expected.column_names, expected.schema.types, strict=True):
            if pa.types.is_floating(kind):
                scale = np.nanmax(np.abs(expected[name].to_numpy()), initial=1)
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5 * scale, err_msg=name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("config", EVERY, indirect=True)
def test_two_processes_follow_the_curve_of_one(config, tmp_path):
    assert mtrain("train", config, *SHORT, "--run_dir", tmp_path / "one") == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "mtrain", "train", str(config), *SHORT, "--run_dir", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("config", EVERY, indirect=True)
def test_every_balancer_that_the_heads_allow_trains_and_others_are_refused_in_one_line(config, tmp_path, capsys):
    """Those from gradients at the neck, or where the trunk does not end in a linear layer at the features."""
    for balancer in BALANCERS:
        statuses = []
        for level in ("neck", "features"):
            run = tmp_path / f"{balancer}-{level}"
            words = ["--objective.balancer", balancer, "--objective.balancing.level", level, "--run_dir", run]
            statuses.append(mtrain("train", config, *SHORT, *words))
            error = capsys.readouterr().err
            if statuses[-1] == 0:
                assert all(math.isfinite(loss) for loss in losses(run).values())
                break
            assert statuses[-1] == 2
            assert "objective.balancer: " in error
            assert len(error.splitlines()) == 1
        refused = balancer != "uncertainty" and config.stem in NO_GRADIENTS
        assert statuses[-1] == (2 if refused else 0), (balancer, error)

"""A run's model as one file and back: the same predictions, in tensors that `nn.Linear` understands."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from problems import INPUTS, TASKS, run_config
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mtrain import runs
from mtrain.cli import main
from mtrain.config import to_yaml
from mtrain.train.run_dir import RunDir

MLP = {"class_path": "MLP", "init_args": {"widths": [16]}}
CASES = {
    "grid": ("grid", {"model": {"trunk": MLP, "head": {"hidden": [5]}}}),
    "routed": ("routed", {"model": {"trunk": "Identity"}}),
    "an ensemble": ("pairs", {"model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [8], "members": 2}}}}),
    "a refit": ("grid", {"split": {"refit": True}}),
}


def mtrain(*words):
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return done.value.code


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    """A folder with a run and its model as a file."""
    layout, sections = CASES[request.param]
    folder = tmp_path_factory.mktemp("consolidate")
    (folder / "c.yaml").write_text(to_yaml(run_config(layout, **sections)))
    assert mtrain("train", folder / "c.yaml", "--train.epochs", 2, "--run_dir", folder / "run") == 0
    assert mtrain("consolidate", folder / "run", "-o", folder / "model.safetensors") == 0
    return request.param, folder


def new_rows(folder):
    x = np.random.default_rng(5).normal(size=(9, len(INPUTS)))
    pq.write_table(pa.table({name: x[:, i] for i, name in enumerate(INPUTS)}), folder / "new.parquet")
    return folder / "new.parquet"


def test_predictions_before_and_after_are_the_same_to_the_last_bit(trained, tmp_path):
    _, folder = trained
    assert mtrain("consolidate", folder / "model.safetensors", "-o", tmp_path / "back") == 0
    for name, run in (("a", folder / "run"), ("b", tmp_path / "back")):
        assert mtrain("predict", run, new_rows(tmp_path), "-o", tmp_path / f"{name}.parquet") == 0
    before, after = (pq.read_table(tmp_path / f"{name}.parquet") for name in "ab")
    assert set(TASKS) <= set(before.column_names)
    assert before.equals(after)
    assert mtrain("consolidate", tmp_path / "back", "-o", tmp_path / "again.safetensors") == 0
    first, again = (tensors(path) for path in (folder / "model.safetensors", tmp_path / "again.safetensors"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


def tensors(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_the_heads_in_the_file_fit_into_linear_layers(trained):
    case, folder = trained
    found = tensors(folder / "model.safetensors")
    members = [""] if case != "an ensemble" else ["", ", member 1"]
    heads = runs.load_model(RunDir(folder / "run")).evaluator.bank.to_modules()
    assert {key.split("/")[1] for key in found if key.startswith("heads/")} == {f"{task}{m}" for task in TASKS for m in members}
    for name, head in heads.items():
        linears = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
        for i, linear in enumerate(linears):
            again = nn.Linear(linear.in_features, linear.out_features)
            again.load_state_dict(
                {"weight": found.pop(f"heads/{name}/weights.{i}"), "bias": found.pop(f"heads/{name}/biases.{i}")}
            )
            assert torch.equal(again.weight, linear.weight)
            assert torch.equal(again.bias, linear.bias)
    assert found.keys() == {f"trunk.{key}" for key in runs.load_model(RunDir(folder / "run")).evaluator.model.state_dict()}


def test_eval_and_init_from_take_the_new_run_directory_and_train_says_why_it_does_not(trained, tmp_path, monkeypatch, capsys):
    case, folder = trained
    back = tmp_path / "back"
    assert mtrain("consolidate", folder / "model.safetensors", "-o", back) == 0
    printed = {}
    monkeypatch.setattr(runs.tables, "print_summary", lambda summary, *_: printed.update(summary))
    assert mtrain("eval", back) == 0
    monkeypatch.undo()
    expected = json.loads((folder / "run" / "summary.json").read_text())
    for part in ("valid", "test"):
        if (case, part) == ("a refit", "valid"):
            assert part not in printed
        else:
            assert printed[part]["skill"] == pytest.approx(expected[part]["skill"], rel=1e-5)
    assert mtrain("train", folder / "c.yaml", "--train.epochs", 1, "--init_from", back, "--run_dir", tmp_path / "new") == 0
    assert "trunk and 6 heads taken over" in capsys.readouterr().out
    assert mtrain("train", folder / "c.yaml", "--train.epochs", 3, "--run_dir", back) == 2
    assert "cannot be continued; train another run with --init_from" in capsys.readouterr().err


def test_of_several_split_seeds_one_must_be_named(tmp_path, capsys):
    config = run_config("grid", split={"seeds": [0, 1]}, train={"epochs": 1})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert mtrain("train", tmp_path / "c.yaml", "--run_dir", tmp_path / "run") == 0
    assert mtrain("consolidate", tmp_path / "run", "-o", tmp_path / "m.safetensors") == 2
    assert "name one of them" in capsys.readouterr().err
    assert mtrain("consolidate", tmp_path / "run" / "split-1", "-o", tmp_path / "m.safetensors") == 0
    assert mtrain("consolidate", tmp_path / "m.safetensors", "-o", tmp_path / "back") == 0
    assert RunDir(tmp_path / "back").config().split.seeds == [1]


def broken(folder):
    """Files and folders that cannot be converted."""
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"path": "a.csv", "layout": "grid"}}))
    (folder / "empty").mkdir()
    (folder / "text.safetensors").write_text("no tensors")
    save_file({"w": torch.ones(2)}, folder / "other.safetensors")
    save_file({"w": torch.ones(2)}, folder / "later.safetensors", {"mtrain": "2"})
    save_file({"w": torch.ones(2)}, folder / "less.safetensors", {"mtrain": "1", "checkpoint": "{}"})
    return folder


@pytest.mark.parametrize(
    ("source", "output", "words"),
    [
        ("run", "m.safetensors", "holds no model yet"),
        ("run", "m.pt", "expected a name that ends in .safetensors"),
        ("empty", "m.safetensors", "expected the directory of a run"),
        ("nothing", "m.safetensors", "there is no such run directory or file"),
        ("text.safetensors", "back", "is not a file of tensors"),
        ("other.safetensors", "back", "was not written by mtrain consolidate"),
        ("later.safetensors", "back", "is of format 2, this mtrain reads 1"),
        ("less.safetensors", "back", "its metadata lack config.yaml; write the file again from its run"),
    ],
)
def test_what_cannot_be_converted_is_said_in_one_line(tmp_path, capsys, source, output, words):
    folder = broken(tmp_path)
    assert mtrain("consolidate", folder / source, "-o", folder / output) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert not (folder / output).exists()


def test_outputs_that_are_there_or_cannot_be_written_are_left_alone(trained, tmp_path, capsys):
    _, folder = trained
    for output, words in (
        (folder, "expected the name of a new run directory"),
        (tmp_path / "copy.safetensors", "becomes a run directory, expected a name without .safetensors"),
        (tmp_path / "file" / "x", "cannot be written"),
    ):
        (tmp_path / "file").write_text("a file, not a folder")
        assert mtrain("consolidate", folder / "model.safetensors", "-o", output) == 2
        assert words in capsys.readouterr().err
    assert mtrain("consolidate", folder / "run", "-o", tmp_path / "no" / "m.safetensors") == 2
    assert capsys.readouterr().err == f"mtrain: --output {tmp_path}/no/m.safetensors: no folder {tmp_path}/no; make it first\n"
    assert not list(tmp_path.glob(".*"))
    assert (folder / "run").is_dir()


def test_a_file_without_a_tasks_head_is_refused(trained, tmp_path, capsys):
    _, folder = trained
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    kept = {key: tensor for key, tensor in tensors(folder / "model.safetensors").items() if not key.startswith("heads/b1/")}
    save_file(kept, tmp_path / "less.safetensors", metadata)
    assert mtrain("consolidate", tmp_path / "less.safetensors", "-o", tmp_path / "back") == 2
    assert "holds no head of task 'b1'" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()

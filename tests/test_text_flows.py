"""Texts from files to predictions, through the command: a data set for each task, a tokenizer and a tiny model made here."""

import csv
import json
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
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from mtrain.cli import main
from mtrain.ship import Predictor
from mtrain.train.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
WORKER = ROOT / "tests" / "parallel" / "text_worker.py"
BERT = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 32,
}  # fmt: skip
RATED = {"good": ["fine", "great", "nice"], "bad": ["awful", "poor", "sad"]}
NEUTRAL = [f"w{i}" for i in range(600)]  # ids beyond 256 are not exact in bf16


def sentence(rng, rating, most=20):
    words = [RATED[rating] if rng.random() < 0.5 else NEUTRAL for _ in range(rng.integers(3, most))]
    return " ".join(rng.choice(some) for some in words)


def labels(kind, rating, text):
    return {
        "binary": int(rating == "good"),
        "multiclass": rating,
        "regression": sum(w in RATED["good"] for w in text.split()) / 4,
    }[kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`tasks/` with a CSV file for each task, `model/` with a tokenizer and a tiny BERT, and `c.yaml`."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    (folder / "tasks").mkdir()
    for t, kind in enumerate(["binary", "multiclass", "regression", "binary"]):
        ratings = rng.choice(["good", "bad"], 60)
        texts = [sentence(rng, rating) for rating in ratings]
        y = [labels(kind, rating, text) for rating, text in zip(ratings, texts, strict=True)]
        pd.DataFrame({"text": texts, "y": y}).to_csv(folder / "tasks" / f"t{t}.csv", index=False)
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = [*NEUTRAL, *RATED["good"], *RATED["bad"]]
    tokenizer.train_from_iterator(words, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"]))
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    (folder / "model").mkdir()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    encoder = BERT | {"vocab_size": tokenizer.get_vocab_size()}
    tree = {
        "data": {"layout": "files", "path": "tasks/", "label": "y"},
        "inputs": {
            "text": {
                "class_path": "Tokens",
                "init_args": {"tokenizer": str(folder / "model" / "tokenizer.json"), "max_length": 24},
            }
        },
        "split": {"by": "within_task"},
        "model": {"trunk": {"class_path": "TextEncoder", "init_args": {"config": encoder, "buckets": 3}}},
        "train": {"steps": 6, "global_batch": 24, "lr": 0.003, "log_every": 1},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    return folder


def command(*words):
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return done.value.code


def refused(capsys, *words):
    """The one line of a command that must fail."""
    assert command(*words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def straight(folder):
    """The run of six steps that is not interrupted."""
    assert command("train", folder / "c.yaml", "--run_dir", folder / "straight", "--data.root", folder) == 0
    return folder / "straight"


def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(folder, straight):
    given = ("train", folder / "c.yaml", "--run_dir", folder / "again", "--data.root", folder)
    assert command(*given, "--train.steps", 3) == 0
    assert command(*given) == 0
    assert losses(folder / "again") == pytest.approx(losses(straight), rel=1e-5)
    assert len(losses(straight)) == 6


def test_a_run_predicts_new_texts(folder, straight):
    pd.DataFrame({"text": ["fine w3 great", "poor w4", "nice"]}).to_csv(folder / "new.csv", index=False)
    assert command("predict", straight, folder / "new.csv", "-o", folder / "out.csv") == 0
    found = pd.read_csv(folder / "out.csv")
    assert {"t0", "t1", "t1=good", "t2", "t3"} <= set(found)
    assert len(found) == 3
    assert found["t0"].between(0, 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_an_exported_run_gives_the_same_predictions(folder, straight, backend, tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    new = pd.DataFrame({"text": ["fine w3 great", "poor w4", "nice", " ".join(["w7"] * 40), "w1 sad"]})
    new.to_csv(tmp_path / "new.csv", index=False)
    assert command("predict", straight, tmp_path / "new.csv", "-o", tmp_path / "out.csv") == 0
    assert command("export", straight, "-o", tmp_path / "model") == 0
    expected = pd.read_csv(tmp_path / "out.csv")
    found = Predictor.load(tmp_path / "model", backend).predict(new)
    assert list(found) == list(expected)
    for name in ("t0", "t1=good", "t2", "t3"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


def test_texts_that_stream_follow_the_same_curve(folder, straight):
    given = ("train", folder / "c.yaml", "--run_dir", folder / "streamed", "--data.root", folder, "--data.streaming", "true")
    assert command(*given, "--data.chunk_rows", 16, "--train.steps", 2) == 0
    assert set(losses(folder / "streamed")) == {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrapper", "options", "rel"),
    [
        ("ddp", (), 1e-4),
        ("fsdp", ("--model.trunk.init_args.gradient_checkpointing", "true"), 1e-4),
        ("fsdp", ("--train.precision", "bf16"), 0.03),
    ],
    ids=["ddp", "fsdp-checkpointing", "fsdp-bf16"],
)
def test_two_processes_follow_the_curve_of_one_and_go_on_from_a_checkpoint(folder, straight, wrapper, options, rel, tmp_path):
    given = ["--data.root", str(folder), *options]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for steps in (3, 5):
        words = [*launch, str(folder / "c.yaml"), str(tmp_path / "run"), wrapper, *given, "--train.steps", str(steps)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
    if wrapper == "fsdp":
        wrapped = (tmp_path / "run.wrapped").read_text()
        assert wrapped.count("FSDPBertLayer") == 2
        assert "FSDPSharedModel" in wrapped
    command("train", folder / "c.yaml", "--run_dir", tmp_path / "run", *given)  # one process goes on
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), rel=rel)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["processes"] == 1
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest() is not None


def stand_in(root, row, rng):
    """A local folder with the card and files of a hub data set of this row of the task table."""
    folder = root / row["data"]
    inputs = dict(pair.split("=") for pair in row["inputs"].split(";") if pair) or {"text": "text"}
    parts = dict(p.split("=") for p in row["split"].split(";")) if "=" in row["split"] else {"train": row["split"]}
    files = []
    for split in parts.values():
        ratings = rng.choice(["good", "bad"], 12)
        texts = [sentence(rng, rating) for rating in ratings]
        y = [3.0 * i for i in range(12)] if row["kind"] == "regression" else [int(rating == "good") for rating in ratings]
        y[0] = -1
        name = f"{row['config'] or 'default'}-{split}.parquet"
        files.append({"split": split, "path": name})
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({inputs["text"]: texts, row["label"]: y, "other": ["a"] * 12}), folder / name)
    card = folder / "README.md"
    configs = yaml.safe_load(card.read_text().strip("-\n"))["configs"] if card.exists() else []
    configs.append({"config_name": row["config"] or "default", "data_files": files})
    card.write_text("---\n" + yaml.safe_dump({"configs": configs}) + "---\n")


@pytest.mark.slow
def test_nlp600_runs_on_local_stand_ins_of_its_model_and_data_sets(folder, tmp_path, capsys):
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    rng, table = np.random.default_rng(0), ROOT / "configs" / "nlp600_tasks.csv"
    with table.open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        stand_in(tmp_path, row, rng)
    model = tmp_path / "model"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "model" / "tokenizer.json"), pad_token="[PAD]")
    tokenizer.save_pretrained(model)
    config = AutoConfig.for_model(**BERT | {"vocab_size": len(tokenizer), "max_position_embeddings": 256})
    AutoModel.from_config(config).save_pretrained(model)
    tree = yaml.safe_load((ROOT / "configs" / "nlp600.yaml").read_text())
    tree["inputs"]["text"]["init_args"]["tokenizer"] = tree["model"]["trunk"]["init_args"]["model"] = str(model)
    tree["data"] |= {"root": str(tmp_path), "table": str(table)}
    tree["train"] |= {"steps": 2, "global_batch": 48, "micro_batch": 24, "save_every": 2}
    tree["tracker"] = "none"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    assert command("train", tmp_path / "c.yaml", "--run_dir", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    tasks = pd.read_parquet(tmp_path / "run" / "tasks.parquet")
    assert sorted(tasks["task"]) == sorted(row["name"] for row in rows)
    assert summary["rows"]["train"] == 11 * len(rows)  # a label of -1 is missing
    assert dict(zip(tasks["task"], tasks["kind"], strict=True)) == {row["name"]: row["kind"] for row in rows}


def test_mistakes_with_text_are_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ("train", folder / "c.yaml", "--run_dir", tmp_path / "run", "--data.root", folder)
    trunk = "--model.trunk.init_args"
    line = refused(capsys, *given, "--model.trunk", "{class_path: MLP}")
    assert "inputs.text: Tokens gives token ids, which trunk MLP cannot read; use TextEncoder" in line
    line = refused(capsys, *given, "--inputs", "{text: {class_path: Categorical, init_args: {max_categories: 9}}}")
    assert "TextEncoder reads token ids, which no feature of inputs gives; use Tokens" in line
    line = refused(capsys, *given, f"{trunk}.config.vocab_size", 300)
    assert "the tokenizer has ids up to 609, but the embedding of TextEncoder has 300 rows" in line
    line = refused(capsys, *given, trunk, "{model: no/such/folder}")
    assert "model 'no/such/folder' cannot be loaded" in line
    line = refused(capsys, *given, "--inputs.text.init_args.max_length", 40)
    assert "inputs of 40 numbers, but the model takes texts of 32 tokens; lower max_length of Tokens" in line
    pq.write_table(pa.table({"text": ["a b", "c d"] * 20, "y": [[1, 0], [0, 1]] * 20}), tmp_path / "tags.parquet")
    line = refused(capsys, *given, "--data", f"{{layout: files, path: {tmp_path}/*.parquet, label: y}}")
    assert "label column 'y'" in line
    assert "token-level" in line
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "transformers" else find_spec(name, *rest)
    )
    line = refused(capsys, *given)
    assert 'needs transformers: pip install "mtrain[text]"' in line
    assert not (tmp_path / "run" / "checkpoints").exists()

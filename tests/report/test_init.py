"""`mtrain init`, through the command line: each outcome is a config that trains, or one clear line."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import yaml

from mtrain.cli import main
from mtrain.config import load_config
from mtrain.report.init import _stem

rng = np.random.default_rng(0)


def run(capsys, *words):
    """Exit status, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as exit:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return exit.value.code, out, err


def table(path, rows=120, labels=("y_1", "y_2")):
    frame = pd.DataFrame(rng.normal(size=(rows, 4)), columns=["age", "bmi [kg]", "x: 1", "#dose"])
    for name in labels:
        frame[name] = (frame["age"] + rng.normal(size=rows) > 0).astype(int)
    frame.to_csv(path, index=False)
    return frame


def test_a_table_becomes_a_config_that_trains_from_any_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    table(tmp_path / "data" / "my table.csv")
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "init", "data/my table.csv", "-o", "data/my table.yaml")
    assert (status, err) == (0, "")
    assert "y_1, y_2" in out
    assert "its name" in out
    assert "2 binary" in out
    text = (tmp_path / "data" / "my table.yaml").read_text()
    assert yaml.safe_load(text)["data"] == {"path": "my table.csv", "layout": "grid"}
    for section in ("data", "inputs", "tasks", "split", "model", "train", "select"):
        assert re.search(rf"\n\n(# .+\n)+{section}:", text), section
    assert load_config(tmp_path / "data" / "my table.yaml").tasks.kind.class_path == "binary"
    monkeypatch.chdir(tmp_path / "elsewhere")
    status, _, err = run(capsys, "train", "../data/my table.yaml", "--train.steps", "20", "--run_dir", "r")
    assert (status, err) == (0, "")
    assert json.loads((tmp_path / "elsewhere" / "r" / "summary.json").read_text())["tasks"] == 2


def test_a_file_is_written_over_only_with_force(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table("t.csv")
    (tmp_path / "t.yaml").write_text("mine")
    status, _, err = run(capsys, "init", "t.csv")
    assert status == 2
    assert err == "mtrain: t.yaml: exists; choose another file with -o, or write over it with --force\n"
    assert (tmp_path / "t.yaml").read_text() == "mine"
    assert run(capsys, "init", "t.csv", "--force")[0] == 0
    assert load_config(tmp_path / "t.yaml").data.path == "t.csv"
    before = (tmp_path / "t.csv").read_bytes()
    status, _, err = run(capsys, "init", "t.csv", "-o", tmp_path / "t.csv", "--force")
    assert (status, err) == (2, f"mtrain: --output {tmp_path / 't.csv'}: is the data; choose another file for the config\n")
    assert (tmp_path / "t.csv").read_bytes() == before


def test_options_correct_a_guess_and_any_key_can_follow(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table("t.csv", labels=("a", "b")).assign(who=np.arange(120) % 40).to_csv("t.csv", index=False)
    words = ("--labels", "b", "#*", "--key", "who", "--train.lr", "0.01", "--split.by", "kfold")
    status, out, err = run(capsys, "init", "t.csv", *words)
    assert (status, err) == (0, "")
    config = load_config(tmp_path / "t.yaml")
    assert config.tasks.labels.include == ["b", "#*"]
    assert (config.data.key, config.train.lr, config.split.by) == ("who", 0.01, "kfold")
    assert list(config.inputs) == ["age", "bmi [kg]", "x: 1", "a"]
    assert "as you said" in out


def test_what_may_be_wrong_is_printed_and_stands_in_the_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    frame = table("t.csv").assign(day=pd.date_range("2020-01-01", periods=120).strftime("%Y-%m-%d"))
    frame.to_csv("t.csv", index=False)
    _, out, _ = run(capsys, "init", "t.csv")
    line = r"column day holds dates.* --split\.by time --split\.column day"
    assert re.search(rf"^note: {line}$", out, re.MULTILINE)
    assert re.search(rf"^# Note: {line}\.$", (tmp_path / "t.yaml").read_text(), re.MULTILINE)
    _, out, _ = run(capsys, "init", "t.csv", "--force", "--split.by", "time", "--split.column", "day")
    assert "note:" not in out
    assert load_config(tmp_path / "t.yaml").split.column == "day"


def test_a_folder_becomes_a_task_for_each_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shops").mkdir()
    for name in ("oslo", "rome", "bonn"):
        table(tmp_path / "shops" / f"{name}.csv", labels=("label",))
    status, _, err = run(capsys, "init", "shops/*.csv")
    assert (status, err) == (0, "")
    config = load_config(tmp_path / "shops.yaml")
    assert (config.data.layout, config.data.path, config.data.label) == ("files", "shops/*.csv", "label")
    assert run(capsys, "train", "shops.yaml", "--train.steps", "20")[0] == 0
    assert set(pd.read_parquet("runs/shops/per_task.parquet").task) == {"oslo", "rome", "bonn"}


@pytest.mark.parametrize(
    ("text", "words", "line"),
    [
        ("", (), "t.csv: the file is empty, expected a header and rows"),
        ("a,y\n1,2\n", (), "data.path t.csv: has 1 row, expected at least 10, to train, validate and test"),
        ("a,a,y\n" + "1,2,3\n" * 20, (), "t.csv: two columns are named 'a', expected unique names; rename one"),
        ("t\n" + "".join(f"only words {i}\n" for i in range(50)), (), "'t' is text"),
        ("a,b\n" + "1,2\n" * 20, (), "no column can be a label beside inputs"),
        ("a,b\n" + "".join(f"{i},{i}\n" for i in range(20)), ("--labels", "c"), "tasks.labels: 'c' matches no column"),
        ("a,b\n" + "".join(f"{i},{i}\n" for i in range(20)), ("--layout", "wide"), "invalid choice: 'wide'"),
        ("a,b\n" + "".join(f"{i},{i}\n" for i in range(20)), ("-o", "no/where.yaml"), "--output no/where.yaml: no folder no"),
    ],
)
def test_what_cannot_become_a_config_ends_in_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, text, words, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text(text)
    status, _, err = run(capsys, "init", "t.csv", *words)
    assert status == 2
    assert err.count("\n") == 1
    assert line in err
    assert not list(tmp_path.glob("*.yaml"))


def test_the_config_is_named_after_the_data():
    names = {
        "a/assays.csv.gz": "assays",
        "shops/*.csv": "shops",
        "user/set": "set",
        "*.csv": "config",
        "python:mine.tables.big(rows=3)": "big",
    }
    assert {data: _stem(data) for data in names} == names


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        "school/school_long.csv.gz",
        "kiba/kiba_long.parquet",
        "tox21/tox21.csv",
        "toxcast/toxcast.csv.gz",
        "bibtex/bibtex.parquet",
    ],
)
def test_every_public_table_becomes_a_config_that_trains(real_data, tmp_path, monkeypatch, capsys, path):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "init", path, "-o", "c.yaml")
    assert (status, err) == (0, "")
    status, _, err = run(capsys, "train", "c.yaml", "--train.steps", "20")
    assert (status, err) == (0, "")
    assert (tmp_path / "runs/c/summary.json").is_file()

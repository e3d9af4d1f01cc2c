import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mtrain.config import DataConfig
from mtrain.data.task_table import TaskSource, read_task_table
from mtrain.errors import UserError


def config(**data):
    return DataConfig(layout="files", **data)


ROWS = [
    {"name": "a", "data": "a.csv", "inputs": {"text": "sentence", "title": "headline"}, "label": "stars", "weight": 2.0},
    {"name": "b", "data": ["b1.csv", "b2.csv"], "kind": "binary", "format": "csv"},
    {"data": "own/set", "config": "en", "split": {"train": "train", "test": "validation+extra"}},
    {"data": "c.d.csv.gz", "weight": 0},
    {"name": "7", "data": "hub/other", "split": "train+test"},
]
WANTED = [
    TaskSource("a", {"": ["a.csv"]}, "stars", rename={"text": "sentence", "title": "headline"}, weight=2.0),
    TaskSource("b", {"": ["b1.csv", "b2.csv"]}, "y", "csv", kind={"class_path": "binary"}),
    TaskSource("own/set/en", {"": ["own/set"]}, "y", config="en", split={"train": "train", "test": "validation+extra"}),
    TaskSource("c.d", {"": ["c.d.csv.gz"]}, "y", weight=0.0),
    TaskSource("7", {"": ["hub/other"]}, "y", split={"": "train+test"}),
]


def flat(value):
    if isinstance(value, dict):
        return ";".join(f"{k}={v}" for k, v in value.items())
    return ";".join(value) if isinstance(value, list) else value


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "yaml", "json", "jsonl"])
def test_every_kind_of_task_table_gives_the_same_sources(tmp_path, kind):
    path = tmp_path / f"tasks.{kind}"
    frame = pd.DataFrame([{k: flat(v) for k, v in row.items()} for row in ROWS])
    if kind in ("csv", "tsv"):
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "yaml":
        path.write_text(yaml.safe_dump(ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = read_task_table(path, config(table=str(path), label="y"))
    assert [source.kind and source.kind.class_path for source in found] == [None, "binary", None, None, None]
    for source, wanted in zip(found, WANTED, strict=True):
        plain = ("name", "files", "label", "form", "rename", "weight", "config", "split")
        assert {k: getattr(source, k) for k in plain} == {k: getattr(wanted, k) for k in plain}


def test_arrow_structs_maps_and_lists_are_mappings_and_lists(tmp_path):
    columns = {
        "data": pa.array([["a.csv", "b.csv"], ["c.csv"]]),
        "name": ["ab", "c"],
        "inputs": pa.array([[("text", "s")], None], pa.map_(pa.string(), pa.string())),
        "split": pa.array([{"train": None, "test": "x"}, {"train": "t", "test": None}]),
        "kind": pa.array([{"class_path": "binary", "init_args": {"pos_weight": 2.0}}, None]),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    ab, c = read_task_table(tmp_path / "t.parquet", config(table="t.parquet", label="y"))
    assert (ab.files, ab.rename, ab.split) == ({"": ["a.csv", "b.csv"]}, {"text": "s"}, {"test": "x"})
    assert ab.kind is not None
    assert (ab.kind.class_path, ab.kind.init_args) == ("binary", {"pos_weight": 2.0})
    assert (c.files, c.rename, c.split, c.kind) == ({"": ["c.csv"]}, {}, {"train": "t"}, None)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("t.yaml", "a: [", "cannot be read as yaml"),
        ("t.yaml", "a: 1", "expected a list"),
        ("t.yaml", "- {data: a.csv, data: b.csv}", "'data' occurs twice"),
        ("t.yaml", "- a.csv", "found 'a.csv'"),
        ("t.yaml", "- {data: a.csv, name: true}", "found True, expected text"),
        ("t.yaml", "- {data: a.csv, kind: {class: x}}", "class"),
        ("t.json", "[", "cannot be read as json"),
        ("t.json", "[" * 100_000, "cannot be read as json"),
        ("t.parquet", "no", "cannot be read as parquet"),
        ("t.xlsx", "no", "expected a .csv"),
    ],
)
def test_a_task_table_that_cannot_be_read_is_refused_in_one_line(tmp_path, name, text, part):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=part):
        read_task_table(tmp_path / name, config(table=name, label="y"))


def test_what_editors_and_spreadsheets_leave_in_a_task_table_does_no_harm(tmp_path):
    texts = {
        "t.csv": "\ufeffname,data\na,a.csv\n,\n\nb,b.csv\n,\n",
        "t.json": '\ufeff[{"name": "a", "data": "a.csv"}, {"name": "b", "data": "b.csv"}]',
        "t.jsonl": '{"name": "a", "data": "a.csv"}\r\n\r\n{"name": "b", "data": "b.csv"}\r\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
        sources = read_task_table(tmp_path / name, config(table=name, label="y"))
        assert [(source.name, source.first_file) for source in sources] == [("a", "a.csv"), ("b", "b.csv")]

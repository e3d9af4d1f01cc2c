import gzip
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from mtrain.config import DataConfig
from mtrain.data.sources import open_table, to_arrow
from mtrain.data.splits import SOURCE
from mtrain.errors import UserError

TABLE = pa.table({"x": [1.5, 2.5, None], "n": [1, 2, 3], "t": ["a", None, "c"]})


def opened(path, **options):
    return open_table(DataConfig(path=path, layout="grid", **options))


def write(path, table=TABLE):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.split(".", 1)[1]
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif kind == "feather":
        feather.write_feather(table, path, compression="uncompressed")
    elif kind == "jsonl":
        path.write_text(table.to_pandas().to_json(orient="records", lines=True))
    else:
        table.to_pandas().to_csv(path, index=False, sep="\t" if ".tsv" in path.name else ",")
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "csv.bz2", "csv.xz", "tsv", "jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_each_file_type_gives_the_same_table(tmp_path, kind, in_memory):
    data = opened(write(tmp_path / f"t.{kind}"), in_memory=in_memory)
    got = to_arrow(data, ["n", "x", "t"])
    assert got["n"].to_pylist() == [1, 2, 3]
    assert got["t"].to_pylist() == ["a", None, "c"]
    assert got["x"].to_pylist() == [1.5, 2.5, None]


def test_a_format_can_be_named_where_the_ending_says_nothing(tmp_path):
    path = tmp_path / "t.dat"
    path.write_text("x\n1\n")
    assert opened(str(path), format="csv")["x"][:] == [1]


def test_lists_globs_and_folders_are_joined_in_sorted_order(tmp_path):
    for i in (2, 0, 1):
        write(tmp_path / "d" / f"{i}.parquet", pa.table({"n": [i]}))
    (tmp_path / "d" / "README.md").write_text("no data")
    listed = [str(tmp_path / "d" / f"{i}.parquet") for i in (2, 0)]
    assert opened(listed)["n"][:] == [2, 0]
    assert opened(str(tmp_path / "d" / "*.parquet"))["n"][:] == [0, 1, 2]
    assert opened(str(tmp_path / "d"))["n"][:] == [0, 1, 2]


def test_files_by_split_carry_the_name_of_their_split(tmp_path):
    paths = {part: write(tmp_path / f"{part}.csv", pa.table({"n": [i]})) for i, part in enumerate(("train", "test"))}
    data = opened(paths)
    assert dict(zip(data["n"][:], data[SOURCE][:], strict=True)) == {0: "train", 1: "test"}


@pytest.mark.parametrize("way", ["root", "environment", "working directory", "beside the config"])
def test_relative_paths_are_looked_for_in_four_places(tmp_path, monkeypatch, way):
    write(tmp_path / "here" / "t.csv")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / ("here" if way == "working directory" else "elsewhere"))
    if way == "environment":
        monkeypatch.setenv("MTRAIN_DATA", str(tmp_path / "here"))
    root = str(tmp_path / "here") if way == "root" else None
    config = DataConfig(path="t.csv", layout="grid", root=root)
    assert len(open_table(config, tmp_path / "here" if way == "beside the config" else None)) == 3


def test_a_function_may_give_the_table(tmp_path, monkeypatch):
    (tmp_path / "tables_of_a_user.py").write_text(
        "import pandas, pyarrow, datasets\n"
        "def arrow(): return pyarrow.table({'n': [1]})\n"
        "def frame(): return pandas.DataFrame({'n': [1]}, index=[7])\n"
        "def ready(): return datasets.Dataset.from_dict({'n': [1]})\n"
        "def number(): return 3\n"
        "def fails(): return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("arrow", "frame", "ready"):
        data = opened(f"python:tables_of_a_user.{name}")
        assert (data.column_names, data["n"][:]) == (["n"], [1])
    with pytest.raises(UserError, match="returned int, expected a table"):
        opened("python:tables_of_a_user.number")
    with pytest.raises(UserError, match="fails with ZeroDivisionError"):
        opened("python:tables_of_a_user.fails")
    sys.modules.pop("tables_of_a_user")


def test_a_long_csv_with_text_at_its_end_is_one_column_of_text(tmp_path):
    values = [f"{i}.5" for i in range(200_000)] + ["oops"]
    (tmp_path / "t.csv").write_text("y\n" + "\n".join(values) + "\n")
    column = to_arrow(opened(str(tmp_path / "t.csv")), ["y"])["y"]
    assert (column[0].as_py(), column[-1].as_py()) == ("0.5", "oops")


GOOD = "a,b\n1,2\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty, expected a header and rows"),
        (b"a,b\n", "no rows, expected at least one"),
        (b"\0" * 100, "holds binary data"),
        (bytes(range(128, 256)), "not UTF-8 text"),
        ("a,ü\n1,2\n".encode("latin-1"), "not UTF-8 text.*convert it"),
        (b"a,b\n" + b"1,2\n" * 100_000 + "ü,2\n".encode("latin-1"), "not UTF-8 text.*convert it"),
        (b"a,b,a\n1,2,3\n", "two columns are named 'a'"),
        (b"a;b\n1;2\n", "separated by ';'"),
        (b"a\tb\n1\t2\n", "separated by"),
        (b"a,b\n1,2,3\n", "row 1 has 3 values but the header 2 names"),
        (b"a,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3, saw 3"),
    ],
)
def test_a_broken_csv_is_refused_in_one_line_that_names_the_file(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"data\.path .*t\.csv.*: .*{message}"):
        opened(str(tmp_path / "t.csv"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv.gz", gzip.compress(("a,b\n" + "1,2\n" * 5000).encode())[:40], "cannot be read as csv"),
        ("t.csv.gz", GOOD.encode(), "Not a gzipped file"),
        ("t.parquet", b"hello", "cannot be read as parquet"),
        ("t.json", b"{nope", "cannot be read as json"),
        ("t.jsonl", b"", "no rows"),
        ("t.arrow", b"nope", "cannot be read as arrow"),
        ("t.xls", b"nope", "unknown file type; set data.format"),
    ],
)
def test_other_broken_files_are_refused_too(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        opened(str(tmp_path / name))


def test_an_empty_table_is_refused(tmp_path):
    path = write(tmp_path / "t.parquet", pa.table({"a": pa.array([], pa.float64())}))
    with pytest.raises(UserError, match="no rows"):
        opened(path)


def test_files_with_other_columns_or_types_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text(GOOD)
    (tmp_path / "b.csv").write_text("a,c\n1,2\n")
    (tmp_path / "c.csv").write_text("a,b\nx,2\n")
    with pytest.raises(UserError, match=r"column 'b' is in .*a\.csv but not in .*b\.csv"):
        opened([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    with pytest.raises(UserError, match=r"Arrow.*same columns and types"):
        opened([str(tmp_path / "a.csv"), str(tmp_path / "c.csv")])


def test_places_without_data_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no such file \(looked in .*MTRAIN_DATA"):
        opened("nope.csv")
    with pytest.raises(UserError, match="holds no csv, json, parquet or arrow file"):
        opened(str(tmp_path))
    write(tmp_path / "a.csv")
    write(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="holds csv and parquet files, expected one type"):
        opened(str(tmp_path))
    with pytest.raises(UserError, match="are for hub data sets"):
        opened(str(tmp_path / "a.csv"), source_split="train")


def test_columns_come_from_arrow_as_numpy_without_a_copy_of_each_value(tmp_path):
    frame = pd.DataFrame({"x": np.arange(10.0)})
    pq.write_table(pa.Table.from_pandas(frame), tmp_path / "t.parquet")
    np.testing.assert_array_equal(to_arrow(opened(str(tmp_path / "t.parquet")), ["x"])["x"].to_numpy(), frame["x"])

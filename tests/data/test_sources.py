import bz2
import gzip
import io
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from frames import check, frame, parts, save

from mtrain.config import DataConfig
from mtrain.data import sources
from mtrain.data.sources import open_data, open_many, open_mapped, open_stream, to_arrow
from mtrain.data.splits import SOURCE
from mtrain.data.tables import ParquetTable, ReadError
from mtrain.errors import UserError

TABLE = pa.table({"x": [1.5, 2.5, None], "n": [1, 2, 3], "t": ["a", None, "c"]})


def opened(path, **options):
    return open_data(DataConfig(path=path, layout="grid", **options), None)[0].data


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
    assert len(open_data(config, tmp_path / "here" if way == "beside the config" else None)[0]) == 3


def test_a_function_may_give_the_table(tmp_path, monkeypatch):
    (tmp_path / "tables_of_a_user.py").write_text(
        "import pandas, pyarrow, datasets\n"
        "def arrow(): return pyarrow.table({'n': [1]})\n"
        "def frame(): return pandas.DataFrame({'n': [1]}, index=[7])\n"
        "def ready(): return datasets.Dataset.from_dict({'n': [1]})\n"
        "def number(): return 3\n"
        "def fails(): return 1 / 0\n"
        "def sized(rows, start=0): return pyarrow.table({'n': list(range(start, rows))})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("arrow", "frame", "ready"):
        data = opened(f"python:tables_of_a_user.{name}")
        assert (data.column_names, data["n"][:]) == (["n"], [1])
    assert opened("python:tables_of_a_user.sized(rows=3, start=1)")["n"][:] == [1, 2]
    for wrong in ("sized(3)", "sized(rows=open)", "sized(rows=)", "sized(rows=3) + 1"):
        with pytest.raises(UserError, match="expected arguments by name with plain values"):
            opened(f"python:tables_of_a_user.{wrong}")
    with pytest.raises(UserError, match="missing 1 required positional argument: 'rows'"):
        opened("python:tables_of_a_user.sized")
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
with io.BytesIO() as _stream:
    with zipfile.ZipFile(_stream, "w") as _archive:
        _archive.writestr("t.csv", GOOD)
    ZIPPED = _stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty, expected a header and rows"),
        (b"a,b\n", "no rows, expected at least one"),
        (b"\0" * 100, "holds binary data"),
        (ZIPPED, "is a zip archive .*, expected CSV text.*; unpack it"),
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
        ("t.csv.gz", gzip.compress(("a,b\n" + "1,2\n" * 5000).encode(), mtime=0)[:40], "cannot be read as csv"),
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


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_that_cannot_be_mapped_are_named(tmp_path, kind):
    pairs = pa.array([[("a", 1.0)]], pa.map_(pa.string(), pa.float64()))
    path = write(tmp_path / f"map.{kind}", pa.table({"x": [1.0], "pairs": pairs}))
    instead = "; or set data.streaming: true" if kind == "parquet" else "$"
    message = (
        rf"column 'pairs' has type map<.*>, which .*, expected numbers, text or lists; .*leave it out of the file{instead}"
    )
    with pytest.raises(UserError, match=rf"data\.path {path}: {message}"):
        opened(path)
    (refused,) = open_mapped([[path]], kind, 5)
    assert re.match(f"{path}: {message}", str(refused))
    path = write(tmp_path / f"twice.{kind}", pa.table([[1.0], [2.0], [3.0]], ["x", "y", "x"]))
    with pytest.raises(UserError, match=rf"data\.path {path}: two columns are named 'x', expected unique names; rename one"):
        opened(path)


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


@pytest.mark.parametrize("form", ["parquet", "csv", "tsv", "jsonl", "csv.gz", "csv.bz2", "csv.xz", "jsonl.gz"])
@pytest.mark.parametrize("workers", [1, 4])
def test_files_give_the_rows_that_pandas_wrote(tmp_path, form, workers):
    files, expected = parts(tmp_path, form)
    kind = {"tsv": "csv", "jsonl": "json"}.get(form.split(".")[0], form.split(".")[0])
    for table in (open_many([files], kind, 8, 0)[0], open_mapped([files], kind, 8)[0]):
        check(table, expected, workers)
        assert table.column_names == ["n", "x", "t"]
    table = open_many([files], kind, 8, 0)[0]
    assert table.where(0) == f"{files[0]}, row 1"
    assert table.where(24) == f"{files[1]}, row 2"


def test_text_files_of_other_types_do_not_change_each_other(tmp_path):
    for form, make in (("csv", "csv"), ("json", "jsonl")):
        values = [["a", "b"], [1, 2], [0.5, 1.0]]
        files = [save(tmp_path / f"{i}.{make}", pd.DataFrame({"y": each})) for i, each in enumerate(values)]
        for opened in (open_many([[f] for f in files], form, 10, 0), open_mapped([[f] for f in files], form, 10)):
            assert [table.read(["y"])["y"].to_pylist() for table in opened] == values


def test_differing_columns_are_named(tmp_path):
    for form in ("parquet", "csv"):
        a = save(tmp_path / f"a.{form}", pd.DataFrame({"y": [1], "x": [1]}))
        b = save(tmp_path / f"b.{form}", pd.DataFrame({"y": [1]}))
        (error,) = open_many([[a, b]], form, 5, 0)
        assert isinstance(error, ReadError)
        assert str(error).startswith(f"column 'x' is in {a} but not in {b}")
    with pytest.raises(ReadError, match=r"b\.parquet: no column 'yy'.*'y'"):
        ParquetTable([str(tmp_path / "b.parquet")], 5, 0).read(["yy"])


@pytest.mark.parametrize("rows", [90, 110, 100])
@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_a_file_that_changes_under_the_run_is_named(tmp_path, form, rows, waits):
    path = save(tmp_path / f"a.{form}", frame(0, 100), group=20)
    (table,) = open_many([[path]], form, 30, 3)
    assert len(table.read_chunk(0, ["n"])) in (20, 30)
    save(path, frame(0, rows).assign(t="other"), group=25)
    what = f"has {rows} rows now, had 100" if form == "parquet" and rows != 100 else "bytes"
    with pytest.raises(ReadError, match=rf"file {path}: .*{what}.* when the run began; "):
        table.read_chunk(1, ["n"])
    assert waits == []


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_a_column_that_is_gone_from_a_file_under_the_run_is_named(tmp_path, form, waits):
    path = save(tmp_path / f"a.{form}", pd.DataFrame({"x": [1.0, 2.0]}))
    (table,) = open_many([[path]], form, 10, 3)
    save(path, pd.DataFrame({"z": [1.0, 2.0]}))
    with pytest.raises(ReadError, match=rf"file {path}: has no column 'x' now, had one when the run began; "):
        table.read_chunk(0, ["x"])
    assert waits == []


def test_json_files_without_rows_say_so(tmp_path):
    for content in ("", "{}\n", "\n"):
        path = tmp_path / "a.jsonl"
        path.write_text(content)
        for opened in (open_many([[str(path)]], "json", 10, 0), open_mapped([[str(path)]], "json", 10)):
            assert isinstance(opened[0], ReadError)
            assert f"{path}: " in str(opened[0])
            assert "no rows, expected at least one" in str(opened[0])


def test_broken_files_are_errors_of_their_own_tables(tmp_path, waits, caplog):
    good = save(tmp_path / "good.parquet", frame(0, 9))
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(Path(good).read_bytes()[:-20])
    text = tmp_path / "text.parquet"
    text.write_text("hello")
    none = save(tmp_path / "none.parquet", frame(0, 0))
    groups = [[good], [str(cut)], [good, good], [str(text)], [str(tmp_path / "absent.parquet")], [none]]
    for opened in (open_many(groups, "parquet", 5, 3), open_mapped(groups, "parquet", 5)):
        check(opened[0], frame(0, 9))
        assert len(opened[2]) == 18
        for i, found in (
            (1, "cut.parquet: cannot be read: ArrowInvalid"),
            (3, "text.parquet: cannot"),
            (4, "absent.parquet: cannot"),
        ):
            assert found in str(opened[i])
            assert isinstance(opened[i], ReadError)
        assert "none.parquet: no rows" in str(opened[5])
    whole = gzip.compress(frame(0, 2000).to_csv(index=False).encode())
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bad.csv").write_bytes(b"a,b\n" + b"1,2\n" * 9 + b"\xff,3\n")
    (tmp_path / "shift.csv").write_text("a,b\n1,2,3\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("n,x,t\n")
    (tmp_path / "bad.jsonl").write_text('{"n": 1}\n{"n": \n')
    good = save(tmp_path / "a[1]*.csv", frame(0, 9))
    names = ["cut.csv.gz", "bad.csv", "shift.csv", "empty.csv", "header.csv", "absent.csv"]
    reasons = [
        "EOFError",
        "not UTF-8",
        "row 1 has 3 values",
        "the file is empty",
        "no rows",
        "No such file|FileNotFound|Unable",
    ]
    groups = [[str(tmp_path / name)] for name in names] + [[good]]
    for opened in (open_many(groups, "csv", 5, 3), open_mapped(groups, "csv", 5)):
        for error, name, why in zip(opened, names, reasons, strict=False):
            assert isinstance(error, ReadError), name
            assert re.match(rf"{tmp_path}/{name}: .*({why})", str(error))
        check(opened[-1], frame(0, 9))
    bad, fine = [str(tmp_path / "bad.jsonl")], [save(tmp_path / "a.jsonl", frame(0, 9))]
    for opened in (open_many([bad, fine], "json", 5, 3), open_mapped([bad, fine], "json", 5)):
        assert "bad.jsonl: cannot be read" in str(opened[0])
        check(opened[1], frame(0, 9))
    assert waits == []
    assert not caplog.records


def stream(path, **options):
    return open_stream(DataConfig(path=path, layout="grid", **options), None, 10)


def test_streams_open_what_tables_open(tmp_path):
    for form in ("parquet", "csv", "jsonl"):
        (tmp_path / form).mkdir()
        _, expected = parts(tmp_path / form, form)
        check(stream(str(tmp_path / form)), expected)
    arrow = tmp_path / "a.arrow"
    rows = pa.Table.from_pandas(frame(0, 30), preserve_index=False)
    with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)
    check(stream(str(arrow)), frame(0, 30))
    (tmp_path / "a.csv.bz2").write_bytes(bz2.compress(frame(0, 30).to_csv(index=False).encode()))
    table = stream({"train": str(tmp_path / "a.csv.bz2"), "test": str(tmp_path / "csv" / "1.csv")})
    assert table.read([SOURCE])[SOURCE].to_pylist() == ["train"] * 30 + ["test"] * 5
    (tmp_path / "odd.csv").write_text("n,other\n1,2\n")
    with pytest.raises(UserError, match=r"data\.path: column 'other' is in the split test but not in the split train"):
        stream({"train": str(tmp_path / "a.csv.bz2"), "test": str(tmp_path / "odd.csv")})
    (tmp_path / "none.csv").write_text("n,t\n")
    with pytest.raises(UserError, match=r"^data\.path .*none\.csv: no rows"):
        stream(str(tmp_path / "none.csv"))


README = """---
configs:
- config_name: main
  data_files:
  - {{split: train, path: "d/0.{form}"}}
  - {{split: test, path: ["d/1.{form}", "d/2.{form}"]}}
{extra}---
"""


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_files_of_a_hub_data_set_are_found_by_its_readme(tmp_path, form, monkeypatch):
    (tmp_path / "d").mkdir()
    _, expected = parts(tmp_path / "d", form)
    (tmp_path / "README.md").write_text(README.format(form=form, extra=""))
    monkeypatch.setattr(sources, "local_files", lambda config, beside: {})
    table = stream(str(tmp_path), name="main")
    check(table, expected)
    assert table.read([SOURCE])[SOURCE].to_pylist() == ["train"] * 23 + ["test"] * 45
    check(stream(str(tmp_path), name="main", source_split="test"), expected[23:])
    with pytest.raises(UserError, match=r"data\.source_split: no split 'tset' in .*'test'.*streaming: false"):
        stream(str(tmp_path), name="main", source_split="tset")
    if form == "csv":
        (tmp_path / "README.md").write_text(README.format(form=form, extra='  sep: ";"\n'))
        with pytest.raises(UserError, match=r"its README sets sep, .*streaming: false"):
            stream(str(tmp_path), name="main")
    (tmp_path / "README.md").write_text("---\nconfigs: 3\n---\n")
    with pytest.raises(UserError, match=r"the hub says: "):
        stream(str(tmp_path), name="main")


@pytest.mark.parametrize("path", [{"train": "user/name"}, ["user/name"]])
def test_a_hub_id_among_files_is_refused(path):
    with pytest.raises(UserError, match="'user/name' is no file; a hub id stands alone"):
        opened(path)

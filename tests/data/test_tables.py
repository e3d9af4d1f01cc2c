import bz2
import gc
import gzip
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import sleep

import datasets
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrain.config import DataConfig
from mtrain.data import sources, tables
from mtrain.data.sources import open_stream
from mtrain.data.splits import SOURCE
from mtrain.data.tables import (
    JoinedTable,
    MappedTable,
    ParquetTable,
    Piece,
    ReadError,
    TextTable,
    in_threads,
    open_many,
    open_mapped,
    retrying,
)
from mtrain.errors import UserError


def frame(first, rows):
    n = np.arange(first, first + rows)
    return pd.DataFrame({"n": n, "x": n / 4, "t": [f"row {i}" for i in n]})


def write(path, data, form=None, group=10):
    path = Path(path)
    form = form or path.name.split(".")[1]
    if form == "parquet":
        pq.write_table(pa.Table.from_pandas(data, preserve_index=False), path, row_group_size=group)
    elif form == "jsonl":
        data.to_json(path, orient="records", lines=True)
    else:
        data.to_csv(path, index=False, sep="\t" if form == "tsv" else ",")
    return str(path)


def parts(folder, form, sizes=(23, 5, 40)):
    first = np.cumsum([0, *sizes])
    return [write(folder / f"{i}.{form}", frame(int(first[i]), size)) for i, size in enumerate(sizes)], frame(0, sum(sizes))


def every_chunk(table, columns, workers=1):
    order = np.random.default_rng(0).permutation(len(table.key_C)) if workers > 1 else np.arange(len(table.key_C))
    with ThreadPoolExecutor(workers) as pool:
        found = dict(zip(order, pool.map(lambda c: table.read_chunk(int(c), columns), order), strict=True))
    return [found[c] for c in range(len(order))]


def check(table, expected, workers=1):
    """The contract, against pandas."""
    assert len(table) == len(expected) == table.start_C[-1]
    assert table.start_C[0] == 0
    assert (np.diff(table.start_C) > 0).all()
    assert table.key_C.dtype == np.uint64
    runs = 1 + np.count_nonzero(np.diff(table.key_C))
    assert len(set(table.key_C.tolist())) == runs  # chunks of one name (of a text file) follow each other
    columns = ["t", "n"]
    chunks = every_chunk(table, columns, workers)
    assert [len(chunk) for chunk in chunks] == np.diff(table.start_C).tolist()
    for found in (pa.concat_tables(chunks, promote_options="permissive"), table.read(columns)):
        assert found.column_names == columns
        assert found["n"].to_pylist() == expected["n"].tolist()
        assert found["t"].to_pylist() == expected["t"].tolist()


def num_open():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def waits(monkeypatch):
    waited = []
    monkeypatch.setattr(tables, "sleep", waited.append)
    return waited


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


def test_an_indices_mapping_is_followed():
    data = datasets.Dataset.from_pandas(frame(0, 50)).shuffle(seed=1)
    check(MappedTable(data, 7), pd.DataFrame(data[:]), workers=4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=4), st.integers(1, 25))
def test_parquet_chunks_are_row_groups_in_order_and_as_large_as_allowed(files, chunk_rows):
    with tempfile.TemporaryDirectory() as folder:
        first, paths, groups = 0, [], []
        for i, (rows, group) in enumerate(files):
            path = Path(folder) / f"{i}.parquet"
            paths.append(write(path, frame(first, rows), group=group))
            first += rows
            groups.append([min(group, rows - at) for at in range(0, rows, group)])
        if not first:
            with pytest.raises(ReadError, match="no rows"):
                ParquetTable(paths, chunk_rows, 0)
            return
        table = ParquetTable(paths, chunk_rows, 0)
        check(table, frame(0, first))
        expected = []
        for sizes in groups:
            here = []
            for size in sizes:
                if here and here[-1] + size <= chunk_rows:
                    here[-1] += size
                else:
                    here.append(size)
            expected += here
        assert np.diff(table.start_C).tolist() == expected
        assert all(size <= chunk_rows or any(size in sizes for sizes in groups) for size in expected)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(1, 40), st.randoms())
def test_text_chunks_can_be_read_in_any_order(sizes, chunk_rows, random):
    with tempfile.TemporaryDirectory() as folder:
        files, expected = parts(Path(folder), "csv", sizes)
        table = TextTable(files, "csv", chunk_rows, 0)
        check(table, expected)
        assert np.diff(table.start_C).max() <= chunk_rows
        order = list(range(len(table.key_C))) * 2
        random.shuffle(order)
        for chunk in order:
            start, stop = table.start_C[chunk : chunk + 2]
            assert table.read_chunk(chunk, ["n"])["n"].to_pylist() == list(range(start, stop))


def test_empty_row_groups_disappear(tmp_path):
    data = pa.table({"n": [1, 2, 3]})
    with pq.ParquetWriter(tmp_path / "a.parquet", data.schema) as writer:
        for part in (data[:0], data[:2], data[:0], data[2:]):
            writer.write_table(part)
    table = ParquetTable([str(tmp_path / "a.parquet")], 2, 0)
    assert table.start_C.tolist() == [0, 2, 3]
    assert table.read_chunk(1, ["n"])["n"].to_pylist() == [3]


def test_keys_of_chunks_depend_neither_on_folders_nor_on_other_tables(tmp_path):
    keys = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files, _ = parts(tmp_path / folder, "parquet")
        keys.append(ParquetTable(files, 8, 0).key_C)
        keys.append(TextTable(parts(tmp_path / folder, "csv")[0], "csv", 8, 0).key_C[[0, -1]])
    assert (keys[0] == keys[2]).all()
    assert (keys[1] == keys[3]).all()
    one, two = (Piece(MappedTable(datasets.Dataset.from_dict({"n": list(range(n))}), 4), name=f"task '{n}'") for n in (9, 6))
    assert (JoinedTable([one, two]).key_C[:3] == JoinedTable([two, one]).key_C[2:]).all()
    assert (JoinedTable([one]).key_C == JoinedTable([one, two]).key_C[:3]).all()
    assert len(set(JoinedTable([one, two]).key_C)) == 5


def test_types_are_promoted_over_files_and_dictionaries_decoded_where_needed(tmp_path):
    columns = [
        {"v": pa.array([1, 2]), "d": pa.array(["a", "b"]).dictionary_encode(), "z": pa.array([None, None])},
        {"v": pa.array([0.5]), "d": pa.array(["c"], pa.large_string()), "z": pa.array(["z"])},
        {"v": pa.array([None]), "d": pa.array([None]), "z": pa.array(["y"]).dictionary_encode()},
    ]
    for i, each in enumerate(columns):
        pq.write_table(pa.table(each), tmp_path / f"{i}.parquet")
    files = [str(tmp_path / f"{i}.parquet") for i in range(3)]
    found = ParquetTable(files, 10, 0).read(["z", "v", "d"])
    assert found.to_pydict() == {"z": [None, None, "z", "y"], "v": [1.0, 2.0, 0.5, None], "d": ["a", "b", "c", None]}
    same = ParquetTable([files[0], files[0]], 10, 0).read(["d"])["d"]
    assert pa.types.is_dictionary(same.type)
    assert same.to_pylist() == ["a", "b", "a", "b"]


def test_types_that_cannot_be_joined_are_named_with_their_files(tmp_path):
    a, b = write(tmp_path / "a.csv", pd.DataFrame({"y": [1]})), write(tmp_path / "b.csv", pd.DataFrame({"y": ["p"]}))
    table = TextTable([a, b], "csv", 10, 0)
    with pytest.raises(ReadError, match=rf"column 'y' is int64 in {a} but large_string in {b}"):
        table.read(["y"])


def test_a_column_has_one_type_in_all_chunks_of_a_text_file(tmp_path):
    path = write(tmp_path / "a.csv", pd.DataFrame({"y": [1, 2, 3, 0.5], "z": [None, None, "a", "b"]}))
    Path(path).write_text("y,z\n1,\n2,\n3,a\n0.5,b\n")
    table = TextTable([path], "csv", 2, 0)
    assert {str(table.read_chunk(c, ["y"])["y"].type) for c in range(2)} == {"double"}
    assert table.read_chunk(0, ["z"])["z"].type == table.read_chunk(1, ["z"])["z"].type
    Path(path).write_text("y,z\n007,\n,\na,\nb,\n")
    table = TextTable([path], "csv", 2, 0)
    assert table.read(["y"])["y"].to_pylist() == ["007", None, "a", "b"]
    assert table.read_chunk(0, ["y"])["y"].to_pylist() == ["007", None]
    assert table.read_chunk(1, ["z"])["z"].to_pylist() == [None, None]


def test_text_files_of_other_types_do_not_change_each_other(tmp_path):
    for form, make in (("csv", "csv"), ("json", "jsonl")):
        values = [["a", "b"], [1, 2], [0.5, 1.0]]
        files = [write(tmp_path / f"{i}.{make}", pd.DataFrame({"y": each})) for i, each in enumerate(values)]
        for opened in (open_many([[f] for f in files], form, 10, 0), open_mapped([[f] for f in files], form, 10)):
            assert [table.read(["y"])["y"].to_pylist() for table in opened] == values


def test_joined_tables_have_common_names_and_constants(tmp_path):
    one = ParquetTable([write(tmp_path / "1.parquet", pd.DataFrame({"a": [1, 2], "b": [3, 4], "only": [0, 0]}), group=1)], 1, 0)
    two = TextTable([write(tmp_path / "2.csv", pd.DataFrame({"x": [5.5], "y": [6]}))], "csv", 5, 0)
    table = JoinedTable([
        Piece(one, {"x": "a", "y": "b"}, {"task": "one"}, "task 'one'"),
        Piece(two, {}, {"task": "two"}, "task 'two'"),
    ])  # fmt: skip
    assert sorted(table.column_names) == ["task", "x", "y"]
    assert table.start_C.tolist() == [0, 1, 2, 3]
    assert [table.piece_of(c) for c in range(3)] == [0, 0, 1]
    read = table.read(["y", "task", "x"])
    assert read.to_pydict() == {"y": [3, 4, 6], "task": ["one", "one", "two"], "x": [1.0, 2.0, 5.5]}
    assert pa.types.is_dictionary(read["task"].type)
    assert table.read_chunk(1, ["task", "x"]).to_pydict() == {"task": ["one"], "x": [2]}
    assert table.read_chunk(2, ["task"]).to_pydict() == {"task": ["two"]}
    assert table.where(1) == f"task 'one', {tmp_path / '1.parquet'}, row 2"
    with pytest.raises(ReadError, match=r"task 'two': .*2\.csv: no column 'z'"):
        table.read_chunk(2, ["z"])


def test_differing_columns_are_named(tmp_path):
    for form in ("parquet", "csv"):
        a = write(tmp_path / f"a.{form}", pd.DataFrame({"y": [1], "x": [1]}))
        b = write(tmp_path / f"b.{form}", pd.DataFrame({"y": [1]}))
        (error,) = open_many([[a, b]], form, 5, 0)
        assert isinstance(error, ReadError)
        assert str(error).startswith(f"column 'x' is in {a} but not in {b}")
    with pytest.raises(ReadError, match=r"b\.parquet: no column 'yy'.*'y'"):
        ParquetTable([str(tmp_path / "b.parquet")], 5, 0).read(["yy"])


@pytest.mark.parametrize("rows", [90, 110, 100])
@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_a_file_that_changes_under_the_run_is_named(tmp_path, form, rows, waits):
    path = write(tmp_path / f"a.{form}", frame(0, 100), group=20)
    (table,) = open_many([[path]], form, 30, 3)
    assert len(table.read_chunk(0, ["n"])) in (20, 30)
    write(path, frame(0, rows).assign(t="other"), group=25)
    what = f"has {rows} rows now, had 100" if form == "parquet" and rows != 100 else "bytes"
    with pytest.raises(ReadError, match=rf"file {path}: .*{what}.* when the run began; "):
        table.read_chunk(1, ["n"])
    assert waits == []


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_a_column_that_is_gone_from_a_file_under_the_run_is_named(tmp_path, form, waits):
    path = write(tmp_path / f"a.{form}", pd.DataFrame({"x": [1.0, 2.0]}))
    (table,) = open_many([[path]], form, 10, 3)
    write(path, pd.DataFrame({"z": [1.0, 2.0]}))
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


def test_a_text_file_whose_values_changed_is_an_error_that_names_it(tmp_path, waits):
    path = write(tmp_path / "a.csv", pd.DataFrame({"y": [1] * 20}))
    table = TextTable([path], "csv", 5, 3)
    Path(path).write_text("y\n" + "1\n" * 15 + "a\n" * 5)
    table.read_chunk(2, ["y"])
    for read in (lambda: table.read(["y"]), lambda: table.read_chunk(3, ["y"])):
        with pytest.raises(ReadError, match=r"a\.csv: cannot be read: ArrowInvalid: Failed to parse string: 'a'"):
            read()
    assert waits == []


def test_broken_files_are_errors_of_their_own_tables(tmp_path, waits, caplog):
    good = write(tmp_path / "good.parquet", frame(0, 9))
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(Path(good).read_bytes()[:-20])
    text = tmp_path / "text.parquet"
    text.write_text("hello")
    none = write(tmp_path / "none.parquet", frame(0, 0))
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
    good = write(tmp_path / "a[1]*.csv", frame(0, 9))
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
    bad, fine = [str(tmp_path / "bad.jsonl")], [write(tmp_path / "a.jsonl", frame(0, 9))]
    for opened in (open_many([bad, fine], "json", 5, 3), open_mapped([bad, fine], "json", 5)):
        assert "bad.jsonl: cannot be read" in str(opened[0])
        check(opened[1], frame(0, 9))
    assert waits == []
    assert not caplog.records


class Flaky(MemoryFileSystem):
    protocol = "flaky"
    failures = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def _open(self, *args, **kwargs):
        if Flaky.failures:
            Flaky.failures -= 1
            raise ConnectionError("the line is down")
        return super()._open(*args, **kwargs)


def test_remote_files_are_read_again_after_growing_delays(tmp_path, waits):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    store = MemoryFileSystem()
    with store.open("/a.parquet", "wb") as stream:
        stream.write(Path(write(tmp_path / "a.parquet", frame(0, 30))).read_bytes())
    table = ParquetTable(["flaky://a.parquet"], 10, 3)
    check(table, frame(0, 30))
    assert waits == []
    Flaky.failures = 3
    assert table.read_chunk(1, ["n"])["n"].to_pylist() == list(range(10, 20))
    assert waits == pytest.approx([0.1, 0.4, 1.6])
    Flaky.failures = 9
    with pytest.raises(ReadError, match=r"^flaky://a\.parquet: cannot be read: ConnectionError: the line is down \(4 tries\)$"):
        table.read_chunk(1, ["n"])
    Flaky.failures = 0


def test_text_is_read_again_from_where_it_was(tmp_path, waits, monkeypatch):
    table = TextTable([write(tmp_path / "a.csv", frame(0, 30))], "csv", 7, 2)
    table.read_chunk(0, ["n"])
    size, failures = os.path.getsize, [OSError(5, "Input/output error")] * 2

    def getsize(path):
        if failures:
            raise failures.pop()
        return size(path)

    monkeypatch.setattr(tables.os.path, "getsize", getsize)
    assert table.read_chunk(1, ["n"])["n"].to_pylist() == list(range(7, 14))
    assert waits == pytest.approx([0.1, 0.4])


@pytest.mark.parametrize(("error", "tries"), [
    (OSError(5, "Input/output error"), 4), (TimeoutError("late"), 4), (ConnectionResetError("reset"), 4),
    (FileNotFoundError("gone"), 1), (PermissionError("no"), 1), (pa.ArrowInvalid("magic"), 1),
    (EOFError("cut"), 1), (ValueError("v"), 1),
])  # fmt: skip
def test_only_what_may_pass_is_tried_again(error, tries, waits):
    calls = []

    def read():
        calls.append(1)
        raise error

    with pytest.raises(ReadError, match=r"^some file: cannot be read: "):
        retrying(read, 3, "some file")
    assert len(calls) == tries


def test_after_an_error_or_ctrl_c_no_thread_begins_another_item(monkeypatch):
    begun = []

    def work(item):
        begun.append(item)
        sleep(0.001)
        if item == 9:
            raise ReadError("nine")
        return -item

    assert in_threads(work, range(9)) == [-item for item in range(9)]
    with pytest.raises(ReadError, match="nine"):
        in_threads(work, range(1000))
    assert len(begun) < 50

    def interrupted(future):
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_threads(work, range(10, 1000))
    assert len(begun) < 100


def test_no_file_stays_open_and_at_most_256_text_files_are(tmp_path, monkeypatch):
    parquet, expected = parts(tmp_path, "parquet")
    tables._make_room(None)  # what other tests left
    gc.collect()
    before = num_open()
    check(ParquetTable(parquet, 5, 0), expected, workers=4)
    assert num_open() == before
    files = [write(tmp_path / f"t{i}.csv", frame(i, 12)) for i in range(300)]
    opened = open_many([[file] for file in files], "csv", 5, 0)
    assert num_open() == before
    for chunk in range(3):
        for i, table in enumerate(opened):
            start = i + 5 * chunk
            assert table.read_chunk(chunk, ["n"])["n"].to_pylist() == list(range(start, min(start + 5, i + 12)))
            assert len(tables._opened) <= tables.MOST_OPEN
        if chunk == 0:
            assert num_open() == before + tables.MOST_OPEN
    tables._make_room(None)
    assert num_open() == before


def test_text_files_can_be_read_by_threads_while_others_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_OPEN", 2)
    groups = [[write(tmp_path / f"{i}.csv", frame(100 * i, 20))] for i in range(6)]
    table = JoinedTable([Piece(one, name=str(i)) for i, one in enumerate(open_many(groups, "csv", 6, 0))])
    check(table, pd.concat([frame(100 * i, 20) for i in range(6)]), workers=4)


def test_a_program_that_leaves_text_open_ends_quietly(tmp_path):
    files = [write(tmp_path / f"{i}.{form}", frame(0, 50)) for i, form in enumerate(["csv", "csv.gz", "jsonl"])]
    program = f"""
from mtrain.data.tables import open_many
opened = open_many([["{files[0]}"], ["{files[1]}"]], "csv", 10, 0) + open_many([["{files[2]}"]], "json", 10, 0)
print([len(table.read_chunk(1, ["n"])) for table in opened])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("[10, 10, 10]\n", "", 0)


def test_the_text_file_that_was_used_last_stays_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_OPEN", 2)
    tables._make_room(None)
    a, b, c = open_many([[write(tmp_path / f"{name}.csv", frame(0, 40))] for name in "abc"], "csv", 5, 0)
    for table, chunk in ((a, 0), (b, 0), (a, 1), (c, 0)):
        table.read_chunk(chunk, ["n"])
    assert [Path(text.file).stem for text in tables._opened] == ["a", "c"]


def test_remote_rows_that_are_longer_than_the_header_are_refused():
    store = MemoryFileSystem()
    store.pipe("/long.csv", b"a,b\n1,2,3\n4,5,6\n")
    store.pipe("/good.csv.gz", gzip.compress(frame(0, 20).to_csv(index=False).encode()))
    bad, good = open_many([["memory://long.csv"], ["memory://good.csv.gz"]], "csv", 6, 0)
    assert "memory://long.csv: rows have more values than the header" in str(bad)
    check(good, frame(0, 20))


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
    with pytest.raises(UserError, match=r"data\.path: column 'other' is in the split test but not in train"):
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
    monkeypatch.setattr(sources, "_files_by_split", lambda config, beside: {})
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

import gc
import gzip
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from frames import check, frame, parts, save
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrain.data import text
from mtrain.data.sources import open_many
from mtrain.data.tables import JoinedTable, ParquetTable, Piece, ReadError
from mtrain.data.text import TextTable


def num_open():
    return len(os.listdir("/proc/self/fd"))


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


def test_a_column_has_one_type_in_all_chunks_of_a_text_file(tmp_path):
    path = save(tmp_path / "a.csv", pd.DataFrame({"y": [1, 2, 3, 0.5], "z": [None, None, "a", "b"]}))
    Path(path).write_text("y,z\n1,\n2,\n3,a\n0.5,b\n")
    table = TextTable([path], "csv", 2, 0)
    assert {str(table.read_chunk(c, ["y"])["y"].type) for c in range(2)} == {"double"}
    assert table.read_chunk(0, ["z"])["z"].type == table.read_chunk(1, ["z"])["z"].type
    Path(path).write_text("y,z\n007,\n,\na,\nb,\n")
    table = TextTable([path], "csv", 2, 0)
    assert table.read(["y"])["y"].to_pylist() == ["007", None, "a", "b"]
    assert table.read_chunk(0, ["y"])["y"].to_pylist() == ["007", None]
    assert table.read_chunk(1, ["z"])["z"].to_pylist() == [None, None]


def test_types_that_cannot_be_joined_are_named_with_their_files(tmp_path):
    a, b = save(tmp_path / "a.csv", pd.DataFrame({"y": [1]})), save(tmp_path / "b.csv", pd.DataFrame({"y": ["p"]}))
    table = TextTable([a, b], "csv", 10, 0)
    with pytest.raises(ReadError, match=rf"column 'y' is int64 in {a} but large_string in {b}"):
        table.read(["y"])


def test_a_text_file_whose_values_changed_is_an_error_that_names_it(tmp_path, waits):
    path = save(tmp_path / "a.csv", pd.DataFrame({"y": [1] * 20}))
    table = TextTable([path], "csv", 5, 3)
    Path(path).write_text("y\n" + "1\n" * 15 + "a\n" * 5)
    table.read_chunk(2, ["y"])
    for read in (lambda: table.read(["y"]), lambda: table.read_chunk(3, ["y"])):
        with pytest.raises(ReadError, match=r"a\.csv: cannot be read: ArrowInvalid: Failed to parse string: 'a'"):
            read()
    assert waits == []


def test_text_is_read_again_from_where_it_was(tmp_path, waits, monkeypatch):
    table = TextTable([save(tmp_path / "a.csv", frame(0, 30))], "csv", 7, 2)
    table.read_chunk(0, ["n"])
    size, failures = os.path.getsize, [OSError(5, "Input/output error")] * 2

    def getsize(path):
        if failures:
            raise failures.pop()
        return size(path)

    monkeypatch.setattr(os.path, "getsize", getsize)
    assert table.read_chunk(1, ["n"])["n"].to_pylist() == list(range(7, 14))
    assert waits == pytest.approx([0.1, 0.4])


def test_no_file_stays_open_and_at_most_256_text_files_are(tmp_path, monkeypatch):
    parquet, expected = parts(tmp_path, "parquet")
    text._make_room(None)  # what other tests left
    gc.collect()
    before = num_open()
    check(ParquetTable(parquet, 5, 0), expected, workers=4)
    assert num_open() == before
    files = [save(tmp_path / f"t{i}.csv", frame(i, 12)) for i in range(300)]
    opened = open_many([[file] for file in files], "csv", 5, 0)
    assert num_open() == before
    for chunk in range(3):
        for i, table in enumerate(opened):
            start = i + 5 * chunk
            assert table.read_chunk(chunk, ["n"])["n"].to_pylist() == list(range(start, min(start + 5, i + 12)))
            assert len(text._opened) <= text.MOST_OPEN
        if chunk == 0:
            assert num_open() == before + text.MOST_OPEN
    text._make_room(None)
    assert num_open() == before


def test_text_files_can_be_read_by_threads_while_others_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MOST_OPEN", 2)
    groups = [[save(tmp_path / f"{i}.csv", frame(100 * i, 20))] for i in range(6)]
    table = JoinedTable([Piece(one, name=str(i)) for i, one in enumerate(open_many(groups, "csv", 6, 0))])
    check(table, pd.concat([frame(100 * i, 20) for i in range(6)]), workers=4)


def test_a_program_that_leaves_text_open_ends_quietly(tmp_path):
    files = [save(tmp_path / f"{i}.{form}", frame(0, 50)) for i, form in enumerate(["csv", "csv.gz", "jsonl"])]
    program = f"""
from mtrain.data.sources import open_many
opened = open_many([["{files[0]}"], ["{files[1]}"]], "csv", 10, 0) + open_many([["{files[2]}"]], "json", 10, 0)
print([len(table.read_chunk(1, ["n"])) for table in opened])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("[10, 10, 10]\n", "", 0)


def test_the_text_file_that_was_used_last_stays_open(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MOST_OPEN", 2)
    text._make_room(None)
    a, b, c = open_many([[save(tmp_path / f"{name}.csv", frame(0, 40))] for name in "abc"], "csv", 5, 0)
    for table, chunk in ((a, 0), (b, 0), (a, 1), (c, 0)):
        table.read_chunk(chunk, ["n"])
    assert [Path(one.file).stem for one in text._opened] == ["a", "c"]


def test_remote_rows_that_are_longer_than_the_header_are_refused():
    store = MemoryFileSystem()
    store.pipe("/long.csv", b"a,b\n1,2,3\n4,5,6\n")
    store.pipe("/good.csv.gz", gzip.compress(frame(0, 20).to_csv(index=False).encode()))
    bad, good = open_many([["memory://long.csv"], ["memory://good.csv.gz"]], "csv", 6, 0)
    assert "memory://long.csv: rows have more values than the header" in str(bad)
    check(good, frame(0, 20))

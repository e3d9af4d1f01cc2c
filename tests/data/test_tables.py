import tempfile
from concurrent.futures import Future
from pathlib import Path
from time import sleep

import datasets
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from frames import check, frame, parts, save
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrain.data.tables import JoinedTable, MappedTable, ParquetTable, Piece, ReadError, in_threads, retrying
from mtrain.data.text import TextTable


def test_an_indices_mapping_is_followed():
    data = datasets.Dataset.from_pandas(frame(0, 50)).shuffle(seed=1)
    check(MappedTable(data, 7), pd.DataFrame(data[:]), workers=4)


def test_views_of_strings_are_read_as_strings(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"t": pa.array(["a", None, "a longer text than fits a view"], pa.string_view()), "n": [1, 2, 3]})
    pq.write_table(table, path)
    for opened in (ParquetTable([str(path)], 5, 0), MappedTable(datasets.Dataset(table), 5)):
        for found in (opened.read(["t"]), opened.read_chunk(0, ["t"])):
            assert found.schema.types == [pa.string()]
            assert found["t"].to_pylist() == table["t"].to_pylist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=4), st.integers(1, 25))
def test_parquet_chunks_are_row_groups_in_order_and_as_large_as_allowed(files, chunk_rows):
    with tempfile.TemporaryDirectory() as folder:
        first, paths, groups = 0, [], []
        for i, (rows, group) in enumerate(files):
            path = Path(folder) / f"{i}.parquet"
            paths.append(save(path, frame(first, rows), group=group))
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


def test_joined_tables_have_common_names_and_constants(tmp_path):
    one = ParquetTable([save(tmp_path / "1.parquet", pd.DataFrame({"a": [1, 2], "b": [3, 4], "only": [0, 0]}), group=1)], 1, 0)
    two = TextTable([save(tmp_path / "2.csv", pd.DataFrame({"x": [5.5], "y": [6]}))], "csv", 5, 0)
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
        stream.write(Path(save(tmp_path / "a.parquet", frame(0, 30))).read_bytes())
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

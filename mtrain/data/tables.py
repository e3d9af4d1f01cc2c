"""Tables that are read by the chunk, so that their inputs need not be in memory.

A *chunk* is what is read at once: some consecutive row groups of a Parquet file, some consecutive rows of anything else.
"""

from __future__ import annotations

import atexit
import glob
import json
import logging
import os
import threading
import weakref
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from time import sleep
from typing import Protocol, TypeVar

import datasets
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtrain.data.order import U64, mix, name_key
from mtrain.data.sources import check_headers, quiet, reason
from mtrain.errors import UserError, nearest, some

READERS = 4  # threads
MOST_OPEN = 256  # text files
_SPLITS_A_CALL = 25  # the time of a `load_dataset` call grows with the square of the number of its splits
_LOST = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_NETWORK = {"aiohttp", "httpcore", "httpx", "requests", "urllib3"}
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what it logs it also raises
T = TypeVar("T")
R = TypeVar("R")


class ReadError(UserError):
    """Data that could not be opened or read, also after retries; the message names the file."""


class Table(Protocol):
    """The contract. Rows are numbered in storage order: file by file, row by row.

    column_names: of all rows.
    start_C: `[C + 1]`, the first row of each of the C chunks, and the number of rows.
    key_C: `[C]` uint64, a stable name of each chunk, from the file's position in its table and the chunk's in the file: it
        depends neither on folders nor on other tables. Chunks of one key can only be read one after another.
    """

    column_names: list[str]
    start_C: NDArray[np.int64]
    key_C: NDArray[np.uint64]

    def __len__(self) -> int: ...

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Every row of some (narrow) columns: labels, keys."""
        ...

    def read_chunk(self, chunk: int, columns: Sequence[str]) -> pa.Table:
        """The rows of one chunk; may be called from several threads at once."""
        ...

    def where(self, row: int) -> str:
        """A row in words, for messages: `task 'a', a.csv, row 5`."""
        ...


@dataclass(frozen=True)
class Piece:
    """A table in a joined one.

    rename: the piece's own name of a column, by its common name; columns that are not named keep theirs.
    constants: columns that the piece does not have, one value for all its rows.
    name: `task 'a'`, for messages; empty: not said.
    """

    table: Table
    rename: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    name: str = ""


def retrying(read: Callable[[], R], retries: int, what: str) -> R:
    """The result of `read()`, which is called again after 0.1, 0.4, 1.6 ... seconds where waiting may help.

    Raises:
        ReadError: `what` (a file) and the last reason.
    """
    for attempt in range(retries + 1):
        try:
            return read()
        except UserError:
            raise
        except Exception as error:  # pandas, pyarrow, datasets and file systems raise many types
            if attempt == retries or not _may_pass(error, remote="://" in what):
                tries = f" ({attempt + 1} tries)" if attempt else ""
                raise ReadError(f"{what}: cannot be read: {reason(error)}{tries}") from error
        sleep(0.1 * 4**attempt)
    raise AssertionError("not reached")


def _may_pass(error: BaseException, remote: bool) -> bool:
    """Whether the same read may work later. A local file that is damaged stays so; a remote one may have been cut short."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and not isinstance(error, _LOST):
        return remote or type(error).__name__ != "BadGzipFile"
    return type(error).__module__.split(".")[0] in _NETWORK or (remote and isinstance(error, EOFError | zlib.error))


def in_threads(function: Callable[[T], R], items: Iterable[T], threads: int = READERS) -> list[R]:
    """The results in order, computed by a few threads; after an error or Ctrl-C no further item is begun."""
    items = list(items)
    if len(items) < 2:
        return [function(item) for item in items]
    found: dict[int, R] = {}
    todo = iter(range(len(items)))  # one for all threads; a future for each item would keep Ctrl-C waiting

    def work() -> None:
        try:
            for i in todo:
                found[i] = function(items[i])
        finally:
            deque(todo, maxlen=0)

    with ThreadPoolExecutor(threads) as pool:
        try:
            for future in [pool.submit(work) for _ in range(min(threads, len(items)))]:
                future.result()
        finally:
            deque(todo, maxlen=0)
    return [found[i] for i in range(len(items))]


def _changed(file: str, what: str) -> ReadError:
    return ReadError(f"file {file}: {what} when the run began; put the old file back or start a new run")


def _chosen(table: pa.Table, columns: Sequence[str], file: str) -> pa.Table:
    held = set(table.column_names)  # a property that builds its list anew each time
    for name in columns:
        if name not in held:
            raise _changed(file, f"has no column '{name}' now, had one")
    return table.select(columns)


def _has_columns(file: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            raise ReadError(f"{file}: no column '{name}'{nearest(name, names)}")


def _same_columns(first: Sequence[str], names: Sequence[str], first_file: str, file: str) -> None:
    for odd in sorted(set(first) ^ set(names)):
        here, there = (file, first_file) if odd in names else (first_file, file)
        raise ReadError(f"column '{odd}' is in {here} but not in {there}, expected the same columns in all files of a table")


def _concat(tables: Sequence[pa.Table], names: Sequence[str]) -> pa.Table:
    """One table, with types that hold all values; `names` say where tables are from."""
    tables = [table.replace_schema_metadata(None) for table in tables]
    if all(table.schema.equals(tables[0].schema) for table in tables):
        return pa.concat_tables(tables)
    columns = []
    for i, name in enumerate(tables[0].column_names):
        parts = [table.column(i) for table in tables]
        types = list(dict.fromkeys(part.type for part in parts))
        if len(types) > 1:
            parts = [_promotable(part) for part in parts]
        try:
            columns.append(pa.concat_tables([pa.table([part], [name]) for part in parts], promote_options="permissive")[name])
        except (pa.ArrowTypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
            kinds = {str(part.type): where for part, where in zip(reversed(parts), reversed(names), strict=True)}
            found = " but ".join(f"{kind} in {where}" for kind, where in reversed(kinds.items()) if kind != "null")
            raise ReadError(f"column '{name}' is {found}, expected types that can be joined; convert it to one type") from None
    return pa.table(columns, names=tables[0].column_names)


def _promotable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Dictionaries and columns without values have types that are not promoted."""
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column))])
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _chunk_keys(file_C: NDArray[np.int64], chunk_C: NDArray[np.int64]) -> NDArray[np.uint64]:
    return mix(mix(file_C.astype(U64) + U64(1)) + chunk_C.astype(U64))


class _Rows:
    """How rows and chunks are numbered over files; `rows_FC` are the rows of each chunk of each file."""

    def __init__(self, files: Sequence[str], rows_FC: Sequence[Sequence[int]]):
        self.files = files
        chunks_F = np.array([len(rows_C) for rows_C in rows_FC], dtype=np.int64)
        rows_C = np.array([rows for each in rows_FC for rows in each], dtype=np.int64)
        if not rows_C.sum():
            raise ReadError(f"{', '.join(files[:3])}: no rows, expected at least one")
        self.first_F = np.cumsum([0] + [sum(each) for each in rows_FC])
        self.file_C = np.repeat(np.arange(len(files)), chunks_F)
        self.chunk_C = np.arange(len(rows_C)) - np.repeat(np.cumsum(chunks_F) - chunks_F, chunks_F)
        self.start_C = np.concatenate([[0], np.cumsum(rows_C)]).astype(np.int64)
        self.key_C = _chunk_keys(self.file_C, self.chunk_C)

    def where(self, row: int) -> str:
        f = int(np.searchsorted(self.first_F, row, side="right")) - 1
        return f"{self.files[f]}, row {row - int(self.first_F[f]) + 1}"


class ParquetTable:
    """Parquet files with the same columns, local or remote (any URL that fsspec opens); a chunk is some row groups of one file.

    No file stays open. Footers are read with each chunk: to keep one saves a fifth of a read and takes 0.1 MB for 64 columns.

    Args:
        chunk_rows: row groups are read together up to this many rows.

    Raises:
        ReadError: a file cannot be read, the columns differ, or there are no rows.
    """

    def __init__(self, files: Sequence[str], chunk_rows: int, retries: int):
        self.files, self.retries = list(files), retries
        self._footers = in_threads(lambda file: retrying(lambda: _footer(file), retries, file), self.files)
        first = self._footers[0]
        for file, footer in zip(self.files, self._footers, strict=True):
            _same_columns(first.names, footer.names, self.files[0], file)
        self.column_names = first.names
        self._groups_C: list[list[int]] = []
        rows_FC: list[list[int]] = []
        for footer in self._footers:
            rows_C: list[int] = []
            for group, rows in enumerate(footer.rows):
                if rows and rows_C and rows_C[-1] + rows <= chunk_rows:
                    rows_C[-1] += rows
                    self._groups_C[-1].append(group)
                elif rows:
                    rows_C.append(rows)
                    self._groups_C.append([group])
            rows_FC.append(rows_C)
        self._rows = _Rows(self.files, rows_FC)
        self.start_C, self.key_C = self._rows.start_C, self._rows.key_C

    def __len__(self) -> int:
        return int(self.start_C[-1])

    def read(self, columns: Sequence[str]) -> pa.Table:
        every = in_threads(lambda f: self._read(f, list(range(len(self._footers[f].rows))), columns), range(len(self.files)))
        return _concat(every, self.files)

    def read_chunk(self, chunk: int, columns: Sequence[str]) -> pa.Table:
        return self._read(int(self._rows.file_C[chunk]), self._groups_C[chunk], columns)

    def where(self, row: int) -> str:
        return self._rows.where(row)

    def _read(self, f: int, groups: list[int], columns: Sequence[str]) -> pa.Table:
        file, known = self.files[f], self._footers[f]
        _has_columns(file, self.column_names, columns)

        def read() -> pa.Table:
            with _parquet(file) as (size, opened):
                rows = _group_rows(opened)
                if sum(rows) != sum(known.rows):
                    raise _changed(file, f"has {sum(rows)} rows now, had {sum(known.rows)}")
                if (size, rows) != (known.size, known.rows):
                    raise _changed(
                        file, f"has {size} bytes in {len(rows)} row groups now, had {known.size} in {len(known.rows)}"
                    )
                table = opened.read_row_groups(groups, columns=list(columns), use_threads=False)
                return _chosen(table, columns, file)

        return retrying(read, self.retries, file)


@dataclass(frozen=True)
class _Footer:
    size: int  # bytes
    names: list[str]
    rows: list[int]  # of each row group


@contextmanager
def _parquet(file: str) -> Iterator[tuple[int, pq.ParquetFile]]:
    """Size in bytes and the opened file."""
    if "://" in file:
        system, path = fsspec.core.url_to_fs(file)
        with system.open(path, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            with pq.ParquetFile(stream, pre_buffer=True) as opened:
                yield size, opened
    else:
        with pq.ParquetFile(file) as opened:
            yield os.path.getsize(file), opened


def _group_rows(opened: pq.ParquetFile) -> list[int]:
    metadata = opened.metadata
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def _footer(file: str) -> _Footer:
    with _parquet(file) as (size, opened):
        names = opened.schema_arrow.names
        twice = next((name for name, times in Counter(names).items() if times > 1), None)
        if twice is not None:
            raise ReadError(f"{file}: two columns are named '{twice}', expected unique names; rename one")
        return _Footer(size, names, _group_rows(opened))


class TextTable:
    """CSV, TSV or JSON files with the same columns, also compressed or remote.

    A chunk is `chunk_rows` rows of one file. Rows are counted, and types found, in one pass at construction. Chunks of a file
    are quick in their order: another one is reached by reading what is before it.

    Args:
        form: csv (also for TSV) or json.

    Raises:
        ReadError: a file cannot be read, the columns differ, or there are no rows.
    """

    def __init__(self, files: Sequence[str], form: str, chunk_rows: int, retries: int):
        self._texts = in_threads(lambda file: _Text(file, form, chunk_rows, retries), files)
        texts = [text for text in self._texts if text.num_rows] or self._texts  # JSON without rows has no columns
        for text in texts:
            _same_columns(texts[0].schema.names, text.schema.names, texts[0].file, text.file)
        self.column_names = texts[0].schema.names
        rows_FC = [[min(chunk_rows, text.num_rows - at) for at in range(0, text.num_rows, chunk_rows)] for text in self._texts]
        self._rows = _Rows(files, rows_FC)
        self.start_C, self.key_C = self._rows.start_C, _chunk_keys(self._rows.file_C, 0 * self._rows.chunk_C)

    def __len__(self) -> int:
        return int(self.start_C[-1])

    def read(self, columns: Sequence[str]) -> pa.Table:
        texts = [text for text in self._texts if text.num_rows]
        return _concat([text.read(columns) for text in texts], [text.file for text in texts])

    def read_chunk(self, chunk: int, columns: Sequence[str]) -> pa.Table:
        f = int(self._rows.file_C[chunk])
        return self._texts[f].chunk(int(self._rows.chunk_C[chunk]), columns)

    def where(self, row: int) -> str:
        return self._rows.where(row)


class _Text:
    """One text file, and the iterator that gives its next chunk."""

    def __init__(self, file: str, form: str, chunk_rows: int, retries: int):
        self.file, self.chunk_rows, self.retries = file, chunk_rows, retries
        self._chunks = (_CsvChunks if form == "csv" else _JsonChunks)(file, chunk_rows)
        self.lock = threading.Lock()
        self._iterator: Generator[pa.Table] | None = None
        self._next = 0
        self._size = self._bytes()
        self.num_rows, self.schema = retrying(self._count, retries, file)

    def read(self, columns: Sequence[str]) -> pa.Table:
        """All rows of some columns."""
        _has_columns(self.file, self.schema.names, columns)

        def read() -> pa.Table:
            with closing(self._chunks()) as chunks:
                return pa.concat_tables(self._typed(chunk, columns) for chunk in chunks)

        table = retrying(read, self.retries, self.file)
        if len(table) != self.num_rows:
            raise _changed(self.file, f"has {len(table)} rows now, had {self.num_rows}")
        return table

    def chunk(self, index: int, columns: Sequence[str]) -> pa.Table:
        _has_columns(self.file, self.schema.names, columns)
        with self.lock:
            return retrying(lambda: self._typed(self._take(index), columns), self.retries, self.file)

    def close(self) -> None:
        """Close the iterator; the caller holds `lock`."""
        with _opened_lock:
            _opened.pop(self, None)
        if self._iterator is not None:
            self._iterator.close()
        self._iterator, self._next = None, 0

    def _take(self, index: int) -> pa.Table:
        if self._bytes() != self._size:
            self.close()
            raise _changed(self.file, f"has {self._bytes()} bytes now, had {self._size}")
        if self._next != index:
            self.close()
        if self._iterator is None:
            _make_room(self)
            self._iterator = self._chunks()
        else:
            with _opened_lock:
                _opened.move_to_end(self)
        done = False
        try:
            while self._next < index:
                next(self._iterator, None)
                self._next += 1
            chunk = next(self._iterator, None)
            self._next += 1
            due = min(self.chunk_rows, self.num_rows - index * self.chunk_rows)
            found = 0 if chunk is None else len(chunk)
            last = (index + 1) * self.chunk_rows >= self.num_rows
            if found != due or (last and next(self._iterator, None) is not None):
                raise _changed(self.file, f"has another number of rows now, had {self.num_rows}")
            done = not last
        finally:
            if not done:
                self.close()
        return chunk

    def _count(self) -> tuple[int, pa.Schema]:
        num_rows, types = 0, dict[str, dict[pa.DataType, bool]]()  # types of a column, and whether there were values
        with closing(self._chunks()) as chunks:
            for chunk in chunks:
                num_rows += len(chunk)
                for name, column in zip(chunk.column_names, chunk.columns, strict=True):
                    found = types.setdefault(name, {})
                    found[column.type] = found.get(column.type, False) or column.null_count < len(column)
        fields, clashing = [], []
        for name, found in types.items():
            kinds = [kind for kind, has_values in found.items() if has_values] or list(found)
            try:
                fields.append(
                    pa.unify_schemas([pa.schema([(name, kind)]) for kind in kinds], promote_options="permissive").field(0)
                )
            except (pa.ArrowTypeError, pa.ArrowInvalid):
                clashing.append(name)
        if clashing:  # numbers first, then text
            if isinstance(self._chunks, _JsonChunks):
                raise ReadError(
                    f"{self.file}: column '{clashing[0]}' holds values of several types, expected one; mend the file"
                )
            self._chunks.text |= set(clashing)
            return self._count()
        return num_rows, pa.schema(fields)

    def _typed(self, chunk: pa.Table, columns: Sequence[str]) -> pa.Table:
        return _chosen(chunk, columns, self.file).cast(pa.schema([self.schema.field(name) for name in columns]))

    def _bytes(self) -> int:
        return -1 if "://" in self.file else retrying(lambda: os.path.getsize(self.file), self.retries, self.file)


_opened = OrderedDict[_Text, None]()  # text files with an open iterator, the least recently used one first
_opened_lock = threading.RLock()


def _make_room(text: _Text | None) -> None:
    """Close iterators until `text` may open one (None: all of them), except where one is just being read."""
    with _opened_lock:
        for old in list(_opened):
            if text is not None and len(_opened) < MOST_OPEN:
                break
            if old is not text and old.lock.acquire(blocking=False):
                try:
                    old.close()
                finally:
                    old.lock.release()
        if text is not None:
            _opened[text] = None


atexit.register(_make_room, None)  # or `datasets` prints "Exception ignored" when the interpreter stops


class _CsvChunks:
    """What the CSV reader of `datasets` does, but closed when its generator is.

    That of `datasets` stays open until the garbage collector comes by: its pandas reader refers to itself.
    """

    def __init__(self, file: str, chunk_rows: int):
        self.file, self.chunk_rows = file, chunk_rows
        self.text: set[str] = set()  # columns to be read as text
        _check_header(file)

    def __call__(self) -> Generator[pa.Table]:
        options = {"sep": _separator(self.file), "dtype": dict.fromkeys(self.text, str), "low_memory": False}
        with (
            fsspec.open(self.file, "rb", compression="infer") as stream,
            pd.read_csv(stream, chunksize=self.chunk_rows, **options) as frames,
        ):
            num_rows = 0
            for frame in frames:
                num_rows += len(frame)
                if not frame.index.equals(pd.RangeIndex(num_rows - len(frame), num_rows)):  # it took a column as the index
                    raise ReadError(f"{self.file}: rows have more values than the header names; mend the header or the rows")
                yield pa.Table.from_pandas(frame, preserve_index=False, nthreads=1)


class _JsonChunks:
    """JSON lines or lists, by streaming `datasets`; a call for each file, or all would be cast to the first one's types."""

    def __init__(self, file: str, chunk_rows: int):
        self.file, self.chunk_rows = file, chunk_rows
        self._stream: datasets.IterableDataset | None = None

    def __call__(self) -> Generator[pa.Table]:
        if self._stream is None:
            path = self.file if "://" in self.file else glob.escape(self.file)
            with _loading:
                found = datasets.load_dataset("json", data_files=[path], split="train", streaming=True)
            self._stream = found.with_format("arrow")
        yield from self._stream.iter(batch_size=self.chunk_rows)


_loading = threading.Lock()


def _separator(file: str) -> str:
    return "\t" if ".tsv" in file else ","


def _check_header(file: str) -> None:
    if "://" not in file:
        try:
            check_headers([file], _separator(file))
        except UserError as error:
            raise ReadError(str(error).removeprefix("data.path ")) from None


class MappedTable:
    """A data set in memory or memory-mapped; a chunk is `chunk_rows` of its rows.

    Args:
        rows: the part of it that is the table; default: all of it.
        name: its file, for messages.
    """

    def __init__(self, data: datasets.Dataset, chunk_rows: int, rows: range | None = None, name: str = ""):
        self.data, self.name = data, name
        self._all = range(len(data)) if rows is None else rows
        if not self._all:
            raise ReadError(f"{name or 'data'}: no rows, expected at least one")
        self.column_names = data.column_names
        self.start_C = np.append(np.arange(0, len(self), chunk_rows), len(self)).astype(np.int64)
        self.key_C = _chunk_keys(np.zeros(len(self.start_C) - 1, dtype=np.int64), np.arange(len(self.start_C) - 1))

    def __len__(self) -> int:
        return len(self._all)

    def read(self, columns: Sequence[str]) -> pa.Table:
        return self._slice(0, len(self), columns)

    def read_chunk(self, chunk: int, columns: Sequence[str]) -> pa.Table:
        return self._slice(int(self.start_C[chunk]), int(self.start_C[chunk + 1]), columns)

    def where(self, row: int) -> str:
        return f"{self.name}, row {row + 1}" if self.name else f"row {row + 1}"

    def _slice(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        _has_columns(self.name or "data", self.column_names, columns)
        views = _views.setdefault(self.data, {})
        names = tuple(columns)
        if names not in views:
            views[names] = self.data.select_columns(list(names)).with_format("arrow")
        return views[names][self._all.start + start : self._all.start + stop].select(columns)


# selected columns of data sets: to select takes `datasets` milliseconds, and many tables may be parts of one data set
_views = weakref.WeakKeyDictionary[datasets.Dataset, dict[tuple[str, ...], datasets.Dataset]]()


class JoinedTable:
    """Tables one after another, under common column names.

    Chunks keep their keys when pieces are added, removed or reordered, as long as the names of the pieces differ.

    column_names: of the columns that every piece has.
    """

    def __init__(self, pieces: Sequence[Piece]):
        self.pieces = list(pieces)
        self.first_P = np.cumsum([0] + [len(piece.table) for piece in self.pieces])  # `[P + 1]`, first row of each piece
        self._chunk_P = np.cumsum([0] + [len(piece.table.key_C) for piece in self.pieces])
        starts = [piece.table.start_C[:-1] + first for piece, first in zip(self.pieces, self.first_P, strict=False)]
        self.start_C = np.concatenate([*starts, self.first_P[-1:]]).astype(np.int64)
        names = np.array([name_key(piece.name or str(p)) for p, piece in enumerate(self.pieces)], dtype=np.uint64)
        keys = [mix(piece.table.key_C + name) for piece, name in zip(self.pieces, mix(names), strict=True)]
        self.key_C = np.concatenate([*keys, np.empty(0, dtype=np.uint64)])
        columns = [_common_names(piece) for piece in self.pieces]
        everywhere = set.intersection(*map(set, columns)) if columns else set()
        self.column_names = [name for name in columns[0] if name in everywhere] if columns else []

    def __len__(self) -> int:
        return int(self.first_P[-1])

    def piece_of(self, chunk: int) -> int:
        """The number of the piece that a chunk belongs to."""
        return int(np.searchsorted(self._chunk_P, chunk, side="right")) - 1

    def read(self, columns: Sequence[str]) -> pa.Table:
        every = in_threads(lambda piece: self._read(piece, columns, piece.table.read), self.pieces)
        return _concat(every, [piece.name or f"table {p + 1}" for p, piece in enumerate(self.pieces)])

    def read_chunk(self, chunk: int, columns: Sequence[str]) -> pa.Table:
        p = self.piece_of(chunk)
        piece, own = self.pieces[p], chunk - int(self._chunk_P[p])
        return self._read(piece, columns, lambda names: piece.table.read_chunk(own, names))

    def where(self, row: int) -> str:
        p = int(np.searchsorted(self.first_P, row, side="right")) - 1
        piece = self.pieces[p]
        return (f"{piece.name}, " if piece.name else "") + piece.table.where(row - int(self.first_P[p]))

    def _read(self, piece: Piece, columns: Sequence[str], read: Callable[[list[str]], pa.Table]) -> pa.Table:
        own = list(dict.fromkeys(piece.rename.get(name, name) for name in columns if name not in piece.constants))
        # a table without columns has no rows, so that constants alone need one to be read
        wanted = own or piece.table.column_names[:1]
        try:
            table = read(wanted)
        except ReadError as error:
            raise ReadError(f"{piece.name}: {error}" if piece.name else str(error)) from error
        code = pa.repeat(pa.scalar(0, pa.int32()), len(table))
        arrays = [
            pa.DictionaryArray.from_arrays(code, [piece.constants[name]])
            if name in piece.constants
            else table[piece.rename.get(name, name)]
            for name in columns
        ]
        return pa.table(arrays, names=list(columns))


def _common_names(piece: Piece) -> list[str]:
    own, renamed = set(piece.table.column_names), set(piece.rename.values())
    kept = [name for name in piece.table.column_names if name not in renamed]
    return list(dict.fromkeys([*kept, *(name for name, source in piece.rename.items() if source in own), *piece.constants]))


def open_many(groups: Sequence[Sequence[str]], form: str, chunk_rows: int, retries: int) -> list[Table | ReadError]:
    """A table for each list of files, to be read by the chunk, or what is wrong with it.

    Args:
        form: csv, json, parquet, or arrow, which is memory-mapped.
    """
    if form == "arrow":
        return open_mapped(groups, form, chunk_rows)

    def open_one(files: Sequence[str]) -> Table | ReadError:
        try:
            return (
                ParquetTable(files, chunk_rows, retries) if form == "parquet" else TextTable(files, form, chunk_rows, retries)
            )
        except ReadError as error:
            return error

    return in_threads(open_one, groups)


def open_mapped(groups: Sequence[Sequence[str]], form: str, chunk_rows: int) -> list[Table | ReadError]:
    """A table for each list of files, converted by `datasets` to its cache and memory-mapped, or what is wrong with it."""
    opened: dict[int, Table | ReadError] = {}
    alike: dict[Hashable, list[int]] = {}
    rows: dict[int, int] = {}
    for g, found in enumerate(in_threads(lambda files: _signature(files, form), groups)):
        if isinstance(found, ReadError):
            opened[g] = found
        else:
            alike.setdefault(g if found[0] is None else found[0], []).append(g)
            rows[g] = found[1]
    most = len(groups) if form == "parquet" else _SPLITS_A_CALL
    with quiet():
        for every in alike.values():
            for together in (every[i : i + most] for i in range(0, len(every), most)):
                try:
                    opened |= zip(
                        together,
                        _map([groups[g] for g in together], form, chunk_rows, [rows[g] for g in together]),
                        strict=True,
                    )
                except Exception:  # one of them is broken; whichever it is says so by itself
                    opened |= {g: _map_one(groups[g], form, chunk_rows, rows[g]) for g in together}
    return [opened[g] for g in range(len(groups))]


def _map_one(files: Sequence[str], form: str, chunk_rows: int, num_rows: int) -> Table | ReadError:
    try:
        return retrying(lambda: _map([files], form, chunk_rows, [num_rows])[0], 0, ", ".join(files[:3]))
    except ReadError as error:
        return error


def _map(groups: Sequence[Sequence[str]], form: str, chunk_rows: int, rows: Sequence[int]) -> list[Table]:
    """Tables of one schema with one call. Where rows are known (Parquet) they are parts of one split, else each has its own."""
    names = [some(list(files), 1) for files in groups]
    paths = [[file if "://" in file else glob.escape(file) for file in files] for files in groups]
    if form == "parquet":
        data = datasets.load_dataset(form, data_files=[path for each in paths for path in each], split="train")
        first = np.cumsum([0, *rows]).tolist()
        if len(data) != first[-1]:
            raise ReadError(f"{groups[0][0]}: its rows changed while it was read, or those of a file beside it")
        return [MappedTable(data, chunk_rows, range(*first[i : i + 2]), name) for i, name in enumerate(names)]
    # one chunk, so that a column has one type however long the file is
    options = {"sep": _separator(groups[0][0]), "chunksize": 2**31 - 1} if form == "csv" else {}
    found = datasets.load_dataset(form, data_files={f"g{i}": each for i, each in enumerate(paths)}, **options)
    return [MappedTable(found[f"g{i}"], chunk_rows, name=name) for i, name in enumerate(names)]


def _signature(files: Sequence[str], form: str) -> tuple[Hashable, int] | ReadError:
    """What tables that are converted together have in common (None: unknown), and the number of rows if they are Parquet."""
    if form == "arrow" or (form != "parquet" and any("://" in file for file in files)):
        return None, 0
    try:
        found = [retrying(lambda file=file: _peek(file, form), 0, file) for file in files]  # type: ignore[misc]
    except ReadError as error:
        return error
    rows = sum(each[1] for each in found)
    if form == "parquet" and not rows:
        return ReadError(f"{', '.join(files[:3])}: no rows, expected at least one")
    return found[0][0] if len({each[0] for each in found}) == 1 else None, rows


def _peek(file: str, form: str) -> tuple[Hashable, int]:
    if form == "parquet":
        with _parquet(file) as (_, opened):
            return str(opened.schema_arrow.remove_metadata()), opened.metadata.num_rows
    if form == "csv":
        _check_header(file)
        first_rows = pd.read_csv(file, sep=_separator(file), nrows=1000)
        if first_rows.empty:
            raise ReadError(f"{file}: no rows, expected at least one")
        return (_separator(file), *((name, str(kind)) for name, kind in first_rows.dtypes.items())), 0
    try:
        with fsspec.open(file, "rt", compression="infer", encoding="utf-8") as stream:
            first = json.loads(stream.readline())
    except ValueError:  # one list over several lines
        return file, 0
    return tuple((name, type(value).__name__) for name, value in first.items()) if isinstance(first, dict) else file, 0

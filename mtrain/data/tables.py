"""Tables that are read by the chunk, so that their inputs need not be in memory.

A *chunk* is what is read at once: some consecutive row groups of a Parquet file, some consecutive rows of anything else.
"""

from __future__ import annotations

import os
import weakref
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import sleep
from typing import Protocol, TypeVar

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtrain.data.order import U64, mix, name_key
from mtrain.errors import UserError, nearest

READERS = 4  # threads
SAMPLED_CHUNKS = 8  # of a table that is looked at
NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0")  # so `datasets` says that a table is empty
_LOST = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_NETWORK = {"aiohttp", "httpcore", "httpx", "requests", "urllib3"}
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


def reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, StopIteration) or any(sign in str(error) for sign in NO_ROWS):
        return "no rows, expected at least one"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text ({error.reason} at byte {error.start}); if it is text, convert it: iconv -f latin1 -t utf-8"
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"


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


def changed(file: str, what: str) -> ReadError:
    """That a file is not what it was at the start."""
    return ReadError(f"file {file}: {what} when the run began; put the old file back or start a new run")


def chosen(table: pa.Table, columns: Sequence[str], file: str) -> pa.Table:
    """Some columns, which the file had at the start."""
    held = set(table.column_names)  # a property that builds its list anew each time
    for name in columns:
        if name not in held:
            raise changed(file, f"has no column '{name}' now, had one")
    return table.select(columns)


def check_columns(file: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a column that is not among `names`."""
    for name in wanted:
        if name not in names:
            raise ReadError(f"{file}: no column '{name}'{nearest(name, names)}")


def check_unique(file: str, names: Sequence[str]) -> None:
    """Refuse two columns of one name."""
    twice = next((name for name, times in Counter(names).items() if times > 1), None)
    if twice is not None:
        raise ReadError(f"{file}: two columns are named '{twice}', expected unique names; rename one")


def with_strings(table: pa.Table) -> pa.Table:
    """The table with its views of strings as strings, which all functions of Arrow take."""
    for i, column in enumerate(table.schema):
        if pa.types.is_string_view(column.type):
            table = table.set_column(i, column.name, table.column(i).cast(pa.string()))
    return table


def odd_column(names: Mapping[str, Sequence[str]]) -> str | None:
    """A column that some tables lack and others have, in words; `names` are their columns, by what each table is called."""
    first = next(iter(names), "")
    for table, columns in names.items():
        if odd := sorted(set(names[first]) ^ set(columns)):
            here, there = (table, first) if odd[0] in columns else (first, table)
            return f"column '{odd[0]}' is in {here} but not in {there}, expected the same columns in all"
    return None


def sample(table: Table, columns: Sequence[str]) -> pa.Table:
    """Rows of a few chunks from all over a table."""
    chunks = np.unique(np.linspace(0, len(table.key_C) - 1, SAMPLED_CHUNKS).astype(int)).tolist()
    return pa.concat_tables([table.read_chunk(chunk, columns) for chunk in chunks], promote_options="permissive")


def concat(tables: Sequence[pa.Table], names: Sequence[str]) -> pa.Table:
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


def chunk_keys(file_C: NDArray[np.int64], chunk_C: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Names of chunks, by the position of their files and their own in them."""
    return mix(mix(file_C.astype(U64) + U64(1)) + chunk_C.astype(U64))


class RowNumbers:
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
        self.key_C = chunk_keys(self.file_C, self.chunk_C)

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
        if problem := odd_column({file: footer.names for file, footer in zip(self.files, self._footers, strict=True)}):
            raise ReadError(problem)
        self.column_names = self._footers[0].names
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
        self._rows = RowNumbers(self.files, rows_FC)
        self.start_C, self.key_C = self._rows.start_C, self._rows.key_C

    def __len__(self) -> int:
        return int(self.start_C[-1])

    def read(self, columns: Sequence[str]) -> pa.Table:
        every = in_threads(lambda f: self._read(f, list(range(len(self._footers[f].rows))), columns), range(len(self.files)))
        return concat(every, self.files)

    def read_chunk(self, chunk: int, columns: Sequence[str]) -> pa.Table:
        return self._read(int(self._rows.file_C[chunk]), self._groups_C[chunk], columns)

    def where(self, row: int) -> str:
        return self._rows.where(row)

    def _read(self, f: int, groups: list[int], columns: Sequence[str]) -> pa.Table:
        file, known = self.files[f], self._footers[f]
        check_columns(file, self.column_names, columns)

        def read() -> pa.Table:
            with parquet_file(file) as (size, opened):
                rows = _group_rows(opened)
                if sum(rows) != sum(known.rows):
                    raise changed(file, f"has {sum(rows)} rows now, had {sum(known.rows)}")
                if (size, rows) != (known.size, known.rows):
                    raise changed(
                        file, f"has {size} bytes in {len(rows)} row groups now, had {known.size} in {len(known.rows)}"
                    )
                table = opened.read_row_groups(groups, columns=list(columns), use_threads=False)
                return with_strings(chosen(table, columns, file))

        return retrying(read, self.retries, file)


@dataclass(frozen=True)
class _Footer:
    size: int  # bytes
    names: list[str]
    rows: list[int]  # of each row group


@contextmanager
def parquet_file(file: str) -> Iterator[tuple[int, pq.ParquetFile]]:
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
    with parquet_file(file) as (size, opened):
        names = opened.schema_arrow.names
        check_unique(file, names)
        return _Footer(size, names, _group_rows(opened))


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
        self.key_C = chunk_keys(np.zeros(len(self.start_C) - 1, dtype=np.int64), np.arange(len(self.start_C) - 1))

    def __len__(self) -> int:
        return len(self._all)

    def read(self, columns: Sequence[str]) -> pa.Table:
        return self._slice(0, len(self), columns)

    def read_chunk(self, chunk: int, columns: Sequence[str]) -> pa.Table:
        return self._slice(int(self.start_C[chunk]), int(self.start_C[chunk + 1]), columns)

    def where(self, row: int) -> str:
        return f"{self.name}, row {row + 1}" if self.name else f"row {row + 1}"

    def _slice(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        check_columns(self.name or "data", self.column_names, columns)
        views = _views.setdefault(self.data, {})
        names = tuple(columns)
        if names not in views:
            views[names] = self.data.select_columns(list(names)).with_format("arrow")
        return with_strings(views[names][self._all.start + start : self._all.start + stop].select(columns))


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
        return concat(every, [piece.name or f"table {p + 1}" for p, piece in enumerate(self.pieces)])

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

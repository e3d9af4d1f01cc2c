"""CSV, TSV and JSON files, read by the chunk."""

from __future__ import annotations

import atexit
import bz2
import csv
import glob
import gzip
import logging
import lzma
import os
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pandas as pd
import pyarrow as pa

from mtrain.data.tables import (
    ReadError,
    RowNumbers,
    changed,
    check_columns,
    check_unique,
    chosen,
    chunk_keys,
    concat,
    in_threads,
    odd_column,
    reason,
    retrying,
)

MOST_OPEN = 256  # files
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what it logs it also raises


def separator_of(file: str) -> str:
    """Between the columns of a CSV or TSV file."""
    return "\t" if ".tsv" in file else ","


def check_separator(what: str, names: Sequence[str]) -> None:
    """Refuse a header that was not divided into columns."""
    other = next((c for c in ";\t,|" if len(names) == 1 and c in names[0]), None)
    if other is not None:
        wanted = "commas in a .csv, tabs in a .tsv"
        raise ReadError(f"{what}: its columns seem to be separated by {other!r}, expected {wanted}; convert it")


def read_header(file: str, separator: str) -> list[str]:
    """The columns of a local file, compressed or not.

    Raises:
        ReadError: a zip archive, and what pandas would pass over: equal names, rows shifted against the header, another
            separator.
    """
    if zipfile.is_zipfile(file):
        raise ReadError(
            f"{file}: is a zip archive (Excel files are, too), expected CSV text, as it is or as .gz, .bz2 or .xz; unpack it"
        )
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    csv.field_size_limit(2**31 - 1)
    try:
        with openers.get(Path(file).suffix, open)(file, "rt", newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, delimiter=separator)
            names, first = next(reader, []), next(reader, [])
    except (OSError, EOFError, ValueError, csv.Error, lzma.LZMAError, zlib.error) as error:
        raise ReadError(f"{file}: cannot be read as csv: {reason(error)}") from error
    if not names:
        raise ReadError(f"{file}: the file is empty, expected a header and rows")
    if "\0" in "".join(names):
        raise ReadError(f"{file}: holds binary data, expected CSV text; set data.format if it is of another type")
    check_unique(file, names)
    check_separator(file, names)
    if len(first) > len(names):
        raise ReadError(f"{file}: row 1 has {len(first)} values but the header {len(names)} names; mend the header or the row")
    return names


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
        if problem := odd_column({text.file: text.schema.names for text in texts}):
            raise ReadError(problem)
        self.column_names = texts[0].schema.names
        rows_FC = [[min(chunk_rows, text.num_rows - at) for at in range(0, text.num_rows, chunk_rows)] for text in self._texts]
        self._rows = RowNumbers(files, rows_FC)
        self.start_C, self.key_C = self._rows.start_C, chunk_keys(self._rows.file_C, 0 * self._rows.chunk_C)

    def __len__(self) -> int:
        return int(self.start_C[-1])

    def read(self, columns: Sequence[str]) -> pa.Table:
        texts = [text for text in self._texts if text.num_rows]
        return concat([text.read(columns) for text in texts], [text.file for text in texts])

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
        check_columns(self.file, self.schema.names, columns)

        def read() -> pa.Table:
            with closing(self._chunks()) as chunks:
                return pa.concat_tables(self._typed(chunk, columns) for chunk in chunks)

        table = retrying(read, self.retries, self.file)
        if len(table) != self.num_rows:
            raise changed(self.file, f"has {len(table)} rows now, had {self.num_rows}")
        return table

    def chunk(self, index: int, columns: Sequence[str]) -> pa.Table:
        check_columns(self.file, self.schema.names, columns)
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
            raise changed(self.file, f"has {self._bytes()} bytes now, had {self._size}")
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
                raise changed(self.file, f"has another number of rows now, had {self.num_rows}")
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
        return chosen(chunk, columns, self.file).cast(pa.schema([self.schema.field(name) for name in columns]))

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
        if "://" not in file:
            read_header(file, separator_of(file))

    def __call__(self) -> Generator[pa.Table]:
        options = {"sep": separator_of(self.file), "dtype": dict.fromkeys(self.text, str), "low_memory": False}
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

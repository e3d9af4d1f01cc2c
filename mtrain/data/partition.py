"""One Parquet file for each task: a long table, or a very sparse grid, rewritten so that its tasks stream one by one.

It is an external sort by task. First the source is read by the chunk, and what fits in memory is sorted and spilled; then the
tasks are written one after another, each from its rows in all spills. Files appear under their names only when they are whole,
so that what a killed run left is taken up where it stopped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mtrain.config import Config
from mtrain.data.features import encode_categories, is_number, is_text
from mtrain.data.labels import Patterns, task_names, select
from mtrain.data.prepare import UNNAMED, label_columns_of, match_inputs
from mtrain.data.sources import local_files, open_stream, reason, require, search_folders
from mtrain.data.splits import SOURCE
from mtrain.data.tables import Table
from mtrain.errors import UserError, nearest, some
from mtrain.report.progress import PLAIN_EVERY_S

_SPILLS = ".spill"
_MANIFEST = "partition.json"
_BATCH = 4e6  # bytes of a record batch of a spill
_LONGEST_NAME = 100  # characters; file systems allow 255 bytes
_OF_SOURCE = ("path", "table", "root", "layout", "format", "name", "source_split", "task", "label")  # keys of one table
_LABEL, _TEXT, _CODE = "label", "__label_text__", "__code__"  # columns of an unpivoted grid


def partition(
    config: Config, beside: Path | None, output: Path, console: Console, row_group: int = 1024, memory: float = 256e6
) -> None:
    """Write `output/tasks/*.parquet`, the task table `output/tasks.parquet` and `output/config.yaml`, which trains on them.

    The rows of a task keep the order of the source. Of a routed or pairs table each row of a selected task is written; of a
    grid one row for each label that is there, its label as column `label`. Only columns that the config uses are kept. A grid
    without `data.key` gets its row numbers as key, so that a split still keeps each of its rows in one part.

    A run that was stopped goes on when it is started again; after success it only says so.

    Args:
        config: layout routed, pairs or grid.
        beside: folder of the config file, see `open_table`.
        output: a new folder, or one that this function began.
        row_group: rows of a row group of the files.
        memory: about how many bytes of rows are held at once; a chunk of the source, however large, is held whole.

    Raises:
        UserError: the source or its columns are wrong, a row has no task name, `output` cannot be written, holds other files,
            or was begun with another source or other options.
    """
    began = time.monotonic()
    if config.data.layout == "files":
        raise UserError("data.layout: found files, expected routed, pairs or grid; each task has its files already")
    if row_group < 1:
        raise UserError(f"--rows: found {row_group}, expected at least 1")
    _check_output(config, beside, output)
    identity = _identity(config, beside, row_group)
    if "finished" in _read_manifest(output, identity):
        shutil.rmtree(output / _SPILLS, ignore_errors=True)
        console.print(f"{output}: complete, nothing to do", highlight=False, soft_wrap=True, markup=False)
        return
    table = open_stream(config.data, beside, config.data.chunk_rows)
    source: _Source = _Grid(config, table) if config.data.layout == "grid" else _Long(config, table)
    manifest = {**identity, "rows": len(table), "columns": source.columns}
    begun = _read_manifest(output, manifest)
    with _writing(output):
        output.mkdir(parents=True, exist_ok=True)
        if not begun:
            _write_json(output / _MANIFEST, manifest)
        for folder in (output / _SPILLS, output / "tasks"):
            folder.mkdir(exist_ok=True)

    with _Progress(console) as progress:
        spills = _spill(source, output / _SPILLS, memory / 3, progress)
        num_rows, files = _write_tasks(source, spills, output / "tasks", memory / 3, row_group, progress)
    _write_task_table(config, output / "tasks.parquet", files, source.label)
    _write_config(config, output / "config.yaml", list(files), source.key)
    _write_json(output / _MANIFEST, {**manifest, "finished": {"rows": num_rows, "tasks": len(files)}})
    shutil.rmtree(output / _SPILLS, ignore_errors=True)
    size, took = sum((output / "tasks" / file).stat().st_size for file in files.values()), time.monotonic() - began
    for line in (
        *_notes(source.names, files),
        f"{num_rows:,} rows of {len(files):,} tasks, {size / 1e6:,.1f} MB, {took:.1f} s: {output}",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


# What is written: rows with the number of their task.


class _Source(Protocol):
    """A table whose rows belong to tasks.

    columns: what is read.
    label: the label column of the files. key: the column of row numbers, where one is added.
    names: of the tasks by number; more may come while rows are read.
    """

    table: Table
    columns: list[str]
    label: str
    key: str | None
    names: list[str]

    def pieces(self, start: int, memory: float) -> Iterator[tuple[int, pa.Table]]:
        """Rows from row `start` of the source on, and the row where they end."""
        ...

    def tasks(self, rows: pa.Table, first_row: int) -> tuple[NDArray[np.int64], pa.Table]:
        """The task of each row (-1: none that is selected), and the columns that are written."""
        ...

    def finished(self, rows: pa.Table, t: int) -> pa.Table:
        """The rows of one task as its file has them."""
        ...

    def state(self) -> dict[str, Any]:
        """What was learned from the rows so far."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


def _kept(config: Config, columns: list[str], labels: set[str | None]) -> list[str]:
    """Inputs, key, weight and split column, in the order of the table."""
    data = config.data
    kept = {data.key, data.weight, config.split.column, SOURCE}
    if config.inputs:
        kept |= {name for names, _ in match_inputs(config, columns) for name in names}
    else:
        kept |= {name for name in columns if name not in labels | {data.task} and not name.startswith(UNNAMED)}
    return [name for name in columns if name in kept]


def _check_columns(config: Config, columns: list[str]) -> None:
    for name in ("key", "task", "label", "weight"):
        if (column := getattr(config.data, name)) is not None:
            require(columns, column, f"data.{name}")
    if config.split.column is not None:
        require(columns, config.split.column, "split.column")


def _check_options(config: Config, names: Sequence[str]) -> None:
    for pattern in Patterns(list(config.tasks.by_name)).unused(names):
        raise UserError(f"tasks.by_name: '{pattern}' matches no task{nearest(pattern, names)}")


class _Long:
    """Layouts routed and pairs; tasks are numbered as they appear."""

    key: str | None = None

    def __init__(self, config: Config, table: Table):
        _check_columns(config, table.column_names)
        assert config.data.task is not None
        assert config.data.label is not None
        self.table, self.task, self.label = table, config.data.task, config.data.label
        kept = _kept(config, table.column_names, {self.label})
        if config.inputs and self.label in kept and self.label != config.split.column:
            raise UserError(f"inputs: column '{self.label}' holds the labels (data.label); leave it out of inputs")
        self.written = [name for name in table.column_names if name in {*kept, self.label}]
        self.columns = list(dict.fromkeys([*self.written, self.task]))
        self.names: list[str] = []
        self._selected: set[str] | None = None
        if config.tasks.labels.include != ["*"] or config.tasks.labels.exclude or config.tasks.by_name:
            every = self._all_names()  # now, rather than after hours
            chosen = select(every, config.tasks.labels, "tasks.labels")
            if not chosen:
                raise UserError(f"tasks.labels: none of the {len(every)} tasks of column '{self.task}' is left; exclude fewer")
            _check_options(config, chosen)
            self._selected = set(chosen)
        self._kind: str | None = None

    def _all_names(self) -> list[str]:
        found: dict[str, None] = {}
        for chunk in range(len(self.table.key_C)):
            column = self.table.read_chunk(chunk, [self.task])[self.task]
            found |= dict.fromkeys(task_names(pc.unique(_plain(column)), self.task).drop_null().to_pylist())
        return list(found)

    def pieces(self, start: int, memory: float) -> Iterator[tuple[int, pa.Table]]:
        return _chunks(self.table, self.columns, start)

    def tasks(self, rows: pa.Table, first_row: int) -> tuple[NDArray[np.int64], pa.Table]:
        column = rows[self.task]
        kind = "text" if is_text(column.type) else "numbers"
        if not pa.types.is_null(column.type):
            if self._kind not in (None, kind):
                raise UserError(
                    f"data.task: column '{self.task}' has text in one file and numbers in another, expected one type"
                )
            self._kind = kind
        value_N, distinct = encode_categories(task_names(column, self.task))
        texts = distinct.to_pylist()
        unnamed = np.array([not text.strip() for text in texts] + [True])  # [-1] is null
        if len(bad := np.flatnonzero(unnamed[value_N])):
            where = self.table.where(first_row + int(bad[0]))
            raise UserError(f"{where}, column '{self.task}': found no task name, expected one in each row")
        number = {name: i for i, name in enumerate(self.names)}
        for name in texts:
            if name not in number and (self._selected is None or name in self._selected):
                number[name] = len(number)
                self.names.append(name)
        code_V = np.array([number.get(name, -1) for name in texts], dtype=np.int64)
        return code_V[value_N], rows.select(self.written)

    def finished(self, rows: pa.Table, t: int) -> pa.Table:
        return rows

    def state(self) -> dict[str, Any]:
        return {"names": self.names, "kind": self._kind}

    def load_state(self, state: dict[str, Any]) -> None:
        self.names, self._kind = state["names"], state["kind"]


class _Grid:
    """A column for each task. Labels are two columns until a task is written: numbers, and text."""

    def __init__(self, config: Config, table: Table):
        names, data = table.column_names, config.data
        _check_columns(config, names)
        reserved = {data.key, data.weight, config.split.column, SOURCE}
        inputs = {name for group, _ in match_inputs(config, names) for name in group}
        self.table, self.missing = table, data.missing_labels
        self.names = label_columns_of(config, names, reserved.union(inputs))
        if not self.names:
            raise UserError("tasks.labels: no label column is left; name columns that are not inputs, key or weight")
        if "" in (name.strip() for name in self.names):
            raise UserError("tasks.labels: a label column has no name, expected one for each task; rename it in the file")
        _check_options(config, self.names)
        self.kept = _kept(config, names, set(self.names))
        if not config.inputs and reserved.issuperset(self.kept):
            raise UserError("inputs: no column is left for inputs; name the label columns in tasks.labels, or the inputs")
        self.columns = list(dict.fromkeys([*self.kept, *self.names]))
        self.label = _free(_LABEL, self.kept, config)
        self.key = None if data.key is not None else _free("__row__", [*self.kept, self.label], config)
        self._is_text: dict[int, bool] = {}

    def pieces(self, start: int, memory: float) -> Iterator[tuple[int, pa.Table]]:
        most = max(1, int(memory / (16 * len(self.names))))
        for end, chunk in _chunks(self.table, self.columns, start):
            for i in range(0, len(chunk), most):
                yield from self._unpivoted(chunk.slice(i, most), end - len(chunk) + i, memory / 4)

    def _unpivoted(self, rows: pa.Table, first: int, memory: float) -> Iterator[tuple[int, pa.Table]]:
        """A row for each label, in pieces of about `memory` bytes: task by task, then in the order of the rows."""
        there_TN = np.zeros((len(self.names), len(rows)), dtype=bool)
        number_TN = np.full(there_TN.shape, np.nan)
        texts: dict[int, pa.ChunkedArray] = {}
        for t, name in enumerate(self.names):
            column, there_TN[t] = _labels(rows[name], name, self.missing)
            if is_text(column.type):
                texts[t] = column
            else:
                number_TN[t] = column.to_numpy()
            if there_TN[t].any() and self._is_text.setdefault(t, t in texts) != (t in texts):
                raise UserError(f"label column '{name}' has numbers in one file and text in another, expected one type")
        inputs = rows.select(self.kept)
        if self.key is not None:
            inputs = inputs.append_column(self.key, pa.array(np.arange(first, first + len(rows))))
        size = inputs.nbytes / max(len(rows), 1) + 24
        labels_N = np.cumsum(there_TN.sum(0))
        start = 0
        while start < len(rows):
            before = labels_N[start - 1] if start else 0
            end = max(start + 1, int(np.searchsorted(labels_N, before + max(1, memory / size), side="right")))
            task_P, row_P = np.nonzero(there_TN[:, start:end])
            row_P += start
            piece = inputs.take(pa.array(row_P))
            piece = piece.append_column(_CODE, pa.array(task_P))
            piece = piece.append_column(self.label, pa.array(number_TN[task_P, row_P]))
            if texts:
                rows_T = np.split(row_P, np.cumsum(np.bincount(task_P, minlength=len(self.names)))[:-1])
                parts = [
                    texts[t].take(pa.array(own)).cast(pa.string()) if t in texts else pa.nulls(len(own), pa.string())
                    for t, own in enumerate(rows_T)
                ]
                chunks = [c for part in parts for c in (part.chunks if isinstance(part, pa.ChunkedArray) else [part])]
                piece = piece.append_column(_TEXT, pa.chunked_array(chunks, pa.string()))
            yield first + end, piece
            start = end

    def tasks(self, rows: pa.Table, first_row: int) -> tuple[NDArray[np.int64], pa.Table]:
        return rows[_CODE].to_numpy(), rows.drop_columns([_CODE])

    def finished(self, rows: pa.Table, t: int) -> pa.Table:
        if self._is_text[t]:
            rows = rows.set_column(rows.column_names.index(self.label), self.label, rows[_TEXT])
        return rows.select([name for name in rows.column_names if name != _TEXT])

    def state(self) -> dict[str, Any]:
        return {"is_text": list(self._is_text.items())}

    def load_state(self, state: dict[str, Any]) -> None:
        self._is_text = dict(state["is_text"])


def _free(wanted: str, taken: Sequence[str], config: Config) -> str:
    """A name for a column that no column has and no pattern of inputs matches."""
    patterns = Patterns(list(config.inputs))
    for name in (wanted, *(f"{wanted}{i}" for i in range(2, 100))):
        if name not in taken and not patterns.of(name):
            return name
    raise UserError(f"inputs: a pattern matches '{wanted}', which partition adds; expected patterns that match only inputs")


def _labels(column: pa.ChunkedArray, name: str, missing: Sequence[float | str]) -> tuple[pa.ChunkedArray, NDArray[np.bool_]]:
    """Labels as float64 or text, and which are there: not NaN, null, empty text or `missing`, as `read_grid` has them."""
    column = _plain(column)
    absent = [m for m in missing if not isinstance(m, str)]
    if is_text(column.type):
        code_N, distinct = encode_categories(pc.utf8_trim_whitespace(column))
        texts = distinct.to_pylist()
        number = pd.to_numeric(pd.Series(texts, dtype=object), errors="coerce").to_numpy(float)
        there = np.array([text != "" and text not in missing for text in texts] + [False])  # [-1] is null
        there[:-1] &= ~np.isin(number, absent)
        return column, there[code_N]
    if is_number(column.type) or pa.types.is_null(column.type):
        column = pc.cast(column, pa.float64(), safe=False)
        value = column.to_numpy()
        return column, ~np.isnan(value) & ~np.isin(value, absent)
    raise UserError(f"label column '{name}': found type {column.type}, expected numbers, booleans or text")


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Values in place of codes of a dictionary."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _chunks(table: Table, columns: list[str], start: int) -> Iterator[tuple[int, pa.Table]]:
    """The table's chunks from row `start` on, and the row after each."""
    first_chunk = int(np.searchsorted(table.start_C, start, side="right")) - 1
    for chunk in range(first_chunk, len(table.key_C)):
        first, end = table.start_C[chunk : chunk + 2].tolist()
        rows = table.read_chunk(chunk, columns).slice(max(0, start - first)).replace_schema_metadata(None)
        yield end, pa.table([_plain(column) for column in rows.columns], names=rows.column_names)


# First pass: what fits in memory, sorted by task.


@dataclass(frozen=True)
class _Spill:
    """Some consecutive rows of the source, sorted by task.

    end: the row of the source that comes next. state: of the source then.
    code_T, start_T: the tasks that occur, ascending, and `[T + 1]` where the rows of each start.
    batch: rows of a record batch.
    row_bytes: mean size of a row.
    """

    path: Path
    end: int
    state: dict[str, Any]
    code_T: NDArray[np.int64]
    start_T: NDArray[np.int64]
    batch: int
    row_bytes: float
    schema: pa.Schema

    @staticmethod
    def open(path: Path) -> _Spill:
        with pa.OSFile(str(path)) as file:
            schema = pa.ipc.open_file(file).schema
        about = json.loads(schema.metadata[b"spill"])
        start_T = np.concatenate([[0], np.cumsum(about["counts"], dtype=np.int64)])
        code_T = np.array(about["codes"], dtype=np.int64)
        schema = schema.remove_metadata()
        return _Spill(path, about["end"], about["state"], code_T, start_T, about["batch"], about["row_bytes"], schema)

    def rows(self, first: int, last: int) -> tuple[NDArray[np.int64], pa.Table]:
        """The rows of the tasks `first` to `last - 1`, and the task of each; memory-mapped."""
        low, high = np.searchsorted(self.code_T, [first, last]).tolist()
        start, end = int(self.start_T[low]), int(self.start_T[high])
        code = np.repeat(self.code_T[low:high], np.diff(self.start_T[low : high + 1]))
        if start == end:
            return code, self.schema.empty_table()
        with pa.memory_map(str(self.path)) as file:
            reader = pa.ipc.open_file(file)
            batches = [reader.get_batch(i) for i in range(start // self.batch, (end - 1) // self.batch + 1)]
        rows = pa.Table.from_batches(batches).replace_schema_metadata(None)
        return code, rows.slice(start % self.batch, end - start)


def _spill(source: _Source, folder: Path, memory: float, progress: _Progress) -> list[_Spill]:
    """Sort the source into spills, after those that an earlier run finished."""
    spills = _finished_spills(folder)
    if spills:
        source.load_state(spills[-1].state)
    begin = spills[-1].end if spills else 0
    progress.start("reading", len(source.table), begin)
    known = spills[-1].schema if spills else None
    for first, end, rows in _gathered(source.pieces(begin, memory), begin, memory):
        code_N, rows = source.tasks(rows, first)
        known = _unified([rows.schema] if known is None else [known, rows.schema])  # so that a wrong type is found early
        path = folder / f"{len(spills):06d}.arrow"
        _write_spill(path, end, source.state(), code_N, rows)
        del rows
        spills.append(_Spill.open(path))
        progress.update(end)
    return spills


def _finished_spills(folder: Path) -> list[_Spill]:
    spills: list[_Spill] = []
    for path in sorted(folder.iterdir()):
        try:
            if path.name != f"{len(spills):06d}.arrow":
                raise ValueError
            spills.append(_Spill.open(path))
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            path.unlink()  # was being written, or comes after one that was
    return spills


def _gathered(pieces: Iterator[tuple[int, pa.Table]], start: int, memory: float) -> Iterator[tuple[int, int, pa.Table]]:
    """Pieces joined until they reach `memory` bytes: first row, row after the last, rows."""
    parts: list[pa.Table] = []
    size, end = 0, start
    for end, part in pieces:
        size += part.nbytes
        parts.append(part)
        del part
        if size >= memory:
            yield start, end, _joined(parts)
            start, size = end, 0
    if parts:
        yield start, end, _joined(parts)


def _joined(parts: list[pa.Table]) -> pa.Table:
    """The rows of all parts, of which the list is emptied: else they would be held twice."""
    schema = _unified([part.schema for part in parts])
    rows = pa.concat_tables(_as(part, schema) for part in parts)
    parts.clear()
    return rows


def _as(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with the columns and types of the schema; absent columns are null."""
    if rows.schema.equals(schema):
        return rows
    return pa.concat_tables([schema.empty_table(), rows], promote_options="permissive")


def _unified(schemas: Iterable[pa.Schema]) -> pa.Schema:
    try:
        return pa.unify_schemas(list(dict.fromkeys(schemas)), promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise UserError(f"data.path: a column has two types in its files: {reason(error)}; mend the files") from None


def _write_spill(path: Path, end: int, state: dict[str, Any], code_N: NDArray[np.int64], rows: pa.Table) -> None:
    order_N = np.argsort(code_N, kind="stable")
    order_N = order_N[np.searchsorted(code_N[order_N], 0) :]  # not the rows of tasks that are not selected
    codes, counts = np.unique(code_N[order_N], return_counts=True)
    row_bytes = rows.nbytes / max(len(rows), 1)
    batch = int(max(1, min(_BATCH / max(row_bytes, 1), 65536)))
    about = {
        "end": end, "state": state, "codes": codes.tolist(), "counts": counts.tolist(), "batch": batch, "row_bytes": row_bytes,
    }  # fmt: skip
    rows = rows.combine_chunks()
    with (
        _whole(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, rows.schema.with_metadata({"spill": json.dumps(about)})) as writer,
    ):
        for start in range(0, len(order_N), batch):
            (part,) = rows.take(pa.array(order_N[start : start + batch])).combine_chunks().to_batches()
            writer.write_batch(part)


# Second pass: each task from its rows in all spills.


def _write_tasks(
    source: _Source, spills: list[_Spill], folder: Path, memory: float, row_group: int, progress: _Progress
) -> tuple[int, dict[str, str]]:
    """Number of rows, and the file of each task that has rows, by its name."""
    names = source.names
    count_T, bytes_T = np.zeros(len(names), dtype=np.int64), np.zeros(len(names))
    for spill in spills:
        rows = np.diff(spill.start_T)
        count_T[spill.code_T] += rows
        bytes_T[spill.code_T] += rows * spill.row_bytes
    tasks = np.flatnonzero(count_T).tolist()
    if not tasks:
        raise UserError(f"none of the {len(names)} tasks has a label; check data.label, tasks.labels and missing_labels")
    _check_names([names[t] for t in tasks])
    files = dict(zip(tasks, _file_names([names[t] for t in tasks]), strict=True))
    schema = _unified(spill.schema for spill in spills)

    for path in folder.glob("*.tmp"):
        path.unlink()
    waiting = {t for t in tasks if not _is_finished(folder / files[t], int(count_T[t]), row_group)}
    total = int(count_T.sum())
    done = total - int(count_T[list(waiting)].sum())
    progress.start("writing", total, done)
    for group in _groups(tasks, bytes_T, memory):
        if waiting.isdisjoint(group):
            continue
        for t, parts in _task_rows(spills, group, schema, alone=bytes_T[group[0]] > memory):
            if t in waiting:
                _write_task(folder / files[t], (source.finished(rows, t) for rows in parts), row_group)
                done += int(count_T[t])
                progress.update(done)
    return total, {names[t]: file for t, file in files.items()}


def _groups(tasks: Sequence[int], bytes_T: NDArray[np.float64], memory: float) -> Iterator[list[int]]:
    """Consecutive tasks that together fit in memory; a task that does not is a group of its own."""
    group: list[int] = []
    size = 0.0
    for t in tasks:
        if group and size + bytes_T[t] > memory:
            yield group
            group, size = [], 0.0
        group.append(t)
        size += bytes_T[t]
    yield group


def _task_rows(
    spills: list[_Spill], group: list[int], schema: pa.Schema, alone: bool
) -> Iterator[tuple[int, Iterable[pa.Table]]]:
    """The rows of each task of the group, in the order of the source."""
    first, last = group[0], group[-1] + 1
    if alone:
        yield first, (_as(spill.rows(first, last)[1], schema) for spill in spills)
        return
    found = [spill.rows(first, last) for spill in spills]
    code_N = np.concatenate([code for code, _ in found])
    order_N = np.argsort(code_N, kind="stable")
    rows = pa.concat_tables(_as(rows, schema) for _, rows in found).combine_chunks().take(pa.array(order_N))
    del found
    bounds = np.searchsorted(code_N[order_N], [*group, last]).tolist()
    for t, start, end in zip(group, bounds, bounds[1:], strict=False):
        yield t, [rows.slice(start, end - start)]


def _write_task(path: Path, parts: Iterable[pa.Table], row_group: int) -> None:
    """Write a file whose row groups, but for the last one, have `row_group` rows, however the rows come."""
    with _whole(path) as temporary, ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        held: list[pa.Table] = []
        num_held = 0
        for part in parts:
            if writer is None:
                texts = [field.name for field in part.schema if is_text(field.type)]  # numbers rarely gain by a dictionary
                writer = stack.enter_context(pq.ParquetWriter(temporary, part.schema, use_dictionary=texts))
            held.append(part)
            num_held += len(part)
            full = num_held - num_held % row_group
            if full:
                rows = pa.concat_tables(held).combine_chunks()
                writer.write_table(rows.slice(0, full), row_group)
                held, num_held = [rows.slice(full)], num_held - full
        if writer is not None and num_held:
            writer.write_table(pa.concat_tables(held).combine_chunks(), row_group)


def _is_finished(path: Path, num_rows: int, row_group: int) -> bool:
    try:
        found = pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        return False
    return (found.num_rows, found.num_row_groups) == (num_rows, -(-num_rows // row_group))


def _file_names(names: Sequence[str]) -> list[str]:
    """A file name for each task that every file system can hold, also one in which `a` and `A` are the same."""
    taken: set[str] = set()
    files = []
    for name in names:
        safe = re.sub(rb"[^A-Za-z0-9_-]|^-", lambda m: f"%{m[0][0]:02X}".encode(), name.encode()).decode()
        if len(safe) > _LONGEST_NAME or safe.lower() in taken or not safe:
            safe = f"{safe[:_LONGEST_NAME]}~{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"
        taken.add(safe.lower())
        files.append(f"{safe}.parquet")
    return files


# What goes with the tasks.


def _write_task_table(config: Config, path: Path, files: dict[str, str], label: str) -> None:
    """Kinds with options are left to the config's `tasks.by_name`, which stays."""
    patterns, options = Patterns(list(config.tasks.by_name)), list(config.tasks.by_name.values())
    own = [[options[i] for i in reversed(patterns.of(name))] for name in files]
    specs = [next((option.kind for option in each if option.kind), None) for each in own]
    columns = {
        "name": pa.array(list(files), pa.string()),
        "data": pa.array([f"tasks/{file}" for file in files.values()], pa.string()),
        "label": pa.array([label] * len(files), pa.string()),
        "kind": pa.array([spec.class_path if spec and not spec.init_args else None for spec in specs], pa.string()),
        "weight": pa.array(
            [next((option.weight for option in each if option.weight is not None), None) for each in own], pa.float64()
        ),
    }
    table = pa.table({name: column for name, column in columns.items() if column.null_count < len(column)})
    with _whole(path) as temporary:
        pq.write_table(table, temporary)


def _write_config(config: Config, path: Path, names: Sequence[str], key: str | None) -> None:
    tree = config.model_dump(mode="json", exclude_unset=True)
    # an absolute root comes before a `tasks.parquet` in the working directory; if it was moved, it is found beside the config
    data = {"layout": "files", "table": "tasks.parquet", "root": str(path.parent.resolve())}
    data |= {name: value for name, value in tree["data"].items() if name not in _OF_SOURCE}
    if key is not None:
        data["key"] = key
    tasks = {name: value for name, value in tree.get("tasks", {}).items() if name != "labels"}
    unused = Patterns(list(config.tasks.by_name)).unused(names)
    tasks["by_name"] = {name: value for name, value in tasks.get("by_name", {}).items() if name not in unused}
    tree |= {"data": data, "tasks": {name: value for name, value in tasks.items() if value}}
    text = yaml.safe_dump({name: value for name, value in tree.items() if value != {}}, sort_keys=False, allow_unicode=True)
    _write_text(path, text)


def _check_names(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(name.strip(), name)) != name:
            raise UserError(f"the tasks {other!r} and {name!r} differ only in spaces around their names; rename one")


def _notes(names: Sequence[str], files: dict[str, str]) -> Iterator[str]:
    if empty := [name for name in names if name not in files]:
        yield f"{len(empty)} tasks have no label and are left out: {some(empty)}"
    if spaced := [name for name in files if name != name.strip()]:
        yield f"{len(spaced)} tasks lose the spaces around their names: {some([repr(name) for name in spaced])}"


# The folder.


def _check_output(config: Config, beside: Path | None, output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file, expected a folder")
    paths = config.data.path.values() if isinstance(config.data.path, dict) else [config.data.path]
    for path in (one for each in paths for one in ([each] if isinstance(each, str) else each)):
        for folder in search_folders(config.data, beside):
            place = folder / Path(path).expanduser()
            if place.is_dir() and output.resolve().is_relative_to(place.resolve()):
                raise UserError(f"{output}: lies in data.path {place}, of which it would become a part; choose another folder")


def _identity(config: Config, beside: Path | None, row_group: int) -> dict[str, Any]:
    """What must be the same when a run goes on."""
    files = local_files(config.data, beside)
    sizes = [[Path(file).name, os.path.getsize(file) if os.path.isfile(file) else None] for file in files]
    data = config.data.model_dump(mode="json", include={*_OF_SOURCE, "key", "weight", "missing_labels"})
    options = {f"data.{name}": value for name, value in data.items() if name not in ("root", "table")}
    options |= {f"tasks.{name}": value for name, value in config.tasks.model_dump(mode="json").items() if name != "kind"}
    return {"files": sizes, "--rows": row_group, **options, "split.column": config.split.column, "inputs": list(config.inputs)}


def _read_manifest(output: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run wrote of itself; empty if there was none."""
    path = output / _MANIFEST
    if not path.exists():
        if output.exists() and any(each.name != f"{_MANIFEST}.tmp" for each in output.iterdir()):
            raise UserError(f"{output}: holds other files, expected a new folder or one that mtrain partition began")
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differs = next((key for key in expected if json.dumps(found.get(key)) != json.dumps(expected[key])), None)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}; delete the folder") from error
    if differs is not None:
        was, now = (json.dumps(each.get(differs), ensure_ascii=False) for each in (found, expected))
        where = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), 0)
        start = max(0, where - 40)
        was, now = (("..." if start else "") + text[start : start + 80] for text in (was, now))
        raise UserError(f"{output}: was begun with {differs} {was}, now it is {now}; choose another folder, or delete this one")
    return found


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=1))


def _write_text(path: Path, text: str) -> None:
    with _whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Another name to write to, which becomes the file's own at the end."""
    temporary = path.with_name(f"{path.name}.tmp")
    with _writing(path):
        yield temporary
        os.replace(temporary, path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = os.strerror(error.errno) if error.errno else reason(error)
        again = "; free space and start again: what is written stays" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(f"{path}: cannot be written: {text}{again}") from error


class _Progress:
    """Rows done of the rows of a phase: a bar in a terminal, else a line every ten seconds."""

    def __init__(self, console: Console):
        self.console, self.last_line = console, time.monotonic()
        self.title, self.total = "", 0
        self.bar: Progress | None = None

    def __enter__(self) -> _Progress:
        if self.console.is_terminal:
            text = TextColumn("{task.description}")
            columns = (text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start(self, title: str, total: int, done: int) -> None:
        """Begin a phase of which `done` of `total` rows were done before."""
        self.title, self.total, self.before, self.began = title, total, done, time.monotonic()
        if self.bar is not None:
            self.shown = self.bar.add_task(title, total=total, completed=done)

    def update(self, done: int) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.shown, completed=done)
        elif now - self.last_line >= PLAIN_EVERY_S:
            self.last_line = now
            left = (self.total - done) * (now - self.began) / max(1, done - self.before)
            line = f"{self.title}: {done:,} of {self.total:,} rows  {left:.0f} s left"
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

"""One Parquet file for each task: a long table, or a very sparse grid, rewritten so that its tasks stream one by one.

It is an external sort by task. The source is read by the chunk, and what fits in memory is sorted and spilled; then each task
is written from its rows in all spills. Files appear under their names only when they are whole, so that what a killed run left
is taken up where it stopped.
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
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from rich.console import Console

from mtrain.config import Config
from mtrain.data.features import encode_categories, is_text
from mtrain.data.labels import Patterns, parse_labels, select, task_names
from mtrain.data.prepare import UNNAMED, label_columns_of, match_inputs
from mtrain.data.sources import local_files, open_stream, require, search_folders
from mtrain.data.splits import SOURCE
from mtrain.data.tables import Table, reason
from mtrain.errors import UserError, nearest, some
from mtrain.model.kinds import Multiclass
from mtrain.report.progress import ShownProgress
from mtrain.report.say import say
from mtrain.writing import replacing

_SPILLS = ".spill"
_MANIFEST = "partition.json"
_LONGEST_NAME = 100  # characters; file systems allow 255 bytes
_OF_SOURCE = ("path", "table", "root", "layout", "format", "name", "source_split", "task", "label")  # keys of one table


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
        beside: folder of the config file, see `search_folders`.
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
    if config.tasks.derived:
        raise UserError("tasks.derived: a file for each task holds only labels that are read; derive tasks in layout grid")
    if config.tasks.others == "refuse":
        raise UserError("tasks.others: found refuse, expected leave_out: rows of other tasks get no file")
    if row_group < 1:
        raise UserError(f"--rows: found {row_group}, expected at least 1")
    _check_output(config, beside, output)
    manifest = _identity(config, beside, row_group)
    if "finished" in _read_manifest(output, manifest):
        shutil.rmtree(output / _SPILLS, ignore_errors=True)
        say(console, f"{output}: complete, nothing to do")
        return
    table = open_stream(config.data, beside, config.data.chunk_rows)
    source = _Grid(config, table) if config.data.layout == "grid" else _Long(config, table)
    manifest["rows"] = len(table)
    if not _read_manifest(output, manifest):
        _write_text(output / _MANIFEST, json.dumps(manifest, indent=1))

    spills = _spill(source, output / _SPILLS, memory / 2, console)
    files, num_rows = _write_tasks(source, spills, output / "tasks", row_group, console)
    table_of_tasks = {"name": list(files), "data": [f"tasks/{f}" for f in files.values()], "label": [source.label] * len(files)}
    with _whole(output / "tasks.parquet") as temporary:
        pq.write_table(pa.table(table_of_tasks), temporary)
    _write_config(config, output / "config.yaml", list(files), source.key)
    finished = {"rows": num_rows, "tasks": len(files)}
    _write_text(output / _MANIFEST, json.dumps({**manifest, "finished": finished}, indent=1))
    shutil.rmtree(output / _SPILLS, ignore_errors=True)
    if empty := [name for name in source.number if name not in files]:
        say(console, f"{len(empty)} tasks have no label and are left out: {some(empty)}")
    if spaced := [repr(name) for name in files if name != name.strip()]:
        say(console, f"{len(spaced)} tasks lose the spaces around their names: {some(spaced)}")
    size = sum((output / "tasks" / file).stat().st_size for file in files.values())
    say(console, f"{num_rows:,} rows of {len(files):,} tasks, {size / 1e6:,.1f} MB, {time.monotonic() - began:.1f} s: {output}")


# Rows with the number of their task.

_Piece = tuple[int, NDArray[np.int64], pa.Table]  # row of the source that comes next; task of each row to write; these rows


class _Source:
    """A table whose rows belong to tasks.

    number: of each task by its name; more may come while rows are read.
    inputs, kept: columns of inputs; and with key, weight and split column.
    schema: of what was read so far.
    columns: what is read. label: the label column of the files. key: the column of row numbers, where one is added.
    """

    columns: list[str]
    label: str
    key: str | None = None

    def __init__(self, config: Config, table: Table):
        data, names = config.data, table.column_names
        for key in ("key", "task", "label", "weight"):
            if (column := getattr(data, key)) is not None:
                require(names, column, f"data.{key}")
        if config.split.column is not None:
            require(names, config.split.column, "split.column")
        reserved = {data.key, data.weight, config.split.column, SOURCE}
        inputs = {name for group, _ in match_inputs(config, names) for name in group}
        tasks = label_columns_of(config, names, reserved | inputs) if data.layout == "grid" else []
        if not config.inputs:
            others = {*reserved, *tasks, data.task, data.label}
            inputs = {name for name in names if name not in others and not name.startswith(UNNAMED)}
        if not inputs:
            raise UserError("inputs: no column is left for inputs; name the label columns in tasks.labels, or the inputs")
        self.table, self.inputs, self.schema = table, inputs, pa.schema([])
        self.kept = [name for name in names if name in reserved | inputs]
        self.number = {name: t for t, name in enumerate(tasks)}


class _Long(_Source):
    """Layouts routed and pairs; tasks are numbered as they appear."""

    def __init__(self, config: Config, table: Table):
        super().__init__(config, table)
        assert config.data.task is not None
        assert config.data.label is not None
        self.task, self.label, labels = config.data.task, config.data.label, config.tasks.labels
        if self.label in self.inputs:
            raise UserError(f"inputs: column '{self.label}' holds the labels (data.label); leave it out of inputs")
        self.written = [name for name in table.column_names if name in {*self.kept, self.label}]
        self.columns = list(dict.fromkeys([*self.written, self.task]))
        self.every_task = labels.include == ["*"] and not labels.exclude
        if not self.every_task or config.tasks.by_name:  # mistakes there are found now, rather than after hours
            every: dict[str, None] = {}
            for chunk in range(len(table.key_C)):
                _, distinct = encode_categories(table.read_chunk(chunk, [self.task])[self.task])
                every |= dict.fromkeys(task_names(distinct, self.task).drop_null().to_pylist())
            chosen = select(list(every), labels, "tasks.labels")
            if not chosen:
                raise UserError(f"tasks.labels: none of the {len(every)} tasks of column '{self.task}' is left; exclude fewer")
            _check_options(config, chosen)
            self.number = {name: t for t, name in enumerate(chosen)}

    def split(self, rows: pa.Table, first: int, memory: float) -> Iterator[_Piece]:
        """A chunk, which begins at row `first`, without the tasks that are not selected."""
        value_N, distinct = encode_categories(task_names(rows[self.task], self.task))
        names = distinct.to_pylist()
        unnamed = np.array([not name.strip() for name in names] + [True])  # [-1] is null
        if len(bad := np.flatnonzero(unnamed[value_N])):
            where = self.table.where(first + int(bad[0]))
            raise UserError(f"{where}, column '{self.task}': found no task name, expected one in each row")
        if self.every_task:
            for name in names:
                self.number.setdefault(name, len(self.number))
        task_N = np.array([self.number.get(name, -1) for name in names])[value_N]
        chosen = task_N >= 0
        yield first + len(rows), task_N[chosen], rows.select(self.written).filter(pa.array(chosen))


class _Grid(_Source):
    """A column for each task; labels are text until a task is written."""

    def __init__(self, config: Config, table: Table):
        super().__init__(config, table)
        if not self.number:
            raise UserError("tasks.labels: no label column is left; name columns that are not inputs, key or weight")
        if not all(name.strip() for name in self.number):
            raise UserError("tasks.labels: a label column has no name, expected one for each task; rename it in the file")
        _check_options(config, list(self.number))
        self.columns, self.missing = list(dict.fromkeys([*self.kept, *self.number])), config.data.missing_labels
        self.label = _free("label", self.kept, config)
        self.key = None if config.data.key is not None else _free("__row__", [*self.kept, self.label], config)

    def split(self, rows: pa.Table, first: int, memory: float) -> Iterator[_Piece]:
        """A row for each label of a chunk, in pieces of about `memory` bytes: task by task, then in the order of the rows."""
        value_TN = np.empty((len(self.number), len(rows)))  # NaN where no label is; else a number, of text any
        every = np.zeros(len(rows), dtype=np.int64)
        for t, name in enumerate(self.number):
            where = lambda row: f"label column '{name}', {self.table.where(first + (row or 0))}"  # noqa: B023, E731
            # any text may be a class: whether it is all numbers shows only when the whole column is there
            value_TN[t], _ = parse_labels(rows[name], where, self.missing, every, [Multiclass()])
        texts = {t: rows[name] for t, name in enumerate(self.number) if is_text(rows[name].type)}
        there_TN = ~np.isnan(value_TN)
        inputs = rows.select(self.kept)
        if self.key is not None:
            inputs = inputs.append_column(self.key, pa.array(np.arange(first, first + len(rows))))
        piece_N = np.cumsum(there_TN.sum(0)) // max(1.0, memory / (inputs.nbytes / len(rows) + 24))
        for start, end in pairwise([0, *(np.flatnonzero(np.diff(piece_N)) + 1).tolist(), len(rows)]):
            task_P, row_P = np.nonzero(there_TN[:, start:end])
            row_P += start
            label = pa.array(value_TN[task_P, row_P]).cast(pa.string())
            if texts:
                own = [text.take(pa.array(row_P[task_P == t])).cast(pa.string()).combine_chunks() for t, text in texts.items()]
                label = pc.replace_with_mask(label, pa.array(np.isin(task_P, list(texts))), pa.concat_arrays(own))
            yield first + end, task_P, inputs.take(pa.array(row_P)).append_column(self.label, label)


def _check_options(config: Config, names: Sequence[str]) -> None:
    for pattern in Patterns(list(config.tasks.by_name)).unused(names):
        raise UserError(f"tasks.by_name: '{pattern}' matches no task{nearest(pattern, names)}")


def _free(wanted: str, taken: Sequence[str], config: Config) -> str:
    """A name for a column that no column has and no pattern of inputs matches."""
    patterns = Patterns(list(config.inputs))
    for name in (wanted, *(f"{wanted}{i}" for i in range(2, 100))):
        if name not in taken and not patterns.of(name):
            return name
    raise UserError(f"inputs: a pattern matches '{wanted}', which partition adds; expected patterns that match only inputs")


def _unified(schemas: Iterable[pa.Schema]) -> pa.Schema:
    try:
        return pa.unify_schemas(list(dict.fromkeys(schemas)), promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise UserError(f"data.path: a column has two types in its files: {reason(error)}; mend the files") from None


# First pass: what fits in memory, sorted by task.


@dataclass(frozen=True)
class _Spill:
    """Some consecutive rows of the source, sorted by task, memory-mapped.

    end: the row of the source that comes next. source: schema of the source so far.
    code_S, start_S: the S tasks that occur, ascending, and `[S + 1]` where the rows of each start.
    """

    rows: pa.Table
    end: int
    source: pa.Schema
    code_S: NDArray[np.int64]
    start_S: NDArray[np.int64]

    @staticmethod
    def open(path: Path, number: dict[str, int]) -> _Spill:
        """Tasks that are not in `number` are added."""
        with pa.memory_map(str(path)) as file:
            rows = pa.ipc.open_file(file).read_all()
        about = json.loads(rows.schema.metadata[b"about"])
        code_S = np.array([number.setdefault(name, len(number)) for name in about["tasks"]], dtype=np.int64)
        start_S = np.cumsum([0, *about["tasks"].values()])
        source = pa.ipc.read_schema(pa.py_buffer(rows.schema.metadata[b"source"]))
        return _Spill(rows.replace_schema_metadata(None), about["end"], source, code_S, start_S)

    def rows_of(self, t: int) -> pa.Table:
        start, end = self.start_S[np.searchsorted(self.code_S, [t, t + 1])].tolist()
        return self.rows.slice(start, end - start)


def _spill(source: _Long | _Grid, folder: Path, memory: float, console: Console) -> list[_Spill]:
    """Sort the source into spills, after those that an earlier run finished."""
    spills: list[_Spill] = []
    while (path := folder / f"{len(spills):06d}.arrow").exists():
        try:
            spills.append(_Spill.open(path, source.number))
        except (OSError, ValueError):  # cut short by a crash
            break
    begin = spills[-1].end if spills else 0
    if spills:
        source.schema = spills[-1].source
    parts: list[tuple[NDArray[np.int64], pa.Table]] = []
    table, size = source.table, 0
    with ShownProgress(console, "reading", begin, len(table)) as progress:
        for chunk in range(int(np.searchsorted(table.start_C, begin, side="right")) - 1, len(table.key_C)):
            rows = table.read_chunk(chunk, source.columns)
            plain = [c.cast(c.type.value_type) if pa.types.is_dictionary(c.type) else c for c in rows.columns]
            rows = pa.table(plain, names=rows.column_names)
            source.schema = _unified([source.schema, rows.schema])  # so that a wrong type is found early
            for end, task_P, piece in source.split(rows, int(table.start_C[chunk]), memory / 4):
                if end <= begin:
                    continue
                parts.append((task_P, piece))
                size += piece.nbytes
                if size >= memory or end == len(table):
                    path = folder / f"{len(spills):06d}.arrow"
                    _write_spill(path, end, source, *zip(*parts, strict=True))
                    spills.append(_Spill.open(path, source.number))
                    progress.show(end)
                    parts, size = [], 0
    return spills


def _write_spill(path: Path, end: int, source: _Source, tasks: Sequence[NDArray[np.int64]], parts: Sequence[pa.Table]) -> None:
    task_N, names = np.concatenate(tasks), list(source.number)
    count_T = np.bincount(task_N)
    about = {"end": end, "tasks": {names[t]: int(count_T[t]) for t in np.flatnonzero(count_T)}}
    order = pa.array(np.argsort(task_N, kind="stable"))
    rows = pa.concat_tables(parts, promote_options="permissive").take(order)
    rows = rows.replace_schema_metadata({"about": json.dumps(about), "source": source.schema.serialize().to_pybytes()})
    with _whole(path) as temporary, pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows)


# Second pass: each task from its rows in all spills.


def _write_tasks(
    source: _Source, spills: list[_Spill], folder: Path, row_group: int, console: Console
) -> tuple[dict[str, str], int]:
    """The file of each task that has rows, by its name; number of rows."""
    names = list(source.number)
    count_T = np.zeros(len(names), dtype=np.int64)
    for spill in spills:
        count_T[spill.code_S] += np.diff(spill.start_S)
    tasks, total = np.flatnonzero(count_T).tolist(), int(count_T.sum())
    if not tasks:
        raise UserError(f"none of the {len(names)} tasks has a label; check data.label, tasks.labels and missing_labels")
    files = _file_names([names[t] for t in tasks])
    schema = _unified(spill.rows.schema for spill in spills)
    done = 0
    with ShownProgress(console, "writing", 0, total) as progress:
        for t in tasks:
            name, num_rows = names[t], int(count_T[t])
            if not _is_finished(folder / files[name], num_rows):
                parts = [schema.empty_table(), *(spill.rows_of(t) for spill in spills)]
                rows = pa.concat_tables(parts, promote_options="permissive")
                if isinstance(source, _Grid) and not is_text(source.schema.field(name).type):
                    label = rows[source.label].cast(pa.float64())
                    rows = rows.set_column(rows.column_names.index(source.label), source.label, label)
                texts = [field.name for field in rows.schema if is_text(field.type)]  # numbers rarely gain by a dictionary
                with _whole(folder / files[name]) as temporary:
                    pq.write_table(rows, temporary, row_group, use_dictionary=texts)
            done += num_rows
            progress.show(done)
    return files, total


def _is_finished(path: Path, num_rows: int) -> bool:
    try:
        return pq.read_metadata(path).num_rows == num_rows
    except (OSError, pa.ArrowException):
        return False


def _file_names(names: Sequence[str]) -> dict[str, str]:
    """A file name for each task that every file system can hold, also one in which `a` and `A` are the same."""
    stripped: dict[str, str] = {}
    files: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        if (other := stripped.setdefault(name.strip(), name)) != name:
            raise UserError(f"the tasks {other!r} and {name!r} differ only in spaces around their names; rename one")
        safe = re.sub(rb"[^A-Za-z0-9_-]|^-", lambda m: f"%{m[0][0]:02X}".encode(), name.encode()).decode()
        if len(safe) > _LONGEST_NAME or safe.lower() in taken:
            safe = f"{safe[:_LONGEST_NAME]}~{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"
        taken.add(safe.lower())
        files[name] = f"{safe}.parquet"
    return files


def _write_config(config: Config, path: Path, names: Sequence[str], key: str | None) -> None:
    tree = config.model_dump(mode="json", exclude_unset=True)
    # an absolute root comes before a `tasks.parquet` in the working directory; if it was moved, it is found beside the config
    data = {"layout": "files", "table": "tasks.parquet", "root": str(path.parent.resolve())}
    data |= {name: value for name, value in tree["data"].items() if name not in _OF_SOURCE}
    if key is not None:
        data["key"] = key
    tasks = {name: value for name, value in tree.get("tasks", {}).items() if name != "labels"}
    for pattern in Patterns(list(config.tasks.by_name)).unused(names):  # of tasks without a label
        del tasks["by_name"][pattern]
    tree |= {"data": data, "tasks": {name: value for name, value in tasks.items() if value}}
    tree = {name: value for name, value in tree.items() if value != {}}
    _write_text(path, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


# The folder.


def _check_output(config: Config, beside: Path | None, output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file, expected a folder")
    paths = config.data.path.values() if isinstance(config.data.path, dict) else [config.data.path]
    for path in (one for each in paths for one in ([each] if isinstance(each, str) else each)):
        for folder in search_folders(config.data.root, beside):
            place = folder / Path(path).expanduser()
            if place.is_dir() and output.resolve().is_relative_to(place.resolve()):
                raise UserError(f"{output}: lies in data.path {place}, of which it would become a part; choose another folder")


def _identity(config: Config, beside: Path | None, row_group: int) -> dict[str, Any]:
    """What must be the same when a run goes on."""
    paths = [path for each in local_files(config.data, beside).values() for path in each]
    files = [os.stat(path) for path in paths if os.path.isfile(path)]
    changed = np.datetime64(max((file.st_mtime_ns for file in files), default=0), "ns").astype("datetime64[ms]")
    data = config.data.model_dump(mode="json", include={*_OF_SOURCE, "key", "weight", "missing_labels"})
    return {
        "source": f"{len(files)} files, {sum(file.st_size for file in files):,} bytes, changed {changed}",
        "--rows": row_group,
        **{f"data.{name}": value for name, value in data.items() if name not in ("root", "table")},
        **{f"tasks.{name}": value for name, value in config.tasks.model_dump(mode="json").items() if name != "kind"},
        "split.column": config.split.column,
        "inputs": list(config.inputs),
    }


def _read_manifest(output: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run wrote of itself; empty if there was none."""
    path = output / _MANIFEST
    if not path.exists():
        if output.exists() and any(each.name != f".{_MANIFEST}" for each in output.iterdir()):
            raise UserError(f"{output}: holds other files, expected a new folder or one that mtrain partition began")
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}; delete the folder") from error
    for key, value in expected.items():
        if (was := json.dumps(found.get(key))) != (now := json.dumps(value)):
            raise UserError(f"{output}: was begun with {key} {was}, now it is {now}; choose another folder, or delete this one")
    return found


def _write_text(path: Path, text: str) -> None:
    with _whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """`replacing`, in a folder that is made, with a line that says what was not written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            yield unfinished
    except OSError as error:
        text = os.strerror(error.errno) if error.errno else reason(error)
        again = "; free space and start again: what is written stays" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(f"{path}: cannot be written: {text}{again}") from error

"""Layout files: a data set for each task, named in a task table or found in a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import datasets
import numpy as np
from numpy.typing import NDArray

from mtrain.config import Config, DataConfig
from mtrain.data.labels import select
from mtrain.data.sources import (
    existing,
    format_of,
    hub_files,
    is_glob,
    open_many,
    open_mapped,
    quiet,
    search_folders,
    streams,
)
from mtrain.data.splits import SOURCE
from mtrain.data.tables import JoinedTable, Piece, ReadError, Table, in_threads
from mtrain.data.task_table import HUB_ID, TaskSource, read_task_table, without_suffixes
from mtrain.errors import UserError, matches, nearest, some

TASK = "__task__"  # constant column: the task's name
_EXPECTED_SHARE = 0.9  # of the other tasks: a column that so many have is missing from the rest by mistake


@dataclass(frozen=True)
class TaskFiles:
    """The opened data sets of T tasks as one table, in which the rows of each task are contiguous.

    table: with the common columns, and the constant columns `TASK` and, if tasks have splits, `SOURCE`.
    pieces: each task's own tables, one a split.
    first_T: `[T + 1]`, the first row of each task, and the number of rows.
    columns: columns of all tasks that no task has as label: what may be an input, key or weight.
    skipped: names and reasons of tasks that are left out.
    """

    table: JoinedTable
    sources: list[TaskSource]
    pieces: list[list[Piece]]
    first_T: NDArray[np.int64]
    columns: list[str]
    streaming: bool
    notes: list[str]
    skipped: list[tuple[str, str]]


class _NeedsScript(UserError):
    """A hub data set that is a program."""


class _Faults:
    """Tasks that cannot be used, by position: the first one stops the run, or all are left out and counted."""

    def __init__(self, sources: Sequence[TaskSource], stop: bool):
        self.sources, self.stop = sources, stop
        self.reasons: dict[int, str] = {}
        self.scripts: list[int] = []

    def add(self, t: int, problem: str) -> None:
        source = self.sources[t]
        self.reasons[t] = problem
        if self.stop:
            row = f" ({source.where})" if source.where else ""
            raise UserError(f"task '{source.name}'{row}: {problem} (data.on_error: skip_task leaves such tasks out)")

    def add_script(self, t: int, problem: str) -> None:
        self.reasons[t] = problem
        self.scripts.append(t)

    def left(self) -> list[int]:
        kept = [t for t in range(len(self.sources)) if t not in self.reasons]
        if not kept:
            t, problem = min(self.reasons.items())
            raise UserError(
                f"none of the {len(self.sources)} tasks can be used; the first, '{self.sources[t].name}': {problem}"
            )
        return kept

    def notes(self) -> Iterator[str]:
        if self.scripts:
            names = some([self.sources[t].name for t in self.scripts])
            yield f"{len(self.scripts)} tasks need a loading script, which datasets no longer runs, and are left out: {names}"
        others = [t for t in sorted(self.reasons) if t not in self.scripts]
        if others:
            first = some([f"{self.sources[t].name} ({self.reasons[t]})" for t in others], 3)
            yield f"{len(others)} tasks have data that cannot be used and are left out: {first}"


def open_tasks(config: Config, beside: Path | None = None) -> TaskFiles:
    """Open the data sets of all selected tasks.

    Args:
        beside: folder of the config file, see `search_folders`; paths of a task table are first tried beside it.

    Raises:
        UserError: the task table is wrong, no task is left, or, unless `data.on_error` is skip_task, a task's data cannot
            be read, are empty, or lack its label or an input that others have.
    """
    data = config.data
    folders = search_folders(data.root, beside)
    if data.table is not None:
        path = existing(data.table, folders, "data.table")
        sources = read_task_table(path, data)
        folders.insert(0, path.parent)
    else:
        sources = discover(data, folders)
    selected = set(select([source.name for source in sources], config.tasks.labels, "tasks.labels"))
    if not selected:
        raise UserError(f"tasks.labels: none of the {len(sources)} tasks is left; exclude fewer")
    sources = [source for source in sources if source.name in selected]
    faults = _Faults(sources, stop=data.on_error == "stop")

    _resolve_all(sources, faults, data, folders)
    streaming = streams(data, [file for t in faults.left() for files in sources[t].files.values() for file in files])
    tables = _open_all(sources, faults, data, streaming)
    shared, notes = _common_columns(sources, faults, tables, config)

    kept = faults.left()
    split = any(set(sources[t].files) != {""} for t in kept)
    unsplit = [sources[t].name for t in kept if set(sources[t].files) == {""}]
    if split and unsplit:
        notes.append(f"{len(unsplit)} of {len(kept)} tasks have no splits of their own, all their rows count as 'train': "
                     f"{some(unsplit)}")  # fmt: skip
    pieces = [
        [
            Piece(
                table,
                sources[t].rename,
                {TASK: sources[t].name} | ({SOURCE: part or "train"} if split else {}),
                f"task '{sources[t].name}'" + (f", split '{part}'" if part else ""),  # chunks are keyed by it
            )
            for part, table in tables[t].items()
        ]
        for t in kept
    ]
    rows_T = [sum(len(piece.table) for piece in own) for own in pieces]
    return TaskFiles(
        table=JoinedTable([piece for own in pieces for piece in own]),
        sources=[sources[t] for t in kept],
        pieces=pieces,
        first_T=np.concatenate([[0], np.cumsum(rows_T)]).astype(np.int64),
        columns=shared,
        streaming=streaming,
        notes=[*faults.notes(), *notes],
        skipped=[(sources[t].name, faults.reasons[t]) for t in sorted(faults.reasons)],
    )


def discover(config: DataConfig, folders: Sequence[Path]) -> list[TaskSource]:
    """A task for each file of the folder or glob `data.path`, named by its path below the folder (or a glob's fixed
    beginning), without endings."""
    path = str(config.path)
    if config.label is None:
        raise UserError("data.label is missing: name the label column, or give each task's in a task table (data.table)")
    if config.name or config.source_split:
        raise UserError("data.name and data.source_split are for hub data sets, but data.path names files; leave them out")
    base, files = existing(path, folders, "data.path"), []
    if base.is_dir():
        files = _data_files(base)
    elif is_glob(path):
        pattern, base = base, Path(*base.parts[: next(i for i, part in enumerate(base.parts) if is_glob(part))])
        files = sorted(file for file in glob(str(pattern), recursive=True) if os.path.isfile(file))
    if not files:
        raise UserError(f"data.path {path}: no data files there, expected a folder or glob in which each file is a task")
    sources: dict[str, TaskSource] = {}
    for file in files:
        name = without_suffixes(os.path.relpath(file, base).replace(os.sep, "/"))
        if name in sources:
            raise UserError(
                f"data.path: {file} and {sources[name].first_file} would both be task '{name}'; rename one, or use a task table"
            )
        sources[name] = TaskSource(name, {"": [file]}, config.label)
    return list(sources.values())


def _data_files(folder: Path) -> list[str]:
    """All files below a folder whose ending says csv, json, parquet or arrow; hidden ones are none."""
    found: list[str] = []
    seen = set()
    for parent, names, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link to a folder above would lead round and round
            names.clear()
            continue
        seen.add(real)
        names[:] = [name for name in names if not name.startswith(".")]
        found += [os.path.join(parent, file) for file in files if not file.startswith(".") and format_of(file)]
    return sorted(found)


# From paths to files.


def _resolve_all(sources: list[TaskSource], faults: _Faults, config: DataConfig, folders: Sequence[Path]) -> None:
    """Replace paths by files; hub data sets, which wait for an answer, several at a time."""

    def attempt(source: TaskSource) -> TaskSource | UserError:
        try:
            return _resolve(source, config, folders)
        except UserError as error:
            return error

    datasets.utils.tqdm.get_lock()  # created once here, else each thread creates and deletes it
    with quiet():
        resolved = in_threads(attempt, sources, threads=8)
    for t, found in enumerate(resolved):
        if isinstance(found, _NeedsScript):
            faults.add_script(t, str(found))
        elif isinstance(found, UserError):
            faults.add(t, str(found))
        else:
            sources[t] = found


def _resolve(source: TaskSource, config: DataConfig, folders: Sequence[Path]) -> TaskSource:
    asks_hub = bool(source.config or source.split)
    if set(source.files) == {""} and len(source.files[""]) == 1 and "://" not in (path := source.files[""][0]):
        found = _find(path, folders)
        is_folder = len(found) == 1 and os.path.isdir(found[0])
        if is_folder and (asks_hub or _is_hub_folder(Path(found[0]))):
            return _from_hub(source, found[0], config)
        if not found and (asks_hub or (HUB_ID.fullmatch(path) and not format_of(path) and not path.startswith("."))):
            return _from_hub(source, path, config)
    if asks_hub:
        raise UserError("config and split are for hub data sets, but data names files; leave them out")
    files: dict[str, list[str]] = {}
    for split, paths in source.files.items():
        files[split] = []
        for path in paths:
            found = [path] if "://" in path else _find(path, folders)
            if len(found) == 1 and os.path.isdir(found[0]):
                found = _data_files(Path(found[0]))
            if not found:
                raise UserError(f"{path}: no such file (looked in {', '.join(map(str, folders))})")
            files[split] += found
    return replace(source, files=files, form=_form(source, files, config))


def _find(path: str, folders: Sequence[Path]) -> list[str]:
    """The file, the folder, or the files of a glob; none."""
    for folder in folders:
        full = str(folder / os.path.expanduser(path))
        if os.path.isfile(full) or os.path.isdir(full):  # a pipe would wait for ever
            return [full]
        if is_glob(path) and (found := sorted(f for f in glob(full, recursive=True) if os.path.isfile(f))):
            return found
    return []


def _form(source: TaskSource, files: dict[str, list[str]], config: DataConfig) -> str:
    if form := source.form or config.format:
        return form
    forms = {format_of(urlparse(f).path if "://" in f else f): f for group in files.values() for f in group}
    if None in forms:
        raise UserError(f"{forms[None]}: unknown file type; set format to csv, json, parquet or arrow")
    if len(forms) > 1:
        raise UserError(f"{' and '.join(forms.values())} are of different types, expected one type in a task")
    return str(next(iter(forms)))


def _is_hub_folder(folder: Path) -> bool:
    """A data set as the hub has them: with a card that begins with YAML, or with a script."""
    card = folder / "README.md"
    if (folder / f"{folder.name}.py").is_file():
        return True
    return card.is_file() and card.open("rb").read(3) == b"---"


def _from_hub(source: TaskSource, path: str, config: DataConfig) -> TaskSource:
    """The files of a hub data set (or of a local folder that is one)."""
    try:
        form, found = hub_files(path, source.config or config.name)
    except UserError as error:
        if "scripts are no longer supported" in str(error.__cause__):
            raise _NeedsScript(f"{path}: needs a loading script, which datasets no longer runs") from error
        raise
    asked = source.split or ({"": config.source_split} if config.source_split else {})
    if not asked:
        asked = {split: split for split in found} if len(found) > 1 else {"": next(iter(found))}
    files = {}
    for part, splits in asked.items():
        names = [name.strip() for name in splits.split("+")]
        if unknown := [name for name in names if name not in found]:
            raise UserError(f"{path}: no split '{unknown[0]}'{nearest(unknown[0], found)}")
        files[part] = [file for name in names for file in found[name]]
    return replace(source, files=files, form=form)


# From files to tables.


def _open_all(sources: list[TaskSource], faults: _Faults, config: DataConfig, streaming: bool) -> dict[int, dict[str, Table]]:
    """Each usable task's tables by split; files that several tasks name are opened once."""
    kept = faults.left()
    groups: dict[str, dict[tuple[str, ...], Table | ReadError | None]] = {}
    for t in kept:
        for files in sources[t].files.values():
            groups.setdefault(str(sources[t].form), {})[tuple(files)] = None
    for form, group in groups.items():
        wanted = [list(files) for files in group]
        opened = (
            open_many(wanted, form, config.chunk_rows, config.retries)
            if streaming
            else open_mapped(wanted, form, config.chunk_rows)
        )
        group.update(zip(group, opened, strict=True))
    tables: dict[int, dict[str, Table]] = {}
    for t in kept:
        source, own = sources[t], {}
        for split, files in source.files.items():
            table = groups[str(source.form)][tuple(files)]
            assert table is not None
            if isinstance(table, ReadError):
                faults.add(t, str(table))
                break
            if problem := _lacks(source, files[0], table):
                faults.add(t, problem)
                break
            own[split] = table
        else:
            tables[t] = own
    return tables


def _lacks(source: TaskSource, file: str, table: Table) -> str | None:
    """What is wrong with the columns that the task itself names."""
    names = set(table.column_names)
    if source.label not in names:
        return f"{file}: no label column '{source.label}'{nearest(source.label, table.column_names)}"
    missing = next(((common, own) for common, own in source.rename.items() if own not in names), None)
    if missing:
        return f"{file}: no column '{missing[1]}' for input '{missing[0]}'{nearest(missing[1], table.column_names)}"
    return None


def _common_columns(
    sources: list[TaskSource], faults: _Faults, tables: dict[int, dict[str, Table]], config: Config
) -> tuple[list[str], list[str]]:
    """Columns of all tasks, and notes; tasks that lack one which is needed are faults.

    Needed are columns that the config names, and those that nearly all of the other tasks have and that match a pattern
    of `inputs` (all, if there are no patterns).
    """
    memo: dict[Any, dict[str, None]] = {}  # most tasks have the same columns
    columns: dict[int, dict[str, None]] = {}
    for t, own in tables.items():
        if t not in faults.reasons:
            names_of = [tuple(table.column_names) for table in own.values()]
            key = (sources[t].label, *sources[t].rename.items(), *names_of)
            if key not in memo:
                memo[key] = _columns(sources[t], names_of)
            columns[t] = memo[key]
    count = Counter(name for own in columns.values() for name in own)
    labels = {sources[t].label for t in columns if sources[t].label not in sources[t].rename}
    named = [*config.inputs, config.data.key, config.data.weight, config.split.column]
    exact = [name for name in named if name is not None and name in count]
    matching = [name for name in count if not config.inputs or any(matches(name, pattern) for pattern in config.inputs)]
    free = [name for name in matching if name not in labels]
    others = len(columns) - 1
    expected = [name for name in free if others > 1 and count[name] >= _EXPECTED_SHARE * others]
    needed = set(exact).union(expected)
    for t, names in columns.items():
        lacking = [name for name in dict.fromkeys([*exact, *expected]) if name not in names] if needed - names.keys() else []
        if lacking:
            name, source = lacking[0], sources[t]
            if name == source.label:
                problem = f"{source.first_file}: column '{name}' holds the labels, but is an input of other tasks"
            else:
                by = "the config names" if name in exact else f"{count[name]} of the {others} other tasks have"
                free_names = [other for other in names if other not in needed]
                problem = f"{source.first_file}: no column '{name}', which {by}{nearest(name, free_names)}"
            faults.add(t, problem)

    kept = faults.left()
    different = {id(columns[t]): columns[t] for t in kept}.values()
    in_all = [name for name in columns[kept[0]] if all(name in own for own in different)]
    notes = []
    if partial := [name for name in free if name not in in_all]:
        notes.append(f"{len(partial)} columns are not in all tasks and cannot be inputs: {some(partial)}")
    if also := [name for name in matching if name in labels]:
        notes.append(f"{len(also)} columns are the label of a task and cannot be inputs of others: {some(also)}")
    if not (usable := [name for name in in_all if name not in labels]):
        t = kept[0]
        other = next((u for u in kept if not columns[t].keys() & columns[u].keys()), kept[-1])
        raise UserError(
            f"the {len(kept)} tasks have no input column in common: '{sources[t].name}' has {some(list(columns[t]), 3)}, "
            f"'{sources[other].name}' has {some(list(columns[other]), 3)}; name them alike in data.table's inputs"
        )
    return usable, notes


def _columns(source: TaskSource, names: Sequence[Sequence[str]]) -> dict[str, None]:
    """Common names of the columns that all tables of a task have, without its label."""
    common_of = {own: common for common, own in source.rename.items()}
    everywhere = set(names[0]).intersection(*names[1:]) - {source.label}
    own = [c for c in names[0] if c in everywhere]
    return dict.fromkeys(common_of.get(c, c) for c in own if c in common_of or c not in source.rename)

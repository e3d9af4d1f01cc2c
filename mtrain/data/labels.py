"""Label columns to numbers: which tasks there are, of which kind, and all their labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrain.components import Spec, build
from mtrain.config import Selection, TasksConfig
from mtrain.data.features import FLOAT32_MAX, encode_categories, is_number, is_text
from mtrain.data.sources import require
from mtrain.data.tables import Table, in_threads
from mtrain.errors import UserError, matches, nearest, some
from mtrain.model.kinds import KINDS, Binary, Kind, Multiclass, Regression, SortedLabels, by_task
from mtrain.tasks import Task, TaskTable

if TYPE_CHECKING:
    from mtrain.data.files import TaskFiles
    from mtrain.data.task_table import TaskSource

_MAX_INFERRED_CLASSES = 20
_ROWS_PER_INFERRED_CLASS = 10
_CLASSES = "classes, whole numbers"
_COUNTS = "whole numbers; set kind: poisson or multiclass for counts or classes"
_WORDS = dict.fromkeys(("yes", "true", "y", "t", "positive", "active", "ja", "oui"), 1.0)
_WORDS |= dict.fromkeys(("no", "false", "n", "f", "negative", "inactive", "nein", "non"), 0.0)
"""What these texts mean as labels of binary tasks."""


@dataclass(frozen=True)
class LabelTable:
    """All labels of a source, one entry per label, in the user's units (classes as indices).

    `row_P` is the row of the source table; `reason_T` says why a task has its kind.
    """

    tasks: TaskTable
    task_P: NDArray[np.int64]
    row_P: NDArray[np.int64]
    y_P: NDArray[np.float64]
    reason_T: list[str]
    notes: list[str]


def select(names: Sequence[str], selection: Selection, key: str, known: Sequence[str] = ()) -> list[str]:
    """The names that match the selection; a pattern that matches none of them (or of all `known`) is an error."""
    known = known or names
    include, exclude = Patterns(selection.include), Patterns(selection.exclude)
    for pattern in (*include.unused(known), *exclude.unused(known)):
        raise UserError(f"{key}: '{pattern}' matches no column or task{nearest(pattern, known)}")
    if len(include.exact) < len(selection.include):
        twice = next(p for i, p in enumerate(selection.include) if p in selection.include[:i])
        raise UserError(f"{key}: '{twice}' occurs twice, expected unique task names; name it once")
    return [name for name in names if include.of(name) and not exclude.of(name)]


class Patterns:
    """Names and glob patterns of a config, in its order; a name is found without trying each."""

    def __init__(self, patterns: Sequence[str]):
        self.exact = {pattern: i for i, pattern in enumerate(patterns)}
        self.globs = [(pattern, i) for i, pattern in enumerate(patterns) if any(c in pattern for c in "*?[")]

    def of(self, name: str) -> list[int]:
        """Positions of the patterns that match, ascending."""
        found = {i for pattern, i in self.globs if matches(name, pattern)}
        return sorted(found | {self.exact[name]} if name in self.exact else found)

    def unused(self, names: Sequence[str]) -> list[str]:
        """Patterns that match none of the names."""
        globs, there = {pattern for pattern, _ in self.globs}, set(names)
        return [p for p in self.exact if p not in there and not (p in globs and any(matches(n, p) for n in names))]


class _Options:
    """What the config, and `own` kinds and weights of a task table, say of each task."""

    def __init__(self, config: TasksConfig, own: Mapping[str, tuple[Kind | None, float | None]] | None = None):
        self._own = dict(own or {})
        self._default = None if config.kind is None else _kind(config.kind, "tasks.kind")
        self._patterns = Patterns(list(config.by_name))
        self._options = list(config.by_name.values())
        self._kinds = [None if o.kind is None else _kind(o.kind, f"tasks.by_name.{p}.kind") for p, o in config.by_name.items()]

    def add(self, name: str, kind: Kind | None) -> None:
        """A derived task, with the kind it has where the config says nothing of it by name."""
        self._own[name] = (kind, None)

    def kind(self, name: str) -> Kind | None:
        """The last that matches; None: to be inferred."""
        own, _ = self._own.get(name, (None, None))
        return next((self._kinds[i] for i in self._patterns.of(name)[::-1] if self._kinds[i]), own or self._default)

    def weight(self, name: str) -> float:
        _, own = self._own.get(name, (None, None))
        weights = [1.0, own, *(self._options[i].weight for i in self._patterns.of(name))]
        return next(w for w in reversed(weights) if w is not None)

    def check(self, names: Sequence[str]) -> None:
        for pattern in self._patterns.unused(names):
            raise UserError(f"tasks.by_name: '{pattern}' matches no task{nearest(pattern, names)}")


def read_grid(data: Table, columns: list[str], config: TasksConfig, missing: Sequence[float | str]) -> LabelTable:
    """One task per label column, and derived ones; NaN, null, empty text and `missing` are no label."""
    sources = [derived.label for derived in config.derived.values()]
    read = list(dict.fromkeys([*columns, *(name for name in sources if name in data.column_names)]))
    if not read:
        raise UserError("tasks.labels: no label column is left; name columns that are not inputs, key or weight")
    table = data.read(read)
    options = _Options(config)
    every = np.zeros(len(data), dtype=np.int64)
    parsed = [parse_labels(table[name], _in_column(name, data), missing, every, [options.kind(name)]) for name in read]
    row_of = [np.flatnonzero(~np.isnan(value)) for value, _ in parsed]
    count_T = np.array([len(rows) for rows in row_of])
    labels = _Labels(
        names=read,
        task_P=np.repeat(np.arange(len(read)), count_T),
        row_P=np.concatenate(row_of),
        y_P=np.concatenate([value[rows] for (value, _), rows in zip(parsed, row_of, strict=True)]),
        texts=[texts[0] for _, texts in parsed],
    )
    return _finish(_derive(labels, len(columns), config, options, data.column_names), options, families=True)


def read_long(data: Table, task: str, label: str, config: TasksConfig, missing: Sequence[float | str]) -> LabelTable:
    """One task per value of the task column (layouts routed and pairs)."""
    require(data.column_names, task, "data.task")
    require(data.column_names, label, "data.label")
    table = data.read([task, label])
    task_N, distinct = encode_categories(task_names(table[task], task))
    if len(unnamed := np.flatnonzero((task_N < 0) | np.isin(task_N, distinct.index("").as_py()))):
        raise UserError(f"column '{task}', {data.where(int(unnamed[0]))}: found no task name, expected one in each row")
    all_names = distinct.to_pylist()
    names = select(all_names, config.labels, "tasks.labels")
    if not names:
        raise UserError(f"tasks.labels: none of the {len(all_names)} tasks of column '{task}' is left; exclude fewer")
    selected = set(names)
    kept = np.array([name in selected for name in all_names])
    if config.others == "refuse" and not kept.all():
        row = int(np.flatnonzero(~kept[task_N])[0])
        raise UserError(
            f"column '{task}', {data.where(row)}: found '{all_names[task_N[row]]}', expected one of {some(names)} "
            "(tasks.labels; tasks.others: leave_out leaves other rows out)"
        )
    task_N = np.where(kept, np.cumsum(kept) - 1, -1)[task_N]
    options = _Options(config)
    value, texts = parse_labels(table[label], _in_column(label, data), missing, task_N, [options.kind(name) for name in names])
    row_P = np.flatnonzero((task_N >= 0) & ~np.isnan(value))
    labels = _Labels(names, task_P=task_N[row_P], row_P=row_P, y_P=value[row_P], texts=texts)
    result = _finish(_derive(labels, len(names), config, options, names), options)
    left_out = len(task_N) - len(row_P)
    if left_out:
        result.notes.append(f"{left_out} rows without a label or of tasks that are not selected are left out")
    return result


def read_files(
    files: TaskFiles, config: TasksConfig, missing: Sequence[float | str], on_error: Literal["stop", "skip_task"]
) -> LabelTable:
    """One task per data set (layout files), each with its own classes; `row_P` counts the rows of the joined table.

    Raises:
        UserError: a task's labels cannot be used; with `skip_task`: those of every task (else it is left out and noted).
    """
    options = _Options(config, _own_options(files.sources))
    columns = _label_columns(files)
    tasks: list[int] = []
    parsed: list[Parsed] = []
    left_out: list[tuple[str, str]] = []
    for t, source in enumerate(files.sources):
        where = _in_files(files, t)
        kind = options.kind(source.name)
        try:
            if isinstance(column := columns[t], UserError):
                raise column
            value, texts = parse_labels(column, where, missing, np.zeros(len(column), dtype=np.int64), [kind])
            if kind is not None and not kind.has_classes and type(kind).problem is not Kind.problem:
                for label in np.unique(value[~np.isnan(value)]).tolist():
                    if problem := kind.problem(label):
                        raise UserError(_refused(where(int(np.argmax(value == label))), label, kind, problem))
        except UserError as error:
            if on_error == "stop":
                raise UserError(f"{error} (data.on_error: skip_task leaves such tasks out)") from error
            left_out.append((source.name, str(error)))
            continue
        tasks.append(t)
        parsed.append((value, texts))
    if not tasks:
        raise UserError(f"none of the {len(columns)} tasks has usable labels; the first: {left_out[0][1]}")
    row_of = [np.flatnonzero(~np.isnan(value)) for value, _ in parsed]
    labels = _Labels(
        names=[files.sources[t].name for t in tasks],
        task_P=np.repeat(np.arange(len(tasks)), [len(rows) for rows in row_of]),
        row_P=np.concatenate([files.first_T[t] + rows for t, rows in zip(tasks, row_of, strict=True)]),
        y_P=np.concatenate([value[rows] for (value, _), rows in zip(parsed, row_of, strict=True)]),
        texts=[texts[0] for _, texts in parsed],
    )
    result = _finish(labels, options, [name for name, _ in [*files.skipped, *left_out]])
    if left_out:
        reasons = some([reason for _, reason in left_out], 3)
        result.notes.append(f"{len(left_out)} tasks have labels that cannot be used and are left out: {reasons}")
    return result


def _own_options(sources: Sequence[TaskSource]) -> dict[str, tuple[Kind | None, float | None]]:
    """Kinds and weights of the task table; a kind that many tasks have is built once."""
    built: dict[str, Kind] = {}
    own = {}
    for source in sources:
        kind = None
        if source.kind is not None:
            text = repr(source.kind)
            kind = built[text] = built.get(text) or _kind(source.kind, f"{source.where}, kind")
        own[source.name] = (kind, source.weight)
    return own


def _in_files(files: TaskFiles, t: int) -> Where:
    source, first = files.sources[t], int(files.first_T[t])

    def where(row: int | None) -> str:
        rows = f"task '{source.name}'" if row is None else files.table.where(first + row)
        return f"{rows}, label column '{source.label}'"

    return where


def _label_columns(files: TaskFiles) -> list[pa.ChunkedArray | UserError]:
    """Each task's labels, or why they cannot be read; a table that several tasks share is read once."""
    tables: dict[int, Table] = {}
    wanted: dict[int, dict[str, None]] = {}
    for source, pieces in zip(files.sources, files.pieces, strict=True):
        for piece in pieces:
            tables[id(piece.table)] = piece.table
            wanted.setdefault(id(piece.table), {})[source.label] = None

    def read(key: int) -> pa.Table | UserError:
        try:
            return tables[key].read(list(wanted[key]))
        except UserError as error:
            return error

    found = dict(zip(tables, in_threads(read, tables), strict=True))
    columns: list[pa.ChunkedArray | UserError] = []
    for source, pieces in zip(files.sources, files.pieces, strict=True):
        own = [found[id(piece.table)] for piece in pieces]
        errors = [table for table in own if isinstance(table, UserError)]
        if errors:
            columns.append(UserError(f"task '{source.name}': {errors[0]}"))
        else:
            columns.append(_joined([table[source.label] for table in own if isinstance(table, pa.Table)], source))
    return columns


def _joined(columns: list[pa.ChunkedArray], source: TaskSource) -> pa.ChunkedArray | UserError:
    """The labels of several files as one column: numbers if all hold numbers, else text."""
    types = dict.fromkeys(column.type for column in columns)
    if len(types) > 1:
        numbers = all(is_number(kind) or pa.types.is_null(kind) for kind in types)
        try:
            columns = [column.cast(pa.float64() if numbers else pa.string(), safe=False) for column in columns]
        except pa.ArrowException:
            found = " and ".join(str(kind) for kind in types)
            return UserError(
                f"task '{source.name}', label column '{source.label}': found {found} in its files, expected one type"
            )
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)


def task_names(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    if pa.types.is_floating(column.type):  # integers with missing values often come as floats
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        if pc.all(pc.equal(pc.trunc(column), column)).as_py():
            column = column.cast(pa.int64())
    try:
        return column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise UserError(f"data.task: column '{name}' has type {column.type}, expected text or whole numbers") from None


Parsed = tuple[NDArray[np.float64], list[list[str] | None]]
"""A value per row, NaN where missing; for each task None, or the texts in which its values are positions."""
Where = Callable[[int | None], str]
"""A row, or the whole column (None), in words."""


def _in_column(name: str, data: Table) -> Where:
    return lambda row: f"label column '{name}'" + ("" if row is None else f", {data.where(row)}")


def parse_labels(
    column: pa.ChunkedArray,
    where: Where,
    missing: Sequence[float | str],
    task_N: NDArray[np.int64],
    kinds: Sequence[Kind | None],
) -> Parsed:
    """The labels of a column whose rows belong to the tasks `task_N` (-1: none)."""
    kind_of = column.type
    if pa.types.is_dictionary(kind_of):
        column, kind_of = column.cast(kind_of.value_type), kind_of.value_type
    texts: list[list[str] | None] = [None] * len(kinds)
    if is_text(kind_of):
        value, texts = _parse_text(column, where, missing, task_N, kinds)
    elif is_number(kind_of) or pa.types.is_null(kind_of):
        value = pc.cast(column, pa.float64(), safe=False).to_numpy()
        value = np.where(np.isin(value, _numbers(missing)), np.nan, value)
    else:
        hint = ""
        if pa.types.is_nested(kind_of):
            hint = ": one label for each row; token-level tasks are not trained here, several labels need a column each"
        raise UserError(f"{where(None)}: found type {kind_of}, expected numbers, booleans or text{hint}")
    beyond = np.flatnonzero(np.abs(value) > FLOAT32_MAX)
    if len(beyond):
        raise UserError(
            f"{where(int(beyond[0]))}: found {value[beyond[0]]:g}, expected a finite number that fits float32; name it in "
            "data.missing_labels if it means 'missing'"
        )
    return value, texts


def _parse_text(
    column: pa.ChunkedArray,
    where: Where,
    missing: Sequence[float | str],
    task_N: NDArray[np.int64],
    kinds: Sequence[Kind | None],
) -> Parsed:
    """A task whose text is all numbers, or all yes and no, has numbers; mostly numbers is a mistake; other text is classes."""
    code_N, distinct = encode_categories(pc.utf8_trim_whitespace(column))
    texts = distinct.to_pylist()
    number = np.asarray(pd.to_numeric(np.array(texts, dtype=object), errors="coerce"), dtype=float)
    number = np.append(number, np.nan)
    is_missing = np.array([text == "" or text in missing for text in texts] + [True])  # [-1] is null
    is_missing |= np.isin(number, _numbers(missing))
    known_N = ~is_missing[code_N] & (task_N >= 0)
    text_N = known_N & np.isnan(number[code_N])

    word = np.array([*(_WORDS.get(text.lower(), np.nan) for text in texts), np.nan])
    others_T = np.bincount(task_N[known_N & np.isnan(word[code_N])], minlength=len(kinds))
    words_T = (others_T == 0) & [kind is None or isinstance(kind, Binary) for kind in kinds]
    number_N = np.where(words_T[task_N], word[code_N], number[code_N])
    text_N &= np.isnan(number_N)

    labels_T = np.bincount(task_N[known_N], minlength=len(kinds))
    texts_T = np.bincount(task_N[text_N], minlength=len(kinds))
    classes = np.unique(task_N[known_N] * len(texts) + code_N[known_N])
    classes_T = np.bincount(classes // max(len(texts), 1), minlength=len(kinds))
    asked_T = np.array([kind is not None and kind.has_classes for kind in kinds])
    for t in np.flatnonzero((texts_T > 0) & ~asked_T).tolist():
        row = int(np.flatnonzero(text_N & (task_N == t))[0])
        found = f"{where(row)}: found '{texts[code_N[row]]}'"
        num_numbers = labels_T[t] - texts_T[t]
        if kinds[t] is not None or num_numbers > texts_T[t]:
            raise UserError(
                f"{found}, expected a number{f' as in {num_numbers} other rows' if num_numbers else ''}; name it in "
                "data.missing_labels if it means 'missing', or set kind: multiclass"
            )
        if classes_T[t] > max(_MAX_INFERRED_CLASSES, labels_T[t] // _ROWS_PER_INFERRED_CLASS):
            raise UserError(
                f"{found}, one of {classes_T[t]} different texts in {labels_T[t]} rows, expected numbers or classes; mend "
                "it, or set kind: multiclass if each text is a class"
            )
    order_of = list(zip(np.isnan(number).tolist(), np.nan_to_num(number).tolist(), texts, strict=False))
    order = sorted(range(len(texts)), key=order_of.__getitem__)
    rank = np.empty(len(texts) + 1)
    rank[order] = np.arange(len(texts))
    by_rank = [texts[i] for i in order]
    has_text_T = asked_T | (texts_T > 0)
    value = np.where(known_N, np.where(has_text_T[task_N], rank[code_N], number_N), np.nan)
    return value, [by_rank if has_text else None for has_text in has_text_T]


def _numbers(missing: Sequence[float | str]) -> list[float]:
    return [m for m in missing if not isinstance(m, str)]


def _kind(spec: Spec, where: str) -> Kind:
    kind = build(spec, KINDS, where)
    if not isinstance(kind, Kind):
        raise UserError(f"{where}: '{spec.class_path}' is not a subclass of mtrain.model.kinds.Kind")
    return kind


@dataclass(frozen=True)
class _Labels:
    """Labels as they were read: numbers, or positions in `texts` where a task has them.

    label, because: of derived tasks, where their labels are, and what they are.
    """

    names: list[str]
    task_P: NDArray[np.int64]
    row_P: NDArray[np.int64]
    y_P: NDArray[np.float64]
    texts: list[list[str] | None]
    label: dict[str, str] = field(default_factory=dict)
    because: dict[str, str] = field(default_factory=dict)


def _derive(labels: _Labels, num_tasks: int, config: TasksConfig, options: _Options, known: Sequence[str]) -> _Labels:
    """With the derived tasks; of the columns only the first `num_tasks` stay tasks.

    Raises:
        UserError: a label that is not `known`, a name that is taken, or no classes where each is to be a task.
    """
    if not config.derived:
        return labels
    names, texts = labels.names[:num_tasks], labels.texts[:num_tasks]
    kept = labels.task_P < num_tasks
    task, row, y = [labels.task_P[kept]], [labels.row_P[kept]], [labels.y_P[kept]]
    label, because, taken = {}, {}, set(names)

    def add(name: str, own: NDArray[np.bool_], y_P: NDArray[np.float64], of_text: list[str] | None, kind: Kind | None) -> None:
        if name in taken:
            raise UserError(f"tasks.derived: '{name}' is already the name of a task; choose another")
        task.append(np.full(len(y_P), len(names)))
        row.append(labels.row_P[own])
        y.append(y_P)
        names.append(name)
        taken.add(name)
        texts.append(of_text)
        options.add(name, kind)

    for name, derived in config.derived.items():
        if derived.label not in labels.names:
            chained = "a derived task, expected one" if derived.label in config.derived else "no column or task"
            near = "" if derived.label in config.derived else nearest(derived.label, known)
            raise UserError(f"tasks.derived.{name}.label: '{derived.label}' is {chained} that is read from the data{near}")
        source = labels.names.index(derived.label)
        own, of_text, kind = labels.task_P == source, labels.texts[source], options.kind(derived.label)
        y_P = labels.y_P[own]
        if ("{class}" in name) != derived.one_against_rest:
            expected = "{class} in the name, for each class's task" if derived.one_against_rest else "one_against_rest: true"
            raise UserError(f"tasks.derived.{name}: expected {expected}")
        if not derived.one_against_rest:
            add(name, own, y_P, of_text, kind)
            label[name] = derived.label
            continue
        distinct = _Distinct.of(np.zeros_like(row_P := labels.row_P[own]), y_P, 1)
        if kind is None and len(row_P):
            kind, _ = distinct.infer(0, of_text is not None)
        if kind is None or not kind.has_classes:
            raise UserError(
                f"tasks.derived.{name}: '{derived.label}' is {kind.name if kind else 'without labels'}, expected kind "
                "multiclass: one_against_rest makes a task for each class"
            )
        for value, class_name in zip(distinct.values(0), distinct.class_names(0, of_text), strict=True):
            of_class = name.replace("{class}", class_name)
            add(of_class, own, (y_P == value).astype(np.float64), None, Binary())
            label[of_class], because[of_class] = derived.label, f"class {class_name} of {derived.label}"
    return _Labels(names, np.concatenate(task), np.concatenate(row), np.concatenate(y), texts, label, because)


def _finish(labels: _Labels, options: _Options, left_out: Sequence[str] = (), families: bool = False) -> LabelTable:
    """Skip tasks without labels, infer kinds, turn classes into indices, check every label against its kind. With `families`,
    tasks whose names differ only in numbers are of one kind."""
    notes = []
    names, task_P, row_P, y_P, texts = labels.names, labels.task_P, labels.row_P, labels.y_P, labels.texts
    options.check([*names, *labels.label.values(), *left_out])
    count_T = np.bincount(task_P, minlength=len(names))
    empty = [names[t] for t in np.flatnonzero(count_T == 0)]
    if len(empty) == len(names):
        raise UserError(f"none of the {len(names)} tasks has a label; check data.label, tasks.labels and missing_labels")
    if empty:
        notes.append(f"{len(empty)} tasks have no label and are skipped: {some(empty)}")
    keep = np.flatnonzero(count_T)
    renumber = np.cumsum(count_T > 0) - 1
    task_P = renumber[task_P]

    distinct = _Distinct.of(task_P, y_P, len(keep))
    tasks: list[Task] = []
    reasons: list[str] = []
    for t, original in enumerate(keep):
        name = names[original]
        kind, reason = options.kind(name), labels.because.get(name, "as configured")
        if kind is None:
            kind, reason = distinct.infer(t, texts[original] is not None)
        tasks.append(Task(name, kind, labels.label.get(name, name), (), options.weight(name)))
        reasons.append(reason)
    counts = {_family(task.name) for task, reason in zip(tasks, reasons, strict=True) if reason == _COUNTS and families}
    for t, task in enumerate(tasks):
        if _family(task.name) in counts and reasons[t].startswith(_CLASSES):
            tasks[t], reasons[t] = replace(task, kind=Regression()), _COUNTS
    if not any(task.weight for task in tasks):
        raise UserError("tasks.by_name: every task has weight 0, so nothing would be trained; give some a positive weight")

    has_classes_T = np.array([task.kind.has_classes for task in tasks])
    if has_classes_T.any():
        tasks = [
            replace(task, classes=distinct.class_names(t, texts[keep[t]])) if has_classes_T[t] else task
            for t, task in enumerate(tasks)
        ]
        y_P = distinct.ranks(task_P, y_P, has_classes_T)
    result = LabelTable(TaskTable(tuple(tasks)), task_P, row_P, y_P, reasons, notes)
    _check_kinds(result, distinct)
    return result


def _family(name: str) -> str:
    """The name without its numbers."""
    return re.sub(r"\d+", "#", name)


@dataclass(frozen=True)
class _Distinct:
    """The distinct labels of each task, sorted."""

    start_T: NDArray[np.int64]
    count_T: NDArray[np.int64]
    labels_T: NDArray[np.int64]
    value: NDArray[np.float64]

    @staticmethod
    def of(task_P: NDArray[np.int64], y_P: NDArray[np.float64], num_tasks: int) -> _Distinct:
        labels = SortedLabels.of(task_P, y_P, np.ones(num_tasks, dtype=np.int64))
        task, y = labels.task_P, labels.y_P
        new = np.ones(len(y), dtype=bool)
        new[1:] = (task[1:] != task[:-1]) | (y[1:] != y[:-1])
        count_T = np.bincount(task[new], minlength=num_tasks)
        return _Distinct(np.cumsum(count_T) - count_T, count_T, labels.count_T.astype(np.int64), y[new])

    def values(self, t: int) -> NDArray[np.float64]:
        return self.value[self.start_T[t] : self.start_T[t] + self.count_T[t]]

    def ranks(self, task_P: NDArray[np.int64], y_P: NDArray[np.float64], use_T: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Each label's rank among the distinct ones of its task, for the tasks to use; else the label."""
        y_P, order, end_T = y_P.copy(), by_task(task_P, len(use_T)), np.cumsum(self.labels_T)
        for t in np.flatnonzero(use_T).tolist():
            own = order[end_T[t] - self.labels_T[t] : end_T[t]]
            y_P[own] = np.searchsorted(self.values(t), y_P[own])
        return y_P

    def infer(self, t: int, is_text: bool) -> tuple[Kind, str]:
        values = self.values(t)
        if is_text:
            return Multiclass(), f"text, {len(values)} classes"
        if np.isin(values, (0.0, 1.0)).all():
            return Binary(), "only 0 and 1"
        if (values == np.round(values)).all():
            low, high = int(values[0]), int(values[-1])
            contiguous = high - low + 1 == len(values)
            frequent = self.labels_T[t] >= _ROWS_PER_INFERRED_CLASS * len(values)
            if low in (0, 1) and contiguous and 3 <= len(values) <= _MAX_INFERRED_CLASSES and frequent:
                return Multiclass(), f"{_CLASSES} {low} to {high}"
            return Regression(), _COUNTS
        return Regression(), "real numbers"

    def class_names(self, t: int, texts: list[str] | None) -> tuple[str, ...]:
        values = self.values(t)
        if texts is not None:
            return tuple(texts[int(v)] for v in values)
        return tuple(str(int(v)) if v == int(v) else repr(float(v)) for v in values)


def _check_kinds(table: LabelTable, distinct: _Distinct) -> None:
    for kind, at in table.tasks.by_kind().items():
        if type(kind).problem is Kind.problem or kind.has_classes:
            continue
        for value in np.unique(np.concatenate([distinct.values(t) for t in at])).tolist():
            problem = kind.problem(value)
            if problem:
                p = np.flatnonzero(np.isin(table.task_P, at) & (table.y_P == value))[0]
                task = table.tasks[int(table.task_P[p])]
                raise UserError(_refused(f"label of task '{task.name}', row {table.row_P[p] + 1}", value, kind, problem))


def _refused(where: str, value: float, kind: Kind, problem: str) -> str:
    return (
        f"{where}: found {value:g}, {problem} for kind {kind.name}; name it in data.missing_labels if it means 'missing', "
        "or set another kind"
    )

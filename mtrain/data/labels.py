"""Label columns to numbers: which tasks there are, of which kind, and all their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrain.components import Spec, build
from mtrain.config import Selection, TasksConfig
from mtrain.data.sources import require, to_arrow
from mtrain.errors import UserError, nearest
from mtrain.model.kinds import KINDS, Binary, Kind, Multiclass, Regression
from mtrain.tasks import Task, TaskTable

_MAX_INFERRED_CLASSES = 20
_ROWS_PER_INFERRED_CLASS = 10


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


def select(names: Sequence[str], selection: Selection, key: str) -> list[str]:
    """The names that match the selection; a pattern that matches nothing is an error."""
    for pattern in [*selection.include, *selection.exclude]:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"{key}: '{pattern}' matches no column or task{nearest(pattern, names)}")
    twice = next((p for i, p in enumerate(selection.include) if p in selection.include[:i]), None)
    if twice is not None:
        raise UserError(f"{key}: '{twice}' occurs twice, expected unique task names")
    return [
        name
        for name in names
        if any(fnmatchcase(name, p) for p in selection.include) and not any(fnmatchcase(name, p) for p in selection.exclude)
    ]


def read_grid(data: datasets.Dataset, columns: list[str], config: TasksConfig, missing: Sequence[float | str]) -> LabelTable:
    """One task per label column; NaN, null, empty text and `missing` are no label."""
    if not columns:
        raise UserError("tasks.labels: no label column is left; name them in tasks.labels")
    table = to_arrow(data, columns)
    kinds = [_configured_kind(name, config) for name in columns]
    parsed = [_parse(table[name], name, missing, kind) for name, kind in zip(columns, kinds, strict=True)]
    row_of = [np.flatnonzero(~np.isnan(column.value)) for column in parsed]
    count_T = np.array([len(rows) for rows in row_of])
    return _finish(
        names=columns,
        labels=columns,
        task_P=np.repeat(np.arange(len(columns)), count_T),
        row_P=np.concatenate(row_of),
        y_P=np.concatenate([column.value[rows] for column, rows in zip(parsed, row_of, strict=True)]),
        texts=[column.texts for column in parsed],
        config=config,
    )


def read_long(data: datasets.Dataset, task: str, label: str, config: TasksConfig, missing: Sequence[float | str]) -> LabelTable:
    """One task per value of the task column (layouts routed and pairs)."""
    require(data.column_names, task, "data.task")
    require(data.column_names, label, "data.label")
    table = to_arrow(data, [task, label])
    encoded = pc.dictionary_encode(table[task].cast(pa.string())).combine_chunks()
    if encoded.null_count:
        row = int(np.flatnonzero(encoded.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"column '{task}', row {row + 1}: found no task name, expected one in each row")
    all_names = encoded.dictionary.to_pylist()
    names = select(all_names, config.labels, "tasks.labels")
    position = np.full(len(all_names), -1)
    position[[all_names.index(name) for name in names] if len(names) < len(all_names) else slice(None)] = np.arange(len(names))
    task_N = position[encoded.indices.to_numpy()]
    wanted = {_configured_kind(name, config) for name in names}
    column = _parse(table[label], label, missing, wanted.pop() if len(wanted) == 1 else None)
    row_P = np.flatnonzero((task_N >= 0) & ~np.isnan(column.value))
    result = _finish(
        names=names,
        labels=names,
        task_P=task_N[row_P],
        row_P=row_P,
        y_P=column.value[row_P],
        texts=[column.texts] * len(names),
        config=config,
    )
    left_out = len(task_N) - len(row_P)
    if left_out:
        result.notes.append(f"{left_out} rows without a label or of tasks that are not selected are left out")
    return result


@dataclass(frozen=True)
class _Column:
    value: NDArray[np.float64]  # numbers, or positions in `texts`; NaN is missing
    texts: list[str] | None


def _parse(column: pa.ChunkedArray, name: str, missing: Sequence[float | str], kind: Kind | None) -> _Column:
    kind_of = column.type
    if pa.types.is_dictionary(kind_of):
        column, kind_of = column.cast(kind_of.value_type), kind_of.value_type
    if pa.types.is_boolean(kind_of) or pa.types.is_integer(kind_of) or pa.types.is_decimal(kind_of):
        column, kind_of = column.cast(pa.float64()), pa.float64()
    if pa.types.is_null(kind_of):
        return _Column(np.full(len(column), np.nan), None)
    if pa.types.is_floating(kind_of):
        value = np.array(column.cast(pa.float64()).to_numpy(), dtype=np.float64)
        infinite = np.flatnonzero(np.isinf(value))
        if len(infinite):
            raise UserError(
                f"label column '{name}', row {infinite[0] + 1}: found {value[infinite[0]]}, expected a finite number; "
                "name it in data.missing_labels if it means 'missing'"
            )
        value[np.isin(value, [m for m in missing if isinstance(m, int | float)])] = np.nan
        return _Column(value, None)
    if not (pa.types.is_string(kind_of) or pa.types.is_large_string(kind_of)):
        raise UserError(f"label column '{name}': found type {kind_of}, expected numbers, booleans or text")
    return _parse_text(column, name, missing, kind)


def _parse_text(column: pa.ChunkedArray, name: str, missing: Sequence[float | str], kind: Kind | None) -> _Column:
    """Text that is all numbers is numbers; text that is mostly numbers has a mistake in it; other text is classes."""
    encoded = pc.dictionary_encode(pc.utf8_trim_whitespace(column)).combine_chunks()
    texts = encoded.dictionary.to_pylist()
    code_N = encoded.indices.fill_null(-1).to_numpy()
    is_missing = np.array([text == "" or text in map(str, missing) for text in texts] + [True])  # [-1] is null
    number = np.append(pd.to_numeric(pd.Series(texts, dtype=object), errors="coerce").to_numpy(float), np.nan)
    number[np.isin(number, [m for m in missing if isinstance(m, int | float)])] = np.nan
    known_N = ~is_missing[code_N]
    text_N = known_N & np.isnan(number[code_N])
    if not text_N.any() and not (kind and kind.has_classes):
        return _Column(np.where(known_N, number[code_N], np.nan), None)
    num_numbers = int(known_N.sum() - text_N.sum())
    wants_classes = kind is not None and kind.has_classes
    if not wants_classes and (num_numbers > text_N.sum() or kind is not None):
        row = int(np.flatnonzero(text_N)[0])
        raise UserError(
            f"label column '{name}', row {row + 1}: found '{texts[code_N[row]]}', expected a number as in the other "
            f"{num_numbers} rows; name it in data.missing_labels if it means 'missing', or set kind: multiclass"
        )
    order = sorted(range(len(texts)), key=lambda i: (np.isnan(number[i]), number[i], texts[i]))
    rank = np.empty(len(texts) + 1)
    rank[order] = np.arange(len(texts))
    return _Column(np.where(known_N, rank[code_N], np.nan), [texts[i] for i in order])


def _configured_kind(name: str, config: TasksConfig) -> Kind | None:
    spec, where = config.kind, "tasks.kind"
    for pattern, options in config.by_name.items():
        if fnmatchcase(name, pattern) and options.kind is not None:
            spec, where = options.kind, f"tasks.by_name.{pattern}.kind"
    return None if spec is None else _kind(spec, where)


def _kind(spec: Spec, where: str, _cache: dict[str, Kind] = {}) -> Kind:  # noqa: B006
    text = spec.model_dump_json()
    if text not in _cache:
        kind = build(spec, KINDS, where)
        if not isinstance(kind, Kind):
            raise UserError(f"{where}: '{spec.class_path}' is not a subclass of mtrain.model.kinds.Kind")
        _cache[text] = kind
    return _cache[text]


def _finish(
    names: list[str],
    labels: list[str],
    task_P: NDArray[np.int64],
    row_P: NDArray[np.int64],
    y_P: NDArray[np.float64],
    texts: list[list[str] | None],
    config: TasksConfig,
) -> LabelTable:
    """Skip tasks without labels, infer kinds, turn classes into indices, check every label against its kind."""
    notes = []
    for pattern in config.by_name:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"tasks.by_name: '{pattern}' matches no task{nearest(pattern, names)}")
    count_T = np.bincount(task_P, minlength=len(names))
    empty = [names[t] for t in np.flatnonzero(count_T == 0)]
    if len(empty) == len(names):
        raise UserError(f"none of the {len(names)} tasks has a label; check data.label, tasks.labels and missing_labels")
    if empty:
        notes.append(f"{len(empty)} tasks have no label and are skipped: {_some(empty)}")
    keep = np.flatnonzero(count_T)
    renumber = np.cumsum(count_T > 0) - 1
    task_P = renumber[task_P]

    distinct = _Distinct.of(task_P, y_P, len(keep))
    tasks, reasons = [], []
    for t, original in enumerate(keep):
        kind, reason = _configured_kind(names[original], config), "as configured"
        if kind is None:
            kind, reason = distinct.infer(t, texts[original] is not None)
        weights = [o.weight for p, o in config.by_name.items() if fnmatchcase(names[original], p) and o.weight is not None]
        tasks.append(Task(names[original], kind, labels[original], (), weights[-1] if weights else 1.0))
        reasons.append(reason)

    has_classes_T = np.array([task.kind.has_classes for task in tasks])
    if has_classes_T.any():
        tasks = [
            replace(task, classes=distinct.class_names(t, texts[keep[t]])) if has_classes_T[t] else task
            for t, task in enumerate(tasks)
        ]
        y_P = np.where(has_classes_T[task_P], distinct.rank_P, y_P)
    result = LabelTable(TaskTable(tuple(tasks)), task_P, row_P, y_P, reasons, notes)
    _check_kinds(result)
    return result


@dataclass(frozen=True)
class _Distinct:
    """The distinct labels of each task, sorted, and the rank of each label among them."""

    start_T: NDArray[np.int64]
    count_T: NDArray[np.int64]
    labels_T: NDArray[np.int64]
    value: NDArray[np.float64]
    rank_P: NDArray[np.int64]

    @staticmethod
    def of(task_P: NDArray[np.int64], y_P: NDArray[np.float64], num_tasks: int) -> _Distinct:
        order = np.lexsort((y_P, task_P))
        task, y = task_P[order], y_P[order]
        new = np.ones(len(order), dtype=bool)
        new[1:] = (task[1:] != task[:-1]) | (y[1:] != y[:-1])
        count_T = np.bincount(task[new], minlength=num_tasks)
        start_T = np.cumsum(count_T) - count_T
        rank_P = np.empty(len(order), dtype=np.int64)
        rank_P[order] = np.cumsum(new) - 1 - start_T[task]
        return _Distinct(start_T, count_T, np.bincount(task_P, minlength=num_tasks), y[new], rank_P)

    def values(self, t: int) -> NDArray[np.float64]:
        return self.value[self.start_T[t] : self.start_T[t] + self.count_T[t]]

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
                return Multiclass(), f"whole numbers {low} to {high}"
            return Regression(), "whole numbers; set kind: poisson or multiclass for counts or classes"
        return Regression(), "real numbers"

    def class_names(self, t: int, texts: list[str] | None) -> tuple[str, ...]:
        values = self.values(t)
        if texts is not None:
            return tuple(texts[int(v)] for v in values)
        return tuple(str(int(v)) if v == int(v) else repr(float(v)) for v in values)


def _check_kinds(table: LabelTable) -> None:
    for kind, at in table.tasks.by_kind().items():
        if type(kind).problem is Kind.problem:
            continue
        of_kind = np.zeros(len(table.tasks), dtype=bool)
        of_kind[at] = True
        candidates = np.flatnonzero(of_kind[table.task_P])
        for value in np.unique(table.y_P[candidates]):
            problem = kind.problem(float(value))
            if problem:
                p = candidates[table.y_P[candidates] == value][0]
                task = table.tasks[int(table.task_P[p])]
                raise UserError(
                    f"label of task '{task.name}', row {table.row_P[p] + 1}: found {value:g}, {problem} for kind "
                    f"{kind.name}; name it in data.missing_labels if it means 'missing', or set another kind"
                )


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

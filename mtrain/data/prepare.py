"""From a config to tensors: open the table, read labels, encode inputs, split, fit on training rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrain.components import Spec, build
from mtrain.config import Config
from mtrain.data import FEATURES
from mtrain.data.batch import Grid, Pairs
from mtrain.data.features import (
    Encoded,
    Feature,
    encode_column,
    encode_rows,
    in_one_line,
    infer_feature,
    is_text,
    transform_rows,
)
from mtrain.data.files import open_tasks
from mtrain.data.inputs import ChunkedInputs, FeatureColumn, Inputs, MemoryInputs, fitting_sample
from mtrain.data.labels import LabelTable, read_files, read_grid, read_long, select
from mtrain.data.loader import WINDOW, Part
from mtrain.data.sources import is_glob, open_data, require
from mtrain.data.splits import KEEPS_KEYS, SOURCE, overlap, split, split_hash
from mtrain.data.statistics import with_statistics
from mtrain.data.tables import ReadError, Table, sample
from mtrain.errors import UserError, matches, nearest
from mtrain.tasks import TaskTable

UNNAMED = "Unnamed: "  # so pandas calls a column without a name: mostly row numbers
_REPEATED = 0.5  # share of distinct values up to which a slow feature is computed before
_SMALL_TABLE, _PROBED_ROWS = 20_000, 64
T = TypeVar("T", pa.Table, pa.ChunkedArray)
_GRID_DENSITY = 0.02  # sparser tables are kept as pairs, denser pairs as a grid


@dataclass
class Source:
    """The table, its labels and its encoded inputs: all that does not depend on the split.

    A *unit* is what a split deals out: a row, for pairs a label. `input_U` is the input row of each unit, `row_U` its row
    in the table, and `row_N` the row in the table of each input row. `chunked`: inputs are not encoded here, but read by
    the chunk while training.
    """

    config: Config
    table: Table
    labels: LabelTable
    features: list[FeatureColumn]
    chunked: bool
    input_U: NDArray[np.int64]
    row_U: NDArray[np.int64]
    row_N: NDArray[np.int64]
    weight_U: NDArray[np.float64] | None
    notes: list[str]

    @property
    def num_inputs(self) -> int:
        return len(self.row_N)

    def input_specs(self) -> dict[str, list[Spec]]:
        """The features as a config has them, with inferred ones written out."""
        specs: dict[str, list[Spec]] = {}
        for item in self.features:
            for name in item.columns:
                specs.setdefault(name, []).append(item.spec)
        return self.config.inputs or specs

    @contextmanager
    def named_rows(self, row_N: NDArray[np.int64]) -> Iterator[None]:
        """Messages of the inner code count rows of the selection `row_N`; say the row of the table, or of the task's file."""
        try:
            yield
        except UserError as error:
            where = self.table.where if self.config.data.layout == "files" else lambda row: f"row {row + 1}"
            text = re.sub(r"\brow (\d+)\b(?!')", lambda m: where(int(row_N[(int(m[1]) - 1) % len(row_N)])), str(error))
            raise UserError(text) from None

    @cached_property
    def repeated(self) -> int:
        """Pairs: how many labels have the same input and task as another before them."""
        if self.config.data.layout != "pairs":
            return 0
        cell_P = np.sort(self.input_U[self.labels.row_P] * len(self.labels.tasks) + self.labels.task_P)
        return int((cell_P[1:] == cell_P[:-1]).sum())

    def column(self, name: str, key: str = "split.column") -> pa.ChunkedArray | NDArray[Any]:
        """A column, one value per unit."""
        if name == SOURCE and name not in self.table.column_names:
            raise UserError("split.by: sources needs named splits; give data.path as {train: FILE, test: FILE}")
        require(self.table.column_names, name, key)
        column = _take(self.table.read([name])[name], self.row_U)
        return column.to_numpy() if pa.types.is_floating(column.type) else column  # NaN in numpy is missing


@dataclass
class Prepared:
    """One split: inputs, parts, and the task table with its training statistics.

    `split_rows` are the rows of the source table (pairs: their labels) in each part.
    """

    tasks: TaskTable
    inputs: Inputs
    parts: dict[str, Part]
    features: list[FeatureColumn]
    split_rows: dict[str, NDArray[np.int64]]
    split_hash: str
    overlap: float | None
    notes: list[str]

    @property
    def widths(self) -> list[tuple[list[str], int]]:
        """Of each feature the columns that it reads, and its width."""
        return [(item.columns, item.feature.width) for item in self.features]


def read_source(config: Config, beside: Path | None = None) -> Source:
    """Open the table and compute what no split changes.

    Raises:
        UserError: anything that is wrong with the table, its labels or its inputs.
    """
    of_data = config.data
    files = open_tasks(config, beside) if of_data.layout == "files" else None
    table, chunked = (files.table, files.streaming) if files else open_data(of_data, beside)
    columns = table.column_names if files is None else files.columns
    for name in ("key", "task", "label", "weight"):
        if (column := getattr(of_data, name)) is not None and not (files and name == "label"):
            require(columns, column, f"data.{name}")
    if config.split.column is not None:
        require(columns, config.split.column, "split.column")
    input_columns = match_inputs(config, columns)
    reserved: set[str | None] = {of_data.key, of_data.task, of_data.label, of_data.weight, config.split.column, SOURCE}

    label_columns: list[str] = []
    derived_from = {task.label for task in config.tasks.derived.values()}
    row_U = np.arange(len(table))
    if of_data.layout == "grid":
        label_columns = label_columns_of(config, columns, reserved.union(*(group[0] for group in input_columns)))
        labels = read_grid(table, label_columns, config.tasks, of_data.missing_labels)
    else:
        if any(of_data.label in group[0] for group in input_columns):
            raise UserError(f"inputs: column '{of_data.label}' holds the labels (data.label); leave it out of inputs")
        if files is not None:
            labels = read_files(files, config.tasks, of_data.missing_labels, of_data.on_error)
        else:
            assert of_data.task is not None
            assert of_data.label is not None
            labels = read_long(table, of_data.task, of_data.label, config.tasks, of_data.missing_labels)
        row_U = labels.row_P  # a unit is a label
        labels = replace(labels, row_P=np.arange(len(row_U)))
    notes = [*(files.notes if files else []), *labels.notes]
    if not config.inputs:
        free = [c for c in columns if c not in reserved.union(label_columns, derived_from)]
        if unnamed := [c for c in free if c.startswith(UNNAMED)]:
            free = [c for c in free if c not in unnamed]
            notes.append(f"{len(unnamed)} columns have no name in the file and are not inputs: {', '.join(unnamed[:5])}")
        if not free:
            raise UserError("inputs: no column is left for inputs; name the label columns in tasks.labels, or the inputs")
        input_columns = [([c], spec) for c, spec in _inferred(table, free).items()]
    features = [FeatureColumn(names, spec, _feature(spec, names)) for names, spec in input_columns]
    if not chunked and (size := _encoded_bytes(table, features, len(row_U))) > of_data.memory_gb * 1e9:
        chunked = True
        notes.append(f"inputs take {size / 1e9:.1f} GB, more than data.memory_gb ({of_data.memory_gb:g}): read by the chunk")

    source = Source(config, table, labels, features, chunked, np.arange(len(row_U)), row_U, row_U, None, notes)
    if of_data.weight is not None:
        with source.named_rows(row_U):
            source.weight_U = _weights(_take(table.read([of_data.weight])[of_data.weight], row_U), of_data.weight)
    if of_data.layout == "pairs":
        assert of_data.key is not None
        if chunked:
            notes.append(f"inputs of rows with the same {of_data.key} are not compared where they are read by the chunk")
        compared = [] if chunked else [c for group in input_columns for c in group[0]]
        with source.named_rows(row_U):
            source.input_U, first = _entities(table, row_U, of_data.key, compared)
        source.row_N = row_U[first]
    if chunked:
        _encode_distinct(source)
        return source
    try:
        _encode(source)
    except UserError:
        if of_data.on_error == "stop":
            raise
        return replace(source, chunked=True)  # what cannot be read is then left out task by task
    return _without_invalid(source)


def _encode(source: Source) -> None:
    """All inputs, in memory."""
    with source.named_rows(source.row_N):
        for item in source.features:
            rows = _take(source.table.read(item.columns), source.row_N)
            item.encoded = encode_column(rows, item.columns, item.feature, source.config.data.workers)


def _encode_distinct(source: Source) -> None:
    """Slow features of values that repeat, as a molecule does in many tasks: once for each value, in parallel."""
    for item in source.features:
        if not item.feature.cached or len(item.columns) > 1:
            continue
        try:
            column = _take(source.table.read(item.columns)[item.columns[0]], source.row_N)
        except ReadError:
            if source.config.data.on_error == "stop":
                raise
            continue
        if not is_text(column.type):
            continue
        whole = pc.dictionary_encode(column, null_encoding="encode").combine_chunks()
        if len(whole.dictionary) > _REPEATED * len(column):
            continue
        _, first = np.unique(whole.indices.to_numpy(), return_index=True)
        rows = pa.table({item.columns[0]: whole.dictionary})
        with source.named_rows(source.row_N[first]):
            item.encoded = encode_column(rows, item.columns, item.feature, source.config.data.workers)
        item.distinct = whole.dictionary


def label_columns_of(config: Config, columns: list[str], used: set[str | None]) -> list[str]:
    """grid: the columns that hold labels."""
    chosen = config.tasks.labels
    if chosen.include == ["*"] and not config.inputs:
        raise UserError(
            "which columns are labels is not said: name them in tasks.labels.include, or name the input columns in inputs"
        )
    candidates = columns if chosen.include != ["*"] else [c for c in columns if c not in used]
    found = select(candidates, chosen, "tasks.labels", known=columns)
    derived = [task.label for task in config.tasks.derived.values()]
    if both := [name for name in [*found, *derived] if name in used - {config.split.column}]:
        raise UserError(f"tasks.labels: column '{both[0]}' is also an input, key or weight; it can be only one of them")
    return found


def prepare(source: Source, seed: int) -> Prepared:
    """Split the units, fit features and targets on the training part, build tensors."""
    config, labels, notes = source.config, source.labels, list(source.notes)
    num_units = len(source.input_U)
    task_N = pa.array(labels.tasks.names).take(pa.array(labels.task_P)) if config.data.layout != "grid" else None
    with source.named_rows(source.row_U):
        key_U = source.column(config.data.key, "data.key") if config.data.key else None
        units = split(
            config.split,
            seed,
            n=num_units,
            columns=source.column,
            known=source.table.column_names,
            task_N=task_N,
            key=key_U,
        )
    if key_U is not None and config.split.by not in KEEPS_KEYS and "test" in units:
        repeated = overlap(_take(key_U, units["train"]), _take(key_U, units["test"]))
        if repeated > 0:
            notes.append(
                f"split.by {config.split.by} does not keep rows of one {config.data.key} together: {repeated:.0%} of the test "
                "rows have one that is also in training; by: group would"
            )
    if "valid" not in units:
        for key, given in (("split.refit", config.split.refit), ("select.patience", config.select.patience)):
            if given:
                raise UserError(f"{key}: needs a valid part, but the split has only {', '.join(units)}; add one to split.parts")
    in_part = {name: np.zeros(num_units, dtype=bool) for name in units}
    for name, unit in units.items():
        in_part[name][unit] = True
    train_P = in_part["train"][labels.row_P]
    if not train_P.any():
        raise UserError("split: the train part holds no label; give it more rows")
    if source.weight_U is not None and not source.weight_U[units["train"]].any():
        raise UserError(f"data.weight: column '{config.data.weight}' is 0 in every training row, expected positive weights")

    is_train_N = np.zeros(source.num_inputs, dtype=bool)
    is_train_N[source.input_U[units["train"]]] = True
    train_inputs = np.flatnonzero(is_train_N)
    inputs = _chunked_inputs(source, train_inputs, seed, notes) if source.chunked else _memory_inputs(source, train_inputs)
    notes += [note for item in source.features for note in item.feature.notes]
    if inputs.width == 0:
        raise UserError("inputs: no input column is left after constant columns were dropped")

    tasks = with_statistics(
        labels.tasks, labels.task_P[train_P], labels.y_P[train_P], config.objective.targets, config.data.layout != "grid"
    )
    center_T, scale_T = tasks.stats["center"], tasks.stats["scale"]
    y_P = (labels.y_P - center_T[labels.task_P]) / scale_T[labels.task_P]
    standardized = any(task.kind.standardized for task in tasks)
    masks = {name: in_part[name][labels.row_P] for name in units}
    if (most := config.split.eval_rows) is not None:
        for name in units.keys() - {"train"}:
            masks[name] = _bounded(masks[name], labels.task_P, most, seed)
    parts = {
        name: _part(
            source,
            labels.task_P[mask],
            labels.row_P[mask],
            y_P[mask],
            labels.y_P[mask] if standardized and name != "train" else None,
            len(tasks),
        )
        for name, mask in masks.items()
    }
    if source.repeated:
        notes.append(f"{source.repeated} labels have the same key and task as another; all count")
    absent = [tasks[int(t)].name for t in np.flatnonzero(tasks.stats["train_labels"] == 0)]
    if absent:
        notes.append(f"{len(absent)} tasks have no training label and stay at their initial head: {', '.join(absent[:5])}")
    shared = None
    if "test" in units and isinstance(inputs, MemoryInputs):
        rows = _row_hash(inputs.x_NF)
        shared = overlap(
            rows[torch.from_numpy(train_inputs)].numpy(), rows[torch.from_numpy(source.input_U[units["test"]])].numpy()
        )
    rows_of = {name: source.row_U[unit] for name, unit in units.items()}
    return Prepared(tasks, inputs, parts, source.features, rows_of, split_hash(rows_of), shared, notes)


def _bounded(mask_P: NDArray[np.bool_], task_P: NDArray[np.int64], most: int, seed: int) -> NDArray[np.bool_]:
    """At most so many labels of each task, drawn at random."""
    chosen = np.random.default_rng([seed, 2]).permutation(np.flatnonzero(mask_P))
    order = np.argsort(task_P[chosen], kind="stable")
    count_T = np.bincount(task_P[chosen])
    rank = np.arange(len(chosen)) - np.repeat(np.cumsum(count_T) - count_T, count_T)
    bounded_P = np.zeros_like(mask_P)
    bounded_P[chosen[order[rank < most]]] = True
    return bounded_P


def _feature(spec: Spec, columns: list[str]) -> Feature:
    feature = build(spec, FEATURES, f"inputs.{columns[0]}")
    if not isinstance(feature, Feature):
        raise UserError(
            f"inputs.{columns[0]}: '{spec.class_path}' is not a mtrain.data.features.Feature; derive it from that class"
        )
    return feature


def _memory_inputs(source: Source, train_inputs: NDArray[np.int64]) -> MemoryInputs:
    blocks = []
    for item in source.features:
        assert item.encoded is not None
        item.feature = _feature(item.spec, item.columns)
        with in_one_line(item.feature, item.columns):
            item.feature.fit(item.encoded.values[train_inputs], item.columns)
        with source.named_rows(source.row_N):
            blocks.append(transform_rows(item.encoded, item.columns, item.feature))
    return MemoryInputs(torch.from_numpy(np.concatenate(blocks, axis=1, dtype=np.float32)))


def _chunked_inputs(source: Source, train_inputs: NDArray[np.int64], seed: int, notes: list[str]) -> ChunkedInputs:
    """Features are fitted on some chunks, or all if they are few."""
    config = source.config.data
    budget, skip = config.memory_gb * 1e9, config.on_error == "skip_task"
    features = [replace(item, feature=_feature(item.spec, item.columns)) for item in source.features]
    values, read = fitting_sample(source.table, source.row_N[train_inputs], features, config.fit_rows, seed, skip_failed=skip)
    for item, of_feature in zip(features, values, strict=True):
        with in_one_line(item.feature, item.columns):
            item.feature.fit(of_feature, item.columns)
    if len(values[0]) < len(train_inputs):
        notes.append(f"inputs are fitted on {len(values[0])} of {len(train_inputs)} training rows (data.fit_rows)")
    source.features = features
    inputs = ChunkedInputs(source.table, source.row_N, features, budget, config.max_invalid * source.num_inputs, skip)
    for chunk, encoded in read.items():
        inputs.put(chunk, encoded)
    in_use = _bytes_in_use(source, inputs)
    if in_use > budget:
        notes.append(
            f"the chunks that are in use at once can take {in_use / 1e9:.2g} GB, more than data.memory_gb "
            f"({config.memory_gb:g}): they are read again and again; raise it, lower data.chunk_rows (Parquet: write smaller "
            "row groups), or give each task a file with mtrain partition"
        )
    return inputs


def _bytes_in_use(source: Source, inputs: ChunkedInputs) -> float:
    """One chunk for each task, or all chunks if they are fewer; where rows are not drawn by task, those shuffled together."""
    size_C = np.diff(source.table.start_C)
    if source.config.data.by_task:
        most_T = np.zeros(len(source.labels.tasks), dtype=np.int64)
        np.maximum.at(most_T, source.labels.task_P, size_C[inputs.chunk_N[source.input_U[source.labels.row_P]]])
        rows = min(most_T.sum(), size_C.sum())
    else:
        rows = np.sort(size_C)[-WINDOW:].sum()
    return 4.0 * inputs.width * float(rows)


def match_inputs(config: Config, columns: list[str]) -> list[tuple[list[str], Spec]]:
    matched, there = [], set(columns)
    for pattern, specs in config.inputs.items():
        one = pattern in there and not is_glob(pattern)  # many inputs are named one by one
        names = [pattern] if one else [c for c in columns if matches(c, pattern)]
        if not names:
            raise UserError(f"inputs: no column '{pattern}' in the data{nearest(pattern, columns)}")
        matched += [(names, spec) for spec in specs]
    return matched


def _take(values: T, row_N: NDArray[np.int64]) -> T:
    """Rows of a table or column; itself, uncopied, where they are all of them."""
    return values if len(row_N) == len(values) else values.take(row_N)


def _inferred(table: Table, columns: list[str]) -> dict[str, Spec]:
    """Features by the values of some rows."""
    values = sample(table, columns)
    return {column: infer_feature(values.schema.field(column), values[column]) for column in columns}


def _encoded_bytes(table: Table, features: list[FeatureColumn], num_inputs: int) -> float:
    """About the memory that all inputs would take, from their first rows."""
    if num_inputs < _SMALL_TABLE:
        return 0.0
    columns = list(dict.fromkeys(name for item in features for name in item.columns))
    first = table.read_chunk(0, columns).slice(0, _PROBED_ROWS)
    width = sum(encode_rows(first.select(item.columns), item.feature).values.shape[1] for item in features)
    return 4.0 * num_inputs * width


def _entities(
    source: Table, row_U: NDArray[np.int64], key: str, inputs: list[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of the entity of each unit and the first unit of each entity; its inputs must be the same everywhere."""
    table = _take(source.read(list(dict.fromkeys([key, *inputs]))), row_U)
    encoded = pc.dictionary_encode(table[key]).combine_chunks()
    if encoded.null_count:
        raise UserError(f"data.key: column '{key}' has {encoded.null_count} missing values, expected one in each row")
    entity = encoded.indices.to_numpy().astype(np.int64)
    _, first = np.unique(entity, return_index=True)
    for name in inputs:
        same = pc.equal(table[name], table[name].take(first[entity])) if not pa.types.is_nested(table[name].type) else None
        if same is not None and (differs := np.flatnonzero(~same.fill_null(True).to_numpy())).size:
            row = differs[0]
            raise UserError(
                f"column '{name}', row {row + 1}: another value than in row {first[entity[row]] + 1}, which has the same "
                f"{key} '{encoded.dictionary[int(entity[row])]}'; expected one input per key"
            )
    return entity, first


def _weights(values: pa.ChunkedArray, column: str) -> NDArray[np.float64]:
    try:
        weight = values.to_numpy().astype(np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"data.weight: column '{column}' is not numeric ({error}), expected numbers >= 0") from None
    bad = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
    if len(bad):
        raise UserError(f"data.weight: column '{column}', row {bad[0] + 1}: found {weight[bad[0]]}, expected >= 0")
    return weight


def _without_invalid(source: Source) -> Source:
    """Leave out the rows whose inputs cannot be used, up to the limit."""
    valid_N = np.ones(source.num_inputs, dtype=bool)
    for item in source.features:
        assert item.encoded is not None
        valid_N &= item.encoded.valid
    if valid_N.all():
        return source
    num_bad = int((~valid_N).sum())
    first = int(np.argmax(source.input_U == np.argmin(valid_N)))
    limit = source.config.data.max_invalid
    if num_bad > limit * len(valid_N):
        raise UserError(
            f"inputs: {num_bad} of {len(valid_N)} cannot be used (first: row {source.row_U[first] + 1}), more than "
            f"data.max_invalid ({limit:g}); mend them or raise it"
        )
    if not valid_N.any():
        raise UserError(f"inputs: none of the {len(valid_N)} can be used (first: row {source.row_U[first] + 1})")
    source.notes.append(f"{num_bad} of {len(valid_N)} inputs cannot be used: their rows are left out")
    for item in source.features:
        assert item.encoded is not None
        item.encoded = Encoded(item.encoded.values[valid_N], item.encoded.valid[valid_N])
    return _keep_units(source, valid_N[source.input_U], valid_N)


def _keep_units(source: Source, keep_U: NDArray[np.bool_], keep_N: NDArray[np.bool_]) -> Source:
    """The source with some of its units and inputs only."""
    labels = source.labels
    keep_P = keep_U[labels.row_P]
    new_unit, new_input = np.cumsum(keep_U) - 1, np.cumsum(keep_N) - 1
    return replace(
        source,
        labels=replace(labels, task_P=labels.task_P[keep_P], row_P=new_unit[labels.row_P[keep_P]], y_P=labels.y_P[keep_P]),
        input_U=new_input[source.input_U[keep_U]],
        row_U=source.row_U[keep_U],
        row_N=source.row_N[keep_N],
        weight_U=None if source.weight_U is None else source.weight_U[keep_U],
    )


def _part(
    source: Source,
    task_P: NDArray[np.int64],
    unit_P: NDArray[np.int64],
    y_P: NDArray[np.float64],
    original_P: NDArray[np.float64] | None,
    num_tasks: int,
) -> Part:
    """Labels of a part over the input rows that have one; dense unless very sparse, repeated or rows of one task each."""
    input_P = source.input_U[unit_P]
    used = np.zeros(source.num_inputs, dtype=bool)
    used[input_P] = True
    rows = np.flatnonzero(used)
    row_P = (np.cumsum(used) - 1)[input_P]
    weight_P = None if source.weight_U is None else source.weight_U[unit_P].astype(np.float32)
    data = source.config.data
    sparse = data.by_task or source.repeated or (data.layout == "pairs" and weight_P is not None)
    sparse = sparse or len(task_P) < _GRID_DENSITY * len(rows) * num_tasks

    def labels(y_P: NDArray[np.float64], dtype: type) -> Grid | Pairs:
        if sparse:
            tensors = (torch.from_numpy(row_P), torch.from_numpy(task_P), torch.from_numpy(y_P.astype(dtype)))
            return Pairs.of(*tensors, None if weight_P is None else torch.from_numpy(weight_P), len(rows), num_tasks)
        y_RT: NDArray[Any] = np.full((len(rows), num_tasks), np.nan, dtype=dtype)
        y_RT[row_P, task_P] = y_P
        weight_R = None
        if weight_P is not None:
            weight_R = np.zeros(len(rows), dtype=np.float32)
            weight_R[row_P] = weight_P
        return Grid(torch.from_numpy(y_RT), None if weight_R is None else torch.from_numpy(weight_R))

    original = None if original_P is None else labels(original_P, np.float64)
    return Part(torch.from_numpy(rows), labels(y_P, np.float32), original)


def _row_hash(x_NF: Tensor) -> Tensor:
    """A 64-bit number per input row, equal for equal rows."""
    generator = torch.Generator().manual_seed(0)
    odd_F = torch.randint(-(2**62), 2**62, (x_NF.shape[1],), generator=generator) * 2 + 1
    hashes = []
    for chunk in x_NF.split(4096):
        bits = (chunk + 0.0).view(torch.int32).to(torch.int64)
        hashes.append((bits * odd_F).sum(1))
    return torch.cat(hashes)

"""From a config to tensors: open the table, read labels, encode inputs, split, fit on training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrain.components import Spec, build
from mtrain.config import Config, SplitConfig, TargetsConfig
from mtrain.data import FEATURES
from mtrain.data.batch import Pairs
from mtrain.data.features import Encoded, Feature, encode_column, infer_feature
from mtrain.data.labels import LabelTable, read_grid, read_long, select
from mtrain.data.loader import Part
from mtrain.data.sources import open_table, require, to_arrow
from mtrain.data.splits import SOURCE, Split, overlap, split, split_hash
from mtrain.errors import UserError, nearest
from mtrain.model.kinds import SortedLabels
from mtrain.tasks import TaskTable

_GRID_DENSITY = 0.02  # sparser tables are kept as pairs, denser pairs as a grid


@dataclass
class FeatureColumn:
    """One feature and the columns that it reads."""

    columns: list[str]
    spec: Spec
    feature: Feature
    encoded: Encoded = field(repr=False)


@dataclass
class Source:
    """The table, its labels and its encoded inputs: all that does not depend on the split.

    A *unit* is what a split deals out: a row, for pairs a label. `input_U` is the input row of each unit.
    """

    config: Config
    data: datasets.Dataset
    labels: LabelTable
    features: list[FeatureColumn]
    input_U: NDArray[np.int64]
    weight_U: NDArray[np.float64] | None
    notes: list[str]

    @property
    def num_inputs(self) -> int:
        return int(self.input_U.max(initial=-1)) + 1

    def input_specs(self) -> dict[str, list[Spec]]:
        """The features as a config has them, with inferred ones written out."""
        specs: dict[str, list[Spec]] = {}
        for item in self.features:
            for name in item.columns:
                specs.setdefault(name, []).append(item.spec)
        return self.config.inputs or specs

    def column(self, name: str, key: str = "split.column") -> NDArray[Any]:
        """A column, one value per unit."""
        require(self.data.column_names, name, key)
        return to_arrow(self.data, [name])[name].to_numpy()


@dataclass
class Prepared:
    """Tensors of one split: inputs `x_NF`, parts, and the task table with its training statistics."""

    tasks: TaskTable
    x_NF: Tensor
    parts: dict[str, Part]
    features: list[FeatureColumn]
    split_units: dict[str, NDArray[np.int64]]
    split_hash: str
    overlap: float | None
    notes: list[str]


def read_source(config: Config, beside: Path | None = None) -> Source:
    """Open the table and compute what no split changes.

    Raises:
        UserError: anything that is wrong with the table, its labels or its inputs.
    """
    data = open_table(config.data, beside)
    columns = data.column_names
    if len(data) == 0:
        raise UserError(f"data.path {config.data.path}: the table has no rows")
    for name in ("key", "task", "label", "weight"):
        if (column := getattr(config.data, name)) is not None:
            require(columns, column, f"data.{name}")
    if config.split.column is not None:
        require(columns, config.split.column, "split.column")
    input_columns = _match_inputs(config, columns)
    of_data = config.data
    reserved = {of_data.key, of_data.task, of_data.label, of_data.weight, config.split.column, SOURCE}

    missing = config.data.missing_labels
    if config.data.layout == "grid":
        used = {column for group in input_columns for column in group[0]} | reserved
        chosen = config.tasks.labels
        candidates = columns if chosen.include != ["*"] else [c for c in columns if c not in used]
        if chosen.include == ["*"] and not config.inputs:
            raise UserError("tasks.labels and inputs are both missing: name the label columns or the input columns")
        labels = read_grid(data, select([*candidates, *chosen.exclude], chosen, "tasks.labels"), config.tasks, missing)
    else:
        assert config.data.task is not None
        assert config.data.label is not None
        labels = read_long(data, config.data.task, config.data.label, config.tasks, missing)
        data = data.select(labels.row_P)  # a unit is a label
        labels = replace(labels, row_P=np.arange(len(labels.row_P)))
    if not config.inputs:
        label_columns = {task.label for task in labels.tasks} if config.data.layout == "grid" else set()
        free = [c for c in columns if c not in reserved | label_columns]
        input_columns = [([c], _inferred(data, c)) for c in free]

    notes = list(labels.notes)
    input_U = np.arange(len(data))
    inputs = data
    if config.data.layout == "pairs":
        assert config.data.key is not None
        input_U, first = _entities(data, config.data.key, [c for group in input_columns for c in group[0]])
        inputs = data.select(first)
    features = []
    for names, spec in input_columns:
        feature = build(spec, FEATURES, f"inputs.{names[0]}")
        features.append(FeatureColumn(names, spec, feature, encode_column(inputs, names, feature, config.data.workers)))
    weight_U = None if config.data.weight is None else _weights(data, config.data.weight)
    source = Source(config, data, labels, features, input_U, weight_U, notes)
    return _without_invalid(source)


def prepare(source: Source, seed: int) -> Prepared:
    """Split the units, fit features and targets on the training part, build tensors."""
    config, labels, notes = source.config, source.labels, list(source.notes)
    num_units = len(source.input_U)
    units = split(
        _split_spec(config.split),
        seed,
        n=num_units,
        columns=source.column,
        known=source.data.column_names,
        task_N=np.array(labels.tasks.names)[labels.task_P] if config.data.layout != "grid" else None,
        key=source.column(config.data.key, "data.key") if config.data.key else None,
    )
    in_part = {name: np.zeros(num_units, dtype=bool) for name in units}
    for name, unit in units.items():
        in_part[name][unit] = True
    train_P = in_part["train"][labels.row_P]
    if not train_P.any():
        raise UserError("split: the train part holds no label; give it more rows")

    train_inputs = np.unique(source.input_U[units["train"]])
    blocks = []
    for item in source.features:
        item.feature = build(item.spec, FEATURES, f"inputs.{item.columns[0]}")
        item.feature.fit(item.encoded.values[train_inputs], item.columns)
        notes += item.feature.notes
        blocks.append(item.feature.transform(item.encoded.values))
    x_NF = torch.from_numpy(np.concatenate(blocks, axis=1, dtype=np.float32))
    if x_NF.shape[1] == 0:
        raise UserError("inputs: no input column is left after constant columns were dropped")

    tasks = with_statistics(
        labels.tasks, labels.task_P[train_P], labels.y_P[train_P], config.objective.targets, config.data.layout != "grid"
    )
    center_T, scale_T = tasks.stats["center"], tasks.stats["scale"]
    y_P = (labels.y_P - center_T[labels.task_P]) / scale_T[labels.task_P]
    parts = {
        name: _part(source, labels.task_P[mask], labels.row_P[mask], y_P[mask], len(tasks))
        for name, mask in ((name, in_part[name][labels.row_P]) for name in units)
    }
    absent = [tasks[int(t)].name for t in np.flatnonzero(tasks.stats["train_labels"] == 0)]
    if absent:
        notes.append(f"{len(absent)} tasks have no training label and stay at their initial head: {', '.join(absent[:5])}")
    shared = None
    if "test" in units:
        rows = _row_hash(x_NF)
        shared = overlap(
            rows[torch.from_numpy(train_inputs)].numpy(), rows[torch.from_numpy(source.input_U[units["test"]])].numpy()
        )
    return Prepared(tasks, x_NF, parts, source.features, units, split_hash(units), shared, notes)


def with_statistics(
    tasks: TaskTable, task_P: NDArray[np.int64], y_P: NDArray[np.float64], config: TargetsConfig, share_units: bool
) -> TaskTable:
    """The table with what its training labels say.

    `train_labels`, `mean`, `std` in original units; `center` and `scale` of standardised targets; the constant
    predictor's `constant_deviance` and the kind's `typical_loss` in the units of the loss.
    """
    num_outputs_T = tasks.num_outputs_T
    labels = SortedLabels.of(task_P, y_P, num_outputs_T)
    mean_T, count_T = labels.mean(), labels.count_T
    var_T = labels.mean((labels.y_P - mean_T[labels.task_P]) ** 2)
    center_T, scale_T = np.zeros(len(tasks)), np.ones(len(tasks))
    standardized_T = np.array([task.kind.standardized for task in tasks])
    shrink = config.shrink if config.shrink is not None else (5.0 if share_units else 0.0)
    if standardized_T.any():
        center_T, scale_T = _targets(count_T, mean_T, var_T, standardized_T, config, shrink)
    stats: dict[str, NDArray[Any]] = {
        "train_labels": count_T,
        "mean": mean_T,
        "std": np.sqrt(var_T),
        "center": center_T,
        "scale": scale_T,
    }
    y_std = (y_P - center_T[task_P]) / scale_T[task_P]
    constant = [np.zeros(0)] * len(tasks)
    deviance_T, typical_T = np.full(len(tasks), np.nan), np.ones(len(tasks))
    for kind, at in tasks.by_kind().items():
        position = np.full(len(tasks), -1)
        position[at] = np.arange(len(at))
        mine = position[task_P] >= 0
        of_kind = SortedLabels.of(position[task_P[mine]], y_std[mine], num_outputs_T[at])
        params = kind.params(of_kind)
        for name, value in params.items():
            stats.setdefault(name, np.full(len(tasks), np.nan))[at] = value
        logits_TO = kind.constant(of_kind)
        for t, row in zip(at, logits_TO, strict=True):
            constant[t] = row[: num_outputs_T[t]]
        param_P = {k: torch.from_numpy(v)[of_kind.task_P] for k, v in params.items()}
        param_P["num_outputs"] = torch.from_numpy(of_kind.num_outputs_T)[of_kind.task_P]
        loss_P = kind.deviances(torch.from_numpy(logits_TO)[of_kind.task_P], torch.from_numpy(of_kind.y_P), param_P)
        deviance_T[at] = of_kind.mean(loss_P.numpy())
        typical_T[at] = kind.typical_loss(num_outputs_T[at], deviance_T[at])
    stats["constant_deviance"] = deviance_T
    return replace(tasks, stats=stats | {"typical_loss": typical_T, "constant": _ragged(constant)})


def _targets(
    count_T: NDArray, mean_T: NDArray, var_T: NDArray, use_T: NDArray, config: TargetsConfig, shrink: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centre and scale of each task; a task with n rows keeps n / (n + shrink) of its own."""
    use = use_T & (count_T > 0)
    weight = count_T[use] / count_T[use].sum()
    pooled_mean, within = weight @ mean_T[use], weight @ var_T[use]
    total = within + weight @ (mean_T[use] - pooled_mean) ** 2
    own = np.where(use, count_T / (count_T + shrink) if shrink else 1.0, 0.0)
    center = {"task": own * np.nan_to_num(mean_T) + (1 - own) * pooled_mean, "pooled": pooled_mean, "none": 0.0}
    pooled_var = within if config.center == "task" else total
    scale = {"task": np.sqrt(own * np.nan_to_num(var_T) + (1 - own) * pooled_var), "pooled": pooled_var**0.5, "none": 1.0}
    center_T = np.where(use_T, center[config.center], 0.0)
    scale_T = np.where(use_T, scale[config.scale], 1.0)
    tiny = 1e-12 * np.maximum(1.0, np.abs(np.nan_to_num(mean_T)))
    return center_T, np.where(scale_T > tiny, scale_T, 1.0)


def _ragged(rows: Sequence[NDArray[np.float64]]) -> NDArray[Any]:
    out = np.empty(len(rows), dtype=object)
    out[:] = list(rows)
    return out


def _match_inputs(config: Config, columns: list[str]) -> list[tuple[list[str], Spec]]:
    matched = []
    for pattern, specs in config.inputs.items():
        names = [c for c in columns if fnmatchcase(c, pattern)]
        if not names:
            raise UserError(f"inputs: no column '{pattern}' in the data{nearest(pattern, columns)}")
        matched += [(names, spec) for spec in specs]
    return matched


def _inferred(data: datasets.Dataset, column: str) -> Spec:
    values = to_arrow(data, [column])
    return infer_feature(values.schema.field(0), values[column])


def _entities(data: datasets.Dataset, key: str, inputs: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of the entity of each row and the first row of each entity; its inputs must be the same everywhere."""
    table = to_arrow(data, list(dict.fromkeys([key, *inputs])))
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


def _weights(data: datasets.Dataset, column: str) -> NDArray[np.float64]:
    values = to_arrow(data, [column])[column].to_numpy()
    try:
        weight = values.astype(np.float64)
    except (TypeError, ValueError):
        raise UserError(f"data.weight: column '{column}' is not numeric") from None
    bad = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
    if len(bad):
        raise UserError(f"data.weight: column '{column}', row {bad[0] + 1}: found {weight[bad[0]]}, expected >= 0")
    return weight


def _without_invalid(source: Source) -> Source:
    """Leave out the rows whose inputs cannot be used, up to the limit."""
    valid_N = np.ones(source.num_inputs, dtype=bool)
    for item in source.features:
        valid_N &= item.encoded.valid
    if valid_N.all():
        return source
    num_bad = int((~valid_N).sum())
    limit = source.config.data.max_invalid
    if num_bad > limit * len(valid_N):
        raise UserError(
            f"inputs: {num_bad} of {len(valid_N)} rows cannot be used (first: row {int(np.argmin(valid_N)) + 1}), "
            f"more than data.max_invalid ({limit:g})"
        )
    new_input = np.cumsum(valid_N) - 1
    keep_U = valid_N[source.input_U]
    new_unit = np.cumsum(keep_U) - 1
    labels = source.labels
    keep_P = keep_U[labels.row_P]
    for item in source.features:
        item.encoded = Encoded(item.encoded.values[valid_N], item.encoded.valid[valid_N])
    return replace(
        source,
        data=source.data.select(np.flatnonzero(keep_U)),
        labels=replace(labels, task_P=labels.task_P[keep_P], row_P=new_unit[labels.row_P[keep_P]], y_P=labels.y_P[keep_P]),
        input_U=new_input[source.input_U[keep_U]],
        weight_U=None if source.weight_U is None else source.weight_U[keep_U],
        notes=[*source.notes, f"{num_bad} of {len(valid_N)} rows have inputs that cannot be used and are left out"],
    )


def _split_spec(config: SplitConfig) -> Split:
    return Split(config.by, config.parts, config.column, config.fold, config.folds, config.balanced)


def _part(
    source: Source, task_P: NDArray[np.int64], unit_P: NDArray[np.int64], y_P: NDArray[np.float64], num_tasks: int
) -> Part:
    """Labels of a part over the input rows that have one; dense unless very sparse, or routed."""
    routed = source.config.data.layout == "routed"
    rows, row_P = np.unique(source.input_U[unit_P], return_inverse=True)
    weight_R = None
    if source.weight_U is not None:
        weight_R = np.zeros(len(rows))
        weight_R[row_P] = source.weight_U[unit_P]
    pairs = Pairs.of(
        torch.from_numpy(row_P),
        torch.from_numpy(task_P),
        torch.from_numpy(y_P.astype(np.float32)),
        None if weight_R is None else torch.from_numpy(weight_R.astype(np.float32)),
        len(rows),
        num_tasks,
    )
    row_R = torch.from_numpy(rows)
    dense = len(task_P) >= _GRID_DENSITY * len(rows) * num_tasks
    unique = len(np.unique(row_P * num_tasks + task_P)) == len(task_P)
    return Part(row_R, pairs.grid() if dense and unique and not routed else pairs)


def _row_hash(x_NF: Tensor) -> Tensor:
    """A 64-bit number per input row, equal for equal rows."""
    generator = torch.Generator().manual_seed(0)
    odd_F = torch.randint(-(2**62), 2**62, (x_NF.shape[1],), generator=generator) * 2 + 1
    hashes = []
    for chunk in x_NF.split(4096):
        bits = (chunk + 0.0).view(torch.int32).to(torch.int64)
        hashes.append((bits * odd_F).sum(1))
    return torch.cat(hashes)

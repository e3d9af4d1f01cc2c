"""What a table on disk is: its layout, key, inputs and labels, found by rules that can be said in a line each.

The rules look at names, types, missing values and positions, in this order: what a person said; splits, weights and keys by
name; a task and a label column of a long table by name; labels by name; labels as the numbers beside molecules or lists;
labels as the columns that miss far more values than the others, in a block or numbered; as what follows numbered inputs; as
the last columns of 0 and 1; as the last column. What may be wrong is said in notes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrain.config import Config, DataConfig, check_config
from mtrain.data.columns import Column, Form, look
from mtrain.data.features import is_number
from mtrain.data.labels import select
from mtrain.data.prepare import UNNAMED
from mtrain.data.sources import format_of, is_glob, local_files, open_data, open_many, quiet, require, search_folders
from mtrain.data.splits import KEEPS_KEYS, SOURCE
from mtrain.data.tables import ReadError, Table, sample
from mtrain.errors import UserError, matches, nearest, some

MIN_ROWS = 10
_CELLS = 50_000_000  # of a table that is looked at as a whole
_SAMPLED_FILES = 20
_VARIES = 5  # rows: a column in which fewer differ from the rest may be constant in training
_MISSING = 0.05  # share: labels miss more, inputs less
_SPARSE = 0.2  # share: numbered columns that miss more, and twice as much as a quarter of the others, are labels
_ALIKE = 0.75  # of what labels miss: columns beside them that miss more are labels too
_MANY_VALUES, _ROWS_EACH = 20, 5  # of a category whose values may be tasks
_NAMED = 8  # columns: more are written as a pattern
_PER_ENTITY = 1.5  # labels on average: fewer are not pairs
MOST_STEPS = 50_000
_SCALARS = ("number", "category", "text", "smiles")
_PART_OF = {
    "train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "test": "test", "testing": "test", "holdout": "test",
}  # fmt: skip
_SPLITS = {"split", "fold", "folds", "set", "subset", "partition", "cv_fold", "data_split"}
_WEIGHTS = {"sample_weight", "sample_weights", "instance_weight", "row_weight"}
_LABELS = {
    "y", "label", "labels", "target", "targets", "class", "outcome", "value", "score", "rating", "response", "activity",
    "measurement", "result", "affinity", "quality", "price", "diagnosis", "standard_value",
}  # fmt: skip
_LABEL_FAMILIES = {"y", "label", "target", "task", "tag", "assay", "endpoint", "output"}
_INPUT_FAMILIES = {
    "x", "f", "v", "feat", "feature", "features", "input", "in", "var", "attr", "attribute", "pixel", "emb", "embedding",
    "dim", "fp", "bit", "ecfp", "desc", "descriptor", "pc", "pca", "word",
}  # fmt: skip
_ANY_FAMILIES = {"c", "col", "column", "field"}  # of inputs and labels alike
_TASKS = {
    "task", "assay", "target", "endpoint", "dataset", "data_set", "property", "school", "store", "shop", "site", "hospital",
    "clinic", "protein", "kinase", "cell_line", "experiment", "variable",
}  # fmt: skip
_GROUPS = {"task", "assay", "school", "store", "shop", "site", "hospital", "clinic"}  # a last column of numbers is their label
_ROW_NAMES = re.compile(r"(^|_)(id|no|num|ref|sku)(_|$)|(nr|number|nummer|code|key|name|uuid|guid)(_|$)")
_NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
_INDEX = re.compile(r"__index_level_\d+__")
_SHARD = re.compile(r"(part|shard|chunk|batch|data|table|train|test|valid)[-_.]?\d+([-_.]of[-_.]\d+)?")


@dataclass(frozen=True)
class Finding:
    """Columns that have one role, and why."""

    columns: list[str]
    role: str
    what: str
    why: str


@dataclass(frozen=True)
class Guess:
    """A whole config as plain values, and what led to it.

    tree: sections of a config; what the person gave stands in it as given.
    why: the reason of a key of the config, `data.layout` for example.
    notes: what may be wrong, and how to mend it, in a line each.
    """

    tree: dict[str, Any]
    findings: list[Finding]
    why: dict[str, str]
    rows: int
    tasks: int
    notes: list[str]


@dataclass
class _Seen:
    """The table (a sample of it, if it is large) and its columns that have no role yet."""

    columns: dict[str, Column]
    values: pa.Table
    rows: int
    files: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    roles: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    constant: set[str] = field(default_factory=set)
    wanted: set[str] | None = None

    def free(self, *forms: Form) -> list[Column]:
        return [c for name, c in self.columns.items() if name not in self.roles and (not forms or c.form in forms)]

    def put(self, columns: Iterable[Column], role: str, what: str, why: str) -> None:
        names = [column.name for column in columns]
        if names:
            self.roles |= dict.fromkeys(names, role)
            self.findings.append(Finding(names, role, what, why))

    def of(self, role: str) -> list[str]:
        return [name for name in self.columns if self.roles.get(name) == role]

    def num_tasks(self, data: dict[str, Any]) -> int:
        if data["layout"] == "grid":
            return len(self.of("label"))
        return len(self.files) if self.files else self.columns[data["task"]].distinct

    def num_inputs(self, data: dict[str, Any]) -> int:
        """Rows that are encoded: in pairs one for each key."""
        return self.columns[data["key"]].distinct if data["layout"] == "pairs" else self.rows


def discover(given: dict[str, Any], beside: Path | None = None, source: str = "init") -> Guess:
    """A config for the data that `given["data"]["path"]` names.

    Args:
        given: parts of a config that are settled; the rest is found. `tasks.labels`, `inputs`, and of `data` layout, key, task
            and label also steer what is found.
        beside: folder of the config, see `search_folders`.
        source: who gave it: begins the message of an unknown or wrong key.

    Raises:
        UserError: the data cannot be read, have too few rows, or no input or no label can be found.
    """
    said = given.get("data") or {}
    settled, wanted = _settled(given, source), _patterns_of(given.get("inputs"))
    _check_type(settled.data, beside)
    layout, path = said.get("layout"), settled.data.path
    files = [] if layout is not None else local_files(settled.data, beside).get("train", [])
    if len(files) > 1 and isinstance(path, str):
        layout, path = _several_files(files, settled.data, said.get("label"))
    of_data = settled.data.model_copy(update={"path": path})
    seen = _look_into_files(of_data, beside) if layout == "files" else _look(of_data, beside)
    if seen.rows < MIN_ROWS:
        raise UserError(
            f"data.path {_short(path)}: has {seen.rows} row{'s' * (seen.rows != 1)}, expected at least {MIN_ROWS}, to train, "
            "validate and test"
        )
    for name in ("task", "label", "key"):
        if said.get(name) is not None:
            require([c for c in seen.columns if c != SOURCE], said[name], f"data.{name}")
    for one, other in combinations(("task", "label", "key"), 2):
        if said.get(one) is not None and said.get(one) == said.get(other):
            raise UserError(f"data.{one} and data.{other}: are both '{said[one]}', expected different columns")

    data: dict[str, Any] = {"path": path}
    _put_said(seen, settled, said, layout)
    seen.wanted = _wanted(seen, wanted)
    _put_aside(seen)
    if all(re.match(_NUMBER, name) for name in seen.columns) and any("." in name for name in seen.columns):
        shown = some(list(seen.columns), 3)
        seen.notes.append(f"the names of columns ({shown}) seem to be values: if the file has no header, give it one")
    dates = [c for c in seen.columns.values() if c.form == "date"]
    split = _split(seen)
    if weight := next((c for c in seen.free("number") if c.plain in _WEIGHTS and c.low >= 0 and not c.missing), None):
        seen.put([weight], "weight", "", "its name")
        data["weight"] = weight.name
    if layout == "files":
        data |= {"layout": "files", "label": _file_label(seen, said.get("label"))}
    else:
        data |= _long(seen, said, layout) or {"layout": "grid"}
    is_grid = data["layout"] == "grid"
    split = split or _default_split(data["layout"])
    by = settled.split.by if "by" in (given.get("split") or {}) else split["by"]
    if key := _keys(seen, data.get("key") or said.get("key"), by):
        data["key"] = key
    if is_grid:
        seen.why["data.layout"] = "a column for each task"
        said_labels = bool(seen.of("label"))
        _labels(seen, settled)
        if not settled.inputs and seen.wanted is None:
            _doubt_inputs(seen, settled.tasks.labels.exclude, said_labels)
            if layout is None and not settled.tasks.derived:
                _propose_tasks(seen)
    specs = _inputs(seen)
    names = _label_names(seen) if is_grid and settled.tasks.labels.include == ["*"] else None
    tasks = {"labels": names} if names else {}
    if by != split["by"]:
        split = {}  # parts and column belong to another way
    if dates and split.get("by") in ("random", "within_task"):
        _propose_time(seen, dates[0])
    tree = {"data": data, "inputs": specs, "tasks": tasks, "split": split}
    tree |= sizes(seen.num_inputs(data), data["layout"], seen.num_tasks(data))
    found = merged(tree, {k: v for k, v in given.items() if k != "inputs" or settled.inputs})
    found["data"]["path"] = path
    if is_grid:
        found["data"].pop("label", None)  # it is among tasks.labels
    return Guess(found, seen.findings, seen.why, seen.rows, seen.num_tasks(data), seen.notes)


def sizes(rows: int, layout: str, tasks: int) -> dict[str, Any]:
    """Model, length and selection for so many input rows.

    A step has about a sixty-fourth of the training rows, a training about 3,000 steps of 10 to 100 epochs, and there are at
    most 40 evaluations.
    """
    train_rows = 0.8 * rows
    batch = 2 ** round(np.log2(np.clip(train_rows / 64, 16, 512)))
    per_epoch = max(1.0, train_rows / batch)
    width = next((width for most, width in ((1_000, 64), (5_000, 128), (20_000, 256)) if rows < most), 512)
    epochs = int(np.clip(round(3000 / per_epoch), 10, 100))
    train: dict[str, Any] = {"epochs": epochs, "eval_every": float(max(1, round(epochs / 40)))}
    if epochs * per_epoch > MOST_STEPS:
        train = {"steps": MOST_STEPS, "eval_every": round(MOST_STEPS / per_epoch / 40, 4)}
    model: dict[str, Any] = {"trunk": {"class_path": "MLP", "init_args": {"widths": [width], "dropout": 0.3}}}
    if rows >= 50_000:
        model["trunk"]["init_args"]["widths"] = [width, width]
    head: dict[str, Any] = {"bias": "constant"}
    if layout in ("routed", "files") and rows < 200 * tasks:
        head["toward_shared"] = 30.0
    return {
        "model": {**model, "head": head},
        "train": {**train, "global_batch": batch, "lr": 1e-3, "decay": "cosine", "warmup": 0.05},
        "select": {"metric": "skill", "reduce": "median", "patience": 10},
    }


def merged(tree: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The tree with the values that are given: sections key by key; a class with its options is one value."""
    out = dict(tree)
    for key, value in given.items():
        old = out.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and "class_path" not in old and key not in ("parts", "inputs"):
            value = merged(old, value)
        out[key] = value
    if {"epochs", "steps"} <= out.keys():  # the other one was given
        del out["epochs" if "steps" in given else "steps"]
    return out


def _short(path: Any) -> str:
    return path if isinstance(path, str) else "of several files"


def _settled(given: dict[str, Any], source: str) -> Config:
    """What a person said, checked."""
    data = {k: v for k, v in (given.get("data") or {}).items() if k not in ("layout", "task", "label", "key", "weight")}
    keep = {k: v for k, v in given.items() if k not in ("data", "sampler")}
    if _patterns_of(given.get("inputs")) is not None:
        del keep["inputs"]
    return check_config({**keep, "data": {**data, "layout": "grid"}}, source)


def _check_type(data: DataConfig, beside: Path | None) -> None:
    """A single file must be one that can be read."""
    path = str(data.path)
    if data.format is not None or format_of(path) is not None:
        return
    for folder in search_folders(data.root, beside):
        if os.path.isfile(folder / os.path.expanduser(path)):
            raise UserError(
                f"data.path {path}: a file of type '{Path(path).suffix}', expected csv, tsv, json, parquet or arrow; convert "
                "it, or write a function that returns its table and give python:module.function"
            )


# Reading.


def _look(data: DataConfig, beside: Path | None) -> _Seen:
    with quiet():
        table, streaming = open_data(data, beside)
        columns = list(table.column_names)
        large = streaming or len(table) * len(columns) > _CELLS
        values = sample(table, columns) if large else table.read(columns)
    return _Seen({name: look(name, values[name]) for name in columns}, values, len(table))


def _look_into_files(data: DataConfig, beside: Path | None) -> _Seen:
    """The columns that all files have; values of some of them."""
    files = [file for paths in local_files(data, beside).values() for file in paths]
    tables = _opened(files, data)
    common = [name for name in tables[0].column_names if all(name in table.column_names for table in tables)]
    if not common:
        raise UserError(
            f"data.path {data.path}: its {len(files)} files have no column in common, expected the same inputs and label in "
            "each; name each file's columns in a task table (data.table)"
        )
    chosen = np.unique(np.linspace(0, len(tables) - 1, _SAMPLED_FILES).astype(int)).tolist()
    try:
        values = pa.concat_tables([tables[i].read_chunk(0, common) for i in chosen], promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"data.path {data.path}: its files have columns of different types: {error}") from None
    rows = sum(len(table) for table in tables)
    return _Seen({name: look(name, values[name]) for name in common}, values, rows, files)


def _opened(files: list[str], data: DataConfig) -> list[Table]:
    with quiet():
        tables = open_many([[file] for file in files], data.format or str(format_of(files[0])), data.chunk_rows, data.retries)
    if failed := next((table for table in tables if isinstance(table, ReadError)), None):
        raise UserError(f"data.path {failed}")
    return [table for table in tables if not isinstance(table, ReadError)]


def _several_files(files: list[str], data: DataConfig, label: str | None) -> tuple[str | None, Any]:
    """Several files are the parts of a split, the pieces of one table, or a task each: `files` if so, and the path."""
    stems = [Path(file).name.split(".")[0].lower() for file in files]
    parts = [_PART_OF.get(stem, "") for stem in stems]
    if "train" in parts and "" not in parts and len(set(parts)) == len(parts):
        return None, {part: str(Path(file).resolve()) for part, file in zip(parts, files, strict=True)}
    if all(_SHARD.fullmatch(stem) for stem in stems):
        return None, data.path
    tables = _opened(files, data)
    names = [name for name in tables[0].column_names if all(name in table.column_names for table in tables)]
    columns = [Column(name, "number") for name in names]
    labels = [c for c in columns if c.plain in _LABELS]
    odd = next((i for i, table in enumerate(tables) if table.column_names != tables[0].column_names), None)
    if odd is None and any(c.base in _TASKS and labels != [c] for c in columns) and labels:
        return None, data.path  # one long table in pieces
    if label is None and not labels and odd is not None:
        raise UserError(
            f"data.path {data.path}: {files[0]} and {files[odd]} have different columns and no common one with a label's name "
            "(y, label, target, ...); name it with --label, or each file's in a task table (data.table)"
        )
    return "files", data.path


# Roles.


def _put_said(seen: _Seen, settled: Config, said: dict[str, Any], layout: str | None) -> None:
    """Inputs and labels that a person named; in a long table `tasks.labels` are tasks."""
    names = [c for c in seen.columns if c != SOURCE]
    for pattern, specs in settled.inputs.items():
        columns = [seen.columns[n] for n in names if matches(n, pattern) and n not in seen.roles]
        if not columns and not any(matches(n, pattern) for n in names):
            raise UserError(f"inputs: no column '{pattern}' in the data{nearest(pattern, names)}")
        seen.put(columns, "input", " + ".join(spec.class_path for spec in specs), "as you said")
    chosen = settled.tasks.labels
    if chosen.include != ["*"] and layout in (None, "grid") and said.get("task") is None:
        labels = select(names, chosen, "tasks.labels")
        seen.put([seen.columns[n] for n in labels if n not in seen.roles], "label", "", "as you said")
    for role in ("task", "label", "key"):
        name = said.get(role)
        if name is not None and name not in seen.roles and (role != "key" or seen.columns[name].form != "smiles"):
            seen.put([seen.columns[name]], role, "", "as you said")


def _patterns_of(inputs: Any) -> list[str] | None:
    """Inputs that are named without their features."""
    return list(inputs) if isinstance(inputs, list | tuple) and all(isinstance(p, str) for p in inputs) else None


def _wanted(seen: _Seen, patterns: list[str] | None) -> set[str] | None:
    if patterns is None:
        return None
    names = [c for c in seen.columns if c != SOURCE]
    if unknown := next((p for p in patterns if not any(matches(name, p) for name in names)), None):
        raise UserError(f"inputs: no column '{unknown}' in the data{nearest(unknown, names)}")
    return {name for name in names if any(matches(name, p) for p in patterns)}


def _put_aside(seen: _Seen) -> None:
    """Columns that are nothing: unnamed, empty, constant, of an unknown type."""
    unnamed = [c for c in seen.free() if c.name.startswith(UNNAMED) or not c.name.strip()]
    seen.put(unnamed, "left out", "", "no name in the file")
    index = [c for c in seen.free() if _INDEX.fullmatch(c.name)]
    seen.put(index, "left out", "", "the index of a pandas data frame")
    seen.put(seen.free("empty"), "left out", "", "no values")
    seen.put(seen.free("date"), "left out", "", "dates, which no feature reads")
    seen.put(seen.free("other"), "left out", "", "a type for which there is no feature")
    of_others = [c for c in seen.free("list") if not is_number(_leaves(seen.values[c.name]).type)]
    seen.put(of_others, "left out", "", "lists of something else than numbers, for which there is no feature")
    still = [c for c in seen.free("number", "category") if c.usual == len(seen.values)]
    seen.put(still, "left out", "", "the same value in all rows")
    seen.constant = {c.name for c in still if c.form == "number"}


def _split(seen: _Seen) -> dict[str, Any] | None:
    """A column whose values name the parts."""
    if SOURCE in seen.columns and seen.columns[SOURCE].form in ("category", "text") and not seen.columns[SOURCE].missing:
        seen.put([seen.columns[SOURCE]], "split", "", "the data's own splits")
        parts = _parts(pc.unique(seen.values[SOURCE]).to_pylist())
        return None if parts is None else {"by": "sources", "parts": parts}
    for column in seen.free("number", "category"):
        whole = column.form == "category" or column.whole
        if column.plain not in _SPLITS or column.missing or column.distinct > 20 or not whole:
            continue
        values = seen.values[column.name]
        if pa.types.is_floating(values.type):
            values = values.cast(pa.int64())
        parts = _parts(sorted(pc.unique(values.cast(pa.string())).to_pylist()))
        if parts is not None:
            seen.put([column], "split", "", "its name, and its values are parts or folds")
            return {"by": "column", "column": column.name, "parts": parts}
    return None


def _parts(values: list[str]) -> dict[str, Any] | None:
    """Parts by values such as train and test, or numbers of folds; None if they are something else."""
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    folds = []
    for value in values:
        part = _PART_OF.get(value.strip().lower())
        if part is not None:
            parts[part].append(value)
        elif value.isdigit():
            folds.append(value)
        else:
            return None
    folds.sort(key=int)
    if folds and (parts["train"] or len(folds) + len(parts["test"]) < 3):
        return None
    if folds:
        for part in ("test", "valid"):
            parts[part] = parts[part] or [folds.pop()]
        parts["train"] = folds
    if not parts["train"]:
        return None
    return {part: found or 0.1 for part, found in parts.items()}


def _default_split(layout: str) -> dict[str, Any]:
    by = "within_task" if layout in ("routed", "files") else "random"
    return {"by": by, "parts": {"train": 0.8, "valid": 0.1, "test": 0.1}}


def _file_label(seen: _Seen, said: str | None) -> str:
    seen.why["data.layout"] = f"a task for each of {len(seen.files)} files"
    if said is not None:
        return said
    usable = seen.free("number", "category")
    named = [c for c in usable if c.plain in _LABELS]
    found = (named or usable)[-1:]
    if not found:
        raise UserError("no column that all files have can be a label; name it with --label")
    seen.put(found, "label", "", "its name, in all files" if named else "the last column of all files")
    return found[0].name


def _long(seen: _Seen, said: dict[str, Any], layout: str | None) -> dict[str, Any] | None:
    """What `data` says of a long table, with a column for the task's name and one for the label; None if it is not one."""
    if layout == "grid" or (layout is None and not said.get("task") and seen.of("label")):
        return None
    wanted = layout is not None or said.get("task") is not None
    task = _task(seen, said, wanted)
    label = _long_label(seen, said, task, wanted or task.base in _GROUPS) if task else None
    if task is None or label is None:
        if wanted:
            what = "label" if task else "task"
            raise UserError(f"layout {layout or 'routed'}: no column can be the {what}'s; name it with --{what}")
        return None
    tasks = len(pc.unique(seen.values[task.name]))
    seen.put([task] if task.name not in seen.roles else [], "task", "", f"its name, and {tasks} values that repeat")
    named = "its name" if label.plain in _LABELS else "the last column of numbers"
    seen.put([label] if label.name not in seen.roles else [], "label", "", named)
    data = {"task": task.name, "label": label.name}
    if layout != "routed" and (found := _entity(seen, task.name, said.get("key"))):
        key, per_entity = found
        seen.why["data.layout"] = f"each {key} has the same inputs in all its rows, and {per_entity:.3g} labels on average"
        return {**data, "layout": "pairs", "key": key}
    if layout == "pairs":
        if said.get("key") is None:
            raise UserError("layout pairs: no column stands for rows with the same inputs; name it with --key")
        return {**data, "layout": "pairs", "key": said["key"]}
    seen.why["data.layout"] = f"each row belongs to one {task.name}"
    return {**data, "layout": "routed"}


def _task(seen: _Seen, said: dict[str, Any], wanted: bool) -> Column | None:
    """A column with a task's name and values that repeat, beside a column with a label's name, or for names of groups beside
    numbers in the last column."""
    if said.get("task") is not None:
        return seen.columns[said["task"]]
    usable = seen.free("number", "category")
    labels = [c for c in usable if c.plain in _LABELS]
    has_labels = wanted or bool(seen.of("label"))
    for column in seen.free("number", "category", "text"):
        names = (column.form != "number" or column.whole) and not column.missing and column.base in _TASKS
        repeats = 1 < column.distinct <= len(seen.values) / 2
        has_label = has_labels or any(c is not column for c in labels)
        numbers_last = column.base in _GROUPS and usable[-1] is not column and usable[-1].form == "number"
        if names and repeats and (has_label or numbers_last):
            return column
    return None


def _long_label(seen: _Seen, said: dict[str, Any], task: Column, wanted: bool) -> Column | None:
    if said.get("label") is not None:
        return seen.columns[said["label"]]
    usable = [c for c in seen.free("number", "category") if c is not task and not c.is_id]
    named = [c for c in usable if c.plain in _LABELS]
    numbers = [c for c in usable if c.form == "number"]
    return next(iter(named), None) or (numbers[-1] if wanted and numbers else None)


def _entity(seen: _Seen, task: str, said: str | None) -> tuple[str, float] | None:
    """A column each of whose values has the same inputs in all rows, and its tasks per value; None if there is none."""
    inputs = [c for n, c in seen.columns.items() if seen.roles.get(n) in (None, "input") and c.form in _SCALARS]
    candidates = [c for c in inputs if c.is_id or c.form in ("category", "text", "smiles")]
    if said is not None:
        candidates = [seen.columns[said]]

    def count(names: list[str]) -> int:
        return seen.values.select(names).group_by(names).aggregate([]).num_rows

    for column in sorted(candidates, key=lambda c: (c.form == "smiles", -c.distinct)):
        others = [c.name for c in inputs if c is not column and not c.is_id]
        entities = count([column.name])
        has_inputs = bool(others) or column.form == "smiles" or seen.roles.get(column.name) == "input"
        alike = has_inputs and not column.missing and count([column.name, *others]) == entities
        if alike and (pairs := count([column.name, task])) >= _PER_ENTITY * entities:
            return column.name, pairs / entities
    return None


def _keys(seen: _Seen, said: str | None, by: str) -> str | None:
    """The column that says which rows are one thing: molecules, or an id; other ids are put aside."""
    free = seen.free()
    usable = [c for c in free if c.name not in (seen.wanted or ())]
    named = [c for c in usable if c.is_id]
    unique = [c for c in usable if not c.is_id and _names_rows(seen, c, free)]
    molecules = seen.free("smiles")
    whole = [c for c in named if not c.missing]
    repeated = [c for c in whole if c.distinct < len(seen.values)]
    key = said or next((c.name for c in [*molecules, *repeated, *whole, *unique] if not c.missing), None)
    for column in [c for c in seen.free() if c.name == key and c.form != "smiles"]:
        why = "its name; rows with one value stay in one part"
        if by not in KEEPS_KEYS:
            why = f"its name; predictions keep it, split.by {by} does not"
        if key == said:
            why = "its inputs repeat with it"
        elif column not in repeated:
            why = "another value in each row; predictions keep it"
        seen.put([column], "key", "", why)
    seen.put([c for c in named if c.name != key], "left out", "", "an id, by its name")
    seen.put([c for c in unique if c.name != key], "left out", "", "an id: another value in each row")
    return key


def _names_rows(seen: _Seen, column: Column, free: Sequence[Column]) -> bool:
    """Whether it has another value in each row, and the name or the place of an id: the first of the free columns, of single
    words or of the numbers of the rows."""
    if column.distinct < len(seen.values) or len(seen.values) < seen.rows:
        return False
    named = bool(_ROW_NAMES.search(column.plain))
    first = column is free[0]
    if column.form in ("category", "text"):
        text = seen.values[column.name].cast(pa.string())
        return named or (first and pc.all(pc.match_substring_regex(text, r"^\s*\S{1,64}\s*$")).as_py())
    if column.form != "number" or not column.whole or len(free) < 3:
        return False
    counts = column.low in (0, 1) and column.high - column.low == len(seen.values) - 1
    last = column.name == list(seen.columns)[-1]
    return (named and not last) or (first and counts and column.family not in _INPUT_FAMILIES)


def _labels(seen: _Seen, settled: Config) -> None:
    """grid: which columns are labels."""
    if seen.of("label"):
        return
    excluded = settled.tasks.labels.exclude
    usable = [c for c in seen.free("number", "category") if not any(matches(c.name, p) for p in excluded)]
    named = bool(settled.inputs) or seen.wanted is not None
    usable = [c for c in usable if c.name not in (seen.wanted or ())]
    numbers = [c for c in usable if c.form == "number"]
    by_name = [c for c in usable if _has_labels_name(c)]
    if texts := [c for c in seen.free("text") if _has_labels_name(c) and not by_name and seen.wanted is None]:
        words = " ".join(shlex.quote(c.name) for c in texts)
        seen.notes.append(f"{_counted(texts)} named as labels, but free text; if labels: --labels {words}")
    sparse = _with_gaps(usable)
    structured = "molecules" if seen.free("smiles") else "lists" if seen.free("list") else ""
    rules = [
        (usable if named else [], "not one of the inputs that you named"),
        (by_name, "its name"),
        (numbers if structured else [], f"numbers beside {structured}"),
        (sparse, "far more missing values than the others, in a block or in numbered columns"),
        (_beside_inputs(usable), "beside columns with names of inputs"),
        (_last_binary(usable), "the last columns, only 0 and 1; no other is so"),
        (usable[-1:], "the last column"),
    ]
    left = len(seen.free())
    for columns, why in rules:
        if columns and (len(columns) < left or named):
            seen.put(columns, "label", "", why)
            if columns is sparse and usable[-1] not in columns and not _block(usable):
                last = usable[-1].name
                seen.notes.append(f"the last column, {last}, is an input; if it is the label: --labels {shlex.quote(last)}")
            return
    raise UserError(
        f"no column can be a label beside inputs: {_told(seen)}; name the labels with --labels, and the others become inputs"
    )


def _has_labels_name(column: Column) -> bool:
    return column.plain in _LABELS or column.family in _LABEL_FAMILIES


def _with_gaps(columns: list[Column]) -> list[Column]:
    """Numbers with missing values, where they are one block at the end or the beginning; numbered columns that miss far more
    than the others; and columns beside those that miss as much."""
    if not columns:
        return []
    block, numbered = _block(columns), _sparse_families(columns)
    if numbered:
        block = [c for c in block if c.missing >= _far_more(columns)]
    groups = [group for group in (block, *numbered) if group]
    found = {c.name for group in groups for c in group}
    if not found:
        return []
    chosen = [c.name in found for c in columns]
    least = max(_MISSING, _ALIKE * min(map(_missing, groups)))
    alike = [c.missing >= least and c.family not in _INPUT_FAMILIES for c in columns]
    first, last = chosen.index(True), len(columns) - chosen[::-1].index(True)
    while first > 0 and alike[first - 1]:
        first -= 1
    while last < len(columns) and alike[last]:
        last += 1
    return [c for i, c in enumerate(columns) if chosen[i] or (first <= i < last and alike[i])]


def _block(columns: list[Column]) -> list[Column]:
    """The numbers with missing values, where they are one block at the end or the beginning of all numbers."""
    numbers = [c for c in columns if c.form == "number"]
    gaps = [i for i, c in enumerate(numbers) if c.missing >= _MISSING]
    block = len(gaps) > 1 and gaps[-1] - gaps[0] + 1 == len(gaps) < len(numbers)
    return [numbers[i] for i in gaps] if block and (gaps[0] == 0 or gaps[-1] == len(numbers) - 1) else []


def _sparse_families(columns: list[Column]) -> list[list[Column]]:
    """Three or more columns with one name but for a number, that miss far more values than the others."""
    least = _far_more(columns)
    families = [family for family in _families(columns) if len(family) > 2 and _is_numbered(family[0])]
    return [family for family in families if _missing(family) >= least]


def _far_more(columns: list[Column]) -> float:
    """The least share of missing values that is far more than what others miss, each family counted once."""
    return max(_SPARSE, 2 * float(np.quantile([_missing(family) for family in _families(columns)], 0.25, method="lower")))


def _missing(columns: list[Column]) -> float:
    return float(np.median([column.missing for column in columns]))


def _families(columns: list[Column]) -> list[list[Column]]:
    """Columns with one name but for a number."""
    found: dict[str, list[Column]] = defaultdict(list)
    for column in columns:
        found[_unnumbered(column)].append(column)
    return list(found.values())


def _unnumbered(column: Column) -> str:
    """Its name without its numbers: `crack # [yes]` of Crack 12 [yes]."""
    return re.sub(r"\d+", "#", column.name.strip()).lower()


def _is_numbered(column: Column) -> bool:
    """Whether its name has letters and a number, and is not usual for inputs (x1, feature_7) or for anything (col3)."""
    name = _unnumbered(column)
    usual = column.family in _INPUT_FAMILIES | _ANY_FAMILIES
    return "#" in name and not usual and bool(re.search(r"[^\W\d_]", name))


def _beside_inputs(columns: list[Column]) -> list[Column]:
    """What stands behind, else before, all columns with names such as x1 or feature_7."""
    inputs = [i for i, c in enumerate(columns) if c.family in _INPUT_FAMILIES]
    return columns[inputs[-1] + 1 :] or columns[: inputs[0]] if len(inputs) > 1 else []


def _last_binary(columns: list[Column]) -> list[Column]:
    """Two or more last columns that hold 0 and 1 only, where no other does."""
    first = next((i for i in range(len(columns), 0, -1) if not columns[i - 1].binary), 0)
    alone = not any(c.binary for c in columns[:first])
    return columns[first:] if alone and 0 < first < len(columns) - 1 else []


def _doubt_inputs(seen: _Seen, excluded: Sequence[str], said_labels: bool) -> None:
    """grid: leave out what is numbered as a label that a person named, and note what else of the inputs looks like a label."""
    labels = [seen.columns[name] for name in seen.of("label")]
    numbered = {_unnumbered(c) for c in labels if _is_numbered(c)}
    others = [c for c in seen.free("number", "category") if not any(matches(c.name, p) for p in excluded)]
    kin = [c for c in others if _unnumbered(c) in numbered]
    add, name = "add them to --labels (tasks.labels)", 'name all inputs: --inputs "[NAME, ...]"'
    if kin and said_labels and len(kin) < len(seen.free("number", "category", "smiles", "list")):
        seen.put(kin, "left out", "", "numbered as a label that you named")
        seen.notes.append(
            f"{_counted(kin)} numbered as labels that you named, and left out; if labels too, {add}; if inputs, {name}"
        )
        others, kin = [c for c in others if c not in kin], []
    looks = {c.name for family in [kin, *_sparse_families([*labels, *others])] for c in family}
    if (missing := _missing(labels)) >= _far_more([*labels, *others]):
        looks |= {c.name for c in others if c.missing >= _ALIKE * missing}
    if alike := [c for c in others if c.name in looks]:
        seen.notes.append(
            f"{_counted(alike)} among the inputs, though like labels by their numbers or missing values; what is measured with "
            f"the labels would give them away: if so, {add}, or {name}"
        )


def _counted(columns: list[Column]) -> str:
    several = len(columns) > 1
    return f"{len(columns)} column{'s' * several} ({some([c.name for c in columns], 3)}) {'are' if several else 'is'}"


def _propose_tasks(seen: _Seen) -> None:
    """grid of one task: a category with many values of several rows each may be the task of a long table."""
    labels = seen.of("label")
    for column in seen.columns.values() if len(labels) == 1 else ():
        names = column.form in ("category", "text") or column.is_id
        if not names or column.missing or column.distinct < _MANY_VALUES or column.name in labels:
            continue
        if np.median(pc.value_counts(seen.values[column.name]).field("counts")) >= _ROWS_EACH:
            words = f"--task {shlex.quote(column.name)} --label {shlex.quote(labels[0])}"
            seen.notes.append(
                f"column {column.name} has {column.distinct:,} values with about {seen.rows // column.distinct:,} rows each: "
                f"if each is a task of its own, say so: {words} (data.task, data.label)"
            )
            return


def _propose_time(seen: _Seen, dates: Column) -> None:
    """A random split of rows with dates shows how well what lies between them is predicted."""
    text = seen.values[dates.name].cast(pa.string())
    needs = [] if pc.all(pc.match_substring_regex(text, r"^\d{4}-\d\d-\d\d")).as_py() else ["dates written as 2024-12-31"]
    needs += ["a date in every row"] if dates.missing else []
    how = f"--split.by time --split.column {shlex.quote(dates.name)}"
    seen.notes.append(
        f"column {dates.name} holds dates: if later rows are to be predicted, scores on a random split look better than they "
        f"will be; to split by time: {how}" + (f" (needs {' and '.join(needs)})" if needs else "")
    )


def _inputs(seen: _Seen) -> dict[str, Any]:
    """Features by column name or pattern; none if a person named the inputs, and the rest is left out."""
    if seen.of("input") or seen.wanted is not None:
        others = [c for c in seen.free() if c.name not in (seen.wanted or ())]
        seen.put(others, "left out", "", "not one of the inputs that you named")
    if seen.of("input"):
        return {}
    rows = len(seen.values)
    still = [c for c in seen.free("number", "category") if rows - c.usual < _VARIES and not c.missing]
    seen.put(still, "left out", "", f"fewer than {_VARIES} rows differ")
    specs: dict[str, Any] = {}
    molecules = seen.free("smiles")
    if molecules and importlib.util.find_spec("rdkit") is None:
        raise UserError(
            f"column '{molecules[0].name}' holds molecules (SMILES), whose features need RDKit: pip install \"mtrain[chem]\""
        )
    for column in molecules:
        specs[column.name] = [
            {"class_path": name, "init_args": {"bits": 2048, "counts": True, "log1p": True, "on_invalid": "skip"}}
            for name in ("ECFP", "AtomPair")
        ]
    seen.put(molecules, "input", "ECFP + AtomPair", "texts that RDKit reads as molecules")
    for column in seen.free("list"):
        bits = _is_bits(seen.values[column.name])
        option: dict[str, Any] = {"normalize": "rms"} if bits else {"standardize": True}
        specs[column.name] = {"class_path": "Array", "init_args": option}
        seen.put([column], "input", "Array", "lists of 0 and 1" if bits else "lists")
    numbers, categories = seen.free("number"), seen.free("category")
    unlike = [name for name in seen.columns if name not in seen.constant]  # a feature drops those by itself
    specs |= dict.fromkeys(_patterns([c.name for c in numbers], unlike), "Numeric")
    specs |= dict.fromkeys((c.name for c in categories), "Categorical")
    seen.put(numbers, "input", "Numeric", "numbers")
    seen.put(categories, "input", "Categorical", "text with few different values")
    for column in seen.free("text"):
        if odd := _odd_among_numbers(seen.values[column.name]):
            seen.put([column], "left out", "", f"numbers, but {odd}: mend those, and it becomes an input")
    seen.put(seen.free("text"), "left out", "", "free text, which the feature Tokens and the trunk TextEncoder read")
    if not specs:
        raise UserError(f"no column can be an input: {_told(seen)}; name the inputs and their features in a config")
    return specs


def _told(seen: _Seen) -> str:
    free = [f"'{c.name}' is {c.form}" for c in seen.free()]
    return some([*free, *(f"'{f.columns[0]}' is {f.role} ({f.why})" for f in seen.findings)])


def _odd_among_numbers(values: pa.ChunkedArray) -> str | None:
    """Of a column of texts most of which are numbers, the others in words."""
    text = values.cast(pa.string()).drop_null()
    odd = text.filter(pc.invert(pc.match_substring_regex(text, _NUMBER)))
    return f"'{odd[0]}' in {len(odd):,} of {len(text):,} rows" if len(odd) < len(text) / 2 else None


def _is_bits(values: pa.ChunkedArray) -> bool:
    numbers = pc.cast(_leaves(values).drop_null(), pa.float64(), safe=False)
    return bool(np.isin(numbers.to_numpy(), (0, 1)).all())


def _leaves(values: pa.ChunkedArray) -> Any:
    """What the first lists of a column hold, of lists in lists the innermost."""
    leaf: Any = values.slice(0, 100).combine_chunks()
    while isinstance(leaf, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray | pa.ExtensionArray):
        leaf = leaf.storage if isinstance(leaf, pa.ExtensionArray) else leaf.flatten()
    return leaf


def _patterns(names: list[str], every: list[str]) -> list[str]:
    """Names, or for those of a family a pattern that matches no other column."""
    families: dict[str, list[str]] = defaultdict(list)
    for name in names:
        families[Column(name, "number").family].append(name)
    found: list[str] = []
    for family in families.values():
        prefix = os.path.commonprefix(family)  # noqa: RUF071 - of letters
        shared = len(family) > _NAMED and prefix and not is_glob(prefix)
        found += [f"{prefix}*"] if shared and [n for n in every if n.startswith(prefix)] == family else family
    return found


def _label_names(seen: _Seen) -> Any:
    """grid: `tasks.labels`: all names, or where they are many, what they are not; inputs and keys need no mention."""
    labels = seen.of("label")
    if len(labels) <= _NAMED:
        return labels
    patterns = _patterns(labels, list(seen.columns))
    if len(patterns) <= _NAMED:
        return patterns
    others = seen.of("left out")
    return {"exclude": others} if others else {}

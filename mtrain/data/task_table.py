"""The task table: one row for each task, which says where its data are and what they mean."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import ValidationError

from mtrain.components import Spec, first_problem
from mtrain.config import DataConfig, YamlLoader
from mtrain.data.sources import format_of, is_glob
from mtrain.data.tables import reason
from mtrain.data.text import check_separator
from mtrain.errors import UserError, nearest

COLUMNS = ("name", "kind", "data", "config", "split", "format", "inputs", "label", "weight")
"""What a task table may say of a task."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FORMATS = ("csv", "json", "parquet", "arrow")


@dataclass(frozen=True)
class TaskSource:
    """Where the data of a task are.

    files: paths, globs, URLs or a hub id by split, `""` if the task has no splits of its own; when opened: its files.
    form: csv, json, parquet or arrow; None: by the files' endings.
    label: the task's own label column.
    rename: the task's own name of an input, by its common name.
    config, split: configuration of a hub data set, and its splits by the part that they form (`""`: all one).
    where: its row of the task table, for messages.
    """

    name: str
    files: dict[str, list[str]]
    label: str
    form: str | None = None
    rename: dict[str, str] = field(default_factory=dict)
    kind: Spec | None = None
    weight: float | None = None
    config: str | None = None
    split: dict[str, str] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    @property
    def first_file(self) -> str:
        return next(paths[0] for paths in self.files.values())


def read_task_table(path: Path, config: DataConfig) -> list[TaskSource]:
    """One task per row of a CSV, TSV, Parquet, YAML or JSON file; paths are as written there.

    Raises:
        UserError: names the file and the row: an unknown column, a missing `data`, two tasks of one name, ...
    """
    rows = _rows(path)
    if not rows:
        raise UserError(f"data.table {path}: no rows, expected one for each task")
    sources = []
    row_of: dict[str, int] = {}
    for i, row in enumerate(rows, 1):
        source = _source(row, f"{path}, row {i}", config)
        if (other := row_of.setdefault(source.name, i)) != i:
            raise UserError(
                f"{path}, row {i}: the task name '{source.name}' is also in row {other}; give each a name of its own"
            )
        sources.append(source)
    return sources


def _rows(path: Path) -> list[Any]:
    kind = path.suffix.lower().lstrip(".")
    try:
        if kind in ("csv", "tsv"):
            with path.open(newline="", encoding="utf-8-sig") as stream:
                return _csv_rows(csv.DictReader(stream, delimiter="\t" if kind == "tsv" else ",", strict=True), path)
        if kind in ("parquet", "pq"):
            return pq.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        if kind in ("jsonl", "ndjson"):
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        if kind not in ("yaml", "yml", "json"):
            raise UserError(f"data.table {path}: expected a .csv, .tsv, .parquet, .yaml, .json or .jsonl file")
        rows = json.loads(text) if kind == "json" else yaml.load(text, Loader=YamlLoader)
    except (OSError, ValueError, RecursionError, csv.Error, yaml.YAMLError, pa.ArrowException) as error:
        raise UserError(f"data.table {path}: cannot be read as {kind}: {reason(error)}") from error
    if not isinstance(rows, list):
        raise UserError(f"data.table {path}: found {type(rows).__name__}, expected a list with an entry for each task")
    return rows


def _csv_rows(reader: csv.DictReader[str], path: Path) -> list[dict[str, Any]]:
    reader.fieldnames = names = [name.strip() for name in reader.fieldnames or []]
    check_separator(f"data.table {path}", names)
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"data.table {path}: two columns are named '{twice}', expected unique names")
    rows: list[dict[str, Any]] = []
    for row in reader:
        if None in row:
            raise UserError(
                f"{path}, row {len(rows) + 1}: has more values than the header has names; quote values that hold the separator"
            )
        rows.append(row)
    return [row for row in rows if any(row.values())]  # spreadsheets leave rows of commas at the end


def _source(row: Any, where: str, config: DataConfig) -> TaskSource:
    if not isinstance(row, dict):
        raise UserError(f"{where}: found {row!r}, expected columns such as name and data")
    for column in row:
        if column not in COLUMNS:
            raise UserError(f"{where}: unknown column '{column}'{nearest(str(column), COLUMNS)}")
    cell = {name: value for name, value in ((name, _tidy(value)) for name, value in row.items()) if value is not None}
    if "data" not in cell:
        raise UserError(f"{where}: no data, expected a path, URL or hub id in column data")
    files = _files(cell["data"], where)
    hub_config = _text(cell["config"], where, "config") if "config" in cell else None
    form = _text(cell["format"], where, "format") if "format" in cell else None
    if form is not None and form not in _FORMATS:
        raise UserError(f"{where}, format: found '{form}', expected one of {', '.join(_FORMATS)}")
    label = _text(cell["label"], where, "label") if "label" in cell else config.label
    if label is None:
        raise UserError(f"{where}: no label column, name it in column label, or in data.label for all tasks")
    rename = _mapping(cell.get("inputs", {}), where, "inputs", "text=sentence;title=headline")
    own = Counter([*rename.values(), label])
    if twice := [name for name, count in own.items() if count > 1]:
        used = "the label and an input" if twice[0] == label else "two inputs"
        raise UserError(f"{where}, inputs: column '{twice[0]}' is {used}; it can be only one of them")
    split = cell.get("split", {})
    if isinstance(split, str) and "=" not in split:
        split = {"": split}
    name = _text(cell["name"], where, "name") if "name" in cell else _default_name(files, hub_config, where)
    return TaskSource(
        name=name,
        files=files,
        label=label,
        form=form,
        rename=rename,
        kind=_kind_spec(cell.get("kind"), where),
        weight=_weight(cell.get("weight"), where),
        config=hub_config,
        split=_mapping(split, where, "split", "train=train;test=validation"),
        where=where,
    )


def _tidy(value: Any) -> Any:
    """Absent (None, NaN, empty) is None; Arrow's maps and structs with absent fields are plain mappings."""
    if isinstance(value, list) and value and all(isinstance(pair, tuple) for pair in value):
        value = dict(value)
    if isinstance(value, dict):
        value = {k: v for k, v in ((k, _tidy(v)) for k, v in value.items()) if v is not None}
    if isinstance(value, str):
        value = value.strip()
    absent = value is None or (isinstance(value, float) and math.isnan(value)) or value in ("", [], {})
    return None if absent else value


def _text(value: Any, where: str, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{where}, {column}: found {value!r}, expected text")
    return str(value)


def _files(value: Any, where: str) -> dict[str, list[str]]:
    by_split = value if isinstance(value, dict) else {"": value}
    files = {}
    for split, paths in by_split.items():
        found = paths.split(";") if isinstance(paths, str) else paths if isinstance(paths, list) else [paths]
        files[str(split)] = [path for path in (_text(path, where, "data").strip() for path in found) if path]
        if not files[str(split)]:
            raise UserError(f"{where}, data: found {value!r}, expected a path, URL or hub id")
    return files


def _mapping(value: Any, where: str, column: str, example: str) -> dict[str, str]:
    if isinstance(value, str):
        pairs = [pair.partition("=") for pair in value.split(";") if pair.strip()]
        if bad := [name for name, equals, own in pairs if not (equals and name.strip() and own.strip())]:
            raise UserError(f"{where}, {column}: found '{bad[0]}' in '{value}', expected pairs such as {example}")
        if len({name.strip() for name, _, _ in pairs}) < len(pairs):
            raise UserError(f"{where}, {column}: a name occurs twice in '{value}', expected pairs such as {example}")
        return {name.strip(): own.strip() for name, _, own in pairs}
    if not isinstance(value, dict):
        raise UserError(f"{where}, {column}: found {value!r}, expected a mapping or text such as {example}")
    return {str(name): "+".join(own) if isinstance(own, list) else _text(own, where, column) for name, own in value.items()}


def _kind_spec(value: Any, where: str) -> Spec | None:
    try:
        return None if value is None else Spec.model_validate(value)
    except ValidationError as error:
        raise UserError(first_problem(error, f"{where}, kind", Spec.model_fields)) from None


def _weight(value: Any, where: str) -> float | None:
    if value is None:
        return None
    try:
        weight = float(_text(value, where, "weight"))
    except ValueError:
        weight = math.nan
    if not (weight >= 0 and math.isfinite(weight)):
        raise UserError(f"{where}, weight: found '{value}', expected a number >= 0")
    return weight


def _default_name(files: dict[str, list[str]], hub_config: str | None, where: str) -> str:
    paths = [path for group in files.values() for path in group]
    if len(paths) == 1 and not is_glob(paths[0]):
        path = urlparse(paths[0]).path if "://" in paths[0] else paths[0]
        if format_of(path):
            return without_suffixes(Path(path).name)
        if "://" not in paths[0]:
            name = path if HUB_ID.fullmatch(path) else Path(path).name
            return f"{name}/{hub_config}" if hub_config else name
    raise UserError(f"{where}: no name, expected one where column data is not a single file or hub id")


def without_suffixes(name: str) -> str:
    """`a/b.c.csv.gz` is `a/b.c`."""
    while "." in Path(name).name and format_of(name):
        name = name.rpartition(".")[0]
    return name

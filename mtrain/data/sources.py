"""Tables from files and hubs, opened by `datasets`."""

from __future__ import annotations

import csv
import glob
import gzip
import os
from pathlib import Path

import datasets
import pyarrow as pa

from mtrain.components import find
from mtrain.config import DataConfig
from mtrain.data.splits import SOURCE
from mtrain.errors import UserError, nearest

_FORMATS = {
    "csv": "csv", "tsv": "csv", "txt": "csv", "json": "json", "jsonl": "json", "ndjson": "json",
    "parquet": "parquet", "pq": "parquet", "arrow": "arrow", "feather": "arrow",
}  # fmt: skip


PYTHON = "python:"


def open_table(config: DataConfig, beside: Path | None = None) -> datasets.Dataset:
    """Open the table that `config` names.

    Args:
        beside: folder of the config file; relative paths are tried under `data.root` (or $MTRAIN_DATA), in the
            working directory and here.

    Raises:
        UserError: no such file, unreadable file, two columns of one name, or a hub that does not answer.
    """
    if isinstance(config.path, str) and config.path.startswith(PYTHON):
        return _call(config.path)
    by_split = config.path if isinstance(config.path, dict) else {"train": config.path}
    files = {split: _files(paths, config, beside) for split, paths in by_split.items()}
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        from_hub = isinstance(config.path, str) and not files["train"]
        loaded = _load_hub(config) if from_hub else _load(files, config)
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    tables = [data.add_column(SOURCE, [split] * len(data)) for split, data in loaded.items()]
    try:
        return datasets.concatenate_datasets(tables)
    except (ValueError, TypeError) as error:
        raise UserError(f"data.path: the splits {', '.join(loaded)} have different columns: {_reason(error)}") from None


def require(columns: list[str], wanted: str, key: str) -> str:
    """The column `wanted`, or an error that names the nearest one."""
    if wanted not in columns:
        raise UserError(f"{key}: no column '{wanted}' in the data{nearest(wanted, columns)}")
    return wanted


def to_arrow(data: datasets.Dataset, columns: list[str]) -> pa.Table:
    """The named columns as one Arrow table; memory-mapped where the data set is."""
    return data.select_columns(columns).with_format("arrow")[:]


def _call(path: str) -> datasets.Dataset:
    """`python:package.module.function`: a function of no arguments that returns a table."""
    table = find(path.removeprefix(PYTHON), {}, "data.path")()
    if isinstance(table, datasets.Dataset):
        return table
    if isinstance(table, pa.Table):
        return datasets.Dataset(table)
    if hasattr(table, "to_dict"):
        return datasets.Dataset.from_pandas(table, preserve_index=False)
    raise UserError(f"data.path {path}: returned {type(table).__name__}, expected a table of datasets, pyarrow or pandas")


def _roots(config: DataConfig, beside: Path | None) -> list[Path]:
    root = config.root or os.environ.get("MTRAIN_DATA")
    return [Path(p) for p in (root, ".", beside) if p is not None]


def _files(paths: str | list[str], config: DataConfig, beside: Path | None) -> list[str]:
    return [file for path in ([paths] if isinstance(paths, str) else paths) for file in _find(path, config, beside)]


def _find(path: str, config: DataConfig, beside: Path | None) -> list[str]:
    """Files behind one path; none if it can only be a hub id."""
    roots = _roots(config, beside)
    for root in roots:
        full = root / Path(path).expanduser()
        if full.is_file():
            return [str(full)]
        if full.is_dir():
            found = sorted(str(f) for f in full.rglob("*") if f.is_file() and _format(f.name))
            if not found:
                raise UserError(f"data.path {full}: the folder holds no csv, json, parquet or arrow file")
            return found
        if any(c in path for c in "*?[") and (found := sorted(glob.glob(str(full), recursive=True))):
            return found
    looks_like_a_file = _format(path) or path.startswith((".", "/", "~")) or any(c in path for c in "*?[")
    if "://" not in path and (looks_like_a_file or path.count("/") != 1):
        raise UserError(
            f"data.path {path}: no such file (looked in {', '.join(str(r) for r in roots)}); "
            "set data.root or MTRAIN_DATA to the folder of the data"
        )
    return [path] if "://" in path else []


def _format(name: str) -> str | None:
    suffixes = [s.lstrip(".").lower() for s in Path(name).suffixes]
    return next((_FORMATS[s] for s in reversed(suffixes) if s in _FORMATS), None)


def _load(files: dict[str, list[str]], config: DataConfig) -> dict[str, datasets.Dataset]:
    every = [file for paths in files.values() for file in paths]
    form = config.format or _format(every[0])
    if form is None:
        raise UserError(f"data.path {every[0]}: unknown file type; set data.format to csv, json, parquet or arrow")
    options: dict[str, object] = {}
    if form == "csv":
        options = {"chunksize": 2**31 - 1}  # one chunk, so that a column has one type however long the file is
        if ".tsv" in every[0]:
            options["sep"] = "\t"
        for file in every:
            if "://" not in file:
                _check_header(file, str(options.get("sep", ",")))
    try:
        return datasets.load_dataset(form, data_files=files, keep_in_memory=config.in_memory, **options)
    except Exception as error:  # the libraries below raise many types for a broken file
        raise UserError(f"data.path {', '.join(every[:3])}: cannot be read as {form}: {_reason(error)}") from error


def _load_hub(config: DataConfig) -> dict[str, datasets.Dataset]:
    try:
        found = datasets.load_dataset(config.path, config.name, split=config.source_split, keep_in_memory=config.in_memory)
        return {"train": found} if isinstance(found, datasets.Dataset) else found
    except Exception as error:
        raise UserError(f"data.path {config.path}: no such file, and the hub says: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _check_header(file: str, separator: str) -> None:
    """pandas renames the second of two equal columns silently, and an empty file has no columns."""
    opener = gzip.open if file.endswith(".gz") else open
    try:
        with opener(file, "rt", newline="", encoding="utf-8") as stream:
            names = next(csv.reader(stream, delimiter=separator), [])
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"data.path {file}: cannot be read: {_reason(error)}") from error
    if not names:
        raise UserError(f"data.path {file}: the file is empty, expected a header and rows")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UserError(f"data.path {file}: two columns are named '{twice}', expected unique names; rename one")

"""Tables from files and hubs, opened by `datasets`."""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
_NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0")  # so `datasets` says that a table is empty


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
        if not from_hub and (config.name or config.source_split):
            raise UserError("data.name and data.source_split are for hub data sets, but data.path names files; leave them out")
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
    function = find(path.removeprefix(PYTHON), {}, "data.path")
    try:
        table = function()
    except UserError:
        raise
    except Exception as error:  # the user's own function may raise anything
        raise UserError(f"data.path {path}: fails with {type(error).__name__}: {error}") from error
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
            if len(kinds := sorted({str(_format(f)) for f in found})) > 1:
                raise UserError(
                    f"data.path {full}: the folder holds {' and '.join(kinds)} files, expected one type; use a glob"
                )
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
        options["sep"] = separator = "\t" if ".tsv" in every[0] else ","
        _check_headers([file for file in every if "://" not in file], separator)
    try:
        return datasets.load_dataset(form, data_files=files, keep_in_memory=config.in_memory, **options)
    except Exception as error:  # the libraries below raise many types for a broken file
        empty = all(os.path.getsize(file) == 0 for file in every if "://" not in file)
        if empty or any(sign in str(error.__cause__ or error) for sign in _NO_ROWS):
            raise UserError(f"data.path {', '.join(every[:3])}: no rows, expected at least one") from error
        same = "; all files need the same columns and types" if len(every) > 1 else ""
        raise UserError(f"data.path {', '.join(every[:3])}: cannot be read as {form}: {_reason(error)}{same}") from error


def _load_hub(config: DataConfig) -> dict[str, datasets.Dataset]:
    try:
        found = datasets.load_dataset(config.path, config.name, split=config.source_split, keep_in_memory=config.in_memory)
        return {"train": found} if isinstance(found, datasets.Dataset) else found
    except Exception as error:
        raise UserError(f"data.path {config.path}: no such file, and the hub says: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text ({error.reason} at byte {error.start}); if it is text, convert it: iconv -f latin1 -t utf-8"
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"


def _check_headers(files: list[str], separator: str) -> None:
    """What pandas would pass over: equal names, rows shifted against the header, other columns in another file."""
    expected: list[str] = []
    for file in files:
        names = _header(file, separator)
        if expected and set(names) != set(expected):
            odd = sorted(set(names) ^ set(expected))[0]
            here, there = (file, files[0]) if odd in names else (files[0], file)
            raise UserError(
                f"data.path: column '{odd}' is in {here} but not in {there}, expected the same columns in all files"
            )
        expected = expected or names


def _header(file: str, separator: str) -> list[str]:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    csv.field_size_limit(2**31 - 1)
    try:
        with openers.get(Path(file).suffix, open)(file, "rt", newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, delimiter=separator)
            names, first = next(reader, []), next(reader, [])
    except (OSError, EOFError, ValueError, csv.Error, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"data.path {file}: cannot be read as csv: {_reason(error)}") from error
    if not names:
        raise UserError(f"data.path {file}: the file is empty, expected a header and rows")
    if "\0" in "".join(names):
        raise UserError(f"data.path {file}: holds binary data, expected CSV text; set data.format if it is of another type")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UserError(f"data.path {file}: two columns are named '{twice}', expected unique names; rename one")
    other = next((c for c in ";\t,|" if len(names) == 1 and c in names[0]), None)
    if other is not None:
        wanted = "commas in a .csv, tabs in a .tsv"
        raise UserError(f"data.path {file}: its columns seem to be separated by {other!r}, expected {wanted}; convert it")
    if len(first) > len(names):
        raise UserError(
            f"data.path {file}: row 1 has {len(first)} values but the header {len(names)} names; mend the header or the row"
        )
    return names

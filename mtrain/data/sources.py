"""Tables from files and hubs, opened by `datasets`."""

from __future__ import annotations

import ast
import glob
import json
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet

from mtrain.components import find
from mtrain.config import DataConfig
from mtrain.data.splits import SOURCE
from mtrain.data.tables import (
    NO_ROWS,
    JoinedTable,
    MappedTable,
    ParquetTable,
    Piece,
    ReadError,
    Table,
    check_unique,
    in_threads,
    odd_column,
    parquet_file,
    reason,
    retrying,
)
from mtrain.data.text import TextTable, read_header, separator_of
from mtrain.errors import UserError, nearest, some

_FORMATS = {
    "csv": "csv", "tsv": "csv", "txt": "csv", "json": "json", "jsonl": "json", "ndjson": "json",
    "parquet": "parquet", "pq": "parquet", "arrow": "arrow", "feather": "arrow",
}  # fmt: skip


_BUILDERS = {"csv": Csv, "json": Json, "parquet": Parquet}
PYTHON = "python:"
_LARGE = 2e9  # bytes
_SPLITS_A_CALL = 25  # the time of a `load_dataset` call grows with the square of the number of its splits


def open_stream(config: DataConfig, beside: Path | None, chunk_rows: int) -> Table:
    """Open the table that `config` names, to be read by the chunk.

    Arrow files and functions have no stream: they are memory-mapped, or in memory as the function returns them.

    Args:
        beside: folder of the config file, see `search_folders`.

    Raises:
        UserError: no such file, an unreadable one, two columns of one name, a hub that does not answer, or a hub data set that
            cannot be read by the chunk.
    """
    return _stream(config, local_files(config, beside), chunk_rows)


def open_data(config: DataConfig, beside: Path | None) -> tuple[Table, bool]:
    """Open the table that `config` names, and whether its inputs stream, as `open_stream` reads them; else they are mapped, or
    in memory as a function returns them.

    Raises:
        UserError: no such file, an unreadable one, two columns of one name, or a hub that does not answer.
    """
    files = local_files(config, beside)
    if streams(config, [file for paths in files.values() for file in paths]):
        return _stream(config, files, config.chunk_rows), True
    return MappedTable(_table(config, files), config.chunk_rows), False


def _table(config: DataConfig, files: dict[str, list[str]]) -> datasets.Dataset:
    if _is_function(config):
        return _call(str(config.path))
    with quiet():
        loaded = _load(files, config) if files else _load_hub(config)
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    tables = [data.add_column(SOURCE, [split] * len(data)) for split, data in loaded.items()]
    try:
        return datasets.concatenate_datasets(tables)
    except (ValueError, TypeError) as error:
        raise UserError(f"data.path: the splits {', '.join(loaded)} have different columns: {reason(error)}") from None


def _stream(config: DataConfig, files: dict[str, list[str]], chunk_rows: int) -> Table:
    form = _form([file for paths in files.values() for file in paths], config) if files else None
    if form == "arrow" or _is_function(config):
        return MappedTable(_table(config, files), chunk_rows)
    with quiet():
        if form is None:
            form, files = _hub_files(config)
        opened = open_many(list(files.values()), form, chunk_rows, config.retries)
    tables: dict[str, Table] = {}
    for split, table in zip(files, opened, strict=True):
        if isinstance(table, ReadError):
            raise UserError(f"data.path {table}")
        tables[split] = table
    if len(tables) == 1:
        return next(iter(tables.values()))
    if problem := odd_column({f"the split {split}": table.column_names for split, table in tables.items()}):
        raise UserError(f"data.path: {problem}")
    return JoinedTable([Piece(table, constants={SOURCE: split}, name=f"split '{split}'") for split, table in tables.items()])


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of `datasets`."""
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(verbosity)


def local_files(config: DataConfig, beside: Path | None) -> dict[str, list[str]]:
    """The files of each split of one table; none where it comes from a hub or a function."""
    if _is_function(config):
        return {}
    by_split = config.path if isinstance(config.path, dict) else {"train": config.path}
    files = {split: _files(paths, config, beside) for split, paths in by_split.items()}
    if isinstance(config.path, str) and not files["train"]:
        return {}
    if config.name or config.source_split:
        raise UserError("data.name and data.source_split are for hub data sets, but data.path names files; leave them out")
    return files


def streams(config: DataConfig, files: Iterable[str]) -> bool:
    """Whether inputs are read by the chunk while training: as the config says, or where local files are large."""
    if config.streaming != "auto":
        return config.streaming
    return sum(os.path.getsize(file) for file in files if os.path.isfile(file)) > _LARGE


def require(columns: list[str], wanted: str, key: str) -> str:
    """The column `wanted`, or an error that names the nearest one."""
    if wanted not in columns:
        raise UserError(f"{key}: no column '{wanted}' in the data{nearest(wanted, columns)}")
    return wanted


def to_arrow(data: datasets.Dataset, columns: list[str]) -> pa.Table:
    """The named columns as one Arrow table; memory-mapped where the data set is."""
    return data.select_columns(columns).with_format("arrow")[:]


def _is_function(config: DataConfig) -> bool:
    return isinstance(config.path, str) and config.path.startswith(PYTHON)


def _call(path: str) -> datasets.Dataset:
    """`python:package.module.function`, or with arguments, `function(rows=100)`: a function that returns a table."""
    name, parenthesis, given = path.removeprefix(PYTHON).partition("(")
    function = find(name, {}, "data.path")
    try:
        arguments = _arguments(given.removesuffix(")")) if parenthesis else {}
    except (SyntaxError, ValueError):
        raise UserError(f"data.path {path}: expected arguments by name with plain values, such as {name}(rows=100)") from None
    try:
        table = function(**arguments)
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


def _arguments(text: str) -> dict[str, Any]:
    """`rows=100, kind='a'` as a dict.

    Raises:
        SyntaxError, ValueError: it is something else.
    """
    call = ast.parse(f"f({text})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError(text)
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}


def search_folders(root: str | None, beside: Path | None = None) -> list[Path]:
    """Where relative paths are looked for, in order: `root` (data.root) or $MTRAIN_DATA, the working directory, `beside`."""
    return list(dict.fromkeys(Path(p) for p in (root or os.environ.get("MTRAIN_DATA"), ".", beside) if p is not None))


def folder_of(path: str, folders: Sequence[Path]) -> Path | None:
    """The first of `folders` in which a file or folder, or a match of a glob, is; None: it is in none."""
    for folder in folders:
        full = str(folder / os.path.expanduser(path))  # pathlib's exists raises for a name that is too long
        if os.path.exists(full) or (is_glob(path) and next(glob.iglob(full, recursive=True), None) is not None):
            return folder
    return None


def existing(path: str, folders: Sequence[Path], key: str) -> Path:
    """Where a file, a folder or matches of a glob are, of `folders` the first."""
    folder = folder_of(path, folders)
    if folder is None:
        raise UserError(
            f"{key} {path}: no such file or folder (looked in {', '.join(map(str, folders))}); "
            "set data.root or MTRAIN_DATA to the folder of the data"
        )
    return folder / os.path.expanduser(path)


def _files(paths: str | list[str], config: DataConfig, beside: Path | None) -> list[str]:
    files = []
    for path in [paths] if isinstance(paths, str) else paths:
        found = _find(path, config, beside)
        if not found and not isinstance(config.path, str):
            raise UserError(
                f"data.path: '{path}' is no file; a hub id stands alone (data.path: {path}) and brings its own splits"
            )
        files += found
    return files


def _find(path: str, config: DataConfig, beside: Path | None) -> list[str]:
    """Files behind one path; none if it can only be a hub id."""
    roots = search_folders(config.root, beside)
    if (root := folder_of(path, roots)) is not None:
        full = root / os.path.expanduser(path)
        if full.is_file():
            return [str(full)]
        if not full.is_dir():
            return sorted(glob.glob(str(full), recursive=True))
        found = sorted(str(f) for f in full.rglob("*") if f.is_file() and format_of(f.name))
        found = [f for f in found if not f.endswith(".txt")] or found  # a readme beside tables
        if not found:
            raise UserError(f"data.path {full}: the folder holds no csv, json, parquet or arrow file")
        if len(kinds := sorted({str(format_of(f)) for f in found})) > 1:
            raise UserError(f"data.path {full}: the folder holds {' and '.join(kinds)} files, expected one type; use a glob")
        return found
    looks_like_a_file = format_of(path) or path.startswith((".", "/", "~")) or is_glob(path)
    if "://" not in path and (looks_like_a_file or path.count("/") != 1):
        raise UserError(
            f"data.path {path}: no such file (looked in {', '.join(str(r) for r in roots)}); "
            "set data.root or MTRAIN_DATA to the folder of the data"
        )
    return [path] if "://" in path else []


def format_of(name: str) -> str | None:
    """csv, json, parquet or arrow, by a file's ending; compression does not matter."""
    suffixes = [s.lstrip(".").lower() for s in Path(name).suffixes]
    return next((_FORMATS[s] for s in reversed(suffixes) if s in _FORMATS), None)


def is_glob(path: str) -> bool:
    return any(c in path for c in "*?[")


def _form(files: list[str], config: DataConfig) -> str:
    form = config.format or format_of(files[0])
    if form is None:
        raise UserError(f"data.path {files[0]}: unknown file type; set data.format to csv, json, parquet or arrow")
    return form


def _load(files: dict[str, list[str]], config: DataConfig) -> dict[str, datasets.Dataset]:
    every = [file for paths in files.values() for file in paths]
    form = _form(every, config)
    options: dict[str, object] = {}
    if form == "csv":
        options = {"chunksize": 2**31 - 1}  # one chunk, so that a column has one type however long the file is
        options["sep"] = separator = separator_of(every[0])
        try:
            headers = {file: read_header(file, separator) for file in every if "://" not in file}
        except ReadError as error:
            raise UserError(f"data.path {error}") from error
        if problem := odd_column(headers):
            raise UserError(f"data.path: {problem}")
    try:
        return datasets.load_dataset(form, data_files=files, keep_in_memory=config.in_memory, **options)
    except Exception as error:  # the libraries below raise many types for a broken file
        empty = all(os.path.getsize(file) == 0 for file in every if "://" not in file)
        if empty or any(sign in str(error.__cause__ or error) for sign in NO_ROWS):
            raise UserError(f"data.path {', '.join(every[:3])}: no rows, expected at least one") from error
        if odd := _odd_schema(every, form):
            raise UserError(f"data.path {odd}") from error
        same = "; all files need the same columns and types" if len(every) > 1 else ""
        raise UserError(f"data.path {', '.join(every[:3])}: cannot be read as {form}: {reason(error)}{same}") from error


def _load_hub(config: DataConfig) -> dict[str, datasets.Dataset]:
    try:
        found = datasets.load_dataset(config.path, config.name, split=config.source_split, keep_in_memory=config.in_memory)
        return {"train": found} if isinstance(found, datasets.Dataset) else found
    except Exception as error:
        raise UserError(f"data.path {config.path}: no such file, and the hub says: {reason(error)}") from error


def _hub_files(config: DataConfig) -> tuple[str, dict[str, list[str]]]:
    """Format, and the files of each chosen split of a hub data set."""
    path = str(config.path)
    instead = "set data.streaming: false"
    form, splits = hub_files(path, config.name, "data.path ", f"; {instead}")
    if config.source_split is None:
        return form, splits
    if config.source_split not in splits:
        near = nearest(config.source_split, splits)
        raise UserError(
            f"data.source_split: no split '{config.source_split}' in {path}{near}; a stream reads whole splits: {instead} else"
        )
    return form, {"train": splits[config.source_split]}


def hub_files(path: str, name: str | None, key: str = "", instead: str = "") -> tuple[str, dict[str, list[str]]]:
    """Format, and the files of each split of a hub data set, as its README says or its folders show.

    Args:
        name: its configuration.
        key, instead: beginning and end of messages.

    Raises:
        UserError: the hub does not answer, or its files cannot be read without `datasets.load_dataset`.
    """
    try:
        builder = datasets.load_dataset_builder(path, name)
    except Exception as error:  # the hub, or what its README says
        missing = "" if os.path.isdir(path) else "no such file, and "
        raise UserError(f"{key}{path}: {missing}the hub says: {reason(error)}") from error
    splits = {str(split): [str(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
    form = next((form for form, kind in _BUILDERS.items() if isinstance(builder, kind)), None)
    if form is None or not splits:
        raise UserError(f"{key}{path}: found no parquet, csv or json files, which alone can be read here{instead}")
    if form != "parquet":
        first = next(iter(splits.values()))[0]
        plain = type(builder.config)(sep=separator_of(first)) if form == "csv" else type(builder.config)()
        same = ("name", "version", "data_dir", "data_files", "description")
        for option, value in vars(plain).items():
            if option not in same and getattr(builder.config, option) != value:
                raise UserError(f"{key}{path}: its README sets {option}, which is not followed here{instead}")
    return form, splits


def open_many(groups: Sequence[Sequence[str]], form: str, chunk_rows: int, retries: int) -> list[Table | ReadError]:
    """A table for each list of files, to be read by the chunk, or what is wrong with it.

    Args:
        form: csv, json, parquet, or arrow, which is memory-mapped.
    """
    if form == "arrow":
        return open_mapped(groups, form, chunk_rows)

    def open_one(files: Sequence[str]) -> Table | ReadError:
        try:
            return (
                ParquetTable(files, chunk_rows, retries) if form == "parquet" else TextTable(files, form, chunk_rows, retries)
            )
        except ReadError as error:
            return error

    return in_threads(open_one, groups)


def open_mapped(groups: Sequence[Sequence[str]], form: str, chunk_rows: int) -> list[Table | ReadError]:
    """A table for each list of files, converted by `datasets` to its cache and memory-mapped, or what is wrong with it."""
    opened: dict[int, Table | ReadError] = {}
    alike: dict[Hashable, list[int]] = {}
    rows: dict[int, int] = {}
    for g, found in enumerate(in_threads(lambda files: _signature(files, form), groups)):
        if isinstance(found, ReadError):
            opened[g] = found
        else:
            alike.setdefault(g if found[0] is None else found[0], []).append(g)
            rows[g] = found[1]
    most = len(groups) if form == "parquet" else _SPLITS_A_CALL
    with quiet():
        for every in alike.values():
            for together in (every[i : i + most] for i in range(0, len(every), most)):
                try:
                    opened |= zip(
                        together,
                        _map([groups[g] for g in together], form, chunk_rows, [rows[g] for g in together]),
                        strict=True,
                    )
                except Exception:  # one of them is broken; whichever it is says so by itself
                    opened |= {g: _map_one(groups[g], form, chunk_rows, rows[g]) for g in together}
    return [opened[g] for g in range(len(groups))]


def _map_one(files: Sequence[str], form: str, chunk_rows: int, num_rows: int) -> Table | ReadError:
    try:
        return retrying(lambda: _map([files], form, chunk_rows, [num_rows])[0], 0, ", ".join(files[:3]))
    except ReadError as error:
        return _odd_schema(files, form) or error


def _odd_schema(files: Sequence[str], form: str) -> ReadError | None:
    """What `datasets` refuses in the columns of the local ones of Parquet or Arrow files."""
    for file in files if form in ("parquet", "arrow") else ():
        try:
            schema = None if "://" in file else _schema(file, form)
            check_unique(file, [] if schema is None else schema.names)
        except ReadError as error:
            return error
        except (OSError, pa.ArrowException):
            continue  # a broken file: what it was opened with says so
        for column in schema or ():
            try:
                datasets.Features.from_arrow_schema(pa.schema([column]))
            except ValueError:
                instead = "; or set data.streaming: true, which reads only what is used" if form == "parquet" else ""
                return ReadError(
                    f"{file}: column '{column.name}' has type {column.type}, which cannot be memory-mapped, expected numbers, "
                    f"text or lists; convert it, or leave it out of the file{instead}"
                )
    return None


def _schema(file: str, form: str) -> pa.Schema:
    if form == "parquet":
        return pq.read_schema(file)
    with pa.memory_map(file) as source:
        try:
            return pa.ipc.open_stream(source).schema
        except pa.ArrowInvalid:
            return pa.ipc.open_file(source).schema


def _map(groups: Sequence[Sequence[str]], form: str, chunk_rows: int, rows: Sequence[int]) -> list[Table]:
    """Tables of one schema with one call. Where rows are known (Parquet) they are parts of one split, else each has its own."""
    names = [some(list(files), 1) for files in groups]
    paths = [[file if "://" in file else glob.escape(file) for file in files] for files in groups]
    if form == "parquet":
        data = datasets.load_dataset(form, data_files=[path for each in paths for path in each], split="train")
        first = np.cumsum([0, *rows]).tolist()
        if len(data) != first[-1]:
            raise ReadError(f"{groups[0][0]}: its rows changed while it was read, or those of a file beside it")
        return [MappedTable(data, chunk_rows, range(*first[i : i + 2]), name) for i, name in enumerate(names)]
    # one chunk, so that a column has one type however long the file is
    options = {"sep": separator_of(groups[0][0]), "chunksize": 2**31 - 1} if form == "csv" else {}
    found = datasets.load_dataset(form, data_files={f"g{i}": each for i, each in enumerate(paths)}, **options)
    return [MappedTable(found[f"g{i}"], chunk_rows, name=name) for i, name in enumerate(names)]


def _signature(files: Sequence[str], form: str) -> tuple[Hashable, int] | ReadError:
    """What tables that are converted together have in common (None: unknown), and the number of rows if they are Parquet."""
    if form == "arrow" or (form != "parquet" and any("://" in file for file in files)):
        return None, 0
    try:
        found = [retrying(lambda file=file: _peek(file, form), 0, file) for file in files]  # type: ignore[misc]
    except ReadError as error:
        return error
    rows = sum(each[1] for each in found)
    if form == "parquet" and not rows:
        return ReadError(f"{', '.join(files[:3])}: no rows, expected at least one")
    return found[0][0] if len({each[0] for each in found}) == 1 else None, rows


def _peek(file: str, form: str) -> tuple[Hashable, int]:
    if form == "parquet":
        with parquet_file(file) as (_, opened):
            return str(opened.schema_arrow.remove_metadata()), opened.metadata.num_rows
    if form == "csv":
        separator = separator_of(file)
        read_header(file, separator)
        first_rows = pd.read_csv(file, sep=separator, nrows=1000)
        if first_rows.empty:
            raise ReadError(f"{file}: no rows, expected at least one")
        return (separator, *((name, str(kind)) for name, kind in first_rows.dtypes.items())), 0
    try:
        with fsspec.open(file, "rt", compression="infer", encoding="utf-8") as stream:
            first = json.loads(stream.readline())
    except ValueError:  # one list over several lines
        return file, 0
    return tuple((name, type(value).__name__) for name, value in first.items()) if isinstance(first, dict) else file, 0

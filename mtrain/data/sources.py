"""Tables from files and hubs, opened by `datasets`."""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet

from mtrain.components import find
from mtrain.config import DataConfig
from mtrain.data.splits import SOURCE
from mtrain.errors import UserError, nearest

if TYPE_CHECKING:
    from mtrain.data.tables import Table

_FORMATS = {
    "csv": "csv", "tsv": "csv", "txt": "csv", "json": "json", "jsonl": "json", "ndjson": "json",
    "parquet": "parquet", "pq": "parquet", "arrow": "arrow", "feather": "arrow",
}  # fmt: skip


_BUILDERS = {"csv": Csv, "json": Json, "parquet": Parquet}
PYTHON = "python:"
_LARGE = 2e9  # bytes
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
    files = _files_by_split(config, beside)
    with quiet():
        loaded = _load(files, config) if files else _load_hub(config)
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    tables = [data.add_column(SOURCE, [split] * len(data)) for split, data in loaded.items()]
    try:
        return datasets.concatenate_datasets(tables)
    except (ValueError, TypeError) as error:
        raise UserError(f"data.path: the splits {', '.join(loaded)} have different columns: {reason(error)}") from None


def open_stream(config: DataConfig, beside: Path | None, chunk_rows: int) -> Table:
    """Open the table that `config` names, to be read by the chunk.

    Arrow files and functions have no stream: they are memory-mapped, or in memory as the function returns them.

    Args:
        beside: as for `open_table`.

    Raises:
        UserError: as `open_table`, or a hub data set that cannot be read by the chunk.
    """
    from mtrain.data.tables import JoinedTable, MappedTable, Piece, ReadError, open_many  # which imports this module

    if isinstance(config.path, str) and config.path.startswith(PYTHON):
        return MappedTable(open_table(config, beside), chunk_rows)
    files = _files_by_split(config, beside)
    with quiet():
        if files:
            form = _form([file for paths in files.values() for file in paths], config)
            if form == "arrow":
                return MappedTable(open_table(config, beside), chunk_rows)
        else:
            form, files = _hub_files(config)
        opened = open_many(list(files.values()), form, chunk_rows, config.retries)
    tables = []
    for table in opened:
        if isinstance(table, ReadError):
            raise UserError(f"data.path {table}")
        tables.append(table)
    if len(tables) == 1:
        return tables[0]
    names = {split: sorted(table.column_names) for split, table in zip(files, tables, strict=True)}
    first = next(iter(names))
    for split in names:
        for odd in sorted(set(names[first]) ^ set(names[split])):
            here, there = (split, first) if odd in names[split] else (first, split)
            raise UserError(
                f"data.path: column '{odd}' is in the split {here} but not in {there}, expected the same columns in all"
            )
    return JoinedTable(
        [Piece(table, constants={SOURCE: split}, name=f"split '{split}'") for split, table in zip(files, tables, strict=True)]
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of `datasets`."""
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(verbosity)


def local_files(config: DataConfig, beside: Path | None) -> list[str]:
    """The files of one table; none where it comes from a hub or a function."""
    if isinstance(config.path, str) and config.path.startswith(PYTHON):
        return []
    paths = config.path.values() if isinstance(config.path, dict) else [config.path]
    return [file for each in paths for file in _files(each, config, beside)]


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


def search_folders(config: DataConfig, beside: Path | None) -> list[Path]:
    """Where relative paths are looked for, in this order."""
    root = config.root or os.environ.get("MTRAIN_DATA")
    return list(dict.fromkeys(Path(p) for p in (root, ".", beside) if p is not None))


def _files_by_split(config: DataConfig, beside: Path | None) -> dict[str, list[str]]:
    """The files of each split; empty where the path can only be a hub id."""
    by_split = config.path if isinstance(config.path, dict) else {"train": config.path}
    files = {split: _files(paths, config, beside) for split, paths in by_split.items()}
    if isinstance(config.path, str) and not files["train"]:
        return {}
    if config.name or config.source_split:
        raise UserError("data.name and data.source_split are for hub data sets, but data.path names files; leave them out")
    return files


def _files(paths: str | list[str], config: DataConfig, beside: Path | None) -> list[str]:
    return [file for path in ([paths] if isinstance(paths, str) else paths) for file in _find(path, config, beside)]


def _find(path: str, config: DataConfig, beside: Path | None) -> list[str]:
    """Files behind one path; none if it can only be a hub id."""
    roots = search_folders(config, beside)
    for root in roots:
        full = root / os.path.expanduser(path)
        if os.path.isfile(full):  # pathlib's raises for a name that is too long
            return [str(full)]
        if os.path.isdir(full):
            found = sorted(str(f) for f in full.rglob("*") if f.is_file() and format_of(f.name))
            if not found:
                raise UserError(f"data.path {full}: the folder holds no csv, json, parquet or arrow file")
            if len(kinds := sorted({str(format_of(f)) for f in found})) > 1:
                raise UserError(
                    f"data.path {full}: the folder holds {' and '.join(kinds)} files, expected one type; use a glob"
                )
            return found
        if any(c in path for c in "*?[") and (found := sorted(glob.glob(str(full), recursive=True))):
            return found
    looks_like_a_file = format_of(path) or path.startswith((".", "/", "~")) or any(c in path for c in "*?[")
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
        options["sep"] = separator = "\t" if ".tsv" in every[0] else ","
        check_headers([file for file in every if "://" not in file], separator)
    try:
        return datasets.load_dataset(form, data_files=files, keep_in_memory=config.in_memory, **options)
    except Exception as error:  # the libraries below raise many types for a broken file
        empty = all(os.path.getsize(file) == 0 for file in every if "://" not in file)
        if empty or any(sign in str(error.__cause__ or error) for sign in _NO_ROWS):
            raise UserError(f"data.path {', '.join(every[:3])}: no rows, expected at least one") from error
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
        separator = "\t" if ".tsv" in next(iter(splits.values()))[0] else ","
        plain = type(builder.config)(sep=separator) if form == "csv" else type(builder.config)()
        same = ("name", "version", "data_dir", "data_files", "description")
        for option, value in vars(plain).items():
            if option not in same and getattr(builder.config, option) != value:
                raise UserError(f"{key}{path}: its README sets {option}, which is not followed here{instead}")
    return form, splits


def reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, StopIteration) or any(sign in str(error) for sign in _NO_ROWS):
        return "no rows, expected at least one"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text ({error.reason} at byte {error.start}); if it is text, convert it: iconv -f latin1 -t utf-8"
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"


def check_headers(files: list[str], separator: str) -> None:
    """Refuse what pandas would pass over: equal names, rows shifted against the header, other columns in another file."""
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


def check_separator(what: str, names: Sequence[str]) -> None:
    """Refuse a header that was not divided into columns."""
    other = next((c for c in ";\t,|" if len(names) == 1 and c in names[0]), None)
    if other is not None:
        wanted = "commas in a .csv, tabs in a .tsv"
        raise UserError(f"{what}: its columns seem to be separated by {other!r}, expected {wanted}; convert it")


def _header(file: str, separator: str) -> list[str]:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    csv.field_size_limit(2**31 - 1)
    try:
        with openers.get(Path(file).suffix, open)(file, "rt", newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, delimiter=separator)
            names, first = next(reader, []), next(reader, [])
    except (OSError, EOFError, ValueError, csv.Error, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"data.path {file}: cannot be read as csv: {reason(error)}") from error
    if not names:
        raise UserError(f"data.path {file}: the file is empty, expected a header and rows")
    if "\0" in "".join(names):
        raise UserError(f"data.path {file}: holds binary data, expected CSV text; set data.format if it is of another type")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UserError(f"data.path {file}: two columns are named '{twice}', expected unique names; rename one")
    check_separator(f"data.path {file}", names)
    if len(first) > len(names):
        raise UserError(
            f"data.path {file}: row 1 has {len(first)} values but the header {len(names)} names; mend the header or the row"
        )
    return names

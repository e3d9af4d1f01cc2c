"""Columns to matrices: how inputs become float32 numbers.

A *feature* reads one or several columns and gives a matrix. `encode` looks at each row alone; `fit` takes its
statistics from the training rows only; `transform` applies them. Columns go from Arrow to numpy without a Python object
a row.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.special import ndtri

from mtrain.components import Spec
from mtrain.errors import UserError, nearest, some

OnInvalid = Literal["error", "skip"]

FLOAT32_MAX = float(np.finfo(np.float32).max)
NUM_QUANTILES = 256
SHOWN = 10  # names in one message before "and N more"


@dataclass
class Encoded:
    """What `Feature.encode` makes of n rows.

    `values` [n, k] are raw values, NaN where missing (integers where nothing can be missing; objects with None where
    they are categories). `valid` [n] is False for a row that cannot be used at all: its values mean nothing.
    """

    values: np.ndarray
    valid: np.ndarray


class Feature(ABC):
    """One or several columns to a float32 matrix. Subclass it for your own, and name it by its import path:

        class Length(Feature):
            def __init__(self, per: float = 1.0):        # options: plain types, annotated, with defaults
                self.per = per                           # each is kept under its own name

            def encode(self, table):                     # row by row: no statistics here
                values = pc.utf8_length(table.column(0)).to_numpy().astype(np.float32)[:, None] / self.per
                return Encoded(values, np.ones(len(values), bool))

    `encode` gets the columns that this feature was given, in order. Mark a row that cannot be used by `valid=False`:
    `encode_column` then refuses it or passes it on, as the option `on_invalid` says. `fit` and `transform` may be left
    out: then the values are used as they are. What `fit` learns goes into `self.state` (lists, numbers and strings
    only: it is saved as JSON), with the matrix's `width`; what a person should know goes into `self.notes`.

    A slow `encode` sets `cached = True`: it then runs once for each distinct value, in parallel, and is kept on disk.
    The key of that cache is the source of the modules that define the class, the options that `encode` depends on
    (`encode_options`; None: all of them), `version()` and the values.
    """

    packed: ClassVar[str] = ""  # what the values are where they are not quantities, for a trunk that unpacks them
    cached: ClassVar[bool] = False
    encode_options: ClassVar[tuple[str, ...] | None] = None
    expected: ClassVar[str] = "a usable value"  # ends the line that refuses an invalid row
    on_invalid: OnInvalid = "error"
    notes: Sequence[str] = ()
    state: dict[str, Any]

    @abstractmethod
    def encode(self, table: pa.Table) -> Encoded:
        """Raw values of each row of `table`, which holds the matched columns (one or more)."""

    def fit(self, values: np.ndarray, columns: list[str]) -> None:
        """Take statistics from `values` [n, k], the *training* rows of what `encode` gave for `columns`."""
        self.state = {"columns": list(columns), "inputs": values.shape[1], "width": values.shape[1]}

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Encoded values [n, k] to float32 [n, width]."""
        self._check_width(values)
        return np.asarray(values, np.float32)

    @property
    def width(self) -> int:
        """Columns of the matrix, known after `fit`."""
        return self.state["width"]

    def state_dict(self) -> dict[str, Any]:
        """What `fit` learnt, as JSON can hold it."""
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)

    def version(self) -> str:
        """Of the library that `encode` calls: part of the cache's key."""
        return ""

    def _check_width(self, values: np.ndarray) -> None:
        if values.shape[1] != self.state["inputs"]:
            raise UserError(
                f"{_names(self.state['columns'])}: {values.shape[1]} values in a row, expected "
                f"{self.state['inputs']} as in training; encode these rows as the training rows were"
            )


class Numeric(Feature):
    """Any number of numeric or bool columns as one matrix.

    In this order: `transform` (log1p), missing values (null or NaN) filled with the training mean or median,
    `transform` (quantile: normal scores of the mid-rank among the training values, from at most 256 of them),
    `standardize` to mean 0 and variance 1, `clip` to [-clip, clip]. `indicator` appends a 0/1 column for each column
    with missing values in training. Columns that are constant in training are dropped, and said in `notes`.

    Raises UserError for text, for infinity, for a value beyond float32, for x <= -1 with log1p and, with
    `impute="error"`, for a missing value.
    """

    def __init__(
        self,
        standardize: bool = True,
        impute: Literal["mean", "median", "error"] = "median",
        indicator: bool = False,
        clip: float | None = None,
        transform: Literal["none", "log1p", "quantile"] = "none",
    ):
        if clip is not None and not 0 < clip < np.inf:
            raise UserError(f"Numeric: clip is {clip}, expected a number above 0, or null for none")
        self.standardize, self.impute, self.indicator, self.clip = standardize, impute, indicator, clip
        self._transform = transform

    def encode(self, table: pa.Table) -> Encoded:
        values = _floats(table)
        if values is None:
            values = np.stack([_numbers(name, table[name]) for name in table.column_names], axis=1)

        def refuse(bad: np.ndarray, message: str) -> None:
            if bad.any():
                row, column = np.unravel_index(int(bad.argmax()), bad.shape)
                value = values[row, column]
                raise UserError(f"column '{table.column_names[column]}', row {row + 1}: {message.format(value=value)}")

        refuse(np.abs(values) > FLOAT32_MAX, "found {value:g}, expected a finite number that fits float32; mend it")
        if self.impute == "error":
            refuse(np.isnan(values), "missing value, expected a number; mend it, or set impute to mean or median")
        if self._transform == "log1p":
            refuse(values <= -1, "found {value:g}, expected a number above -1 for log1p; use transform: quantile")
        return Encoded(values, np.ones(len(values), bool))

    def fit(self, values: np.ndarray, columns: list[str]) -> None:
        x = self._logged(values)
        missing = np.isnan(x)
        num_missing = missing.sum(0)
        low = np.min(x, axis=0, where=~missing, initial=np.inf)
        high = np.max(x, axis=0, where=~missing, initial=-np.inf)
        keep = np.flatnonzero(high > low)
        indicator = np.flatnonzero((num_missing > 0) & (num_missing < len(x))) if self.indicator else np.arange(0)
        empty, constant = np.flatnonzero(num_missing == len(x)), np.flatnonzero(high == low)
        if not len(keep) + len(indicator):
            _refuse_constant(columns, len(x))
        notes = [
            f"dropped {what} {_names([columns[i] for i in which])}"
            for what, which in (("constant", constant), ("all-missing", empty))
            if len(which)
        ]
        if len(filled := [i for i in keep if num_missing[i]]):
            counts = some([f"{columns[i]} ({num_missing[i]} of {len(x)})" for i in filled], SHOWN)
            notes.append(f"filled missing training values with the {self.impute}: {counts}")

        x = x[:, keep]
        fill = (np.nanmean if self.impute == "mean" else np.nanmedian)(x, axis=0) if len(keep) else np.zeros(0)
        self.notes = notes
        self.state = {
            "columns": list(columns),
            "inputs": len(columns),
            "width": len(keep) + len(indicator),
            "keep": keep.tolist(),
            "indicator": indicator.tolist(),
            "fill": fill.tolist(),
        }
        if self._transform == "quantile":
            observed = (np.sort(column[~np.isnan(column)]) for column in x.T)
            self.state["scores"] = [{"rows": len(o), "values": o[_positions(len(o))].tolist()} for o in observed]
        if self.standardize:
            x = self._filled(x)
            std = x.std(0)
            self.state |= {"mean": x.mean(0).tolist(), "std": np.where(std > 0, std, 1.0).tolist()}

    def transform(self, values: np.ndarray) -> np.ndarray:
        self._check_width(values)
        x = self._filled(self._logged(values).take(self.state["keep"], axis=1))
        if self.standardize:
            x -= self.state["mean"]
            x /= self.state["std"]
        if self.clip is not None:
            x = np.clip(x, -self.clip, self.clip)
        if self.state["indicator"]:
            x = np.hstack([x, np.isnan(values[:, self.state["indicator"]])])
        return x.astype(np.float32)

    def _logged(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, np.float64)
        return np.log1p(values) if self._transform == "log1p" else values

    def _filled(self, x: np.ndarray) -> np.ndarray:
        """Kept columns (a copy) with missing values filled in place, then as normal scores if asked for."""
        if (missing := np.isnan(x)).any():
            np.copyto(x, self.state["fill"], where=missing)
        for column, score in zip(x.T, self.state.get("scores", ()), strict=False):
            column[:] = _normal_scores(column, np.asarray(score["values"]), score["rows"])
        return x


class Array(Feature):
    """One list column (fixed or not, nested or not: embeddings, images, bags of words) flattened to [n, k].

    Each row is scaled to length 1 (`normalize="l2"`) or to a root mean square of 1 ("rms"; a row of zeros stays), then
    each position to training mean 0 and variance 1 (`standardize`; a position that is constant in training becomes 0).
    No position is dropped.

    Raises UserError for rows of differing length and for missing or infinite values.
    """

    def __init__(self, standardize: bool = False, normalize: Literal["none", "l2", "rms"] = "none"):
        self.standardize, self.normalize = standardize, normalize

    def encode(self, table: pa.Table) -> Encoded:
        name = only_column(self, table)
        values = _matrix(name, table[name])
        if values.dtype.kind == "f":
            bad = ~(np.abs(values) <= FLOAT32_MAX)
            if bad.any():
                row, position = np.unravel_index(int(bad.argmax()), bad.shape)
                raise UserError(
                    f"column '{name}', row {row + 1}: found {values[row, position]:g} at position {position + 1}, "
                    "expected finite numbers that fit float32; mend the value or leave the row out"
                )
        return Encoded(values, np.ones(len(values), bool))

    def fit(self, values: np.ndarray, columns: list[str]) -> None:
        super().fit(values, columns)
        if self.standardize:
            x = self._normalized(values)
            std = x.std(0, dtype=np.float64)
            constant = x.max(0) == x.min(0)
            if constant.any():
                count = f"{constant.sum()} of {len(std)} positions"
                self.notes = [f"column '{columns[0]}': {count} are constant in training"]
            mean = np.where(constant, x[0], x.mean(0, dtype=np.float64))
            self.state |= {"mean": mean.tolist(), "std": np.where(constant, 1.0, std).tolist()}

    def transform(self, values: np.ndarray) -> np.ndarray:
        self._check_width(values)
        x = self._normalized(values)
        if self.standardize:
            x = (x - self.state["mean"]) / self.state["std"]
        return np.asarray(x, np.float32)

    def _normalized(self, values: np.ndarray) -> np.ndarray:
        if self.normalize == "none":
            return values
        norm = np.sqrt(np.einsum("nk,nk->n", values, values, dtype=np.float64, casting="unsafe"))[:, None]
        unit = values / np.where(norm > 0, norm, 1.0)
        return unit if self.normalize == "l2" else unit * values.shape[1] ** 0.5


class Categorical(Feature):
    """One-hot of string, integer, bool or dictionary columns, each with its own vocabulary from training rows.

    The vocabulary of a column holds the `max_categories` most frequent values that occur at least `min_count` times, in
    alphabetical order. Everything else (rarer, unseen or missing) goes to a last column "other" if some training row
    does; if none does, "other" could not be learnt, so there is no such column and unseen or missing values are all
    zeros. A column with one category for all training rows is dropped, and said in `notes`.

    Raises UserError for numbers that are not whole and for types without categories (lists).
    """

    def __init__(self, max_categories: int = 1000, min_count: int = 1):
        if max_categories < 1 or min_count < 1:
            raise UserError(
                f"Categorical: max_categories is {max_categories}, min_count {min_count}; expected at least 1 for both"
            )
        self.max_categories, self.min_count = max_categories, min_count

    def encode(self, table: pa.Table) -> Encoded:
        values = np.empty((table.num_rows, table.num_columns), object)
        for i, name in enumerate(table.column_names):
            codes, names = encode_categories(_text(name, table[name]))
            values[:, i] = np.array([*names.to_pylist(), None], object)[codes]  # code -1, missing: None
        return Encoded(values, np.ones(len(values), bool))

    def fit(self, values: np.ndarray, columns: list[str]) -> None:
        vocabulary: list[list[str]] = []
        other: list[bool] = []
        notes = []
        pooled: dict[str, list[str]] = {}
        for name, column in zip(columns, values.T, strict=True):
            codes, names = encode_categories(pa.array(column, pa.string()))
            counts = np.bincount(codes + 1, minlength=len(names) + 1)[1:]
            found = sorted(zip(-counts, names.to_pylist(), strict=True))
            kept = sorted(category for count, category in found[: self.max_categories] if -count >= self.min_count)
            left = len(column) - int(counts[np.isin(names.to_pylist(), kept)].sum())
            if len(kept) + (left > 0) < 2:
                notes.append(f"dropped constant column '{name}'")
                kept, left = [], 0
            elif left and len(kept) == len(names):
                what = "missing values are a category of their own"
                pooled.setdefault(what, []).append(f"{name} ({left} of {len(column)})")
            elif left:
                rare = f"{len(names) - len(kept)} of {len(names)} categories"
                what = "rare categories" + " and missing values" * bool((codes < 0).any()) + " share the category 'other'"
                pooled.setdefault(what, []).append(f"{name} ({rare}, {left} of {len(column)} rows)")
            vocabulary.append(kept)
            other.append(left > 0)
        width = sum(map(len, vocabulary)) + sum(other)
        if not width:
            _refuse_constant(columns, len(values))
        self.notes = notes + [f"{what}: {some(each, SHOWN)}" for what, each in pooled.items()]
        self.state = {
            "columns": list(columns),
            "inputs": len(columns),
            "width": width,
            "vocabulary": vocabulary,
            "other": other,
        }

    def transform(self, values: np.ndarray) -> np.ndarray:
        self._check_width(values)
        out = np.zeros((len(values), self.width), np.float32)
        start = 0
        for column, names, other in zip(values.T, self.state["vocabulary"], self.state["other"], strict=True):
            found = pc.index_in(pa.array(column, pa.string()), value_set=pa.array(names, pa.string()))
            place = pc.fill_null(found, len(names)).to_numpy()
            rows = np.flatnonzero(place < len(names) + other)
            out[rows, start + place[rows]] = 1
            start += len(names) + other
        return out


def encode_column(table: pa.Table, columns: list[str], feature: Feature, num_proc: int = 1, cache: bool = True) -> Encoded:
    """Run `feature.encode` over all rows of `table`.

    With `cache`, a `cached` feature runs through `Dataset.map`, once for each distinct value, in `num_proc` processes, and
    is kept in datasets' cache directory under a key that depends only on the feature's code, its options and the values: a
    second run reads it from there. Raises UserError for a column that is not there, for a feature that fails or breaks its
    contract and, with `on_invalid="error"`, for the first row that cannot be used; with `on_invalid="skip"` such rows come
    back with `valid` False.
    """
    known = set(table.column_names)
    for name in columns:
        if name not in known:
            raise UserError(f"no column '{name}' in the data{nearest(name, table.column_names)}")
    if not len(table):
        raise UserError(f"{_names(columns)}: the data have no rows, expected at least one")
    table = table.select(columns)
    with in_one_line(feature, columns):
        encoded = _encode_cached(table, feature, num_proc) if feature.cached and cache else encode_rows(table, feature)
    if feature.on_invalid == "error" and not encoded.valid.all():
        row = int(encoded.valid.argmin())
        found = ", ".join(repr(str(table[name][row].as_py() or ""))[:80] for name in columns)
        raise UserError(
            f"{_names(columns)}, row {row + 1}: found {found}, expected {feature.expected} "
            f"({(~encoded.valid).sum()} such rows in {len(table)}); mend them, or leave them out with on_invalid: skip"
        )
    return encoded


def encode_rows(table: pa.Table, feature: Feature) -> Encoded:
    """What `feature.encode` gives for the rows of `table`.

    Raises:
        UserError: it refuses them, fails, or gives something else than numbers for each row.
    """
    with in_one_line(feature, table.column_names):
        encoded = feature.encode(table)
    num_rows, found = len(table), _kind(encoded)
    if isinstance(encoded, Encoded):
        values, valid = encoded.values, encoded.valid
        if (
            isinstance(values, np.ndarray)
            and isinstance(valid, np.ndarray)
            and (values.ndim, len(values), valid.shape, valid.dtype) == (2, num_rows, (num_rows,), bool)
        ):
            return encoded
        found = f"values {_kind(values)} and valid {_kind(valid)}"
    raise UserError(
        f"{_names(table.column_names)}: {type(feature).__name__} encodes {num_rows} rows as {found}, expected an Encoded with "
        f"values [{num_rows}, k] and valid bool [{num_rows}]"
    )


def transform_rows(encoded: Encoded, columns: list[str], feature: Feature) -> np.ndarray:
    """The matrix float32 [n, width] of encoded rows. Rows that are not valid may hold anything.

    Raises:
        UserError: `feature.transform` refuses them, fails, or gives something else, or numbers that are not finite.
    """
    with in_one_line(feature, columns), np.errstate(over="ignore"):
        matrix = feature.transform(encoded.values)
        expected = len(encoded.values), feature.width
        name = type(feature).__name__
        if not isinstance(matrix, np.ndarray) or matrix.shape != expected:
            raise UserError(f"{_names(columns)}: {name} transforms to {_kind(matrix)}, expected float32 {list(expected)}")
        x = np.asarray(matrix, np.float32)
    if x.size and not np.isfinite([x.min(), x.max()]).all():
        bad = ~np.isfinite(x) & encoded.valid[:, None]
        if bad.any():
            row, position = np.unravel_index(int(bad.argmax()), bad.shape)
            raise UserError(
                f"{_names(columns)}, row {row + 1}: {name} gives {x[row, position]:g} at position {position + 1}, expected "
                "finite numbers that fit float32; mend the value, let the feature fill it, or have it mark the row as not valid"
            )
    return x


@contextmanager
def in_one_line(feature: Feature, columns: Sequence[str]) -> Iterator[None]:
    """Whatever the user's own feature raises, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{_names(columns)}: {type(feature).__name__} fails with {type(error).__name__}: {error}") from error


def infer_feature(field: pa.Field, values: pa.Array | pa.ChunkedArray) -> Spec:
    """The feature of a column for which the config names none, by its type, name and values.

    Numbers and bools are `Numeric`, lists `Array`, a text column with "smiles" in its name `ECFP`, other text with few
    distinct values (20, or a tenth of the rows up to 1000) `Categorical`. Anything else: UserError.
    """
    kind = field.type.storage_type if isinstance(field.type, pa.BaseExtensionType) else field.type
    if _is_list(kind):
        return Spec(class_path="Array")
    if is_number(kind):
        return Spec(class_path="Numeric")
    if pa.types.is_dictionary(kind):
        return Spec(class_path="Categorical")
    hint = f"say how to encode it, as in inputs: {{{field.name}: Categorical}}, or leave it out of inputs"
    if not is_text(kind):
        raise UserError(f"column '{field.name}' has type {kind}, expected numbers, text or lists; {hint}")
    if "smiles" in field.name.lower():
        return Spec(class_path="ECFP")
    num_distinct = pc.count_distinct(values).as_py()
    if num_distinct > max(20, min(1000, len(values) // 10)):
        found = f"text with {num_distinct} distinct values in {len(values)} rows"
        raise UserError(f"column '{field.name}' is {found}; {hint}")
    return Spec(class_path="Categorical")


def encode_categories(column: Any) -> tuple[np.ndarray, pa.Array]:
    """Codes int64 [n] of a column's values (-1: missing) and the distinct values, in order of first appearance."""
    if not isinstance(column, (pa.Array, pa.ChunkedArray)):
        column = pa.array(column, from_pandas=True)
    if pa.types.is_dictionary(column.type):  # it may hold values that do not occur
        column = column.cast(column.type.value_type)
    encoded = column.dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    return pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy(), encoded.dictionary


def _encode_cached(table: pa.Table, feature: Feature, num_proc: int) -> Encoded:
    import datasets

    place = None
    if table.num_columns == 1 and (is_text(table.field(0).type) or pa.types.is_integer(table.field(0).type)):
        column = pc.dictionary_encode(table.column(0), null_encoding="encode").combine_chunks()
        if len(column.dictionary) < len(column):
            place, table = column.indices.to_numpy(), pa.table({table.column_names[0]: column.dictionary})
    key = _cache_key(table, feature)
    path = Path(datasets.config.HF_DATASETS_CACHE) / "mtrain" / f"{type(feature).__name__}-{key}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    num_proc = min(num_proc, table.num_rows // 100)  # a process costs more than 100 rows
    out = (
        datasets.Dataset(table)
        .with_format("arrow")
        .map(
            partial(_encode_batch, feature=feature),
            batched=True,
            remove_columns=table.column_names,
            num_proc=num_proc if num_proc > 1 else None,
            cache_file_name=str(path) if key else None,
            new_fingerprint=key or datasets.fingerprint.generate_random_fingerprint(),
            desc=f"{type(feature).__name__} of {', '.join(table.column_names)}",
        )[:]
    )
    encoded = Encoded(_matrix("values", out["values"]), out["valid"].to_numpy())
    return encoded if place is None else Encoded(encoded.values[place], encoded.valid[place])


def _encode_batch(table: pa.Table, feature: Feature) -> pa.Table:
    encoded = encode_rows(table, feature)
    flat = pa.array(np.ascontiguousarray(encoded.values).ravel())
    values = pa.FixedSizeListArray.from_arrays(flat, encoded.values.shape[1])
    return pa.table({"values": values, "valid": pa.array(encoded.valid)})


def _cache_key(table: pa.Table, feature: Feature) -> str:
    """Empty where the feature's source cannot be read (a class typed into a prompt): then nothing is cached."""
    kinds = [kind for kind in type(feature).__mro__ if issubclass(kind, Feature) and kind is not Feature]
    try:
        sources = [inspect.getsource(sys.modules[kind.__module__]) for kind in kinds]
    except (OSError, TypeError):
        return ""
    options = feature.encode_options
    if options is None:
        options = tuple(inspect.signature(type(feature)).parameters)
    chosen = {name: getattr(feature, name) for name in options}
    about = [type(feature).__qualname__, feature.version(), json.dumps(chosen, sort_keys=True, default=str), *sources]
    sink = pa.BufferOutputStream()
    anonymous = table.rename_columns([str(i) for i in range(table.num_columns)]).replace_schema_metadata(None)
    # not Arrow's own format: the last byte of its bitmaps holds whatever the memory held before
    pq.write_table(anonymous, sink, compression="none")
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update(sink.getvalue())
    return digest.hexdigest()[:32]


def _floats(table: pa.Table) -> np.ndarray | None:
    """The whole matrix at once where all columns are float32, or all float64; else None."""
    kinds = set(table.schema.types)
    if len(kinds) > 1 or not kinds <= {pa.float32(), pa.float64()} or not len(table):
        return None
    (batch,) = table.combine_chunks().to_batches()
    return batch.to_tensor(null_to_nan=True).to_numpy()


def _numbers(name: str, column: pa.ChunkedArray) -> np.ndarray:
    """A numeric, bool or number-like text column as floats [n], NaN where missing."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if not (is_number(kind) or is_text(kind) or pa.types.is_null(kind)):
        hint = "use the feature Array" if _is_list(kind) else "use another feature or take it out of inputs"
        raise UserError(f"column '{name}' has type {kind}, expected numbers; {hint}")
    exact = pa.types.is_boolean(kind) or (not is_text(kind) and kind in _FIT_FLOAT32)
    target = pa.float32() if exact else pa.float64()
    if pa.types.is_float16(kind):
        column = column.cast(pa.float32())
    try:
        return pc.cast(column, target, safe=False).to_numpy()
    except pa.ArrowInvalid:
        row, text = next((i, t) for i, t in enumerate(column.to_pylist()) if t is not None and not _parses(t))
        raise UserError(
            f"column '{name}', row {row + 1}: found text {text[:80]!r}, expected a number; mend the value (leave it "
            "empty if it is missing), or use the feature Categorical"
        ) from None


def _parses(text: str) -> bool:
    try:
        pa.array([text]).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _text(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of categories as strings."""
    if pa.types.is_floating(column.type):  # integers with missing values often come as floats
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        if (row := pc.index(pc.equal(pc.trunc(column), column), pa.scalar(False)).as_py()) >= 0:
            raise UserError(
                f"column '{name}', row {row + 1}: found {column[row].as_py():g}, expected categories (text or whole "
                "numbers); use the feature Numeric"
            )
        column = column.cast(pa.int64())
    try:
        return column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise UserError(f"column '{name}' has type {column.type}, expected text, whole numbers or bools") from None


def _matrix(name: str, column: pa.ChunkedArray) -> np.ndarray:
    """A list column, nested or not, as [n, k], from Arrow's buffers."""
    blocks: list[np.ndarray] = []
    done = 0
    for chunk in column.chunks:
        leaf, num_values = chunk, 1  # values a row so far
        while True:
            if isinstance(leaf, pa.ExtensionArray):
                leaf = leaf.storage
            if leaf.null_count:
                row = done + pc.index(leaf.is_null(), pa.scalar(True)).as_py() // num_values
                raise UserError(
                    f"column '{name}', row {row + 1}: missing value, expected a full list of numbers; mend the row or "
                    "leave it out"
                )
            if not _is_list(leaf.type):
                break
            if pa.types.is_fixed_size_list(leaf.type):
                length = leaf.type.list_size
            elif len(leaf):
                lengths = pc.list_value_length(leaf).to_numpy()
                length = int(lengths[0])
                if (lengths != length).any():
                    odd = int((lengths != length).argmax())
                    _refuse_lengths(name, done + odd // num_values, int(lengths[odd]), done, length)
            else:
                length = 0
            leaf, num_values = leaf.flatten(), num_values * length
        if not num_values:
            raise UserError(f"column '{name}', row {done + 1}: an empty list, expected at least one number")
        if leaf is chunk or not is_number(leaf.type):
            hint = "use the feature Numeric or Categorical" if leaf is chunk else "use a feature of your own"
            raise UserError(f"column '{name}' has type {column.type}, expected lists of numbers; {hint}")
        if not len(chunk):
            continue
        if pa.types.is_boolean(leaf.type):
            leaf = leaf.cast(pa.uint8())
        elif pa.types.is_decimal(leaf.type):
            leaf = leaf.cast(pa.float64())
        if blocks and num_values != blocks[0].shape[1]:
            _refuse_lengths(name, done, num_values, 0, blocks[0].shape[1])
        blocks.append(leaf.to_numpy(zero_copy_only=False).reshape(len(chunk), num_values))
        done += len(chunk)
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def _refuse_lengths(name: str, row: int, length: int, first: int, expected: int) -> None:
    raise UserError(
        f"column '{name}', row {row + 1}: a list of {length}, expected {expected} as in row {first + 1}; make all rows "
        "the same length (pad or cut them)"
    )


def only_column(feature: Feature, table: pa.Table) -> str:
    if table.num_columns != 1:
        raise UserError(
            f"{type(feature).__name__} reads one column, got {_names(table.column_names)}; give each column its own"
        )
    return table.column_names[0]


def _refuse_constant(columns: Sequence[str], num_rows: int) -> None:
    raise UserError(
        f"{_names(columns)}: the same value (or none) in all {num_rows} training rows, so nothing can be learnt; leave "
        "out of inputs what does not vary"
    )


def _positions(num_rows: int) -> np.ndarray:
    """Which of `num_rows` sorted values are kept as quantiles: all, or 256 evenly spaced ones."""
    return np.rint(np.linspace(0, num_rows - 1, min(num_rows, NUM_QUANTILES))).astype(np.int64)


def _normal_scores(x: np.ndarray, quantiles: np.ndarray, num_rows: int) -> np.ndarray:
    """ndtri((r + 1/2) / n) with r the 0-based mid-rank of x among n training values, interpolated between quantiles."""
    ranks = _positions(num_rows)
    low = -np.interp(-x, -quantiles[::-1], -ranks[::-1])  # the first of tied quantiles, and the last: their middle
    return ndtri(((low + np.interp(x, quantiles, ranks)) / 2 + 0.5) / num_rows)


def is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


_FIT_FLOAT32 = {pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.float16(), pa.float32()}


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _names(columns: Sequence[str]) -> str:
    return f"column{'s' if len(columns) != 1 else ''} {some([repr(str(c)) for c in columns], SHOWN)}"

"""The inputs of a run as float32 rows: all in memory, or read by the chunk within a memory budget."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrain.components import Spec
from mtrain.data.features import Encoded, Feature, encode_column, transform_rows
from mtrain.data.tables import READERS, ReadError, Table
from mtrain.errors import UserError, some

_SAMPLE_BYTES = 1e9
R = TypeVar("R")


@dataclass
class FeatureColumn:
    """One feature and the columns that it reads.

    `encoded` are all rows, None where inputs are read by the chunk; but where a slow feature reads values that repeat,
    it is computed before for each of them: then `encoded` goes with `distinct`.
    """

    columns: list[str]
    spec: Spec
    feature: Feature
    encoded: Encoded | None = field(default=None, repr=False)
    distinct: pa.Array | None = field(default=None, repr=False)

    def encode(self, rows: pa.Table) -> Encoded:
        """The raw values of some rows of the table."""
        if self.distinct is None or self.encoded is None:
            return encode_column(rows, self.columns, self.feature)
        at_N = pc.index_in(rows[self.columns[0]], self.distinct)
        unknown_N = at_N.is_null().to_numpy()  # rows without a label: nobody asks for them
        at_N = at_N.fill_null(0).to_numpy()
        return Encoded(self.encoded.values[at_N], self.encoded.valid[at_N] | unknown_N)


class Inputs(Protocol):
    """The contract. Rows are numbered from 0.

    chunk_N: chunk of each row. key_C: a stable name of each chunk.
    in_memory: whether rows cost nothing to get.
    """

    width: int
    nbytes: int
    in_memory: bool
    chunk_N: NDArray[np.int64]
    key_C: NDArray[np.uint64]

    def gather(self, row_B: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.bool_] | None]:
        """`x_BF` of the rows, and which of them can be used (None: all)."""
        ...

    def failed(self) -> list[int]:
        """Chunks that could not be read, where `on_error` is skip_task."""
        ...

    def notes(self) -> list[str]:
        """What a person should know of the rows that were read."""
        ...


class MemoryInputs:
    """A matrix `x_NF`: one chunk."""

    in_memory = True

    def __init__(self, x_NF: Tensor):
        self.x_NF = x_NF
        self.width, self.nbytes = x_NF.shape[1], x_NF.nbytes
        self.chunk_N, self.key_C = np.zeros(len(x_NF), dtype=np.int64), np.zeros(1, dtype=np.uint64)

    def gather(self, row_B: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.bool_] | None]:
        return self.x_NF[torch.from_numpy(row_B)], None

    def failed(self) -> list[int]:
        return []

    def notes(self) -> list[str]:
        return []


@dataclass(frozen=True)
class _Rows:
    """Transformed inputs of a chunk, and which rows can be used (None: all)."""

    x: NDArray[np.float32]
    valid: NDArray[np.bool_] | None


class ChunkedInputs:
    """Inputs of a table that is read by the chunk: read, encoded and transformed by a few threads, kept within a budget.

    While the chunks in use fit the budget, the least recently used one makes room; where they do not, those that are
    there stay and the others are read again, so that a part of all reads is saved however tasks take turns.

    Args:
        row_N: row of the table of each input row.
        features: fitted.
        budget: bytes of decoded chunks to keep.
        max_invalid: largest number of rows that features may refuse with `on_invalid: skip`.
        skip_failed: a chunk that cannot be read makes its rows unusable, instead of an error.
    """

    in_memory = False

    def __init__(
        self,
        table: Table,
        row_N: NDArray[np.int64],
        features: Sequence[FeatureColumn],
        budget: float,
        max_invalid: float,
        skip_failed: bool,
    ):
        self.table, self.row_N, self.features = table, row_N, features
        self.budget, self.max_invalid, self.skip_failed = budget, max_invalid, skip_failed
        self.width = sum(item.feature.width for item in features)
        self.nbytes = min(int(budget), 4 * self.width * len(row_N))
        self.chunk_N, self.key_C = chunk_of(table, row_N), table.key_C
        self.num_invalid = 0
        self._kept: OrderedDict[int, tuple[int, _Rows]] = OrderedDict()  # chunk: (time of last use, rows)
        self._kept_bytes = 0
        self._failed: dict[int, str] = {}
        self._seen_invalid: set[int] = set()
        self._time = 0
        self._lock = threading.Lock()

    def gather(self, row_B: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.bool_] | None]:
        order = np.argsort(self.chunk_N[row_B], kind="stable")
        chunk_B, local_B = self.chunk_N[row_B][order], self.row_N[row_B][order]
        local_B = local_B - self.table.start_C[chunk_B]
        edges = np.flatnonzero(np.diff(chunk_B, prepend=-1, append=-1))
        found_BF, x_BF = np.empty((2, len(row_B), self.width), dtype=np.float32)
        ok_B = np.ones(len(row_B), dtype=bool)
        with self._lock:
            self._time += 1
        chunks = chunk_B[edges[:-1]].tolist()
        for i, rows in enumerate(self._chunks(chunks)):
            here, local = slice(edges[i], edges[i + 1]), local_B[edges[i] : edges[i + 1]]
            if rows is None:
                ok_B[order[here]] = False
                continue
            np.take(rows.x, local, axis=0, out=found_BF[here], mode="clip")  # other modes copy once more
            if rows.valid is not None:
                ok_B[order[here]] = rows.valid[local]
        x_BF[order] = found_BF
        return torch.from_numpy(x_BF), None if ok_B.all() else ok_B

    def failed(self) -> list[int]:
        return list(self._failed)

    def notes(self) -> list[str]:
        notes = []
        if self.num_invalid:
            notes.append(f"{self.num_invalid} inputs cannot be used: their rows are left out")
        if self._failed:
            notes.append(
                f"{len(self._failed)} chunks of data could not be read: {some(list(dict.fromkeys(self._failed.values())), 3)}"
            )
        return notes

    def _chunks(self, chunks: Sequence[int]) -> Iterator[_Rows | None]:
        """The rows of each chunk, None for one that cannot be read; missing ones are read ahead."""
        missing = dict.fromkeys(chunk for chunk in chunks if chunk not in self._kept and chunk not in self._failed)
        if not missing:
            yield from (self._use(chunk) for chunk in chunks)
            return
        with _read_ahead(self._read, missing) as found:
            for chunk in chunks:
                yield next(found) if chunk in missing else self._use(chunk)

    def _use(self, chunk: int) -> _Rows | None:
        with self._lock:
            if chunk in self._kept:
                rows = self._kept[chunk][1]
                self._kept[chunk] = self._time, rows
                self._kept.move_to_end(chunk)
                return rows
        return None if chunk in self._failed else self._read(chunk)

    def _read(self, chunk: int) -> _Rows | None:
        try:
            return self.put(chunk, encode_chunk(self.table, chunk, self.features))
        except ReadError as error:
            if not self.skip_failed:
                raise
            with self._lock:
                self._failed[chunk] = str(error)
            return None

    def put(self, chunk: int, encoded: Sequence[Encoded]) -> _Rows:
        """Transform the encoded rows of a chunk, and keep them if there is room."""
        try:
            blocks = [transform_rows(one, item.columns, item.feature) for item, one in zip(self.features, encoded, strict=True)]
        except UserError as error:
            raise located(error, self.table, int(self.table.start_C[chunk])) from None
        x = np.ascontiguousarray(blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1), dtype=np.float32)
        valid = np.logical_and.reduce([one.valid for one in encoded])
        rows = _Rows(x, None if valid.all() else valid)
        with self._lock:
            if rows.valid is not None and chunk not in self._seen_invalid:
                self._seen_invalid.add(chunk)
                self.num_invalid += int((~rows.valid).sum())
                if self.num_invalid > self.max_invalid:
                    of = f"{self.num_invalid} of {len(self.row_N)}"
                    raise UserError(f"inputs: {of} cannot be used, more than data.max_invalid; mend them or raise it")
            self._keep(chunk, rows)
        return rows

    def _keep(self, chunk: int, rows: _Rows) -> None:
        size = rows.x.nbytes
        while self._kept and self._kept_bytes + size > self.budget:
            oldest, (used, old) = next(iter(self._kept.items()))
            if used >= self._time - 1:
                return
            del self._kept[oldest]
            self._kept_bytes -= old.x.nbytes
        if chunk not in self._kept and size <= self.budget:
            self._kept[chunk] = self._time, rows
            self._kept_bytes += size


@contextmanager
def _read_ahead(read: Callable[[int], R], chunks: Iterable[int]) -> Iterator[Iterator[R]]:
    """What `read` gives for each chunk, in order, from a few threads that are ahead of their user."""
    left = iter(chunks)
    with ThreadPoolExecutor(READERS) as pool:
        reading = deque(pool.submit(read, chunk) for chunk in islice(left, 2 * READERS))

        def results() -> Iterator[R]:
            while reading:
                yield reading.popleft().result()
                reading.extend(pool.submit(read, chunk) for chunk in islice(left, 1))

        try:
            yield results()
        finally:
            for future in reading:
                future.cancel()


def chunk_of(table: Table, row_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """The chunk of each row of the table."""
    return np.searchsorted(table.start_C, row_N, side="right") - 1


def encode_chunk(table: Table, chunk: int, features: Sequence[FeatureColumn]) -> list[Encoded]:
    """Raw values of a chunk's rows, for each feature.

    Raises:
        ReadError: it cannot be read, or holds a value that a feature refuses; file and row are named.
    """
    rows = table.read_chunk(chunk, list(dict.fromkeys(name for item in features for name in item.columns)))
    try:
        return [item.encode(rows) for item in features]
    except UserError as error:
        raise located(error, table, int(table.start_C[chunk])) from None


def located(error: UserError, table: Table, first: int) -> ReadError:
    """An error that counts rows from the row `first` of the table, or names none, with the row of the file."""
    text, named = re.subn(r"\brow (\d+)\b(?!')", lambda m: table.where(first + int(m[1]) - 1), str(error))
    return ReadError(text if named else f"{table.where(first)}: {text}")


def fitting_sample(
    table: Table,
    row_N: NDArray[np.int64],
    features: Sequence[FeatureColumn],
    most: int,
    seed: int,
    skip_failed: bool,
) -> tuple[list[NDArray], dict[int, list[Encoded]]]:
    """Encoded rows for features to be fitted on, and the chunks that they are from.

    Chunks in a random order until there are `most` of the rows `row_N`, or a gigabyte of them; all rows where there are fewer.
    """
    chunk_N = chunk_of(table, row_N)
    local_N = row_N - table.start_C[chunk_N]
    order = np.argsort(chunk_N, kind="stable")
    end_C = np.cumsum(np.bincount(chunk_N, minlength=len(table.key_C)))
    first_C = np.concatenate([[0], end_C[:-1]])
    chosen = np.random.default_rng([seed, 1]).permutation(np.flatnonzero(end_C > first_C)).tolist()
    read: dict[int, list[Encoded]] = {}
    local: dict[int, NDArray[np.int64]] = {}
    num_rows, num_bytes = 0, 0

    def encoded_or_none(chunk: int) -> list[Encoded] | None:
        try:
            return encode_chunk(table, chunk, features)
        except ReadError:
            if not skip_failed:
                raise
            return None

    with _read_ahead(encoded_or_none, chosen) as found:
        for chunk, encoded in zip(chosen, found, strict=True):
            if encoded is None:
                continue
            read[chunk] = encoded
            own = local_N[order[first_C[chunk] : end_C[chunk]]]
            local[chunk] = own[np.logical_and.reduce([one.valid for one in encoded])[own]]
            num_rows += len(local[chunk])
            num_bytes += sum(one.values.nbytes for one in encoded)
            if num_rows >= most or num_bytes > _SAMPLE_BYTES:
                break
    for i, item in enumerate(features):
        widths = {chunk: encoded[i].values.shape[1] for chunk, encoded in read.items()}
        usual = max(set(widths.values()), key=list(widths.values()).count, default=0)
        for chunk in [chunk for chunk, width in widths.items() if width != usual]:
            if not skip_failed:
                columns = some([f"'{name}'" for name in item.columns])
                problem = f"column {columns}: {widths[chunk]} values in a row, expected {usual} as in most others"
                raise located(UserError(problem), table, int(table.start_C[chunk]))
            del read[chunk]
    if not any(len(local[chunk]) for chunk in read):
        raise UserError("inputs: no training row can be read or used, so nothing can be fitted; mend the data")
    rows = [np.concatenate([read[c][i].values[local[c]] for c in sorted(read)]) for i in range(len(features))]
    return rows, read

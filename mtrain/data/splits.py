"""Which rows train, which choose, which are scored: `split` gives the parts of a table as sorted row numbers.

A *unit* is what is dealt: a row of the table (for pairs, a label). The same seed gives the same parts on any machine.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrain.config import SplitConfig
from mtrain.data.features import encode_categories, is_text
from mtrain.data.order import mix, name_key
from mtrain.errors import UserError, nearest

SOURCE = "__source__"  # what `by: sources` asks `columns` for: the name of the source's own split, for each row
FRACTIONS = {"train": 0.8, "valid": 0.1, "test": 0.1}
KEEPS_KEYS = ("random", "stratified", "group", "scaffold", "kfold")  # units of one key end in one part
READS_COLUMN = ("column", "stratified", "group", "scaffold", "time")


def split(
    spec: SplitConfig,
    seed: int,
    *,
    n: int,
    columns: Callable[[str], Any],
    task_N: Any = None,
    key: Any = None,
    known: Iterable[str] = (),
) -> dict[str, np.ndarray]:
    """Part name to sorted unit numbers (int64); each of the `n` units is in exactly one part.

    `columns(name)` gives a column as a numpy or Arrow array of n values, or raises KeyError (`known` are the names that
    there are, for the message). `task_N` is the task of each unit: names rather than numbers, so that adding a task
    moves no other task's rows. Units with the same `key` end in one part for the ways in `KEEPS_KEYS`; the others ignore it.

    Random without a key that repeats is `numpy.random.default_rng(seed).permutation(n)`, cut at round(fraction * n).
    Groups and keys are shuffled and cut where it is nearest to the fractions, with at least one for each part. Tasks
    and classes have fraction * size rounded up or down: by their name, so that seeds do not change counts.

    Raises UserError for what `spec` cannot do with these data, an empty part included.
    """
    _check_unused(spec)
    if not n:
        raise UserError("split: the data have no rows, expected at least one")

    def column(name: str | None) -> Any:
        if name is None:
            raise UserError(f"split.column: missing; by: {spec.by} needs the name of a column")
        try:
            return columns(name)
        except KeyError:
            raise UserError(f"split.column: no column '{name}' in the data{nearest(name, known)}") from None

    if spec.by in ("column", "sources"):
        return _by_column(spec, seed, column(SOURCE if spec.by == "sources" else spec.column))

    keys = None
    if key is not None and spec.by in KEEPS_KEYS:
        keys = _groups("the key", key)
        if keys.max() + 1 == n:
            keys = None  # no key repeats
    if spec.by == "kfold":
        return _by_fold(spec, seed, n, keys)

    names, fractions = _fractions(spec)
    if spec.by == "random" and keys is None:
        part_N = _cut(np.random.default_rng(seed).permutation(n), fractions)
    elif spec.by == "random":
        assert keys is not None
        part_N = _shuffled_groups(keys, fractions, _rng(seed, "random"))
    elif spec.by == "time":
        part_N = _cut(np.argsort(_times(spec.column, column(spec.column)), kind="stable"), fractions)
    elif spec.by == "within_task":
        if task_N is None:
            raise UserError("split.by: within_task needs rows that belong to a task (routed, files, pairs); use random")
        part_N = _within(task_N, fractions, seed)
    elif spec.by == "stratified":
        classes = pc.fill_null(_as_text(column(spec.column)), "")
        if keys is None:
            part_N = _within(classes, fractions, seed)
        else:  # a key's class is that of its first unit
            first = np.unique(keys, return_index=True)[1]
            part_N = _within(classes.take(pa.array(first)), fractions, seed)[keys]
    elif spec.by == "group":
        if spec.column is None and key is None:
            column(None)
        groups = _groups(f"column '{spec.column}'", column(spec.column)) if spec.column else _groups("the key", key)
        part_N = _shuffled_groups(_joined(groups, keys), fractions, _rng(seed, "group"))
    else:
        from mtrain.data.chem import scaffolds

        molecule_N, smiles = encode_categories(_as_text(column(spec.column)))
        scaffold_M = scaffolds([*smiles.to_pylist(), None])
        if all(text.startswith("invalid:") for text in scaffold_M):
            found = f"found {smiles[0].as_py()!r}" if len(smiles) else "it is empty"
            raise UserError(f"split.column: '{spec.column}' holds no SMILES that RDKit can parse ({found}); name another")
        scaffold_N = encode_categories(scaffold_M)[0][molecule_N]  # -1, missing: the last
        groups = _joined(encode_categories(scaffold_N)[0], keys)
        if spec.balanced:
            part_N = _shuffled_groups(groups, fractions, _rng(seed, "scaffold"))
        else:
            part_N = _largest_first(groups, fractions)

    parts = {name: np.flatnonzero(part_N == i) for i, name in enumerate(names)}
    shares = dict(zip(names, fractions, strict=True))
    return _checked({name: parts[name] for name in (spec.parts or names)}, shares, spec.by, n)


def split_hash(parts: Mapping[str, np.ndarray]) -> str:
    """12 hex digits that stand for the parts' names and units, whatever the order of parts, machine or integer type."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name}\0{len(parts[name])}\0".encode())
        digest.update(np.sort(parts[name]).astype("<i8").tobytes())
    return digest.hexdigest()[:12]


def overlap(train_keys: Any, test_keys: Any) -> float:
    """The share of test units whose key [n], or whose row of inputs [n, k], also occurs in training; nan without any.

    Arrays are numpy or Arrow; a missing key occurs nowhere.
    """
    train, test = _comparable(train_keys), _comparable(test_keys)
    if not len(test):
        return float("nan")
    return pc.sum(pc.is_in(test, value_set=pc.unique(train).drop_null())).as_py() / len(test)


def _by_column(spec: SplitConfig, seed: int, values: Any) -> dict[str, np.ndarray]:
    where = f"column '{spec.column}'" if spec.by == "column" else "the sources' splits"
    codes, distinct = encode_categories(pc.fill_null(_as_text(values), ""))
    found = distinct.to_pylist()
    named: dict[str, Sequence[str]] = {}
    drawn: dict[str, float] = {}
    for name, share in (spec.parts or ({v: v for v in found} if spec.by == "sources" else {})).items():
        if isinstance(share, (int, float)) and not isinstance(share, bool):
            drawn[name] = share
        else:
            named[name] = [_spell(v) for v in share] if isinstance(share, (list, tuple)) else [_spell(share)]
    if "train" not in named:
        raise UserError(f"split.parts.train: expected values of {where}; they are: {', '.join(sorted(found)[:20])}")

    part_of: dict[str, str] = {}
    for name, wanted in named.items():
        for value in wanted:
            if value not in found:
                raise UserError(f"split.parts.{name}: no value '{value}' in {where}{nearest(value, found)}")
            if part_of.setdefault(value, name) != name:
                raise UserError(f"split.parts: '{value}' is in both {part_of[value]} and {name}; name it once")
    counts = np.bincount(codes, minlength=len(found))
    if left := [f"'{v}' ({c} rows)" for v, c in zip(found, counts, strict=True) if v not in part_of]:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise UserError(
            f"split.parts: {where} also holds {', '.join(left[:5])}{more}, which no part names; add each to a part, or "
            "to one of its own that nothing uses, such as unused: [...]"
        )
    names = list(named)
    part_N = np.array([names.index(part_of[v]) for v in found])[codes]
    parts = {name: np.flatnonzero(part_N == i) for i, name in enumerate(names)}
    if bad := [f"{name}: {share}" for name, share in drawn.items() if not 0 < share < 1]:
        raise UserError(f"split.parts.{bad[0]}, expected a share of train between 0 and 1, or values of {where}")
    rows = parts["train"]
    shuffled = rows[_rng(seed, "column").permutation(len(rows))]
    shares = {name: 0.0 for name in named} | drawn
    for name, share in drawn.items():
        taken, shuffled = np.split(shuffled, [round(share * len(rows))])
        parts[name] = np.sort(taken)
    parts["train"] = np.sort(shuffled)
    return _checked({name: parts[name] for name in (spec.parts or names)}, shares, spec.by, len(rows))


def _by_fold(spec: SplitConfig, seed: int, n: int, keys: np.ndarray | None) -> dict[str, np.ndarray]:
    share = spec.parts.get("valid")
    if set(spec.parts) - {"valid"} or not (share is None or (isinstance(share, (int, float)) and 0 <= share < 1)):
        raise UserError(
            f"split.parts: {dict(spec.parts)}, expected {{}} (valid is the next fold) or {{valid: share}} for by: "
            "kfold, which makes train and test from fold and folds"
        )
    fewest = 3 if share is None else 2
    if not (spec.folds >= fewest and 0 <= spec.fold < spec.folds):
        raise UserError(
            f"split: fold is {spec.fold} and folds {spec.folds}, expected at least {fewest} folds, and fold from 0 to folds - 1"
        )
    groups = np.arange(n) if keys is None else keys
    order = _rng(seed, "kfold").permutation(groups.max() + 1)
    fold_G = np.empty(len(order), np.int64)
    if keys is None:
        fold_G[order] = np.arange(n) * spec.folds // n
    else:  # the largest first, each to the smallest fold
        sizes = np.bincount(groups)
        heap = [(0, k) for k in range(spec.folds)]
        for g in order[np.argsort(-sizes[order], kind="stable")].tolist():
            size, k = heap[0]
            fold_G[g] = k
            heapq.heapreplace(heap, (size + int(sizes[g]), k))
    fold_N = fold_G[groups]
    if share is None:
        part_N = np.where(fold_N == spec.fold, 2, np.where(fold_N == (spec.fold + 1) % spec.folds, 1, 0))
        shares = {"train": 1.0, "valid": 1.0, "test": 1.0}
    else:
        part_N = np.where(fold_N == spec.fold, 2, 0)
        rest = np.flatnonzero(part_N == 0)
        if share and len(rest):
            within = np.unique(groups[rest], return_inverse=True)[1]
            part_N[rest] = _shuffled_groups(within, [1 - share, share], _rng(seed, "kfold", spec.fold))
        shares = {"train": 1.0, "valid": share, "test": 1.0}
    parts = {name: np.flatnonzero(part_N == i) for i, name in enumerate(("train", "valid", "test"))}
    return _checked(parts, shares, spec.by, n)


def _fractions(spec: SplitConfig) -> tuple[list[str], list[float]]:
    """Parts in the order in which they are filled: train, valid, any others, test; those of 0 at the end."""
    parts = spec.parts or FRACTIONS
    fractions: dict[str, float] = {}
    for name, share in parts.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise UserError(f"split.parts.{name}: {share!r}, expected a fraction from 0 to 1 for by: {spec.by}")
        fractions[name] = float(share)
    total = sum(fractions.values())
    if abs(total - 1) > 1e-6:
        sizes = ", ".join(f"{name} {f:g}" for name, f in fractions.items())
        raise UserError(f"split.parts: {sizes} sum to {total:g}, expected 1")
    if not fractions.get("train"):
        raise UserError("split.parts.train: no training rows, expected a fraction above 0")
    order = {"train": 0, "valid": 1, "test": 3}
    names = sorted(fractions, key=lambda name: (fractions[name] == 0, order.get(name, 2)))
    return names, [fractions[name] for name in names]


def _cut(order: np.ndarray, fractions: Sequence[float]) -> np.ndarray:
    """Part of each unit: the first round(f * n) of `order` are part 0, and so on; the last part above 0 the rest."""
    n, used = len(order), sum(f > 0 for f in fractions)
    sizes = [round(f * n) for f in fractions[: used - 1]]
    part_N = np.full(n, used - 1)
    for part, end in reversed(list(enumerate(np.cumsum(sizes)))):
        part_N[order[:end]] = part
    return part_N


def _shuffled_groups(groups: np.ndarray, fractions: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Part of each unit, groups [n] (0 to G - 1) kept whole.

    Groups come in a random order, those of more than half the smallest part first (so to train), and are cut where the
    number of units is nearest to the fractions, with at least one group for each part.
    """
    sizes = np.bincount(groups)
    used = sum(f > 0 for f in fractions)
    order = rng.permutation(len(sizes))
    large = sizes[order] > min(fractions[:used]) * len(groups) / 2
    order = order[np.argsort(~large, kind="stable")]
    total = np.cumsum(sizes[order])
    part_G = np.empty(len(sizes), np.int64)
    start = 0
    for part, share in enumerate(np.cumsum(fractions[:used])):
        nearest_end = int(np.abs(total - share * len(groups)).argmin()) + 1
        end = max(min(nearest_end, len(sizes) - (used - 1 - part)), start + 1)
        part_G[order[start : end if part < used - 1 else None]] = part
        start = end
    return part_G[groups]


def _largest_first(groups: np.ndarray, fractions: Sequence[float]) -> np.ndarray:
    """Part of each unit, groups [n] (0 to G - 1) kept whole: DeepChem's rule.

    The largest group comes first, of equal ones that with the first unit; each goes to the first part for which it and
    all before it stay within the sum of their fractions, else to the last.
    """
    sizes = np.bincount(groups)
    order = np.lexsort((np.unique(groups, return_index=True)[1], -sizes))
    used = sum(f > 0 for f in fractions)
    limits = np.cumsum(fractions[: used - 1]) * len(groups) + 1e-6
    filled = np.zeros(used - 1, np.int64)  # units in a part and those before it
    part_G = np.full(len(sizes), used - 1)
    for group in order:
        room = filled + sizes[group] <= limits
        if room.any():
            part_G[group] = part = int(room.argmax())
            filled[part:] += sizes[group]
    return part_G[groups]


def _within(groups: Any, fractions: Sequence[float], seed: int) -> np.ndarray:
    """Part of each unit, each group split by itself: a pure function of seed, the group's name and its size.

    Part 0 gets at least one unit of every group. Else a part gets fraction * size rounded up or down, at random by the
    group's name, so that over many small groups the totals fit too.
    """
    codes, names = encode_categories(groups)
    if (codes < 0).any():
        raise UserError(f"split: row {int((codes < 0).argmax()) + 1} has no task; mend the row or leave it out")
    sizes = np.bincount(codes, minlength=len(names))
    ids_G = np.array([name_key(str(name)) for name in names.to_pylist()], np.uint64)

    start_N = (np.cumsum(sizes) - sizes)[codes]
    place_N = np.empty(len(codes), np.int64)
    order = np.argsort(codes, kind="stable")
    place_N[order] = np.arange(len(codes))
    place_N -= start_N
    draw_N = _mix(_mix(ids_G + _mix(np.array([seed], np.uint64)))[codes] + place_N.astype(np.uint64))
    rank_N = np.empty(len(codes), np.int64)
    rank_N[np.lexsort((draw_N, codes))] = np.arange(len(codes))
    rank_N -= start_N

    rounding_G = (_mix(ids_G) >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
    used = sum(f > 0 for f in fractions)
    part_N = np.zeros(len(codes), np.int64)
    for share in np.cumsum(fractions[: used - 1]):
        cut_G = np.maximum(np.floor(np.round(share * sizes, 6) + rounding_G), 1)
        part_N += rank_N >= cut_G[codes]
    return part_N


def _mix(x: np.ndarray) -> np.ndarray:
    """A step of SplitMix64 (Steele, Lea and Flood 2014): 64 bits to 64 well-mixed bits, also for small numbers."""
    return mix(x + np.uint64(0x9E3779B97F4A7C15))


def _joined(groups: np.ndarray, keys: np.ndarray | None) -> np.ndarray:
    """Groups merged where a key ties them together: the connected components of units, groups and keys."""
    if keys is None:
        return groups
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    num_groups = groups.max() + 1
    size = num_groups + keys.max() + 1
    links = coo_array((np.ones(len(groups), np.int8), (groups, num_groups + keys)), shape=(size, size))
    return encode_categories(connected_components(links, directed=False)[1][groups])[0]


def _groups(what: str, values: Any) -> np.ndarray:
    codes, _ = encode_categories(values)
    if (codes < 0).any():
        raise UserError(
            f"split: {what} is missing in row {int((codes < 0).argmax()) + 1} ({(codes < 0).sum()} such rows), "
            "expected a value in every row; fill it in or leave the rows out"
        )
    return codes


def _times(name: str | None, values: Any) -> np.ndarray:
    """Times as int64 or float64 that sort by age; text is read as ISO 8601."""
    times = _arrow(values)
    if times.null_count:
        row = pc.index(times.is_null(), pa.scalar(True)).as_py()
        found = f"no time in row {row + 1} ({times.null_count} such rows)"
        raise UserError(f"split: column '{name}' has {found}, expected one in every row; fill it in")
    if is_text(times.type):
        zone = "UTC" if str(times[0]).endswith("Z") or "+" in str(times[0]) else None
        try:
            times = times.cast(pa.timestamp("us", zone))
        except pa.ArrowInvalid as error:
            wanted = "expected numbers, dates or ISO 8601 text such as 2024-12-31"
            raise UserError(f"split: column '{name}' holds text that is not a time ({error}), {wanted}") from None
    if pa.types.is_date32(times.type) or pa.types.is_time32(times.type):
        times = times.cast(pa.int32())
    elif pa.types.is_temporal(times.type):
        times = times.cast(pa.int64())
    elif not (pa.types.is_integer(times.type) or pa.types.is_floating(times.type)):
        raise UserError(f"split: column '{name}' has type {times.type}, expected numbers, dates or ISO 8601 text")
    return times.to_numpy(zero_copy_only=False)


def _arrow(values: Any) -> pa.Array:
    """One Arrow array; NaN in a numpy array is missing."""
    if isinstance(values, pa.ChunkedArray):
        values = pa.chunked_array(values.chunks, values.type).combine_chunks()
    return values if isinstance(values, pa.Array) else pa.array(values, from_pandas=True)


def _as_text(values: Any) -> pa.Array:
    array = _arrow(values)
    try:
        return array.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise UserError(f"split.column: it has type {array.type}, expected text, numbers or bools") from None


def _spell(value: Any) -> str:
    """A value of the config as Arrow writes it: YAML's true is 'true'."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _comparable(keys: Any) -> pa.Array:
    """Keys as an Arrow array; the rows of a matrix as fixed-size binary."""
    if not (isinstance(keys, np.ndarray) and keys.ndim == 2):
        return _arrow(keys)
    rows = np.ascontiguousarray(keys + 0.0 if keys.dtype.kind == "f" else keys)  # -0.0 is 0.0
    kind = pa.binary(rows.shape[1] * rows.itemsize)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, pa.py_buffer(rows)])


def _rng(seed: int, purpose: str, *more: int) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose.encode(), *more])


def _check_unused(spec: SplitConfig) -> None:
    """A setting that the chosen way would ignore is refused."""
    usual = SplitConfig()
    if spec.column is not None and spec.by not in READS_COLUMN:
        hint = "by: group keeps a column's groups whole" if spec.by in ("random", "kfold") else "leave it out"
        raise UserError(f"split.column: '{spec.column}' is not used by: {spec.by}; {hint}")
    if spec.by != "kfold" and (spec.fold, spec.folds) != (usual.fold, usual.folds):
        raise UserError(f"split.fold, split.folds: not used by: {spec.by}; leave them out, or use by: kfold")
    if spec.balanced and spec.by != "scaffold":
        raise UserError(f"split.balanced: not used by: {spec.by}; leave it out, or use by: scaffold")


def _checked(parts: dict[str, np.ndarray], shares: Mapping[str, float], by: str, n: int) -> dict[str, np.ndarray]:
    if not len(parts["train"]):
        raise UserError(f"split: no training rows are left of {n} (by: {by}); give train a larger share")
    for name, rows in parts.items():
        if shares[name] > 0 and not len(rows):
            raise UserError(
                f"split.parts.{name}: empty, although {n} rows were split by: {by}; give it a larger share, or none"
            )
    return parts

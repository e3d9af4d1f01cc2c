"""Two runs on the same rows, task by task: differences with intervals, corrected for looking at many tasks at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, t

from mtrain.errors import UserError
from mtrain.report.intervals import RESAMPLES, Floats, Kept, bounded, interval, resample
from mtrain.train.evaluate import HIGHER_IS_BETTER
from mtrain.train.run_dir import RunDir

FALSE_DISCOVERIES = 0.05  # expected share of wrong ones among the differences that are called clear
LEAST_ROWS = 10  # of a task, for a test of its difference


@dataclass(frozen=True)
class Comparison:
    """How a second run differs from a first one in a metric, on the tasks that both have.

    Intervals come from resampling rows, the same for both runs and all tasks. `clear_T`: the difference is not 0, at a false
    discovery rate of 5 % over tasks (Benjamini and Hochberg 1995), by a t-test with the standard error over draws.
    """

    names: list[str]
    metric: str
    first_T: Floats
    second_T: Floats
    low_T: Floats
    high_T: Floats
    q_T: Floats
    """Least false discovery rate at which the task is clear; NaN where it has too few rows to say."""
    mean: tuple[float, float, float]
    """Mean difference over tasks (of skill from -1 up), and its interval."""
    median: tuple[float, float, float]
    wins: tuple[int, float, float]
    """Tasks in which the second run is better, and the interval of that number (draws bring it nearer to half of the tasks, as
    any noise does; the interval is moved back)."""
    other_tasks: int
    """That only one of the runs has."""

    @property
    def difference_T(self) -> Floats:
        return self.second_T - self.first_T

    @property
    def gain_T(self) -> Floats:
        """The difference, positive where the second run is better."""
        return self.difference_T if HIGHER_IS_BETTER[self.metric] else -self.difference_T

    @property
    def clear_T(self) -> NDArray[np.bool_]:
        return self.q_T <= FALSE_DISCOVERIES

    def count(self, better: bool, clear: bool = False) -> int:
        """Tasks in which the second run is (clearly) better, or worse."""
        side_T = self.gain_T > 0 if better else self.gain_T < 0
        return int((side_T & self.clear_T).sum() if clear else side_T.sum())


def check_same_rows(runs: Sequence[RunDir]) -> None:
    """Whether the runs have the same splits.

    Raises:
        UserError: which do not.
    """
    hashes = [{one.path.name: str(one.load_json("summary.json")["split_hash"]) for one in run.splits()} for run in runs]
    first = list(hashes[0].values())
    for run, found in zip(runs[1:], hashes[1:], strict=True):
        if list(found.values()) != first:
            raise UserError(
                f"run {run.path}: its split (hash {', '.join(found.values())}) is not that of run {runs[0].path} "
                f"({', '.join(first)}): a difference could be that of their rows; compare runs on the same data and split"
            )


def compare(runs: tuple[RunDir, RunDir], part: str, metric: str, resamples: int = RESAMPLES) -> Comparison:
    """Compare two runs with the same splits; over several splits means are compared.

    Raises:
        UserError: they have no task in common, kept no predictions, or their labels differ.
    """
    first_names, there = runs[0].per_task()["task"].to_pylist(), set(runs[1].per_task()["task"].to_pylist())
    names = [name for name in first_names if name in there]
    if not names:
        raise UserError(f"runs {runs[0].path} and {runs[1].path}: have no task in common, so nothing can be compared")
    splits: tuple[list[Kept], list[Kept]] = [], []
    for pair in zip(*(run.splits() for run in runs), strict=True):
        for side, kept in zip(splits, _common(pair, part, names), strict=True):
            side.append(kept)
    first, second = (resample(side, [metric], resamples)[metric] for side in splits)
    difference_TN = second.value_TN - first.value_TN
    low_T, high_T = interval(difference_TN)
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    difference_T = second.value_T - first.value_T
    wins, wins_N = int((sign * difference_T > 0).sum()), (sign * difference_TN > 0).sum(0).astype(np.float64)
    scored_T = np.isfinite(difference_T)
    if not scored_T.any():
        raise UserError(f"runs {runs[0].path} and {runs[1].path}: no task of the {part} part has a {metric} in both")
    ends = [bounded(metric, np.column_stack([one.value_T, one.value_TN])[scored_T]) for one in (first, second)]
    mean, median = (_with_interval(of(ends[1] - ends[0], axis=0)) for of in (np.nanmean, np.nanmedian))
    fewest, most = interval(wins_N + wins - wins_N.mean())
    rows_T = _rows(splits[0], len(names))
    return Comparison(
        names,
        metric,
        first.value_T,
        second.value_T,
        low_T,
        high_T,
        discoveries(difference_T, difference_TN, rows_T),
        mean,
        median,
        (wins, max(0.0, float(fewest)), min(float(scored_T.sum()), float(most))),
        len(there.symmetric_difference(first_names)),
    )


def _with_interval(values: Floats) -> tuple[float, float, float]:
    """A value that is followed by those of the draws."""
    low, high = interval(values[1:])
    return float(values[0]), float(low), float(high)


def discoveries(difference_T: Floats, difference_TN: Floats, rows_T: NDArray[np.int64]) -> Floats:
    """Adjusted p-values `[T]` of differences, from their values on resampled rows; NaN where a task has too few rows, or the
    same difference in every draw."""
    with np.errstate(invalid="ignore", divide="ignore"):
        error_T = np.nanstd(np.where(np.isfinite(difference_TN).mean(1, keepdims=True) >= 0.5, difference_TN, 0), axis=1)
        error_T *= np.sqrt(rows_T / (rows_T - 1))
        p_T = 2 * t.sf(np.abs(difference_T) / error_T, rows_T - 1)
    p_T = np.where(difference_T == 0, 1.0, p_T)
    tested = np.isfinite(p_T) & (rows_T >= LEAST_ROWS) & ((error_T > 0) | (difference_T == 0))
    q_T = np.full(len(p_T), np.nan)
    if tested.any():
        q_T[tested] = false_discovery_control(p_T[tested])
    return q_T


def _rows(splits: Sequence[Kept], num_tasks: int) -> NDArray[np.int64]:
    """Different rows of each task."""
    pairs = np.unique(np.concatenate([np.stack([kept.task_P, kept.row_P], 1) for kept in splits]), axis=0)
    return np.bincount(pairs[:, 0], minlength=num_tasks)


def _common(pair: tuple[RunDir, RunDir], part: str, names: list[str]) -> tuple[Kept, Kept]:
    """The labels that both runs kept predictions of."""
    found = []
    for run in pair:
        kept = Kept.load(run, part, names)
        if kept is None:
            raise UserError(
                f"run {run.path}: kept no predictions of its {part} part, which a comparison resamples; train it with "
                "select.predictions above 0"
            )
        order = np.lexsort((kept.y_P, kept.row_P, kept.task_P))  # several labels of a task and row are told apart by value
        found.append(kept.take(order))
    first, second = found
    if len(first.row_P) != len(second.row_P) or (first.task_P != second.task_P).any() or (first.row_P != second.row_P).any():
        cells = [kept.task_P * (1 << 40) + kept.row_P for kept in found]
        first, second = (kept.take(np.isin(own, other)) for kept, own, other in zip(found, cells, cells[::-1], strict=True))
    if len(first.y_P) != len(second.y_P) or (first.y_P != second.y_P).any():
        different = np.flatnonzero(first.y_P != second.y_P) if len(first.y_P) == len(second.y_P) else np.zeros(1, np.int64)
        name = names[int(first.task_P[different[0]])]
        raise UserError(
            f"runs {pair[0].path} and {pair[1].path}: have other labels of task '{name}' on the same rows; compare runs on the "
            "same data"
        )
    if not len(first.y_P):
        raise UserError(
            f"runs {pair[0].path} and {pair[1].path}: kept predictions of different rows, so nothing can be compared"
        )
    return first, second

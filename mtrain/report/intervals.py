"""Intervals of every task's metric by resampling rows (Efron 1979): how far it could be off because the part has the rows
that it has.

Rows are drawn with replacement, and a row takes all its labels along: tasks share rows, so errors of tasks go together, and a
mean over tasks gets the interval that it should have, which resampling tasks would understate. A *draw* says how often each
row was drawn; metrics are computed from labels that count as often as their row, all tasks and many draws at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import csr_array

from mtrain.model.metrics import METRICS, Scored, ScoreOptions
from mtrain.train.evaluate import SKILL_FLOOR
from mtrain.train.run_dir import RunDir

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 400
LEVEL = 0.95
_ROWS = 20_000_000  # rows x draws that are held at once
_MEANS = ("deviance", "accuracy", "brier", "mse", "mae")  # metrics that are a mean over labels


@dataclass(frozen=True)
class Kept:
    """The predictions that a run kept of a part, sorted by task; `task_P` are places in the names they were read with."""

    task_P: Ints
    row_P: Ints
    y_P: Floats
    pred_P: Floats
    deviance_P: Floats
    constant_P: Floats
    probabilities_P: pa.ListArray
    family_T: NDArray[np.str_]
    """Of each task: which metrics apply; empty where the run does not have the task."""
    options: ScoreOptions

    @staticmethod
    def load(run: RunDir, part: str, names: Sequence[str]) -> Kept | None:
        """Of a run of one split; None: it kept none."""
        table = run.predictions(part)
        if table is None:
            return None
        tasks, config = run.tasks(), run.config()
        place = {name: t for t, name in enumerate(names)}
        task = table["task"].combine_chunks()
        code_T = np.array([place.get(name, -1) for name in task.dictionary.to_pylist()], dtype=np.int64)
        task_P = code_T[task.indices.to_numpy()]
        order = np.argsort(task_P, kind="stable")
        order = order[task_P[order] >= 0]
        y_P, pred_P, deviance_P, constant_P = (
            table[name].to_numpy().astype(np.float64)[order] for name in ("label", "prediction", "deviance", "constant")
        )
        family_T = np.full(len(names), "", dtype="U10")
        threshold_T = np.full(len(names), np.nan)
        scores = run.per_task()
        thresholds = scores["threshold"].to_numpy() if "threshold" in scores.column_names else np.full(len(tasks), np.nan)
        for name, one, threshold in zip(tasks.names, tasks, thresholds, strict=True):
            if name in place:
                family_T[place[name]], threshold_T[place[name]] = one.kind.family, threshold
        return Kept(
            task_P[order],
            table["row"].to_numpy().astype(np.int64)[order],
            y_P,
            pred_P,
            deviance_P,
            constant_P,
            pc.take(table["probabilities"].combine_chunks(), pa.array(order)),
            family_T,
            ScoreOptions(config.select.min_per_class, threshold_T),
        )

    @property
    def num_tasks(self) -> int:
        return len(self.family_T)

    def take(self, at: NDArray[np.bool_] | Ints) -> Kept:
        """Some of the labels, in order."""
        at = np.flatnonzero(at) if at.dtype == bool else at
        columns = {name: getattr(self, name)[at] for name in ("task_P", "row_P", "y_P", "pred_P", "deviance_P", "constant_P")}
        return replace(self, **columns, probabilities_P=pc.take(self.probabilities_P, pa.array(at)))

    @cached_property
    def prediction(self) -> Floats:
        """As `Scored` wants them: of multiclass tasks `[P, K]`, else `[P]`; of labels of one family."""
        if not len(self.pred_P) or self.family_T[self.task_P[0]] != "multiclass":
            return self.pred_P
        lengths = pc.list_value_length(self.probabilities_P).to_numpy()
        padded = np.zeros((len(lengths), lengths.max()))
        padded[np.arange(padded.shape[1]) < lengths[:, None]] = self.probabilities_P.flatten().to_numpy()
        return padded

    def scored(self, drawn: Ints | slice = slice(None)) -> Scored:
        """Labels of one family for `mtrain.model.metrics`."""
        return Scored(self.task_P[drawn], self.y_P[drawn], self.prediction[drawn], self.num_tasks, self.row_P[drawn])


@dataclass(frozen=True)
class Resampled:
    """A metric of each task on all rows `[T]`, and on each draw `[T, N]`; NaN where it cannot be scored."""

    value_T: Floats
    value_TN: Floats

    def interval(self) -> tuple[Floats, Floats]:
        """The middle 95 % over draws `[T]`."""
        return interval(self.value_TN)


def interval(value_TN: Floats) -> tuple[Floats, Floats]:
    """Percentiles over draws `[..., N]`; NaN where fewer than half of them have a value."""
    enough = np.isfinite(value_TN).mean(-1, keepdims=True) >= 0.5
    filled = np.where(enough, value_TN, 0)
    low, high = np.nanquantile(filled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=-1)
    return tuple(np.where(enough[..., 0], bound, np.nan) for bound in (low, high))  # type: ignore[return-value]


def bounded(metric: str, values: Floats) -> Floats:
    """Values as a mean over tasks takes them: skill has no lower bound, and one task could outweigh all others."""
    return np.maximum(values, SKILL_FLOOR) if metric == "skill" else values


def resample(splits: Sequence[Kept], metrics: Sequence[str], resamples: int = RESAMPLES) -> dict[str, Resampled]:
    """Metrics by name; of several splits the mean over them, with one drawing of rows for all.

    Two calls with labels of the same rows draw the same rows.
    """
    rows = np.unique(np.concatenate([kept.row_P for kept in splits]))
    placed = [replace(kept, row_P=np.searchsorted(rows, kept.row_P)) for kept in splits]
    found: dict[str, list[Floats]] = {metric: [] for metric in metrics}
    functions = {metric: [statistic(kept, metric, len(rows)) for kept in placed] for metric in metrics}
    for drawn_RN in _draws(len(rows), resamples):
        for metric, of_splits in functions.items():
            found[metric].append(_mean([function(drawn_RN) for function in of_splits]))
    return {metric: Resampled(blocks[0][:, 0], np.concatenate(blocks[1:], axis=1)) for metric, blocks in found.items()}


def _draws(num_rows: int, resamples: int) -> Iterator[NDArray[np.float32]]:
    """First every row once `[R, 1]`, then blocks of draws `[R, N]`."""
    yield np.ones((num_rows, 1), dtype=np.float32)
    rng = np.random.default_rng(0)
    size = max(1, min(50, _ROWS // num_rows))
    for start in range(0, resamples, size):
        draws = range(start, min(start + size, resamples))
        counts = [np.bincount(rng.integers(num_rows, size=num_rows), minlength=num_rows) for _ in draws]
        yield np.stack(counts, axis=1).astype(np.float32)


def _mean(values: Sequence[Floats]) -> Floats:
    """Mean of the arrays where they are not NaN."""
    if len(values) == 1:
        return values[0]
    stacked = np.stack(values)
    there = np.isfinite(stacked)
    with np.errstate(invalid="ignore"):
        return np.where(there, stacked, 0).sum(0) / there.sum(0)


def statistic(kept: Kept, metric: str, num_rows: int) -> Callable[[NDArray[np.float32]], Floats]:
    """The metric of each task `[T, N]` as a function of how often each row was drawn `[R, N]`. `row_P` are places below R.

    Ratios of sums over labels, and areas under curves, count labels as often as their rows; other metrics are computed draw by
    draw on repeated labels.
    """
    if metric in ("skill", "deviance"):  # of all families
        by_family = [_ratio(kept, metric, num_rows)]
    else:
        families = [f for f in METRICS if metric in METRICS[f] and (kept.family_T == f).any()]
        by_family = [_of_family(kept.take(kept.family_T[kept.task_P] == f), f, metric, num_rows) for f in families]

    def function(drawn_RN: NDArray[np.float32]) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            found = [one(drawn_RN) for one in by_family]
        return _mean([np.full((kept.num_tasks, drawn_RN.shape[1]), np.nan), *found])

    return function


def _of_family(kept: Kept, family: str, metric: str, num_rows: int) -> Callable[[NDArray[np.float32]], Floats]:
    if metric in _MEANS or (family, metric) == ("binary", "f1"):
        return _ratio(kept, metric, num_rows)
    if metric in ("r2", "ev"):
        return _explained(kept, num_rows)
    if metric in ("roc_auc", "pr_auc"):
        return _area(kept, metric)
    per_task = METRICS[family][metric].per_task

    def function(drawn_RN: NDArray[np.float32]) -> Floats:
        out = np.full((kept.num_tasks, drawn_RN.shape[1]), np.nan)
        for n, drawn_R in enumerate(drawn_RN.T.astype(np.int64)):
            value_T = per_task(kept.scored(np.repeat(np.arange(len(kept.row_P)), drawn_R[kept.row_P])), kept.options)
            if value_T is not None:
                out[:, n] = value_T
        return out

    return function


def _sums(kept: Kept, num_rows: int, *values: Floats) -> Callable[[NDArray[np.float32]], list[Floats]]:
    """Sums of each task's values over the drawn labels `[T, N]`."""
    starts = np.searchsorted(kept.task_P, np.arange(kept.num_tasks + 1))
    shape = kept.num_tasks, num_rows
    stacks = [csr_array((np.asarray(value_P, np.float64), kept.row_P, starts), shape=shape) for value_P in values]
    return lambda drawn_RN: [stack @ drawn_RN for stack in stacks]


def _ratio(kept: Kept, metric: str, num_rows: int) -> Callable[[NDArray[np.float32]], Floats]:
    """Metrics that are a sum over labels by another."""
    above: Floats
    below: Floats = np.ones(len(kept.y_P))
    if metric == "skill":
        above, below = kept.deviance_P, kept.constant_P
    elif metric == "deviance":
        above = kept.deviance_P
    elif metric == "f1":
        threshold_T = kept.options.threshold_T
        assert threshold_T is not None
        chosen_P = kept.pred_P >= np.nan_to_num(threshold_T, nan=0.5)[kept.task_P]
        truth_P = kept.y_P > 0.5
        above, below = 2 * (chosen_P & truth_P).astype(np.float64), np.add(chosen_P, truth_P, dtype=np.float64)
    else:  # a label by itself as a task has its own term of the mean
        family = str(kept.family_T[kept.task_P[0]]) if len(kept.task_P) else "binary"
        alone = Scored(np.arange(len(kept.y_P)), kept.y_P, kept.prediction, len(kept.y_P))
        found = METRICS[family][metric].per_task(alone, kept.options)
        assert found is not None
        above = found
    sums = _sums(kept, num_rows, above, below)

    def function(drawn_RN: NDArray[np.float32]) -> Floats:
        above_TN, below_TN = sums(drawn_RN)
        value_TN = np.where(below_TN > 0, above_TN / below_TN, np.nan)
        return 1 - value_TN if metric == "skill" else value_TN

    return function


def _explained(kept: Kept, num_rows: int) -> Callable[[NDArray[np.float32]], Floats]:
    """R2 about the mean of the drawn labels."""
    y_P = kept.scored().centered(kept.y_P)  # near 0, so that little is lost where squares are subtracted
    sums = _sums(kept, num_rows, (kept.y_P - kept.pred_P) ** 2, y_P**2, y_P, np.ones(len(y_P)))

    def function(drawn_RN: NDArray[np.float32]) -> Floats:
        error_TN, square_TN, sum_TN, count_TN = sums(drawn_RN)
        variance_TN = square_TN - sum_TN**2 / count_TN
        return np.where(variance_TN > 1e-12 * square_TN, 1 - error_TN / variance_TN, np.nan)

    return function


def _area(kept: Kept, metric: str) -> Callable[[NDArray[np.float32]], Floats]:
    """Areas under ROC and precision-recall curves, as `mtrain.model.metrics` has them; labels are sorted once for all draws."""
    order = np.lexsort((-kept.pred_P, kept.task_P))
    task_P, pred_P, row_P, truth_P = kept.task_P[order], kept.pred_P[order], kept.row_P[order], kept.y_P[order] > 0.5
    new_P = np.ones(len(task_P), dtype=bool)
    new_P[1:] = (task_P[1:] != task_P[:-1]) | (pred_P[1:] != pred_P[:-1])
    start_G = np.flatnonzero(new_P)  # groups of equal predictions of a task
    tasks, first_A = np.unique(task_P[start_G], return_index=True)
    task_of_G = np.repeat(np.arange(len(tasks)), np.diff(first_A, append=len(start_G)))

    def of_draw(drawn_R: NDArray[np.float32]) -> Floats:
        count_P = drawn_R[row_P].astype(np.float64)
        size_G, positive_G = (np.add.reduceat(values_P, start_G) for values_P in (count_P, count_P * truth_P))
        labels_A, positives_A = (np.add.reduceat(values_G, first_A) for values_G in (size_G, positive_G))
        seen_G, found_G = (
            np.cumsum(values_G) - (np.cumsum(total_A) - total_A)[task_of_G]
            for values_G, total_A in ((size_G, labels_A), (positive_G, positives_A))
        )
        if metric == "roc_auc":
            won_G = (size_G - positive_G) * (found_G - positive_G / 2)
            area_A = np.add.reduceat(won_G, first_A) / (positives_A * (labels_A - positives_A))
        else:
            gain_G = np.where(positive_G > 0, positive_G * found_G / seen_G, 0)
            area_A = np.add.reduceat(gain_G, first_A) / positives_A
        return np.where((positives_A > 0) & (positives_A < labels_A), area_A, np.nan)

    def function(drawn_RN: NDArray[np.float32]) -> Floats:
        out = np.full((kept.num_tasks, drawn_RN.shape[1]), np.nan)
        if len(tasks):
            out[tasks] = np.stack([of_draw(drawn_R) for drawn_R in np.ascontiguousarray(drawn_RN.T)], axis=1)
        return out

    return function

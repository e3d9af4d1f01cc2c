"""Metrics of all tasks at once, in float64 numpy and without a loop over tasks.

Labels come as *pairs*: one entry for each scored label, whatever layout the data had (`Scored`). A metric gives
one value for each task (`[T]`, NaN where the task cannot be scored) and one *pooled* value over all labels
together. A task without labels, or with a prediction that is not finite, has no value; one such prediction takes
the pooled value as well, since a model that diverged on some tasks has no score over all of them.

`METRICS[family][name]` is what an evaluator uses; `summarize` makes the row that a person looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Family = Literal["binary", "multiclass", "regression"]
Args = ParamSpec("Args")

NUM_BINS = 15  # of the calibration error


class Curve(NamedTuple):
    """Binary tasks ranked by falling prediction: one entry for each of the G distinct predictions of a task."""

    task_G: Ints
    threshold_G: Floats  # the prediction that the group's labels share
    size_G: Floats  # labels in the group
    positives_G: Floats  # positive ones among them
    seen_G: Floats  # labels of the task with this or a higher prediction
    found_G: Floats  # positive ones among those


@dataclass(frozen=True, eq=False)
class Scored:
    """Labels and predictions of tasks of one family, one entry for each label, in any order; kept sorted by task.

    `pred` is the probability of the positive class [P], class probabilities [P, K] (padded classes hold 0), or the
    prediction in original units [P]. Binary labels above 0.5 are positive, multiclass labels are class indices.
    `row_P` is the input row of each label and is needed by `precision_at_k` only.

    Raises ValueError for lengths that differ, a task outside [0, num_tasks), a label that is not finite or, for
    class probabilities, is not one of the K classes.
    """

    task_P: Ints
    y_P: Floats
    pred: Floats
    num_tasks: int
    row_P: Ints | None = None

    def __post_init__(self) -> None:
        task_P, y_P = np.asarray(self.task_P, np.int64), np.asarray(self.y_P, np.float64)
        pred = np.asarray(self.pred, np.float64)
        row_P = None if self.row_P is None else np.asarray(self.row_P, np.int64)
        lengths = [len(column) for column in (task_P, y_P, pred, row_P) if column is not None]
        if len(set(lengths)) > 1:
            raise ValueError(f"task_P, y_P, pred and row_P must be equally long; their lengths are {lengths}")
        if np.any((task_P < 0) | (task_P >= self.num_tasks)):
            raise ValueError(f"task_P must lie in [0, {self.num_tasks}); it spans [{task_P.min()}, {task_P.max()}]")
        if not np.isfinite(y_P).all():
            raise ValueError(f"{np.sum(~np.isfinite(y_P))} of {len(y_P)} labels are not finite; leave missing ones out")
        if pred.ndim == 2 and np.any((y_P < 0) | (y_P >= pred.shape[1]) | (y_P != np.floor(y_P))):
            raise ValueError(f"multiclass labels must be classes 0 to {pred.shape[1] - 1}")
        if np.any(task_P[1:] < task_P[:-1]):
            order = _order(task_P)
            task_P, y_P, pred = task_P[order], y_P[order], pred[order]
            row_P = None if row_P is None else row_P[order]
        for name, column in (("task_P", task_P), ("y_P", y_P), ("pred", pred), ("row_P", row_P)):
            object.__setattr__(self, name, column)

    @cached_property
    def count_T(self) -> Ints:
        """Labels of each task."""
        return np.bincount(self.task_P, minlength=self.num_tasks)

    @cached_property
    def start_P(self) -> Ints:
        """Where the labels of each label's task start."""
        return (np.cumsum(self.count_T) - self.count_T)[self.task_P]

    def sum_T(self, value_P: ArrayLike) -> Floats:
        """Sum over each task's labels; 0 for an absent task."""
        return _sums(value_P, self.task_P, self.num_tasks)

    def mean_T(self, value_P: ArrayLike) -> Floats:
        """Mean over each task's labels; NaN for an absent task."""
        with np.errstate(invalid="ignore"):
            return self.sum_T(value_P) / self.count_T

    def centered(self, value_P: Floats) -> Floats:
        """Values less their task's mean; exactly 0 in a task whose values are all equal."""
        from_first_P = value_P - value_P[self.start_P]
        return from_first_P - self.mean_T(from_first_P)[self.task_P]

    @cached_property
    def bad_T(self) -> NDArray[np.bool_]:
        """Tasks with a prediction that is not finite."""
        finite = np.isfinite(self.pred)
        return self.sum_T(~(finite.all(axis=1) if finite.ndim == 2 else finite)) > 0

    def sound(self) -> Scored:
        """The same tasks, with those in `bad_T` absent."""
        if not self.bad_T.any():
            return self
        keep_P = ~self.bad_T[self.task_P]
        row_P = None if self.row_P is None else self.row_P[keep_P]
        return Scored(self.task_P[keep_P], self.y_P[keep_P], self.pred[keep_P], self.num_tasks, row_P)

    def pooled(self) -> Scored:
        """All labels as one task."""
        return self._pooled

    @cached_property
    def _pooled(self) -> Scored:
        return Scored(np.zeros_like(self.task_P), self.y_P, self.pred, 1, self.row_P)

    @cached_property
    def by_row(self) -> Scored:
        """Rows in the place of tasks: each row's labels as one ranking. Needs `row_P`."""
        assert self.row_P is not None
        rows, row_P = np.unique(self.row_P, return_inverse=True)
        return Scored(row_P, self.y_P, self.pred, len(rows))

    @cached_property
    def curve(self) -> Curve:
        """The ranking that ROC, precision-recall and F1 are read from."""
        order = _order(self.task_P, -self.pred)
        pred_P = self.pred[order]
        starts = _run_starts(self.task_P, pred_P)
        task_G = self.task_P[starts]
        size_G = np.diff(starts, append=len(pred_P)).astype(np.float64)
        positives_G = np.add.reduceat(self.truth_P[order].astype(np.float64), starts)

        def running(value_G: Floats) -> Floats:
            total_T = _sums(value_G, task_G, self.num_tasks)
            return np.cumsum(value_G) - (np.cumsum(total_T) - total_T)[task_G]

        return Curve(task_G, pred_P[starts], size_G, positives_G, running(size_G), running(positives_G))

    @cached_property
    def truth_P(self) -> Ints:
        """The true class; of binary tasks 1 for positive labels."""
        return (self.y_P if self.pred.ndim == 2 else self.y_P > 0.5).astype(np.int64)

    @cached_property
    def positives_T(self) -> Floats:
        """Positive labels of each binary task."""
        return self.sum_T(self.truth_P)

    @cached_property
    def class_P(self) -> Ints:
        """The predicted class: the most probable one, or for binary tasks whether the probability reaches 0.5."""
        return np.argmax(self.pred, axis=1) if self.pred.ndim == 2 else (self.pred >= 0.5).astype(np.int64)


def _sums(value: ArrayLike, index: Ints, length: int) -> Floats:
    """Sums of the values with equal index, for each index below `length`."""
    return np.bincount(index, weights=np.asarray(value, np.float64), minlength=length).astype(np.float64, copy=False)


def _order(task_P: Ints, *keys: NDArray[Any]) -> Ints:
    """A stable order by task, then by `keys`. Narrow integers make numpy use its radix sort for the task."""
    narrow_P = task_P.astype(np.min_scalar_type(int(task_P.max(initial=0))))
    return np.lexsort((*reversed(keys), narrow_P))


def _run_starts(*keys: NDArray[Any]) -> Ints:
    """Where runs of equal keys start."""
    new_P = np.zeros(len(keys[0]), bool)
    new_P[:1] = True
    for key in keys:
        new_P[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(new_P)


def _of_sound_tasks(
    metric: Callable[Concatenate[Scored, Args], Floats],
) -> Callable[Concatenate[Scored, Args], Floats]:
    """Leave out tasks with predictions that are not finite, and let 0/0 be NaN without a warning."""

    @wraps(metric)
    def guarded(scored: Scored, *args: Args.args, **kwargs: Args.kwargs) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return metric(scored.sound(), *args, **kwargs)

    return guarded


# ------------------------------------------------------------------------------------------------- binary


@_of_sound_tasks
def roc_auc(scored: Scored, min_per_class: int = 1) -> Floats:
    """Area under the ROC curve [T]: the share of (positive, negative) pairs ranked right, ties 0.5.

    NaN with fewer than `min_per_class` positives or negatives (and always without one of each).
    """
    curve = scored.curve
    negatives_G = curve.size_G - curve.positives_G
    won_T = _sums(negatives_G * (curve.found_G - curve.positives_G / 2), curve.task_G, scored.num_tasks)
    pairs_T = scored.positives_T * (scored.count_T - scored.positives_T)
    return np.where(_rankable_T(scored, min_per_class), won_T / pairs_T, np.nan)


@_of_sound_tasks
def pr_auc(scored: Scored, min_per_class: int = 1) -> Floats:
    """Average precision [T]: sum of precision x gain in recall over distinct thresholds, as scikit-learn has it.

    NaN as for `roc_auc`.
    """
    curve = scored.curve
    gained_T = _sums(curve.positives_G * curve.found_G / curve.seen_G, curve.task_G, scored.num_tasks)
    return np.where(_rankable_T(scored, min_per_class), gained_T / scored.positives_T, np.nan)


def _rankable_T(scored: Scored, min_per_class: int) -> NDArray[np.bool_]:
    return np.minimum(scored.positives_T, scored.count_T - scored.positives_T) >= max(min_per_class, 1)


@_of_sound_tasks
def f1(scored: Scored, threshold_T: Floats | None = None) -> Floats:
    """F1 of the positive class [T], where `probability >= threshold` is positive; NaN without positive labels.

    `threshold_T` is 0.5 where it is NaN or not given.
    """
    positive_P = scored.pred >= _threshold_P(scored, threshold_T)
    right_T = scored.sum_T(positive_P * scored.truth_P)
    f1_T = 2 * right_T / (scored.positives_T + scored.sum_T(positive_P))
    return np.where(scored.positives_T > 0, f1_T, np.nan)


def _threshold_P(scored: Scored, threshold_T: Floats | None) -> Floats:
    if threshold_T is None:
        return np.full(len(scored.y_P), 0.5)
    return np.nan_to_num(threshold_T, nan=0.5)[scored.task_P]


@_of_sound_tasks
def best_f1_threshold(scored: Scored) -> Floats:
    """The threshold of each task [T] that maximises F1 on these labels; NaN without positive labels.

    It lies midway between the neighbouring distinct predictions, and is the highest one where several are best.
    """
    curve = scored.curve
    f1_G = 2 * curve.found_G / (curve.seen_G + scored.positives_T[curve.task_G])
    starts = _run_starts(curve.task_G)
    tasks, best = curve.task_G[starts], _order(curve.task_G, -f1_G)[starts]
    upper = curve.threshold_G[best]
    follower = np.minimum(best + 1, len(f1_G) - 1)
    lower = np.where(curve.task_G[follower] == tasks, curve.threshold_G[follower], upper)
    middle = lower + (upper - lower) / 2
    threshold_T = np.full(scored.num_tasks, np.nan)
    threshold_T[tasks] = np.where(middle > lower, middle, upper)  # of neighbouring floats the middle is the lower one
    return np.where(scored.positives_T > 0, threshold_T, np.nan)


def precision_at_k(scored: Scored, k: int) -> float:
    """Precision at k of a ranking of tags: positives among a row's k highest predictions / k, mean over rows.

    Rows are those with at least k scored labels; rows without a positive count 0, as the extreme multi-label
    literature does. Where predictions tie across the cut, the expectation over their order. NaN if no row has k
    labels, rows are not known, or a prediction is not finite.
    """
    if scored.row_P is None or scored.bad_T.any():
        return float("nan")
    curve, count_R = scored.by_row.curve, scored.by_row.count_T
    taken_G = np.clip(k - (curve.seen_G - curve.size_G), 0, curve.size_G)
    hits_R = _sums(curve.positives_G * taken_G / curve.size_G, curve.task_G, len(count_R))
    return float(np.mean(hits_R[count_R >= k]) / k) if np.any(count_R >= k) else float("nan")


# ----------------------------------------------------------------------------------- binary and multiclass


@_of_sound_tasks
def accuracy(scored: Scored) -> Floats:
    """Share of labels whose class is predicted right [T]: at a probability of 0.5, or the most probable class."""
    return scored.mean_T(scored.class_P == scored.truth_P)


@_of_sound_tasks
def macro_f1(scored: Scored) -> Floats:
    """F1 of multiclass tasks [T]: mean over the classes that occur in the task's labels or predictions."""
    num_classes = scored.pred.shape[1]

    def count_TK(class_P: Ints, kept: slice | NDArray[np.bool_] = slice(None)) -> Ints:
        cell_P = (scored.task_P * num_classes + class_P)[kept]
        return np.bincount(cell_P, minlength=scored.num_tasks * num_classes).reshape(-1, num_classes)

    right_TK = count_TK(scored.truth_P, scored.class_P == scored.truth_P)
    occurs_TK = count_TK(scored.truth_P) + count_TK(scored.class_P)
    return np.sum(2 * right_TK / np.maximum(occurs_TK, 1), axis=1) / np.sum(occurs_TK > 0, axis=1)


@_of_sound_tasks
def brier(scored: Scored) -> Floats:
    """Brier score [T]: mean squared error of the probability; for multiclass tasks summed over classes."""
    if scored.pred.ndim == 1:
        return mse(scored)
    p_truth_P = scored.pred[np.arange(len(scored.y_P)), scored.truth_P]
    return scored.mean_T((scored.pred**2).sum(axis=1) - p_truth_P**2 + (1 - p_truth_P) ** 2)


@_of_sound_tasks
def ece(scored: Scored) -> Floats:
    """Expected calibration error [T] over 15 equal-width bins: sum over bins of |labels right - confidence| / labels.

    The confidence is the probability of the positive class, or of the most probable class. Bins are closed below
    and 1.0 has one of its own, as in torchmetrics. Source: Guo et al. 2017, eq. 3.
    """
    if scored.pred.ndim == 1:
        confidence_P, right_P = scored.pred, scored.truth_P > 0
    else:
        confidence_P, right_P = scored.pred.max(axis=1, initial=0), scored.class_P == scored.truth_P
    bin_P = np.searchsorted(np.linspace(0, 1, NUM_BINS + 1), np.clip(confidence_P, 0, 1), side="right") - 1
    cell_P, num_cells = scored.task_P * (NUM_BINS + 1) + bin_P, scored.num_tasks * (NUM_BINS + 1)
    gap_TN = _sums(right_P - confidence_P, cell_P, num_cells).reshape(-1, NUM_BINS + 1)
    return np.abs(gap_TN).sum(axis=1) / scored.count_T


def pooled_ece(scored: Scored) -> float:
    """`ece` of all labels together, by torchmetrics (n_bins=15, norm="l1"); NaN without labels."""
    import torch
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

    if not len(scored.y_P) or scored.bad_T.any():
        return float("nan")
    pred = torch.from_numpy(np.clip(scored.pred, 0, 1))  # outside [0, 1] torchmetrics would take them for logits
    truth_P = torch.from_numpy(scored.truth_P)
    if scored.pred.ndim == 1:
        return float(binary_calibration_error(pred, truth_P, NUM_BINS, "l1"))
    return float(multiclass_calibration_error(pred, truth_P, pred.shape[1], NUM_BINS, "l1"))


def _pooled_f1(scored: Scored, options: ScoreOptions) -> float:
    """F1 over all labels, each judged by the threshold of its own task."""
    margin_P = scored.pred - _threshold_P(scored, options.threshold_T)
    return float(f1(Scored(scored.task_P, scored.y_P, margin_P, scored.num_tasks).pooled(), np.zeros(1))[0])


# --------------------------------------------------------------------------------------------- regression


@_of_sound_tasks
def mse(scored: Scored) -> Floats:
    """Mean squared error [T]."""
    return scored.mean_T((scored.pred - scored.y_P) ** 2)


@_of_sound_tasks
def mae(scored: Scored) -> Floats:
    """Mean absolute error [T]."""
    return scored.mean_T(np.abs(scored.pred - scored.y_P))


@_of_sound_tasks
def r2(scored: Scored) -> Floats:
    """1 - SSE/SST about the mean of these labels [T]; NaN where labels are constant or fewer than two.

    For one task it is also its explained variance `ev` = 1 - MSE/Var of the multi-task literature. The two differ
    when pooled: `ev` is this function of the pooled labels, so that it rewards knowing the tasks' means, whereas
    `pooled_r2` does not.
    """
    variance_T = scored.mean_T(scored.centered(scored.y_P) ** 2)
    return np.where(variance_T > 0, 1 - mse(scored) / variance_T, np.nan)


def pooled_r2(scored: Scored) -> float:
    """1 - SSE/SST with both summed over all labels and SST about each task's own mean; NaN where that is 0."""
    sst = np.sum(scored.centered(scored.y_P) ** 2)
    return float(1 - mse(scored.pooled())[0] * len(scored.y_P) / sst) if sst > 0 else float("nan")


@_of_sound_tasks
def pearson_r2(scored: Scored) -> Floats:
    """Squared Pearson correlation [T]; NaN where labels or predictions are constant."""
    y_P, pred_P = scored.centered(scored.y_P), scored.centered(scored.pred)
    shared_T = scored.sum_T(y_P * pred_P)
    return np.minimum(shared_T / scored.sum_T(y_P**2) * (shared_T / scored.sum_T(pred_P**2)), 1)


@_of_sound_tasks
def ci(scored: Scored) -> Floats:
    """Concordance index [T]: the share of pairs with different labels that are ordered right, tied predictions 0.5.

    NaN where all labels are equal. O(P log P) by Knight's count for Kendall's tau (JASA 1966): sort by label, then
    by prediction; discordant pairs are the inversions left among the predictions.
    """
    task_P, y_P, pred_P = scored.task_P, scored.y_P, scored.pred  # task_P holds for any order inside tasks
    by_pred = _order(task_P, pred_P)
    by_label = by_pred[_order(task_P, y_P[by_pred])]  # by task, then label, then prediction

    def tied_T(*keys: Floats) -> Floats:
        starts = _run_starts(task_P, *keys)
        size = np.diff(starts, append=len(task_P)).astype(np.float64)
        return _sums(size * (size - 1) / 2, task_P[starts], scored.num_tasks)

    starts = _run_starts(task_P, pred_P[by_pred])
    level_P = np.empty_like(by_pred)  # dense rank of each prediction over all tasks
    level_P[by_pred] = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(task_P)))
    rank_P = np.empty_like(by_pred)  # inside the task; ties rise with the position, so that they are no inversions
    rank_P[np.argsort(level_P[by_label], kind="stable")] = np.arange(len(task_P)) - scored.start_P

    ordered_T = scored.count_T * (scored.count_T - 1) / 2 - tied_T(y_P[by_label])
    tied_pred_T = tied_T(pred_P[by_pred]) - tied_T(y_P[by_label], pred_P[by_label])
    return 1 - (_inversions_T(scored, rank_P) + tied_pred_T / 2) / ordered_T


def _inversions_T(scored: Scored, rank_P: Ints) -> Floats:
    """Pairs out of order in each task's permutation of 0..n-1, as a wavelet tree counts them.

    From the highest bit down, ranks are split stably into blocks that share the bits above. A rank whose bit is 0
    is out of order with each one before it in its block whose bit is 1. Blocks of a permutation are full, so where
    they start follows from the position alone, in all tasks at once.
    """
    rank_P, start_P = rank_P.astype(np.int32), scored.start_P.astype(np.int32)  # half the memory traffic
    index_P = np.arange(len(rank_P), dtype=np.int32)
    inside_P = index_P - start_P
    crossed_P = np.zeros_like(rank_P)
    for bit in reversed(range(int(scored.count_T.max(initial=1) - 1).bit_length())):
        block_P = start_P + (inside_P >> (bit + 1) << (bit + 1))
        upper_P = rank_P >> bit & 1
        before_P = np.cumsum(upper_P, dtype=np.int32) - upper_P
        before_P -= before_P[block_P]
        crossed_P += np.where(upper_P, 0, before_P)
        split_P = np.empty_like(rank_P)
        split_P[np.where(upper_P, block_P + (1 << bit) + before_P, index_P - before_P)] = rank_P
        rank_P = split_P
    return scored.sum_T(crossed_P)


# ----------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True, eq=False)
class ScoreOptions:
    """What an evaluation fixes for all tasks: classes must hold `min_per_class` labels each to be ranked
    (`roc_auc`, `pr_auc`), and `threshold_T` are the thresholds of the binary `f1` (0.5 where NaN or None)."""

    min_per_class: int = 1
    threshold_T: Floats | None = None


@dataclass(frozen=True)
class Metric:
    """A metric by name. `per_task` gives [T] with NaN where a task cannot be scored, or None for a metric that ranks
    a row's tasks and so has no value for one of them (`p_at_k`); `pooled` gives one number over all labels."""

    name: str
    family: Family
    higher_is_better: bool
    per_task: Callable[[Scored, ScoreOptions], Floats | None]
    pooled: Callable[[Scored, ScoreOptions], float]


def _metric(
    name: str,
    family: Family,
    higher_is_better: bool,
    per_task: Callable[[Scored, ScoreOptions], Floats],
    pooled: Callable[[Scored, ScoreOptions], float] | None = None,
) -> Metric:
    """A metric that is pooled, if not said otherwise, as if all labels were of one task."""
    as_one = pooled or (lambda scored, options: float(per_task(scored.pooled(), options)[0]))
    return Metric(name, family, higher_is_better, per_task, as_one)


def _precision_at(k: int) -> Metric:
    return Metric(f"p_at_{k}", "binary", True, lambda s, o: None, lambda s, o: precision_at_k(s, k))


_ALL = [
    _metric("roc_auc", "binary", True, lambda s, o: roc_auc(s, o.min_per_class)),
    _metric("pr_auc", "binary", True, lambda s, o: pr_auc(s, o.min_per_class)),
    _metric("accuracy", "binary", True, lambda s, o: accuracy(s)),
    _metric("f1", "binary", True, lambda s, o: f1(s, o.threshold_T), _pooled_f1),
    _metric("brier", "binary", False, lambda s, o: brier(s)),
    _metric("ece", "binary", False, lambda s, o: ece(s), lambda s, o: pooled_ece(s)),
    *(_precision_at(k) for k in (1, 3, 5)),
    _metric("accuracy", "multiclass", True, lambda s, o: accuracy(s)),
    # pooled: micro F1, which for one label a row is the accuracy; classes of different tasks are not the same classes
    _metric("f1", "multiclass", True, lambda s, o: macro_f1(s), lambda s, o: float(accuracy(s.pooled())[0])),
    _metric("brier", "multiclass", False, lambda s, o: brier(s)),
    _metric("ece", "multiclass", False, lambda s, o: ece(s), lambda s, o: pooled_ece(s)),
    _metric("mse", "regression", False, lambda s, o: mse(s)),
    _metric("mae", "regression", False, lambda s, o: mae(s)),
    _metric("r2", "regression", True, lambda s, o: r2(s), lambda s, o: pooled_r2(s)),
    _metric("ev", "regression", True, lambda s, o: r2(s)),
    _metric("pearson_r2", "regression", True, lambda s, o: pearson_r2(s)),
    _metric("ci", "regression", True, lambda s, o: ci(s)),
]
METRICS: dict[str, dict[str, Metric]] = {
    family: {metric.name: metric for metric in _ALL if metric.family == family} for family in get_args(Family)
}


def summarize(
    value_T: Floats | None, pooled: float, higher_is_better: bool, num_ranked: int = 0
) -> dict[str, float | int | None]:
    """One metric in a few numbers; those that are not finite become None.

    `mean`, `median` and `worst_decile` (mean over the worst tenth, rounded down, at least one) are over the tasks
    that could be scored, `scored` counts them. For a metric without values for single tasks (`value_T` None) the mean
    is the pooled value, median and worst decile are None, and `scored` is `num_ranked`, the tasks in the ranking.
    """

    def finite(number: float) -> float | None:
        return float(number) if np.isfinite(number) else None

    if value_T is None:
        mean, scored = finite(pooled), num_ranked if np.isfinite(pooled) else 0
        return {"mean": mean, "median": None, "worst_decile": None, "pooled": mean, "scored": scored}
    best_first = np.sort(value_T[np.isfinite(value_T)])[:: -1 if higher_is_better else 1]
    if not len(best_first):
        return {"mean": None, "median": None, "worst_decile": None, "pooled": finite(pooled), "scored": 0}
    return {
        "mean": finite(best_first.mean()),
        "median": finite(np.median(best_first)),
        "worst_decile": finite(best_first[-max(1, len(best_first) // 10) :].mean()),
        "pooled": finite(pooled),
        "scored": len(best_first),
    }

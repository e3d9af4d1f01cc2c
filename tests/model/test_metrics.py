"""Metrics of all tasks at once against a loop over tasks with scikit-learn, or with plain sums over pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from mtrain.model import metrics as m
from mtrain.model.metrics import METRICS, Scored, ScoreOptions

RNG = np.random.default_rng(7)
NUM_TASKS = 40
EVERY_METRIC = [
    pytest.param(metric, id=f"{metric.family}-{metric.name}") for family in METRICS.values() for metric in family.values()
]


def ragged_tasks(rng: np.random.Generator) -> np.ndarray:
    """Tasks of 0 to 60 labels in a random order; the first, the last and some others have none."""
    size_T = rng.integers(0, 60, NUM_TASKS)
    size_T[[0, 7, NUM_TASKS - 1]] = 0
    size_T[[1, 2]] = 1
    size_T[[3, 4, 5]] = 40
    return rng.permutation(np.repeat(np.arange(NUM_TASKS), size_T))


def binary() -> Scored:
    rng = np.random.default_rng(7)
    task_P = ragged_tasks(rng)
    y_P = (rng.random(len(task_P)) < 0.3).astype(float)
    y_P[task_P == 3], y_P[task_P == 4] = 0, 1
    pred_P = np.where(task_P % 2, rng.integers(0, 8, len(task_P)) / 7, rng.random(len(task_P)))  # odd tasks: many ties
    pred_P[task_P == 5] = 0.5
    return Scored(task_P, y_P, pred_P, NUM_TASKS, row_P=rng.integers(0, 90, len(task_P)))


def multiclass() -> Scored:
    rng = np.random.default_rng(7)
    task_P = ragged_tasks(rng)
    num_classes_T = rng.integers(2, 7, NUM_TASKS)
    logit_PK = rng.normal(size=(len(task_P), 6)) * 3
    logit_PK[np.arange(6) >= num_classes_T[task_P, None]] = -np.inf
    pred_PK = np.exp(logit_PK) / np.exp(logit_PK).sum(axis=1, keepdims=True)
    y_P = rng.integers(0, num_classes_T[task_P])
    y_P[task_P == 3] = 1
    return Scored(task_P, y_P, pred_PK, NUM_TASKS)


def regression() -> Scored:
    rng = np.random.default_rng(7)
    task_P = ragged_tasks(rng)
    y_P = np.round(rng.normal(size=len(task_P)) * 3 + 50, 1) + task_P
    pred_P = y_P + rng.normal(size=len(task_P)) * 2
    tied_P = task_P % 2 == 1
    y_P[tied_P], pred_P[tied_P] = np.round(y_P[tied_P]), np.round(pred_P[tied_P])
    y_P[task_P == 3] = 0.1  # whose mean is not 0.1 in floats
    pred_P[task_P == 4] = 0.1
    return Scored(task_P, y_P, pred_P, NUM_TASKS)


MAKE: dict[str, Callable[[], Scored]] = {"binary": binary, "multiclass": multiclass, "regression": regression}


def loop(
    scored: Scored, value_of: Callable[[np.ndarray, np.ndarray], float], scorable: Callable = lambda y: True
) -> np.ndarray:
    value_T = np.full(scored.num_tasks, np.nan)
    for task in range(scored.num_tasks):
        mine = scored.task_P == task
        if mine.any() and scorable(scored.y_P[mine]):
            value_T[task] = value_of(scored.y_P[mine], scored.pred[mine])
    return value_T


def has_both(y: np.ndarray, least: int = 1) -> bool:
    return min(y.sum(), (1 - y).sum()) >= least


def varies(y: np.ndarray) -> bool:
    return len(np.unique(y)) > 1


def ci_by_pairs(y: np.ndarray, pred: np.ndarray) -> float:
    won = pairs = 0.0
    for i in range(len(y)):
        for j in range(len(y)):
            if y[i] < y[j]:
                pairs += 1
                won += 1.0 if pred[i] < pred[j] else 0.5 if pred[i] == pred[j] else 0.0
    return won / pairs if pairs else np.nan


def ece_by_bins(confidence: np.ndarray, right: np.ndarray) -> float:
    edges = np.linspace(0, 1, 16)
    total = 0.0
    for low, high in zip(edges, [*edges[1:], 2], strict=True):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def brier_by_classes(y: np.ndarray, pred: np.ndarray) -> float:
    return float(np.mean(np.sum((pred - np.eye(pred.shape[1])[y.astype(int)]) ** 2, axis=1)))


def same(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------- against a loop over tasks


@pytest.mark.parametrize("least", [1, 3])
def test_roc_auc_and_pr_auc_are_scikit_learns_in_each_task_with_enough_of_both_classes(least: int) -> None:
    scored = binary()

    def enough(y: np.ndarray) -> bool:
        return has_both(y, least)

    same(m.roc_auc(scored, least), loop(scored, sk.roc_auc_score, enough))
    same(m.pr_auc(scored, least), loop(scored, sk.average_precision_score, enough))
    assert np.isnan(m.roc_auc(scored)[[0, 3, 4]]).all()
    assert m.roc_auc(scored)[5] == 0.5


def test_min_per_class_of_0_still_needs_one_of_each_class() -> None:
    scored = binary()
    same(m.pr_auc(scored, 0), m.pr_auc(scored, 1))
    same(m.roc_auc(scored, 0), m.roc_auc(scored, 1))


def test_accuracy_brier_and_ece_of_binary_tasks_are_the_loops() -> None:
    scored = binary()
    same(m.accuracy(scored), loop(scored, lambda y, p: sk.accuracy_score(y, p >= 0.5)))
    same(m.brier(scored), loop(scored, lambda y, p: float(np.mean((y - p) ** 2))))
    same(m.ece(scored), loop(scored, lambda y, p: ece_by_bins(p, y)))


def test_f1_at_each_tasks_threshold_is_scikit_learns_and_0_5_where_that_is_missing() -> None:
    scored = binary()
    threshold_T = RNG.integers(0, 8, NUM_TASKS) / 7  # some predictions lie right on it
    used_T = iter(threshold_T[[t for t in range(NUM_TASKS) if scored.y_P[scored.task_P == t].sum()]])
    same(m.f1(scored, threshold_T), loop(scored, lambda y, p: sk.f1_score(y, p >= next(used_T)), np.any))
    same(m.f1(scored), loop(scored, lambda y, p: sk.f1_score(y, p >= 0.5), np.any))
    same(m.f1(scored, np.full(NUM_TASKS, np.nan)), m.f1(scored))


def test_no_threshold_has_a_higher_f1_than_the_best_one() -> None:
    scored = binary()
    threshold_T = m.best_f1_threshold(scored)

    def best(y: np.ndarray, p: np.ndarray) -> float:
        return max(sk.f1_score(y, p >= cut) for cut in np.unique(p))

    same(m.f1(scored, threshold_T), loop(scored, best, np.any))
    np.testing.assert_array_equal(np.isnan(threshold_T), np.isnan(m.f1(scored)))


def test_the_best_threshold_lies_midway_between_distinct_predictions() -> None:
    above = np.nextafter(0.5, 1)
    scored = Scored([0, 0, 0, 1, 1, 2, 2], [1, 1, 0, 1, 0, 1, 1], [0.9, 0.6, 0.2, above, 0.5, 0.3, 0.3], 3)
    np.testing.assert_allclose(m.best_f1_threshold(scored), [0.4, 0.5, 0.3])
    same(m.f1(scored, m.best_f1_threshold(scored)), np.ones(3))


def test_multiclass_metrics_are_scikit_learns_and_the_loops() -> None:
    scored = multiclass()
    same(m.accuracy(scored), loop(scored, lambda y, p: sk.accuracy_score(y, p.argmax(1))))
    same(m.macro_f1(scored), loop(scored, lambda y, p: sk.f1_score(y, p.argmax(1), average="macro")))
    same(m.brier(scored), loop(scored, brier_by_classes))
    same(m.ece(scored), loop(scored, lambda y, p: ece_by_bins(p.max(1), p.argmax(1) == y)))


def test_regression_metrics_are_scikit_learns_and_numpys() -> None:
    scored = regression()
    same(m.mse(scored), loop(scored, sk.mean_squared_error))
    same(m.mae(scored), loop(scored, sk.mean_absolute_error))
    same(m.r2(scored), loop(scored, sk.r2_score, varies))

    def pearson_r2(y: np.ndarray, p: np.ndarray) -> float:
        return float(np.corrcoef(y, p)[0, 1] ** 2) if varies(p) else np.nan

    same(m.pearson_r2(scored), loop(scored, pearson_r2, varies))
    assert np.isnan(m.r2(scored)[[0, 1, 3]]).all()
    assert np.isnan(m.pearson_r2(scored)[[0, 1, 3, 4]]).all()


def test_ci_is_the_share_of_pairs_in_order() -> None:
    scored = regression()
    same(m.ci(scored), loop(scored, ci_by_pairs))
    assert m.ci(scored)[4] == 0.5


labels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 4)), max_size=40)


@settings(deadline=None, max_examples=150)
@given(labels)
def test_ci_is_the_share_of_pairs_in_order_whatever_is_tied(triples: list[tuple[int, int, int]]) -> None:
    task_P, y_P, pred_P = np.array(triples, float).reshape(-1, 3).T
    scored = Scored(task_P, y_P, pred_P, 5)
    same(m.ci(scored), loop(scored, ci_by_pairs))


@settings(deadline=None, max_examples=150)
@given(labels)
def test_binary_curves_are_scikit_learns_whatever_is_tied(triples: list[tuple[int, int, int]]) -> None:
    task_P, y_P, pred_P = np.array(triples, float).reshape(-1, 3).T
    scored = Scored(task_P, y_P > 2, pred_P / 4, 5)
    same(m.roc_auc(scored), loop(scored, sk.roc_auc_score, has_both))
    same(m.pr_auc(scored), loop(scored, sk.average_precision_score, has_both))
    best_T = loop(scored, lambda y, p: max(sk.f1_score(y, p >= cut) for cut in p), np.any)
    same(m.f1(scored, m.best_f1_threshold(scored)), best_T)


def test_precision_at_k_is_the_mean_over_rows_with_k_labels() -> None:
    scored = binary()
    distinct = dataclasses.replace(scored, pred=RNG.permutation(len(scored.y_P)) / len(scored.y_P))
    for k in (1, 3, 5):
        share = []
        for row in np.unique(distinct.row_P):
            mine = distinct.row_P == row
            if mine.sum() >= k:
                top = np.argsort(-distinct.pred[mine])[:k]
                share.append(distinct.y_P[mine][top].mean())
        assert len(share) > 0
        assert m.precision_at_k(distinct, k) == pytest.approx(np.mean(share))


def test_precision_at_k_of_tied_predictions_is_their_expectation() -> None:
    scored = Scored(np.arange(4), [1, 1, 0, 0], [0.9, 0.5, 0.5, 0.5], 4, row_P=np.zeros(4))
    assert m.precision_at_k(scored, 1) == 1
    assert m.precision_at_k(scored, 2) == pytest.approx((1 + 1 / 3) / 2)
    assert m.precision_at_k(scored, 4) == 0.5


def test_precision_at_k_is_nan_without_rows_or_without_a_row_of_k_labels() -> None:
    assert np.isnan(m.precision_at_k(Scored(np.arange(4), np.ones(4), np.ones(4), 4, row_P=np.zeros(4)), 5))
    assert np.isnan(m.precision_at_k(Scored(np.arange(4), np.ones(4), np.ones(4), 4), 1))


# ----------------------------------------------------------------------------------------------- pooled


@pytest.mark.parametrize(
    ("family", "name", "value_of"),
    [
        ("binary", "roc_auc", sk.roc_auc_score),
        ("binary", "pr_auc", sk.average_precision_score),
        ("binary", "accuracy", lambda y, p: sk.accuracy_score(y, p >= 0.5)),
        ("binary", "f1", lambda y, p: sk.f1_score(y, p >= 0.5)),
        ("binary", "brier", sk.brier_score_loss),
        ("binary", "ece", lambda y, p: ece_by_bins(p, y)),
        ("multiclass", "accuracy", lambda y, p: sk.accuracy_score(y, p.argmax(1))),
        ("multiclass", "f1", lambda y, p: sk.f1_score(y, p.argmax(1), average="micro")),
        ("multiclass", "brier", brier_by_classes),
        ("multiclass", "ece", lambda y, p: ece_by_bins(p.max(1), p.argmax(1) == y)),
        ("regression", "mse", sk.mean_squared_error),
        ("regression", "mae", sk.mean_absolute_error),
        ("regression", "ev", sk.r2_score),
        ("regression", "pearson_r2", lambda y, p: np.corrcoef(y, p)[0, 1] ** 2),
        ("regression", "ci", ci_by_pairs),
    ],
)
def test_the_pooled_value_is_the_metric_of_all_labels_together(family: str, name: str, value_of: Callable) -> None:
    scored = MAKE[family]()
    assert METRICS[family][name].pooled(scored, ScoreOptions()) == pytest.approx(value_of(scored.y_P, scored.pred))


def test_pooled_f1_judges_each_label_by_the_threshold_of_its_task() -> None:
    scored = binary()
    threshold_T = np.where(np.arange(NUM_TASKS) % 3, RNG.integers(0, 8, NUM_TASKS) / 7, np.nan)
    positive_P = scored.pred >= np.nan_to_num(threshold_T, nan=0.5)[scored.task_P]
    pooled = METRICS["binary"]["f1"].pooled(scored, ScoreOptions(threshold_T=threshold_T))
    assert pooled == pytest.approx(sk.f1_score(scored.y_P, positive_P))


def test_pooled_r2_divides_by_the_spread_inside_tasks_and_ev_by_the_spread_of_all_rows() -> None:
    scored = regression()
    sse = np.sum((scored.pred - scored.y_P) ** 2)
    inside = np.nansum(loop(scored, lambda y, p: float(np.sum((y - y.mean()) ** 2))))
    r2, ev = (METRICS["regression"][name].pooled(scored, ScoreOptions()) for name in ("r2", "ev"))
    assert r2 == pytest.approx(1 - sse / inside)
    assert ev == pytest.approx(1 - np.mean((scored.pred - scored.y_P) ** 2) / np.var(scored.y_P))
    assert ev > r2
    metrics = METRICS["regression"]
    same(metrics["ev"].per_task(scored, ScoreOptions()), metrics["r2"].per_task(scored, ScoreOptions()))


# ------------------------------------------------------------------------------------- of every metric


@pytest.mark.parametrize("metric", EVERY_METRIC)
def test_the_order_of_labels_does_not_matter(metric: m.Metric) -> None:
    scored, options = MAKE[metric.family](), ScoreOptions(threshold_T=RNG.random(NUM_TASKS))
    p = RNG.permutation(len(scored.y_P))
    row_P = None if scored.row_P is None else scored.row_P[p]
    shuffled = Scored(scored.task_P[p], scored.y_P[p], scored.pred[p], NUM_TASKS, row_P)
    assert metric.pooled(shuffled, options) == pytest.approx(metric.pooled(scored, options))
    if metric.per_task(scored, options) is not None:
        same(metric.per_task(shuffled, options), metric.per_task(scored, options))


@pytest.mark.parametrize("metric", EVERY_METRIC)
def test_renumbering_tasks_renumbers_their_values(metric: m.Metric) -> None:
    scored, options = MAKE[metric.family](), ScoreOptions()
    if (value_T := metric.per_task(scored, options)) is None:
        pytest.skip("ranks tasks, has no value for one of them")
    new_T = RNG.permutation(NUM_TASKS)
    renumbered = Scored(new_T[scored.task_P], scored.y_P, scored.pred, NUM_TASKS)
    same(metric.per_task(renumbered, options)[new_T], value_T)


@pytest.mark.parametrize("metric", EVERY_METRIC)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("error")
def test_a_prediction_that_is_not_finite_takes_the_value_of_its_task_and_the_pooled_one(metric: m.Metric, bad: float) -> None:
    scored, options = MAKE[metric.family](), ScoreOptions()
    task = np.argmax(np.bincount(scored.task_P))
    pred = scored.pred.copy()
    pred[np.flatnonzero(scored.task_P == task)[2], ...] = bad
    broken = dataclasses.replace(scored, pred=pred)
    assert np.isnan(metric.pooled(broken, options))
    if (value_T := metric.per_task(scored, options)) is not None:
        same(metric.per_task(broken, options), np.where(np.arange(NUM_TASKS) == task, np.nan, value_T))


@pytest.mark.parametrize("metric", EVERY_METRIC)
@pytest.mark.filterwarnings("error")
def test_without_labels_nothing_is_scored(metric: m.Metric) -> None:
    pred = np.zeros((0, 3)) if metric.family == "multiclass" else np.zeros(0)
    scored = Scored(np.zeros(0), np.zeros(0), pred, 4, row_P=np.zeros(0))
    assert np.isnan(metric.pooled(scored, ScoreOptions()))
    value_T = metric.per_task(scored, ScoreOptions())
    assert value_T is None or (value_T.shape == (4,) and np.isnan(value_T).all())
    assert np.isnan(m.best_f1_threshold(Scored(np.zeros(0), np.zeros(0), np.zeros(0), 4))).all()


@pytest.mark.parametrize("metric", EVERY_METRIC)
def test_every_metric_is_better_for_perfect_predictions_in_the_direction_it_says(metric: m.Metric) -> None:
    scored, options = MAKE[metric.family](), ScoreOptions()
    perfect = np.eye(6)[scored.y_P.astype(int)] if metric.family == "multiclass" else scored.y_P
    better = metric.pooled(dataclasses.replace(scored, pred=perfect), options)
    worse = metric.pooled(scored, options)
    assert better > worse if metric.higher_is_better else better < worse


def test_the_registry_names_each_metric_once_in_its_family() -> None:
    assert {family: set(by_name) for family, by_name in METRICS.items()} == {
        "binary": {"roc_auc", "pr_auc", "accuracy", "f1", "brier", "ece", "p_at_1", "p_at_3", "p_at_5"},
        "multiclass": {"accuracy", "f1", "brier", "ece"},
        "regression": {"mse", "mae", "r2", "ev", "pearson_r2", "ci"},
    }
    for family, by_name in METRICS.items():
        assert all(metric.name == name and metric.family == family for name, metric in by_name.items())


# --------------------------------------------------------------------------------- Scored and summarize


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([0, 1], [1.0], [0.5], 2), "equally long"),
        (([0, 2], [1.0, 0.0], [0.5, 0.5], 2), r"\[0, 2\)"),
        (([0, 1], [1.0, np.nan], [0.5, 0.5], 2), "1 of 2 labels are not finite"),
        (([0, 1], [1.0, 3.0], np.ones((2, 3)), 2), "classes 0 to 2"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scored(*columns)


def test_construction_leaves_the_callers_arrays_as_they_are() -> None:
    task_P, y_P, pred_P = np.array([2, 0, 1]), np.array([1.0, 0.0, 1.0]), np.array([0.3, 0.2, 0.1])
    scored = Scored(task_P, y_P, pred_P, 3)
    np.testing.assert_array_equal(scored.task_P, [0, 1, 2])
    np.testing.assert_array_equal(task_P, [2, 0, 1])


@pytest.mark.parametrize(("higher_is_better", "worst"), [(True, (0 + 1) / 2), (False, (24 + 23) / 2)])
def test_the_summary_is_over_scored_tasks_and_its_worst_tenth_is_the_bad_end(higher_is_better: bool, worst: float) -> None:
    value_T = np.append(RNG.permutation(np.arange(25.0)), [np.nan, np.nan])
    assert m.summarize(value_T, 7.0, higher_is_better) == {
        "mean": 12.0, "median": 12.0, "worst_decile": worst, "pooled": 7.0, "scored": 25
    }  # fmt: skip


def test_the_summary_has_none_where_there_is_no_finite_number() -> None:
    nothing = {"mean": None, "median": None, "worst_decile": None, "pooled": None, "scored": 0}
    assert m.summarize(np.full(3, np.nan), np.nan, True) == nothing
    assert m.summarize(None, np.nan, True, num_ranked=3) == nothing
    assert m.summarize(np.array([2.0, np.nan]), np.inf, True) == {
        **nothing,
        **dict.fromkeys(["mean", "median", "worst_decile"], 2.0),
        "scored": 1,
    }


def test_the_summary_of_a_ranking_is_its_pooled_value() -> None:
    assert m.summarize(None, 0.25, True, num_ranked=12) == {
        "mean": 0.25, "median": None, "worst_decile": None, "pooled": 0.25, "scored": 12
    }  # fmt: skip

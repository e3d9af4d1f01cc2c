"""Resampled metrics against the metrics of labels that are really repeated, and how often intervals hold the truth."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from made import make_run

from mtrain.model.metrics import METRICS, ScoreOptions
from mtrain.report import intervals
from mtrain.report.intervals import Kept, interval, resample, statistic


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", num_tasks=12, rows=90)


@pytest.fixture(scope="module")
def kept(run):
    return Kept.load(run, "test", run.tasks().names)


ALL = [
    "skill",
    "deviance",
    *dict.fromkeys(name for family in METRICS.values() for name in family if not name.startswith("p_at")),
]


@pytest.mark.parametrize("metric", ALL)
def test_on_all_rows_a_metric_is_what_the_run_says(run, kept, metric):
    expected = run.per_task()[f"test_{metric}"].to_numpy()
    found = resample([kept], [metric], resamples=1)[metric].value_T
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("metric", ALL)
def test_a_draw_counts_labels_as_often_as_their_rows(kept, metric):
    """Against the metric of labels that are really repeated, by the functions that score runs."""
    rng = np.random.default_rng(3)
    threshold_T = np.where(np.arange(12) % 3 == 0, np.nan, rng.uniform(0.3, 0.7, 12))
    kept = replace(kept, options=ScoreOptions(1, threshold_T))
    drawn_RN = rng.poisson(1, size=(90, 3)).astype(np.float32)
    found_TN = statistic(kept, metric, 90)(drawn_RN)
    for n in range(3):
        repeated = kept.take(np.repeat(np.arange(len(kept.row_P)), drawn_RN[kept.row_P, n].astype(int)))
        for t in range(12):
            own = repeated.take(repeated.task_P == t)
            if metric == "skill":
                expected = 1 - own.deviance_P.sum() / own.constant_P.sum()
            elif metric == "deviance":
                expected = own.deviance_P.mean()
            else:
                family = METRICS[str(kept.family_T[t])]
                expected = family[metric].per_task(own.scored(), kept.options)[t] if metric in family else np.nan
            assert found_TN[t, n] == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("metric", ["skill", "roc_auc", "r2", "ece"])
def test_results_do_not_depend_on_how_many_draws_are_computed_at_once(kept, metric, monkeypatch):
    whole = resample([kept], [metric], 60)[metric]
    monkeypatch.setattr(intervals, "_ROWS", 7 * 90)
    np.testing.assert_array_equal(resample([kept], [metric], 60)[metric].value_TN, whole.value_TN)


def regression(rng, rows, tasks, shared=0.0):
    """Errors of normal size whose mean square is 1, with a part that all tasks of a row have in common."""
    row_P, task_P = (index.ravel() for index in np.meshgrid(np.arange(rows), np.arange(tasks)))
    error = np.sqrt(shared) * rng.normal(size=rows)[row_P] + np.sqrt(1 - shared) * rng.normal(size=rows * tasks)
    zero = np.zeros(len(row_P))
    none = pa.nulls(len(row_P), pa.list_(pa.float32()))
    family_T, options = np.full(tasks, "regression"), ScoreOptions()
    return Kept(task_P, row_P, zero, error, error**2, 2 + zero, none, family_T, options)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    found = resample([regression(np.random.default_rng(0), 80, 800)], ["mse"], 300)["mse"]
    low_T, high_T = found.interval()
    assert 0.88 <= np.mean((low_T <= 1) & (high_T >= 1)) <= 0.97


def test_the_interval_of_a_mean_over_tasks_knows_that_tasks_share_rows():
    """Where errors of a row go together, the mean over 30 tasks is hardly surer than one task: intervals from rows hold the
    truth, those from tasks do not."""
    hits = {"rows": 0, "tasks": 0}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        found = resample([regression(rng, 60, 30, shared=0.9)], ["mse"], 200)["mse"]
        low, high = interval(found.value_TN.mean(0))
        hits["rows"] += low <= 1 <= high
        of_tasks = found.value_T[rng.integers(30, size=(200, 30))].mean(1)
        low, high = np.quantile(of_tasks, [0.025, 0.975])
        hits["tasks"] += low <= 1 <= high
    assert hits["rows"] >= 33
    assert hits["tasks"] <= 26


def test_several_splits_are_averaged_with_one_drawing_of_rows(kept):
    """The same split twice has the interval of one."""
    one, two = (resample(splits, ["skill"], 50)["skill"] for splits in ([kept], [kept, kept]))
    np.testing.assert_allclose(two.value_TN, one.value_TN)
    half = kept.take(kept.task_P < 6)
    other = resample([kept, half], ["skill"], 50)["skill"]
    np.testing.assert_allclose(other.value_TN, one.value_TN)


def test_a_task_that_most_draws_cannot_score_has_no_interval():
    values_TN = np.array([[1.0, np.nan, np.nan, np.nan], [1.0, 2.0, np.nan, 3.0]])
    low_T, high_T = interval(values_TN)
    assert np.isnan(low_T[0])
    assert np.isnan(high_T[0])
    assert 1 <= low_T[1] < high_T[1] <= 3


def test_tasks_may_be_read_in_any_order_and_some_left_out(run):
    names = run.tasks().names
    whole, some = Kept.load(run, "test", names), Kept.load(run, "test", [names[7], "unknown", names[2]])
    all_T, some_T = (resample([kept], ["skill"], 1)["skill"].value_T for kept in (whole, some))
    assert some_T[0] == pytest.approx(all_T[7])
    assert np.isnan(some_T[1])
    assert some_T[2] == pytest.approx(all_T[2])
    assert Kept.load(run, "valid", names) is None

"""Two runs on the same rows: what is called better, and how sure that is."""

import numpy as np
import pytest
from made import make_run

from mtrain.cli import main
from mtrain.errors import UserError
from mtrain.report.compare import check_same_rows, compare, discoveries
from mtrain.report.intervals import Kept, resample


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run, and one whose errors are smaller."""
    folder = tmp_path_factory.mktemp("pair")
    return make_run(folder / "base", noise=1.0), make_run(folder / "better", noise=0.5)


def test_differences_are_those_of_the_runs_results(pair):
    found = compare(pair, "test", "skill", 50)
    first, second = (run.per_task()["test_skill"].to_numpy() for run in pair)
    np.testing.assert_allclose(found.difference_T, second - first, rtol=1e-4, atol=1e-6)
    assert found.mean[0] == pytest.approx((np.maximum(second, -1) - np.maximum(first, -1)).mean(), rel=1e-4)
    assert found.mean[1] < found.mean[0] < found.mean[2]
    assert found.wins[0] == (second > first).sum() == found.count(better=True)
    assert found.count(better=False) == (second < first).sum()
    assert 0 < found.count(better=True, clear=True) <= found.count(better=True)
    assert found.count(better=False, clear=True) == 0


def test_intervals_come_from_the_same_rows_in_both_runs_and_all_tasks(pair):
    names = pair[0].tasks().names
    drawn = [resample([Kept.load(run, "test", names)], ["skill"], 60)["skill"].value_TN for run in pair]
    low_T, high_T = np.nanquantile(drawn[1] - drawn[0], [0.025, 0.975], axis=1)
    found = compare(pair, "test", "skill", 60)
    np.testing.assert_allclose(found.low_T, low_T)
    np.testing.assert_allclose(found.high_T, high_T)
    drawn = [np.maximum(values_TN, -1) for values_TN in drawn]
    for numbers, of in ((found.mean, np.mean), (found.median, np.median)):
        assert numbers[1:] == pytest.approx(np.quantile(of(drawn[1] - drawn[0], 0), [0.025, 0.975]))
    apart = np.quantile(drawn[1][:, ::-1].mean(0) - drawn[0].mean(0), [0.025, 0.975])
    assert np.ptp(found.mean[1:]) < np.ptp(apart)  # other rows for each run would say less


def test_where_lower_is_better_a_fall_is_a_win(pair):
    found = compare(pair, "test", "deviance", 50)
    assert found.count(better=True) == (found.difference_T < 0).sum() > found.count(better=False)


def test_a_run_does_not_differ_from_itself(pair):
    found = compare((pair[0], pair[0]), "test", "skill", 20)
    assert found.mean == found.median == (0, 0, 0)
    assert not found.clear_T.any()
    assert found.wins[0] == 0


def test_false_discoveries_are_as_few_as_promised():
    """600 tasks of 40 rows, in 60 of which the second run is better; and where it is in none, hardly ever one is clear."""
    rng = np.random.default_rng(0)
    rows_T, false, found, alarms = np.full(600, 40), [], [], 0
    draws_RN = rng.multinomial(40, np.full(40, 1 / 40), size=300).T
    for _ in range(20):
        difference_TR = rng.normal(size=(600, 40))
        alarms += (discoveries(difference_TR.mean(1), difference_TR @ draws_RN / 40, rows_T) <= 0.05).any()
        difference_TR[:60] += 1.0
        clear_T = discoveries(difference_TR.mean(1), difference_TR @ draws_RN / 40, rows_T) <= 0.05
        false.append(clear_T[60:].sum() / max(1, clear_T.sum()))
        found.append(clear_T[:60].mean())
    assert np.mean(false) <= 0.09
    assert np.mean(found) >= 0.8
    assert alarms <= 5


def test_tasks_with_few_rows_or_without_spread_are_not_tested():
    draws_TN = np.random.default_rng(0).normal(1, 0.1, size=(3, 50))
    draws_TN[2] = 1
    q_T = discoveries(np.ones(3), draws_TN, np.array([50, 9, 50]))
    assert q_T[0] < 1e-6
    assert np.isnan(q_T[1:]).all()


def test_runs_with_other_splits_are_refused(pair, tmp_path, capsys):
    other = make_run(tmp_path / "other", split_hash="ffffffffffff")
    with pytest.raises(UserError, match=r"other: its split \(hash ffffffffffff\) is not that of run .*base \(0123456789ab\)"):
        check_same_rows([pair[0], other])
    with pytest.raises(SystemExit) as stop:
        main(["report", str(pair[0].path), str(other.path), "-o", str(tmp_path / "report.html")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("mtrain: run ")
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_tasks_that_only_one_run_has_are_counted(pair, tmp_path):
    names = [*pair[0].tasks().names[:-1], "another"]
    found = compare((pair[0], make_run(tmp_path / "run", names=names)), "test", "skill", 10)
    assert (len(found.names), found.other_tasks) == (11, 2)
    nothing = make_run(tmp_path / "nothing", names=[f"new {t}" for t in range(12)])
    with pytest.raises(UserError, match="no task in common"):
        compare((pair[0], nothing), "test", "skill", 10)


def test_other_labels_and_missing_predictions_are_said(pair, tmp_path):
    with pytest.raises(UserError, match="have other labels of task 'task 0'"):
        compare((pair[0], make_run(tmp_path / "run", seed=5, rows=150)), "test", "skill", 10)
    silent = make_run(tmp_path / "silent")
    (silent.path / "predictions-test.parquet").unlink()
    with pytest.raises(UserError, match=r"silent: kept no predictions of its test part"):
        compare((pair[0], silent), "test", "skill", 10)


def test_runs_that_kept_different_rows_are_compared_on_those_of_both(pair, tmp_path):
    less = make_run(tmp_path / "less", noise=0.5)
    less.save_predictions("test", 300, less.predictions("test"))
    rows = set(less.predictions("test")["row"].to_pylist())
    assert 30 < len(rows) < 150
    assert len(less.predictions("test")) <= 300
    again = make_run(tmp_path / "again", noise=1.0)
    again.save_predictions("test", 300, again.predictions("test"))
    assert set(again.predictions("test")["row"].to_pylist()) == rows
    found, both = (compare((pair[0], less), "test", "skill", 10), compare((again, less), "test", "skill", 10))
    np.testing.assert_allclose(found.difference_T, both.difference_T)

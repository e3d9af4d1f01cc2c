import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, logit, softmax
from small_runs import mtrain, predictions, trained

from mtrain.model.metrics import Scored
from mtrain.ship.calibrate import FOLDS, Calibration, cross_validated, fit, log_loss


def binary(sizes, slope=0.5, intercept=-0.4, seed=0):
    """Labels of tasks whose right log-odds are `slope` times those that the model gives, plus `intercept`."""
    rng = np.random.default_rng(seed)
    task_P = np.repeat(np.arange(len(sizes)), sizes)
    z_P = 3 * rng.normal(size=len(task_P))
    slope_P, intercept_P = (np.broadcast_to(value, len(sizes))[task_P] for value in (slope, intercept))
    y_P = rng.random(len(task_P)) < expit(slope_P * z_P + intercept_P)
    return Scored(task_P, y_P.astype(float), expit(z_P), len(sizes))


def names(scored):
    return [f"task {t}" for t in range(scored.num_tasks)]


def nll(theta, z, y):
    u = np.exp(theta[0]) * z + theta[1]
    return np.sum(np.logaddexp(0, u) - y * u)


def fisher(theta, z):
    x = np.stack([np.exp(theta[0]) * z, np.ones_like(z)], 1)
    p = expit(np.exp(theta[0]) * z + theta[1])
    return (x * (p * (1 - p))[:, None]).T @ x / len(z)


def test_slopes_and_intercepts_minimise_each_tasks_penalised_log_loss():
    strength, scored = 20.0, binary([3, 40, 500, 1], slope=np.array([0.3, 0.5, 2.0, 1.0]))
    found = fit(names(scored), {"binary": scored}, strength)

    def best(z, y, center, prior):
        def objective(theta):
            return nll(theta, z, y) + (theta - center) @ prior @ (theta - center) / 2

        return minimize(objective, center, method="BFGS", options={"gtol": 1e-7}).x

    z_P, y_P = logit(scored.pred), scored.y_P
    ridge = 1e-6 * np.eye(2)
    pool = best(z_P, y_P, np.zeros(2), strength * (fisher(np.zeros(2), z_P) + ridge))
    prior = strength * (fisher(pool, z_P) + ridge)
    for t in range(4):
        theta = best(z_P[scored.task_P == t], y_P[scored.task_P == t], pool, prior)
        assert [np.log(found.slope[t]), found.intercept[t]] == pytest.approx(theta, abs=1e-4)
    assert found.about["pool"]["slope"] == pytest.approx(np.exp(pool[0]), abs=1e-4)


def test_tasks_without_rows_have_the_pooled_parameters_and_large_ones_their_own():
    slope = np.array([0.3, 1.0, 2.0, 1.0])
    scored = binary([20_000, 0, 20_000, 5], slope=slope, intercept=0.2)
    found = fit(names(scored), {"binary": scored}, 100.0)
    pool = found.about["pool"]
    assert found.slope[1] == pytest.approx(pool["slope"])
    assert found.intercept[1] == pytest.approx(pool["intercept"])
    assert found.slope[[0, 2]] == pytest.approx(slope[[0, 2]], rel=0.1)
    assert abs(found.slope[3] - pool["slope"]) < 0.3


def test_separable_labels_keep_finite_positive_slopes():
    z = np.array([-3.0, -2.0, 2.0, 3.0, -1.0, 1.0])
    scored = Scored(np.array([0, 0, 0, 0, 1, 1]), np.array([0.0, 0, 1, 1, 1, 0]), expit(z), 2)
    found = fit(names(scored), {"binary": scored}, 1.0)
    assert np.isfinite(found.slope).all()
    assert (found.slope > 0).all()
    assert np.isfinite(found.intercept).all()


def test_certain_predictions_are_calibrated_too():
    scored = Scored(np.zeros(4, int), np.array([0.0, 1, 1, 0]), np.array([0.0, 1.0, 1.0, 1.0]), 1)
    found = fit(["a"], {"binary": scored}, 10.0)
    assert np.isfinite(found.binary(scored.pred, scored.task_P)).all()


def test_calibration_lowers_the_log_loss_of_new_rows():
    rng = np.random.default_rng(3)
    slope, intercept = np.exp(0.3 * rng.normal(size=60)) * 0.4, 0.3 * rng.normal(size=60)
    sizes = rng.integers(5, 200, 60)
    valid, test = (binary(sizes, slope, intercept, seed=seed) for seed in (4, 5))

    def loss(strength):
        found = fit(names(valid), {"binary": valid}, strength)
        after = Scored(test.task_P, test.y_P, found.binary(test.pred, test.task_P), 60)
        return float(log_loss(after.pooled())[0])

    shrunk, pooled, free = loss(100.0), loss(1e9), loss(1e-3)
    assert shrunk < float(log_loss(test.pooled())[0]) - 0.1
    assert shrunk < pooled
    assert shrunk < free


def test_temperatures_minimise_each_tasks_penalised_log_loss():
    rng = np.random.default_rng(0)
    sizes, classes, strength = [300, 50, 0], [4, 3, 5], 30.0
    task_P = np.repeat(np.arange(3), sizes)
    pred_PK, y_P = np.zeros((350, 5)), np.zeros(350)
    for p, t in enumerate(task_P):
        logits = 4 * rng.normal(size=classes[t])
        pred_PK[p, : classes[t]] = softmax(logits)
        y_P[p] = rng.choice(classes[t], p=softmax(logits * (0.4, 0.8, 1)[t]))
    scored = Scored(task_P, y_P, pred_PK, 3)
    found = fit(names(scored), {"multiclass": scored}, strength)
    logs = [np.log(row[row > 0]) for row in pred_PK]

    def curvature(s):
        spread = []
        for row in logs:
            p = softmax(np.exp(s) * row)
            spread.append(np.exp(2 * s) * (p @ row**2 - (p @ row) ** 2))
        return np.mean(spread) + 1e-6

    def best(rows, center, prior):
        def objective(s):
            losses = [-log_softmax(np.exp(s) * logs[p])[int(y_P[p])] for p in rows]
            return sum(losses) + prior * (s - center) ** 2 / 2

        return minimize_scalar(objective, bounds=(-4, 4), method="bounded", options={"xatol": 1e-8}).x

    pool = best(range(350), 0.0, strength * curvature(0.0))
    for t in range(2):
        s = best(np.flatnonzero(task_P == t), pool, strength * curvature(pool))
        assert -np.log(found.temperature[t]) == pytest.approx(s, abs=1e-5)
    assert found.temperature[2] == pytest.approx(np.exp(-pool))
    after = found.multiclass(pred_PK, task_P)
    np.testing.assert_allclose(after.sum(1), 1)
    assert not after[task_P == 0, 4:].any()
    np.testing.assert_array_equal(after.argmax(1), pred_PK.argmax(1))


def test_a_rows_labels_do_not_calibrate_the_row_itself():
    rng = np.random.default_rng(0)
    task_P, row_P = np.repeat(np.arange(4), 50), np.tile(np.arange(100, 150), 4)
    pred, y_P = rng.random(200), (rng.random(200) < 0.5).astype(float)
    before = cross_validated(Scored(task_P, y_P, pred, 4, row_P), 10.0)
    other = cross_validated(Scored(task_P, np.where(row_P == 120, 1 - y_P, y_P), pred, 4, row_P), 10.0)
    same_P = before.pred == other.pred
    assert same_P[row_P == 120].all()
    assert np.unique(row_P[same_P]).size == 50 // FOLDS
    apart = ~np.isin(row_P, row_P[same_P])
    rest = Scored(task_P[apart], y_P[apart], pred[apart], 4)
    expected = fit(names(before), {"binary": rest}, 10.0).binary(pred[same_P], task_P[same_P])
    np.testing.assert_allclose(before.pred[same_P], expected)


def test_fewer_rows_than_folds_are_left_as_they_are_or_calibrated_by_the_others():
    one = Scored(np.zeros(2, int), np.array([0.0, 1]), np.array([0.3, 0.9]), 1, np.array([7, 7]))
    np.testing.assert_allclose(cross_validated(one, 10.0).pred, one.pred)
    none = Scored(np.zeros(2, int), np.array([0.0, 1]), np.array([np.nan, 0.9]), 1, np.array([7, 8]))
    assert not len(cross_validated(none, 10.0).pred)


def predicted(run, sharpness):
    """Give a run predictions of a validation part: log-odds and logits of each family so many times the right ones."""
    rng = np.random.default_rng(2)
    tables = []
    for task, classes in (("sick", 2), ("risk", 2), ("grade", 3)):
        logits = rng.normal(size=(400, classes))
        right = softmax(logits, axis=1)
        given = softmax(sharpness["binary" if classes == 2 else "multiclass"] * logits, axis=1)
        label = (rng.random((400, 1)) > right[:, :-1].cumsum(1)).sum(1)
        lists = pa.array([None] * 400 if classes == 2 else given.tolist(), pa.list_(pa.float64()))
        columns = {"row": np.arange(400), "task": [task] * 400, "label": label, "prediction": given[:, 1]}
        tables.append(pa.table(columns | {"probabilities": lists}))
    pq.write_table(pa.concat_tables(tables), run / "predictions-valid.parquet")


def test_calibration_is_kept_for_the_families_that_it_helps_on_rows_it_has_not_seen(folder, tmp_path, capsys):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    predicted(run, {"binary": 3.0, "multiclass": 1.0})
    assert mtrain("calibrate", run) == 0
    out = capsys.readouterr().out
    assert "not kept for multiclass tasks: the cross-validated log loss" in out
    assert "kept for binary tasks in" in out
    for words in ("valid, by 5 folds: log loss", "test: log loss"):
        assert out.count(words) == 2  # once for each family
    found = json.loads((run / "calibration.json").read_text())
    assert set(found["temperature"]) == {1.0}
    assert found["slope"][found["task"].index("sick")] < 0.6
    assert found["cross_validated"].keys() == found["test"].keys() == {"binary"}
    before, after = (found["cross_validated"]["binary"][f"log_loss_{when}"] for when in ("before", "after"))
    assert after[-1] < before[-1] - 0.1

    predicted(run, {"binary": 1.0, "multiclass": 1.0})
    assert mtrain("calibrate", run) == 0
    out = capsys.readouterr().out
    assert "not kept for binary and multiclass tasks" in out
    assert "use the model's own probabilities; the calibration that it had is removed" in out
    assert not (run / "calibration.json").exists()
    assert mtrain("calibrate", run) == 0
    assert "removed" not in capsys.readouterr().out
    assert mtrain("calibrate", run, "--force") == 0
    assert "kept for binary and multiclass tasks in" in capsys.readouterr().out
    assert set(json.loads((run / "calibration.json").read_text())["temperature"]) != {1.0}


def test_log_loss_is_that_of_its_definition():
    scored = Scored(np.array([0, 0, 1]), np.array([1.0, 0, 1]), np.array([0.8, 0.3, 0.25]), 3)
    expected = [-(np.log(0.8) + np.log(0.7)) / 2, -np.log(0.25)]
    with np.errstate(invalid="ignore"):
        assert log_loss(scored)[:2] == pytest.approx(expected)


def test_a_calibrated_run_predicts_with_it_unless_told_not_to(folder, capsys):
    run = trained(folder, "calibrated")
    before = predictions(folder, run, folder / "new.parquet")
    capsys.readouterr()
    assert mtrain("calibrate", run, "--strength", "20", "--force") == 0
    out = capsys.readouterr().out
    assert "2 binary tasks" in out
    assert "calibration error" in out
    found = json.loads((run / "calibration.json").read_text())
    assert found["strength"] == 20
    after = predictions(folder, run, folder / "new.parquet")
    calibration = Calibration(found["task"], *(np.array(found[name]) for name in ("slope", "intercept", "temperature")))
    for name in ("sick", "risk"):
        t = found["task"].index(name)
        expected = expit(found["slope"][t] * logit(before[name].to_numpy()) + found["intercept"][t])
        np.testing.assert_allclose(after[name].to_numpy(), expected, rtol=1e-6)
        assert not np.allclose(after[name].to_numpy(), before[name].to_numpy(), atol=1e-4)
    p_NK = np.stack([before[f"grade={name}"].to_numpy() for name in ("high", "low", "mid")], 1)
    expected = calibration.multiclass(p_NK, np.full(len(p_NK), found["task"].index("grade")))
    np.testing.assert_allclose(after["grade=low"].to_numpy(), expected[:, 1], rtol=1e-6)
    assert after["grade"].equals(before["grade"])
    assert after["height"].equals(before["height"])
    assert predictions(folder, run, folder / "new.parquet", "--no-calibration").equals(before)


@pytest.mark.slow
def test_what_cannot_be_calibrated_is_said(folder, capsys):
    run = trained(folder, "numbers", "--tasks.labels", "[height]", "--tasks.by_name", "{}", "--train.epochs", "1")
    silent = trained(folder, "silent", "--select.predictions", "0", "--train.epochs", "1")
    for words, expected in (
        ([run], "no binary or multiclass tasks"),
        ([silent], "keeps no predictions"),
        ([folder / "run", "--strength", "0"], "--strength 0"),
        ([folder / "run", "--strength", "nan"], "--strength nan: expected a number of rows"),
        ([folder], "holds no config.yaml"),
    ):
        capsys.readouterr()
        assert mtrain("calibrate", *words) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_a_calibration_of_an_earlier_model_is_refused(folder, capsys):
    run = trained(folder, "stale", "--train.epochs", "1")
    assert mtrain("calibrate", run, "--force") == 0
    trained(folder, "stale", "--train.epochs", "3")
    capsys.readouterr()
    assert mtrain("predict", run, folder / "new.parquet", "-o", folder / "no.csv") == 2
    assert "run mtrain calibrate again" in capsys.readouterr().err
    assert mtrain("calibrate", run, "--force") == 0
    predictions(folder, run, folder / "new.parquet")

"""Scores against naive computations on the same rows."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import D, draw_labels, label_loss, make_bank, make_tasks
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error, roc_auc_score
from torch import nn

from mtrain.data.batch import Pairs
from mtrain.data.inputs import MemoryInputs
from mtrain.data.loader import Part
from mtrain.errors import UserError
from mtrain.model.kinds import Binary, Multiclass, Poisson, Quantile
from mtrain.parallel.shard import Shard
from mtrain.parallel.world import World
from mtrain.train import evaluate
from mtrain.train.evaluate import Evaluator, check_metric, flatten
from mtrain.train.objective import Objective


@pytest.fixture(params=[7, 2048], ids=["small batches", "one batch"])
def problem(request, monkeypatch):
    monkeypatch.setattr(evaluate, "EVAL_ROWS", request.param)
    rng = np.random.default_rng(0)
    tasks = make_tasks(rng)
    row, task = (a.ravel() for a in np.indices((60, len(tasks))))
    keep = (rng.random(len(row)) > 0.4) & (task != 9)
    row, task = row[keep], task[keep]
    y = draw_labels(rng, tasks, task)
    standard = (y - tasks.stats["center"][task]) / tasks.stats["scale"][task]
    weight = torch.rand(60)[row]  # a metric does not look at sample weights
    part = part_of(row, task, y, standard, weight, len(tasks))
    x = torch.randn(60, D)
    bank = make_bank(tasks, (4,))
    objective, shard = Objective(tasks, bank, torch.device("cpu")), Shard.replicated(World(), tasks.names)
    evaluator = Evaluator(tasks, nn.Identity(), bank, objective, shard, False, 1, torch.device("cpu"))
    return tasks, evaluator, x, part, (row, task, y, standard)


def part_of(row, task, y, standard, weight, num_tasks):
    """A part of 60 rows, its labels as pairs."""
    row, task = map(torch.from_numpy, (row, task))
    labels, original = (
        Pairs.of(row, task, torch.from_numpy(values).to(dtype), weight, 60, num_tasks)
        for values, dtype in ((standard, torch.float32), (y, torch.float64))
    )
    return Part(torch.arange(60), labels, original)


@pytest.mark.parametrize("as_pairs", [False, True], ids=["grid", "pairs"])
def test_kept_predictions_are_those_that_were_scored(problem, as_pairs):
    tasks, evaluator, x, part, entries = problem
    tables = []
    scores = evaluator.score(MemoryInputs(x), part if as_pairs else as_grid(part), keep=tables.append)
    (kept,) = tables
    found = {(row["task"], row["row"]): row for row in kept.to_pylist()}
    assert len(found) == len(kept) == len(entries[0])
    assert list(found) == sorted(found, key=lambda cell: (tasks.names.index(cell[0]), cell[1]))
    modules = evaluator.bank.to_modules().double()
    for row, t, y, _ in zip(*entries, strict=True):
        task, one = tasks[t], found[tasks[t].name, row]
        stats, logits = {k: v[t] for k, v in tasks.stats.items()}, modules[task.name](x[row].double()).detach()
        expected = naive_predictions(task, stats, logits)
        assert one["label"] == pytest.approx(y, rel=1e-6)
        if isinstance(task.kind, Multiclass):
            assert one["probabilities"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert expected[int(one["prediction"])] == pytest.approx(max(expected), rel=1e-4)
        else:
            assert one["probabilities"] is None
            assert one["prediction"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    sums = kept.to_pandas().groupby("task", observed=True)[["deviance", "constant"]].sum()
    for t, task in enumerate(tasks):
        if task.name in sums.index:
            deviance, constant = sums.loc[task.name]
            assert 1 - deviance / constant == pytest.approx(scores.per_task["skill"][t], rel=1e-4, abs=1e-5)


def as_grid(part):
    return Part(part.row_R, part.labels.grid(), part.original.grid())


def naive_predictions(task, stats, logits):
    kind = task.kind
    if isinstance(kind, Binary):
        weight = stats["pos_weight"] if kind.param_names else 1.0
        return 1 / (1 + math.exp(-(float(logits[0]) - math.log(weight))))
    if isinstance(kind, Multiclass):
        return logits.softmax(0).tolist()
    if isinstance(kind, Poisson):
        return math.exp(logits[0])
    level = 1 if isinstance(kind, Quantile) else 0
    return float(logits[level]) * stats["scale"] + stats["center"]


def plain_kind(kind):
    """The kind whose loss is this one's deviance; the positive weight is undone at the logit."""
    return replace(kind, **({"label_smoothing": 0.0} if isinstance(kind, Multiclass) else {}))


def naive(tasks, bank, x, entries):
    """Per task: labels, predictions, and deviances of model and constant, label by label in float64."""
    modules = bank.to_modules().double()
    found = {}
    for row, t, y, standard in zip(*entries, strict=True):
        task = tasks[t]
        stats = {name: values[t] for name, values in tasks.stats.items()}
        logits = modules[task.name](x[row].double()).detach()
        shift = math.log(stats["pos_weight"]) if "pos_weight" in task.kind.param_names else 0.0
        constant = torch.from_numpy(stats["constant"])
        deviances = [
            float(label_loss(plain_kind(task.kind), v - shift, float(np.float32(standard)), 1.0)) for v in (logits, constant)
        ]
        own = found.setdefault(int(t), ([], [], [], []))
        for values, value in zip(own, (y, naive_predictions(task, stats, logits), *deviances), strict=True):
            values.append(value)
    return found


@pytest.mark.parametrize("layout", ["grid", "pairs"])
def test_skill_deviance_and_metrics_equal_a_loop_over_the_scored_rows(problem, layout):
    tasks, evaluator, x, part, entries = problem
    if layout == "grid":
        part = as_grid(part)
    scores = evaluator.score(MemoryInputs(x), part)
    expected = naive(tasks, evaluator.bank, x, entries)
    for t, task in enumerate(tasks):
        if t not in expected:
            assert all(math.isnan(values[t]) for values in scores.per_task.values())
            continue
        y, pred, model, constant = (np.array(values) for values in expected[t])
        close = {"rel": 1e-4, "abs": 1e-6}
        assert scores.label_count_T[t] == len(y)
        assert scores.per_task["skill"][t] == pytest.approx(1 - model.sum() / constant.sum(), **close)
        assert scores.per_task["deviance"][t] == pytest.approx(model.mean(), **close)
        if task.kind.family == "binary":
            assert scores.per_task["roc_auc"][t] == pytest.approx(roc_auc_score(y, pred), **close)
            assert scores.per_task["f1"][t] == pytest.approx(f1_score(y, pred > 0.5), **close)
            assert scores.per_task["accuracy"][t] == pytest.approx(accuracy_score(y, pred > 0.5), **close)
        elif task.kind.family == "multiclass":
            assert scores.per_task["accuracy"][t] == pytest.approx(accuracy_score(y, pred.argmax(1)), **close)
        else:
            assert scores.per_task["mse"][t] == pytest.approx(mean_squared_error(y, pred), **close)
    skill_T = np.array([1 - sum(m) / sum(c) for *_, m, c in expected.values()])
    assert scores.summary["skill"]["mean"] == pytest.approx(np.maximum(skill_T, -1).mean(), abs=1e-4)
    assert scores.summary["skill"]["median"] == pytest.approx(np.median(skill_T), abs=1e-4)
    assert scores.summary["skill"]["scored"] == len(tasks) - 1
    typical = tasks.stats["typical_loss"]
    model, constant = (sum(sum(e[i]) / typical[t] for t, e in expected.items()) for i in (2, 3))
    assert scores.summary["skill"]["pooled"] == pytest.approx(1 - model / constant, abs=1e-4)


def test_grid_and_pairs_of_the_same_labels_score_the_same(problem):
    _, evaluator, x, part, _ = problem
    pairs = evaluator.score(MemoryInputs(x), part, choose_threshold=True)
    grid = evaluator.score(MemoryInputs(x), as_grid(part), choose_threshold=True)
    for name, values in pairs.per_task.items():
        np.testing.assert_allclose(grid.per_task[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    for name, values in pairs.summary.items():
        for key, value in values.items():
            same = value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
            assert grid.summary[name][key] == same, (name, key)


def test_thresholds_are_chosen_on_one_part_and_applied_to_another(problem):
    tasks, evaluator, x, part, _ = problem
    chosen = evaluator.score(MemoryInputs(x), part, choose_threshold=True)
    assert chosen.threshold_T is not None
    plain = evaluator.score(MemoryInputs(x), part)
    again = evaluator.score(MemoryInputs(x), part, threshold_T=chosen.threshold_T)
    binary = [t for t, task in enumerate(tasks) if task.kind.family == "binary"]
    np.testing.assert_allclose(again.per_task["f1"][binary], chosen.per_task["f1"][binary])
    assert (again.per_task["f1"][binary] >= plain.per_task["f1"][binary] - 1e-9).all()
    assert (again.per_task["f1"][binary] > plain.per_task["f1"][binary] + 0.01).any()


def test_only_the_asked_metrics_are_computed_with_the_same_values(problem):
    _, evaluator, x, part, _ = problem
    every, one = evaluator.score(MemoryInputs(x), part), evaluator.score(MemoryInputs(x), part, only={"roc_auc"})
    assert set(one.summary) == {"skill", "deviance", "roc_auc"}
    assert one.value("roc_auc", "mean") == every.value("roc_auc", "mean")
    assert math.isnan(one.value("mse", "mean"))


def test_a_task_that_a_constant_predicts_perfectly_has_no_skill(problem):
    tasks, evaluator, x, _, (row, task, y, _) = problem
    for t in (0, 5, 1):
        y[task == t] = {0: 0.1, 5: 0.0, 1: 1.0}[t]
        evaluator.constant_TO[t, 0] = {0: (0.1 - tasks.stats["center"][0]) / tasks.stats["scale"][0] + 1e-8, 5: -30.0, 1: 30.0}[
            t
        ]
    standard = (y - tasks.stats["center"][task]) / tasks.stats["scale"][task]
    scores = evaluator.score(MemoryInputs(x), part_of(row, task, y, standard, None, len(tasks)))
    assert np.isnan(scores.per_task["skill"][[0, 1, 5]]).all()
    assert np.isfinite(scores.per_task["deviance"][[0, 1, 5]]).all()


def test_scoring_leaves_the_training_mode_as_it_was(problem):
    _, evaluator, x, part, _ = problem
    evaluator.bank.train()
    evaluator.model.eval()
    evaluator.score(MemoryInputs(x), part)
    assert evaluator.bank.training
    assert not evaluator.model.training


def test_predictions_of_all_tasks_equal_a_loop(problem):
    tasks, evaluator, x, _, _ = problem
    modules = evaluator.bank.to_modules().double()
    seen = set()
    for _, task_A, value_NAO in evaluator.predict(evaluator.model(x)):
        for a, t in enumerate(task_A.tolist()):
            seen.add(t)
            stats = {name: values[t] for name, values in tasks.stats.items()}
            kind = tasks[t].kind
            for row in (0, 41):
                logits = modules[tasks[t].name](x[row].double()).detach()
                value = value_NAO[row, a].detach()
                if isinstance(kind, Multiclass):
                    expected = naive_predictions(tasks[t], stats, logits)
                    assert value[: len(expected)].tolist() == pytest.approx(expected, rel=1e-4)
                    assert not value[len(expected) :].any()
                else:
                    assert float(kind.point(value)) == pytest.approx(
                        naive_predictions(tasks[t], stats, logits), rel=1e-4, abs=1e-5
                    )
    assert seen == set(range(len(tasks)))


def test_an_unknown_metric_is_refused_with_the_nearest_one(problem):
    tasks, *_ = problem
    check_metric("roc_auc", tasks)
    with pytest.raises(UserError, match="did you mean 'roc_auc'"):
        check_metric("rocauc", tasks)


def test_flattened_names_leave_out_what_has_no_value():
    assert flatten({"skill": {"mean": 0.5, "median": None}}, "valid") == {"valid/skill/mean": 0.5}

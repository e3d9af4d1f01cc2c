from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge

from mtrain.baseline import linear
from mtrain.baseline import rows as rows_module
from mtrain.baseline.lbfgs import minimize
from mtrain.baseline.problem import Problem
from mtrain.baseline.rows import TaskRows, count
from mtrain.baseline.single import Chunk, Network, fit_single
from mtrain.cli import main
from mtrain.config import check_config
from mtrain.data.features import Numeric
from mtrain.data.prepare import prepare, read_source
from mtrain.model.head_options import head_forms
from mtrain.report import progress
from mtrain.report.compare import compare
from mtrain.train.evaluate import scores_of
from mtrain.train.run_dir import RunDir

TRAIN = {"epochs": 3, "global_batch": 32, "lr": 0.01, "decay": "cosine", "warmup": 0.1, "clip": 0.5, "head_clip": 1.0}


def mtrain(*words):
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return done.value.code


def grid_table(rows=160, seed=0):
    """Tasks of each kind, of a row's inputs; a third of the labels is missing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4))
    y = {f"r{t}": x @ rng.normal(size=4) + 0.3 * rng.normal(size=rows) + 5 for t in range(3)}
    y |= {f"b{t}": (x @ rng.normal(size=4) + rng.logistic(size=rows) > 0).astype(float) for t in range(2)}
    y["count"] = rng.poisson(np.exp(0.5 * x[:, 0])).astype(float)
    y["grade"] = np.array(["a", "b", "c"])[np.digitize(x[:, 1], [-0.5, 0.5])].astype(object)
    for values in y.values():
        values[rng.random(rows) < 1 / 3] = None if values.dtype == object else np.nan
    return pa.table({f"x{i}": x[:, i] for i in range(4)} | {n: pa.array(v, from_pandas=True) for n, v in y.items()})


def routed_table(rows=240, seed=0, tasks=4):
    """Tasks of unequal size whose rows share weights but for an offset."""
    rng = np.random.default_rng(seed)
    task = rng.choice(tasks, rows, p=np.arange(1, tasks + 1) / sum(range(tasks + 1)))
    x = rng.normal(size=(rows, 3)) + task[:, None]
    y = x @ np.array([1.0, -2.0, 0.5]) + 3.0 * task + 0.1 * rng.normal(size=rows)
    return pa.table({f"x{i}": x[:, i] for i in range(3)} | {"task": [f"t{t}" for t in task], "y": y})


def tree(layout, **changes):
    found = {
        "data": {"path": "table.parquet", "layout": layout, "workers": 1},
        "inputs": {"x*": "Numeric"},
        "tasks": {"labels": ["r*", "b*", "count", "grade"], "by_name": {"count": {"kind": "poisson"}}},
        "model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [8], "dropout": 0.2}}, "head": {"hidden": [6]}},
        "train": TRAIN,
    }
    if layout == "routed":
        found["data"] |= {"task": "task", "label": "y"}
        found["tasks"] = {"kind": "regression"}
    return found | changes


def problem_of(folder, layout="grid", table=None, **changes):
    pq.write_table(table or (grid_table() if layout == "grid" else routed_table()), folder / "table.parquet")
    config = check_config(tree(layout, **changes), "test")
    return Problem.of(config, prepare(read_source(config, folder), 0))


def of_task(problem, part, t):
    """Inputs and labels of a task, by a look at every label."""
    pairs = problem.parts[part].labels.pairs()
    own = pairs.task_P == t
    row = problem.parts[part].row_R[pairs.row_P[own]]
    return problem.x_NF[row].double().numpy(), pairs.y_P[own].double().numpy()


@pytest.mark.parametrize("layout", ["grid", "routed"])
@pytest.mark.parametrize("penalty", [0.1, 30.0])
def test_ridge_of_each_task_is_that_of_scikit_learn(tmp_path, layout, penalty):
    problem = problem_of(tmp_path, layout)
    own = np.array([2, 0, 1])
    solve = linear._solver(problem, "train", problem.tasks[0].kind, own, shared=False)
    weight, bias = solve(torch.full((3,), penalty, dtype=torch.float64))
    for a, t in enumerate(own):
        x, y = of_task(problem, "train", t)
        expected = Ridge(penalty).fit(x, y)
        np.testing.assert_allclose(weight[a, 0], expected.coef_, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(bias[a, 0], expected.intercept_, rtol=1e-6, atol=1e-9)


def test_ridge_with_more_features_than_rows_and_with_weights():
    rng = np.random.default_rng(0)
    x, y, weight = rng.normal(size=(2, 9, 20)), rng.normal(size=(2, 9)), rng.random((2, 9))
    weight[1, 6:] = 0
    solve = linear.ridge(*map(torch.from_numpy, (x, y, weight)))
    found, bias = solve(torch.tensor([0.5, 3.0], dtype=torch.float64))
    for a, penalty in enumerate([0.5, 3.0]):
        expected = Ridge(penalty).fit(x[a], y[a], weight[a])
        np.testing.assert_allclose(found[a, 0], expected.coef_, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(bias[a, 0], expected.intercept_, rtol=1e-6)


@pytest.mark.parametrize("dense", [0.0, 2.0])  # all rows of the part with labels missing; each task's own rows
def test_logistic_softmax_and_poisson_regression_are_those_of_scikit_learn(tmp_path, dense, monkeypatch):
    monkeypatch.setattr(linear, "DENSE", dense)
    problem = problem_of(tmp_path)
    for name in ("b0", "b1", "grade", "count"):
        t = problem.tasks.names.index(name)
        solve = linear._solver(problem, "train", problem.tasks[t].kind, np.array([t]), shared=False)
        x, y = of_task(problem, "train", t)
        for penalty in (10.0, 0.5):
            weight, bias = solve(torch.tensor([penalty], dtype=torch.float64))
            if name == "count":  # its loss is twice the likelihood's; scikit-learn takes the mean
                expected = PoissonRegressor(alpha=penalty / 2 / len(y), tol=1e-10, max_iter=1000).fit(x, y)
            else:
                expected = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=5000).fit(x, y)
            np.testing.assert_allclose(weight[0].squeeze(0), expected.coef_.squeeze(), atol=2e-4)
            if name != "grade":  # a constant in all biases of softmax changes nothing
                np.testing.assert_allclose(bias[0, 0], expected.intercept_, atol=2e-4)


def test_pooled_ridge_is_one_regression_with_an_indicator_of_each_task(tmp_path):
    problem = problem_of(tmp_path, "routed", objective={"targets": {"center": "pooled", "scale": "pooled"}})
    own = np.arange(4)
    weight, bias = linear._solver(problem, "train", problem.tasks[0].kind, own, shared=True)(
        torch.full((4,), 7.0, dtype=torch.float64)
    )
    rows = problem.rows["train"]
    x, task = problem.x_NF[rows.row_P].double().numpy(), np.eye(4)[rows.task_P]
    left = np.hstack([x, task])
    penalties = np.diag([7.0] * x.shape[1] + [0.0] * 4)
    expected = np.linalg.solve(left.T @ left + penalties, left.T @ rows.y_P.double().numpy())
    np.testing.assert_allclose(np.concatenate([weight[0, 0], bias[:, 0]]), expected, rtol=1e-6, atol=1e-8)


def test_pooled_losses_end_where_the_gradient_is_0(tmp_path):
    table = routed_table()
    y = (np.asarray(table["y"]) > np.median(table["y"])).astype(float)
    table = table.set_column(table.column_names.index("y"), "y", pa.array(y))
    problem = problem_of(tmp_path, "routed", table, tasks={"kind": "binary"})
    solver = linear._solver(problem, "train", problem.tasks[0].kind, np.arange(4), shared=True)
    weight, bias = solver(torch.full((4,), 2.0, dtype=torch.float64))
    rows = problem.rows["train"]
    x = problem.x_NF[rows.row_P].double()
    error_P = (x @ weight[0, 0] + bias[rows.task_P, 0]).sigmoid() - rows.y_P.double()
    np.testing.assert_allclose(error_P @ x + 2.0 * weight[0, 0], 0, atol=1e-3)
    np.testing.assert_allclose(np.bincount(rows.task_P, error_P, 4), 0, atol=1e-3)


def test_each_minimum_is_found_as_if_it_were_alone():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 6, 6, generator=generator, dtype=torch.float64)
    bowl, middle = root @ root.mT + torch.eye(6), torch.randn(5, 6, generator=generator, dtype=torch.float64)

    def value(own):
        return lambda at: torch.einsum("ad,ade,ae->a", at - middle[own], bowl[own], at - middle[own])

    every = minimize(value(slice(None)), torch.zeros(5, 6, dtype=torch.float64))
    torch.testing.assert_close(every, middle, atol=1e-5, rtol=1e-5)
    alone = minimize(value(slice(2, 3)), torch.zeros(1, 6, dtype=torch.float64))
    torch.testing.assert_close(every[2:3], alone, atol=1e-12, rtol=1e-9)


def test_labels_of_tasks_and_their_scores(tmp_path):
    problem = problem_of(tmp_path)
    rows = TaskRows.of(problem.parts["valid"])
    some = rows.take(np.array([4, 1]))
    for a, t in enumerate((4, 1)):
        x, y = of_task(problem, "valid", t)
        own = some.task_P == a
        np.testing.assert_array_equal(some.y_P[own], y.astype(np.float32))
        np.testing.assert_array_equal(problem.x_NF[some.row_P[own]].double(), x)
    at_AR, present_AR = some.padded()
    np.testing.assert_array_equal(at_AR[present_AR], np.arange(len(some.y_P)))
    constant = linear.constant_logits(problem.tasks)[rows.task_P]
    scores = scores_of([count(problem.tasks, rows, constant)], problem.tasks, 1)
    np.testing.assert_allclose(scores.per_task["skill"], 0, atol=1e-9)


@pytest.mark.parametrize("layout", ["grid", "routed"])
def test_stacked_networks_are_what_training_each_alone_gives(tmp_path, layout):
    trunk = {"class_path": "MLP", "init_args": {"widths": [8], "dropout": 0.3, "norm": "layer", "skip": True}}
    problem = problem_of(tmp_path, layout, model={"trunk": trunk, "head": {"hidden": [6], "dropout": 0.2}})
    own, kind = np.array([0, 1, 2]), problem.tasks[0].kind
    forms = head_forms(problem.tasks.names, problem.config)

    def trained(tasks):
        chunk = Chunk(problem, kind, tasks, [forms[t] for t in tasks])
        steps = chunk.train(problem.rows["train"].take(tasks), problem.rows["valid"].take(tasks), None)
        return steps, chunk.logits(problem.rows["test"].take(tasks))

    steps, together = trained(own)
    alone = [trained(own[t : t + 1]) for t in own]
    assert steps.tolist() == [int(one[0][0]) for one in alone]
    torch.testing.assert_close(together, torch.cat([one[1] for one in alone]), atol=1e-5, rtol=1e-5)


def test_a_step_of_a_network_is_that_of_a_module_with_adamw(tmp_path):
    model = {"trunk": {"class_path": "MLP", "init_args": {"widths": [8]}}, "head": {"hidden": [6]}}
    train = {"steps": 1, "global_batch": 1000, "lr": 0.01, "weight_decay": 0.1, "head_lr": 0.02, "clip": 0.01}
    problem = problem_of(tmp_path, model=model, train=train)
    form = head_forms(problem.tasks.names, problem.config)[0]
    chunk = Chunk(problem, problem.tasks[0].kind, np.array([0, 1]), [form, form])
    chunk.train(problem.rows["train"].take(np.array([0, 1])), None, None)
    found = chunk.logits(problem.rows["test"].take(np.array([0, 1])))
    for t in (0, 1):
        network = Network(problem.config, 4, problem.tasks.names[t], form, 1)
        head = [*network.hidden.parameters(), *network.head.parameters()]
        optimizer = torch.optim.AdamW(
            [{"params": list(network.shared.parameters())}, {"params": head, "lr": 0.02}], lr=0.01, weight_decay=0.1
        )
        x, y = (torch.from_numpy(values).float() for values in of_task(problem, "train", t))
        (network(x)[:, 0] - y).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.shared.parameters(), 0.01)
        optimizer.step()
        expected = network(torch.from_numpy(of_task(problem, "test", t)[0]).float())
        own = problem.rows["test"].take(np.array([0, 1])).task_P == t
        torch.testing.assert_close(found[own], expected.detach(), atol=1e-5, rtol=1e-4)


def test_networks_go_to_their_best_step_and_a_refit_to_the_same(tmp_path):
    problem = problem_of(tmp_path, "routed", split={"refit": True}, train=TRAIN | {"epochs": 8})
    fitted = fit_single(problem, Console(quiet=True))
    steps = fitted.columns["best_step"]
    per_epoch = -(-problem.parts["train"].num_rows // 32)
    assert (steps % per_epoch == 0).all()
    assert (steps > 0).all()
    scores = [
        scores_of([count(problem.tasks, problem.rows[part], fitted.logits[part])], problem.tasks, 1).per_task["skill"]
        for part in ("valid", "test")
    ]
    assert np.nanmedian(scores[0]) > 0.1
    assert np.nanmedian(scores[1]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["grid", "routed"])
def test_the_command_writes_runs_that_a_report_compares(tmp_path, layout, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pq.write_table(grid_table() if layout == "grid" else routed_table(), "table.parquet")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree(layout)))
    assert mtrain("baseline", "c.yaml", "--run_dir", "run") == 0  # before the run is there
    assert mtrain("train", "c.yaml", "--run_dir", "run") == 0
    capsys.readouterr()
    assert mtrain("baseline", "c.yaml", "--run_dir", "run") == 0
    out = capsys.readouterr().out
    assert "run better (skill)" in out
    scores = pq.read_table("run/baseline.parquet").to_pandas()
    for name in ("run", "constant", "pooled", "linear", "single"):
        assert np.isfinite(scores[f"{name}_test_skill"]).sum() >= len(scores) - 1
    assert np.nanmedian(scores["linear_test_skill"]) > 0.2
    if layout == "routed":  # rows share weights: one model with a bias for each task is nearly exact
        assert scores["pooled_test_skill"].min() > 0.9
    found = compare((RunDir(tmp_path / "run"), RunDir(tmp_path / "run" / "baseline-single")), "test", "skill", 20)
    np.testing.assert_allclose(found.second_T, scores["single_test_skill"], atol=1e-5)
    assert mtrain("report", "run", "run/baseline-single", "run/baseline-linear", "--resamples", "10") == 0


def test_seeds_of_a_split_are_averaged_and_a_trunk_that_cannot_be_stacked_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pq.write_table(routed_table(), "table.parquet")
    found = tree("routed", split={"seeds": [0, 1]}, model={"trunk": {"class_path": "Conv", "init_args": {}}})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(found))
    assert mtrain("baseline", "c.yaml", "-o", "out") == 0
    assert capsys.readouterr().out.count("trunk Conv is not stacked by task") == 1
    each = [pq.read_table(f"out/baseline-pooled/split-{seed}/per_task.parquet")["test_skill"].to_numpy() for seed in (0, 1)]
    mean = pq.read_table("out/baseline.parquet")["pooled_test_skill"].to_numpy()
    np.testing.assert_allclose(mean, np.mean(each, 0))


class Codes(Numeric):
    packed = "codes"


def test_linear_models_are_not_fitted_on_inputs_that_are_no_quantities(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pq.write_table(routed_table(), "table.parquet")
    found = tree("routed")
    found["inputs"] = dict.fromkeys(found["inputs"], f"{__name__}.Codes")
    found["model"] = {"trunk": {"class_path": "Conv", "init_args": {}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(found))
    assert mtrain("baseline", "c.yaml", "-o", "out") == 0
    assert "pooled, linear: no linear models: inputs are codes, which are no quantities" in capsys.readouterr().out
    assert [path.name for path in sorted(Path("out").glob("baseline-*"))] == ["baseline-constant"]


def test_what_is_fitted_is_said_and_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    problem = problem_of(tmp_path, "routed", train=TRAIN | {"epochs": 2}, split={"refit": True})
    steps = 2 * -(-problem.parts["train"].num_rows // 32)
    told = StringIO()
    console = Console(file=told, width=200)
    linear.fit_linear(problem, console, pooled=False)
    lines = told.getvalue().splitlines()
    assert lines[0] == "linear: 4 tasks, all at once, 11 penalties to choose from"
    assert [line.split("  ")[0] for line in lines[1:]] == [f"linear: fit {n} of 13" for n in range(1, 14)]
    told.truncate(0)
    monkeypatch.setattr(rows_module, "BUDGET", 1.0)
    fit_single(problem, console)
    first, *lines = told.getvalue().lstrip("\0").splitlines()
    assert first == f"single: 4 networks, in 4 chunks, each for at most 2 epochs ({steps} steps), then again on train + valid"
    assert lines[0].startswith(f"single: step 1 of at most {8 * steps}  chunk 1 of 4, 1 networks  ")
    done = [int(line.split()[2]) for line in lines]
    assert done == sorted(done)
    assert done[-1] <= 8 * steps
    assert steps in done
    assert 7 * steps - 1 in done  # the last chunk's first training


@pytest.fixture
def fitted(tmp_path, monkeypatch):
    """The config of a run that has baselines and is not trained, in the working directory."""
    monkeypatch.chdir(tmp_path)
    pq.write_table(routed_table(), "table.parquet")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree("routed", model={"trunk": {"class_path": "Conv"}})))
    assert mtrain("baseline", "c.yaml", "--run_dir", "run") == 0


def test_a_baseline_is_refused_where_a_model_is_needed(fitted, tmp_path, capsys):
    for words in (
        ("predict", "run", "run/baseline-linear", "table.parquet", "-o", "out.csv"),
        ("eval", "run/baseline-linear"),
        ("calibrate", "run/baseline-linear"),
        ("export", "run/baseline-linear", "-o", "out"),
        ("consolidate", "run/baseline-linear", "-o", "out.safetensors"),
    ):
        capsys.readouterr()
        assert mtrain(*words) == 2
        assert capsys.readouterr().err.startswith("mtrain: run run/baseline-linear: is a baseline, which keeps no model")
    (tmp_path / "run" / "baseline-linear" / "checkpoints" / "step-00000001").mkdir(parents=True)
    RunDir(tmp_path / "run" / "baseline-linear").refuse_baseline()  # a trained run that lost a file: said where it is read


def test_what_is_wrong_is_said_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pq.write_table(grid_table(), "table.parquet")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree("grid")))
    assert mtrain("baseline", "c.yaml", "--select.metric", "roc_acu") == 2
    assert "select.metric: 'roc_acu' is not a metric of these tasks" in capsys.readouterr().err
    assert mtrain("baseline", "c.yaml", "--split.parts", "{train: 1.0}") == 2
    assert "neither a valid nor a test part" in capsys.readouterr().err

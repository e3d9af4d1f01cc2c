"""Decision fusion and inputs of each task's own, from config to predictions."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from mtrain import runs
from mtrain.config import load_config
from mtrain.data.digits import quarters, sensors
from mtrain.errors import UserError
from mtrain.model.head_forms import NOTHING, HeadForm
from mtrain.model.heads import HeadBank
from mtrain.ship.predict import predict
from mtrain.train.run_dir import RunDir

CONFIGS = Path(__file__).parents[2] / "configs"
QUIET = Console(quiet=True)


def trained(name, path, *overrides):
    config = load_config(CONFIGS / f"{name}.yaml", ["--train.steps", "12", "--train.eval_every", "9", *overrides])
    runs.train(config, CONFIGS, path, QUIET)
    return config


@pytest.mark.parametrize("routed", [False, True])
def test_a_head_that_combines_others_gives_the_weighted_sum_of_their_logits(routed):
    forms = [HeadForm(reads="a"), HeadForm(reads="b"), HeadForm(reads=NOTHING, parents=(1, 0), combine=(0.3, 0.7))]
    forms += [HeadForm(reads=NOTHING, parents=(0, 1))]
    bank = HeadBank(list("lrfw"), [3] * 4, {"a": (2,), "b": (5,)}, forms=forms)
    z_BD = torch.randn(6, 7)
    logits = bank(z_BD)
    torch.testing.assert_close(logits[:, 2], 0.3 * logits[:, 1] + 0.7 * logits[:, 0])
    if routed:
        task_B = torch.tensor([2, 0, 2, 1, 3, 3])
        torch.testing.assert_close(bank(z_BD, task_B), logits[torch.arange(6), task_B])
    learned = next(group for group in bank.groups if group.names == ["w"])
    expected = torch.cat([logits[:, 0], logits[:, 1]], 1) @ learned.weights[0][0].T + learned.biases[0][0]
    torch.testing.assert_close(logits[:, 3], expected)


@pytest.mark.slow
def test_decision_fusion_trains_each_model_and_keeps_fixed_weights(tmp_path):
    trained("fusion_decision", tmp_path / "run")
    pq.write_table(quarters().slice(0, 40), tmp_path / "new.parquet")
    predict([tmp_path / "run"], str(tmp_path / "new.parquet"), tmp_path / "out.parquet", QUIET)
    found = pq.read_table(tmp_path / "out.parquet").to_pandas()
    p = {t: found[[f"{t}={d}" for d in range(10)]].to_numpy() for t in ("digit", "digit_left", "digit_right", "digit_learned")}
    joint = np.sqrt(p["digit_left"] * p["digit_right"])
    assert p["digit"] == pytest.approx(joint / joint.sum(1, keepdims=True), rel=1e-4, abs=1e-7)
    heads = RunDir(tmp_path / "run").model().heads()
    fixed = torch.cat([torch.eye(10), torch.eye(10)], 1) / 2
    assert torch.equal(heads["digit"]["weights.0"], fixed)
    assert not torch.equal(heads["digit_learned"]["weights.0"], fixed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{combine: [0.5], reads: ['task:digit_left', 'task:digit_right']}", "combines by 1 weights, but reads"),
        ("{combine: [1.0], reads: [left, 'task:digit_left']}", "expected as many tasks as task:NAME, and no feature"),
        ("{combine: [1.0], reads: ['task:digit_up']}", "did you mean 'digit'"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, options, words):
    with pytest.raises(UserError, match=words) as caught:
        trained("fusion_decision", tmp_path / "run", "--tasks.by_name.digit", options)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def stems(tmp_path_factory):
    """A run of 12 steps with a stem for each task, one that was continued after 6, and the predictions of all rows."""
    path = tmp_path_factory.mktemp("stems")
    trained("task_inputs", path / "whole", "--train.decay", "constant")
    for steps in ("6", "12"):
        trained("task_inputs", path / "parts", "--train.decay", "constant", "--train.steps", steps)
    pq.write_table(sensors(), path / "all.parquet")
    predict([path / "whole"], str(path / "all.parquet"), path / "out.parquet", QUIET)
    return path


@pytest.mark.slow
def test_a_continued_run_with_stems_is_the_run_that_was_not_stopped(stems):
    whole, parts = (RunDir(stems / name).model().tensors("trunk") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


@pytest.mark.slow
def test_a_row_is_predicted_by_the_stem_of_its_own_task_alone(stems):
    found = pq.read_table(stems / "out.parquet").to_pandas()
    tasks = ["top", "left", "middle", "coarse"]
    for task in tasks:
        assert found[f"{task}=3"].notna().tolist() == (found["sensor"] == task).tolist()
    scored = pq.read_table(stems / "whole" / "predictions-test.parquet").to_pandas()  # as evaluation gave them
    assert set(scored["task"]) == set(tasks)
    for task in tasks:
        own = scored[scored["task"] == task]
        values = found.loc[own["row"], [f"{task}={d}" for d in range(10)]].to_numpy(float)
        assert values == pytest.approx(np.stack(own["probabilities"]), abs=1e-5)


@pytest.mark.slow
def test_rows_whose_task_is_not_said_are_refused(stems):
    pq.write_table(sensors().drop_columns(["sensor"]).slice(0, 3), stems / "none.parquet")
    with pytest.raises(UserError, match="no column 'sensor'"):
        predict([stems / "whole"], str(stems / "none.parquet"), stems / "none.csv", QUIET)


@pytest.mark.slow
def test_other_tasks_than_those_of_the_stems_are_refused(stems):
    options = ("--tasks.labels", "[top, left, coarse]", "--init_from", str(stems / "whole"))
    names = ("top", "left", "coarse")
    options += ("--inputs", str({f"{name}_*": "Numeric" for name in names}))
    options += ("--model.inputs", str({name: f"{name}_*" for name in names}))
    options += ("--model.trunk.init_args.columns", str({name: [name] for name in names}))
    with pytest.raises(UserError, match="saved for 4 tasks that are not the 3 of now"):
        trained("task_inputs", stems / "fewer", *options)

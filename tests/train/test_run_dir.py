"""Run directories."""

import json

import numpy as np
import pytest

from mtrain.config import check_config
from mtrain.errors import UserError
from mtrain.train.run_dir import RunDir, average_summaries
from mtrain.writing import replacing


def config(**sections):
    return check_config({"data": {"path": "a.csv", "layout": "grid"}, **sections}, "test")


def test_a_run_is_continued_with_another_length_but_not_with_another_model(tmp_path):
    run = RunDir(tmp_path / "run")
    run.start(config(train={"epochs": 3}))
    run.start(config(train={"epochs": 5, "log_every": 2}, tracker="Wandb"))
    assert run.config().train.epochs == 5
    with pytest.raises(UserError, match=r"model\.neck: null -> 3") as caught:
        run.start(config(model={"neck": 3}, train={"lr": 1.0}))
    assert "train.lr: 0.001 -> 1.0" in str(caught.value)
    assert run.config().model.neck is None


def test_a_folder_of_something_else_is_refused_and_an_empty_one_taken(tmp_path):
    (tmp_path / "there").mkdir()
    RunDir(tmp_path / "there").start(config())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="exists and is not a run"):
        RunDir(tmp_path / "other").start(config())
    with pytest.raises(UserError, match=r"holds no config\.yaml"):
        RunDir(tmp_path / "nothing").config()


def test_a_start_that_was_killed_before_the_config_was_whole_can_be_repeated(tmp_path):
    (tmp_path / ".config.yaml").write_text("data: {pa")
    RunDir(tmp_path).start(config())
    assert RunDir(tmp_path).config() == config()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("features.json", lambda run: run.load_json("features.json")),
        ("tasks.parquet", RunDir.tasks),
        ("per_task.parquet", RunDir.per_task),
        ("history.parquet", RunDir.history),
        ("predictions-test.parquet", lambda run: run.predictions("test")),
    ],
)
def test_a_damaged_file_of_a_run_is_named_in_a_line(tmp_path, name, read):
    (tmp_path / name).write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=rf"{name} cannot be read, it is damaged: ") as caught:
        read(RunDir(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(TypeError), replacing(path) as unfinished:
        unfinished.write_text(None)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.txt", "before")]
    with replacing(path) as unfinished:
        unfinished.write_text("after")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.txt", "after")]


def test_the_curve_is_cut_to_the_checkpoints_step_and_loses_a_torn_line(tmp_path):
    run = RunDir(tmp_path)
    for step in (5, 10, 15):
        run.log({"step": step, "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    run.cut_log(10)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [5, 10]


def test_averages_over_split_seeds_have_the_standard_deviation_beside_them():
    def summary(auc, worst, seconds, note):
        scores = {"mean": auc, "median": None, "worst_decile": worst, "pooled": 0.5, "scored": 12}
        return {"test": {"roc_auc": scores}, "tasks": 12, "seconds": seconds, "split_hash": note, "selected_value": worst}

    found = average_summaries([summary(0.7, None, 1.0, "a"), summary(0.8, 0.4, 2.0, "b"), summary(0.6, 0.6, 3.0, "c")])
    auc = found["test"]["roc_auc"]
    assert auc["mean"] == pytest.approx(0.7)
    assert auc["sd"]["mean"] == pytest.approx(np.std([0.7, 0.8, 0.6], ddof=1))
    assert auc["worst_decile"] == pytest.approx(0.5)
    assert auc["sd"]["worst_decile"] == pytest.approx(np.std([0.4, 0.6], ddof=1))
    assert auc["median"] is None
    assert auc["scored"] == found["tasks"] == 12
    assert found["seconds"] == 2.0
    assert found["split_hash"] == ["a", "b", "c"]
    assert found["selected_value"] == pytest.approx(0.5)


def test_the_history_of_many_evaluations_is_thinned_and_forgets_what_is_later(tmp_path):
    run = RunDir(tmp_path)
    for step in range(1, 251):
        values = {name: np.array([step, np.nan]) for name in ("skill", "metric", "loss", "weight")}
        run.add_history(step, {"task": ["a", "b"], **values})
    frame = run.history().to_pandas()
    of_a = frame[frame["task"] == "a"]
    assert of_a["step"].tolist() == [*range(2, 201, 2), *range(201, 251)]
    assert (of_a["skill"] == of_a["step"]).all()
    assert len(frame) == 2 * len(of_a)
    run.cut_log(230)
    assert run.history()["step"].to_numpy().max() == 230

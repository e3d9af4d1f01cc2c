"""Whole trainings: what is selected, what a run directory holds, and that nothing is lost by stopping."""

import json
import math
import os
import signal
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from problems import TASKS, run_config
from rich.console import Console
from safetensors import safe_open

from mtrain import runs
from mtrain.data.prepare import prepare, read_source
from mtrain.errors import UserError
from mtrain.parallel.world import World
from mtrain.train.evaluate import Evaluator, Scores
from mtrain.train.loop import Selection, Trainer, joined, lr_factor
from mtrain.train.run_dir import RunDir
from mtrain.train.state import head_stacks, trunk_tensors
from mtrain.train.step import Stepper
from mtrain.train.stop import Preempted, stop_signals
from mtrain.train.tracker import NoTracker


def train(config, path):
    console = Console(file=StringIO(), width=200)
    with stop_signals("SIGTERM", "SIGUSR1") as asked:
        summary = runs.train(config, Path(), path, console, asked=asked)
    return summary, console.file.getvalue()


def curve(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("rows_per_second", "data_wait")} for line in lines]


def weights(path, name="newest"):
    """Every tensor of a checkpoint: of trunk, heads, both optimizers and state."""
    run = RunDir(path)
    saved = run.checkpoints.newest() if name == "newest" else run.model()
    with safe_open(saved.path / "shard-00000-of-00001.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key != "layout"}  # noqa: SIM118


def assert_same_run(a, b):
    if (a / "split-0").is_dir():
        for split in ("split-0", "split-1"):
            assert_same_run(a / split, b / split)
        return
    assert curve(a) == curve(b)
    for name in ("newest", "model"):
        mine, other = weights(a, name), weights(b, name)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[k], other[k]) for k in mine)
    for table in ("history", "predictions-valid", "predictions-test"):
        assert pq.read_table(a / f"{table}.parquet").equals(pq.read_table(b / f"{table}.parquet")), table
    first, second = (json.loads((path / "summary.json").read_text()) for path in (a, b))
    for part in ("valid", "test", "selected_step", "selected_value", "labels", "split_hash"):
        assert first[part] == second[part]


class Killed(Exception):
    pass


RESUMED = {
    "grid": ("grid", {}),
    "two split seeds": ("grid", {"split": {"seeds": [0, 1], "parts": {"train": 0.6, "valid": 0.2, "test": 0.2}}}),
    "grid with a refit": ("grid", {"split": {"refit": True, "parts": {"train": 0.6, "valid": 0.2, "test": 0.2}}}),
    "routed": ("routed", {}),
    "routed towards shared heads": ("routed", {"model": {"trunk": "Identity", "head": {"toward_shared": 10.0}}}),
    "pairs with accumulation": ("pairs", {"train": {"epochs": 4, "global_batch": 16, "micro_batch": 5, "log_every": 4}}),
    "a user's own random trunk": ("grid", {"model": {"trunk": "problems.OwnTrunk"}}),
    "routed by the chunk": ("routed", {"data": {"streaming": True, "chunk_rows": 20}, "split": {"refit": True}}),
    "grid by the chunk": ("grid", {"data": {"streaming": True, "chunk_rows": 4}}),
    "an ensemble": ("pairs", {"model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [8], "members": 2}}}}),
}


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
WAYS = [(how, case) for case in RESUMED for how in ("killed", "interrupted")]


@pytest.mark.parametrize(
    ("how", "case"),
    [pytest.param(*way, marks=[] if i % 4 in (0, 3) else pytest.mark.slow) for i, way in enumerate(WAYS)],
)
def test_a_run_that_was_stopped_is_the_run_that_was_not(case, how, tmp_path, monkeypatch):
    layout, sections = RESUMED[case]
    config = run_config(layout, **sections)
    train(config, tmp_path / "straight")
    call, seen = Stepper.__call__, []
    num_calls = sum(curve(file.parent)[-1]["step"] for file in (tmp_path / "straight").rglob("metrics.jsonl"))
    stop_at = {int(a * num_calls) + 1 for a in (0.1, 0.45, 0.9)}

    def stopping(self, batch, step, *rest):
        seen.append(step)
        if len(seen) in stop_at:
            if how == "killed":
                raise Killed
            os.kill(os.getpid(), STOPS[(len(seen) > 0.2 * num_calls) + (len(seen) > 0.7 * num_calls)])
        call(self, batch, step, *rest)

    monkeypatch.setattr(Stepper, "__call__", stopping)
    stops, said, expected = [], [], []
    while True:
        try:
            train(config, tmp_path / "stopped")
            break
        except Killed:
            stops.append(None)
        except Preempted as stop:
            stops.append(stop.number)
            said.append((tmp_path / "stopped" / "preempted").read_text())
            split = [one for one in RunDir(tmp_path / "stopped").splits() if one.has_trained][-1]
            expected.append(f"{signal.Signals(stop.number).name} at step {split.checkpoints.newest().step}\n")
    assert not list((tmp_path / "stopped").rglob("preempted"))
    assert said == expected
    if how == "killed":
        assert len(stops) == 3
    else:  # not a step was done twice
        assert stops == list(STOPS)
        assert len(seen) == num_calls
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_starting_a_finished_run_again_changes_nothing(tmp_path):
    for refit in (False, True):
        config, path = run_config("grid", split={"refit": refit}), tmp_path / str(refit)
        first, _ = train(config, path)
        lines, before = curve(path), weights(path)
        again, _ = train(config, path)
        assert curve(path) == lines
        assert all(torch.equal(before[k], v) for k, v in weights(path).items())
        assert {k: first[k] for k in ("valid", "test", "seconds", "rows_per_second")} == {
            k: again[k] for k in ("valid", "test", "seconds", "rows_per_second")
        }


def test_more_epochs_continue_a_run(tmp_path):
    steady = {"global_batch": 16, "log_every": 2}
    train(run_config("grid", train={"epochs": 2, **steady, "decay": "constant", "warmup": 0.0}), tmp_path / "a")
    short = curve(tmp_path / "a")
    train(run_config("grid", train={"epochs": 5, **steady, "decay": "constant", "warmup": 0.0}), tmp_path / "a")
    train(run_config("grid", train={"epochs": 5, **steady, "decay": "constant", "warmup": 0.0}), tmp_path / "b")
    assert curve(tmp_path / "a")[: len(short)] == short
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_refitted_run_does_not_silently_ignore_more_epochs(tmp_path):
    train(run_config("grid", split={"refit": True}, train={"epochs": 2}), tmp_path)
    with pytest.raises(UserError, match="has been refitted"):
        train(run_config("grid", split={"refit": True}, train={"epochs": 3}), tmp_path)


@pytest.mark.parametrize("how", ["cut short", "a flipped bit"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_taken(how, tmp_path):
    config = run_config("grid", train={"epochs": 4, "keep_checkpoints": 2})
    train(config, tmp_path / "whole")
    train(config, tmp_path / "damaged")
    before, newest = sorted((tmp_path / "damaged" / "checkpoints").glob("step-*"))[-2:]
    (file,) = newest.glob("shard-*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data[:500] if how == "cut short" else data)
    _, said = train(config, tmp_path / "damaged")
    (line,) = (line for line in said.splitlines() if "it is not used" in line)
    assert f"{newest.name}/{file.name}: is damaged" in line
    assert f"continuing at step {int(before.name.removeprefix('step-'))} of" in said
    assert_same_run(tmp_path / "whole", tmp_path / "damaged")


def test_training_stops_without_improvement_and_the_best_step_is_selected(tmp_path, monkeypatch):
    values = iter([0.1, 0.5, 0.4, math.nan, 0.9])
    monkeypatch.setattr(Scores, "value", lambda self, metric, reduce: next(values))
    summary, _ = train(run_config("grid", select={"patience": 2}, train={"epochs": 30, "log_every": 100}), tmp_path)
    per_epoch = curve(tmp_path)[0]["step"]
    lines = curve(tmp_path)
    assert summary["selected_step"] == 2 * per_epoch
    assert summary["selected_value"] == 0.5
    assert lines[-1]["step"] == 4 * per_epoch
    assert "loss" in lines[-1]  # what was not yet logged is, when training ends early


def test_without_patience_a_metric_that_cannot_be_scored_is_refused(tmp_path):
    config = run_config("grid", select={"metric": "roc_auc", "min_per_class": 1000})
    with pytest.raises(UserError, match="no task of the valid part can be scored by roc_auc"):
        train(config, tmp_path)


@pytest.mark.parametrize("section", [{"split": {"refit": True}}, {"select": {"patience": 3}}])
def test_options_that_need_a_valid_part_are_refused_without_one(section, tmp_path):
    parts = {"parts": {"train": 0.8, "test": 0.2}}
    config = run_config("grid", **(section | {"split": section.get("split", {}) | parts}))
    with pytest.raises(UserError, match="needs a valid part"):
        train(config, tmp_path)


def test_selection_follows_the_direction_of_the_metric():
    up, down = Selection(True), Selection(False)
    assert [up.improves(v) for v in (math.nan, 0.1, 0.1, 0.2, math.nan, 0.1)] == [False, True, False, True, False, False]
    assert [down.improves(v) for v in (3.0, 4.0, 2.0)] == [True, False, True]
    assert (up.misses, up.value, down.value) == (2, 0.2, 2.0)


@pytest.mark.parametrize("layout", ["grid", "routed", "pairs"])
def test_a_refit_trains_as_long_as_selected_on_train_and_valid_and_scores_the_test_part_once(layout, tmp_path, monkeypatch):
    scored, score, parts = [], Evaluator.score, {}
    build = Trainer.__init__

    def built(self, prepared, *args):
        parts.update(prepared.parts)
        build(self, prepared, *args)

    monkeypatch.setattr(Trainer, "__init__", built)

    def counted(self, inputs, part, **options):
        scored.append(next(name for name, own in parts.items() if own is part))
        return score(self, inputs, part, **options)

    monkeypatch.setattr(Evaluator, "score", counted)
    summary, _ = train(run_config(layout, split={"refit": True}), tmp_path)
    lines = curve(tmp_path)
    fit = [line["step"] for line in lines if line["phase"] == "fit"]
    refit = [line for line in lines if line["phase"] == "refit"]
    assert scored.count("test") == 1
    assert scored[-1] == "test"
    assert refit[-1]["epoch"] == pytest.approx(
        next(x["epoch"] for x in lines if x["step"] == summary["selected_step"] and "epoch" in x), abs=0.2
    )
    assert refit[-1]["step"] > max(fit)
    run = RunDir(tmp_path)
    assert run.model().step == run.checkpoints.newest().step == refit[-1]["step"]
    assert run.model().about == {"phase": "refit", "best": summary["selected_step"], "final": refit[-1]["step"]}
    assert (run.best().step, run.best().about["phase"]) == (summary["selected_step"], "fit")


@pytest.mark.parametrize("layout", ["grid", "routed", "pairs"])
def test_parts_joined_for_a_refit_hold_the_labels_of_both(layout):
    data = prepare(read_source(run_config(layout)), 0)
    parts = [data.parts["train"], data.parts["valid"]]
    both = joined(parts, len(data.tasks))

    def entries(part):
        pairs = part.labels.pairs()
        return sorted(zip(part.row_R[pairs.row_P].tolist(), pairs.task_P.tolist(), pairs.y_P.tolist(), strict=True))

    assert entries(both) == sorted(entries(parts[0]) + entries(parts[1]))
    assert type(both.labels) is type(parts[0].labels)


@pytest.mark.parametrize("frozen", ["trunk", "heads"])
def test_a_frozen_part_does_not_change_at_all(frozen, tmp_path):
    config = run_config("grid", freeze=[frozen], model={"trunk": "problems.OwnTrunk"}, train={"epochs": 1})
    prepared, tracker = prepare(read_source(config), 0), NoTracker()
    run, accelerator = RunDir(tmp_path / "x"), runs.make_accelerator(config)
    trainer = Trainer(prepared, config, run, accelerator, World(), tracker, Console())
    start = {f"tensors/{name}": tensor.clone() for name, tensor in trunk_tensors(trainer.shared).items()}
    for number, stacks in enumerate(head_stacks(trainer.bank)):
        start |= {f"heads/{number}/{name}": tensor.clone() for name, tensor in stacks.tensors.items()}
    train(config, tmp_path / "run")
    end = weights(tmp_path / "run")
    still = {k for k in start if torch.equal(start[k], end[k])}
    part = {"trunk": "tensors/", "heads": "heads/"}[frozen]
    assert still == {k for k in start if k.startswith(part)}


def test_freezing_everything_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing is left to train"):
        train(run_config("grid", freeze=["trunk", "heads"]), tmp_path)


def test_init_from_takes_the_trunk_and_the_heads_of_the_same_tasks(tmp_path):
    train(run_config("grid", train={"epochs": 1}), tmp_path / "a")
    still = {"epochs": None, "steps": 1, "lr": 1e-12, "weight_decay": 0.0}
    keep = {name: {"kind": TASKS[name]} for name in ("r0", "b0", "c0")} | {"n0": {"kind": "regression"}}
    config = run_config("grid", init_from=str(tmp_path / "a"), train=still, tasks={"labels": list(keep), "by_name": keep})
    _, said = train(config, tmp_path / "b")
    assert "trunk and 3 heads taken over, heads that start fresh: 1" in said
    a, b = (runs.load_model(RunDir(tmp_path / name)).evaluator for name in "ab")
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    theirs, own = a.bank.to_modules(), b.bank.to_modules()
    for name in keep:
        same = all(torch.allclose(p, q) for p, q in zip(theirs[name].parameters(), own[name].parameters(), strict=True))
        assert same == (name != "n0")


def test_each_split_seed_starts_from_the_split_of_the_same_seed_before_its_refit(tmp_path):
    split = {"parts": {"train": 0.6, "valid": 0.2, "test": 0.2}}
    still = {"epochs": None, "steps": 1, "lr": 1e-12, "weight_decay": 0.0}
    train(run_config("grid", split=split | {"seeds": [3, 4], "refit": True}, train={"epochs": 1}), tmp_path / "a")
    train(run_config("grid", split=split | {"seeds": [4, 5]}, train=still, init_from=str(tmp_path / "a")), tmp_path / "b")
    for seed, source in ((4, 4), (5, 3)):
        theirs = runs.load_model(RunDir(tmp_path / "a" / f"split-{source}"), refitted=False).evaluator.model
        own = runs.load_model(RunDir(tmp_path / "b" / f"split-{seed}")).evaluator.model
        for p, q in zip(theirs.parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("refit", [False, True])
def test_a_run_continues_without_the_run_that_it_started_from(tmp_path, refit):
    split = {"parts": {"train": 0.6, "valid": 0.2, "test": 0.2}, "refit": refit}
    train(run_config("grid", split=split, train={"epochs": 1}), tmp_path / "a")
    config = run_config("grid", split=split, train={"epochs": 2}, init_from=str(tmp_path / "a"))
    train(config, tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    train(config, tmp_path / "b")
    with pytest.raises(UserError, match=r"a: holds no config\.yaml"):
        train(config, tmp_path / "c")


def test_smaller_micro_batches_are_the_same_run(tmp_path):
    train(run_config("grid", train={"epochs": 1}), tmp_path)
    before = weights(tmp_path)
    train(run_config("grid", train={"epochs": 1, "micro_batch": 8}), tmp_path)
    assert all(torch.equal(before[k], v) for k, v in weights(tmp_path).items())


def test_init_from_another_trunk_names_the_first_parameter_that_differs(tmp_path):
    train(run_config("grid", train={"epochs": 1}), tmp_path / "a")
    wider = {"trunk": {"class_path": "MLP", "init_args": {"widths": [8]}}}
    with pytest.raises(UserError, match=r"model: 'trunk\.trunk\.linears\.0\.weight' is \[16, 5\] there and \[8, 5\] here"):
        train(run_config("grid", init_from=str(tmp_path / "a"), model=wider), tmp_path / "b")


def test_tasks_with_infinite_losses_are_counted_shown_and_stop_the_run_past_the_limit(tmp_path):
    kinds = {"by_name": {name: {"kind": kind} for name, kind in TASKS.items()}, "labels": list(TASKS)}
    kinds["by_name"]["r1"] = {"kind": "problems.SometimesInfinite"}
    summary, said = train(run_config("grid", tasks=kinds, train={"epochs": 2, "max_bad_steps": 1000}), tmp_path / "a")
    counted = [line.get("bad_task_steps", 0) for line in curve(tmp_path / "a")]
    assert sum(counted) > 0
    assert "the loss of task 'r1' was not finite in" in said
    assert all(math.isfinite(line["loss"]) for line in curve(tmp_path / "a") if "loss" in line)
    assert summary["test"]["roc_auc"]["scored"] == 2
    with pytest.raises(UserError, match=r"more than train\.max_bad_steps \(2\)"):
        train(run_config("grid", tasks=kinds, train={"epochs": 2, "max_bad_steps": 2}), tmp_path / "b")


def test_bf16_follows_the_curve_of_full_precision(tmp_path):
    for precision in ("no", "bf16"):
        train(run_config("routed", train={"epochs": 3, "precision": precision}), tmp_path / precision)
    losses = {p: np.array([x["loss"] for x in curve(tmp_path / p) if "loss" in x]) for p in ("no", "bf16")}
    assert (losses["no"] != losses["bf16"]).any()
    np.testing.assert_allclose(losses["bf16"], losses["no"], rtol=0.05)


def test_fp16_without_a_gpu_is_refused_in_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine can do fp16")
    with pytest.raises(UserError, match=r"train\.precision fp16: not on this device"):
        train(run_config("grid", train={"precision": "fp16"}), tmp_path)


def test_several_split_seeds_are_runs_of_their_own_and_are_averaged(tmp_path):
    config = run_config(
        "grid", split={"seeds": [3, 4], "parts": {"train": 0.6, "valid": 0.2, "test": 0.2}}, train={"epochs": 1}
    )
    summary, _ = train(config, tmp_path / "both")
    alone = [json.loads((tmp_path / "both" / f"split-{seed}" / "summary.json").read_text()) for seed in (3, 4)]
    own, _ = train(
        run_config("grid", split={"seeds": [4], "parts": {"train": 0.6, "valid": 0.2, "test": 0.2}}, train={"epochs": 1}),
        tmp_path / "one",
    )
    assert own["test"] == alone[1]["test"]
    for metric in ("skill", "roc_auc", "mse"):
        values = [one["test"][metric]["mean"] for one in alone]
        assert summary["test"][metric]["mean"] == pytest.approx(np.mean(values))
        assert summary["test"][metric]["sd"]["mean"] == pytest.approx(np.std(values, ddof=1))


def test_a_run_directory_holds_the_documented_files_and_figures(tmp_path):
    summary, _ = train(run_config("grid"), tmp_path)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary))
    assert {"valid", "test", "seconds", "rows_per_second", "peak_memory_mb", "tasks"} <= written.keys()
    names = "roc_auc pr_auc accuracy f1 mse mae r2 ev pearson_r2 ci ece p_at_1 p_at_3 p_at_5 skill"
    for metric in names.split():
        assert written["test"][metric].keys() == {"mean", "median", "worst_decile", "pooled", "scored"}
    assert written["tasks"] == 6
    table = pq.read_table(tmp_path / "per_task.parquet")
    assert {"task", "kind", "train_labels", "expected_share", "threshold", "test_labels", "test_skill", "valid_roc_auc"} <= set(
        table.column_names
    )
    assert table["task"].to_pylist() == list(TASKS)
    assert sum(table["expected_share"].to_pylist()) == pytest.approx(1)
    assert np.nanmean(table["test_skill"].to_numpy()) == pytest.approx(written["test"]["skill"]["mean"], abs=0.2)
    lines = curve(tmp_path)
    assert all(isinstance(line["step"], int) for line in lines)
    assert [line["step"] for line in lines if "loss" in line][:3] == [3, 6, 9]
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.yaml", "tasks.parquet", "features.json", "split.parquet", "metrics.jsonl", "history.parquet",
        "per_task.parquet", "predictions-valid.parquet", "predictions-test.parquet", "summary.json", "checkpoints",
    }  # fmt: skip


def test_a_training_learns_all_kinds(tmp_path):
    summary, _ = train(run_config("grid", train={"epochs": 60, "decay": "cosine"}), tmp_path)
    assert summary["test"]["skill"]["median"] > 0.3


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_to_its_peak_and_falls_as_asked(decay):
    factors = [lr_factor(step, 100, 0.1, decay) for step in range(100)]
    np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10)
    assert max(factors) == 1.0
    expected = {"constant": 1.0, "linear": 0.5, "cosine": 0.5}[decay]
    assert factors[55] == pytest.approx(expected)
    assert lr_factor(200, 100, 0.1, decay) == (1.0 if decay == "constant" else 0.0)


def test_running_out_of_memory_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(Stepper, "__call__", lambda *_: torch.empty(10**16))
    with pytest.raises(UserError, match=r"out of memory: lower train\.micro_batch \(now 16 rows"):
        train(run_config("grid"), tmp_path)

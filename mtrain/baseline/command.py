"""`mtrain baseline`: baselines for the tasks, split and metrics of a config's run, kept as runs that a report compares."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table

from mtrain.baseline.linear import fit_linear
from mtrain.baseline.problem import Fitted, Problem
from mtrain.baseline.rows import constant_logits, count
from mtrain.baseline.single import fit_single, why_not
from mtrain.config import Config
from mtrain.data.prepare import Prepared, prepare, read_source
from mtrain.errors import UserError
from mtrain.report.say import say
from mtrain.train.evaluate import HIGHER_IS_BETTER, Scores, check_metric, predictions, scores_of
from mtrain.train.loop import peak_memory_mb
from mtrain.train.run_dir import RunDir, average_summaries

RUN = "run"


def baseline(config: Config, beside: Path, run_path: Path, output: Path | None, console: Console) -> pd.DataFrame:
    """Fit the baselines of a config, on each of its split seeds, and show them beside its run, if it is there.

    Each is kept as a run, `baseline-NAME` in the output directory, that `mtrain report` compares; `baseline.parquet` has the
    selected metric and skill of each task by all of them.

    Args:
        run_path: of the config's run.
        output: where to write; default the run's directory.

    Raises:
        UserError: what is wrong with the config or its data; the inputs do not fit in memory; the run is of another split.
    """
    folder = output or run_path
    config = config.model_copy(update={"run_dir": None})
    source = read_source(config, beside)
    seeds = config.split.seeds
    first: Prepared | None = prepare(source, seeds[0])
    assert first is not None
    check_metric(config.select.metric, first.tasks)
    for note in first.notes:
        say(console, f"note: {note}")
    if (no_networks := why_not(config)) is not None:
        say(console, f"single: no networks of single tasks: {no_networks}")
    summaries: dict[str, list[dict[str, Any]]] = {}
    hashes = []
    for seed in seeds:
        data, first = first or prepare(source, seed), None
        hashes.append(data.split_hash)
        problem = Problem.of(config.of_split(seed), data)
        if not problem.scored:
            raise UserError("baseline: the split has neither a valid nor a test part to score; add one to split.parts")
        if problem.codes is not None and seed == seeds[0]:
            say(console, f"pooled, linear: no linear models: inputs are {problem.codes}, which are no quantities")
        for name, fit in _baselines(problem, console, single=no_networks is None):
            run = RunDir(folder / f"baseline-{name}")
            run.start(config)
            one = run if len(seeds) == 1 else RunDir(run.path / f"split-{seed}")
            one.start(problem.config)
            started = time.monotonic()
            summaries.setdefault(name, []).append(_save(one, problem, data, fit(), started))
            of_split = f", split seed {seed}" if len(seeds) > 1 else ""
            say(console, f"{name}{of_split}: {summaries[name][-1]['seconds']:.1f} s, {run.path}")
    if len(seeds) > 1:
        for name, found in summaries.items():
            RunDir(folder / f"baseline-{name}").save_averages(average_summaries(found))
    frame = _table(config, folder, list(summaries), RunDir(run_path), hashes, console)
    RunDir(folder).save_table("baseline.parquet", pa.Table.from_pandas(frame, preserve_index=False))
    return frame


def _baselines(problem: Problem, console: Console, single: bool) -> Iterator[tuple[str, Callable[[], Fitted]]]:
    """Name and fit of each."""
    yield "constant", partial(_constant, problem)
    if problem.codes is None:
        yield "pooled", partial(fit_linear, problem, console, pooled=True)
        yield "linear", partial(fit_linear, problem, console, pooled=False)
    if single:
        yield "single", partial(fit_single, problem, console)


def _constant(problem: Problem) -> Fitted:
    logits_TO = constant_logits(problem.tasks)
    logits = {part: logits_TO[problem.rows[part].task_P] for part in problem.scored}
    return Fitted(logits, {}, int(problem.tasks.num_outputs_T.sum()))


def _save(run: RunDir, problem: Problem, data: Prepared, fitted: Fitted, started: float) -> dict[str, Any]:
    """Write what a run of one split keeps; gives its summary."""
    tasks, select = problem.tasks, problem.config.select
    seconds, scores = time.monotonic() - started, dict[str, Scores]()
    for part in problem.scored:
        counted = [count(tasks, problem.rows[part], fitted.logits[part])]
        threshold_T = scores["valid"].threshold_T if part == "test" and "valid" in scores else None
        scores[part] = scores_of(counted, tasks, select.min_per_class, None, threshold_T, choose_threshold=part == "valid")
        if select.predictions:
            run.save_predictions(part, select.predictions, predictions(counted, tasks))
    none_T = np.full(len(tasks), np.nan)
    columns: dict[str, Any] = {
        "task": tasks.names,
        "kind": [task.kind.name for task in tasks],
        "train_labels": tasks.stats["train_labels"],
        "expected_share": none_T,
        "weight": none_T,
    }
    if "valid" in scores and (threshold_T := scores["valid"].threshold_T) is not None:
        columns["threshold"] = threshold_T
    for part, found in scores.items():
        columns[f"{part}_labels"] = found.label_count_T
        columns |= {f"{part}_{name}": value_T for name, value_T in found.per_task.items()}
    run.save_table("tasks.parquet", tasks.to_arrow())
    run.save_table("per_task.parquet", pa.table(columns | fitted.columns))
    summary: dict[str, Any] = {part: found.summary for part, found in scores.items()} | {
        "tasks": len(tasks),
        "rows": {part: p.num_rows for part, p in data.parts.items()},
        "labels": {part: int(p.labels.count_T().sum()) for part, p in data.parts.items()},
        "inputs": data.inputs.width,
        "parameters": {"trunk": 0, "heads": fitted.parameters},
        "processes": 1,
        "selected_step": int(np.median(fitted.columns["best_step"])) if "best_step" in fitted.columns else 0,
        "selected_value": None,
        "seconds": seconds,
        "rows_per_second": None,
        "data_wait": None,
        "peak_memory_mb": peak_memory_mb(torch.device("cpu")),
        "test_inputs_seen_in_training": data.overlap,
        "split_hash": data.split_hash,
        "notes": data.notes,
    }
    run.save_json("summary.json", summary)
    return summary


def _table(config: Config, folder: Path, names: list[str], run: RunDir, hashes: list[str], console: Console) -> pd.DataFrame:
    """Print the last part's scores of each baseline, and in how many tasks the run is better; gives all of them by task."""
    metric = config.select.metric
    runs = {name: RunDir(folder / f"baseline-{name}") for name in names}
    if run.is_run and (run.path / "per_task.parquet").is_file():
        found = [one.load_json("summary.json")["split_hash"] for one in run.splits()]
        if found == hashes:
            runs = {RUN: run} | runs
        else:
            say(console, f"run {run.path}: its split (hash {', '.join(found)}) is not that of the config: it is not compared")
    frames = {name: one.per_task().to_pandas().set_index("task") for name, one in runs.items()}
    part = next(part for part in ("test", "valid") if f"{part}_skill" in frames[names[0]])
    shown = list(dict.fromkeys(["skill", metric]))
    shown = [name for name in shown if f"{part}_{name}" in frames[names[0]]]
    columns = {
        f"{name}_{which}_{one}": frame[f"{which}_{one}"]
        for name, frame in frames.items()
        for which in ("valid", "test")
        for one in shown
        if f"{which}_{one}" in frame
    }
    result = pd.DataFrame(columns).reindex(frames[names[0]].index).reset_index()
    table = Table(title=part, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for one in shown:
        for how in ("mean", "median", "pooled"):
            table.add_column(f"{one}, {how}", justify="right")
    if RUN in frames:
        table.add_column(f"run better ({shown[-1]})", justify="right")
    for name, one_run in runs.items():
        rows = [one_run.load_json("summary.json")[part][one] for one in shown]
        cells = ["-" if row[how] is None else f"{row[how]:.4f}" for row in rows for how in ("mean", "median", "pooled")]
        if RUN in frames:
            key = f"{part}_{shown[-1]}"
            gain_T = (result[f"{RUN}_{key}"] - result[f"{name}_{key}"]) * (1 if HIGHER_IS_BETTER[shown[-1]] else -1)
            share = (gain_T > 0).sum() / max(1, gain_T.notna().sum())
            cells.append("" if name == RUN else f"{share:.0%} of {gain_T.notna().sum()} tasks")
        table.add_row(name, *cells)
    console.print(table)
    if RUN in frames and config.select.predictions:
        say(console, f"task by task: mtrain report {run.path} {folder / f'baseline-{names[-1]}'}")
    return result

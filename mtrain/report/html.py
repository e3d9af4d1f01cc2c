"""`mtrain report`: one or several runs as one HTML file that needs no network."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from rich.console import Console

from mtrain import __version__
from mtrain.errors import UserError
from mtrain.report.compare import Comparison, check_same_rows, compare
from mtrain.report.intervals import LEVEL, RESAMPLES, Kept, Resampled, bounded, interval, resample
from mtrain.report.say import say
from mtrain.report.tables import merged_notes
from mtrain.train.evaluate import HIGHER_IS_BETTER
from mtrain.train.run_dir import RunDir
from mtrain.writing import replacing

POINTS = 300  # of a curve
SPARKS = 40  # of a task's curve in the table
CELLS = 400  # of a heat map's side: beyond, a cell is the mean over several tasks
USUAL = {"binary": "roc_auc", "multiclass": "accuracy", "regression": "r2"}  # of a family of kinds
TITLES = {"roc_auc": "ROC-AUC", "r2": "R²"}
QUANTILES = {"p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9}


def write_report(paths: Sequence[Path], output: Path, resamples: int = RESAMPLES, console: Console | None = None) -> None:
    """Write a report of runs, and of how the others differ from the first, on their test part, or valid where one has none.

    Args:
        resamples: how often rows are drawn anew for intervals.

    Raises:
        UserError: a run is not trained to its end, or the runs have other splits.
    """
    console = console or Console(quiet=True)
    script = plotly_script()
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {output}: expected a name that ends in .html")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: no folder {output.parent}; make it first")
    if output.is_dir():
        raise UserError(f"--output {output}: is a directory, expected the name of a file")
    if resamples < 2:
        raise UserError(f"--resamples {resamples}: expected at least 2")
    runs = [RunDir(path) for path in paths]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a run is named twice; name different runs")
    check_same_rows(runs)
    part = _part(runs)
    names = _names(paths)
    data: dict[str, Any] = {"version": __version__, "level": LEVEL, "runs": [], "comparisons": []}
    for name, run in zip(names, runs, strict=True):
        data["runs"].append(run_data(run, name, part, resamples))
        for line in data["runs"][-1]["warnings"]:
            say(console, f"run {run.path}: {line}")
    metric = data["runs"][0]["metric"]
    for i, run in enumerate(runs[1:], 1):
        found = compare((runs[0], run), part, metric, resamples)
        data["comparisons"].append(comparison_data(found, i))
        say(console, f"{names[i]} against {names[0]}: {sentence(found)}")
    title = f"mtrain: {', '.join(names)}"
    _write(output, _page(title, data, script))
    say(console, f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def plotly_script() -> str:
    """The library that draws the figures.

    Raises:
        UserError: it is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError('mtrain report draws with plotly, which is not installed; pip install "mtrain[report]"') from None
    return get_plotlyjs()


def run_data(run: RunDir, name: str, part: str, resamples: int) -> dict[str, Any]:
    """All that the page shows of a run; of one over several splits, means over them."""
    config, summary, splits = run.config(), run.load_json("summary.json"), run.splits()
    table = run.per_task().to_pandas()
    names = table["task"].tolist()
    metric, reduce = config.select.metric, config.select.reduce
    metrics = [m for m in dict.fromkeys(["skill", metric]) if f"{part}_{m}" in table]
    found, warnings = _intervals(splits, part, names, metrics, resamples)
    history = _history(splits, names)
    columns = {
        "task": names,
        "kind": table["kind"].tolist(),
        "train": table["train_labels"],
        "scored": table[f"{part}_labels"],
        "share": table["expected_share"],
        "weight": table["weight"],
    }
    for m in metrics:
        value_T = table[f"{part}_{m}"].to_numpy(np.float64)
        columns[m] = value_T
        if m in found:
            # all labels give the value, the predictions that were kept the interval
            low_T, high_T = (bound + value_T - found[m].value_T for bound in found[m].interval())
            columns |= {f"{m}_low": low_T, f"{m}_high": high_T}
    usual = {task.kind.name: USUAL[task.kind.family] for task in run.tasks()}
    if set(usual.values()) - set(metrics):
        empty = np.full(len(names), np.nan)  # no task of a family may be scored
        columns["usual"] = [table.get(f"{part}_{usual[kind]}", empty)[t] for t, kind in enumerate(table["kind"])]
    if f"{part}_mae" in table and "mae" not in metrics:
        columns["mae"] = table[f"{part}_mae"]
    notes = list(dict.fromkeys(_flat(summary.get("notes", []))))
    of_tasks = [note for note in notes if re.match(r"\d+ (of \d+ )?tasks ", note)]
    return {
        "name": name,
        "path": str(run.path),
        "part": part,
        "metric": metric if metric in metrics else "skill",
        "higher": {m: HIGHER_IS_BETTER[m] for m in metrics},
        "metrics": metrics,
        "usual": {kind: TITLES.get(m, m) for kind, m in usual.items()},
        "splits": len(splits),
        "headline": _headline(summary, part, metric, reduce, found),
        "facts": _facts(summary, config, len(splits)),
        "notes": of_tasks,
        "data_notes": merged_notes([note for note in notes if note not in of_tasks]),
        "warnings": warnings,
        "tasks": {key: values if key in ("task", "kind") else _short(values) for key, values in columns.items()}
        | _of_history(history, names, metric, reduce),
        "history": _quantiles(history),
        "curve": _curve(splits),
        "affinity": _affinity(splits, names),
    }


def comparison_data(found: Comparison, second: int) -> dict[str, Any]:
    columns = {"first": found.first_T, "second": found.second_T, "low": found.low_T, "high": found.high_T, "q": found.q_T}
    columns["difference"] = found.difference_T
    return {
        "second": second,
        "metric": found.metric,
        "higher": HIGHER_IS_BETTER[found.metric],
        "sentence": sentence(found),
        "tasks": {"task": found.names} | {name: _short(values) for name, values in columns.items()},
        "clear": [bool(clear) for clear in found.clear_T],
    }


def sentence(found: Comparison) -> str:
    """A comparison in a sentence."""
    middle, average = ("{:+.4f} ({:+.4f} to {:+.4f})".format(*numbers) for numbers in (found.median, found.mean))
    wins, fewest, most = found.wins
    tasks = f"{len(found.names):,}"
    only = f"; {found.other_tasks} tasks that only one of them has are left out" if found.other_tasks else ""
    return (
        f"over {tasks} tasks {found.metric} changes by {middle} in the median and {average} in the mean; better on {wins} "
        f"({fewest:.0f} to {most:.0f}), worse on {found.count(better=False)}; clearly better on "
        f"{found.count(better=True, clear=True)}, clearly worse on {found.count(better=False, clear=True)}{only}"
    )


def _part(runs: Sequence[RunDir]) -> str:
    """The part to show: what all runs have scored."""
    scored = [set(run.per_task().column_names) for run in runs]
    for part in ("test", "valid"):
        if all(f"{part}_skill" in columns for columns in scored):
            return part
    raise UserError(f"run {runs[0].path}: no part that all runs have scored; give the split a valid or a test part")


def _names(paths: Sequence[Path]) -> list[str]:
    """Each run's directory, with as many of those around it as tell the runs apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return names


def _intervals(
    splits: Sequence[RunDir], part: str, names: list[str], metrics: list[str], resamples: int
) -> tuple[dict[str, Resampled], list[str]]:
    kept = [Kept.load(one, part, names) for one in splits]
    if any(one is None for one in kept):
        return {}, ["kept no predictions (select.predictions is 0), so metrics come without intervals"]
    return resample([one for one in kept if one is not None], metrics, resamples), []


def _headline(
    summary: dict[str, Any], part: str, metric: str, reduce: str, found: dict[str, Resampled]
) -> list[dict[str, str | None]]:
    """The few numbers that come first: label, value and what it could as well be."""
    reductions: dict[str, Callable[..., Any]] = {"mean": np.nanmean, "median": np.nanmedian}
    lines: list[dict[str, str | None]] = []
    for m in dict.fromkeys([metric, "skill"]):
        row = summary[part].get(m, {})
        shown = dict.fromkeys([reduce, "median", "mean", "worst_decile"]) if m == metric else ["median"]
        values = {how: row[how] for how in shown if row.get(how) is not None}
        number = _digits(values.values())
        for how, value in values.items():
            note = None
            if how in reductions and m in found and np.isfinite(found[m].value_T).any():
                scored = np.isfinite(found[m].value_T)
                one = reductions[how]
                draws_N = one(bounded(m, found[m].value_TN[scored]), axis=0)
                shift = value - one(bounded(m, found[m].value_T[scored]))
                note = " to ".join(number.format(bound + shift) for bound in interval(draws_N))
            elif (sd := row.get("sd", {}).get(how)) is not None:
                note = f"± {number.format(sd)} over splits"
            label = {"worst_decile": "worst tenth's mean"}.get(how, how)
            lines.append({"label": f"{label} {part} {m}", "value": number.format(value), "note": note})
    lines.append({"label": "tasks", "value": f"{summary['tasks']:,}", "note": f"{summary[part]['skill']['scored']:g} scored"})
    lines.append({"label": "training", "value": _time(summary["seconds"]), "note": None})
    return lines


def _digits(values: Iterable[float]) -> str:
    """How all of some numbers are written: the largest with four digits, the others with as many decimals."""
    largest = max((abs(value) for value in values), default=0.0)
    return f"{{:,.{max(0, 3 - math.floor(math.log10(largest or 1)))}f}}"


def _facts(summary: dict[str, Any], config: Any, splits: int) -> list[list[str]]:
    """Data and time."""
    rows, labels = summary["rows"], summary["labels"]
    facts = [
        ["Layout, split", f"{config.data.layout}, {config.split.by}" + (f", {splits} seeds" if splits > 1 else "")],
        ["Rows", ", ".join(f"{part} {count:,.0f}" for part, count in rows.items())],
        ["Labels", ", ".join(f"{part} {count:,.0f}" for part, count in labels.items())],
    ]
    if config.data.layout in ("grid", "pairs"):
        share = 1 - sum(labels.values()) / (sum(rows.values()) * summary["tasks"])
        facts.append(["Missing labels", f"{share:.0%} of rows x tasks"])
    if summary.get("test_inputs_seen_in_training") is not None:
        facts.append(["Test inputs also in training", f"{summary['test_inputs_seen_in_training']:.1%}"])
    facts += [
        ["Inputs", f"{summary['inputs']:,.0f} numbers a row"],
        ["Parameters", ", ".join(f"{part} {count:,.0f}" for part, count in summary["parameters"].items())],
        ["Balancer", config.objective.balancer.class_path],
        ["Processes", f"{summary['processes']:g}"],
        ["Selected step", f"{summary['selected_step']:,.0f}"],
        ["Time of training", _time(summary["seconds"])],
        ["Rows a second", f"{summary['rows_per_second'] or 0:,.0f}"],
        ["Waiting for data", f"{summary['data_wait'] or 0:.1%} of the steps' time"],
        ["Peak memory", f"{summary['peak_memory_mb']:,.0f} MB of process 0"],
        ["Split hash", ", ".join(_flat(summary["split_hash"]))],
        ["Seed", str(config.train.seed)],
    ]
    return facts


def _time(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"


def _flat(value: Any) -> list[str]:
    """Text, lists of text, and lists of those, as one list."""
    if isinstance(value, list):
        return [text for each in value for text in _flat(each)]
    return [str(value)]


def _history(splits: Sequence[RunDir], names: list[str]) -> dict[str, Any] | None:
    """Of all evaluations `[S]`: steps, and values of each task `[S, T]`; means over splits."""
    tables = [table for one in splits if (table := one.history()) is not None and len(table)]
    if not tables:
        return None
    frame = pd.concat([table.to_pandas().astype({"task": str}) for table in tables])
    steps = np.sort(frame["step"].unique())
    grouped = frame.groupby(["step", "task"]).mean()
    wide = {name: grouped[name].unstack("task").reindex(index=steps, columns=names) for name in grouped.columns}
    return {"step": steps} | {name: values.to_numpy(np.float64) for name, values in wide.items()}


def _of_history(history: dict[str, Any] | None, names: list[str], metric: str, reduce: str) -> dict[str, Any]:
    """Each task's best step by the selected metric, and its course of skill in whole hundredths."""
    if history is None:
        return {"best": [None] * len(names), "course": [[]] * len(names)}
    values_ST = history["metric"] if np.isfinite(history["metric"]).any() else history["skill"]
    signed_ST = values_ST if HIGHER_IS_BETTER[metric] else -values_ST
    best_T = np.where(np.isfinite(signed_ST), signed_ST, -np.inf).argmax(0)
    best = [int(history["step"][b]) if np.isfinite(signed_ST[:, t]).any() else None for t, b in enumerate(best_T)]
    shown_ST = np.clip(history["skill"][_thin(len(history["step"]), SPARKS)], -1, 1)
    hundredths_ST = np.where(np.isfinite(shown_ST), np.round(100 * shown_ST), -999).astype(int)
    return {"best": best, "course": [[None if v == -999 else v for v in own] for own in hundredths_ST.T.tolist()]}


def _quantiles(history: dict[str, Any] | None) -> dict[str, Any] | None:
    """How skill and weights spread over tasks, at each evaluation."""
    if history is None:
        return None
    at = _thin(len(history["step"]), POINTS)
    found: dict[str, Any] = {"step": history["step"][at].tolist()}
    for name in ("skill", "weight"):
        values_ST = history[name][at]
        scored_T = np.isfinite(values_ST).any(0)
        if scored_T.any():
            spread = np.nanquantile(values_ST[:, scored_T], list(QUANTILES.values()), axis=1)
            found[name] = {q: _short(values) for q, values in zip(QUANTILES, spread, strict=True)}
            found[f"{name}_varies"] = bool(np.nanmax(values_ST) - np.nanmin(values_ST) > 1e-6)
    return found


def _curve(splits: Sequence[RunDir]) -> dict[str, Any]:
    """The training loss, learning rate and speed over steps; means over splits."""
    keys = ("loss", "lr", "rows_per_second", "data_wait")
    lines = []
    for one in splits:
        path = one.path / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        lines += [values for line in text.splitlines() if "loss" in (values := json.loads(line))]
    if not lines:
        return {"step": []}
    frame = pd.DataFrame(lines)
    again = frame["step"][frame["phase"] == "refit"].min()
    frame = frame.groupby("step")[list(keys)].mean()
    frame = frame.iloc[_thin(len(frame), POINTS)]
    refit = None if np.isnan(again) else int(again)
    return {"step": frame.index.tolist(), "refit": refit} | {key: _short(frame[key]) for key in keys}


def _affinity(splits: Sequence[RunDir], names: list[str]) -> dict[str, Any] | None:
    """The matrix of affinities in the order of its groups, in 254 levels from -1 to 1; of the first split that has one."""
    path = next((one.path for one in splits if (one.path / "affinity.parquet").is_file()), None)
    if path is None:
        return None
    pairs = pq.read_table(path / "affinity.parquet", columns=["task_a", "task_b", "affinity"])
    groups = pq.read_table(path / "affinity_groups.parquet").to_pandas().sort_values("order")
    groups = groups[groups["task"].isin(names)]
    ordered = groups["task"].tolist()
    place = pd.Series(np.arange(len(ordered)), ordered)
    a, b = (place.reindex(pairs[name].to_pandas()).to_numpy() for name in ("task_a", "task_b"))
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known].astype(int), b[known].astype(int)
    matrix = np.full((len(ordered), len(ordered)), np.nan)
    matrix[a, b] = matrix[b, a] = pairs["affinity"].to_numpy()[known]
    off_diagonal = matrix[np.isfinite(matrix)]
    np.fill_diagonal(matrix, 1)
    each = -(-len(ordered) // CELLS)
    if each > 1:
        padded = np.pad(matrix, ((0, -len(ordered) % each),) * 2, constant_values=np.nan)
        blocks = padded.reshape(len(padded) // each, each, -1, each)
        there = np.isfinite(blocks)
        with np.errstate(invalid="ignore"):
            matrix = np.where(there, blocks, 0).sum((1, 3)) / there.sum((1, 3))
    levels = np.where(np.isfinite(matrix), np.round(127 * np.clip(matrix, -1, 1)), -128).astype(np.int8)
    return {
        "side": len(matrix),
        "each": each,
        "cells": base64.b64encode(levels.tobytes()).decode(),
        "tasks": ordered,
        "group": groups["group"].astype(int).tolist(),
        "negative": float((off_diagonal < 0).mean()) if len(off_diagonal) else 0.0,
    }


def _thin(count: int, most: int) -> NDArray[np.int64]:
    """At most so many places, evenly spread, with first and last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _short(values: ArrayLike | Iterable[float]) -> list[float | None]:
    """Numbers with five digits; None for what is not a number."""
    return [float(f"{v:.5g}") if np.isfinite(v) else None for v in np.asarray(values, np.float64).tolist()]


def _page(title: str, data: dict[str, Any], plotly: str) -> str:
    """The file. What comes from the run is data that the page's script shows as text: no name of a task can be code."""
    asset = {name: (files("mtrain.report") / "assets" / name).read_text() for name in ("page.html", "page.css", "page.js")}
    encoded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"title": html.escape(title), "css": asset["page.css"], "data": encoded, "plotly": plotly, "js": asset["page.js"]}
    page = asset["page.html"]
    before, *rest = page.split("{{")
    return before + "".join(parts[name] + after for name, after in (piece.split("}}", 1) for piece in rest))


def _write(output: Path, text: str) -> None:
    try:
        with replacing(output) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from None

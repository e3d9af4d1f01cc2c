"""What the commands print."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mtrain.config import Config
from mtrain.data.batch import Grid
from mtrain.data.prepare import Prepared, Source
from mtrain.errors import some
from mtrain.parallel.plan import Plan
from mtrain.report.estimate import estimate
from mtrain.report.say import say

SHOWN_TASKS = 20
FIRST = ("skill", "roc_auc", "pr_auc", "accuracy", "f1", "brier", "ece", "mse", "mae", "r2", "ev", "pearson_r2", "ci")


def print_notes(notes: Sequence[str], console: Console) -> None:
    for note in notes:
        say(console, f"note: {note}")


def print_summary(summary: dict[str, Any], config: Config, run_dir: Path, console: Console) -> None:
    """A short table of the selected metric and the others, per part."""
    for part in ("valid", "test"):
        metrics = summary.get(part)
        if not metrics:
            continue
        table = Table(title=part, title_justify="left", box=None, pad_edge=False)
        table.add_column("metric")
        for name in ("mean", "median", "worst decile", "pooled", "tasks scored"):
            table.add_column(name, justify="right")
        selected = config.select.metric
        for name in sorted(metrics, key=lambda n: (n != selected, FIRST.index(n) if n in FIRST else len(FIRST))):
            row = metrics[name]
            if row["mean"] is None and row["pooled"] is None:
                continue
            sd = row.get("sd", {})
            cells = [_number(row[k], sd.get(k)) for k in ("mean", "median", "worst_decile", "pooled")]
            table.add_row(name, *cells, f"{row['scored']:g}", style="bold" if name == selected else None)
        console.print(table)
    if "seconds" in summary:
        console.print(
            f"{summary['tasks']} tasks, {summary['seconds']:.1f} s of training, {summary['rows_per_second'] or 0:,.0f} "
            f"rows/s, {summary['peak_memory_mb']:,.0f} MB, run {run_dir}",
            highlight=False,
            soft_wrap=True,
        )


def _number(value: float | None, sd: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ± {sd:.4f}" if sd is not None else "")


def print_plan(plan: Plan, wrapper: str, console: Console) -> None:
    """In a line: how many processes, and who has which tasks."""
    hot = f", {len(plan.hot)} on all of them" if len(plan.hot) else ""
    counts = np.bincount(plan.owner_T[plan.owner_T >= 0], minlength=plan.ranks)
    console.print(
        f"{plan.ranks} processes ({wrapper}); heads of {len(plan.names)} tasks: {counts.min()} to {counts.max()} a "
        f"process{hot}; mode {plan.mode}: {plan.why}",
        highlight=False,
        soft_wrap=True,
    )


def print_tasks(source: Source, data: Prepared, config: Config, console: Console) -> None:
    """The task table with its training statistics, sizes, estimates, and what is suspicious."""
    tasks, stats = data.tasks, data.tasks.stats
    table = Table(box=None, pad_edge=False)
    for name in ("task", "kind", "because", "outputs"):
        table.add_column(name, justify="right" if name == "outputs" else "left")
    for name in ("labels", *data.parts, "mean", "std", "constant's loss"):
        table.add_column(name, justify="right")
    count_T = np.bincount(source.labels.task_P, minlength=len(tasks))
    in_part = {part: p.labels.count_T().numpy() for part, p in data.parts.items()}
    for t, task in enumerate(tasks[:SHOWN_TASKS]):
        table.add_row(
            task.name,
            task.kind.name,
            source.labels.reason_T[t],
            str(task.num_outputs),
            str(count_T[t]),
            *(str(in_part[part][t]) for part in data.parts),
            f"{stats['mean'][t]:.4g}",
            f"{stats['std'][t]:.4g}",
            f"{stats['constant_deviance'][t]:.4g}",
        )
    console.print(table)
    if len(tasks) > SHOWN_TASKS:
        console.print(f"and {len(tasks) - SHOWN_TASKS} more tasks", highlight=False)
    kinds: dict[str, int] = defaultdict(int)
    for task in tasks:
        kinds[task.kind.name] += 1
    console.print(
        f"\n{len(tasks)} tasks ({', '.join(f'{n} {k}' for k, n in kinds.items())}), layout {config.data.layout}, "
        f"{source.num_inputs} inputs of {data.inputs.width} numbers",
        highlight=False,
        soft_wrap=True,
    )
    labels = data.parts["train"].labels
    share = len(source.labels.y_P) / (source.num_inputs * len(tasks))
    console.print(
        f"labels: {len(source.labels.y_P)}, {1 - share:.0%} of the table is missing; computed as "
        f"{'a grid' if isinstance(labels, Grid) else 'pairs'}",
        highlight=False,
    )
    for item in data.features:
        names = item.columns[0] + (f" and {len(item.columns) - 1} more" if len(item.columns) > 1 else "")
        console.print(f"input: {names}: {item.spec.class_path}, {item.feature.width} numbers", highlight=False)
    sizes = ", ".join(f"{part} {p.num_rows}" for part, p in data.parts.items())
    console.print(f"split: {config.split.by}, rows: {sizes} (hash {data.split_hash})", highlight=False)
    if data.overlap is not None:
        console.print(f"test inputs that also occur in training: {data.overlap:.1%}", highlight=False)
    needs = estimate(data, config)
    console.print(
        f"estimate: {(needs.data_bytes + needs.model_bytes) / 1e6:,.0f} MB for data, model and optimizers "
        f"({needs.trunk_parameters:,} parameters in the trunk, {needs.head_parameters:,} in the heads), {needs.steps} steps, "
        f"about {needs.seconds:,.0f} s on this machine's CPU",
        highlight=False,
        soft_wrap=True,
    )
    print_notes(data.notes, console)
    for line in suspicious(source, data):
        say(console, f"suspicious: {line}")


def suspicious(source: Source, data: Prepared) -> list[str]:
    """What a person should look at before training: one class, constant targets, few labels, near-duplicate names."""
    tasks, stats = data.tasks, data.tasks.stats
    lines = []
    flat = [t for t, task in enumerate(tasks) if stats["train_labels"][t] > 0 and stats["std"][t] == 0]
    one_class = [tasks[t].name for t in flat if tasks[t].kind.family in ("binary", "multiclass")]
    constant = [tasks[t].name for t in flat if tasks[t].kind.family == "regression"]
    for names, what in ((one_class, "only one class"), (constant, "a constant target")):
        if names:
            lines.append(f"{len(names)} tasks have {what} in training: {some(names)}")
    similar = defaultdict(list)
    for task in tasks:
        similar[re.sub(r"[\W_]+", "", task.name).lower()].append(task.name)
    pairs = [" ~ ".join(names) for names in similar.values() if len(names) > 1]
    if pairs:
        lines.append(f"{len(pairs)} names are almost the same: {some(pairs)}")
    return lines

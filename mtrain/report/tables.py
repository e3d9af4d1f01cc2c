"""What the commands print."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtrain.config import Config
from mtrain.data.batch import Grid
from mtrain.data.prepare import Prepared, Source
from mtrain.errors import some
from mtrain.parallel.plan import Plan
from mtrain.report.estimate import estimate
from mtrain.report.say import say

SHOWN_TASKS = 20
FEW_LABELS = 5  # of a task in a part: fewer are suspicious
FIRST = ("skill", "roc_auc", "pr_auc", "accuracy", "f1", "brier", "ece", "mse", "mae", "r2", "ev", "pearson_r2", "ci")


def merged_notes(notes: Iterable[str]) -> list[str]:
    """Notes that begin alike, up to a colon, as one."""
    rest: dict[str, list[str]] = {}
    for note in notes:
        head, _, own = note.partition(": ")
        rest.setdefault(head, []).append(own)
    return [": ".join(filter(None, (head, "; ".join(own)))) for head, own in rest.items()]


def print_notes(notes: Sequence[str], console: Console) -> None:
    for note in merged_notes(notes):
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
        say(
            console,
            f"{summary['tasks']} tasks, {summary['seconds']:.1f} s of training, {summary['rows_per_second'] or 0:,.0f} "
            f"rows/s, {summary['peak_memory_mb']:,.0f} MB, run {run_dir}",
        )


def _number(value: float | None, sd: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ± {sd:.4f}" if sd is not None else "")


def print_plan(plan: Plan, wrapper: str, console: Console) -> None:
    """In a line: how many processes, and who has which tasks."""
    hot = f", {len(plan.hot)} on all of them" if len(plan.hot) else ""
    counts = np.bincount(plan.owner_T[plan.owner_T >= 0], minlength=plan.ranks)
    say(
        console,
        f"{plan.ranks} processes ({wrapper}); heads of {len(plan.names)} tasks: {counts.min()} to {counts.max()} a "
        f"process{hot}; mode {plan.mode}: {plan.why}",
    )


def print_tasks(source: Source, data: Prepared, config: Config, console: Console, every: bool = False) -> None:
    """The task table with its training statistics, sizes, estimates, and what is suspicious.

    Args:
        every: show every task; else of many only the first, those that are suspicious before the others.
    """
    tasks, stats = data.tasks, data.tasks.stats
    found = _suspicious(data)
    order = list(range(len(tasks)))
    if not every and len(tasks) > SHOWN_TASKS:
        order = list(dict.fromkeys([*(t for _, flagged in found for t in flagged), *order]))[:SHOWN_TASKS]
    table = Table(box=None, pad_edge=False)
    for name in ("task", "kind", "because", "outputs"):
        table.add_column(name, justify="right" if name == "outputs" else "left")
    for name in ("labels", *data.parts, "mean", "std", "constant's loss"):
        table.add_column(name, justify="right")
    count_T = np.bincount(source.labels.task_P, minlength=len(tasks))
    in_part = {part: p.labels.count_T().numpy() for part, p in data.parts.items()}
    for t in order:
        cells = (
            tasks[t].name,
            tasks[t].kind.name,
            source.labels.reason_T[t],
            str(tasks[t].num_outputs),
            str(count_T[t]),
            *(str(in_part[part][t]) for part in data.parts),
            f"{stats['mean'][t]:.4g}",
            f"{stats['std'][t]:.4g}",
            f"{stats['constant_deviance'][t]:.4g}",
        )
        table.add_row(*map(Text, cells))
    console.print(table)
    if len(tasks) > len(order):
        first = "suspicious ones come first; " if found else ""
        say(console, f"and {len(tasks) - len(order):,} more tasks ({first}--all shows every task)")
    kinds = Counter(task.kind.name for task in tasks)
    rows = "different inputs" if config.data.layout == "pairs" else "rows"
    say(
        console,
        f"\n{len(tasks):,} tasks ({', '.join(f'{n} {k}' for k, n in kinds.items())}), layout {config.data.layout}, "
        f"{source.num_inputs:,} {rows} of {data.inputs.width:,} numbers",
    )
    labels = len(source.labels.y_P)
    if config.data.by_task:
        say(console, f"labels: {labels:,}, one a row")
    else:
        computed = "a grid" if isinstance(data.parts["train"].labels, Grid) else "pairs"
        share = 1 - (labels - source.repeated) / (source.num_inputs * len(tasks))
        say(console, f"labels: {labels:,}, {share:.0%} of {rows} x tasks have none; computed as {computed}")
    for item in data.features:
        names = item.columns[0] + (f" and {len(item.columns) - 1} more" if len(item.columns) > 1 else "")
        say(console, f"input: {names}: {item.spec.class_path}, {item.feature.width} numbers")
    sizes = ", ".join(f"{part} {p.num_rows}" for part, p in data.parts.items())
    say(console, f"split: {config.split.by}, rows: {sizes} (hash {data.split_hash})")
    if data.overlap is not None:
        say(console, f"test inputs that also occur in training: {data.overlap:.1%}")
    needs = estimate(data, config)
    most = "at most " if config.split.refit or config.select.patience else ""
    say(
        console,
        f"estimate: {(needs.data_bytes + needs.model_bytes) / 1e6:,.0f} MB for data, model and optimizers "
        f"({needs.trunk_parameters:,} parameters in the trunk, {needs.head_parameters:,} in the heads), {most}{needs.steps:,} "
        f"steps, about {needs.seconds:,.0f} s on this machine's CPU",
    )
    print_notes(data.notes, console)
    for line, _ in found:
        say(console, f"suspicious: {line}")


def suspicious(source: Source, data: Prepared) -> list[str]:
    """What a person should look at before training: one class, constant targets, few labels, near-duplicate names."""
    return [line for line, _ in _suspicious(data)]


def _suspicious(data: Prepared) -> list[tuple[str, list[int]]]:
    """Each with the places of the tasks that it is about."""
    tasks, stats = data.tasks, data.tasks.stats
    flat = [t for t, task in enumerate(tasks) if stats["train_labels"][t] > 0 and stats["std"][t] == 0]
    one_class = [t for t in flat if tasks[t].kind.family in ("binary", "multiclass")]
    constant = [t for t in flat if tasks[t].kind.family == "regression"]
    found = [("have only one class in training", one_class), ("have a constant target in training", constant)]
    for part, own in data.parts.items():
        count_T = own.labels.count_T().numpy()
        few = np.argsort(count_T, kind="stable")[: int((count_T < FEW_LABELS).sum())].tolist()
        none = f" ({int((count_T == 0).sum())} of them none)" if few and count_T[few[0]] == 0 else ""
        found.append((f"have fewer than {FEW_LABELS} labels in {part}{none}", few))
    lines = [(f"{len(at)} tasks {what}: {some([tasks[t].name for t in at])}", at) for what, at in found if at]
    similar = defaultdict(list)
    for t, task in enumerate(tasks):
        similar[re.sub(r"[\W_]+", "", task.name).lower()].append(t)
    alike = [at for at in similar.values() if len(at) > 1]
    if alike:
        pairs = [" ~ ".join(tasks[t].name for t in at) for at in alike]
        lines.append((f"{len(pairs)} names are almost the same: {some(pairs)}", [t for at in alike for t in at]))
    return lines

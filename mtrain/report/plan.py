"""What `mtrain plan` prints: who owns what on so many ranks, and what a step sends."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from mtrain.config import Config
from mtrain.data.prepare import prepare, read_source
from mtrain.errors import UserError, some
from mtrain.model.trunks import shared_network
from mtrain.parallel.plan import HEAD_BYTES, HOT, Flow, Plan, Workload, flows, make_plan, plain_ddp
from mtrain.parallel.workload import workload
from mtrain.report.say import say
from mtrain.train.loop import sampling_probabilities

SHOWN_RANKS = 8
MOST_RANKS = 100_000
SCALES = (8, 64, 512, 4096)
MOMENT_BYTES = 8
"""Bytes of AdamW's two moments of a parameter, in float32."""


def show_plan(config: Config, beside: Path, ranks: int, memory_gb: float | None, console: Console, fsdp: bool = False) -> None:
    """Print what a training on `ranks` ranks would do, without starting any.

    Args:
        beside: folder of the config, where its data may be.
        memory_gb: memory of a rank for parameters, gradients and moments; the trunk's are taken from it.
        fsdp: the trunk is sharded by FSDP2, else replicated by DDP.

    Raises:
        UserError: the trunk or the heads do not fit, or what is wrong with config and data.
    """
    if not 1 <= ranks <= MOST_RANKS:
        raise UserError(f"--ranks is {ranks}, expected 1 to {MOST_RANKS:,}")
    if memory_gb is not None and not 0 < memory_gb < math.inf:
        raise UserError(f"--memory is {memory_gb:g}, expected GB of a process, above 0")
    source = read_source(config, beside)
    data = prepare(source, config.split.seeds[0])
    shared = shared_network(config, data.widths, data.tasks.names)
    work = workload(data.tasks, data.parts["train"].labels, config, shared, sampling_probabilities(data, config))
    print_plan(work, ranks, memory_gb, console, fsdp)


def print_plan(work: Workload, ranks: int, memory_gb: float | None, console: Console, fsdp: bool = False) -> None:
    """The plan of a workload: its ranks, what they send in a step, and the same for other numbers of ranks; see `show_plan`."""
    plan = make_plan(work, ranks, head_memory(work, ranks, memory_gb, fsdp))
    trunk = "sharded by FSDP2" if fsdp else "replicated by DDP"
    say(
        console,
        f"{len(work.names)} tasks on {ranks} ranks: {work.trunk_params:,} parameters in the trunk ({trunk}), "
        f"{int(work.head_params_T.sum()):,} in the heads, {work.batch} rows a step",
    )
    say(console, f"mode {plan.mode}: {plan.why}")
    say(console, f"the busiest rank has {plan.imbalance:.2f} x the mean work of trunk and heads")
    if len(plan.hot):
        say(console, f"hot tasks, on every rank: {some([plan.names[t] for t in plan.hot])}")
    if ranks > work.batch:
        say(console, f"with {work.batch} rows a step, at least {ranks - work.batch} ranks have none")
    console.print()
    console.print(_ranks_table(plan, work))
    console.print()
    console.print(_wire_table(flows(plan, work, fsdp), plain_ddp(work), ranks))
    console.print()
    console.print(_scales_table(work, memory_gb, fsdp))


def head_memory(work: Workload, ranks: int, memory_gb: float | None, fsdp: bool = False) -> float | None:
    """Bytes that a rank has for heads beside the trunk; None where memory is not limited.

    Raises:
        UserError: the trunk alone does not fit.
    """
    if memory_gb is None:
        return None
    trunk = (4 * work.trunk_params + (HEAD_BYTES - 4) * work.trunk_trained) / (ranks if fsdp else 1)
    room = memory_gb * 1e9 - trunk
    if room <= 0:
        raise UserError(
            f"--memory {memory_gb:g}: the trunk takes {trunk / 1e9:.3g} GB of a rank with gradients and moments, which leaves "
            f"nothing for heads; give more{'' if fsdp else ', or shard the trunk (FSDP2)'}"
        )
    return room


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    return table


def _held(plan: Plan, value_T: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over the tasks whose heads each rank holds, for each rank `[R]`."""
    hot_T = plan.owner_T == HOT
    return np.bincount(plan.owner_T[~hot_T], value_T[~hot_T], plan.ranks) + value_T[hot_T].sum()


def _ranks_table(plan: Plan, work: Workload) -> Table:
    """For each rank what it holds, the rows that it reads, rows x heads that it computes, and its work."""
    hot_T = plan.owner_T == HOT
    tasks_R, params_R = _held(plan, np.ones(len(hot_T))), _held(plan, work.head_params_T.astype(np.float64))
    labels_R = _held(plan, np.where(hot_T, work.rows_T / plan.ranks, work.rows_T))
    rows_R = labels_R if plan.mode == "owners" and work.by_task else np.full(plan.ranks, work.batch / plan.ranks)
    work_R = plan.load_R / (plan.load_R.mean() or 1.0)
    table = _table("rank", "tasks", "parameters", "moments", "heads in all", "rows a step", "head rows a step", "work / mean")

    def add(name: str, of: Callable[[NDArray[np.float64]], float]) -> None:
        sizes = (_size(MOMENT_BYTES * of(params_R)), _size(HEAD_BYTES * of(params_R)))
        rows = (f"{of(rows_R):,.1f}", f"{of(labels_R):,.1f}", f"{of(work_R):.2f}")
        table.add_row(name, f"{of(tasks_R):,.0f}", f"{of(params_R):,.0f}", *sizes, *rows)

    shown = plan.ranks if plan.ranks <= SHOWN_RANKS + 1 else SHOWN_RANKS
    for rank in range(shown):
        add(str(rank), operator.itemgetter(rank))
    if shown < plan.ranks:
        for what, of in (("least", np.min), ("mean", np.mean), ("most", np.max)):
            add(f"{what} of {plan.ranks}", of)
    return table


def _wire_table(found: dict[str, Flow], plain: Flow, ranks: int) -> Table:
    """What each rank sends in a step, beside plain DDP of everything."""
    table = _table("sent in a step by each rank", "collective", "bytes", "of plain DDP")
    whole, total = plain.sent(ranks), sum(flow.sent(ranks) for flow in found.values())
    for what, flow in found.items():
        table.add_row(what, flow.collective, _size(flow.sent(ranks)), _ratio(flow.sent(ranks), whole))
    table.add_row("total", "", _size(total), _ratio(total, whole), style="bold")
    table.add_row("plain DDP of trunk and all heads", plain.collective, _size(whole), "")
    return table


def _scales_table(work: Workload, memory_gb: float | None, fsdp: bool) -> Table:
    """The plan for other numbers of ranks in a line each."""
    table = _table("ranks", "mode", "work / mean", "hot tasks", "heads, most", "sent", "of plain DDP")
    whole = plain_ddp(work)
    for ranks in SCALES:
        try:
            plan = make_plan(work, ranks, head_memory(work, ranks, memory_gb, fsdp))
        except UserError:
            table.add_row(str(ranks), "does not fit")
            continue
        heads = HEAD_BYTES * _held(plan, work.head_params_T.astype(np.float64)).max()
        total = sum(flow.sent(ranks) for flow in flows(plan, work, fsdp).values())
        cells = (f"{plan.imbalance:.2f}", str(len(plan.hot)), _size(heads), _size(total), _ratio(total, whole.sent(ranks)))
        table.add_row(str(ranks), plan.mode, *cells)
    return table


def _size(value: float) -> str:
    """Bytes with three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            break
        value /= 1000
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"


def _ratio(value: float, whole: float) -> str:
    return f"{value / whole:.1%}" if whole else "-"

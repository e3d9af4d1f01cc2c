"""`mtrain bench scale`: a step on several processes, against DDP of everything: time, bytes sent, memory of the heads.

The trainer's own step (trunk in DDP, heads at their owners) and one module of the same trunk and all heads in DDP, with dense
fused AdamW, take turns in the same processes, on the same rows, and must begin with the same loss. One process has one CPU
thread or one GPU. Bytes are counted, not computed: the payloads of all collectives of the step, those of DDP by a communication
hook; `wire` is what a rank then sends if each is a ring (`mtrain.parallel.plan.wire_bytes`; gloo's own reduce-scatter sends
twice that). Barriers around each timed step make its time that of the slowest rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mtrain.bench.cases import cases_named
from mtrain.config import Config, check_config
from mtrain.data.batch import Batch, Grid
from mtrain.data.prepare import prepare, read_source
from mtrain.errors import UserError
from mtrain.model.heads import HeadBank
from mtrain.model.trunks import SharedModel, shared_network
from mtrain.parallel.plan import Collective, wire_bytes
from mtrain.parallel.shard import Shard
from mtrain.parallel.world import World, count_gradients
from mtrain.parallel.wrap import make_accelerator
from mtrain.train.loop import Trainer, build_bank, build_loader
from mtrain.train.run_dir import RunDir
from mtrain.train.step import Totals, count
from mtrain.train.stop import leave
from mtrain.train.tracker import NoTracker

COLLECTIVES: dict[str, Collective] = {
    "gradients": "all-reduce", "all_reduce": "all-reduce", "control": "all-reduce", "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter", "all_to_all": "all-to-all",
}  # fmt: skip
"""What `World.sent` counts."""
LARGE = "large"  # the name of the task with most rows


@dataclass(frozen=True)
class Case:
    """`share` of the rows belong to one task, 0: all tasks have as many; of so many `classes`, 1: it is a regression too."""

    name: str
    layout: str
    share: float = 0.0
    classes: int = 1
    tasks: int = 1000
    width: int = 512
    layers: int = 4
    hidden: int = 64
    batch: int = 1024
    rows: int = 20_000
    steps: int = 7


CASES = [
    Case("routed", "routed"),
    Case("hot", "routed", share=0.7),
    Case("exchange", "routed", share=0.7, classes=4000),
    Case("grid", "grid", rows=2048, steps=3),
]


def make_table(case: Case) -> pa.Table:
    """Random inputs and labels; half of a grid's labels are missing."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((case.rows, case.width), dtype=np.float32)
    columns: dict[str, Any] = {"x": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), case.width)}
    if case.layout == "grid":
        for t in range(case.tasks):
            columns[f"task {t}"] = pa.array(generator.standard_normal(case.rows), mask=generator.random(case.rows) < 0.5)
        return pa.table(columns)
    names = np.array([LARGE, *(f"task {t}" for t in range(1, case.tasks))], dtype=object)
    large = round(case.share * case.rows)
    rest = np.arange(case.rows - large)
    task = np.concatenate([np.zeros(large, dtype=np.int64), rest % (case.tasks - 1) + 1 if large else rest % case.tasks])
    y = generator.standard_normal(case.rows)
    if case.classes > 1:
        y[task == 0] = np.arange(large) % case.classes
    return pa.table(columns | {"task": pa.array(names[task]), "y": y})


def make_config(case: Case, path: Path) -> Config:
    data = {"path": str(path), "layout": case.layout}
    if case.layout == "routed":
        data |= {"task": "task", "label": "y"}
    kinds = {LARGE: {"kind": "multiclass"}} if case.classes > 1 else {}
    tree = {
        "data": data,
        "inputs": {"x": "Array"},
        "tasks": {"kind": "regression", "by_name": kinds},
        "split": {"parts": {"train": 1.0}},
        "model": {
            "trunk": {"class_path": "MLP", "init_args": {"widths": [case.width] * case.layers}},
            "head": {"hidden": [case.hidden]},
        },
        "objective": {"scale": "none"},
        "train": {"global_batch": case.batch, "epochs": 1},
        "tracker": "none",
    }
    if case.layout == "routed":
        tree["sampler"] = "Proportional"
    return check_config(tree, "bench scale")


class Everything(nn.Module):
    """Trunk and all heads as one module, which gives the sum of a batch's losses."""

    def __init__(self, shared: SharedModel, bank: HeadBank, large: int | None):
        super().__init__()
        self.shared, self.bank, self.large = shared, bank, large

    def forward(self, batch: Batch) -> Tensor:
        z_BD, labels = self.shared(batch.x_BF), batch.labels
        if isinstance(labels, Grid):
            missing = labels.y_BT.isnan()
            loss = (self.bank(z_BD)[..., 0] - labels.y_BT.masked_fill(missing, 0)) ** 2
            return loss.masked_fill(missing, 0).sum()
        logits_BO = self.bank(z_BD, labels.task_P)
        if self.large is None:
            return ((logits_BO[:, 0] - labels.y_P) ** 2).sum()
        is_large = labels.task_P == self.large
        loss = ((logits_BO[:, 0] - labels.y_P)[~is_large] ** 2).sum()
        return loss + F.cross_entropy(logits_BO[is_large], labels.y_P[is_large].long(), reduction="sum")


def num_bytes(parameters: Iterable[Tensor], *optimizers: torch.optim.Optimizer) -> int:
    """Of parameters, and of what optimizers keep for them."""
    held = list(parameters)
    for optimizer in optimizers:
        held += [value for p in held for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in held)


class Contender:
    """A step, what it sent, and what it holds of heads; `step(number)` returns its loss, of all rows."""

    def __init__(self, step: Callable[[int], Tensor], sent: Counter[str], head_bytes: Callable[[], int]):
        self.step, self.sent, self.head_bytes = step, sent, head_bytes
        self.seconds: list[float] = []


def make_contenders(case: Case, path: Path) -> tuple[Trainer, Contender, Contender]:
    """The trainer, its step, and the same by DDP of everything."""
    config = make_config(case, path)
    accelerator = make_accelerator(config)
    device, world = accelerator.device, World(accelerator.device)
    data = world.together(lambda: prepare(read_source(config), 0))
    trainer = Trainer(data, config, RunDir(path.parent / "run", 1, world), accelerator, world, NoTracker(), Console(quiet=True))
    if isinstance(trainer.stepper.model, DistributedDataParallel):
        count_gradients(trainer.stepper.model, world.sent)
    loader = build_loader(data, config, data.parts["train"], device, trainer.shard)
    head_optimizer = trainer.head_optimizer
    assert head_optimizer is not None

    def ours(number: int) -> Tensor:
        totals, batch = Totals(len(data.tasks), device), loader.batch(number)
        num_labels, num_rows, *_ = map(int, world.sum_numbers(*count(batch), False, False))  # as the trainer
        trainer.stepper(batch, number, totals, num_labels, num_rows)
        return totals.loss

    sent: Counter[str] = Counter()
    shared = shared_network(config, data.widths, data.tasks.names)
    bank = build_bank(data.tasks, config, shared)
    everything = Everything(shared, bank, data.tasks.names.index(LARGE) if case.classes > 1 else None).to(device)
    model: nn.Module = everything
    if world.size > 1:
        model = DistributedDataParallel(everything, [device.index] if device.type == "cuda" else None)
        count_gradients(model, sent)
    train = config.train
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True
    )
    dealt = build_loader(data, config, data.parts["train"], device, Shard.replicated(world, data.tasks.names))

    def plain(number: int) -> Tensor:
        (batch,) = dealt.batch(number)
        share = torch.tensor(count([batch])[0], device=device)  # of the labels
        if world.size > 1:
            sent["all_reduce"] += share.nbytes
            dist.all_reduce(share)
        loss = model(batch.to(device)) / share
        (loss * world.size).backward()  # DDP averages
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return (
        trainer,
        Contender(ours, world.sent, lambda: num_bytes(trainer.bank.parameters(), head_optimizer)),
        Contender(plain, sent, lambda: num_bytes(bank.parameters(), optimizer)),
    )


def check_sent(case: Case, sent: dict[str, float], trunk: float, head: float) -> None:
    """That no gradient of a head is among what a step sends: the gradients in DDP have the trunk's bytes, and all that is
    sent beside them together has less than a head's."""
    gradients = sent["gradients"]
    rest = sum(sent.values()) - gradients
    if gradients != trunk or rest >= head:
        raise AssertionError(
            f"{case.name}: DDP sends {gradients:.0f} bytes of gradients, where the trunk has {trunk:.0f}; the rest is "
            f"{rest:.0f} bytes, where a head's gradient has {head:.0f}"
        )


def per_step(of_ranks: Sequence[tuple[Counter[str], int]], steps: int) -> dict[str, float]:
    """Bytes of a step, on average over ranks."""
    total = sum((sent for sent, _ in of_ranks), Counter[str]())
    return {what: payload / len(of_ranks) / steps for what, payload in total.items()}


def measure(case: Case, path: Path) -> dict[str, Any]:
    """One case on the processes that there are; every one of them calls this."""
    trainer, ours, plain = make_contenders(case, path)
    world, device = trainer.world, trainer.accelerator.device

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if world.size > 1:
            dist.barrier()

    first = [float(contender.step(0)) for contender in (ours, plain)]
    first[1] = sum(world.gather_objects(first[1]))
    if abs(first[0] - first[1]) > 1e-4 * first[1]:
        raise AssertionError(f"{case.name}: the first loss is {first[0]}, of DDP of everything {first[1]}")
    for contender in (ours, plain):
        contender.sent.clear()
    for number in range(1, case.steps + 1):
        for contender in (ours, plain):
            wait()
            start = time.perf_counter()
            contender.step(number)
            wait()
            contender.seconds.append(time.perf_counter() - start)
    totals = [(contender.sent, contender.head_bytes()) for contender in (ours, plain)]
    of_ranks, of_ranks_plain = zip(*world.gather_objects(totals), strict=True)
    sent, sent_plain = per_step(of_ranks, case.steps), per_step(of_ranks_plain, case.steps)
    mode = "hot" if len(trainer.plan.hot) else trainer.plan.mode
    if mode == "owners" and world.size > 1:
        check_sent(case, sent, 4 * trainer.work.trunk_trained, 4 * int(trainer.work.head_params_T.min()))

    def wire(sent: dict[str, float]) -> float:
        return sum(wire_bytes(COLLECTIVES[what], payload, world.size) for what, payload in sent.items())

    return {
        "bench": "scale",
        "case": case.name,
        "ranks": world.size,
        "device": device.type,
        "mode": mode if world.size > 1 else None,
        "step_ms": median(ours.seconds) * 1e3,
        "step_ms_ddp": median(plain.seconds) * 1e3,
        "wire_mb": wire(sent) / 1e6,
        "wire_mb_ddp": wire(sent_plain) / 1e6,
        "wire_over_ddp": wire(sent) / wire(sent_plain) if world.size > 1 else None,
        "head_mb_per_rank": max(held for _, held in of_ranks) / 1e6,
        "head_mb_per_rank_ddp": max(held for _, held in of_ranks_plain) / 1e6,
        "collectives_mb": {what: payload / 1e6 for what, payload in sent.items()},
    }


def launch(ranks: int, cases: Sequence[Case], folder: Path) -> list[dict[str, Any]]:
    """Measure on so many processes of this machine."""
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    apart = {name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_")) or name in ("RANK", "WORLD_SIZE")}
    env = {name: value for name, value in os.environ.items() if name not in apart}
    env |= {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, *command, "-m", "mtrain.bench.scale", str(folder)], env=env)
    if done.returncode:
        raise UserError(f"bench scale on {ranks} processes ended with status {done.returncode}; its error stands above")
    return json.loads((folder / "found.json").read_text())


def run(json_path: Path | None = None, cases: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure the named cases (default: all) on 1 and 2 processes, or on 1 to all GPUs; print a table, write `json_path`.

    One dict a case and number of processes: times in milliseconds, bytes that each rank sends a step and holds of heads
    (parameters and moments) in MB, `_ddp` those of DDP of everything; `collectives_mb` are payloads, of what is reduced,
    gathered, scattered or handed in.
    """
    chosen, results = cases_named(CASES, cases), []
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen:
            pq.write_table(make_table(case), Path(folder) / f"{case.name}.parquet")
        most = torch.cuda.device_count() if torch.cuda.is_available() else 2
        for ranks in range(1, most + 1):
            results += launch(ranks, chosen, Path(folder))
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)
    return results


def print_table(results: Sequence[dict[str, Any]]) -> None:
    columns = {
        "case": "case", "ranks": "ranks", "mode": "mode", "step_ms": "step, ms", "step_ms_ddp": "of DDP", "wire_mb": "sent, MB",
        "wire_mb_ddp": "by DDP", "wire_over_ddp": "ratio", "head_mb_per_rank": "heads, MB", "head_mb_per_rank_ddp": "of DDP",
    }  # fmt: skip
    table = Table(title=f"a step on several processes ({results[0]['device']})", padding=0)
    for title in columns.values():
        table.add_column(title.replace(", ", "\n"), no_wrap=True)
    for result in results:
        values = [result[key] for key in columns]
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else "" if v is None else str(v) for v in values))
    Console().print(table)


def _work(folder: Path) -> None:
    """What `launch` starts: all cases, on the processes that there are."""
    torch.set_num_threads(1)
    results = []
    for tree in json.loads((folder / "cases.json").read_text()):
        case = Case(**tree)
        results.append(measure(case, folder / f"{case.name}.parquet"))
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / "found.json").write_text(json.dumps(results))
    leave(0, together=True)


if __name__ == "__main__":
    _work(Path(sys.argv[1]))

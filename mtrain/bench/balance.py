"""`mtrain bench balance`: what each balancing method adds to a step, and what a backward for each task would cost.

The trainer's own step on random data, one trainer a method, taking turns; medians in one run. `overhead` is a method's step
over that of `equal`, less 1, and `statistics` the part of it that is not the balancer. `naive_ratio` is the time of a backward
for each task down to the neck only (timed on a sample of tasks and scaled) over the time that the method adds. `weights_ms` is
the balancer alone, from ready statistics to weights, and `torchjd_ms` TorchJD's time for the same from the same Gram matrix,
where it is installed (null where it takes longer than `PEER_LIMIT` seconds).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from mtrain.balance import BALANCERS
from mtrain.balance.base import Balancer, Seen
from mtrain.bench.cases import cases_named
from mtrain.bench.scale import Case, make_config, make_table
from mtrain.bench.trainers import make_trainer, time_steps, wait
from mtrain.config import check_config
from mtrain.data.loader import Loader
from mtrain.data.prepare import Prepared, prepare, read_source
from mtrain.train.loop import Trainer
from mtrain.train.objective import pieces, routes

SAMPLE = 10  # tasks whose backward is timed
PEER_LIMIT = 20.0  # seconds
PEERS = {
    "mgda": "MGDA()", "pcgrad": "PCGrad()", "gradvac": "GradVac()", "cagrad": "CAGrad(c=0.5)", "fairgrad": "FairGrad()",
    "imtl_g": "IMTLG()", "aligned": "AlignedMTL()", "upgrad": "UPGrad()",
}  # fmt: skip
PEER = """
import sys, time, torch, torchjd.aggregation as peer
gram = torch.load(sys.argv[1])
weighting = eval("peer." + sys.argv[2]).gramian_weighting
start = time.perf_counter()
weighting(gram)
print((time.perf_counter() - start) * 1e3)
"""


@dataclass(frozen=True)
class Setting:
    name: str
    case: Case
    hidden: list[int]


CASES = [
    Setting("routed", Case("routed", "routed", steps=7), []),
    Setting("grid-linear", Case("grid", "grid", rows=2048, steps=5), []),
    Setting("grid-hidden", Case("grid", "grid", rows=2048, steps=5), [16]),
]


class Timed(Balancer):
    """A balancer, and the seconds of each of its calls."""

    def __init__(self, inner: Balancer):
        self.inner = inner
        self.seconds: list[float] = []
        self.gram_AA: torch.Tensor | None = None
        self.needs, self.second_forward = inner.needs, inner.second_forward  # type: ignore[misc]
        self.weighs_heads = inner.weighs_heads  # type: ignore[misc]

    def weights(self, seen: Seen) -> torch.Tensor:
        start = time.perf_counter()
        found = self.inner.weights(seen)
        wait(found.device)
        self.seconds.append(time.perf_counter() - start)
        self.gram_AA = seen.gram_AA
        return found

    def after(self, seen: Seen) -> None:
        self.inner.after(seen)


def make_contender(setting: Setting, data: Prepared, method: str, path: Path) -> tuple[Trainer, Loader, Timed]:
    base = make_config(setting.case, path).model_dump(mode="json")
    base["model"] |= {"neck": setting.case.width, "head": {"hidden": setting.hidden}}
    base["objective"]["balancer"] = method
    trainer, loader = make_trainer(check_config(base, "bench balance"), data, path.parent / "run")
    bounded = trainer.stepper.balancing.balancer
    bounded.balancer = timed = Timed(bounded.balancer)
    return trainer, loader, timed


def naive(trainer: Trainer, loader: Loader) -> float:
    """Seconds of a backward for each task from its loss to the neck, scaled from a sample."""
    (batch,) = loader.batch(0)
    needed = routes(trainer.bank, batch.labels)
    device = trainer.accelerator.device
    batch = batch.to(device)
    neck = trainer.shared.linear_neck
    assert neck is not None
    with torch.no_grad():
        h_BD = trainer.shared.trunk(batch.x_BF)
    found = list(pieces(trainer.bank, neck(h_BD), batch.labels, needed))
    sums = [(piece, piece.sum(trainer.objective.losses(piece))) for piece in found]
    sum_A = sums[0][1]
    seconds = []
    for a in range(SAMPLE):
        wait(device)
        start = time.perf_counter()
        torch.autograd.grad(sum_A[a], list(neck.parameters()), retain_graph=True)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds) * sum(len(piece.task_A) for piece, _ in sums)


def peer_ms(method: str, gram_AA: torch.Tensor | None) -> float | None:
    """Milliseconds in which TorchJD finds weights from a Gram matrix."""
    if gram_AA is None or method not in PEERS or importlib.util.find_spec("torchjd") is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(gram_AA.cpu(), file.name)
        command = [sys.executable, "-W", "ignore", "-c", PEER, file.name, PEERS[method]]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_LIMIT)
        except subprocess.TimeoutExpired:
            return None
    return float(done.stdout) if done.returncode == 0 else None


def measure(setting: Setting, methods: Sequence[str], path: Path) -> list[dict[str, Any]]:
    source = read_source(make_config(setting.case, path))
    data = prepare(source, 0)
    contenders, timed = {}, {}
    for method in dict.fromkeys(["equal", *methods]):
        trainer, loader, timed[method] = make_contender(setting, data, method, path)
        contenders[method] = trainer, loader
    naive_seconds = naive(*contenders["equal"])
    seconds = time_steps(contenders, setting.case.steps)
    results = []
    for method in contenders:
        extras = [mine - plain for mine, plain in zip(seconds[method], seconds["equal"], strict=True)]
        own = timed[method].seconds[-len(extras) :]
        extra, collecting = median(extras), median(e - alone for e, alone in zip(extras, own, strict=True))
        trainer = contenders[method][0]
        gradients, alone = trainer.stepper.balancing.gradients, median(own)
        results.append(
            {
                "bench": "balance",
                "case": setting.name,
                "method": method,
                "device": trainer.accelerator.device.type,
                "step_ms": median(seconds[method]) * 1e3,
                "overhead": extra / median(seconds["equal"]),
                "statistics": None if gradients is None else collecting / median(seconds["equal"]),
                "naive_ratio": naive_seconds / extra if gradients is not None and extra > 0 else None,
                "weights_ms": alone * 1e3,
                "torchjd_ms": peer_ms(method, timed[method].gram_AA),
                "gram_error": None if gradients is None else gradients.error,
            }
        )
    return results


def run(json_path: Path | None = None, cases: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure all methods in the named cases (default: all); print a table, write `json_path`."""
    results = []
    for setting in cases_named(CASES, cases):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "table.parquet"
            pq.write_table(make_table(setting.case), path)
            methods = [method for method in BALANCERS if method != "static"]  # needs weights by task
            results += measure(setting, methods, path)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)
    return results


def print_table(results: Sequence[dict[str, Any]]) -> None:
    table = Table(title=f"balancing, 1000 tasks ({results[0]['device']})", box=None)
    for title in ("case", "method", "step, ms", "added", "statistics", "naive / added", "weights, ms", "TorchJD, ms"):
        table.add_column(title, justify="left" if title in ("case", "method") else "right", no_wrap=True)
    for result in results:
        ratio = "" if result["naive_ratio"] is None else f"{result['naive_ratio']:,.0f}x"
        statistics = "" if result["statistics"] is None else f"{result['statistics']:.1%}"
        peer = "" if result["torchjd_ms"] is None else f"{result['torchjd_ms']:,.0f}"
        numbers = (
            f"{result['step_ms']:.0f}",
            f"{result['overhead']:.1%}",
            statistics,
            ratio,
            f"{result['weights_ms']:.2f}",
            peer,
        )
        table.add_row(result["case"], result["method"], *numbers)
    Console(width=None if sys.stdout.isatty() else 140).print(table)

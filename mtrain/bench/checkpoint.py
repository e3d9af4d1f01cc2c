"""`mtrain bench checkpoint`: how long saving keeps a training waiting, against a plain copy of the same tensors.

The state is a trunk and the heads of a thousand tasks, with both optimizers' moments. `memcpy_ms` copies it into tensors that
are there already, `block_ms` is `Checkpoints.save` (to an emptied queue); the two take turns and their medians are compared.
`slowdown` compares steps (matrix products) from the return of `save` until the checkpoint is complete, with the last part of
it that is done between steps, to steps with nothing else going on. `save_s` is from `save` to complete and synced with nothing
else going on; `restore_s` is from nothing known to tensors filled, checksums included (files are in the page cache by then).
On CUDA the state is there, the copies go to pinned memory and the times include waiting for the device. The files go to the
folder for temporary files (`TMPDIR`).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mtrain.bench.cases import cases_named
from mtrain.errors import UserError
from mtrain.train.checkpoint import Checkpoints, Snapshot, Stacks


@dataclass(frozen=True)
class Case:
    """A trunk of `layers` square linear layers and heads with one hidden layer."""

    name: str
    layers: int
    width: int
    tasks: int
    features: int
    hidden: int
    outputs: int
    repeats: int


CASES = [
    Case("4mb", layers=1, width=256, tasks=1000, features=64, hidden=4, outputs=1, repeats=30),
    Case("400mb", layers=2, width=2048, tasks=1000, features=512, hidden=48, outputs=4, repeats=7),
]
STEP_ROWS, STEP_WIDTH = 256, 512


def make_snapshot(case: Case, device: torch.device) -> Snapshot:
    def with_moments(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        names = {name + suffix: shape for name, shape in shapes.items() for suffix in ("", ".exp_avg", ".exp_avg_sq")}
        return {name: torch.randn(shape, device=device) for name, shape in names.items()}

    trunk: dict[str, tuple[int, ...]] = {}
    for layer in range(case.layers):
        trunk |= {f"trunk.{layer}.weight": (case.width, case.width), f"trunk.{layer}.bias": (case.width,)}
    heads: dict[str, tuple[int, ...]] = {}
    for layer, (d_in, out) in enumerate([(case.features, case.hidden), (case.hidden, case.outputs)]):
        heads |= {f"weights.{layer}": (case.tasks, out, d_in), f"biases.{layer}": (case.tasks, out)}
    names = [f"task {t}" for t in range(case.tasks)]
    state = {"lr": 1e-3, "cursors": dict.fromkeys(names, 0), "weight_T": torch.ones(case.tasks, device=device)}
    return Snapshot(with_moments(trunk), [Stacks(names, [case.outputs] * case.tasks, with_moments(heads))], state)


def tensors_of(snapshot: Snapshot) -> list[Tensor]:
    return [*snapshot.tensors.values(), *(tensor for stacks in snapshot.heads for tensor in stacks.tensors.values())]


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def make_step(device: torch.device) -> Callable[[], None]:
    """Forward and backward of two linear layers."""
    x = torch.randn(STEP_ROWS, STEP_WIDTH, device=device)
    weights = [torch.randn(STEP_WIDTH, STEP_WIDTH, device=device, requires_grad=True) for _ in range(2)]

    def step() -> None:
        loss = (torch.relu(x @ weights[0]) @ weights[1]).square().mean()
        torch.autograd.grad(loss, weights)

    return step


def measure(case: Case, folder: Path, device: torch.device) -> dict[str, Any]:
    snapshot, step = make_snapshot(case, device), make_step(device)
    tensors = tensors_of(snapshot)
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda") for tensor in tensors]
    checkpoints = Checkpoints(folder)
    number = 0

    def copy() -> None:
        for into, tensor in zip(copies, tensors, strict=True):
            into.copy_(tensor, non_blocking=True)

    def save() -> None:
        nonlocal number
        number += 1
        checkpoints.save(number, snapshot, {"phase": "fit"})

    def finish() -> None:
        if (failure := checkpoints.finish()) is not None:
            raise UserError(failure)

    def restore() -> None:
        fresh = make_snapshot(case, device)
        start = time.perf_counter()
        saved = Checkpoints(folder).newest()
        assert saved is not None
        saved.copy_into(fresh.tensors)
        saved.copy_heads(fresh.heads)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        restores.append(time.perf_counter() - start)
        if not all(map(torch.equal, tensors_of(fresh), tensors)):
            raise AssertionError("what was restored is not what was saved")

    restores: list[float] = []
    blocks, memcpys, saves, slow = [], [], [], []
    copy()
    save()  # memory is taken by the first
    finish()
    for _ in range(case.repeats):
        memcpys.append(_seconds(copy, device))
        blocks.append(_seconds(save, device))
        saves.append(blocks[-1] + _seconds(finish, device))
    for _ in range(5):
        _seconds(step, device)
    for _ in range(case.repeats):
        save()
        start, steps = time.perf_counter(), 0
        while checkpoints.writing or not steps:
            _seconds(step, device)
            steps += 1
        finish()
        busy = time.perf_counter() - start
        slow.append(busy / sum(_seconds(step, device) for _ in range(steps)))
    for _ in range(3):
        restore()
    block, memcpy = median(blocks), median(memcpys)
    return {
        "bench": "checkpoint",
        "case": case.name,
        "mb": sum(tensor.nbytes for tensor in tensors) / 1e6,
        "block_ms": block * 1e3,
        "memcpy_ms": memcpy * 1e3,
        "block_over_memcpy": block / memcpy,
        "slowdown": median(slow),
        "save_s": median(saves),
        "restore_s": median(restores),
    }


def run(json_path: Path | None = None, cases: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure the named cases (default: all), print a table, write `json_path`; one dict a case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for case in cases_named(CASES, cases):
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(case, Path(folder), device))
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    table = Table(title=f"checkpoints ({device.type})", padding=0)
    for key in results[0]:
        if key != "bench":
            table.add_column(key.replace("_", "\n"), justify="right", no_wrap=True)
    for result in results:
        table.add_row(*(v if isinstance(v, str) else f"{v:.4g}" for k, v in result.items() if k != "bench"))
    Console().print(table)
    return results

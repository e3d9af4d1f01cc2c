"""Whole head steps (forward, loss, backward to heads and features, AdamW) of a bank against a loop over modules.

`loop_ms` is an `nn.ModuleList` with fused AdamW, `loop_default_ms` with the default AdamW, `vmap_ms` is
`torch.func.vmap` over stacked heads with fused AdamW, `compile_ms` is `torch.compile` of the loop, `gemm_ms` three
plain GEMMs (forward, weight gradient, input gradient) of the heads' flops. All run in turn within one process and the
medians of their times are compared; before that losses, gradients and stepped weights of bank and loop must agree.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from mtrain.bench.cases import cases_named
from mtrain.model.heads import HeadBank
from mtrain.train.optim import HeadAdamW, HeadUpdate

COMPILE_LIMIT_S = 120.0
ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}


@dataclass(frozen=True)
class Case:
    """`batch` rows, read by every head, or where `routed` each by one of `active` tasks (None: by any)."""

    name: str
    tasks: int
    features: int
    hidden: int
    batch: int
    outputs: tuple[int, ...]  # in turn
    routed: bool = False
    active: int | None = None
    rivals: bool = True
    compiled: bool = False


CASES = [
    Case("grid-1000x64", 1000, 64, 16, 64, (1,), compiled=True),
    Case("grid-1000x256", 1000, 256, 32, 128, (4,)),
    Case("routed-1000x256", 1000, 256, 32, 1024, (4,), routed=True),
    Case("ragged-1000x256", 1000, 256, 32, 128, tuple(range(1, 11))),
    Case("scale-1000", 1000, 256, 32, 1024, (4,), routed=True, active=512, rivals=False),
    Case("scale-10000", 10_000, 256, 32, 1024, (4,), routed=True, active=512, rivals=False),
]


class BankStep:
    """A head bank and its optimizer, stepped as the trainer steps them."""

    def __init__(self, bank: HeadBank):
        self.bank, self.optimizer = bank, HeadAdamW(bank, **ADAMW)

    def __call__(self, z_BD: Tensor, target: Tensor, task_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss and gradient at z. `target` is `[B, T, O]` of every head or `[B, O]` of each row's own, 0 where padded."""
        pieces: list[tuple[int, list[Tensor], Tensor | None]] = []
        losses = []
        if task_B is None:
            for number, group in enumerate(self.bank.groups):
                pieces.append((number, list(group.parameters()), None))
                own = target if len(self.bank.groups) == 1 else target[:, group.task_ids, : group.outputs]
                losses.append(F.mse_loss(group.grid(z_BD, pieces[-1][1]), own, reduction="sum"))
        else:
            for route in self.bank.route(task_B):
                group = self.bank.groups[route.group]
                pieces.append((route.group, group.gather(route.active_A), route.active_A))
                logits_PO = group.routed(z_BD, route, pieces[-1][1])
                own = target[route.label_P, : group.outputs]
                losses.append(F.mse_loss(logits_PO, own, reduction="sum"))
        loss = torch.stack(losses).sum() / len(z_BD)
        grad_z, *grads = torch.autograd.grad(loss, [z_BD, *(p for _, params, _ in pieces for p in params)])
        rest = iter(grads)
        updates = [HeadUpdate(number, [next(rest) for _ in params], active) for number, params, active in pieces]
        self.optimizer.step(updates)
        return loss, grad_z


class LoopStep:
    """The same heads as an `nn.ModuleList`; `options` go to `torch.optim.AdamW`."""

    def __init__(self, heads: nn.ModuleList, **options: Any):
        self.heads, self.optimizer = heads, torch.optim.AdamW(heads.parameters(), **ADAMW, **options)
        self.ragged = len({p.shape for head in heads for p in list(head.parameters())[-1:]}) > 1

    def loss(self, z_BD: Tensor, target: Tensor, task_B: Tensor | None) -> Tensor:
        if task_B is None:
            outputs = [head(z_BD) for head in self.heads]
            if self.ragged:
                outputs = [F.pad(output, (0, target.shape[2] - output.shape[1])) for output in outputs]
            return F.mse_loss(torch.stack(outputs, 1), target, reduction="sum") / len(z_BD)
        order_B = torch.argsort(task_B)
        active_A, counts_A = torch.unique(task_B, return_counts=True)
        rows = z_BD[order_B].split(counts_A.tolist())
        outputs = [self.heads[task](row) for task, row in zip(active_A.tolist(), rows, strict=True)]
        return F.mse_loss(torch.cat(outputs), target[order_B], reduction="sum") / len(z_BD)

    def __call__(self, z_BD: Tensor, target: Tensor, task_B: Tensor | None) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        z_BD.grad = None
        loss = self.loss(z_BD, target, task_B)
        loss.backward()
        self.optimizer.step()
        assert z_BD.grad is not None
        return loss, z_BD.grad


class VmapStep(LoopStep):
    """The same heads stacked by `torch.func.stack_module_state` and run by `vmap`: equal shapes and the grid only."""

    def __init__(self, heads: nn.ModuleList):
        self.stacks, _ = torch.func.stack_module_state(list(heads))
        self.heads = heads
        self.optimizer = torch.optim.AdamW(self.stacks.values(), **ADAMW, fused=True)

    def loss(self, z_BD: Tensor, target: Tensor, task_B: Tensor | None) -> Tensor:
        def one(stacks: dict[str, Tensor], z: Tensor) -> Tensor:
            return torch.func.functional_call(self.heads[0], stacks, (z,))

        outputs_TBO = torch.func.vmap(one, in_dims=(0, None))(self.stacks, z_BD)
        return F.mse_loss(outputs_TBO.transpose(0, 1), target, reduction="sum") / len(z_BD)


def make_bank(case: Case) -> HeadBank:
    outputs = [case.outputs[t % len(case.outputs)] for t in range(case.tasks)]
    return HeadBank([f"task{t}" for t in range(case.tasks)], outputs, case.features, hidden=(case.hidden,))


def make_heads(bank: HeadBank) -> nn.ModuleList:
    return nn.ModuleList(bank.to_modules().values())


def make_batches(case: Case, bank: HeadBank, count: int = 4) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """`(z, target, task_B)`; targets of outputs that a task has not are 0."""
    generator = torch.Generator().manual_seed(0)
    real_TO = torch.arange(max(bank.outputs)) < torch.tensor(bank.outputs)[:, None]
    batches = []
    for _ in range(count):
        z_BD = torch.randn(case.batch, case.features, generator=generator).requires_grad_()
        task_B = None
        if case.routed:
            task_B = torch.randint(case.tasks, (case.batch,), generator=generator)
            if case.active is not None:
                active_A = torch.randperm(case.tasks, generator=generator)[: case.active]
                task_B = active_A.repeat(case.batch // case.active)
        shape = (case.batch, *(real_TO.shape if task_B is None else real_TO.shape[1:]))
        target = torch.randn(shape, generator=generator) * (real_TO if task_B is None else real_TO[task_B])
        batches.append((z_BD, target, task_B))
    return batches


def check(case: Case) -> None:
    """Two steps of bank and loop in float64: losses, gradients at z and the weights after them agree."""
    bank = make_bank(case).double()
    loop = LoopStep(make_heads(bank), fused=True)
    step = BankStep(bank)
    for z, target, task_B in make_batches(case, bank, 2):
        z, target = z.detach().double().requires_grad_(), target.double()
        for ours, theirs in zip(step(z, target, task_B), loop(z, target, task_B), strict=True):
            torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(make_heads(bank).parameters(), loop.heads.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def gemms(case: Case, bank: HeadBank) -> Callable[[], None]:
    """Three plain GEMMs with the flops of the heads' forward, weight gradient and input gradient on the grid."""
    width = sum(case.features * case.hidden + case.hidden * o for o in bank.outputs) // case.features
    z_BD, weight = torch.randn(case.batch, case.features), torch.randn(width, case.features)
    grad = torch.randn(case.batch, width)

    def run() -> None:
        z_BD @ weight.t()
        grad.t() @ z_BD
        grad @ weight

    return run


def measure(contenders: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each. They take turns, a fast one several times a turn (up to a tenth of a second)."""
    runs = {}
    for name, run in contenders.items():
        run()
        start = time.perf_counter()
        run()
        runs[name] = min(10, max(1, int(0.1 / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            for _ in range(runs[name]):
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(values) for name, values in times.items()}


def stepper(step: Callable[..., Any], batches: Sequence[tuple[Any, ...]]) -> Callable[[], None]:
    """Runs `step` on the batches in turn."""
    turn = 0

    def run() -> None:
        nonlocal turn
        step(*batches[turn % len(batches)])
        turn += 1

    return run


def contenders(case: Case) -> dict[str, Callable[[], None]]:
    bank = make_bank(case)
    batches = make_batches(case, bank)
    found = {"bank_ms": stepper(BankStep(bank), batches)}
    if case.rivals:
        found["loop_ms"] = stepper(LoopStep(make_heads(bank), fused=True), batches)
        found["loop_default_ms"] = stepper(LoopStep(make_heads(bank)), batches)
        if not case.routed:
            found["gemm_ms"] = gemms(case, bank)
            if len(set(bank.outputs)) == 1:
                found["vmap_ms"] = stepper(VmapStep(make_heads(bank)), batches)
    return found


def compiled_loop_ms(case: Case, limit_s: float = COMPILE_LIMIT_S) -> float | None:
    """The compiled loop's step, in a process of its own; None where no compiler works or the limit is not enough."""
    command = [sys.executable, "-m", "mtrain.bench.heads", case.name]
    try:
        done = subprocess.run(command, timeout=limit_s, capture_output=True, text=True, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return None
    return float(done.stdout.split()[-1])


def _time_compiled_loop(case: Case) -> None:
    bank = make_bank(case)
    loop = LoopStep(make_heads(bank), fused=True)
    loop.loss = torch.compile(loop.loss)  # type: ignore[method-assign]
    print(measure({"compile_ms": stepper(loop, make_batches(case, bank))}, 5)["compile_ms"])


def run(json_path: Path | None = None, cases: Sequence[str] | None = None, repeats: int = 7) -> list[dict[str, Any]]:
    """Measure the named cases (default: all), print a table, write `json_path`; one dict a case, times in milliseconds.

    `speedup` is loop / bank, `over_gemm` bank / gemm, `over_scale_1000` of scale-10000 its time / that of scale-1000.
    """
    chosen = cases_named(CASES, cases)
    for case in chosen:
        if case.rivals:
            check(case)
    together = [case for case in chosen if not case.rivals]  # compared with each other: measured in turn
    results = []
    scale = measure({case.name: contenders(case)["bank_ms"] for case in together}, repeats) if together else {}
    for case in chosen:
        times = measure(contenders(case), repeats) if case.rivals else {"bank_ms": scale[case.name]}
        result: dict[str, Any] = {"bench": "heads", "case": case.name}
        for key in ("loop_ms", "loop_default_ms", "vmap_ms", "bank_ms", "gemm_ms"):
            result[key] = times.get(key)
        result["compile_ms"] = compiled_loop_ms(case) if case.compiled else None
        result["speedup"] = times["loop_ms"] / times["bank_ms"] if "loop_ms" in times else None
        result["over_gemm"] = times["bank_ms"] / times["gemm_ms"] if "gemm_ms" in times else None
        if case.name == "scale-10000" and "scale-1000" in scale:
            result["over_scale_1000"] = scale["scale-10000"] / scale["scale-1000"]
        results.append(result)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    columns = dict.fromkeys(key for result in results for key in result if key != "bench")
    table = Table(title="head steps, times in ms", padding=0)
    for key in columns:
        table.add_column(key.removesuffix("_ms").replace("_", "\n"), no_wrap=True)
    for result in results:
        values = [result.get(key) for key in columns]
        table.add_row(*(v if isinstance(v, str) else "" if v is None else f"{v:.4g}" for v in values))
    Console().print(table)
    return results


if __name__ == "__main__":
    _time_compiled_loop(next(case for case in CASES if case.name == sys.argv[1]))

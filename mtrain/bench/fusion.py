"""Training steps (forward, backward, AdamW) of many small encoders as one computation against a loop over them.

Both have the same values and fused AdamW; before they are measured, their features must agree to 1e-6 and their gradients to
1e-5. They run in turn within one process; medians are compared.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mtrain.bench.cases import cases_named
from mtrain.bench.heads import measure
from mtrain.model.dropout import row_keys
from mtrain.model.fusion import Stacked, keys_of, salts_of
from mtrain.model.trunks import MLP


@dataclass(frozen=True)
class Case:
    """So many encoders, each an MLP on its own `batch` rows of `features` numbers."""

    name: str
    encoders: int
    batch: int
    features: int
    widths: list[int]
    options: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("plain", 32, 32, 16, [32, 16]),
    Case("layer-norm", 32, 32, 16, [32, 16], {"norm": "layer"}),
    Case("batch-norm", 32, 32, 16, [32, 16], {"norm": "batch"}),
    Case("dropout", 32, 32, 16, [32, 16], {"dropout": 0.2}),
    Case("larger", 32, 128, 64, [64, 32]),
]


def compare(case: Case, repeats: int = 20) -> dict[str, float]:
    """Milliseconds of a step of both, and how many times as fast the one computation is."""
    torch.manual_seed(0)
    networks = nn.ModuleList(MLP(case.features, case.widths, **case.options) for _ in range(case.encoders))
    stacked = Stacked(copy.deepcopy(list(networks)))
    x_EBF = torch.randn(case.encoders, case.batch, case.features)
    keys_EB = keys_of(row_keys(0, 0, torch.arange(case.batch)), salts_of([str(e) for e in range(case.encoders)]))
    assert keys_EB is not None

    def loop() -> Tensor:
        return torch.stack([network(x_EBF[e], keys_EB[e]) for e, network in enumerate(networks)])

    def one() -> Tensor:
        return stacked(x_EBF, keys_EB)

    _check(networks, stacked, loop(), one())
    found = measure({"loop_ms": _stepper(loop, networks), "stacked_ms": _stepper(one, stacked)}, repeats)
    return found | {"speedup": found["loop_ms"] / found["stacked_ms"]}


def _stepper(forward: Callable[[], Tensor], module: nn.Module) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        forward().square().mean().backward()
        optimizer.step()

    return step


def _check(networks: nn.ModuleList, stacked: Stacked, expected: Tensor, found: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    for z in (found, expected):
        z.square().mean().backward()
    for name, place in stacked.places.items():
        if isinstance(stack := getattr(stacked, place), nn.Parameter):
            grads = [network.get_parameter(name).grad for network in networks]
            assert stack.grad is not None
            torch.testing.assert_close(list(stack.grad), grads, atol=1e-5, rtol=1e-5)


def run(json_path: Path | None = None, cases: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure the named cases (default: all), print a table, write `json_path`."""
    chosen = cases_named(CASES, cases)
    results: list[dict[str, Any]] = [{"bench": "fusion", "case": case.name, **compare(case)} for case in chosen]
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    table = Table("case", "encoders", "loop, ms", "one computation, ms", "times as fast", title="steps of small encoders")
    for case, result in zip(chosen, results, strict=True):
        numbers = [f"{result[key]:.3g}" for key in ("loop_ms", "stacked_ms", "speedup")]
        table.add_row(case.name, str(case.encoders), *numbers)
    Console().print(table)
    return results

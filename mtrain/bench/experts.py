"""`mtrain bench experts`: what experts with a gate for each task add to the step of a shared bottom.

The trainer's own step on random rows of 1000 tasks, optimizer included, one trainer a form of the model, taking turns; medians
in one run. Eight experts of widths 128-64 hold as many values as the shared bottom's 1024-64, and heads read 64 features in
every form. `over_shared` is a form's step over the shared bottom's.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from mtrain.bench.cases import cases_named
from mtrain.bench.scale import Case, make_config, make_table
from mtrain.bench.trainers import make_trainer, time_steps
from mtrain.config import check_config
from mtrain.data.prepare import prepare, read_source

EXPERTS, EXPERT, SHARED = 8, [128, 64], [1024, 64]
GATE = {"experts": "experts", "by": "gate"}


def _of_experts(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": {"expert": {"class_path": "MLP", "init_args": {"widths": EXPERT}}, **options}}


FORMS: dict[str, dict[str, Any]] = {
    "shared": {"trunk": {"class_path": "MLP", "init_args": {"widths": SHARED}}},
    "scale_shift": {"trunk": {"class_path": "MLP", "init_args": {"widths": SHARED}}, "head": {"scale_shift": True}},
    "mmoe": {"trunk": _of_experts("MMoE", experts=EXPERTS), "head": {"gate": GATE}},
    "cgc": {"trunk": _of_experts("CGC", groups=2, group_experts=2, shared_experts=EXPERTS - 4), "head": {"gate": GATE}},
}


@dataclass(frozen=True)
class Setting:
    """Heads of `hidden` widths; the gates read `features` numbers."""

    name: str
    features: int
    hidden: list[int]


SETTINGS = [
    Setting("linear-64", 64, []),
    Setting("linear-256", 256, []),
    Setting("hidden-64", 64, [16]),
    Setting("hidden-256", 256, [16]),
]


def measure(setting: Setting, path: Path, tasks: int = 1000, steps: int = 15) -> list[dict[str, Any]]:
    case = Case("routed", "routed", width=setting.features, tasks=tasks)
    pq.write_table(make_table(case), path)
    base = make_config(case, path).model_dump(mode="json")
    data = prepare(read_source(make_config(case, path)), 0)
    contenders = {}
    for form, model in FORMS.items():
        head = {"hidden": setting.hidden, **model.get("head", {})}
        config = check_config(base | {"model": {"trunk": model["trunk"], "head": head}}, "bench experts")
        contenders[form] = make_trainer(config, data, path.parent / form)
    seconds = time_steps(contenders, steps)
    return [
        {
            "bench": "experts",
            "case": setting.name,
            "form": form,
            "device": contenders[form][0].accelerator.device.type,
            "parameters": sum(p.numel() for p in contenders[form][0].shared.parameters()),
            "step_ms": median(times) * 1e3,
            "over_shared": median(mine / plain for mine, plain in zip(times, seconds["shared"], strict=True)),
        }
        for form, times in seconds.items()
    ]


def run(json_path: Path | None = None, cases: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure all forms in the named cases (default: all); print a table, write `json_path`."""
    results = []
    for setting in cases_named(SETTINGS, cases):
        with tempfile.TemporaryDirectory() as folder:
            results += measure(setting, Path(folder) / "table.parquet")
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    table = Table("case", "form", "values in the trunk", "step, ms", "over shared", title="experts, 1000 tasks, routed")
    for result in results:
        over = f"{result['over_shared']:.2f}x"
        table.add_row(result["case"], result["form"], f"{result['parameters']:,}", f"{result['step_ms']:.1f}", over)
    Console().print(table)
    return results

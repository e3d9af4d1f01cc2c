"""`mtrain bench study`: do balancers help? `equal` against five methods on three public data sets, with the same tuning effort.

Each method gets the same model, splits and number of trials: those of `TRIALS` on the first split, of which the best on the
validation part is kept; then every split is trained with it and its test part scored. `difference` is the mean over
splits of the difference to `equal` on the same split, with a 95 % interval of Student's t; `better` the share of tasks that are
better than with `equal` in the mean over splits. Data are looked for under `$MTRAIN_DATA`.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from mtrain.bench.cases import cases_named
from mtrain.config import check_config
from mtrain.runs import train
from mtrain.train.evaluate import HIGHER_IS_BETTER
from mtrain.train.run_dir import RunDir

METHODS: dict[str, dict[str, Any]] = {
    "equal": {},
    "uncertainty": {},
    "gradnorm": {},
    "mgda": {"every": 5},
    "cagrad": {"every": 5},
    "upgrad": {"every": 5},
}
TRIALS = [(factor, share) for factor in (1.0, 2.0) for share in ("rows", "tasks")]
"""Factor of the learning rate, and whether labels or tasks count the same before balancing."""
SPLITS = 3

TOXCAST = """
data: {path: toxcast/toxcast.csv.gz, layout: grid, key: smiles}
inputs:
  smiles:
    - {class_path: Descriptors, init_args: {on_invalid: skip}}
    - {class_path: ECFP, init_args: {bits: 1024, counts: true, log1p: true, on_invalid: skip}}
tasks: {labels: {exclude: [smiles]}, kind: binary}
model: {trunk: {class_path: MLP, init_args: {widths: [512], dropout: 0.5}}, neck: 256, head: {bias: constant}}
objective: {scale: none}
train: {epochs: 10, global_batch: 128, lr: 1.0e-3, decay: cosine}
select: {metric: roc_auc, reduce: mean, min_per_class: 1}
"""
SCHOOL = """
data: {path: school/school_long.csv.gz, layout: routed, task: task, label: y}
inputs: {"f*": Numeric}
tasks: {kind: regression}
split: {by: within_task, parts: {train: 0.65, valid: 0.1, test: 0.25}}
model:
  trunk: {class_path: MLP, init_args: {widths: [64], activation: silu, dropout: 0.3}}
  neck: 64
  head: {toward_shared: 1000.0, toward_shared_bias: 8.0}
objective: {targets: {center: pooled, scale: pooled}}
train: {epochs: 15, global_batch: 256, lr: 5.0e-3, decay: cosine, warmup: 0.05, weight_decay: 0.05, head_weight_decay: 0.0}
select: {metric: ev, reduce: pooled, checkpoint: last}
"""
KIBA = """
data: {path: kiba/kiba_long.parquet, layout: pairs, key: ligand, task: target, label: y}
inputs: {smiles: [{class_path: ECFP, init_args: {bits: 2048, counts: true, log1p: true}}, MACCS, Descriptors]}
tasks: {kind: regression}
model: {trunk: {class_path: MLP, init_args: {widths: [256, 256], activation: silu, norm: layer, dropout: 0.1}}, neck: 256}
objective: {targets: {center: task, scale: pooled}}
train: {epochs: 30, global_batch: 128, lr: 2.0e-3, weight_decay: 0.5, decay: cosine, warmup: 0.05, eval_every: 3}
select: {metric: mse, reduce: pooled, checkpoint: last}
"""


@dataclass(frozen=True)
class Study:
    """A data set's config without its split, and the split number `i`."""

    name: str
    text: str

    def split(self, i: int) -> dict[str, Any]:
        if self.name == "kiba":  # the test fold is given; another fold validates each time
            folds = [str(fold) for fold in range(5)]
            parts = {"train": [fold for fold in folds if fold != str(4 - i)], "valid": [str(4 - i)], "test": ["test"]}
            return {"by": "column", "column": "fold", "parts": parts}
        return {"seeds": [i]}


CASES = [Study("school", SCHOOL), Study("toxcast", TOXCAST), Study("kiba", KIBA)]


@dataclass(frozen=True)
class Result:
    """Of one run: the value that selects, on both parts; the worst decile of tasks and every task's value on the test part."""

    valid: float
    test: float
    worst: float
    test_T: np.ndarray


def run_one(study: Study, method: str, trial: tuple[float, str], number: int, folder: Path) -> Result:
    """Train a method on a split."""
    factor, share = trial
    tree = yaml.safe_load(study.text)
    tree.setdefault("split", {}).update(study.split(number))
    balancing = {"normalize": method != "equal"} | METHODS[method]
    tree["objective"] |= {"balancer": method, "balancing": balancing, "share": share}
    tree["train"] |= {"lr": tree["train"]["lr"] * factor, "seed": number}
    config = check_config(tree, f"bench study, {study.name}")
    path = folder / f"{study.name}-{method}-{factor:g}-{share}-{number}"
    summary = train(config, Path(), path, Console(quiet=True))
    metric, reduce = config.select.metric, config.select.reduce
    per_task = pq.read_table(RunDir(path).path / "per_task.parquet")
    test = summary["test"][metric]
    return Result(
        summary["valid"][metric][reduce],
        test[reduce],
        test["worst_decile"],
        per_task[f"test_{metric}"].to_numpy(zero_copy_only=False).astype(float),
    )


def measure(study: Study, methods: Sequence[str], folder: Path, console: Console) -> list[dict[str, Any]]:
    select = yaml.safe_load(study.text)["select"]
    sign = 1 if HIGHER_IS_BETTER[select["metric"]] else -1
    found: dict[str, tuple[tuple[float, str], list[Result]]] = {}
    for method in methods:
        tried = [run_one(study, method, trial, 0, folder) for trial in TRIALS]
        best = int(np.nanargmax([sign * result.valid for result in tried]))
        others = [run_one(study, method, TRIALS[best], number, folder) for number in range(1, SPLITS)]
        found[method] = TRIALS[best], [tried[best], *others]
        console.print(f"{study.name}, {method}: {mean(result.test for result in found[method][1]):.4f}", highlight=False)
    plain = found["equal"][1]
    results = []
    for method, ((factor, share), runs) in found.items():
        differences = [mine.test - other.test for mine, other in zip(runs, plain, strict=True)]
        half = student.ppf(0.975, SPLITS - 1) * stdev(differences) / math.sqrt(SPLITS)
        gain_T = sign * np.mean([mine.test_T - other.test_T for mine, other in zip(runs, plain, strict=True)], axis=0)
        scored = np.isfinite(gain_T)
        results.append(
            {
                "bench": "study",
                "case": study.name,
                "method": method,
                "metric": f"{select['reduce']} {select['metric']}",
                "lr_factor": factor,
                "share": share,
                "test": mean(result.test for result in runs),
                "sd": stdev(result.test for result in runs),
                "difference": mean(differences),
                "low": mean(differences) - half,
                "high": mean(differences) + half,
                "worst_decile": mean(result.worst for result in runs),
                "better": None if method == "equal" else float((gain_T[scored] > 0).mean()),
                "tasks": int(scored.sum()),
            }
        )
    return results


def run(json_path: Path | None = None, cases: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train all methods on the named data sets (default: all); print a table, write `json_path`."""
    results = []
    for study in cases_named(CASES, cases):
        with tempfile.TemporaryDirectory() as folder:
            results += measure(study, list(METHODS), Path(folder), Console())
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)
    return results


def print_table(results: Sequence[dict[str, Any]]) -> None:
    table = Table(title=f"balancers, {SPLITS} splits", box=None)
    for title in ("case", "method", "share", "metric", "test", "to equal [95 %]", "worst decile", "tasks better"):
        table.add_column(title, justify="left" if title in ("case", "method", "share", "metric") else "right", no_wrap=True)
    for result in results:
        own = f"{result['test']:.4f} ± {result['sd']:.4f}"
        between = f"{result['difference']:+.4f} [{result['low']:+.4f}, {result['high']:+.4f}]"
        better = "" if result["better"] is None else f"{result['better']:.0%} of {result['tasks']}"
        names = result["case"], result["method"], result["share"], result["metric"]
        table.add_row(*names, own, between, f"{result['worst_decile']:.4f}", better)
    Console(width=None if sys.stdout.isatty() else 140).print(table)

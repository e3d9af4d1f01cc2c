"""`mtrain bench step`: an epoch of the trainer against a minimal hand-written loop on the same data.

The hand-written loop is what people write for masked multi-task data: one `nn.Linear` with an output per task behind the same
trunk, masked cross-entropy, AdamW, and nothing else (no absent tasks that stay put, no per-task losses, no counts, no checks).
The data are ToxCast's molecules as 1024-bit ECFP where $MTRAIN_DATA has them, else random ones of the same shape.
Epochs of both alternate in one process; medians are compared.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from mtrain.bench.trainers import make_trainer
from mtrain.config import Config, check_config
from mtrain.data.batch import Grid
from mtrain.data.inputs import MemoryInputs
from mtrain.data.prepare import Prepared, prepare, read_source
from mtrain.train.step import Totals, count

TOXCAST = "toxcast/toxcast.csv.gz"
ROWS, BITS, TASKS, MISSING = 8576, 1024, 617, 0.71
WIDTH, DROPOUT, BATCH, LR = 1500, 0.5, 128, 1e-3


def random_table() -> pa.Table:
    """Random bits and labels in the shape of ToxCast."""
    generator = np.random.default_rng(0)
    bits = (generator.random((ROWS, BITS)) < 0.05).astype(np.uint8)
    columns: dict[str, Any] = {"smiles": pa.FixedSizeListArray.from_arrays(pa.array(bits.ravel()), BITS)}
    for t in range(TASKS):
        label = (generator.random(ROWS) < 0.1).astype(np.int8)
        columns[f"task_{t}"] = pa.array(label, mask=generator.random(ROWS) < MISSING)
    return pa.table(columns)


def make_config() -> Config:
    real = (Path(os.environ.get("MTRAIN_DATA", ".")) / TOXCAST).is_file()
    feature = {"class_path": "ECFP", "init_args": {"bits": BITS}} if real else {"class_path": "Array"}
    tree = {
        "data": {"path": TOXCAST if real else "python:mtrain.bench.step.random_table", "layout": "grid"},
        "inputs": {"smiles": feature},
        "tasks": {"kind": "binary"},
        "model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [WIDTH], "dropout": DROPOUT}}},
        "objective": {"scale": "none"},
        "train": {"global_batch": BATCH, "lr": LR},
        "select": {"metric": "roc_auc"},
    }
    return check_config(tree, "bench step")


def hand_written(data: Prepared, fused: bool) -> Callable[[], float]:
    """A function that trains one epoch and returns its last loss."""
    part = data.parts["train"]
    assert isinstance(part.labels, Grid)
    assert isinstance(data.inputs, MemoryInputs)
    x_NF, y_NT = data.inputs.x_NF[part.row_R], part.labels.y_BT
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x_NF.shape[1], WIDTH), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(WIDTH, y_NT.shape[1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=fused)
    criterion = nn.BCEWithLogitsLoss(reduction="none")

    def epoch() -> float:
        loss = torch.zeros(())
        for at in torch.randperm(len(x_NF)).split(BATCH):
            y = y_NT[at]
            mask = ~y.isnan()
            losses: Tensor = criterion(model(x_NF[at]), torch.where(mask, y, 0))
            loss = (losses * mask).sum() / mask.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    return epoch


def ours(data: Prepared, config: Config, folder: Path) -> Callable[[], float]:
    """The trainer's own step and loader, for one epoch."""
    trainer, loader = make_trainer(config, data, folder)
    step = 0

    def epoch() -> float:
        nonlocal step
        totals = Totals(len(data.tasks), torch.device("cpu"))
        for _ in range(loader.steps_per_epoch):
            batch = loader.batch(step)
            trainer.stepper(batch, step, totals, *count(batch))
            step += 1
        return float(totals.loss) / totals.steps

    return epoch


def run(json_path: Path | None = None, epochs: int = 9) -> list[dict[str, Any]]:
    """Time `epochs` interleaved epochs of each after a warm-up; prints and returns the figures."""
    config = make_config()
    data = prepare(read_source(config), 0)
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            "mtrain": ours(data, config, Path(folder)),
            "loop": hand_written(data, fused=False),
            "loop_fused": hand_written(data, fused=True),
        }
        losses = {name: epoch() for name, epoch in contenders.items()}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(epochs):
            for name, epoch in contenders.items():
                start = time.perf_counter()
                losses[name] = epoch()
                times[name].append(time.perf_counter() - start)
    if abs(losses["mtrain"] - losses["loop"]) > 0.2 * losses["loop"]:
        raise AssertionError(f"the loops do not learn the same: last losses {losses}")
    median = {name: statistics.median(t) for name, t in times.items()}
    result = {
        "bench": "step",
        "case": "toxcast" if config.data.path == TOXCAST else "toxcast-shaped",
        "epoch_s": median["mtrain"],
        "loop_s": median["loop"],
        "loop_fused_s": median["loop_fused"],
        "over_loop": median["mtrain"] / median["loop"],
        "over_loop_fused": median["mtrain"] / median["loop_fused"],
    }
    print(
        f"{result['case']}: an epoch {median['mtrain']:.2f} s, hand-written {median['loop']:.2f} s "
        f"({result['over_loop']:.2f}x), with fused AdamW {median['loop_fused']:.2f} s ({result['over_loop_fused']:.2f}x)"
    )
    if json_path is not None:
        json_path.write_text(json.dumps([result], indent=1) + "\n")
    return [result]

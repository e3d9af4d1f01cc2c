"""What a run will need, before it starts: memory and time, from shapes and one measured matrix product."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from mtrain.config import Config
from mtrain.data.batch import Grid
from mtrain.data.prepare import Prepared
from mtrain.model.trunks import shared_network
from mtrain.train.loop import build_bank, training_steps

PER_PARAMETER = 16  # bytes: value, gradient and AdamW's two moments in float32
GEMM = 1024
EFFICIENCY = 0.4  # share of the product's rate that a whole step reaches on MLPs, measured on ToxCast
OVERHEAD_S = 1e-2  # of a step beside its products, and of evaluations, measured on School and digits


@dataclass(frozen=True)
class Estimate:
    """Bytes of data and of model with its optimizers, parameters, and the most steps of all split seeds with their refits, and
    seconds of them on this machine."""

    data_bytes: int
    model_bytes: int
    trunk_parameters: int
    head_parameters: int
    steps: int
    seconds: float


def estimate(data: Prepared, config: Config) -> Estimate:
    """Needs the shapes only; the time is rough (a factor of two)."""
    shared = shared_network(config, data.widths, data.tasks.names)
    bank = build_bank(data.tasks, config, shared)
    trunk = sum(p.numel() for p in shared.parameters())
    heads = sum(p.numel() for p in bank.parameters())
    part = data.parts["train"]
    rows = config.train.global_batch
    steps = training_steps(config.train, part.num_rows)
    if config.split.refit:
        steps += training_steps(config.train, part.num_rows + data.parts["valid"].num_rows)
    steps *= len(config.split.seeds)
    # a grid runs every head on every row, else each label runs its own head
    head_share = 1.0 if isinstance(part.labels, Grid) else len(part.labels.y_P) / part.num_rows / len(data.tasks)
    flops = 6 * rows * (trunk + heads * head_share) * steps
    labels = [p.labels.y_BT if isinstance(p.labels, Grid) else p.labels.y_P for p in data.parts.values()]
    return Estimate(
        data_bytes=data.inputs.nbytes + sum(y.nbytes for y in labels),
        model_bytes=PER_PARAMETER * (trunk + heads),
        trunk_parameters=trunk,
        head_parameters=heads,
        steps=steps,
        seconds=flops / (EFFICIENCY * gemm_rate()) + steps * OVERHEAD_S,
    )


def gemm_rate() -> float:
    """Floating-point operations a second of a square float32 product, the best of a few."""
    a = torch.randn(GEMM, GEMM)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * GEMM**3 / best

"""Trainers that take their steps in turn, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console

from mtrain.config import Config
from mtrain.data.loader import Loader
from mtrain.data.prepare import Prepared
from mtrain.parallel.world import World
from mtrain.parallel.wrap import make_accelerator
from mtrain.train.loop import Trainer, build_loader
from mtrain.train.run_dir import RunDir
from mtrain.train.step import Totals, count
from mtrain.train.tracker import NoTracker


def make_trainer(config: Config, data: Prepared, folder: Path) -> tuple[Trainer, Loader]:
    """A trainer of prepared data that prints and tracks nothing, and its loader."""
    accelerator = make_accelerator(config)
    trainer = Trainer(data, config, RunDir(folder), accelerator, World(), NoTracker(), Console(quiet=True))
    return trainer, build_loader(data, config, data.parts["train"], accelerator.device)


def time_steps(contenders: Mapping[str, tuple[Trainer, Loader]], steps: int) -> dict[str, list[float]]:
    """Seconds of each of so many steps, for each contender, after one that makes buffers."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(steps + 1):
        for name, (trainer, loader) in contenders.items():
            device = trainer.accelerator.device
            batch, totals = loader.batch(number), Totals(len(trainer.tasks), device)
            wait(device)
            start = time.perf_counter()
            trainer.stepper(batch, number, totals, *count(batch))
            wait(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(device: torch.device) -> None:
    """For what the device has yet to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

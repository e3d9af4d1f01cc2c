"""What the commands do with whole runs: train one, score one again, load its model."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from accelerate import Accelerator
from rich.console import Console

from mtrain.components import Spec, build
from mtrain.config import Config, DataConfig, differences, to_yaml
from mtrain.data import FEATURES
from mtrain.data.inputs import FeatureColumn
from mtrain.data.prepare import Prepared, prepare, read_source
from mtrain.data.sources import folder_of, search_folders
from mtrain.errors import UserError, some
from mtrain.model.head_options import head_forms, with_parents
from mtrain.model.trunks import shared_network
from mtrain.parallel.shard import Shard
from mtrain.parallel.world import World
from mtrain.parallel.wrap import make_accelerator
from mtrain.report import tables
from mtrain.report.say import say
from mtrain.tasks import TaskTable
from mtrain.train.checkpoint import Checkpoints, Saved
from mtrain.train.evaluate import Evaluator
from mtrain.train.loop import Trainer, build_bank
from mtrain.train.objective import Objective
from mtrain.train.run_dir import RunDir, average_summaries
from mtrain.train.state import head_stacks, trunk_tensors
from mtrain.train.stop import Preempted
from mtrain.train.tracker import build_tracker

T = TypeVar("T")


def train(
    config: Config,
    beside: Path,
    run_path: Path,
    console: Console,
    resume: str = "auto",
    asked: Callable[[], int | None] = lambda: None,
) -> dict[str, Any]:
    """Train a config, once for each split seed; every process of a run calls this. Returns the summary.

    Args:
        resume: auto, continue from the newest complete checkpoint of the run directory, if there is one; never, refuse if
            there is one; or the path of a checkpoint to continue from.
        asked: gives the number of a signal that asks to stop, if one came.
    """
    accelerator = make_accelerator(config)
    world = World(accelerator.device)
    if not world.is_first:
        console = Console(quiet=True)
    run = RunDir(run_path, config.train.keep_checkpoints, world)
    with _lost_contact(world):
        try:
            return _train(config, beside, run, console, accelerator, world, resume, asked)
        except Preempted as stop:
            run.mark_preempted(stop)
            world.gather_objects(None)  # a launcher ends the others as soon as one has ended
            raise


def _train(
    config: Config,
    beside: Path,
    run: RunDir,
    console: Console,
    accelerator: Accelerator,
    world: World,
    resume: str,
    asked: Callable[[], int | None],
) -> dict[str, Any]:
    if _checkpoint(resume) is not None and len(config.split.seeds) > 1:
        raise UserError("--resume PATH: the run has several split seeds, a checkpoint is of one; choose one in split.seeds")
    world.together(run.check_free)
    of_rank = config.tracker if world.is_first else Spec(class_path="none")
    trackers = world.together(lambda: {seed: build_tracker(of_rank) for seed in config.split.seeds})
    source = _first_here(accelerator, world, lambda: read_source(config, beside))
    resolved = config.model_copy(update={"inputs": source.input_specs(), "data": _located(config.data, beside)})
    seeds = config.split.seeds
    run_of = run.by_seed(seeds)

    def trainer(seed: int) -> Trainer:
        data = _first_here(accelerator, world, lambda: prepare(source, seed))
        with _out_of_memory(config):
            _check_alike(world, resolved, data)
            return world.together(
                lambda: Trainer(data, config.of_split(seed), run_of[seed], accelerator, world, trackers[seed], console, asked)
            )

    first: Trainer | None = trainer(seeds[0])  # what is wrong is said before anything is written
    assert first is not None
    world.together(lambda: run.start(resolved) if world.is_first else None)
    run.unmark_preempted()
    if world.size > 1:
        tables.print_plan(first.plan, accelerator.distributed_type.value, console)
    tables.print_notes(first.prepared.notes, console)
    summaries = []
    for i, (seed, one) in enumerate(run_of.items()):
        if len(seeds) > 1:
            console.print(f"split seed {seed} ({i + 1} of {len(seeds)})", highlight=False)
            if world.is_first:
                one.start(resolved.of_split(seed))
        current, first = first or trainer(seed), None
        start = world.together(partial(_start, one, current.tasks, resume, console))
        _save_inputs(one, current.prepared)
        with _out_of_memory(config):
            summaries.append(current.run(start))
        tables.print_notes(current.prepared.inputs.notes(), console)
    summary = summaries[0] if len(seeds) == 1 else average_summaries(summaries)
    if len(seeds) > 1:
        run.save_averages(summary)
    tables.print_summary(summary, config, run.path, console)
    return summary


def _first_here(accelerator: Accelerator, world: World, function: Callable[[], T]) -> T:
    """What every process computes, on each machine one before the others: it leaves caches for them."""
    if world.size == 1:
        return function()
    first = world.together(lambda: function() if accelerator.is_local_main_process else None)
    rest = world.together(lambda: None if accelerator.is_local_main_process else function())
    return first if rest is None else rest  # type: ignore[return-value]


def _check_alike(world: World, config: Config, data: Prepared) -> None:
    """Whether all processes train the same.

    Raises:
        UserError: what differs, and on which rank.
    """
    tasks = data.tasks.to_arrow().select(["task", "kind_spec", "train_labels"]).to_pydict()
    own = {"config": to_yaml(config), "task table": str(tasks), "split": data.split_hash}
    own = {what: hashlib.sha256(value.encode()).hexdigest() for what, value in own.items()}
    every = world.gather_objects(own)
    other = next((rank for rank, of_rank in enumerate(every) if of_rank != every[0]), None)
    if other is None:
        return
    different = next(what for what, value in every[0].items() if every[other][what] != value)
    if different == "config":
        configs = world.gather_objects(config)
        different += f" ({'; '.join(differences(configs[0], configs[other], ())[:3])})"

    def refuse() -> None:
        raise UserError(f"rank {other} and rank 0 have another {different}: give all processes the same")

    world.together(refuse)


def _checkpoint(resume: str) -> tuple[Path, int] | None:
    """The folder and step of the checkpoint that is named; None: of none."""
    if resume in ("auto", "never"):
        return None
    path = Path(resume)
    match = re.fullmatch(r"step-(\d+)", path.name)
    if match is None:
        raise UserError(f"--resume {resume}: expected auto, never, or a directory RUN/checkpoints/step-NUMBER")
    return path.parent, int(match[1])


def _start(run: RunDir, tasks: TaskTable, resume: str, console: Console) -> Saved | None:
    """The checkpoint from which to continue; None: there is none."""
    if resume == "never":
        if run.has_trained:
            raise UserError(f"--resume never: {run.path} holds checkpoints; choose another --run_dir, or remove it")
        return None
    run.check_kinds(tasks)
    named = _checkpoint(resume)
    if named is None:
        start = run.checkpoints.newest()
        if start is None and run.checkpoints.refused:
            raise UserError(
                f"{run.checkpoints.refused[0]}; there is no whole one before it: remove {run.checkpoints.folder} to begin anew"
            )
        for line in run.checkpoints.refused:
            say(console, f"{line}; it is not used")
    else:
        folder, step = named
        start = Checkpoints(folder, world=run.world).at(step)
    if start is not None and not start.state:
        raise UserError(
            f"run {run.path}: was made from a file of its model and cannot be continued; train another run with --init_from "
            f"{run.path}"
        )
    if start is not None:
        before, now = start.state["tasks"], tasks.names
        new, gone = (sorted(set(a) - set(b)) for a, b in ((now, before), (before, now)))
        for what, names in (("new, their heads start fresh", new), ("gone, their heads are left behind", gone)):
            if names:
                say(console, f"{len(names)} tasks are {what}: {some(names)}")
    return start


@contextmanager
def _lost_contact(world: World) -> Iterator[None]:
    """When a process of the run dies, the others say so in one line instead of a traceback."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if world.size > 1 and (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
            reason = text.splitlines()[0][:200]
            raise UserError(
                f"rank {world.rank}: another process of the run cannot be reached any more, it or its machine has ended "
                f"({reason}); see what it said, and start the same command again: it continues from the last checkpoint"
            ) from None
        raise


def evaluate(path: Path, console: Console) -> None:
    """Score the validation and test parts of a run again, from its data and its checkpoints; several processes share the
    rows."""
    world, console = processes(console)
    run = RunDir(path)
    config = run.config()
    source = read_source(config, path)  # which may hold the table itself
    summaries = []
    for seed, one in zip(config.split.seeds, run.splits(), strict=True):
        data = prepare(source, seed)
        if data.split_hash != one.load_json("summary.json")["split_hash"]:
            raise UserError(f"run {one.path}: the data give another split than in training; has the table changed?")
        summary: dict[str, Any] = {}
        threshold_T = None
        parts = ["valid", "test"]
        if one.model().about["best"] is None:
            parts = ["test"]
            say(console, f"run {one.path}: has only the refitted model, which was trained on the valid part: not scored there")
        for part in parts:
            if part in data.parts:  # a refitted model has seen the valid part: the selected one is scored there
                model = load_model(one, refitted=part == "test", world=world)
                scores = model.evaluator.score(
                    data.inputs, data.parts[part], threshold_T=threshold_T, choose_threshold=part == "valid"
                )
                threshold_T = scores.threshold_T
                summary[part] = scores.summary
        summaries.append(summary)
    summary = summaries[0] if len(summaries) == 1 else average_summaries(summaries)
    tables.print_summary(summary, config, path, console)


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, ready to score and predict."""

    tasks: TaskTable
    features: list[FeatureColumn]
    evaluator: Evaluator

    @property
    def width(self) -> int:
        """Of a row of inputs."""
        return sum(item.feature.width for item in self.features)


def processes(console: Console) -> tuple[World, Console]:
    """The processes of a command that a launcher may have started several times, on CPUs; only rank 0 prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    world = World()
    return world, console if world.is_first else Console(quiet=True)


def load_model(
    run: RunDir, refitted: bool = True, world: World | None = None, names: Collection[str] | None = None
) -> LoadedModel:
    """The model that a run (of one split) selected; `refitted`: trained again on train + valid, where the run did that.
    Every process of `world` has all of it; `names`: with the heads of these tasks, and of those whose logits they read.

    Raises:
        UserError: the directory is not a finished run.
    """
    config, tasks = run.config(), run.tasks()
    features = []
    for item in run.load_json("features.json"):
        spec = Spec.model_validate(item["feature"])
        feature = build(spec, FEATURES, "inputs")
        feature.load_state_dict(item["state"])
        features.append(FeatureColumn(item["columns"], spec, feature))
    shared = shared_network(config, [(item.columns, item.feature.width) for item in features], tasks.names).eval()
    if names is not None:
        chosen = [t for t, name in enumerate(tasks.names) if name in names]
        tasks = tasks.take(np.array(with_parents(chosen, head_forms(tasks.names, config))))
    bank = build_bank(tasks, config, shared).eval()
    saved = run.model() if refitted else run.best()
    saved.copy_into(trunk_tensors(shared))
    saved.copy_heads(head_stacks(bank))
    device, shard = torch.device("cpu"), Shard.replicated(world or World(), tasks.names)
    objective, min_per_class = Objective(tasks, bank, device), config.select.min_per_class
    evaluator = Evaluator(tasks, shared, bank, objective, shard, config.data.by_task, min_per_class, device)
    return LoadedModel(tasks, features, evaluator)


def show_tasks(config: Config, beside: Path, console: Console, every: bool = False) -> None:
    """Print the tasks of a config (`every`: however many there are) and what is suspicious, without training."""
    source = read_source(config, beside)
    data = prepare(source, config.split.seeds[0])
    tables.print_tasks(source, data, config, console, every)


def _save_inputs(run: RunDir, data: Prepared) -> None:
    """What a run needs to read new rows as it read its own, and which row of the table is in which part."""
    run.save_table("tasks.parquet", data.tasks.to_arrow())
    features = [
        {"columns": item.columns, "feature": item.spec.model_dump(), "state": item.feature.state_dict()}
        for item in data.features
    ]
    run.save_json("features.json", features)
    row = np.concatenate(list(data.split_rows.values()))
    part = np.repeat(list(data.split_rows), [len(rows) for rows in data.split_rows.values()])
    order = np.argsort(row)
    run.save_table("split.parquet", pa.table({"row": row[order], "part": part[order]}))


def _located(data: DataConfig, beside: Path) -> DataConfig:
    """With the folder in which the data were found as root, so that other commands find them from anywhere.

    What was found under $MTRAIN_DATA stays without a root: the folder of the data may move.
    """
    paths = data.table or (data.path if isinstance(data.path, list | str) else next(iter(data.path.values())))
    path = paths if isinstance(paths, str) else paths[0]
    moving = None if data.root else os.environ.get("MTRAIN_DATA")
    folder = folder_of(path, search_folders(data.root, beside))
    if folder is None or (moving and folder == Path(moving)):
        return data
    return data.model_copy(update={"root": str(folder.resolve())})


@contextmanager
def _out_of_memory(config: Config) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text or "out of memory" in text:
            size = config.train.micro_batch or config.train.global_batch
            raise UserError(
                f"out of memory: lower train.micro_batch (now {size} rows at a time) or the model's widths"
            ) from None
        raise

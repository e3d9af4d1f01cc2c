"""What the commands do with whole runs: train one, score one again, predict with one."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from accelerate import Accelerator
from numpy.typing import NDArray
from rich.console import Console

from mtrain.components import Spec, build
from mtrain.config import Config, DataConfig, differences, to_yaml
from mtrain.data import FEATURES
from mtrain.data.features import Feature, encode_column
from mtrain.data.prepare import Prepared, prepare, read_source
from mtrain.data.sources import open_table, to_arrow
from mtrain.errors import UserError, some
from mtrain.model.kinds import Quantile
from mtrain.model.trunks import build_shared
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
from mtrain.train.tracker import TRACKERS

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
    source = _first_here(accelerator, world, lambda: read_source(config, beside))
    resolved = config.model_copy(update={"inputs": source.input_specs(), "data": _located(config.data, beside)})
    seeds = config.split.seeds
    if resume not in ("auto", "never") and len(seeds) > 1:
        raise UserError("--resume PATH: the run has several split seeds, a checkpoint is of one; choose one in split.seeds")

    def trainer(seed: int) -> Trainer:
        data = _first_here(accelerator, world, lambda: prepare(source, seed))
        tracker = build(config.tracker if world.is_first else Spec(class_path="none"), TRACKERS, "tracker")
        with _out_of_memory(config):
            _check_alike(world, resolved, data)
            return world.together(lambda: Trainer(data, config, run, accelerator, world, tracker, console, asked))

    first: Trainer | None = trainer(seeds[0])  # what is wrong is said before anything is written
    assert first is not None
    world.together(lambda: run.start(resolved) if world.is_first else None)
    run.unmark_preempted()
    if world.size > 1:
        tables.print_plan(first.plan, accelerator.distributed_type.value, console)
    tables.print_notes(first.prepared.notes, console)
    summaries = []
    for i, (seed, one) in enumerate(zip(seeds, run.splits(), strict=True)):
        if len(seeds) > 1:
            console.print(f"split seed {seed} ({i + 1} of {len(seeds)})", highlight=False)
            of_one = resolved.model_copy(update={"split": config.split.model_copy(update={"seeds": [seed]})})
            if world.is_first:
                one.start(of_one)
        current, first = first or trainer(seed), None
        current.run_dir = one
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


def _start(run: RunDir, tasks: TaskTable, resume: str, console: Console) -> Saved | None:
    """The checkpoint from which to continue; None: there is none."""
    if resume == "never":
        if run.has_trained:
            raise UserError(f"--resume never: {run.path} holds checkpoints; choose another --run_dir, or remove it")
        return None
    run.check_kinds(tasks)
    if resume == "auto":
        start = run.checkpoints.newest()
        if start is None and run.checkpoints.refused:
            raise UserError(
                f"{run.checkpoints.refused[0]}; there is no whole one before it: remove {run.checkpoints.folder} to begin anew"
            )
        for line in run.checkpoints.refused:
            say(console, f"{line}; it is not used")
    else:
        path = Path(resume)
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match is None:
            raise UserError(f"--resume {resume}: expected auto, never, or a directory RUN/checkpoints/step-NUMBER")
        start = Checkpoints(path.parent, world=run.world).at(int(match[1]))
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
    world, console = _processes(console)
    run = RunDir(path)
    config = run.config()
    source = read_source(config)
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
            console.print(f"run {one.path}: has only the refitted model, which was trained on the valid part: not scored there")
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


def predict(path: Path, data_path: str, output: Path, console: Console) -> None:
    """Predict every task for every row of a table, and write a column for each task; see `prediction_columns`.

    A run over several split seeds predicts with the mean of its models. Several processes share the rows.
    """
    world, console = _processes(console)
    if output.suffix not in (".parquet", ".csv"):
        raise UserError(f"--output {output}: expected a name that ends in .parquet or .csv")
    run = RunDir(path)
    config = run.config()
    models = [load_model(one) for one in run.splits()]
    where: dict[str, Any] = {"path": data_path, "format": None}
    if os.path.exists(data_path):  # before one under data.root
        where |= {"path": str(Path(data_path).resolve()), "name": None, "source_split": None}
    data = open_table(config.data.model_copy(update=where))
    columns: dict[str, Any] = {}
    key = config.data.key
    if key is not None and key in data.column_names:
        columns[key] = to_arrow(data, [key])[key]
    inputs = [name for name in dict.fromkeys(n for names, _ in models[0].features for n in names) if name in data.column_names]
    table = to_arrow(data, inputs)
    encoded = [encode_column(table, names, feature, config.data.workers) for names, feature in models[0].features]
    valid_N = np.logical_and.reduce([one.valid for one in encoded])
    share: dict[int, NDArray[np.float64]] = {}
    for model in models:  # split seeds differ in what features learnt from training rows, not in how they are encoded
        blocks = [feature.transform(one.values) for (_, feature), one in zip(model.features, encoded, strict=True)]
        x_NF = torch.from_numpy(np.concatenate(blocks, axis=1, dtype=np.float32))
        for task_A, value_NAO in model.evaluator.predict(x_NF.tensor_split(world.size)[world.rank]):
            for a, t in enumerate(task_A.tolist()):
                share[t] = share.get(t, 0) + value_NAO[:, a] / len(models)
    shares = world.gather_to_first(share)
    if shares is None:
        return
    sums = {t: np.concatenate([one[t] for one in shares]) for t in share}
    tasks = models[0].tasks
    for values in sums.values():
        values[~valid_N] = np.nan
    task = config.data.task
    if config.data.layout == "routed" and task is not None and task in data.column_names:
        columns[task] = to_arrow(data, [task])[task]
        columns["prediction"] = _own_prediction(columns[task], tasks, sums)
    for t, one in enumerate(tasks):
        columns |= prediction_columns(one, sums[t])
    _write(pa.table(columns), output)
    if not valid_N.all():
        console.print(f"{int((~valid_N).sum())} of {len(data)} rows have inputs that cannot be used: no prediction")
    console.print(f"{len(data)} rows, {len(tasks)} tasks: {output}", highlight=False)


def prediction_columns(task: Any, value_NO: NDArray[np.float64]) -> dict[str, Any]:
    """Columns of one task: its name holds the value, probability, mean count, median, or the name of the likeliest class.

    Classes have their probabilities beside it in `task=class`, quantiles in `task@level`.
    """
    missing = np.isnan(value_NO[:, 0])
    if task.kind.has_classes:
        value_NO = value_NO[:, : len(task.classes)]
        likeliest = np.nan_to_num(value_NO).argmax(1)
        named = pa.DictionaryArray.from_arrays(pa.array(likeliest, mask=missing), pa.array(task.classes)).cast(pa.string())
        return {task.name: named} | {
            f"{task.name}={name}": pa.array(value_NO[:, i], mask=missing) for i, name in enumerate(task.classes)
        }
    point = task.kind.point(torch.from_numpy(value_NO)).numpy()
    columns = {task.name: pa.array(point, mask=missing)}
    if isinstance(task.kind, Quantile):
        columns |= {
            f"{task.name}@{level:g}": pa.array(value_NO[:, i], mask=missing) for i, level in enumerate(task.kind.levels)
        }
    return columns


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, ready to score and predict."""

    tasks: TaskTable
    features: list[tuple[list[str], Feature]]
    evaluator: Evaluator


def _processes(console: Console) -> tuple[World, Console]:
    """The processes of a command that a launcher may have started several times, on CPUs; only rank 0 prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    world = World()
    return world, console if world.is_first else Console(quiet=True)


def load_model(run: RunDir, refitted: bool = True, world: World | None = None) -> LoadedModel:
    """The model that a run (of one split) selected; `refitted`: trained again on train + valid, where the run did that.
    Every process of `world` has all of it.

    Raises:
        UserError: the directory is not a finished run.
    """
    config, tasks = run.config(), run.tasks()
    features = []
    for item in run.load_json("features.json"):
        feature = build(Spec.model_validate(item["feature"]), FEATURES, "inputs")
        feature.load_state_dict(item["state"])
        features.append((item["columns"], feature))
    shared = build_shared(config.model, sum(feature.width for _, feature in features), config.train.seed).eval()
    bank = build_bank(tasks, config, shared).eval()
    saved = run.model() if refitted else run.best()
    saved.copy_into(trunk_tensors(shared))
    saved.copy_heads(head_stacks(bank))
    device, shard = torch.device("cpu"), Shard.replicated(world or World(), tasks.names)
    objective, min_per_class = Objective(tasks, bank, device), config.select.min_per_class
    evaluator = Evaluator(tasks, shared, bank, objective, shard, config.data.by_task, min_per_class, device)
    return LoadedModel(tasks, features, evaluator)


def show_tasks(config: Config, beside: Path, console: Console) -> None:
    """Print the tasks of a config and what is suspicious, without training."""
    source = read_source(config, beside)
    data = prepare(source, config.split.seeds[0])
    tables.print_tasks(source, data, config, console)


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


def _own_prediction(task_N: pa.ChunkedArray, tasks: TaskTable, sums: dict[int, NDArray[np.float64]]) -> pa.Array:
    """Each row's prediction for its own task; null for a task that the model does not know, and for classes."""
    own_N = pc.fill_null(pc.index_in(task_N.cast(pa.string()), pa.array(tasks.names)), -1).to_numpy()
    order = np.argsort(own_N, kind="stable")
    first_T = np.searchsorted(own_N[order], np.arange(len(tasks) + 1))
    out = np.full(len(own_N), np.nan)
    for t, task in enumerate(tasks):
        rows = order[first_T[t] : first_T[t + 1]]
        if len(rows) and not task.kind.has_classes:
            out[rows] = task.kind.point(torch.from_numpy(sums[t][rows])).numpy()
    return pa.array(out, mask=np.isnan(out))


def _located(data: DataConfig, beside: Path) -> DataConfig:
    """With the folder in which the data were found as root, so that other commands find them from anywhere.

    What was found under $MTRAIN_DATA stays without a root: the folder of the data may move.
    """
    paths = data.table or (data.path if isinstance(data.path, list | str) else next(iter(data.path.values())))
    path = paths if isinstance(paths, str) else paths[0]
    moving = None if data.root else os.environ.get("MTRAIN_DATA")
    for folder in (data.root or moving, ".", beside):
        if folder is not None and glob.glob(str(Path(folder) / path)):
            return data if folder == moving else data.model_copy(update={"root": str(Path(folder).resolve())})
    return data


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


def _write(table: pa.Table, path: Path) -> None:
    write: Callable[..., None] = pq.write_table if path.suffix == ".parquet" else pacsv.write_csv
    unfinished = path.with_name(f".{path.name}")
    try:
        write(table, unfinished)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"--output {path}: cannot be written: {error.strerror or error}") from error

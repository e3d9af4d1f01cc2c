"""What the commands do with whole runs: train one, score one again, predict with one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from rich.console import Console

from mtrain.components import Spec, build
from mtrain.config import Config
from mtrain.data import FEATURES
from mtrain.data.features import Feature, encode_column
from mtrain.data.prepare import Prepared, prepare, read_source
from mtrain.data.sources import open_table, to_arrow
from mtrain.errors import UserError
from mtrain.model.kinds import Quantile
from mtrain.model.trunks import build_shared
from mtrain.report import tables
from mtrain.tasks import TaskTable
from mtrain.train.evaluate import Evaluator
from mtrain.train.loop import Trainer, build_bank
from mtrain.train.objective import Objective
from mtrain.train.run_dir import RunDir, average_summaries
from mtrain.train.tracker import TRACKERS


def make_accelerator(config: Config) -> Accelerator:
    """The accelerator of a run.

    Raises:
        UserError: a precision that the device does not have, or several processes.
    """
    try:
        log_with = "wandb" if config.tracker.class_path.lower() == "wandb" else None
        accelerator = Accelerator(mixed_precision=config.train.precision, log_with=log_with)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"train.precision {config.train.precision}: not on this device: {error}") from None
    if accelerator.num_processes > 1:
        raise UserError(
            f"started with {accelerator.num_processes} processes, expected 1: this version trains in one process; "
            "use accelerate launch --num_processes 1"
        )
    return accelerator


def train(config: Config, beside: Path, run_path: Path, console: Console) -> dict[str, Any]:
    """Train a config, once for each split seed; continues what the run directory holds. Returns the summary."""
    source = read_source(config, beside)
    resolved = config.model_copy(update={"inputs": source.input_specs()})
    run = RunDir(run_path, config.train.keep_checkpoints)
    accelerator = make_accelerator(config)
    seeds = config.split.seeds
    first: Prepared | None = prepare(source, seeds[0])  # what is wrong is said before anything is written
    assert first is not None
    run.start(resolved)
    tables.print_notes(first.notes, console)
    summaries = []
    for i, (seed, one) in enumerate(zip(seeds, run.splits(), strict=True)):
        if len(seeds) > 1:
            console.print(f"split seed {seed} ({i + 1} of {len(seeds)})", highlight=False)
            split = config.split.model_copy(update={"seeds": [seed]})
            one.start(resolved.model_copy(update={"split": split}))
        data, first = first or prepare(source, seed), None
        _save_inputs(one, data)
        tracker = build(config.tracker, TRACKERS, "tracker")
        summaries.append(Trainer(data, config, one, accelerator, tracker, console).run())
        accelerator.free_memory()
    summary = summaries[0] if len(seeds) == 1 else average_summaries(summaries)
    if len(seeds) > 1:
        run.save_json("summary.json", summary)
    tables.print_summary(summary, config, run.path, console)
    return summary


def evaluate(path: Path, console: Console) -> None:
    """Score the validation and test parts of a run again, from its data and its checkpoint."""
    run = RunDir(path)
    config = run.config()
    source = read_source(config)
    summaries = []
    for seed, one in zip(config.split.seeds, run.splits(), strict=True):
        model = load_model(one)
        data = prepare(source, seed)
        if data.split_hash != one.load_json("summary.json")["split_hash"]:
            raise UserError(f"run {one.path}: the data give another split than in training; has the table changed?")
        summary: dict[str, Any] = {}
        threshold_T = None
        for part in ("valid", "test"):
            if part in data.parts:
                scores = model.evaluator.score(
                    data.x_NF, data.parts[part], threshold_T=threshold_T, choose_threshold=part == "valid"
                )
                threshold_T = scores.threshold_T
                summary[part] = scores.summary
        summaries.append(summary)
    summary = summaries[0] if len(summaries) == 1 else average_summaries(summaries)
    tables.print_summary(summary, config, path, console)


def predict(path: Path, data_path: str, output: Path, console: Console) -> None:
    """Predict every task for every row of a table, and write a column for each task; see `prediction_columns`.

    A run over several split seeds predicts with the mean of its models.
    """
    if output.suffix not in (".parquet", ".csv"):
        raise UserError(f"--output {output}: expected a name that ends in .parquet or .csv")
    run = RunDir(path)
    config = run.config()
    models = [load_model(one) for one in run.splits()]
    data = open_table(config.data.model_copy(update={"path": data_path, "format": None}))
    columns: dict[str, Any] = {}
    key = config.data.key
    if key is not None and key in data.column_names:
        columns[key] = to_arrow(data, [key])[key]
    valid_N = np.ones(len(data), dtype=bool)
    sums: dict[int, NDArray[np.float64]] = {}
    for model in models:
        blocks = []
        for names, feature in model.features:
            encoded = encode_column(data, names, feature, config.data.workers)
            valid_N &= encoded.valid
            blocks.append(feature.transform(encoded.values))
        x_NF = torch.from_numpy(np.concatenate(blocks, axis=1, dtype=np.float32))
        for task_A, value_NAO in model.evaluator.predict(x_NF):
            for a, t in enumerate(task_A.tolist()):
                sums[t] = sums.get(t, 0) + value_NAO[:, a] / len(models)
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


def load_model(run: RunDir) -> LoadedModel:
    """The model that a run (of one split) selected.

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
    bank = build_bank(tasks, config, shared.out_features).eval()
    state = run.checkpoints.model()
    shared.load_state_dict(state["shared"])
    bank.load_state_dict(state["bank"])
    device = torch.device("cpu")
    objective = Objective(tasks, bank, config.objective, None, device)
    return LoadedModel(tasks, features, Evaluator(tasks, shared, bank, objective, config.select.min_per_class, device))


def show_tasks(config: Config, beside: Path, console: Console) -> None:
    """Print the tasks of a config and what is suspicious, without training."""
    source = read_source(config, beside)
    data = prepare(source, config.split.seeds[0])
    tables.print_tasks(source, data, config, console)


def _save_inputs(run: RunDir, data: Prepared) -> None:
    """What a run needs to read new rows as it read its own, and which unit is in which part."""
    run.save_table("tasks.parquet", data.tasks.to_arrow())
    features = [
        {"columns": item.columns, "feature": item.spec.model_dump(), "state": item.feature.state_dict()}
        for item in data.features
    ]
    run.save_json("features.json", features)
    unit = np.concatenate(list(data.split_units.values()))
    part = np.repeat(list(data.split_units), [len(units) for units in data.split_units.values()])
    order = np.argsort(unit)
    run.save_table("split.parquet", pa.table({"row": unit[order], "part": part[order]}))


def _own_prediction(task_N: pa.ChunkedArray, tasks: TaskTable, sums: dict[int, NDArray[np.float64]]) -> pa.Array:
    """Each row's prediction for its own task; null for a task that the model does not know, and for classes."""
    names = task_N.cast(pa.string()).to_numpy()
    out = np.full(len(names), np.nan)
    for t, task in enumerate(tasks):
        rows = np.flatnonzero(names == task.name)
        if len(rows) and not task.kind.has_classes:
            out[rows] = task.kind.point(torch.from_numpy(sums[t][rows])).numpy()
    return pa.array(out, mask=np.isnan(out))


def _write(table: pa.Table, path: Path) -> None:
    write: Callable[..., None] = pq.write_table if path.suffix == ".parquet" else pacsv.write_csv
    unfinished = path.with_name(f".{path.name}")
    try:
        write(table, unfinished)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"--output {path}: cannot be written: {error.strerror or error}") from error

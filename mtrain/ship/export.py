"""`mtrain export`: a run's model for use without the trainer.

A folder with the model as a `torch.export` program and as ONNX, both checked against the model itself, and what a user of it
needs: how inputs become its numbers, what its outputs are, the task table with thresholds, and a model card.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.console import Console

from mtrain.config import Config
from mtrain.data.features import encode_column, transform_rows
from mtrain.data.files import open_tasks
from mtrain.data.sources import open_data
from mtrain.data.tables import Table
from mtrain.errors import UserError, matches, nearest
from mtrain.report.say import say
from mtrain.runs import LoadedModel, load_model
from mtrain.ship.calibrate import Calibration
from mtrain.ship.card import model_card
from mtrain.ship.predictor import ABOUT, INPUT, INPUTS, ONNX, PROGRAM, VALUES, VERSION, Predictor
from mtrain.ship.values import Values
from mtrain.train.run_dir import RunDir

CHECKED_ROWS = 64
TOLERANCE = 1e-5  # of 1, or of a label's standard deviation, plus the value


def export(
    path: Path,
    output: Path,
    console: Console,
    patterns: Sequence[str] | None = None,
    onnx: bool = True,
    calibrated: bool = True,
) -> None:
    """Write a run's model, of all tasks or of those that match a pattern, to a new folder; see the module.

    Raises:
        UserError: the run holds several models or none, no task matches, the model cannot be exported, or what was exported
            gives other numbers.
    """
    if onnx:
        _require_onnx()
    run = RunDir(path)
    if len(several := run.splits()) > 1:
        named = ", ".join(str(each.path) for each in several)
        raise UserError(f"run {run.path}: has a model for each of its split seeds; name one of them: {named}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output}: exists; expected the name of a new folder")
    config = run.config()
    model = load_model(run, names=_chosen(run, patterns))
    calibration = Calibration.load(run) if calibrated else None
    values = Values(model.evaluator, model.width, calibration)
    if values.takes_tasks:
        raise UserError(
            f"run {run.path}: its trunk {config.model.trunk.class_path} reads each row's task, exported models take inputs only"
        )
    x_NF = _sample(config, model, console)
    about = _about(run, config, model, values, calibration)
    unfinished = output.absolute().with_name(f".{output.name}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write_models(unfinished, values, x_NF, onnx, config)
        (unfinished / ABOUT).write_text(json.dumps(about, indent=1))
        shutil.copy(run.path / "features.json", unfinished / INPUTS)
        thresholds = pa.array([one["threshold"] for one in about["tasks"]], pa.float64())
        pq.write_table(model.tasks.to_arrow().append_column("threshold", thresholds), unfinished / "tasks.parquet")
        worst = _check(unfinished, values, x_NF, model, onnx)
        (unfinished / "model_card.md").write_text(model_card(run, config, model, values, about, worst))
        os.rename(unfinished, output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    found = ", ".join(f"{name} within {error:.1e}" for name, error in worst.items())
    say(console, f"{len(model.tasks)} tasks{', calibrated' if values.calibrated else ''}; the model's numbers again: {found}")
    say(console, f'{output}: use it with mtrain.ship.Predictor.load("{output}").predict(table)')


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'export: ONNX needs {error.name}: pip install "mtrain[export]", or leave it out with --no-onnx'
        ) from None


def _chosen(run: RunDir, patterns: Sequence[str] | None) -> list[str] | None:
    """The names of the tasks to export; None: all."""
    if patterns is None:
        return None
    names = run.tasks().names
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise UserError(f"--tasks {pattern}: run {run.path} has no such task{nearest(pattern, names)}")
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def _sample(config: Config, model: LoadedModel, console: Console) -> NDArray[np.float32]:
    """Inputs of some rows of the run's data, or random ones where those cannot be read any more."""
    columns = list(dict.fromkeys(name for item in model.features for name in item.columns))
    try:
        by_task = config.data.layout == "files"
        table: Table = open_tasks(config, None).table if by_task else open_data(config.data, None)[0]
        rows = table.read_chunk(0, columns).slice(0, CHECKED_ROWS)
        encoded = [encode_column(rows, item.columns, item.feature) for item in model.features]
    except UserError as error:
        say(console, f"note: the run's data cannot be read, the model is checked on random inputs ({error})")
        return np.random.default_rng(0).normal(size=(CHECKED_ROWS, model.width)).astype(np.float32)
    valid_N = np.logical_and.reduce([one.valid for one in encoded])
    blocks = [transform_rows(one, item.columns, item.feature) for item, one in zip(model.features, encoded, strict=True)]
    x_NF = np.concatenate(blocks, axis=1)[valid_N]
    return np.resize(x_NF, (max(2, len(x_NF)), model.width))  # a single row would be taken for a constant


def _about(run: RunDir, config: Config, model: LoadedModel, values: Values, calibration: Calibration | None) -> dict[str, Any]:
    """What `Predictor` reads: tasks with what the model's numbers are, thresholds, and columns that come along."""
    from mtrain import __version__

    threshold_T = np.full(len(model.tasks), np.nan)
    if (run.path / "per_task.parquet").is_file():
        per_task = pd.read_parquet(run.path / "per_task.parquet").set_index("task")
        if "threshold" in per_task:
            threshold_T = per_task["threshold"].reindex(model.tasks.names).to_numpy(np.float64)
    if calibration is not None:
        threshold_T = calibration.of(model.tasks.names).binary(threshold_T, np.arange(len(model.tasks)))
    tasks = [
        {
            "task": one.task,
            "kind": one.kind,
            "values": list(one.values),
            "classes": list(one.classes),
            "threshold": None if np.isnan(threshold) else float(threshold),
        }
        for one, threshold in zip(values.outputs, threshold_T, strict=True)
    ]
    return {
        "format": VERSION,
        "mtrain": __version__,
        "step": run.model().step,
        "width": model.width,
        "input": INPUT,
        "output": VALUES,
        "calibrated": values.calibrated,
        "key": config.data.key,
        "task": config.data.task,
        "tasks": tasks,
    }


def _write_models(folder: Path, values: Values, x_NF: NDArray[np.float32], onnx: bool, config: Config) -> None:
    trunk, rows = config.model.trunk.class_path, ({0: torch.export.Dim("rows")},)
    with _quiet(), torch.no_grad():
        try:
            program = torch.export.export(values, (torch.from_numpy(x_NF),), dynamic_shapes=rows)
            torch.export.save(program, folder / PROGRAM)
        except UserError:
            raise
        except Exception as error:  # a trunk may do anything that torch.export cannot follow
            fixed = "specialized it to be a constant" in str(error)
            hint = "; its forward fixes the number of rows: x.shape[0] stays free where len(x) does not" if fixed else ""
            raise UserError(f"trunk {trunk} cannot be exported: torch.export says: {_first_line(error)}{hint}") from error
        if not onnx:
            return
        try:
            written = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=[VALUES], verbose=False)
            assert written is not None
            written.save(folder / ONNX)
        except Exception as error:
            raise UserError(
                f"trunk {trunk} cannot be written as ONNX, leave that out with --no-onnx: {_first_line(error)}"
            ) from error


def _check(folder: Path, values: Values, x_NF: NDArray[np.float32], model: LoadedModel, onnx: bool) -> dict[str, float]:
    """The largest differences of what was written from the model, on one, some and all sample rows.

    Raises:
        UserError: one is above `TOLERANCE`.
    """
    unit_T = np.where([task.kind.standardized for task in model.tasks], model.tasks.stats["scale"], 1.0)
    unit_V = np.repeat(unit_T, [len(output.values) for output in values.outputs])
    found = {}
    for backend in ("torch", "onnx") if onnx else ("torch",):
        predictor = Predictor.load(folder, backend)  # type: ignore[arg-type]
        worst = 0.0
        for rows in (1, len(x_NF) // 2 + 1, len(x_NF)):
            expected_NV = values.all_rows(torch.from_numpy(x_NF[:rows])).numpy()
            error_NV = np.abs(predictor.model(x_NF[:rows]) - expected_NV) / (unit_V + np.abs(expected_NV))
            worst = max(worst, float(error_NV.max()))
            if not worst <= TOLERANCE:  # NaN is not
                row, column = np.unravel_index(int(np.nanargmax(error_NV)), error_NV.shape)
                name = [name for output in values.outputs for name in output.values][column]
                raise UserError(
                    f"export: {backend} gives '{name}' of sample row {row + 1} with a difference of {worst:.1e} from the "
                    f"model, more than {TOLERANCE:g}" + ("; leave ONNX out with --no-onnx" if backend == "onnx" else "")
                )
        found[backend] = worst
    return found


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:300]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch prints and logs while it exports, and where it cannot."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)

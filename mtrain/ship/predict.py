"""`mtrain predict`: every task for every row of a table, by one run or the mean of several, some rows at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.console import Console

from mtrain.config import Config
from mtrain.data.features import Encoded, encode_column, transform_rows
from mtrain.data.inputs import located
from mtrain.data.labels import task_names
from mtrain.data.sources import local_files, open_data
from mtrain.data.tables import Table
from mtrain.errors import UserError, matches, nearest, some
from mtrain.report.say import say
from mtrain.runs import load_model, processes
from mtrain.ship.calibrate import Calibration
from mtrain.ship.columns import Output, check_names, to_table, value_names
from mtrain.ship.values import Values
from mtrain.train.run_dir import RunDir

NUMBERS = 4_000_000  # inputs and values of the rows that are in memory at once
FEWEST, MOST = 256, 65536  # rows


class RunPredictor:
    """What runs predict together: the mean of their models, probabilities for classes, original units for numbers.

    Args:
        paths: run directories; those of several split seeds hold several models.
        calibrated: whether the calibrations that the runs have are used.
        all_tasks: whether a trunk that reads each row's task reads every task in turn, in place of the row's.

    Attributes:
        outputs: what the V numbers of a row are, task by task.
        calibrated: how many of the `models` have a calibration.

    Raises:
        UserError: a directory is not a finished run or is named twice, or the tasks of the runs differ.
    """

    def __init__(self, paths: Sequence[Path], calibrated: bool = True, all_tasks: bool = False):
        splits = [one for path in paths for one in RunDir(path).splits()]
        there = [one.path.resolve() for one in splits]
        if twice := next((one for i, one in enumerate(splits) if there[i] in there[:i]), None):
            raise UserError(f"run {twice.path}: is named twice, the mean would count it twice; name each run once")
        self.config: Config = splits[0].config()
        self.models, self.values = [], []
        for run in splits:
            model = load_model(run)
            values = Values(model.evaluator, model.width, Calibration.load(run) if calibrated else None)
            self.models.append(model)
            self.values.append(values)
            _check_alike(splits[0], self.values[0].outputs, run, values.outputs)
        self.outputs = self.values[0].outputs
        self.calibrated = sum(one.calibrated for one in self.values)
        names = value_names(self.outputs)
        self._order = [[value_names(one.outputs).index(name) for name in names] for one in self.values]
        self.columns = list(dict.fromkeys(name for model in self.models for item in model.features for name in item.columns))
        self.all_tasks = all_tasks
        self.task: str | None = None  # the column that says each row's task, where a trunk reads it
        if any(one.takes_tasks for one in self.values) and not all_tasks:
            self.task = self.config.data.task or "task"
            self.columns.append(self.task)
        self.rows = min(MOST, max(FEWEST, NUMBERS // (len(names) + max(model.width for model in self.models))))

    def predict(self, table: pa.Table) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The numbers `[N, V]` of the rows of a table, and which rows can be used: those of others are NaN.

        Raises:
            UserError: a column is missing, or holds a value that cannot be used.
        """
        valid_N = np.ones(len(table), dtype=bool)
        if not len(table):
            return np.empty((0, len(self._order[0]))), valid_N
        encoded: dict[str, Encoded] = {}
        sum_NV = np.zeros((len(table), len(self._order[0])))
        for model, values, order in zip(self.models, self.values, self._order, strict=True):
            blocks = []
            for item in model.features:
                # split seeds differ in what features learnt, not in how they read
                key = f"{item.spec.model_dump_json()} {item.columns}"
                if key not in encoded:
                    encoded[key] = encode_column(table, item.columns, item.feature, self.config.data.workers)
                    valid_N &= encoded[key].valid
                blocks.append(transform_rows(encoded[key], item.columns, item.feature))
            x_NF = torch.from_numpy(np.concatenate(blocks, axis=1))
            if values.takes_tasks and self.all_tasks:
                sum_NV += _as_each_task(values, x_NF)[:, order]
                continue
            task_N = None
            if values.takes_tasks:
                task_N = torch.from_numpy(self._tasks(table, values))
                valid_N &= (task_N >= 0).numpy()
            sum_NV += values.all_rows(x_NF, task_N).numpy()[:, order]
        mean_NV = sum_NV / len(self.models)
        mean_NV[~valid_N] = np.nan
        return mean_NV, valid_N

    def _tasks(self, table: pa.Table, values: Values) -> NDArray[np.int64]:
        """Each row's task by its place in the model; -1 for one that the model does not know."""
        names = pa.array([output.task for output in values.outputs], pa.string())
        place_N = pc.index_in(table[self.task].cast(pa.string()), names)
        return place_N.fill_null(-1).combine_chunks().to_numpy().astype(np.int64)


def _as_each_task(values: Values, x_NF: torch.Tensor) -> NDArray[np.float64]:
    """The numbers `[N, V]` of rows that are taken for rows of each task in turn, where the trunk reads the task."""
    value_NV = np.full((len(x_NF), len(values.place_V)), np.nan)
    for t in range(len(values.outputs)):
        of_task = values.all_rows(x_NF, torch.full((len(x_NF),), t)).numpy()
        value_NV = np.where(np.isnan(of_task), value_NV, of_task)
    return value_NV


def predict(
    paths: Sequence[Path],
    data_path: str,
    output: Path,
    console: Console,
    calibrated: bool = True,
    all_tasks: bool = False,
    keep: Sequence[str] = (),
    own_task: bool = False,
) -> None:
    """Predict every task for every row of a table, and write a column for each number; see `to_columns`.

    Several runs of the same tasks (and the models of a run over several split seeds) predict with their mean. Rows are read,
    predicted and written some at a time, and shared by the processes.

    Args:
        all_tasks: rows stand for no task: a trunk that reads each row's task reads every task in turn, and the task column
            may name tasks that the runs have not.
        keep: names or patterns of columns of the table that are written too, after its key and task.
        own_task: write the number for each row's own task, and not those for all tasks.

    Raises:
        UserError: the output cannot be written, a column is missing or cannot be used, has the name of a task's, or a row names
            another task.
    """
    world, console = processes(console)
    if output.suffix not in (".parquet", ".csv"):
        raise UserError(f"--output {output}: expected a name that ends in .parquet or .csv")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: no folder {output.parent}; make it first")
    if output.exists() and Path(data_path).exists() and output.samefile(data_path):
        raise UserError(f"--output {output}: is the table that is read; choose another name")
    runs = RunPredictor(paths, calibrated, all_tasks)
    data = runs.config.data
    if all_tasks and data.layout == "grid":
        raise UserError("--all-tasks: rows of a grid name no task, all are predicted anyway; leave it out")
    table = _open(runs.config, data_path, runs.rows)
    for name in runs.columns:
        if name not in table.column_names:
            raise UserError(f"no column '{name}' in {data_path}{nearest(name, table.column_names)}")
    kept = [name for name in (data.key, data.task) if name is not None and name in table.column_names]
    if own_task:
        _check_own_task(runs, kept, data_path)
    kept = list(dict.fromkeys([*kept, *_kept(keep, table, data_path)]))
    check_names(runs.outputs, kept, data.task, own_task)
    unusable = 0
    with table_writer(output) as write:
        for first, rows in _read(table, list(dict.fromkeys([*kept, *runs.columns])), runs.rows):
            edges = np.linspace(0, len(rows), world.size + 1).astype(int)
            begin, end = edges[world.rank : world.rank + 2].tolist()
            own = partial(_predict, runs, table, first + begin, rows.slice(begin, end - begin))
            shares = world.gather_to_first(world.together(own))
            unusable += world.together(partial(_append, write, runs, rows.select(kept), shares, own_task))
    if unusable:
        say(console, f"{unusable} of {len(table)} rows have inputs that cannot be used: no prediction")
    of = f", mean of {len(runs.models)} models" if len(runs.models) > 1 else ""
    part = f"{runs.calibrated} of them " if runs.calibrated < len(runs.models) else ""
    how = f", {part}calibrated (--no-calibration leaves that off)" if runs.calibrated else ""
    say(console, f"{len(table)} rows, {len(runs.outputs)} tasks{of}{how}: {output}")


def _kept(keep: Sequence[str], table: Table, data_path: str) -> list[str]:
    """The columns that `keep` names, in the order of the table."""
    for pattern in keep:
        if not any(matches(name, pattern) for name in table.column_names):
            raise UserError(f"--keep {pattern}: no such column in {data_path}{nearest(pattern, table.column_names)}")
    return [name for name in table.column_names if any(matches(name, pattern) for pattern in keep)]


def _check_own_task(runs: RunPredictor, kept: Sequence[str], data_path: str) -> None:
    """Refuse to write only what there is not."""
    if runs.config.data.task not in kept:
        column = "" if runs.config.data.task is None else f" (column '{runs.config.data.task}')"
        raise UserError(f"--own-task: rows of {data_path} do not say their task{column}; leave --own-task out")
    if classes := next((output.task for output in runs.outputs if output.classes), None):
        raise UserError(f"--own-task: task '{classes}' has classes, whose probabilities are columns of its own; leave it out")


def _predict(runs: RunPredictor, table: Table, first: int, rows: pa.Table) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """`runs.predict` of rows of a table of which the first has the number `first`; messages name the file and row."""
    try:
        _check_tasks(runs, rows)
        return runs.predict(rows)
    except UserError as error:
        raise located(error, table, first) from None


def _check_tasks(runs: RunPredictor, rows: pa.Table) -> None:
    """Refuse rows of a routed table that name tasks which the runs have not."""
    column, names = runs.config.data.task, [output.task for output in runs.outputs]
    if runs.all_tasks or runs.config.data.layout != "routed" or column is None or column not in rows.column_names:
        return
    task_N = task_names(rows[column], column)
    unknown = np.flatnonzero(~pc.is_in(task_N, pa.array(names, pa.string())).to_numpy())
    if len(unknown):
        name = task_N[int(unknown[0])].as_py()
        raise UserError(
            f"column '{column}', row {unknown[0] + 1}: found {'no task' if name is None else repr(name)}, expected one of the "
            f"run's tasks{nearest(name or '', names)}; --all-tasks predicts all tasks whatever a row names"
        )


def _append(
    write: Callable[[pa.Table], None],
    runs: RunPredictor,
    kept: pa.Table,
    shares: Sequence[tuple[NDArray[np.float64], NDArray[np.bool_]]] | None,
    own_task: bool,
) -> int:
    """Write some rows, see `to_table`. Returns how many rows have no prediction. `shares` are what the processes predicted, on
    rank 0."""
    if shares is None:
        return 0
    value_NV = np.concatenate([value_NV for value_NV, _ in shares])
    write(to_table(runs.outputs, value_NV, kept, runs.config.data.task, own_task))
    return sum(int((~valid_N).sum()) for _, valid_N in shares)


def _check_alike(first: RunDir, outputs: Sequence[Output], other: RunDir, others: Sequence[Output]) -> None:
    """Refuse to average runs of different tasks."""
    ours, theirs = ({output.task: output for output in each} for each in (outputs, others))
    if odd := sorted(ours.keys() ^ theirs.keys()):
        has, lacks = (other, first) if odd[0] in theirs else (first, other)
        raise UserError(
            f"run {has.path}: has task '{odd[0]}', {lacks.path} has not ({len(odd)} tasks are in one of them only); only runs "
            "of the same tasks can be averaged"
        )
    for name, output in ours.items():
        if theirs[name] != output:
            here, there = (
                each.kind + (f" ({some(each.values, 3)})" if len(each.values) > 1 else "") for each in (output, theirs[name])
            )
            raise UserError(
                f"task '{name}': is {here} in {first.path}, {there} in {other.path}; only runs of the same kinds, classes and "
                "quantile levels can be averaged"
            )


def _open(config: Config, path: str, rows: int) -> Table:
    """The table to be predicted: a file, looked for in the working directory before data.root, or what else a config names."""
    where: dict[str, Any] = {"path": path, "format": None, "chunk_rows": rows}
    if os.path.exists(path):
        where |= {"path": str(Path(path).resolve()), "name": None, "source_split": None}
    data = config.data.model_copy(update=where)
    return open_data(data.model_copy(update={"streaming": bool(local_files(data, None))}), None)[0]


def _read(table: Table, columns: Sequence[str], most: int) -> Iterator[tuple[int, pa.Table]]:
    """The rows of a table, so many at a time, and the number of the first."""
    for chunk, start in enumerate(table.start_C[:-1].tolist()):
        rows = table.read_chunk(chunk, columns)
        for at in range(0, len(rows), most):
            yield start + at, rows.slice(at, most)


@contextmanager
def table_writer(path: Path) -> Iterator[Callable[[pa.Table], None]]:
    """What appends tables of the same columns to a Parquet or CSV file, which is there when all are written, or not at all.

    Raises:
        UserError: it cannot be written, or the type of a column cannot be.
    """
    unfinished = path.with_name(f".{path.name}")
    opened: Any = None
    schema = pa.schema([])

    def write(table: pa.Table) -> None:
        nonlocal opened, schema
        if opened is None:
            nested = next((field for field in table.schema if pa.types.is_nested(field.type)), None)
            if nested is not None and path.suffix == ".csv":
                raise UserError(
                    f"--output {path}: column '{nested.name}' holds {nested.type}, which CSV cannot; write .parquet"
                )
            schema = table.schema
            opened = (pq.ParquetWriter if path.suffix == ".parquet" else pacsv.CSVWriter)(str(unfinished), schema)
        try:
            table = table.cast(schema)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(
                f"--output {path}: files have other values in the same column, expected one type: {error}"
            ) from None
        opened.write_table(table)

    @contextmanager
    def said() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"--output {path}: cannot be written: {error.strerror or error}") from error

    try:
        yield said()(write)
        with said():
            if opened is not None:
                opened.close()
                unfinished.replace(path)
    finally:
        with suppress(OSError):
            if opened is not None:
                opened.close()
            unfinished.unlink(missing_ok=True)

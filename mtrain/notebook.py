"""mtrain in a notebook or a script: fit a table that is in memory, look at the run, predict."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from mtrain.config import check_config
from mtrain.data.discover import discover
from mtrain.errors import UserError
from mtrain.report.init import print_findings
from mtrain.train.run_dir import TABLE, RunDir
from mtrain.train.stop import Preempted

_ROW_GROUP = 8192
AnyTable: TypeAlias = pd.DataFrame | pa.Table | datasets.Dataset | str | Path


@dataclass(frozen=True)
class Run:
    """A finished run.

    path: its directory; a temporary one goes with the last reference to the run.
    """

    path: Path
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Mean, median, worst decile, pooled value and number of scored tasks of every metric of each part, and more."""
        return RunDir(self.path).load_json("summary.json")

    @cached_property
    def per_task(self) -> pd.DataFrame:
        """A row for each task: every metric of each part, labels, expected share, weight."""
        return pd.read_parquet(self.path / "per_task.parquet")

    def predict(self, table: AnyTable) -> pd.DataFrame:
        """A row for each row of a table with the run's input columns, and the columns that `mtrain predict` writes.

        Raises:
            UserError: an input column is missing, or holds what cannot be used.
        """
        from mtrain.ship.predict import predict

        with tempfile.TemporaryDirectory(prefix="mtrain-") as folder, _without_bars():
            output, file = Path(folder) / "predictions.parquet", Path(folder).resolve() / TABLE
            with _as_the_table(str(file)):
                predict([self.path], _as_path(table, file), output, Console(quiet=True))
            return pd.read_parquet(output)

    def report(self, path: str | Path) -> Path:
        """Write `mtrain report` of this run: one HTML file."""
        from mtrain.report.html import write_report

        write_report([self.path], Path(path))
        return Path(path)

    def __repr__(self) -> str:
        part = self.summary.get("test") or self.summary.get("valid") or {}
        median = part.get("skill", {}).get("median")
        skill = "" if median is None else f", median skill {median:.3f}"
        return f"Run({self.summary['tasks']} tasks{skill}, path={str(self.path)!r})"


def fit(
    table: AnyTable,
    inputs: Sequence[str] | dict[str, Any] | None = None,
    tasks: Sequence[str] | dict[str, Any] | None = None,
    *,
    run_dir: str | Path | None = None,
    resume: str = "auto",
    show: bool = True,
    **config: Any,
) -> Run:
    """Train on a table, in this process; what is not given is chosen as `mtrain init` chooses it.

        run = mtrain.fit(table, inputs=["x*"], tasks=["y*"], train={"epochs": 20})

    Args:
        table: a pandas DataFrame, pyarrow Table or datasets.Dataset, which is written to the run directory, or the path of a
            file, folder or hub data set.
        inputs: names or patterns of input columns, or `{name or pattern: feature}`.
        tasks: names or patterns of label columns, or the section `tasks` of a config.
        run_dir: place of the run; default a temporary one. The same call with the same directory continues a run that was
            stopped.
        resume: auto, never, or the path of a checkpoint.
        show: print what was found and the progress.
        config: sections of a config by name: `data={"layout": "grid"}, model={...}, train={"lr": 3e-4}, split={...}`.

    Raises:
        UserError: what is wrong with the table or an option, in one line.
        KeyboardInterrupt: the training was interrupted, after the current step; with a `run_dir` it can be continued.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("mtrain.fit trains in one process; for several give a config to: torchrun ... -m mtrain train CONFIG")
    from mtrain import runs

    given = dict(config)
    if inputs is not None:
        given["inputs"] = inputs if isinstance(inputs, dict) else _names(inputs)
    if tasks is not None:
        given["tasks"] = tasks if isinstance(tasks, dict) else {"labels": _names(tasks)}
    console = Console(quiet=not show, force_jupyter=False)
    temporary = None if run_dir is not None else tempfile.TemporaryDirectory(prefix="mtrain-", ignore_cleanup_errors=True)
    path = Path(run_dir if run_dir is not None else temporary.name)  # type: ignore[union-attr]
    was_there = (path / TABLE).exists()
    with _without_bars():
        data = _section(config, "data")
        if "path" in data or "table" in data:
            raise UserError("mtrain.fit: data: has a path or table beside the table that was given; leave one of them out")
        try:
            given["data"] = {**data, **_place(table, path)}
            with _as_the_table(f"data.path {TABLE}"):
                guess = discover(given, source="mtrain.fit")
            if show:
                print_findings(guess, console)
            runs.train(check_config(guess.tree, "mtrain.fit"), Path(), path, console, str(resume))
        except Preempted as stop:
            raise KeyboardInterrupt(f"stopped at step {stop.step}") from None
        except UserError:
            if not was_there and not RunDir(path).is_run:
                with suppress(OSError):  # nothing is left of a run that did not begin
                    (path / TABLE).unlink()
                    path.rmdir()
            raise
    return Run(path, temporary)


def _names(given: Iterable[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise UserError(f"mtrain.fit: {name}: found {section!r}, expected a dict of keys and values")
    return section


def _place(table: AnyTable, path: Path) -> dict[str, str]:
    """Where a run finds the table: a path as it is, what is in memory in the run directory.

    Raises:
        UserError: the directory is something else, or of a run on another table.
    """
    if isinstance(table, str | Path):
        return {"path": str(table)}
    arrow = _to_arrow(table)
    run = RunDir(path)
    run.check_free()
    file = path / TABLE
    if (run.is_run or file.exists()) and not (file.is_file() and pq.read_table(file).equals(arrow)):
        raise UserError(f"run_dir {path}: holds {'a run on ' * run.is_run}another table; choose another run_dir, or remove it")
    if not run.is_run:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir {path}: cannot be written: {error.strerror}") from None
        run.save_table(TABLE, arrow)
    return {"path": TABLE, "root": str(path.resolve())}


def _as_path(table: AnyTable, file: Path) -> str:
    if isinstance(table, str | Path):
        return str(table)
    pq.write_table(_to_arrow(table), file, row_group_size=_ROW_GROUP)
    return str(file)


def _to_arrow(table: Any) -> pa.Table:
    """Columns as Arrow has them, with text as names.

    Raises:
        UserError: the table is of another type, two columns have one name, or a column holds values of several types.
    """
    if isinstance(table, datasets.Dataset):
        return table.with_format("arrow")[:].replace_schema_metadata(None)
    if isinstance(table, pd.DataFrame):
        frame = table.set_axis([str(name) for name in table.columns], axis=1)
        if not frame.columns.is_unique:
            twice = frame.columns[frame.columns.duplicated()][0]
            raise UserError(f"table: two columns are named '{twice}', expected unique names; rename one")
        try:
            return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise UserError(f"table: {' '.join(map(str, error.args))}; expected one type in a column") from None
    if isinstance(table, pa.Table):
        return table.replace_schema_metadata(None)
    raise UserError(
        f"table: found {type(table).__name__}, expected a pandas DataFrame, pyarrow Table, datasets.Dataset or a path"
    )


@contextmanager
def _as_the_table(file: str) -> Iterator[None]:
    """Messages do not name the file in which a table from memory lies."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(file, "the table")) from None


@contextmanager
def _without_bars() -> Iterator[None]:
    """`datasets` does not print over the progress."""
    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()

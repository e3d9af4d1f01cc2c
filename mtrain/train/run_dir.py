"""A run directory tells everything; every command takes one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mtrain.config import Config, differences, load_config, to_yaml
from mtrain.data.order import mix
from mtrain.errors import UserError
from mtrain.parallel.world import World
from mtrain.tasks import TaskTable
from mtrain.train.checkpoint import Checkpoints, Saved
from mtrain.train.stop import Preempted
from mtrain.writing import replacing

T = TypeVar("T")

PREEMPTED = "preempted"
TABLE = "data.parquet"  # of a run on a table that was in memory
BESIDE = (".", "baseline")  # how names begin that are not of a run: of unfinished files, and what mtrain baseline writes
HISTORY = "history.parquet"
EVALUATIONS = 200  # that the history keeps: where there are more, every second one of them goes
_NO_MODEL = "holds no model yet, as it has not been evaluated; continue it with mtrain train"

# Changing these does not make another run.
MAY_CHANGE = (
    "run_dir", "tracker", "data.root", "data.workers", "data.in_memory", "data.retries", "data.on_error", "train.epochs",
    "train.steps", "train.micro_batch", "train.log_every", "train.save_every", "train.keep_checkpoints",
    "train.timeout_minutes", "train.compile", "train.max_bad_steps", "select.patience", "select.predictions",
)  # fmt: skip


class RunDir:
    """Files of one run: config.yaml, tasks.parquet, features.json, split.parquet, metrics.jsonl, history.parquet,
    per_task.parquet, predictions-<part>.parquet, summary.json, checkpoints/, and `preempted` while a signal has stopped it. A
    run over several split seeds holds one such directory per seed, split-<seed>/. All ranks read it, rank 0 writes."""

    def __init__(self, path: Path, keep_checkpoints: int = 1, world: World | None = None):
        self.path, self.keep_checkpoints, self.world = path, keep_checkpoints, world
        self.writes = world is None or world.is_first
        self.checkpoints = Checkpoints(path / "checkpoints", keep_checkpoints, world)
        self._lines = b""  # of the curve, not written yet

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def is_run(self) -> bool:
        return self.config_file.is_file()

    @property
    def has_trained(self) -> bool:
        return any(self.path.glob("checkpoints/step-*")) or any(self.path.glob("split-*/checkpoints/step-*"))

    def start(self, config: Config) -> None:
        """Create the directory, or check that it is of the same run.

        Raises:
            UserError: it holds a run with another configuration (what differs is named) or something else.
        """
        if self.is_run:
            before = self.config()
            for unit in ("epochs", "steps"):
                old, new = getattr(before.train, unit), getattr(config.train, unit)
                if old is not None and new is not None and new < old and self.has_trained:
                    raise UserError(
                        f"run_dir {self.path}: train.{unit}: {old:g} -> {new:g}; a run can be made longer, not shorter; choose "
                        "another --run_dir"
                    )
            changed = differences(before, config, MAY_CHANGE)
            if changed:
                more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
                raise UserError(
                    f"run_dir {self.path}: holds a run with another configuration: {'; '.join(changed[:3])}{more}; "
                    "choose another --run_dir or remove it"
                )
        self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir {self.path}: cannot be written: {error.strerror}") from error
        self._write_text("config.yaml", to_yaml(config))

    def check_free(self) -> None:
        """Whether the directory is a run, or has nothing in it but a table for one and baselines.

        Raises:
            UserError: it holds something else.
        """
        if self.is_run or not self.path.exists():
            return
        if not self.path.is_dir() or any(p.name != TABLE and not p.name.startswith(BESIDE) for p in self.path.iterdir()):
            raise UserError(f"run_dir {self.path}: exists and is not a run; choose another --run_dir")

    def config(self) -> Config:
        if not self.is_run:
            raise UserError(f"run {self.path}: holds no config.yaml; expected the directory of a run")
        return load_config(self.config_file)

    def splits(self) -> list[RunDir]:
        """The runs of the split seeds; the run itself if there is one seed."""
        return list(self.by_seed(self.config().split.seeds).values())

    def by_seed(self, seeds: Sequence[int]) -> dict[int, RunDir]:
        """Where a run with these split seeds keeps each of them."""
        if len(seeds) == 1:
            return {seeds[0]: self}
        return {seed: RunDir(self.path / f"split-{seed}", self.keep_checkpoints, self.world) for seed in seeds}

    def model(self) -> Saved:
        """The checkpoint to predict with: of the refit where that is done, else the selected one.

        Raises:
            UserError: there is none yet, or it is damaged.
        """
        return self._kept("final", "best")

    def refuse_baseline(self) -> None:
        """Refuse a run that `mtrain baseline` wrote, which keeps scores and predictions but no model.

        Raises:
            UserError: this is one.
        """
        if not self.is_run:
            return
        one = self.splits()[0].path
        if (one / "per_task.parquet").is_file() and not (one / "features.json").is_file() and not self.has_trained:
            raise UserError(
                f"run {self.path}: is a baseline, which keeps no model: it is for mtrain report only; name a trained run"
            )

    def best(self) -> Saved:
        """The selected checkpoint, before a refit; the refitted one in a run that was made from a file of its model."""
        return self._kept("best", "final")

    def _kept(self, *keys: str) -> Saved:
        """The checkpoint that the newest one names by the first of these keys that it has."""
        newest = self.checkpoints.newest()
        if newest is None and self.checkpoints.refused:
            raise UserError(self.checkpoints.refused[0])
        step = None if newest is None else next((newest.about[key] for key in keys if newest.about[key]), None)
        if newest is None or step is None:
            raise UserError(f"run {self.path}: {_NO_MODEL}")
        return newest if step == newest.step else self.checkpoints.at(step)

    def mark_preempted(self, stop: Preempted) -> None:
        """Leave a file for launch scripts to look at, which do not see a process's exit status."""
        self._write_text(PREEMPTED, f"{stop} at step {stop.step}\n")

    def unmark_preempted(self) -> None:
        if self.writes:
            (self.path / PREEMPTED).unlink(missing_ok=True)

    def tasks(self) -> TaskTable:
        return self._read("tasks.parquet", TaskTable.load)

    def save_averages(self, summary: dict[str, Any]) -> None:
        """summary.json, and tasks.parquet and per_task.parquet with the mean over the split seeds."""
        for name in ("tasks.parquet", "per_task.parquet"):
            frame = pd.concat([pd.read_parquet(one.path / name) for one in self.splits()])
            by_task = frame.groupby("task", sort=False)
            numbers = frame.select_dtypes("number").columns
            averaged = by_task.first().assign(**by_task[list(numbers)].mean()).reset_index()[frame.columns]
            self.save_table(name, pa.Table.from_pandas(averaged, preserve_index=False))
        self.save_json("summary.json", summary)

    def check_kinds(self, tasks: TaskTable) -> None:
        """Whether the tasks that were there when the run was last trained are what they were.

        Raises:
            UserError: a task has another kind or other classes.
        """
        if not (self.path / "tasks.parquet").is_file() or not self.has_trained:
            return
        before = {task.name: (task.kind, task.classes) for task in self.tasks()}
        for task in tasks:
            if before.get(task.name, (task.kind, task.classes)) != (task.kind, task.classes):
                raise UserError(
                    f"run {self.path}: task '{task.name}' has another kind or other classes since the run began: the data have "
                    "changed; bring them back, or start a new run with another --run_dir (--init_from takes over the trunk "
                    "and the heads of tasks that stay)"
                )

    def save_json(self, name: str, value: Any) -> None:
        self._write_text(name, json.dumps(value, indent=1, allow_nan=False))

    def load_json(self, name: str) -> Any:
        return self._read(name, lambda path: json.loads(path.read_text()))

    def save_table(self, name: str, table: pa.Table) -> None:
        if not self.writes:
            return
        with self._said(name), replacing(self.path / name) as unfinished:
            pq.write_table(table, unfinished, compression="zstd")

    def save_predictions(self, part: str, most: int, table: pa.Table) -> None:
        """Keep predictions of a part, as `evaluate.predictions` gives them: of rows drawn at random, with all their labels, so
        many as there are at `most` labels of. The drawing depends on the row alone, so that it is alike in all runs."""
        row_P = table["row"].to_numpy()
        if len(row_P) > most:
            rows, labels_R = np.unique(row_P, return_counts=True)
            order = np.argsort(mix(rows.astype(np.uint64)))
            kept = rows[order[np.cumsum(labels_R[order]) <= most]]
            table = table.filter(np.isin(row_P, kept))
        self.save_table(f"predictions-{part}.parquet", table)

    def per_task(self) -> pa.Table:
        return self._read("per_task.parquet", pq.read_table)

    def predictions(self, part: str) -> pa.Table | None:
        name = f"predictions-{part}.parquet"
        return self._read(name, pq.read_table) if (self.path / name).is_file() else None

    def history(self) -> pa.Table | None:
        """Of the evaluations while training and each task: step, task, skill, metric (the selected one), loss (deviance a
        label), weight (of the balancer)."""
        return self._read(HISTORY, pq.read_table) if (self.path / HISTORY).is_file() else None

    def add_history(self, step: int, columns: dict[str, Any]) -> None:
        """Add an evaluation to `history`; `columns` hold a value for each task."""
        if not self.writes:
            return
        task = pa.array(columns["task"]).dictionary_encode()
        numbers = {name: pa.array(values, pa.float32()) for name, values in columns.items() if name != "task"}
        added = pa.table({"step": pa.array(np.full(len(task), step, np.int32)), "task": task, **numbers})
        before = self.history()
        if before is not None:
            steps = np.unique(before["step"].to_numpy())
            if len(steps) >= EVALUATIONS:
                before = before.filter(np.isin(before["step"].to_numpy(), steps[1::2]))
            added = pa.concat_tables([before, added]).unify_dictionaries()
        self.save_table(HISTORY, added)

    def log(self, line: dict[str, Any]) -> None:
        """Add a line to the curve; where the disk is full, when there is room again."""
        if not self.writes:
            return
        self._lines += (json.dumps(line, allow_nan=False) + "\n").encode()
        path = self.path / "metrics.jsonl"
        with suppress(OSError):
            with path.open("ab", buffering=0) as file:
                size = file.tell()
                written = file.write(self._lines)
                if written < len(self._lines):
                    file.truncate(size)
                    return
            self._lines = b""

    def cut_log(self, step: int) -> list[dict[str, Any]]:
        """Forget the lines after a step, and a line that was cut short: a resumed run writes them again. Returns the others.
        The history forgets what is later too."""
        if self.writes and (history := self.history()) is not None:
            self.save_table(HISTORY, history.filter(history["step"].to_numpy() <= step))
        path = self.path / "metrics.jsonl"
        if not (path.is_file() and self.writes):
            return []
        whole = [(line, json.loads(line)) for line in path.read_text().split("\n")[:-1]]
        kept = [(line, values) for line, values in whole if values["step"] <= step]
        self._write_text("metrics.jsonl", "".join(f"{line}\n" for line, _ in kept))
        return [values for _, values in kept]

    def _write_text(self, name: str, text: str) -> None:
        if not self.writes:
            return
        with self._said(name), replacing(self.path / name) as unfinished:
            unfinished.write_text(text)

    def _read(self, name: str, read: Callable[[Path], T]) -> T:
        """A file of the run.

        Raises:
            UserError: it is not there, or damaged.
        """
        path = self.path / name
        if not path.is_file():
            raise UserError(f"run {self.path}: holds no {name}; expected a run that has been trained to its end")
        try:
            return read(path)
        except (OSError, ValueError, KeyError) as error:  # Arrow's errors are among them
            reason = str(error).partition("\n")[0]
            raise UserError(f"run {self.path}: {name} cannot be read, it is damaged: {reason}") from None

    @contextmanager
    def _said(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"run {self.path}: {name} cannot be written: {error.strerror or error}") from None


def average_summaries(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of each number over split seeds, with `sd` (n - 1) of each metric's reductions beside it."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for summary in summaries for key in summary):
        values = [summary.get(key) for summary in summaries]
        present = [value for value in values if value is not None]
        if present and isinstance(present[0], dict):
            merged[key] = average_summaries(present)
            if "scored" in present[0]:
                numbers = {k: [value[k] for value in present if value.get(k) is not None] for k in merged[key]}
                merged[key]["sd"] = {k: float(np.std(n, ddof=1)) for k, n in numbers.items() if len(n) > 1}
        elif all(value == values[0] for value in values):
            merged[key] = values[0]
        elif all(isinstance(value, int | float) for value in present):
            merged[key] = float(np.mean(present))
        else:
            merged[key] = values
    return merged

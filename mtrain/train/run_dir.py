"""A run directory tells everything; every command takes one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mtrain.config import Config, check_config, differences, to_yaml
from mtrain.errors import UserError
from mtrain.tasks import TaskTable
from mtrain.train.checkpoint import Checkpoints

# Changing these does not make another run.
MAY_CHANGE = (
    "run_dir", "tracker", "data.root", "data.workers", "data.in_memory", "train.epochs", "train.steps", "train.log_every",
    "train.keep_checkpoints", "train.compile", "train.max_bad_steps", "select.patience",
)  # fmt: skip


class RunDir:
    """Files of one run: config.yaml, tasks.parquet, features.json, split.parquet, metrics.jsonl, per_task.parquet,
    summary.json and checkpoints/. A run over several split seeds holds one such directory per seed, split-<seed>/."""

    def __init__(self, path: Path, keep_checkpoints: int = 1):
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints", keep_checkpoints)

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def is_run(self) -> bool:
        return self.config_file.is_file()

    @property
    def has_trained(self) -> bool:
        return any(self.path.glob("checkpoints/*.pt")) or any(self.path.glob("split-*/checkpoints/*.pt"))

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
        elif self.path.exists() and not (self.path.is_dir() and all(p.name.startswith(".") for p in self.path.iterdir())):
            raise UserError(f"run_dir {self.path}: exists and is not a run; choose another --run_dir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_text("config.yaml", to_yaml(config))
        except OSError as error:
            raise UserError(f"run_dir {self.path}: cannot be written: {error.strerror}") from error

    def config(self) -> Config:
        if not self.is_run:
            raise UserError(f"run {self.path}: holds no config.yaml; expected the directory of a run")
        return check_config(yaml.safe_load(self.config_file.read_text()), str(self.config_file))

    def splits(self) -> list[RunDir]:
        """The runs of the split seeds; the run itself if there is one seed."""
        seeds = self.config().split.seeds
        return [self] if len(seeds) == 1 else [RunDir(self.path / f"split-{seed}") for seed in seeds]

    def tasks(self) -> TaskTable:
        path = self.path / "tasks.parquet"
        if not path.is_file():
            raise UserError(f"run {self.path}: holds no tasks.parquet; expected a run that has been trained")
        return TaskTable.load(path)

    def check_tasks(self, tasks: TaskTable) -> None:
        """Refuse to continue a run with other tasks than those it was started with.

        Raises:
            UserError: the first task that is new, is gone, or has another kind or other classes.
        """
        if not (self.path / "tasks.parquet").is_file() or not self.has_trained:
            return
        before, now = ({task.name: (task.kind, task.classes) for task in table} for table in (self.tasks(), tasks))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                what = "is new" if name not in before else "is gone" if name not in now else "has another kind or other classes"
                raise UserError(
                    f"run {self.path}: task '{name}' {what} since the run began: the data have changed; bring them back, or "
                    "start a new run with another --run_dir (--init_from takes over the trunk and the heads of tasks that stay)"
                )

    def save_averages(self, summary: dict[str, Any]) -> None:
        """summary.json, and tasks.parquet and per_task.parquet with the mean over the split seeds."""
        for name in ("tasks.parquet", "per_task.parquet"):
            frame = pd.concat([pd.read_parquet(one.path / name) for one in self.splits()])
            by_task = frame.groupby("task", sort=False)
            numbers = frame.select_dtypes("number").columns
            averaged = by_task.first().assign(**by_task[list(numbers)].mean()).reset_index()[frame.columns]
            self.save_table(name, pa.Table.from_pandas(averaged, preserve_index=False))
        self.save_json("summary.json", summary)

    def save_json(self, name: str, value: Any) -> None:
        self._write_text(name, json.dumps(value, indent=1, allow_nan=False))

    def load_json(self, name: str) -> Any:
        path = self.path / name
        if not path.is_file():
            raise UserError(f"run {self.path}: holds no {name}; expected a run that has been trained")
        return json.loads(path.read_text())

    def save_table(self, name: str, table: pa.Table) -> None:
        unfinished = self.path / f".{name}"
        pq.write_table(table, unfinished)
        os.replace(unfinished, self.path / name)

    def log(self, line: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def cut_log(self, step: int) -> None:
        """Forget the lines after a step, and a line that was cut short: a resumed run writes them again."""
        path = self.path / "metrics.jsonl"
        if path.is_file():
            whole = path.read_text().split("\n")[:-1]
            kept = [line for line in whole if json.loads(line)["step"] <= step]
            self._write_text("metrics.jsonl", "".join(line + "\n" for line in kept))

    def _write_text(self, name: str, text: str) -> None:
        unfinished = self.path / f".{name}"
        unfinished.write_text(text)
        os.replace(unfinished, self.path / name)


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

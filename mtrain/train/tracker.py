"""Where a run's curve goes beside its own directory: nowhere, W&B or TensorBoard, both through accelerate."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import Accelerator
from numpy.typing import ArrayLike, NDArray

from mtrain.components import Spec, build
from mtrain.errors import UserError

SHOWN_ROWS = 20  # of a table, where a tracker shows text


class Tracker:
    """The contract, and a tracker that keeps nothing: derive your own from it and write the methods that it needs. Rank 0
    alone calls them. Names are few, however many tasks there are: what belongs to a task comes in histograms and tables."""

    def start(self, accelerator: Accelerator, run_dir: Path, config: dict[str, Any], run_id: str | None) -> str | None:
        """Begin, or continue the run with this id; returns the run's id. `config` is the resolved one."""
        return run_id

    def log(self, values: dict[str, float], step: int) -> None:
        """Numbers by name. Steps never fall, but after a run was continued."""

    def log_histogram(self, name: str, values: ArrayLike, step: int) -> None:
        """A number for each task, NaN where there is none."""

    def log_table(self, name: str, columns: Mapping[str, Any], step: int) -> None:
        """Columns by name, worst tasks first."""

    def complete(self) -> None:
        """The run has been trained to its end, and its directory holds everything."""

    def finish(self) -> None:
        """Nothing more will come, because the run is complete or has stopped."""


class NoTracker(Tracker):
    """Keeps nothing."""


class Wandb(Tracker):
    """Weights & Biases. Offline unless `mode: online` or WANDB_MODE asks for it: names of tasks may be confidential.

    Args:
        project: W&B project.
        mode: default: WANDB_MODE, else offline.
        name: shown name of the run; default: the run directory's.
        checkpoint: also store the model's checkpoint, as an artifact.
        report: also store what `mtrain report` makes of the run.

    Raises:
        UserError: wandb is not installed, or what draws the report.
    """

    def __init__(
        self,
        project: str = "mtrain",
        mode: Literal["online", "offline", "disabled"] | None = None,
        name: str | None = None,
        checkpoint: bool = False,
        report: bool = False,
    ):
        _require("wandb", "wandb")
        if report:
            from mtrain.report.html import plotly_script

            plotly_script()
        self.project, self.mode, self.name = project, mode, name
        self.checkpoint, self.report = checkpoint, report

    def start(self, accelerator: Accelerator, run_dir: Path, config: dict[str, Any], run_id: str | None) -> str | None:
        import wandb

        run_id = run_id or uuid.uuid4().hex[:8]
        options = {
            "mode": self.mode or os.environ.get("WANDB_MODE", "offline"),
            "dir": str(run_dir),
            "name": self.name or run_dir.name,
            "id": run_id,
            "resume": "allow",
            "settings": wandb.Settings(silent=True),
        }
        accelerator.init_trackers(self.project, config=None, init_kwargs={"wandb": options})
        self.run = accelerator.get_tracker("wandb", unwrap=True)
        self.run.config.update(config, allow_val_change=True)
        self.accelerator, self.run_dir = accelerator, run_dir
        return run_id

    def log(self, values: dict[str, float], step: int) -> None:
        self.accelerator.log(values, step=step)

    def log_histogram(self, name: str, values: ArrayLike, step: int) -> None:
        import wandb

        if len(finite := _finite(values)):
            self.accelerator.log({name: wandb.Histogram(np_histogram=np.histogram(finite, bins=50))}, step=step)

    def log_table(self, name: str, columns: Mapping[str, Any], step: int) -> None:
        import pandas as pd
        import wandb

        self.accelerator.log({name: wandb.Table(dataframe=pd.DataFrame(dict(columns)))}, step=step)

    def complete(self) -> None:
        import wandb

        if self.checkpoint:
            from mtrain.train.run_dir import RunDir

            artifact = wandb.Artifact(f"model-{self.run.id}", type="model")
            artifact.add_dir(str(RunDir(self.run_dir).model().path))
            self.run.log_artifact(artifact)
        if self.report:
            from mtrain.report.html import write_report

            path = self.run_dir / "report.html"
            write_report([self.run_dir], path)
            self.run.log({"report": wandb.Html(path.read_text())})

    def finish(self) -> None:
        _finish(self.accelerator)


class TensorBoard(Tracker):
    """TensorBoard; its files are in the run directory's `tensorboard/`. Tables are shown by their first rows.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self) -> None:
        _require("tensorboard", "mtrain[tensorboard]")

    def start(self, accelerator: Accelerator, run_dir: Path, config: dict[str, Any], run_id: str | None) -> str | None:
        from accelerate.utils import LoggerType

        accelerator.project_configuration.set_directories(str(run_dir))
        accelerator.log_with = [LoggerType.TENSORBOARD]
        accelerator.init_trackers("tensorboard")
        self.accelerator, self.writer = accelerator, accelerator.get_tracker("tensorboard", unwrap=True)
        self.writer.add_text("config", "".join(f"    {key}: {value}\n" for key, value in config.items()))
        return run_id

    def log(self, values: dict[str, float], step: int) -> None:
        self.accelerator.log(values, step=step)

    def log_histogram(self, name: str, values: ArrayLike, step: int) -> None:
        if len(finite := _finite(values)):
            self.writer.add_histogram(name, finite, step)

    def log_table(self, name: str, columns: Mapping[str, Any], step: int) -> None:
        rows = [[str(cell).replace("|", "\\|") for cell in row[:SHOWN_ROWS]] for row in columns.values()]
        lines = [list(columns), ["---"] * len(columns), *zip(*rows, strict=True)]
        self.writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def finish(self) -> None:
        _finish(self.accelerator)


def build_tracker(spec: Spec) -> Tracker:
    """The tracker of a config.

    Raises:
        UserError: it cannot be built, is none, or a package that it needs is not installed.
    """
    tracker = build(spec, TRACKERS, "tracker")
    if not isinstance(tracker, Tracker):
        raise UserError(f"tracker: '{spec.class_path}' is not a mtrain.train.tracker.Tracker; derive it from that class")
    return tracker


def _require(package: str, install: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        raise UserError(f'tracker: {package} is not installed; pip install "{install}"') from None


def _finish(accelerator: Accelerator) -> None:
    while accelerator.trackers:  # end_training would also end the processes' group; the next split has trackers of its own
        accelerator.trackers.pop().finish()


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    value_T = np.asarray(values, np.float64)
    return value_T[np.isfinite(value_T)]


TRACKERS: dict[str, type[Tracker]] = {
    "none": NoTracker,
    "Wandb": Wandb,
    "wandb": Wandb,
    "TensorBoard": TensorBoard,
    "tensorboard": TensorBoard,
}

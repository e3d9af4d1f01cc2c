"""Where a run's curve goes beside its own directory: nowhere, or W&B through accelerate."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any, Literal, Protocol

from accelerate import Accelerator


class Tracker(Protocol):
    """The contract. `start` gets the resolved config and the id of the run to continue, and returns the run's id."""

    def start(self, accelerator: Accelerator, run_dir: Path, config: dict[str, Any], run_id: str | None) -> str | None: ...

    def log(self, values: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class NoTracker:
    """Keeps nothing."""

    def start(self, accelerator: Accelerator, run_dir: Path, config: dict[str, Any], run_id: str | None) -> str | None:
        return run_id

    def log(self, values: dict[str, float], step: int) -> None:
        pass

    def finish(self) -> None:
        pass


class Wandb:
    """Weights & Biases. Offline unless `mode: online` or WANDB_MODE asks for it: names of tasks may be confidential.

    Args:
        project: W&B project.
        mode: default: WANDB_MODE, else offline.
        name: shown name of the run; default: the run directory's.
    """

    def __init__(
        self,
        project: str = "mtrain",
        mode: Literal["online", "offline", "disabled"] | None = None,
        name: str | None = None,
    ):
        self.project, self.mode, self.name = project, mode, name

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
        run = accelerator.get_tracker("wandb", unwrap=True)
        run.config.update(config, allow_val_change=True)
        self.accelerator = accelerator
        return run_id

    def log(self, values: dict[str, float], step: int) -> None:
        self.accelerator.log(values, step=step)

    def finish(self) -> None:
        for tracker in self.accelerator.trackers:  # end_training would also end the processes' group
            tracker.finish()


TRACKERS: dict[str, type] = {"none": NoTracker, "Wandb": Wandb, "wandb": Wandb}

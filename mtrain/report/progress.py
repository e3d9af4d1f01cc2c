"""What a person sees while a run trains: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0


class TrainingProgress:
    """Loss, selected metric, rows per second and time left. Use as a context manager around the loop."""

    def __init__(self, console: Console, title: str, total_steps: int, metric: str):
        self.console, self.title, self.total, self.metric = console, title, total_steps, metric
        self.fields: dict[str, Any] = {"loss": float("nan"), "score": float("nan"), "rows": 0.0}
        self.started = self.last_line = time.monotonic()
        self.first_step: int | None = None
        self.bar: Progress | None = None

    def __enter__(self) -> TrainingProgress:
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("loss {task.fields[loss]:.4f}"),
                TextColumn(self.metric + " {task.fields[score]:.4f}"),
                TextColumn("{task.fields[rows]:,.0f} rows/s"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.bar.start()
            self.bar_task = self.bar.add_task(self.title, total=self.total, **self.fields)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, step: int, **fields: float) -> None:
        """Show that `step` steps are done; fields not given keep their value."""
        self.fields.update(fields)
        if self.bar is not None:
            self.bar.update(self.bar_task, completed=step, **self.fields)
            return
        now = time.monotonic()
        if self.first_step is None:
            self.first_step, self.started = step, now
        if now - self.last_line < PLAIN_EVERY_S:
            return
        self.last_line = now
        done = step - self.first_step
        left = f"{(self.total - step) * (now - self.started) / done:.0f} s left" if done else ""
        self.console.print(
            f"{self.title}: step {step}/{self.total}  loss {self.fields['loss']:.4f}  {self.metric} "
            f"{self.fields['score']:.4f}  {self.fields['rows']:,.0f} rows/s  {left}".rstrip(),
            highlight=False,
            soft_wrap=True,
        )

"""What a person sees while a run trains: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0


class TrainingProgress:
    """Loss, selected metric, rows per second and time left. Use as a context manager around the loop.

    Args:
        start: steps that were done before.
        metric: name of the selected metric; empty where none is evaluated.
    """

    def __init__(self, console: Console, title: str, start: int, total: int, metric: str):
        self.console, self.title, self.start, self.total, self.metric = console, title, start, total, metric
        self.known: dict[str, str] = {}
        self.started = self.last_line = time.monotonic()
        self.bar: Progress | None = None

    def __enter__(self) -> TrainingProgress:
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.bar.start()
            self.bar_task = self.bar.add_task(self.title, total=self.total, completed=self.start, text="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, step: int, **fields: float) -> None:
        """Show that `step` steps are done; `loss`, `score` and `rows` (a second) keep their value where not given."""
        shown: dict[str, Any] = {"loss": "loss {:.4f}", "score": self.metric + " {:.4f}", "rows": "{:,.0f} rows/s"}
        self.known |= {name: shown[name].format(value) for name, value in fields.items()}
        text = "  ".join(self.known[name] for name in shown if name in self.known)
        if self.bar is not None:
            self.bar.update(self.bar_task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self.last_line < PLAIN_EVERY_S:
            return
        self.last_line = now
        left = (self.total - step) * (now - self.started) / (step - self.start)
        line = f"{self.title}: step {step}/{self.total}  {text}  {left:.0f} s left"
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

"""What a person sees while something long runs: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mtrain.report.say import say

PLAIN_EVERY_S = 10.0


class ShownProgress:
    """How much is done, and the time left. Use as a context manager around the loop.

    Args:
        start: what was done before, of `total`.
        done: how a plain line says it, from these two numbers.
    """

    def __init__(self, console: Console, title: str, start: int, total: int, done: str = "{:,} of {:,} rows"):
        self.console, self.title, self.start, self.total, self.done = console, title, start, total, done
        self.started = self.last_line = time.monotonic()
        self.bar: Progress | None = None

    def __enter__(self) -> Self:
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

    def show(self, done: int, text: str = "") -> None:
        """Show that `done` of the total are done."""
        if self.bar is not None:
            self.bar.update(self.bar_task, completed=done, text=text)
            return
        now = time.monotonic()
        if now - self.last_line < PLAIN_EVERY_S:
            return
        self.last_line = now
        left = (self.total - done) * (now - self.started) / max(1, done - self.start)
        shown = [self.done.format(done, self.total), text, f"{left:.0f} s left"]
        line = f"{self.title}: {'  '.join(part for part in shown if part)}"
        say(self.console, line)


class TrainingProgress(ShownProgress):
    """Also loss, selected metric and rows per second.

    Args:
        start: steps that were done before.
        metric: name of the selected metric; empty where none is evaluated.
    """

    def __init__(self, console: Console, title: str, start: int, total: int, metric: str):
        super().__init__(console, title, start, total, "step {}/{}")
        self.metric = metric
        self.known: dict[str, str] = {}

    def update(self, step: int, **fields: float) -> None:
        """Show that `step` steps are done; `loss`, `score` and `rows` (a second) keep their value where not given."""
        shown: dict[str, Any] = {"loss": "loss {:.4f}", "score": self.metric + " {:.4f}", "rows": "{:,.0f} rows/s"}
        self.known |= {name: shown[name].format(value) for name, value in fields.items()}
        self.show(step, "  ".join(self.known[name] for name in shown if name in self.known))

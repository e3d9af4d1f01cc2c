"""What a person sees while something long runs: a few live lines in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from mtrain.report.say import say

PLAIN_EVERY_S, LIVE_EVERY_S = 10.0, 0.25
MOST_SHARE = 0.008  # of the time that drawing may take
SHOWN_TASKS = 5
_TREND = 24  # evaluations
_BARS = "▁▂▃▄▅▆▇█"


class ShownProgress:
    """How much is done, and the time left. Use as a context manager around the loop.

    The lines are drawn by whoever calls `show`, at most four times a second and in less than 1 % of the time: no thread draws
    behind the loop's back, and the cursor stays visible, so that a process that is ended leaves the terminal as it was.

    Args:
        start: what was done before, of `total`.
        done: how it is said, from these two numbers.
    """

    def __init__(self, console: Console, title: str, start: int, total: int, done: str = "{:,} of {:,} rows"):
        self.console, self.title, self.start, self.total, self.done = console, title, start, total, done
        self.started = self.drawn = time.monotonic()
        self.at, self.note, self.pause = start, "", PLAIN_EVERY_S
        self.live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.console.is_dumb_terminal and not self.console.quiet:
            self.live = Live(self.view(), console=self.console, auto_refresh=False, transient=True)
            self.live.start(refresh=True)
            self.console.show_cursor(True)
            self.pause = LIVE_EVERY_S
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.update(self.view())
            self.live.stop()

    def show(self, done: int, note: str = "") -> None:
        """Show that `done` of the total are done."""
        self.at, self.note = done, note
        now = time.monotonic()
        if now - self.drawn < self.pause:
            return
        self.drawn = now
        if self.live is not None:
            self.live.update(self.view(), refresh=True)
            self.drawn = time.monotonic()
            self.pause = max(LIVE_EVERY_S, (self.drawn - now) / MOST_SHARE)
            return
        parts = [self.done.format(done, self.total), self.text(), f"{self.left(now):.0f} s left"]
        say(self.console, f"{self.title}: {'  '.join(part for part in parts if part)}")

    def left(self, now: float) -> float:
        """Seconds, at the mean speed until now."""
        return (self.total - self.at) * (now - self.started) / max(1, self.at - self.start)

    def text(self) -> str:
        """What is said beside how much is done."""
        return self.note

    def view(self) -> RenderableType:
        """The live lines."""
        line = Table.grid(*(Column(no_wrap=True, overflow="ellipsis") for _ in range(5)), padding=(0, 2))
        left = "" if self.at == self.start else f"{timedelta(seconds=round(self.left(time.monotonic())))} left"
        share = f"{self.at / max(1, self.total):.0%}"
        bar = ProgressBar(total=max(1, self.total), completed=self.at, width=30)
        line.add_row(self.title, bar, share, self.done.format(self.at, self.total), left)
        return Group(line, _line(self.text()))


class TrainingProgress(ShownProgress):
    """Also loss, selected metric and its course, rows per second, share of the time spent waiting for data, peak memory, and
    which tasks are worst and which have improved most.

    Args:
        start: steps that were done before.
        metric: name of the selected metric; empty where none is evaluated.
    """

    def __init__(self, console: Console, title: str, start: int, total: int, metric: str):
        super().__init__(console, title, start, total, "step {}/{}")
        self.metric = metric
        self.values: dict[str, float] = {}
        self.scores: list[float] = []
        self.tasks: RenderableType = ""
        self.first: tuple[int, NDArray[np.float64]] | None = None

    def update(self, step: int, **values: float) -> None:
        """Show that `step` steps are done; what is not given keeps its value.

        Args:
            values: loss, rows (a second), wait (share of the time) and memory (MB).
        """
        self.values |= values
        self.show(step)

    def evaluated(self, step: int, score: float, skill_T: NDArray[np.float64], names: Sequence[str]) -> None:
        """Show the selected metric and each task's skill on the validation part (NaN: not scored)."""
        self.scores.append(score)
        if self.live is not None:
            self.first = self.first or (step, skill_T)
            self.tasks = _tasks(skill_T, self.first[1], self.first[0], names)
        self.show(step)

    def text(self) -> str:
        values, parts = self.values, []
        if "loss" in values:
            parts.append(f"loss {values['loss']:.4f}")
        if self.scores:
            parts.append(f"{self.metric} {self.scores[-1]:.4f}")
        if self.live is not None and len(self.scores) > 1:
            parts.append(f"{sparkline(self.scores[-_TREND:])} {self.scores[-1] - self.scores[-2]:+.4f}")
        if "rows" in values:
            parts.append(f"{values['rows']:,.0f} rows/s")
        if self.live is not None and "wait" in values:
            parts.append(f"{values['wait']:.0%} waiting for data")
        if self.live is not None and "memory" in values:
            parts.append(f"{values['memory']:,.0f} MB")
        return "  ".join(parts)

    def view(self) -> RenderableType:
        return Group(super().view(), self.tasks) if self.tasks else super().view()


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, from the lowest to the highest; a blank where there is none."""
    known = [value for value in values if math.isfinite(value)]
    low, span = (min(known), (max(known) - min(known)) or 1.0) if known else (0.0, 1.0)
    last = len(_BARS) - 1
    return "".join(_BARS[round((v - low) / span * last)] if math.isfinite(v) else " " for v in values)


def _tasks(skill_T: NDArray[np.float64], first_T: NDArray[np.float64], since: int, names: Sequence[str]) -> RenderableType:
    """The tasks with the lowest skill, and those whose skill has risen most since the first evaluation."""
    gain_T = skill_T - first_T
    worst = np.argsort(skill_T)[: min(SHOWN_TASKS, int(np.isfinite(skill_T).sum()))]
    improved = np.argsort(-gain_T)[: min(SHOWN_TASKS, int((gain_T > 0).sum()))]
    table = Table.grid(padding=(0, 2))
    for _ in range(2):
        table.add_column(no_wrap=True, max_width=32)
        table.add_column(no_wrap=True, justify="right")
    table.add_row("worst tasks", "skill", *(("most improved", f"since step {since}") if len(improved) else ()), style="dim")
    for i in range(max(len(worst), len(improved))):
        left = [names[worst[i]], f"{skill_T[worst[i]]:.3f}"] if i < len(worst) else ["", ""]
        right = [names[improved[i]], f"{gain_T[improved[i]]:+.3f}"] if i < len(improved) else ["", ""]
        table.add_row(*map(Text, left + right))
    return table


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")

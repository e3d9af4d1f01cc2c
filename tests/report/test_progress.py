"""The progress of a training, in a terminal and in a log file."""

from io import StringIO

import pytest
from rich.console import Console

from mtrain.report import progress
from mtrain.report.progress import TrainingProgress


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_log_file_gets_plain_lines_every_ten_seconds(clock):
    console = Console(file=StringIO(), width=40)
    with TrainingProgress(console, "training", 100, 200, "median [skill]") as shown:
        for step in range(101, 200):
            clock.now += 1
            shown.update(step, loss=0.5, rows=1234.0)
            if step == 110:
                shown.update(step, score=0.25)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "training: step 110/200  loss 0.5000  1,234 rows/s  90 s left"
    assert lines[1] == "training: step 120/200  loss 0.5000  median [skill] 0.2500  1,234 rows/s  80 s left"
    assert len(lines) == 9


def test_a_terminal_gets_one_bar_that_goes_away():
    console = Console(file=StringIO(), width=120, force_terminal=True)
    with TrainingProgress(console, "training", 50, 200, "mean skill") as shown:
        assert shown.bar is not None
        assert shown.bar.tasks[0].completed == 50
        shown.update(150, loss=0.5, rows=10.0)
        shown.update(150, score=0.125)
        assert shown.bar.tasks[0].completed == 150
        assert shown.bar.tasks[0].fields["text"] == "loss 0.5000  mean skill 0.1250  10 rows/s"
    assert "training" in console.file.getvalue()

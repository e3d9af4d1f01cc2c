"""The progress of a training, in a terminal and in a log file."""

import os
import re
import signal
import subprocess
import sys
import time
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from mtrain.report import progress
from mtrain.report.progress import ShownProgress, TrainingProgress, sparkline

NAMES = ["a[red]", "b", "c", "d", "e", "f", "g"]


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def terminal(width=120, **options):
    return Console(file=StringIO(), width=width, force_terminal=True, **options)


def last_screen(console):
    """The lines of the last drawing, without control sequences."""
    drawn = re.split(r"\x1b\[1A\x1b\[2K|\r\x1b\[2K", console.file.getvalue())
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn[-1])


def test_a_log_file_gets_plain_lines_every_ten_seconds(clock):
    console = Console(file=StringIO(), width=40)
    with TrainingProgress(console, "training", 100, 200, "median [skill]") as shown:
        for step in range(101, 200):
            clock.now += 1
            shown.update(step, loss=0.5, rows=1234.0, wait=0.1, memory=10.0)
            if step == 110:
                shown.evaluated(step, 0.25, np.zeros(7), NAMES)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "training: step 110/200  loss 0.5000  1,234 rows/s  90 s left"
    assert lines[1] == "training: step 120/200  loss 0.5000  median [skill] 0.2500  1,234 rows/s  80 s left"
    assert len(lines) == 9


def test_a_terminal_shows_loss_trend_speed_memory_and_the_worst_and_most_improved_tasks(clock):
    console = terminal()
    first = np.array([0.5, -0.25, np.nan, 0.1, 0.2, 0.3, 0.0])
    with TrainingProgress(console, "training", 50, 200, "median skill") as shown:
        clock.now += 30
        shown.evaluated(75, 0.125, first, NAMES)
        clock.now += 30
        shown.update(150, loss=0.5, rows=1234.0, wait=0.04, memory=812.0)
        shown.evaluated(150, 0.25, first + np.array([0.01, 0.5, 0, 0.2, 0.3, 0.05, -0.9]), NAMES)
        clock.now += 1
        shown.update(150)
        screen = last_screen(console)
    assert "75%" in screen
    assert "step 150/200" in screen
    assert "0:00:30 left" in screen
    assert "loss 0.5000  median skill 0.2500  ▁█ +0.1250  1,234 rows/s  4% waiting for data  812 MB" in screen
    head, *lines = screen[screen.index("worst tasks") :].splitlines()
    assert head.split() == ["worst", "tasks", "skill", "most", "improved", "since", "step", "75"]
    rows = [line.split() for line in lines]
    assert [row[:2] for row in rows] == [["g", "-0.900"], ["b", "0.250"], ["d", "0.300"], ["f", "0.350"], ["e", "0.500"]]
    assert [row[2:] for row in rows] == [
        ["b", "+0.500"],
        ["e", "+0.300"],
        ["d", "+0.200"],
        ["f", "+0.050"],
        ["a[red]", "+0.010"],
    ]


def test_the_lines_go_away_and_the_cursor_is_never_hidden():
    console = terminal()
    with TrainingProgress(console, "training", 0, 10, "") as shown:
        shown.update(5, loss=1.0)
        console.print("a line above")
        cursor = re.findall(r"\x1b\[\?25([hl])", console.file.getvalue())
        assert cursor[-1] == "h"
    assert "a line above" in console.file.getvalue()
    assert last_screen(console).strip() == ""


def test_no_line_is_wrapped_in_a_narrow_terminal(clock):
    console = terminal(width=40)
    with TrainingProgress(console, "training", 0, 1_000_000, "worst_decile roc_auc") as shown:
        clock.now += 1
        shown.evaluated(1, 0.5, np.linspace(0, 1, 3), ["task " * 20, "b", "c"])
        clock.now += 1
        shown.update(2, loss=0.5, rows=1e6, wait=0.5, memory=1e5)
        lines = last_screen(console).splitlines()
    assert max(map(len, lines)) <= 40
    assert len(lines) <= 2 + 1 + 3 + 1


@pytest.mark.parametrize("console", [terminal(quiet=True), Console(file=StringIO(), quiet=True)])
def test_other_ranks_are_silent(console, clock):
    with TrainingProgress(console, "training", 0, 10, "") as shown:
        clock.now += 100
        shown.update(5, loss=1.0)
    assert console.file.getvalue() == ""


def test_drawing_is_rare_and_a_step_pays_almost_nothing(clock):
    console = terminal()
    with TrainingProgress(console, "training", 0, 10_000, "") as shown:
        size = len(console.file.getvalue())
        started = time.perf_counter()
        for step in range(10_000):
            shown.update(step)
        assert (time.perf_counter() - started) / 10_000 < 50e-6
        assert len(console.file.getvalue()) == size


def test_slow_drawing_is_done_less_often(clock, monkeypatch):
    console, drawn = terminal(), []
    with TrainingProgress(console, "training", 0, 10_000, "") as shown:

        def slowly(*_, **__):
            clock.now += 0.05
            drawn.append(clock.now)

        monkeypatch.setattr(shown.live, "update", slowly)
        for step in range(3000):
            clock.now += 0.01
            shown.update(step)
        monkeypatch.undo()
    assert 3 <= len(drawn) <= 6  # 30 s of steps, each drawing 50 ms: under 1 %


def test_other_loops_show_rows(clock):
    console = Console(file=StringIO(), width=80)
    with ShownProgress(console, "reading", 0, 2000) as shown:
        clock.now += 10
        shown.show(1000, "a.csv")
    assert console.file.getvalue() == "reading: 1,000 of 2,000 rows  a.csv  10 s left\n"


def test_a_trend_has_a_bar_for_each_value():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([float("nan"), 1.0, 3.0]) == " ▁█"
    assert sparkline([float("nan")]) == " "


def test_ctrl_c_ends_a_step_and_leaves_the_terminal_in_order():
    code = (
        "import sys, time\n"
        "from rich.console import Console\n"
        "from mtrain.report.progress import TrainingProgress\n"
        "from mtrain.train.stop import stop_signals\n"
        "console = Console(force_terminal=True, width=80)\n"
        "with TrainingProgress(console, 'training', 0, 10**6, '') as shown, stop_signals('SIGINT') as came:\n"
        "    step = 0\n"
        "    while not came():\n"
        "        step += 1; shown.update(step, loss=1.0); time.sleep(0.01)\n"
        "    console.print('stopped')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "TERM": "xterm"})
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 10)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"stopped" in out
    assert re.findall(rb"\x1b\[\?25([hl])", out)[-1] == b"h"

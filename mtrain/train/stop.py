"""How a process ends: signals that ask a run to stop, after a finished step and a checkpoint from which the same command
continues the run, and the end of processes that worked together."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

SAME = 2.0  # seconds in which a launcher passes on to its processes a signal that they have got themselves


class Preempted(Exception):
    """A run was stopped by a signal, at a checkpoint."""

    def __init__(self, number: int, step: int):
        super().__init__(signal.Signals(number).name)
        self.number, self.step = number, step


@contextmanager
def stop_signals(*names: str) -> Iterator[Callable[[], int | None]]:
    """Signals are noticed: gives a function that returns the number of the one that came, or None. A second one exits at
    once. Outside the main thread, where Python has no handlers, none is noticed."""
    came: list[tuple[int, float]] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def handle(number: int, frame: Any) -> None:
        now = time.monotonic()
        if came and not ("WORLD_SIZE" in os.environ and now - came[0][1] < SAME):
            os._exit(128 + number)
        came.append((number, now))

    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: came[0][0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def leave(status: int, together: bool = False) -> NoReturn:
    """Exit; `together`: all processes of the group do.

    Of several processes none takes the interpreter apart: a thread of Gloo that still has to let go of a tensor would abort it
    (pytorch/pytorch#179291), and DDP keeps those threads when its group is destroyed.
    """
    dist = sys.modules.get("torch.distributed")  # if no one has imported it there is no group
    if dist is None or not dist.is_initialized() or dist.get_world_size() == 1:
        sys.exit(status)
    if together:
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

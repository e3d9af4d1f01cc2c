"""Signals that ask a run to stop."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from mtrain.train.stop import stop_signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_is_noticed_and_what_handled_it_before_comes_back(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with stop_signals("SIGINT", "SIGTERM", "SIGUSR1") as stopped:
        assert stopped() is None
        os.kill(os.getpid(), number)
        assert stopped() == number
    assert signal.getsignal(number) is before


TWO = """
import os, signal
from mtrain.train.stop import stop_signals
with stop_signals("SIGINT", "SIGTERM", "SIGUSR1") as stopped:
    os.kill(os.getpid(), signal.SIGINT)
    print(int(stopped()), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print(int(stopped()), flush=True)
"""


def test_a_second_signal_ends_the_process_at_once():
    env = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    done = subprocess.run([sys.executable, "-c", TWO], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "2\n")


def test_a_signal_that_the_launcher_passes_on_again_at_once_is_the_same_one():
    done = subprocess.run([sys.executable, "-c", TWO], env=os.environ | {"WORLD_SIZE": "2"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n2\n")


def test_outside_the_main_thread_none_is_noticed_and_nothing_breaks():
    seen = []

    def inside():
        with stop_signals("SIGINT", "SIGTERM", "SIGUSR1") as stopped:
            seen.append(stopped())

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [None]

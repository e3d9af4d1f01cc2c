"""Signals that ask a run to stop."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from ports import free_port

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


HELD = """
import atexit, sys
import torch
import torch.distributed as dist
from mtrain.train.stop import leave
dist.init_process_group("gloo")
torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))  # keeps the group's threads
atexit.register(print, "last words")
sys.setswitchinterval(100)  # threads of Gloo that have not let go of a tensor yet wait for the interpreter
for _ in range(50):
    dist.all_reduce(torch.ones(3))
leave(7, together=True)
"""


def test_processes_of_a_group_leave_whatever_threads_of_gloo_still_hold():
    where = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    words = [sys.executable, "-c", HELD]
    both = [
        subprocess.Popen(words, env=where | {"RANK": f"{rank}"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [(*process.communicate(timeout=120), process.returncode) for process in both] == [("last words\n", "", 7)] * 2

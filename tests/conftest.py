"""No test touches the network, the user's caches or the user's data; small tensors are faster on one thread."""

import os
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", HF_HOME=tempfile.mkdtemp(prefix="mtrain-tests-"))

import atexit
import shutil

import datasets
import pytest
import torch

torch.set_num_threads(1)
datasets.disable_progress_bars()  # as the command does, before it imports them
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
DATA = os.environ.get("MTRAIN_DATA")  # real tables, for the tests that ask for them


def pytest_configure(config):
    """Other tests do not see them; the process that deals tests to workers leaves the variable to those."""
    if not getattr(config.option, "numprocesses", None):
        os.environ.pop("MTRAIN_DATA", None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def real_data(monkeypatch):
    """The folder of the public data sets, or a skip that says what is missing."""
    if DATA is None:
        pytest.skip("set MTRAIN_DATA to the folder of the public data sets to run this")
    monkeypatch.setenv("MTRAIN_DATA", DATA)
    return DATA

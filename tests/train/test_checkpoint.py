"""Checkpoints are whole or absent."""

import os

import pytest
import torch

from mtrain.errors import UserError
from mtrain.train.checkpoint import Checkpoints


def state(value):
    return {"step": value, "weights": {"w": torch.full((50,), float(value))}, "names": ["a", "b"], "nothing": None}


def test_what_is_read_is_what_was_written(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() is None
    checkpoints.save(3, state(3))
    found = checkpoints.latest()
    assert found["step"] == 3
    assert found["names"] == ["a", "b"]
    assert torch.equal(found["weights"]["w"], torch.full((50,), 3.0))


def test_the_latest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (9, 10, 100):
        checkpoints.save(step, state(step))
    checkpoints.save_best(state(9))
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "step-000000010.pt", "step-000000100.pt"]
    assert checkpoints.latest()["step"] == 100
    assert checkpoints.model()["step"] == 9
    checkpoints.save_refit(state(7))
    assert checkpoints.model()["step"] == 7
    assert checkpoints.best()["step"] == 9


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_crash_before_the_rename_leaves_the_one_before_and_no_rubbish_later(tmp_path, monkeypatch, name):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))
    monkeypatch.setattr(os, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, state(2))
    monkeypatch.undo()
    assert checkpoints.latest()["step"] == 1
    checkpoints.save(3, state(3))
    assert os.listdir(tmp_path) == ["step-000000003.pt"]


def test_a_full_disk_is_said_in_one_line_and_the_one_before_stays(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        checkpoints.save(2, state(2))
    assert os.listdir(tmp_path) == ["step-000000001.pt"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_newest_checkpoint_is_refused_by_name_in_one_line(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state(1))
    checkpoints.save(2, state(2))
    path = tmp_path / "step-000000002.pt"
    content = bytearray(path.read_bytes())
    at = content.find(torch.full((50,), 2.0).numpy().tobytes())
    content[at + 7] ^= 1
    path.write_bytes({"cut": bytes(content[: len(content) // 2]), "flipped": bytes(content), "empty": b""}[damage])
    with pytest.raises(UserError, match=r"step-000000002\.pt: is damaged") as caught:
        checkpoints.latest()
    assert "\n" not in str(caught.value)


def test_a_run_without_a_best_checkpoint_says_so(tmp_path):
    with pytest.raises(UserError, match=r"best\.pt: no such file"):
        Checkpoints(tmp_path).model()

"""The checkpoints' bench, on small cases."""

import json
from dataclasses import replace

import pytest

from mtrain.bench import checkpoint
from mtrain.errors import UserError


def test_every_case_is_measured_and_written(monkeypatch, tmp_path):
    small = {"width": 8, "tasks": 10, "features": 6, "repeats": 2}
    monkeypatch.setattr(checkpoint, "CASES", [replace(case, **small) for case in checkpoint.CASES])
    results = checkpoint.run(tmp_path / "checkpoint.json")
    assert json.loads((tmp_path / "checkpoint.json").read_text()) == results
    assert [result["case"] for result in results] == ["4mb", "400mb"]
    for result in results:
        assert result["bench"] == "checkpoint"
        assert result["block_over_memcpy"] == pytest.approx(result["block_ms"] / result["memcpy_ms"])
        assert min(result[key] for key in ("mb", "memcpy_ms", "slowdown", "save_s", "restore_s")) > 0


def test_the_cases_are_as_large_as_they_say():
    sizes = {
        c.name: sum(t.nbytes for t in checkpoint.tensors_of(checkpoint.make_snapshot(c, "meta"))) for c in checkpoint.CASES
    }
    assert sizes == {"4mb": pytest.approx(4e6, rel=0.03), "400mb": pytest.approx(4e8, rel=0.03)}


def test_a_case_that_is_not_there_is_said():
    with pytest.raises(UserError, match="no case '40mb'; did you mean"):
        checkpoint.run(cases=["40mb"])

"""The bench of experts, on small cases, through the command."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from mtrain.bench import experts


def test_every_form_is_measured_beside_a_shared_bottom_with_as_many_values(monkeypatch, tmp_path):
    monkeypatch.setattr(experts, "SETTINGS", [replace(one, features=16) for one in experts.SETTINGS[1:3]])
    plain = experts.measure
    monkeypatch.setattr(experts, "measure", lambda setting, path: plain(setting, path, tasks=10, steps=2))
    results = experts.run(tmp_path / "experts.json", ["hidden-64"])
    assert json.loads((tmp_path / "experts.json").read_text()) == results
    assert [(result["case"], result["form"]) for result in results] == [("hidden-64", form) for form in experts.FORMS]
    shared, *others = results
    assert shared["over_shared"] == 1
    for result in others:
        assert result["parameters"] == pytest.approx(shared["parameters"], rel=0.02)  # biases
        assert result["over_shared"] > 0


def test_a_case_of_a_bench_without_cases_is_refused():
    command = [sys.executable, "-m", "mtrain", "bench", "stream", "--case", "routed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "mtrain: bench stream has no cases, found --case routed; leave it out\n"

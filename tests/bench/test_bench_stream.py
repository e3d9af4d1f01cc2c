"""The bench of streams runs, on few tasks, and says what it promises."""

import json

import pytest

from mtrain.bench import stream


def test_the_bench_writes_its_figures_and_checks_what_it_times(tmp_path, monkeypatch, capsys):
    for name, value in {"TASKS": 30, "COLUMNS": 3, "LARGEST": 200, "BATCH": 32, "ROUNDS": 1, "INTERLEAVE_S": 0.3}.items():
        monkeypatch.setattr(stream, name, value)
    monkeypatch.setattr(stream, "INPUTS", ["x0", "x1", "x2"])
    stream.run(tmp_path / "figures.json")
    cold, warm = json.loads((tmp_path / "figures.json").read_text())
    assert (cold["case"], warm["case"]) == ("cold", "warm")
    keys = (
        "vs_interleave",
        "vs_interleave_arrow",
        "vs_pyarrow",
        "first_batch_s",
        "peak_mb",
        "state_kb",
        "restore_s",
        "rows_per_s",
    )
    for result in (cold, warm):
        assert result.keys() == {"bench", "case", *keys}
        assert all(result[key] > 0 for key in keys)
    assert warm["vs_interleave"] == pytest.approx(cold["vs_interleave"] * warm["rows_per_s"] / cold["rows_per_s"])
    assert "cold:" in capsys.readouterr().out

"""The heads' bench, on small cases."""

import json
from dataclasses import replace

import pytest

from mtrain.bench import heads
from mtrain.errors import UserError

SMALL = {"tasks": 6, "features": 8, "hidden": 4, "batch": 12}


@pytest.fixture
def small_cases(monkeypatch):
    cases = [replace(c, **SMALL, active=c.active and 3, compiled=False) for c in heads.CASES]
    monkeypatch.setattr(heads, "CASES", [c if c.name != "scale-10000" else replace(c, tasks=60) for c in cases])


def test_every_case_is_checked_measured_and_written(small_cases, tmp_path):
    results = heads.run(tmp_path / "heads.json", repeats=1)
    assert json.loads((tmp_path / "heads.json").read_text()) == results
    assert [r["case"] for r in results] == [c.name for c in heads.CASES]
    by_case = {r["case"]: r for r in results}
    for r in results:
        assert r["bench"] == "heads"
        assert r["bank_ms"] > 0
        assert r["compile_ms"] is None
        if r["loop_ms"] is not None:
            assert r["speedup"] == pytest.approx(r["loop_ms"] / r["bank_ms"])
    grid, ragged, routed = (by_case[f"{name}-1000x256"] for name in ("grid", "ragged", "routed"))
    assert grid["over_gemm"] == pytest.approx(grid["bank_ms"] / grid["gemm_ms"])
    assert grid["vmap_ms"] > 0
    assert ragged["vmap_ms"] is None  # heads of different shapes cannot be stacked
    assert routed["gemm_ms"] is routed["over_gemm"] is None
    assert by_case["scale-1000"]["loop_ms"] is None
    assert by_case["scale-10000"]["over_scale_1000"] > 0


def test_only_the_named_cases_run(small_cases):
    assert [r["case"] for r in heads.run(cases=["routed-1000x256"], repeats=1)] == ["routed-1000x256"]


def test_a_loop_that_does_not_compile_in_time_is_no_figure():
    assert heads.compiled_loop_ms(heads.CASES[0], limit_s=0.01) is None


def test_an_unknown_case_is_refused():
    with pytest.raises(UserError, match="there is no case 'grid-1000x65'; did you mean 'grid-1000x64'"):
        heads.run(cases=["grid-1000x65"])

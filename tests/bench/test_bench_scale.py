"""The bench of several processes, on small cases."""

import json
from dataclasses import replace

import pytest

from mtrain.bench import scale
from mtrain.errors import UserError


@pytest.mark.slow
def test_every_case_is_measured_on_one_and_two_processes(monkeypatch, tmp_path):
    small = {"tasks": 40, "width": 16, "layers": 2, "hidden": 24, "batch": 60, "rows": 800, "steps": 2}
    classes = {"exchange": {"classes": 200}}
    monkeypatch.setattr(scale, "CASES", [replace(case, **small, **classes.get(case.name, {})) for case in scale.CASES])
    results = scale.run(tmp_path / "scale.json")
    assert json.loads((tmp_path / "scale.json").read_text()) == results
    found = {(result["case"], result["ranks"]): result for result in results}
    modes = {"routed": "owners", "hot": "hot", "exchange": "exchange", "grid": "gather"}
    assert list(found) == [(case, ranks) for ranks in (1, 2) for case in modes]
    trunk, head = 2 * (16 * 16 + 16), 16 * 24 + 24 + 24 + 1
    for case, mode in modes.items():
        one, two = found[case, 1], found[case, 2]
        assert (one["mode"], two["mode"], two["bench"]) == (None, mode, "scale")
        assert (one["wire_mb"], one["wire_mb_ddp"], one["wire_over_ddp"], one["collectives_mb"]) == (0, 0, None, {})
        assert min(one["step_ms"], one["step_ms_ddp"], two["step_ms"], two["step_ms_ddp"]) > 0
        heads = 40 * head + (0 if case != "exchange" else 199 * 25)
        assert two["wire_mb_ddp"] == pytest.approx((4 * (trunk + heads) + 8) / 1e6)
        assert two["wire_over_ddp"] == pytest.approx(two["wire_mb"] / two["wire_mb_ddp"])
        assert two["collectives_mb"]["gradients"] == pytest.approx(4 * trunk / 1e6)
        assert one["head_mb_per_rank_ddp"] == pytest.approx(12 * heads / 1e6, rel=0.01)
    routed = found["routed", 2]
    assert routed["wire_mb"] == pytest.approx((4 * trunk + 4 * (4 * 40 + 1) + 32) / 1e6)
    assert routed["head_mb_per_rank"] == pytest.approx(routed["head_mb_per_rank_ddp"] / 2, rel=0.01)


def test_the_cases_have_the_designs_sizes():
    for case in scale.CASES:
        assert (case.tasks, case.width, case.layers, case.hidden, case.batch) == (1000, 512, 4, 64, 1024)


def test_a_head_gradient_that_crosses_ranks_is_found():
    case = replace(scale.CASES[0], tasks=3)
    scale.check_sent(case, {"gradients": 400.0, "all_reduce": 99.0}, trunk=400, head=100)
    for sent in ({"gradients": 404.0}, {"gradients": 400.0, "all_to_all": 100.0}):
        with pytest.raises(AssertionError, match="routed: "):
            scale.check_sent(case, sent, trunk=400, head=100)


def test_a_case_that_is_not_there_is_said():
    with pytest.raises(UserError, match="no case 'gird'; did you mean"):
        scale.run(cases=["gird"])

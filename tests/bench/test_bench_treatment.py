"""Two heads by treatment, one model and two models on a table with known effects."""

import json

import numpy as np
import pytest

from mtrain.bench import treatment


@pytest.mark.slow
def test_two_heads_err_less_in_the_individual_effect_than_one_model_and_than_two(tmp_path):
    """Minutes: 56 runs."""
    found = treatment.run(tmp_path / "pehe.json")
    print(
        json.dumps({method: {name: np.round(found[method][name], 3).tolist() for name in ("all", "test")} for method in found})
    )
    ours = np.array(found["two heads"]["all"])
    assert np.isfinite(ours).all()
    for other in ("treatment as an input", "two models"):
        assert ours.mean() < np.mean(found[other]["all"]), other
    assert json.loads((tmp_path / "pehe.json").read_text()) == found

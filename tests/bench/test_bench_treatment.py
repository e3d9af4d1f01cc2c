"""Two heads by treatment, one model and two models on a table with known effects."""

import json

import numpy as np
import pytest

from mtrain.bench import treatment


def test_paired_differences_have_the_standard_error_of_their_mean():
    less, error = treatment.paired([1.0, 2.0, 6.0], [0.0, 0.0, 3.0])
    assert (less, error) == pytest.approx((2.0, 1 / np.sqrt(3)))


@pytest.mark.slow
def test_two_heads_err_less_in_the_individual_effect_than_one_model_and_than_two(tmp_path):
    """Minutes: 64 runs."""
    found = treatment.run(tmp_path / "pehe.json")
    assert json.loads((tmp_path / "pehe.json").read_text()) == json.loads(json.dumps(found))
    for other in ("treatment as an input", "two models"):
        for rows in ("all", "test"):
            assert np.isfinite(found[other][rows]).all()
            less, error = treatment.paired(found[other][rows], found[treatment.OURS][rows])
            assert less > 2 * error, (other, rows, less, error)

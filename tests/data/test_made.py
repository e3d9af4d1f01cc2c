"""The embedded tables: what they promise of themselves."""

import numpy as np
import pyarrow as pa
import pytest

from mtrain.data.many_heads import many_heads
from mtrain.data.treatment import treatment


def test_treatment_has_known_outcomes_on_the_same_covariates_whatever_the_seed():
    first, second = treatment(), treatment(seed=1)
    x = [name for name in first.column_names if name.startswith("x")]
    assert len(x) == 48
    assert all(first[name] == second[name] for name in x)
    assert first["mu0"] != second["mu0"]
    assert treatment() == first
    for table in (first, second):
        t, y, w, mu0, mu1 = (table[name].to_numpy() for name in ("t", "y", "w", "mu0", "mu1"))
        noise = y - np.where(t == 1, mu1, mu0)
        assert np.std(noise) == pytest.approx(0.3, rel=0.1)
        assert 0.1 < t.mean() < 0.4
        assert abs(mu0[t == 1].mean() - mu0[t == 0].mean()) > 0.05  # the groups differ
        assert w[t == 1].sum() == pytest.approx(w[t == 0].sum())
        assert w.mean() == pytest.approx(1)
        part, count = np.unique(table["part"].to_numpy(zero_copy_only=False), return_counts=True)
        assert dict(zip(part, count, strict=True)) == pytest.approx({"train": 1132, "valid": 485, "test": 180}, abs=1)


def test_many_heads_has_as_many_labels_as_asked_half_of_them_classes():
    table = many_heads(heads=41)
    assert (table.num_rows, table.num_columns) == (1797, 42)
    assert pa.types.is_fixed_size_list(table["pixels"].type)
    classes = [len(table[f"class_{head}"].unique()) for head in range(1, 41, 2)]
    assert set(classes) == set(range(2, 11))
    assert all(abs(table[f"value_{head}"].to_numpy()).max() <= 1 for head in range(0, 41, 2))
    assert many_heads(heads=3)["class_1"] == table["class_1"]

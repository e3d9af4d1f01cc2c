"""Any number of tasks on scikit-learn's handwritten digits: regression and classification with 2 to 10 classes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def many_heads(heads: int = 100) -> pa.Table:
    """One row for each of the 1,797 scans: `pixels` (64 numbers), and a label column for each head.

    Every second head is a regression (`value_0`, `value_2`, ...): a random tanh feature of the pixels. The others have
    classes (`class_1`, ...): the pixels nearest to one of 2 to 10 random scans.

    Args:
        heads: how many.
    """
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(0)
    pixels_ND = load_digits().data
    x_ND = (pixels_ND - pixels_ND.mean()) / pixels_ND.std()
    columns: dict[str, pa.Array] = {"pixels": pa.FixedSizeListArray.from_arrays(pa.array(pixels_ND.ravel()), x_ND.shape[1])}
    for head in range(heads):
        if head % 2 == 0:
            columns[f"value_{head}"] = pa.array(np.tanh(x_ND @ rng.normal(size=x_ND.shape[1]) / 8))
        else:
            centre_KD = x_ND[rng.choice(len(x_ND), 2 + head // 2 % 9, replace=False)]
            nearest_N = (x_ND @ centre_KD.T - 0.5 * (centre_KD**2).sum(1)).argmax(1)
            columns[f"class_{head}"] = pa.array(nearest_N)
    return pa.table(columns)

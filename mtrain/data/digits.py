"""The embedded default: handwritten digits of which the upper half is given.

From the upper four rows of scikit-learn's 8 x 8 digits (1,797 real scans; Alpaydin and Kaynak 1998) predict the 32 lower
pixels (regression), the digit (multiclass), whether it is each digit (binary), which of each pair of digits it is
(binary, missing for the other digits), and counts of inked pixels in the lower half (poisson).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def digits() -> pa.Table:
    """One row per scan: `upper` (32 pixels, 0 to 16), and the label columns."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels, digit = data.images.astype(np.float32), data.target
    upper, lower = pixels[:, :4].reshape(-1, 32), pixels[:, 4:]
    columns: dict[str, pa.Array] = {"upper": pa.FixedSizeListArray.from_arrays(pa.array(upper.ravel()), 32)}
    columns |= {f"pixel_{r + 4}_{c}": pa.array(lower[:, r, c]) for r in range(4) for c in range(8)}
    columns["digit"] = pa.array([f"{d}" for d in digit])
    columns |= {f"is_{d}": pa.array((digit == d).astype(np.int8)) for d in range(10)}
    for a in range(10):
        for b in range(a + 1, 10):
            among = (digit == a) | (digit == b)
            columns[f"{a}_not_{b}"] = pa.array((digit == a).astype(np.int8), mask=~among)
    columns |= {f"ink_row_{r + 4}": pa.array((lower[:, r] > 0).sum(1)) for r in range(4)}
    columns |= {f"dark_row_{r + 4}": pa.array((lower[:, r] >= 12).sum(1)) for r in range(4)}
    columns["ink_lower"] = pa.array((lower > 0).sum((1, 2)))
    return pa.table(columns)

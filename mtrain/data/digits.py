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


def quarters() -> pa.Table:
    """One row per scan: its quarters `upper_left`, `upper_right`, `lower_left` and `lower_right` (16 pixels each, 0 to 16), and
    what to predict: the `digit` (multiclass), whether it is `even` (binary), and its `ink` (mean darkness, regression)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = data.images.astype(np.float32)
    columns: dict[str, pa.Array] = {}
    for i, row in enumerate(("upper", "lower")):
        for j, column in enumerate(("left", "right")):
            part = pixels[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            columns[f"{row}_{column}"] = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), 16)
    columns["digit"] = pa.array([f"{d}" for d in data.target])
    columns["even"] = pa.array((data.target % 2 == 0).astype(np.int8))
    columns["ink"] = pa.array(pixels.mean((1, 2)))
    return pa.table(columns)


def sensors() -> pa.Table:
    """Data sets of different columns in one table: each scan is seen by four sensors, whose pixels are columns of their own.

    A row is a `scan` as one `sensor` sees it: `top` the 16 pixels of its two top rows, `left` the 32 of its left half, `middle`
    the 8 of its fourth row, `coarse` the means of its 16 blocks of 2 x 2. Columns of other sensors are null; the label is the
    `digit`.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = data.images.astype(np.float32)
    seen = {
        "top": pixels[:, :2].reshape(-1, 16),
        "left": pixels[:, :, :4].reshape(-1, 32),
        "middle": pixels[:, 3],
        "coarse": pixels.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16),
    }
    tables = []
    for sensor, values in seen.items():
        columns: dict[str, pa.Array] = {f"{sensor}_{i}": pa.array(column) for i, column in enumerate(values.T)}
        columns["scan"], columns["sensor"] = pa.array(np.arange(len(values))), pa.array([sensor] * len(values))
        tables.append(pa.table(columns | {"digit": pa.array([f"{d}" for d in data.target])}))
    return pa.concat_tables(tables, promote_options="default")

"""Cora (Sen et al. 2008) with the split of Yang et al. 2016 (arXiv:1603.08861): 2,708 papers, their words and citations."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from mtrain.data.sources import existing, search_folders


def cora() -> pa.Table:
    """One row for each node: `node` (its number), `y` (its class, 0 to 6, as text) and `part` (train, valid, test or unused).

    From the arrays `y`, `train`, `val` and `test` (numbers of nodes) of cora/cora.npz, under $MTRAIN_DATA or in the working
    directory.
    """
    with np.load(existing("cora/cora.npz", search_folders(None), "graph")) as file:
        y_N = file["y"]
        part_N = np.full(len(y_N), "unused", dtype=object)
        for part, name in (("train", "train"), ("valid", "val"), ("test", "test")):
            part_N[file[name]] = part
    return pa.table({"node": np.arange(len(y_N)), "y": pa.array(y_N).cast(pa.string()), "part": pa.array(part_N)})

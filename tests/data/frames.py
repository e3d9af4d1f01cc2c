"""Frames in files of all types, and the check that a table has their rows."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

SMILES = [
    "CCO", "c1ccccc1", "CC(=O)O", "CCN(CC)CC", "C1CCCCC1", "O=C=O", "CC(C)O", "c1ccncc1", "CCCCCl", "N#CC", "CC=O", "OCCO",
]  # fmt: skip


def frame(first, rows):
    n = np.arange(first, first + rows)
    return pd.DataFrame({"n": n, "x": n / 4, "t": [f"row {i}" for i in n]})


def with_holes(data, share, seed=0):
    """The table with so large a share of its values missing, of all columns or by name."""
    rng = np.random.default_rng(seed)
    share = share if isinstance(share, dict) else dict.fromkeys(data.columns, share)
    return data.assign(**{name: data[name].mask(rng.random(len(data)) < missing) for name, missing in share.items()})


def laboratory(rows=300):
    """Samples with inputs of which some miss, and outcomes in numbered columns, of which 40 % miss."""
    rng = np.random.default_rng(0)
    inputs = pd.DataFrame(
        {
            "Proben-Nr.": [f"P-{i}" for i in range(rows)],
            "Temp (C)": rng.normal(size=rows).round(2),
            "pH": rng.normal(size=rows).round(2),
            "Material": rng.choice(["steel", "tin", "PVC"], rows),
            "Werk": rng.choice(["A", "B"], rows),
        }
    )
    outcomes = {f"Riss {i} [ja]": rng.integers(0, 2, rows) for i in range(1, 5)}
    outcomes |= {f"ok? {i}": rng.choice(["yes", "no"], rows) for i in range(1, 4)}
    outcomes |= {f"HV {i}": rng.normal(size=rows).round(2) for i in range(1, 4)}
    outcomes["Grade"] = rng.choice(["A", "B", "C"], rows)
    holes = {"Temp (C)": 0.08, "pH": 0.15, "Material": 0.06} | dict.fromkeys(outcomes, 0.4)
    return with_holes(inputs.assign(**outcomes), holes), list(outcomes)


def save(path, data, form=None, group=10):
    path = Path(path)
    form = form or path.name.split(".")[1]
    if form == "parquet":
        pq.write_table(pa.Table.from_pandas(data, preserve_index=False), path, row_group_size=group)
    elif form == "jsonl":
        data.to_json(path, orient="records", lines=True)
    else:
        data.to_csv(path, index=False, sep="\t" if form == "tsv" else ",")
    return str(path)


def parts(folder, form, sizes=(23, 5, 40)):
    first = np.cumsum([0, *sizes])
    return [save(folder / f"{i}.{form}", frame(int(first[i]), size)) for i, size in enumerate(sizes)], frame(0, sum(sizes))


def every_chunk(table, columns, workers=1):
    order = np.random.default_rng(0).permutation(len(table.key_C)) if workers > 1 else np.arange(len(table.key_C))
    with ThreadPoolExecutor(workers) as pool:
        found = dict(zip(order, pool.map(lambda c: table.read_chunk(int(c), columns), order), strict=True))
    return [found[c] for c in range(len(order))]


def check(table, expected, workers=1):
    """The contract, against pandas."""
    assert len(table) == len(expected) == table.start_C[-1]
    assert table.start_C[0] == 0
    assert (np.diff(table.start_C) > 0).all()
    assert table.key_C.dtype == np.uint64
    runs = 1 + np.count_nonzero(np.diff(table.key_C))
    assert len(set(table.key_C.tolist())) == runs  # chunks of one name (of a text file) follow each other
    columns = ["t", "n"]
    chunks = every_chunk(table, columns, workers)
    assert [len(chunk) for chunk in chunks] == np.diff(table.start_C).tolist()
    for found in (pa.concat_tables(chunks, promote_options="permissive"), table.read(columns)):
        assert found.column_names == columns
        assert found["n"].to_pylist() == expected["n"].tolist()
        assert found["t"].to_pylist() == expected["t"].tolist()

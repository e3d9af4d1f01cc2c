"""Small runs with tasks of every kind, for the tests beside."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mtrain.cli import main

GRADES = np.array(["low", "mid", "high"])


def mtrain(*words):
    """Run a command in this process; returns its exit status."""
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return done.value.code


def table(rows, seed=0):
    """Inputs with text and missing values, and labels of every kind; a fifth of the labels is missing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4))
    colour = rng.choice(["red", "green", "blue"], rows)
    grade = np.digitize(x[:, 3], [-0.5, 0.5])
    y = {
        "height": 1000 + 12 * x[:, 0],
        "sick": (x[:, 1] + rng.normal(size=rows) > 0.8).astype(float),
        "risk": (x[:, 0] + 2 * rng.normal(size=rows) > 0).astype(float),
        "visits": rng.poisson(np.exp(0.8 * x[:, 2])).astype(float),
        "spread": 3 * x[:, 0] - 2 * x[:, 1] + (colour == "red"),
        "grade": GRADES[grade].astype(object),
        "level": np.array(["a", "b"])[(x[:, 2] > 0).astype(int)].astype(object),
    }
    for values in y.values():
        values[rng.random(rows) < 0.2] = None if values.dtype == object else np.nan
    x[rng.random(x.shape) < 0.05] = np.nan
    inputs = {f"x{i}": pa.array(x[:, i], from_pandas=True) for i in range(4)}
    labels = {name: pa.array(values, from_pandas=True) for name, values in y.items()}
    return pa.table({"id": np.arange(rows), "colour": colour, **inputs, **labels})


def config(**changes):
    """Of the table above."""
    kinds = {
        "sick": {"class_path": "binary", "init_args": {"pos_weight": 4.0}},
        "visits": "poisson",
        "spread": {"class_path": "quantile", "init_args": {"levels": [0.1, 0.5, 0.9]}},
    }
    return {
        "data": {"path": "table.parquet", "layout": "grid", "key": "id", "workers": 1},
        "inputs": {"x*": "Numeric", "colour": "Categorical"},
        "tasks": {
            "labels": ["height", "sick", "risk", "visits", "spread", "grade", "level"],
            "by_name": {name: {"kind": kind} for name, kind in kinds.items()},
        },
        "model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [16]}}, "head": {"hidden": [8]}},
        "train": {"epochs": 4, "global_batch": 64, "lr": 0.02},
    } | changes


def trained(folder: Path, name: str, *words, **changes) -> Path:
    """Train a config in a folder that holds the table; returns the run."""
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config(**changes)))
    assert mtrain("train", folder / f"{name}.yaml", "--run_dir", folder / name, *words) == 0
    return folder / name


def predictions(folder: Path, *words, out="out.parquet") -> pa.Table:
    assert mtrain("predict", *words, "-o", folder / out) == 0
    return pq.read_table(folder / out)

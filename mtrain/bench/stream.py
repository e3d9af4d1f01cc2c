"""`mtrain bench stream`: batches mixed from 1000 Parquet tasks, against `datasets.interleave_datasets` and plain pyarrow.

1000 files of 64 float columns, 50 to 5,000 rows spread evenly on a logarithmic scale, drawn in proportion to their rows.
`cold` is the first epoch of a new loader, which reads and encodes every file; `warm` an epoch whose rows are in memory.
pyarrow reads the same columns of the same files into float32 matrices, one after another, with its own threads; the
fastest of its readers is taken. interleave_datasets streams the same files with the same probabilities, by row and as
Arrow batches; only some seconds of it are timed. Rounds alternate; medians are compared.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mtrain.config import Config, check_config
from mtrain.data.loader import Loader
from mtrain.data.prepare import Prepared, prepare, read_source
from mtrain.train.loop import build_loader, peak_memory_mb

TASKS, COLUMNS, SMALLEST, LARGEST, BATCH = 1000, 64, 50, 5000, 256
ROUNDS = 3
INTERLEAVE_S = 5.0
INPUTS = [f"x{i}" for i in range(COLUMNS)]


def write_tasks(folder: Path) -> list[Path]:
    """A Parquet file for each task."""
    generator = np.random.default_rng(0)
    sizes = np.geomspace(SMALLEST, LARGEST, TASKS).round().astype(int)
    paths = []
    for i, size in enumerate(generator.permutation(sizes).tolist()):
        x = generator.standard_normal((COLUMNS, size), dtype=np.float32)
        paths.append(folder / f"task_{i:04}.parquet")
        pq.write_table(pa.table(dict(zip(INPUTS, x, strict=True)) | {"y": x.sum(0)}), paths[-1])
    return paths


def make_config(folder: Path) -> Config:
    tree = {
        "data": {"layout": "files", "path": str(folder), "label": "y", "streaming": True},
        "inputs": {"x*": "Numeric"},
        "tasks": {"kind": "regression"},
        "split": {"parts": {"train": 1.0}},
        "sampler": "Proportional",
        "train": {"global_batch": BATCH},
    }
    return check_config(tree, "bench stream")


def make_loader(data: Prepared, config: Config) -> Loader:
    return build_loader(data, config, data.parts["train"])


def epoch(loader: Loader, start: int) -> float:
    """Rows a second of an epoch's batches."""
    rows, began = 0, time.perf_counter()
    for step in range(start, start + loader.steps_per_epoch):
        rows += len(loader.batch(step)[0].row_B)
    return rows / (time.perf_counter() - began)


def read_with_pyarrow(paths: list[Path]) -> float:
    """Rows a second of pyarrow reading the files into matrices."""
    rows, began = 0, time.perf_counter()
    for path in paths:
        table = pq.ParquetFile(path).read(INPUTS)
        rows += len(np.stack([column.to_numpy() for column in table.columns], axis=1))
    return rows / (time.perf_counter() - began)


def interleaved(paths: list[Path], as_arrow: bool) -> float:
    """Rows a second of `interleave_datasets`, after its first item."""
    files = datasets.load_dataset("parquet", data_files=[str(path) for path in paths], split="train", streaming=True)
    streams = [files.shard(len(paths), i) for i in range(len(paths))]
    sizes = np.array([pq.read_metadata(path).num_rows for path in paths], dtype=float)
    mixed = datasets.interleave_datasets(streams, probabilities=(sizes / sizes.sum()).tolist(), seed=0)
    items: Iterator[Any] = iter(mixed.with_format("arrow").iter(batch_size=BATCH)) if as_arrow else iter(mixed)
    next(items)
    rows, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < INTERLEAVE_S:
        item = next(items, None)
        if item is None:
            break
        rows += len(item) if as_arrow else 1
    items.close()  # type: ignore[attr-defined]
    return rows / seconds


def state_kb(loader: Loader) -> float:
    buffer = io.BytesIO()
    torch.save(loader.state_dict(), buffer)
    return len(buffer.getvalue()) / 1e3


def restore(data: Prepared, config: Config, state: dict[str, Any], step: int) -> tuple[float, torch.Tensor]:
    """Seconds until a new loader gives the batch of `step`, nothing of which is in memory, and the batch's rows."""
    began = time.perf_counter()
    loader = make_loader(data, config)
    loader.load_state_dict(state)
    rows = loader.batch(step)[0].row_B
    seconds = time.perf_counter() - began
    loader.close()
    return seconds, rows


def run(json_path: Path | None = None) -> list[dict[str, Any]]:
    """Time everything on the same files; prints and returns the figures."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_tasks(Path(folder))
        config = make_config(Path(folder))
        first_batch_s: list[float] = []
        cold: list[float] = []
        warm: list[float] = []
        pyarrow: list[float] = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            data = prepare(read_source(config), 0)
            loader = make_loader(data, config)
            loader.batch(0)
            first_batch_s.append(time.perf_counter() - began)
            loader.close()
            del data, loader
            data = prepare(read_source(config), 0)
            loader = make_loader(data, config)
            cold.append(epoch(loader, 0))
            warm.append(epoch(loader, loader.steps_per_epoch))
            step = 2 * loader.steps_per_epoch
            state, expected = loader.state_dict(), loader.batch(step)[0].row_B
            size_kb = state_kb(loader)
            loader.close()
            del data, loader
            if not pyarrow:  # of one training; what follows leaves holes in the heap
                peak_mb = peak_memory_mb(torch.device("cpu"))
            pyarrow.append(read_with_pyarrow(paths))
        restore_s, rows = restore(prepare(read_source(config), 0), config, state, step)
        if not torch.equal(rows, expected):
            raise AssertionError("the restored loader gives other rows")
        by_row, by_batch = interleaved(paths, as_arrow=False), interleaved(paths, as_arrow=True)
    results = []
    for case, figures in (("cold", cold), ("warm", warm)):
        speed = statistics.median(figures)
        result = {
            "bench": "stream",
            "case": case,
            "rows_per_s": speed,
            "vs_interleave": speed / by_row,
            "vs_interleave_arrow": speed / by_batch,
            "vs_pyarrow": speed / statistics.median(pyarrow),
            "first_batch_s": statistics.median(first_batch_s),
            "peak_mb": peak_mb,
            "state_kb": size_kb,
            "restore_s": restore_s,
        }
        results.append(result)
        print(
            f"{case}: {speed:,.0f} rows/s, {result['vs_interleave']:,.0f}x interleave_datasets by row, "
            f"{result['vs_interleave_arrow']:,.1f}x in Arrow batches, {result['vs_pyarrow']:.0%} of pyarrow's reading"
        )
    print(
        f"first batch after {results[0]['first_batch_s']:.1f} s, peak memory {peak_mb:,.0f} MB, state {size_kb:.0f} kB, "
        f"restored in {restore_s:.2f} s"
    )
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1) + "\n")
    return results

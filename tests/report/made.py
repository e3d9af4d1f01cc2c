"""Run directories as training leaves them, made from drawn labels and predictions."""

import itertools

import numpy as np
import pyarrow as pa

from mtrain.config import TargetsConfig, check_config
from mtrain.data.statistics import with_statistics
from mtrain.model.kinds import Binary, Multiclass, Poisson, Regression
from mtrain.report.affinity import affinity_tables
from mtrain.tasks import Task, TaskTable
from mtrain.train.evaluate import Counted, predictions, scores_of
from mtrain.train.run_dir import RunDir

KINDS = (Binary(), Regression(), Multiclass(), Poisson())
HOSTILE = ("<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", 'a "quoted" & <b>bold</b> name', "{{data}}")


def labels_of(kind, signal, seen):
    """Labels, predictions, and deviances of model and of a constant."""
    clipped = np.clip(seen, -4, 4)
    if isinstance(kind, Binary):
        y, p = (signal > 0).astype(float), 1 / (1 + np.exp(-2 * clipped))
        return y, p, -np.where(y > 0, np.log(p), np.log1p(-p)), np.full(len(y), np.log(2))
    if isinstance(kind, Multiclass):
        y = np.digitize(signal, [-0.5, 0.5]).astype(float)
        logits = -np.abs(clipped[:, None] - np.array([-1.0, 0.0, 1.0])) * 2
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return y, p, -np.log(p[np.arange(len(y)), y.astype(int)]), np.full(len(y), np.log(3))
    if isinstance(kind, Poisson):
        y, mean = np.floor(np.exp(np.clip(signal, -2, 2))), np.exp(np.clip(seen, -2, 2))
        return y, mean, 2 * (y * np.log(np.maximum(y, 1) / mean) - y + mean), (y - 1.2) ** 2 + 0.1
    return signal, seen, (signal - seen) ** 2, signal**2


def make_run(
    path,
    num_tasks=12,
    rows=150,
    seed=0,
    noise=1.0,
    split_hash="0123456789ab",
    names=None,
    affinity=False,
    kinds=KINDS,
    **sections,
):
    """Write a run directory of one split; runs of one `seed` and size have the same rows, labels and
    errors, which are `noise` times as large."""
    names = list(names or [f"task {t}" for t in range(num_tasks)])
    tree = {"data": {"path": "table.csv", "layout": "grid"}, "select": {"metric": "skill"}} | sections
    config = check_config(tree, "made")
    run = RunDir(path)
    run.start(config)
    rng = np.random.default_rng(seed)
    tasks = TaskTable(
        tuple(
            Task(name, kind, name, tuple("abc") if isinstance(kind, Multiclass) else ())
            for name, kind in zip(names, itertools.cycle(kinds), strict=False)
        )
    )
    row_P, task_P = np.nonzero(rng.random((rows, num_tasks)) < 0.4)
    signal_P = rng.normal(size=len(row_P))
    seen_P = signal_P + noise * rng.normal(size=len(row_P))
    collected, deviance_T, constant_T = {}, np.zeros(num_tasks), np.zeros(num_tasks)
    truth_P = np.zeros(len(row_P))
    for t, task in enumerate(tasks):
        own = task_P == t
        y, p, deviance, constant = labels_of(task.kind, signal_P[own], seen_P[own])
        truth_P[own], deviance_T[t], constant_T[t] = y, deviance.sum(), constant.sum()
        entry = (task_P[own], row_P[own], y, p, deviance.astype(np.float32), constant.astype(np.float32))
        collected.setdefault(task.kind.family, []).append(entry)
    tasks = with_statistics(tasks, task_P, truth_P, TargetsConfig(), False)
    counted = Counted(deviance_T, constant_T, np.bincount(task_P, minlength=num_tasks), collected)
    scores = scores_of([counted], tasks, 1)
    run.save_table("tasks.parquet", tasks.to_arrow())
    run.save_predictions("test", 10**6, predictions([counted], tasks))
    columns = {
        "task": names,
        "kind": [task.kind.name for task in tasks],
        "train_labels": np.round(np.geomspace(20, 20_000, num_tasks)).astype(int),
        "expected_share": np.full(num_tasks, 1 / num_tasks),
        "weight": np.linspace(0.5, 1.5, num_tasks),
        "test_labels": scores.label_count_T,
        **{f"test_{name}": values for name, values in scores.per_task.items()},
    }
    run.save_table("per_task.parquet", pa.table(columns))
    for step in range(20, 220, 20):
        rise_T = scores.per_task["skill"] * (1 - np.exp(-step / 60))
        run.log(
            {"step": step, "phase": "fit", "loss": 1 / step, "lr": 1e-3, "rows_per_second": 1000.0 + step, "data_wait": 0.02}
        )
        weight_T = np.linspace(1 - step / 400, 1 + step / 400, num_tasks)
        run.add_history(step, {"task": names, "skill": rise_T, "metric": rise_T, "loss": 1 - rise_T, "weight": weight_T})
    summary = {
        "test": scores.summary, "tasks": num_tasks, "rows": {"train": 3 * rows, "test": rows}, "inputs": 5,
        "labels": {"train": 3 * len(row_P), "test": len(row_P)}, "parameters": {"trunk": 100, "heads": 50}, "processes": 1,
        "selected_step": 200, "selected_value": 0.5, "seconds": 75.0, "rows_per_second": 1234.5, "data_wait": 0.02,
        "peak_memory_mb": 321.0, "test_inputs_seen_in_training": 0.0, "split_hash": split_hash, "notes": ["a note"],
    }  # fmt: skip
    run.save_json("summary.json", summary)
    if affinity:
        side = rng.normal(size=(num_tasks, 3))
        unit = side / np.linalg.norm(side, axis=1, keepdims=True)
        pairs, groups = affinity_tables(names, (unit @ unit.T).astype(np.float32), np.ones((num_tasks, num_tasks), np.float32))
        run.save_table("affinity.parquet", pairs)
        run.save_table("affinity_groups.parquet", groups)
    return run

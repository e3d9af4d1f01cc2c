"""What the training labels of each task say: constants, scales, and how to standardise targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mtrain.config import TargetsConfig
from mtrain.model.kinds import SortedLabels
from mtrain.tasks import TaskTable


def with_statistics(
    tasks: TaskTable, task_P: NDArray[np.int64], y_P: NDArray[np.float64], config: TargetsConfig, share_units: bool
) -> TaskTable:
    """The table with what its training labels say.

    `train_labels`, `mean`, `std` in original units; `center` and `scale` of standardised targets; the constant
    predictor's `constant_deviance` and `constant_loss` (with positive weights and label smoothing) and the kind's
    `typical_loss` in the units of the loss.
    """
    num_outputs_T = tasks.num_outputs_T
    labels = SortedLabels(task_P, y_P, num_outputs_T)  # means need no order
    mean_T, count_T = labels.mean(), labels.count_T
    var_T = labels.mean((labels.y_P - mean_T[labels.task_P]) ** 2)
    var_T[var_T <= (1e-12 * mean_T) ** 2] = 0.0  # equal labels: what is left is rounding
    center_T, scale_T = np.zeros(len(tasks)), np.ones(len(tasks))
    standardized_T = np.array([task.kind.standardized for task in tasks])
    shrink = config.shrink if config.shrink is not None else (5.0 if share_units else 0.0)
    if standardized_T.any():
        center_T, scale_T = _targets(count_T, mean_T, var_T, standardized_T, config, shrink)
    stats: dict[str, NDArray[Any]] = {
        "train_labels": count_T,
        "mean": mean_T,
        "std": np.sqrt(var_T),
        "center": center_T,
        "scale": scale_T,
    }
    y_std = (y_P - center_T[task_P]) / scale_T[task_P]
    constant = [np.zeros(0)] * len(tasks)
    deviance_T, loss_T, typical_T = np.full((3, len(tasks)), np.nan)
    for kind, at in tasks.by_kind().items():
        position = np.full(len(tasks), -1)
        position[at] = np.arange(len(at))
        mine = position[task_P] >= 0
        of_kind = SortedLabels.of(position[task_P[mine]], y_std[mine], num_outputs_T[at])
        params = kind.params(of_kind)
        for name, value in params.items():
            stats.setdefault(name, np.full(len(tasks), np.nan))[at] = value
        logits_TO = kind.constant(of_kind)
        for t, row in zip(at, logits_TO, strict=True):
            constant[t] = row[: num_outputs_T[t]]
        param_P = {k: torch.from_numpy(v)[of_kind.task_P] for k, v in params.items()}
        param_P["num_outputs"] = torch.from_numpy(of_kind.num_outputs_T)[of_kind.task_P]
        logits_PO, y_of_P = torch.from_numpy(logits_TO)[of_kind.task_P], torch.from_numpy(of_kind.y_P)
        deviance_T[at] = of_kind.mean(kind.deviances(logits_PO, y_of_P, param_P).numpy())
        loss_T[at] = of_kind.mean(kind.losses(logits_PO, y_of_P, param_P).numpy())
        typical_T[at] = kind.typical_loss(num_outputs_T[at], deviance_T[at])
    stats |= {"constant_deviance": deviance_T, "constant_loss": loss_T, "typical_loss": typical_T}
    return replace(tasks, stats=stats | {"constant": _ragged(constant)})


def _targets(
    count_T: NDArray, mean_T: NDArray, var_T: NDArray, use_T: NDArray, config: TargetsConfig, shrink: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centre and scale of each task; a task with n rows keeps n / (n + shrink) of its own."""
    use = use_T & (count_T > 0)
    weight = count_T[use] / count_T[use].sum()
    pooled_mean, within = weight @ mean_T[use], weight @ var_T[use]
    total = within + weight @ (mean_T[use] - pooled_mean) ** 2
    own = np.where(use, count_T / (count_T + shrink) if shrink else 1.0, 0.0)
    center = {"task": own * np.nan_to_num(mean_T) + (1 - own) * pooled_mean, "pooled": pooled_mean, "none": 0.0}
    pooled_var = within if config.center == "task" else total
    scale = {"task": np.sqrt(own * np.nan_to_num(var_T) + (1 - own) * pooled_var), "pooled": pooled_var**0.5, "none": 1.0}
    center_T = np.where(use_T, center[config.center], 0.0)
    scale_T = np.where(use_T, scale[config.scale], 1.0)
    return center_T, np.where(scale_T > 0, scale_T, 1.0)


def _ragged(rows: Sequence[NDArray[np.float64]]) -> NDArray[Any]:
    out = np.empty(len(rows), dtype=object)
    out[:] = list(rows)
    return out

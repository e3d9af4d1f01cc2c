"""Which tasks help or hurt one another: the cosines of their gradients, and groups of tasks that agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.cluster.hierarchy import average, fcluster, leaves_list
from scipy.spatial.distance import squareform

MOST_GROUPS = 20


def affinity_tables(
    names: Sequence[str], cosine_TT: NDArray[np.float32], steps_TT: NDArray[np.float32]
) -> tuple[pa.Table, pa.Table]:
    """Mean cosine of each pair of tasks; and the group of each task and its place in the order in which like stands by like.

    The affinity of two tasks is the cosine of their gradients, averaged over the steps in which both had labels (Fifty et al.
    2021, arXiv:2109.04617, look at the same question through losses after a step): above 0 a step for one also helps the other.
    Groups are those of average linkage with the distance 1 - affinity, as many as have the largest mean silhouette (Rousseeuw
    1987); pairs that never met count as 0.

    Args:
        cosine_TT, steps_TT: sums of cosines, and how many there are.

    Returns:
        `task_a, task_b, affinity, steps` for pairs that met, each once; `task, group, order`, groups from the largest down.
    """
    a, b = np.triu_indices(len(names), 1)
    met = steps_TT[a, b] > 0
    pairs = pa.table(
        {
            "task_a": pa.array(names).take(pa.array(a[met])),
            "task_b": pa.array(names).take(pa.array(b[met])),
            "affinity": cosine_TT[a, b][met] / steps_TT[a, b][met],
            "steps": steps_TT[a, b][met].astype(np.int64),
        }
    )
    affinity_TT = np.divide(cosine_TT, steps_TT, out=np.zeros_like(cosine_TT, dtype=np.float64), where=steps_TT > 0)
    group_T, order_T = _groups(affinity_TT)
    return pairs, pa.table({"task": list(names), "group": group_T, "order": order_T})


def _groups(affinity_TT: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    num_tasks = len(affinity_TT)
    if num_tasks < 3:
        return np.zeros(num_tasks, dtype=np.int64), np.arange(num_tasks)
    distance_TT = np.clip(1 - (affinity_TT + affinity_TT.T) / 2, 0, 2)
    np.fill_diagonal(distance_TT, 0)
    tree = average(squareform(distance_TT, checks=False))
    cuts = [fcluster(tree, number, criterion="maxclust") for number in range(2, min(MOST_GROUPS, num_tasks - 1) + 1)]
    group_T = max(cuts, key=lambda group_T: silhouette(distance_TT, group_T))
    sizes = np.bincount(group_T)
    rank = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    order_T = np.empty(num_tasks, dtype=np.int64)
    order_T[leaves_list(tree)] = np.arange(num_tasks)
    return rank[group_T], order_T


def silhouette(distance_TT: NDArray[np.float64], group_T: NDArray[np.int64]) -> float:
    """Mean over tasks of (b - a) / max(a, b): a the mean distance to the own group's others, b to the nearest other group's;
    0 for a task alone in its group."""
    _, group_T, count_G = np.unique(group_T, return_inverse=True, return_counts=True)
    if len(count_G) < 2:
        return 0.0
    sum_TG = distance_TT @ np.eye(len(count_G))[group_T]
    own = np.arange(len(group_T)), group_T
    within_T = sum_TG[own] / np.maximum(count_G[group_T] - 1, 1)
    mean_TG = sum_TG / count_G
    mean_TG[own] = np.inf
    other_T = mean_TG.min(1)
    largest_T = np.maximum(within_T, other_T)
    value_T = np.divide(other_T - within_T, largest_T, out=np.zeros_like(largest_T), where=largest_T > 0)
    return float(np.where(count_G[group_T] > 1, value_T, 0).mean())

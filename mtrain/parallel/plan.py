"""The plan: which rank owns each task."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Plan:
    """The rank that owns each task `[T]` in the order of `names`, and the expected load of each rank `[R]`."""

    names: tuple[str, ...]
    owner_T: NDArray[np.int64]
    load_R: NDArray[np.float64]

    @property
    def imbalance(self) -> float:
        """Largest load of a rank over the mean: 1 is perfect, and what no load at all gives."""
        largest = float(self.load_R.max())
        return largest / float(self.load_R.mean()) if largest > 0 else 1.0


def assign(names: Sequence[str], load_T: NDArray[np.float64], ranks: int) -> Plan:
    """Give tasks to ranks: by falling load, each to the rank with the least so far.

    Longest processing time first (Graham 1969): the largest load is at most 4/3 of the best possible one. Ties go by task
    name and to the lowest rank, so every process that knows names and loads, in any order, makes the same plan.

    Args:
        names: each task once.
        load_T: expected load of each task `[T]`, finite and >= 0, in any unit, e.g. rows a step.
        ranks: how many there are; with more ranks than tasks some own none.
    """
    load = np.asarray(load_T, dtype=np.float64).tolist()
    assert ranks > 0
    assert len(set(names)) == len(names) == len(load)
    assert all(0 <= each < np.inf for each in load)
    owner_T = np.zeros(len(names), dtype=np.int64)
    heap = [(0.0, rank) for rank in range(ranks)]
    for task in sorted(range(len(names)), key=lambda t: (-load[t], names[t])):
        least, rank = heap[0]
        owner_T[task] = rank
        heapq.heapreplace(heap, (least + load[task], rank))
    load_R = np.zeros(ranks)
    for total, rank in heap:
        load_R[rank] = total
    return Plan(tuple(names), owner_T, load_R)

"""Weights that a person gives."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Facts, Seen
from mtrain.balance.common import require
from mtrain.errors import UserError, matches, nearest


class Static(Balancer):
    """w_t as given: linear scalarisation with hand-made weights (Kurin et al. 2022, arXiv:2201.04122; Xin et al. 2022).

    Args:
        weights: numbers, at least 0, by task name or glob pattern. A task's own name goes before patterns, the first pattern
            that matches before later ones.
        default: the weight of all other tasks.

    Raises:
        UserError: a weight is negative or not finite; `begin`: a name or pattern fits no task, or every weight is 0.
    """

    def __init__(self, *, weights: dict[str, float], default: float = 1.0):
        for name, value in weights.items():
            require(0 <= value < math.inf, f"weights: that of '{name}'", value, "a finite number, at least 0")
        require(0 <= default < math.inf, "default", default, "a finite number, at least 0")
        self.given, self.default = weights, default

    def begin(self, facts: Facts) -> None:
        super().begin(facts)
        self.weight = torch.tensor(_resolve(self.given, self.default, facts.names), dtype=torch.float32, device=facts.device)

    def weights(self, seen: Seen) -> Tensor:
        return self.weight[seen.task_A]


def _resolve(given: Mapping[str, float], default: float, names: list[str]) -> list[float]:
    known = set(names)
    patterns = [pattern for pattern in given if pattern not in known]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise UserError(f"balancer: weights: no task is named or matches '{pattern}'{nearest(pattern, names)}")
    found = []
    for name in names:
        key = name if name in given else next((pattern for pattern in patterns if matches(name, pattern)), None)
        found.append(default if key is None else given[key])
    if not any(found):
        raise UserError("balancer: weights: every task has weight 0, expected some above 0")
    return found

"""Samplers: how often each task is drawn, from the number of its training rows."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mtrain.errors import UserError


class Sampler(Protocol):
    """The contract: probabilities `[T]` that sum to 1, 0 for tasks without rows. Users' own are named by import path."""

    def probabilities(self, rows_T: NDArray[np.int64]) -> NDArray[np.float64]: ...


class Temperature:
    """p_t ~ n_t^(1/tau), as for multilingual models (Arivazhagan et al. 2019, arXiv:1907.05019).

    Args:
        tau: 1 is proportional; larger values draw small tasks more often.
    """

    def __init__(self, tau: float = 2.0):
        if not tau > 0:
            raise UserError(f"sampler: tau is {tau}, expected a positive number")
        self.tau = tau

    def probabilities(self, rows_T: NDArray[np.int64]) -> NDArray[np.float64]:
        weight_T = np.where(rows_T > 0, np.power(np.maximum(rows_T, 1).astype(np.float64), 1 / self.tau), 0.0)
        return weight_T / weight_T.sum()


class Proportional(Temperature):
    """p_t ~ n_t: every row counts the same."""

    def __init__(self) -> None:
        super().__init__(tau=1.0)


class Equal:
    """Every task with rows is drawn equally often."""

    def probabilities(self, rows_T: NDArray[np.int64]) -> NDArray[np.float64]:
        return (rows_T > 0) / np.count_nonzero(rows_T)


SAMPLERS: dict[str, type] = {"Proportional": Proportional, "Temperature": Temperature, "Equal": Equal}

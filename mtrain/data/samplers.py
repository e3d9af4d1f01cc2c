"""Samplers: how often each task is drawn, from the number of its training rows."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mtrain.errors import UserError


class Sampler(Protocol):
    """The contract; users' own are named by import path.

    `probabilities` is called once at the start of every block of steps, with the training rows of each task `[T]`, of
    which some are above 0. It returns `[T]`: the probabilities with which the block draws tasks, which sum to 1 and are 0
    for tasks without rows. They must be a pure function of `rows_T` and of the sampler's own state before the call: the
    same on every rank and after a restore. A call may move the state on to the next block, see `StatefulSampler`.
    """

    def probabilities(self, rows_T: NDArray[np.int64]) -> NDArray[np.float64]: ...


@runtime_checkable
class StatefulSampler(Sampler, Protocol):
    """A sampler that changes from block to block, e.g. with the number of blocks so far.

    The state is plain values (numbers, text, lists, dicts of them). A checkpoint holds the one from before the call for the
    current block; a resumed run loads it and makes that call again.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def draw(sampler: Sampler, rows_T: NDArray[np.int64]) -> NDArray[np.float64]:
    """The probabilities `[T]` that a sampler gives for the next block.

    Raises:
        UserError: no task has rows, or the user's own sampler fails or gives what is no probability.
    """
    if not rows_T.any():
        raise UserError("sampler: no task is left whose data can be read; bring the data back, or start a new run")
    try:
        given = sampler.probabilities(rows_T)
    except UserError:
        raise
    except Exception as error:  # the user's own class may raise anything
        raise UserError(f"sampler: {type(sampler).__name__} fails with {type(error).__name__}: {error}") from error
    return checked(given, rows_T)


def checked(probability_T: ArrayLike, rows_T: NDArray[np.int64]) -> NDArray[np.float64]:
    """What a sampler gave, as probabilities `[T]`: 0 for tasks without rows, divided by the sum.

    Raises:
        UserError: not one finite number >= 0 for each task, or none above 0 where there are rows.
    """
    try:
        given = np.asarray(probability_T, dtype=np.float64)
        most = np.finfo(np.float64).max / max(len(rows_T), 1)  # so that the sum is finite too
        valid = given.shape == rows_T.shape and bool(((given >= 0) & (given <= most)).all())
    except (TypeError, ValueError, RuntimeError):  # a user's sampler may give anything, also a tensor with a gradient
        valid = False
    if not valid:
        raise UserError(f"sampler: gave {probability_T!r:.80}, expected {len(rows_T)} numbers >= 0, one for each task")
    p_T = np.where(rows_T > 0, given, 0.0)
    if not p_T.any():
        raise UserError("sampler: gave probability 0 to every task with rows, expected some above 0")
    return p_T / p_T.sum()


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
        share_T = rows_T / rows_T.max()  # a small tau would overflow powers of the rows themselves
        weight_T = np.where(rows_T > 0, np.power(share_T, 1 / self.tau), 0.0)
        return weight_T / weight_T.sum()


class Proportional(Temperature):
    """p_t ~ n_t: every row counts the same."""

    def __init__(self) -> None:
        super().__init__(tau=1.0)


class Sqrt(Temperature):
    """p_t ~ sqrt(n_t), between `Proportional` and `Equal` (Stickland and Murray 2019, arXiv:1902.02671)."""

    def __init__(self) -> None:
        super().__init__(tau=2.0)


class Equal:
    """Every task with rows is drawn equally often."""

    def probabilities(self, rows_T: NDArray[np.int64]) -> NDArray[np.float64]:
        return (rows_T > 0) / np.count_nonzero(rows_T)


class Capped(Temperature):
    """p_t ~ min(n_t, cap)^(1/tau): examples-proportional mixing with an artificial limit, and a temperature.

    Raffel et al. 2020 (T5, arXiv:1910.10683), section 3.5.2.

    Args:
        cap: rows above which a task counts as no larger.
        tau: 1 is proportional up to the cap; larger values draw small tasks more often.
    """

    def __init__(self, cap: int = 30000, tau: float = 1.0):
        if not cap > 0:
            raise UserError(f"sampler: cap is {cap}, expected a positive number of rows")
        super().__init__(tau)
        self.cap = cap

    def probabilities(self, rows_T: NDArray[np.int64]) -> NDArray[np.float64]:
        return super().probabilities(np.minimum(rows_T, self.cap))


class UniMax:
    """As equal as possible with no task seen more than `epochs` times (Chung et al. 2023, arXiv:2304.09151, algorithm 1).

    p_t ~ min(n_t, level), where the level solves sum_t min(n_t, level) = budget / epochs: of the `budget` rows that the run
    draws, a task gets level * epochs, or n_t * epochs if it has fewer rows than the level. If all tasks seen `epochs` times
    are fewer rows than the budget, nothing is left to even out and p_t ~ n_t: `epochs` acts only above budget / sum_t n_t.

    Args:
        budget: rows that the whole run draws; mtrain knows it.
        epochs: how often a row may be seen in the run, on average over its task.
    """

    def __init__(self, budget: int, epochs: float = 10.0):
        if not budget > 0:
            raise UserError(f"sampler: budget is {budget}, expected a positive number of rows")
        if not 0 < epochs < np.inf:
            raise UserError(f"sampler: epochs is {epochs}, expected a positive, finite number")
        self.budget, self.epochs = budget, epochs

    def probabilities(self, rows_T: NDArray[np.int64]) -> NDArray[np.float64]:
        rows_A = np.sort(rows_T[rows_T > 0])
        left_A = self.budget / self.epochs - (np.cumsum(rows_A) - rows_A)  # when all smaller tasks have taken their rows
        share_A = left_A / np.arange(len(rows_A), 0, -1)
        level_L = share_A[share_A < rows_A]
        weight_T = np.minimum(rows_T, level_L[0] if len(level_L) else np.inf)
        return weight_T / weight_T.sum()


SAMPLERS: dict[str, type] = {
    "Proportional": Proportional,
    "Temperature": Temperature,
    "Sqrt": Sqrt,
    "Equal": Equal,
    "Capped": Capped,
    "UniMax": UniMax,
}

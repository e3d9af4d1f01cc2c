"""What holds for every balancer: a warm-up, finite weights, bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Facts, Seen
from mtrain.balance.common import require
from mtrain.components import is_own
from mtrain.errors import UserError


class Bounded(Balancer):
    """A balancer as the trainer uses it. In this order:

    1. Tasks whose loss, norm or diagonal of the Gram matrix is not finite are not shown to the balancer: its state stays clean.
    2. The balancer gives weights to the others, also in warm-up steps, so that its state is ready after them.
    3. In the first `warmup` steps every weight is 1; what follows is left out.
    4. Weights that are not finite, and those of tasks that were not shown, become the mean of the finite ones (1 where
       there are none) and are counted in `replaced_T`.
    5. Weights are clamped from `min` to `max` times their mean.
    6. With `normalize` they are divided by their mean, so that it is 1. No two weights then differ by more than max / min.

    Means are over active tasks, and of absolute values: a negative weight, which some papers have, is clamped at -`max`
    times the mean, or to `min`.

    Args:
        balancer: what gives the weights.
        warmup: optimizer steps, from the start of the run.
        min: least ratio to the mean, from 0 to 1; None: no bound.
        max: largest ratio to the mean, at least 1; None: no bound.
        normalize: whether weights have a mean of 1 over active tasks; off where a paper has no such thing.

    Raises:
        UserError: the balancer fails, or gives something else than a weight for each task that it is shown; a user's own
            balancer also where it gives negative weights and none above 0.

    Attributes:
        replaced_T: in how many steps each task's weight was not finite, int64.
    """

    def __init__(
        self,
        balancer: Balancer,
        warmup: int = 0,
        min: float | None = None,
        max: float | None = None,
        normalize: bool = False,
    ):
        require(warmup >= 0, "warmup", warmup, "a number of steps, at least 0")
        require(min is None or 0 <= min <= 1, "min", min, "a ratio to the mean weight, from 0 to 1")
        require(max is None or 1 <= max < math.inf, "max", max, "a ratio to the mean weight, at least 1 and finite")
        self.balancer, self.warmup, self.min, self.max, self.normalize = balancer, warmup, min, max, normalize
        self.needs, self.second_forward = balancer.needs, balancer.second_forward  # type: ignore[misc]
        self.weighs_heads = balancer.weighs_heads  # type: ignore[misc]

    def begin(self, facts: Facts) -> None:
        super().begin(facts)
        self.replaced_T = torch.zeros(facts.num_tasks, dtype=torch.int64, device=facts.device)
        with self._one_line():
            self.balancer.begin(facts)

    def weights(self, seen: Seen) -> Tensor:
        if not len(seen.task_A):
            return torch.ones_like(seen.loss_A)
        weight_A = self._given(seen)
        finite_A = weight_A.isfinite()
        self.replaced_T.index_add_(0, seen.task_A, (~finite_A).long())
        if seen.step < self.warmup:
            return torch.ones_like(weight_A)
        mean = torch.where(finite_A.any(), _mean_size(torch.where(finite_A, weight_A, 0), finite_A.sum()), 1.0)
        weight_A = torch.where(finite_A, weight_A, mean)
        if self.min is not None or self.max is not None:
            least = None if self.min is None else self.min * mean
            largest = None if self.max is None else self.max * mean
            weight_A = weight_A.clamp(-largest if least is None and largest is not None else least, largest)
        if self.normalize:
            mean = _mean_size(weight_A, len(weight_A))
            weight_A = weight_A / torch.where(mean > 0, mean, 1.0)
        return weight_A

    def after(self, seen: Seen) -> None:
        known_A = _known(seen)
        with self._one_line():
            self.balancer.after(seen if bool(known_A.all()) else _part(seen, known_A))

    def _given(self, seen: Seen) -> Tensor:
        """The balancer's weights; NaN for tasks that it is not shown."""
        known_A = _known(seen)
        if bool(known_A.all()):
            return self._asked(seen)
        weight_A = torch.full_like(seen.loss_A, math.nan)
        if bool(known_A.any()):
            weight_A[known_A] = self._asked(_part(seen, known_A))
        return weight_A

    def _asked(self, seen: Seen) -> Tensor:
        """The balancer's weights `[A]` of the tasks that it is shown."""
        with self._one_line():
            given = self.balancer.weights(seen)
        name, num_active = type(self.balancer).__name__, len(seen.task_A)
        if not isinstance(given, Tensor) or given.shape != seen.loss_A.shape:
            found = f"a tensor of shape {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
            raise UserError(
                f"objective.balancer: {name} gives {found}, expected a tensor [{num_active}], a weight for each active task"
            )
        if is_own(self.balancer) and bool((given < 0).any() & ~(given > 0).any()):
            raise UserError(
                f"objective.balancer: {name} gives no weight above 0 and some below (least: {float(given.min()):g}), which "
                "makes losses grow; expected weights that are not negative"
            )
        return given.float()

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Whatever the user's own balancer raises, as one line."""
        try:
            yield
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            name = type(self.balancer).__name__
            raise UserError(f"objective.balancer: {name} fails with {type(error).__name__}: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        """The balancer's own state, and `replaced_T`."""
        return {**self.balancer.state_dict(), "replaced_T": self.replaced_T}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.replaced_T = state["replaced_T"].to(self.facts.device)
        self.balancer.load_state_dict({name: value for name, value in state.items() if name != "replaced_T"})


def _known(seen: Seen) -> Tensor:
    known_A = seen.loss_A.isfinite()
    if seen.norm2_A is not None:
        known_A = known_A & seen.norm2_A.isfinite()
    if seen.gram_AA is not None:
        known_A = known_A & seen.gram_AA.diagonal().isfinite()
    return known_A


def _part(seen: Seen, keep_A: Tensor) -> Seen:
    return replace(
        seen,
        task_A=seen.task_A[keep_A],
        loss_A=seen.loss_A[keep_A],
        count_A=seen.count_A[keep_A],
        norm2_A=None if seen.norm2_A is None else seen.norm2_A[keep_A],
        gram_AA=None if seen.gram_AA is None else seen.gram_AA[keep_A][:, keep_A],
    )


def _mean_size(weight_A: Tensor, count: Tensor | int) -> Tensor:
    """Mean absolute value over `count` weights, of which the rest are 0; divided by the largest first, as their sum may be
    too large for float32."""
    largest = weight_A.abs().max()
    safe = torch.where(largest > 0, largest, 1.0)
    return (weight_A / safe).abs().sum() / count * largest

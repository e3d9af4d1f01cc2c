"""Kinds of task: each owns its loss, its deviance, its predictions, its metrics family and its constant predictor.

A kind is a small frozen dataclass of options and works on all heads of a group at once. Logits have shape `[..., O]`
and labels `[...]`; a `[B, T]` grid and `[P]` routed labels go through the same code. Per-task numbers (number of
outputs, positive weight) arrive as tensors that broadcast against the labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mtrain.errors import UserError

Params = dict[str, Tensor]


def by_task(task_P: NDArray[np.int64], num_tasks: int) -> NDArray[np.int64]:
    """The order that groups labels by task and keeps them as they are within each."""
    return np.argsort(task_P.astype(np.uint16) if num_tasks <= 1 << 16 else task_P, kind="stable")  # 16 bits: radix sort


@dataclass(frozen=True)
class SortedLabels:
    """Training labels of T tasks, one entry per label, sorted by task and then by value.

    Tasks without a label are allowed; what is computed for them is NaN.
    """

    task_P: NDArray[np.int64]
    y_P: NDArray[np.float64]
    num_outputs_T: NDArray[np.int64]

    @staticmethod
    def of(task_P: NDArray[np.int64], y_P: NDArray[np.float64], num_outputs_T: NDArray[np.int64]) -> SortedLabels:
        order = by_task(task_P, len(num_outputs_T))
        task_P, y_P = task_P[order], y_P[order].astype(np.float64)
        for own in np.split(y_P, np.cumsum(np.bincount(task_P, minlength=len(num_outputs_T)))):
            own.sort()  # several times faster than one sort of all by (task, value)
        return SortedLabels(task_P, y_P, num_outputs_T)

    @property
    def num_tasks(self) -> int:
        return len(self.num_outputs_T)

    @property
    def count_T(self) -> NDArray[np.integer]:
        return np.bincount(self.task_P, minlength=self.num_tasks)

    def sum(self, value_P: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(self.task_P, weights=value_P, minlength=self.num_tasks).astype(np.float64)

    def mean(self, value_P: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sum(self.y_P if value_P is None else value_P) / self.count_T

    def quantile(self, q: float) -> NDArray[np.float64]:
        """The smallest label at or above the q-th share of each task's labels: it minimises the pinball loss."""
        count_T = self.count_T
        start_T = np.cumsum(count_T) - count_T
        at_T = start_T + np.clip(np.ceil(q * count_T).astype(np.int64) - 1, 0, np.maximum(count_T - 1, 0))
        value_T = np.full(self.num_tasks, np.nan)
        value_T[count_T > 0] = self.y_P[at_T[count_T > 0]]
        return value_T


@dataclass(frozen=True)
class Kind:
    """What a kind of task must say; user kinds subclass this and are named in a config by their import path.

    `losses`, `deviances` and `predict` must be element-wise over all leading dimensions.
    """

    family: ClassVar[Literal["binary", "multiclass", "regression"]]
    """Which metrics apply."""
    standardized: ClassVar[bool] = False
    """Labels are centred and scaled before the loss, and predictions brought back to the original units."""
    has_classes: ClassVar[bool] = False
    """Labels are names or values of classes, translated to indices by a stored vocabulary."""

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def group_key(self) -> Any:
        """Heads with equal keys may share a head group."""
        return self

    def num_outputs(self, num_classes: int) -> int:
        """Logits of one task."""
        return 1

    @property
    def param_names(self) -> tuple[str, ...]:
        """What `params` holds; beside these, losses and predictions always get `num_outputs`."""
        return ()

    def params(self, labels: SortedLabels) -> dict[str, NDArray[np.float64]]:
        """Per-task numbers `[T]` that loss and predictions need, from the training labels."""
        return {}

    def losses(self, logits: Tensor, y: Tensor, params: Params) -> Tensor:
        """Loss of each label, `[..., O]` and `[...]` to `[...]`; what training minimises."""
        raise NotImplementedError

    def deviances(self, logits: Tensor, y: Tensor, params: Params) -> Tensor:
        """Loss of each label without label smoothing or positive weights; what `skill` compares."""
        return self.losses(logits, y, params)

    def predict(self, logits: Tensor, params: Params) -> Tensor:
        """Logits to what a user reads, `[..., O]`: probabilities, counts, or values in standardised units."""
        return logits

    def point(self, prediction: Tensor) -> Tensor:
        """The one number of `predict` that metrics score, `[..., O]` to `[...]`; multiclass tasks are scored on all."""
        return prediction[..., 0]

    def constant(self, labels: SortedLabels) -> NDArray[np.float64]:
        """Logits `[T, O]` of the best constant predictor on the training labels."""
        raise NotImplementedError

    def typical_loss(self, num_outputs_T: NDArray[np.int64], constant_deviance_T: NDArray[np.float64]) -> NDArray:
        """The divisor of `scale: kind`, `[T]`."""
        return constant_deviance_T

    def problem(self, y: float) -> str | None:
        """Why a label cannot be of this kind, or None; called with distinct values only."""
        return None


@dataclass(frozen=True)
class Regression(Kind):
    """Real-valued targets.

    Args:
        loss: `mse` squared, `mae` absolute, or `huber` (quadratic up to `delta` standard deviations).
        delta: where the Huber loss turns linear, in standardised units.
    """

    loss: Literal["mse", "mae", "huber"] = "mse"
    delta: float = 1.0
    family: ClassVar[Literal["binary", "multiclass", "regression"]] = "regression"
    standardized: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise UserError(f"kind Regression: delta is {self.delta}, expected a positive number")

    def losses(self, logits: Tensor, y: Tensor, params: Params) -> Tensor:
        pred = logits[..., 0]
        if self.loss == "mae":
            return (pred - y).abs()
        if self.loss == "huber":
            return F.huber_loss(pred, y, reduction="none", delta=self.delta)
        return (pred - y).square()

    def constant(self, labels: SortedLabels) -> NDArray[np.float64]:
        if self.loss == "mae":
            return labels.quantile(0.5)[:, None]
        center_T = labels.mean()
        if self.loss == "huber":  # iteratively reweighted means, all tasks at once
            center_T = labels.quantile(0.5)
            for _ in range(100):
                residual_P = np.abs(labels.y_P - center_T[labels.task_P])
                weight_P = np.minimum(1.0, self.delta / np.maximum(residual_P, 1e-300))
                with np.errstate(invalid="ignore", divide="ignore"):
                    center_T = labels.sum(weight_P * labels.y_P) / labels.sum(weight_P)
        return center_T[:, None]

    def typical_loss(self, num_outputs_T: NDArray[np.int64], constant_deviance_T: NDArray[np.float64]) -> NDArray:
        return np.ones(len(num_outputs_T))


@dataclass(frozen=True)
class Binary(Kind):
    """0/1 targets, cross-entropy.

    Args:
        pos_weight: weight of positive labels in the loss, or `balanced` (negatives / positives of the training
            labels). Predictions and metrics undo it: `logit - log(pos_weight)` is the plain model's logit.
    """

    pos_weight: float | Literal["balanced"] | None = None
    family: ClassVar[Literal["binary", "multiclass", "regression"]] = "binary"

    def __post_init__(self) -> None:
        if isinstance(self.pos_weight, int | float) and not self.pos_weight > 0:
            raise UserError(f"kind Binary: pos_weight is {self.pos_weight}, expected a positive number or 'balanced'")

    @property
    def group_key(self) -> Any:
        return type(self), self.pos_weight is not None  # the weights themselves are per-task numbers

    @property
    def param_names(self) -> tuple[str, ...]:
        return () if self.pos_weight is None else ("pos_weight",)

    def params(self, labels: SortedLabels) -> dict[str, NDArray[np.float64]]:
        if self.pos_weight is None:
            return {}
        if self.pos_weight == "balanced":
            positives_T = labels.sum(labels.y_P)
            ratio_T = (labels.count_T - positives_T) / np.maximum(positives_T, 1)
            return {"pos_weight": np.where((positives_T > 0) & (ratio_T > 0), ratio_T, 1.0)}
        return {"pos_weight": np.full(labels.num_tasks, float(self.pos_weight))}

    def losses(self, logits: Tensor, y: Tensor, params: Params) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits[..., 0], y, reduction="none", pos_weight=params.get("pos_weight"))

    def deviances(self, logits: Tensor, y: Tensor, params: Params) -> Tensor:
        return F.binary_cross_entropy_with_logits(self._plain(logits, params)[..., 0], y, reduction="none")

    def predict(self, logits: Tensor, params: Params) -> Tensor:
        return self._plain(logits, params).sigmoid()

    def _plain(self, logits: Tensor, params: Params) -> Tensor:
        return logits - params["pos_weight"].log().unsqueeze(-1) if "pos_weight" in params else logits

    def constant(self, labels: SortedLabels) -> NDArray[np.float64]:
        rate_T = labels.mean()
        with np.errstate(divide="ignore", invalid="ignore"):
            logit_T = np.log(rate_T) - np.log1p(-rate_T)
        if self.pos_weight is not None:
            logit_T = logit_T + np.log(self.params(labels)["pos_weight"])
        return np.clip(logit_T, -30, 30)[:, None]  # a rate of 0 or 1 stays finite

    def typical_loss(self, num_outputs_T: NDArray[np.int64], constant_deviance_T: NDArray[np.float64]) -> NDArray:
        return np.full(len(num_outputs_T), math.log(2))

    def problem(self, y: float) -> str | None:
        return None if y in (0.0, 1.0) else "expected 0 or 1"


@dataclass(frozen=True)
class Multiclass(Kind):
    """One of K classes, cross-entropy; K differs from task to task.

    Args:
        label_smoothing: share of the target spread evenly over the task's K classes.
    """

    label_smoothing: float = 0.0
    family: ClassVar[Literal["binary", "multiclass", "regression"]] = "multiclass"
    has_classes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"kind Multiclass: label_smoothing is {self.label_smoothing}, expected 0 <= value < 1")

    def num_outputs(self, num_classes: int) -> int:
        return max(num_classes, 2)

    def losses(self, logits: Tensor, y: Tensor, params: Params) -> Tensor:
        log_prob = self._log_prob(logits, params)
        loss = -log_prob.gather(-1, y.long().unsqueeze(-1)).squeeze(-1)
        if self.label_smoothing:
            spread = -log_prob.masked_fill(log_prob == -torch.inf, 0).sum(-1) / params["num_outputs"]
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * spread
        return loss

    def deviances(self, logits: Tensor, y: Tensor, params: Params) -> Tensor:
        return -self._log_prob(logits, params).gather(-1, y.long().unsqueeze(-1)).squeeze(-1)

    def predict(self, logits: Tensor, params: Params) -> Tensor:
        return self._log_prob(logits, params).exp()

    def _log_prob(self, logits: Tensor, params: Params) -> Tensor:
        """Padded outputs of tasks with fewer classes get probability 0."""
        classes = torch.arange(logits.shape[-1], device=logits.device)
        padded = classes >= params["num_outputs"].unsqueeze(-1)
        return logits.masked_fill(padded, -torch.inf).log_softmax(-1)

    def constant(self, labels: SortedLabels) -> NDArray[np.float64]:
        num_classes = int(labels.num_outputs_T.max(initial=2))
        flat_P = labels.task_P * num_classes + labels.y_P.astype(np.int64)
        count_TK = np.bincount(flat_P, minlength=labels.num_tasks * num_classes).reshape(labels.num_tasks, num_classes)
        with np.errstate(divide="ignore", invalid="ignore"):
            logit_TK = np.log(count_TK / labels.count_T[:, None])
        return np.maximum(logit_TK, -30)

    def typical_loss(self, num_outputs_T: NDArray[np.int64], constant_deviance_T: NDArray[np.float64]) -> NDArray:
        return np.log(num_outputs_T)

    def problem(self, y: float) -> str | None:
        return None if y >= 0 and y == int(y) else "expected a class"


@dataclass(frozen=True)
class Poisson(Kind):
    """Counts; the logit is the log of the mean. The loss is the deviance `2 (y log(y/mu) - y + mu)`, never negative."""

    family: ClassVar[Literal["binary", "multiclass", "regression"]] = "regression"

    def losses(self, logits: Tensor, y: Tensor, params: Params) -> Tensor:
        log_mean = logits[..., 0]
        return 2 * (torch.xlogy(y, y) - y * log_mean - y + log_mean.exp())

    def predict(self, logits: Tensor, params: Params) -> Tensor:
        return logits.exp()

    def constant(self, labels: SortedLabels) -> NDArray[np.float64]:
        with np.errstate(divide="ignore"):
            return np.maximum(np.log(labels.mean()), -30)[:, None]

    def problem(self, y: float) -> str | None:
        return None if y >= 0 and y == int(y) else "expected a count: 0, 1, 2, ..."


@dataclass(frozen=True)
class Quantile(Kind):
    """Conditional quantiles by the pinball loss, summed over levels (Koenker and Bassett 1978).

    Args:
        levels: ascending, each strictly between 0 and 1; the one nearest 0.5 is the point prediction of metrics.
    """

    levels: tuple[float, ...] = (0.1, 0.5, 0.9)
    family: ClassVar[Literal["binary", "multiclass", "regression"]] = "regression"
    standardized: ClassVar[bool] = True

    def __post_init__(self) -> None:
        levels = self.levels
        if not levels or list(levels) != sorted(set(levels)) or not 0 < levels[0] <= levels[-1] < 1:
            raise UserError(f"kind Quantile: levels are {levels}, expected ascending numbers between 0 and 1")

    def num_outputs(self, num_classes: int) -> int:
        return len(self.levels)

    def point(self, prediction: Tensor) -> Tensor:
        return prediction[..., int(np.argmin(np.abs(np.array(self.levels) - 0.5)))]

    def losses(self, logits: Tensor, y: Tensor, params: Params) -> Tensor:
        levels = logits.new_tensor(self.levels)
        residual = y.unsqueeze(-1) - logits
        return torch.maximum(levels * residual, (levels - 1) * residual).sum(-1)

    def constant(self, labels: SortedLabels) -> NDArray[np.float64]:
        return np.stack([labels.quantile(level) for level in self.levels], axis=-1)


KINDS: dict[str, type[Kind]] = {
    "regression": Regression,
    "binary": Binary,
    "multiclass": Multiclass,
    "poisson": Poisson,
    "quantile": Quantile,
}

"""Balancing inside the step: which statistics a balancer gets, and the weights that it gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Facts, Seen
from mtrain.balance.bounded import Bounded
from mtrain.config import BalancingConfig
from mtrain.parallel.shard import Shard
from mtrain.train.task_gradients import TaskGradients

LEVELS = ("min", "p10", "median", "p90", "max")
STATE = ("weight_T", "norm2_T", "gram_TT", "cosine_TT", "steps_TT")


def quantiles(value_T: Tensor) -> list[float]:
    """Of values by task, at `LEVELS`."""
    return value_T.quantile(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=value_T.dtype, device=value_T.device)).tolist()


class Balancing:
    """The weights of all tasks, alike on every rank, and what they come from.

    Args:
        gradients: where the balancer, or the tasks' affinity, needs them.

    Attributes:
        cosine_TT, steps_TT: sums of the cosines of two tasks' gradients, and in how many steps there were both.
    """

    def __init__(
        self, balancer: Balancer, facts: Facts, config: BalancingConfig, gradients: TaskGradients | None, shard: Shard
    ):
        self.balancer = Bounded(balancer, config.warmup, config.min, config.max, config.normalize)
        self.balancer.begin(facts)
        self.gradients, self.config, self.shard = gradients, config, shard
        self.weight_T = torch.ones(facts.num_tasks, device=facts.device)
        self.norm2_T: Tensor | None = None
        self.gram_TT: Tensor | None = None
        self.cosine_TT: Tensor | None = None
        self.steps_TT: Tensor | None = None
        if config.affinity:
            self.cosine_TT, self.steps_TT = torch.zeros(2, facts.num_tasks, facts.num_tasks, device=facts.device)

    def due(self, step: int) -> bool:
        """Whether gradients are to be collected in a step."""
        return self.gradients is not None and step % self.config.every == 0

    def update(self, step: int, loss_T: Tensor, count_T: Tensor) -> None:
        """New weights, from mean losses (NaN where a task is absent) and label counts `[T]` of a window."""
        task_A, due = (~loss_T.isnan()).nonzero().squeeze(1), self.due(step)
        if not len(task_A):
            return
        norm2_A = gram_AA = None
        if self.gradients is not None and due:
            norm2_A, gram_AA = self.gradients.finish(task_A)
            if self.config.affinity:
                assert gram_AA is not None
                self._add_cosines(task_A, gram_AA)
            norm2_A, gram_AA = self._smooth(task_A, norm2_A, gram_AA)
        if self.balancer.needs != "losses" and not due:
            return
        weight_A = self.balancer.weights(Seen(step, task_A, loss_T[task_A], count_T[task_A], norm2_A, gram_AA))
        weight_T = self.weight_T.index_copy(0, task_A, weight_A.to(self.weight_T))
        if self.gradients is not None and self.shard.world.size > 1:  # machines that round differently agree
            weight_T = self.shard.world.sum(weight_T if self.shard.world.is_first else torch.zeros_like(weight_T))
        self.weight_T = weight_T

    def after(self, step: int, loss_T: Tensor, count_T: Tensor) -> None:
        """Losses of the same window after the step."""
        task_A = (~loss_T.isnan()).nonzero().squeeze(1)
        self.balancer.after(Seen(step, task_A, loss_T[task_A], count_T[task_A]))

    def _add_cosines(self, task_A: Tensor, gram_AA: Tensor) -> None:
        assert self.cosine_TT is not None
        assert self.steps_TT is not None
        size_A = gram_AA.diagonal().clamp(min=0).sqrt()
        cosine_AA = gram_AA / (size_A[:, None] * size_A)
        there_AA, at = cosine_AA.isfinite(), (task_A[:, None], task_A)
        self.cosine_TT[at] += torch.where(there_AA, cosine_AA, 0)
        self.steps_TT[at] += there_AA

    def _smooth(self, task_A: Tensor, norm2_A: Tensor, gram_AA: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Moving averages over steps in which a task, or a pair of tasks, was there; unbiased ones are made semidefinite."""
        num_tasks = len(self.weight_T)
        if gram_AA is None:
            if self.config.smoothing and self.norm2_T is None:
                self.norm2_T = norm2_A.new_full((num_tasks,), torch.nan)
            return self._average(self.norm2_T, task_A, norm2_A).clamp(min=0), None
        if self.config.smoothing and self.gram_TT is None:
            self.gram_TT = gram_AA.new_full((num_tasks, num_tasks), torch.nan)
        gram_AA = self._average(self.gram_TT, (task_A[:, None], task_A), gram_AA)
        if self.config.unbiased:
            known_A = gram_AA.diagonal().isfinite()
            value, vector_AA = torch.linalg.eigh(torch.where(known_A[:, None] & known_A, gram_AA.nan_to_num(), 0))
            gram_AA = (vector_AA * value.clamp(min=0)) @ vector_AA.T
            gram_AA.diagonal()[~known_A] = torch.nan
        return gram_AA.diagonal(), gram_AA

    def _average(self, kept: Tensor | None, at: Any, new: Tensor) -> Tensor:
        if kept is None:
            return new
        old, share = kept[at], self.config.smoothing
        value = torch.where(old.isnan(), new, torch.where(new.isnan(), old, share * old + (1 - share) * new))
        kept[at] = value
        return value

    def summary(self) -> dict[str, Any]:
        """For the curve: how weights spread over tasks, and which have the least and the largest (nothing where all are equal);
        the error of projected inner products."""
        values = quantiles(self.weight_T)
        found: dict[str, Any] = {}
        if values[0] != values[-1]:
            found = {f"weight_{name}": value for name, value in zip(LEVELS, values, strict=True)}
            names, least, most = self.balancer.facts.names, int(self.weight_T.argmin()), int(self.weight_T.argmax())
            found |= {"weight_min_task": names[least], "weight_max_task": names[most]}
        if self.gradients is not None and self.gradients.error is not None:
            found["gram_error"] = self.gradients.error
        return found

    def state_dict(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in STATE}, "balancer": self.balancer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.weight_T.device
        for name in STATE:
            setattr(self, name, None if state[name] is None else state[name].to(device))
        self.balancer.load_state_dict(state["balancer"])

"""The contract of balancers: what they are shown of a step, and what they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

Need = Literal["losses", "norms", "gram"]


@dataclass(frozen=True)
class Facts:
    """What a balancer knows of the T tasks from the start: their names, their number and where its tensors live; which are
    `regression`-like (a squared, absolute or quantile error: the regression form of uncertainty weighting), and each one's
    expected share of the objective, which sums to 1."""

    names: list[str]
    regression_T: Tensor
    share_T: Tensor
    device: torch.device

    @property
    def num_tasks(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Seen:
    """What a balancer is shown of a step: the A tasks that have labels in the global batch. Alike on every rank, float32.

    With g_t the gradient (at the neck) of task t's term of the objective, `coefficient_t * labels_t / N * L_t`, before any
    balancing weight:

    Attributes:
        step: number of the optimizer step.
        task_A: the active tasks, ascending.
        loss_A: their mean losses L_t over the global batch.
        count_A: their labels in it.
        norm2_A: |g_t|^2, for those that need norms; smoothed over steps where that is configured.
        gram_AA: <g_s, g_t>, for those that need the Gram matrix; smoothed likewise, positive semidefinite up to rounding.
    """

    step: int
    task_A: Tensor
    loss_A: Tensor
    count_A: Tensor
    norm2_A: Tensor | None = None
    gram_AA: Tensor | None = None


class Balancer:
    """Base of balancers. A subclass has typed keyword options, says what it `needs`, and gives `weights`.

    Tensors of its state are attributes named `*_T`, one value (or row) for each task, made in `begin`: they are saved by
    task name. Other state goes through `state_dict`.

    Attributes:
        needs: losses; norms (and losses) or gram (norms and losses as well).
        second_forward: `after` is to be called with the losses of the same batch after the step.
        weighs_heads: whether a task's weight also scales the gradient of its own head; not where the paper combines the
            tasks' gradients at shared parameters only, and heads follow their own loss.
    """

    needs: ClassVar[Need] = "losses"
    second_forward: ClassVar[bool] = False
    weighs_heads: ClassVar[bool] = True

    def begin(self, facts: Facts) -> None:
        self.facts = facts

    def weights(self, seen: Seen) -> Tensor:
        """Weights `[A]` of the active tasks, finite and not negative but where the paper's method has negative ones."""
        raise NotImplementedError

    def after(self, seen: Seen) -> None:
        """The same tasks with their losses after the step, for balancers with `second_forward`."""

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name.endswith("_T")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(self.facts.device) if isinstance(value, Tensor) else value)

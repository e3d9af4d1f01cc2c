"""GradVac: gradients turned towards one another, to the similarity that they have on average."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mtrain.balance.base import Balancer, Facts, Need, Seen
from mtrain.balance.solvers import expect, gram_of, shuffled, solve, sweep, unit

MOST_TASKS = 8192
LONGEST = 1e6


class GradVac(Balancer):
    """The sum over tasks of g_i, to which in turn, for each other g_j in random order, so much of g_j is added that their
    cosine is its running mean, where it is below that (Wang et al. 2021, arXiv:2010.05874, eq. 2 and 3, algorithm 1). Running
    means start from 0.

    Args:
        beta: share of a step's cosine in the running mean of a pair (the paper's 0.01).

    Raises:
        UserError: more than 8192 tasks, whose pairs would take over 256 MB.

    Deviations: one random order a step for all i, seeded by the step (see PCGrad); a gradient is turned no further once it is
    1e6 times as long as it was; one gradient for the whole neck, as there are no groups of parameters.
    """

    needs: ClassVar[Need] = "gram"
    weighs_heads = False

    def __init__(self, beta: float = 0.01):
        expect(0 <= beta <= 1, "balancer gradvac: beta", beta, "a number from 0 to 1")
        self.beta = beta

    def begin(self, facts: Facts) -> None:
        super().begin(facts)
        expect(
            facts.num_tasks <= MOST_TASKS,
            "balancer gradvac: tasks",
            facts.num_tasks,
            f"at most {MOST_TASKS}; pcgrad keeps no pairs",
        )
        self.cosine_TT = torch.zeros(facts.num_tasks, facts.num_tasks, device=facts.device)

    def weights(self, seen: Seen) -> Tensor:
        gram_AA = gram_of(seen.gram_AA)
        task_A = seen.task_A[gram_AA.diagonal() > 0]
        return solve(gram_AA, lambda gram: self._weights(gram, task_A[:, None], seen.step))

    def _weights(self, gram: Tensor, task: Tensor, step: int) -> Tensor:
        order = shuffled(len(gram), step, gram.device)
        task = task[order]
        cosine, norm = unit(gram[order][:, order])
        goal = self.cosine_TT[task.T, task].to(gram.dtype)  # [j, i]: of g_i with g_j
        mean = goal.clone()
        weight = torch.eye(len(norm), dtype=gram.dtype, device=gram.device)
        square = torch.ones_like(norm)

        def rule(j: int, old: Tensor, inner: Tensor) -> Tensor:
            length = square.sqrt()
            found = (inner / length).clamp(-1, 1)
            sine = (1 - goal[j] ** 2).clamp(min=0).sqrt()
            more = length * (goal[j] * (1 - found**2).sqrt() / sine.clamp(min=1e-6) - found)
            more = torch.where((found < goal[j]) & (length < LONGEST), more, 0)
            more[j] = 0
            square.add_(more * (2 * inner + more)).clamp_(min=1e-30)
            mean[j] += self.beta * (found - goal[j])
            return old + more

        sweep(cosine, weight, rule)
        mean.fill_diagonal_(0)
        self.cosine_TT[task.T, task] = mean.to(self.cosine_TT.dtype)
        result = torch.empty_like(norm)
        result[order] = weight @ norm / norm
        return result

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"names": self.facts.names, "cosine_TT": self.cosine_TT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Pairs of tasks that were not there start from 0."""
        place = {name: i for i, name in enumerate(state["names"])}
        now = [i for i, name in enumerate(self.facts.names) if name in place]
        then = [place[self.facts.names[i]] for i in now]
        self.cosine_TT.zero_()
        self.cosine_TT[torch.tensor(now)[:, None], torch.tensor(now)] = state["cosine_TT"].to(self.facts.device)[then][:, then]

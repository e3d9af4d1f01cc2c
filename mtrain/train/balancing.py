"""Balancing inside the step: which statistics a balancer gets, and the weights that it gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtrain.balance.base import Balancer, Facts, Seen
from mtrain.balance.bounded import Bounded
from mtrain.balance.gradients import (
    SKETCH,
    Sketch,
    gram,
    gram_cost,
    grid_sums,
    make_sketch,
    neck_inputs,
    norms2,
    project,
    projected_gram,
    routed_factors,
    task_gradients,
)
from mtrain.config import BalancingConfig
from mtrain.data.batch import Deal
from mtrain.errors import UserError
from mtrain.model.heads import HeadBank
from mtrain.model.trunks import SharedModel
from mtrain.parallel.shard import Shard
from mtrain.train.objective import Piece

EXACT_COST = 5e9  # multiply-adds of a Gram matrix up to which it is computed exactly


class NeckGradients:
    """Norms and inner products of the tasks' gradients at the neck, over the micro-batches of a window.

    Args:
        name: of the balancer, for messages.
        shared: the shared network before it is wrapped.
        grid: whether every head reads every row.

    Raises:
        UserError: the features are not the output of a linear layer, or all its parameters are frozen.
    """

    def __init__(
        self,
        name: str,
        balancer: Balancer,
        shared: SharedModel,
        bank: HeadBank,
        shard: Shard,
        grid: bool,
        config: BalancingConfig,
    ):
        neck = shared.linear_neck
        if neck is None or not any(p.requires_grad for p in shared.parameters()):
            what = "the trunk is frozen" if neck is not None else "the trunk does not end in one; set model.neck to a width"
            raise UserError(f"objective.balancer: {name} needs the tasks' gradients at a linear neck, but {what}")
        neck.register_forward_hook(self._keep)
        self.needs, self.bank, self.shard = balancer.needs, bank, shard
        self.has_bias, self.num_tasks = neck.bias is not None, len(shard.own)
        self.wanted = False
        self.projected = False
        self.error: float | None = None
        """Standard error of a projected Gram matrix, relative to |g_s| |g_t|."""
        if grid and self.needs == "gram" and config.projections != "never":
            width = neck.in_features + self.has_bias
            units = sum(group.weights[0].shape[:2].numel() for group in bank.groups)
            (units,) = shard.world.sum_numbers(units)
            cost = min(gram_cost(int(units), len(shard.plan.names), width, neck.out_features))
            self.projected = config.projections != "auto" or cost > EXACT_COST
            self.vectors = SKETCH if config.projections == "auto" else int(config.projections)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.wanted:
            self.h_BI = inputs[0].detach()

    def start(self, step: int, wanted: bool) -> None:
        """A window begins, in which gradients are `wanted` or not."""
        self.step, self.wanted = step, wanted
        self.sketch: Sketch | None = None
        self.labels: list[tuple[Tensor, Tensor, Tensor]] = []
        self.sums: dict[int, tuple[Piece, Tensor]] = {}

    def add(self, found: Sequence[tuple[Piece, Tensor]], deal: Deal | None, factor: float) -> None:
        """Gradients at the taps of a micro-batch's pieces, which are those of the tasks' terms times `factor`."""
        x_HI = neck_inputs(self.shard.to_heads(self.h_BI, deal), self.has_bias)
        x = x_HI
        if self.projected:
            if self.sketch is None:  # exact along the mean row, which holds most of the gradients behind a ReLU
                mean_I1 = x_HI.mean(0)[:, None]
                self.sketch = make_sketch(len(mean_I1), self.bank.in_features, self.step, x_HI, self.vectors, mean_I1)
            x = x_HI @ self.sketch.x_IR
        for piece, grad in found:
            if piece.route is not None:
                delta_PD = grad.index_select(0, piece.route.place_P).to(x_HI.dtype) / factor
                self.labels.append((x_HI[piece.route.row_P], delta_PD, piece.task_A[piece.route.slot_P]))
                continue
            c_AHI = grid_sums(grad.view(len(piece.task_A), -1, grad.shape[-1]), x) / factor
            if piece.number in self.sums:
                c_AHI += self.sums[piece.number][1]
            self.sums[piece.number] = piece, c_AHI

    def finish(self, task_A: Tensor) -> tuple[Tensor, Tensor | None]:
        """Squared norms `[A]`, and where they are needed inner products `[A, A]`, of the active tasks on all ranks."""
        if self.projected:
            return self._project(task_A)
        x_NI, y_ND, task_N = self._units()
        if self.needs == "norms":
            norm2_T = self._norms2(x_NI, y_ND, task_N)
            return self.shard.everywhere(norm2_T[None], norm2_T.new_zeros(()))[0][0, task_A], None
        own_N, world = self.shard.own_on(task_N.device)[task_N], self.shard.world
        x_NI, y_ND, task_N = (world.gather_rows(value) for value in (x_NI, y_ND, own_N))
        slot_T = torch.full((len(self.shard.plan.names),), -1, device=task_N.device)
        slot_T[task_A] = torch.arange(len(task_A), device=task_N.device)
        slot_N = slot_T[task_N]
        there = slot_N >= 0
        gram_AA = gram(routed_factors(x_NI[there], y_ND[there], slot_N[there], len(task_A)))
        return gram_AA.diagonal(), gram_AA

    def _units(self) -> tuple[Tensor, Tensor, Tensor]:
        """The outer products of this rank's tasks, and the task of each."""
        parts = list(self.labels)
        for piece, c_AHI in self.sums.values():
            v_AHD = piece.group.weights[0].detach().float()
            parts.append((c_AHI.flatten(0, 1), v_AHD.flatten(0, 1), piece.task_A.repeat_interleave(v_AHD.shape[1])))
        if not parts:
            device = self.h_BI.device
            width = self.h_BI.shape[-1] + self.has_bias
            features = self.bank.in_features
            return (
                torch.zeros(0, width, device=device),
                torch.zeros(0, features, device=device),
                torch.zeros(0, device=device).long(),
            )
        x, y, task = (torch.cat(list(values)) for values in zip(*parts, strict=True))
        return x, y, task

    def _norms2(self, x_NI: Tensor, y_ND: Tensor, task_N: Tensor) -> Tensor:
        """For each of this rank's tasks; hot tasks, of which ranks have some labels each, count where `Shard` says so."""
        norm2_T = norms2(routed_factors(x_NI, y_ND, task_N, self.num_tasks))
        if self.shard.hot.any():
            hot = torch.from_numpy(self.shard.hot).to(task_N.device)
            slot_T = torch.cumsum(hot, 0) - 1
            mine = hot[task_N]
            factors = routed_factors(x_NI[mine], y_ND[mine], slot_T[task_N[mine]], int(hot.sum()))
            gradient_ADI = self.shard.world.sum(task_gradients(factors))
            norm2_T[hot] = gradient_ADI.square().sum((1, 2)) * self.shard.world.is_first
        return norm2_T

    def _project(self, task_A: Tensor) -> tuple[Tensor, Tensor]:
        assert self.sketch is not None
        x_IR, world = self.sketch.x_IR, self.shard.world
        none = x_IR.new_zeros(0, 1, x_IR.shape[1]), x_IR.new_zeros(0, 1, self.bank.in_features)
        parts = [project(*none, self.sketch)]  # where this rank has no tasks, nothing of the right width
        parts += [project(c_AHR, p.group.weights[0].detach(), self.sketch) for p, c_AHR in self.sums.values()]
        task_a = torch.cat([task_A[:0], *(piece.task_A for piece, _ in self.sums.values())])
        y_TF = parts[0].new_zeros(self.num_tasks, parts[0].shape[1]).index_copy_(0, task_a, torch.cat(parts))
        task_N, y_NF = world.gather_rows(self.shard.own_on(task_A.device)), world.gather_rows(y_TF)
        gram_AA, error = projected_gram(y_NF[torch.argsort(task_N)][task_A], self.sketch)
        self.error = float(error)
        return gram_AA.diagonal(), gram_AA


class Balancing:
    """The weights of all tasks, alike on every rank, and what they come from.

    Args:
        gradients: where the balancer needs them.
    """

    def __init__(
        self, balancer: Balancer, facts: Facts, config: BalancingConfig, gradients: NeckGradients | None, shard: Shard
    ):
        self.balancer = Bounded(balancer, config.warmup, config.min, config.max, config.normalize)
        self.balancer.begin(facts)
        self.gradients, self.config, self.shard = gradients, config, shard
        self.weight_T = torch.ones(facts.num_tasks, device=facts.device)
        self.norm2_T: Tensor | None = None
        self.gram_TT: Tensor | None = None

    def due(self, step: int) -> bool:
        """Whether gradients are to be collected in a step."""
        return self.gradients is not None and step % self.config.every == 0

    def update(self, step: int, loss_T: Tensor, count_T: Tensor) -> None:
        """New weights, from mean losses (NaN where a task is absent) and label counts `[T]` of a window."""
        task_A = (~loss_T.isnan()).nonzero().squeeze(1)
        if not len(task_A) or (self.gradients is not None and not self.due(step)):
            return
        norm2_A = gram_AA = None
        if self.gradients is not None:
            norm2_A, gram_AA = self.gradients.finish(task_A)
            norm2_A, gram_AA = self._smooth(task_A, norm2_A, gram_AA)
        weight_A = self.balancer.weights(Seen(step, task_A, loss_T[task_A], count_T[task_A], norm2_A, gram_AA))
        weight_T = self.weight_T.index_copy(0, task_A, weight_A.to(self.weight_T))
        if self.gradients is not None and self.shard.world.size > 1:  # machines that round differently agree
            weight_T = self.shard.world.sum(weight_T if self.shard.world.is_first else torch.zeros_like(weight_T))
        self.weight_T = weight_T

    def after(self, step: int, loss_T: Tensor, count_T: Tensor) -> None:
        """Losses of the same window after the step."""
        task_A = (~loss_T.isnan()).nonzero().squeeze(1)
        self.balancer.after(Seen(step, task_A, loss_T[task_A], count_T[task_A]))

    def _smooth(self, task_A: Tensor, norm2_A: Tensor, gram_AA: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Moving averages over the steps in which a task, or a pair of tasks, was there."""
        keep, tasks = self.config.smoothing, len(self.weight_T)
        if not keep:
            return norm2_A, gram_AA
        if gram_AA is None:
            if self.norm2_T is None:
                self.norm2_T = norm2_A.new_full((tasks,), torch.nan)
            old_A = self.norm2_T[task_A]
            norm2_A = torch.where(old_A.isnan(), norm2_A, keep * old_A + (1 - keep) * norm2_A)
            self.norm2_T[task_A] = norm2_A
            return norm2_A, None
        if self.gram_TT is None:
            self.gram_TT = gram_AA.new_full((tasks, tasks), torch.nan)
        at = task_A[:, None], task_A
        old_AA = self.gram_TT[at]
        gram_AA = torch.where(old_AA.isnan(), gram_AA, keep * old_AA + (1 - keep) * gram_AA)
        self.gram_TT[at] = gram_AA
        return gram_AA.diagonal(), gram_AA

    def summary(self) -> dict[str, float]:
        """For the curve: how weights spread over tasks (none where all are equal), and the error of a projected Gram matrix."""
        levels = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], device=self.weight_T.device)
        values = self.weight_T.quantile(levels).tolist()
        if values[0] == values[-1]:
            return {}
        names = ("min", "p10", "median", "p90", "max")
        found = {f"weight_{name}": value for name, value in zip(names, values, strict=True)}
        if self.gradients is not None and self.gradients.error is not None:
            found["gram_error"] = self.gradients.error
        return found

    def state_dict(self) -> dict[str, Any]:
        own = {"weight_T": self.weight_T, "norm2_T": self.norm2_T, "gram_TT": self.gram_TT}
        return {**own, "balancer": self.balancer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.weight_T.device
        for name in ("weight_T", "norm2_T", "gram_TT"):
            setattr(self, name, None if state[name] is None else state[name].to(device))
        self.balancer.load_state_dict(state["balancer"])

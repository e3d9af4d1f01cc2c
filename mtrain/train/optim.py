"""AdamW for head banks: a step count for each task, on the active tasks only.

A dense Adam moves a head that was absent for k steps by about sqrt(k) learning rates when it comes back, and decays it
meanwhile. Here an absent head does not move at all: the result is that of a `torch.optim.AdamW` for each head, stepped
only when its head is active (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtrain.model.heads import HeadBank

LARGE_HEAD = 1024  # elements; below it a call of the fused kernel for each head costs more on a CPU than passes over all


@dataclass(frozen=True)
class HeadUpdate:
    """Gradients of the heads `active_A` (ids inside group number `group`; None = all of them in order), one `[A, ...]`
    for each of the group's parameters, in their order; if `dense`, one `[T_g, ...]`, of which only `active_A` are read."""

    group: int
    grads: Sequence[Tensor]
    active_A: Tensor | None = None
    dense: bool = False


class HeadAdamW(torch.optim.Optimizer):
    """One AdamW for each head of a bank, vectorised; cost follows the active heads.

    There is one `param_groups` entry for each of `bank.groups`. A parameter's state is `step` `[T_g]` and the stacks
    `exp_avg` and `exp_avg_sq`, made at once: build the optimizer after moving the bank to its device.

    Args:
        bank: the heads.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        max_norm: clip the gradient of each head, over all its parameters, to this norm.
    """

    def __init__(
        self,
        bank: HeadBank,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        max_norm: float | None = None,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_norm": max_norm}
        defaults["fused"] = True  # so that loading brings step counts to the parameters' device
        self._heads: dict[Tensor, tuple[list[int], list[list[Tensor]]]] = {}
        super().__init__([{"params": list(group.parameters())} for group in bank.groups], defaults)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {
                    "step": torch.zeros(len(p), device=p.device),
                    "exp_avg": torch.zeros_like(p, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
                }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._heads = {}

    def _stacks(self, p: Tensor) -> list[Tensor]:
        """The parameter's stacks in the order in which the fused kernel takes them, step counts last."""
        state = self.state[p]
        return [p.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"]]

    def _views(self, p: Tensor) -> list[list[Tensor]]:
        """Each head's own slice of `_stacks`, made anew only when a stack was replaced."""
        stacks = self._stacks(p)
        where = [stack.data_ptr() for stack in stacks]
        if p not in self._heads or self._heads[p][0] != where:
            self._heads[p] = where, [list(stack.unbind()) for stack in stacks]
        return self._heads[p][1]

    @torch.no_grad()
    def step(self, updates: Iterable[HeadUpdate] | None = None) -> None:  # type: ignore[override]
        """Move the heads that `updates` name; without it all heads by their `.grad`, but for groups that have none."""
        if updates is None:
            grads = [[p.grad for p in group["params"]] for group in self.param_groups]
            updates = [HeadUpdate(i, g) for i, g in enumerate(grads) if all(grad is not None for grad in g)]
        for update in updates:
            if update.active_A is None or len(update.active_A):
                self._update(update)

    def _update(self, update: HeadUpdate) -> None:
        """Three ways to the same numbers: whole stacks by the fused kernel where most heads have one step count; each
        active head's slice by the fused kernel where heads are so large that a call for each pays; else by rows."""
        options, active_A = self.param_groups[update.group], update.active_A
        params: list[Tensor] = options["params"]
        grads = [grad.contiguous() for grad in update.grads]
        if options["max_norm"] is not None:
            grads = clip_per_head(grads, options["max_norm"])
        for p in params:
            self.state[p]["step"][slice(None) if active_A is None else active_A] += 1
        if (active_A is None or update.dense) and self._update_whole(params, grads, active_A, options):
            return
        if update.dense and active_A is not None:
            grads = [grad.index_select(0, active_A.to(grad.device)) for grad in grads]
        lists = [list[Tensor]() for _ in range(5)]
        for p, grad in zip(params, grads, strict=True):
            if p.device.type == "cpu" and p[0].numel() >= LARGE_HEAD:
                ids = None if active_A is None else active_A.tolist()
                weight, *moments = [views if ids is None else map(views.__getitem__, ids) for views in self._views(p)]
                for tensors, slices in zip(lists, (weight, grad.unbind(), *moments), strict=True):
                    tensors += slices
            else:
                self._update_rows(self._stacks(p), grad, active_A, options)
        if lists[0]:
            self._fused(options, *lists)

    def _update_whole(
        self, params: list[Tensor], grads: list[Tensor], active_A: Tensor | None, options: dict[str, Any]
    ) -> bool:
        """Step all heads at once with the commonest step count, then put back those that are absent or have another
        count, and update these by rows; returns False, with nothing done, where that would be most heads."""
        step_T = self.state[params[0]]["step"]
        common = step_T.mode().values
        apart_T, absent_T = step_T != common, torch.zeros_like(step_T, dtype=torch.bool)
        if active_A is not None:
            absent_T = torch.ones_like(absent_T).index_fill_(0, active_A.to(step_T.device), False)
        apart = (apart_T | absent_T).nonzero().squeeze(1)
        if len(apart) > len(step_T) // 2:
            return False
        stacks = [self._stacks(p) for p in params]
        kept = [[stack.index_select(0, apart) for stack in of_one[:3]] for of_one in stacks]
        weights, means, squares, _ = (list(same) for same in zip(*stacks, strict=True))
        self._fused(options, weights, grads, means, squares, [common] * len(params))
        late = apart[~absent_T[apart]]
        for of_one, rows_of_one, grad in zip(stacks, kept, grads, strict=True):
            for stack, rows in zip(of_one, rows_of_one, strict=False):
                stack.index_copy_(0, apart, rows)
            if len(late):
                self._update_rows(of_one, grad.index_select(0, late), late, options)
        return True

    @staticmethod
    def _fused(
        options: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        means: list[Tensor],
        squares: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        beta1, beta2 = options["betas"]
        torch._fused_adamw_(
            weights,
            grads,
            means,
            squares,
            [],
            steps,
            lr=options["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=options["weight_decay"],
            eps=options["eps"],
            amsgrad=False,
            maximize=False,
        )

    def _update_rows(self, stacks: list[Tensor], grad: Tensor, active_A: Tensor | None, options: dict[str, Any]) -> None:
        if active_A is not None:
            active_A = active_A.to(grad.device)
        weight, mean, square, step = stacks if active_A is None else [s.index_select(0, active_A) for s in stacks]
        beta1, beta2 = options["betas"]
        step = step.to(torch.promote_types(grad.dtype, torch.float32)).view(-1, *[1] * (grad.dim() - 1))
        correction1, correction2 = (-torch.expm1(step * math.log(max(beta, 1e-300))) for beta in (beta1, beta2))
        weight.mul_(1 - options["lr"] * options["weight_decay"])
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = square.sqrt().div_(correction2.sqrt()).add_(options["eps"])
        weight.sub_(torch.div(mean, denominator, out=denominator).mul_(options["lr"] / correction1))
        if active_A is not None:
            for stack, rows in zip(stacks, (weight, mean, square), strict=False):
                stack.index_copy_(0, active_A, rows)


def clip_per_head(grads: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    """`grads` (stacks `[A, ...]`) with the gradient of each head, over all stacks, scaled to a norm of at most
    `max_norm`, as `torch.nn.utils.clip_grad_norm_` does for one head."""
    norm_A = torch.stack([torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads]).norm(dim=0)
    scale_A = (max_norm / (norm_A + 1e-6)).clamp(max=1)
    return [grad * scale_A.view(-1, *[1] * (grad.dim() - 1)) for grad in grads]

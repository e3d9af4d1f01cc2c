"""What a checkpoint holds of a model and its optimizers, under names that fit any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtrain.model.heads import HeadBank
from mtrain.parallel.shard import Shard
from mtrain.train.checkpoint import Stacks
from mtrain.train.optim import HeadAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
NEW = {"weight_T": 1.0, "norm2_T": math.nan, "gram_TT": math.nan}


def trunk_tensors(shared: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Parameters and buffers of the shared network as `trunk.NAME`, and the state of its AdamW, made where the optimizer has
    not stepped yet, as `optimizer.NAME.WHAT`."""
    found = {f"trunk.{name}": tensor for name, tensor in shared.state_dict().items()}
    if optimizer is not None:
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        for name, p in shared.named_parameters():
            if not p.requires_grad:
                continue
            if p not in inner.state:
                fresh = {"step": torch.zeros((), device=p.device)} | {what: torch.zeros_like(p) for what in MOMENTS}
                inner.state[p] = fresh
            found |= {f"optimizer.{name}.{what}": tensor for what, tensor in inner.state[p].items()}
    return found


def head_stacks(bank: HeadBank, optimizer: HeadAdamW | None = None, shard: Shard | None = None) -> list[Stacks]:
    """The heads of each group by name, with the state of their optimizer; hot heads are written by rank 0."""
    stacks = []
    for group in bank.groups:
        tensors: dict[str, Tensor] = {}
        for name, p in group.named_parameters():
            tensors[name] = p.detach()
            if optimizer is not None:
                tensors |= {f"{name}.{what}": tensor for what, tensor in optimizer.state[p].items()}
        written = None
        if shard is not None and shard.hot.any():
            written = shard.counts[group.task_ids.cpu().numpy() % len(shard.own)].tolist()
        hidden = [widths[:-1] for widths in group.widths] if group.ragged else None
        stacks.append(Stacks(group.names, group.sizes.tolist(), tensors, written, hidden))
    return stacks


def by_task(state: dict[str, Any], names: Sequence[str], now: Sequence[str]) -> dict[str, Any]:
    """A tree whose tensors with keys that end in `_T` (`_TT`) hold a value for each task (pair of tasks) `names`, for the
    tasks `now`: for new ones that of `NEW`, or 0."""
    if list(names) == list(now):
        return state
    place = {name: t for t, name in enumerate(names)}
    pairs = [(t, place[name]) for t, name in enumerate(now) if name in place]
    here, there = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).t()

    def moved(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: moved(k, v) for k, v in value.items()}
        if isinstance(value, Tensor) and key.endswith("_TT"):
            every = value.new_full((len(now), len(now)), NEW.get(key, 0))
            every[here[:, None], here] = value[there[:, None], there]
            return every
        if isinstance(value, Tensor) and key.endswith("_T"):
            return value.new_full((len(now), *value.shape[1:]), NEW.get(key, 0)).index_copy_(0, here, value[there])
        return value

    return moved("", state)

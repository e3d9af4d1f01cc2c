"""What one rank does of a plan: its tasks, the rows that it reads, and the way of features to heads and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrain.parallel.plan import HOT, Plan
from mtrain.parallel.world import World

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Deal:
    """The places in a batch that this rank reads, and those that its heads read (None: the same).

    `total` are the rows of all ranks; `sent_R` and `received_R` the rows that travel to and from each rank, where heads
    get rows by exchange.
    """

    read: Ints
    heads: Ints | None
    total: int
    sent_R: list[int] | None = None
    received_R: list[int] | None = None


class Shard:
    """One rank's share of a plan.

    Attributes:
        own: tasks whose heads are here, ascending.
        hot: which of them are on all ranks.
        counts: those of `own` that are counted here, in sums over ranks where each task counts once.
    """

    def __init__(self, world: World, plan: Plan):
        self.world, self.plan = world, plan
        here = (plan.owner_T == world.rank) | (plan.owner_T == HOT)
        self.own: Ints = np.flatnonzero(here)
        self.hot = plan.owner_T[self.own] == HOT if world.size > 1 else np.zeros(len(self.own), dtype=bool)
        self.counts = ~self.hot | world.is_first
        self._own = {torch.device("cpu"): torch.from_numpy(self.own)}

    @staticmethod
    def replicated(world: World, names: Sequence[str]) -> Shard:
        """Every rank has the heads of all tasks, and a share of the rows."""
        return Shard(world, Plan(tuple(names), np.full(len(names), HOT), np.ones(world.size)))

    @property
    def has_all(self) -> bool:
        """Whether the heads of all tasks are here."""
        return len(self.own) == len(self.plan.names)

    def local(self, value_T: Tensor) -> Tensor:
        """The values of this rank's tasks."""
        return value_T if self.has_all else value_T[self.own_on(value_T.device)]

    def everywhere(self, value_NT: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over ranks, for all tasks `[N, T]`, of values for this rank's; and of a number."""
        if self.world.size == 1:
            return value_NT, number
        rows, tasks = len(value_NT), len(self.plan.names)
        every = value_NT.new_zeros(rows * tasks + 1)
        every[:-1].view(rows, tasks)[:, self.own_on(every.device)] = value_NT
        every[-1] = number
        self.world.sum(every)
        return every[:-1].view(rows, tasks), every[-1]

    def own_on(self, device: torch.device) -> Tensor:
        """`own` on a device; copied once, as a copy would wait for all work in the device's queue."""
        if device not in self._own:
            self._own[device] = self._own[torch.device("cpu")].to(device)
        return self._own[device]

    def deal(self, task_P: Ints | None, rows: int, micro_batches: int = 1) -> Iterator[Deal]:
        """A batch of `rows` rows, dealt in so many micro-batches of about equal size.

        Args:
            task_P: task of each row; None where a row may have labels of many.
        """
        rank, ranks, mode = self.world.rank, self.world.size, self.plan.mode
        if mode == "owners":
            place_P = np.arange(rows)
            owner_P = np.full(rows, HOT) if task_P is None else self.plan.owner_T[task_P]
            own = place_P if ranks == 1 else np.flatnonzero(np.where(owner_P == HOT, place_P % ranks, owner_P) == rank)
            yield from (Deal(piece, None, rows) for piece in np.array_split(own, micro_batches))
            return
        for places in np.array_split(np.arange(rows), micro_batches):
            dealt = places[rank::ranks]
            if mode == "gather":
                yield Deal(dealt, places, len(places))
                continue
            assert task_P is not None
            owner_P, holder_P = self.plan.owner_T[task_P[places]], np.arange(len(places)) % ranks
            mine, for_me = np.flatnonzero(holder_P == rank), np.flatnonzero(owner_P == rank)
            mine = mine[np.argsort(owner_P[mine], kind="stable")]
            for_me = for_me[np.argsort(holder_P[for_me], kind="stable")]
            yield Deal(
                places[mine],
                places[for_me],
                len(places),
                np.bincount(owner_P[mine], minlength=ranks).tolist(),
                np.bincount(holder_P[for_me], minlength=ranks).tolist(),
            )

    def to_heads(self, z_BD: Tensor, deal: Deal | None) -> Tensor:
        """The features that this rank's heads read, of those that all ranks computed."""
        if deal is None or deal.heads is None:
            return z_BD
        if deal.sent_R is None or deal.received_R is None:
            return self.world.gather_dealt(z_BD, deal.total)
        return self.world.exchange(z_BD, deal.sent_R, deal.received_R)

    def from_heads(self, grad_HD: Tensor, deal: Deal | None) -> Tensor:
        """The gradient at this rank's features, of those at the features that all heads read."""
        if deal is None or deal.heads is None:
            return grad_HD
        if deal.sent_R is None or deal.received_R is None:
            return self.world.scatter_dealt(grad_HD)
        return self.world.exchange(grad_HD, deal.received_R, deal.sent_R)

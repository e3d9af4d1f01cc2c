"""Which rows the heads of a group read, where each row (or label) belongs to one task: sorted by task, padded to segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Active heads `start:stop` of a route, each padded to `size` rows, which begin at row `offset`."""

    start: int
    stop: int
    size: int
    offset: int

    @property
    def heads(self) -> slice:
        return slice(self.start, self.stop)

    def rows(self, x_NI: Tensor) -> Tensor:
        """This segment's rows of the padded layout `[N, I]`, as a view `[heads, size, I]`."""
        heads = self.stop - self.start
        return x_NI.narrow(0, self.offset, heads * self.size).view(heads, self.size, -1)


@dataclass(frozen=True)
class Fed:
    """Rows that other heads read a head's logits on, beside those of its own labels; Q of them."""

    row_Q: Tensor
    place_Q: Tensor  # position of each in the padded layout


@dataclass(frozen=True)
class Route:
    """Which rows the active heads of one group read, computed once for a batch by `HeadBank.route`.

    P labels are sorted by active head; active heads are ordered by segment (similar numbers of labels), then by id.
    """

    group: int
    label_P: Tensor  # positions in the batch's label arrays
    row_P: Tensor  # rows of z
    slot_P: Tensor  # the active head of each label, ascending
    active_A: Tensor  # ids of the active heads inside the group
    task_A: Tensor  # ids of the active heads in the bank
    segments: tuple[Segment, ...]
    padded_row_N: Tensor  # rows of z in the padded layout; padding repeats the head's own first row
    padded_head_N: Tensor  # the head (id inside the group) of each padded row
    place_P: Tensor  # position of each label in the padded layout
    fed: Fed | None = None
    parent_KN: Tensor | None = None  # position of each padded row in the padded layout of each parent's group

    @property
    def padded_slot_N(self) -> Tensor:
        """The active head of each padded row."""
        sizes = [(s.stop - s.start, s.size) for s in self.segments]
        size_A = torch.cat([torch.full((heads,), size) for heads, size in sizes])
        return torch.arange(len(size_A)).repeat_interleave(size_A).to(self.padded_row_N.device)

    def to(self, device: torch.device | str) -> Route:
        """The same route with its tensors on `device`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        if self.fed is not None:
            moved["fed"] = Fed(self.fed.row_Q.to(device), self.fed.place_Q.to(device))
        return replace(self, **moved)


def plan_route(group: int, local_P: Tensor, row_P: Tensor, label_P: Tensor, task_ids: Tensor, smallest: int) -> Route:
    """The `Route` of one group's labels. `local_P` are task ids inside the group, `label_P` positions in the batch;
    segments hold up to `smallest * 2**k` rows a head."""
    return _planned(group, local_P, row_P, label_P, task_ids, smallest)[0]


def plan_fed_routes(
    entries: dict[int, tuple[Tensor, Tensor, Tensor]],
    order: Sequence[int],
    parents: Sequence[Sequence[tuple[int, Tensor]]],
    task_ids: Sequence[Tensor],
    smallest: Sequence[int],
) -> list[Route]:
    """The routes of groups whose heads read other heads' logits: these run on the same rows too.

    Args:
        entries: of each group with labels, `local_P`, `row_P` and `label_P` as in `plan_route`.
        order: the groups, parents before children.
        parents: of each group, for each of its heads' parents: the group that it is in, and ids there `[T_g]`.
        task_ids, smallest: of each group, as in `plan_route`.
    """
    parts = {number: [entry] for number, entry in entries.items()}
    fed_to: dict[int, int] = {}  # rows by now of each group without a label
    routes, feeds, entry_of = dict[int, Route](), dict[int, list[tuple[int, int]]](), dict[int, Tensor]()
    for number in reversed(order):
        if number not in parts:
            continue
        local_P, row_P, label_P = (torch.cat(of_parts) for of_parts in zip(*parts[number], strict=True))
        routes[number], entry_of[number] = _planned(number, local_P, row_P, label_P, task_ids[number], smallest[number])
        feeds[number] = []
        for parent, local_T in parents[number]:
            start = fed_to.get(parent, 0)
            fed_to[parent] = start + len(local_P)
            mark_P = -1 - torch.arange(start, fed_to[parent])
            parts.setdefault(parent, []).append((local_T[local_P], row_P, mark_P))
            feeds[number].append((parent, start))
    for number, of_child in feeds.items():
        if of_child:
            places = []
            for parent, start in of_child:
                fed = routes[parent].fed
                assert fed is not None
                places.append(fed.place_Q[start + entry_of[number]])
            routes[number] = replace(routes[number], parent_KN=torch.stack(places))
    return [routes[number] for number in sorted(routes)]


def _planned(
    group: int, local_P: Tensor, row_P: Tensor, label_P: Tensor, task_ids: Tensor, smallest: int
) -> tuple[Route, Tensor]:
    """The route of entries, of which those with `label_P` -1, -2, ... are fed rows number 0, 1, ...; and which entry each
    padded row is."""
    active_A, slot_P, counts_A = torch.unique(local_P, return_inverse=True, return_counts=True)
    bucket_A = (counts_A.double() / smallest).clamp(min=1).log2().ceil().long()
    bucket_A, order_A = torch.sort(bucket_A, stable=True)
    slot_P, order_P = torch.sort(torch.argsort(order_A)[slot_P], stable=True)
    active_A, counts_A, row_P, label_P = active_A[order_A], counts_A[order_A], row_P[order_P], label_P[order_P]
    size_A = torch.empty_like(counts_A)
    segments, start, offset = [], 0, 0
    for heads in torch.bincount(bucket_A).tolist():
        if heads:
            size = int(counts_A[start : start + heads].max())
            segments.append(Segment(start, start + heads, size, offset))
            size_A[start : start + heads] = size
            start, offset = start + heads, offset + heads * size
    first_A, padded_first_A = counts_A.cumsum(0) - counts_A, size_A.cumsum(0) - size_A
    place_P = torch.arange(len(slot_P)) + (padded_first_A - first_A)[slot_P]
    sorted_N = first_A.repeat_interleave(size_A)
    sorted_N[place_P] = torch.arange(len(place_P))
    padded_row_N, fed = row_P[sorted_N], None
    if len(label_P) and int(label_P.min()) < 0:
        own = label_P >= 0
        at_Q = torch.argsort(label_P[~own], descending=True)
        fed = Fed(row_P[~own][at_Q], place_P[~own][at_Q])
        label_P, row_P, slot_P, place_P = label_P[own], row_P[own], slot_P[own], place_P[own]
    route = Route(
        group=group,
        label_P=label_P,
        row_P=row_P,
        slot_P=slot_P,
        active_A=active_A,
        task_A=task_ids[active_A],
        segments=tuple(segments),
        padded_row_N=padded_row_N,
        padded_head_N=active_A.repeat_interleave(size_A),
        place_P=place_P,
        fed=fed,
    )
    return route, order_P[sorted_N]

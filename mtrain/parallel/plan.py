"""The plan: which rank owns each task, how rows meet their heads, and what a step sends."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mtrain.errors import UserError

HOT = -1
"""Owner of a task whose head every rank holds."""
EVEN = 1.2
"""Largest load over the mean that counts as even."""
HEAD_BYTES = 16
"""Bytes of a parameter with its gradient and AdamW's two moments, in float32."""
TRIES = 32
"""Numbers of hot tasks for which a whole assignment is tried."""

Mode = Literal["owners", "exchange", "gather"]
Collective = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]


@dataclass(frozen=True, eq=False)
class Plan:
    """Who owns which task.

    Attributes:
        names: the tasks.
        owner_T: the rank that owns each task `[T]`, in the order of `names`; `HOT`: every rank holds it.
        load_R: expected work of each rank `[R]`; from `make_plan`, multiply-adds of one forward pass over a global batch.
        mode: `owners`, each rank reads the rows of its own tasks (those of hot tasks are dealt); `exchange`, rows are dealt
            and features go to the owner of the row's task; `gather`, rows are dealt and owners get the features of all.
        why: the reason for the mode, in words.
    """

    names: tuple[str, ...]
    owner_T: NDArray[np.int64]
    load_R: NDArray[np.float64]
    mode: Mode = "owners"
    why: str = ""

    @property
    def ranks(self) -> int:
        return len(self.load_R)

    @property
    def imbalance(self) -> float:
        """Largest load of a rank over the mean: 1 is perfect, and what no load at all gives."""
        largest = float(self.load_R.max())
        return largest / float(self.load_R.mean()) if largest > 0 else 1.0

    @property
    def hot(self) -> NDArray[np.int64]:
        """Positions of the hot tasks, ascending."""
        return np.flatnonzero(self.owner_T == HOT)


@dataclass(frozen=True, eq=False)
class Workload:
    """What a plan is made from: the sizes of a run, alike on every process.

    Attributes:
        names: the tasks, each once.
        rows_T: expected labels of each task in a global batch `[T]`.
        head_params_T: parameters of each head `[T]`, of all members of an ensemble.
        by_task: whether a row belongs to one task (layouts routed and files).
        batch: rows of a global batch.
        width: numbers of a row's features, members x D for an ensemble.
        trunk_params, trunk_trained: parameters of the trunk, and how many of them are trained.
        heads_trained: whether heads are.
        shared_params: parameters of the heads' means, where heads are pulled towards them, else 0.
        parents_T: the tasks whose logits each head reads; these are on its rank. None: no head reads another's.
    """

    names: Sequence[str]
    rows_T: NDArray[np.float64]
    head_params_T: NDArray[np.int64]
    by_task: bool
    batch: int
    width: int
    trunk_params: int
    trunk_trained: int
    heads_trained: bool = True
    shared_params: int = 0
    parents_T: Sequence[Sequence[int]] | None = None


def make_plan(work: Workload, ranks: int, memory: float | None = None) -> Plan:
    """Who owns which task, and how rows meet their heads: a pure function that every process computes alike.

    Work is counted in multiply-adds of a forward pass, one for each parameter and row: `rows x (trunk + head)` for a task
    whose owner reads its rows, else `rows x head` for the owner, with the trunk's work dealt evenly.

    Where a row belongs to one task, the mode is `owners` if the busiest rank has at most `EVEN` times the mean work, with
    as few hot tasks as that takes, the largest ones first, and as long as all-reducing the gradients of their heads sends
    no more than exchanging features would. Else it is `exchange`, but for trunks so small that this evens nothing out.

    Tasks whose heads read one another's logits are placed together.

    Args:
        work: the run.
        ranks: how many there are.
        memory: bytes that each rank has for heads, see `HEAD_BYTES`; default: enough.

    Raises:
        UserError: the heads do not fit.
    """
    unit_T = _units(work)
    plan = _plan_units(work, unit_T, ranks, memory)
    return replace(plan, names=tuple(work.names), owner_T=plan.owner_T[unit_T])


def _units(work: Workload) -> NDArray[np.int64]:
    """The unit `[T]` of tasks that each belongs to: of those that read one another's logits, else one of its own."""
    unit_T = np.arange(len(work.names))
    for task, parents in enumerate(work.parents_T or ()):
        for parent in parents:
            unit_T[unit_T == unit_T[task]] = unit_T[parent]
    return np.unique(unit_T, return_inverse=True)[1]


def _sums(unit_T: NDArray[np.int64], value_T: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.bincount(unit_T, value_T).astype(np.float64)


def _plan_units(work: Workload, unit_T: NDArray[np.int64], ranks: int, memory: float | None) -> Plan:
    """The plan of units, each under the first of its tasks' names, as if they were tasks."""
    by_task, trunk = work.by_task, work.trunk_params
    load_T, rows_T = _loads(work.names, work.head_params_T), _loads(work.names, work.rows_T)
    name_of: dict[int, str] = {}
    for unit, name in zip(unit_T.tolist(), work.names, strict=True):
        name_of[unit] = min(name, name_of.get(unit, name))
    names = [name_of[unit] for unit in range(len(name_of))]
    size_T, head_T, rows_T = (_sums(unit_T, each) for each in (HEAD_BYTES * load_T, rows_T * load_T, rows_T))
    room = np.inf if memory is None else float(memory)
    largest_first = _by_load(names, size_T)
    packed = _greedy(largest_first, size_T, ranks, size_T, room)
    if packed is None:
        raise _too_small(names, size_T, largest_first, ranks, room)

    def owned(load_T: NDArray[np.float64], dealt: float, mode: Mode, why: str) -> Plan:
        """No hot tasks; `dealt` is the work that every rank has beside its own tasks'."""
        order = _by_load(names, load_T)
        placed = _greedy(order, load_T, ranks, size_T, room)
        owner_T = packed[0] if placed is None else placed[0]
        load_R = np.zeros(ranks)
        np.add.at(load_R, owner_T[order], load_T[order])
        return Plan(tuple(names), owner_T, dealt + load_R, mode, why)

    dealt = trunk * work.batch / ranks
    if not by_task and ranks > 1:
        return owned(head_T, dealt, "gather", "a row may have labels of any task, so every owner reads all features")
    whole_T = head_T + rows_T * trunk
    owners = owned(whole_T, 0.0, "owners", "")
    if owners.imbalance <= EVEN:
        why = "one rank" if ranks == 1 else f"rows at their owners give the busiest rank {owners.imbalance:.2f} x the mean work"
        return replace(owners, why=why)
    uneven = f"rows at their owners would give the busiest rank {owners.imbalance:.1f} x the mean work"
    hot = _with_hot(names, whole_T, size_T, ranks, room, work.batch * work.width)
    if hot is not None:
        number = np.isin(unit_T, hot.hot).sum()
        return replace(hot, why=f"{uneven}, with {number} hot task{'s' if number > 1 else ''} it is {hot.imbalance:.2f} x")
    exchange = owned(head_T, dealt, "exchange", f"{uneven}, more than {EVEN:g}")
    if exchange.load_R.max() < owners.load_R.max():
        return exchange
    return replace(owners, why=f"{uneven}; with features exchanged it would be no less, as the work is in the heads")


def wire_bytes(collective: Collective, payload: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring collective.

    Args:
        collective: what is done.
        payload: bytes of the tensor that is reduced; for all-gather and reduce-scatter of the whole one, for all-to-all of
            what one rank hands in, its own part included.
        ranks: how many take part.
    """
    share = (ranks - 1) / ranks * payload
    return 2 * share if collective == "all-reduce" else share


@dataclass(frozen=True)
class Flow:
    """A collective of each step, with its payload in bytes as in `wire_bytes`, on average over ranks."""

    collective: Collective
    payload: float

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends."""
        return wire_bytes(self.collective, self.payload, ranks)


def flows(plan: Plan, work: Workload, fsdp: bool = False) -> dict[str, Flow]:
    """What travels in a step of one micro-batch, in float32.

    Args:
        fsdp: the trunk is sharded by FSDP2, which gathers its parameters forward and backward, else replicated by DDP.
    """
    found: dict[str, Flow] = {}
    if fsdp:
        found["trunk parameters"] = Flow("all-gather", 2 * 4 * work.trunk_params)
    found["trunk gradients"] = Flow("reduce-scatter" if fsdp else "all-reduce", 4 * work.trunk_trained)
    if plan.mode == "exchange":
        found["features"] = found["feature gradients"] = Flow("all-to-all", 4 * work.batch / plan.ranks * work.width)
    elif plan.mode == "gather":
        padded = -(-work.batch // plan.ranks) * plan.ranks
        found["features"] = Flow("all-gather", 4 * padded * work.width)
        found["feature gradients"] = Flow("reduce-scatter", 4 * padded * work.width)
    if not work.trunk_trained:
        found.pop("feature gradients", None)
    if work.heads_trained:
        # beside a hot head's gradient: whether its loss is finite, and whether it has labels
        found["hot heads"] = Flow("all-reduce", 4 * (int(work.head_params_T[plan.hot].sum()) + 2 * len(plan.hot)))
        found["shared heads"] = Flow("all-reduce", 4 * work.shared_params)
    found["losses"] = Flow("all-reduce", 4 * (4 * len(plan.names) + 1))
    found["control"] = Flow("all-reduce", 4 * 8)
    return {what: flow for what, flow in found.items() if flow.payload}


def plain_ddp(work: Workload) -> Flow:
    """What DDP of the trunk and all heads would send in a step."""
    heads = int(work.head_params_T.sum()) if work.heads_trained else 0
    return Flow("all-reduce", 4 * (work.trunk_trained + heads))


def _loads(names: Sequence[str], load_T: ArrayLike) -> NDArray[np.float64]:
    load_T = np.asarray(load_T, dtype=np.float64)
    assert len(set(names)) == len(names) == len(load_T)
    assert np.isfinite(load_T).all()
    assert (load_T >= 0).all()
    return load_T


def _by_load(names: Sequence[str], load_T: NDArray[np.float64]) -> list[int]:
    load = load_T.tolist()
    return sorted(range(len(load)), key=lambda t: (-load[t], names[t]))


def _greedy(
    order: Sequence[int], load_T: NDArray[np.float64], ranks: int, size_T: NDArray[np.float64], room: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
    """Owners `[T]` (`HOT` for tasks that `order` leaves out) and loads `[R]`: each task in order goes to the rank with the
    least load of those that have room for it; None where none has. By falling load and with room that is longest processing
    time first (Graham 1969), whose largest load is at most 4/3 of the best possible one."""
    assert ranks > 0
    load, size = load_T.tolist(), size_T.tolist()
    smallest = min((size[task] for task in order), default=0.0)
    owner_T = np.full(len(load), HOT, dtype=np.int64)
    load_R = np.zeros(ranks)
    free = [room] * ranks
    heap = [(0.0, rank) for rank in range(ranks)]
    for task in order:
        full = []
        while heap and free[heap[0][1]] < size[task]:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        least, rank = heap[0]
        owner_T[task] = rank
        free[rank] -= size[task]
        load_R[rank] = least + load[task]
        heapq.heapreplace(heap, (least + load[task], rank))
        for entry in full:
            if free[entry[1]] >= smallest:
                heapq.heappush(heap, entry)
    return owner_T, load_R


def _with_hot(
    names: Sequence[str], load_T: NDArray[np.float64], size_T: NDArray[np.float64], ranks: int, room: float, features: float
) -> Plan | None:
    """The plan with the fewest hot tasks that is even; None where more of them would be needed than features cost.

    `features`: numbers in the features of a global batch, of which each rank exchanges 1 / ranks.
    """
    order = _by_load(names, load_T)
    load, size = load_T[order], size_T[order]
    hot_load, hot_size = (np.concatenate([[0.0], np.cumsum(each)]) for each in (load, size))
    most = EVEN * load.sum() / ranks
    next_load = np.append(load, 0.0)
    may = (hot_load / ranks + next_load <= most) & (hot_size <= min(room, HEAD_BYTES * features / ranks))
    for number in (1 + np.flatnonzero(may[1:])[:TRIES]).tolist():
        placed = _greedy(order[number:], load_T, ranks, size_T, room - hot_size[number])
        if placed is not None:
            plan = Plan(tuple(names), placed[0], placed[1] + hot_load[number] / ranks)
            if plan.imbalance <= EVEN:
                return plan
    return None


def _too_small(names: Sequence[str], size_T: NDArray[np.float64], order: Sequence[int], ranks: int, room: float) -> UserError:
    def packed(ranks: int) -> float:
        placed = _greedy(order, size_T, ranks, size_T, np.inf)
        assert placed is not None
        return float(placed[1].max())

    task = order[0]
    enough = [f"{packed(ranks) * 1.005 / 1e9:.3g} GB"]  # not rounded down
    if size_T[task] <= room:
        enough.append(f"{1 + bisect_left(range(1, len(names)), True, key=lambda r: packed(r) <= room)} ranks")
    return UserError(
        f"memory: the heads need {size_T.sum() / 1e9:.3g} GB with gradients and moments, the largest ('{names[task]}') "
        f"{size_T[task] / 1e9:.3g} GB; {ranks} rank{'s' if ranks > 1 else ''} with {room / 1e9:.3g} GB each beside the trunk "
        f"cannot hold them; {' or '.join(enough)} would do"
    )

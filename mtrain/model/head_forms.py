"""What each head is made of: the features that it reads, its gate, its hidden layers; and which heads are stacked together."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

from mtrain.errors import UserError, nearest

NOTHING = ""  # what a head reads that reads other heads' logits only
MAX_WASTE = 0.3  # of a group's output parameters may be padding


@dataclass(frozen=True)
class HeadForm:
    """What one head is.

    Attributes:
        hidden: widths of its hidden layers; "2x" is twice its outputs.
        reads: name of the feature that it reads; None: the experts of the gate, or the only one.
        parents: the heads (positions in the bank) whose logits for the same row it reads too.
        experts: the experts that its gate may choose from; None: all.
        combine: fixed weights of its parents, whose weighted sum it is; None: it has layers.
    """

    hidden: tuple[int | str, ...] = ()
    reads: str | None = None
    parents: tuple[int, ...] = ()
    experts: tuple[int, ...] | None = None
    combine: tuple[float, ...] | None = None

    def widths(self, outputs: int) -> tuple[int, ...]:
        """Widths of the hidden layers of a head with so many outputs, and these."""
        return (*(h if isinstance(h, int) else int(h.removesuffix("x")) * outputs for h in self.hidden), outputs)


@dataclass(frozen=True)
class Gate:
    """Each head reads a mixture of experts, by a softmax of linear logits of its own (MMoE: Ma et al. 2018, "Modeling task
    relationships in multi-task learning with multi-gate mixture-of-experts", equations 5 to 8; with a bias).

    Attributes:
        experts: the feature, `[B, E, D]`, that is mixed.
        by: the feature that the gates read.
    """

    experts: str
    by: str


@dataclass(frozen=True)
class Source:
    """What the heads of a group read.

    Attributes:
        z_width: of all of z.
        columns: of z, those that heads read.
        read, by: in `columns`, the feature (all experts) and that of the gate.
        width: of what the first layer reads of the features, D.
        experts: how many there are to be mixed; 0: there is no gate.
        parents: group and number of outputs of each head's parents.
    """

    z_width: int
    columns: slice
    read: slice
    by: slice
    width: int
    experts: int = 0
    parents: tuple[tuple[int, int], ...] = ()

    @property
    def in_features(self) -> int:
        """Width of the first layer's input."""
        return self.width + sum(outputs for _, outputs in self.parents)

    def num_params(self, widths: Sequence[int], scale_shift: bool) -> int:
        """Parameters of a head with so wide layers."""
        layers = sum((a + 1) * b for a, b in pairwise((self.in_features, *widths)))
        return layers + 2 * self.width * scale_shift + self.experts * (self.by.stop - self.by.start + 1)


@dataclass(frozen=True)
class GroupPlan:
    """Heads that are stacked: their positions, ascending, the (padded) widths of their layers, and what they read."""

    ids: list[int]
    widths: tuple[int, ...]
    source: Source


def group_by_size(sizes: Sequence[int]) -> list[list[int]]:
    """Positions of `sizes` in groups that, padded to their largest member, waste at most `MAX_WASTE`.

    Greedy from the largest size down, whole sizes at a time: each group spans at least a factor of 1 / (1 - MAX_WASTE),
    so their number grows with the logarithm of the largest size, not with the number of tasks.
    """
    groups: list[list[int]] = []
    largest = used = count = 0
    members: dict[int, list[int]] = {}
    for i, size in enumerate(sizes):
        members.setdefault(size, []).append(i)
    for size in sorted(members, reverse=True):
        same = members[size]
        used, count = used + size * len(same), count + len(same)
        if not groups or used < (1 - MAX_WASTE) * largest * count:
            groups.append([])
            largest, used, count = size, size * len(same), len(same)
        groups[-1] += same
    return [sorted(group) for group in groups]


def plan_groups(
    names: Sequence[str],
    outputs: Sequence[int],
    forms: Sequence[HeadForm],
    keys: Sequence[Hashable],
    features: Mapping[str, tuple[int, ...]],
    gate: Gate | None = None,
) -> list[GroupPlan]:
    """Which heads are stacked together: those of equal keys and forms, and of similar size.

    Raises:
        UserError: a head reads what is not there, or its own logits; the task is named.
    """
    columns = _columns(features)
    depth_T = _depths(names, forms)
    for name, form in zip(names, forms, strict=True):
        if form.experts is not None:
            _check_experts(name, form.experts, form.reads, features, gate)
    for name, form, size in zip(names, forms, outputs, strict=True):
        if form.combine is not None and any(outputs[p] != size for p in form.parents):
            sizes = ", ".join(f"'{names[p]}' {outputs[p]}" for p in form.parents)
            raise UserError(f"task '{name}' has {size} outputs, but combines {sizes}: expected as many of each")
    group_T, grouped = [-1] * len(names), list[list[int]]()
    sources: list[Source] = []
    for depth in range(max(depth_T, default=0) + 1):
        alike: dict[Hashable, list[int]] = {}
        for i, form in enumerate(forms):
            if depth_T[i] == depth:
                parents = tuple((group_T[p], outputs[p]) for p in form.parents)
                alike.setdefault((keys[i], form.hidden, form.reads, parents, form.combine is None), []).append(i)
        for ids in alike.values():
            form = forms[ids[0]]
            parents = tuple((group_T[p], outputs[p]) for p in form.parents)
            source = _source(names[ids[0]], form.reads, parents, features, columns, gate)
            relative = any(isinstance(h, str) for h in form.hidden)
            costs = [source.num_params(form.widths(outputs[i]), False) if relative else outputs[i] for i in ids]
            for group in group_by_size(costs):
                for i in (own := [ids[g] for g in group]):
                    group_T[i] = len(grouped)
                grouped.append(own)
                sources.append(source)
    # the order of keys first, so that the groups of each key stand together
    rank = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    order = sorted(range(len(grouped)), key=lambda g: (rank[keys[grouped[g][0]]], g))
    number = {g: at for at, g in enumerate(order)}
    plans = []
    for g in order:
        source, largest = sources[g], max(grouped[g], key=lambda i: outputs[i])
        parents = tuple((number[parent], width) for parent, width in source.parents)
        widths = forms[largest].widths(outputs[largest])
        plans.append(GroupPlan(grouped[g], widths, Source(**(vars(source) | {"parents": parents}))))
    return plans


def _columns(features: Mapping[str, tuple[int, ...]]) -> dict[str, slice]:
    ends = accumulate(map(prod, features.values()))
    return {name: slice(end - prod(shape), end) for (name, shape), end in zip(features.items(), ends, strict=True)}


def _depths(names: Sequence[str], forms: Sequence[HeadForm]) -> list[int]:
    """How many heads stand between each and the features, at most."""
    depth_T = [-1 if form.parents else 0 for form in forms]
    waiting = [i for i, form in enumerate(forms) if form.parents]
    while waiting:
        ready = [i for i in waiting if min(depth_T[p] for p in forms[i].parents) >= 0]
        if not ready:
            path = [waiting[0]]
            while path[-1] not in path[:-1]:
                path.append(next(p for p in forms[path[-1]].parents if depth_T[p] < 0))
            cycle = " reads ".join(f"'{names[i]}'" for i in path[path.index(path[-1]) :])
            raise UserError(f"tasks.by_name: task {cycle}: a head cannot read logits that depend on its own; take one out")
        for i in ready:
            depth_T[i] = 1 + max(depth_T[p] for p in forms[i].parents)
        waiting = [i for i in waiting if depth_T[i] < 0]
    return depth_T


def _source(
    task: str,
    reads: str | None,
    parents: tuple[tuple[int, int], ...],
    features: Mapping[str, tuple[int, ...]],
    columns: Mapping[str, slice],
    gate: Gate | None,
) -> Source:
    for option, name in (("experts", gate.experts), ("by", gate.by)) if gate is not None else ():
        if name not in features:
            raise UserError(f"model.head.gate.{option}: the trunk gives no feature '{name}'{nearest(name, features)}")
    if gate is not None and len(features[gate.experts]) != 2:
        raise UserError(
            f"model.head.gate.experts: '{gate.experts}' is {list(features[gate.experts])} for a row, expected [E, D]: E experts"
        )
    if reads == NOTHING:
        nothing = slice(0, 0)
        return Source(max(each.stop for each in columns.values()), nothing, nothing, nothing, 0, 0, parents)
    if reads is None and gate is None and len(features) > 1:
        raise UserError(
            f"task '{task}' does not say which feature it reads, and the trunk gives {', '.join(features)}; set tasks.by_name "
            "with reads, or model.head.gate"
        )
    name = reads or (next(iter(features)) if gate is None else gate.experts)
    if name not in features:
        raise UserError(f"task '{task}' reads feature '{name}', which the trunk does not give{nearest(name, features)}")
    own, total = columns[name], max(each.stop for each in columns.values())
    if gate is None or name != gate.experts:
        width = own.stop - own.start
        return Source(total, own, slice(0, width), slice(0, 0), width, 0, parents)
    experts, width = features[name]
    by = columns[gate.by]
    start, stop = min(own.start, by.start), max(own.stop, by.stop)
    read, by = (slice(part.start - start, part.stop - start) for part in (own, by))
    return Source(total, slice(start, stop), read, by, width, experts, parents)


def _check_experts(
    task: str, experts: tuple[int, ...], reads: str | None, features: Mapping[str, tuple[int, ...]], gate: Gate | None
) -> None:
    if gate is None:
        raise UserError(f"task '{task}' chooses from experts, but its head has no gate; set model.head.gate")
    if reads not in (None, gate.experts):
        what = f"the feature '{reads}'" if reads else "other tasks alone"
        raise UserError(
            f"task '{task}' chooses from experts, but reads {what}; let it read {gate.experts}, or leave experts out"
        )
    there = features[gate.experts][0] if gate.experts in features else 0
    if not experts or min(experts) < 0 or max(experts) >= there > 0:
        raise UserError(
            f"task '{task}' chooses from experts {list(experts)}, expected numbers from 0 to {there - 1} of '{gate.experts}'"
        )

"""What a config says of each task's head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mtrain.config import Config
from mtrain.data.labels import Patterns
from mtrain.errors import UserError, nearest
from mtrain.model.head_forms import NOTHING, Gate, HeadForm

TASK = "task:"  # before the name of a task whose logits a head reads


def head_forms(names: Sequence[str], config: Config) -> list[HeadForm]:
    """The form of each task's head: as `model.head` says, and the last of `tasks.by_name` that matches.

    Raises:
        UserError: a head reads several features, or a task that is not there; the task is named.
    """
    place = {name: i for i, name in enumerate(names)}
    options, patterns = list(config.tasks.by_name.values()), Patterns(list(config.tasks.by_name))
    same = HeadForm(tuple(config.model.head.hidden))
    forms = []
    for name in names:
        given: dict[str, Any] = {}
        for i in patterns.of(name):
            own = {key: getattr(options[i], key) for key in ("reads", "experts", "hidden", "combine")}
            given |= {key: value for key, value in own.items() if value is not None}
        forms.append(_form(name, same, given, place) if given else same)
    return forms


def with_parents(chosen: Sequence[int], forms: Sequence[HeadForm]) -> list[int]:
    """The chosen tasks (positions), those whose logits they read, those that these read, and so on; ascending."""
    found, left = set(chosen), list(chosen)
    while left:
        new = set(forms[left.pop()].parents) - found
        found |= new
        left += new
    return sorted(found)


def forms_by_name(names: Sequence[str], config: Config) -> dict[str, tuple[HeadForm, list[str]]]:
    """The form of each task's head by its name, with the names of its parents in place of their positions."""
    forms = zip(names, head_forms(names, config), strict=True)
    return {name: (replace(form, parents=()), [names[p] for p in form.parents]) for name, form in forms}


def head_gate(config: Config) -> Gate | None:
    gate = config.model.head.gate
    return None if gate is None else Gate(gate.experts, gate.by)


def of_members(forms: Sequence[HeadForm], members: int) -> list[HeadForm]:
    """The forms of an ensemble's heads: those of each member after those of the one before."""
    return [
        replace(form, parents=tuple(m * len(forms) + p for p in form.parents)) if m and form.parents else form
        for m in range(members)
        for form in forms
    ]


def _form(task: str, same: HeadForm, given: Mapping[str, Any], place: Mapping[str, int]) -> HeadForm:
    reads: Sequence[str] = given.get("reads", ())
    features = [name for name in reads if not name.startswith(TASK)]
    parents = [name.removeprefix(TASK) for name in reads if name.startswith(TASK)]
    if len(features) > 1 or len(set(parents)) < len(parents) or NOTHING in features:
        raise UserError(
            f"task '{task}' reads {', '.join(map(repr, reads))}: expected one feature, and any number of other tasks as "
            f"{TASK}NAME"
        )
    combine: Sequence[float] | None = given.get("combine")
    if combine is not None and (features or not parents or len(combine) != len(parents)):
        raise UserError(
            f"task '{task}' combines by {len(combine)} weights, but reads {', '.join(reads) or 'no task'}: expected as many "
            f"tasks as {TASK}NAME, and no feature"
        )
    if combine is not None and given.get("hidden"):
        raise UserError(f"task '{task}' combines the logits of others by weights, and has hidden layers; leave one of them out")
    for parent in parents:
        if parent not in place:
            raise UserError(f"task '{task}' reads {TASK}{parent}, which is not a task of this run{nearest(parent, place)}")
    return HeadForm(
        tuple(given.get("hidden", same.hidden)) if combine is None else (),
        features[0] if features else NOTHING if parents else None,
        tuple(place[parent] for parent in parents),
        tuple(given["experts"]) if "experts" in given else None,
        None if combine is None else tuple(combine),
    )

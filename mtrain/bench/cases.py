"""The cases of a bench, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from mtrain.errors import UserError, nearest


class Named(Protocol):
    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)


def cases_named(cases: Iterable[C], names: Sequence[str] | None) -> list[C]:
    """The named cases, in that order; all of them where none is named.

    Raises:
        UserError: there is no case of a name.
    """
    known = {case.name: case for case in cases}
    for name in names or ():
        if name not in known:
            raise UserError(f"there is no case '{name}'{nearest(name, known)}")
    return [known[name] for name in names or known]

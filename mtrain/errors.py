"""What a user can cause, said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


class UserError(Exception):
    """A mistake that a person can mend: the command prints its one line and exits with status 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def matches(name: str, pattern: str) -> bool:
    """Whether a name is, or matches, a pattern of the config: `assay [uM]` is itself, though [uM] is also a glob."""
    return name == pattern or fnmatchcase(name, pattern)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or what is known, or nothing: the end of a line that refuses `name`."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [k for k in known if k.endswith("." + name)][:1]
    if close:
        return f"; did you mean '{close[0]}'?"
    if known and len(known) <= 20:
        return f"; known: {', '.join(known)}"
    return ""


def some(names: Sequence[str], most: int = 5) -> str:
    """The first `most` names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

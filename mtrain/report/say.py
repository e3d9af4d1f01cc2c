"""A line as it is: neither wrapped, nor coloured, nor read as markup, which a task's name may look like."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print one line."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)

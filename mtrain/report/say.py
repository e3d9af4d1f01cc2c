"""Text as it is: neither wrapped, nor coloured, nor read as markup or emoji, which a task's name may look like."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


def say(console: Console, text: str) -> None:
    """Print one line."""
    console.print(Text(text), soft_wrap=True)

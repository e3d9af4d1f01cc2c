"""mtrain: a trainer for models with 100 to 10,000 tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mtrain.errors import UserError

if TYPE_CHECKING:
    from mtrain.notebook import Run, fit

__version__ = "0.1.0"
__all__ = ["Run", "UserError", "fit"]


def __getattr__(name: str) -> Any:
    """`mtrain.fit` and `mtrain.Run` import what they need when they are first used."""
    if name in ("Run", "fit"):
        from mtrain import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module 'mtrain' has no attribute '{name}'")

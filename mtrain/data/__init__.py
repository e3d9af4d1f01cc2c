"""From tables to batches."""

from collections.abc import Iterator, Mapping
from importlib import import_module

from mtrain.data.features import Feature

_MODULES = {
    **dict.fromkeys(("Numeric", "Array", "Categorical"), "features"),
    **dict.fromkeys(("ECFP", "AtomPair", "TopologicalTorsion", "MACCS", "Avalon", "Descriptors"), "chem"),
    "MolGraph": "graphs",
    "Tokens": "tokens",
}


class _Features(Mapping[str, type[Feature]]):
    """Classes by name, each imported when it is asked for: what one feature needs is not asked of a predictor without it."""

    def __getitem__(self, name: str) -> type[Feature]:
        return getattr(import_module(f"mtrain.data.{_MODULES[name]}"), name)

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


FEATURES: Mapping[str, type[Feature]] = _Features()
"""What a config can name by its short name."""

"""From tables to batches."""

from mtrain.data.chem import ECFP, MACCS, AtomPair, Avalon, Descriptors, TopologicalTorsion
from mtrain.data.features import Array, Categorical, Feature, Numeric

FEATURES: dict[str, type[Feature]] = {
    kind.__name__: kind
    for kind in (Numeric, Array, Categorical, ECFP, AtomPair, TopologicalTorsion, MACCS, Avalon, Descriptors)
}
"""What a config can name by its short name."""

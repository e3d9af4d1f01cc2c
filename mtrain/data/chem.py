"""Molecules as features: a column of SMILES to fingerprints or descriptors, by RDKit (the extra `chem`)."""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mtrain.data.features import FLOAT32_MAX, Encoded, Feature, Numeric, OnInvalid, is_text, only_column
from mtrain.errors import UserError


class Molecules(Feature):
    """One column of SMILES. A subclass says what one molecule's row of values is.

    A row is not valid where the text is missing, empty or not parsed by RDKit, whose own messages are kept quiet.
    """

    cached = True
    expected = "a SMILES string that RDKit can parse"

    def __init__(self, on_invalid: OnInvalid = "error"):
        require_rdkit(type(self).__name__)
        self.on_invalid = on_invalid

    @abstractmethod
    def calculator(self) -> tuple[int, type, Callable[[Any], Any]]:
        """Number and numpy type of a row's values, and the function from an RDKit molecule to them."""

    def version(self) -> str:
        import rdkit

        return rdkit.__version__

    def encode(self, table: pa.Table) -> Encoded:
        from rdkit import rdBase

        name = only_column(self, table)
        column = table[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not (is_text(column.type) or pa.types.is_null(column.type)):
            raise UserError(f"column '{name}' has type {column.type}, but {type(self).__name__} reads SMILES text")
        num_values, dtype, calculate = self.calculator()
        values = np.zeros((table.num_rows, num_values), dtype)
        valid = np.zeros(table.num_rows, bool)
        with rdBase.BlockLogs():
            for row, smiles in enumerate(column.to_pylist()):
                if (molecule := parse(smiles)) is not None:
                    values[row], valid[row] = calculate(molecule), True
        return Encoded(values, valid)


class Fingerprint(Molecules):
    """Bits or counts of hashed substructures: uint8 bits, uint16 counts, `log1p` of the counts if asked for."""

    counts: bool = False
    log1p: bool = False

    def __init__(self, bits: int, counts: bool, log1p: bool, on_invalid: OnInvalid):
        super().__init__(on_invalid)
        if not 1 <= bits <= 1 << 20:
            raise UserError(f"{type(self).__name__}: bits is {bits}, expected 1 to {1 << 20}; 1024 or 2048 is usual")
        if log1p and not counts:
            raise UserError(f"{type(self).__name__}: log1p is set without counts; set counts: true, or leave log1p out")
        self.bits, self.counts, self.log1p = bits, counts, log1p

    def generator(self) -> Any:
        """An RDKit fingerprint generator."""
        raise NotImplementedError

    def calculator(self) -> tuple[int, type, Callable[[Any], Any]]:
        made = self.generator()
        if self.counts:
            return self.bits, np.uint16, lambda molecule: np.minimum(made.GetCountFingerprintAsNumPy(molecule), 65535)
        return self.bits, np.uint8, made.GetFingerprintAsNumPy

    def transform(self, values: np.ndarray) -> np.ndarray:
        x = super().transform(values)
        return np.log1p(x) if self.log1p else x


class ECFP(Fingerprint):
    """Extended-connectivity (Morgan) fingerprint: Rogers and Hahn 2010; radius 2 is ECFP4, with `features` FCFP4."""

    encode_options = ("radius", "bits", "counts", "features", "chirality")

    def __init__(
        self,
        radius: int = 2,
        bits: int = 1024,
        counts: bool = False,
        log1p: bool = False,
        features: bool = False,
        chirality: bool = False,
        on_invalid: OnInvalid = "error",
    ):
        super().__init__(bits, counts, log1p, on_invalid)
        if not 0 <= radius <= 20:
            raise UserError(f"ECFP: radius is {radius}, expected 0 to 20; 2 or 3 is usual")
        self.radius, self.features, self.chirality = radius, features, chirality

    def generator(self) -> Any:
        from rdkit.Chem import rdFingerprintGenerator as make

        invariants = {"atomInvariantsGenerator": make.GetMorganFeatureAtomInvGen()} if self.features else {}
        return make.GetMorganGenerator(radius=self.radius, fpSize=self.bits, includeChirality=self.chirality, **invariants)


class AtomPair(Fingerprint):
    """Atom pairs (Carhart 1985). Without `counts`, RDKit's bits simulate counts up to 8."""

    encode_options = ("bits", "counts", "chirality")

    def __init__(
        self,
        bits: int = 2048,
        counts: bool = False,
        log1p: bool = False,
        chirality: bool = False,
        on_invalid: OnInvalid = "error",
    ):
        super().__init__(bits, counts, log1p, on_invalid)
        self.chirality = chirality

    def generator(self) -> Any:
        from rdkit.Chem import rdFingerprintGenerator as make

        return make.GetAtomPairGenerator(fpSize=self.bits, includeChirality=self.chirality)


class TopologicalTorsion(Fingerprint):
    """Topological torsions (Nilakantan 1987). Without `counts`, RDKit's bits simulate counts up to 8."""

    encode_options = ("bits", "counts", "chirality")

    def __init__(
        self,
        bits: int = 2048,
        counts: bool = False,
        log1p: bool = False,
        chirality: bool = False,
        on_invalid: OnInvalid = "error",
    ):
        super().__init__(bits, counts, log1p, on_invalid)
        self.chirality = chirality

    def generator(self) -> Any:
        from rdkit.Chem import rdFingerprintGenerator as make

        return make.GetTopologicalTorsionGenerator(fpSize=self.bits, includeChirality=self.chirality)


class MACCS(Molecules):
    """The 166 public MACCS keys as 167 bits: bit 0 is never set, as in RDKit."""

    encode_options = ()

    def __init__(self, on_invalid: OnInvalid = "error"):
        super().__init__(on_invalid)

    def calculator(self) -> tuple[int, type, Callable[[Any], Any]]:
        from rdkit.Chem.rdMolDescriptors import GetMACCSKeysFingerprint

        return 167, np.uint8, _as_numpy(GetMACCSKeysFingerprint)


class Avalon(Fingerprint):
    """Avalon fingerprint (Gedeck 2006)."""

    encode_options = ("bits", "counts")

    def __init__(self, bits: int = 1024, counts: bool = False, log1p: bool = False, on_invalid: OnInvalid = "error"):
        super().__init__(bits, counts, log1p, on_invalid)

    def calculator(self) -> tuple[int, type, Callable[[Any], Any]]:
        from rdkit.Avalon.pyAvalonTools import GetAvalonCountFP, GetAvalonFP

        made = GetAvalonCountFP if self.counts else GetAvalonFP
        dtype = np.uint16 if self.counts else np.uint8
        return self.bits, dtype, _as_numpy(lambda molecule: made(molecule, nBits=self.bits))


class Descriptors(Molecules):
    """RDKit's 2D descriptors (217 in 2026.9), tens of milliseconds a molecule.

    A descriptor that fails or is not finite is missing: filled with the training median. Then, on training statistics,
    normal scores of ranks (`quantile`; insensitive to the wild tails of some descriptors) or mean 0 and variance 1
    (`standardize`), and `clip`. Constant descriptors are dropped. Values beyond float32 are cut to its range.
    """

    encode_options = ()

    def __init__(
        self,
        transform: Literal["quantile", "standardize"] = "quantile",
        clip: float | None = 5.0,
        on_invalid: OnInvalid = "error",
    ):
        super().__init__(on_invalid)
        quantile = transform == "quantile"
        self._numeric = Numeric(
            standardize=not quantile, transform="quantile" if quantile else "none", clip=clip, impute="median"
        )

    @staticmethod
    def names() -> list[str]:
        from rdkit.Chem import Descriptors as made

        return [name for name, _ in made.descList]

    def calculator(self) -> tuple[int, type, Callable[[Any], Any]]:
        from rdkit.Chem import Descriptors as made

        def calculate(molecule: Any) -> np.ndarray:
            found = made.CalcMolDescriptors(molecule, missingVal=np.nan, silent=True)
            row = np.fromiter(found.values(), np.float64, len(found))
            return np.where(np.isfinite(row), np.clip(row, -FLOAT32_MAX, FLOAT32_MAX), np.nan)

        return len(made.descList), np.float32, calculate

    def fit(self, values: np.ndarray, columns: list[str]) -> None:
        self._numeric.fit(values, self.names())
        self.state, self.notes = self._numeric.state, self._numeric.notes

    def transform(self, values: np.ndarray) -> np.ndarray:
        return self._numeric.transform(values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["columns"] != (here := self.names()):
            raise UserError(
                f"Descriptors: made with {len(state['columns'])} RDKit descriptors, but RDKit {self.version()} has "
                f"{len(here)}, or others; install the RDKit that made the run"
            )
        super().load_state_dict(state)
        self._numeric.load_state_dict(state)


def require_rdkit(what: str) -> None:
    if importlib.util.find_spec("rdkit") is None:
        raise UserError(f'{what} needs RDKit, which is not installed: pip install "mtrain[chem]"')


def parse(smiles: str | None) -> Any:
    """An RDKit molecule with at least one atom, or None."""
    from rdkit import Chem

    molecule = Chem.MolFromSmiles(smiles) if smiles else None
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


def scaffolds(smiles: Sequence[str | None]) -> list[str]:
    """The Bemis-Murcko scaffold (without chirality) of each molecule, as SMILES; "" where there is no ring.

    A text that is not a molecule is its own scaffold, marked by a leading "invalid:".
    """
    require_rdkit("the scaffold split")
    from rdkit import rdBase
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

    with rdBase.BlockLogs():
        molecules = ((text, parse(text)) for text in smiles)
        return [
            f"invalid:{text}" if molecule is None else MurckoScaffoldSmiles(mol=molecule, includeChirality=False)
            for text, molecule in molecules
        ]


def _as_numpy(make: Callable[[Any], Any]) -> Callable[[Any], np.ndarray]:
    """RDKit's bit or count vector as an array."""
    from rdkit.DataStructs import ConvertToNumpyArray

    def calculate(molecule: Any) -> np.ndarray:
        out = np.zeros(0, np.int64)
        ConvertToNumpyArray(make(molecule), out)
        return out

    return calculate

"""Graphs as data: one large graph from a file, and molecules packed into rows of a fixed width.

A packed molecule of at most M atoms is `[atoms, bonds, M atom codes, 2 M bond codes]`, the rest of each list 0. A code holds
small whole numbers in the bits of one number below 2**24, which float32 holds exactly: see `ATOM_FIELDS` and `BOND_FIELDS`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrain.data.chem import Molecules
from mtrain.data.features import FLOAT32_MAX, Encoded, OnInvalid
from mtrain.data.sources import existing, search_folders
from mtrain.errors import UserError

MOLECULES = "packed molecules"
MAX_ATOMS = 256  # the ends of a bond have 8 bits each
ATOM_FIELDS = {  # name to bits
    "element": 7,
    "degree": 3,
    "charge": 3,  # -4 to 3
    "hydrogens": 3,
    "radical": 1,
    "hybridization": 3,
    "aromatic": 1,
    "ring": 1,
    "chirality": 2,  # none, clockwise, counter-clockwise, other
}
BOND_FIELDS = {"begin": 8, "end": 8, "type": 3, "stereo": 3, "conjugated": 1, "ring": 1}
BOND_TYPES = ("OTHER", "SINGLE", "DOUBLE", "TRIPLE", "AROMATIC", "DATIVE")


class MolGraph(Molecules):
    """A column of SMILES as packed molecule graphs, for the trunk GraphNet. Hydrogens are counted, not atoms of their own.

    Args:
        max_atoms: a row with more atoms (or more than twice as many bonds) cannot be used.
    """

    encode_options = ("max_atoms",)
    packed = MOLECULES

    def __init__(self, max_atoms: int = 100, on_invalid: OnInvalid = "error"):
        super().__init__(on_invalid)
        if not 1 <= max_atoms <= MAX_ATOMS:
            raise UserError(f"MolGraph: max_atoms is {max_atoms}, expected 1 to {MAX_ATOMS}")
        self.max_atoms = max_atoms

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"a SMILES string that RDKit can parse, of at most {self.max_atoms} atoms (max_atoms)"

    def calculator(self) -> tuple[int, type, Callable[[Any], Any]]:
        return packed_width(self.max_atoms), np.int32, lambda molecule: pack_molecule(molecule, self.max_atoms)

    def encode(self, table: pa.Table) -> Encoded:
        encoded = super().encode(table)
        return Encoded(encoded.values, encoded.valid & (encoded.values[:, 0] > 0))


def packed_width(max_atoms: int) -> int:
    """Numbers in a row for molecules of at most so many atoms."""
    return 2 + 3 * max_atoms


def pack_molecule(molecule: Any, max_atoms: int) -> NDArray[np.int32]:
    """An RDKit molecule as a packed row; zeros where it is too large."""
    row = np.zeros(packed_width(max_atoms), np.int32)
    num_atoms, num_bonds = molecule.GetNumAtoms(), molecule.GetNumBonds()
    if num_atoms <= max_atoms and num_bonds <= 2 * max_atoms:
        row[:2] = num_atoms, num_bonds
        row[2 : 2 + num_atoms] = [_pack(_atom(atom), ATOM_FIELDS) for atom in molecule.GetAtoms()]
        row[2 + max_atoms :][:num_bonds] = [_pack(_bond(bond), BOND_FIELDS) for bond in molecule.GetBonds()]
    return row


@dataclass(frozen=True)
class MoleculeBatch:
    """Molecules as one graph.

    `row_A`, `place_A`: row of each atom, and its number there; `atom_A`, `bond_E`: their fields `[A, 9]` and `[E, 4]` (without
    its ends), as int64; `edge_2E`: from and to which atom each bond leads, each bond both ways.
    """

    row_A: Tensor
    place_A: Tensor
    atom_A: Tensor
    edge_2E: Tensor
    bond_E: Tensor


def unpack_molecules(x_BF: Tensor) -> MoleculeBatch:
    """Packed rows, as `pack_molecule` gives them, as one graph of all their atoms. Rows of zeros have none.

    In `torch.export`, where the number of atoms cannot depend on the rows, all places for atoms and bonds are there, and those
    without one belong to the last row, which must be zeros.

    Raises:
        UserError: rows that are something else.
    """
    max_atoms = (x_BF.shape[1] - 2) // 3
    num_atoms_B, num_bonds_B = x_BF[:, :2].long().unbind(1)
    exporting = torch.compiler.is_exporting()
    if not exporting and ((num_atoms_B < 0) | (num_atoms_B > max_atoms) | ((num_atoms_B == 0) & x_BF.any(1))).any():
        raise UserError("inputs: they are no packed molecules; the trunk GraphNet reads the feature MolGraph and nothing else")
    row_A, place_A, code_A = _listed(x_BF[:, 2 : 2 + max_atoms], num_atoms_B)
    row_E, _, code_E = _listed(x_BF[:, 2 + max_atoms :], num_bonds_B)
    bond_E = _unpack(code_E, BOND_FIELDS)
    places_B = torch.full_like(num_atoms_B, max_atoms) if exporting else num_atoms_B
    first_B = places_B.cumsum(0) - places_B
    ends_2E = (bond_E[:, :2] + first_B[row_E, None]).T
    both_ways_2E = torch.cat([ends_2E, ends_2E.flip(0)], 1)
    return MoleculeBatch(row_A, place_A, _unpack(code_A, ATOM_FIELDS), both_ways_2E, bond_E[:, 2:].repeat(2, 1))


def _listed(values_BM: Tensor, count_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, place and value of the first `count_B` values of each row; in `torch.export` of all values, see above."""
    there_BM = torch.arange(values_BM.shape[1], device=count_B.device) < count_B[:, None]
    if torch.compiler.is_exporting():
        row_B, place_M = (torch.arange(size, device=count_B.device) for size in values_BM.shape)
        row_BM = torch.where(there_BM, row_B[:, None], count_B.shape[0] - 1)
        return row_BM.flatten(), place_M.expand_as(there_BM).flatten(), (values_BM * there_BM).long().flatten()
    row_N, place_N = there_BM.nonzero(as_tuple=True)
    return row_N, place_N, values_BM[there_BM].long()


def _pack(values: Sequence[int], fields: Mapping[str, int]) -> int:
    code = 0
    for value, bits in zip(values, fields.values(), strict=True):
        code = code << bits | min(max(value, 0), 2**bits - 1)
    return code


def _unpack(code_N: Tensor, fields: Mapping[str, int]) -> Tensor:
    """Codes `[N]` to fields `[N, number of fields]`."""
    bits = torch.tensor(list(fields.values()), device=code_N.device)
    shift = bits.flip(0).cumsum(0).flip(0) - bits
    return code_N[:, None] // 2**shift % 2**bits  # ONNX has no shifts


def _atom(atom: Any) -> list[int]:
    return [
        atom.GetAtomicNum(),
        atom.GetTotalDegree(),
        atom.GetFormalCharge() + 4,
        atom.GetTotalNumHs(),
        atom.GetNumRadicalElectrons(),
        int(atom.GetHybridization()),
        atom.GetIsAromatic(),
        atom.IsInRing(),
        int(atom.GetChiralTag()),
    ]


def _bond(bond: Any) -> list[int]:
    name = str(bond.GetBondType())
    return [
        bond.GetBeginAtomIdx(),
        bond.GetEndAtomIdx(),
        BOND_TYPES.index(name) if name in BOND_TYPES else 0,
        int(bond.GetStereo()),
        bond.GetIsConjugated(),
        bond.IsInRing(),
    ]


@dataclass(frozen=True)
class Graph:
    """Node features `x_NF` (float32) and `edge_2E` (int64), the number of the node from which and to which each edge leads."""

    x_NF: Tensor
    edge_2E: Tensor


def read_graph(path: str, root: str | None = None, nodes: str = "x", edges: str = "edge_index") -> Graph:
    """One graph from a file of numpy arrays (.npz).

    Args:
        path: as a data path, under `root` or $MTRAIN_DATA, or in the working directory.
        nodes: name of the array of node features, [N, F].
        edges: of the array [2, E] of the edges' nodes; both directions where the graph has none.

    Raises:
        UserError: no such file or array, or arrays that are no graph.
    """
    found = existing(path, search_folders(root), "graph")
    try:
        opened = np.load(found, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError("one array without a name")
        with opened as file:
            for key, name in (("nodes", nodes), ("edges", edges)):
                if name not in file.files:
                    holds = f"it holds {', '.join(file.files)}"
                    raise UserError(f"graph {found}: no array '{name}', {holds}; name the right one in the option {key}")
            x_NF, edge_2E = file[nodes], file[edges]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        reason = "of another format, or with Python objects in it" if "allow_pickle" in str(error) else error
        raise UserError(f"graph {found}: not a file of numpy arrays (.npz): {reason}; write it with np.savez") from None
    return _checked(found, x_NF, edge_2E, nodes, edges)


def _checked(path: Path, x_NF: NDArray[Any], edge_2E: NDArray[Any], nodes: str, edges: str) -> Graph:
    def refuse(name: str, found: str, expected: str) -> None:
        raise UserError(f"graph {path}, array '{name}': {found}, expected {expected}")

    if x_NF.ndim != 2 or x_NF.dtype.kind not in "fiub":
        refuse(nodes, f"{x_NF.dtype} of shape {list(x_NF.shape)}", "numbers [nodes, features]")
    if not x_NF.size:
        refuse(nodes, f"shape {list(x_NF.shape)}", "at least one node and one feature")
    if x_NF.dtype.kind == "f" and (bad_NF := ~(np.abs(x_NF) <= np.float32(FLOAT32_MAX))).any():
        refuse(nodes, f"{x_NF[bad_NF][0]} in node {np.argwhere(bad_NF)[0, 0]}", "finite numbers that fit float32")
    if edge_2E.ndim != 2 or len(edge_2E) != 2 or edge_2E.dtype.kind not in "iu":
        refuse(edges, f"{edge_2E.dtype} of shape {list(edge_2E.shape)}", "whole numbers [2, edges]")
    if not edge_2E.size:
        refuse(edges, "no edges", "at least one")
    bad_2E = (edge_2E < 0) | (edge_2E >= len(x_NF))
    if bad_2E.any():
        found = f"node {edge_2E[bad_2E][0]} in edge {np.argwhere(bad_2E)[0, 1]}"
        refuse(edges, found, f"0 to {len(x_NF) - 1} ('{nodes}' has {len(x_NF)} nodes)")
    return Graph(torch.from_numpy(x_NF.astype(np.float32)), torch.from_numpy(edge_2E.astype(np.int64)))

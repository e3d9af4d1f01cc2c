"""Packed molecules against PyTorch Geometric's, and graphs from files."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from mtrain.data.features import encode_column
from mtrain.data.graphs import ATOM_FIELDS, BOND_FIELDS, MolGraph, packed_width, read_graph, unpack_molecules
from mtrain.errors import UserError

SMILES = [
    "C", "[Na+].[Cl-]", "CC(=O)Oc1ccccc1C(=O)O", "C#N", "F/C=C/F", "F/C=C\\F", "N[C@@H](C)C(=O)O", "N[C@H](C)C(=O)O",
    "[O-][N+](=O)c1ccc2[nH]ccc2c1", "FP(F)(F)(F)F", "[CH3]", "C1CC1C=CC=C", "[Pt](Cl)(Cl)(N)N", "C12C3C4C1C5C2C3C45",
]  # fmt: skip


def rows(smiles, **options):
    feature = MolGraph(**options)
    table = pa.table({"smiles": smiles})
    encoded = encode_column(table, ["smiles"], feature)
    feature.fit(encoded.values, ["smiles"])
    return torch.from_numpy(feature.transform(encoded.values)), encoded.valid


def test_packed_molecules_are_those_of_pytorch_geometric():
    from torch_geometric.data import Batch
    from torch_geometric.utils import from_smiles
    from torch_geometric.utils.smiles import e_map, x_map

    expected = Batch.from_data_list([from_smiles(text) for text in SMILES])
    x_BF, _ = rows(SMILES, max_atoms=13)
    assert (x_BF.dtype, x_BF.shape) == (torch.float32, (len(SMILES), packed_width(13)))
    batch = unpack_molecules(x_BF)
    assert batch.row_A.tolist() == expected.batch.tolist()

    ours = {name: batch.atom_A[:, i] for i, name in enumerate(ATOM_FIELDS)}
    theirs = {name: expected.x[:, i] for i, name in enumerate(x_map)}
    assert (ours["charge"] - 4).tolist() == (theirs["formal_charge"] - 5).tolist()
    assert ours["radical"].tolist() == theirs["num_radical_electrons"].clamp(max=1).tolist()
    for name, other in {
        "element": "atomic_num", "degree": "degree", "hydrogens": "num_hs", "aromatic": "is_aromatic", "ring": "is_in_ring",
        "chirality": "chirality",
    }.items():  # fmt: skip
        assert ours[name].tolist() == theirs[other].clamp(max=2 ** ATOM_FIELDS[name] - 1).tolist(), name
    named = np.array(x_map["hybridization"])[theirs["hybridization"]]
    rdkit_order = ["UNSPECIFIED", "S", "SP", "SP2", "SP3", "SP2D", "SP3D", "SP3D2"]
    assert [rdkit_order[i] for i in ours["hybridization"]] == named.tolist()

    kind = np.array(["OTHER", "SINGLE", "DOUBLE", "TRIPLE", "AROMATIC", "DATIVE", "", ""])[batch.bond_E[:, 0]]
    bonds = {(a, b): tuple(v) for a, b, *v in zip(*batch.edge_2E.tolist(), kind, *batch.bond_E[:, 1:3].T.tolist(), strict=True)}
    kind = np.array(e_map["bond_type"])[expected.edge_attr[:, 0]]
    attributes = expected.edge_attr[:, 1:].T.tolist()
    assert bonds == {(a, b): tuple(v) for a, b, *v in zip(*expected.edge_index.tolist(), kind, *attributes, strict=True)}
    assert list(BOND_FIELDS) == ["begin", "end", "type", "stereo", "conjugated", "ring"]


def test_a_molecule_of_the_most_atoms_keeps_all_of_them():
    x_BF, valid = rows(["C" * 256, "C" * 257], max_atoms=256, on_invalid="skip")
    assert valid.tolist() == [True, False]
    batch = unpack_molecules(x_BF[:1])
    assert len(batch.row_A) == 256
    assert batch.edge_2E.max() == 255


def test_molecules_that_are_too_large_are_refused_or_skipped():
    with pytest.raises(UserError, match=r"row 2: found 'CCCC', expected .* at most 3 atoms \(max_atoms\) \(1 such rows in 2\)"):
        rows(["CC", "CCCC"], max_atoms=3)
    assert rows(["CC", "CCCC", "x", None], max_atoms=3, on_invalid="skip")[1].tolist() == [True, False, False, False]
    with pytest.raises(UserError, match="max_atoms is 300, expected 1 to 256"):
        MolGraph(max_atoms=300)


X = np.eye(3, dtype=np.uint8)
EDGES = np.array([[0, 1], [1, 0]])


def test_a_graph_is_found_under_the_root_the_variable_or_here(tmp_path, monkeypatch):
    np.savez(tmp_path / "g.npz", x=X, edge_index=EDGES)
    graph = read_graph("g.npz", str(tmp_path))
    assert (graph.x_NF.dtype, graph.edge_2E.dtype) == (torch.float32, torch.int64)
    np.testing.assert_array_equal(graph.edge_2E, EDGES)
    monkeypatch.setenv("MTRAIN_DATA", str(tmp_path))
    np.testing.assert_array_equal(read_graph("g.npz").x_NF, X)
    with pytest.raises(UserError, match=r"graph other.npz: no such file .* set data.root or MTRAIN_DATA"):
        read_graph("other.npz")


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"x": X[:0], "edge_index": EDGES}, r"array 'x': shape \[0, 3\], expected at least one node"),
        ({"x": X, "edge_index": EDGES[:, :0]}, "array 'edge_index': no edges, expected at least one"),
        ({"x": X, "edge_index": EDGES + 2}, r"node 3 in edge 1, expected 0 to 2 \('x' has 3 nodes\)"),
        ({"x": X, "edge_index": EDGES - 1}, "node -1 in edge 0"),
        ({"x": X, "edge_index": np.zeros((3, 2), int)}, r"int64 of shape \[3, 2\], expected whole numbers \[2, edges\]"),
        ({"x": X, "edge_index": EDGES + 0.5}, r"float64 of shape \[2, 2\], expected whole numbers \[2, edges\]"),
        ({"x": np.where(X, 1, [[0], [np.nan], [0]]), "edge_index": EDGES}, "array 'x': nan in node 1, expected finite numbers"),
        (
            {"x": np.where(X, 1, [[0], [-1e300], [0]]), "edge_index": EDGES},
            "-1e.300 in node 1, expected finite numbers that",
        ),
        ({"x": X[0], "edge_index": EDGES}, r"shape \[3\], expected numbers \[nodes, features\]"),
        ({"X": X, "edge_index": EDGES}, "no array 'x', it holds X, edge_index; name the right one in the option nodes"),
    ],
)
def test_what_is_no_graph_is_refused(tmp_path, arrays, line):
    np.savez(tmp_path / "g.npz", **arrays)
    with pytest.raises(UserError, match=line):
        read_graph("g.npz", str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"PK\x03\x04broken"])
def test_what_is_no_file_of_arrays_is_refused(tmp_path, content):
    (tmp_path / "g.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"g.npz: not a file of numpy arrays \(.npz\)"):
        read_graph("g.npz", str(tmp_path))


def test_one_array_without_a_name_is_refused(tmp_path):
    np.save(tmp_path / "g.npy", X)
    with pytest.raises(UserError, match=r"g.npy: not a file .*: one array without a name; write it with np.savez"):
        read_graph("g.npy", str(tmp_path))


def test_a_table_in_place_of_a_graph_is_refused_without_numpys_advice(tmp_path):
    (tmp_path / "edges.csv").write_text("from,to\n0,1\n")
    with pytest.raises(UserError, match=r"\(.npz\): of another format, or with Python objects in it; write it with np.savez$"):
        read_graph("edges.csv", str(tmp_path))

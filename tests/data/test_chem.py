import importlib.util
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from sklearn.preprocessing import StandardScaler

from mtrain.errors import UserError

rdkit = pytest.importorskip("rdkit")
from rdkit import Chem, DataStructs  # noqa: E402
from rdkit.Avalon import pyAvalonTools  # noqa: E402
from rdkit.Chem import AllChem, MACCSkeys, rdMolDescriptors  # noqa: E402
from rdkit.Chem import Descriptors as RDKitDescriptors  # noqa: E402

from mtrain.data.chem import (  # noqa: E402
    ECFP,
    MACCS,
    AtomPair,
    Avalon,
    Descriptors,
    TopologicalTorsion,
    scaffolds,
)
from mtrain.data.features import encode_column  # noqa: E402

SMILES = [
    "CC(=O)Oc1ccccc1C(=O)O",
    "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",
    "C[C@H](N)C(=O)O",
    "CCCCCCCCCCCCCCCC",
    "c1ccc2ccccc2c1",
    "[Na+].[Cl-]",
    "CC(C)Cc1ccc(cc1)C(C)C(=O)O",
    "OC1CCCCC1",
]
MOLECULES = [Chem.MolFromSmiles(s) for s in SMILES]
TABLE = pa.table({"smiles": SMILES})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def dense(vectors):
    rows = []
    for vector in vectors:
        row = np.zeros(0, np.int64)
        DataStructs.ConvertToNumpyArray(vector, row)
        rows.append(row)
    return np.stack(rows)


@pytest.mark.parametrize(
    ("feature", "make"),
    [
        (ECFP(), lambda m: AllChem.GetMorganFingerprintAsBitVect(m, 2, 1024)),
        (ECFP(radius=3, bits=512), lambda m: AllChem.GetMorganFingerprintAsBitVect(m, 3, 512)),
        (ECFP(chirality=True), lambda m: AllChem.GetMorganFingerprintAsBitVect(m, 2, 1024, useChirality=True)),
        (ECFP(features=True), lambda m: AllChem.GetMorganFingerprintAsBitVect(m, 2, 1024, useFeatures=True)),
        (ECFP(counts=True), lambda m: AllChem.GetHashedMorganFingerprint(m, 2, 1024)),
        (AtomPair(counts=True), lambda m: rdMolDescriptors.GetHashedAtomPairFingerprint(m, 2048)),
        (AtomPair(), lambda m: rdMolDescriptors.GetHashedAtomPairFingerprintAsBitVect(m, 2048)),
        (TopologicalTorsion(), lambda m: rdMolDescriptors.GetHashedTopologicalTorsionFingerprintAsBitVect(m, 2048)),
        (TopologicalTorsion(counts=True), lambda m: rdMolDescriptors.GetHashedTopologicalTorsionFingerprint(m, 2048)),
        (MACCS(), MACCSkeys.GenMACCSKeys),
        (Avalon(bits=512), lambda m: pyAvalonTools.GetAvalonFP(m, 512)),
        (Avalon(counts=True), lambda m: pyAvalonTools.GetAvalonCountFP(m, 1024)),
    ],
)
def test_fingerprints_are_those_of_rdkits_older_functions(feature, make):
    encoded = feature.encode(TABLE)
    expected = dense(make(m) for m in MOLECULES)
    np.testing.assert_array_equal(encoded.values, expected)
    assert encoded.values.dtype == (np.uint16 if getattr(feature, "counts", False) else np.uint8)
    assert encoded.valid.all()
    feature.fit(encoded.values, ["smiles"])
    assert feature.width == expected.shape[1]
    np.testing.assert_array_equal(feature.transform(encoded.values), expected.astype(np.float32))


def test_log1p_is_taken_of_counts_and_refused_without_them():
    feature = ECFP(counts=True, log1p=True)
    values = feature.encode(TABLE).values
    assert values.max() > 2
    feature.fit(values, ["smiles"])
    np.testing.assert_allclose(feature.transform(values), np.log1p(values.astype(float)), rtol=1e-6)
    with pytest.raises(UserError, match="log1p is set without counts"):
        ECFP(log1p=True)


@pytest.mark.parametrize("make", [lambda: ECFP(bits=0), lambda: ECFP(radius=-1)])
def test_options_out_of_range_are_refused(make):
    with pytest.raises(UserError, match="expected"):
        make()


def test_rows_that_are_no_molecules_are_skipped_or_named_and_rdkit_is_quiet(capfd):
    texts = ["CCO", "not a molecule", None, "", " ", "C1CC", "c1ccccc1"]
    ds = datasets.Dataset.from_dict({"smiles": texts})
    encoded = encode_column(ds.with_format("arrow")[:], ["smiles"], ECFP(on_invalid="skip"))
    assert encoded.valid.tolist() == [True, False, False, False, False, False, True]
    assert not encoded.values[1:6].any()
    with pytest.raises(
        UserError, match=r"column 'smiles', row 2: found 'not a molecule', .* RDKit can parse \(5 such rows in 7\)"
    ):
        encode_column(ds.with_format("arrow")[:], ["smiles"], ECFP())
    err = capfd.readouterr().err
    assert "Parse Error" not in err
    assert "unclosed ring" not in err


def test_only_one_column_of_text_is_read():
    with pytest.raises(UserError, match="ECFP reads one column, got columns 'a', 'b'"):
        ECFP().encode(pa.table({"a": ["C"], "b": ["C"]}))
    with pytest.raises(UserError, match="column 'a' has type int64"):
        ECFP().encode(pa.table({"a": [1]}))


def test_a_column_of_categories_is_read_as_its_text():
    categories = pa.table({"smiles": pa.array(SMILES).dictionary_encode()})
    for encoded in (ECFP().encode(categories), encode_column(categories, ["smiles"], ECFP())):
        np.testing.assert_array_equal(encoded.values, ECFP().encode(TABLE).values)


def raw_descriptors():
    return np.array([[f(m) for _, f in RDKitDescriptors.descList] for m in MOLECULES])


def test_descriptors_are_rdkits_with_what_is_not_finite_as_missing():
    got = Descriptors().encode(TABLE).values
    expected = raw_descriptors()
    np.testing.assert_allclose(got, np.where(np.isfinite(expected), expected, np.nan), rtol=1e-6)
    assert np.isnan(got).any()  # BCUT2D of salts


def test_descriptors_standardize_with_the_training_median_for_missing_ones_and_drop_constant_ones():
    feature = Descriptors(transform="standardize", clip=2.0)
    values = feature.encode(TABLE).values
    feature.fit(values[:6], ["smiles"])
    raw = values.astype(np.float64)
    median = np.nanmedian(raw[:6], axis=0)
    raw = raw[:, np.nanmax(raw[:6], 0) > np.nanmin(raw[:6], 0)]
    median = np.nanmedian(raw[:6], axis=0)
    filled = np.where(np.isnan(raw), median, raw)
    expected = np.clip(StandardScaler().fit(filled[:6]).transform(filled), -2, 2)
    np.testing.assert_allclose(feature.transform(values), expected, rtol=1e-5, atol=1e-5)
    assert feature.width < values.shape[1]
    assert feature.notes[0].startswith("dropped constant columns '")


def test_descriptors_as_normal_scores_are_finite_and_their_state_survives_json():
    feature = Descriptors()
    values = feature.encode(TABLE).values
    feature.fit(values, ["smiles"])
    x = feature.transform(values)
    assert np.isfinite(x).all()
    assert x.dtype == np.float32
    state = json.loads(json.dumps(feature.state_dict(), allow_nan=False))
    again = Descriptors()
    again.load_state_dict(state)
    np.testing.assert_array_equal(again.transform(values), x)
    with pytest.raises(UserError, match="install the RDKit that made the run"):
        Descriptors().load_state_dict(state | {"columns": state["columns"][:-1]})


def test_options_that_encode_does_not_read_share_the_cache(tmp_path, monkeypatch):
    ds = datasets.Dataset.from_dict({"smiles": SMILES})
    for feature in (ECFP(counts=True), ECFP(counts=True, log1p=True, on_invalid="skip"), ECFP()):
        encode_column(ds.with_format("arrow")[:], ["smiles"], feature)
    assert len(list((tmp_path / "cache" / "mtrain").iterdir())) == 2


def test_without_rdkit_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'ECFP needs RDKit, which is not installed: pip install "mtrain\[chem\]"'):
        ECFP()


def test_scaffolds_are_bemis_murcko_without_chirality_and_what_does_not_parse_is_its_own():
    assert scaffolds(["Cc1ccccc1", "CCO", "C[C@@H]1CC1c1ccccc1", "nonsense", None]) == [
        "c1ccccc1",
        "",
        "c1ccc(C2CC2)cc1",
        "invalid:nonsense",
        "invalid:None",
    ]


@pytest.mark.parametrize(("file", "num_invalid"), [("toxcast/toxcast.csv.gz", 0), ("tox21/tox21.csv", 8)])
def test_real_molecules_are_read_in_two_processes(real_data, file, num_invalid):
    path = Path(real_data) / file
    ds = datasets.load_dataset("csv", data_files=str(path), split="train").select_columns(["smiles"])
    encoded = encode_column(ds.with_format("arrow")[:], ["smiles"], ECFP(on_invalid="skip"), num_proc=2)
    assert (~encoded.valid).sum() == num_invalid
    rows = np.flatnonzero(encoded.valid)[::500]
    expected = [AllChem.GetMorganFingerprintAsBitVect(Chem.MolFromSmiles(ds[int(r)]["smiles"]), 2, 1024) for r in rows]
    np.testing.assert_array_equal(encoded.values[rows], dense(expected))

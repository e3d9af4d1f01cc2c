"""Graph trunks against dense matrices and one molecule at a time."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from mtrain.cli import main
from mtrain.components import Spec
from mtrain.config import ModelConfig
from mtrain.data.chem import ECFP
from mtrain.data.features import Numeric
from mtrain.data.graphs import MolGraph, unpack_molecules
from mtrain.errors import UserError
from mtrain.model.dropout import row_keys
from mtrain.model.graphs import FieldEmbedding, GraphNet, NodeGraph
from mtrain.model.trunks import build_shared, check_features

N, F = 60, 40
SMILES = ["C", "CCO", "c1ccccc1", "[Na+].[Cl-]", "CC(=O)Oc1ccccc1C(=O)O", "N[C@@H](C)C(=O)O", "C1CC1", "C#N"]


def step_key(step, seed=0):
    return row_keys(seed, step, torch.zeros(1, dtype=torch.int64))


@pytest.fixture
def graph(tmp_path):
    """A graph of two communities with some words each; gives its edges (both ways) and writes graph.npz."""
    rng = np.random.default_rng(0)
    group = np.arange(N) % 2
    a, b = rng.integers(0, N, (2, 400))
    kept = (a != b) & ((group[a] == group[b]) | (rng.random(400) < 0.1))
    pairs = np.unique(np.sort([a[kept], b[kept]], 0), axis=1)
    edges = np.concatenate([pairs, pairs[::-1]], 1)
    x = (rng.random((N, F)) < 0.03 + 0.06 * ((np.arange(F) % 2) == group[:, None])).astype(np.uint8)
    x[:, 0] = 1
    np.savez(tmp_path / "graph.npz", x=x, edge_index=edges)
    part = rng.permutation(np.repeat(["train", "valid", "test"], N // 3))
    nodes = pd.DataFrame(
        {"node": range(N), "y": np.where(group, "odd", "even"), "z": group + 0.1 * rng.normal(size=N), "part": part}
    )
    nodes.to_csv(tmp_path / "nodes.csv", index=False)
    return edges


def node_graph(folder, **options):
    torch.manual_seed(0)
    return NodeGraph(1, "graph.npz", str(folder), **options)


@pytest.mark.parametrize("dense", [False, True])
def test_a_node_graph_is_the_formula_of_kipf_and_welling_on_dense_matrices(tmp_path, graph, dense):
    if dense:
        x = np.random.default_rng(1).normal(size=(N, F)).astype(np.float32) ** 2
        np.savez(tmp_path / "graph.npz", x=x, edge_index=graph)
    model = node_graph(tmp_path, width=8, normalize=True).double()
    assert model.x_NF.is_sparse_csr != dense
    for name in ("x_NF", "adjacency_NN"):
        setattr(model, name, getattr(model, name).double())
    x = torch.from_numpy(np.load(tmp_path / "graph.npz")["x"]).double()
    h = model.linear(x / x.sum(1, keepdim=True))
    a = torch.eye(N, dtype=torch.float64)
    a[graph[1], graph[0]] = 1
    root = a.sum(1).rsqrt()
    for conv in model.convs:
        h = root[:, None] * a * root @ (h.relu() @ conv.lin.weight.T) + conv.bias
    rows = torch.tensor([[5.0], [0.0], [5.0], [59.0]])
    torch.testing.assert_close(model(rows), h[[5, 0, 5, 59]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "conv",
    ["SAGEConv", "GraphConv", "GATv2Conv", "TransformerConv", Spec(class_path="APPNP", init_args={"K": 3, "alpha": 0.2})],
)
def test_layers_of_pytorch_geometric_give_what_they_give_on_plain_edges(tmp_path, graph, conv):
    conv = Spec.model_validate(conv)
    model = node_graph(tmp_path, width=8, convs=[conv])
    h = model.linear(model.x_NF.to_dense()).relu()
    expected = model.convs[0](h, torch.from_numpy(graph))
    torch.testing.assert_close(model(torch.arange(N)[:, None].float()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dense", [False, True])
def test_dropout_of_a_node_depends_on_the_step_and_not_on_the_batch(tmp_path, graph, dense):
    if dense:
        np.savez(tmp_path / "graph.npz", x=np.ones((N, F)), edge_index=graph)
    model = node_graph(tmp_path, width=8, dropout=0.5, input_dropout=0.5)
    every = torch.arange(N)[:, None].float()
    z = model(every, step_key(1))
    torch.testing.assert_close(model(every[[7, 3]], step_key(1)), z[[7, 3]])
    assert model(every[:0], step_key(1)).shape == (0, 8)
    assert not torch.allclose(model(every, step_key(2)), z)
    found = torch.stack([model._features(step_key(step).expand(N) + torch.arange(N)).to_dense() for step in range(400)])
    x = model.x_NF.to_dense()
    assert set((found[0] / x)[x > 0].round(decimals=5).tolist()) == {0.0, 2.0}
    torch.testing.assert_close(found.mean(0), x, rtol=0, atol=0.25)
    assert torch.equal(model.eval()(every, step_key(1)), model(every))


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([60.0], "node number 60, expected whole numbers from 0 to 59"),
        ([3.0, -1.0], "node number -1"),
        ([0.5], "node number 0.5, .*standardize: false, impute: error"),
        ([float("nan")], "node number nan"),
    ],
)
def test_what_is_no_node_is_said(tmp_path, graph, rows, line):
    with pytest.raises(UserError, match=line):
        node_graph(tmp_path)(torch.tensor(rows)[:, None])


@pytest.mark.parametrize(
    ("trunk", "in_features", "options", "line"),
    [
        ("NodeGraph", 3, {"graph": "graph.npz"}, "reads one number, a row's node, but the inputs have 3"),
        ("NodeGraph", 1, {"graph": "gone.npz"}, "graph gone.npz: no such file"),
        ("NodeGraph", 1, {"graph": "graph.npz", "convs": ["GCNconv"]}, "convs: 'GCNconv' is unknown; did you mean 'GCNConv'"),
        ("NodeGraph", 1, {"graph": "graph.npz", "convs": ["BatchNorm"]}, "convs: 'BatchNorm' is no graph layer"),
        (
            "NodeGraph",
            1,
            {"graph": "graph.npz", "convs": [{"class_path": "GATv2Conv", "init_args": {"heads": 2}}]},
            r"convs: 'GATv2Conv' gives \[2, 128\] for 2 nodes, expected \[2, 64\] \(width\); with several heads set concat",
        ),
        (
            "NodeGraph",
            1,
            {"graph": "graph.npz", "convs": ["PointNetConv"]},
            "convs: 'PointNetConv' fails on nodes and edges alone \\(TypeError: .*; use a layer that needs no more",
        ),
        ("NodeGraph", 1, {"graph": "graph.npz", "width": 0}, "width is 0"),
        ("NodeGraph", 1, {}, "model.trunk.init_args.graph: is missing"),
        ("GraphNet", 1024, {}, "reads packed molecules, as one feature MolGraph gives them; found 1024 inputs"),
        ("GraphNet", 302, {"width": 0}, "width is 0"),
    ],
)
def test_what_cannot_be_built_is_said(tmp_path, graph, trunk, in_features, options, line):
    config = ModelConfig(trunk=Spec(class_path=trunk, init_args=options))
    with pytest.raises(UserError, match=line):
        build_shared(config, in_features, 0, root=str(tmp_path))


def test_a_graph_whose_numbers_of_nodes_float32_does_not_hold_is_refused(tmp_path):
    np.savez(tmp_path / "large.npz", x=np.zeros((2**24 + 1, 1), np.uint8), edge_index=np.zeros((2, 1), np.int64))
    with pytest.raises(UserError, match=r"large.npz: 16,777,217 nodes, expected at most 16,777,216: float32 holds"):
        NodeGraph(1, "large.npz", str(tmp_path))


def built(trunk, inputs, **options):
    return build_shared(ModelConfig(trunk=Spec(class_path=trunk, init_args=options)), inputs, 0)


def fitted(feature, column, width):
    feature.state = {"columns": [column], "width": width}
    return feature


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "standardize: true, impute: median"),
        ({"standardize": False}, "impute: median"),
        ({"standardize": False, "impute": "mean"}, "impute: mean"),
        ({"impute": "error"}, "standardize: true"),
        ({"standardize": False, "impute": "error", "clip": 5.0}, "clip: 5.0"),
    ],
)
@pytest.mark.parametrize("trunk", ["NodeGraph", "FeatureFusion"])
def test_numbers_of_nodes_that_a_feature_changes_are_refused_with_the_right_spelling(tmp_path, graph, trunk, options, found):
    of_graph = {"graph": str(tmp_path / "graph.npz")}
    if trunk == "FeatureFusion":
        encoder = {"class_path": "NodeGraph", "init_args": of_graph}
        shared = built(trunk, {"a": [slice(0, 1)], "b": [slice(1, 2)]}, encoder=encoder)
    else:
        shared = built(trunk, 1, **of_graph)
    kept = fitted(Numeric(standardize=False, impute="error"), "other", 1)
    check_features(shared, [kept])
    with pytest.raises(UserError) as refused:
        check_features(shared, [kept, fitted(Numeric(**options), "node", 1)])
    assert str(refused.value) == (
        f"inputs.node: found Numeric with {found}, but NodeGraph reads numbers of nodes as they are; write inputs: "
        "{node: {class_path: Numeric, init_args: {standardize: false, impute: error}}}"
    )


def test_packed_molecules_are_read_by_a_graph_net_and_by_nothing_else():
    molecules = [fitted(MolGraph(max_atoms=20), column, 62) for column in ("drug", "other")]
    numbers = fitted(Numeric(), "dose", 62)
    two, graph_net = {"a": [slice(0, 62)], "b": [slice(62, 124)]}, {"class_path": "GraphNet", "init_args": {"width": 8}}
    check_features(built("GraphNet", 62), molecules[:1])
    check_features(built("FeatureFusion", two, encoder=graph_net), molecules)
    for trunk, inputs, options, features, line in (
        (
            "MLP",
            62,
            {},
            molecules[:1],
            "inputs.drug: MolGraph gives packed molecules, which trunk MLP cannot read; use GraphNet",
        ),
        ("FeatureFusion", two, {}, molecules, "inputs.drug: MolGraph gives packed molecules, which trunk FeatureFusion cannot"),
        ("GraphNet", 62, {}, [numbers], "GraphNet reads packed molecules, which no feature of inputs gives; use MolGraph"),
        ("GraphNet", 62, {}, [fitted(ECFP(bits=62), "drug", 62)], "packed molecules, which no feature of inputs gives"),
        (
            "GraphNet",
            62 + 3,
            {},
            [molecules[0], fitted(Numeric(), "dose", 3)],
            "GraphNet reads one feature of packed molecules, but inputs has 2",
        ),
        (
            "FeatureFusion",
            two,
            {"encoder": graph_net},
            [molecules[0], numbers],
            "inputs.dose: Numeric gives quantities, but trunk FeatureFusion reads packed molecules",
        ),
    ):
        with pytest.raises(UserError) as refused:
            check_features(built(trunk, inputs, **options), features)
        assert line in str(refused.value)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("inner", ["GraphNet", "NodeGraph"])
def test_gates_and_stems_do_not_read_what_only_the_graph_trunk_in_them_can(tmp_path, graph, inner):
    np.savez(tmp_path / "graph.npz", x=np.ones((N, F)), edge_index=graph)  # dense: torch.func.vmap has no sparse features
    options = {"graph": str(tmp_path / "graph.npz")} if inner == "NodeGraph" else {}
    width, part = (1 if options else 62), {"class_path": inner, "init_args": options | {"width": 8}}
    if options:
        feature = fitted(Numeric(standardize=False, impute="error"), "node", 1)
    else:
        feature = fitted(MolGraph(max_atoms=20), "drug", 62)
    line = f"reads its inputs as quantities too, but {inner} in it needs others; make {inner} the trunk"
    for shared in (
        built("MMoE", width, experts=2, expert=part),
        built("CGC", width, groups=1, group_experts=1, shared_experts=1, expert=part),
    ):
        with pytest.raises(UserError, match=line):
            check_features(shared, [feature])
    stems = ModelConfig(trunk=Spec(class_path="TaskStems", init_args={"widths": [width], "trunk": part}))
    with pytest.raises(UserError, match=f"TaskStems {line}"):
        check_features(build_shared(stems, {"a": [slice(0, width)]}, 0, ["t"], by_task=True), [feature])


def test_a_class_of_ones_own_that_packs_is_told_what_would_unpack_it():
    class Reads(Numeric):
        packed = "reads of a genome"

    feature = Reads()
    feature.state = {"width": 4}  # a feature need not learn more
    with pytest.raises(UserError, match=r"inputs: Reads gives .* use a class of your own with unpacks = 'reads of a genome'"):
        check_features(built("MLP", 4), [feature])


@pytest.mark.parametrize("trunk", ["NodeGraph", "GraphNet"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, trunk):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch_geometric" else found(name, *a))
    config = ModelConfig(trunk=Spec(class_path=trunk, init_args={"graph": "g.npz"} if trunk == "NodeGraph" else {}))
    with pytest.raises(UserError, match=rf'{trunk} needs PyTorch Geometric, .* pip install "mtrain\[graph\]"'):
        build_shared(config, 302, 0)


@pytest.fixture(scope="module")
def packed():
    values = MolGraph(max_atoms=20).encode(pa.table({"smiles": SMILES})).values
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize("training", [False, True])
def test_a_molecule_gets_the_same_features_in_every_batch(packed, training):
    torch.manual_seed(0)
    model = GraphNet(packed.shape[1], width=8, layers=3, dropout=0.4).double().train(training)
    keys = row_keys(0, 1, torch.arange(len(packed)))
    z = model(packed, keys)
    for rows in ([0], [3], [5, 2, 2, 7], list(range(len(packed)))[::-1], []):
        torch.testing.assert_close(model(packed[rows], keys[rows]), z[rows], rtol=1e-9, atol=1e-9)
    other = model(packed, row_keys(0, 2, torch.arange(len(packed))))
    assert torch.allclose(other, z) != training


def test_rows_that_are_no_molecules_are_refused_and_rows_of_zeros_are_not(packed):
    model = GraphNet(packed.shape[1], width=8, layers=1).eval()
    torch.testing.assert_close(model(torch.cat([packed, torch.zeros_like(packed[:2])]))[: len(packed)], model(packed))
    for row in (torch.ones(62).index_fill(0, torch.tensor([0]), 0), torch.full((62,), 21.0)):
        with pytest.raises(UserError, match="they are no packed molecules; the trunk GraphNet reads the feature MolGraph"):
            model(torch.stack([packed[0], row]))


def test_a_graph_net_is_its_layers_written_out_on_one_molecule():
    from torch_geometric.utils import from_smiles

    torch.manual_seed(0)
    values = MolGraph(max_atoms=30).encode(pa.table({"smiles": [SMILES[4]]})).values
    model = GraphNet(values.shape[1], width=8, layers=2).double()
    batch_edges = from_smiles(SMILES[4]).edge_index.tolist()
    batch = unpack_molecules(torch.from_numpy(values.astype(np.float32)))
    h = torch.stack([model.atoms(fields[None])[0] for fields in batch.atom_A])
    bond = {
        pair: model.bonds(f[None])[0] for pair, f in zip(zip(*batch.edge_2E.tolist(), strict=True), batch.bond_E, strict=True)
    }
    assert sorted(bond) == sorted(zip(*batch_edges, strict=True))
    for conv, norm in zip(model.convs, model.norms, strict=True):
        sums = [h[i] + sum((h[a] + bond[a, b]).relu() for a, b in bond if b == i) for i in range(len(h))]
        h = h + norm(conv.nn(torch.stack(sums))).relu()
    expected = model.readout(torch.cat([h.mean(0), h.amax(0)])).relu()
    torch.testing.assert_close(model(torch.from_numpy(values.astype(np.float32)))[0], expected)


def test_each_field_value_has_an_embedding_of_its_own():
    embedding = FieldEmbedding([1, 2], 4)
    values = torch.tensor([[a, b] for a in range(2) for b in range(4)])
    expected = embedding.table.weight[values[:, 0]] + embedding.table.weight[2 + values[:, 1]]
    torch.testing.assert_close(embedding(values), expected)
    assert embedding.table.weight.shape == (6, 4)


NODES = {
    "data": {"path": "nodes.csv", "layout": "grid"},
    "inputs": {"node": {"class_path": "Numeric", "init_args": {"standardize": False, "impute": "error"}}},
    "tasks": {"labels": ["y", "z"], "derived": {"is_{class}": {"label": "y", "one_against_rest": True}}},
    "split": {"by": "column", "column": "part", "parts": {p: [p] for p in ("train", "valid", "test")}, "seeds": [0, 1]},
    "model": {
        "trunk": {
            "class_path": "NodeGraph",
            "init_args": {"graph": "graph.npz", "width": 8, "dropout": 0.2, "input_dropout": 0.2, "normalize": True},
        },
        "neck": 6,
    },
    "objective": {"balancer": "gradnorm"},
    "train": {"epochs": 30, "global_batch": 20, "lr": 0.04, "seed_with_split": True, "log_every": 1, "eval_every": 15},
}


def run_main(*words):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return stopped.value.code


def test_nodes_are_trained_and_predicted_and_seeds_repeat_the_training_on_a_given_split(tmp_path, graph, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(NODES))
    assert run_main("train", "c.yaml", "--run_dir", "run") == 0
    first, second = (json.loads((tmp_path / f"run/split-{seed}/summary.json").read_text()) for seed in (0, 1))
    assert first["split_hash"] == second["split_hash"]
    assert first["test"]["deviance"]["mean"] != second["test"]["deviance"]["mean"]
    assert first["test"]["accuracy"]["worst_decile"] > 0.8
    assert run_main("predict", "run", "nodes.csv", "-o", "p.parquet") == 0
    table = pq.read_table(tmp_path / "p.parquet")
    right = np.array(table["y"].to_pylist()) == pd.read_csv(tmp_path / "nodes.csv")["y"].to_numpy()
    assert right.mean() > 0.8


@pytest.mark.parametrize("number", [-1, N, 0.5])
def test_a_number_that_is_no_node_is_refused_before_a_run_directory_is_made(tmp_path, graph, monkeypatch, capsys, number):
    monkeypatch.chdir(tmp_path)
    nodes = pd.read_csv("nodes.csv")
    nodes["node"] = nodes["node"].astype(type(number))
    nodes.loc[7, "node"] = number
    nodes.to_csv("nodes.csv", index=False)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(NODES))
    assert run_main("train", "c.yaml", "--run_dir", "run") == 2
    assert f"inputs: node number {number}, expected whole numbers from 0 to 59" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["nodes", "molecules"])
def test_graphs_follow_the_same_curve_on_two_processes(tmp_path, graph, case):
    config = NODES | {"split": {**NODES["split"], "seeds": [0]}, "train": {**NODES["train"], "seed_with_split": False}}
    if case == "molecules":
        rng = np.random.default_rng(0)
        smiles = ["C" * n + "O" * m + "c1ccccc1" * r for n in range(1, 9) for m in range(3) for r in range(2)]
        pd.DataFrame({"smiles": smiles, "a": rng.normal(size=48), "b": rng.integers(0, 2, 48)}).to_csv(
            tmp_path / "m.csv", index=False
        )
        config |= {"data": {"path": "m.csv", "layout": "grid"}, "inputs": {"smiles": "MolGraph"}, "tasks": {}, "split": {}}
        config["model"] = {
            "trunk": {"class_path": "GraphNet", "init_args": {"width": 8, "layers": 2, "dropout": 0.2}},
            "neck": 6,
        }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    curves = []
    for processes in (1, 2):
        words = ["-m", "mtrain", "train", "c.yaml", "--run_dir", f"run{processes}"]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        done = subprocess.run(
            [sys.executable, *launcher, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        lines = map(json.loads, (tmp_path / f"run{processes}/metrics.jsonl").read_text().splitlines())
        curves.append([line["loss"] for line in lines if "loss" in line])
    assert len(curves[0]) >= 30
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)


@pytest.mark.slow
def test_cora_reaches_its_figure(tmp_path, real_data):
    assert run_main("train", "configs/cora.yaml", "--run_dir", tmp_path / "run") == 0
    tables = [pq.read_table(path / "per_task.parquet").to_pydict() for path in sorted((tmp_path / "run").glob("split-*"))]
    accuracy = [dict(zip(table["task"], table["test_accuracy"], strict=True))["y"] for table in tables]
    assert len(accuracy) == 10
    assert np.mean(accuracy) >= 0.815


@pytest.mark.slow
def test_graphs_of_tox21_reach_their_figure(tmp_path, real_data):
    assert run_main("train", "configs/tox21_graph.yaml", "--run_dir", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["test"]["roc_auc"]["mean"] >= 0.77

"""Trunks on graphs, with layers from PyTorch Geometric (the extra `graph`)."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrain.components import Spec, build
from mtrain.data.features import Feature, Numeric
from mtrain.data.graphs import ATOM_FIELDS, BOND_FIELDS, MOLECULES, packed_width, read_graph, unpack_molecules
from mtrain.errors import UserError
from mtrain.model.dropout import Dropout, mix64
from mtrain.model.heads import ACTIVATIONS

_GCN = Spec(class_path="GCNConv")
_NUMBERS = "{class_path: Numeric, init_args: {standardize: false, impute: error}}"  # the feature that gives nodes' numbers
_MOST_NODES = 1 << 24  # whose numbers float32 holds exactly
_SPARSE = 0.1  # share of non-zero node features up to which they are kept as a sparse matrix


class NodeGraph(nn.Module):
    """Features of the nodes of one graph. A row is a node: its only input is the node's number, from 0.

    The graph stays in memory as a whole, and each pass computes all its nodes and takes the rows of the batch: a linear layer,
    activation and dropout, then graph layers with the same between them. Dropout is keyed by node, so that all processes
    compute the same features.

    Args:
        graph: a .npz file with the graph, see `mtrain.data.graphs.read_graph`.
        root: folder of the data, from the config.
        nodes, edges: names of its arrays of node features [N, F] and edges [2, E].
        width: of the linear layer and of every graph layer.
        convs: graph layers, classes of torch_geometric.nn with their options: GCNConv, SAGEConv, GATv2Conv, APPNP, ...; they
            read node features and edges alone.
        normalize: divide a node's features by the sum of their absolute values.
        input_dropout, dropout: share of the node features, and of each layer's inputs, that is zeroed in training.
    """

    def __init__(
        self,
        in_features: int,
        graph: str,
        root: str | None = None,
        nodes: str = "x",
        edges: str = "edge_index",
        width: int = 64,
        convs: list[Spec] = [_GCN, _GCN],  # noqa: B006
        activation: Literal["relu", "elu", "gelu", "silu", "tanh"] = "relu",
        normalize: bool = False,
        input_dropout: float = 0.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        require_geometric("NodeGraph")
        from torch_geometric import nn as layers

        if in_features != 1:
            raise UserError(f"model.trunk: NodeGraph reads one number, a row's node, but the inputs have {in_features}")
        if width < 1:
            raise UserError(f"model.trunk: width is {width}, expected at least 1")
        found = read_graph(graph, root, nodes, edges)
        if len(found.x_NF) > _MOST_NODES:
            raise UserError(
                f"graph {graph}: {len(found.x_NF):,} nodes, expected at most {_MOST_NODES:,}: float32 holds no larger numbers"
            )
        # not buffers, which checkpoints would hold and DDP would send around in each forward pass
        self.edge_2E, x_NF = found.edge_2E, found.x_NF
        if normalize:
            x_NF = x_NF / x_NF.abs().sum(1, keepdim=True).clamp(min=1e-12)
        ones, size = torch.ones(self.edge_2E.shape[1]), (len(x_NF), len(x_NF))
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch: sparse CSR "is in beta state"
            self.x_NF = x_NF.to_sparse_csr() if x_NF.count_nonzero() <= _SPARSE * x_NF.numel() else x_NF
            # row: to which node, column: from which
            self.adjacency_NN = torch.sparse_coo_tensor(self.edge_2E.flip(0), ones, size).to_sparse_csr()
        self.linear = nn.Linear(x_NF.shape[1], width)
        where = "model.trunk.init_args.convs"
        self.convs = nn.ModuleList(build(conv, vars(layers), where, in_channels=width, out_channels=width) for conv in convs)
        for conv, spec in zip(self.convs, convs, strict=True):
            if not isinstance(conv, layers.MessagePassing):
                raise UserError(f"{where}: '{spec.class_path}' is no graph layer (MessagePassing), such as GCNConv")
            _try(conv, width, f"{where}: '{spec.class_path}'")
        self.activation = ACTIVATIONS[activation][1]()
        self.input_dropout = Dropout(input_dropout, layer=0)
        self.dropouts = nn.ModuleList(Dropout(dropout, layer=i + 1) for i in range(len(convs)))
        self.out_features = width

    def forward(self, x_BF: Tensor, step_key: Tensor | None = None) -> Tensor:
        """`[B, 1]` numbers of nodes to `[B, width]`.

        Raises:
            UserError: a number that is no node of the graph, or `torch.export`.
        """
        if torch.compiler.is_exporting():
            raise UserError("trunk NodeGraph cannot be exported: its nodes are those of one graph; predict them with the run")
        self._to(x_BF.device)
        node_B = self.rows_of(x_BF[:, 0])
        keys_N = None
        if step_key is not None:
            keys_N = mix64(step_key ^ mix64(torch.arange(len(self.x_NF), device=x_BF.device)))
        with torch.autocast(x_BF.device.type, enabled=False):  # sparse products have no bf16
            h_ND = self.linear(self._features(keys_N))
            for conv, dropout in zip(self.convs, self.dropouts, strict=True):
                edges = self.adjacency_NN if conv.fuse else self.edge_2E  # fuse: the layer is one sparse product
                h_ND = conv(dropout(self.activation(h_ND), keys_N), edges)
        return h_ND[node_B]

    def check_numbers(self, features: Sequence[Feature]) -> None:
        """Whether features give numbers of nodes as they are in the table.

        Raises:
            UserError: a Numeric changes them, or puts one where none is.
        """
        for feature in features:
            if not isinstance(feature, Numeric):
                continue
            kept = {"standardize": False, "impute": "error", "clip": None}
            found = {option: getattr(feature, option) for option in kept}
            if changed := [f"{option}: {str(found[option]).lower()}" for option in kept if found[option] != kept[option]]:
                column = feature.state["columns"][0]
                raise UserError(
                    f"inputs.{column}: found Numeric with {', '.join(changed)}, but NodeGraph reads numbers of nodes as they "
                    f"are; write inputs: {{{column}: {_NUMBERS}}}"
                )

    def _to(self, device: torch.device) -> None:
        if self.edge_2E.device != device:
            self.x_NF, self.edge_2E = self.x_NF.to(device), self.edge_2E.to(device)
            self.adjacency_NN = self.adjacency_NN.to(device)

    def rows_of(self, number_B: Tensor) -> Tensor:
        """The rows of the graph's nodes, from their numbers.

        Raises:
            UserError: a number that is no node of the graph.
        """
        node_B = number_B.long()
        bad_B = (node_B != number_B) | (node_B < 0) | (node_B >= len(self.x_NF))
        if bad_B.any():
            raise UserError(
                f"inputs: node number {number_B[bad_B][0].item():g}, expected whole numbers from 0 to {len(self.x_NF) - 1}, "
                f"as in inputs: {{COLUMN: {_NUMBERS}}}"
            )
        return node_B

    def _features(self, keys_N: Tensor | None) -> Tensor:
        """The node features, after dropout."""
        x_NF = self.x_NF
        if not x_NF.is_sparse_csr:
            return self.input_dropout(x_NF, keys_N)
        if not self.training or self.input_dropout.p == 0:
            return x_NF
        crow, column_V, value_V = x_NF.crow_indices(), x_NF.col_indices(), x_NF.values()
        keys_V = None if keys_N is None else mix64(keys_N.repeat_interleave(crow.diff()) ^ column_V)
        kept_V = self.input_dropout(value_V[:, None], keys_V)[:, 0]  # each value as a row of one unit
        return torch.sparse_csr_tensor(crow, column_V, kept_V, x_NF.shape)


def _try(conv: nn.Module, width: int, what: str) -> None:
    """Refuse a graph layer that does not map nodes `[N, width]` and edges to `[N, width]`, by a pass over two nodes."""
    edge_2E = torch.tensor([[0, 1], [1, 0]])
    try:
        with torch.no_grad():
            found = copy.deepcopy(conv).eval()(torch.zeros(2, width), edge_2E)  # a copy: some layers keep the first graph
    except Exception as error:  # of many kinds, for layers that read more than nodes and edges
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{what} fails on nodes and edges alone ({reason}); use a layer that needs no more") from None
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != [2, width]:
        raise UserError(
            f"{what} gives {shape} for 2 nodes, expected [2, {width}] (width); with several heads set concat: false"
        )


class GraphNet(nn.Module):
    """Graph network on packed molecules (the feature MolGraph): a sum of embeddings of each atom's fields, residual GINE layers
    (Hu et al. 2020, arXiv:1905.12265) with layer normalisation, and a layer on the mean and maximum over a molecule's atoms.

    Molecules do not see each other, and dropout is keyed by molecule and atom.

    Args:
        width: of atoms; features are twice as wide.
        layers: how many steps atoms learn from their neighbours.
        dropout: share of each layer's outputs that is zeroed in training.
    """

    unpacks = MOLECULES

    def __init__(self, in_features: int, width: int = 64, layers: int = 3, dropout: float = 0.0):
        super().__init__()
        require_geometric("GraphNet")
        from torch_geometric.nn import GINEConv

        if in_features % 3 != packed_width(0) or in_features < packed_width(1):
            raise UserError(
                f"model.trunk: GraphNet reads packed molecules, as one feature MolGraph gives them; found {in_features} inputs"
            )
        if width < 1 or layers < 0:
            raise UserError(f"model.trunk: width is {width}, layers {layers}, expected at least 1, and 0")
        self.atoms = FieldEmbedding(list(ATOM_FIELDS.values()), width)
        self.bonds = FieldEmbedding(list(BOND_FIELDS.values())[2:], width)
        self.convs = nn.ModuleList(
            GINEConv(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.dropouts = nn.ModuleList(Dropout(dropout, layer=i) for i in range(layers))
        self.readout, self.last_dropout = nn.Linear(2 * width, 2 * width), Dropout(dropout, layer=layers)
        self.out_features = 2 * width

    def forward(self, x_BF: Tensor, keys_B: Tensor | None = None) -> Tensor:
        """Packed molecules to `[B, 2 width]`."""
        from torch_geometric.utils import scatter

        rows = x_BF.shape[0]
        if torch.compiler.is_exporting():
            x_BF = F.pad(x_BF, (0, 0, 0, 1))  # a row for places without an atom or bond
        batch = unpack_molecules(x_BF)
        keys_A = None if keys_B is None else mix64(keys_B[batch.row_A] ^ batch.place_A)
        h_AD, bond_ED = self.atoms(batch.atom_A), self.bonds(batch.bond_E)
        for conv, norm, dropout in zip(self.convs, self.norms, self.dropouts, strict=True):
            h_AD = h_AD + dropout(F.relu(norm(conv(h_AD, batch.edge_2E, bond_ED))), keys_A)
        pooled = [scatter(h_AD, batch.row_A, dim_size=x_BF.shape[0], reduce=how)[:rows] for how in ("mean", "max")]
        return self.last_dropout(F.relu(self.readout(torch.cat(pooled, 1))), keys_B)


class FieldEmbedding(nn.Module):
    """The sum of an embedding of each field: `[N, number of fields]` (int64) to `[N, width]`.

    Args:
        bits: of each field's values.
    """

    def __init__(self, bits: list[int], width: int):
        super().__init__()
        sizes = torch.tensor([2**b for b in bits])
        self.table = nn.Embedding(int(sizes.sum()), width)
        nn.init.normal_(self.table.weight, std=len(bits) ** -0.5)  # their sum: 1
        self.first = sizes.cumsum(0) - sizes

    def forward(self, values: Tensor) -> Tensor:
        return F.embedding_bag(values + self.first.to(values.device), self.table.weight, mode="sum")


def require_geometric(what: str) -> None:
    if importlib.util.find_spec("torch_geometric") is None:
        raise UserError(f'{what} needs PyTorch Geometric, which is not installed: pip install "mtrain[graph]"')

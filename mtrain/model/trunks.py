"""Shared networks.

The contract of a trunk, also for the user's own `nn.Module` named by its import path: it is built with `in_features`
(the width of the inputs) if its signature has that argument, and `init_args` from the config; `forward(x_BF)` returns
features `[B, D]` (or `[B, M, D]` with an attribute `members` = M: an ensemble in one network). It may take `keys_B`, the
int64 keys of `mtrain.model.dropout`, so that its dropout depends on rows and not on how they are dealt to processes; and it
may have an attribute `neck`, its last shared `nn.Linear`, which gradient-based balancing reads. D is `out_features`, or found
by a trial pass.
"""

from __future__ import annotations

import inspect
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrain.components import build
from mtrain.config import ModelConfig
from mtrain.errors import UserError
from mtrain.model.dropout import Dropout
from mtrain.model.heads import ACTIVATIONS


class MemberLinear(nn.Module):
    """M linear layers as one: `[B, in]` (shared input) or `[B, M, in]` to `[B, M, out]`, each initialised as nn.Linear."""

    def __init__(self, members: int, in_features: int, out_features: int):
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(members, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).view(len(x), *self.bias.shape)
        return torch.baddbmm(self.bias[:, None], x.transpose(0, 1), self.weight.mT).transpose(0, 1)


class MLP(nn.Module):
    """Blocks of linear layer, normalisation, activation and dropout.

    Args:
        members: M independent networks in one computation, each with heads and a loss of its own; their logits are averaged
            in predictions (Lakshminarayanan et al. 2017, arXiv:1612.01474). Features are then `[B, M, D]`.
        widths: one block each.
        activation: of each block.
        norm: normalisation between linear layer and activation.
        dropout: share of a block's outputs that is zeroed in training.
        input_dropout: the same for the inputs.
        residual: add a block's input to its output where the widths are equal.
        skip: append the inputs to the features, so that heads also read them linearly.
    """

    def __init__(
        self,
        in_features: int,
        widths: list[int] = [512, 512],  # noqa: B006
        activation: Literal["relu", "elu", "gelu", "silu", "tanh"] = "relu",
        norm: Literal["none", "layer", "batch"] = "none",
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        residual: bool = False,
        skip: bool = False,
        members: int = 1,
    ):
        super().__init__()
        if members < 1 or (members > 1 and norm == "batch"):
            raise UserError(f"model.trunk: members is {members} with norm {norm}, expected >= 1, and without batch norm if > 1")
        if not widths or min(widths) < 1:
            raise UserError(f"model.trunk: widths are {widths}, expected at least one positive number")
        norms = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
        sizes = [in_features, *widths]
        self.linears = nn.ModuleList(
            nn.Linear(a, b) if members == 1 else MemberLinear(members, a, b) for a, b in zip(sizes, widths, strict=False)
        )
        self.norms = nn.ModuleList(norms[norm](width) for width in widths)
        self.activation = ACTIVATIONS[activation][1]()
        self.input_dropout = Dropout(input_dropout, layer=0)
        self.dropouts = nn.ModuleList(Dropout(dropout, layer=i + 1) for i in range(len(widths)))
        self.residual, self.skip, self.members = residual, skip, members
        self.out_features = widths[-1] + (in_features if skip else 0)

    @property
    def neck(self) -> nn.Module:
        return self.linears[-1]

    def forward(self, x_BF: Tensor, keys_B: Tensor | None = None) -> Tensor:
        h = x = self.input_dropout(x_BF, keys_B)
        for linear, norm, dropout in zip(self.linears, self.norms, self.dropouts, strict=True):
            out = dropout(self.activation(norm(linear(h))), keys_B)
            h = h + out if self.residual and h.shape == out.shape else out
        if not self.skip:
            return h
        return torch.cat([h, x if h.dim() == 2 else x.unsqueeze(1).expand(-1, self.members, -1)], dim=-1)


class Linear(nn.Module):
    """One linear layer to `width` features: the trunk of a low-rank linear model."""

    def __init__(self, in_features: int, width: int = 128):
        super().__init__()
        if width < 1:
            raise UserError(f"model.trunk: width is {width}, expected at least 1")
        self.neck = nn.Linear(in_features, width)
        self.out_features = width

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.neck(x_BF)


class Identity(nn.Module):
    """No trunk: heads read the inputs."""

    def __init__(self, in_features: int):
        super().__init__()
        self.out_features = in_features

    def forward(self, x_BF: Tensor) -> Tensor:
        return x_BF


TRUNKS: dict[str, type[nn.Module]] = {"MLP": MLP, "Linear": Linear, "Identity": Identity}


class SharedModel(nn.Module):
    """Trunk and, where asked for, a neck: all that heads share. `forward(x_BF, keys_B)` gives features `[B, D]`."""

    def __init__(self, trunk: nn.Module, width: int, neck: int | None):
        super().__init__()
        self.trunk = trunk
        self.members: int = getattr(trunk, "members", 1)
        if neck is not None and self.members > 1:
            raise UserError("model.neck: a trunk with several members has no common neck; leave it out")
        self.neck = nn.Identity() if neck is None else nn.Linear(width, neck)
        self.out_features = width if neck is None else neck
        self.takes_keys = "keys_B" in inspect.signature(trunk.forward).parameters

    @property
    def linear_neck(self) -> nn.Linear | None:
        """The linear layer whose outputs are the features themselves; None where there is none."""
        last = self.trunk.neck if isinstance(self.trunk, Linear) else None
        return self.neck if isinstance(self.neck, nn.Linear) else last

    def forward(self, x_BF: Tensor, keys_B: Tensor | None = None) -> Tensor:
        z_BD = self.trunk(x_BF, keys_B) if self.takes_keys else self.trunk(x_BF)
        return self.neck(z_BD)


def build_shared(config: ModelConfig, in_features: int, seed: int) -> SharedModel:
    """The shared network of a config, initialised from `seed` alone.

    Raises:
        UserError: unknown trunk or option, or a trunk that does not map `[B, F]` to `[B, D]`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = build(config.trunk, TRUNKS, "model.trunk", in_features=in_features)
        if not isinstance(trunk, nn.Module):
            raise UserError(f"model.trunk: '{config.trunk.class_path}' is not an nn.Module")
        return SharedModel(trunk, _width(trunk, in_features, config.trunk.class_path), config.neck)


def _width(trunk: nn.Module, in_features: int, name: str) -> int:
    width = getattr(trunk, "out_features", None)
    if isinstance(width, int):
        return width
    training = trunk.training
    try:
        with torch.no_grad():
            z = trunk.eval()(torch.zeros(2, in_features))
    except Exception as error:
        raise UserError(f"model.trunk: {name} fails on inputs of shape [2, {in_features}]: {error}") from error
    finally:
        trunk.train(training)
    if not isinstance(z, Tensor) or z.dim() != 2 or len(z) != 2:
        shape = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise UserError(f"model.trunk: {name} gives {shape} for inputs [2, {in_features}], expected features [2, D]")
    return z.shape[1]

"""Networks with several inputs, and many small networks as one computation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from mtrain.components import Spec, build, signature
from mtrain.errors import UserError
from mtrain.model.dropout import mix64
from mtrain.model.heads import stable_hash

JOINT = "joint"


class Stacked(nn.Module):
    """E networks of one form as one computation: each of their parameters and buffers is a stack `[E, ...]`, and
    `torch.func.vmap` turns their layers into batched ones.

    Batch normalisation keeps statistics of each network. Dropout differs between networks where each has keys of its own, or
    none.

    Args:
        networks: of one class and form; their values are copied.
    """

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.one = networks[0]
        self.takes_keys = "keys_B" in inspect.signature(self.one.forward).parameters
        self.places: dict[str, str] = {}
        states = [dict(network.named_parameters()) | dict(network.named_buffers()) for network in networks]
        for name, first in states[0].items():
            stack = torch.stack([state[name].detach() for state in states])
            owner, _, leaf = name.rpartition(".")
            module = self.one.get_submodule(owner)
            # the stacks belong to this module, so that what shards or gathers them does so before its forward
            place = self.places[name] = name.replace(".", "/")
            if isinstance(first, nn.Parameter):
                self.register_parameter(place, nn.Parameter(stack, first.requires_grad))
            else:
                self.register_buffer(place, stack, persistent=leaf not in module._non_persistent_buffers_set)
            delattr(module, leaf)
            setattr(module, leaf, torch.empty(0))  # a place for what `functional_call` puts there

    def forward(self, x: Tensor, keys_EB: Tensor | None = None) -> Tensor:
        """`[E, B, D]` of x `[E, B, F]`, or of `[B, F]` that all networks read."""
        state = {name: getattr(self, place) for name, place in self.places.items()}
        keys_EB = keys_EB if self.takes_keys else None

        def run(state: dict[str, Tensor], x_BF: Tensor, keys_B: Tensor | None) -> Tensor:
            return functional_call(self.one, state, (x_BF,) if keys_B is None else (x_BF, keys_B))

        if torch.compiler.is_exporting():  # vmap's rules for norms fix the number of rows
            ones = [dict(zip(state, values, strict=True)) for values in zip(*state.values(), strict=True)]
            return torch.stack([run(one, x[e] if x.dim() == 3 else x, None) for e, one in enumerate(ones)])
        in_dims = (0, 0 if x.dim() == 3 else None, None if keys_EB is None else 0)
        return vmap(run, in_dims, randomness="different")(state, x, keys_EB)


def keys_of(keys_B: Tensor | None, salts: Tensor) -> Tensor | None:
    """Dropout keys `[E, B]` of E networks that read the same rows, by their `salts` (int64 [E])."""
    return None if keys_B is None else mix64(keys_B ^ salts.to(keys_B.device)[:, None])


def salts_of(names: Sequence[str]) -> Tensor:
    """A salt of dropout keys for each name, int64 [E]."""
    return torch.tensor([stable_hash("input", name) for name in names], dtype=torch.int64)


class _Fusion(nn.Module):
    """Two or more inputs of equal width, each encoded to features of equal width.

    Args:
        inputs: widths by name.
        encoder: the network of an input: MLP, Conv, ... or an import path.
        output: concat: one feature, the encoders' side by side; separate: a feature for each input by its name, and `joint`,
            all of them side by side.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        encoder: Spec = Spec(class_path="MLP"),  # noqa: B008
        output: Literal["concat", "separate"] = "concat",
    ):
        super().__init__()
        name, found = type(self).__name__, ", ".join(f"{name} {width}" for name, width in inputs.items())
        if len(inputs) < 2:
            raise UserError(f"model.trunk: {name} needs two or more inputs, found {found}; name them in model.inputs")
        if len(set(inputs.values())) > 1:
            raise UserError(f"model.trunk: {name} needs inputs of equal width, found {found}")
        if output == "separate" and JOINT in inputs:
            raise UserError(f"model.inputs: '{JOINT}' is the name of {name}'s joint feature; choose another")
        self.names, self.output = list(inputs), output
        self.salts = salts_of(self.names)
        width = self._build(encoder, next(iter(inputs.values())))
        joint = width * len(inputs)
        self.out_features = joint if output == "concat" else dict.fromkeys(inputs, width) | {JOINT: joint}

    def _build(self, encoder: Spec, in_features: int) -> int:
        """Make what `_encode` needs; gives the width of an encoder's features."""
        raise NotImplementedError

    def _encode(self, x_IBF: Tensor, keys_IB: Tensor | None) -> Tensor:
        """Features `[I, B, D]` of all inputs."""
        raise NotImplementedError

    def forward(self, inputs: dict[str, Tensor], keys_B: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        x_IBF = torch.stack([inputs[name] for name in self.names])
        z_BID = self._encode(x_IBF, keys_of(keys_B, self.salts)).transpose(0, 1)
        if self.output == "concat":
            return z_BID.flatten(1)
        return {name: z_BID[:, i] for i, name in enumerate(self.names)} | {JOINT: z_BID.flatten(1)}


class FeatureFusion(_Fusion):
    """Feature fusion: the same layers read each input (siamese networks: Bromley et al. 1993, "Signature Verification using a
    Siamese Time Delay Neural Network"), and their features are laid side by side. Batch normalisation in it has the
    statistics of all inputs together."""

    def _build(self, encoder: Spec, in_features: int) -> int:
        self.encoder, width = build_encoder(encoder, in_features)
        self.takes_keys = "keys_B" in inspect.signature(self.encoder.forward).parameters
        return width

    def _encode(self, x_IBF: Tensor, keys_IB: Tensor | None) -> Tensor:
        keys = () if keys_IB is None or not self.takes_keys else (keys_IB.flatten(),)
        return self.encoder(x_IBF.flatten(0, 1), *keys).view(*x_IBF.shape[:2], -1)


class ModelFusion(_Fusion):
    """Model fusion: an encoder for each input, all of one form and run as one computation; their features are laid side by
    side, or (`output: separate`) read by heads of their own: decision fusion."""

    def _build(self, encoder: Spec, in_features: int) -> int:
        self.encoders, width = build_stacked(encoder, in_features, len(self.names))
        return width

    def _encode(self, x_IBF: Tensor, keys_IB: Tensor | None) -> Tensor:
        return self.encoders(x_IBF, keys_IB)


def build_encoder(spec: Spec, in_features: int, option: str = "encoder") -> tuple[nn.Module, int]:
    """A network inside a trunk, from matrix to matrix, and the width of its features.

    Raises:
        UserError: it cannot be built, or gives something else.
    """
    from mtrain.model.trunks import FEATURES, TRUNKS, feature_shapes  # which import this module

    where = f"model.trunk.init_args.{option}"
    if "in_features" not in (arguments := signature(spec, TRUNKS, where)) and "inputs" in arguments:
        raise UserError(f"{where}: {spec.class_path} reads inputs by name, expected a network of one matrix, such as MLP")
    network = build(spec, TRUNKS, where, in_features=in_features)
    if not isinstance(network, nn.Module) or "task_B" in inspect.signature(network.forward).parameters:
        raise UserError(f"{where}: '{spec.class_path}' is not an nn.Module that reads inputs only")
    shapes = feature_shapes(network, in_features, None, spec.class_path)
    if list(shapes) != [FEATURES] or len(shapes[FEATURES]) != 1 or getattr(network, "members", 1) != 1:
        raise UserError(f"{where}: {spec.class_path} gives several features or members, expected one feature [B, D]")
    return network, shapes[FEATURES][0]


def build_stacked(spec: Spec, in_features: int, count: int, *, experts: bool = False) -> tuple[Stacked, int]:
    """So many networks inside a trunk as one computation, and the width of each; `experts` read the same inputs.

    Raises:
        UserError: as `build_encoder`, or `torch.func.vmap` cannot run them: what they compute depends on values of the rows.
    """
    option = "expert" if experts else "encoder"
    built = [build_encoder(spec, in_features, option) for _ in range(count)]
    stacked, width = Stacked([network for network, _ in built]), built[0][1]
    training = {module: module.training for module in stacked.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # what is built after it begins as without the pass
            stacked.eval()(torch.zeros((2, in_features) if experts else (count, 2, in_features)))
    except Exception as error:  # of many kinds, also of the user's own network
        if not torch.accelerator.is_available():  # else its kernels may be of the accelerator alone
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"model.trunk.init_args.{option}: {count} networks {spec.class_path} cannot run as one by torch.func.vmap "
                f"({type(error).__name__}: {reason}); use MLP, Conv or another that computes the same for all rows"
            ) from error
    finally:
        for module, mode in training.items():
            module.training = mode
    return stacked, width

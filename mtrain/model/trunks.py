"""Shared networks.

The contract of a trunk, also for the user's own `nn.Module` named by its import path. It is built with `init_args` from the
config, and with what its signature has of:

- `in_features`: the width of the inputs; `forward(x_BF)` then gets one matrix;
- `inputs`, in its place: the width of each input by its name (`model.inputs`); `forward` then gets a dict name to
  `[B, width]`;
- `tasks`: the names of all tasks;
- `root`: `data.root`, for files of its own.

`forward` returns float32 features `[B, D]` (or `[B, M, D]` with an attribute `members` = M: an ensemble in one network); or
several by name, each `[B, D]` or `[B, E, D]`, of which each head reads one. It may take `keys_B`, the int64 keys of
`mtrain.model.dropout`, so that its dropout depends on rows and not on how they are dealt to processes; `step_key`, the key
`[1]` of the step alone, for a trunk that computes more than the rows; and `task_B`, the task of each row (int64), where each
row has one. Both keys are None in evaluation. It may have an attribute `neck`, an `nn.Linear` whose output is what `forward`
returns: gradient-based balancing takes gradients there. What it returns without the rows is its attribute `out_features`, a
number, or D or (E, D) by name; or it is found by a trial pass: of two rows of zeros, on the CPU, in evaluation. The user's own
trunk is tried also where it has `out_features`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from math import prod
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrain.components import build, is_own, signature
from mtrain.config import Config, ModelConfig
from mtrain.data import FEATURES as INPUT_FEATURES
from mtrain.data.features import Feature
from mtrain.data.inputs import Inputs, MemoryInputs
from mtrain.errors import UserError, matches, nearest
from mtrain.model.conv import Conv
from mtrain.model.dropout import Dropout
from mtrain.model.experts import CGC, MMoE
from mtrain.model.fusion import FeatureFusion, ModelFusion
from mtrain.model.graphs import GraphNet, NodeGraph
from mtrain.model.heads import ACTIVATIONS
from mtrain.model.stems import TaskStems
from mtrain.model.text import TextEncoder


class MemberLinear(nn.Module):
    """M linear layers as one: `[B, in]` (shared input) or `[B, M, in]` to `[B, M, out]`, each initialised as nn.Linear."""

    def __init__(self, members: int, in_features: int, out_features: int):
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(members, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(1, self.bias.shape)
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
TRUNKS |= {"NodeGraph": NodeGraph, "GraphNet": GraphNet}
TRUNKS |= {"FeatureFusion": FeatureFusion, "ModelFusion": ModelFusion, "TaskStems": TaskStems, "MMoE": MMoE, "CGC": CGC}
TRUNKS |= {"Conv": Conv, "TextEncoder": TextEncoder}


Shape = tuple[int, ...]
Ranges = dict[str, list[slice]]
FEATURES = "features"  # the name of a trunk's only feature


class SharedModel(nn.Module):
    """Trunk and, where asked for, a neck: all that heads share. `forward(x_BF, keys_B, task_B)` gives `z_BD`.

    Several features are flattened and laid side by side in `z_BD`, in their order; `columns` says where each is.

    Args:
        features: width of the trunk's only feature, or the shape of a row of each, `(D,)` or `(E, D)`, by name.
        neck: width of a last linear layer; None: there is none.
        ranges: where each input is in `x_BF`; None: the trunk takes `x_BF` itself.

    Attributes:
        features: shape of a row of each feature that heads read.
        out_features: their width, all together.
    """

    def __init__(
        self, trunk: nn.Module, features: int | dict[str, Shape], neck: int | None = None, ranges: Ranges | None = None
    ):
        super().__init__()
        self.trunk, self.ranges = trunk, ranges
        self.members: int = getattr(trunk, "members", 1)
        if isinstance(features, int):
            features = {FEATURES: (features,)}
        (name, shape), *others = features.items()
        self.one_feature = not others and len(shape) == 1
        if self.members > 1 and not self.one_feature:
            raise UserError(f"model.trunk: it has several members and gives {_shown(features)}; members need one feature")
        if neck is not None and not self.one_feature:
            raise UserError(f"model.neck: the trunk gives {_shown(features)}; a neck needs one feature, leave it out")
        if neck is not None and self.members > 1:
            raise UserError("model.neck: a trunk with several members has no common neck; leave it out")
        self.neck = nn.Identity() if neck is None else nn.Linear(shape[0], neck)
        self.given = features if self.members == 1 else {name: (self.members, *shape)}
        self.features = features if neck is None else {name: (neck,)}
        self.out_features = sum(map(prod, self.features.values()))
        parameters = inspect.signature(trunk.forward).parameters
        self.takes_keys, self.takes_tasks = "keys_B" in parameters, "task_B" in parameters
        self.takes_step = "step_key" in parameters

    @property
    def linear_neck(self) -> nn.Linear | None:
        """The linear layer whose outputs are the features themselves; None where there is none."""
        last = self.neck if isinstance(self.neck, nn.Linear) else getattr(self.trunk, "neck", None)
        return last if isinstance(last, nn.Linear) and self.one_feature else None

    def forward(
        self, x_BF: Tensor, keys_B: Tensor | None = None, task_B: Tensor | None = None, step_key: Tensor | None = None
    ) -> Tensor:
        given: dict[str, Any] = {}
        if self.takes_step:
            given["step_key"] = step_key
        if self.takes_keys:
            given["keys_B"] = keys_B
        if self.takes_tasks:
            given["task_B"] = task_B
        found = self.trunk(x_BF if self.ranges is None else split_inputs(x_BF, self.ranges), **given)
        if isinstance(found, Tensor):
            found = {next(iter(self.given)): found}
        if not self._fit(found, x_BF):
            rows = {name: (x_BF.shape[0], *shape) for name, shape in self.given.items()}
            raise UserError(
                f"model.trunk: {type(self.trunk).__name__} gives {_described(found)}, expected {_expected(rows)} as its "
                "out_features, or its trial pass, say"
            )
        if self.one_feature:
            (z_BD,) = found.values()
            return self.neck(z_BD)
        return torch.cat([found[name].flatten(1) for name in self.given], 1)

    def _fit(self, found: object, x_BF: Tensor) -> bool:
        """Whether the trunk gave what was said, for each row."""
        if not isinstance(found, Mapping) or not all(isinstance(z, Tensor) for z in found.values()):
            return False
        shapes = {name: tuple(z.shape[1:]) for name, z in found.items()}
        return shapes == self.given and (
            torch.compiler.is_exporting() or all(z.shape[0] == x_BF.shape[0] for z in found.values())
        )


def check_features(shared: SharedModel, features: Sequence[Feature], inputs: Inputs | None = None) -> None:
    """Whether features that are packed in numbers (token ids, molecules) meet a trunk that unpacks them, and the other way
    round, and whether numbers of nodes reach a NodeGraph as they are.

    Args:
        inputs: of all rows; where they are in memory, their numbers of nodes are looked at too.

    Raises:
        UserError: one is there without the other, token ids that have no embedding, or numbers changed or of no node.
    """

    def use(known: Mapping[str, type], attribute: str, what: object) -> str:
        names = [name for name, kind in known.items() if getattr(kind, attribute, None) == what]
        return f"use {names[0]}" if names else f"use a class of your own with {attribute} = '{what}'"

    trunk, name = shared.trunk, type(shared.trunk).__name__
    readers = [module for module in trunk.modules() if isinstance(getattr(module, "unpacks", None), str)]
    packed = {feature.packed for feature in features if feature.packed}
    for reader in readers:
        if reader.unpacks not in packed:
            instead = use(INPUT_FEATURES, "packed", reader.unpacks)
            raise UserError(f"model.trunk: {name} reads {reader.unpacks}, which no feature of inputs gives; {instead}")
    if readers and shared.ranges is None and len(features) > 1:
        raise UserError(
            f"model.trunk: {name} reads one feature of {readers[0].unpacks}, but inputs has {len(features)} features"
        )
    nodes = [module for module in trunk.modules() if isinstance(module, NodeGraph)]
    if (inner := [*readers, *nodes]) and isinstance(trunk, MMoE | CGC | TaskStems):
        inside = type(inner[0]).__name__
        raise UserError(
            f"model.trunk: {name} reads its inputs as quantities too, but {inside} in it needs others; make {inside} the trunk"
        )
    for feature in [] if is_own(trunk) else features:  # the user's own trunk may do with them what it likes
        where, kind = ".".join(["inputs", *feature.state.get("columns", [])[:1]]), type(feature).__name__
        if readers and not feature.packed:
            raise UserError(f"{where}: {kind} gives quantities, but trunk {name} reads {readers[0].unpacks}")
        if feature.packed and not any(reader.unpacks == feature.packed for reader in readers):
            instead = use(TRUNKS, "unpacks", feature.packed)
            raise UserError(f"{where}: {kind} gives {feature.packed}, which trunk {name} cannot read; {instead}")
    for reader in readers:
        if isinstance(reader, TextEncoder):
            reader.check_vocabulary([feature for feature in features if feature.packed == reader.unpacks])
    for reader in [] if is_own(trunk) else nodes:
        reader.check_numbers(features)
        if isinstance(inputs, MemoryInputs):
            reader.rows_of(inputs.x_NF.flatten())


def check_tasks(shared: SharedModel, saved: Sequence[str], now: Sequence[str]) -> None:
    """Whether the parameters of a trunk that reads each row's task are of these tasks.

    Raises:
        UserError: they were saved for others.
    """
    if shared.takes_tasks and list(saved) != list(now):
        name = type(shared.trunk).__name__
        raise UserError(f"trunk {name} was saved for {len(saved)} tasks that are not the {len(now)} of now; start a new run")


def split_inputs(x_BF: Tensor, ranges: Ranges) -> dict[str, Tensor]:
    """The columns of each input by its name, as views where they stand together."""
    parts = {name: [x_BF[:, columns] for columns in of_name] for name, of_name in ranges.items()}
    return {name: of_name[0] if len(of_name) == 1 else torch.cat(of_name, 1) for name, of_name in parts.items()}


def shared_network(config: Config, widths: Sequence[tuple[Sequence[str], int]], tasks: Sequence[str]) -> SharedModel:
    """The shared network of a run.

    Args:
        widths: of each feature the columns that it reads, and its width.
        tasks: names of all tasks.

    Raises:
        UserError: `model.inputs` does not fit the data, or as `build_shared`.
    """
    ranges = input_ranges(config, widths)
    return build_shared(config.model, ranges, config.train.seed, tasks, config.data.by_task, config.data.root)


def input_ranges(config: Config, widths: Sequence[tuple[Sequence[str], int]]) -> Ranges:
    """The columns of `x_BF` of each input by name: as `model.inputs` says, else by the keys of `inputs`.

    Raises:
        UserError: a pattern of `model.inputs` matches no column; a column, or a feature of several, is of no name, or of two.
    """
    keys = [key for key, specs in config.inputs.items() for _ in specs] or [columns[0] for columns, _ in widths]
    named = config.model.inputs
    known = [column for columns, _ in widths for column in columns]
    for name, patterns in (named or {}).items():
        for pattern in patterns or [""]:
            if not any(matches(column, pattern) for column in known):
                raise UserError(f"model.inputs.{name}: no input column '{pattern}'{nearest(pattern, known)}")
    ranges: Ranges = {name: [] for name in (named or keys)}
    start = 0
    for key, (columns, width) in zip(keys, widths, strict=True):
        of_name = ranges[key if named is None else _name_of(columns, key, named)]
        stop = start + width
        if of_name and of_name[-1].stop == start:
            start = of_name.pop().start
        of_name.append(slice(start, stop))
        start = stop
    return ranges


def _name_of(columns: Sequence[str], key: str, named: Mapping[str, Sequence[str]]) -> str:
    """The name in `model.inputs` of a feature that reads `columns`."""
    first: dict[str, str] = {}
    for column in columns:
        names = [name for name, patterns in named.items() if any(matches(column, pattern) for pattern in patterns)]
        if len(names) != 1:
            what = f"is in {names[0]} and {names[1]}" if names else "is in none of its names"
            raise UserError(f"model.inputs: column '{column}' {what}; give each input column one name")
        first.setdefault(names[0], column)
    if len(first) > 1:
        one, other = list(first)[:2]
        raise UserError(
            f"model.inputs: the feature inputs.{key} reads '{first[one]}' of {one} and '{first[other]}' of {other} together; "
            "give each name its own keys in inputs"
        )
    return next(iter(first))


def build_shared(
    config: ModelConfig,
    inputs: int | Ranges,
    seed: int,
    tasks: Sequence[str] = (),
    by_task: bool = False,
    root: str | None = None,
) -> SharedModel:
    """The shared network of a config, initialised from `seed` alone.

    Args:
        inputs: their width, or the columns of each input by name.
        by_task: whether each row is of one task.
        root: folder of the data.

    Raises:
        UserError: unknown trunk or option, inputs by name for a trunk that takes one matrix, tasks of rows where rows have
            none, or a trunk that does not map `[B, F]` to features.
    """
    name, ranges = config.trunk.class_path, {"inputs": [slice(0, inputs)]} if isinstance(inputs, int) else inputs
    width_of = {name: sum(columns.stop - columns.start for columns in of_name) for name, of_name in ranges.items()}
    in_features = sum(width_of.values())
    by_name = "inputs" in signature(config.trunk, TRUNKS, "model.trunk")
    if config.inputs is not None and not by_name:
        raise UserError(
            f"model.inputs: trunk {name} takes all inputs as one matrix, not {', '.join(config.inputs)} by name: its __init__ "
            "has no argument `inputs`; give it one, or leave model.inputs out"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given = {"in_features": in_features, "inputs": width_of, "tasks": list(tasks), "root": root}
        try:
            trunk = build(config.trunk, TRUNKS, "model.trunk", **given)
        except UserError as error:
            if by_name and isinstance(error.__cause__, KeyError):
                raise UserError(f"model.inputs: trunk {name} wants {error.__cause__}, found {', '.join(width_of)}") from error
            raise
        if not isinstance(trunk, nn.Module):
            raise UserError(f"model.trunk: '{name}' is not an nn.Module")
        if "task_B" in inspect.signature(trunk.forward).parameters and not by_task:
            raise UserError(f"model.trunk: {name} reads each row's task, which only layouts routed and files have")
        taken = ranges if by_name else None
        return SharedModel(trunk, feature_shapes(trunk, in_features, taken, name), config.neck, taken)


def feature_shapes(trunk: nn.Module, in_features: int, ranges: Ranges | None, name: str) -> dict[str, Shape]:
    """Shapes of a trunk's features: as `out_features` says, else by a trial pass. The user's own trunk is tried in any case.

    Raises:
        UserError: `out_features` says no shape, or the trial pass fails or gives something else.
    """
    said = getattr(trunk, "out_features", None)
    if said is None:
        return _tried(trunk, in_features, ranges, name, None)
    shapes = _said(said, name)
    if is_own(trunk):
        with torch.random.fork_rng(devices=[]):  # what is built after it begins as without the pass
            _tried(trunk, in_features, ranges, name, shapes)
    return shapes


def _said(said: object, name: str) -> dict[str, Shape]:
    """Shapes of a row of features as `out_features` says them."""
    shapes: Mapping[str, Any] = said if isinstance(said, Mapping) else {FEATURES: said}
    sizes = {key: [shape] if isinstance(shape, Integral) else shape for key, shape in shapes.items()}
    for size in sizes.values() or [None]:
        if not isinstance(size, Sequence) or len(size) not in (1, 2) or not all(_is_width(width) for width in size):
            raise UserError(
                f"model.trunk: {name} has out_features {said!r}, expected D, or D or (E, D) for each feature by name: whole "
                "numbers above 0"
            )
    return {key: tuple(map(int, size)) for key, size in sizes.items()}


def _is_width(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _tried(
    trunk: nn.Module, in_features: int, ranges: Ranges | None, name: str, said: dict[str, Shape] | None
) -> dict[str, Shape]:
    """Shapes of a row of what a trunk gives for two rows of zeros."""
    x_2F, parameters = torch.zeros(2, in_features), inspect.signature(trunk.forward).parameters
    of_rows = {"keys_B": None, "step_key": None, "task_B": torch.zeros(2, dtype=torch.int64)}
    given = {argument: value for argument, value in of_rows.items() if argument in parameters}
    training = {module: module.training for module in trunk.modules()}
    try:
        with torch.no_grad():
            z = trunk.eval()(x_2F if ranges is None else split_inputs(x_2F, ranges), **given)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's own trunk may raise anything
        if said is not None and torch.accelerator.is_available():  # its kernels may be of the accelerator alone
            return said
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"model.trunk: {name} fails on inputs of shape {_input_shapes(in_features, ranges)}: {what}") from error
    finally:
        for module, mode in training.items():
            module.training = mode
    members = getattr(trunk, "members", 1)
    rows = (2,) if members == 1 else (2, members)
    found = {next(iter(said or [FEATURES])): z} if isinstance(z, Tensor) else z
    shapes = {}
    if isinstance(found, Mapping) and all(isinstance(feature, Tensor) for feature in found.values()):
        shapes = {key: tuple(feature.shape[len(rows) :]) for key, feature in found.items()}
    sound = shapes and all(
        feature.dtype == torch.float32 and feature.shape[: len(rows)] == rows and len(shapes[key]) in (1, 2) and feature.numel()
        for key, feature in found.items()
    )
    if not sound or said not in (None, shapes):
        expected = _expected({FEATURES: (*rows, "D")}) + ", or several by name"
        if said is not None:
            expected = _expected({key: (*rows, *shape) for key, shape in said.items()}) + " as its out_features say"
        inputs = _input_shapes(in_features, ranges)
        raise UserError(f"model.trunk: {name} gives {_described(z)} for inputs {inputs}, expected {expected}")
    return shapes


def _described(given: object) -> str:
    """What a trunk gave."""
    if isinstance(given, Tensor):
        return f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
    if isinstance(given, Mapping):
        return ", ".join(f"{name} {_described(value)}" for name, value in given.items()) or "no features"
    return "None" if given is None else f"a {type(given).__name__}"


def _expected(features: Mapping[str, Sequence[object]]) -> str:
    """What a trunk is to give."""
    shown = {name: f"[{', '.join(map(str, shape))}]" for name, shape in features.items()}
    return ", ".join("float32 " + shape if name == FEATURES else f"{name} float32 {shape}" for name, shape in shown.items())


def _input_shapes(in_features: int, ranges: Ranges | None) -> str:
    if ranges is None:
        return f"[2, {in_features}]"
    widths = {name: sum(columns.stop - columns.start for columns in of_name) for name, of_name in ranges.items()}
    return ", ".join(f"{name} [2, {width}]" for name, width in widths.items())


def _shown(features: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in features.items())

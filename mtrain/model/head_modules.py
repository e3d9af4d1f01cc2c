"""Separately built heads, as modules of torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrain.errors import UserError
from mtrain.model.head_forms import HeadForm

Activation = Literal["relu", "elu", "gelu", "silu", "tanh"]

# In place where the derivative needs the output only. Each gives 0 for 0: padded hidden units stay 0.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], type[nn.Module]]] = {
    "relu": (torch.relu_, nn.ReLU),
    "elu": (F.elu_, nn.ELU),
    "gelu": (F.gelu, nn.GELU),
    "silu": (F.silu, nn.SiLU),
    "tanh": (torch.tanh_, nn.Tanh),
}


def linears(head: nn.Module) -> list[nn.Linear]:
    """The linear layers of a head, in order."""
    return [module for module in head.modules() if isinstance(module, nn.Linear)]


def to_module(weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str, dropout: float) -> nn.Module:
    """A head with copies of these layers: an `nn.Sequential`, an `nn.Linear` without hidden layers."""
    layers: list[nn.Module] = []
    for weight, bias in zip(weights, biases, strict=True):
        if layers:
            layers.append(ACTIVATIONS[activation][1]())
            layers += [nn.Dropout(dropout)] if dropout else []
        linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
        layers.append(linear)
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def common_form(named: Sequence[tuple[str, nn.Module]]) -> tuple[int, HeadForm, list[int], Activation | None, float]:
    """What separately built heads are: width of their input, form, outputs of each, activation, dropout.

    Raises:
        UserError: naming the first head that is something else than `HeadBank` holds, or does not fit the others.
    """
    if not named:
        raise UserError("there are no heads to convert: expected at least one")
    shapes = [_shape(name, head) for name, head in named]
    (widths, activation, dropout), first = shapes[0], named[0][0]
    outputs = [shape[0][-1] for shape in shapes]
    hidden: list[int | str] = []
    for layer, width in enumerate(widths[1:-1], 1):
        alike = all(shape[0][layer : layer + 1] == (width,) for shape in shapes)
        hidden.append(width if alike else f"{width // widths[-1]}x")
    form = HeadForm(tuple(hidden))
    for (name, _), shape in zip(named, shapes, strict=True):
        expected = (widths[0], *form.widths(shape[0][-1])) if len(shape[0]) == len(widths) else ()
        if (shape[0], *shape[1:]) != (expected, activation, dropout):
            raise UserError(
                f"head '{name}' has (widths, activation, dropout) {shape}, head '{first}' has {shapes[0]}: expected to differ "
                "in their outputs only, or also in hidden layers that are as wide as the same multiple of them"
            )
    return widths[0], form, outputs, activation, dropout


def _letter(layer: nn.Module) -> str:
    """L, A or D for a linear layer, an activation of ours or dropout, else a question mark."""
    if isinstance(layer, nn.Linear):
        return "L" if layer.bias is not None else "?"
    if type(layer) in {module for _, module in ACTIVATIONS.values()}:
        ours = getattr(layer, "alpha", 1.0) == 1.0 and getattr(layer, "approximate", "none") == "none"
        return "A" if ours else "?"
    return "D" if type(layer) is nn.Dropout else "?"


def _shape(name: str, head: nn.Module) -> tuple[tuple[int, ...], Activation | None, float]:
    """(widths from input to output, activation, dropout) of a separately built head."""
    layers = list(head) if isinstance(head, nn.Sequential) else [head]
    found = linears(head)
    acts = {key for key, (_, module) in ACTIVATIONS.items() for layer in layers if type(layer) is module}
    drops = {layer.p for layer in layers if isinstance(layer, nn.Dropout)}
    chained = all(a.out_features == b.in_features for a, b in pairwise(found))
    if not re.fullmatch("L(AL)*|L(ADL)*", "".join(map(_letter, layers))) or not chained or max(len(acts), len(drops)) > 1:
        raise UserError(
            f"head '{name}' is {head}: expected nn.Linear or nn.Sequential(Linear, activation, [Dropout], ..., Linear) "
            f"with biases and one activation of {', '.join(ACTIVATIONS)}"
        )
    widths = (found[0].in_features, *(linear.out_features for linear in found))
    return widths, cast(Activation, acts.pop()) if acts else None, drops.pop() if drops else 0.0

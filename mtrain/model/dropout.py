"""Dropout that depends on (seed, step, row, layer) and on nothing else.

`F.dropout` draws from a stream, so a row's mask depends on which rows stand before it: two processes see other masks
than one. Here a row's 64-bit key is a hash of (seed, step, row id), and unit j of a layer is kept where the top bits of
`mix(key, layer) * c_j` say so, with fixed odd random constants c_j (multiply-shift hashing: Dietzfelbinger et al., "A
Reliable Randomized Algorithm for the Closest-Pair Problem", 1997): an int64 multiply, a compare and a multiply.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrain.errors import UserError


def signed64(value: int) -> int:
    """`value` modulo 2**64, as the int64 with the same bits."""
    return (value + 2**63) % 2**64 - 2**63


GOLDEN = signed64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: splitmix64's increment
MIX_1 = signed64(0xBF58476D1CE4E5B9)
MIX_2 = signed64(0x94D049BB133111EB)


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    """`x ^ (x >>> bits)`: torch shifts int64 arithmetically, so the copied sign bits are masked off."""
    return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))


def mix64(x: Tensor) -> Tensor:
    """splitmix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014) of each int64 of `x`: a
    bijection whose output bits each depend on all input bits."""
    x = x + GOLDEN
    x = _xor_shift(x, 30) * MIX_1
    x = _xor_shift(x, 27) * MIX_2
    return _xor_shift(x, 31)


def row_keys(seed: int, step: int, rows_B: Tensor) -> Tensor:
    """Hash of (seed, step, row id) for each row id of `rows_B` (int64 [B]): int64 [B], equal on every rank."""
    for salt in (seed, step):
        rows_B = mix64(rows_B ^ mix64(torch.full_like(rows_B, signed64(salt))))
    return rows_B


def unit_constants(salt: Tensor, units: int) -> Tensor:
    """Fixed odd 64-bit constants `[*salt.shape, units]`, one a unit, from an int64 `salt` (a layer, a hashed name)."""
    salt = mix64(salt).unsqueeze(-1)
    return mix64(salt ^ mix64(torch.arange(units, device=salt.device))) | 1


def keyed_dropout(x: Tensor, keys: Tensor, constants: Tensor, p: float) -> Tensor:
    """`x` with elements zeroed with probability `p` and the rest divided by `1 - p`. `keys` (hashed rows) and
    `constants` (of units) are int64 and broadcast to `x`'s shape."""
    keep = keys * constants >= signed64(round(p * 2**64) - 2**63)
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


class Dropout(nn.Module):
    """Dropout of the last dimension's units with masks that are a function of (row key, `layer`).

    Args:
        p: probability of zeroing a unit, 0 <= p < 1.
        layer: this module's number within the model: two modules with the same number draw the same masks.

    Raises:
        UserError: where `p` is not in [0, 1).
    """

    def __init__(self, p: float, layer: int):
        super().__init__()
        if not 0 <= p < 1:
            raise UserError(f"dropout is {p}: expected a probability, at least 0 and below 1")
        self.p = p
        self.layer = layer
        self.constants = torch.empty(0, dtype=torch.int64)  # not a buffer, which DDP would send around in each forward pass

    def forward(self, x: Tensor, keys_B: Tensor | None = None) -> Tensor:
        """`x` `[B, ..., J]`; `keys_B` from `row_keys`. Without keys this is `F.dropout`, in evaluation the identity."""
        if not self.training or self.p == 0 or keys_B is None:
            return F.dropout(x, self.p, self.training)
        units = x.shape[1:].numel()
        if len(self.constants) < units or self.constants.device != x.device:
            self.constants = unit_constants(torch.tensor(self.layer, device=x.device), units)
        mixed_B = mix64(keys_B ^ mix64(torch.full_like(keys_B, self.layer)))
        constants = self.constants[:units].view(x.shape[1:])
        return keyed_dropout(x, mixed_B.view(-1, *[1] * (x.dim() - 1)), constants, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}"

"""Convolutional trunks for images and volumes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Literal

from torch import Tensor, nn

from mtrain.errors import UserError
from mtrain.model.dropout import Dropout
from mtrain.model.heads import ACTIVATIONS

_LAYERS: dict[int, tuple[Any, Any, Any]] = {
    2: (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d),
    3: (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d),
}


class Conv(nn.Module):
    """Blocks of convolution, normalisation, activation, pooling and dropout over images or volumes that come flattened.

    Padding keeps the size of an image, only pooling shrinks it: `[B, C * H * W]` to `[B, widths[-1]]` where the features are
    averaged over what is left (`features: mean`), or to `[B, widths[-1] * h * w]`.

    Args:
        shape: of one input: `[C, H, W]` or `[C, D, H, W]`; with `channels_last` `[H, W, C]` or `[D, H, W, C]`, as images are
            often stored.
        widths: channels of each block.
        kernel: odd side of the kernels.
        pool: side of the windows of which each block keeps the maximum; 1 keeps all. The last side left must be at least 1.
        features: average over positions, or keep all of them.
        activation: of each block.
        norm: between convolution and activation: over groups of 8 channels (`group`, Wu and He 2018), over all of them
            (`layer`), or `batch`, in one process only.
        dropout: share of each block's values that is zeroed in training.

    Raises:
        UserError: options that do not fit each other, or the inputs.
    """

    def __init__(
        self,
        in_features: int,
        shape: list[int],
        widths: list[int] = [32, 64],  # noqa: B006
        kernel: int = 3,
        pool: int = 2,
        features: Literal["mean", "all"] = "mean",
        activation: Literal["relu", "elu", "gelu", "silu", "tanh"] = "relu",
        norm: Literal["none", "layer", "group", "batch"] = "none",
        dropout: float = 0.0,
        channels_last: bool = False,
    ):
        super().__init__()
        if len(shape) not in (3, 4) or min(shape) < 1:
            raise UserError(f"model.trunk: shape is {shape}, expected [C, H, W] for images or [C, D, H, W] for volumes")
        if prod(shape) != in_features:
            fewer = " (Numeric leaves out columns that are constant in training: read a list column with Array)"
            raise UserError(
                f"model.trunk: shape {shape} is {prod(shape)} values, but the inputs have {in_features}; give one row's shape"
                f"{fewer if in_features < prod(shape) else ''}"
            )
        if not widths or min(widths) < 1:
            raise UserError(f"model.trunk: widths are {widths}, expected at least one positive number")
        if kernel < 1 or kernel % 2 == 0 or pool < 1:
            raise UserError(f"model.trunk: kernel is {kernel} and pool {pool}, expected an odd kernel and a pool of at least 1")
        if norm == "group" and any(width % 8 for width in widths):
            raise UserError(f"model.trunk: widths are {widths} with norm group, expected multiples of 8; or use norm: layer")
        self.shape, self.channels_last = shape, channels_last
        channels, *sides = [shape[-1], *shape[:-1]] if channels_last else shape
        left = [side // pool ** len(widths) for side in sides]
        if min(left) < 1:
            raise UserError(
                f"model.trunk: {len(widths)} blocks with pool {pool} leave nothing of {' x '.join(map(str, sides))}; use fewer "
                "widths or pool: 1"
            )
        conv, batch_norm, max_pool = _LAYERS[len(sides)]
        sizes = [channels, *widths]
        self.convs = nn.ModuleList(conv(a, b, kernel, padding=kernel // 2) for a, b in zip(sizes, widths, strict=False))
        norms: dict[str, Callable[[int], nn.Module]] = {
            "none": lambda width: nn.Identity(),
            "layer": lambda width: nn.GroupNorm(1, width),
            "group": lambda width: nn.GroupNorm(width // 8, width),
            "batch": batch_norm,
        }
        self.norms = nn.ModuleList(norms[norm](width) for width in widths)
        self.activation = ACTIVATIONS[activation][1]()
        self.pool = max_pool(pool) if pool > 1 else nn.Identity()
        self.dropouts = nn.ModuleList(Dropout(dropout, layer=i) for i in range(len(widths)))
        self.mean = features == "mean"
        self.out_features = widths[-1] * (1 if self.mean else prod(left))

    def forward(self, x_BF: Tensor, keys_B: Tensor | None = None) -> Tensor:
        h = x_BF.unflatten(1, self.shape)
        if self.channels_last:
            h = h.movedim(-1, 1).contiguous()
        for conv, norm, dropout in zip(self.convs, self.norms, self.dropouts, strict=True):
            h = dropout(self.pool(self.activation(norm(conv(h)))), keys_B)
        return h.flatten(2).mean(2) if self.mean else h.flatten(1)

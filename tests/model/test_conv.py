"""Convolutional trunks over flattened images and volumes."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mtrain.config import ModelConfig
from mtrain.data.features import Array, encode_column
from mtrain.errors import UserError
from mtrain.model.conv import Conv
from mtrain.model.dropout import row_keys
from mtrain.model.trunks import build_shared


def test_an_image_is_convolved_as_by_hand():
    torch.manual_seed(0)
    trunk, x_BCHW = Conv(2 * 9 * 6, [2, 9, 6], widths=[8, 5]), torch.randn(3, 2, 9, 6)
    h = x_BCHW.double()
    for conv in trunk.convs:
        h = F.max_pool2d(F.relu(F.conv2d(h, conv.weight.double(), conv.bias.double(), padding=1)), 2)
    assert h.shape[2:] == (2, 1)
    torch.testing.assert_close(trunk(x_BCHW.flatten(1)), h.mean((2, 3)).float())
    trunk.mean = False
    torch.testing.assert_close(trunk(x_BCHW.flatten(1)), h.flatten(1).float())
    assert Conv(2 * 9 * 6, [2, 9, 6], widths=[8, 5], features="all").out_features == 10


def test_a_volume_is_convolved_as_by_hand():
    torch.manual_seed(0)
    trunk, x_BCDHW = Conv(4 * 5 * 6, [1, 4, 5, 6], widths=[3], norm="layer", activation="silu"), torch.randn(2, 1, 4, 5, 6)
    (conv,), (norm,) = trunk.convs, trunk.norms
    assert isinstance(conv, nn.Conv3d)
    h = F.conv3d(x_BCDHW, conv.weight, conv.bias, padding=1)
    h = (h - h.mean((1, 2, 3, 4), keepdim=True)) / (h.var((1, 2, 3, 4), keepdim=True, correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(trunk(x_BCDHW.flatten(1)), F.max_pool3d(F.silu(h), 2).mean((2, 3, 4)), rtol=1e-5, atol=1e-6)


def test_channels_may_stand_last():
    torch.manual_seed(0)
    first = Conv(3 * 8 * 4, [3, 8, 4])
    last = Conv(3 * 8 * 4, [8, 4, 3], channels_last=True)
    last.load_state_dict(first.state_dict())
    x_BCHW = torch.randn(2, 3, 8, 4)
    torch.testing.assert_close(last(x_BCHW.movedim(1, -1).flatten(1)), first(x_BCHW.flatten(1)))


def test_dropout_depends_on_rows_and_not_on_how_they_are_dealt():
    torch.manual_seed(0)
    trunk, x_BF, keys_B = Conv(64, [1, 8, 8], dropout=0.5).train(), torch.randn(6, 64), row_keys(0, 1, torch.arange(6))
    both = torch.cat([trunk(x_BF[:2], keys_B[:2]), trunk(x_BF[2:], keys_B[2:])])
    torch.testing.assert_close(trunk(x_BF, keys_B), both)
    assert not torch.allclose(trunk(x_BF, keys_B), trunk.eval()(x_BF))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": [8, 8]}, r"shape is \[8, 8\], expected \[C, H, W\] for images or \[C, D, H, W\] for volumes"),
        (
            {"shape": [1, 8, 9]},
            r"is 72 values, but the inputs have 64; give one row's shape \(Numeric leaves out .* Array\)",
        ),
        ({"shape": [1, 7, 9]}, r"shape \[1, 7, 9\] is 63 values, but the inputs have 64; give one row's shape$"),
        ({"shape": [1, 8, 8], "widths": [4] * 4}, r"4 blocks with pool 2 leave nothing of 8 x 8; use fewer widths or pool: 1"),
        ({"shape": [1, 8, 8], "widths": []}, r"widths are \[\], expected at least one positive number"),
        ({"shape": [1, 8, 8], "kernel": 4}, r"kernel is 4 and pool 2, expected an odd kernel"),
        ({"shape": [1, 8, 8], "norm": "group", "widths": [12]}, r"widths are \[12\] with norm group, expected multiples of 8"),
        ({"shape": [1, 8, 8], "dropout": 1.0}, r"dropout is 1.0"),
    ],
)
def test_bad_options_are_said_in_one_line(options, message):
    with pytest.raises(UserError, match=message):
        build_shared(ModelConfig(trunk={"class_path": "Conv", "init_args": options}), 64, 0)


def test_images_come_from_columns_of_nested_lists():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    table = pa.table({"image": pa.array(images.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8()))))})
    feature = Array()
    encoded = encode_column(table, ["image"], feature)
    feature.fit(encoded.values, ["image"])
    x_BF = torch.from_numpy(feature.transform(encoded.values))
    np.testing.assert_array_equal(x_BF.view(5, 4, 6, 3), images)
    trunk = Conv(72, [4, 6, 3], widths=[4], channels_last=True)
    expected = F.max_pool2d(F.relu(trunk.convs[0](torch.from_numpy(images).float().permute(0, 3, 1, 2))), 2).mean((2, 3))
    torch.testing.assert_close(trunk(x_BF), expected)


class Patches(nn.Module):
    """A user's own network for images, as in torchvision: images in, features out."""

    def __init__(self, in_features: int, side: int = 8):
        super().__init__()
        self.side, self.channels = side, in_features // side**2
        self.body = nn.Sequential(nn.Conv2d(self.channels, 6, 4, stride=4), nn.ReLU(), nn.Flatten())

    def forward(self, x_BF):
        return self.body(x_BF.view(-1, self.channels, self.side, self.side))


def test_a_module_of_the_users_own_reads_images():
    spec = {"class_path": f"{__name__}.Patches", "init_args": {"side": 8}}
    shared = build_shared(ModelConfig(trunk=spec), 128, 0)
    assert shared.out_features == 24
    assert shared(torch.randn(3, 128)).shape == (3, 24)

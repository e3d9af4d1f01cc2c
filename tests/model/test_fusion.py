"""Several inputs, and many networks as one computation, against loops over separately built modules."""

import copy
from itertools import accumulate
from statistics import median

import pytest
import torch
from torch import nn
from torch.func import functional_call

from mtrain.components import Spec
from mtrain.config import ModelConfig
from mtrain.errors import UserError
from mtrain.model.dropout import row_keys
from mtrain.model.fusion import FeatureFusion, ModelFusion, Stacked, keys_of, salts_of
from mtrain.model.trunks import MLP, build_shared

E, B, F = 5, 7, 6
WIDTHS = {"a": F, "b": F, "c": F}


class Convolution(nn.Module):
    """A user's encoder with a buffer, without keys."""

    def __init__(self, in_features: int, channels: int = 3):
        super().__init__()
        self.layer, self.norm = nn.Conv1d(1, channels, 3), nn.BatchNorm1d(channels)
        self.register_buffer("scale", torch.rand(1))
        self.out_features = channels * (in_features - 2)

    def forward(self, x):
        return (self.norm(self.layer(x[:, None])).relu() * self.scale).flatten(1)


def networks(kind, count=E):
    if kind == "conv":
        return [Convolution(F) for _ in range(count)]
    options = {"norm": kind} if kind in ("layer", "batch") else {"dropout": 0.4} if kind == "dropout" else {}
    return [MLP(F, [8, 4], **options) for _ in range(count)]


def state_of(stacked, number):
    return {name: getattr(stacked, place)[number] for name, place in stacked.places.items()}


def inputs_of(rows=B):
    return {name: torch.randn(rows, width) for name, width in WIDTHS.items()}


@pytest.mark.parametrize("kind", ["plain", "layer", "batch", "dropout", "conv"])
@pytest.mark.parametrize("shared_x", [False, True])
def test_stacked_networks_equal_a_loop(kind, shared_x):
    separate = [network.double() for network in networks(kind)]
    stacked = Stacked(copy.deepcopy(separate))
    x = torch.randn(*(() if shared_x else (E,)), B, F, dtype=torch.float64)
    keys = keys_of(row_keys(0, 1, torch.arange(B)), salts_of([str(e) for e in range(E)]))
    for training in (True, True, False):
        stacked.train(training)
        expected = []
        for e, network in enumerate(separate):
            network.train(training).zero_grad()
            own = x if shared_x else x[e]
            expected.append(network(own) if kind == "conv" else network(own, keys[e]))
        stacked.zero_grad()
        found = stacked(x, keys)
        torch.testing.assert_close(found, torch.stack(expected))
        (found**2).sum().backward()
        (torch.stack(expected) ** 2).sum().backward()
        for e, network in enumerate(separate):
            for name, p in network.named_parameters():
                torch.testing.assert_close(getattr(stacked, stacked.places[name]).grad[e], p.grad)
    for e, network in enumerate(separate):  # also the running statistics of batch normalisation
        torch.testing.assert_close(state_of(stacked, e), dict(network.named_parameters()) | dict(network.named_buffers()))


def test_a_rows_dropout_depends_on_row_and_encoder_alone():
    torch.manual_seed(0)
    spec = Spec(class_path="MLP", init_args={"widths": [64], "dropout": 0.5})
    keys = row_keys(0, 3, torch.arange(B))
    x = inputs_of()
    same = {name: x["a"] for name in x}
    for trunk in (ModelFusion(WIDTHS, spec), FeatureFusion(WIDTHS, spec)):
        torch.testing.assert_close(trunk(x, keys)[4:], trunk({name: v[4:] for name, v in x.items()}, keys[4:]))
        masks = (trunk(same, keys) == 0).view(B, 3, -1)
        assert not torch.equal(masks[:, 0], masks[:, 1])
        assert not torch.equal(trunk(x), trunk(x))  # without keys: random


@pytest.mark.parametrize("output", ["concat", "separate"])
def test_fusions_equal_encoders_in_a_loop(output):
    spec, x = Spec(class_path="MLP", init_args={"widths": [8, 4], "norm": "layer"}), inputs_of()
    fused = FeatureFusion(WIDTHS, spec, output=output)
    own = ModelFusion(WIDTHS, spec, output=output)
    one = MLP(F, [8, 4], norm="layer")
    of_own = [functional_call(one, state_of(own.encoders, i), (x[name],)) for i, name in enumerate(WIDTHS)]
    for trunk, encoded in ((fused, [fused.encoder(x[name]) for name in WIDTHS]), (own, of_own)):
        joint = torch.cat(encoded, 1)
        if output == "concat":
            assert trunk.out_features == 12
            torch.testing.assert_close(trunk(x), joint)
        else:
            assert trunk.out_features == {"a": 4, "b": 4, "c": 4, "joint": 12}
            expected = dict(zip(WIDTHS, encoded, strict=True)) | {"joint": joint}
            torch.testing.assert_close(trunk(x), expected)


def test_each_encoder_begins_as_it_would_alone():
    torch.manual_seed(3)
    own = ModelFusion(WIDTHS, Spec(class_path="Linear", init_args={"width": 50}))
    weight = own.encoders.get_parameter("neck/weight").detach()
    assert weight.shape == (3, 50, F)
    assert weight.abs().max() <= F**-0.5
    assert weight.flatten(1).std(1) == pytest.approx([(F * 3) ** -0.5] * 3, rel=0.15)


def test_a_fusion_is_built_and_trained_as_a_shared_network():
    ranges = {"a": [slice(0, 2), slice(4, 6)], "b": [slice(2, 4), slice(6, 8)]}
    config = ModelConfig(trunk=Spec(class_path="ModelFusion", init_args={"encoder": "Identity", "output": "separate"}))
    shared, x = build_shared(config, ranges, 0), torch.arange(16.0).view(2, 8)
    assert shared.features == {"a": (4,), "b": (4,), "joint": (8,)}
    assert shared(x)[0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 0, 1, 4, 5, 2, 3, 6, 7]
    assert shared(x[:0]).shape == (0, 16)


def test_stacked_networks_compile_and_take_no_rows():
    stacked = Stacked(networks("layer"))
    assert stacked(torch.zeros(E, 0, F)).shape == (E, 0, 4)
    (stacked(torch.zeros(E, 0, F)).sum() * 2).backward()
    assert all(p.grad is not None for p in stacked.parameters())


@pytest.mark.parametrize(
    ("inputs", "options", "words"),
    [
        ({"a": 3}, {}, "two or more inputs, found a 3"),
        ({"a": 3, "b": 4}, {}, "equal width, found a 3, b 4"),
        ({"a": 3, "joint": 3}, {"output": "separate"}, "choose another"),
        ({"a": 3, "b": 3}, {"encoder": {"class_path": "MLP", "init_args": {"members": 2}}}, "expected one feature"),
        ({"a": 3, "b": 3}, {"encoder": {"class_path": "MLP", "init_args": {"width": 2}}}, "did you mean 'widths'"),
        ({"a": 3, "b": 3}, {"encoder": "MMoE"}, "several features"),
        (
            {"a": 3, "b": 3},
            {"encoder": "FeatureFusion"},
            "encoder: FeatureFusion reads inputs by name, expected a network of one",
        ),
        ({"a": 3, "b": 3}, {"output": "both"}, "output"),
    ],
)
def test_a_fusion_that_cannot_be_is_refused_in_one_line(inputs, options, words):
    ranges = {name: [slice(end - inputs[name], end)] for name, end in zip(inputs, accumulate(inputs.values()), strict=True)}
    for name in ("FeatureFusion", "ModelFusion"):
        with pytest.raises(UserError, match=words) as caught:
            build_shared(ModelConfig(trunk=Spec(class_path=name, init_args=options)), ranges, 0)
        assert "\n" not in str(caught.value)


class Picky(nn.Module):
    """A user's own encoder, which looks at its values."""

    def __init__(self, in_features: int):
        super().__init__()
        self.linear, self.out_features = nn.Linear(in_features, 2), 2

    def forward(self, x_BF):
        z_BD = self.linear(x_BF)
        return z_BD if z_BD.sum() > 0 else -z_BD


@pytest.mark.parametrize(
    ("trunk", "option", "named"),
    [("ModelFusion", "encoder", "model.trunk.init_args.encoder: 2"), ("MMoE", "expert", "model.trunk.init_args.expert: 8")],
)
def test_networks_that_cannot_run_as_one_are_refused_in_one_line(trunk, option, named):
    encoder = f"{__name__}.Picky"
    ranges = {"a": [slice(0, 3)], "b": [slice(3, 6)]}
    with pytest.raises(UserError, match=f"{named} networks .*Picky cannot run as one by torch.func.vmap") as caught:
        build_shared(ModelConfig(trunk=Spec(class_path=trunk, init_args={option: encoder})), ranges, 0)
    assert "\n" not in str(caught.value)
    build_shared(ModelConfig(trunk=Spec(class_path="FeatureFusion", init_args={"encoder": encoder})), ranges, 0)


@pytest.mark.slow
def test_many_small_encoders_are_faster_than_a_loop():
    from mtrain.bench.fusion import CASES, compare

    assert median(compare(CASES[0])["speedup"] for _ in range(3)) >= 4.0

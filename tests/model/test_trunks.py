"""Trunks and the contract for the user's own."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mtrain.components import Spec
from mtrain.config import ModelConfig
from mtrain.errors import UserError
from mtrain.model.dropout import row_keys
from mtrain.model.trunks import MLP, build_shared


class Own(nn.Module):
    """A user's trunk: no `out_features`, no keys, a random module."""

    def __init__(self, in_features: int, width: int = 3):
        super().__init__()
        self.layer = nn.Linear(in_features, width)

    def forward(self, x):
        return self.layer(x).tanh()


class Flat(nn.Module):
    def forward(self, x):
        return x.sum()


class Fails(nn.Module):
    def forward(self, x):
        raise ValueError("no")


def shared(class_path, in_features=4, neck=None, **init_args):
    return build_shared(ModelConfig(trunk=Spec(class_path=class_path, init_args=init_args), neck=neck), in_features, 0)


@pytest.fixture(autouse=True)
def own_trunks(monkeypatch):
    monkeypatch.setitem(sys.modules, "own_trunks", sys.modules[__name__])


def test_an_mlp_equals_its_layers_written_out():
    model = MLP(4, [8, 8], activation="gelu", norm="layer", residual=True, skip=True)
    x = torch.randn(5, 4)
    h = F.gelu(F.layer_norm(model.linears[0](x), (8,)))
    h = h + F.gelu(F.layer_norm(model.linears[1](h), (8,)))
    torch.testing.assert_close(model(x), torch.cat([h, x], 1))
    assert model.out_features == 12
    assert model.neck is model.linears[-1]


def test_initial_values_depend_on_the_seed_alone():
    torch.manual_seed(1)
    a = shared("MLP")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    b = shared("MLP")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rows_dropout_does_not_depend_on_the_rows_beside_it():
    model = shared("MLP", widths=[64], dropout=0.5, input_dropout=0.2)
    x, rows = torch.randn(6, 4), torch.arange(6)
    whole = model(x, row_keys(0, 3, rows))
    half = model(x[3:], row_keys(0, 3, rows[3:]))
    torch.testing.assert_close(whole[3:], half)
    assert not torch.equal(whole, model(x, row_keys(0, 4, rows)))


@pytest.mark.parametrize(
    ("name", "options", "width"), [("MLP", {"widths": [7, 5]}, 5), ("Linear", {"width": 6}, 6), ("Identity", {}, 4)]
)
def test_built_in_trunks_say_their_width_and_a_neck_replaces_it(name, options, width):
    model = shared(name, **options)
    assert model.out_features == width
    assert model(torch.randn(2, 4), torch.zeros(2, dtype=torch.int64)).shape == (2, width)
    assert shared(name, neck=9, **options)(torch.randn(2, 4)).shape == (2, 9)


def test_a_users_own_trunk_is_built_from_its_import_path_and_its_width_is_found():
    model = shared("own_trunks.Own", width=11)
    assert model.out_features == 11
    assert model.training
    assert model(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)).shape == (3, 11)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("MPL", {}, "did you mean 'MLP'"),
        ("MLP", {"width": [3]}, "did you mean 'widths'"),
        ("MLP", {"widths": []}, "expected at least one positive number"),
        ("own_trunks.Flat", {}, "expected features"),
        ("own_trunks.Fails", {}, "fails on inputs of shape"),
        ("own_trunks.Missing", {}, "cannot import"),
    ],
)
def test_a_trunk_that_cannot_be_is_refused_in_one_line(name, options, words):
    with pytest.raises(UserError, match=words) as caught:
        shared(name, **options)
    assert "\n" not in str(caught.value)


def test_each_member_of_an_ensemble_is_a_network_of_its_own():
    model = MLP(4, [6, 5], members=3)
    x = torch.randn(7, 4)
    features = model(x)
    assert features.shape == (7, 3, 5)
    for m in range(3):
        h = x
        for linear in model.linears:
            h = torch.relu(F.linear(h, linear.weight[m], linear.bias[m]))
        torch.testing.assert_close(features[:, m], h)

"""Trunks and the contract for the user's own."""

import re
import sys
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mtrain.components import Spec
from mtrain.config import ModelConfig, check_config
from mtrain.errors import UserError
from mtrain.model.dropout import row_keys
from mtrain.model.trunks import MLP, build_shared, check_tasks, shared_network, split_inputs


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


class Leaves(nn.Module):
    def __init__(self):
        raise SystemExit(3)


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
        ("own_trunks.Flat", {}, r"gives float32 \[\] for inputs \[2, 4\], expected float32 \[2, D\], or several by name"),
        ("own_trunks.Fails", {}, "fails on inputs of shape"),
        ("own_trunks.Leaves", {}, "'own_trunks.Leaves' fails with {}: SystemExit: 3"),
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


class Named(nn.Module):
    """Reads inputs by name, and gives several features."""

    def __init__(self, inputs: dict[str, int], tasks: list[str], said: bool = True):
        super().__init__()
        self.left, self.right = nn.Linear(inputs["left"], 3), nn.Linear(inputs["right"], 8)
        self.tasks = tasks
        if said:
            self.out_features = {"one": 3, "experts": [2, 4]}

    def forward(self, inputs):
        return {"experts": self.right(inputs["right"]).view(-1, 2, 4), "one": self.left(inputs["left"])}


class ByTask(nn.Module):
    def __init__(self, in_features: int, tasks: list[str]):
        super().__init__()
        self.bias = nn.Embedding(len(tasks), in_features)

    def forward(self, x_BF, task_B=None):
        return x_BF + self.bias(task_B)


class Says(nn.Module):
    """Says what it gives, and gives something else; `later`: in training only."""

    GIVES: ClassVar = {
        "as said": lambda z: z,
        "noise": lambda z: z + torch.rand(3)[0],
        "a list": lambda z: [z],
        "nothing": lambda z: None,
        "names": lambda z: {"a": z, "b": z[:, :3]},
        "float64": lambda z: z.double(),
        "int64": lambda z: z.long(),
        "fewer": lambda z: z[:-1],
        "flat": lambda z: z.sum(1),
        "an error": lambda z: {}["nope"],
        "exit": lambda z: sys.exit(1),
    }

    def __init__(self, in_features: int, gives: str, out: Any = 8, later: bool = False):
        super().__init__()
        self.layer, self.frozen, self.out_features = nn.Linear(in_features, 8), nn.Dropout().eval(), out
        self.gives, self.later = self.GIVES[gives], later

    def forward(self, x_BF, keys_B, step_key):
        z = self.layer(x_BF)
        return z if self.later and not self.training else self.gives(z)


def network(columns, trunk, model=None, inputs=None, layout="grid", tasks=("t", "u")):
    """The shared network for features that read `columns`: of each its names, and its width."""
    inputs = inputs or {names[0]: "Numeric" for names, _ in columns}
    data = {"path": "x.csv", "layout": layout} | ({} if layout == "grid" else {"task": "task", "label": "y"})
    config = check_config({"data": data, "inputs": inputs, "model": {"trunk": trunk} | (model or {})}, "test")
    return shared_network(config, columns, tasks)


WIDE = [(["left_a", "left_b"], 4), (["right"], 2), (["left_c"], 1)]
KEYS = {"left_?": "Numeric", "right": "Numeric", "left_c": "Numeric"}
NAMED = {"class_path": "own_trunks.Named"}
BY_NAME = {"left": "left_*", "right": ["right"]}


@pytest.mark.parametrize("said", [True, False])
def test_inputs_come_by_name_and_features_leave_by_name(said):
    model = network(WIDE, NAMED | {"init_args": {"said": said}}, {"inputs": BY_NAME}, KEYS)
    x = torch.randn(5, 7)
    one = model.trunk.left(torch.cat([x[:, :4], x[:, 6:]], 1))
    experts = model.trunk.right(x[:, 4:6])
    z = {"one": one, "experts": experts.view(5, 2, 4)}
    assert model.trunk.tasks == ["t", "u"]
    order = ["one", "experts"] if said else ["experts", "one"]
    assert list(model.features) == order
    assert model.features == {"one": (3,), "experts": (2, 4)}
    torch.testing.assert_close(model(x), torch.cat([z[name].flatten(1) for name in order], 1))
    assert model.out_features == 11
    assert model.linear_neck is None


def test_without_names_in_the_model_the_keys_of_inputs_are_the_names():
    columns = [(["a"], 3), (["a"], 2), (["b"], 5)]
    model = network(columns, "FeatureFusion", inputs={"a": ["Numeric", "Categorical"], "b": "Numeric"})
    assert model.ranges == {"a": [slice(0, 5)], "b": [slice(5, 10)]}
    found = split_inputs(x := torch.randn(2, 10), model.ranges)
    assert found["b"].data_ptr() == x[:, 5:].data_ptr()  # a view


def test_a_trunk_gets_each_rows_task():
    model = network([(["a"], 3)], "own_trunks.ByTask", layout="routed")
    x, task_B = torch.randn(4, 3), torch.tensor([1, 0, 1, 1])
    torch.testing.assert_close(model(x, None, task_B), x + model.trunk.bias.weight[task_B])
    with pytest.raises(UserError, match="saved for 1 tasks that are not the 2 of now"):
        check_tasks(model, ["t"], ["t", "u"])


@pytest.mark.parametrize(
    ("trunk", "given", "words"),
    [
        ("MLP", BY_NAME, "trunk MLP takes all inputs as one matrix, not left, right by name"),
        (NAMED, {"left": "left_*", "wrong": "right"}, "Named wants 'right', found left, wrong"),
        (NAMED, {"left": "lft_*", "right": "right"}, r"model.inputs.left: no input column 'lft_\*'; did you mean"),
        (NAMED, {"left": ["left_a", "left_b"], "right": "right"}, "column 'left_c' is in none of its names"),
        (NAMED, {"left": "left_*", "right": ["right", "left_c"]}, "column 'left_c' is in left and right"),
        (NAMED, {"left": ["left_a", "left_c"], "right": ["right", "left_b"]}, "reads 'left_a' of left and 'left_b' of right"),
        (NAMED, {"left": [], "right": "right"}, "model.inputs.left: no input column ''"),
        ("FeatureFusion", None, r"equal width, found left_\? 4, right 2, left_c 1"),
        ("own_trunks.ByTask", None, "reads each row's task, which only layouts routed and files have"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_line(trunk, given, words):
    with pytest.raises(UserError, match=words) as caught:
        network(WIDE, trunk, {"inputs": given}, KEYS)
    assert "\n" not in str(caught.value)


def test_features_that_do_not_fit_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"gives one \[3\], experts \[2, 4\]; a neck needs one feature|the trunk gives one"):
        network(WIDE, NAMED, {"inputs": BY_NAME, "neck": 4}, KEYS)


@pytest.mark.parametrize(
    ("gives", "out", "words"),
    [
        ("as said", 5, "gives float32 [2, 8] for inputs [2, 4], expected float32 [2, 5] as its out_features say"),
        ("as said", 8.0, "has out_features 8.0, expected D, or D or (E, D) for each feature by name: whole numbers above 0"),
        ("as said", "eight", "has out_features 'eight', expected D"),
        ("as said", {}, "has out_features {}, expected D"),
        ("as said", {"a": 0}, "has out_features {'a': 0}, expected D"),
        ("as said", True, "has out_features True, expected D"),
        ("a list", 8, "gives a list for inputs [2, 4], expected float32 [2, 8]"),
        ("nothing", 8, "gives None for inputs [2, 4], expected float32 [2, 8]"),
        (
            "names", {"a": 8, "b": (2, 3)},
            "gives a float32 [2, 8], b float32 [2, 3] for inputs [2, 4], expected a float32 [2, 8], b float32 [2, 2, 3] as its",
        ),
        ("float64", 8, "gives float64 [2, 8] for inputs [2, 4], expected float32 [2, 8]"),
        ("int64", 8, "gives int64 [2, 8]"),
        ("fewer", 8, "gives float32 [1, 8]"),
        ("flat", 8, "gives float32 [2]"),
        ("an error", 8, "fails on inputs of shape [2, 4]: KeyError: 'nope'"),
        ("exit", 8, "fails on inputs of shape [2, 4]: SystemExit: 1"),
    ],
)  # fmt: skip
def test_a_users_trunk_that_says_its_width_is_tried_too(monkeypatch, gives, out, words):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match=re.escape(f"model.trunk: own_trunks.Says {words}")):
        shared("own_trunks.Says", gives=gives, out=out)


def test_trying_a_trunk_that_says_its_width_changes_nothing_that_is_built():
    a, b = (shared("own_trunks.Says", neck=3, gives=gives) for gives in ("as said", "noise"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert [module.training for module in (a, a.trunk, a.trunk.layer, a.trunk.frozen)] == [True, True, True, False]


def test_a_trunk_that_fails_on_the_cpu_may_need_the_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert shared("own_trunks.Says", gives="an error").out_features == 8
    with pytest.raises(UserError, match="fails on inputs of shape"):  # nothing else says what it gives
        shared("own_trunks.Fails")


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        ("a list", "gives a list, expected float32 [5, 8] as its out_features"),
        ("nothing", "gives None, expected float32 [5, 8]"),
        ("fewer", "gives features float32 [4, 8], expected float32 [5, 8]"),
        ("names", "gives a float32 [5, 8], b float32 [5, 3], expected float32 [5, 8]"),
    ],
)
def test_what_a_trunk_gives_is_checked_in_training(gives, words):
    model = shared("own_trunks.Says", gives=gives, later=True)
    assert model.eval()(torch.zeros(5, 4)).shape == (5, 8)
    with pytest.raises(UserError, match=re.escape(f"model.trunk: Says {words}")):
        model.train()(torch.zeros(5, 4))

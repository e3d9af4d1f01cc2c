"""Experts against loops over separate networks and gates."""

import pytest
import torch
from torch.func import functional_call

from mtrain.components import Spec
from mtrain.config import ModelConfig
from mtrain.errors import UserError
from mtrain.model.dropout import row_keys
from mtrain.model.experts import CGC, MMoE
from mtrain.model.trunks import MLP, build_shared

B, F, D = 6, 5, 4
EXPERT = Spec(class_path="MLP", init_args={"widths": [7, D]})


def expert(stacked, number, x):
    state = {name: getattr(stacked, place)[number] for name, place in stacked.places.items()}
    return functional_call(MLP(x.shape[1], [7, D]), state, (x,))


def test_mmoe_equals_a_loop_over_experts():
    x = torch.randn(B, F)
    trunk = MMoE(F, 3, EXPERT)
    found = trunk(x)
    assert trunk.out_features == {"experts": (3, D), "gate": F}
    torch.testing.assert_close(found["experts"], torch.stack([expert(trunk.experts, e, x) for e in range(3)], 1))
    assert found["gate"] is x


def test_cgc_with_three_levels_equals_its_equations():
    groups, own, common = 3, 2, 2
    trunk = CGC(F, groups, own, common, 3, EXPERT)
    x = torch.randn(B, F)
    count = groups * own + common
    reads = [x] * (groups + 1)
    for level in range(3):
        z = [expert(trunk.levels[level], e, reads[min(e // own, groups)]) for e in range(count)]
        if level == 2:
            break
        gates = trunk.gates[level]
        weight, bias = gates.weight, gates.bias
        after = []
        for g in range(groups + 1):
            chosen = [e for e in range(count) if g == groups or e // own == g or e >= groups * own]
            logits = reads[g] @ weight[g][chosen].T + bias[g][chosen]
            after.append(sum(logits.softmax(1)[:, [i]] * z[e] for i, e in enumerate(chosen)))
        reads = after
    found = trunk(x)
    torch.testing.assert_close(found["experts"], torch.stack(z, 1))
    torch.testing.assert_close(found["gate"], torch.cat(reads, 1))
    assert trunk.out_features == {"experts": (count, D), "gate": 4 * D}
    assert CGC(F, groups, own, common, 1, EXPERT).out_features == {"experts": (count, D), "gate": F}


@pytest.mark.parametrize("name", ["MMoE", "CGC"])
def test_a_rows_features_do_not_depend_on_the_rows_beside_it(name):
    options = {"expert": {"class_path": "MLP", "init_args": {"widths": [16], "dropout": 0.5}}}
    model = build_shared(ModelConfig(trunk=Spec(class_path=name, init_args=options)), F, 0)
    x, keys = torch.randn(B, F), row_keys(0, 1, torch.arange(B))
    torch.testing.assert_close(model(x, keys)[2:], model(x[2:], keys[2:]))
    experts, width = model.features["experts"]
    masks = (model(x, keys)[:, : experts * width] == 0).view(B, experts, width)
    assert not torch.equal(masks[:, 0], masks[:, 1])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("MMoE", {"experts": 1}, "experts is 1"),
        ("CGC", {"levels": 0}, "levels is 0"),
        ("CGC", {"expert": "Nothing"}, "'Nothing' is unknown"),
        ("MMoE", {"expert": "CGC"}, "several features"),
    ],
)
def test_experts_that_cannot_be_are_refused_in_one_line(name, options, words):
    with pytest.raises(UserError, match=words):
        build_shared(ModelConfig(trunk=Spec(class_path=name, init_args=options)), F, 0)


def test_a_neck_behind_experts_is_refused():
    with pytest.raises(UserError, match="a neck needs one feature"):
        build_shared(ModelConfig(trunk=Spec(class_path="MMoE"), neck=3), F, 0)

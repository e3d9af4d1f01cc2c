import pytest

from mtrain.config import check_config
from mtrain.errors import UserError
from mtrain.model.head_forms import Gate, HeadForm
from mtrain.model.head_options import forms_by_name, head_forms, head_gate, of_members

NAMES = ["price_a", "price_b", "click", "buy"]


def config(by_name, **head):
    tree = {"data": {"path": "t.csv", "layout": "grid"}, "tasks": {"by_name": by_name}, "model": {"head": head}}
    return check_config(tree, "test")


def test_options_of_a_task_are_those_of_the_head_and_the_last_that_match():
    by_name = {
        "price_*": {"reads": "left", "experts": [0, 2]},
        "price_b": {"reads": ["right", "task:click"], "hidden": ["3x"]},
        "buy": {"reads": ["left", "task:click", "task:price_a"]},
    }
    given = config(by_name, hidden=["2x", 8], gate={"experts": "left", "by": "g"})
    own = ("2x", 8)
    expected = [
        HeadForm(own, "left", (), (0, 2)),
        HeadForm(("3x",), "right", (2,), (0, 2)),
        HeadForm(own),
        HeadForm(own, "left", (2, 0)),
    ]
    assert head_forms(NAMES, given) == expected
    assert head_gate(given) == Gate("left", "g")
    assert forms_by_name(NAMES, given)["buy"] == (HeadForm(own, "left"), ["click", "price_a"])
    two = of_members(expected, 2)
    assert (two[:4], two[5].parents, two[7].parents) == (expected, (6,), (6, 4))


@pytest.mark.parametrize(
    ("by_name", "message"),
    [
        ({"buy": {"reads": ["left", "right"]}}, "task 'buy' reads 'left', 'right': expected one feature"),
        ({"buy": {"reads": ""}}, "task 'buy' reads '': expected one feature, and any number of other tasks as task:NAME"),
        ({"buy": {"reads": ["", "task:click"]}}, "task 'buy' reads '', 'task:click': expected one feature"),
        ({"buy": {"reads": ["left", "task:click", "task:click"]}}, "reads: found .*; expected each once"),
        ({"buy": {"reads": ["left", "task:clik"]}}, "reads task:clik, which is not a task of this run; did you mean 'click'"),
    ],
)
def test_what_a_head_cannot_read_is_said(by_name, message):
    with pytest.raises(UserError, match=message):
        head_forms(NAMES, config(by_name))


@pytest.mark.parametrize("hidden", ["x2", "0x", 0, "2.5x", -1])
def test_a_width_is_a_number_or_a_multiple(hidden):
    with pytest.raises(UserError, match=r"model.head.hidden.0: found .* such as 2x"):
        config({}, hidden=[hidden])

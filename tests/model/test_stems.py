"""A stem for each task against a loop over tasks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F_

from mtrain.components import Spec
from mtrain.config import ModelConfig
from mtrain.errors import UserError
from mtrain.model.stems import TaskStems
from mtrain.model.trunks import build_shared

INPUTS = {"a": 2, "b": 3, "c": 1}
TASKS = ["t0", "t1", "t2", "u0"]
COLUMNS = {"t*": ["a"], "t1": ["c", "b"]}  # u0 has all
OWN = {"t0": ["a"], "t1": ["c", "b"], "t2": ["a"], "u0": ["a", "b", "c"]}


def rows(count):
    return {name: torch.randn(count, width) for name, width in INPUTS.items()}, torch.randint(4, (count,))


def stems(**options):
    return TaskStems(INPUTS, TASKS, COLUMNS, [5, 4], "tanh", Spec(class_path="Linear", init_args={"width": 3}), **options)


def loop(trunk, x, task_B):
    out = []
    for row, task in enumerate(task_B.tolist()):
        h = torch.cat([x[name][row] for name in OWN[TASKS[task]]])
        h = torch.tanh(F_.linear(h, trunk.weight_0[task][:, : len(h)], trunk.bias_0[task]))
        h = torch.tanh(F_.linear(h, trunk.weight_1[task], trunk.bias_1[task]))
        out.append(trunk.trunk(h))
    return torch.stack(out)


def test_stems_equal_a_loop_over_rows_with_their_gradients():
    trunk = stems()
    x, task_B = rows(40)
    found, expected = trunk(x, None, task_B), loop(trunk, x, task_B)
    torch.testing.assert_close(found, expected)
    parameters = list(trunk.parameters())
    grads = [torch.autograd.grad(out.square().sum(), parameters) for out in (found, expected)]
    torch.testing.assert_close(*grads)


def test_a_stem_begins_by_its_tasks_name_as_nn_linear_does():
    def built(tasks):
        torch.manual_seed(5)
        return TaskStems(INPUTS, tasks, {}, [300])

    some, other = built(TASKS), built(["u0", "x"])
    assert torch.equal(some.weight_0[3], other.weight_0[0])
    narrow = TaskStems(INPUTS, TASKS, {"t0": ["c"], "t1": ["a", "c"]}, [2000])
    for task, width in ((0, 1), (1, 3), (2, 6)):
        weight = narrow.weight_0[task][:, :width]
        assert not narrow.weight_0[task][:, width:].any()
        assert weight.abs().max().item() == pytest.approx(width**-0.5, rel=0.01)
        assert weight.std().item() == pytest.approx(nn.Linear(width, 2000).weight.std().item(), rel=0.05)


def test_a_rank_without_rows_takes_part():
    trunk = stems()
    x, task_B = rows(0)
    out = trunk(x, None, task_B)
    assert out.shape == (0, 3)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in trunk.parameters())


def build(trunk, by_task=True):
    ranges, start = {}, 0
    for name, width in INPUTS.items():
        ranges[name], start = [slice(start, start + width)], start + width
    return build_shared(ModelConfig(trunk=trunk), ranges, 0, TASKS, by_task)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": {"v*": ["a"]}}, "no task 'v\\*'"),
        ({"columns": {"t*": ["d"]}}, "no input 'd'"),
        ({"columns": {"t*": []}}, "is empty"),
        ({"widths": []}, "at least one positive number"),
        ({"trunk": "MMoE"}, "several features"),
    ],
)
def test_stems_that_cannot_be_are_refused_in_one_line(options, words):
    with pytest.raises(UserError, match=words):
        build(Spec(class_path="TaskStems", init_args=options))


def test_rows_without_a_task_are_refused():
    with pytest.raises(UserError, match="only layouts routed and files have"):
        build(Spec(class_path="TaskStems"), by_task=False)

import numpy as np
import pytest
import torch

from mtrain.config import Config
from mtrain.data.batch import Grid, Pairs
from mtrain.model.kinds import Binary, Multiclass, Regression
from mtrain.model.trunks import build_shared
from mtrain.parallel.workload import workload
from mtrain.tasks import Task, TaskTable
from mtrain.train.loop import build_bank

TASKS = TaskTable(
    (
        Task("a", Regression()),
        Task("b", Binary()),
        *(Task(f"c{n}", Multiclass(), classes=tuple(map(str, range(n)))) for n in (3, 4, 40)),
    )
)
GRID = Grid(torch.zeros(50, 5))


def config(members=1, hidden=(), batch=20, freeze=(), toward_shared=0.0):
    return Config.model_validate(
        {
            "data": {"path": "table.csv", "layout": "grid"},
            "model": {
                "trunk": {"class_path": "MLP", "init_args": {"widths": [6], "members": members}},
                "head": {"hidden": list(hidden), "toward_shared": toward_shared},
            },
            "train": {"global_batch": batch},
            "freeze": list(freeze),
        }
    )


def of(config, labels=GRID, sampling_T=None):
    return workload(TASKS, labels, config, build_shared(config.model, 3, 0), sampling_T)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("hidden", [(), (5,), (5, 2)])
def test_sizes_are_those_of_the_heads_that_would_be_built(members, hidden):
    given = config(members, hidden, toward_shared=1.0)
    shared = build_shared(given.model, 3, 0)
    bank = build_bank(TASKS, given, shared)
    of_task = [0] * len(TASKS)
    for head, module in bank.to_modules().items():
        of_task[TASKS.names.index(head.split(",")[0])] += sum(p.numel() for p in module.parameters())
    work = of(given)
    assert work.head_params_T.tolist() == of_task
    assert work.shared_params == sum(p[0].numel() for p in bank.parameters())
    assert work.width == shared(torch.zeros(1, 3)).numel()
    assert work.trunk_params == work.trunk_trained == sum(p.numel() for p in shared.parameters())


def test_every_head_reads_every_row_of_a_grid():
    work = of(config(batch=20))
    assert (work.by_task, work.batch, work.rows_T.tolist()) == (False, 20, [20.0] * 5)


def test_a_batch_is_no_larger_than_the_rows_of_a_grid():
    work = of(config(batch=200))
    assert (work.batch, work.rows_T.tolist()) == (50, [50.0] * 5)


def test_pairs_count_labels():
    task_P = torch.tensor([0, 0, 1, 4])
    labels = Pairs.of(torch.tensor([0, 1, 1, 3]), task_P, torch.zeros(4), None, 4, 5)
    assert of(config(batch=2), labels).rows_T.tolist() == [1.0, 0.5, 0.0, 0.0, 0.5]


def test_rows_drawn_by_task_follow_the_sampler():
    work = of(config(batch=200), sampling_T=np.array([0.5, 0.25, 0.25, 0.0, 0.0]))
    assert (work.by_task, work.batch, work.rows_T.tolist()) == (True, 200, [100.0, 50.0, 50.0, 0.0, 0.0])


def test_what_is_frozen_is_not_trained():
    assert of(config(freeze=["trunk"])).trunk_trained == 0
    assert not of(config(freeze=["heads"])).heads_trained
    assert of(config()).shared_params == 0

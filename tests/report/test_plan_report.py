"""What `mtrain plan` prints."""

from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import yaml
from rich.console import Console

from mtrain.config import load_config
from mtrain.errors import UserError
from mtrain.parallel.plan import Workload
from mtrain.report.plan import head_memory, print_plan, show_plan

WORK = Workload(
    [f"task {i}" for i in range(100)],
    np.array([600.0, *[4.0] * 99]),
    np.full(100, 65_000),
    True,
    batch=996,
    width=1024,
    trunk_params=1_000_000,
    trunk_trained=1_000_000,
)


def printed(show, *arguments, **more):
    file = StringIO()
    show(*arguments, console=Console(file=file, width=140), **more)
    return file.getvalue()


def cells(text, first):
    """What follows `first` in the line that begins with it."""
    return next(line.removeprefix(first).split() for line in text.splitlines() if line.startswith(first))


def test_ranks_hot_tasks_and_bytes_are_shown():
    text = printed(print_plan, WORK, 4, None)
    assert "100 tasks on 4 ranks: 1,000,000 parameters in the trunk (replicated by DDP), 6,500,000 in the heads" in text
    assert "mode owners: rows at their owners would give the busiest rank 2.4 x the mean work, with 1 hot task it is" in text
    assert "hot tasks, on every rank: task 0\n" in text
    # 25 tasks and the hot one; 150 of its 600 rows and 4 of each other task
    assert cells(text, "0 ") == ["26", "1,690,000", "13.5", "MB", "27", "MB", "250.0", "250.0", "1.00"]
    assert cells(text, "3 ")[:2] == ["25", "1,625,000"]
    assert cells(text, "trunk gradients") == ["all-reduce", "6", "MB", "13.3%"]
    assert cells(text, "hot heads") == ["all-reduce", "390", "kB", "0.9%"]
    assert cells(text, "plain DDP of trunk and all heads") == ["all-reduce", "45", "MB"]
    assert [line.split()[0] for line in text.splitlines()[-4:]] == ["8", "64", "512", "4096"]


def test_of_many_ranks_the_first_and_the_extremes_are_shown():
    text = printed(print_plan, WORK, 64, None)
    assert "mode exchange: rows at their owners would give the busiest rank 38.6 x the mean work, more than 1.2\n" in text
    assert cells(text, "0 ")[:2] == ["1", "65,000"]
    assert "\n8  " not in text.split("sent in a step")[0]
    assert cells(text, "least of 64")[0] == "1"
    assert cells(text, "most of 64")[0] == "2"
    assert cells(text, "mean of 64")[-3:] == ["15.6", "15.6", "1.00"]


def test_ranks_without_rows_are_told():
    assert "with 996 rows a step, at least 3100 ranks have none" in printed(print_plan, WORK, 4096, None)


def test_a_sharded_trunk_gathers_its_parameters():
    text = printed(print_plan, WORK, 4, None, fsdp=True)
    assert cells(text, "trunk parameters") == ["all-gather", "6", "MB", "13.3%"]
    assert cells(text, "trunk gradients") == ["reduce-scatter", "3", "MB", "6.7%"]


def test_memory_is_what_the_trunk_leaves():
    assert head_memory(WORK, 4, None) is None
    assert head_memory(WORK, 4, 0.1) == 100e6 - 16e6
    assert head_memory(WORK, 4, 0.1, fsdp=True) == 100e6 - 4e6
    assert head_memory(replace(WORK, trunk_trained=0), 4, 0.1) == 100e6 - 4e6
    with pytest.raises(UserError, match=r"^--memory 0.016: the trunk takes 0.016 GB of a rank .* shard the trunk"):
        head_memory(WORK, 4, 0.016)


def test_heads_that_do_not_fit_are_told_for_this_number_of_ranks_and_for_others():
    text = printed(print_plan, WORK, 100, 0.018)
    assert cells(text, "8 ") == ["does", "not", "fit"]
    assert cells(text, "512 ")[0] == "exchange"
    with pytest.raises(UserError, match=r"2 ranks with 0.002 GB each .* 0.0523 GB or 100 ranks would do$"):
        print_plan(WORK, 2, 0.018, Console(file=StringIO()))


@pytest.fixture
def config_path(tmp_path):
    """Five tasks in one long table: task t has 20 * (t + 1) rows."""
    rng = np.random.default_rng(0)
    rows = [(*rng.normal(size=2), rng.normal(), t) for t in range(5) for _ in range(20 * (t + 1))]
    (tmp_path / "table.csv").write_text("x0,x1,y,task\n" + "\n".join(f"{a},{b},{y},t{t}" for a, b, y, t in rows) + "\n")
    config = {
        "data": {"path": "table.csv", "layout": "routed", "task": "task", "label": "y"},
        "inputs": {"x*": "Numeric"},
        "tasks": {"kind": "regression"},
        "split": {"by": "within_task", "parts": {"train": 0.5, "valid": 0.25, "test": 0.25}},
        "model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [8]}}, "head": {"hidden": [3]}},
        "train": {"global_batch": 30},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_config_is_planned_from_its_data(config_path):
    text = printed(show_plan, load_config(config_path), config_path.parent, 3, None)
    assert "5 tasks on 3 ranks: 24 parameters in the trunk (replicated by DDP), 155 in the heads, 30 rows a step" in text
    assert "mode owners: rows at their owners give the busiest rank 1.00 x the mean work" in text
    # shares of 10, 20, .. 50 rows of 150; t4 alone, t3 with t0, t2 with t1
    assert cells(text, "0 ") == ["1", "31", "248", "B", "496", "B", "10.0", "10.0", "1.00"]
    assert cells(text, "1 ") == ["2", "62", "496", "B", "992", "B", "10.0", "10.0", "1.00"]
    assert cells(text, "losses") == ["all-reduce", "112", "B", "11.7%"]
    assert cells(text, "plain DDP of trunk and all heads") == ["all-reduce", "955", "B"]


def test_a_number_of_ranks_that_cannot_be_is_refused(config_path):
    with pytest.raises(UserError, match="--ranks is 0, expected 1 to 100,000"):
        show_plan(load_config(config_path), config_path.parent, 0, None, Console(file=StringIO()))

import json
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from mtrain.config import load_config
from mtrain.data import partition as module
from mtrain.data.files import open_tasks
from mtrain.data.partition import partition
from mtrain.data.prepare import prepare, read_source
from mtrain.data.task_table import read_task_table
from mtrain.errors import UserError
from mtrain.report import progress

LONG = {"layout": "routed", "task": "task", "label": "y"}


def long_frame(rows=300, tasks=7, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "id": np.arange(rows),
            "task": [f"t{t}" for t in rng.integers(0, tasks, rows)],
            "x": rng.normal(size=rows),
            "word": rng.choice(["a", "b", "ccc"], rows),
            "y": rng.integers(0, 2, rows).astype(float),
        }
    )


def config_of(folder, data, **rest):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"data": {"root": str(folder), **data}, **rest}))
    return load_config(path)


def save(frame, path, row_group=32):
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False, row_group_size=row_group)
    return path.name


def run(config, output, **options):
    out = StringIO()
    partition(config, None, output, Console(file=out, width=200), **options)
    return out.getvalue()


def read(output):
    """Each task's rows, by the task table."""
    table = pq.read_table(output / "tasks.parquet").to_pylist()
    return {row["name"]: pd.read_parquet(output / row["data"]) for row in table}


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_rows(found, expected):
    pd.testing.assert_frame_equal(found.reset_index(drop=True), expected.reset_index(drop=True), check_dtype=False)


# Long tables.


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("memory", [300, 5_000, 1e8])
def test_each_task_has_its_rows_in_the_order_of_the_source(tmp_path, kind, memory):
    frame = long_frame()
    config = config_of(tmp_path, {**LONG, "path": save(frame, tmp_path / f"long.{kind}"), "chunk_rows": 50})
    text = run(config, tmp_path / "out", memory=memory, row_group=16)
    assert "300 rows of 7 tasks" in text
    found = read(tmp_path / "out")
    assert list(found) == list(frame["task"].unique())
    for name, rows in frame.groupby("task"):
        assert_rows(found[name], rows.drop(columns="task"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.yaml", "partition.json", "tasks", "tasks.parquet"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    task=st.lists(st.sampled_from(["a", "A", "b/c", "ü"]), min_size=1, max_size=60),
    chunk=st.integers(1, 20),
    groups=st.integers(1, 20),
    memory=st.integers(1, 2000),
    row_group=st.integers(1, 9),
)
def test_any_chunks_and_budget_give_the_groups_of_pandas(tmp_path_factory, task, chunk, groups, memory, row_group):
    folder = tmp_path_factory.mktemp("any")
    frame = pd.DataFrame({"x": np.arange(len(task)), "task": task, "y": np.arange(len(task)) % 3})
    config = config_of(folder, {**LONG, "path": save(frame, folder / "long.parquet", groups), "chunk_rows": chunk})
    run(config, folder / "out", memory=memory, row_group=row_group)
    found = read(folder / "out")
    assert set(found) == set(task)
    for name, rows in frame.groupby("task"):
        assert_rows(found[name], rows.drop(columns="task"))
    for row in pq.read_table(folder / "out" / "tasks.parquet").to_pylist():
        about = pq.read_metadata(folder / "out" / row["data"])
        sizes = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
        assert all(size == row_group for size in sizes[:-1])
        assert 1 <= sizes[-1] <= row_group


def test_only_used_columns_of_the_selected_tasks_are_written(tmp_path):
    frame = long_frame()
    config = config_of(
        tmp_path,
        {**LONG, "path": save(frame, tmp_path / "long.parquet"), "key": "id"},
        inputs={"wo*": "OneHot"},
        tasks={"labels": {"exclude": ["t3"]}, "by_name": {"t[12]": {"kind": "binary"}, "t2": {"weight": 2}}},
    )
    run(config, tmp_path / "out")
    found = read(tmp_path / "out")
    assert set(found) == set(frame["task"]) - {"t3"}
    assert list(found["t1"].columns) == ["id", "word", "y"]
    sources = read_task_table(tmp_path / "out" / "tasks.parquet", config.data)
    assert {(source.name, source.label) for source in sources} == {(name, "y") for name in found}
    assert load_config(tmp_path / "out" / "config.yaml").tasks.by_name == config.tasks.by_name


def test_types_that_widen_from_file_to_file_are_joined(tmp_path):
    for i, values in enumerate([[1, 2], [0.5, None], [None, None]]):
        pq.write_table(pa.table({"task": ["a", "b"], "x": pa.array(values), "y": [0, 1]}), tmp_path / f"{i}.parquet")
    config = config_of(tmp_path, {**LONG, "path": "*.parquet"})
    run(config, tmp_path / "out", memory=10)
    found = read(tmp_path / "out")
    np.testing.assert_array_equal(found["a"]["x"], [1, 0.5, np.nan])
    assert {frame["x"].dtype for frame in found.values()} == {np.dtype(float)}


def test_splits_of_the_source_stay_splits(tmp_path):
    frame = long_frame()
    save(frame[:200], tmp_path / "train.csv")
    save(frame[200:], tmp_path / "test.csv")
    config = config_of(tmp_path, {**LONG, "path": {"train": "train.csv", "test": "test.csv"}}, split={"by": "sources"})
    run(config, tmp_path / "out", memory=1000)
    source = read_source(load_config(tmp_path / "out" / "config.yaml"), tmp_path / "out")
    parts = prepare(source, 0).split_rows
    ids = source.table.read(["id"])["id"].to_numpy()
    assert sorted(ids[parts["test"]]) == list(range(200, 300))


def test_odd_task_names_get_files_of_their_own(tmp_path):
    names = [
        "a/b",
        "a",
        "A",
        "..",
        ".hidden",
        "ü",
        "x" * 5000,
        "x" * 5000 + "y",
        "a;b*?[c]",
        "50%",
        "%2E%2E",
        "-",
        "CON",
        "a\nb",
    ]
    frame = pd.DataFrame({"x": np.arange(len(names) * 3.0), "task": names * 3, "y": [0, 1, 0] * len(names)})
    config = config_of(tmp_path, {**LONG, "path": save(frame, tmp_path / "long.parquet")})
    run(config, tmp_path / "out")
    files = [path.name for path in (tmp_path / "out" / "tasks").iterdir()]
    assert len({name.lower() for name in files}) == len(names)
    assert max(map(len, files)) < 200
    opened = open_tasks(load_config(tmp_path / "out" / "config.yaml"), tmp_path / "out")
    assert [source.name for source in opened.sources] == names
    for name, first, last in zip(names, opened.first_T, opened.first_T[1:], strict=False):
        found = opened.table.read(["x"])["x"].to_numpy()[first:last]
        np.testing.assert_array_equal(found, frame["x"][frame["task"] == name])


def test_no_more_rows_are_held_than_the_budget_allows(tmp_path, monkeypatch):
    frame = long_frame(4000, 20)[["task", "x", "y"]]
    config = config_of(tmp_path, {**LONG, "path": save(frame, tmp_path / "long.parquet", 100), "chunk_rows": 100})
    held = []
    write = module._write_spill

    def counted(path, end, source, tasks, parts):
        held.append(sum(map(len, parts)))
        write(path, end, source, tasks, parts)

    monkeypatch.setattr(module, "_write_spill", counted)
    run(config, tmp_path / "out", memory=2 * 12_000, row_group=64)  # a row takes about 25 bytes
    assert len(held) >= 5
    assert max(held) <= 900
    assert sum(map(len, read(tmp_path / "out").values())) == 4000


# Grids.


def grid_frame(rows=120, seed=0):
    rng = np.random.default_rng(seed)
    grid = pd.DataFrame({"x1": rng.normal(size=rows), "x2": rng.choice(["u", "v"], rows), "unused": 1})
    for t in range(5):
        grid[f"n{t}"] = np.where(rng.random(rows) < 0.2, rng.integers(0, 2, rows).astype(float), np.nan)
    grid["n5"] = np.where(rng.random(rows) < 0.5, -1, 0.25)
    grid["n6"] = np.nan
    grid["text"] = rng.choice(["low", "high", "", " ? ", "-1"], rows)
    return grid


GRID = {"layout": "grid", "missing_labels": [-1, "?"]}
LABELS = {"include": ["n*", "text"]}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("memory", [2000, 1e8])
def test_a_grid_gives_a_row_for_each_label_that_is_there(tmp_path, kind, memory):
    frame = grid_frame()
    config = config_of(
        tmp_path,
        {**GRID, "path": save(frame, tmp_path / f"grid.{kind}"), "chunk_rows": 50},
        inputs={"x?": {"class_path": "OneHot"}},
        tasks={"labels": LABELS, "by_name": {"n*": {"weight": 0.5}, "n6": {"weight": 2.0}}},
    )
    text = run(config, tmp_path / "out", memory=memory, row_group=8)
    assert "1 tasks have no label and are left out: n6" in text
    found = read(tmp_path / "out")
    assert list(found) == ["n0", "n1", "n2", "n3", "n4", "n5", "text"]
    for name, rows in found.items():
        there = frame[name].isin(["low", "high"]) if name == "text" else frame[name].notna() & (frame[name] != -1)
        assert_rows(rows, frame.loc[there, ["x1", "x2"]].assign(__row__=np.flatnonzero(there), label=frame.loc[there, name]))
    written = load_config(tmp_path / "out" / "config.yaml")
    assert list(written.tasks.by_name) == ["n*"]
    assert written.data.key == "__row__"


def test_the_written_config_has_the_tasks_kinds_and_labels_of_the_grid(tmp_path):
    frame = grid_frame(400).drop(columns=["n6", "unused"])
    frame["entity"] = np.arange(400) // 2
    config = config_of(
        tmp_path,
        {**GRID, "path": save(frame, tmp_path / "grid.csv"), "key": "entity"},
        tasks={"labels": LABELS},
        model={"trunk": "Identity"},
        train={"epochs": 2},
    )
    run(config, tmp_path / "out", memory=20_000)
    written = load_config(tmp_path / "out" / "config.yaml")
    assert (written.data.layout, written.data.key, written.train, written.model) == (
        "files", "entity", config.train, config.model,
    )  # fmt: skip
    before, after = read_source(config), read_source(written)
    assert after.labels.tasks.names == before.labels.tasks.names
    assert [task.kind for task in after.labels.tasks] == [task.kind for task in before.labels.tasks]
    assert [task.classes for task in after.labels.tasks] == [task.classes for task in before.labels.tasks]
    for t in range(len(before.labels.tasks)):
        np.testing.assert_array_equal(after.labels.y_P[after.labels.task_P == t], before.labels.y_P[before.labels.task_P == t])
    parts = prepare(after, 0).split_rows
    entity = after.table.read(["entity"])["entity"].to_numpy()
    assert not set(entity[parts["train"]]) & set(entity[parts["test"]])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), rows=st.integers(1, 30), tasks=st.integers(1, 6), memory=st.integers(1, 3000), chunk=st.integers(1, 9))
def test_a_grid_of_any_shape_is_unpivoted_as_by_melt(tmp_path_factory, data, rows, tasks, memory, chunk):
    folder = tmp_path_factory.mktemp("any")
    cell = st.sampled_from([None, 0.0, 1.0, 2.5])
    columns = {f"t{t}": pa.array(data.draw(st.lists(cell, min_size=rows, max_size=rows)), pa.float64()) for t in range(tasks)}
    columns["t0"] = pa.array([1.0, *columns["t0"].to_pylist()[1:]])
    pq.write_table(pa.table({"x": np.arange(rows), **columns}), folder / "grid.parquet", row_group_size=chunk)
    config = config_of(folder, {"path": "grid.parquet", "layout": "grid", "chunk_rows": chunk}, tasks={"labels": ["t*"]})
    run(config, folder / "out", memory=memory)
    frame = pd.read_parquet(folder / "grid.parquet")
    melted = frame.melt("x", var_name="task", value_name="label").dropna()
    found = read(folder / "out")
    assert list(found) == list(melted["task"].unique())
    for name, own in melted.groupby("task"):
        assert_rows(found[name][["x", "label"]], own[["x", "label"]])


def test_columns_that_are_added_have_names_of_their_own(tmp_path):
    frame = pd.DataFrame({"label": [1.0, 2.0], "__row__": [5.0, 6.0], "t": [0, 1]})
    config = config_of(tmp_path, {"layout": "grid", "path": save(frame, tmp_path / "grid.csv")}, tasks={"labels": ["t"]})
    run(config, tmp_path / "out")
    assert list(read(tmp_path / "out")["t"].columns) == ["label", "__row__", "__row__2", "label2"]
    source = read_source(load_config(tmp_path / "out" / "config.yaml"), tmp_path / "out")
    assert sorted(name for item in source.features for name in item.columns) == ["__row__", "label"]


def test_text_that_looks_like_numbers_stays_text_and_numbers_keep_every_digit(tmp_path):
    grid = pa.table({"x": [0, 1, 2], "code": ["01", "1", None], "y": [0.1 + 0.2, None, 1e-300], "b": [True, None, False]})
    pq.write_table(grid, tmp_path / "grid.parquet")
    config = config_of(tmp_path, {"path": "grid.parquet", "layout": "grid"}, tasks={"labels": ["code", "y", "b"]})
    run(config, tmp_path / "out")
    found = {name: rows["label"].tolist() for name, rows in read(tmp_path / "out").items()}
    assert found == {"code": ["01", "1"], "y": [0.1 + 0.2, 1e-300], "b": [1.0, 0.0]}


# Restarts.


class Killed(BaseException):
    pass


def kill_at(monkeypatch, call, name="replace"):
    """Stop before the given call, counted from 0."""
    left = [call]
    real = getattr(os, name)

    def stop(*args):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return real(*args)

    monkeypatch.setattr(module.os, name, stop)


@pytest.mark.parametrize("layout", ["long", "grid"])
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(tmp_path, monkeypatch, layout):
    if layout == "long":
        config = config_of(tmp_path, {**LONG, "path": save(long_frame(), tmp_path / "a.csv"), "chunk_rows": 50})
    else:
        path = save(grid_frame(), tmp_path / "a.parquet")
        config = config_of(
            tmp_path, {**GRID, "path": path, "chunk_rows": 50}, inputs={"x?": "OneHot"}, tasks={"labels": LABELS}
        )
    options = {"memory": 9000, "row_group": 16}
    run(config, tmp_path / "whole", **options)
    expected = content(tmp_path / "whole")
    del expected["config.yaml"]  # names its folder

    def killed(output, call):
        with monkeypatch.context() as patch:
            kill_at(patch, call)
            try:
                run(config, output, **options)
            except Killed:
                return True
        return False

    first = 0
    while killed(output := tmp_path / f"out{first}", first):
        if killed(output, 3):
            assert "rows of" in run(config, output, **options)
        found = content(output)
        assert str(output) in found.pop("config.yaml").decode()
        assert found == expected
        first += 1
    assert first > 12


def test_finished_parts_are_not_computed_again(tmp_path, monkeypatch):
    config = config_of(tmp_path, {**LONG, "path": save(long_frame(), tmp_path / "a.parquet"), "chunk_rows": 32})
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_config", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(config, tmp_path / "out", memory=3000)

    def never(*_):
        raise AssertionError("computed again")

    before = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    assert len(before) > 10
    monkeypatch.setattr(module, "_write_spill", never)
    run(config, tmp_path / "out", memory=3000)
    assert all(path.stat().st_ino == before[path] for path in (tmp_path / "out" / "tasks").iterdir())
    monkeypatch.setattr(module, "open_stream", never)
    assert "complete, nothing to do" in run(config, tmp_path / "out")


def test_files_cut_short_by_a_crash_are_written_again(tmp_path, monkeypatch):
    config = config_of(tmp_path, {**LONG, "path": save(long_frame(), tmp_path / "a.parquet"), "chunk_rows": 32})
    run(config, tmp_path / "whole", memory=3000)
    with monkeypatch.context() as patch:
        kill_at(patch, 12)
        with pytest.raises(Killed):
            run(config, tmp_path / "out", memory=3000)
    written = [*(tmp_path / "out" / ".spill").glob("*.arrow")][2:], [*(tmp_path / "out" / "tasks").glob("*.parquet")]
    for path in [each for group in written for each in group]:
        path.write_bytes(path.read_bytes()[:50])
    run(config, tmp_path / "out", memory=3000)
    assert content(tmp_path / "out" / "tasks") == content(tmp_path / "whole" / "tasks")


def test_a_killed_process_is_taken_up(tmp_path):
    config = config_of(tmp_path, {**LONG, "path": save(long_frame(), tmp_path / "a.parquet")})
    code = """
import os, signal, sys
from pathlib import Path
from rich.console import Console
from mtrain.config import load_config
from mtrain.data.partition import partition
left, real = [7], os.replace
def replace(*args):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*args)
os.replace = replace
partition(load_config(Path(sys.argv[1])), None, Path(sys.argv[2]), Console(), memory=3000)
"""
    words = [sys.executable, "-c", code, str(tmp_path / "config.yaml"), str(tmp_path / "out")]
    assert subprocess.run(words, capture_output=True, cwd=Path(module.__file__).parents[2]).returncode == -signal.SIGKILL
    run(config, tmp_path / "out", memory=3000)
    run(config, tmp_path / "whole", memory=3000)
    assert content(tmp_path / "out" / "tasks") == content(tmp_path / "whole" / "tasks")


# Mistakes.


@pytest.mark.parametrize("finished", [False, True])
def test_another_source_or_option_is_refused(tmp_path, monkeypatch, finished):
    frame = long_frame()
    config = config_of(tmp_path, {**LONG, "path": save(frame, tmp_path / "a.csv")})
    with monkeypatch.context() as patch:
        kill_at(patch, 100 if finished else 3)
        if finished:
            run(config, tmp_path / "out", memory=3000)
        else:
            with pytest.raises(Killed):
                run(config, tmp_path / "out", memory=3000)
    with pytest.raises(UserError, match=r"out: was begun with --rows 1024, now it is 7; choose another folder, or delete"):
        run(config, tmp_path / "out", row_group=7)
    with pytest.raises(UserError, match=r'was begun with data.label "y", now it is "x"'):
        run(config_of(tmp_path, {**LONG, "path": "a.csv", "label": "x"}), tmp_path / "out")
    frame.loc[0, "word"] = "longer"
    save(frame, tmp_path / "a.csv")
    with pytest.raises(UserError, match=r'was begun with source "1 files, 9,\d+ bytes, changed .*", now it is "1 files'):
        run(config, tmp_path / "out")


def test_a_folder_with_other_files_is_refused(tmp_path):
    config = config_of(tmp_path, {**LONG, "path": save(long_frame(), tmp_path / "a.csv")})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="full: holds other files, expected a new folder"):
        run(config, tmp_path / "full")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        run(config, tmp_path / "a.csv")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        run(config, tmp_path / "a.csv" / "out")
    with pytest.raises(UserError, match=r"lies in data\.path"):
        run(config_of(tmp_path, {**LONG, "path": str(tmp_path)}), tmp_path / "out")


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path, monkeypatch):
    config = config_of(tmp_path, {**LONG, "path": save(long_frame(), tmp_path / "a.csv")})
    with monkeypatch.context() as patch:

        def full(*_, **options):
            raise OSError(28, "No space left on device")

        patch.setattr(module.pq.ParquetWriter, "write_table", full)
        with pytest.raises(UserError, match=r"tasks/t\d.parquet: cannot be written: No space left on device; free space"):
            run(config, tmp_path / "out")
    assert "300 rows of 7 tasks" in run(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        ({}, {"task": "tusk"}, r"data.task: no column 'tusk' in the data; did you mean 'task'\?"),
        ({}, {"label": "z"}, "data.label: no column 'z'"),
        ({}, {"weight": "w"}, "data.weight: no column 'w'"),
        ({"task": ["a"] * 40 + [None] + ["b"] * 259}, {}, r"a\.parquet, row 41, column 'task': found no task name"),
        ({"task": ["a"] * 299 + [" "]}, {}, r"a\.parquet, row 300, column 'task': found no task name"),
        ({"task": ["a"] * 299 + ["a "]}, {}, "the tasks 'a' and 'a ' differ only in spaces"),
        ({"task": [["a"]] * 300}, {}, "expected text or whole numbers"),
    ],
)
def test_mistakes_of_long_tables(tmp_path, change, data, message):
    path = save(long_frame().assign(**change), tmp_path / "a.parquet")
    config = config_of(tmp_path, {**LONG, "path": path, "chunk_rows": 32, **data})
    with pytest.raises(UserError, match=message) as error:
        run(config, tmp_path / "out", memory=2000)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ({"tasks": {"labels": ["t9"]}}, "tasks.labels: 't9' matches no column or task"),
        ({"tasks": {"by_name": {"u*": {"weight": 1}}}}, r"tasks.by_name: 'u\*' matches no task"),
        ({"tasks": {"labels": {"exclude": ["t*"]}}}, "none of the 7 tasks of column 'task' is left"),
        ({"inputs": {"[xy]": "Standardize"}}, "column 'y' holds the labels"),
        ({"inputs": {"q": "Standardize"}}, "inputs: no column 'q' in the data"),
        ({"split": {"by": "time", "column": "when"}}, "split.column: no column 'when'"),
    ],
)
def test_mistakes_of_the_config_are_found_before_anything_is_written(tmp_path, rest, message):
    config = config_of(tmp_path, {**LONG, "path": save(long_frame(), tmp_path / "a.csv")}, **rest)
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_of_grids(tmp_path):
    path = save(grid_frame(), tmp_path / "grid.parquet")
    with pytest.raises(UserError, match="which columns are labels is not said"):
        run(config_of(tmp_path, {**GRID, "path": path}), tmp_path / "out")
    with pytest.raises(UserError, match="none of the 1 tasks has a label"):
        run(config_of(tmp_path, {**GRID, "path": path}, tasks={"labels": ["n6"]}), tmp_path / "out")
    for i, values in enumerate([[1.0, 2.0], ["a", "b"]]):
        pq.write_table(pa.table({"x": [1, 2], "t": values}), tmp_path / f"part{i}.parquet")
    with pytest.raises(UserError, match=r"column has two types in its files: .* Field t .* double vs string"):
        run(config_of(tmp_path, {**GRID, "path": "part*"}, tasks={"labels": ["t"]}), tmp_path / "out2")


def test_a_layout_of_files_needs_no_partition(tmp_path):
    config = config_of(tmp_path, {"layout": "files", "path": "folder", "label": "y"})
    with pytest.raises(UserError, match="each task has its files already"):
        run(config, tmp_path / "out")


def test_progress_is_plain_lines_where_there_is_no_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    config = config_of(tmp_path, {**LONG, "path": save(long_frame(), tmp_path / "a.parquet"), "chunk_rows": 32})
    lines = run(config, tmp_path / "out", memory=3000).splitlines()
    assert lines[0].startswith("reading: ")
    assert any(line.startswith("writing: 300 of 300 rows") for line in lines)
    assert lines[-1].startswith("300 rows of 7 tasks, ")
    assert json.loads((tmp_path / "out" / "partition.json").read_text())["finished"] == {"rows": 300, "tasks": 7}

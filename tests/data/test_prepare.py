from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize

from mtrain.config import TargetsConfig, check_config
from mtrain.data.batch import Grid, Pairs
from mtrain.data.features import Encoded, Feature
from mtrain.data.prepare import prepare, read_source
from mtrain.data.statistics import with_statistics
from mtrain.errors import UserError
from mtrain.model.kinds import Binary, Kind, Multiclass, Poisson, Quantile, Regression
from mtrain.parallel.shard import Shard
from mtrain.parallel.world import World
from mtrain.tasks import Task, TaskTable


def prepared(tmp_path, frame, tree, seed=0):
    frame.to_parquet(tmp_path / "t.parquet", row_group_size=tree["data"].get("chunk_rows"))
    tree = {**tree, "data": {"path": str(tmp_path / "t.parquet"), "workers": 1, **tree["data"]}}
    source = read_source(check_config(tree, "test"), Path("."))
    return source, prepare(source, seed)


def entries(part, tasks):
    """{(input row, task): label in original units} of a part, by a plain loop."""
    center_T, scale_T = tasks.stats["center"], tasks.stats["scale"]
    pairs = part.labels.pairs()
    return {
        (int(part.row_R[row]), tasks[int(t)].name): float(y) * scale_T[t] + center_T[t]
        for row, t, y in zip(pairs.row_P, pairs.task_P, pairs.y_P, strict=True)
    }


def assert_same_entries(found, wanted):
    assert found.keys() == wanted.keys()
    for at, y in wanted.items():
        assert found[at] == pytest.approx(y, rel=1e-5, abs=1e-5)


def grid_frame(rows=200, missing=0.6, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"x1": rng.normal(5, 3, rows), "x2": rng.normal(size=rows)})
    for t in range(6):
        frame[f"y{t}"] = np.where(rng.random(rows) < missing, np.nan, rng.normal(t, t + 1, rows))
    return frame


GRID = {"data": {"layout": "grid"}, "inputs": {"x*": "Numeric"}}


def test_a_column_that_tasks_are_derived_from_is_no_input(tmp_path):
    tree = {"data": {"layout": "grid"}, "tasks": {"labels": ["y0"], "derived": {"more": {"label": "y1"}}}}
    frame = grid_frame()[["x1", "y0", "y1"]]
    _, data = prepared(tmp_path, frame, tree)
    assert data.tasks.names == ["y0", "more"]
    assert [item.columns for item in data.features] == [["x1"]]
    found = entries(data.parts["train"], data.tasks)
    values = frame["y1"][data.split_rows["train"]].dropna().to_dict()
    assert_same_entries({at: y for at, y in found.items() if at[1] == "more"}, {(row, "more"): y for row, y in values.items()})
    tree = GRID | {"tasks": {"labels": ["y0"], "derived": {"more": {"label": "x1"}}}}
    with pytest.raises(UserError, match=r"tasks.labels: column 'x1' is also an input"):
        prepared(tmp_path, frame, tree)


def test_the_parts_of_a_grid_hold_exactly_its_labels(tmp_path):
    frame = grid_frame()
    _, data = prepared(tmp_path, frame, GRID)
    assert {name: len(units) for name, units in data.split_rows.items()} == {"train": 160, "valid": 20, "test": 20}
    for name, part in data.parts.items():
        assert isinstance(part.labels, Grid)
        wanted = {
            (int(row), f"y{t}"): frame[f"y{t}"][row]
            for row in data.split_rows[name]
            for t in range(6)
            if not np.isnan(frame[f"y{t}"][row])
        }
        assert_same_entries(entries(part, data.tasks), wanted)


def test_inputs_and_targets_are_fitted_on_training_rows_only(tmp_path):
    frame = grid_frame()
    _, data = prepared(tmp_path, frame, GRID)
    train = data.split_rows["train"]
    x = frame[["x1", "x2"]].to_numpy()
    naive = (x - x[train].mean(0)) / x[train].std(0)
    np.testing.assert_allclose(data.inputs.x_NF.numpy(), naive, atol=1e-5)
    changed = frame.copy()
    others = np.setdiff1d(np.arange(len(frame)), train)
    changed.loc[others, ["x1", "x2", "y0"]] *= 1000
    _, again = prepared(tmp_path, changed, GRID)
    torch.testing.assert_close(again.inputs.x_NF[train], data.inputs.x_NF[train])
    for name in ("center", "scale", "mean", "std", "train_labels", "constant_deviance"):
        np.testing.assert_array_equal(again.tasks.stats[name], data.tasks.stats[name])


def long_frame(rows=400, tasks=5, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"x1": rng.normal(size=rows), "task": [f"t{t}" for t in rng.integers(0, tasks, rows)]})
    return frame.assign(y=rng.normal(3, 2, rows), w=rng.random(rows) + 0.5)


ROUTED = {"data": {"layout": "routed", "task": "task", "label": "y"}, "inputs": {"x1": "Numeric"}}


def test_routed_parts_hold_each_row_once_with_its_task_label_and_weight(tmp_path):
    frame = long_frame()
    frame.loc[3::7, "y"] = np.nan
    tree = ROUTED | {"data": ROUTED["data"] | {"weight": "w"}, "split": {"by": "within_task"}}
    _, data = prepared(tmp_path, frame, tree)
    kept = np.flatnonzero(frame.y.notna())
    assert len(data.inputs.x_NF) == len(kept)
    for name, part in data.parts.items():
        assert isinstance(part.labels, Pairs)
        rows = data.split_rows[name]
        assert kept[part.row_R].tolist() == rows.tolist()
        wanted = {(int(at), frame.task[row]): frame.y[row] for at, row in zip(part.row_R, rows, strict=True)}
        assert_same_entries(entries(part, data.tasks), wanted)
        np.testing.assert_allclose(part.labels.weight_P, frame.w[rows], rtol=1e-6)


def pairs_frame(keys=60, tasks=8, share=0.5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=keys)
    rows = [(k, t) for k in range(keys) for t in range(tasks) if rng.random() < share]
    rng.shuffle(rows)
    k, t = np.array(rows).T
    return pd.DataFrame({"id": [f"k{i}" for i in k], "x1": x[k], "task": [f"t{i}" for i in t], "y": rng.normal(size=len(k))})


PAIRS = {"data": {"layout": "pairs", "task": "task", "label": "y", "key": "id"}, "inputs": {"x1": "Numeric"}}


@pytest.mark.parametrize("by", ["random", "within_task"])
def test_pairs_have_one_input_for_each_key_and_a_split_of_labels(tmp_path, by):
    frame = pairs_frame()
    source, data = prepared(tmp_path, frame, PAIRS | {"split": {"by": by}})
    order = list(dict.fromkeys(frame.id))
    assert source.num_inputs == len(data.inputs.x_NF) == len(order)
    first = frame.drop_duplicates("id").x1.to_numpy()
    np.testing.assert_allclose(np.corrcoef(data.inputs.x_NF[:, 0], first)[0, 1], 1)
    seen = {}
    for name, part in data.parts.items():
        units = data.split_rows[name]
        wanted = {(order.index(frame.id[u]), frame.task[u]): frame.y[u] for u in units}
        assert_same_entries(entries(part, data.tasks), wanted)
        for unit in units:
            seen.setdefault(frame.id[unit], set()).add(name)
    assert sum(len(units) for units in data.split_rows.values()) == len(frame)
    assert by == "within_task" or all(len(parts) == 1 for parts in seen.values())


@pytest.mark.parametrize(("share", "container"), [(0.5, Grid), (0.015, Pairs)])
def test_pairs_are_kept_as_a_grid_unless_very_sparse(tmp_path, share, container):
    _, data = prepared(tmp_path, pairs_frame(100, 300, share), PAIRS)
    assert isinstance(data.parts["train"].labels, container)


def test_a_grid_and_the_same_table_as_pairs_give_the_same_tensors(tmp_path):
    wide = grid_frame(missing=0.3).assign(id=[f"k{i}" for i in range(200)])
    wide["part"] = np.where(np.arange(200) % 5 == 0, "test", "train")
    long = wide.melt(["id", "x1", "x2", "part"], var_name="task", value_name="y").sort_values(
        "id", key=lambda s: s.str[1:].astype(int)
    )
    split = {"by": "column", "column": "part", "parts": {"train": "train", "test": "test"}}
    targets = {"objective": {"targets": {"shrink": 3}}}
    _, grid = prepared(tmp_path, wide, GRID | targets | {"split": split, "tasks": {"labels": "y*"}})
    _, pairs = prepared(tmp_path, long.reset_index(drop=True), PAIRS | targets | {"split": split, "inputs": {"x*": "Numeric"}})
    order = [pairs.tasks.names.index(name) for name in grid.tasks.names]
    for part in ("train", "test"):
        assert isinstance(pairs.parts[part].labels, Grid)
        torch.testing.assert_close(pairs.parts[part].labels.y_BT[:, order], grid.parts[part].labels.y_BT, equal_nan=True)
    torch.testing.assert_close(pairs.inputs.x_NF, grid.inputs.x_NF)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("base", [GRID, PAIRS], ids=["grid", "pairs"])
def test_inputs_by_the_chunk_are_those_in_memory(tmp_path, base, streaming):
    frame = grid_frame() if base is GRID else pairs_frame()
    frame.iloc[3, frame.columns.get_loc("x1")] = np.nan if base is GRID else frame.x1[3]
    frame["c"] = np.random.default_rng(0).choice(["a", "b", "c"], len(frame)) if base is GRID else frame.id.str[-1]
    tree = base | {"inputs": {"x*": "Numeric", "c": "Categorical"}}
    _, memory = prepared(tmp_path, frame, tree)
    by_chunk = {"streaming": streaming, "chunk_rows": 7, "memory_gb": 1e-6}
    if not streaming:  # too large for the memory that is allowed
        frame = pd.concat([frame] * (20_000 // len(frame) + 1), ignore_index=True)
        frame["id"] = [f"k{i}" for i in range(len(frame))]
        tree = tree | {"tasks": {"labels": "y*"}} if base is GRID else tree
        _, memory = prepared(tmp_path, frame, tree)
        by_chunk["chunk_rows"] = 997
    source, chunked = prepared(tmp_path, frame, tree | {"data": tree["data"] | by_chunk})
    assert source.chunked
    assert not chunked.inputs.in_memory
    assert chunked.split_hash == memory.split_hash
    every = np.random.default_rng(0).permutation(source.num_inputs)
    x_NF, ok = chunked.inputs.gather(every)
    assert ok is None
    torch.testing.assert_close(x_NF, memory.inputs.x_NF[every], rtol=1e-6, atol=1e-6)
    for name in memory.parts:
        assert_same_entries(entries(chunked.parts[name], chunked.tasks), entries(memory.parts[name], memory.tasks))


def test_features_are_fitted_on_some_chunks_where_there_are_many(tmp_path):
    frame = grid_frame(rows=1000)
    few = {"data": {"layout": "grid", "streaming": True, "chunk_rows": 10, "fit_rows": 100}}
    frame["part"] = np.where(np.arange(len(frame)) % 2, "test", "train")
    frame.loc[frame.part == "test", "x1"] = 1e6  # never looked at
    split = {"by": "column", "column": "part", "parts": {"train": "train", "test": "test"}}
    _, data = prepared(tmp_path, frame, GRID | few | {"split": split, "tasks": {"labels": "y*"}})
    assert any("inputs are fitted on 100 of 500 training rows" in note for note in data.notes)
    train, _ = data.inputs.gather(data.parts["train"].row_R.numpy())
    assert abs(train.mean()) < 0.3
    assert 0.7 < train.std() < 1.3


class Slow(Feature):
    """Length and first letter of a text, and a note of how many texts were looked at."""

    cached = True
    looked_at: ClassVar[list[int]] = []

    def encode(self, table):
        texts = table.column(0).to_pylist()
        self.looked_at.append(len(texts))
        return Encoded(np.array([[len(t), ord(t[0])] for t in texts], np.float32), np.ones(len(texts), bool))


@pytest.mark.parametrize("values", [7, 300])
def test_a_slow_feature_is_computed_once_for_each_value_that_repeats(tmp_path, monkeypatch, values):
    rng = np.random.default_rng(0)
    texts = [chr(97 + i % 26) * (1 + i // 26) for i in range(values)]
    frame = pd.DataFrame({"s": rng.permutation(np.resize(texts, 300)), "task": np.repeat(["a", "b", "c"], 100)})
    frame["y"] = np.where(rng.random(300) < 0.1, np.nan, rng.normal(size=300))
    frame.loc[5, ["s", "y"]] = "only here", np.nan
    tree = {"data": {"layout": "routed", "task": "task", "label": "y"}, "inputs": {"s": "test_prepare.Slow"}}
    _, memory = prepared(tmp_path, frame, tree)
    Slow.looked_at.clear()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another cache")
    source, chunked = prepared(tmp_path, frame, tree | {"data": tree["data"] | {"streaming": True, "chunk_rows": 20}})
    x_NF, ok = chunked.inputs.gather(np.arange(source.num_inputs))
    assert ok is None
    torch.testing.assert_close(x_NF, memory.inputs.x_NF)
    assert max(Slow.looked_at) <= (7 if values == 7 else 20)
    assert sum(Slow.looked_at) == 7 or values > 7


def test_too_little_memory_for_the_chunks_in_use_is_said(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x1": rng.normal(size=600), "task": np.repeat(["a", "b", "c"], 200), "y": rng.normal(size=600)})
    tree = {"data": {"layout": "routed", "task": "task", "label": "y", "streaming": True, "chunk_rows": 50}}
    for memory, said in ((4 * 150 / 1e9, False), (4 * 149 / 1e9, True)):  # 50 rows of each of three tasks
        data = {"data": tree["data"] | {"memory_gb": memory}, "inputs": {"x1": "Numeric"}}
        _, result = prepared(tmp_path, frame, data)
        assert any("chunks that are in use at once" in note for note in result.notes) == said


def test_rows_that_cannot_be_used_have_zeros_and_no_labels_in_batches_by_the_chunk(tmp_path):
    frame = grid_frame()
    frame["x1"] = frame["x1"].abs() + 0.1
    frame.loc[[5, 50, 77], "x1"] = -1.0
    tree = {"data": {"layout": "grid", "streaming": True, "chunk_rows": 10}, "inputs": {"x1": "test_prepare.Positive"}}
    tree |= {"tasks": {"labels": "y*"}}
    _, data = prepared(tmp_path, frame, tree)
    shard, seen, unused = Shard.replicated(World(), data.tasks.names), [], []
    for part in data.parts.values():
        for batch, original in part.batches(data.inputs, 32, shard, False):
            for labels in filter(None, (batch.labels, original)):
                labelled = labels.y_BT.isfinite().any(1)
                assert labelled.tolist() == [row not in (5, 50, 77) for row in batch.row_B.tolist()]
            unused += batch.row_B[~labelled].tolist()
            assert not batch.x_BF[~labelled].any()
            assert batch.x_BF[labelled].all()
            seen += batch.row_B.tolist()
    with_label = np.flatnonzero(frame.filter(like="y").notna().any(axis=1))
    assert sorted(seen) == with_label.tolist()
    assert sorted(unused) == sorted({5, 50, 77} & set(with_label.tolist()))
    assert data.inputs.notes() == ["3 inputs cannot be used: their rows are left out"]
    with pytest.raises(UserError, match=r"[123] of 200 cannot be used, more than data.max_invalid"):
        prepared(tmp_path, frame, tree | {"data": tree["data"] | {"max_invalid": 0.0}})


@pytest.mark.parametrize("base", [GRID, PAIRS], ids=["grid", "pairs"])
def test_parts_that_are_scored_can_be_bounded_for_each_task(tmp_path, base):
    frame = grid_frame(missing=0.3) if base is GRID else pairs_frame(share=0.9)
    tree = base | {"split": {"parts": {"train": 0.5, "valid": 0.25, "test": 0.25}}}
    _, whole = prepared(tmp_path, frame, tree)
    _, some = prepared(tmp_path, frame, tree | {"split": tree["split"] | {"eval_rows": 7}})
    assert entries(some.parts["train"], some.tasks) == entries(whole.parts["train"], whole.tasks)
    for name in ("valid", "test"):
        kept, every = entries(some.parts[name], some.tasks), entries(whole.parts[name], whole.tasks)
        assert kept.items() <= every.items()
        assert some.parts[name].labels.count_T().tolist() == whole.parts[name].labels.count_T().clamp(max=7).tolist()


def test_a_repeated_measurement_is_kept_and_said(tmp_path):
    frame = pairs_frame()
    frame = pd.concat([frame, frame.iloc[:3].assign(y=9.0)], ignore_index=True)
    _, data = prepared(tmp_path, frame, PAIRS)
    assert sum(int(part.labels.count_T().sum()) for part in data.parts.values()) == len(frame)
    assert "3 labels have the same key and task as another; all count" in data.notes


def test_inputs_that_differ_for_one_key_are_refused_by_their_row_in_the_table(tmp_path):
    frame = pairs_frame()
    later = frame.index[frame.id == frame.id[10]][1]
    frame.loc[later, "x1"] = 99.0
    frame.loc[0, "y"] = np.nan  # an earlier row that is left out moves no row number
    with pytest.raises(UserError, match=rf"column 'x1', row {later + 1}: another value than in row \d+, .* '{frame.id[10]}'"):
        prepared(tmp_path, frame, PAIRS)


def test_messages_name_the_row_of_the_table_when_rows_without_labels_come_before(tmp_path):
    frame = long_frame()
    frame.loc[:9, "y"] = np.nan
    frame.loc[50, "x1"] = np.inf
    with pytest.raises(UserError, match="column 'x1', row 51: found inf"):
        prepared(tmp_path, frame, ROUTED)
    frame.loc[50, "x1"], frame.loc[60, "w"] = 0.0, -1.0
    with pytest.raises(UserError, match="column 'w', row 61: found -1"):
        prepared(tmp_path, frame, ROUTED | {"data": ROUTED["data"] | {"weight": "w"}})


class Positive(Feature):
    """A user's feature: rows with a negative number cannot be used."""

    def __init__(self, on_invalid: str = "skip"):
        self.on_invalid = on_invalid

    def encode(self, table):
        values = table.column(0).to_numpy()[:, None]
        return Encoded(np.asarray(values, np.float32), values[:, 0] >= 0)


@pytest.mark.parametrize("tree", [GRID, ROUTED, PAIRS], ids=["grid", "routed", "pairs"])
def test_rows_that_cannot_be_used_are_left_out_counted_and_limited(tmp_path, tree):
    frame = {"grid": grid_frame, "routed": long_frame, "pairs": pairs_frame}[tree["data"]["layout"]]()
    frame["x1"] = frame["x1"].abs()
    frame["other"] = np.arange(len(frame)) if "id" not in frame else frame.id.str[1:].astype(int)
    same = frame.id == frame.id[7] if "id" in frame else frame.index == 7
    frame.loc[same, "x1"] = -1.0
    tree = tree | {"inputs": {"x1": f"{__name__}.Positive", "other": f"{__name__}.Positive"}, "tasks": {}}
    if tree["data"]["layout"] == "grid":
        tree["tasks"] = {"labels": "y*"}
    _, data = prepared(tmp_path, frame, tree)
    assert any(note.startswith("1 of ") and "left out" in note for note in data.notes)
    assert (data.inputs.x_NF >= 0).all()
    kept = set(frame.other[~same])
    assert {int(value) for value in data.inputs.x_NF[:, 1]} == kept
    for name, part in data.parts.items():  # labels still belong to their inputs
        of = {int(v): row for row, v in enumerate(data.inputs.x_NF[:, 1].tolist())}
        for (row, task), y in entries(part, data.tasks).items():
            own = frame[frame.other == int(data.inputs.x_NF[row, 1])]
            found = own[task].to_numpy() if task in own else own.y[own.task == task].to_numpy()
            assert np.isclose(found, y, rtol=1e-4, atol=1e-4).any(), (name, of)
    frame.loc[: len(frame) // 3, "x1"] = -1.0
    if "id" in frame:
        frame["x1"] = frame.groupby("id").x1.transform("min")
    with pytest.raises(UserError, match=r"inputs: \d+ of \d+ cannot be used \(first: row 1\), more than data.max_invalid"):
        prepared(tmp_path, frame, tree)
    with pytest.raises(UserError, match="none of the"):
        prepared(tmp_path, frame.assign(x1=-1.0), tree | {"data": tree["data"] | {"max_invalid": 1}})


def test_tasks_without_training_labels_are_said_and_have_no_constant(tmp_path):
    frame = grid_frame(missing=0.0).assign(part=["train"] * 150 + ["test"] * 50)
    frame.loc[:149, "y3"] = np.nan
    split = {"by": "column", "column": "part", "parts": {"train": "train", "test": "test"}}
    _, data = prepared(tmp_path, frame, GRID | {"split": split, "tasks": {"labels": "y*"}})
    stats = data.tasks.stats
    assert stats["train_labels"].tolist() == [150, 150, 150, 0, 150, 150]
    assert np.isnan(stats["constant_deviance"][3])
    assert any("1 tasks have no training label" in note and "y3" in note for note in data.notes)
    assert np.isfinite(stats["center"]).all()
    assert (stats["scale"] > 0).all()


def test_sample_weights_of_a_grid_belong_to_its_rows(tmp_path):
    frame = grid_frame().assign(w=np.arange(200.0))
    _, data = prepared(tmp_path, frame, GRID | {"data": {"layout": "grid", "weight": "w"}})
    for part in data.parts.values():
        assert part.labels.weight_B.tolist() == part.row_R.tolist()
    with pytest.raises(UserError, match="'w' is 0 in every training row"):
        prepared(tmp_path, frame.assign(w=0), GRID | {"data": {"layout": "grid", "weight": "w"}})


def test_the_share_of_test_inputs_seen_in_training_is_counted(tmp_path):
    frame = grid_frame(missing=0.0).assign(part=["train"] * 150 + ["test"] * 50)
    frame.loc[150:159, ["x1", "x2"]] = frame.loc[:9, ["x1", "x2"]].to_numpy()
    split = {"by": "column", "column": "part", "parts": {"train": "train", "test": "test"}}
    _, data = prepared(tmp_path, frame, GRID | {"split": split, "tasks": {"labels": "y*"}})
    assert data.overlap == pytest.approx(0.2)


def test_without_inputs_every_other_named_column_is_one(tmp_path):
    frame = grid_frame().rename(columns={"x2": "Unnamed: 0"}).assign(id=range(200), cat=list("ab") * 100)
    source, data = prepared(tmp_path, frame, {"data": {"layout": "grid", "key": "id"}, "tasks": {"labels": "y*"}})
    assert {name: specs[0].class_path for name, specs in source.input_specs().items()} == {
        "x1": "Numeric",
        "cat": "Categorical",
    }
    assert any("1 columns have no name in the file" in note for note in data.notes)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"tasks": {"labels": ["x1", "y0"]}}, "column 'x1' is also an input"),
        ({"inputs": {"*": "Numeric"}, "tasks": {"labels": "y*"}}, "column 'y0' is also an input"),
        ({"split": {"parts": {"train": 0.8, "test": 0.2}, "refit": True}}, "split.refit: needs a valid part"),
        ({"split": {"parts": {"train": 0.8, "test": 0.2}}, "select": {"patience": 2}}, "select.patience: needs a valid part"),
        ({"split": {"by": "sources"}}, "split.by: sources needs named splits"),
        ({"split": {"by": "column", "column": "part", "parts": {"train": "train"}}}, "no column 'part'"),
        ({"data": {"layout": "grid", "key": "kee"}}, "data.key: no column 'kee'"),
        ({"inputs": {"z*": "Numeric"}}, "inputs: no column 'z\\*' in the data"),
        ({"tasks": {"labels": {"exclude": ["y9"]}}}, "'y9' matches no column or task; did you mean 'y"),
    ],
)
def test_a_config_that_does_not_fit_the_table_is_refused(tmp_path, tree, message):
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, grid_frame(), GRID | tree)


# ---- training statistics against plain loops ----


def table_of(kinds, classes=3):
    return TaskTable(
        tuple(
            Task(f"t{i}", kind, classes=tuple(map(str, range(classes))) if kind.has_classes else ())
            for i, kind in enumerate(kinds)
        )
    )


KINDS: list[Kind] = [
    Regression(),
    Regression(loss="mae"),
    Regression(loss="huber", delta=0.7),
    Binary(),
    Binary(pos_weight=3.0),
    Binary(pos_weight="balanced"),
    Multiclass(),
    Multiclass(label_smoothing=0.2),
    Poisson(),
    Quantile(),
]


def draw(kind, rng, n):
    if isinstance(kind, Binary):
        return (rng.random(n) < 0.3).astype(float)
    if kind.has_classes:
        return rng.choice(3, n, p=[0.5, 0.3, 0.2]).astype(float)
    return rng.poisson(2.5, n).astype(float) if isinstance(kind, Poisson) else rng.normal(20, 4, n)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_the_constant_has_the_least_mean_deviance_that_any_constant_can_have(kind):
    rng = np.random.default_rng(0)
    tasks = table_of([kind] * 3)
    task_P = rng.permutation(np.repeat([0, 2], [41, 150]))
    y_P = np.where(task_P == 0, draw(kind, rng, 191), draw(kind, rng, 191))
    stats = with_statistics(tasks, task_P, y_P, TargetsConfig(), False).stats
    for t in (0, 2):
        y = torch.from_numpy((y_P[task_P == t] - stats["center"][t]) / stats["scale"][t])
        params = {name: torch.full((len(y),), float(stats[name][t])) for name in stats if name == "pos_weight"}
        params["num_outputs"] = torch.full((len(y),), int(tasks.num_outputs_T[t]))

        def loss(logits, y=y, params=params):
            rows = torch.from_numpy(np.asarray(logits, float)).expand(len(y), -1)
            return float(kind.deviances(rows, y, params).mean())

        ways = ({"method": "Nelder-Mead", "options": {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 10_000}}, {"method": "Powell"})
        starts = (np.zeros(tasks.num_outputs_T[t]), np.asarray(stats["constant"][t]))
        least = min(minimize(loss, start, **way).fun for way in ways for start in starts)
        assert stats["constant_deviance"][t] == pytest.approx(loss(stats["constant"][t]), rel=1e-6)
        if isinstance(kind, Regression) and kind.loss == "mse":
            assert stats["constant_deviance"][t] == pytest.approx(1.0)
        assert stats["constant_deviance"][t] <= least + 1e-6
    assert np.isnan(stats["constant_deviance"][1])


def test_counts_means_and_standard_deviations_are_those_of_numpy_for_each_task():
    rng = np.random.default_rng(1)
    tasks = table_of(KINDS * 3)
    task_P = rng.integers(0, 29, 2000)  # the last task has none
    y_P = np.array([draw(KINDS[t % 10], rng, 1)[0] for t in task_P])
    stats = with_statistics(tasks, task_P, y_P, TargetsConfig(), False).stats
    for t in range(29):
        own = y_P[task_P == t]
        assert stats["train_labels"][t] == len(own)
        assert stats["mean"][t] == pytest.approx(own.mean())
        assert stats["std"][t] == pytest.approx(own.std())
        standardized = KINDS[t % 10].standardized
        assert stats["center"][t] == pytest.approx(own.mean() if standardized else 0.0)
        assert stats["scale"][t] == pytest.approx(own.std() if standardized else 1.0)
    assert stats["train_labels"][29] == 0
    assert np.isnan(stats["mean"][29])


@pytest.mark.parametrize("center", ["task", "pooled", "none"])
@pytest.mark.parametrize("scale", ["task", "pooled", "none"])
@pytest.mark.parametrize("shrink", [0.0, 7.0])
def test_targets_are_centred_and_scaled_as_asked_and_shrunk_towards_the_pool(center, scale, shrink):
    rng = np.random.default_rng(2)
    tasks = table_of([Regression()] * 4 + [Binary()])
    task_P = np.repeat([0, 1, 2, 4], [3, 30, 300, 50])
    y_P = rng.normal(np.array([0.0, 5, -3, 0, 0])[task_P], np.array([1.0, 2, 3, 1, 1])[task_P])
    stats = with_statistics(tasks, task_P, y_P, TargetsConfig(center=center, scale=scale, shrink=shrink), True).stats
    own = [y_P[task_P == t] for t in range(3)]
    every = np.concatenate(own)
    within = sum(((y - y.mean()) ** 2).sum() for y in own) / len(every)
    pool = within if center == "task" else every.var()
    for t in range(4):
        keep = 0.0 if t == 3 else len(own[t]) / (len(own[t]) + shrink)  # a task without labels is the pool
        mean, var = (own[t].mean(), own[t].var()) if t < 3 else (0.0, 0.0)
        wanted_center = {"task": keep * mean + (1 - keep) * every.mean(), "pooled": every.mean(), "none": 0.0}[center]
        wanted_var = {"task": keep * var + (1 - keep) * pool, "pooled": pool, "none": 1.0}[scale]
        assert stats["center"][t] == pytest.approx(wanted_center)
        assert stats["scale"][t] == pytest.approx(np.sqrt(wanted_var))
    assert (stats["center"][4], stats["scale"][4]) == (0.0, 1.0)


def test_a_constant_target_has_standard_deviation_zero_and_scale_one_whatever_its_unit():
    for value in (0.1, 1e9 / 3, 0.0):
        stats = with_statistics(table_of([Regression()]), np.zeros(7, int), np.full(7, value), TargetsConfig(), False).stats
        assert (stats["std"][0], stats["scale"][0]) == (0.0, 1.0)
    tiny = with_statistics(table_of([Regression()]), np.zeros(2, int), np.array([1e-15, 3e-15]), TargetsConfig(), False).stats
    assert tiny["scale"][0] == pytest.approx(1e-15)


def test_a_positive_weight_that_balances_is_negatives_over_positives_of_training():
    tasks = table_of([Binary(pos_weight="balanced")] * 2)
    stats = with_statistics(tasks, np.array([0, 0, 0, 0, 1]), np.array([1.0, 0, 0, 0, 0]), TargetsConfig(), False).stats
    assert stats["pos_weight"].tolist() == [3.0, 1.0]

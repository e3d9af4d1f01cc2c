import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtrain
from mtrain.config import SplitConfig
from mtrain.data.splits import overlap, split, split_hash
from mtrain.errors import UserError

PARTS = {"train": 0.7, "valid": 0.1, "test": 0.2}


def Split(by="random", parts=None, **options):
    return SplitConfig(by=by, parts=parts or {}, **options)


def run(spec, n, seed=0, table=None, **given_):
    table = table or {}
    return split(spec, seed, n=n, columns=table.__getitem__, known=table, **given_)


def assert_partition(parts, n):
    every = np.concatenate(list(parts.values()))
    assert len(every) == n
    np.testing.assert_array_equal(np.sort(every), np.arange(n))
    for rows in parts.values():
        assert (np.diff(rows) > 0).all()


def assert_whole(parts, groups):
    where = defaultdict(set)
    for name, rows in parts.items():
        for group in np.asarray(groups)[rows].tolist():
            where[group].add(name)
    assert all(len(names) == 1 for names in where.values())


@settings(max_examples=50, deadline=None)
@given(n=st.integers(10, 500), seed=st.integers(0, 2**32))
def test_random_is_numpys_permutation_cut_at_rounded_fractions(n, seed):
    order = np.random.default_rng(seed).permutation(n)
    a, b = round(0.7 * n), round(0.1 * n)
    parts = run(Split(parts=PARTS), n, seed)
    assert_partition(parts, n)
    np.testing.assert_array_equal(parts["train"], np.sort(order[:a]))
    np.testing.assert_array_equal(parts["valid"], np.sort(order[a : a + b]))
    np.testing.assert_array_equal(parts["test"], np.sort(order[a + b :]))
    unique_key = run(Split(parts=PARTS), n, seed, key=np.array([f"k{i}" for i in range(n)]))
    assert split_hash(parts) == split_hash(unique_key)


@settings(max_examples=60, deadline=None)
@given(
    by=st.sampled_from(["random", "stratified", "kfold", "group", "group_by_key"]),
    keys=st.lists(st.integers(0, 60), min_size=60, max_size=400),
    seed=st.integers(0, 10),
)
def test_units_with_one_key_end_in_one_part(by, keys, seed):
    n = len(keys)
    distinct = sorted(set(keys))
    table = {"group": np.array(keys) // 2, "class": np.array([f"c{k % 3}" for k in keys])}
    spec = {
        "random": Split("random", PARTS),
        "stratified": Split("stratified", {"train": 0.6, "test": 0.4}, column="class"),
        "kfold": Split("kfold", folds=4, fold=1),
        "group": Split("group", PARTS, column="group"),
        "group_by_key": Split("group", PARTS),
    }[by]
    if len(distinct) < 12:
        return
    try:
        parts = run(spec, n, seed, table, key=np.array(keys))
    except UserError as error:  # few rows in a class: a part may be empty
        if by != "stratified" or "empty" not in str(error):
            raise
        return
    assert_partition(parts, n)
    assert_whole(parts, keys)
    if by == "group":
        assert_whole(parts, table["group"])


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), min_size=3, max_size=80), seed=st.integers(0, 5))
def test_group_parts_miss_their_size_by_less_than_a_few_groups_and_are_never_empty(sizes, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    parts = run(Split("group", PARTS, column="g"), len(groups), seed, {"g": groups})
    assert_partition(parts, len(groups))
    assert_whole(parts, groups)
    for name, fraction in PARTS.items():
        assert len(parts[name]) > 0
        assert abs(len(parts[name]) - fraction * len(groups)) <= 2.5 * max(sizes)


def test_a_group_too_large_for_a_small_part_goes_to_train():
    groups = np.r_[np.zeros(300, int), np.arange(1, 701)]
    for seed in range(10):
        parts = run(Split("group", {"train": 0.8, "valid": 0.1, "test": 0.1}, column="g"), 1000, seed, {"g": groups})
        assert {name: len(rows) for name, rows in parts.items()} == {"train": 800, "valid": 100, "test": 100}
        assert 0 in parts["train"]


def test_groups_tied_by_a_key_stay_together():
    groups = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    key = np.array(list("abbcdefghi"))  # b ties groups 0 and 1
    for seed in range(20):
        parts = run(Split("group", {"train": 0.5, "test": 0.5}, column="g"), 10, seed, {"g": groups}, key=key)
        assert_whole(parts, np.where(groups == 1, 0, groups))


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=40), seed=st.integers(0, 100))
def test_within_task_rounds_each_tasks_fraction_up_or_down_and_keeps_a_training_row(sizes, seed):
    task_N = np.random.default_rng(seed).permutation(np.repeat([f"t{i}" for i in range(len(sizes))], sizes))
    try:
        parts = run(Split("within_task", PARTS), len(task_N), seed, task_N=task_N)
    except UserError as error:
        if "empty" not in str(error):
            raise
        return
    assert_partition(parts, len(task_N))
    for i, size in enumerate(sizes):
        counts = {name: int((task_N[rows] == f"t{i}").sum()) for name, rows in parts.items()}
        assert counts["train"] >= 1
        for name, fraction in PARTS.items():
            assert abs(counts[name] - fraction * size) < 1 + 1e-6


def test_within_task_keeps_the_totals_over_many_small_tasks():
    task_N = np.repeat(np.arange(2000), 4)
    parts = run(Split("within_task"), len(task_N), task_N=task_N)
    assert abs(len(parts["valid"]) - 800) < 120  # 4 * 0.1 rows a task, about 4 standard deviations of 2000 draws
    assert abs(len(parts["test"]) - 800) < 120


def test_within_task_draws_every_row_equally_often():
    task_N = np.repeat(["a", "b"], [10, 30])
    spec = Split("within_task", {"train": 0.5, "test": 0.5})
    counts = sum(np.bincount(run(spec, 40, seed, task_N=task_N)["test"], minlength=40) for seed in range(2000))
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(500)
    together = sum({0, 10} <= set(run(spec, 40, seed, task_N=task_N)["test"].tolist()) for seed in range(2000))
    assert abs(together - 500) < 100  # tasks are shuffled independently


def test_within_task_adding_a_task_moves_no_other_tasks_rows():
    task_N = np.repeat(["a", "b", "c"], [22, 40, 7])
    before = run(Split("within_task", PARTS), 69, 3, task_N=task_N)
    after = run(Split("within_task", PARTS), 80, 3, task_N=np.r_[["new"] * 11, task_N])
    for name, rows in before.items():
        np.testing.assert_array_equal(after[name][after[name] >= 11] - 11, rows)


def test_stratified_keeps_each_class_at_its_fraction():
    y = np.random.default_rng(0).choice(["x", "y", "z"], 1000, p=[0.8, 0.15, 0.05])
    parts = run(Split("stratified", PARTS, column="c"), 1000, table={"c": pa.array(y)})
    assert_partition(parts, 1000)
    for name, fraction in PARTS.items():
        for label in "xyz":
            assert abs((y[parts[name]] == label).sum() - fraction * (y == label).sum()) < 1


@pytest.mark.parametrize("key", [None, np.repeat(np.arange(50), 2)])
def test_kfold_tests_every_unit_once_and_validates_on_the_next_fold(key):
    runs = [run(Split("kfold", fold=k, folds=5), 100, 1, key=key) for k in range(5)]
    np.testing.assert_array_equal(np.sort(np.concatenate([r["test"] for r in runs])), np.arange(100))
    for k, parts in enumerate(runs):
        assert_partition(parts, 100)
        assert len(parts["test"]) == 20
        np.testing.assert_array_equal(parts["valid"], runs[(k + 1) % 5]["test"])
    shared = run(Split("kfold", {"valid": 0.25}, fold=2, folds=5), 100, 1, key=key)
    assert_partition(shared, 100)
    np.testing.assert_array_equal(shared["test"], runs[2]["test"])
    assert len(shared["valid"]) == 20
    if key is not None:
        assert_whole(shared, key)


def test_column_values_name_the_parts_and_a_share_is_drawn_from_train():
    fold = np.array(["0", "1", "2", "test"] * 25)
    parts = run(Split("column", {"train": ["0", "1"], "valid": ["2"], "test": "test"}, column="f"), 100, table={"f": fold})
    assert_partition(parts, 100)
    np.testing.assert_array_equal(parts["test"], np.flatnonzero(fold == "test"))
    np.testing.assert_array_equal(parts["train"], np.flatnonzero((fold == "0") | (fold == "1")))
    drawn = run(Split("column", {"train": ["0", "1", "2"], "valid": 0.2, "test": "test"}, column="f"), 100, table={"f": fold})
    assert_partition(drawn, 100)
    assert len(drawn["valid"]) == 15
    np.testing.assert_array_equal(drawn["test"], parts["test"])


def test_column_reads_numbers_bools_and_missing_values():
    number = pa.chunked_array([[0, 1, None, 1]])
    parts = run(Split("column", {"train": ["1"], "test": ["0"], "unused": [""]}, column="f"), 4, table={"f": number})
    assert {k: v.tolist() for k, v in parts.items()} == {"train": [1, 3], "test": [0], "unused": [2]}
    held = np.array([True, False, False])
    parts = run(Split("column", {"train": "false", "test": [True]}, column="f"), 3, table={"f": held})
    assert parts["test"].tolist() == [0]


def test_sources_own_splits_are_the_parts():
    table = {"__source__": np.array(["train"] * 8 + ["validation"] * 2)}
    parts = run(Split("sources", {"train": "train", "test": "validation", "valid": 0.25}), 10, table=table)
    assert {k: len(v) for k, v in parts.items()} == {"train": 6, "test": 2, "valid": 2}
    assert set(run(Split("sources"), 10, table=table)) == {"train", "validation"}


@pytest.mark.parametrize(
    "times",
    [
        np.array([3.5, 1, 2, 5, 4]),
        np.array(["2020-01-03", "2020-01-01", "2020-01-02", "2020-01-05", "2020-01-04"], "datetime64[D]"),
        pa.array(["2020-01-03", "2019-12-01T10:00:00", "2020-01-02", "2020-02-05", "2020-01-04"]),
        pa.array(["2020-01-03T00:00Z", "2019-12-01T10:00Z", "2020-01-02T00:00Z", "2020-02-05T00:00Z", "2020-01-04T00:00Z"]),
    ],
)
def test_time_trains_on_the_oldest(times):
    parts = run(Split("time", {"train": 0.6, "test": 0.4}, column="t"), 5, table={"t": times})
    assert parts["train"].tolist() == [0, 1, 2]


def test_scaffold_is_deepchems_rule_with_the_largest_scaffolds_in_train():
    pytest.importorskip("rdkit")
    from rdkit import Chem
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

    rings = ["c1ccccc1", "C1CCCCC1", "c1ccncc1", "C1CC1", "c1ccc2ccccc2c1", "C1CCNCC1", "c1ccsc1", "C1CCC1"]
    rng = np.random.default_rng(0)
    smiles = [f"{'C' * int(rng.integers(1, 6))}{ring}" for ring in rng.choice(rings, 97, p=[0.4, 0.2] + [0.4 / 6] * 6)]
    smiles += ["CCO", "CCC", "CCN"]
    sets = defaultdict(list)
    for i, text in enumerate(smiles):
        sets[MurckoScaffoldSmiles(mol=Chem.MolFromSmiles(text))].append(i)
    train, valid, test = [], [], []
    for rows in sorted(sets.values(), key=lambda rows: (-len(rows), rows[0])):
        if len(train) + len(rows) > 70:
            if len(train) + len(valid) + len(rows) > 80:
                test += rows
            else:
                valid += rows
        else:
            train += rows
    for seed in (0, 1):
        parts = run(Split("scaffold", PARTS, column="smiles"), 100, seed, {"smiles": smiles})
        assert {k: v.tolist() for k, v in parts.items()} == {
            "train": sorted(train),
            "valid": sorted(valid),
            "test": sorted(test),
        }
    shuffled = run(Split("scaffold", PARTS, column="smiles", balanced=True), 100, 1, {"smiles": smiles})
    assert_partition(shuffled, 100)
    assert_whole(shuffled, [MurckoScaffoldSmiles(mol=Chem.MolFromSmiles(s)) for s in smiles])
    assert split_hash(shuffled) != split_hash(parts)


@pytest.mark.parametrize(
    ("spec", "given_", "message"),
    [
        (Split(parts={"train": 0.8, "test": 0.1}), {}, r"train 0.8, test 0.1 sum to 0.9, expected 1"),
        (Split(parts={"valid": 0.5, "test": 0.5}), {}, "no training rows"),
        (Split(parts={"train": ["a"], "test": 0.1}), {}, r"split.parts.train: \['a'\], expected a fraction"),
        (Split(parts={"train": 0.98, "valid": 0.01, "test": 0.01}), {}, "split.parts.valid: empty, although 10 rows"),
        (Split("group", column="gruop"), {}, "split.column: no column 'gruop' in the data; did you mean 'group'"),
        (Split("group"), {}, "by: group needs the name of a column"),
        (Split("stratified"), {}, "by: stratified needs the name of a column"),
        (Split("within_task"), {}, "needs rows that belong to a task"),
        (Split("random", column="group"), {}, "split.column: 'group' is not used by: random; by: group keeps"),
        (Split("random", fold=1), {}, "not used by: random"),
        (Split("group", column="group", balanced=True), {}, "split.balanced: not used by: group"),
        (Split("kfold", fold=5), {}, "fold is 5 and folds 5"),
        (Split("kfold", folds=2), {}, "at least 3 folds"),
        (Split("kfold", {"train": 0.9, "test": 0.1}), {}, "which makes train and test from fold and folds"),
        (
            Split("column", {"train": ["a"], "test": ["z"]}, column="ab"),
            {},
            "test: no value 'z' in column 'ab'; known: a, b",
        ),
        (
            Split("column", {"train": ["a"]}, column="ab"),
            {},
            r"column 'ab' also holds 'b' \(5 rows\), which no part names",
        ),
        (Split("column", {"train": ["a"], "test": ["a", "b"]}, column="ab"), {}, "'a' is in both train and test"),
        (
            Split("column", {"test": ["a"], "train": 0.5}, column="ab"),
            {},
            "split.parts.train: expected values of column",
        ),
        (Split("column", {"train": ["a", "b"], "valid": 1.5}, column="ab"), {}, "expected a share of train"),
        (Split("time", column="ab"), {}, "column 'ab' holds text that is not a time"),
        (Split("time", column="holes"), {}, r"column 'holes' has no time in row 10 \(1 such rows\)"),
        (Split("group", column="holes"), {}, r"column 'holes' is missing in row 10"),
        (Split(), {"key": pa.array([None] + [1] * 9)}, "the key is missing in row 1"),
        (Split("within_task"), {"task_N": pa.array(["a", None] * 5)}, "row 2 has no task"),
    ],
)
def test_what_cannot_be_split_is_said_in_one_line(spec, given_, message):
    table = {"group": np.arange(10), "ab": np.array(["a", "b"] * 5), "holes": np.r_[np.arange(9.0), np.nan]}
    with pytest.raises(UserError, match=message):
        run(spec, 10, table=table, **given_)


def test_parts_come_in_the_configs_order_and_a_part_of_zero_is_empty():
    parts = run(Split(parts={"test": 0.0, "valid": 0.2, "train": 0.8}), 10)
    assert [(name, len(rows)) for name, rows in parts.items()] == [("test", 0), ("valid", 2), ("train", 8)]


def test_another_process_gives_the_same_parts_and_another_seed_does_not():
    code = """
import numpy as np
from mtrain.config import SplitConfig
from mtrain.data.splits import split, split_hash
n = 300
table = {"g": np.arange(n) // 4, "c": np.arange(n) % 3}
task = np.array([f"t{i % 7}" for i in range(n)])
for seed in (0, 1):
    ways = [{}, {"by": "group", "column": "g"}, {"by": "stratified", "column": "c"}, {"by": "kfold"}, {"by": "within_task"}]
    for spec in [SplitConfig(**way) for way in ways]:
        print(split_hash(split(spec, seed, n=n, columns=table.__getitem__, task_N=task)))
"""
    env = os.environ | {"PYTHONPATH": str(Path(mtrain.__file__).parents[1])}
    outputs = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(2)
    ]
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) == 10


def test_the_hash_knows_parts_by_name_and_units_whatever_the_order_and_type():
    parts = {"train": np.array([0, 1, 4]), "test": np.array([2, 3])}
    same = {"test": np.array([2, 3], np.int32), "train": np.array([0, 1, 4], np.uint16)}
    assert split_hash(parts) == split_hash(same)
    assert split_hash(parts) != split_hash({"train": parts["test"], "test": parts["train"]})
    assert split_hash({"a": np.array([0]), "b": np.array([1])}) != split_hash({"a": np.array([0, 1]), "b": np.array([])})
    assert len(split_hash(parts)) == 12


def test_overlap_is_the_share_of_test_units_that_occur_in_training():
    assert overlap(["a", "b", "b"], pa.array(["b", "c", "b", None])) == 0.5
    x = np.random.default_rng(0).integers(0, 3, (40, 3)).astype(np.float32)
    train, test = x[:20], x[20:]
    test[0] = -0.0
    naive = np.mean([any((row == other).all() for other in train) for row in test])
    assert overlap(train, test) == pytest.approx(naive)
    assert overlap(train.astype(np.uint8), test.astype(np.uint8)) == pytest.approx(naive)
    assert np.isnan(overlap(train, test[:0]))

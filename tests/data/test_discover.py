"""What a table is taken for, and why."""

from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from frames import SMILES, laboratory, with_holes

from mtrain.config import check_config
from mtrain.data import discover as discovering
from mtrain.data.discover import _Seen, discover, merged, sizes
from mtrain.data.prepare import prepare, read_source
from mtrain.errors import UserError, matches

rng = np.random.default_rng(0)


def numbers(names, rows=60):
    return pd.DataFrame(rng.normal(size=(rows, len(names))), columns=list(names))


def found(tmp_path, frame, given=None, name="t.csv"):
    """The guess for a table in a file; its tree is checked."""
    path = tmp_path / name
    frame.to_parquet(path) if name.endswith("parquet") else frame.to_csv(path, index=False)
    given = given or {}
    guess = discover({**given, "data": {**given.get("data", {}), "path": str(path)}})
    check_config(guess.tree, "test")
    return guess


def role(guess, name):
    return {column: finding.role for finding in guess.findings for column in finding.columns}.get(name)


def of(guess, wanted):
    return [column for finding in guess.findings if finding.role == wanted for column in finding.columns]


def reason(guess, name):
    return next(finding.why for finding in guess.findings if name in finding.columns)


def test_numbers_beside_molecules_are_labels_and_the_molecules_the_key(tmp_path):
    pytest.importorskip("rdkit")
    frame = pd.DataFrame({"mol_id": [f"m{i}" for i in range(24)], "smiles": SMILES * 2})
    frame = pd.concat([frame, pd.DataFrame(rng.integers(0, 2, (24, 12)), columns=[f"NR {i}" for i in range(12)])], axis=1)
    guess = found(tmp_path, frame)
    assert guess.tree["data"] | {"path": ""} == {"path": "", "layout": "grid", "key": "smiles"}
    assert guess.tree["tasks"] == {"labels": ["NR *"]}
    assert [spec["class_path"] for spec in guess.tree["inputs"]["smiles"]] == ["ECFP", "AtomPair"]
    assert role(guess, "mol_id") == "left out"
    assert (guess.rows, guess.tasks) == (24, 12)


def test_labels_by_name_come_before_all_other_rules(tmp_path):
    guess = found(tmp_path, numbers(["y_1", "age", "y_2", "bmi"]))
    assert guess.tree["tasks"] == {"labels": ["y_1", "y_2"]}
    assert guess.tree["inputs"] == {"age": "Numeric", "bmi": "Numeric"}
    assert reason(guess, "y_1") == "its name"


def test_a_block_of_columns_with_missing_values_is_labels(tmp_path):
    frame = numbers(["age", "dose", "kinase", "gpcr", "herg"], 200)
    frame.loc[:, "kinase":] = frame.loc[:, "kinase":].mask(rng.random((200, 3)) < 0.3)
    guess = found(tmp_path, frame)
    assert of(guess, "label") == ["kinase", "gpcr", "herg"]
    assert "missing" in reason(guess, "gpcr")
    scattered = frame[["kinase", "age", "gpcr", "dose", "herg"]]
    assert of(found(tmp_path, scattered), "label") == ["herg"]


def test_numbered_columns_that_miss_far_more_are_labels_with_those_beside_them_that_miss_as_much(tmp_path):
    frame, outcomes = laboratory()
    guess = found(tmp_path, frame)
    assert of(guess, "label") == outcomes
    assert of(guess, "input") == ["Temp (C)", "pH", "Material", "Werk"]
    assert guess.notes == []
    first = frame[[*outcomes, *(name for name in frame if name not in outcomes)]]
    assert set(of(found(tmp_path, first), "label")) == set(outcomes)
    far = with_holes(frame.assign(**{"Temp (C)": rng.normal(size=len(frame))}), {"Temp (C)": 0.4})
    guess = found(tmp_path, far)
    assert of(guess, "label") == outcomes
    assert guess.notes[0].startswith("1 column (Temp (C)) is among the inputs, though like labels")


def test_inputs_beside_numbered_labels_stay_inputs_though_some_values_miss(tmp_path):
    frame = numbers(["age", "dose", "ph", *(f"crack {i}" for i in range(4)), "yield"], 300)
    frame = with_holes(frame, {"dose": 0.1, "ph": 0.15, **{name: 0.4 for name in frame.columns[3:]}})
    guess = found(tmp_path, frame)
    assert of(guess, "input") == ["age", "dose", "ph"]
    assert guess.tasks == 5


def test_where_all_columns_miss_as_much_none_is_like_a_label(tmp_path):
    guess = found(tmp_path, with_holes(numbers(["a", "b", "q 1", "q 2", "q 3", "last"], 300), 0.3))
    assert of(guess, "label") == ["last"]
    assert guess.notes == []


def test_text_that_misses_as_much_as_a_block_of_numbers_is_labels_too(tmp_path):
    frame = numbers(["age", "dose", "kinase", "gpcr"], 300).assign(toxic=rng.choice(["yes", "no"], 300), unit=["a", "b"] * 150)
    frame = with_holes(frame, {"kinase": 0.3, "gpcr": 0.3, "toxic": 0.3, "unit": 0.06})
    assert of(found(tmp_path, frame), "label") == ["kinase", "gpcr", "toxic"]


@pytest.mark.parametrize("name", ["x{}", "feature_{}", "bit_{}", "fp_{}", "sensor {} [V]"])
def test_numbered_inputs_that_miss_few_values_stay_inputs(tmp_path, name):
    names = [name.format(i) for i in range(1, 31)]
    frame = with_holes(numbers(names, 200), {column: 0.04 * (i % 3) for i, column in enumerate(names)}).assign(
        colour=rng.normal(size=200)
    )
    guess = found(tmp_path, frame)
    assert of(guess, "label") == ["colour"]
    assert of(guess, "input") == names
    assert guess.notes == []


def test_columns_named_as_inputs_stay_inputs_however_many_values_they_miss(tmp_path):
    names, labels = [f"x{i}" for i in range(9)], [f"crack {i}" for i in range(5)]
    frame = with_holes(numbers([*names, "age", "dose", *labels], 300), dict.fromkeys([*names, *labels], 0.4))
    assert of(found(tmp_path, frame), "label") == labels
    assert of(found(tmp_path, frame[["dose", *labels, *names, "age"]]), "label") == labels


def test_a_last_column_behind_sparse_numbered_ones_is_mentioned(tmp_path):
    frame = with_holes(numbers([*(f"sensor {i}" for i in range(4)), "age"], 200), 0.3).assign(
        size=rng.normal(size=200), profit=rng.normal(size=200)
    )
    guess = found(tmp_path, frame.assign(age=rng.normal(size=200))[["size", "age", *frame.columns[:4], "profit"]])
    assert of(guess, "label") == [f"sensor {i}" for i in range(4)]
    assert guess.notes == ["the last column, profit, is an input; if it is the label: --labels profit"]


def test_what_is_numbered_as_a_label_that_is_named_is_no_input_and_what_looks_like_labels_is_said(tmp_path):
    frame, _ = laboratory()
    named = {"tasks": {"labels": ["Riss 1 [ja]", "Grade"]}}
    guess = found(tmp_path, frame, named)
    assert of(guess, "label") == ["Riss 1 [ja]", "Grade"]
    assert of(guess, "left out") == ["Riss 2 [ja]", "Riss 3 [ja]", "Riss 4 [ja]"]
    kin, alike = guess.notes
    assert kin.startswith(
        "3 columns (Riss 2 [ja], Riss 3 [ja], Riss 4 [ja]) are numbered as labels that you named, and left out"
    )
    assert alike.startswith("6 columns (ok? 1, ok? 2, ok? 3 and 3 more) are among the inputs, though like labels")
    assert '--inputs "[NAME, ...]"' in alike
    guess = found(tmp_path, frame, {**named, "inputs": ["Temp*", "HV*"]})
    assert guess.notes == []
    assert set(of(guess, "input")) == {"Temp (C)", "HV 1", "HV 2", "HV 3"}
    guess = found(tmp_path, frame, {"tasks": {"labels": {"include": ["Riss*", "ok*", "HV*"], "exclude": ["HV 3"]}}})
    assert role(guess, "HV 3") == "input"
    assert guess.notes[0].startswith("1 column (Grade) is among the inputs, though like labels")


def test_the_only_inputs_stay_though_they_are_numbered_as_the_label_and_x1_to_x9_say_nothing(tmp_path):
    guess = found(tmp_path, numbers([f"sensor {i}" for i in range(5)]), {"tasks": {"labels": ["sensor 4"]}})
    assert of(guess, "input") == [f"sensor {i}" for i in range(4)]
    assert guess.notes[0].startswith(
        "4 columns (sensor 0, sensor 1, sensor 2 and 1 more) are among the inputs, though like labels"
    )
    for name in ("x{}", "col_{}", "{}"):
        names = [name.format(i) for i in range(9)]
        guess = found(tmp_path, numbers([*names, "age"]), {"tasks": {"labels": [names[-1]]}})
        assert of(guess, "input") == [*names[:-1], "age"]
        assert guess.notes == []


def test_what_stands_behind_numbered_inputs_is_labels(tmp_path):
    guess = found(tmp_path, numbers([*(f"x{i}" for i in range(12)), "yield", "purity"]))
    assert of(guess, "label") == ["yield", "purity"]
    assert guess.tree["inputs"] == {"x*": "Numeric"}


def test_last_columns_of_0_and_1_are_labels_where_no_other_is(tmp_path):
    flags = pd.DataFrame(rng.integers(0, 2, (60, 3)), columns=["red", "green", "blue"])
    assert of(found(tmp_path, numbers("abc").join(flags)), "label") == ["red", "green", "blue"]
    other = numbers("abc").join(flags).assign(a=rng.integers(0, 2, 60))
    assert of(found(tmp_path, other), "label") == ["blue"]


def test_else_the_last_column_is_the_label_and_every_rule_can_be_overruled(tmp_path):
    frame = numbers(["alpha", "beta", "gamma", "delta"])
    guess = found(tmp_path, frame)
    assert of(guess, "label") == ["delta"]
    assert reason(guess, "delta") == "the last column"
    guess = found(tmp_path, frame, {"tasks": {"labels": ["*a"]}, "inputs": {"beta": "Numeric"}})
    assert of(guess, "label") == ["alpha", "gamma", "delta"]
    assert of(found(tmp_path, frame, {"data": {"label": "beta"}}), "label") == ["beta"]
    assert of(found(tmp_path, frame, {"inputs": ["gamma", "d*"]}), "label") == ["alpha", "beta"]
    assert of(found(tmp_path, frame, {"inputs": {"alpha": "Numeric"}}), "label") == ["beta", "gamma", "delta"]


def test_a_column_with_a_tasks_name_beside_a_label_makes_a_long_table(tmp_path):
    frame = numbers(["x1", "x2"], 80).assign(assay_id=np.repeat(range(8), 10), value=rng.normal(size=80))
    guess = found(tmp_path, frame)
    assert guess.tree["data"] | {"path": ""} == {"path": "", "layout": "routed", "task": "assay_id", "label": "value"}
    assert guess.tree["split"]["by"] == "within_task"
    assert guess.tree["model"]["head"]["toward_shared"] > 0  # ten rows a task
    assert guess.tasks == 8
    assert found(tmp_path, frame, {"data": {"layout": "grid"}}).tree["data"]["layout"] == "grid"


def test_stores_are_tasks_whose_label_is_the_last_number(tmp_path):
    frame = numbers(["temperature"], 80).assign(store=np.repeat(list("abcdefgh"), 10), revenue=rng.normal(size=80))
    guess = found(tmp_path, frame)
    assert guess.tree["data"] | {"path": ""} == {"path": "", "layout": "routed", "task": "store", "label": "revenue"}


def test_one_label_beside_a_category_of_many_rows_each_may_be_many_tasks(tmp_path):
    def notes(given=None, rows=6, branches=25, **columns):
        names = [f"F{i:02}" for i in range(branches)]
        frame = numbers(["cost"], 25 * rows).assign(branch=np.resize(names, 25 * rows), **columns)
        return found(tmp_path, frame.assign(**{"net sales": rng.normal(size=25 * rows)}), given).notes

    assert notes() == [
        "column branch has 25 values with about 6 rows each: if each is a task of its own, say so: --task branch --label "
        "'net sales' (data.task, data.label)"
    ]
    assert notes(rows=4) == []
    assert notes({"data": {"layout": "grid"}}) == []
    assert notes({"inputs": ["cost", "branch"]}) == []
    assert notes({"data": {"task": "branch", "label": "net sales"}}) == []
    assert notes({"tasks": {"labels": ["cost", "net sales"]}}, hours=rng.normal(size=150)) == []
    assert notes(branches=19) == []


def test_a_long_table_whose_inputs_repeat_with_an_id_is_pairs(tmp_path):
    inputs = numbers(["x1", "x2"], 12).assign(customer_id=range(100, 112))
    frame = inputs.merge(pd.DataFrame({"task": list("abcde")}), how="cross")
    frame = frame.assign(y=rng.normal(size=60)).drop(index=[3, 17])
    guess = found(tmp_path, frame)
    assert guess.tree["data"]["layout"] == "pairs"
    assert guess.tree["data"]["key"] == "customer_id"
    assert of(guess, "key") == ["customer_id"]
    assert of(guess, "input") == ["x1", "x2"]
    frame.loc[0, "x1"] += 1
    assert found(tmp_path, frame).tree["data"]["layout"] == "routed"
    with pytest.raises(UserError, match="--key"):
        found(tmp_path, frame, {"data": {"layout": "pairs"}})


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (["train", "test"], {"train": ["train"], "valid": 0.1, "test": ["test"]}),
        (["training", "dev", "holdout"], {"train": ["training"], "valid": ["dev"], "test": ["holdout"]}),
        (["0", "1", "2", "test"], {"train": ["0", "1"], "valid": ["2"], "test": ["test"]}),
        ([0, 1, 2, 3, 4], {"train": ["0", "1", "2"], "valid": ["3"], "test": ["4"]}),
        (["east", "west"], None),
        ([0, 1], None),
    ],
)
def test_a_column_of_parts_or_folds_is_the_split(tmp_path, values, parts):
    frame = numbers("ab").assign(split=np.resize(np.array(values, dtype=object), 60), y=rng.normal(size=60))
    guess = found(tmp_path, frame)
    if parts is None:
        assert guess.tree["split"]["by"] == "random"
    else:
        assert guess.tree["split"] == {"by": "column", "column": "split", "parts": parts}


def test_another_split_takes_the_place_of_the_found_one(tmp_path):
    frame = numbers("ab").assign(fold=np.arange(60) % 5, y=rng.normal(size=60))
    assert found(tmp_path, frame, {"split": {"by": "random"}}).tree["split"] == {"by": "random"}
    assert found(tmp_path, frame, {"split": {"seeds": [1]}}).tree["split"]["column"] == "fold"


def test_ids_dates_constants_weights_and_free_text_are_no_inputs(tmp_path):
    frame = numbers(["a", "b"]).assign(
        **{"Unnamed: 0": range(60)},
        userID=range(60),
        patient_id=np.repeat(range(20), 3),
        day=[f"2020-01-{1 + i % 28:02}" for i in range(60)],
        same=1,
        nearly=[1] * 57 + [2, 3, 4],
        sample_weight=1.5 + rng.random(60),
        note=[f"note {i} on {i * 7}" for i in range(60)],
        humid=rng.normal(size=60),
        city=rng.choice(["Rome", "Oslo"], 60),
        y=rng.normal(size=60),
    )
    guess = found(tmp_path, frame)
    assert guess.tree["inputs"] == {"a": "Numeric", "b": "Numeric", "humid": "Numeric", "city": "Categorical"}
    assert guess.tree["data"]["key"] == "patient_id"
    assert guess.tree["data"]["weight"] == "sample_weight"
    assert set(of(guess, "left out")) == {"Unnamed: 0", "userID", "day", "same", "nearly", "note"}
    assert {column for finding in guess.findings for column in finding.columns} == set(frame.columns)


@pytest.mark.parametrize(
    ("name", "values", "what"),
    [
        ("Probe", [f"P-{3 * i}" for i in range(60)], "key"),
        ("Sample No.", [1000 + 7 * i % 60 for i in range(60)], "key"),
        ("compound name", [f"acid {i}" for i in range(60)], "key"),
        ("run", range(1, 61), "key"),
        ("Probe", [f"P-{i // 2}" for i in range(60)], "left out"),
        ("remark", [f"looks {i} fine" for i in range(60)], "left out"),
        ("sequence", [f"{i:080}A" for i in range(60)], "left out"),
        ("x", range(60), "input"),
        ("year", range(1960, 2020), "input"),
    ],
)
def test_a_column_with_another_value_in_each_row_that_is_named_or_placed_as_an_id_is_the_key(tmp_path, name, values, what):
    frame = pd.DataFrame({name: list(values)}).join(numbers(["a", "b", "y"]))
    guess = found(tmp_path, frame)
    assert role(guess, name) == what
    assert guess.tree["data"].get("key") == (name if what == "key" else None)
    assert role(found(tmp_path, frame, {"inputs": [name, "a"]}), name) != "key"
    if what == "key" and name != "run":
        assert role(found(tmp_path, frame.assign(patient_id=np.arange(60) % 20)), name) == "left out"


def test_a_key_with_another_value_in_each_row_changes_no_split(tmp_path):
    frame = pd.DataFrame({"Probe": [f"P-{i}" for i in range(60)]}).join(numbers(["a", "b", "y"]))
    trees = found(tmp_path, frame).tree, found(tmp_path, frame.drop(columns="Probe"), name="u.csv").tree
    with_key, without = (prepare(read_source(check_config(tree, "test")), 0) for tree in trees)
    assert trees[0]["data"]["key"] == "Probe"
    assert with_key.split_hash == without.split_hash
    assert with_key.inputs.width == without.inputs.width == 2


@pytest.mark.parametrize(
    ("form", "missing", "needs"),
    [
        ("%Y-%m-%d", 0, ""),
        ("%d.%m.%Y", 0, " (needs dates written as 2024-12-31)"),
        ("%Y-%m-%d", 3, " (needs a date in every row)"),
    ],
)
def test_dates_may_call_for_a_split_by_time(tmp_path, form, missing, needs):
    day = pd.Series(pd.date_range("2020-01-01", periods=60)).dt.strftime(form)
    day[:missing] = None
    frame = numbers(["a", "y"]).assign(**{"the day": day})
    (note,) = found(tmp_path, frame).notes
    assert note.startswith("column the day holds dates")
    assert note.endswith("to split by time: --split.by time --split.column 'the day'" + needs)
    by_time = {"split": {"by": "time", "column": "the day"}}
    assert found(tmp_path, frame, by_time).notes == []
    if not needs:
        assert (
            prepare(read_source(check_config(found(tmp_path, frame, by_time).tree, "test")), 0).split_rows["test"].min() == 54
        )


def test_lists_are_arrays_scaled_by_what_they_hold(tmp_path):
    bits = pd.DataFrame({"x": list(rng.integers(0, 2, (30, 5))), "e": list(rng.normal(size=(30, 4))), "n": rng.normal(size=30)})
    guess = found(tmp_path, bits, name="t.parquet")
    assert guess.tree["inputs"]["x"] == {"class_path": "Array", "init_args": {"normalize": "rms"}}
    assert guess.tree["inputs"]["e"] == {"class_path": "Array", "init_args": {"standardize": True}}
    assert of(guess, "label") == ["n"]
    gaps = pd.DataFrame({"x": [[0.0, None], None] * 15, "tags": [["a", "b"]] * 30, "n": rng.normal(size=30)})
    guess = found(tmp_path, gaps, name="g.parquet")
    assert guess.tree["inputs"] == {"x": {"class_path": "Array", "init_args": {"normalize": "rms"}}}
    assert "lists of something else than numbers" in reason(guess, "tags")


def test_a_column_of_numbers_that_is_called_as_the_datas_splits_is_an_input(tmp_path):
    guess = found(tmp_path, numbers(["__source__", "x2", "y"]))
    assert guess.tree["split"]["by"] == "random"
    assert of(guess, "input") == ["__source__", "x2"]


def test_numbers_with_a_text_among_them_are_said_to_be_that(tmp_path):
    frame = numbers(["c", "a", "b"]).astype({"a": object, "b": object})
    frame.loc[7, "a"] = "<0.1"
    frame["b"] = [f"remark {i}" for i in range(60)]
    guess = found(tmp_path, frame.assign(x1=1.5 * np.arange(60)))
    assert "numbers, but '<0.1' in 1 of 60 rows: mend those" in reason(guess, "a")
    assert "free text" in reason(guess, "b")


def test_a_file_that_seems_to_lack_a_header_is_mentioned(tmp_path):
    assert "seem to be values: if the file has no header" in found(tmp_path, numbers(["0.5", "-1.25", "3"])).notes[0]
    assert not found(tmp_path, numbers(["0", "1", "2"])).notes


def test_a_text_that_is_named_as_a_label_is_mentioned(tmp_path):
    texts = [f"{i}" if i % 2 else f"a {i}" for i in range(60)]
    guess = found(tmp_path, numbers(["a", "b"]).assign(y=texts))
    assert of(guess, "label") == ["b"]
    assert "1 column (y) is named as labels, but free text; if labels: --labels y" in guess.notes
    assert not found(tmp_path, numbers(["a", "b", "target"]).assign(y=texts)).notes


def test_an_index_that_pandas_wrote_is_neither_an_input_nor_the_label(tmp_path):
    guess = found(tmp_path, numbers(["a", "b", "c"]).assign(__index_level_0__=np.arange(60)), name="t.parquet")
    assert "index of a pandas data frame" in reason(guess, "__index_level_0__")
    assert of(guess, "label") == ["c"]


def test_files_are_tasks_splits_or_pieces_of_a_table(tmp_path):
    def folder(name, **frames):
        (tmp_path / name).mkdir()
        for stem, frame in frames.items():
            frame.to_csv(tmp_path / name / f"{stem}.csv", index=False)
        return discover({"data": {"path": str(tmp_path / name)}}).tree["data"]

    shop = numbers("abc").assign(y=1.0 * rng.integers(0, 2, 60))
    assert folder("tasks", oslo=shop, rome=shop.assign(own=1))["layout"] == "files"
    assert folder("same", oslo=numbers("abc"), rome=numbers("abc")) | {"path": ""} == {
        "path": "",
        "layout": "files",
        "label": "c",
    }
    parts = folder("split", train=shop, test=shop)
    assert parts["layout"] == "grid"
    assert sorted(parts["path"]) == ["test", "train"]
    assert folder("pieces", **{"part-0": shop, "part-1": shop})["layout"] == "grid"
    long = shop.assign(task=np.repeat(list("pqrstu"), 10))
    assert folder("long", north=long, south=long)["layout"] == "routed"
    with pytest.raises(UserError, match="different columns and no common one with a label's name"):
        folder("odd", oslo=numbers("abc"), rome=numbers("abd"))


@pytest.mark.parametrize(
    ("frame", "line"),
    [
        (pd.DataFrame({"a": [1.0], "y": [2.0]}), "has 1 row, expected at least 10"),
        (pd.DataFrame({"a": [1] * 20, "b": [2] * 20}), "no column can be a label"),
        (pd.DataFrame({"t": [f"only text {i}" for i in range(50)]}), "'t' is text"),
        (pd.DataFrame({"day": [f"2020-01-{i:02}" for i in range(1, 29)], "y": range(28)}), "no column can be a"),
    ],
)
def test_what_cannot_be_used_ends_in_one_line(tmp_path, frame, line):
    with pytest.raises(UserError, match=line):
        found(tmp_path, frame)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"data": {"key": "nope"}}, "data.key: no column 'nope'"),
        ({"data": {"task": "a", "label": "a"}}, "data.task and data.label: are both 'a', expected different columns"),
        ({"data": {"layout": "routed"}}, "layout routed: no column can be the task's; name it with --task"),
        ({"tasks": {"labels": ["z*"]}}, "tasks.labels: 'z\\*' matches no column"),
        ({"inputs": ["q"]}, "inputs: no column 'q'"),
        ({"inputs": {"q": "Numeric"}}, "inputs: no column 'q'"),
        ({"modle": {}}, "modle: unknown option; did you mean 'model'"),
        ({"train": {"epochs": -1}}, "train.epochs"),
    ],
)
def test_a_wrong_correction_is_named(tmp_path, given, line):
    with pytest.raises(UserError, match=line):
        found(tmp_path, numbers("abc"), given)


def test_other_files_are_refused_by_type(tmp_path):
    np.savez(tmp_path / "graph.npz", x=np.zeros(3))
    with pytest.raises(UserError, match=r"a file of type '.npz', expected csv"):
        discover({"data": {"path": str(tmp_path / "graph.npz")}})


def test_what_is_given_replaces_what_was_found():
    tree = {
        "train": {"epochs": 9, "lr": 1},
        "model": {"trunk": {"class_path": "MLP", "init_args": {"widths": [3]}}},
        "inputs": {"a": 1},
    }
    given = {"train": {"steps": 5}, "model": {"trunk": {"class_path": "Identity"}}, "inputs": {"b": 2}}
    assert merged(tree, given) == {"train": {"steps": 5, "lr": 1}, "model": given["model"], "inputs": {"b": 2}}


@pytest.mark.parametrize("rows", [10, 150, 1_500, 15_000, 150_000, 1_500_000, 150_000_000])
def test_sizes_grow_with_the_data(rows):
    train, trunk = sizes(rows, "grid", 10)["train"], sizes(rows, "grid", 10)["model"]["trunk"]["init_args"]
    per_epoch = max(1, 0.8 * rows / train["global_batch"])
    steps = train.get("steps") or train["epochs"] * per_epoch
    assert 16 <= train["global_batch"] <= 512
    assert 100 <= steps <= 50_000
    assert 5 <= steps / (train["eval_every"] * per_epoch) <= 60
    assert trunk["widths"][0] <= max(64, rows)


@pytest.mark.parametrize("names", [[f"g{i}" for i in range(300)], [f"{a}{b}z" for a in "abcdefghij" for b in "klmnopqrstuvwx"]])
def test_a_wide_table_is_not_looked_through_for_each_column(tmp_path, monkeypatch, names):
    calls = Counter()
    for name in ("of", "free"):
        original = getattr(_Seen, name)
        monkeypatch.setattr(_Seen, name, lambda *given, original=original: calls.update("s") or original(*given))
    monkeypatch.setattr(discovering, "matches", lambda *given: calls.update("m") or matches(*given))
    guess = found(tmp_path, numbers([*names, "y"], 20))
    assert list(guess.tree["inputs"]) == (["g*"] if "g1" in names else names)
    assert of(guess, "label") == ["y"]
    assert max(calls.values()) < len(names)


def test_large_ids_are_keys_and_no_inputs(tmp_path):
    guess = found(tmp_path, numbers(["a", "b", "y"]).assign(tweet_id=range(2**60, 2**60 + 60)), name="t.parquet")
    assert (role(guess, "tweet_id"), guess.tree["data"]["key"]) == ("key", "tweet_id")
    assert guess.tree["inputs"] == {"a": "Numeric", "b": "Numeric"}


@pytest.mark.parametrize("streaming", [False, True])
def test_views_of_strings_and_bytes_times_and_durations_do_not_stop_a_table_from_training(tmp_path, streaming):
    table = pa.table(
        {
            "text": pa.array(["a", "b", "c"] * 20, pa.string_view()),
            "bytes": pa.array([b"a", b"b"] * 30, pa.binary_view()),
            "at": pa.array(range(60), pa.time32("s")),
            "took": pa.array(range(60), pa.duration("s")),
            "y": rng.normal(size=60),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    guess = discover({"data": {"path": str(tmp_path / "t.parquet"), "streaming": streaming}})
    assert guess.tree["inputs"] == {"text": "Categorical"}
    assert of(guess, "left out") == ["bytes", "at", "took"]
    assert guess.notes == []
    assert prepare(read_source(check_config(guess.tree, "test")), 0).inputs.width == 3


@pytest.mark.parametrize(
    "path",
    [
        "tox21/tox21.csv",
        "toxcast/toxcast.csv.gz",
        "school/school_long.csv.gz",
        "kiba/kiba_long.parquet",
        "bibtex/bibtex.parquet",
    ],
)
def test_public_tables_are_found_as_their_configs_describe_them(real_data, path):
    from pathlib import Path

    from mtrain.config import load_config

    pytest.importorskip("rdkit")
    tree = discover({"data": {"path": path}}).tree
    config = load_config(Path(__file__).parents[2] / "configs" / f"{path.split('/')[0]}.yaml")
    for name in ("path", "layout", "key", "task", "label"):
        assert tree["data"].get(name) == getattr(config.data, name)
    assert set(tree["inputs"]) == set(config.inputs)
    assert tree["split"]["by"] == config.split.by
    assert tree["split"].get("column") == config.split.column

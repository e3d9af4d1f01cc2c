import gzip
import os
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtrain.config import Config
from mtrain.data.files import TASK, discover, open_tasks
from mtrain.data.labels import read_files
from mtrain.data.splits import SOURCE
from mtrain.errors import UserError


def config(inputs=None, tasks=None, **data):
    tree = {"data": {"layout": "files", **data}, "inputs": inputs or {}, "tasks": tasks or {}}
    return Config.model_validate(tree)


def labels_of(files, cfg):
    return read_files(files, cfg.tasks, cfg.data.missing_labels, cfg.data.on_error)


def both(cfg, beside=None):
    files = open_tasks(cfg, beside)
    return files, labels_of(files, cfg)


def write_csv(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_csv(path, index=False)
    return str(path)


def write_table(path, rows):
    path.write_text(yaml.safe_dump(rows, sort_keys=False))
    return str(path)


def entries(files, table):
    """{task: {row of the task: label as the user wrote it}}, by a plain loop."""
    first = dict(zip([source.name for source in files.sources], files.first_T, strict=False))
    found = {task.name: {} for task in table.tasks}
    for t, row, y in zip(table.task_P, table.row_P, table.y_P, strict=True):
        task = table.tasks[int(t)]
        found[task.name][int(row - first[task.name])] = task.classes[int(y)] if task.kind.has_classes else float(y)
    return found


# Task tables


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name,data,lable\na,a.csv,y\n", ["row 1", "unknown column 'lable'", "'label'"]),
        ("name,data\na,a.csv\na,b.csv\n", ["row 2", "'a'", "row 1"]),
        ("name,data\na,a.csv\nb,\n", ["row 2", "no data"]),
        ("name,data\n", ["no rows"]),
        ("", ["no rows"]),
        ("name,data\na,a.csv,1\n", ["row 1", "more values"]),
        ("name,name,data\na,a,a.csv\n", ["two columns", "'name'"]),
        ("name, name,data\na,a,a.csv\n", ["two columns", "'name'"]),
        ("name;data\na;a.csv\n", ["separated by ';'"]),
        ("name,data,weight\na,a.csv,-1\n", ["row 1", "weight", "'-1'", "number >= 0"]),
        ("name,data,weight\na,a.csv,heavy\n", ["row 1", "weight", "'heavy'"]),
        ("name,data,weight\na,a.csv,inf\n", ["row 1", "weight", "'inf'"]),
        ("name,data,format\na,a.csv,xlsx\n", ["row 1", "format", "'xlsx'", "parquet"]),
        ("name,data,inputs\na,a.csv,text\n", ["row 1", "inputs", "'text'", "text=sentence"]),
        ("name,data,inputs\na,a.csv,x=p;x=q\n", ["row 1", "inputs", "twice"]),
        ("name,data,inputs\na,a.csv,x=y\n", ["row 1", "'y'", "the label and an input"]),
        ("name,data,inputs\na,a.csv,x=p;z=p\n", ["row 1", "'p'", "two inputs"]),
        ("data\na.csv;b.csv\n", ["row 1", "no name"]),
        ("data\n*.csv\n", ["row 1", "no name"]),
    ],
)
def test_a_wrong_task_table_names_file_and_row(tmp_path, text, parts):
    (tmp_path / "tasks.csv").write_text(text)
    with pytest.raises(UserError) as error:
        open_tasks(config(table=str(tmp_path / "tasks.csv"), label="y", on_error="skip_task"))
    for part in ["tasks.csv", *parts]:
        assert part in str(error.value)


def test_a_missing_task_table_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"data.table nowhere.csv: no such file.*data.root"):
        open_tasks(config(table="nowhere.csv", label="y"), tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody_here/a"])
def test_names_that_no_file_can_have_are_refused_as_absent(tmp_path, name):
    absent = rf"{name}.csv: no such file"
    table = write_table(tmp_path / "t.yaml", [{"data": f"{name}.csv", "label": "y"}])
    with pytest.raises(UserError, match=rf"t.yaml, row 1\): {absent}"):
        open_tasks(config(table=table))
    for wrong in (config(table=f"{name}.csv"), config(path=f"{name}.csv", label="y")):
        with pytest.raises(UserError, match=absent.replace("file", "file or folder")):
            open_tasks(wrong)


def test_paths_are_also_tried_beside_the_task_table(tmp_path):
    write_csv(tmp_path / "tables" / "sub" / "a.csv", x=[1.0, 2.0], y=[0, 1])
    write_table(tmp_path / "tables" / "tasks.yaml", [{"data": "sub/a.csv", "label": "y"}])
    files, _ = both(config(table="tables/tasks.yaml"), beside=tmp_path)
    assert files.sources[0].name == "a"
    assert files.sources[0].files == {"": [str(tmp_path / "tables" / "sub" / "a.csv")]}


# Folders and globs


def test_each_file_of_a_folder_is_a_task_named_by_its_path(tmp_path):
    for i, name in enumerate(("london/school_7.csv.gz", "london/school_8.csv", "v1.2.csv", ".hidden/x.csv")):
        write_csv(tmp_path / "d" / name, x=[1.0] * (i + 1), y=[0.5 * i] * (i + 1))
    pq.write_table(pa.table({"x": [3.0], "y": [9.5]}), tmp_path / "d" / "p.parquet")
    (tmp_path / "d" / "README.md").write_text("no data")
    files, table = both(config(path=str(tmp_path / "d"), label="y"))
    assert table.tasks.names == ["london/school_7", "london/school_8", "p", "v1.2"]
    assert files.columns == ["x"]
    assert files.first_T.tolist() == [0, 1, 3, 4, 7]
    assert entries(files, table)["p"] == {0: 9.5}
    assert files.table.read([TASK])[TASK].to_pylist() == ["london/school_7"] + ["london/school_8"] * 2 + ["p"] + ["v1.2"] * 3


def test_a_globs_tasks_are_named_below_its_fixed_beginning(tmp_path):
    for name in ("y2024/a_1.csv", "y2024/b_1.csv", "y2025/a_1.csv"):
        write_csv(tmp_path / "d" / name, x=[1.0], y=[1.0])
    data = config(path="d/y*/a_*.csv", label="y").data
    assert [source.name for source in discover(data, [tmp_path])] == ["y2024/a_1", "y2025/a_1"]


def test_links_that_lead_round_and_pipes_give_no_tasks(tmp_path):
    write_csv(tmp_path / "d" / "a.csv", x=[1.0, 2.0], y=[0, 1])
    (tmp_path / "d" / "round").symlink_to("../d")
    assert [source.name for source in discover(config(path="d", label="y").data, [tmp_path])] == ["a"]
    os.mkfifo(tmp_path / "d" / "b.csv")
    with pytest.raises(UserError, match=r"task 'b': .*b\.csv: no such file"):
        open_tasks(config(path="d", label="y"), tmp_path)


def test_two_files_of_one_task_name_and_an_empty_folder_are_refused(tmp_path):
    write_csv(tmp_path / "d" / "a.csv", x=[1.0], y=[1.0])
    write_csv(tmp_path / "d" / "a.tsv", x=[1.0], y=[1.0])
    with pytest.raises(UserError, match=r"a.csv and .*a.tsv would both be task 'a'|a.tsv and .*a.csv would both be task 'a'"):
        open_tasks(config(path=str(tmp_path / "d"), label="y"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data files there"):
        open_tasks(config(path=str(tmp_path / "empty"), label="y"))
    with pytest.raises(UserError, match="no such file or folder"):
        open_tasks(config(path="nowhere/*.csv", label="y"))
    with pytest.raises(UserError, match=r"data.label is missing"):
        open_tasks(config(path=str(tmp_path / "d")))


# Common inputs, own labels


def test_own_names_of_inputs_and_own_label_vocabularies_meet_in_one_table(tmp_path):
    write_csv(tmp_path / "a.csv", sentence=["p", "q"], n=[1.5, 2.5], mood=["sad", "glad"], text=["other", "column"])
    write_csv(tmp_path / "b.csv", n=[3.5, 4.5, 5.5], text=["r", "s", "t"], stars=[1.5, 2.0, 9.5])
    write_csv(tmp_path / "c.csv", review=["u", "v"], n=[6.5, 7.5], topic=["sport", "arts"])
    rows = [
        {"name": "c", "data": "c.csv", "inputs": {"text": "review"}, "label": "topic"},
        {"name": "a", "data": "a.csv", "inputs": {"text": "sentence"}, "label": "mood"},
        {"name": "b", "data": "b.csv", "label": "stars"},
    ]
    files, table = both(config(table=write_table(tmp_path / "tasks.yaml", rows)))
    assert set(files.columns) == {"text", "n"}
    assert files.table.read(["text", "n"]).to_pydict() == {
        "text": ["u", "v", "p", "q", "r", "s", "t"],
        "n": [6.5, 7.5, 1.5, 2.5, 3.5, 4.5, 5.5],
    }
    assert entries(files, table) == {
        "c": {0: "sport", 1: "arts"},
        "a": {0: "sad", 1: "glad"},
        "b": {0: 1.5, 1: 2.0, 2: 9.5},
    }
    assert [task.classes for task in table.tasks] == [("arts", "sport"), ("glad", "sad"), ()]


def test_kinds_and_weights_of_the_row_win_over_all_tasks_and_by_name_over_the_row(tmp_path):
    path = write_csv(tmp_path / "d.csv", x=[1.0, 2, 3], y=[0, 1, 1])
    rows = [
        {"name": "own", "data": path, "kind": {"class_path": "binary", "init_args": {"pos_weight": 3.0}}, "weight": 2},
        {"name": "plain", "data": path},
        {"name": "named", "data": path, "kind": "binary", "weight": 2},
    ]
    tasks = {"kind": "regression", "by_name": {"named": {"kind": "poisson", "weight": 0.5}}}
    _, table = both(config(table=write_table(tmp_path / "t.yaml", rows), label="y", tasks=tasks))
    assert [task.kind.name for task in table.tasks] == ["binary", "regression", "poisson"]
    assert table.tasks[0].kind.pos_weight == 3.0
    assert table.tasks.weight_T.tolist() == [2.0, 1.0, 0.5]


def test_an_unknown_kind_names_the_row(tmp_path):
    path = write_csv(tmp_path / "d.csv", x=[1.0], y=[1.0])
    table = write_table(tmp_path / "t.yaml", [{"data": path, "kind": "binry"}])
    with pytest.raises(UserError, match=r"t.yaml, row 1, kind: 'binry' is unknown; did you mean 'binary'"):
        both(config(table=table, label="y"))


@pytest.mark.parametrize("inputs", [None, {"*": "Numeric"}])
def test_the_label_of_one_task_is_no_input_of_another(tmp_path, inputs):
    names = [f"y{i}" for i in range(5)]
    path = write_csv(
        tmp_path / "wide.csv", x=[1.0, 2.0], **{name: [0.5 + i, 1.5] for i, name in enumerate(names)}, z=["p", "q"]
    )
    rows = [{"name": name, "data": path, "label": name} for name in [*names, "z"]]
    files, table = both(config(table=write_table(tmp_path / "t.yaml", rows), inputs=inputs))
    assert files.columns == ["x"]
    assert [note for note in files.notes if "6 columns are the label of a task" in note]
    naive = {name: {0: 0.5 + i, 1: 1.5} for i, name in enumerate(names)}
    assert entries(files, table) == {**naive, "z": {0: "p", 1: "q"}}
    with pytest.raises(UserError, match=r"task 'y0'.*column 'y0' holds the labels, but is an input"):
        open_tasks(config(table=write_table(tmp_path / "t.yaml", rows), inputs={"y0": "Numeric"}))


def test_tasks_are_selected_before_files_are_opened(tmp_path):
    path = write_csv(tmp_path / "a.csv", x=[1.0], y=[1.0])
    rows = [{"name": "keep", "data": path}, {"name": "drop", "data": "nowhere.csv"}]
    table = write_table(tmp_path / "t.yaml", rows)
    files, _ = both(config(table=table, label="y", tasks={"labels": {"exclude": ["drop"]}}))
    assert [source.name for source in files.sources] == ["keep"]
    with pytest.raises(UserError, match=r"tasks.labels: 'kep'"):
        open_tasks(config(table=table, label="y", tasks={"labels": ["kep"]}))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.one_of(st.none(), st.integers(-5, 5).map(float)), min_size=1, max_size=6), min_size=1, max_size=6))
def test_labels_lie_in_their_own_rows_whatever_is_missing(tmp_path_factory, labels):
    folder = tmp_path_factory.mktemp("d")
    for i, own in enumerate(labels):
        pq.write_table(pa.table({"x": np.arange(len(own)), "y": pa.array(own, pa.float64())}), folder / f"{i}.parquet")
    cfg = config(path=str(folder), label="y", tasks={"kind": "regression"})
    naive = {f"{i}": {r: v for r, v in enumerate(own) if v is not None} for i, own in enumerate(labels)}
    naive = {name: own for name, own in naive.items() if own}
    if not naive:
        with pytest.raises(UserError, match="has a label"):
            both(cfg)
        return
    files, table = both(cfg)
    assert entries(files, table) == naive
    x_N = files.table.read(["x"])["x"].to_numpy()
    first_T = dict(zip([s.name for s in files.sources], files.first_T, strict=False))
    assert all(x_N[row] == row - first_T[table.tasks[int(t)].name] for t, row in zip(table.task_P, table.row_P, strict=True))


def test_hundreds_of_tasks_open_in_table_order(tmp_path):
    names = [f"t{i:03d}" for i in range(320)][::-1]
    for i, name in enumerate(names):
        pq.write_table(pa.table({"x": [float(i)] * (i % 3 + 1), "y": [float(i)] * (i % 3 + 1)}), tmp_path / f"{name}.parquet")
    rows = pd.DataFrame({"name": names, "data": [f"{name}.parquet" for name in names]})
    rows.to_csv(tmp_path / "tasks.csv", index=False)
    for streaming in (True, False):
        files, table = both(config(table=str(tmp_path / "tasks.csv"), label="y", streaming=streaming))
        assert files.streaming == streaming
        assert table.tasks.names == names
        assert np.diff(files.first_T).tolist() == [i % 3 + 1 for i in range(320)]
        np.testing.assert_array_equal(files.table.read(["x"])["x"].to_numpy()[table.row_P], table.task_P)


# Splits and hub data sets


def test_files_by_split_are_named_by_the_source_column(tmp_path):
    for name, x in (("a_train", [1.0, 2.0]), ("a_test", [3.0]), ("b", [4.0])):
        write_csv(tmp_path / f"{name}.csv", x=x, y=x)
    rows = [{"name": "a", "data": {"train": "a_train.csv", "test": ["a_test.csv"]}}, {"name": "b", "data": "b.csv"}]
    files, table = both(config(table=write_table(tmp_path / "t.yaml", rows), label="y"))
    assert files.table.read(["x", SOURCE]).to_pydict() == {
        "x": [1.0, 2.0, 3.0, 4.0],
        SOURCE: ["train", "train", "test", "train"],
    }
    assert entries(files, table) == {"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: 4.0}}
    assert [note for note in files.notes if "1 of 2 tasks have no splits" in note]
    assert len(set(files.table.key_C.tolist())) == 3


def card_folder(folder):
    write_csv(folder / "a.csv", x=[1.0, 2.0], y=[1.5, 2.5])
    write_csv(folder / "b.csv", x=[3.0], y=[3.5])
    write_csv(folder / "c.csv", x=[4.0], y=[4.5])
    configs = [
        {"config_name": "one", "data_files": [{"split": "train", "path": "a.csv"}, {"split": "test", "path": "b.csv"}]},
        {"config_name": "two", "data_files": "c.csv"},
    ]
    (folder / "README.md").write_text("---\n" + yaml.safe_dump({"configs": configs}) + "---\n")
    return str(folder)


def test_configurations_and_splits_of_a_hub_data_set_are_chosen(tmp_path):
    card = card_folder(tmp_path / "card")
    rows = [
        {"name": "all", "data": card, "config": "one"},
        {"name": "joined", "data": card, "config": "one", "split": "train+test"},
        {"name": "mapped", "data": card, "config": "one", "split": {"train": "test", "valid": "train"}},
        {"name": "two", "data": card, "config": "two"},
    ]
    files, _ = both(config(table=write_table(tmp_path / "t.yaml", rows), label="y"))
    table = files.table.read(["x", SOURCE]).to_pydict()
    found = [list(zip(table["x"][a:b], table[SOURCE][a:b], strict=True)) for a, b in pairwise(files.first_T)]
    assert found == [
        [(1.0, "train"), (2.0, "train"), (3.0, "test")],
        [(1.0, "train"), (2.0, "train"), (3.0, "train")],
        [(3.0, "train"), (1.0, "valid"), (2.0, "valid")],
        [(4.0, "train")],
    ]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"config": "three"}, "'three' not found"),
        ({}, "Config name is missing"),
        ({"config": "one", "split": "trian"}, "no split 'trian'; did you mean 'train'"),
    ],
)
def test_what_a_hub_data_set_does_not_have_names_the_task(tmp_path, row, part):
    rows = [{"name": "a", "data": card_folder(tmp_path / "card"), **row}]
    with pytest.raises(UserError, match=part) as error:
        open_tasks(config(table=write_table(tmp_path / "t.yaml", rows), label="y"))
    assert "task 'a'" in str(error.value)


def test_data_sets_that_need_a_script_are_always_skipped_and_counted(tmp_path):
    (tmp_path / "prog").mkdir()
    (tmp_path / "prog" / "prog.py").write_text("import datasets\n")
    rows = [{"name": "good", "data": write_csv(tmp_path / "a.csv", x=[1.0], y=[1.0])}, {"name": "old", "data": "prog"}]
    cfg = config(table=write_table(tmp_path / "t.yaml", rows), label="y", tasks={"by_name": {"old": {"weight": 2.0}}})
    files, table = both(cfg)
    assert table.tasks.names == ["good"]
    assert [name for name, _ in files.skipped] == ["old"]
    assert [note for note in files.notes if "1 tasks need a loading script" in note and "old" in note]
    with pytest.raises(UserError, match=r"none of the 1 tasks can be used.*script"):
        open_tasks(config(table=write_table(tmp_path / "t.yaml", rows[1:]), label="y"))


def test_an_unreachable_hub_data_set_and_splits_of_plain_files_are_faults(tmp_path):
    rows = [{"data": "nobody/nothing"}]
    with pytest.raises(UserError, match=r"task 'nobody/nothing'.*the hub says"):
        open_tasks(config(table=write_table(tmp_path / "t.yaml", rows), label="y"))
    rows = [{"data": write_csv(tmp_path / "a.csv", x=[1.0], y=[1.0]), "split": "train"}]
    with pytest.raises(UserError, match=r"task 'a'.*config and split are for hub data sets"):
        open_tasks(config(table=write_table(tmp_path / "t.yaml", rows), label="y"))


# Faults


def truncated_gzip(path):
    whole = gzip.compress(b"x,y\n" + b"".join(b"%d.5,%d.25\n" % (i * 7919 % 1009, i * 104729 % 997) for i in range(20000)))
    path.with_suffix(".csv.gz").write_bytes(whole[: len(whole) // 2])
    return path.with_suffix(".csv.gz")


def corrupt_parquet(path):
    path.with_suffix(".parquet").write_bytes(b"PAR1" + bytes(200))
    return path.with_suffix(".parquet")


def empty_file(path):
    path.with_suffix(".csv").write_text("")
    return path.with_suffix(".csv")


def only_a_header(path):
    path.with_suffix(".csv").write_text("x,y\n")
    return path.with_suffix(".csv")


def empty_parquet(path):
    pq.write_table(pa.table({"x": pa.array([], pa.float64()), "y": pa.array([], pa.float64())}), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def no_label(path):
    return write_csv(path.with_suffix(".csv"), x=[1.0, 2.0], ys=[1.0, 2.0])


def no_input(path):
    return write_csv(path.with_suffix(".csv"), xs=[1.0, 2.0], y=[1.0, 2.0])


def no_file(path):
    return path.with_suffix(".csv")


def text_among_numbers(path):
    return write_csv(path.with_suffix(".csv"), x=[1.0, 2.0, 3.0], y=["0.5", "oops", "2.5"])


FAULTS = {
    truncated_gzip: [],
    corrupt_parquet: [],
    empty_file: [],
    only_a_header: ["no rows"],
    empty_parquet: ["no rows"],
    no_label: ["no label column 'y'; did you mean 'ys'"],
    no_input: ["no column 'x'", "did you mean 'xs'"],
    no_file: ["no such file"],
    text_among_numbers: ["row 2", "label column 'y'", "'oops'", "2 other rows"],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("inputs", [None, {"x": "Numeric"}])
def test_a_broken_task_among_many_stops_the_run_or_is_left_out_and_counted(tmp_path, fault, streaming, inputs):
    rows = [{"name": f"t{i}", "data": write_csv(tmp_path / f"t{i}.csv", x=[i + 0.5], y=[i + 0.25])} for i in range(3)]
    bad = str(fault(tmp_path / "bad"))
    rows.insert(1, {"name": "bad", "data": bad})
    options = {"table": write_table(tmp_path / "t.yaml", rows), "label": "y", "streaming": streaming, "inputs": inputs}
    with pytest.raises(UserError) as error:
        both(config(**options))
    for part in ["task 'bad'", bad, "skip_task", *FAULTS[fault]]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)

    files, table = both(config(**options, on_error="skip_task"))
    assert table.tasks.names == ["t0", "t1", "t2"]
    assert entries(files, table) == {f"t{i}": {0: i + 0.25} for i in range(3)}
    x_N = files.table.read(["x"])["x"].to_pylist()
    assert [x_N[row] for row in table.row_P] == [0.5, 1.5, 2.5]
    notes = [note for note in [*files.notes, *table.notes] if "1 tasks have" in note and "left out" in note]
    assert len(notes) == 1
    assert "bad" in notes[0]


def test_if_every_task_is_broken_the_first_reason_is_given(tmp_path):
    rows = [{"name": "a", "data": "nowhere.csv"}, {"name": "b", "data": "nowhere2.csv"}]
    with pytest.raises(UserError, match=r"none of the 2 tasks can be used; the first, 'a': nowhere.csv: no such file"):
        open_tasks(config(table=write_table(tmp_path / "t.yaml", rows), label="y", on_error="skip_task"))


def test_a_column_that_half_the_tasks_have_is_no_input_and_noted(tmp_path):
    for i in range(4):
        extra = {"z": [1.0]} if i % 2 else {}
        write_csv(tmp_path / "d" / f"{i}.csv", x=[1.0], y=[1.0], **extra)
    files = open_tasks(config(path=str(tmp_path / "d"), label="y"))
    assert files.columns == ["x"]
    assert [note for note in files.notes if "not in all tasks" in note and "z" in note]
    with pytest.raises(UserError, match=r"task '0'.*no column 'z', which the config names"):
        open_tasks(config(path=str(tmp_path / "d"), label="y", inputs={"z": "Numeric"}))


def test_tasks_without_a_common_column_are_refused(tmp_path):
    write_csv(tmp_path / "d" / "a.csv", p=[1.0], y=[1.0])
    write_csv(tmp_path / "d" / "b.csv", q=[1.0], y=[1.0])
    with pytest.raises(UserError, match=r"no input column in common: 'a' has p, 'b' has q"):
        open_tasks(config(path=str(tmp_path / "d"), label="y"))


def test_whole_numbers_in_one_file_and_fractions_in_another_are_one_label(tmp_path):
    rows = [{"name": "a", "data": {"train": write_csv(tmp_path / "p.csv", x=[1.0, 2.0], y=[1, 2]),
                                   "test": write_csv(tmp_path / "q.csv", x=[3.0], y=[2.5])}}]  # fmt: skip
    files, table = both(config(table=write_table(tmp_path / "t.yaml", rows), label="y"))
    assert entries(files, table) == {"a": {0: 1.0, 1: 2.0, 2: 2.5}}


def test_text_in_one_file_of_a_task_names_that_file_and_its_row(tmp_path):
    rows = [{"name": "a", "data": {"train": write_csv(tmp_path / "p.csv", x=[1.0, 2.0], y=[1, 2]),
                                   "test": write_csv(tmp_path / "q.csv", x=[3.0, 4.0], y=["3", "oops"])}}]  # fmt: skip
    with pytest.raises(UserError, match=r"task 'a', .*q.csv, row 2, label column 'y': found 'oops'"):
        both(config(table=write_table(tmp_path / "t.yaml", rows), label="y"))


@pytest.mark.parametrize("on_error", ["stop", "skip_task"])
def test_a_value_that_its_kind_refuses_names_task_file_and_row(tmp_path, on_error):
    rows = [
        {"name": "a", "data": write_csv(tmp_path / "a.csv", x=[1.0, 2.0], y=[0, 1]), "kind": "binary"},
        {"name": "b", "data": write_csv(tmp_path / "b.csv", x=[1.0, 2.0, 3.0], y=[0, 1, 7]), "kind": "binary"},
    ]
    cfg = config(table=write_table(tmp_path / "t.yaml", rows), label="y", on_error=on_error)
    if on_error == "stop":
        with pytest.raises(UserError, match=r"task 'b', .*b.csv, row 3, label column 'y': found 7, expected 0 or 1"):
            both(cfg)
    else:
        files, table = both(cfg)
        assert table.tasks.names == ["a"]
        assert "1 tasks have labels that cannot be used" in table.notes[0]
        assert [source.name for source in files.sources] == ["a", "b"]

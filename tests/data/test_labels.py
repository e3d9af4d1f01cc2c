import re

import datasets
import numpy as np
import pyarrow as pa
import pytest

from mtrain.config import Selection, TasksConfig
from mtrain.data.labels import read_grid, read_long, select
from mtrain.data.tables import MappedTable
from mtrain.data.text import TextTable
from mtrain.errors import UserError
from mtrain.model.kinds import Kind, Poisson

NAN = float("nan")


def grid(columns, missing=(), **config):
    return grid_of(columns, list(columns), missing, **config)


def grid_of(columns, selected, missing=(), **config):
    return read_grid(MappedTable(datasets.Dataset(pa.table(columns)), 100), selected, TasksConfig(**config), list(missing))


def long(columns, missing=(), **config):
    return read_long(MappedTable(datasets.Dataset(pa.table(columns)), 100), "task", "y", TasksConfig(**config), list(missing))


def entries(table):
    """{task: {row: label as the user wrote it}}, by a plain loop."""
    out = {task.name: {} for task in table.tasks}
    for t, row, y in zip(table.task_P, table.row_P, table.y_P, strict=True):
        task = table.tasks[int(t)]
        out[task.name][int(row)] = task.classes[int(y)] if task.kind.has_classes else float(y)
    return out


def kinds(table):
    return {task.name: task.kind.name for task in table.tasks}


def test_every_label_of_a_grid_is_read_and_kinds_are_inferred_from_all_of_them():
    table = grid(
        {
            "binary": [0, 1, None, 1] * 20,
            "flag": [True, False, None, True] * 20,
            "real": [0.5, NAN, 2.0, 3.0] * 20,
            "stars": [1, 2, 3, 4] * 20,
            "count": [0, 7, 200, 3] * 20,
            "text": ["red", "", None, "blue"] * 20,
            "number as text": ["0.5", "", "1e3", " -2 "] * 20,
        }
    )
    assert kinds(table) == {
        "binary": "binary", "flag": "binary", "real": "regression", "stars": "multiclass", "count": "regression",
        "text": "multiclass", "number as text": "regression",
    }  # fmt: skip
    found = entries(table)
    assert found["binary"] == {i: float(i % 4 > 0) for i in range(80) if i % 4 != 2}
    assert found["real"] == {i: [0.5, NAN, 2.0, 3.0][i % 4] for i in range(80) if i % 4 != 1}
    assert found["stars"] == {i: "1234"[i % 4] for i in range(80)}
    assert found["text"] == {i: "red" if i % 4 == 0 else "blue" for i in range(80) if i % 4 in (0, 3)}
    assert found["number as text"] == {i: [0.5, 0, 1000, -2][i % 4] for i in range(80) if i % 4 != 1}
    assert len(table.reason_T) == len(table.tasks)
    assert all(table.reason_T)


def test_whole_numbers_are_classes_only_if_few_contiguous_and_each_frequent():
    for values, kind in (([0, 1, 2] * 10, "multiclass"), ([0, 1, 2] * 9, "regression"), ([0, 1, 3] * 10, "regression")):
        assert kinds(grid({"y": values})) == {"y": kind}


def test_whole_numbers_of_columns_whose_names_differ_in_a_number_are_of_one_kind():
    few, many = [0, 1, 2] * 10, [0, 1, 9] * 10
    assert kinds(grid({"holes 1": few, "holes 2": many, "grade": few, "other 1": few})) == {
        "holes 1": "regression", "holes 2": "regression", "grade": "multiclass", "other 1": "multiclass",
    }  # fmt: skip
    assert kinds(grid({"holes 1": few, "holes 2": many}, by_name={"holes 1": {"kind": "multiclass"}})) == {
        "holes 1": "multiclass", "holes 2": "regression",
    }  # fmt: skip


@pytest.mark.parametrize("kind", [None, "binary"])
def test_yes_and_no_are_one_and_zero(kind):
    table = grid({"a": ["Yes", "no", None, "no "], "b": ["active", "", "inactive", "active"]}, kind=kind)
    assert kinds(table) == {"a": "binary", "b": "binary"}
    assert entries(table) == {"a": {0: 1, 1: 0, 3: 0}, "b": {0: 1, 2: 0, 3: 1}}
    assert kinds(grid({"a": ["yes", "no", "perhaps"]})) == {"a": "multiclass"}
    assert kinds(grid({"a": ["yes", "no"]}, kind="multiclass")) == {"a": "multiclass"}


def test_classes_are_sorted_as_numbers_then_as_text_and_stored_by_name():
    labels = ["10", "9", "b", "a"] * 10
    table = grid({"y": labels}, kind="multiclass")
    assert table.tasks[0].classes == ("9", "10", "a", "b")
    assert entries(table)["y"] == dict(enumerate(labels))
    assert grid({"y": [3.0, 1.5, 3.0]}, kind="multiclass").tasks[0].classes == ("1.5", "3")


@pytest.mark.parametrize(
    ("values", "missing", "left"),
    [
        ([1.5, -1.0, 2.5], [-1], {0: 1.5, 2: 2.5}),
        ([1, -1, 2], [-1, 2], {0: 1.0}),
        (["1.5", "-1", "n.d."], [-1, "n.d."], {0: 1.5}),
        (["1.5", "-1.0", " n.d. "], [-1, "n.d."], {0: 1.5}),
        ([1.5, np.inf, 2.0], [float("inf")], {0: 1.5, 2: 2.0}),
        (["1", "2", "x"], ["x"], {0: 1.0, 1: 2.0}),
    ],
)
def test_values_that_mean_missing_are_no_labels(values, missing, left):
    assert entries(grid({"y": values}, missing, kind="regression"))["y"] == left


def test_a_missing_mark_among_classes_is_no_class():
    table = grid({"y": ["a", "b", "-1", "?"] * 5}, [-1, "?"])
    assert table.tasks[0].classes == ("a", "b")
    assert len(table.y_P) == 10


def test_tasks_without_labels_are_skipped_and_said():
    table = grid({"a": [1.0, 2.5], "b": pa.array([None, None], pa.float64()), "c": pa.nulls(2)})
    assert table.tasks.names == ["a"]
    assert table.notes == ["2 tasks have no label and are skipped: b, c"]
    with pytest.raises(UserError, match="none of the 1 tasks has a label"):
        grid({"a": [None, NAN]})


def test_kinds_and_weights_by_name_or_pattern_and_later_entries_win():
    columns = {"n_a": [0, 1, 2], "n_b": [0, 1, 5], "f [0-1]": [0, 1, 1]}
    by_name = {
        "*": {"kind": "regression", "weight": 2.0},
        "n_*": {"kind": "poisson"},
        "n_b": {"kind": {"class_path": "regression", "init_args": {"loss": "mae"}}, "weight": 0.5},
        "f [0-1]": {"kind": "binary"},
    }
    table = grid(columns, by_name=by_name)
    assert kinds(table) == {"n_a": "poisson", "n_b": "regression", "f [0-1]": "binary"}
    assert table.tasks.weight_T.tolist() == [2.0, 0.5, 2.0]
    assert table.tasks[1].kind.loss == "mae"
    with pytest.raises(UserError, match=r"tasks\.by_name: 'n_c' matches no task; did you mean 'n_b'"):
        grid(columns, by_name={"n_c": {"weight": 1}})
    with pytest.raises(UserError, match="every task has weight 0"):
        grid(columns, by_name={"*": {"weight": 0}})


class Even(Poisson):
    """A user's kind."""

    def problem(self, y):
        return None if y % 2 == 0 else "expected an even number"


def test_a_users_kind_is_named_by_its_import_path_and_checks_its_labels():
    path = f"{__name__}.Even"
    assert isinstance(grid({"y": [2, 4]}, kind=path).tasks[0].kind, Even)
    with pytest.raises(UserError, match=r"task 'y', row 2: found 3, expected an even number for kind even"):
        grid({"y": [2, 3]}, kind=path)
    with pytest.raises(UserError, match="not a subclass of"):
        grid({"y": [2, 3]}, kind="json.JSONDecoder")


@pytest.mark.parametrize("kind", ["binary", "poisson"])
def test_a_label_outside_its_kind_is_refused_with_task_and_row(kind):
    bad = {"binary": 2, "poisson": -2}[kind]
    values = [0, 1] * 50 + [bad]
    with pytest.raises(UserError, match=rf"task 'y', row 101: found {bad}, expected .* for kind {kind}; .*missing_labels"):
        grid({"a": [0, 1] * 50 + [1], "y": values}, kind=kind)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (["1"] * 99 + ["oops"], None, "column 'y', row 100: found 'oops', expected a number as in 99 other rows"),
        (["red", "blue"], "binary", "column 'y', row 1: found 'red', expected a number; name it"),
        ([f"1,{i}" for i in range(99)], None, "row 1: found '1,0', one of 99 different texts in 99 rows"),
        ([1.0, np.inf], None, "row 2: found inf, expected a finite number"),
        (["1", "inf"], None, "row 2: found inf, expected a finite number"),
        ([1.0, -1e39], None, r"row 2: found -1e\+39, expected a finite number that fits float32"),
        ([[1.0], [2.0]], None, "found type list<.*>, expected numbers, booleans or text"),
    ],
)
def test_labels_that_cannot_be_read_are_refused_with_column_and_row(values, kind, message):
    with pytest.raises(UserError, match=message):
        grid({"y": values}, kind=kind)


def test_integers_beyond_float64_and_decimals_and_dictionaries_are_read():
    assert entries(grid({"y": [2**62 + 1, 0]}))["y"] == {0: 2.0**62, 1: 0.0}
    assert entries(grid({"y": pa.array([1, 2], pa.decimal128(5, 2))}))["y"] == {0: 1.0, 1: 2.0}
    assert entries(grid({"y": pa.array(["p", "q", "p"]).dictionary_encode()}))["y"] == {0: "p", 1: "q", 2: "p"}


def test_a_long_table_has_a_task_for_each_name_in_order_of_appearance():
    table = long({"task": ["b", "a", "b", "c"], "y": [1.5, 0.5, None, 2.5]})
    assert table.tasks.names == ["b", "a", "c"]
    assert entries(table) == {"b": {0: 1.5}, "a": {1: 0.5}, "c": {3: 2.5}}
    assert table.notes == ["1 rows without a label or of tasks that are not selected are left out"]


def test_tasks_of_a_long_table_may_be_numbers_and_may_be_selected():
    table = long({"task": [7.0, 8.0, 9.0], "y": [1.5, 0.5, 2.5]}, labels={"exclude": ["8"]})
    assert entries(table) == {"7": {0: 1.5}, "9": {2: 2.5}}
    with pytest.raises(UserError, match="none of the 3 tasks of column 'task' is left"):
        long({"task": [7, 8, 9], "y": [1.5, 0.5, 2.5]}, labels={"exclude": ["*"]})


def test_each_task_of_a_long_table_has_its_own_classes_and_kind():
    table = long(
        {
            "task": ["color", "size", "real"] * 20,
            "y": [text for i in range(20) for text in (["red", "blue"][i % 2], ["S", "M", "L"][i % 3], f"{i}.5")],
        }
    )
    assert kinds(table) == {"color": "multiclass", "size": "multiclass", "real": "regression"}
    assert [task.classes for task in table.tasks] == [("blue", "red"), ("L", "M", "S"), ()]
    found = entries(table)
    assert found["color"] == {3 * i: ["red", "blue"][i % 2] for i in range(20)}
    assert found["real"] == {3 * i + 2: i + 0.5 for i in range(20)}


def test_numeric_classes_of_a_long_table_are_ranks_within_their_own_task():
    rng = np.random.default_rng(0)
    task = rng.integers(0, 50, 2000)
    y = rng.integers(0, 4, 2000) * 10 + task
    table = long({"task": [f"t{t}" for t in task], "y": y}, kind="multiclass")
    for name, found in entries(table).items():
        own = {int(i): str(y[i]) for i in np.flatnonzero(task == int(name[1:]))}
        assert found == own
        assert list(table.tasks[table.tasks.names.index(name)].classes) == [str(v) for v in sorted(set(map(int, own.values())))]


def test_a_row_without_a_task_name_is_refused():
    for names in (["a", None, "b"], ["a", "", "b"]):
        with pytest.raises(UserError, match="column 'task', row 2: found no task name"):
            long({"task": names, "y": [1.0, 2.0, 3.0]})
    with pytest.raises(UserError, match=r"data\.task: column 'task' has type"):
        long({"task": [["a"]], "y": [1.0]})


def test_selection_takes_names_patterns_and_all_but():
    names = ["a1", "a2", "b [x]", "c"]
    assert select(names, Selection(include=["a*", "b [x]"]), "k") == ["a1", "a2", "b [x]"]
    assert select(names, Selection(exclude=["a?", "c"]), "k") == ["b [x]"]
    with pytest.raises(UserError, match="k: 'a' occurs twice"):
        select(["a"], Selection(include=["a", "a"]), "k")
    with pytest.raises(UserError, match="k: 'd' matches no column or task"):
        select(names, Selection(exclude=["d"]), "k")
    assert select(["a1"], Selection(exclude=["id"]), "k", known=["a1", "id"]) == ["a1"]


def test_a_kind_without_a_check_takes_any_label():
    assert Kind().problem(2.5) is None


def test_a_row_of_several_files_is_named_by_its_file(tmp_path):
    files = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    (tmp_path / "a.csv").write_text("task,y\n" + "t,1\n" * 5)
    (tmp_path / "b.csv").write_text("task,y\n" + "t,1\n" * 3 + "t,inf\n")
    table = TextTable(files, "csv", 2, 0)
    at_b = f"label column 'y', {files[1]}, row 4: found inf"
    with pytest.raises(UserError, match=re.escape(at_b)):
        read_long(table, "task", "y", TasksConfig(), [])
    with pytest.raises(UserError, match=re.escape(at_b)):
        read_grid(table, ["y"], TasksConfig(), [])
    (tmp_path / "b.csv").write_text("task,y\nt,1\n,1\n")
    with pytest.raises(UserError, match=re.escape(f"column 'task', {files[1]}, row 2: found no task name")):
        read_long(TextTable(files, "csv", 2, 0), "task", "y", TasksConfig(), [])


def test_derived_tasks_have_the_labels_of_their_column_under_kinds_and_weights_of_their_own():
    columns = {"y": ["b", "a", None, "c"] * 10, "z": [0.5, 1.5, NAN, 2.0] * 10, "w": [1, 2, 3, 4] * 10}
    derived = {
        "z again": {"label": "z"},
        "is_{class}": {"label": "y", "one_against_rest": True},
        "star {class}": {"label": "w", "one_against_rest": True},
    }
    by_name = {"z again": {"kind": {"class_path": "regression", "init_args": {"loss": "huber"}}}, "is_*": {"weight": 0.5}}
    for selected in (["y", "z", "w"], ["z"]):  # a derived task's column need not be a task
        table = grid_of(columns, selected, derived=derived, by_name=by_name)
        found = entries(table)
        stars = [f"star {c}" for c in (1, 2, 3, 4)]
        assert list(found) == [*selected, "z again", "is_a", "is_b", "is_c", *stars]
        assert found["z again"] == found["z"]
        assert kinds(table)["is_a"] == kinds(table)["star 3"] == "binary"
        for letter in "abc":
            expected = {row: float(y == letter) for row, y in enumerate(columns["y"]) if y is not None}
            assert found[f"is_{letter}"] == expected
        assert found["star 3"] == {row: float(w == 3) for row, w in enumerate(columns["w"])}
        tasks = {task.name: task for task in table.tasks}
        assert (tasks["z again"].kind.loss, tasks["z again"].label, tasks["is_b"].label) == ("huber", "z", "y")
        assert (tasks["is_b"].weight, tasks["star 3"].weight) == (0.5, 1.0)
        assert table.reason_T[table.tasks.names.index("is_b")] == "class b of y"


def test_derived_tasks_of_a_long_table_have_the_rows_of_the_task_they_are_derived_from():
    columns = {"task": ["p", "q", "p", "q", "p"], "y": ["1.5", "u", "2", "v", ""]}
    derived = {"p2": {"label": "p"}, "q={class}": {"label": "q", "one_against_rest": True}}
    found = entries(long(columns, derived=derived))
    assert found["p2"] == found["p"] == {0: 1.5, 2: 2.0}
    assert found["q=u"] == {1: 1.0, 3: 0.0}
    assert found["q=v"] == {1: 0.0, 3: 1.0}


@pytest.mark.parametrize(
    ("derived", "line"),
    [
        ({"a": {"label": "yy"}}, "tasks.derived.a.label: 'yy' is no column or task that is read .* did you mean 'y'"),
        ({"z": {"label": "y"}}, "'z' is already the name of a task"),
        ({"{class}": {"label": "c", "one_against_rest": True}}, "'z' is already the name of a task"),
        ({"a {class}": {"label": "y", "one_against_rest": True}}, "'y' is regression, expected kind multiclass"),
        ({"a {class}": {"label": "none", "one_against_rest": True}}, "'none' is without labels, expected kind multiclass"),
        ({"a": {"label": "y", "one_against_rest": True}}, r"tasks.derived.a: expected \{class\} in the name"),
        ({"a {class}": {"label": "y"}}, "expected one_against_rest: true"),
        ({"a": {"label": "y"}, "b": {"label": "a"}}, "tasks.derived.b.label: 'a' is a derived task, expected one that is read"),
    ],
)
def test_what_cannot_be_derived_is_said(derived, line):
    columns = {"y": [0.5, 1.5], "z": [1.0, 2.0], "c": ["z", "u"], "none": pa.array([None, None], pa.float64())}
    with pytest.raises(UserError, match=line):
        grid_of(columns, ["y", "z", "c"], derived=derived)


def test_rows_of_other_tasks_are_left_out_and_counted_or_refused():
    columns = {"task": [0, 1, 0, 2, 1], "y": [1.0, 2.0, 3.0, 4.0, 5.0]}
    table = long(columns, labels=["0", "1"], kind="regression")
    assert entries(table) == {"0": {0: 1.0, 2: 3.0}, "1": {1: 2.0, 4: 5.0}}
    assert "1 rows without a label or of tasks that are not selected" in table.notes[0]
    with pytest.raises(UserError, match="column 'task', row 4: found '2', expected one of 0, 1"):
        long(columns, labels=["0", "1"], others="refuse")

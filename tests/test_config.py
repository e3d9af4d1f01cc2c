from __future__ import annotations

import pytest
import yaml

from mtrain.components import Spec, build, find
from mtrain.config import Config, check_config, differences, keys, load_config, to_yaml
from mtrain.errors import UserError, matches, nearest

GRID = {"data": {"path": "t.csv", "layout": "grid"}}


def load(tmp_path, tree, *words):
    path = tmp_path / "c.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return load_config(path, words)


def refused(tmp_path, tree, *words):
    with pytest.raises(UserError) as caught:
        load(tmp_path, tree, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_overrides_are_yaml_with_or_without_an_equals_sign(tmp_path):
    words = [
        "--train.lr=1e-2",
        "--train.epochs",
        "3",
        "--split.seeds",
        "[1, 2]",
        "--model.head.hidden=[8]",
        "--freeze",
        "trunk",
    ]
    config = load(tmp_path, GRID, *words)
    assert (config.train.lr, config.train.epochs, config.split.seeds) == (0.01, 3.0, [1, 2])
    assert (config.model.head.hidden, config.freeze) == ([8], ["trunk"])


def test_an_override_reaches_into_sections_that_the_file_does_not_have_and_into_bare_class_names(tmp_path):
    config = load(tmp_path, GRID | {"model": {"trunk": "MLP"}}, "--model.trunk.init_args.widths=[4]", "--tracker", "Wandb")
    assert config.model.trunk == Spec(class_path="MLP", init_args={"widths": [4]})
    assert config.tracker == Spec(class_path="Wandb")


def test_the_last_of_two_equal_overrides_wins(tmp_path):
    assert load(tmp_path, GRID, "--train.lr=1", "--train.lr=2").train.lr == 2


def test_a_resolved_config_reads_back_as_itself(tmp_path):
    config = load(tmp_path, GRID | {"inputs": {"x*": ["Numeric", "Array"]}, "tasks": {"labels": "y*"}})
    assert load(tmp_path, to_yaml(config)) == config
    assert config.tasks.labels.include == ["y*"]


def test_differences_name_each_changed_key_but_not_the_ignored_ones(tmp_path):
    old, new = load(tmp_path, GRID), load(tmp_path, GRID, "--train.lr=0.5", "--train.epochs=7", "--data.root=/x")
    assert differences(old, new, ["train.epochs", "data"]) == ["train.lr: 0.001 -> 0.5"]


def test_every_key_is_documented_except_those_that_say_it_themselves():
    silent = {key for key, text, _ in keys() if not text}
    plain = {"model.head.activation", "model.head.dropout", "select.reduce", "tasks.labels.include", "tasks.labels.exclude"}
    assert silent <= plain | {"objective.targets.center", "objective.targets.scale", "objective.balancer"}


def test_values_that_mark_missing_labels_may_be_one_value_or_infinite(tmp_path):
    assert load(tmp_path, GRID, "--data.missing_labels=-1").data.missing_labels == [-1]
    assert load(tmp_path, GRID, "--data.missing_labels=[.inf, none]").data.missing_labels == [float("inf"), "none"]


def test_values_of_a_split_column_are_text_and_bare_numbers_are_shares(tmp_path):
    parts = {"train": [0, 1, True], "valid": 0.1, "test": False}
    config = load(tmp_path, GRID | {"split": {"by": "column", "column": "fold", "parts": parts}})
    assert config.split.parts == {"train": ["0", "1", "true"], "valid": 0.1, "test": "false"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.ephocs=3"], "train.ephocs: unknown option; did you mean 'epochs'?"),
        (["--lr=3"], "lr: unknown option; did you mean 'train.lr'?"),
        (["--model.lr=3"], "model.lr: unknown option; did you mean 'train.lr'?"),
        (["--model.head.widths=[3]"], "model.head.widths: unknown option"),
        (["--model.trunk.init_arg.widths=[3]"], "did you mean 'init_args'?"),
        (["--train.epochs=abc"], "command line: train.epochs: found 'abc'; input should be a valid number"),
        (["--train.lr"], "--train.lr: a value is missing"),
        (["--train.lr", "--train.epochs", "3"], "--train.lr: a value is missing"),
        (["--train.lr=.inf"], "train.lr: found inf"),
        (["--train.lr=true"], "train.lr: found True; expected another type than true or false"),
        (["--train.lr.x=1"], "train.lr: found {'x': 1}; input should be a valid number"),
        (["--train=1"], "train: found 1; expected a section of keys and values"),
        (["--data.path=3"], "data.path: found 3; expected text or a list"),
        (["--data.path="], "data.path: found None"),
        (["--data.path=[]"], "data.path: found []; expected a file"),
        (["--data.layout=gird"], "data.layout: found 'gird'; input should be 'grid', 'routed', 'pairs' or 'files'"),
        (["--data.layout=routed"], "data.task is missing"),
        (["--data.task=t"], "data.task is for layouts routed and pairs"),
        (["--sampler=Equal"], "sampler is for layouts routed and files"),
        (["--tasks.others=refuse"], "tasks.others is for layouts routed and pairs"),
        (["--tasks.derived={b: {lable: a}}"], "tasks.derived.b.lable: unknown option; did you mean 'label'?"),
        (["--tasks.derived={b: {label: a}}", "--split.by=within_task"], "tasks.derived: split.by within_task deals out"),
        (["--data.key=t", "--data.weight=t"], "data.key and data.weight are both 't', expected different columns"),
        (["--data.layout=routed", "--data.task=t", "--data.label=t"], "data.task and data.label are both 't'"),
        (["--data.layout=pairs", "--data.task=t", "--data.label=y", "--data.key=y"], "data.label and data.key are both 'y'"),
        (
            ["--tasks.derived={b: {label: a}}", "--data.layout=routed", "--data.task=t", "--data.label=y"],
            "tasks.derived: layout routed has one task for each row",
        ),
        (["--split.seeds=[1, 1]"], "split.seeds: found [1, 1]; expected different seeds"),
        (["--split.seeds=[-1]"], "split.seeds.0: found -1"),
        (["--model.head.hidden=[0]"], "model.head.hidden.0: found 0"),
        (["--train.epochs=1", "--train.steps=2"], "train.epochs and train.steps are both given"),
        (["--train.micro_batch=999"], "train.micro_batch is larger than train.global_batch (128)"),
        (["--split.by=rnadom"], "split.by: found 'rnadom'"),
        (["train.lr=1"], "'train.lr=1': expected an override such as --train.epochs 10"),
        (["--", "1"], "expected an override"),
        (["--inputs.smiles"], "a value is missing"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(tmp_path, words, message):
    assert message in refused(tmp_path, GRID, *words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing, expected keys such as data"),
        ("- a\n- b\n", "found a list"),
        ("data: {path: [\n", "line 2: not valid YAML"),
        ("data:\n\tpath: x\n", "line 2: not valid YAML"),
        ("data: {path: a, layout: grid}\ndata: {path: b, layout: grid}\n", "line 2: not valid YAML: 'data' occurs twice"),
        ("inputs: {}\n", "data: is missing"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_its_line(tmp_path, text, message):
    assert message in refused(tmp_path, text)


def test_a_missing_folder_or_binary_config_is_refused(tmp_path):
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x81")
    for path, message in ((tmp_path / "no.yaml", "No such file"), (tmp_path, "directory"), (tmp_path / "b.yaml", "not a YAML")):
        with pytest.raises(UserError, match=message):
            load_config(path)


def test_floats_without_a_point_and_with_an_exponent_are_numbers(tmp_path):
    assert load(tmp_path, "data: {path: a, layout: grid}\ntrain: {lr: 1e-3, weight_decay: 2E-1}\n").train.lr == 1e-3


def test_the_nearest_name_is_said_or_all_of_a_few_or_nothing():
    assert nearest("epohcs", ["lr", "epochs"]) == "; did you mean 'epochs'?"
    assert nearest("lr", ["train.lr"]) == "; did you mean 'train.lr'?"
    assert nearest("zzz", ["lr", "epochs"]) == "; known: lr, epochs"
    assert nearest("zzz", [f"name{i}" for i in range(30)]) == ""


def test_a_name_with_brackets_matches_itself():
    assert matches("IC50 [uM]", "IC50 [uM]")
    assert matches("IC50 u", "IC50 [uM]")
    assert not matches("IC50 x", "IC50 [uM]")


class Own:
    """A user's class."""

    def __init__(self, width: int, copy: bool = False, names: list[str] | None = None):
        if width < 0:
            raise ValueError("negative width")
        self.width, self.copy, self.names = width, copy, names


class Open:
    def __init__(self, **anything):
        self.anything = anything


PATH = f"{__name__}.Own"


def test_a_users_class_is_built_by_its_import_path_with_checked_and_given_arguments():
    made = build(Spec(class_path=PATH, init_args={"copy": True, "names": ["a"]}), {}, "part", width=3, unused=1)
    assert isinstance(made, Own)
    assert (made.width, made.copy, made.names) == (3, True, ["a"])
    assert build(Spec(class_path=f"{__name__}.Open", init_args={"a": 1}), {}, "part").anything == {"a": 1}


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        ("Onw", {}, "part: 'Onw' is unknown; did you mean 'Own'?"),
        ("no.such.Thing", {}, "part: cannot import 'no.such.Thing'"),
        ("..", {}, "part: cannot import '..'"),
        (f"{__name__}.Missing", {}, "cannot import"),
        (PATH, {}, "part.init_args.width: is missing"),
        (PATH, {"width": "wide"}, "part.init_args.width: found 'wide'"),
        (PATH, {"width": 1, "nmaes": []}, "part.init_args.nmaes: unknown option; did you mean 'names'?"),
        (PATH, {"width": -1}, "fails with {'width': -1, 'copy': False, 'names': None}: ValueError: negative width"),
        ("math.pi", {}, "is not a class with options"),
    ],
)
def test_a_class_that_cannot_be_built_is_refused_in_one_line(path, args, message):
    with pytest.raises(UserError) as caught:
        build(Spec(class_path=path, init_args=args), {"Own": Own}, "part")
    assert message in str(caught.value)


def test_a_module_that_fails_when_imported_is_refused(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("def f( return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="SyntaxError"):
        find("broken_module.f", {}, "part")


def test_checked_trees_are_frozen():
    config = check_config(GRID, "here")
    assert isinstance(config, Config)
    with pytest.raises(ValueError):
        config.train = None  # type: ignore[misc]

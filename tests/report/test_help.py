"""What --help says."""

import re

import pytest

from mtrain.cli import main
from mtrain.report.help import FIRST_RUN, MORE


def shown(capsys, *words):
    with pytest.raises(SystemExit) as exit:
        main([*words, "--help"])
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_every_example_is_of_a_command_that_exists(capsys):
    known = re.findall(r"^    (\w+)(?: |$)", shown(capsys), re.M)
    examples = re.findall(r"^  mtrain (\w+)", "\n".join([FIRST_RUN, *MORE.values()]), re.M)
    assert set(examples) <= set(known)
    assert set(MORE) <= set(known)


@pytest.mark.parametrize("name", MORE)
def test_every_command_says_what_it_does_and_shows_its_use(capsys, name):
    text = shown(capsys, name)
    assert re.search(rf"^  mtrain {name} ", text, re.M)
    for option in set(re.findall(r" (--[a-z-]+)\b(?![._])", MORE[name])) - {"--run_dir"}:
        assert option in text
    assert max(map(len, MORE[name].splitlines())) <= 124


def test_keys_of_the_config_follow_where_they_can_be_given(capsys):
    for name in ("init", "train", "tasks", "partition", "plan"):
        assert "--train.epochs" in shown(capsys, name)
    assert "--train.epochs" not in shown(capsys, "eval")

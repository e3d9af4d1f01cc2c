import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mtrain.config import check_config, load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


ELSEWHERE = ("mtrain.fit(", "Predictor.load(")  # tests/test_notebook.py and tests/ship run these
EXAMPLES = [block for block in blocks("python") if not any(name in block for name in ELSEWHERE)]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_python_example_of_the_readme_runs(number):
    exec(EXAMPLES[number], {"torch": torch, "__name__": "mine"})


@pytest.mark.parametrize("number", range(len(blocks("yaml"))))
def test_every_config_of_the_readme_is_valid(number):
    check_config(yaml.safe_load(blocks("yaml")[number]), "README")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_that_ships_is_valid(path):
    load_config(path)


def test_the_top_level_holds_only_what_it_should():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not in a git checkout")
    top = {name.split("/")[0] for name in tracked if not name.startswith(".")}
    assert top == {"pyproject.toml", "mtrain", "launch", "configs", "tests", "README.md", "LICENSE"}


def test_every_command_of_the_readme_exists():
    help_text = subprocess.run([sys.executable, "-m", "mtrain", "--help"], capture_output=True, text=True).stdout
    named = set(re.findall(r"`mtrain ([a-z]+)", README))
    assert {"train", "init", "report", "bench"} <= named
    for command in named:
        assert re.search(rf"^    {command}\b", help_text, re.M), command

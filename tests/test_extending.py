"""The README's chapter on extending: each example, as it stands there, trains from the command line."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from mtrain.cli import main

README = Path(os.environ.get("MTRAIN_README", Path(__file__).parents[1] / "README.md"))
CHAPTER = README.read_text().partition("## Extending\n")[2].partition("\n## ")[0]
EXAMPLES = re.findall(r"\*\*An? (\w+)\*\*.*?```python\n(.*?)```\n\n```yaml\n(.*?)```", CHAPTER, re.S)


def mtrain(*words):
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return done.value.code


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a user, with the file of all examples."""
    (tmp_path / "mine.py").write_text("\n\n".join(code for _, code, _ in EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield tmp_path
    sys.modules.pop("mine", None)


def test_each_part_has_an_example_of_less_than_twenty_lines():
    assert [name for name, _, _ in EXAMPLES] == ["table", "feature", "trunk", "kind", "balancer", "sampler"]
    for name, code, config in EXAMPLES:
        assert len([line for line in (code + config).splitlines() if line.strip()]) < 20, name


@pytest.mark.parametrize(("name", "config"), [(name, config) for name, _, config in EXAMPLES])
def test_each_example_trains_stops_and_goes_on(name, config, folder, capsys):
    (folder / "mine.yaml").write_text(config)
    words = ["train", "mine.yaml", "--run_dir", "run", "--train.global_batch", "64"]
    assert mtrain(*words, "--train.epochs", "1") == 0, capsys.readouterr().err
    assert mtrain(*words, "--train.epochs", "2") == 0, capsys.readouterr().err
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["tasks"] == 5
    assert "mine." in (folder / "run" / "config.yaml").read_text()
    assert mtrain("predict", "run", "python:mine.sales(rows=20)", "-o", "out.csv") == 0, capsys.readouterr().err

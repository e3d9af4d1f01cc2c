"""`mtrain init`: from a table on disk to a commented config that trains as it is."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtrain.config import check_config
from mtrain.data.discover import Guess, discover
from mtrain.data.prepare import Prepared, Source, prepare, read_source
from mtrain.data.sources import PYTHON, folder_of, search_folders
from mtrain.data.splits import SOURCE
from mtrain.errors import UserError, some
from mtrain.report.say import say
from mtrain.report.tables import print_notes, suspicious
from mtrain.writing import replacing

CORRECT = "--layout, --labels PATTERN..., --key, --task, --label or any key of a config, such as --data.missing_labels -1"


def init(data: str, output: Path | None, given: dict[str, Any], force: bool, console: Console) -> Path:
    """Look at data, show what they are and why, write a config. Nothing is asked.

    Before it is written the config is tried: tasks, inputs and split are made from it as `mtrain train` does.

    Args:
        data: CSV, JSON, Parquet or Arrow file, folder or glob of them, or hub id.
        output: the file to write; None: `<name of the data>.yaml` in the working directory.
        given: what is settled, as a config has it; see `discover`.
        force: write over a file.

    Returns:
        The file.

    Raises:
        UserError: the file exists, or no config that trains can be made from the data.
    """
    output = output or Path(f"{_stem(data)}.yaml")
    if output.exists() and os.path.exists(data) and output.samefile(data):
        raise UserError(f"--output {output}: is the data; choose another file for the config")
    if output.exists() and not force:
        raise UserError(f"{output}: exists; choose another file with -o, or write over it with --force")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: no folder {output.parent}")
    given = {**given, "data": {**(given.get("data") or {}), "path": data}}
    guess = discover(given)
    tree = guess.tree
    tree["data"]["path"] = _portable(tree["data"]["path"], tree["data"].get("root"), output)
    print_findings(guess, console)
    config = check_config(tree, "init")
    source = read_source(config, output.parent)
    prepared = prepare(source, config.split.seeds[0])
    kinds = Counter(task.kind.name for task in prepared.tasks)
    if len(kinds) == 1 and not tree["tasks"].get("kind"):
        tree["tasks"]["kind"] = next(iter(kinds))
    _print_tasks(source, prepared, kinds, console)
    try:
        with replacing(output) as unfinished:
            unfinished.write_text(config_text(guess, data, output, kinds, prepared), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror}") from None
    say(console, f"\n{output} is written. Train it: mtrain train {output}")
    say(console, f"If something was guessed wrong, edit it, or run this again with --force and {CORRECT}")
    return output


def print_findings(guess: Guess, console: Console) -> None:
    """Which column is what, and why; and what may be wrong."""
    table = Table(box=None, pad_edge=False)
    for name in ("columns", "are", "as", "because"):
        table.add_column(name)
    for finding in guess.findings:
        columns = "(parts)" if finding.columns == [SOURCE] else some(finding.columns, 3)
        row = (columns, finding.role, finding.what, finding.why)
        table.add_row(*map(escape, row))
    console.print(table)
    say(console, f"\nlayout {guess.tree['data']['layout']}: {guess.why.get('data.layout', 'as you said')}; {guess.rows:,} rows")
    print_notes(guess.notes, console)


def _print_tasks(source: Source, prepared: Prepared, kinds: Counter[str], console: Console) -> None:
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    parts = ", ".join(f"{name} {part.num_rows:,}" for name, part in prepared.parts.items())
    labels, width = len(source.labels.y_P), prepared.inputs.width
    say(console, f"tasks: {told}; {labels:,} labels; inputs of {width:,} numbers; rows: {parts}")
    print_notes(prepared.notes, console)
    for line in suspicious(source, prepared):
        say(console, f"suspicious: {line}")


def config_text(guess: Guess, data: str, output: Path, kinds: Counter[str], prepared: Prepared) -> str:
    """The config as YAML, with the reasons as comments."""
    tree, train = guess.tree, guess.tree["train"]
    length = f"{train['steps']:,} steps" if "steps" in train else f"{train.get('epochs', 30)} passes over the training rows"
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    comments = {
        "data": [f"layout {tree['data']['layout']}: {guess.why.get('data.layout', 'as you said')}."]
        + [f"{some(f.columns, 5)}: {f.role}, because: {f.why}." for f in guess.findings if f.role not in ("label", "input")]
        + [f"Note: {note}." for note in guess.notes],
        "inputs": [f"{some(f.columns, 5)}: {f.why}." for f in guess.findings if f.role == "input"],
        "tasks": [f"{told}. Counts and classes that look like numbers need a kind of their own here."]
        + [f"Labels are {some(f.columns, 5)}, because: {f.why}." for f in guess.findings if f.role == "label"],
        "split": [f"{name}: {part.num_rows:,} rows." for name, part in prepared.parts.items()],
        "model": [
            f"Widths for {guess.rows:,} rows. More dropout, or a smaller width, if the validation part gets worse early."
        ],
        "train": [f"At most {length}; training stops after select.patience evaluations without improvement."],
        "select": ["The best step, by the median over tasks of 1 - deviance / deviance of a constant, on the validation part."],
    }
    lines = [
        f"# Made by mtrain init from {_one_line(data)}, {guess.rows:,} rows. Train it: mtrain train {_one_line(output.name)}",
        f"# Tasks, sizes and what is suspicious, without training: mtrain tasks {_one_line(output.name)}",
    ]
    for name, section in tree.items():
        lines += ["", *(f"# {_one_line(comment)}" for comment in comments.get(name, []))]
        dumped = yaml.safe_dump({name: section}, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
        lines.append(dumped.rstrip())
    return "\n".join(lines) + "\n"


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _stem(data: str) -> str:
    """`assays` of assays.csv.gz, tables/assays/*.csv or user/assays."""
    if data.startswith(PYTHON):
        return data.partition("(")[0].rpartition(".")[2]
    parts = [part for part in Path(data).parts if not any(c in part for c in "*?[")]
    return (parts[-1].split(".")[0] if parts else "") or "config"


def _portable(path: Any, root: str | None, output: Path) -> Any:
    """The path as the config's own folder sees it, or a whole one; as it is where it is found under a root, or is no file."""
    if isinstance(path, dict):
        return {part: _beside(file, output) for part, file in path.items()}
    folder = folder_of(path, search_folders(root))
    if folder == Path(".") and root is None:
        return _beside(os.path.expanduser(path), output)
    return path


def _beside(path: str, output: Path) -> str:
    folder, full = output.parent.resolve(), Path(path).absolute()
    return str(full.relative_to(folder) if full.is_relative_to(folder) else full)

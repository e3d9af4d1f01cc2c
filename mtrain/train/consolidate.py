"""A run's model as one file, for use elsewhere, and such a file as a run directory.

The file is plain safetensors: the shared network as `trunk.NAME`, each head as `heads/TASK/weights.0` `[out, in]`,
`heads/TASK/biases.0` `[out]`, ... (those of an ensemble's other members as `heads/TASK, member 1/weights.0`), without padding,
so that each is what an `nn.Linear` holds; a head's gate, scale and shift as `heads/TASK/inputs.gate_weight` and so on. Its
metadata are the run's own files as text.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtrain.errors import UserError
from mtrain.report.say import say
from mtrain.train.checkpoint import Checkpoints, Snapshot, Stacks
from mtrain.train.run_dir import RunDir
from mtrain.writing import replacing

VERSION = "1"
TEXTS = ("config.yaml", "features.json", "summary.json", "calibration.json")
TABLE = "tasks.parquet"  # in base64
HEADS = "heads/"


def consolidate(source: Path, output: Path, console: Console) -> None:
    """Write the model of a run directory (of one split) as a file, or such a file as a run directory.

    The directory can score, predict and start other runs (`init_from`), but not be trained on: it has no optimizer's state.

    Raises:
        UserError: what `source` is or lacks, or why `output` cannot be written.
    """
    if source.is_dir():
        _to_file(RunDir(source), output, console)
    elif source.is_file():
        _to_run(source, output, console)
    else:
        raise UserError(f"consolidate {source}: there is no such run directory or file")


def _to_file(run: RunDir, output: Path, console: Console) -> None:
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: expected a name that ends in .safetensors")
    if output.is_dir():
        raise UserError(f"--output {output}: is a directory, expected the name of a file")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: no folder {output.parent}; make it first")
    several = [each for each in run.splits() if each.path != run.path]
    if several:
        named = ", ".join(str(each.path) for each in several)
        raise UserError(f"run {run.path}: has a model for each of its split seeds; name one of them: {named}")
    saved, tasks = run.model(), run.tasks()
    about = {"step": saved.step, "about": saved.about}
    metadata = {"mtrain": VERSION, "checkpoint": json.dumps(about)}
    metadata |= {name: (run.path / name).read_text() for name in TEXTS if (run.path / name).is_file()}
    metadata[TABLE] = base64.b64encode((run.path / TABLE).read_bytes()).decode()
    heads = saved.heads()
    tensors = saved.tensors("trunk") | {
        f"{HEADS}{name}/{key}": tensor for name, of_one in heads.items() for key, tensor in of_one.items()
    }
    try:
        with replacing(output) as unfinished:
            save_file({key: tensor.clone() for key, tensor in tensors.items()}, unfinished, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output {output}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    say(console, f"step {saved.step}, {len(tasks)} tasks: {output}")


def _to_run(source: Path, output: Path, console: Console) -> None:
    metadata, tensors = _read(source)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output}: exists; expected the name of a new run directory")
    if output.suffix == ".safetensors":
        raise UserError(f"--output {output}: {source} becomes a run directory, expected a name without .safetensors")
    checkpoint = json.loads(metadata["checkpoint"])
    step, about = checkpoint["step"], checkpoint["about"]
    if about["final"] == step:  # the selected model, which is another one, is not in the file
        about["best"] = None
    trunk = {key: tensor for key, tensor in tensors.items() if not key.startswith(HEADS)}
    unfinished = output.absolute().with_name(f".{output.name}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name in TEXTS:
            if name in metadata:
                (unfinished / name).write_text(metadata[name])
        (unfinished / TABLE).write_bytes(base64.b64decode(metadata[TABLE]))
        tasks = RunDir(unfinished).tasks()
        heads = _stacks(tensors)
        if lost := sorted({task.name for task in tasks} - {name for each in heads for name in each.names}):
            raise UserError(f"{source}: holds no head of task '{lost[0]}', but names it; write the file again from its run")
        checkpoints = Checkpoints(unfinished / "checkpoints")
        checkpoints.save(step, Snapshot(trunk, heads), about)
        if (failure := checkpoints.finish()) is not None:
            raise UserError(f"--output {output}: {failure}")
        os.rename(unfinished, output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    say(console, f"step {step}, {len(tasks)} tasks: {output}")


def _read(source: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(source, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{source}: is not a file of tensors (safetensors): {error}") from None
    if "mtrain" not in metadata:
        raise UserError(f"{source}: was not written by mtrain consolidate: its metadata do not say what the model is")
    if metadata["mtrain"] != VERSION:
        raise UserError(f"{source}: is of format {metadata['mtrain']}, this mtrain reads {VERSION}; update mtrain")
    if lost := [name for name in ("checkpoint", "config.yaml", TABLE) if name not in metadata]:
        raise UserError(f"{source}: its metadata lack {lost[0]}; write the file again from its run")
    return metadata, tensors


def _stacks(tensors: dict[str, Tensor]) -> list[Stacks]:
    """The heads in the file, those of the same shapes together."""
    heads: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if key.startswith(HEADS):
            name, _, layer = key.removeprefix(HEADS).rpartition("/")
            heads[name][layer] = tensor
    alike: dict[Any, list[str]] = defaultdict(list)
    for name, of_one in heads.items():
        alike[tuple((key, *tensor.shape) for key, tensor in sorted(of_one.items()))].append(name)
    stacks = []
    for names in alike.values():
        of_all = {key: torch.stack([heads[name][key] for name in names]) for key in heads[names[0]]}
        last = max(int(key.removeprefix("biases.")) for key in of_all if key.startswith("biases."))
        outputs = of_all[f"biases.{last}"].shape[1]
        stacks.append(Stacks(names, [outputs] * len(names), of_all))
    return stacks

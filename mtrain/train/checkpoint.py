"""Checkpoints: complete and verified, or absent.

A checkpoint is a directory `step-000000100/` with a file of tensors from each rank, `shard-00000-of-00002.safetensors`, and
`manifest.json` with each file's size and checksum, written last. All is written into a hidden directory, synced, and renamed.
A save copies the state; a thread writes the copy while training goes on. Heads are found by their task's name, and trunk
tensors by the region that they are of the whole, so any number of ranks can load what any other number has saved.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import uuid
import weakref
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mtrain.errors import UserError, some
from mtrain.parallel.wrap import sharded
from mtrain.train.shards import Damaged, ShardBuffer, ShardFile, decode, encode, verify

VERSION = 1
MANIFEST = "manifest.json"
_VISIBLE = re.compile(r"step-(\d{9,})")
_HIDDEN = re.compile(r"\.step-(\d{9,})\.[0-9a-f]+")  # being written, replaced or removed
_LAYER = re.compile(r"\.(\d+)")
_PARAMETER = re.compile(r"\w+\.\w+")  # of a head, not of its optimizer

_X = TypeVar("_X")
_Sources = dict[str, tuple[Tensor, Tensor | None]]  # of each name, those rows or all of them


class Ranks(Protocol):
    """What is asked of a `World`."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def gather_objects(self, value: Any, /) -> list[Any]: ...


class OneRank:
    """A process on its own."""

    rank, size = 0, 1

    def gather_objects(self, value: Any, /) -> list[Any]:
        return [value]


@dataclass
class Stacks:
    """Heads of one group on this rank.

    Attributes:
        names: of the heads, in stack order.
        sizes: number of outputs of each; the stacks of the last layer are padded on dimension 1 to the largest.
        tensors: "weights.0" `[T_g, out, in]`, "biases.0" `[T_g, out]`, of the optimizer "weights.0.exp_avg" like it,
            "weights.0.step" `[T_g]`, ...: a number after the first dot is the layer.
        written: False at heads that another rank writes; None where this rank writes all.
        hidden: widths of each head's hidden layers, where the stacks are padded to the largest; None where they are alike.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    tensors: dict[str, Tensor]
    written: Sequence[bool] | None = None
    hidden: Sequence[Sequence[int]] | None = None


@dataclass
class Snapshot:
    """What one rank contributes to a checkpoint.

    Attributes:
        tensors: of the trunk and its optimizer. Plain ones are equal on all ranks and written by rank 0; each region of a
            DTensor is written once, by a rank that holds it.
        heads: for each head group.
        state: a tree of dicts (with text as keys), lists, tuples, tensors and plain values, equal on all ranks.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    heads: list[Stacks] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of a run: the newest `keep`, and those whose steps are `about["best"]` and `about["final"]`.

    Every method is called on all ranks alike, with `world=None` by a process on its own. All ranks must see one folder.

    Attributes:
        refused: what the last `newest` found damaged, one line each.
        in_flight: a save was begun and is not committed yet; the same on all ranks.
    """

    def __init__(self, folder: Path, keep: int = 1, world: Ranks | None = None):
        self.folder, self.keep, self.world = folder, keep, world or OneRank()
        self.refused: list[str] = []
        self.in_flight = False
        self._damaged: set[int] = set()
        self._token = ""  # the same on all ranks, from the first save on
        self._buffer = ShardBuffer()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._done = threading.Event()
        self._done.set()
        self._written: tuple[str, int, int] | str = ""  # file, size and checksum, or what went wrong
        self._step = 0
        self._about: dict[str, Any] = {}

    @property
    def writing(self) -> bool:
        """Whether this rank has not written its file yet."""
        return not self._done.is_set()

    @torch.no_grad()
    def save(self, step: int, snapshot: Snapshot, about: dict[str, Any]) -> str | None:
        """Copy the state and begin to write it. `about` is small and plain JSON.

        A save that is still in flight is finished first: returns what `finish` says of it.
        """
        failure = self.finish()
        if not self._token:
            self._begin()
        self._step, self._about = step, json.loads(json.dumps(about))
        layout: dict[str, Any] = {"tensors": {}, "heads": []}
        sources = _own_regions(snapshot.tensors, self.world.rank, layout["tensors"])
        for number, stacks in enumerate(snapshot.heads):
            sources |= _own_heads(number, stacks, layout["heads"])
        if self.world.rank == 0:
            tensors: dict[str, Tensor] = {}
            layout["state"] = encode(snapshot.state, tensors)
            sources |= {key: (tensor, None) for key, tensor in tensors.items()}
        self._buffer.fill(sources)
        self._done.clear()
        self._jobs.put(partial(self._write, layout))
        self.in_flight = True
        return failure

    @property
    def _unfinished(self) -> Path:
        """Where the save in flight is written."""
        return self.folder / f".{_name(self._step)}.{self._token}"

    def _write(self, layout: dict[str, Any]) -> None:
        """In the thread: no collectives, and nothing is raised."""
        path = self._unfinished / f"shard-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._written = (path.name, *self._buffer.write(path, layout))
        except OSError as error:
            self._written = f"{path.name}: {error.strerror or error}"
        except Exception as error:
            self._written = f"{path.name}: {type(error).__name__}: {error}"
        self._done.set()

    def finish(self) -> str | None:
        """Wait for a save that is in flight, and `commit` it."""
        return self.commit() if self.in_flight else None

    def commit(self) -> str | None:
        """Make the save in flight a checkpoint, and remove those not kept; returns a line where that failed, else None.

        Best called when no rank is `writing` any more: it waits for the slowest. Checkpoints of later steps, of a run that
        went back, are removed as well, and so are those that `newest` found damaged.
        """
        assert self.in_flight
        self._done.wait()
        self.in_flight = False
        written = self.world.gather_objects(self._written)
        line = self._settle(written) if self.world.rank == 0 else None
        return self.world.gather_objects(line)[0]

    def _settle(self, written: list[tuple[str, int, int] | str]) -> str | None:
        """On rank 0, which raises nothing: the others wait for it."""
        place = self.folder / _name(self._step)
        files, problem = {}, None
        for each in written:
            if isinstance(each, str):
                problem = problem or each
            else:
                files[each[0]] = {"size": each[1], "crc32": each[2]}
        if problem is None:
            try:
                self._publish(place, files)
            except OSError as error:
                problem = f"{Path(error.filename).name if error.filename else MANIFEST}: {error.strerror or error}"
        try:
            if problem is None:
                self._prune()
                return None
            _remove(self._unfinished)
            steps = self.steps()
            before = f"the one of step {max(steps)} is intact" if steps else "there is none before it"
            return f"checkpoint {place} was not written: {problem}; {before}"
        except OSError as error:
            done = "was written, but others" if problem is None else f"was not written: {problem}; what there is of it"
            return f"checkpoint {place} {done} cannot be removed: {error.filename}: {error.strerror}"

    def _publish(self, place: Path, files: dict[str, dict[str, int]]) -> None:
        for name, of_one in files.items():
            path = self._unfinished / name
            if not path.is_file() or path.stat().st_size != of_one["size"]:
                raise OSError(0, "is not what its rank wrote: all ranks must see one file system", name)
        manifest = {"version": VERSION, "step": self._step, "about": self._about, "files": files}
        with (self._unfinished / MANIFEST).open("w") as file:
            json.dump({"manifest": manifest, "crc32": _checksum(manifest)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(self._unfinished)
        replaced = _hide(place) if place.exists() else None
        os.rename(self._unfinished, place)
        _sync_folder(self.folder)
        if replaced is not None:
            _remove(replaced)

    def _prune(self) -> None:
        self._damaged.discard(self._step)
        whole = [step for step in self.steps() if step <= self._step and step not in self._damaged]
        kept = {*whole[-self.keep :], self._about.get("best"), self._about.get("final")}
        for step, path in self._found().items():
            if step not in kept:
                _remove(_hide(path))

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending, as this rank sees them; not verified."""
        return sorted(self._found())

    def newest(self) -> Saved | None:
        """The newest checkpoint that is complete, after reading all of it once; None where there is none.

        Raises:
            UserError: a folder or file cannot be read, or was written by a later version.
        """
        self.refused = []
        found = self._first(self._found)
        for step in sorted(found, reverse=True):
            try:
                return self._open(found[step])
            except Damaged as error:
                self.refused.append(f"checkpoint {error}")
                self._damaged.add(step)
        return None

    def at(self, step: int) -> Saved:
        """The checkpoint of one step, after reading all of it once.

        Raises:
            UserError: there is none, or it is damaged; names the file.
        """
        found = self._first(self._found)
        if step not in found:
            known = some([str(each) for each in sorted(found)]) or "none"
            raise UserError(f"{self.folder}: there is no checkpoint of step {step}; there are: {known}")
        try:
            return self._open(found[step])
        except Damaged as error:
            others = some([str(each) for each in sorted(found) if each != step]) or "none"
            raise UserError(f"checkpoint {error}; take that of another step: {others}") from None

    def _first(self, compute: Callable[[], _X]) -> _X:
        """What rank 0 computes, on all ranks; its error as well."""
        value: Any = None
        if self.world.rank == 0:
            try:
                value = compute()
            except UserError as error:
                value = error
            except OSError as error:
                value = UserError(f"{error.filename}: {error.strerror}")
        value = self.world.gather_objects(value)[0]
        if isinstance(value, UserError):
            raise value
        return value

    def _open(self, path: Path) -> Saved:
        """Verify a checkpoint, its files dealt over the ranks."""
        manifest = self._first(lambda: _read_manifest(path))
        files: dict[str, Any] = manifest["files"]
        layouts: dict[str, Any] = {}
        problem: UserError | None = None
        for name in list(files)[self.world.rank :: self.world.size]:
            try:
                verify(path / name, files[name]["size"], files[name]["crc32"])
                layouts[name] = ShardFile(path / name).layout()
            except UserError as error:
                problem = problem or error
        every: dict[str, Any] = {}
        problems: list[UserError] = []
        for of_rank, problem_there in self.world.gather_objects((layouts, problem)):
            every |= of_rank
            problems += [problem_there] if problem_there else []
        if problems:
            raise min(problems, key=lambda each: (isinstance(each, Damaged), str(each)))
        return Saved(path, manifest["step"], manifest["about"], {name: every[name] for name in files}, self.world)

    def _found(self) -> dict[int, Path]:
        """Directories with a manifest by step; a hidden one, of a process that was killed just before or between renames,
        where there is no other."""
        found: dict[int, Path] = {}
        paths = sorted(self.folder.iterdir(), reverse=True) if self.folder.is_dir() else []  # hidden ones come last
        for path in paths:
            if (match := _VISIBLE.fullmatch(path.name) or _HIDDEN.fullmatch(path.name)) and (path / MANIFEST).is_file():
                found.setdefault(int(match[1]), path)
        return found

    def _begin(self) -> None:
        """Before the first save: start the one thread for all (starting it makes the caller wait), and on rank 0 remove what
        killed processes left; a complete checkpoint gets its name."""
        threading.Thread(target=_serve, args=(self._jobs,), name="checkpoints", daemon=True).start()
        weakref.finalize(self, self._jobs.put, None)
        if self.world.rank == 0:
            with suppress(OSError):  # the save that follows says what is wrong
                for step, path in self._found().items():
                    if _HIDDEN.fullmatch(path.name):
                        os.rename(path, self.folder / _name(step))
                for path in self.folder.iterdir() if self.folder.is_dir() else ():
                    if _HIDDEN.fullmatch(path.name):
                        _remove(path)
        self._token = self.world.gather_objects(uuid.uuid4().hex)[0]


class Saved:
    """A verified checkpoint.

    Attributes:
        path, step, about: as saved.
        names: of all heads in it.
    """

    def __init__(self, path: Path, step: int, about: dict[str, Any], layouts: dict[str, Any], world: Ranks):
        self.path, self.step, self.about = path, step, about
        self._world, self._shards = world, dict[str, ShardFile]()
        self._layouts = layouts
        self._shapes: dict[str, list[int]] = {}
        self._regions: dict[str, list[tuple[str, list[int], list[int]]]] = defaultdict(list)
        self._groups: list[tuple[str, dict[str, Any]]] = []
        self._rows: dict[str, tuple[int, int]] = {}
        for file, layout in layouts.items():
            for name, (whole, offset, shape) in layout["tensors"].items():
                self._shapes[name] = whole
                self._regions[name].append((file, offset, shape))
            for group in layout["heads"]:
                self._rows |= {name: (len(self._groups), row) for row, name in enumerate(group["names"])}
                self._groups.append((file, group))
        self.names = set(self._rows)

    @cached_property
    def state(self) -> dict[str, Any]:
        """The tree, its tensors on the CPU."""
        file, layout = next((file, layout) for file, layout in self._layouts.items() if "state" in layout)
        return decode(layout["state"], lambda key: self._tensor(file, key).clone())

    def tensors(self, part: str) -> dict[str, Tensor]:
        """All tensors whose names begin with `part` and a dot, whole."""
        found = {}
        for name, shape in self._shapes.items():
            if name.startswith(f"{part}."):
                file, _, _ = self._regions[name][0]
                found[name] = torch.empty(shape, dtype=self._tensor(file, f"tensors/{name}").dtype)
        self.copy_into(found)
        return found

    def heads(self) -> dict[str, dict[str, Tensor]]:
        """The parameters of each head by its name: "weights.0" `[out, in]`, "biases.0" `[out]`, ..., without padding; and
        those of its input, as "inputs.scale"."""
        found: dict[str, dict[str, Tensor]] = {}
        for file, group in self._groups:
            keys = [key for key in group["shapes"] if _PARAMETER.fullmatch(key)]
            stacks = {key: self._tensor(file, f"heads/{group['group']}/{key}") for key in keys}
            for row, name in enumerate(group["names"]):
                widths = [*_hidden(group["shapes"], group.get("hidden"), row), group["sizes"][row]]
                found[name] = {key: _unpadded(stack[row], _layer(key), widths) for key, stack in stacks.items()}
        return found

    def copy_into(self, tensors: dict[str, Tensor]) -> None:
        """Fill tensors by name: plain ones whole, of DTensors what this rank holds, however they were saved.

        Raises:
            UserError: names, among those that share their part before the first dot, or shapes differ.
        """
        parts = {name.split(".")[0] for name in tensors}
        there = {name: shape for name, shape in self._shapes.items() if name.split(".")[0] in parts}
        here = {name: list(tensor.shape) for name, tensor in tensors.items()}
        differ = [name for name in here | there if here.get(name) != there.get(name)]
        if differ:
            said = [f"'{name}' is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here" for name in differ]
            what = f"checkpoint {self.path} is of another model: {some(said, 3)}"
            raise UserError(f"{what}; use the same model, or start a new run")
        with torch.no_grad():
            for name, tensor in tensors.items():
                local, own = _region(tensor)
                filled = 0
                for file, offset, shape in self._regions[name]:
                    bounds = [
                        (max(a, b), min(a + n, b + m)) for a, n, b, m in zip(own, local.shape, offset, shape, strict=True)
                    ]
                    if any(low >= high for low, high in bounds):
                        continue
                    into = local[tuple(slice(low - a, high - a) for (low, high), a in zip(bounds, own, strict=True))]
                    part = tuple(slice(low - b, high - b) for (low, high), b in zip(bounds, offset, strict=True))
                    into.copy_(self._tensor(file, f"tensors/{name}")[part])
                    filled += into.numel()
                assert filled == local.numel(), f"{name}: regions do not make up the whole"

    def copy_heads(self, stacks: Sequence[Stacks]) -> set[str]:
        """Fill the rows of this rank's heads by their names; returns the names found. Other heads stay as they are.

        Called on all ranks: what one of them refuses is raised on all, and nothing is copied.

        Raises:
            UserError: a task has another number of outputs, or other layers; the task is named.
        """
        moves: list[tuple[int, Stacks, list[int], list[int]]] = []
        problem = None
        try:
            for each in stacks:
                pairs: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
                for row, name in enumerate(each.names):
                    if name in self._rows:
                        number, row_there = self._rows[name]
                        group = self._groups[number][1]
                        size_there = group["sizes"][row_there]
                        if size_there != each.sizes[row]:
                            raise self._refuse(name, f"has {size_there} outputs there and {each.sizes[row]} here")
                        if each.hidden is not None or "hidden" in group:
                            theirs = _hidden(group["shapes"], group.get("hidden"), row_there)
                            ours = _hidden({key: t.shape for key, t in each.tensors.items()}, each.hidden, row)
                            if theirs != ours:
                                raise self._refuse(name, f"has hidden layers {theirs} there and {ours} here")
                        pairs[number][0].append(row_there)
                        pairs[number][1].append(row)
                for number, (there, here) in pairs.items():
                    self._compare(number, each, each.names[here[0]])
                    moves.append((number, each, there, here))
        except UserError as error:
            problem = str(error)
        if problems := [each for each in self._world.gather_objects(problem) if each]:
            raise UserError(problems[0])
        with torch.no_grad():
            for number, each, there, here in moves:
                self._copy_rows(number, each, torch.tensor(there), torch.tensor(here))
        return {each.names[row] for _, each, _, here in moves for row in here}

    def _compare(self, number: int, stacks: Stacks, name: str) -> None:
        """Whether a saved group has the layers of `stacks`; `name` is of a head in both. What is not asked for, as an
        optimizer's moments, may be there."""
        shapes = self._groups[number][1]["shapes"]
        what = {_LAYER.sub("", key) for key in stacks.tensors}
        keys = stacks.tensors | {key: None for key in shapes if _LAYER.sub("", key) in what}
        last = _last_layer(keys)
        ragged = stacks.hidden is not None or "hidden" in self._groups[number][1]
        for key in keys:
            here = list(stacks.tensors[key].shape[1:]) if key in stacks.tensors else "absent"
            there = shapes[key][1:] if key in shapes else "absent"
            layer, padded = _layer(key), 0  # dimensions whose widths were compared head by head
            if layer is not None and "absent" not in (here, there):
                padded = 2 if ragged and layer else int(ragged or layer == last)
            if here[padded:] != there[padded:]:
                raise self._refuse(name, f"'{key}' is {there} there and {here} here")

    def _refuse(self, name: str, differs: str) -> UserError:
        return UserError(f"checkpoint {self.path}: the head of task '{name}' differs: {differs}; start a new run")

    def _copy_rows(self, number: int, stacks: Stacks, there: Tensor, here: Tensor) -> None:
        file = self._groups[number][0]
        key_of = f"heads/{self._groups[number][1]['group']}"
        for key, tensor in stacks.tensors.items():
            saved, stack = self._tensor(file, f"{key_of}/{key}"), tensor.detach()
            if not torch.equal(there, torch.arange(len(saved))):
                saved = saved.index_select(0, there)
            if saved.shape[1:] != stack.shape[1:]:
                both = [slice(min(a, b)) for a, b in zip(saved.shape[1:], stack.shape[1:], strict=True)]
                narrow, saved = saved, saved.new_zeros(len(saved), *stack.shape[1:])
                saved[:, *both] = narrow[:, *both]  # what is beyond it is padding in both
            if torch.equal(here, torch.arange(len(stack))):
                stack.copy_(saved)
            else:
                stack.index_copy_(0, here.to(stack.device), saved.to(stack.device, stack.dtype))

    def _tensor(self, file: str, key: str) -> Tensor:
        if file not in self._shards:
            self._shards[file] = ShardFile(self.path / file)
        return self._shards[file].tensor(key)


def _serve(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # or it keeps its checkpoints alive while waiting for the next


def _own_regions(tensors: dict[str, Tensor], rank: int, layout: dict[str, Any]) -> _Sources:
    """What this rank writes of the trunk; `layout` gets the shape of the whole, and offset and shape of the region."""
    own: _Sources = {}
    for name, tensor in tensors.items():
        if _writes(tensor, rank):
            local, offset = _region(tensor)
            layout[name] = [list(tensor.shape), offset, list(local.shape)]
            own[f"tensors/{name}"] = local, None
    return own


def _own_heads(number: int, stacks: Stacks, layout: list[Any]) -> _Sources:
    """What this rank writes of a head group; `layout` gets a description of it."""
    names, sizes, rows = list(stacks.names), list(stacks.sizes), dict[torch.device, Tensor]()
    hidden = stacks.hidden
    if stacks.written is not None and not all(stacks.written):
        heads = [row for row, written in enumerate(stacks.written) if written]
        names, sizes = [names[row] for row in heads], [sizes[row] for row in heads]
        hidden = None if hidden is None else [hidden[row] for row in heads]
        rows = {device: torch.tensor(heads, device=device) for device in {t.device for t in stacks.tensors.values()}}
    if not names:
        return {}
    shapes = {key: [len(names), *tensor.shape[1:]] for key, tensor in stacks.tensors.items()}
    described: dict[str, Any] = {"group": number, "names": names, "sizes": sizes, "shapes": shapes}
    layout.append(described if hidden is None else described | {"hidden": [list(of_one) for of_one in hidden]})
    return {f"heads/{number}/{key}": (tensor, rows.get(tensor.device)) for key, tensor in stacks.tensors.items()}


def _region(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """What this rank holds of a tensor, and its offset in the whole."""
    if not sharded(tensor):
        return tensor.detach(), [0] * tensor.dim()
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(type(placement) not in (Replicate, Shard) for placement in tensor.placements):
        raise TypeError(f"checkpoint: a tensor is placed as {tensor.placements}: expected Replicate and Shard only")
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local().detach(), list(offset)


def _writes(tensor: Tensor, rank: int) -> bool:
    """Whether this rank writes what it holds: of several that hold the same one does."""
    if not sharded(tensor):
        return rank == 0
    place = tensor.device_mesh.get_coordinate()
    if place is None or not tensor.to_local().numel():
        return False
    return all(at == 0 for at, placement in zip(place, tensor.placements, strict=True) if placement.is_replicate())


def _layer(key: str) -> int | None:
    return int(match[1]) if (match := _LAYER.search(key)) else None


def _last_layer(keys: Any) -> int | None:
    return max((layer for key in keys if (layer := _layer(key)) is not None), default=None)


def _hidden(shapes: Mapping[str, Sequence[int]], hidden: Sequence[Sequence[int]] | None, row: int) -> list[int]:
    """Widths of a head's hidden layers."""
    if hidden is not None:
        return list(hidden[row])
    return [shapes[f"weights.{layer}"][1] for layer in range(_last_layer(shapes) or 0)]


def _unpadded(tensor: Tensor, layer: int | None, widths: Sequence[int]) -> Tensor:
    """A head's weight or bias of a layer."""
    if layer is None:
        return tensor
    tensor = tensor[: widths[layer]]
    return tensor[:, : widths[layer - 1]] if layer and tensor.dim() == 2 else tensor


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        read = json.loads(file.read_text())
        manifest, checksum = read["manifest"], read["crc32"]
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{file}: is damaged") from None
    if _checksum(manifest) != checksum:
        raise Damaged(f"{file}: is damaged, its checksum is wrong")
    if manifest["version"] != VERSION:
        raise UserError(f"{file}: is of format {manifest['version']}, this mtrain reads {VERSION}; update mtrain")
    return manifest


def _checksum(manifest: Any) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _hide(path: Path) -> Path:
    hidden = path.with_name(f".{path.name.lstrip('.').split('.')[0]}.{uuid.uuid4().hex}")
    os.rename(path, hidden)
    return hidden


def _remove(path: Path) -> None:
    """Remove a hidden directory; without its manifest, which goes first, it does not count."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder last through a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

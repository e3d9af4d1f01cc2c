"""Files of tensors: safetensors, written by hand from a buffer that is kept, and read through a memory map.

`safetensors.torch.save_file` copies all tensors into new memory first and holds the interpreter's lock meanwhile. Here the
copy goes into a buffer that already lies as the file will, and writing and checksumming release the lock.
"""

from __future__ import annotations

import errno
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mtrain.errors import UserError

CHUNK = 1 << 22  # bytes written, read and checksummed at a time
LAYOUT = "layout"  # the tensor of a file that holds a JSON text
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_PLAIN = frozenset((type(None), bool, int, float, str))
_TEXT = frozenset((str,))


class Damaged(UserError):
    """A file that is not as it was written."""


class ShardBuffer:
    """The data of one file. Memory is kept from one `fill` to the next, pinned where tensors come from CUDA."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._kinds: dict[str, tuple[torch.dtype, tuple[int, ...], bool]] = {}
        self._places: dict[str, tuple[int, Tensor]] = {}  # of each tensor, in the order of the file: offset and view
        self._size = 0
        self._events: list[torch.cuda.Event] = []

    def fill(self, tensors: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
        """Copy each tensor, or those of its rows `[n]` int64 (on its device) that are given; called without gradients.

        Copies from CUDA are only queued, in order with what follows on the device; `write` waits for them.
        """
        kinds = {
            key: (tensor.dtype, tensor.shape if rows is None else (len(rows), *tensor.shape[1:]), tensor.is_cuda)
            for key, (tensor, rows) in tensors.items()
        }
        if kinds != self._kinds:
            self._place(kinds)
        for key, (_, view) in self._places.items():
            tensor, rows = tensors[key]
            if rows is None:
                view.copy_(tensor, non_blocking=tensor.is_cuda)
            elif tensor.device.type == "cpu":
                torch.index_select(tensor, 0, rows, out=view)
            else:
                view.copy_(tensor.index_select(0, rows), non_blocking=tensor.is_cuda)
        self._events = []
        for device in {tensor.device for tensor, _ in tensors.values() if tensor.is_cuda}:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)

    def _place(self, kinds: dict[str, tuple[torch.dtype, tuple[int, ...], bool]]) -> None:
        for key, (dtype, _, _) in kinds.items():
            if dtype not in DTYPES:
                raise TypeError(f"checkpoint: {key} is of type {dtype}, which the file format does not have")
        sizes = {key: math.prod(shape) * dtype.itemsize for key, (dtype, shape, _) in kinds.items()}
        self._size, pinned = sum(sizes.values()), any(is_cuda for *_, is_cuda in kinds.values())
        if self._size > len(self._bytes) or pinned != self._bytes.is_pinned():
            self._bytes = torch.empty(self._size, dtype=torch.uint8, pin_memory=pinned)
        self._kinds, self._places, begin = kinds, {}, 0
        # the widest types first, so that each tensor is aligned without gaps, which the format does not allow
        for key, (dtype, shape, _) in sorted(kinds.items(), key=lambda item: -item[1][0].itemsize):
            view = self._bytes[begin : begin + sizes[key]].view(dtype).view(shape)
            self._places[key] = begin, view
            begin += sizes[key]

    def write(self, path: Path, layout: Mapping[str, Any]) -> tuple[int, int]:
        """Write the file, with `layout` as JSON, and sync it; returns its size and CRC-32.

        Raises:
            OSError: as the file system does.
        """
        text = json.dumps(layout).encode()
        header: dict[str, Any] = {
            key: {"dtype": DTYPES[view.dtype], "shape": list(view.shape), "data_offsets": [begin, begin + view.nbytes]}
            for key, (begin, view) in self._places.items()
        }
        header[LAYOUT] = {"dtype": "U8", "shape": [len(text)], "data_offsets": [self._size, self._size + len(text)]}
        described = json.dumps(header).encode()
        described += b" " * (-len(described) % 8)
        for event in self._events:
            event.synchronize()
        crc = size = 0
        with path.open("wb") as file:
            for part in (len(described).to_bytes(8, "little"), described, self._bytes[: self._size].numpy().data, text):
                for start in range(0, len(part), CHUNK):
                    chunk = part[start : start + CHUNK]
                    file.write(chunk)
                    crc, size = zlib.crc32(chunk, crc), size + len(chunk)
            file.flush()
            os.fsync(file.fileno())
        return size, crc


def verify(path: Path, size: int, crc: int) -> None:
    """Read a file and compare its size and CRC-32.

    Raises:
        Damaged: naming the file and what is wrong with it.
        UserError: the file is there but cannot be read.
    """
    try:
        found, now = path.stat().st_size, 0
        if found != size:
            raise Damaged(f"{path}: is damaged, it has {found} bytes and {size} were written")
        buffer = memoryview(bytearray(min(CHUNK, max(size, 1))))
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                now = zlib.crc32(buffer[:count], now)
    except FileNotFoundError:
        raise Damaged(f"{path}: is missing") from None
    except OSError as error:
        kind = Damaged if error.errno == errno.EIO else UserError
        raise kind(f"{path}: cannot be read: {error.strerror}") from error
    if now != crc:
        raise Damaged(f"{path}: is damaged, its checksum is {now:08x} and was {crc:08x}")


class ShardFile:
    """A file that was verified. Tensors are views of a memory map: only what is looked at is read."""

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt", device="cpu")

    def tensor(self, key: str) -> Tensor:
        return self._file.get_tensor(key)

    def layout(self) -> dict[str, Any]:
        return json.loads(self.tensor(LAYOUT).numpy().tobytes())


def encode(value: Any, tensors: dict[str, Tensor], where: str = "state") -> Any:
    """A copy, that JSON has, of a tree of dicts (with text as keys), lists, tuples, tensors and plain values; the tensors
    are added to `tensors` by name, and only named in the tree.

    Raises:
        TypeError: naming the place of something else.
    """
    kind = type(value)  # training waits for this: there may be several values for each of 10,000 tasks
    if kind is dict and _TEXT.issuperset(map(type, value)):
        if _PLAIN.issuperset(map(type, value.values())):
            tree = dict(value)
        else:
            tree = {k: v if type(v) in _PLAIN else encode(v, tensors, f"{where}.{k}") for k, v in value.items()}
        return {"$dict": tree} if "$" in "".join(tree) else tree
    if kind is list:
        if _PLAIN.issuperset(map(type, value)):
            return list(value)
        return [each if type(each) in _PLAIN else encode(each, tensors, where) for each in value]
    if kind is tuple:
        return {"$tuple": encode(list(value), tensors, where)}
    if isinstance(value, Tensor):
        tensors[f"state/{len(tensors)}"] = value
        return {"$tensor": f"state/{len(tensors) - 1}"}
    if kind in _PLAIN or isinstance(value, int | float | str):
        return value
    raise TypeError(f"checkpoint: {where} cannot be written: {kind.__name__} {value!r:.100}")


def decode(tree: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The tree that `encode` was given; `tensor` gives a tensor by its name."""
    if isinstance(tree, list):
        return [decode(each, tensor) for each in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensor(tree["$tensor"])
    if "$tuple" in tree:
        return tuple(decode(each, tensor) for each in tree["$tuple"])
    return {key: decode(each, tensor) for key, each in tree.get("$dict", tree).items()}

"""Checkpoints: complete or absent. One file each, written beside its place, synced, then renamed."""

from __future__ import annotations

import os
import re
import uuid
import zipfile
from pathlib import Path
from typing import Any

import torch

from mtrain.errors import UserError

_NAME = re.compile(r"step-(\d{9})\.pt")


class Checkpoints:
    """The checkpoints of a run: the latest `keep`, and the best.

    A state is a tree of dicts and lists of tensors, numbers and strings; nothing else is loaded from a file.
    """

    def __init__(self, folder: Path, keep: int = 1):
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Any]) -> None:
        self._write(self.folder / f"step-{step:09d}.pt", state)
        for old in self._steps()[: -self.keep]:
            old.unlink()

    def save_best(self, state: dict[str, Any]) -> None:
        self._write(self.folder / "best.pt", state)

    def save_refit(self, state: dict[str, Any]) -> None:
        self._write(self.folder / "refit.pt", state)

    def latest(self) -> dict[str, Any] | None:
        """The newest state, or None where there is none."""
        steps = self._steps()
        return self._read(steps[-1]) if steps else None

    def best(self) -> dict[str, Any]:
        """The state that was selected.

        Raises:
            UserError: there is none yet, or the file is damaged.
        """
        path = self.folder / "best.pt"
        if not path.is_file():
            raise UserError(f"{path}: no such file; the run has not been evaluated yet, continue it with mtrain train")
        return self._read(path)

    def model(self) -> dict[str, Any]:
        """The state to predict with: refitted where the run did that, else the selected one."""
        path = self.folder / "refit.pt"
        return self._read(path) if path.is_file() else self.best()

    def _steps(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for abandoned in self.folder.glob(".*.pt.*"):
            abandoned.unlink()
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with unfinished.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            _sync_folder(self.folder)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise UserError(f"checkpoint {path}: cannot be written: {error.strerror}; free space and start again") from error
        except RuntimeError as error:  # torch reports a full disk this way
            unfinished.unlink(missing_ok=True)
            raise UserError(f"checkpoint {path}: cannot be written: {error}") from error

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
                if (bad := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {bad}")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for a damaged file
            raise UserError(
                f"checkpoint {path}: is damaged ({type(error).__name__}: {error}); remove it to continue from the one before, "
                "or from the start where there is none"
            ) from None


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder last through a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

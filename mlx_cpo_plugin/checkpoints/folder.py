"""Checkpoints on disk, each a folder that is whole or absent: written beside, flushed, renamed, and checked when read.

A checkpoint holds files of arrays, a file of plain values, and a manifest with the size and hash of each of these.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_cpo_plugin.checkpoints.adapter import CheckpointError

MANIFEST = "manifest.json"
VALUES = "values.json"
_DIGITS = 7

Arrays = Mapping[str, mx.array]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole.

    Attributes:
        iteration: after which it was written.
        values: plain values by name.
    """

    folder: Path
    iteration: int
    values: dict[str, Any]

    def arrays(self, name: str) -> dict[str, mx.array]:
        """Return the arrays that were saved under ``name``; none if there were none."""
        file = self.folder / f"{name}.safetensors"
        return dict(mx.load(str(file))) if file.exists() else {}  # type: ignore[arg-type]  # safetensors: a dict


class CheckpointFolder:
    """The checkpoints of a run, of which the newest are kept.

    Args:
        keep: how many; at least 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, iteration: int, arrays: Mapping[str, Arrays], values: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then remove those that are too old.

        Args:
            arrays: files of arrays by name; one without arrays is left out.

        Raises:
            CheckpointError: it cannot be written; the older ones are left as they were.
        """
        target = self._target(iteration)
        partial = self.folder / f".{os.getpid()}-{target.name}"
        try:
            self._remove_leftovers()
            partial.mkdir(parents=True)
            for name, content in arrays.items():
                if content:
                    _save_arrays(partial / f"{name}.safetensors", content)
            (partial / VALUES).write_text(json.dumps(values), encoding="utf-8")
            manifest = {file.name: _describe(file) for file in sorted(partial.iterdir())}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in (*partial.iterdir(), partial):
                _flush(path)
            if target.exists():  # left by a run that was resumed from an older one
                shutil.rmtree(target)
            partial.rename(target)
            _flush(self.folder)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{target} cannot be written ({error}); free space or change adapter_path. The checkpoints before it "
                "are whole; continue with resume: auto."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in self._targets()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def newest(self, say: Callable[[str], None], at_most: int | None = None) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, of an iteration up to ``at_most``; say which are not."""
        for target in self._targets():
            if at_most is not None and int(target.name) > at_most:
                continue
            try:
                return read_checkpoint(target)
            except CheckpointError as error:
                say(f"{error} The one before it is used.")
        return None

    def _target(self, iteration: int) -> Path:
        return self.folder / f"{iteration:0{_DIGITS}d}"

    def _targets(self) -> list[Path]:
        """Return the folders that look like checkpoints, the newest first."""
        if not os.path.isdir(self.folder):  # which unlike Path.is_dir is false for names that no file can have
            return []
        found = [path for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name), reverse=True)

    def _remove_leftovers(self) -> None:
        """Remove what a run that was killed had not finished; only one run writes here at a time."""
        if self.folder.is_dir():
            for path in self.folder.glob(".*-*"):
                shutil.rmtree(path, ignore_errors=True)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in ``folder``.

    Raises:
        CheckpointError: it is not whole, or is something else; says what is wrong with which file.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        fault = next((fault for name in manifest if (fault := _fault(folder / name, manifest[name]))), None)
        if fault is None and VALUES in manifest and folder.name.isdecimal():
            return Checkpoint(folder, int(folder.name), json.loads((folder / VALUES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        fault = f"{type(error).__name__}: {error}"
    raise CheckpointError(f"The checkpoint {folder} is not whole ({fault or 'it is something else'}).")


def _fault(file: Path, described: Mapping[str, Any]) -> str | None:
    if file.stat().st_size != described["bytes"]:
        return f"{file.name} has {file.stat().st_size} bytes instead of {described['bytes']}"
    if _hash(file) != described["sha256"]:
        return f"{file.name} has another content than was written"
    return None


def _describe(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": _hash(file)}


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _save_arrays(file: Path, arrays: Arrays) -> None:
    """Write arrays, and make sure that a disk that is full did not cut them short."""
    mx.save_safetensors(str(file), dict(arrays))
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    expected = 8 + header + sum(array.nbytes for array in arrays.values())
    if file.stat().st_size != expected:
        raise OSError(f"{file.name} has {file.stat().st_size} bytes instead of {expected}")


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot flush a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)

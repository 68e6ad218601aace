"""Checkpoints on disk, each a folder that is whole or absent: written beside, flushed, renamed, and checked when read.

A checkpoint holds files of arrays, a file of plain values, and a manifest with the size and hash of each of these. Its
values name the run that wrote it and the iteration after which it did; the name of the folder is for people alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_cpo_plugin.atomic_files import check_safetensors, flush, partial_of, remove, remove_partials, sha256_of
from mlx_cpo_plugin.checkpoints import CHECKPOINTS
from mlx_cpo_plugin.checkpoints.adapter import CheckpointError
from mlx_cpo_plugin.checkpoints.run_identity import RunIdentity
from mlx_cpo_plugin.errors import is_out_of_memory
from mlx_cpo_plugin.types import Values

MANIFEST = "manifest.json"
VALUES = "values.json"

Arrays = Mapping[str, mx.array]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole: plain values by name, and arrays in files; who wrote it, and when."""

    folder: Path
    values: Values
    run: RunIdentity
    iteration: int

    def arrays(self, name: str) -> dict[str, mx.array]:
        """Return the arrays that were saved under ``name``; none if there were none."""
        file = self.folder / f"{name}.safetensors"
        return dict(mx.load(str(file))) if file.exists() else {}  # type: ignore[arg-type]  # safetensors: a dict


@dataclass
class CheckpointFolder:
    """The checkpoints of a run, of which the newest are kept.

    Attributes:
        run_id: of the run that writes them; no other's are ever removed.
        keep: how many; at least 1.
        keep_also: the iteration of one that is kept as one of them, however old it is.
    """

    folder: Path
    run_id: str
    keep: int
    keep_also: int | None = None

    def save(
        self,
        iteration: int,
        arrays: Mapping[str, Arrays],
        values: Values,
        files: Mapping[str, Path] | None = None,
    ) -> Path:
        """Write a checkpoint, then remove those of the same run that are too old, or beyond this one.

        Args:
            arrays: arrays by the names of their files; a file without arrays is left out.
            values: with ``run`` and ``iteration``, by which the checkpoint is told from others.
            files: existing files to hold by name; they are linked, so nobody may write into them afterwards.

        Raises:
            CheckpointError: it cannot be written; the older ones are left as they were.
        """
        target = self.folder / f"{iteration:07d}"
        partial = partial_of(target)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_partials(self.folder)
            partial.mkdir()
            for name, content in arrays.items():
                if content:
                    mx.save_safetensors(str(file := partial / f"{name}.safetensors"), dict(content))
                    check_safetensors(file)
            for name, file in (files or {}).items():
                _link(file, partial / name)
            (partial / VALUES).write_text(json.dumps(values), encoding="utf-8")
            manifest = {
                file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
                for file in sorted(partial.iterdir())
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in (*partial.iterdir(), partial):
                flush(path)
            if os.path.lexists(target):  # torn, or from beyond the one that the run was resumed from
                target.rename(partial_of(target, "removed"))
            partial.rename(target)
            flush(self.folder)
        except (OSError, RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"{target} cannot be written ({error}); free space or change adapter_path.",
                key="adapter_path",
                place=str(target),
            ) from error
        finally:
            remove(partial)
        remove(partial_of(target, "removed"))
        self._prune(iteration)
        return target

    def _prune(self, newest: int) -> None:
        """Remove what is too old, and what is beyond the newest: the run was resumed from an older one."""
        mine = {}
        for folder in checkpoints_in(self.folder):
            with suppress(CheckpointError):
                checkpoint = read_checkpoint(folder, hashed=False)
                if checkpoint.run.id == self.run_id:
                    mine[checkpoint.iteration] = folder
        done = sorted((iteration for iteration in mine if iteration <= newest), reverse=True)
        kept = {self.keep_also}.intersection(done[1:])
        kept |= set([iteration for iteration in done if iteration not in kept][: max(self.keep - len(kept), 1)])
        for iteration in mine.keys() - kept:
            # The name goes first: what is half removed is no checkpoint.
            aside = partial_of(mine[iteration], "removed")
            mine[iteration].rename(aside)
            remove(aside)


def folder_of_rank(adapter_folder: Path) -> Path:
    """Return where this rank has its checkpoints below an adapter folder."""
    rank = mx.distributed.init().rank()
    return adapter_folder / (CHECKPOINTS if rank == 0 else f"{CHECKPOINTS}-rank-{rank}")


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the folders that look like checkpoints, those of the highest numbers first."""
    if not os.path.isdir(folder):  # which unlike Path.is_dir is false for names that no file can have
        return []
    found = [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def read_checkpoint(folder: Path, hashed: bool = True) -> Checkpoint:
    """Return the checkpoint in ``folder``.

    Args:
        hashed: read every file; otherwise only their sizes are compared.

    Raises:
        CheckpointError: it is not whole, or is something else; says what is wrong with which file.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name in {VALUES: None, **manifest}:
            if (size := (folder / name).stat().st_size) != (expected := manifest[name]["bytes"]):
                raise ValueError(f"{name} has {size} bytes instead of {expected}")
            if hashed and sha256_of(folder / name) != manifest[name]["sha256"]:
                raise ValueError(f"{name} differs from what was written")
        values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
        return Checkpoint(folder, values, RunIdentity.from_plain(values["run"]), int(values["iteration"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        fault = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"The checkpoint {folder} is incomplete or corrupt ({fault}).", place=str(folder)
        ) from error


def _link(file: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    try:
        os.link(file, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copyfile(file, target)

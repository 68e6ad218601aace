"""From what a run goes on: the one place that decides it, by the identities of runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_cpo_plugin.checkpoints.adapter import CheckpointError
from mlx_cpo_plugin.checkpoints.folder import (
    CHECKPOINTS,
    MANIFEST,
    Checkpoint,
    checkpoints_in,
    folder_of_rank,
    read_checkpoint,
)
from mlx_cpo_plugin.checkpoints.run_identity import PREVIOUS, Origin, RunIdentity, RunRecord, read_record
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.exchange import of_all_ranks

AUTO = "auto"

Usable = Callable[[Mapping[str, Any]], bool]
"""Whether a run can go on from a checkpoint with these values."""


def _any(values: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        record: the run, and where it goes on from if that is another one.
        checkpoint: this rank's part of what is restored; ``None``: it begins with a fresh adapter.
        continues: whether the run whose folder it is goes on as itself. Otherwise a new one begins there.
        notes: what there is to tell of it.
    """

    record: RunRecord
    checkpoint: Checkpoint | None = None
    continues: bool = False
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The adapter folder that the checkpoint is in, or a checkpoint that stands alone."""
        assert self.checkpoint is not None
        folder = self.checkpoint.folder
        return folder.parent.parent if folder.parent.name.startswith(CHECKPOINTS) else folder


def find_start(
    adapter_folder: Path,
    resume: str | None,
    run: RunIdentity | None = None,
    usable: Usable = _any,
    hashed: bool = True,
) -> Start:
    """Return where a run begins, without changing anything; all ranks have to call this.

    - Without ``resume`` a new run begins.
    - ``auto`` goes on with the folder's own run, from its newest checkpoint that every rank has whole. Where there
      never was one, a new run begins.
    - Anything else is the adapter folder of a run, of which the newest checkpoint is taken, or one of its checkpoints.
      A new run begins from it, unless it is the newest of the folder's own run.

    Args:
        run: the identity that was planned: that of the folder's own run, or the one that a new run gets; by default
            one is made.
        hashed: read checkpoints completely; otherwise their sizes have to do, which tells the same runs apart.

    Raises:
        ConfigError: there is no checkpoint to go on from, or none that is whole and ``usable``.
    """
    if resume is None:
        return Start(RunRecord(_new_run(run)))
    if resume == AUTO:
        return _own_run(adapter_folder, usable, hashed) or Start(
            RunRecord(_new_run(run)),
            notes=(
                f"There is no checkpoint in {adapter_folder / CHECKPOINTS} to resume; training from the beginning.",
            ),
        )
    found = _Search(usable, hashed)
    checkpoint = found.wanted(Path(resume))
    own = _Search(usable, hashed).newest(adapter_folder)
    newest = own is not None and (own.run.id, own.iteration) == (checkpoint.run.id, checkpoint.iteration)
    if own is not None and newest and run in (None, own.run):
        record, _ = _record_in(adapter_folder)
        if record is None or record.run.id == own.run.id:
            return Start(record or RunRecord(own.run), own, continues=True, notes=found.notes)
    origin = Origin(
        checkpoint.run.id, checkpoint.iteration, str(_of_first_rank(once_put_aside(checkpoint, adapter_folder)))
    )
    return Start(RunRecord(_new_run(run, checkpoint.run), origin), checkpoint, notes=found.notes)


def planned_run(adapter_folder: Path, resume: str | None) -> RunIdentity:
    """Return the identity that a run is going to have, known before data and model are loaded.

    Raises:
        ConfigError: see :func:`find_start`.
    """
    return find_start(adapter_folder, resume, hashed=False).record.run


def _new_run(run: RunIdentity | None, goes_on_from: RunIdentity | None = None) -> RunIdentity:
    """Return the identity of a new run, the same on all ranks."""
    mine = run or RunIdentity.new(None if goes_on_from is None else goes_on_from.begun)
    return RunIdentity.from_plain(of_all_ranks(mine.plain())[0])


def _record_in(folder: Path) -> tuple[RunRecord | None, bool]:
    """Return the record of a folder's run as the first rank has it, and whether that was only about to begin there."""
    record = read_record(folder)
    about_to_begin = record is not None and record.successor is not None
    record = record.successor if record is not None and record.successor is not None else record
    shared = None if record is None else [replace(record, files=()).plain(), about_to_begin]
    first = of_all_ranks(shared)[0]
    if first is None:
        return None, False
    return RunRecord.from_plain(first[0]), first[1]


def _own_run(folder: Path, usable: Usable, hashed: bool) -> Start | None:
    """Return where the run of a folder goes on; ``None`` where none ever had a checkpoint."""
    search, (record, _) = _Search(usable, hashed), _record_in(folder)
    checkpoint = search.newest(folder)
    if checkpoint is not None:
        return Start(record or RunRecord(checkpoint.run), checkpoint, continues=True, notes=search.notes)
    if record is not None and record.origin is not None:
        # It was killed before it had a checkpoint of its own.
        path = Path(record.origin.checkpoint)
        if not path.exists():  # nor had it put aside what it went on from
            path = folder / CHECKPOINTS / path.name
        return Start(record, _Search(usable, hashed).wanted(path), notes=search.notes)
    if any(of_all_ranks(search.seen)):
        raise ConfigError(f"resume is auto, but {search.why_none(folder)}")
    return None


@dataclass
class _Search:
    """A search for a checkpoint that all ranks have whole.

    Attributes:
        faults: number and what is wrong of those that cannot be used.
        seen: how many there are of this rank, whole or not.
        notes: what there is to tell once one is found.
    """

    usable: Usable
    hashed: bool
    faults: list[tuple[int, str]] = field(default_factory=list)
    seen: int = 0
    notes: tuple[str, ...] = ()

    def newest(self, folder: Path) -> Checkpoint | None:
        """Return the newest checkpoint of the run whose folder it is."""
        record, about_to_begin = _record_in(folder)
        if about_to_begin:
            return None  # what lies there is another run's, and about to be put aside
        mine = self._whole(folder_of_rank(folder))
        run_id = of_all_ranks(record.run.id if record else mine[0].run.id if mine else None)[0]
        mine = [checkpoint for checkpoint in mine if checkpoint.run.id == run_id]
        at_most = None
        while True:
            best = next((each for each in mine if at_most is None or each.iteration <= at_most), None)
            iterations = of_all_ranks(-1 if best is None else best.iteration)
            at_most = min(iterations)
            if at_most < 0 or best is None:
                return None
            if at_most == max(iterations):
                newer = [fault for number, fault in self.faults if number > best.iteration]
                self.notes = tuple(f"{fault} {best.folder} is used." for fault in newer)
                return best

    def wanted(self, path: Path) -> Checkpoint:
        """Return the checkpoint that a path names, or the newest of the adapter folder that it names.

        Raises:
            ConfigError: there is none that is whole and usable.
        """
        if not _is_checkpoint(path):
            found = self.newest(path)
            if found is None:
                if not any(of_all_ranks(self.seen)):
                    raise ConfigError(
                        f"resume is {str(path)!r}, but there is no whole checkpoint in it; give another, or auto."
                    )
                raise ConfigError(f"resume is {str(path)!r}, but {self.why_none(path)}")
            return found
        mine = folder_of_rank(path.parent.parent) / path.name if path.parent.name.startswith(CHECKPOINTS) else path
        if mine == path and mx.distributed.init().rank() > 0 and not path.parent.name.startswith(CHECKPOINTS):
            raise ConfigError(f"resume is {str(path)!r}, which is the first rank's alone; give the adapter folder.")
        try:
            checkpoint = read_checkpoint(mine, self.hashed)
        except CheckpointError as error:
            raise ConfigError(f"resume is {str(path)!r}: {error}") from error
        if not self.usable(checkpoint.values):
            raise ConfigError(f"resume is {str(path)!r}: {_after_last_step(checkpoint)}; give an earlier one.")
        return checkpoint

    def why_none(self, folder: Path) -> str:
        """Say why none of the checkpoints of a folder can be used."""
        faults = " ".join(fault for _, fault in self.faults) or "They are of other runs, or other ranks lack them."
        return (
            f"none of the checkpoints in {folder_of_rank(folder)} can be gone on from. {faults} Nothing was changed; "
            "restore them, go on from an adapter with resume_adapter_file, or leave out resume to begin anew."
        )

    def _whole(self, folder: Path) -> list[Checkpoint]:
        """Return those that are whole and usable, the newest first."""
        found = []
        for path in checkpoints_in(folder):
            self.seen += 1
            try:
                checkpoint = read_checkpoint(path, self.hashed)
            except CheckpointError as error:
                self.faults.append((int(path.name), str(error)))
                continue
            if self.usable(checkpoint.values):
                found.append(checkpoint)
            else:
                fault = f"The checkpoint {path} is no start for these iters: {_after_last_step(checkpoint)}."
                self.faults.append((int(path.name), fault))
        return sorted(found, key=lambda checkpoint: checkpoint.iteration, reverse=True)


def _after_last_step(checkpoint: Checkpoint) -> str:
    return (
        f"it is of the last optimizer step of a run of {checkpoint.values.get('iters')} iterations, which closed early"
    )


def _is_checkpoint(path: Path) -> bool:
    in_checkpoints = path.name.isdecimal() and path.parent.name.startswith(CHECKPOINTS)
    return os.path.isfile(path / MANIFEST) or (in_checkpoints and os.path.isdir(path))


def once_put_aside(checkpoint: Checkpoint, adapter_folder: Path) -> Path:
    """Return where a checkpoint is once a new run has begun in ``adapter_folder``, which may be where it is now."""
    folder = checkpoint.folder
    if os.path.realpath(folder.parent.parent) != os.path.realpath(adapter_folder):
        return folder.absolute()
    return (adapter_folder / PREVIOUS / checkpoint.run.id / folder.parent.name / folder.name).absolute()


def _of_first_rank(folder: Path) -> Path:
    in_checkpoints = folder.parent.name.startswith(CHECKPOINTS)
    return folder.parent.with_name(CHECKPOINTS) / folder.name if in_checkpoints else folder

"""What a run starts from: the one place that decides it, by the identities of runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.checkpoints import CHECKPOINTS, PREVIOUS
from mlx_cpo_plugin.checkpoints.adapter import CheckpointError
from mlx_cpo_plugin.checkpoints.folder import MANIFEST, Checkpoint, checkpoints_in, folder_of_rank, read_checkpoint
from mlx_cpo_plugin.checkpoints.run_identity import Origin, RunIdentity, RunRecord, read_record
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.exchange import gather, is_first_rank

AUTO = "auto"

Usable = Callable[[Mapping[str, Any]], bool]
"""Whether a run can be resumed from a checkpoint with these values."""


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        record: the run, and the checkpoint of another run that it starts from, if any.
        checkpoint: this rank's part of what is restored; ``None``: it begins with a fresh adapter.
        continues: whether it is the folder's own run that is resumed. Otherwise a new one begins there.
        notes: sentences for the user.
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
        return folder.parent.parent if _is_in_adapter_folder(folder) else folder


def find_start(
    adapter_folder: Path,
    resume: str | None,
    run: RunIdentity | None = None,
    usable: Usable = lambda values: True,
    hashed: bool = True,
) -> Start:
    """Return what a run starts from, without changing anything; all ranks have to call this.

    - Without ``resume`` a new run begins.
    - ``auto`` resumes the folder's own run from its newest checkpoint that every rank has whole. If there has never
      been one, a new run begins.
    - Anything else is the adapter folder of a run, of which the newest checkpoint is taken, or one of its checkpoints.
      A new run begins from it, unless it is the newest of the folder's own run.

    Args:
        run: the identity that was planned: that of the folder's own run, or the one that a new run gets; by default
            one is made.
        hashed: read checkpoints completely; otherwise only their sizes are compared.

    Raises:
        ConfigError: there is no checkpoint to resume from, or none that is whole and ``usable``.
    """
    if resume is None:
        return Start(RunRecord(_new_run(run)))
    if resume == AUTO:
        none = f"There is no checkpoint in {adapter_folder / CHECKPOINTS} to resume; training from the beginning."
        return _own_run(adapter_folder, usable, hashed) or Start(RunRecord(_new_run(run)), notes=(none,))
    found = _Search(usable, hashed)
    checkpoint = found.wanted(Path(resume))
    own = _Search(usable, hashed).newest(adapter_folder)
    newest = own is not None and (own.run.id, own.iteration) == (checkpoint.run.id, checkpoint.iteration)
    if own is not None and newest and run in (None, own.run):
        record, _ = _record_in(adapter_folder)
        if record is None or record.run.id == own.run.id:
            return Start(record or RunRecord(own.run), own, continues=True, notes=found.notes)
    place = once_put_aside(checkpoint, adapter_folder)
    if _is_in_adapter_folder(place):  # that of the first rank
        place = place.parent.with_name(CHECKPOINTS) / place.name
    origin = Origin(checkpoint.run.id, checkpoint.iteration, str(place))
    return Start(RunRecord(_new_run(run, checkpoint.run), origin), checkpoint, notes=found.notes)


def planned_run(adapter_folder: Path, resume: str | None) -> RunIdentity:
    """Return the identity that a run is going to have, known before data and model are loaded."""
    return find_start(adapter_folder, resume, hashed=False).record.run


def once_put_aside(checkpoint: Checkpoint, adapter_folder: Path) -> Path:
    """Return where a checkpoint is once a new run has begun in ``adapter_folder``, which may be where it is now."""
    folder = checkpoint.folder
    if os.path.realpath(folder.parent.parent) != os.path.realpath(adapter_folder):
        return folder.absolute()
    return (adapter_folder / PREVIOUS / checkpoint.run.id / folder.parent.name / folder.name).absolute()


def _new_run(run: RunIdentity | None, starts_from: RunIdentity | None = None) -> RunIdentity:
    """Return the identity of a new run, the same on all ranks."""
    mine = run or RunIdentity.new(None if starts_from is None else starts_from.begun)
    return RunIdentity.from_plain(gather(mine.plain())[0])


def _record_in(folder: Path) -> tuple[RunRecord | None, bool]:
    """Return the record of a folder's run as the first rank has it, and whether that was only about to begin there."""
    record = read_record(folder)
    shared = None
    if record is not None:
        shared = [replace(record.successor or record, files=()).plain(), record.successor is not None]
    first = gather(shared)[0]
    return (None, False) if first is None else (RunRecord.from_plain(first[0]), first[1])


def _own_run(folder: Path, usable: Usable, hashed: bool) -> Start | None:
    """Return where the run of a folder continues; ``None`` where none ever had a checkpoint."""
    search, (record, _) = _Search(usable, hashed), _record_in(folder)
    checkpoint = search.newest(folder)
    if checkpoint is not None:
        return Start(record or RunRecord(checkpoint.run), checkpoint, continues=True, notes=search.notes)
    if record is not None and record.origin is not None:
        # It was killed before it had a checkpoint of its own.
        path = Path(record.origin.checkpoint)
        if not path.exists():  # nor had it put aside what it started from
            path = folder / CHECKPOINTS / path.name
        return Start(record, _Search(usable, hashed).wanted(path), notes=search.notes)
    if any(gather(search.seen)):
        raise ConfigError(f"resume is auto, but {search.why_none(folder)}", key="resume")
    return None


@dataclass
class _Search:
    """A search for a checkpoint that all ranks have whole.

    Attributes:
        faults: number and what is wrong of those that cannot be used.
        seen: how many there are of this rank, whole or not.
        notes: sentences for the user, once one is found.
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
        run_id = gather(record.run.id if record else mine[0].run.id if mine else None)[0]
        mine = [checkpoint for checkpoint in mine if checkpoint.run.id == run_id]
        # Every rank needs one of the same iteration; fifty numbers fit into an exchange.
        common = set.intersection(*map(set, gather([checkpoint.iteration for checkpoint in mine[:50]])))
        best = next((checkpoint for checkpoint in mine if checkpoint.iteration in common), None)
        if best is not None:
            newer = [fault for number, fault in self.faults if number > best.iteration]
            self.notes = tuple(f"{fault} Using {best.folder}." for fault in newer)
        return best

    def wanted(self, path: Path) -> Checkpoint:
        """Return the checkpoint that a path names, or the newest of the adapter folder that it names."""
        if not (os.path.isfile(path / MANIFEST) or (_is_in_adapter_folder(path) and os.path.isdir(path))):
            found = self.newest(path)
            if found is not None:
                return found
            if any(gather(self.seen)):
                raise ConfigError(f"resume is {str(path)!r}, but {self.why_none(path)}", key="resume")
            raise ConfigError(
                f"resume is {str(path)!r}, but there is no whole checkpoint in it; give another, or auto.",
                key="resume",
            )
        mine = path
        if path.parent.name.startswith(CHECKPOINTS):
            mine = folder_of_rank(path.parent.parent) / path.name
        elif not is_first_rank():
            raise ConfigError(
                f"resume is {str(path)!r}, which belongs to the first rank alone; give the adapter folder.",
                key="resume",
            )
        try:
            checkpoint = read_checkpoint(mine, self.hashed)
        except CheckpointError as error:
            raise ConfigError(f"resume is {str(path)!r}: {error}", key="resume") from error
        if not self.usable(checkpoint.values):
            raise ConfigError(
                f"resume is {str(path)!r}: {_in_last_step(checkpoint)}; give an earlier one.", key="resume"
            )
        return checkpoint

    def why_none(self, folder: Path) -> str:
        """Say why none of the checkpoints of a folder can be used."""
        faults = " ".join(fault for _, fault in self.faults) or "They are of other runs, or other ranks lack them."
        return (
            f"none of the checkpoints in {folder_of_rank(folder)} can be resumed. {faults} Nothing was changed; "
            "restore them, start from an adapter with resume_adapter_file, or leave out resume to begin anew."
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
                fault = f"The checkpoint {path} cannot be resumed with these iters: {_in_last_step(checkpoint)}."
                self.faults.append((int(path.name), fault))
        return sorted(found, key=lambda checkpoint: checkpoint.iteration, reverse=True)


def _in_last_step(checkpoint: Checkpoint) -> str:
    return (
        f"it is inside the last optimizer step of a run of {checkpoint.values.get('iters')} iterations, which may "
        "hold fewer micro-batches than others"
    )


def _is_in_adapter_folder(checkpoint: Path) -> bool:
    """Whether a path is that of a checkpoint where runs leave them."""
    return checkpoint.name.isdecimal() and checkpoint.parent.name.startswith(CHECKPOINTS)

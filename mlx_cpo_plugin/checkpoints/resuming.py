"""What a run starts from: the one place that decides it, by the identities of runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_cpo_plugin.checkpoints import CHECKPOINTS, PREVIOUS
from mlx_cpo_plugin.checkpoints.adapter import CheckpointError
from mlx_cpo_plugin.checkpoints.folder import MANIFEST, Checkpoint, checkpoints_in, folder_of_rank, read_checkpoint
from mlx_cpo_plugin.checkpoints.run_identity import TRAINED, Origin, RunIdentity, RunRecord, read_record
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.exchange import gather, is_first_rank
from mlx_cpo_plugin.types import Values

AUTO = "auto"

Usable = Callable[[Values], bool]
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
    own = _search(adapter_folder, usable, hashed)
    if resume == AUTO:
        if own.checkpoint is not None:
            return Start(own.record or RunRecord(own.checkpoint.run), own.checkpoint, continues=True, notes=own.notes)
        if own.record is not None and TRAINED in own.record.done and not own.some_there:
            raise ConfigError(
                f"resume is auto, but the run in {adapter_folder} has finished and its checkpoints have been removed. "
                "Nothing was changed; merge its adapter with mlx-cpo export, train on from it with "
                "resume_adapter_file, or leave out resume to begin anew.",
                key="resume",
                place=str(adapter_folder),
            )
        if own.record is not None and own.record.origin is not None:
            # It was killed before it had a checkpoint of its own.
            path = Path(own.record.origin.checkpoint)
            if not path.exists():  # nor had it put aside what it started from
                path = adapter_folder / CHECKPOINTS / path.name
            return Start(own.record, _named(path, usable, hashed)[0])
        if own.some_there:
            raise ConfigError(f"resume is auto, but {own.why_none(adapter_folder)}", key="resume")
        none = f"There is no checkpoint in {adapter_folder / CHECKPOINTS} to resume; training from the beginning."
        return Start(RunRecord(_new_run(run)), notes=(none,))
    checkpoint, notes = _named(Path(resume), usable, hashed)
    newest = own.checkpoint
    is_newest = newest and (newest.run.id, newest.iteration) == (checkpoint.run.id, checkpoint.iteration)
    if newest and is_newest and run in (None, newest.run):
        return Start(own.record or RunRecord(newest.run), newest, continues=True, notes=notes)
    place = once_put_aside(checkpoint, adapter_folder)
    if _is_in_adapter_folder(place):  # that of the first rank
        place = place.parent.with_name(CHECKPOINTS) / place.name
    origin = Origin(checkpoint.run.id, checkpoint.iteration, str(place))
    return Start(RunRecord(_new_run(run, checkpoint.run), origin), checkpoint, notes=notes)


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


@dataclass(frozen=True)
class _Found:
    """What a search of an adapter folder found, the same on all ranks but for this rank's part of the checkpoint.

    Attributes:
        record: the record of the folder's run.
        checkpoint: the newest of that run which every rank has whole and can use; ``None`` if there is none.
        faults: what is wrong with newer ones of this rank.
        some_there: whether any rank has a checkpoint, whole or not.
    """

    record: RunRecord | None
    checkpoint: Checkpoint | None
    faults: list[str]
    some_there: bool

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(f"{fault} Using {self.checkpoint.folder}." for fault in self.faults) if self.checkpoint else ()

    def why_none(self, folder: Path) -> str:
        """Say why none of the checkpoints of a folder can be used."""
        if not self.some_there:
            return "there is no whole checkpoint in it; give another, or auto."
        faults = " ".join(self.faults) or "They are of other runs, or other ranks lack them."
        return (
            f"none of the checkpoints in {folder_of_rank(folder)} can be resumed. {faults} Nothing was changed; "
            "restore them, start from an adapter with resume_adapter_file, or leave out resume to begin anew."
        )


def _search(folder: Path, usable: Usable, hashed: bool) -> _Found:
    """Look for the newest checkpoint of the run whose folder it is."""
    there = read_record(folder)
    about = ((there.successor or there).in_short().plain(), there.successor is not None) if there else None
    first = gather(about)[0]
    record, about_to_begin = (RunRecord.from_plain(first[0]), first[1]) if first else (None, False)
    whole: list[Checkpoint] = []
    faults: dict[int, str] = {}
    # What lies there before the run begins is another run's, and about to be put aside.
    for path in () if about_to_begin else checkpoints_in(folder_of_rank(folder)):
        try:
            checkpoint = read_checkpoint(path, hashed)
            if usable(checkpoint.values):
                whole.append(checkpoint)
            else:
                reason = f"The checkpoint {path} cannot be resumed with these iters: {_in_last_step(checkpoint)}."
                faults[int(path.name)] = reason
        except CheckpointError as error:
            faults[int(path.name)] = str(error)
    run_id = gather(record.run.id if record else whole[0].run.id if whole else None)[0]
    mine = {checkpoint.iteration: checkpoint for checkpoint in whole if checkpoint.run.id == run_id}
    # Every rank needs one of the same iteration; fifty numbers fit into an exchange.
    common = set.intersection(*map(set, gather(sorted(mine)[-50:])))
    best = max(common, default=-1)
    newer = [fault for number, fault in faults.items() if number > best]
    return _Found(record, mine.get(best), newer, any(gather(bool(whole or faults))))


def _named(path: Path, usable: Usable, hashed: bool) -> tuple[Checkpoint, tuple[str, ...]]:
    """Return the checkpoint that a path names, or the newest of the adapter folder that it names, and notes on it."""
    wanted = f"resume is {str(path)!r}"
    if not (os.path.isfile(path / MANIFEST) or (_is_in_adapter_folder(path) and os.path.isdir(path))):
        found = _search(path, usable, hashed)
        if found.checkpoint is None:
            raise ConfigError(f"{wanted}, but {found.why_none(path)}", key="resume", place=str(path))
        return found.checkpoint, found.notes
    mine = path
    if path.parent.name.startswith(CHECKPOINTS):
        mine = folder_of_rank(path.parent.parent) / path.name
    elif not is_first_rank():
        raise ConfigError(f"{wanted}, which belongs to the first rank alone; give the adapter folder.", key="resume")
    try:
        checkpoint = read_checkpoint(mine, hashed)
    except CheckpointError as error:
        raise ConfigError(
            f"{wanted}: {str(error).removesuffix('.')}; give an earlier one, or auto.", key="resume", place=str(mine)
        ) from error
    if not usable(checkpoint.values):
        raise ConfigError(f"{wanted}: {_in_last_step(checkpoint)}; give an earlier one.", key="resume", place=str(mine))
    return checkpoint, ()


def _in_last_step(checkpoint: Checkpoint) -> str:
    return (
        f"it is of the last optimizer step of a run of {checkpoint.values.get('iters')} iterations, and others may not "
        "end a step, report or validate there"
    )


def _is_in_adapter_folder(checkpoint: Path) -> bool:
    """Whether a path is that of a checkpoint where runs leave them."""
    return checkpoint.name.isdecimal() and checkpoint.parent.name.startswith(CHECKPOINTS)

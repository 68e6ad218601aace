"""An adapter folder and its run: one run at a time writes into it, and a new one moves what is there aside."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from mlx_cpo_plugin.atomic_files import remove_partials
from mlx_cpo_plugin.checkpoints import ADAPTER_CONFIG, BEST, CHECKPOINTS, LOCK, PREVIOUS, RECORD
from mlx_cpo_plugin.checkpoints.adapter import CheckpointError, write_atomically
from mlx_cpo_plugin.checkpoints.folder import folder_of_rank
from mlx_cpo_plugin.checkpoints.run_identity import LEFT_BY_EVERY_RUN, RunIdentity, RunRecord, read_record, run_in
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.exchange import gather, is_first_rank
from mlx_cpo_plugin.types import Values

SOFT = ".soft"
# Whoever looks whether a run is at work holds its lock for a moment.
PATIENCE, BETWEEN_ATTEMPTS = 0.1, 0.02  # seconds


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of an adapter folder until the context ends, or this process does.

    All ranks of a run are one run. Contexts for the same folder may be nested.

    Raises:
        ConfigError: another run is in it, or it cannot be written to.
    """
    if not is_first_rank():
        yield
        return
    lock = _locked(folder)
    try:
        remove_partials(
            folder, lambda name: name in (RECORD, ADAPTER_CONFIG) or bool(LEFT_BY_EVERY_RUN.fullmatch(name))
        )
        for inside in (folder / BEST, *folder.glob(f"{CHECKPOINTS}*")):
            remove_partials(inside)
        yield
    finally:
        lock.release()


def refuse_if_in_use(folder: Path) -> None:
    """Find out, without changing anything, whether a run may begin in an adapter folder.

    Raises:
        ConfigError: another run is writing to it, or earlier ones could not be moved aside.
    """
    if any((folder / name).exists() for name in (LOCK, LOCK + SOFT)):
        _locked(folder).release()
    if run_in(folder) is not None:
        _place_for_earlier_runs(folder)


def fault_of(folder: Path) -> str:
    """Return what keeps something that is there from being a folder to write into; empty where nothing does."""
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        return ""
    return "is a file" if folder.is_file() else "cannot be written to"


def _place_for_earlier_runs(folder: Path) -> Path:
    """Return where earlier runs of an adapter folder are put aside."""
    previous = folder / PREVIOUS
    fault = "is a link" if previous.is_symlink() else fault_of(previous) if previous.exists() else ""
    if fault:
        raise ConfigError(
            f"{previous} {fault}, but earlier runs are moved there; remove it or give another folder.",
            key="adapter_path",
            place=str(previous),
        )
    return previous


def _locked(folder: Path) -> BaseFileLock:
    """Return the lock of a folder, which ends with the process; its file stays."""
    file = os.path.realpath(folder) + os.sep + LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock: BaseFileLock = FileLock(file, PATIENCE, poll_interval=BETWEEN_ATTEMPTS, is_singleton=True)
            lock.acquire()
        except Timeout:
            raise
        except (OSError, NotImplementedError):  # a file system without locks
            lock = SoftFileLock(f"{file}{SOFT}", PATIENCE, is_singleton=True)  # a dead process holds none
            lock.acquire()
    except Timeout:
        raise ConfigError(
            f"Another run is writing to {folder}; wait until it ends or give another adapter_path.", key="adapter_path"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"adapter_path {folder} cannot be written to ({error}); give another folder.", key="adapter_path"
        ) from error
    return lock


def begin_run(
    adapter_folder: Path, record: RunRecord, say: Callable[[str], None], in_use: Collection[Path] = ()
) -> None:
    """Make an adapter folder that of a run which begins; what another one left is put aside, and nothing lost.

    The record of the older run stays until everything has been moved, beside that of the run that is to begin, so that
    :func:`finish_moving` can do the rest after a kill. All ranks have to call this.

    Args:
        in_use: folders that the new run reads; a fused model in one of them stays where it is.

    Raises:
        ConfigError: there is a link in the way.
        CheckpointError: it cannot be written.
    """
    moved = None
    if is_first_rank():
        moved = finish_moving(adapter_folder, in_use)
        current, run = read_record(adapter_folder), run_in(adapter_folder)
        if run is not None and run != record.run and _left_by(current, adapter_folder, in_use):
            _write(adapter_folder, replace(current or RunRecord(run), successor=record))
            moved = finish_moving(adapter_folder, in_use)
            say(f"Files of an earlier run, {run.id}, were in {adapter_folder}; they have been moved to {moved}.")
        _write(adapter_folder, record)
    older = gather(moved and moved.name)[0]
    mine = folder_of_rank(adapter_folder)
    if not is_first_rank() and mine.is_dir():  # on another machine's disk
        _move(mine, adapter_folder / PREVIOUS / (older or "unknown"))


def finish_moving(adapter_folder: Path, in_use: Collection[Path] = ()) -> Path | None:
    """Put aside what is left of a run whose successor was about to begin; return where it is, if there was one."""
    record = read_record(adapter_folder)
    if record is None or record.successor is None:
        return None
    previous = _place_for_earlier_runs(adapter_folder)
    aside = previous / record.run.id
    remove_partials(aside)
    _write(aside, replace(record, successor=None))
    config = adapter_folder / ADAPTER_CONFIG
    if config.is_file():  # it stays, too: whoever started the run may have written what is not in the model
        write_atomically(aside / ADAPTER_CONFIG, lambda partial: shutil.copyfile(config, partial))
    for path in _left_by(record, adapter_folder, in_use):
        _move(path, aside)
    _write(adapter_folder, record.successor)
    return aside


def once_begun(path: str, adapter_folder: Path, run: RunIdentity, began_with: object) -> str:
    """Return where a file that a run begins from is once the run has begun in ``adapter_folder``.

    What lies in that folder has then been put aside.

    Args:
        began_with: what the settings say that lie in the folder, which a run that has begun has written.
    """
    inside = Path(os.path.relpath(os.path.realpath(path), os.path.realpath(adapter_folder)))
    current = run_in(adapter_folder)
    if current is None or not LEFT_BY_EVERY_RUN.fullmatch(inside.parts[0]):
        return path
    if current == run:
        aside = isinstance(began_with, str) and Path(began_with).match(f"{PREVIOUS}/*/{inside}")
        return str(began_with) if aside else path
    return str((adapter_folder / PREVIOUS / current.id / inside).absolute())


def make_way(folder: Path, names: Collection[str], say: Callable[[str], None], run: RunIdentity | None = None) -> None:
    """Record that the fused model of a run is going to write these names into a folder, and put aside what is there.

    What the run has written itself stays, to be replaced.

    Args:
        folder: that of the run's adapter, or one that is for its fused model alone.
        run: ``None``: the one whose folder it is; without any, nothing is done.
    """
    record = read_record(folder)
    if run is not None and (record is None or record.run != run):
        record = RunRecord(run)
    if record is None:
        return
    put_aside(folder, record, [name for name in names if name not in record.files], say)
    _update(folder, record.with_files(names))


def put_aside(adapter_folder: Path, record: RunRecord, names: Iterable[str], say: Callable[[str], None]) -> None:
    """Move what others have left under names that a run is about to write."""
    foreign = [name for name in names if os.path.lexists(adapter_folder / name)]
    aside = adapter_folder / PREVIOUS / f"before-{record.run.id}"
    for name in foreign:
        _move(adapter_folder / name, aside)
    if foreign:
        say(f"{', '.join(foreign)} in {adapter_folder} would have been overwritten; what was there is in {aside}.")


def goes_on(adapter_folder: Path, record: RunRecord) -> None:
    """Record that the folder's run continues: no part of it is complete any more, and its rows are told anew."""
    _update(adapter_folder, replace(read_record(adapter_folder) or record, done={}, data={}))


def record_done(adapter_folder: Path, part: str, run: RunIdentity | None = None, result: str = "") -> None:
    """Record that a part of the folder's run, which has to be ``run`` if that is given, is complete, and as what."""
    record = read_record(adapter_folder)
    if record is not None and run in (None, record.run):
        _update(adapter_folder, replace(record, done={**record.done, part: result}))


def record_undone(adapter_folder: Path, part: str) -> None:
    """Record that a part of the folder's run is not complete, or is about to be done anew."""
    record = read_record(adapter_folder)
    if record is not None:
        _update(adapter_folder, replace(record, done={name: of for name, of in record.done.items() if name != part}))


def record_data(
    adapter_folder: Path, run: RunIdentity, data: Values, template_arguments: Values, anew: Collection[str] = ()
) -> None:
    """Record what the folder's run trained on, by split, and the arguments of the chat template that rendered it.

    Args:
        anew: splits that were measured after those that are recorded; of the others what is recorded stays.
    """
    record = read_record(adapter_folder)
    if record is not None and record.run == run:
        kept = {split: of for split, of in record.data.items() if split not in anew}
        _update(adapter_folder, replace(record, data={**data, **kept}, template_arguments=template_arguments))


def record_files(adapter_folder: Path, names: Collection[str]) -> None:
    """Record that files of these names are the run's, to be put aside with it."""
    record = read_record(adapter_folder)
    if record is not None:
        _update(adapter_folder, record.with_files(names))


def is_done(adapter_folder: Path, part: str, run: RunIdentity, result: str = "") -> bool:
    """Return whether a part of a run is complete, with this result, and the run has not continued since."""
    record = read_record(adapter_folder)
    return record is not None and record.run == run and record.done.get(part) == result


def _update(adapter_folder: Path, record: RunRecord) -> None:
    if is_first_rank() and read_record(adapter_folder) != record:
        _write(adapter_folder, record)


def _write(folder: Path, record: RunRecord) -> None:
    text = json.dumps(record.plain(), indent=1) + "\n"
    write_atomically(folder / RECORD, lambda partial: partial.write_text(text, encoding="utf-8"))


def _left_by(record: RunRecord | None, folder: Path, in_use: Collection[Path]) -> list[Path]:
    """Return what a run has left in a folder, in the order in which it is put aside."""
    names = [path.name for path in folder.iterdir() if LEFT_BY_EVERY_RUN.fullmatch(path.name)]
    names.sort(key=lambda name: (not name.startswith(CHECKPOINTS), name))  # without these, none is resumed by mistake
    if record is not None and not any(os.path.realpath(path) == os.path.realpath(folder) for path in in_use):
        names += [name for name in record.files if os.path.lexists(folder / name)]
    return [folder / name for name in names]


def _move(path: Path, into: Path) -> None:
    try:
        into.mkdir(parents=True, exist_ok=True)
        target, number = into / path.name, 2
        while os.path.lexists(target):
            target, number = into / f"{path.stem}-{number}{path.suffix}", number + 1
        path.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be moved to {into} ({error.strerror}); make room there, or give another adapter_path.",
            key="adapter_path",
            place=str(into),
        ) from error

"""An adapter folder and its run: one run at a time writes into it, and a new one moves what is there aside."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from mlx_cpo_plugin.atomic_files import remove_partials
from mlx_cpo_plugin.checkpoints import ADAPTER_CONFIG, CHECKPOINTS, METRICS_FILE, PREVIOUS, RECORD, RUN_SETTINGS
from mlx_cpo_plugin.checkpoints.adapter import write_atomically
from mlx_cpo_plugin.checkpoints.folder import folder_of_rank, read_checkpoint
from mlx_cpo_plugin.checkpoints.run_identity import RunIdentity, RunRecord, read_record, run_in
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.exchange import gather, is_first_rank

LOCK_NAME = ".lock"
# The page writes them while a run is at work, and the next run keeps them.
_OF_THE_PAGE = ("console.log", "studio.yaml", "studio_run.json")

# The checkpoints go first: a run without any cannot be resumed by mistake.
_LEFT_BY_EVERY_RUN = re.compile(
    rf"{CHECKPOINTS}(-rank-\d+)?|(best_adapters.*|(\d{{7,}}_)?adapters)\.safetensors"
    rf"|{re.escape(METRICS_FILE)}|{re.escape(RUN_SETTINGS)}"
)
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
_held: ContextVar[frozenset[str]] = ContextVar("held", default=frozenset())


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of an adapter folder until the context ends, or this process does.

    All ranks of a run are one run. Contexts for the same folder may be nested.

    Raises:
        ConfigError: another run is in it, or it cannot be written to.
    """
    name = os.path.realpath(folder)
    if not is_first_rank() or name in _held.get():
        yield
        return
    lock = _locked(folder)
    token = _held.set(_held.get() | {name})
    try:
        remove_partials(folder, _is_of_runs)
        for checkpoints in folder.glob(f"{CHECKPOINTS}*"):
            remove_partials(checkpoints)
        yield
    finally:
        _held.reset(token)
        lock.release()


def _locked(folder: Path) -> BaseFileLock:
    """Return the lock of a folder, which ends with the process; its file stays."""
    file, soft_file = folder / LOCK_NAME, folder / f"{LOCK_NAME}.soft"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock: BaseFileLock = FileLock(file)
            lock.acquire(blocking=False)
            if file.stat().st_size == 0 or _process_in(file).isdecimal():  # else filelock has fallen back to a soft one
                _write_process(file)
        except (OSError, NotImplementedError) as error:
            if isinstance(error, Timeout) or (isinstance(error, OSError) and error.errno not in _NO_FLOCK):
                raise
            lock = SoftFileLock(soft_file)  # holds nobody once its process is dead
            lock.acquire(blocking=False)
    except Timeout:
        holder = _process_in(file) or _process_in(soft_file) or "unknown"
        raise ConfigError(
            f"Another run, process {holder}, is writing to {folder}; wait until it ends or give another adapter_path.",
            key="adapter_path",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"adapter_path {folder} cannot be written to ({error}); give another folder.", key="adapter_path"
        ) from error
    return lock


def _write_process(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW)
    try:
        os.write(descriptor, str(os.getpid()).encode())
    finally:
        os.close(descriptor)


def _process_in(file: Path) -> str:
    """Return the number of the process that a lock file names; empty where it names none."""
    with suppress(OSError, ValueError):
        found = re.search(r"(?:^|pid=)(\d+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        return found[1] if found else ""
    return ""


def begin_run(
    adapter_folder: Path, record: RunRecord, say: Callable[[str], None], in_use: Collection[Path] = ()
) -> None:
    """Make an adapter folder that of a run which begins; what another one left is put aside, and nothing lost.

    The record of the older run stays until everything has been moved, beside that of the run that is to begin, so that
    :func:`finish_moving` can do the rest after a kill. All ranks have to call this.

    Args:
        in_use: files and folders that the new run reads, which stay where they are.

    Raises:
        ConfigError: there is a link in the way.
        CheckpointError: it cannot be written.
    """
    if is_first_rank():
        finish_moving(adapter_folder, in_use)
        current = read_record(adapter_folder)
        if current is None or current.run != record.run:
            run = run_in(adapter_folder)
            if run is not None and _left_by(current, adapter_folder, in_use):
                _write(adapter_folder, replace(current or RunRecord(run), successor=record))
                aside = finish_moving(adapter_folder, in_use)
                say(f"Files of an earlier run, {run.id}, were in {adapter_folder}; they have been moved to {aside}.")
        _write(adapter_folder, record)
    gather(None)
    mine = folder_of_rank(adapter_folder)
    if not is_first_rank() and mine.is_dir() and not mine.is_symlink():
        # Another machine's disk, where the first rank has put nothing aside.
        for path in mine.iterdir():
            if path.is_dir() and _run_of_checkpoint(path) != record.run.id:
                _move(path, adapter_folder / PREVIOUS / _run_of_checkpoint(path) / mine.name)


def finish_moving(adapter_folder: Path, in_use: Collection[Path] = ()) -> Path | None:
    """Put aside what is left of a run whose successor was about to begin; return where it is, if there was one."""
    record = read_record(adapter_folder)
    if record is None or record.successor is None:
        return None
    previous = adapter_folder / PREVIOUS
    if previous.is_symlink():
        raise ConfigError(
            f"{previous} is a link, but earlier runs are moved there; remove it or give another folder.",
            key="adapter_path",
        )
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


def put_aside_what_is_not_the_runs(adapter_folder: Path, paths: Sequence[Path], say: Callable[[str], None]) -> None:
    """Put aside those of some files in an adapter folder that its run has not written itself."""
    record = read_record(adapter_folder)
    if record is None:
        return
    foreign = [path for path in paths if path.relative_to(adapter_folder).parts[0] not in record.files]
    if foreign:
        aside = adapter_folder / PREVIOUS / f"before-{record.run.id}"
        for path in foreign:
            _move(path, aside)
        names = ", ".join(path.name for path in foreign)
        say(f"{names} in {adapter_folder} would have been overwritten; what was there has been moved to {aside}.")


def goes_on(adapter_folder: Path, record: RunRecord) -> None:
    """Record that the folder's run continues: no part of it is complete any more."""
    _update(adapter_folder, replace(read_record(adapter_folder) or record, done=()))


def record_done(adapter_folder: Path, part: str, run: RunIdentity | None = None) -> None:
    """Record that a part of the folder's run, which has to be ``run`` if that is given, is complete."""
    record = read_record(adapter_folder)
    if record is not None and run in (None, record.run) and part not in record.done:
        _update(adapter_folder, replace(record, done=(*record.done, part)))


def is_done(adapter_folder: Path, part: str, run: RunIdentity) -> bool:
    """Return whether a part of a run is complete, and the run has not continued since."""
    record = read_record(adapter_folder)
    return record is not None and record.run == run and part in record.done


@contextmanager
def written_files_recorded(adapter_folder: Path) -> Iterator[None]:
    """Record what a fused model writes into the folder inside the context as files of the run."""
    before = _entries(adapter_folder)
    yield
    record = read_record(adapter_folder)
    made = {name for name, *_ in _entries(adapter_folder) - before}
    if record is not None:
        _update(adapter_folder, replace(record, files=tuple(sorted({*record.files, *made}))))


def _update(adapter_folder: Path, record: RunRecord) -> None:
    if is_first_rank() and read_record(adapter_folder) != record:
        _write(adapter_folder, record)


def _write(folder: Path, record: RunRecord) -> None:
    text = json.dumps(record.plain(), indent=1) + "\n"
    write_atomically(folder / RECORD, lambda partial: partial.write_text(text, encoding="utf-8"))


def _entries(folder: Path) -> set[tuple[str, int, int]]:
    """Return folders, and files with inode and time of writing; without those that every run or the page has."""
    entries = set()
    for path in folder.iterdir():
        if not path.name.startswith(".") and path.name not in (PREVIOUS, *_OF_THE_PAGE) and not _is_of_runs(path.name):
            status = path.lstat()
            entries.add((path.name, 0, 0) if path.is_dir() else (path.name, status.st_ino, status.st_mtime_ns))
    return entries


def _left_by(record: RunRecord | None, folder: Path, in_use: Collection[Path]) -> list[Path]:
    """Return what a run has left in a folder, in the order in which it is put aside."""
    names = sorted(path.name for path in folder.iterdir() if _LEFT_BY_EVERY_RUN.fullmatch(path.name))
    names.sort(key=lambda name: not name.startswith(CHECKPOINTS))
    used = [Path(os.path.realpath(path)) for path in in_use]
    if record is not None and Path(os.path.realpath(folder)) not in used:  # it may train the fused model
        names += [name for name in record.files if os.path.lexists(folder / name)]
    return [
        folder / name
        for name in names
        if not any(path.is_relative_to(os.path.realpath(folder / name)) and (folder / name).is_dir() for path in used)
    ]


def _move(path: Path, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    target, number = into / path.name, 2
    while os.path.lexists(target):
        target, number = into / f"{path.stem}-{number}{path.suffix}", number + 1
    path.rename(target)


def _run_of_checkpoint(folder: Path) -> str:
    try:
        return read_checkpoint(folder, hashed=False).run.id
    except ValueError:
        return "unknown"


def _is_of_runs(name: str) -> bool:
    """Whether only the run whose folder it is writes the file of this name."""
    return name in (RECORD, ADAPTER_CONFIG) or _LEFT_BY_EVERY_RUN.fullmatch(name) is not None

"""An adapter folder and whose it is: one run at a time writes into it, and a new one puts aside what is there."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from mlx_cpo_plugin.atomic_files import remove_partials
from mlx_cpo_plugin.checkpoints.adapter import write_atomically
from mlx_cpo_plugin.checkpoints.folder import CHECKPOINTS, folder_of_rank, read_checkpoint
from mlx_cpo_plugin.checkpoints.run_identity import PREVIOUS, RECORD, RunIdentity, RunRecord, read_record, run_in
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.exchange import of_all_ranks

LOCK_NAME = ".lock"
ADAPTER_CONFIG = "adapter_config.json"
LOG_FOLDER = "runs"
# It writes them while a run is at work, and the next run goes on with them.
_OF_THE_PAGE = ("console.log", "studio.yaml", "studio_run.json")

# The checkpoints go first: what has none left is no run to go on with.
_LEFT_BY_EVERY_RUN = re.compile(
    rf"{CHECKPOINTS}(-rank-\d+)?|adapters\.safetensors|best_adapters.*\.safetensors|\d{{7,}}_adapters\.safetensors|metrics\.jsonl"
    r"|run_settings\.yaml"
)
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
_held: ContextVar[frozenset[str]] = ContextVar("held", default=frozenset())


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of an adapter folder until the context ends, or this process does.

    All ranks of a run are one run. Inside another such context for the same folder nothing more happens.

    Raises:
        ConfigError: another run is in it, or it cannot be written to.
    """
    name = os.path.realpath(folder)
    if mx.distributed.init().rank() > 0 or name in _held.get():
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
    """Return the lock, which ends with the process and is no file that is removed and made anew."""
    file = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock: BaseFileLock = FileLock(file)
            lock.acquire(blocking=False)
            if _flocked(lock):
                _write_process(file)
        except (OSError, NotImplementedError) as error:
            if isinstance(error, Timeout) or (isinstance(error, OSError) and error.errno not in _NO_FLOCK):
                raise
            lock = SoftFileLock(file.with_name(f"{LOCK_NAME}.soft"))  # holds nobody once its process is dead
            lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"Another run, process {_process_in(file)}, is writing to {folder}; wait for its end or give another "
            "adapter_path."
        ) from None
    except OSError as error:
        raise ConfigError(f"adapter_path {folder} cannot be written to ({error}); give another folder.") from error
    return lock


def _flocked(lock: BaseFileLock) -> bool:
    """Whether the file is a mere lock; where a file system has none, it holds what filelock writes into it."""
    return os.path.getsize(lock.lock_file) == 0 or _process_in(Path(lock.lock_file)).isdecimal()


def _write_process(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW)
    try:
        os.write(descriptor, str(os.getpid()).encode())
    finally:
        os.close(descriptor)


def _process_in(file: Path) -> str:
    with suppress(OSError, ValueError):
        for name in (file, file.with_name(f"{LOCK_NAME}.soft")):
            if name.is_file() and (text := name.read_text(encoding="utf-8").strip()):
                found = re.search(r"(?:^|pid=)(\d+)", text, re.MULTILINE)
                return found[1] if found else "unknown"
    return "unknown"


def begin_run(
    adapter_folder: Path, record: RunRecord, say: Callable[[str], None], in_use: Collection[Path] = ()
) -> None:
    """Have an adapter folder be that of a run which begins; what another one left is put aside, and nothing lost.

    The run whose folder it is stays written down until everything has been moved, beside the one that is to begin, so
    that :func:`finish_moving` can do the rest after a kill. All ranks have to call this.

    Args:
        in_use: files and folders that the new run reads, which stay where they are.

    Raises:
        ConfigError: there is a link in the way.
        CheckpointError: it cannot be written.
    """
    if mx.distributed.init().rank() == 0:
        finish_moving(adapter_folder, in_use)
        current = read_record(adapter_folder)
        if current is None or current.run != record.run:
            left = _left_by(current, adapter_folder, in_use)
            run = run_in(adapter_folder)
            if left and run is not None:
                _write(adapter_folder, replace(current or RunRecord(run), successor=record))
                aside = finish_moving(adapter_folder, in_use)
                say(f"Files of an earlier run, {run.id}, were in {adapter_folder}; they are put aside in {aside}.")
        _write(adapter_folder, record)
    of_all_ranks(None)
    mine = folder_of_rank(adapter_folder)
    if mx.distributed.init().rank() > 0 and mine.is_dir() and not mine.is_symlink():
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
        raise ConfigError(f"{previous} is a link; earlier runs are put aside there: remove it or give another folder.")
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
    """Put aside those of some files in an adapter folder that the run whose folder it is has not written itself."""
    record = read_record(adapter_folder)
    if record is None:
        return
    foreign = [path for path in paths if path.relative_to(adapter_folder).parts[0] not in record.files]
    if foreign:
        aside = adapter_folder / PREVIOUS / f"before-{record.run.id}"
        for path in foreign:
            _move(path, aside)
        names = ", ".join(path.name for path in foreign)
        say(f"{names} in {adapter_folder} would have been overwritten; what was there is put aside in {aside}.")


def goes_on(adapter_folder: Path, record: RunRecord) -> None:
    """Write down that the folder's run goes on: what it had brought to an end it has no more."""
    write_record(adapter_folder, replace(read_record(adapter_folder) or record, done=()))


def record_done(adapter_folder: Path, what: str, run: RunIdentity | None = None) -> None:
    """Write down that the folder's run, which has to be ``run`` if that is given, has brought something to an end."""
    record = read_record(adapter_folder)
    if record is not None and run in (None, record.run) and what not in record.done:
        write_record(adapter_folder, replace(record, done=(*record.done, what)))


def is_done(adapter_folder: Path, what: str, run: RunIdentity) -> bool:
    """Return whether a run has brought something to an end, and not gone on since."""
    record = read_record(adapter_folder)
    return record is not None and record.run == run and what in record.done


def write_record(adapter_folder: Path, record: RunRecord) -> None:
    """Write down whose folder it is; on the first rank."""
    if mx.distributed.init().rank() == 0 and read_record(adapter_folder) != record:
        _write(adapter_folder, record)


@contextmanager
def written_files_recorded(adapter_folder: Path) -> Iterator[None]:
    """Write down what a tracker or a fused model writes into the folder inside the context: it is the run's, too."""
    before = _entries(adapter_folder)
    yield
    record = read_record(adapter_folder)
    made = [name for name, written in _entries(adapter_folder).items() if before.get(name) != written]
    if record is not None:
        write_record(adapter_folder, replace(record, files=tuple(sorted({*record.files, *made}))))


def _entries(folder: Path) -> dict[str, object]:
    """Return which files are in a folder and when they were written, and which folders; no run's own."""
    entries: dict[str, object] = {}
    for path in (*folder.glob("*"), *(folder / LOG_FOLDER).glob("*")) if folder.is_dir() else ():
        name, status = path.relative_to(folder).as_posix(), path.lstat()
        if not name.startswith(".") and name not in (LOG_FOLDER, *_OF_THE_PAGE) and not _is_of_runs(name):
            entries[name] = None if path.is_dir() else (status.st_ino, status.st_mtime_ns)
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


def _write(folder: Path, record: RunRecord) -> None:
    write_atomically(folder / RECORD, lambda partial: partial.write_text(record.text(), encoding="utf-8"))


def _is_of_runs(name: str) -> bool:
    """Whether only the run whose folder it is writes the file of this name."""
    return name in (RECORD, ADAPTER_CONFIG) or _LEFT_BY_EVERY_RUN.fullmatch(name) is not None

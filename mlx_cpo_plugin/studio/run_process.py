"""Training as a process of its own: it outlives the page, and a reopened page finds it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mlx_cpo_plugin.atomic_files import replace_whole
from mlx_cpo_plugin.checkpoints import LOCK, METRICS_FILE, RECORD, run_identity
from mlx_cpo_plugin.console import last_lines
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.settings.nested import auto_if_true
from mlx_cpo_plugin.settings.options import AUTO
from mlx_cpo_plugin.studio.child import PYTHON

CONFIG_NAME = "studio.yaml"
CONSOLE_NAME = "console.log"
RECORD_NAME = "studio_run.json"
LOCK_NAME = ".studio.lock"
STOP_NAME = ".studio.stop"
STOPPED = "stopped after iteration"
OWNER_ONLY = 0o077
# Whoever looks whether a run is at work holds its lock for a moment.
_LOCK_ATTEMPTS = 5
_SECONDS_BETWEEN_ATTEMPTS = 0.02


@dataclass(frozen=True)
class RunRecord:
    """What is written down of a run that the page started.

    Attributes:
        pid: the process that watches over the training, whose session both are in; ``None`` until the training begins.
        training_pid: the training itself; ``None`` until it begins.
        exit_code: of the training, negative where a signal ended it; ``None`` while it runs, or where nobody was left
            to see its end.
        console_start: the bytes that earlier runs in the folder had printed.
    """

    pid: int | None = None
    training_pid: int | None = None
    exit_code: int | None = None
    console_start: int = 0


@dataclass(frozen=True)
class RunState:
    """How a run stands.

    Attributes:
        status: ``none`` (nothing ran here), ``running``, ``finished``, ``stopped`` (and saved), ``ended`` (by a signal,
            at once), ``killed`` (by a signal that cannot be caught), ``failed`` or ``lost`` (nobody saw how it ended).
        exit_code: of the training, where it is known.
        own: whether the page started it, and so can stop it.
    """

    status: str
    exit_code: int | None = None
    own: bool = True

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.status == "running"


def start(folder: Path, config_text: str, root: Path, resume: bool) -> None:
    """Start the host's own command on a configuration, and come back at once.

    What the run writes can be read by its owner alone.

    Args:
        folder: the adapter folder; configuration, console and record are written into it.
        root: the folder in which the command runs, which paths in the configuration are relative to.
        resume: go on from the last checkpoint.

    Raises:
        ConfigError: a run is in that folder already, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _open_own(folder / LOCK_NAME, os.O_RDWR)
        try:
            _start_locked(folder.resolve(), config_text, root, resume, lock)
        finally:
            os.close(lock)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder} cannot be written to ({error.strerror}); give another adapter_path.",
            key="adapter_path",
            place=str(error.filename or folder),
        ) from error


def _how_to_begin(config_text: str, resume: bool) -> list[str]:
    """Return the words by which a run goes on, or begins anew, or from another run that the configuration names."""
    if resume:
        return ["--resume", AUTO]
    from_another = auto_if_true((yaml.safe_load(config_text) or {}).get("resume")) not in (None, AUTO)
    return [] if from_another else ["--resume", "false"]


def _start_locked(folder: Path, config_text: str, root: Path, resume: bool, lock: int) -> None:
    if not _lock_for_a_run(lock):
        raise ConfigError(
            f"A run is already writing to {folder}; stop it or give another adapter_path.",
            key="adapter_path",
            place=str(folder),
        )
    console = _open_own(folder / CONSOLE_NAME, os.O_WRONLY | os.O_APPEND)
    try:
        os.fchmod(console, stat.S_IRUSR | stat.S_IWUSR)  # an earlier version may have made it
        replace_whole(folder / CONFIG_NAME, lambda partial: partial.write_text(config_text, encoding="utf-8"))
        (folder / STOP_NAME).unlink(missing_ok=True)
        _write(folder, RunRecord(console_start=os.fstat(console).st_size))
        watcher = [*PYTHON, "-m", "mlx_cpo_plugin.studio.run_process", str(folder), str(lock)]
        command = ["-m", "mlx_lm_lora.train", "--config", str(folder / CONFIG_NAME)]
        command += _how_to_begin(config_text, resume)
        # The lock belongs to the open file: watcher and training have it for as long as either lives.
        subprocess.Popen(
            [*watcher, *command],
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock],
            umask=OWNER_ONLY,
            env={**os.environ, "NO_COLOR": "", "FORCE_COLOR": "1"},  # the page reads the progress bar
        )
    finally:
        os.close(console)


def stop(folder: Path) -> None:
    """Ask a run to save and stop; asked again, it ends at once.

    A request that comes before the training has begun is kept in a file. Whoever takes the file away delivers it.
    """
    if not state(folder).running:
        return
    if _has_begun(read_record(folder)):
        _ask_to_stop(read_record(folder))
        return
    os.close(_open_own(folder / STOP_NAME, os.O_WRONLY))
    record = read_record(folder)
    if _has_begun(record) and _take_request(folder):
        _ask_to_stop(record)


def state(folder: Path) -> RunState:
    """Return how the run in an adapter folder stands."""
    if _is_locked(folder / LOCK_NAME):
        return RunState("running")
    if _is_locked(folder / LOCK):
        return RunState("running", own=False)
    record = read_record(folder)
    code = None if record is None else record.exit_code
    is_later = _is_later(folder / RECORD, folder / RECORD_NAME)
    if code is None or is_later:
        own = record is not None and code is None
        return RunState(_outcome_written(folder, own, is_later or not own), own=own)
    names = {0: "finished", -signal.SIGKILL: "killed"}
    for number in (signal.SIGTERM, signal.SIGINT):
        names |= {128 + number: "stopped", -number: "ended"}
    return RunState(names.get(code, "failed"), code)


def read_record(folder: Path) -> RunRecord | None:
    """Return what is written down of the folder's run."""
    try:
        values: dict[str, Any] = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        return RunRecord(**values)
    except (OSError, ValueError, TypeError):
        return None


def console_tail(folder: Path, lines: int = 40) -> list[str]:
    """Return the last lines of what the last run printed; of a line that was written over, what it says last."""
    record = read_record(folder) or RunRecord()
    try:
        return last_lines(folder / CONSOLE_NAME, record.console_start)[-lines:]
    except OSError:
        return []


def watch(folder: Path, lock: int, words: list[str]) -> int:
    """Run a Python command to its end, pass requests to stop on to it, and write down how it ended.

    Args:
        lock: the open file whose lock says that a run is at work; the command inherits it.
    """
    record = read_record(folder) or RunRecord()

    def begin() -> None:
        """Between fork and exec, so that there is no moment in which the training runs and cannot be found."""
        _write(folder, replace(record, pid=os.getsid(0), training_pid=os.getpid()))
        if _take_request(folder):
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with subprocess.Popen([*PYTHON, *words], pass_fds=[lock], preexec_fn=begin) as training:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda received, frame: training.send_signal(received))
            code = training.wait()
    except subprocess.SubprocessError:
        print(f"error: {folder / RECORD_NAME} cannot be written; free space or change adapter_path.", flush=True)
        return ConfigError.exit_code
    _write(folder, replace(read_record(folder) or record, exit_code=code))
    return code if code >= 0 else 128 - code


def _outcome_written(folder: Path, own: bool, is_new: bool) -> str:
    """Return the status of a run whose end nobody saw, by what it has written itself.

    Args:
        own: whether the page started it, so that the console is of this run.
        is_new: whether ``run.json`` has been written since.
    """
    run = run_identity.read_record(folder)
    if is_new and run is not None and run_identity.TRAINED in run.done:
        return "finished"
    if own:
        return "stopped" if any(STOPPED in line for line in console_tail(folder, 1)) else "lost"
    return "none" if run is None and not (folder / METRICS_FILE).is_file() else "lost"


def _is_later(file: Path, other: Path) -> bool:
    try:
        return file.stat().st_mtime_ns > other.stat().st_mtime_ns
    except OSError:
        return False


def _write(folder: Path, record: RunRecord) -> None:
    replace_whole(folder / RECORD_NAME, lambda partial: partial.write_text(json.dumps(asdict(record))))


def _has_begun(record: RunRecord | None) -> bool:
    return record is not None and record.training_pid is not None


def _take_request(folder: Path) -> bool:
    """Take the request to stop away; whether there was one that nobody else took."""
    try:
        (folder / STOP_NAME).unlink()
    except FileNotFoundError:
        return False
    return True


def _ask_to_stop(record: RunRecord | None) -> None:
    if record is None or record.training_pid is None or record.exit_code is not None:
        return
    with suppress(ProcessLookupError):
        # Numbers of processes are used again, but never in the session of another.
        if os.getsid(record.training_pid) == record.pid:
            os.kill(record.training_pid, signal.SIGTERM)


def _open_own(path: Path, flags: int) -> int:
    """Open a file of the page, made anew if need be, which nobody else can read.

    Raises:
        ConfigError: there is a link in its place, or something that is no file.
        OSError: it cannot be opened.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ConfigError(
                f"{path} is a link or not a regular file, so it is not written to; remove it.", place=str(path)
            )
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, stat.S_IRUSR | stat.S_IWUSR)


def _lock_for_a_run(lock: int) -> bool:
    for attempt in range(_LOCK_ATTEMPTS):
        if _locked(lock, fcntl.LOCK_EX):
            return True
        time.sleep(_SECONDS_BETWEEN_ATTEMPTS * (attempt + 1 < _LOCK_ATTEMPTS))
    return False


def _locked(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(file: Path) -> bool:
    try:
        lock = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return not _locked(lock, fcntl.LOCK_SH)  # shared: two that look do not take each other for a run
    finally:
        os.close(lock)


if __name__ == "__main__":
    sys.exit(watch(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))

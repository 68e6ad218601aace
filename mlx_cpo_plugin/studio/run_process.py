"""Training as a process of its own: it outlives the page, and a page that is opened again finds it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from mlx_cpo_plugin.checkpoints.adapter import write_atomically
from mlx_cpo_plugin.errors import ConfigError

CONFIG_NAME = "studio.yaml"
CONSOLE_NAME = "console.log"
RECORD_NAME = "studio_run.json"
LOCK_NAME = ".studio.lock"
CONSOLE_TAIL = 64 * 1024


@dataclass(frozen=True)
class RunRecord:
    """What is written down of a run that the page started.

    Attributes:
        pid: the process that watches over the training.
        training_pid: the training itself.
        exit_code: of the training; ``None`` while it runs, or where nobody was left to see its end.
    """

    pid: int
    training_pid: int
    exit_code: int | None = None


@dataclass(frozen=True)
class RunState:
    """How a run stands.

    Attributes:
        status: ``none`` (never started from the page), ``running``, ``finished``, ``stopped``, ``failed`` or ``lost``
            (ended without anybody seeing how, as when the machine goes down).
        exit_code: of the training, where it is known.
    """

    status: str
    exit_code: int | None = None

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.status == "running"


def start(folder: Path, config_text: str, root: Path, resume: bool) -> None:
    """Start the host's own command on a configuration, and come back at once.

    Args:
        folder: the adapter folder; configuration, console and record are written into it.
        root: the folder in which the command runs, which paths in the configuration are relative to.
        resume: go on from the last checkpoint.

    Raises:
        ConfigError: a run is in that folder already.
        CheckpointError: it cannot be written to.
    """
    config = folder / CONFIG_NAME
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("a+b") as lock:
        if not _locked(lock):
            raise ConfigError(f"A run is writing to {folder} already; stop it or give another adapter_path.")
        write_atomically(config, lambda partial: partial.write_text(config_text, encoding="utf-8"))
        (folder / RECORD_NAME).unlink(missing_ok=True)
        words = [
            "-m",
            "mlx_lm_lora.train",
            "--config",
            str(config.resolve()),
            *(["--resume", "auto"] if resume else []),
        ]
        watcher = [sys.executable, "-m", "mlx_cpo_plugin.studio.run_process", str(folder.resolve()), *words]
        with (folder / CONSOLE_NAME).open("ab" if resume else "wb") as console:
            # The lock belongs to the open file: the watcher has it for as long as it lives, whatever becomes of us.
            subprocess.Popen(
                watcher,
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )


def stop(folder: Path) -> None:
    """Ask a run to save and stop; asked again, it ends at once."""
    record = read_record(folder)
    if record is not None and state(folder).running:
        os.kill(record.pid, signal.SIGTERM)


def state(folder: Path) -> RunState:
    """Return how the run in an adapter folder stands."""
    if _is_locked(folder):
        return RunState("running")
    record = read_record(folder)
    if record is None:
        return RunState("none")
    if record.exit_code is None:
        return RunState("lost")
    names = {0: "finished", 128 + signal.SIGTERM: "stopped", 128 + signal.SIGINT: "stopped"}
    return RunState(names.get(record.exit_code, "failed"), record.exit_code)


def read_record(folder: Path) -> RunRecord | None:
    """Return what is written down of the folder's run."""
    try:
        values: dict[str, Any] = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        return RunRecord(**values)
    except (OSError, ValueError, TypeError):
        return None


def console_tail(folder: Path, lines: int = 40) -> list[str]:
    """Return the last lines of what a run printed; of a line that was written over, what it says last."""
    try:
        with (folder / CONSOLE_NAME).open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - CONSOLE_TAIL))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in shown if line.strip()][-lines:]


def running_folders(root: Path, depth: int = 3) -> list[Path]:
    """Return the adapter folders below ``root`` in which a run is at work."""
    patterns = ["/".join(["*"] * levels + [LOCK_NAME]) for levels in range(depth + 1)]
    found = {file.parent for pattern in patterns for file in root.glob(pattern)}
    return sorted(folder for folder in found if state(folder).running)


def watch(folder: Path, words: list[str]) -> int:
    """Run a Python command to its end, pass requests to stop on to it, and write down how it ended."""
    with subprocess.Popen([sys.executable, *words]) as training:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, frame: training.send_signal(received))
        _write(folder, RunRecord(os.getpid(), training.pid))
        code = training.wait()
    exit_code = code if code >= 0 else 128 - code
    _write(folder, RunRecord(os.getpid(), training.pid, exit_code))
    return exit_code


def _write(folder: Path, record: RunRecord) -> None:
    write_atomically(folder / RECORD_NAME, lambda partial: partial.write_text(json.dumps(asdict(record))))


def _locked(stream: IO[bytes]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(folder: Path) -> bool:
    try:
        with (folder / LOCK_NAME).open("rb") as stream:
            return not _locked(stream)
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(watch(Path(sys.argv[1]), sys.argv[2:]))

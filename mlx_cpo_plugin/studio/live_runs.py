"""Which runs there are below the folder of the page, and which of them are at work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from threading import Lock

from mlx_cpo_plugin.checkpoints import ADAPTER_FILE, CHECKPOINTS, METRICS_FILE
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.report.record import RunRecord, has_reported
from mlx_cpo_plugin.studio import run_process

SEARCH_DEPTH = 4

_MARKS = (METRICS_FILE, run_process.RECORD_NAME)


class LiveRuns:
    """The runs below a folder, shared by all who look at the page.

    To search the folder may take long, so that is done when a page is opened; in between, runs that the page starts
    are added.

    Args:
        root: the folder of the page.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = Lock()
        self._known: set[Path] = set()
        self._heeded: set[Path] = set()

    def add(self, folder: Path) -> None:
        """Look at this folder from now on."""
        with self._lock:
            self._known.add(Path(os.path.abspath(folder)))

    def search(self) -> list[Path]:
        """Search anew; return the folders of all runs, the one that wrote last first."""
        found = {folder for folder in folders_below(self.root, SEARCH_DEPTH) if _last_written(folder)}
        with self._lock:
            self._known = found | {folder for folder in self._known if _last_written(folder)}
        return self.known()

    def known(self) -> list[Path]:
        """Return the folders of all runs that are known, the one that wrote last first."""
        with self._lock:
            return sorted(self._known, key=_last_written, reverse=True)

    def reported(self) -> list[str]:
        """Search anew; return the names of runs that have metrics, the one that wrote last first; none is read."""
        self.search()
        return list(self._with_metrics())

    def records(self, names: Sequence[str]) -> list[RunRecord]:
        """Return the runs of these names.

        Raises:
            ConfigError: none is named, or there is no such run.
            ReportError: one of them cannot be read.
        """
        if not names:
            raise ConfigError("Pick a run.")
        runs = self._with_metrics()
        missing = next((name for name in names if name not in runs), None)
        if missing is not None:
            message = f"There is no run {missing!r} below {self.root}; pick one from the list."
            raise ConfigError(message, place=str(self.root), allowed=", ".join(runs))
        return [RunRecord.read(runs[name]) for name in names]

    def _with_metrics(self) -> dict[str, Path]:
        return {self.name(folder): folder for folder in self.known() if has_reported(folder)}

    def at_work(self) -> list[Path]:
        """Return the folders of runs that are at work, in the order of their names."""
        with self._lock:
            known = sorted(self._known | self._heeded)
        return [folder for folder in known if run_process.state(folder).running]

    def heed(self, folder: Path) -> None:
        """Tell changes in this folder, too, whether a run has been in it or not."""
        with self._lock:
            self._heeded.add(folder)

    def changes(self) -> str:
        """Return a text that is another one once anything of what is shown of runs is."""
        with self._lock:
            folders = sorted(self._known | self._heeded)
        return sha256(repr([(folder, _state_of_files(folder)) for folder in folders]).encode()).hexdigest()

    def name(self, folder: Path) -> str:
        """Return the name of a run: its folder, relative to that of the page where it is inside."""
        return str(folder.relative_to(self.root)) if folder.is_relative_to(self.root) else str(folder)

    def folder(self, name: str) -> Path | None:
        """Return the folder of a known run by its name."""
        with self._lock:
            return next((folder for folder in self._known if self.name(folder) == name), None)


def folders_below(root: Path, depth: int) -> Iterator[Path]:
    """Yield ``root`` and ``depth`` levels below it, by name, without links and what holds neither runs nor files."""
    for path, names, _ in os.walk(root, followlinks=False):
        folder = Path(path)
        deep = len(folder.relative_to(root).parts) >= depth
        names[:] = (
            [] if deep else [name for name in sorted(names) if not name.startswith((".", "__pycache__", CHECKPOINTS))]
        )
        yield folder


def _state_of_files(folder: Path) -> list[object]:
    """How the run in a folder stands, and what says that it has written since."""
    names = (METRICS_FILE, run_process.CONSOLE_NAME, ADAPTER_FILE, CHECKPOINTS)
    return [run_process.state(folder), *(state_of_file(folder / name) for name in names)]


def state_of_file(path: Path) -> tuple[int, int, int] | None:
    """Return what is another one once a file has been written; ``None`` where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _last_written(folder: Path) -> float:
    """Return when a run last wrote into a folder; 0 where none ever has."""
    times = [file.lstat().st_mtime for name in _MARKS if (file := folder / name).is_file() and not file.is_symlink()]
    return max(times, default=0.0)

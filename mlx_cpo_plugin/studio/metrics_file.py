"""The metrics of a run while it writes them: each line of the file is read once."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Lock

from mlx_cpo_plugin.checkpoints import METRICS_FILE
from mlx_cpo_plugin.report.record import Row, last_run_of, parsed_rows

_MOST_FILES = 8


class MetricsFile:
    """The metrics in a folder, as far as they have been read."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / METRICS_FILE
        self._lock = Lock()
        self._begin()

    def _begin(self) -> None:
        self._inode, self._read = 0, 0
        self._rows: list[Row] = []

    def rows(self) -> list[Row]:
        """Return the rows that the last run has written whole; none where there are none."""
        with self._lock:
            try:
                with self.file.open("rb") as stream:
                    status = os.fstat(stream.fileno())
                    if status.st_ino != self._inode or status.st_size < self._read:
                        self._begin()
                        self._inode = status.st_ino
                    stream.seek(self._read)
                    lines, end, _ = stream.read().rpartition(b"\n")
            except OSError:
                self._begin()
                return []
            if end:
                self._read += len(lines) + len(end)
                self._rows = last_run_of([*self._rows, *parsed_rows(lines.decode("utf-8", "replace").split("\n"))])
            return self._rows


_files: dict[Path, MetricsFile] = {}


def read_metrics(folder: Path) -> list[Row]:
    """Return the rows that the last run in a folder has written whole; all who look share them and leave them as is."""
    file = _files.pop(folder, None) or MetricsFile(folder)
    _files[folder] = file  # the one that was asked for last stands last
    for oldest in list(_files)[:-_MOST_FILES]:
        _files.pop(oldest, None)
    return file.rows()

"""Files that are whole or as they were before."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def replace_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` fill a file beside ``path``, flush it to the disk, then rename it to ``path``.

    Raises:
        OSError: the folder cannot be made, or the file not be written.
        Exception: whatever ``write`` raises.
    """
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):  # the folder may be what is wrong; the error raised says more
            partial.unlink(missing_ok=True)

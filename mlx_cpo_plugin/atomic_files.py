"""Files that are either complete or unchanged, and the removal of what a killed process had not finished."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# ".<thread>-<what for>-<name>": beside the file, so that it can be renamed to it.
_PARTIAL = re.compile(r"\.\d+-(?P<purpose>partial|removed)-(?P<name>.+)", re.DOTALL)


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, flush it to the disk, then rename it to ``path``.

    A link in its place is replaced, not followed. What is no file, such as a device or a pipe, is written to as it is.

    Raises:
        OSError: the folder cannot be made, or the file not be written.
        Exception: whatever ``write`` raises.
    """
    if _is_device(path):
        write(path)
        return
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    except OSError as error:
        # Of a full disk no file is named, and the partial one nobody knows.
        if error.errno is not None and error.filename in (None, str(partial)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with suppress(OSError):  # the folder may be what is wrong; the error raised says more
            partial.unlink(missing_ok=True)


def _is_device(path: Path) -> bool:
    """Whether a path leads to something that nobody wants replaced by a file, itself or through links of the system."""
    return os.path.abspath(path).startswith(("/dev/fd/", "/dev/std", "/proc/")) or is_stream(path)


def is_stream(path: str | Path) -> bool:
    """Whether there is something that is no file and no folder, such as a pipe, which can be read only once."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def cache_folder() -> Path:
    """Return the folder of what can be made again; raises RuntimeError where this account has no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-cpo-plugin"


def partial_of(path: Path, purpose: str = "partial") -> Path:
    """Return the name beside ``path`` of a file or folder on its way to that name, or from it.

    Args:
        purpose: ``partial`` or ``removed``.
    """
    return path.with_name(f".{threading.get_native_id()}-{purpose}-{path.name}")


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def put_back(path: Path) -> None:
    """Put back what a killed process had moved away from ``path`` and not replaced."""
    for other in [] if os.path.lexists(path) or not path.parent.is_dir() else sorted(path.parent.iterdir()):
        match = _PARTIAL.fullmatch(other.name)
        if match and match["name"] == path.name and match["purpose"] == "removed":
            other.rename(path)
            return


def remove_partials(folder: Path, owned: Callable[[str], bool] = lambda name: True) -> None:
    """Remove what killed processes had not finished of the files that only the caller may write in a folder.

    Args:
        owned: whether a file of this name is one of them.
    """
    for path in partials(folder, owned):
        remove(path)


def partials(folder: Path, owned: Callable[[str], bool] = lambda name: True) -> list[Path]:
    """Return what is on its way to such a name in a folder, or away from it, or was left by a killed process."""
    there = list(folder.iterdir()) if os.path.isdir(folder) else []
    return [path for path in there if (match := _PARTIAL.fullmatch(path.name)) and owned(match["name"])]


def remove(path: Path) -> None:
    """Remove a file or folder, or a link but not what it leads to; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush what was written to a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def check_safetensors(file: Path) -> None:
    """Check that a safetensors file is as long as its header says: a disk that is full may cut it short in silence.

    Raises:
        OSError: it is not.
        ValueError: its header cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(min(header, size)))
    data = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    if size != 8 + header + data:
        raise OSError(f"{file.name} has {size} bytes instead of {8 + header + data}")

"""The folder of an export: there as a whole or not at all, and never in place of something that is no export."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mlx_cpo_plugin.atomic_files import flush, partial_of, partials, put_back, remove, remove_partials, sha256_of
from mlx_cpo_plugin.errors import first_line, is_device_fault, named
from mlx_cpo_plugin.export.errors import ExportError
from mlx_cpo_plugin.publish.card import CARD_NAMES
from mlx_cpo_plugin.types import Values

# What was exported, in every export.
RECORD = "export.json"
# Bytes of a file that somebody may have edited, at most.
MOST_EDITED = 10_000_000
_OF_SYSTEMS = re.compile(r"\.DS_Store|\._.*")
HOW_TO_REPLACE = "give --force to replace it, or another --output"


def check_target(target: Path, replace: bool) -> None:
    """Find out whether an export may go to ``target``; only what a killed one had moved away from there is put back.

    Raises:
        ExportError: it cannot be written, or there is something already, which is not to be replaced or is no export,
            or holds other files, too; another export is writing it.
    """
    with _writing(target):
        _refuse_another_export_to(Path(os.path.realpath(target)))
        put_back(Path(os.path.realpath(target)))
        place = next(parent for parent in Path(os.path.realpath(target)).parents if os.path.lexists(parent))
        with tempfile.TemporaryDirectory(dir=place, prefix="."):
            pass
    if not os.path.lexists(target):
        return
    if target.is_dir() and Path.cwd().is_relative_to(os.path.realpath(target)):
        raise ExportError(
            f"{named(str(target))} is, or holds, the current folder, and is to be replaced as a whole; give another "
            "--output.",
            key="output",
            place=str(target),
        )
    if target.is_dir() and not any(target.iterdir()):
        return
    if not (target / RECORD).is_file():
        raise ExportError(
            f"{named(str(target))} is there already and no export; give another --output.",
            key="output",
            place=str(target),
        )
    if not replace:
        raise ExportError(
            f"{named(str(target))} is an export already; {HOW_TO_REPLACE}.",
            key="output",
            place=str(target),
        )
    if others := _changed_in(target):
        raise ExportError(
            f"{named(str(target))} holds {named(others[0])}, which is not as the export left it, and would be lost; "
            "move it, or give another --output.",
            key="output",
            place=str(target / others[0]),
        )


def _changed_in(target: Path) -> list[str]:
    """Return the names in an export that it did not come with, or that were edited since, as far as it says."""
    try:
        own = dict(json.loads((target / RECORD).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, LookupError, TypeError):
        return []
    paths = [path for path in target.iterdir() if path.name != RECORD and not _OF_SYSTEMS.fullmatch(path.name)]
    return sorted(path.name for path in paths if path.name not in own or own[path.name] != _digest(path))


def _digest(path: Path) -> str:
    """Return what an edited file is known by; nothing of what nobody edits, or what is carried over."""
    if path.name in CARD_NAMES or not path.is_file() or path.stat().st_size > MOST_EDITED:
        return ""
    return sha256_of(path)


@contextmanager
def whole_or_nothing(target: Path, record: Values) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that takes its place when the context ends without an error.

    Raises:
        ExportError: it cannot be written, or another export is writing it; what was at ``target`` is as it was.
    """
    target = Path(os.path.realpath(target))
    staging, replaced = partial_of(target), partial_of(target, "removed")
    try:
        with ExitStack() as stack, _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _refuse_another_export_to(target)
            remove_partials(target.parent, lambda name: name == target.name)  # of killed processes
            staging.mkdir()
            stack.enter_context(_held(staging))
            yield staging
            record = {**record, "files": {path.name: _digest(path) for path in sorted(staging.iterdir())}}
            (staging / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            for path in staging.rglob("*"):
                flush(path)
            if target.exists():
                target.rename(replaced)
            staging.rename(target)
            flush(target.parent)
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        remove(replaced)
        remove(staging)


def _refuse_another_export_to(target: Path) -> None:
    for path in partials(target.parent, lambda name: name == target.name):
        try:
            with _held(path):
                pass
        except BlockingIOError as error:
            raise ExportError(
                f"Another export is writing to {named(str(target))}; wait until it ends, or give another --output.",
                key="output",
                place=str(target),
            ) from error


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Show others, while the context lasts, that a folder is no killed process's; BlockingIOError: another one does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:  # and not a file system without locks
                raise
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        # Where the disk is full MLX raises the latter.
        if is_device_fault(error) or not (isinstance(error, OSError) or str(error).startswith("[write]")):
            raise
        raise ExportError(
            f"The export cannot be written to {named(str(target))} ({first_line(error)}); free space, or give another "
            "--output.",
            key="output",
            place=str(target),
        ) from error

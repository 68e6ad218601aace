"""The folder of an export: there as a whole or not at all, and never in place of something that is no export."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_cpo_plugin.atomic_files import flush, partial_of, put_back, remove, remove_partials, sha256_of
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
            or holds other files, too.
    """
    with _writing(target):
        put_back(Path(os.path.realpath(target)))
        place = next(parent for parent in Path(os.path.realpath(target)).parents if os.path.lexists(parent))
        with tempfile.TemporaryDirectory(dir=place, prefix="."):
            pass
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
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
        ExportError: it cannot be written; what was at ``target`` is as it was.
    """
    target = Path(os.path.realpath(target))
    staging, replaced = partial_of(target), partial_of(target, "removed")
    try:
        with _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_partials(target.parent, lambda name: name == target.name)  # of killed processes
            staging.mkdir()
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

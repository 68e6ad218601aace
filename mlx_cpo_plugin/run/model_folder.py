"""A model's folder, written beside its place and put there when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = ".unfinished-model-"
_CONFIG = "config.json"


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder on the file system of ``target``, inside it; it is removed in the end.

    What an earlier process left there when it was killed is removed first.
    """
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    for left in target.glob(f"{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    staging = target / f"{_PREFIX}{os.getpid()}"
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # unless the model is in it
                target.rmdir()


def publish(staging: Path, target: Path, put_aside: Callable[[Sequence[Path]], None] = lambda replaced: None) -> None:
    """Move a whole model from ``staging`` into ``target``, in place of a model that is there.

    There is no moment at which the folder holds a ``config.json`` with weights that are not its own: without the former
    it is no model to any program. Links in ``target`` are replaced, not followed.

    Args:
        put_aside: gets the files in ``target`` that are going to be replaced or removed, those of a model first, and
            may move them elsewhere.

    Raises:
        OSError: a file is cut short, or cannot be moved.
    """
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    for file in files:
        check_whole(staging / file)
        flush(staging / file)
    weights = [*target.glob("model*.safetensors"), target / "model.safetensors.index.json"]
    replaced = dict.fromkeys((target / _CONFIG, *weights, *(target / file for file in files)))
    put_aside([path for path in replaced if os.path.lexists(path)])
    (target / _CONFIG).unlink(missing_ok=True)
    for file in weights:
        if file.relative_to(target) not in files:
            file.unlink(missing_ok=True)
    for file in [file for file in files if str(file) != _CONFIG] + [Path(_CONFIG)]:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (staging / file).replace(target / file)
    flush(target)


def check_whole(file: Path) -> None:
    """See that a safetensors file is as long as its header says; other files pass.

    Raises:
        OSError: it is cut short.
    """
    if file.suffix != ".safetensors":
        return
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(header))
    data = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    size = file.stat().st_size
    if size != 8 + header + data:
        raise OSError(f"{file.name} has {size} bytes instead of {8 + header + data}")


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or folder, as far as the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(descriptor)

"""Keeps the pairs of many rows, so that the next run on them, or the same one resumed, starts without tokenising."""

from __future__ import annotations

import hashlib
import json
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import IO

from mlx_cpo_plugin.atomic_files import cache_folder, remove, replace_whole
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.tokens import TruncatedPair

LEAST_ROWS = 5_000
"""Fewer are tokenised about as fast as they are read."""
MOST_BYTES = 4 << 30
"""Of all files; the ones that were not used for longest go first."""
ABANDONED_AFTER = 86_400.0
"""Seconds after which nobody writes a file any more that is not finished."""
_PATTERN = "pairs-*.pickle"
_DIGEST_SIZE = hashlib.sha256().digest_size

Outcomes = list[TruncatedPair | UnusableRow]


class PairCache:
    """The file for some rows, read by one converter.

    Args:
        rows: row, columns and source of each.
        identity: returns all that their pairs depend on beside them, or ``None`` where that cannot be told.
    """

    def __init__(self, rows: Sequence[tuple[object, object, str]], identity: Callable[[], str | None]) -> None:
        self.rows = len(rows)
        self.file: Path | None = None
        if len(rows) >= LEAST_ROWS and (converter := identity()) is not None:
            with suppress(OSError, RuntimeError, TypeError, ValueError, RecursionError):  # no home, or rows of objects
                self.file = cache_folder() / _PATTERN.replace("*", _digest(rows, converter))

    def read(self) -> Outcomes | None:
        """Return the outcome of each row, if they are there and whole."""
        if self.file is None:
            return None
        try:
            with self.file.open("rb") as file:
                # A flipped bit would be another token.
                if file.read(_DIGEST_SIZE) != hashlib.file_digest(file, "sha256").digest():
                    return None
                file.seek(_DIGEST_SIZE)
                outcomes = list(chain.from_iterable(_parts(file)))
            self.file.touch()
        except Exception:  # a damaged pickle raises anything
            return None
        return outcomes if len(outcomes) == self.rows else None

    def write(self, outcomes: Sequence[TruncatedPair | UnusableRow]) -> None:
        """Keep the outcome of each row, where there is room for it."""
        if self.file is None:
            return

        def fill(path: Path) -> None:
            with path.open("w+b") as file:
                file.write(bytes(_DIGEST_SIZE))
                for start in range(0, len(outcomes), LEAST_ROWS):  # a pickle keeps all of its objects in memory
                    pickle.dump(list(outcomes[start : start + LEAST_ROWS]), file)
                file.seek(_DIGEST_SIZE)
                digest = hashlib.file_digest(file, "sha256").digest()
                file.seek(0)
                file.write(digest)

        with suppress(OSError):
            replace_whole(self.file, fill)
            _make_room(self.file)


def _parts(file: IO[bytes]) -> Iterator[Outcomes]:
    while True:
        try:
            yield pickle.load(file)
        except EOFError:
            return


def _digest(rows: Sequence[tuple[object, object, str]], converter: str) -> str:
    digest = hashlib.sha256(converter.encode())
    for package in ("tokenizers", "transformers", "jinja2"):
        digest.update(version(package).encode())
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    columns: object = None
    for value, its_columns, source in rows:
        if its_columns is not columns:
            columns = its_columns
            digest.update(repr(columns).encode())
        digest.update(json.dumps([source, value]).encode())
    return digest.hexdigest()[:32]


def _make_room(newest: Path) -> None:
    for left in newest.parent.glob(f".*-partial-{_PATTERN}"):  # by a killed process
        if time.time() - left.stat().st_mtime > ABANDONED_AFTER:
            remove(left)
    files = sorted(newest.parent.glob(_PATTERN), key=lambda file: file.stat().st_mtime, reverse=True)
    size = 0
    for file in files:
        size += file.stat().st_size
        if size > MOST_BYTES and file != newest:
            file.unlink()

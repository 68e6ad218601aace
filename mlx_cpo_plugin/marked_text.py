"""Texts that end in a mark of their content: a later command replaces them only while nobody has edited them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import count, takewhile
from pathlib import Path

from mlx_cpo_plugin.atomic_files import replace_whole

_SENTENCE = "Written by mlx-cpo-plugin, which replaces it only while nothing in it is changed: {}"
# By the ending of the file, in the comments of its language.
_MARKS = {".md": f"\n<!-- {_SENTENCE} -->\n", ".yaml": f"\n# {_SENTENCE}\n"}


def marked(text: str, suffix: str) -> str:
    """Return a text with its mark behind it.

    Args:
        suffix: of the file that it goes to, ``.md`` or ``.yaml``.
    """
    return text + _MARKS[suffix].format(_digest(text))


def write_marked(file: Path, text: str) -> None:
    """Write a text with its mark to a file, as a whole or not at all."""
    replace_whole(file, lambda partial: partial.write_text(marked(text, file.suffix), encoding="utf-8"))


def is_edited(file: Path) -> bool:
    """Whether there is a file which is not as :func:`marked` made it."""
    try:
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    start = text.rfind(_MARKS[file.suffix].partition("{}")[0])
    return start < 0 or text != marked(text[:start], file.suffix)


def edited_among(folder: Path, names: Iterable[str]) -> list[str]:
    """Return those of the names, up to the first that may be written, whose files somebody has edited."""
    return list(takewhile(lambda name: is_edited(folder / name), names))


def beside_edited(file: Path) -> Path:
    """Return the first of ``best.yaml``, ``best-2.yaml`` and so on that may be written."""
    return next(path for path in _numbered(file) if not is_edited(path))


def _numbered(file: Path) -> Iterator[Path]:
    yield file
    yield from (file.with_stem(f"{file.stem}-{number}") for number in count(2))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]

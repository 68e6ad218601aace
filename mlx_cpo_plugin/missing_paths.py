"""What a name that is no existing path was probably meant to be."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path


def looks_like_path(name: str, suffixes: Sequence[str] = ()) -> bool:
    """Whether a name can only be a path, and not that of something on the Hugging Face hub."""
    marked = name.startswith((".", "/", "~")) or name.endswith(("/", *suffixes)) or name.count("/") > 1
    return marked or ("/" in name and os.path.isdir(name.partition("/")[0]))


def nearest_path(path: Path, fits: Callable[[Path], bool] = Path.is_dir) -> str | None:
    """Return the existing path beside a missing one whose name is nearly the same, among those that ``fits`` takes."""
    names = [other.name for other in (path.parent.iterdir() if path.parent.is_dir() else ()) if fits(other)]
    by_stem = {name.partition(".")[0]: name for name in names} | {name: name for name in names}
    near = get_close_matches(path.name, by_stem, n=1, cutoff=0.7)
    return str(path.parent / by_stem[near[0]]) if near else None

"""Folders as other tools write them: which of their files hold which split."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mlx_cpo_plugin.data.files import COMPRESSED, SUFFIXES, kind_of
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.wording import named

SPLIT_NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test",),
}
_OF_PAIRS = frozenset(("prefs", "pref", "preferences", "preference", "pairs", "dpo", "orpo", "cpo", "simpo", "rm"))
_OF_OTHER_ROWS = frozenset(("sft", "gen", "kto", "ppo", "grpo"))
_OF_SHARDS = frozenset(("of", "part", "shard", "chunk", "data", "rows", "split", "set"))
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
_METADATA = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))
_LARGEST_CARD = 1 << 18


class _Claim(NamedTuple):
    """What a name says of its split; of several claims on one split the least one holds.

    Attributes:
        folder: whether it is the name of a folder; files of the same split come first.
        rank: 0 for the split's name alone, 1 for shards, 2 for pairs among other rows, 3 for a name before it.
        alias: position of the split's name among its aliases.
        words: the name without numbers, which shards of one set have in common.
    """

    folder: bool
    rank: int
    alias: int
    words: tuple[str, ...]


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` of the ``datasets`` library wrote this folder."""
    files = ("dataset_dict.json",), ("state.json", "dataset_info.json")
    return any(all((folder / name).is_file() for name in names) for names in files)


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of each split of a folder; none where their names do not tell.

    What the card of a downloaded hub repository says comes first, then names in the folder, then those in its only
    subfolder with splits, or in ``data``. Files of one set without the name of a split are the training set.

    Raises:
        DataError: several sets, configurations or names compete, or a shard is missing.
    """
    described = _described(folder)
    if described:
        return described
    here = _named_splits(folder)
    if here:
        return here
    children = [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    inside = {child: found for child in children if (found := _named_splits(child))}
    names = [child.name for child in inside]
    chosen = next((child for child in inside if child.name in ("data", "default") or len(inside) == 1), None)
    if chosen is not None:
        return inside[chosen]
    if inside:
        raise DataError(
            f"{named(str(folder))} holds several data sets ({named(', '.join(names))}): let data name one of them."
        )
    for place in (folder, folder / "data"):
        files = _data_files(place) if place.is_dir() else []
        if len({_words(file.name) for file in files}) == 1:
            return {"train": _whole(_best_of_each_stem(files))}
    return {}


def pick_splits(names: Iterable[str]) -> dict[str, str]:
    """Return which of the splits that a data set has is its train, valid and test split.

    A split of pairs is known by its name, as in ``train_prefs``; the only one there is counts as the training set.

    Raises:
        DataError: two names have an equal claim to a split.
    """
    names = list(names)
    claims: dict[str, list[tuple[_Claim, str]]] = {}
    for name in names:
        for split, claim in _claim(name).items():
            claims.setdefault(split, []).append((claim, name))
    if not claims and len(names) == 1:
        return {"train": names[0]}
    return {split: _least(split, found)[0] for split, found in claims.items()}


def _least(split: str, found: Sequence[tuple[_Claim, str]]) -> list[str]:
    """Return the names with the best claim: one, or the shards of one set."""
    least = min(claim[:3] for claim, _ in found)
    best = [(claim.words, name) for claim, name in found if claim[:3] == least]
    if len({words for words, _ in best}) > 1:
        names = ", ".join(named(name, 60) for _, name in best[:4])
        raise DataError(f"{names} may each be the {split} split: keep one of them, or let data name the file.")
    return [name for _, name in best]


def _claim(name: str) -> dict[str, _Claim]:
    """Return the split that a name stands for, if it does, with its claim to it."""
    words = _words(name)
    found = [
        (split, aliases.index(word), word)
        for word in words
        for split, aliases in SPLIT_NAMES.items()
        if word in aliases
    ]
    if len(found) != 1 or _OF_OTHER_ROWS & set(words):
        return {}
    split, alias, word = found[0]
    others = set(words) - {word} - _OF_SHARDS
    if not others:
        rank = 0 if _stem(name).lower() == word else 1
    elif others <= _OF_PAIRS:
        rank = 2
    elif words[-1] == word:
        rank = 3
    else:
        return {}
    return {split: _Claim(False, rank, alias, words)}


def _stem(name: str) -> str:
    """Return a file's name without the suffixes that say how it is written."""
    for suffix in (*COMPRESSED, *SUFFIXES):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


def _words(name: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[^a-z]+", _stem(name).lower()) if word and word != "of")


def _data_files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir(), key=_natural)
        if kind_of(path.name) in SUFFIXES
        and path.name.lower() not in _METADATA
        and not path.name.startswith(".")
        and path.is_file()
    ]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort 2 before 10."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", path.name)]


def _named_splits(folder: Path) -> dict[str, list[Path]]:
    """Return the splits that files, or subfolders full of files, are named after."""
    claims: dict[str, list[tuple[_Claim, str]]] = {}
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir(), key=_natural):
        holds = _data_files(path) if path.is_dir() else [path] if path in _data_files(folder) else []
        for split, claim in _claim(path.name).items() if holds else ():
            files[path.name] = holds
            claims.setdefault(split, []).append((claim._replace(folder=path.is_dir()), path.name))
    return {
        split: _whole(_best_of_each_stem([file for name in _least(split, found) for file in files[name]]))
        for split, found in claims.items()
    }


def _best_of_each_stem(files: Sequence[Path]) -> list[Path]:
    """Of one set written in several ways, keep the first in the order of SUFFIXES, and the uncompressed one."""

    def order(path: Path) -> tuple[int, int]:
        return SUFFIXES.index(kind_of(path.name)), len(path.name)

    best: dict[tuple[Path, str], Path] = {}
    for file in files:
        key = (file.parent, _stem(file.name).lower())
        if key not in best or order(file) < order(best[key]):
            best[key] = file
    return list(best.values())


def _whole(files: list[Path]) -> list[Path]:
    """Return the files, unless they are numbered and one is missing."""
    numbers: dict[tuple[Path, str, str], set[int]] = {}
    for file in files:
        match = _SHARD.fullmatch(_stem(file.name))
        if match:
            numbers.setdefault((file.parent, match[1], match[3]), set()).add(int(match[2]))
    for (folder, name, count), there in numbers.items():
        missing = sorted(set(range(int(count))) - there)
        if missing:
            first = f"{named(name, 60)}-{missing[0]:05}-of-{count}"
            raise DataError(
                f"{named(str(folder))} lacks {len(missing)} of the {int(count)} files of {named(name, 60)}, first of "
                f"all {first}: fetch the data set again."
            )
    return files


def _described(folder: Path) -> dict[str, list[Path]]:
    """Return the files that the card of a hub repository, its README.md, gives to each split; none without one."""
    configurations = list(_configurations(folder))
    names = [str(configuration.get("config_name", "default")) for configuration in configurations]
    if not configurations:
        return {}
    marked = [i for i, entry in enumerate(configurations) if names[i] == "default" or entry.get("default") is True]
    if len(configurations) > 1 and not marked:
        raise DataError(
            f"{named(str(folder))} has the configurations {named(', '.join(names))}: write hf_dataset with that folder "
            "as path: and one of them as config:."
        )
    chosen = configurations[marked[0] if marked else 0]
    base = folder / str(chosen.get("data_dir") or "")
    given = chosen["data_files"]
    if isinstance(given, Mapping):
        given = [{"split": split, "path": path} for split, path in given.items()]
    elif not isinstance(given, list) or not all(isinstance(entry, Mapping) for entry in given):
        given = [{"split": "train", "path": given}]
    files: dict[str, list[Path]] = {}
    for entry in given:
        found = _matching(base, entry.get("path"))
        if found:
            files.setdefault(str(entry.get("split", "train")), []).extend(found)
    return {split: _whole(files[name]) for split, name in pick_splits(files).items()}


def _configurations(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The entries of ``configs:`` in the front matter of README.md that name files."""
    try:
        with open(folder / "README.md", encoding="utf-8", errors="replace") as file:
            text = file.read(_LARGEST_CARD)
        parts = re.split(r"^---[ \t]*$", text, maxsplit=2, flags=re.MULTILINE)
        values = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return
    configurations = values.get("configs") if isinstance(values, Mapping) else None
    for entry in configurations if isinstance(configurations, list) else ():
        if isinstance(entry, Mapping) and entry.get("data_files"):
            yield entry


def _matching(base: Path, patterns: Any) -> list[Path]:
    """Return the data files below ``base`` that a pattern, or one of several, stands for."""
    found: dict[Path, None] = {}
    for pattern in patterns if isinstance(patterns, list) else [patterns]:
        if not isinstance(pattern, str) or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            continue
        for path in sorted(base.glob(pattern), key=_natural):
            if path.is_file() and kind_of(path.name) in SUFFIXES:
                found[path] = None
    return list(found)

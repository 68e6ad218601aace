"""Find the files of each split in a folder, as other tools lay it out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mlx_cpo_plugin.data.files import COMPRESSED, SUFFIXES, kind_of
from mlx_cpo_plugin.errors import DataError, named

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


# How well a name matches a split; the least wins. Whether it is a folder's name; 0 for the split's name alone, 1 for
# shards, 2 for pairs among other rows, 3 for another name in front; and the position among the split's aliases.
_Claim = tuple[bool, int, int]


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` of the ``datasets`` library wrote this folder."""
    files = ("dataset_dict.json",), ("state.json", "dataset_info.json")
    return any(all((folder / name).is_file() for name in names) for names in files)


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of each split of a folder; empty where their names do not say.

    What the card of a downloaded hub repository says comes first, then names in the folder, then those in its only
    subfolder with splits, or in ``data``. Files of one set without the name of a split are the training set.

    Raises:
        DataError: several sets, configurations or names compete, or a shard is missing.
    """
    here = _described(folder) or _named_splits(folder)
    if here:
        return here
    children = [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    inside = {child.name: found for child in children if (found := _named_splits(child))}
    chosen = next((name for name in inside if name in ("data", "default") or len(inside) == 1), None)
    if chosen is not None:
        return inside[chosen]
    if inside:
        raise DataError(
            f"{named(str(folder))} holds several data sets ({named(', '.join(inside))}): let data name one of them."
        )
    for place in (folder, folder / "data"):
        files = _data_files(place)
        if len({_words(file.name) for file in files}) == 1:
            return {"train": _whole(_best_of_each_stem(files))}
    return {}


def pick_splits(names: Collection[str]) -> dict[str, str]:
    """Return which of the splits that a data set has is its train, valid and test split.

    Splits of pairs are recognised among others by name, as in ``train_prefs``; a single split is the training set.

    Raises:
        DataError: two names have an equal claim to a split.
    """
    picked = {split: found[0] for split, found in _claimed(dict.fromkeys(names, False)).items()}
    return {"train": next(iter(names))} if not picked and len(names) == 1 else picked


def _claimed(names: Mapping[str, bool]) -> dict[str, list[str]]:
    """Return the names with the best claim to each split: one, or the shards of one set.

    Args:
        names: name -> whether it is that of a folder.
    """
    claims: dict[str, dict[str, _Claim]] = {}
    for name, folder in names.items():
        if claim := _claim(name, folder):
            claims.setdefault(claim[0], {})[name] = claim[1]
    best = {}
    for split, found in claims.items():
        least = min(found.values())
        best[split] = [name for name, claim in found.items() if claim == least]
        if len({_words(name) for name in best[split]}) > 1:
            listed = ", ".join(named(name, 60) for name in best[split][:4])
            raise DataError(f"{listed} may each be the {split} split: keep one of them, or let data name the file.")
    return best


def _claim(name: str, folder: bool) -> tuple[str, _Claim] | None:
    """Return the split that a name stands for, if any, and its claim to it."""
    words = _words(name)
    found = [(split, word) for word in words for split, aliases in SPLIT_NAMES.items() if word in aliases]
    if len(found) != 1 or _OF_OTHER_ROWS & set(words):
        return None
    split, word = found[0]
    others = set(words) - {word} - _OF_SHARDS
    if not others:
        rank = 0 if _stem(name).lower() == word else 1
    elif others <= _OF_PAIRS:
        rank = 2
    elif words[-1] == word:
        rank = 3
    else:
        return None
    return split, (folder, rank, SPLIT_NAMES[split].index(word))


def _stem(name: str) -> str:
    """Return a file's name without the suffixes of format and compression."""
    for suffix in (*COMPRESSED, *SUFFIXES):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


def _words(name: str) -> tuple[str, ...]:
    """Return the words of a name; all shards of a set have the same."""
    return tuple(word for word in re.split(r"[^a-z]+", _stem(name).lower()) if word and word != "of")


def _data_files(folder: Path) -> list[Path]:
    """Return the data files of a folder; empty where the path is no folder."""
    return [
        path
        for path in sorted(folder.iterdir() if folder.is_dir() else (), key=_natural)
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
    here = _data_files(folder)
    entries = {path: [path] if path in here else [] for path in sorted(folder.iterdir(), key=_natural)}
    files = {path.name: found for path, alone in entries.items() if (found := alone or _data_files(path))}
    claimed = _claimed({name: (folder / name).is_dir() for name in files})
    return {
        split: _whole(_best_of_each_stem([file for name in names for file in files[name]]))
        for split, names in claimed.items()
    }


def _best_of_each_stem(files: Sequence[Path]) -> list[Path]:
    """Of one set written in several ways, keep the first in the order of SUFFIXES, and the uncompressed one."""
    best: dict[tuple[Path, str], Path] = {}
    for file in sorted(files, key=lambda file: (SUFFIXES.index(kind_of(file.name)), len(file.name))):
        best.setdefault((file.parent, _stem(file.name).lower()), file)
    return sorted(best.values(), key=files.index)


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
    """Return the files of each split by the card of a hub repository, its README.md; empty without one."""
    configurations = list(_configurations(folder))
    names = [str(entry.get("config_name", "default")) for entry in configurations]
    default = [
        entry
        for entry, name in zip(configurations, names, strict=True)
        if name == "default" or entry.get("default") is True
    ]
    if len(configurations) > 1 and not default:
        raise DataError(
            f"{named(str(folder))} has the configurations {named(', '.join(names))}: write hf_dataset with that folder "
            "as path: and one of them as config:."
        )
    chosen = next(iter(default or configurations), None)
    if chosen is None:
        return {}
    base, given = folder / str(chosen.get("data_dir") or ""), chosen["data_files"]
    if isinstance(given, Mapping):
        given = [{"split": split, "path": path} for split, path in given.items()]
    elif not isinstance(given, list) or not all(isinstance(entry, Mapping) for entry in given):
        given = [{"split": "train", "path": given}]
    files: dict[str, list[Path]] = {}
    for entry in given:
        if found := _matching(base, entry.get("path")):
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

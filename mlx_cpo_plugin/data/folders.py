"""Find the files of each split in a folder, as other tools lay it out."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

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
_SHARD = re.compile(r"(.*?)[-_]?(\d+)-of-(\d+)")
_METADATA = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))

# How well a name matches a split; the least wins. Whether it is a folder's name; 0 for the split's name alone, 1 for
# shards, 2 for pairs among other rows, 3 for another name in front; and the position among the split's aliases.
_Claim = tuple[bool, int, int]


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` of the ``datasets`` library wrote this folder."""
    files = ("dataset_dict.json",), ("state.json", "dataset_info.json")
    return any(all((folder / name).is_file() for name in names) for names in files)


def has_card(folder: Path) -> bool:
    """Whether the card of a downloaded hub repository, its README.md, says which files belong to which split."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return bool((metadata_load(folder / "README.md") or {}).get("configs"))
    except (OSError, ValueError, yaml.YAMLError):
        return False


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of each split of a folder; empty where their names do not say.

    Names in the folder come first, then those in its only subfolder with splits, or in ``data``. Files of one set
    without the name of a split are the training set.

    Raises:
        DataError: several sets or names compete.
    """
    here = _named_splits(folder)
    if here:
        return here
    children = [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    inside = {child.name: found for child in children if (found := _named_splits(child))}
    chosen = next((name for name in inside if name in ("data", "default") or len(inside) == 1), None)
    if chosen is not None:
        return inside[chosen]
    if inside:
        raise DataError(
            f"{named(str(folder))} holds several data sets ({named(', '.join(inside))}): set data to one of them.",
            key="data",
            place=str(folder),
            allowed=", ".join(inside),
        )
    for place in (folder, folder / "data"):
        files = _data_files(place)
        if len({_words(file.name) for file in files}) == 1:
            return {"train": _best_of_each_stem(files)}
    return {}


def pick_splits(names: Collection[str]) -> dict[str, str]:
    """Return which of the splits that a data set has is its train, valid and test split.

    Splits of pairs are recognised among others by name, as in ``train_prefs``; a single split is the training set.

    Raises:
        DataError: two names have an equal claim to a split.
    """
    picked = {split: found[0] for split, found in _claimed(dict.fromkeys(names, False)).items()}
    return {"train": next(iter(names))} if not picked and len(names) == 1 else picked


def nearest_split(name: str) -> str | None:
    """Return which of ``train``, ``valid`` and ``test`` a name is probably a slip of, empty where it is like none.

    None: it names a split, also one of rows that are no pairs, such as ``train_sft``.
    """
    words = _words(name)
    if any(word in aliases for word in words for aliases in SPLIT_NAMES.values()):
        return None
    splits = {alias: split for split, aliases in SPLIT_NAMES.items() for alias in aliases}
    near = get_close_matches("_".join(words), splits, n=1)
    return splits[near[0]] if near else ""


def _claimed(names: Mapping[str, bool]) -> dict[str, list[str]]:
    """The names, each with whether it is a folder's, that have the best claim to each split: one, or a set's shards."""
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
            raise DataError(
                f"{listed} may each be the {split} split: keep one of them, or set data to the file.",
                key="data",
                allowed=listed,
            )
    return best


def _claim(name: str, folder: bool) -> tuple[str, _Claim] | None:
    """The split that a name stands for, if any, and its claim to it."""
    words = _words(name)
    found = [(split, word) for word in words for split, aliases in SPLIT_NAMES.items() if word in aliases]
    if len(found) != 1 or _OF_OTHER_ROWS & set(words):
        return None
    split, word = found[0]
    others = set(words) - {word} - _OF_SHARDS
    if not others:
        rank = 0 if _stem(name) == word else 1
    elif others <= _OF_PAIRS:
        rank = 2
    elif words[-1] == word or others == {"dataset"}:
        rank = 3
    else:
        return None
    return split, (folder, rank, SPLIT_NAMES[split].index(word))


def _stem(name: str) -> str:
    """A file's name in lower case, without the suffixes of format and compression."""
    name = name.lower()
    for suffix in (*COMPRESSED, *SUFFIXES):
        name = name.removesuffix(suffix)
    return name


def _words(name: str) -> tuple[str, ...]:
    """The words of a name; all shards of a set have the same."""
    return tuple(word for word in re.split(r"[^a-z]+", _stem(name)) if word and word != "of")


def _data_files(folder: Path) -> list[Path]:
    """The data files of a folder, and links named after a split that lead nowhere, of which whoever reads them is told.

    There are none where the path is no folder.
    """
    return [
        path
        for path in sorted(folder.iterdir() if folder.is_dir() else (), key=_natural)
        if kind_of(path.name) in SUFFIXES
        and path.name.lower() not in _METADATA
        and not path.name.startswith(".")
        and (path.is_file() or (path.is_symlink() and not path.exists() and _claim(path.name, False)))
    ]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort 2 before 10."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", path.name)]


def _named_splits(folder: Path) -> dict[str, list[Path]]:
    """The splits that files of a folder, or its subfolders full of files, are named after."""
    files = {path.name: [path] for path in _data_files(folder)}
    inside = {path.name: found for path in sorted(folder.iterdir(), key=_natural) if (found := _data_files(path))}
    claimed = _claimed({**dict.fromkeys(files, False), **dict.fromkeys(inside, True)})
    files |= inside
    return {
        split: _best_of_each_stem([file for name in names for file in files[name]]) for split, names in claimed.items()
    }


def _best_of_each_stem(files: Sequence[Path]) -> list[Path]:
    """Of one set written in several ways, keep the first in the order of SUFFIXES, and the uncompressed one."""
    best: dict[tuple[Path, str], Path] = {}
    for file in sorted(files, key=lambda file: (SUFFIXES.index(kind_of(file.name)), len(file.name))):
        best.setdefault((file.parent, _stem(file.name)), file)
    return sorted(best.values(), key=files.index)


def check_shards(files: Sequence[Path]) -> None:
    """Raise DataError where files that say how many they are, as ``train-00000-of-00003`` does, are fewer."""
    there: dict[tuple[str, int], dict[int, Path]] = {}
    for file in files:
        if found := _SHARD.fullmatch(_stem(file.name)):
            there.setdefault((found[1], int(found[3])), {})[int(found[2])] = file
    for (_, count), shards in there.items():
        if len(shards) < count:
            folder, listed = next(iter(shards.values())).parent, ", ".join(file.name for file in shards.values())
            raise DataError(
                f"{named(str(folder))} holds {len(shards)} of {count} shards ({named(listed, 60)}): put the others "
                "there, or set data to one file.",
                key="data",
                place=str(folder),
            )


def passed_over(folder: Path, split: str, files: Sequence[Path]) -> list[str]:
    """Return the data files of a folder that are named after a split, too, but are not among its ``files``."""
    return [
        file.relative_to(folder).as_posix()
        for place in sorted({folder, *(file.parent for file in files)})
        for file in _data_files(place)
        if file not in files and (claim := _claim(file.name, False)) and claim[0] == split
    ]

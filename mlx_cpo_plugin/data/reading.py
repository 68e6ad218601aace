"""Read the raw rows of each split from the files, folders or Hugging Face datasets in the settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.data.columns import Columns, DataSettings, first_few, rows_in
from mlx_cpo_plugin.data.files import ACCEPTED, SUFFIXES, Row, kind_of, numbered, read_file
from mlx_cpo_plugin.data.folders import (
    check_shards,
    has_card,
    is_saved_dataset,
    nearest_split,
    passed_over,
    pick_splits,
    split_files,
)
from mlx_cpo_plugin.errors import DataError, first_line, is_out_of_memory, named, printable, shown
from mlx_cpo_plugin.missing_paths import looks_like_path, nearest_path
from mlx_cpo_plugin.types import Values

# Where an hf_dataset entry names no split: the two have no row in common and leave none out.
DEFAULT_TRAIN_SPLIT = "train[:90%]"
DEFAULT_VALID_SPLIT = "train[90%:]"
HUB_SECONDS = 10.0
"""How long the hub may take to say whether it has a data set."""


@dataclass(frozen=True)
class RowGroup:
    """Rows of one file or dataset split, which share their columns.

    Attributes:
        note: for the user, on how they were chosen.
        share: of a set that is mixed with others, its name and its weight.
    """

    name: str
    rows: Sequence[Row]
    columns: Columns
    note: str = ""
    share: tuple[str, float] | None = None


Splits = dict[str, list[RowGroup]]


def read_splits(
    settings: DataSettings, wanted: Collection[str], rows: Mapping[str, Iterable[object]] | None = None
) -> Splits:
    """Read the ``wanted`` ones of ``train``, ``valid`` and ``test``; a split that is not there has no groups.

    ``rows``, by split, go before ``settings.hf_dataset``, and this before ``settings.data``, which is a folder, a file
    (the training set) or the name of a dataset on the Hugging Face hub, or a list of such with their weights.

    Raises:
        DataError: a path does not exist, a dataset is not found, or a column is missing.
    """
    if rows is not None:
        splits = _rows_of_call(rows, Columns.from_settings(settings), wanted)
    elif settings.hf_dataset:
        splits = _read_entries(settings, settings.hf_dataset, wanted)
    elif isinstance(settings.data, str):
        splits = _read_data(settings.data, Columns.from_settings(settings), wanted)
    else:
        splits = _read_sets(settings, settings.data, wanted)
    for groups in splits.values():
        for group in groups:
            group.columns.check([row.value for row in group.rows], group.name)
    return _noted_where_unscored({split: splits.get(split, []) for split in wanted})


def _noted_where_unscored(splits: Splits) -> Splits:
    """The splits, with a note at each group without the scores that ``min_gap`` needs.

    Raises:
        DataError: no group has any.
    """
    groups = [group for groups in splits.values() for group in groups if group.rows]
    unscored = [group for group in groups if not group.columns.tell_gaps([row.value for row in group.rows])]
    if unscored and len(unscored) == len(groups):
        raise DataError(
            f"min_gap is set, but {unscored[0].name} has no scores: give them as score_chosen and score_rejected, or "
            "remove min_gap.",
            key="min_gap",
            place=unscored[0].name,
        )

    def noted(group: RowGroup) -> RowGroup:
        note = f"{group.note} {group.name} has no scores, so that min_gap leaves its rows in.".lstrip()
        return replace(group, note=note) if any(group is other for other in unscored) else group

    return {split: [noted(group) for group in groups] for split, groups in splits.items()}


def _read_sets(settings: DataSettings, sets: Sequence[Values], wanted: Collection[str]) -> Splits:
    """The sets of a list in ``data``, one after the other; each need not have every split."""
    splits: Splits = {split: [] for split in wanted}
    for entry in sets:
        share = named(str(entry["path"])), float(entry.get("weight") or 1.0)
        read = _read_data(str(entry["path"]), Columns.from_settings(settings, entry), wanted, mixed=True)
        for split, groups in read.items():
            splits[split] += [replace(group, share=share) for group in groups]
    return splits


def _rows_of_call(rows: Mapping[str, Iterable[object]], columns: Columns, wanted: Collection[str]) -> Splits:
    rows = {str(name): given for name, given in rows.items() if given is not None}
    picked = pick_splits(rows)
    if not set(picked) & {"train", "test"}:
        raise DataError(
            f"data has the keys {named(', '.join(rows)) or '(none)'}, none of them train: give rows as a list, or by "
            "split, as in {'train': rows, 'valid': others}.",
            key="data",
            allowed="train, valid, test",
        )
    for name in rows:
        if name not in picked.values() and (near := nearest_split(name)) is not None:
            advice = f"did you mean {near}?" if near else "use train, valid and test."
            raise DataError(
                f"data has the key {named(name)}, which is no split: {advice}",
                key="data",
                place=name,
                allowed=near or "train, valid, test",
            )
    splits = {}
    for split in (split for split in wanted if split in picked):
        name, given = picked[split], rows[picked[split]]
        if isinstance(given, str | os.PathLike):
            read = read_file(Path(given).expanduser())
        else:
            read = numbered(rows_in(given, f"data[{name!r}]"), f"{name} row", before=" ")
        splits[split] = [RowGroup(f"data[{name!r}]", read, columns)]
    return splits


def _read_data(data: str, columns: Columns, wanted: Collection[str], mixed: bool = False) -> Splits:
    """The rows of one set; where it is ``mixed`` with others, their sources name its path."""
    try:
        path = Path(data).expanduser()
        if path.is_file():
            name = data if mixed else path.name
            return {"train": [RowGroup(named(name), read_file(path, name), columns)]} if "train" in wanted else {}
        if path.is_dir():
            return _read_folder(path, columns, wanted, Path(data) if mixed else None)
        if path.exists():  # a device, a pipe
            raise DataError(f"data names {named(data)}, which is no file and no folder; give one of them.", key="data")
        near = nearest_path(path, lambda other: other.is_dir() or kind_of(other.name) in SUFFIXES)
    except (OSError, RuntimeError) as error:  # the latter for ~somebody, who is not known here
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(
            f"data names {named(data)}, which cannot be read ({reason}): check the path.", key="data"
        ) from error
    if near is not None or looks_like_path(data, SUFFIXES):
        advice = "give a folder, a file or a hub name." if near is None else f"did you mean {named(near)}?"
        raise DataError(f"data names {named(data)}, which does not exist: {advice}", key="data", allowed=near or "")
    return _of_library(data, _load_from_hub(data, {}), columns, wanted)


def _read_folder(folder: Path, columns: Columns, wanted: Collection[str], mixed_as: Path | None) -> Splits:
    name = folder.name if mixed_as is None else mixed_as.as_posix()
    if is_saved_dataset(folder):
        import datasets

        with _library(str(folder), f"{named(str(folder))} cannot be loaded", "save the data set again"):
            found = datasets.load_from_disk(str(folder))
        by_split = found if isinstance(found, Mapping) else {"train": found}
        return _of_library(name, by_split, columns, wanted)
    if has_card(folder):
        return _of_library(name, _load_from_hub(str(folder), {}), columns, wanted)
    files = split_files(folder)
    splits: Splits = {}
    for split in wanted:
        check_shards(files.get(split, ()))
        for number, file in enumerate(files.get(split, ())):
            where = ((mixed_as or Path()) / file.relative_to(folder)).as_posix()
            others = [] if number else passed_over(folder, split, files[split])
            note = f"{first_few(others, 3)} {'are' if others[1:] else 'is'} not read." if others else ""
            splits.setdefault(split, []).append(RowGroup(named(where), read_file(file, where), columns, note))
    if not splits and not (mixed_as and files):  # the other sets may have the split
        names_there = sorted(path.name for path in folder.iterdir())[:8]
        found = ", ".join(shown(name)[1:-1] for name in names_there) or "nothing"
        needed = " or ".join(f"{split}.jsonl" for split in wanted)
        raise DataError(
            f"{named(str(folder))} holds no {needed} (found: {found}): put the rows there, as {ACCEPTED}.",
            key="data",
            place=str(folder),
            allowed=needed,
        )
    return splits


def _of_library(
    name: str, by_split: Mapping[str, Iterable[object]], columns: Columns, wanted: Collection[str]
) -> Splits:
    """Rows of a dataset of the ``datasets`` library."""
    picked = pick_splits(by_split)
    if not picked:
        raise DataError(
            f"{named(name)} has the splits {named(', '.join(by_split))}, none of them called train: write hf_dataset "
            "with path: and train_split:.",
            key="hf_dataset",
            place=name,
            allowed=", ".join(by_split),
        )
    splits = {}
    for split in (split for split in wanted if split in picked):
        where = f"{named(name, 100)} {named(picked[split], 100)}"
        splits[split] = [RowGroup(where, _library_rows(name, by_split[picked[split]], where), columns)]
    return splits


def _read_entries(settings: DataSettings, entries: list[Values] | Values, wanted: Collection[str]) -> Splits:
    """The entries of ``hf_dataset``, one after the other, each with its own columns."""
    carve = settings.valid_fraction > 0  # which takes rows of the training set
    splits: Splits = {split: [] for split in wanted}
    entries = [entries] if isinstance(entries, Mapping) else entries
    weighted = any(isinstance(entry, Mapping) and entry.get("weight") is not None for entry in entries)
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):  # as apps may give it
            raise DataError(
                "hf_dataset has an entry without a path: write path: and the dataset's name.", key="hf_dataset"
            )
        config = entry.get("config") or {}
        options = dict(config) if isinstance(config, Mapping) else {"name": config}
        columns = Columns.from_settings(settings, entry)
        names = {
            "train": entry.get("train_split", "train" if carve else DEFAULT_TRAIN_SPLIT),
            "valid": entry.get("valid_split", None if carve else DEFAULT_VALID_SPLIT),
            "test": entry.get("test_split"),
        }
        label = " ".join(str(part) for part in (entry["path"], options.get("name")) if part)
        for split, groups in splits.items():
            if names[split] is None:
                continue
            where = named(f"{label} {names[split]}", 100)
            if where in [group.name for group in groups]:
                where = f"{where} ({len(groups) + 1})"
            try:
                rows = _library_rows(entry["path"], _load_split(entry["path"], options, names[split]), where)
            except DataError as error:
                if split != "valid" or "valid_split" in entry or "train_split" not in entry:
                    raise
                fault = f"{str(error).rstrip('.')}, or set valid_split, which is {DEFAULT_VALID_SPLIT} by default."
                raise DataError(fault, key="hf_dataset.valid_split", place=where) from error
            share = (where, float(entry.get("weight") or 1.0)) if weighted else None
            groups.append(RowGroup(where, rows, columns, _note_on_splits(entry, split, names, where), share))
    return splits


def _load_split(name: str, options: Mapping[str, object], split: str) -> Any:
    if split not in (DEFAULT_TRAIN_SPLIT, DEFAULT_VALID_SPLIT):
        return _load_from_hub(name, {**options, "split": split})
    rows = _load_from_hub(name, {**options, "split": "train"})  # the library refuses a part without rows
    cut = round(0.9 * len(rows))
    part = range(cut) if split == DEFAULT_TRAIN_SPLIT else range(cut, len(rows))
    return rows.select(part) if part else []


def _note_on_splits(entry: Mapping[str, object], split: str, names: Mapping[str, str | None], where: str) -> str:
    if split == "train" and names["train"] == DEFAULT_TRAIN_SPLIT and "train_split" not in entry:
        rest = "the rest is validated on" if names["valid"] == DEFAULT_VALID_SPLIT else "the rest is not used"
        return f"{where} is nine tenths of its rows, {rest}: set train_split and valid_split for others."
    if split == "valid" and names["valid"] == DEFAULT_VALID_SPLIT and "train_split" in entry:
        return f"{where} may share rows with train_split {named(names['train'], 100)}: set valid_split."
    return ""


def _load_from_hub(name: str, options: Mapping[str, object]) -> Any:
    import datasets

    with (
        _library(name, f"the dataset {shown(name)} cannot be loaded", "check its settings"),
        _hub_asked(name) as silent,
    ):
        try:
            return datasets.load_dataset(name, **options)
        except datasets.exceptions.DatasetNotFoundError as error:
            raise DataError(
                f"no dataset {shown(name)} was found, neither as a local path nor on the Hugging Face hub: check "
                "data or hf_dataset.",
                key="data",
                place=name,
            ) from error
        except ConnectionError as error:
            if not silent:
                raise
            raise DataError(
                f"no dataset {shown(name)} was found, neither as a local path nor in the cache, and the Hugging Face "
                f"hub cannot be reached ({silent}): check data or hf_dataset.",
                key="data",
                place=name,
            ) from error


@contextmanager
def _hub_asked(name: str) -> Iterator[str]:
    """Ask the hub once whether it has a data set; where it does not answer, the library only looks into its cache.

    By itself the library would try for half a minute. Yields why there is no answer, if there is none.
    """
    from datasets import config

    offline = config.HF_HUB_OFFLINE
    silent = "offline mode is on" if offline else "" if os.path.exists(name) else _why_silent(name)
    config.HF_HUB_OFFLINE = bool(silent)
    try:
        yield silent
    finally:
        config.HF_HUB_OFFLINE = offline


def _why_silent(name: str) -> str:
    """Return why the hub does not answer; empty where it does, whatever it says."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(name, timeout=HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return ""
    except Exception as error:  # whatever its client raises for network, proxy or certificates
        return printable(first_line(error))
    return ""


def _library_rows(name: str, rows: Iterable[object], where: str) -> list[Row]:
    # Images and the like are decoded only now, by whatever library is there.
    with _library(where, f"a row of the dataset {shown(name)} cannot be read", "check its columns"):
        return numbered(rows, where)


@contextmanager
def _library(place: str, failure: str, advice: str) -> Iterator[None]:
    """Turn whatever the builders, network and decoders of the ``datasets`` library raise into DataError.

    A module ``torch`` that is not PyTorch, which would mislead the library, is hidden meanwhile.
    """
    torch = sys.modules.get("torch")
    if torch is not None and not hasattr(torch, "Tensor"):
        del sys.modules["torch"]
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise DataError(f"{failure} ({printable(reason)}): {advice}.", place=place) from error
    finally:
        if torch is not None:
            sys.modules.setdefault("torch", torch)

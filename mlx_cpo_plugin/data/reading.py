"""Files, folders and Hugging Face datasets to raw rows, each with the place it came from."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlx_cpo_plugin.data.formats import Columns
from mlx_cpo_plugin.errors import DataError, first_line, is_out_of_memory
from mlx_cpo_plugin.wording import named, printable, shown

SPLIT_NAMES = {
    "train": ("train",),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test",),
}
SUFFIXES = (".jsonl", ".json", ".parquet")
# What mlx-lm-lora reads where an hf_dataset entry names no split.
DEFAULT_TRAIN_SPLIT = "train[:80%]"
DEFAULT_VALID_SPLIT = "train[-10%:]"


class Row(NamedTuple):
    """A raw row and where it stands, e.g. ``train.jsonl:12``."""

    value: Any
    source: str


@dataclass(frozen=True)
class RowGroup:
    """Rows of one file or dataset split, which share their column names.

    Attributes:
        name: what to call them in messages.
        rows: the raw rows, in order.
        columns: the columns to read.
        note: something the user should know about how they were chosen; empty for nothing.
    """

    name: str
    rows: Sequence[Row]
    columns: Columns
    note: str = ""


def read_splits(settings: Any, wanted: Collection[str]) -> dict[str, list[RowGroup]]:
    """Read the ``wanted`` ones of ``train``, ``valid`` and ``test``; a split that is not there has no groups.

    ``settings.hf_dataset`` goes before ``settings.data``, which is a folder, a file (the training set) or the name of
    a dataset on the Hugging Face hub.

    Raises:
        DataError: a path does not exist, a file cannot be read, a dataset is not found, or a column is missing.
    """
    if getattr(settings, "hf_dataset", None):
        splits = _read_entries(settings, wanted)
    else:
        splits = _read_data(str(settings.data), Columns.from_settings(settings), wanted)
    result = {split: splits.get(split, []) for split in wanted}
    for groups in result.values():
        for group in groups:
            if group.rows:
                group.columns.check((row.value for row in group.rows), group.name)
    return result


def _read_data(data: str, columns: Columns, wanted: Collection[str]) -> dict[str, list[RowGroup]]:
    try:
        path = Path(data).expanduser()
        if path.is_file():
            return {"train": [RowGroup(named(path.name), read_file(path), columns)]} if "train" in wanted else {}
        if path.is_dir():
            return _read_folder(path, columns, wanted)
    except OSError as error:
        raise DataError(
            f"data names {named(data)}, which cannot be read ({error.strerror}): check the path."
        ) from error
    except RuntimeError as error:  # ~somebody, who is not known here
        raise DataError(f"data names {named(data)}, whose home folder is not known: give the whole path.") from error
    if _looks_like_path(data):
        raise DataError(f"data names {named(data)}, which does not exist: give a folder, a file or a hub name.")
    return _read_hub(data, columns, wanted)


def read_file(path: Path) -> list[Row]:
    """Rows of a ``.jsonl``, ``.json`` or ``.parquet`` file.

    A ``.json`` file holds a list of rows, or an object with that list under ``data``.

    Raises:
        DataError: the file is of another kind, or not readable as what its name says.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{named(str(path))} is not a data file that can be read: use one of {', '.join(SUFFIXES)}.")
    try:
        return reader(path)
    except OSError as error:
        words = error.strerror or first_line(error)
        raise DataError(f"{named(str(path))} cannot be read ({printable(words)}): check the file.") from error


def _read_jsonl(path: Path) -> list[Row]:
    rows, name = [], named(path.name)
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        text = _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, path, number).strip()
        if not text:
            continue
        rows.append(Row(_parse_json(text, path, number), f"{name}:{number}"))
    return rows


def _read_json(path: Path) -> list[Row]:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    text = "\n".join(_decode(line, path, number) for number, line in enumerate(lines, start=1))
    content = _parse_json(text, path, 1)
    rows = content.get("data") if isinstance(content, Mapping) else content
    if not isinstance(rows, list):
        file = named(str(path))
        raise DataError(f'{file} holds no rows: write a list of rows, or an object with that list under "data".')
    return _numbered(rows, named(path.name))


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        return _numbered(parquet.read_table(path).to_pylist(), named(path.name))
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the latter for text, dates and the like
        reason = printable(first_line(error))
        raise DataError(f"{named(str(path))} is not a Parquet file that can be read ({reason}): check it.") from error


def _read_folder(folder: Path, columns: Columns, wanted: Collection[str]) -> dict[str, list[RowGroup]]:
    splits = {}
    for split in wanted:
        candidates = (folder / f"{name}{suffix}" for name in SPLIT_NAMES[split] for suffix in SUFFIXES)
        file = next((path for path in candidates if path.is_file()), None)
        if file is not None:
            splits[split] = [RowGroup(file.name, read_file(file), columns)]
    if not splits:
        names = ", ".join(shown(name)[1:-1] for name in sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        needed = " or ".join(f"{split}.jsonl" for split in wanted)
        raise DataError(
            f"{named(str(folder))} holds no {needed} (also .json, .parquet; found: {names}): put the rows there."
        )
    return splits


def _read_hub(name: str, columns: Columns, wanted: Collection[str]) -> dict[str, list[RowGroup]]:
    found = _load_from_hub(name, {})
    splits = {}
    for split in wanted:
        there = next((alias for alias in SPLIT_NAMES[split] if alias in found), None)
        if there is not None:
            where = f"{named(name, 100)} {there}"
            splits[split] = [RowGroup(where, _hub_rows(name, found[there], where), columns)]
    return splits


def _read_entries(settings: Any, wanted: Collection[str]) -> dict[str, list[RowGroup]]:
    """The entries of ``hf_dataset``, one after the other, each with its own columns."""
    entries = settings.hf_dataset
    splits: dict[str, list[RowGroup]] = {split: [] for split in wanted}
    for entry in [entries] if isinstance(entries, Mapping) else entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            raise DataError("hf_dataset has an entry without a path: write path: and the dataset's name.")
        options = _options_of(entry)
        columns = Columns.from_settings(settings, entry)
        carve = bool(getattr(settings, "valid_fraction", 0))
        names = {
            "train": entry.get("train_split", DEFAULT_TRAIN_SPLIT),
            "valid": entry.get("valid_split", None if carve else DEFAULT_VALID_SPLIT),
            "test": entry.get("test_split"),
        }
        for split in splits:
            if names[split] is None:
                continue
            if not isinstance(names[split], str):
                given = f"{split}_split {shown(names[split])}"
                raise DataError(
                    f"hf_dataset has an entry with {given}: write the name of a split, such as train[:80%]."
                )
            where = named(f"{entry['path']} {names[split]}", 100)
            found = _load_from_hub(entry["path"], {**options, "split": names[split]})
            rows = _hub_rows(entry["path"], found, where)
            shares_rows = split == "valid" and "train_split" in entry and "valid_split" not in entry
            overlap = f"{where} may share rows with train_split {named(names['train'], 100)}: set valid_split."
            note = overlap if shares_rows else ""
            splits[split].append(RowGroup(where, rows, columns, note))
    return splits


def _options_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config`` of an ``hf_dataset`` entry means as arguments of ``datasets.load_dataset``."""
    config = entry.get("config") or {}
    if isinstance(config, str):
        return {"name": config}
    if not isinstance(config, Mapping):
        raise DataError(f"hf_dataset has an entry with config {shown(config)}: write the name of a configuration.")
    return dict(config)


def _load_from_hub(name: str, options: Mapping[str, Any]) -> Any:
    import datasets

    try:
        with _without_partial_torch():
            return datasets.load_dataset(name, **options)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"no dataset {shown(name)} was found, neither as a local path nor on the Hugging Face hub: check data or "
            "hf_dataset."
        ) from error
    except Exception as error:  # The library raises whatever its builders and the network raise.
        if is_out_of_memory(error):
            raise
        reason = printable(first_line(error))
        raise DataError(f"the dataset {shown(name)} cannot be loaded ({reason}): check its settings.") from error


def _hub_rows(name: str, rows: Any, where: str) -> list[Row]:
    try:
        with _without_partial_torch():
            return _numbered(rows, where)
    except Exception as error:  # Images and the like are decoded only now, by whatever library is there.
        if is_out_of_memory(error):
            raise
        reason = printable(first_line(error))
        raise DataError(f"a row of the dataset {shown(name)} cannot be read ({reason}): check its columns.") from error


@contextmanager
def _without_partial_torch() -> Iterator[None]:
    """Hide a ``torch`` that is no PyTorch, but which ``datasets`` would take for it, until the context ends."""
    torch = sys.modules.get("torch")
    if torch is None or hasattr(torch, "Tensor"):
        yield
        return
    del sys.modules["torch"]
    try:
        yield
    finally:
        sys.modules.setdefault("torch", torch)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(("/", *SUFFIXES)) or name.count("/") > 1


def _numbered(rows: Any, name: str) -> list[Row]:
    return [Row(value, f"{name}:{number}") for number, value in enumerate(rows, start=1)]


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{named(str(path))}:{number} is not valid UTF-8: save the file as UTF-8.") from error


def _parse_json(text: str, path: Path, line: int) -> Any:
    """The value of JSON ``text`` that begins on ``line``."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place, reason = line + error.lineno - 1, f"{error.msg}, column {error.colno}"
        raise DataError(f"{named(str(path))}:{place} is not valid JSON ({reason}): correct that line.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets without end
        reason = first_line(error)
        raise DataError(f"{named(str(path))}:{line} holds JSON that cannot be read ({reason}): correct it.") from error

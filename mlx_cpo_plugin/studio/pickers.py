"""What is on this machine to pick from: models, data sets, and the first pairs of a data set."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants

from mlx_cpo_plugin.checkpoints import METRICS_FILE
from mlx_cpo_plugin.data.columns import Columns
from mlx_cpo_plugin.data.files import SUFFIXES, Row, beginning, kind_of, numbered, read_file
from mlx_cpo_plugin.data.folders import has_card, is_saved_dataset, split_files
from mlx_cpo_plugin.data.messages import Message, UnusableRow
from mlx_cpo_plugin.data.rows import PlainText, parse_row
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.studio.live_runs import folders_below

DEPTH = 3
MOST_CHOICES = 200
PAIRS_SHOWN = 2
BEGINNING = 2**20
"""Bytes of a file of lines that are read for its first pairs."""
LARGEST_WHOLE = 32 * 2**20
"""Bytes of a file that is read whole where its beginning alone cannot be read."""


@dataclass(frozen=True)
class PairText:
    """A pair as text: the prompt (empty where there is none) and both answers."""

    prompt: str
    chosen: str
    rejected: str


def models_here(root: Path) -> list[str]:
    """Return the model folders below ``root``, relative to it, and the models in the Hugging Face cache."""
    folders = [
        str(folder.relative_to(root))
        for folder in folders_below(root, DEPTH)
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    ]
    cached = [
        name
        for name, snapshot in _cached("models")
        if (snapshot / "config.json").exists() and any(snapshot.glob("*.safetensors"))
    ]
    return [*folders, *cached][:MOST_CHOICES]


def datasets_here(root: Path) -> list[str]:
    """Return folders and files below ``root`` that hold a training set, and the data sets in the Hugging Face cache."""
    found = []
    for folder in folders_below(root, DEPTH):
        if any((folder / name).is_file() for name in ("config.json", METRICS_FILE)):  # a model, a run
            continue
        if folder != root and _training_files(folder):
            found.append(str(folder.relative_to(root)))
        files = [path for path in sorted(folder.iterdir()) if path.is_file() and kind_of(path.name) in SUFFIXES]
        found += [str(file.relative_to(root)) for file in files if kind_of(file.name) != ".json"]
    return [*found, *(name for name, _ in _cached("datasets"))][:MOST_CHOICES]


def is_cached(dataset: str) -> bool:
    """Whether a data set of the hub is in the Hugging Face cache."""
    return any(name == dataset for name, _ in _cached("datasets"))


def sets_named(settings: RunSettings) -> list[str]:
    """Return the folders, files and names that ``data`` is made up of."""
    return [settings.data] if isinstance(settings.data, str) else [str(entry["path"]) for entry in settings.data]


def first_pairs(settings: RunSettings, root: Path) -> list[PairText] | None:
    """Return the first pairs of the training set; ``None`` where only a check can tell, as of data on the hub.

    Of several sets that are mixed it is the first.

    Raises:
        DataError: there are no training rows, they cannot be read, a column is missing, or none of them is a pair.
    """
    data = sets_named(settings)[0]
    path = root / data
    if settings.hf_dataset or not path.exists() or (path.is_dir() and (is_saved_dataset(path) or has_card(path))):
        return None
    file = path
    if path.is_dir():
        files = split_files(path).get("train", ())
        if not files:
            raise DataError(f"{data} holds no training rows, such as train.jsonl; put them there.", key="data")
        file = files[0]
    rows = _first_rows(file)
    if rows is None:
        return None
    if not rows:
        raise DataError(f"{file.name} holds no rows; add some.", key="data")
    columns = Columns.from_settings(settings, settings.data[0] if isinstance(settings.data, list) else None)
    columns.check([row.value for row in rows], file.name)
    pairs, reasons = [], []
    for value, source in (pair for row in rows for pair in columns.pair_rows(*row)):
        try:
            pairs.append(_pair_text(value, columns))
        except UnusableRow as error:
            reasons.append(f"{error} ({source})")
    if not pairs:
        raise DataError(f"None of the first rows is a pair: {reasons[0]}; correct them.", key="data")
    return pairs[:PAIRS_SHOWN]


def _first_rows(file: Path) -> list[Row] | None:
    """Return some rows from the beginning of a file; ``None`` where the whole of a large one would have to be read."""
    status = file.stat()
    return _rows_at_first(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)  # asked anew at every change of the form
def _rows_at_first(file: Path, size: int, changed: int) -> list[Row] | None:
    kind, most = kind_of(file.name), 10 * PAIRS_SHOWN
    if kind == ".parquet" and file.suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            batch = next(parquet.ParquetFile(file).iter_batches(batch_size=most), None)
        except (ArrowException, OSError) as error:
            raise DataError(f"{file.name} is not a Parquet file that can be read ({error}); check it.") from error
        return numbered(batch.to_pylist() if batch else [], file.name)
    if kind in (".jsonl", ".ndjson", ".csv", ".tsv"):
        with suppress(OSError):  # reading all of it says why
            lines = _whole_lines(beginning(file, BEGINNING), quoted=kind in (".csv", ".tsv"))
            if lines:
                try:
                    with tempfile.NamedTemporaryFile(suffix=kind) as part:
                        part.write(lines)
                        part.flush()
                        return read_file(Path(part.name), file.name)[:most]
                except DataError:  # perhaps of the cut: a value may take several lines
                    if size > LARGEST_WHOLE:
                        raise
    return read_file(file)[:most] if size <= LARGEST_WHOLE else None


def _whole_lines(text: bytes, quoted: bool) -> bytes:
    """The lines at the beginning of a file; nothing where all of it is there, or no line is.

    Args:
        quoted: none ends within quotation marks.
    """
    if len(text) < BEGINNING:
        return b""
    lines = text[: text.rfind(b"\n") + 1]
    while quoted and lines.count(b'"') % 2:
        lines = lines[: lines.rfind(b"\n", 0, -1) + 1]
    return lines


def _pair_text(row: object, columns: Columns) -> PairText:
    parsed = parse_row(row, columns)
    if isinstance(parsed, PlainText):
        return PairText("", parsed.chosen, parsed.rejected)
    prompt, sides = parsed.chosen[: parsed.shared], (parsed.chosen, parsed.rejected)
    return PairText(_said(prompt), *(_said(side[parsed.shared :]) for side in sides))


def _said(messages: list[Message]) -> str:
    """Return what was said, with the speakers where there are several messages."""
    texts = [message["content"] for message in messages]
    if len(messages) == 1:
        return texts[0]
    return "\n\n".join(f"{message['role']}: {text}" for message, text in zip(messages, texts, strict=True))


def _training_files(folder: Path) -> list[Path]:
    try:
        return split_files(folder).get("train", [])
    except (DataError, OSError):
        return []


def _cached(kind: str) -> list[tuple[str, Path]]:
    """The repositories of a kind in the Hugging Face cache, each with one of its snapshots."""
    found = []
    cache = Path(constants.HF_HUB_CACHE)
    for folder in sorted(cache.glob(f"{kind}--*")) if cache.is_dir() else ():
        snapshot = next((path for path in sorted((folder / "snapshots").glob("*")) if path.is_dir()), None)
        if snapshot is not None:
            found.append((folder.name.removeprefix(f"{kind}--").replace("--", "/"), snapshot))
    return found

"""One data file to raw rows, by what is in it: the name is a hint at most."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mlx_cpo_plugin.errors import DataError, first_line, is_out_of_memory
from mlx_cpo_plugin.wording import named, printable

SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ACCEPTED = "JSON Lines, JSON, Parquet, Arrow or CSV, also compressed (.gz, .bz2, .xz, .zst)"

_FOREIGN = (
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet: unpack it, or export it as CSV"),
    (b"version https://git-lfs", "a pointer of Git LFS and not the file itself: fetch it with `git lfs pull`"),
    (b"<!doctype html", "a web page and not a data file: download the file itself"),
    (b"<html", "a web page and not a data file: download the file itself"),
)
"""How files begin that are taken for data by mistake, and what to do about each."""
_HEADER = re.compile(r'"?[A-Za-z_]\w*"?(?:[,;\t]"?[A-Za-z_]\w*"?)+\s*')
_JSON_BEGINS = '{["-0123456789tfn'
_BLANK = " \t\r\n\ufeff\x1e"
_GAP = re.compile(f"[{_BLANK}]*")


class Row(NamedTuple):
    """A raw row and where it stands, e.g. ``train.jsonl:12``."""

    value: Any
    source: str


def kind_of(name: str) -> str:
    """Return the suffix that says what a file holds, in lower case: ``.jsonl`` of ``train.jsonl.gz``."""
    name = name.lower()
    packing = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    return Path(name.removesuffix(packing)).suffix


def read_file(path: Path, name: str = "") -> list[Row]:
    """Read the rows of a file: JSON Lines, JSON, Parquet, Arrow or CSV, compressed or not, told apart by content.

    A JSON file holds a list of rows, an object with that list under ``data``, or objects one after the other.

    Args:
        name: what to call the file in the sources of its rows; its own name by default.

    Raises:
        DataError: the file is of another kind, or damaged.
    """
    try:
        content = _unpacked(path.read_bytes(), path)
    except OSError as error:
        words = error.strerror or first_line(error)
        raise DataError(f"{named(str(path))} cannot be read ({printable(words)}): check the file.") from error
    name = named(name or path.name)
    start = content[:64].lstrip().lower()
    for mark, what in _FOREIGN:
        if start.startswith(mark.lower()):
            raise DataError(f"{named(str(path))} is {what}.")
    if content.startswith(b"PAR1") or kind_of(path.name) == ".parquet":
        return numbered(_columnar(content, path, "Parquet", _parquet_rows), name)
    if content.startswith((b"ARROW1", b"\xff\xff\xff\xff")) or kind_of(path.name) == ".arrow":
        return numbered(_columnar(content, path, "Arrow", _arrow_rows), name)
    text = _decoded(content, path)
    if not text.strip(_BLANK):
        return []
    if _is_table(text, kind_of(path.name)):
        return _table_rows(text, path, name)
    if "\0" in text or text.lstrip(_BLANK)[0] not in _JSON_BEGINS:
        raise _no_data(path)
    return _json_rows(text, path, name)


def _no_data(path: Path) -> DataError:
    return DataError(f"{named(str(path))} is not a data file that can be read: use {ACCEPTED}.")


def numbered(rows: Iterable[Any], name: str, before: str = ":") -> list[Row]:
    """Return rows that know their number, counted from 1, behind ``name``."""
    return [Row(value, f"{name}{before}{number}") for number, value in enumerate(rows, start=1)]


def _unpacked(content: bytes, path: Path) -> bytes:
    unpackers: dict[bytes, Callable[[bytes], bytes]] = {
        b"\x1f\x8b": gzip.decompress,
        b"BZh": bz2.decompress,
        b"\xfd7zXZ\x00": lzma.decompress,
        b"\x28\xb5\x2f\xfd": _unpack_zstandard,
    }
    unpack = next((unpack for mark, unpack in unpackers.items() if content.startswith(mark)), None)
    if unpack is None:
        return content
    try:
        return unpack(content)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        reason = printable(first_line(error))
        raise DataError(f"{named(str(path))} cannot be decompressed ({reason}): fetch or make it again.") from error


def _unpack_zstandard(content: bytes) -> bytes:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd") as stream:
        unpacked: bytes = stream.read()
    return unpacked


def _columnar(content: bytes, path: Path, kind: str, read: Callable[[Any], list[Any]]) -> list[Any]:
    import pyarrow

    try:
        return read(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two for text and dates
        if is_out_of_memory(error):
            raise
        reason = printable(first_line(error))
        raise DataError(f"{named(str(path))} is not a {kind} file that can be read ({reason}): check it.") from error


def _parquet_rows(source: Any) -> list[Any]:
    from pyarrow import parquet

    rows: list[Any] = parquet.read_table(source).to_pylist()
    return rows


def _arrow_rows(source: Any) -> list[Any]:
    """Rows of a file, or of a stream, which is what the ``datasets`` library writes."""
    from pyarrow import ipc

    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    rows: list[Any] = (ipc.open_file(source) if is_file else ipc.open_stream(source)).read_all().to_pylist()
    return rows


def _decoded(content: bytes, path: Path) -> str:
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if b"\0" in content:
            raise _no_data(path) from error
        line = content.count(b"\n", 0, error.start) + 1
        kind = encoding.removesuffix("-sig").upper()
        raise DataError(f"{named(str(path))}:{line} is not valid {kind}: save the file as UTF-8.") from error


def _json_rows(text: str, path: Path, name: str) -> list[Row]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip(_BLANK)]
    if _is_json_lines([line for _, line in lines[:2]]):
        return [Row(_parse_json(line.strip(_BLANK), path, number), f"{name}:{number}") for number, line in lines]
    documents = list(_documents(text, path))
    if len(documents) > 1 and len({line for _, line in documents}) == len(documents):
        return [Row(value, f"{name}:{line}") for value, line in documents]
    if len(documents) > 1:
        return numbered((value for value, _ in documents), name, " row ")
    value, line = documents[0]
    rows = value.get("data") if isinstance(value, Mapping) else value
    if isinstance(value, Mapping) and not isinstance(rows, list):
        return [Row(value, f"{name}:{line}")]
    if not isinstance(rows, list):
        file = named(str(path))
        raise DataError(f'{file} holds no rows: write a list of rows, or an object with that list under "data".')
    if kind_of(path.name) in (".jsonl", ".ndjson"):  # where a number alone would be taken for a line
        return numbered(rows, name, " row ")
    return numbered(rows, name)


def _is_json_lines(first: list[str]) -> bool:
    """Whether every line is a document of its own, by the first two: one of them may be damaged."""
    return len(first) == 2 and (
        _is_json(first[0]) or (first[0].lstrip(_BLANK).startswith("{") and _is_json(first[1].strip(_BLANK)))
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text.strip(_BLANK))
    except (ValueError, RecursionError):
        return False
    return True


def _documents(text: str, path: Path) -> Iterator[tuple[Any, int]]:
    """Each JSON value of a text, however it is laid out, and the line on which it begins."""
    decoder, place, line = json.JSONDecoder(), 0, 1
    while (start := _GAP.match(text, place).end()) < len(text):  # type: ignore[union-attr]  # matches anything
        line += text.count("\n", place, start)
        with _explained(path, line, whole=True):
            value, place = decoder.raw_decode(text, start)
        yield value, line
        line += text.count("\n", start, place)


def _parse_json(text: str, path: Path, line: int) -> Any:
    """The value of JSON ``text`` that stands on ``line``."""
    with _explained(path, line, whole=False):
        return json.loads(text)


@contextmanager
def _explained(path: Path, line: int, whole: bool) -> Iterator[None]:
    """Tell of JSON that cannot be read with its file, line and column; the parser saw the ``whole`` file or a line."""
    file = named(str(path))
    try:
        yield
    except json.JSONDecodeError as error:
        place, reason = error.lineno if whole else line, f"{error.msg}, column {error.colno}"
        raise DataError(f"{file}:{place} is not valid JSON ({reason}): correct that line.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets without end
        reason = first_line(error)
        raise DataError(f"{file}:{line} holds JSON that cannot be read ({reason}): correct it.") from error


def _is_table(text: str, kind: str) -> bool:
    first = text.lstrip(_BLANK).partition("\n")[0]
    return not first.startswith(("{", "[")) and (kind in (".csv", ".tsv") or _HEADER.fullmatch(first) is not None)


def _table_rows(text: str, path: Path, name: str) -> list[Row]:
    """Rows of comma-, semicolon- or tab-separated text whose first line names the columns; every value is text."""
    text = text.lstrip(_BLANK)
    first = text.partition("\n")[0]
    delimiter = max("\t,;" if kind_of(path.name) == ".tsv" else ",;\t", key=first.count)
    rows: list[Row] = []
    line = 1
    longest = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = [column.strip() for column in next(reader)]
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(header):
                raise DataError(
                    f"{named(str(path))}:{line} has {len(cells)} values for {len(header)} columns: put values that "
                    "hold a separator into quotes."
                )
            if cells:
                values = dict(zip(header, cells, strict=False))
                rows.append(Row({column: value for column, value in values.items() if column}, f"{name}:{line}"))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{named(str(path))}:{line} is not valid CSV ({error}): correct it.") from error
    finally:
        csv.field_size_limit(longest)
    repeated = sorted({column for column in header if column and header.count(column) > 1})
    if repeated:
        raise DataError(f"{named(str(path))} has two columns called {named(repeated[0], 60)}: rename one of them.")
    return rows

"""Read the raw rows of a data file, told apart by content: its name is only a hint."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mlx_cpo_plugin.data.columns import ALIASES
from mlx_cpo_plugin.data.messages import UnusableRow, decode_messages
from mlx_cpo_plugin.data.ranked import COMPLETIONS
from mlx_cpo_plugin.errors import DataError, first_line, is_out_of_memory, named, printable, shown

SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv")
COMPRESSED = (".gz", ".bz2", ".zst")
ACCEPTED = "JSON Lines, JSON, Parquet, Arrow or CSV, also compressed (.gz, .bz2, .zst)"

_HEADER = re.compile(r'"?[A-Za-z_]\w*"?(?:[,;\t]"?[A-Za-z_]\w*"?)+\s*')
# Bytes in which a file that is no text shows it.
_LOOKED_AT = 4096
_JSON_BEGINS = '{["-0123456789tfn'
_ANSWERS = {*ALIASES["chosen"], *ALIASES["rejected"], *COMPLETIONS}
_OTHER_CONTAINERS = {
    b"PK\x03\x04": "a ZIP archive, or a workbook of Excel",
    b"\xfd7zXZ\x00": "packed by xz",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
}
_GAP = re.compile(r"[\s\ufeff]*")
_JSON = re.compile(rb"\s*[\[{]")


class Row(NamedTuple):
    """A raw row and where it comes from, e.g. ``train.jsonl:12``."""

    value: object
    source: str


def kind_of(name: str) -> str:
    """Return the suffix of a file name in lower case, without that of compression: ``.jsonl`` of ``train.jsonl.gz``."""
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
    file, kind, name = named(str(path)), kind_of(path.name), named(name or path.name)
    try:
        content = _unpacked(path.read_bytes())
    except OSError as error:
        reason = printable(getattr(error, "strerror", None) or first_line(error))
        raise DataError(f"{file} cannot be read ({reason}): check the file.", place=file) from error
    if content.startswith(b"version https://git-lfs"):
        raise DataError(
            f"{file} is a pointer of Git LFS and not the file itself: fetch it with `git lfs pull`.", place=file
        )
    is_text = _JSON.match(content) is not None or (bool(content) and b"\0" not in content[:_LOOKED_AT])
    if content.startswith(b"PAR1") or (kind == ".parquet" and not is_text):
        return numbered(_columnar_rows(content, file, "Parquet"), name)
    if content.startswith((b"ARROW1", b"\xff\xff\xff\xff")) or (kind == ".arrow" and not is_text):
        return numbered(_columnar_rows(content, file, "Arrow"), name)
    if packed := next((what for mark, what in _OTHER_CONTAINERS.items() if content.startswith(mark)), None):
        raise DataError(f"{file} is {packed}, which is not read: unpack or save it as {ACCEPTED}.", place=file)
    text = _decoded(content, file)
    start = _GAP.match(text).end()  # type: ignore[union-attr]  # matches anything
    if start == len(text):
        return []
    first = text[start:].partition("\n")[0]
    if not first.startswith(("{", "[")) and (kind in (".csv", ".tsv") or _is_header(first)):
        return _table_rows(text[start:], file, kind, name)
    if "\0" in text or first[0] not in _JSON_BEGINS:
        raise DataError(f"{file} is not a data file that can be read: use {ACCEPTED}.", place=file)
    return _json_rows(text, file, kind, name)


def _is_header(line: str) -> bool:
    """Whether a line names columns: words with nothing between but separators, or an answer's among others."""
    names = {name.strip(' "').lower() for name in re.split("[,;\t]", line.strip())}
    return _HEADER.fullmatch(line) is not None or (len(names) > 1 and not names.isdisjoint(_ANSWERS))


def numbered(rows: Iterable[object], name: str, before: str = ":") -> list[Row]:
    """Return rows whose source is ``name`` and their number, counted from 1."""
    return [Row(value, f"{name}{before}{number}") for number, value in enumerate(rows, start=1)]


def beginning(path: Path, size: int) -> bytes:
    """Return the first ``size`` bytes of a file, unpacked; raises OSError where it cannot be read."""
    with path.open("rb") as stream:
        codec = _codec(stream.read(4))
        stream.seek(0)
        if codec is None:
            return stream.read(size)
        import pyarrow

        with pyarrow.CompressedInputStream(stream, codec) as unpacked:
            return bytes(unpacked.read(size))


def _unpacked(content: bytes) -> bytes:
    if (codec := _codec(content)) is None:
        return content
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), codec) as stream:
        return bytes(stream.read())


def _codec(content: bytes) -> str | None:
    marks = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
    return next((codec for mark, codec in marks.items() if content.startswith(mark)), None)


def _columnar_rows(content: bytes, file: str, kind: str) -> list[object]:
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if kind == "Parquet":
            table = parquet.read_table(pyarrow.BufferReader(content))
        else:  # the `datasets` library writes streams
            read = ipc.open_file if content.startswith(b"ARROW1") else ipc.open_stream
            table = read(content).read_all()
        rows: list[object] = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two for text and dates
        if is_out_of_memory(error):
            raise
        reason = printable(first_line(error))
        raise DataError(f"{file} is not a {kind} file that can be read ({reason}): check it.", place=file) from error
    return rows


def _decoded(content: bytes, file: str) -> str:
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}:{line} is not valid {error.encoding.upper()}: save the file as UTF-8.", place=f"{file}:{line}"
        ) from error


def _json_rows(text: str, file: str, kind: str, name: str) -> list[Row]:
    documents = list(_documents(text, file))
    if len(documents) > 1:
        if len({line for _, line in documents}) == len(documents):
            return [Row(value, f"{name}:{line}") for value, line in documents]
        return numbered((value for value, _ in documents), name, " row ")
    value, line = documents[0]
    rows = value.get("data") if isinstance(value, Mapping) else value
    if isinstance(rows, list):  # in a file of lines, a number alone would be taken for one
        return numbered(rows, name, " row " if kind in (".jsonl", ".ndjson") else ":")
    if isinstance(value, Mapping):
        _refuse_other_layouts(value, file)
        return [Row(value, f"{name}:{line}")]
    raise DataError(
        f'{file} holds no rows: write a list of rows, or an object with that list under "data".', place=file
    )


def _refuse_other_layouts(value: Mapping[str, object], file: str) -> None:
    """Raise DataError for an object that is no row, but holds rows by column, by split or by a name of their own."""
    answers = next((value[name] for name in ALIASES["chosen"] if name in value), None)
    if _is_column(answers) or any(map(_holds_rows, value.values())):
        names = ", ".join(shown(name)[1:-1] for name in list(value)[:8])
        raise DataError(
            f"{file} holds no rows but lists or objects under {names}: write a list of rows, as pandas does with "
            'orient="records", and each split to a file of its own.',
            place=file,
        )


def _is_column(part: object) -> bool:
    """Whether these are the answers of several rows: texts, or lists of messages."""
    cells = list(part.values()) if isinstance(part, Mapping) and "0" in part else part
    if not isinstance(cells, list) or not cells:
        return False
    with suppress(UnusableRow):
        cells = [decode_messages(cell) for cell in cells]
    return all(isinstance(cell, str | list) for cell in cells)


def _holds_rows(part: object) -> bool:
    """Whether this is an object with an answer, or a list of such."""
    first = part[0] if isinstance(part, list) and part else part
    return isinstance(first, Mapping) and not first.keys().isdisjoint(_ANSWERS)


def _documents(text: str, file: str) -> Iterator[tuple[object, int]]:
    """Each JSON value of a text, however it is laid out, and the line on which it begins."""
    decoder, place, line = json.JSONDecoder(), 0, 1
    while (start := _GAP.match(text, place).end()) < len(text):  # type: ignore[union-attr]  # matches anything
        line += text.count("\n", place, start)
        try:
            value, place = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits
            raise DataError(
                f"{file}:{line} is not valid JSON ({first_line(error)}): correct it.", place=f"{file}:{line}"
            ) from error
        yield value, line
        line += text.count("\n", start, place)


def _table_rows(text: str, file: str, kind: str, name: str) -> list[Row]:
    """Rows of comma-, semicolon- or tab-separated text whose first line names the columns; every value is text."""
    first = text.partition("\n")[0]
    delimiter = max("\t,;" if kind == ".tsv" else ",;\t", key=first.count)
    spaced = f"{delimiter} " in first  # as some write it, also before quotes
    rows, line = [], 1
    longest = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=spaced, strict=True)
        header = [column.strip() for column in next(reader)]
        if twice := next((column for column in header if column and header.count(column) > 1), None):
            raise DataError(f"{file} has two columns {named(twice)}: rename one of them.", place=file)
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(header):
                raise DataError(
                    f"{file}:{line} has {len(cells)} values for {len(header)} columns: put values that hold a "
                    "separator into quotes.",
                    place=f"{file}:{line}",
                )
            if cells:
                values = zip(header, cells, strict=False)
                rows.append(Row({column: value for column, value in values if column}, f"{name}:{line}"))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}:{line} is not valid CSV ({error}): correct it.", place=f"{file}:{line}") from error
    finally:
        csv.field_size_limit(longest)
    return rows

"""A data file is read by what is in it, whatever it is called, and its rows know where they stand."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet
from support.refusals import refused

from mlx_cpo_plugin.data.files import read_file
from mlx_cpo_plugin.errors import DataError

ROWS = [{"prompt": f"What is {i},\n\u2028 {i}?", "chosen": f'It is "{i}".', "rejected": "No."} for i in range(12)]
SUFFIXES = ["jsonl", "json", "parquet", "csv", "ndjson", "txt"]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[Any], delimiter: str = ",") -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def parquet_of(rows: list[Any]) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


def arrow_of(rows: list[Any], new: Callable[..., Any]) -> bytes:
    stream, data = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with new(stream, data.schema) as writer:
        writer.write_table(data)
    return stream.getvalue()


def zstandard(content: bytes) -> bytes:
    packed: bytes = pyarrow.compress(content, codec="zstd", asbytes=True)
    return packed


FORMS: dict[str, Callable[[list[Any]], bytes]] = {
    "lines": lines,
    "lines with a byte order mark": lambda rows: b"\xef\xbb\xbf" + lines(rows),
    "lines of Windows": lambda rows: lines(rows).replace(b"\n", b"\r\n"),
    "lines in UTF-16": lambda rows: lines(rows).decode().encode("utf-16"),
    "lines in UTF-16 without a mark": lambda rows: lines(rows).decode().encode("utf-16-be"),
    "objects over several lines": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
    "objects without a gap": lambda rows: lines(rows).replace(b"\n", b""),
    "a list": lambda rows: json.dumps(rows).encode(),
    "a list over several lines": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    "a list with a row on each line": lambda rows: b"[\n" + lines(rows).strip().replace(b"\n", b",\n") + b"\n]\n",
    "a list under data": lambda rows: json.dumps({"version": 1, "data": rows}).encode(),
    "parquet": parquet_of,
    "an arrow stream": lambda rows: arrow_of(rows, ipc.new_stream),
    "an arrow file": lambda rows: arrow_of(rows, ipc.new_file),
    "commas": table,
    "semicolons": lambda rows: table(rows, ";"),
    "tabs": lambda rows: table(rows, "\t"),
    "gzip": lambda rows: gzip.compress(lines(rows)),
    "gzip of a list": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "bzip2": lambda rows: bz2.compress(lines(rows)),
    "zstandard": lambda rows: zstandard(lines(rows)),
}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "ndjson", "txt", "jsonl.gz"])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_read_by_what_is_in_it(form: str, suffix: str, tmp_path: Path) -> None:
    rows = read_file(write(tmp_path / f"rows.{suffix}", FORMS[form](ROWS)))

    assert [row.value for row in rows] == ROWS
    assert len({row.source for row in rows}) == len(ROWS)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("form", ["lines", "a list over several lines"])
def test_json_is_read_under_the_name_of_another_format(form: str, suffix: str, tmp_path: Path) -> None:
    assert [row.value for row in read_file(write(tmp_path / f"rows.{suffix}", FORMS[form](ROWS)))] == ROWS


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "jsonl", "txt"])
@pytest.mark.parametrize("header", ["prompt,chosen,rejected,chosen-rating", '"prompt", "chosen","rejected","my score"'])
def test_a_table_is_read_under_any_name_and_with_any_names_of_columns(suffix: str, header: str, tmp_path: Path) -> None:
    (tmp_path / f"rows.{suffix}").write_text(f"{header}\nWho?,Me.,You.,3\n")

    (row,) = read_file(tmp_path / f"rows.{suffix}")

    assert list(row.value.values())[:3] == ["Who?", "Me.", "You."]
    assert {name.strip() for name in row.value} >= {"prompt", "chosen", "rejected"}


@pytest.mark.parametrize("form", ["lines", "a list", "a list over several lines", "objects over several lines", "gzip"])
def test_a_single_row_is_read_as_several_are(form: str, tmp_path: Path) -> None:
    assert [row.value for row in read_file(write(tmp_path / "rows.json", FORMS[form](ROWS[:1])))] == ROWS[:1]


@pytest.mark.parametrize(
    "row",
    [
        {side: [{"role": "user", "content": "Who?"}] for side in ("chosen", "rejected")},
        {side: {"from": "gpt", "value": side} for side in ("chosen", "rejected")},
        {"input": {"messages": [{"role": "user", "content": "Who?"}]}, "preferred_output": [{"content": "Me."}]},
        {"prompt": "Who?", "completions": ["Me.", "You."], "scores": [2, 1]},
        {"completions": ["The sky is blue.", "The sky is green."], "scores": [2, 1]},
        {
            "completions": [[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]],
            "scores": [1],
        },
        {"completions": [{"response": "Me.", "overall_score": 9}]},
        {side: [json.dumps({"role": "assistant", "content": side})] for side in ("chosen", "rejected")},
        {},
    ],
)
def test_a_single_row_of_lists_and_objects_is_one(row: dict[str, object], tmp_path: Path) -> None:
    assert [read.value for read in read_file(write(tmp_path / "row.json", json.dumps(row).encode()))] == [row]


@pytest.mark.parametrize(
    ("name", "form", "sources"),
    [
        ("rows.jsonl", "lines", ["rows.jsonl:1", "rows.jsonl:2"]),
        ("rows.json", "lines", ["rows.json:1", "rows.json:2"]),
        ("rows.json", "a list over several lines", ["rows.json:1", "rows.json:2"]),
        ("rows.jsonl", "a list over several lines", ["rows.jsonl row 1", "rows.jsonl row 2"]),
        ("rows.jsonl", "objects over several lines", ["rows.jsonl:1", "rows.jsonl:6"]),
        ("rows.parquet", "parquet", ["rows.parquet:1", "rows.parquet:2"]),
        ("rows.csv", "commas", ["rows.csv:2", "rows.csv:4"]),  # the prompts hold a line break
    ],
)
def test_rows_know_their_line_or_their_number(name: str, form: str, sources: list[str], tmp_path: Path) -> None:
    rows = read_file(write(tmp_path / name, FORMS[form](ROWS)))

    assert [row.source for row in rows[:2]] == sources


def test_blank_lines_are_skipped_and_still_counted(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": "\xe2\x80\xa8"}'

    assert [(row.value, row.source) for row in read_file(write(tmp_path / "train.jsonl", content))] == [
        ({"a": 1}, "train.jsonl:1"),
        ({"a": "\u2028"}, "train.jsonl:4"),
    ]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf", b"[]", b"prompt,chosen,rejected\n"])
def test_a_file_without_rows_has_none(content: bytes, tmp_path: Path) -> None:
    assert read_file(write(tmp_path / "rows.jsonl", content)) == []


def test_a_long_cell_and_an_index_column_are_no_obstacle(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = "a" * (limit + 1)

    rows = read_file(write(tmp_path / "rows.csv", f",prompt,chosen\n0,{long},b\n".encode()))

    assert rows[0].value == {"prompt": long, "chosen": "b"}
    assert csv.field_size_limit() == limit


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ANY_ROW = st.dictionaries(st.text(max_size=8).filter(lambda key: key != "data"), VALUES, min_size=1, max_size=4)


@settings(max_examples=20)
@given(st.lists(ANY_ROW, min_size=1, max_size=4))
def test_any_rows_are_the_same_as_lines_and_as_a_list(tmp_path_factory: Any, rows: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    forms = [
        lines(rows),
        json.dumps(rows, indent=1).encode(),
        "\n\n".join(json.dumps(row, indent=1, ensure_ascii=True) for row in rows).encode(),
    ]

    for number, content in enumerate(forms):
        assert [row.value for row in read_file(write(folder / f"{number}.json", content))] == rows


@pytest.mark.parametrize(
    ("name", "content", "line", "fault"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": }\n', ":2", "not valid JSON"),
        ("a.jsonl", b'{"a": 1\n{"a": 2}\n{"a": 3}', ":1", "not valid JSON"),
        ("a.jsonl", b'[\n{"a" 1}]', ":1", "not valid JSON"),
        ("a.jsonl", b'{"a":\n1}\n{"a": }', ":3", "not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', ":2", "not valid UTF-8"),
        ("a.json", b'[{"a":\n"\xff"}]', ":2", "not valid UTF-8"),
        ("a.json", b"3", "", "no rows"),
        ("a.json", b'{"prompt": ["Who?"], "chosen": ["Me."]}', "", "under prompt, chosen"),
        ("a.json", b'{"prompt": {"0": "Who?"}, "chosen": {"0": "Me."}}', "", "under prompt, chosen"),
        ("a.json", b'{"chosen": [[{"role": "user", "content": "Who?"}]], "id": "x"}', "", "under chosen, id"),
        ("a.json", b'{"train": [{"messages": [], "chosen": "Me."}], "test": []}', "", "under train, test"),
        ("a.json", b'{"7f": {"prompt": "Who?", "chosen": "Me."}}', "", "under 7f"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000, ":2", "not valid JSON .*recursion"),
        ("a.json", b"9" * 5000, ":1", "not valid JSON .*limit"),
        ("a.jsonl", b"Once upon a time", "", "not a data file"),
        ("a.jsonl", b"\x89\x50\x00\x01\x02", ":1", "not valid UTF-8"),
        ("a.csv", b'a,b\n"1,2\n', ":2", "not valid CSV"),
        ("a.csv", b"a,b,a\n1,2,3\n", "", "has two columns a"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", ":3", "3 values for 2 columns"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "", "git lfs pull"),
        ("a.json", b"\n<!DOCTYPE html><html>", "", "not a data file"),
        ("a.xlsx", b"PK\x03\x04\x14\x00\xff", "", "a workbook of Excel, which is not read"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00\xff", "", "packed by xz, which is not read: unpack or save it as JSON Lines"),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(
    name: str, content: bytes, line: str, fault: str, tmp_path: Path
) -> None:
    with refused(DataError, fault, place=f"{tmp_path / name}{line}"):
        read_file(write(tmp_path / name, content))


@pytest.mark.parametrize("form", ["parquet", "an arrow stream", "an arrow file", "gzip", "bzip2", "zstandard"])
@pytest.mark.parametrize("part", [0.3, 0.6])
def test_a_file_that_was_cut_is_one_sentence(form: str, part: float, tmp_path: Path) -> None:
    whole = FORMS[form](ROWS)
    path = write(tmp_path / "a.jsonl", whole[: int(part * len(whole))])

    with refused(DataError, place=str(path)):
        read_file(path)

"""The pairs of many rows are kept, and taken for nothing but the same rows, tokenizer and settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support.data_tokenizers import CHATML, make_tokenizer, tokenizer_named
from support.refusals import refused

from mlx_cpo_plugin.data import PreferenceDataset, conversion, pair_cache, pairs_of_rows
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.settings.config import RunSettings

ROWS = [{"prompt": f"What is {i}?", "chosen": f"Yes, {i}." * (i % 3), "rejected": "No."} for i in range(12)]


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the cache, in which even a few rows are kept."""
    monkeypatch.setattr(pair_cache, "LEAST_ROWS", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mlx-cpo-plugin"


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources of the rows that are tokenised."""
    sources: list[str] = []
    outcome = conversion.RowConverter._outcome

    def noted(self: Any, value: object, columns: Any, source: str) -> Any:
        sources.append(source)
        return outcome(self, value, columns, source)

    monkeypatch.setattr(conversion.RowConverter, "_outcome", noted)
    return sources


def converted(rows: list[Any] = ROWS, tokenizer: Any = None, **settings: Any) -> PreferenceDataset:
    return pairs_of_rows(
        rows, tokenizer or tokenizer_named("chatml"), RunSettings.of({"max_seq_length": 64} | settings)
    )


def contents(dataset: PreferenceDataset) -> list[Any]:
    parts = ("prompt", "chosen", "rejected", "chosen_scored", "rejected_scored")
    pairs = [(pair.source, *(getattr(pair, part).tolist() for part in parts)) for pair in dataset]
    return [pairs, list(dataset.report.lines()), dataset.report.skipped]


def test_rows_are_tokenised_once(tokenised: list[str]) -> None:
    first = contents(converted())
    assert len(tokenised) == len(ROWS)
    assert contents(converted()) == first
    assert len(tokenised) == len(ROWS)


CHANGES: dict[str, Callable[[], PreferenceDataset]] = {
    "a row": lambda: converted([*ROWS[:-1], ROWS[-1] | {"chosen": "Yes!"}]),
    "the order": lambda: converted(ROWS[::-1]),
    "a column": lambda: converted(
        [{"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in ROWS],
        prompt_feature="question",
    ),
    "the limit": lambda: converted(max_seq_length=63),
    "what becomes of long rows": lambda: converted(overlong="drop"),
    "the chat template": lambda: converted(chat_template=CHATML + " "),
    "arguments of the template": lambda: converted(chat_template_kwargs={"date": "today"}),
    "the tokenizer": lambda: converted(tokenizer=make_tokenizer(CHATML, eos="</s>")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_pairs_depend_on_is_told_apart(change: str, tokenised: list[str]) -> None:
    converted()
    CHANGES[change]()
    assert len(tokenised) == 2 * len(ROWS)


@pytest.mark.parametrize(("template", "same"), [(CHATML, True), ("{{ strftime_now('%d') }}" + CHATML, False)])
def test_the_day_counts_where_a_template_asks_for_it(template: str, same: bool) -> None:
    days = [datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2)]
    first, second = (ChatTokenizer(make_tokenizer(template), now=day).identity() for day in days)
    assert first is not None
    assert (first == second) is same


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    ],
)
def test_a_damaged_file_is_made_again(damage: Callable[[bytes], bytes], folder: Path, tokenised: list[str]) -> None:
    first = contents(converted())
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert contents(converted()) == first
    assert len(tokenised) == 2 * len(ROWS)
    assert contents(converted()) == first
    assert len(tokenised) == 2 * len(ROWS)


def test_few_rows_and_rows_of_objects_are_not_kept(folder: Path) -> None:
    converted(ROWS[:4])
    converted([row | {"extra": object()} for row in ROWS])
    assert not folder.exists()


def test_a_row_that_is_refused_leaves_nothing(folder: Path) -> None:
    with refused(DataError):
        converted(max_seq_length=4, overlong="error")
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_none(folder: Path, tokenised: list[str]) -> None:
    folder.write_text("a file in its place")
    assert contents(converted()) == contents(converted())
    assert len(tokenised) == 2 * len(ROWS)


def test_what_killed_processes_have_left_is_removed_after_a_day(folder: Path, tokenised: list[str]) -> None:
    converted(ROWS)
    today, older = (folder / f".{number}-partial-pairs-{number}.pickle" for number in (1, 2))
    for file in (today, older):
        file.touch()
    os.utime(older, (0, 0))

    converted(ROWS[:10])

    assert today.exists()
    assert not older.exists()


def test_what_was_not_used_for_longest_makes_room(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tokenised: list[str]
) -> None:
    for count in (10, 11):
        converted(ROWS[:count])
    for file in folder.iterdir():
        os.utime(file, (0, 0))
    converted(ROWS[:10])  # used again
    monkeypatch.setattr(pair_cache, "MOST_BYTES", 2 * max(file.stat().st_size for file in folder.iterdir()))
    converted(ROWS)
    tokenised.clear()
    converted(ROWS)
    converted(ROWS[:10])
    assert tokenised == []
    converted(ROWS[:11])
    assert len(tokenised) == 11

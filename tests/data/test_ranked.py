"""Rows with several answers become pairs of a better and a worse one; pairs worth about the same are left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.data_tokenizers import tokenizer_named
from support.refusals import refused
from support.tiny import build_pairs

from mlx_cpo_plugin.data import PreferenceDataset, load_dataset
from mlx_cpo_plugin.data.columns import Columns
from mlx_cpo_plugin.data.ranked import row_numbers, row_of
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.settings.config import RunSettings

NAMES = "ABCDEFG"


def load(data: Path, **settings: Any) -> PreferenceDataset:
    given = {"data": str(data), "train": True, "max_seq_length": 512, **settings}
    return load_dataset(RunSettings.of(given), tokenizer_named("chatml"))[0]


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def made_of(row: object, **settings: Any) -> list[tuple[Any, Any]]:
    """The chosen and the rejected answer of each row of two that a row stands for; itself where there is none."""
    columns = Columns.from_settings(RunSettings.of(settings))
    made: list[Any] = [value for value, _ in columns.pair_rows(row, "rows:1")]
    return [] if made == [row] else [(value["chosen"], value["rejected"]) for value in made]


def answers(pairs: PreferenceDataset) -> list[tuple[str, str]]:
    decode = tokenizer_named("chatml").decode
    return [tuple(decode(side.tolist()).split("<")[0] for side in (pair.chosen, pair.rejected)) for pair in pairs]


@given(scores=st.lists(st.integers(0, 5), min_size=2, max_size=7), gap=st.none() | st.integers(0, 4))
def test_all_pairs_are_those_of_a_better_and_a_worse_answer_that_differ_by_the_gap(
    scores: list[int], gap: int | None
) -> None:
    row = {"prompt": "Who?", "completions": list(NAMES[: len(scores)]), "scores": scores}

    pairs = made_of(row, completion_pairs="all", min_gap=gap)

    worth = dict(zip(NAMES, scores, strict=False))
    wanted = {(a, b) for a in worth for b in worth if worth[a] > worth[b] and worth[a] - worth[b] >= (gap or 0)}
    assert set(pairs) == wanted
    assert len(pairs) == len(wanted)


@given(scores=st.lists(st.floats(-5, 5), min_size=2, max_size=7), gap=st.none() | st.floats(0, 5))
def test_the_best_is_paired_with_the_worst(scores: list[float], gap: float | None) -> None:
    row = {"prompt": "Who?", "completions": list(NAMES[: len(scores)]), "scores": scores}

    pairs = made_of(row, min_gap=gap)

    worth = dict(zip(NAMES, scores, strict=False))
    if max(scores) == min(scores) or max(scores) - min(scores) < (gap or 0):
        assert pairs == []
    else:
        ((chosen, rejected),) = pairs
        assert (worth[chosen], worth[rejected]) == (max(scores), min(scores))


@pytest.mark.parametrize(
    "columns",
    [
        {"completions": ["B", "A", "C"], "scores": [2, 3.5, 1]},
        {"completions": ["B", "A", "C"], "ranks": [2, 1, 3]},
        {"generations": ["B", "A", "C"], "ratings": ["2", "3", "1"]},
        {"completions": '["B", "A", "C"]', "scores": "[2, 3, 1]"},
        {"completions": ["B", "A", "C"], "scores": [2, 3, 1], "ranks": [1, 2, 3]},
        {"completions": [{"response": text, "overall_score": score} for text, score in (("B", 2), ("A", 3), ("C", 1))]},
        {"answers": [{"answer": text, "rank": rank} for text, rank in (("B", 2.0), ("A", 1.0), ("C", 3.0))]},
        {"completions": [[{"role": "assistant", "content": text}] for text in "BAC"], "scores": [2, 3, 1]},
        {"completions": [{"role": "assistant", "content": text} for text in "BAC"], "ranks": [2, 1, 3]},
        {"completions": ["B", "A", "C"], "scores": [2, 3, 1], "chosen": None, "rejected": None},
    ],
)
def test_scores_or_ranks_stand_in_the_row_or_in_its_answers(tmp_path: Path, columns: dict[str, Any]) -> None:
    pairs = load(write(tmp_path / "rows.jsonl", [{"prompt": "Who?", **columns}]))

    assert answers(pairs) == [("A", "C")]
    assert pairs[0].source == "rows.jsonl:1 (answers 2 and 3)"


def test_a_row_with_a_chosen_and_a_rejected_answer_is_that_pair(tmp_path: Path) -> None:
    row = {"prompt": "Who?", "chosen": "A", "rejected": "B", "responses": ["C", "D"], "scores": [1, 2]}

    assert answers(load(write(tmp_path / "rows.jsonl", [row]))) == [("A", "B")]


def test_rows_that_say_too_little_are_skipped_with_their_reason(tmp_path: Path) -> None:
    good = {"prompt": "Who?", "completions": ["A", "B", "C"], "scores": [3, 2, 1]}
    faults: list[dict[str, Any]] = [
        {"scores": [1, 1, 1]},
        {"scores": [1, 2]},
        {"scores": [1, 2, "many"]},
        {"scores": [1, 2, float("inf")]},
        {"scores": None},
        {"completions": ["A"]},
        {"completions": "A or B"},
        {"completions": [{"said": "A"}, {"said": "B"}, {"said": "C"}]},
    ]

    pairs = load(write(tmp_path / "rows.jsonl", [good] * len(faults) + [{**good, **fault} for fault in faults]))

    reasons = {place: reason for reason, places in pairs.report.skipped.items() for place in places}
    assert set(reasons) == {f"rows.jsonl:{len(faults) + 1 + number}" for number in range(len(faults))}
    assert len(set(reasons.values())) == len(faults) - 1  # infinity is no number either
    assert pairs.report.rows == 2 * len(faults)


def test_answers_without_any_scores_or_ranks_are_refused(tmp_path: Path) -> None:
    rows = [{"question": "Who?", "answers": ["A", "B"]}]

    with refused(DataError, match="scores or ranks", key="chosen_feature", place="rows.jsonl"):
        load(write(tmp_path / "rows.jsonl", rows))


def test_rows_are_counted_as_rows_and_stay_together_where_some_are_held_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"Who {i}?", "completions": ["A", "B", "C"], "scores": [3, 2, 1]} for i in range(10)]
    settings = RunSettings.of(
        {"data": str(write(tmp_path / "rows.jsonl", rows)), "train": True, "valid_fraction": 0.3}
        | {"completion_pairs": "all", "max_seq_length": 512, "seed": 3}
    )

    train, valid, _ = load_dataset(settings, tokenizer_named("chatml"))

    sides = [{row_of(pair.source) for pair in pairs} for pairs in (train, valid)]
    assert [len(side) for side in sides] == [7, 3]
    assert not sides[0] & sides[1]
    assert (len(train), len(valid)) == (21, 9)
    assert (train.report.rows, valid.report.rows) == (7, 3)


def test_only_what_names_two_answers_is_taken_off_the_name_of_a_row() -> None:
    sources = [
        "held (answers v2).jsonl:1",
        "held (answers v2).jsonl:2",
        "a:1 (answers 1 and 3)",
        "a:1 (answers 2 and 3)",
    ]

    pairs = [replace(pair, source=source) for pair, source in zip(build_pairs(4), sources, strict=True)]

    assert row_numbers(pairs).tolist() == [0, 1, 2, 2]


def test_pairs_whose_scores_are_near_are_left_out_by_choice_and_rows_without_scores_are_not(tmp_path: Path) -> None:
    scores = [(5, 1), (5, 4), (4, 4), (2, 3), (5, 2)]
    rows = [{"prompt": f"Who {i}?", "chosen": "A", "rejected": "B"} for i in range(len(scores) + 1)]
    for row, (chosen, rejected) in zip(rows, scores, strict=False):
        row |= {"score_chosen": chosen, "score_rejected": rejected}
    file = write(tmp_path / "rows.jsonl", rows)

    pairs = load(file, min_gap=3)

    assert [pair.source for pair in pairs] == ["rows.jsonl:1", "rows.jsonl:5", "rows.jsonl:6"]
    assert list(pairs.report.skipped.values()) == [[f"rows.jsonl:{line}" for line in (2, 3, 4)]]
    assert {"chosen score", "rejected score"} <= set(pairs.report.columns.read)
    assert len(load(file)) == 6
    with refused(DataError, key="min_gap"):
        load(write(tmp_path / "near.jsonl", rows[1:3]), min_gap=3)


def test_a_gap_that_no_row_can_have_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "Who?", "chosen": "A", "rejected": "B"}]

    with refused(DataError, key="min_gap", place="rows.jsonl"):
        load(write(tmp_path / "rows.jsonl", rows), min_gap=1)


def test_rows_left_out_by_choice_are_no_reason_why_the_others_cannot_be_used(tmp_path: Path) -> None:
    near = [{"prompt": f"Who {i}?", "completions": ["A", "B"], "scores": [2, 1]} for i in range(5)]
    wrong = [{"prompt": f"Why {i}?", "completions": ["A", "B"], "scores": [2]} for i in range(2)]
    good = {"prompt": "Who?", "completions": ["A", "B"], "scores": [9, 1]}

    with pytest.raises(DataError, match=r"2 of 8 rows .* mostly because there are 1 scores or ranks"):
        load(write(tmp_path / "rows.jsonl", [*near, *wrong, good]), min_gap=3)

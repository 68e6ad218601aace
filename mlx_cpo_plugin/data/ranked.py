"""Rows with several answers and their scores or ranks become rows of two; gaps of scores may be too small."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.data.messages import UnusableRow, as_json, is_null, parse_json
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.types import Values

BEST_WORST, ALL = "best_worst", "all"
# Column names under which answers and what they are worth are published, the commonest first.
COMPLETIONS = ("completions", "generations", "responses", "answers", "candidates")
SCORES, RANKS = ("scores", "ratings"), ("ranks", "rankings")
CHOSEN_SCORES = ("score_chosen", "chosen_score", "chosen_rating", "chosen-rating")
REJECTED_SCORES = ("score_rejected", "rejected_score", "rejected_rating", "rejected-rating")
# The same inside an answer that is an object.
_TEXT = ("response", "answer", "text", "completion", "generation", "content")
_SCORE, _RANK = ("score", "overall_score", "rating"), ("rank",)
_OF_MESSAGES = ("role", "from", "messages")
# Behind the source of a row: which of its answers a pair is made of.
_OF_ANSWERS = " (answers {} and {})"
_ENDS_SO = re.compile(re.escape(_OF_ANSWERS).replace(r"\{\}", r"\d+") + "$")

SMALL_GAP = "the gap between the scores is below min_gap"


class SmallGap(UnusableRow):
    """A row that the settings leave out, since its answers are worth about the same."""

    by_choice = True


@dataclass(frozen=True)
class Selection:
    """Which pairs are made of a row.

    Attributes:
        pairs: of several answers the best against the worst (``best_worst``), or each against all worse ones (``all``).
        min_gap: by how much the score, or the rank, of the chosen answer must be better, if it is known.
    """

    pairs: str = BEST_WORST
    min_gap: float | None = None


BEST_AGAINST_WORST = Selection()


class Answer(NamedTuple):
    """One of several answers, and what it is worth; more is better."""

    value: object
    worth: float


def row_of(source: str) -> str:
    """Return the source of the row that a pair is from: ``train.jsonl:12`` of ``train.jsonl:12 (answers 1 and 3)``."""
    return _ENDS_SO.sub("", source)


def row_key(source: str, place: int) -> str | int:
    """What the pairs of one row have in common; ``place`` for a pair that is alone, whose source may be another's."""
    row = row_of(source)
    return place if row == source else row


def row_numbers(pairs: Sequence[PreferencePair]) -> NDArray[np.int64]:
    """Return which row each of N pairs is from, of the rows numbered in the order of the pairs: int64 [N]."""
    numbers: dict[str | int, int] = {}
    keys = [row_key(pair.source, place) for place, pair in enumerate(pairs)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def has_completions(names: Iterable[object]) -> bool:
    """Whether one of the columns holds several answers."""
    return not set(COMPLETIONS).isdisjoint(names)


def holds_several(row: Mapping[str, object]) -> bool:
    """Whether one of the columns holds a list of several answers, or one as text, and not an object."""
    return any(isinstance(row.get(name), list | str) for name in COMPLETIONS)


def is_ranked(row: Mapping[str, object]) -> bool:
    """Whether a row says what each of its several answers is worth."""
    try:
        return has_completions(row) and bool(_answers(row))
    except (UnusableRow, RecursionError):
        return False


def has_scores(names: Iterable[object]) -> bool:
    """Whether columns of these names say what answers are worth; answers in a list may say so themselves."""
    names = set(names)
    in_pair = not names.isdisjoint(CHOSEN_SCORES) and not names.isdisjoint(REJECTED_SCORES)
    return in_pair or has_completions(names)


def columns_of_scores(row: Mapping[str, object], selection: Selection, several: bool) -> dict[str, str]:
    """Return part -> column of all that is read of a row with several answers, or with the scores of two."""
    parts: dict[str, tuple[str, ...]] = {}
    if several:
        parts = {"completions": COMPLETIONS, "scores": SCORES if _column(row, SCORES) else RANKS}
    elif selection.min_gap is not None:
        parts = {"chosen score": CHOSEN_SCORES, "rejected score": REJECTED_SCORES}
    return {part: column for part, names in parts.items() if (column := _column(row, names))}


def two_answer_rows(
    row: Mapping[str, object], selection: Selection, names: tuple[str, str], source: str = ""
) -> list[tuple[Values, str]]:
    """Return the rows of two answers, and their sources, that a row with several answers stands for.

    Answers worth the same make no pair.

    Args:
        names: the columns of the chosen and the rejected answer.

    Raises:
        UnusableRow: it says too little about its answers, or none is better than another.
    """
    answers = _answers(row)
    numbered = sorted(enumerate(answers, 1), key=lambda item: -item[1].worth)
    best, worst = numbered[0], numbered[-1]
    if best[1].worth == worst[1].worth:
        raise UnusableRow("no completion is better than another")
    found = [(best, worst)]
    if selection.pairs == ALL:
        found = [(better, worse) for i, better in enumerate(numbered) for worse in numbered[i + 1 :]]
    least = selection.min_gap or 0.0
    gaps = [(better, worse, better[1].worth - worse[1].worth) for better, worse in found]
    rest = {key: value for key, value in row.items() if key not in (*COMPLETIONS, *SCORES, *RANKS)}
    made = [
        (
            {**rest, names[0]: better.value, names[1]: worse.value},
            source + _OF_ANSWERS.format(number, other),
        )
        for (number, better), (other, worse), gap in gaps
        if gap > 0 and gap >= least
    ]
    if not made:
        raise SmallGap(SMALL_GAP)
    return made


def refuse_small_gap(row: Mapping[str, object], selection: Selection) -> None:
    """Raise SmallGap where a row of two answers says that their scores are nearer than ``min_gap``."""
    columns = [_column(row, names) for names in (CHOSEN_SCORES, REJECTED_SCORES)]
    if selection.min_gap is None or not all(columns):
        return
    chosen, rejected = (_number(row[column]) for column in columns)
    if chosen - rejected < selection.min_gap:
        raise SmallGap(SMALL_GAP)


def _answers(row: Mapping[str, object]) -> list[Answer]:
    column = _column(row, COMPLETIONS)
    answers = parse_json(as_json(row.get(column)))
    if not isinstance(answers, list):
        raise UnusableRow(f"{column} is not a list")
    if len(answers) < 2:
        raise UnusableRow(f"{column} has fewer than two answers")
    worth = _worth(row, answers)
    if len(worth) != len(answers):
        raise UnusableRow(f"there are {len(worth)} scores or ranks for {len(answers)} {column}")
    return [Answer(_said(answer), value) for answer, value in zip(answers, worth, strict=True)]


def _worth(row: Mapping[str, object], answers: list[object]) -> list[float]:
    """Return the scores, or the ranks with their signs turned, of the row or else of each answer."""
    for names, sign in ((SCORES, 1), (RANKS, -1)):
        if column := _column(row, names):
            values = parse_json(as_json(row[column]))
            if not isinstance(values, list):
                raise UnusableRow(f"{column} is not a list")
            return [sign * _number(value) for value in values]
    for keys, sign in ((_SCORE, 1), (_RANK, -1)):
        inside = [(answer, _column(answer, keys)) for answer in answers if isinstance(answer, Mapping)]
        if any(name for _, name in inside):
            return [sign * _number(answer.get(name)) for answer, name in inside]
    raise UnusableRow("the completions have neither scores nor ranks")


def _said(answer: object) -> object:
    """Return the text of an answer that is an object; messages, and text itself, stay as they are."""
    if not isinstance(answer, Mapping) or any(key in answer for key in _OF_MESSAGES):
        return answer
    text = _column(answer, _TEXT)
    if not text:
        raise UnusableRow("a completion has no text")
    return answer[text]


def _column(row: Mapping[str, object], names: Iterable[str]) -> str:
    return next((name for name in names if not is_null(row.get(name))), "")


def _number(value: object) -> float:
    value = as_json(value)
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            if math.isfinite(number := float(value)):
                return number
        except (ValueError, OverflowError):
            pass
    raise UnusableRow("a score or rank is not a number")

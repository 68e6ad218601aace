"""Which columns of a row hold the parts of a preference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Protocol

from mlx_cpo_plugin.data.messages import UnusableRow, as_json, decode_messages, is_null, parse_dialogue
from mlx_cpo_plugin.data.ranked import (
    BEST_AGAINST_WORST,
    Selection,
    columns_of_scores,
    has_completions,
    has_scores,
    holds_several,
    is_ranked,
    refuse_small_gap,
    two_answer_rows,
)
from mlx_cpo_plugin.errors import DataError, named, shown
from mlx_cpo_plugin.types import Values

AUTO = "auto"
# Column names under which the parts of a preference are published, the commonest first.
ALIASES = {
    "chosen": ("chosen", "preferred_output", "chosen_response", "chosen_answer", "response_chosen", "response_j"),
    "rejected": (
        *("rejected", "non_preferred_output", "rejected_response", "rejected_answer"),
        *("response_rejected", "response_k"),
    ),
    "prompt": (
        *("prompt", "conversations", "conversation", "messages"),
        *("instruction", "question", "query", "input", "context"),
    ),
    "system": ("system", "system_prompt"),
}

# Columns that hold a task, which others may add to, and whole conversations, whose last turn may be an answer.
TASKS = ("instruction", "question", "query")
CONVERSATIONS = ("conversations", "conversation", "messages")
# So many words stand in another text, or in a column, by no accident.
FEW_WORDS = 3
# Columns of what is no text.
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# Columns that are read beside the parts of a preference.
BESIDE = ("tools", "functions", "chat_template_kwargs")


class ValidationSettings(Protocol):
    """The settings that say whether the weights that validate best are wanted, and how much is validated."""

    load_best: bool
    val_batches: int


class DataSettings(ValidationSettings, Protocol):
    """The settings that decide on rows and pairs, by the keys of the YAML file; ``begun``: when the run began."""

    data: str | list[Values]
    hf_dataset: list[dict[str, object]] | None
    train: bool
    test: bool
    valid_fraction: float
    seed: int
    max_seq_length: int
    overlong: str
    chat_template: str | None
    chat_template_kwargs: dict[str, object] | None
    begun: datetime | None
    chosen_feature: str
    rejected_feature: str
    prompt_feature: str
    system_feature: str
    completion_pairs: str
    min_gap: float | None


@dataclass(frozen=True)
class ColumnsRead:
    """Which columns of the rows were read.

    Attributes:
        read: part of the preference, e.g. ``prompt`` -> the columns that it was taken from in any row.
        unread: all others.
        doubtful: those of the unread ones that hold something under a usual name -> the part that they may be; no part
            for :data:`MEDIA`.
    """

    read: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    doubtful: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[ColumnsRead]) -> ColumnsRead:
        """What was read in any of several files."""
        read: dict[str, dict[str, None]] = {}
        for part in parts:
            for name, columns in part.read.items():
                read.setdefault(name, {}).update(dict.fromkeys(columns))
        unread = dict.fromkeys(column for part in parts for column in part.unread)
        doubtful = {column: name for part in parts for column, name in part.doubtful.items()}
        return cls({name: tuple(columns) for name, columns in read.items()}, tuple(unread), doubtful)


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; ``auto`` looks through :data:`ALIASES` in each row.

    ``prompt`` may name several columns of text, such as ``instruction+input``, which are joined by line breaks.
    ``selection`` says which pairs are made of rows with several answers or with scores, and ``prompt_repeated`` that
    the answers in text begin with the prompt, which is then left out of them.
    """

    chosen: str = AUTO
    rejected: str = AUTO
    prompt: str = AUTO
    system: str = AUTO
    selection: Selection = BEST_AGAINST_WORST
    prompt_repeated: bool = False

    @classmethod
    def from_settings(cls, settings: DataSettings, overrides: Mapping[str, object] | None = None) -> Columns:
        """Read ``chosen_feature`` and its siblings from ``settings``; ``overrides`` goes first."""
        keys = {part: f"{part}_feature" for part in ALIASES}
        given = overrides or {}
        names: Values = {part: str(given.get(key) or getattr(settings, key) or AUTO) for part, key in keys.items()}
        return cls(**names, selection=Selection(settings.completion_pairs, settings.min_gap))

    def check(self, rows: Sequence[object], where: str) -> None:
        """Raise DataError, listing the columns found, where there are rows but none has a column that is needed."""
        if rows and not any(isinstance(row, Mapping) for row in rows):
            raise DataError(
                f"{where} has no rows with columns: each must be a mapping, as in {{'prompt': ..., 'chosen': ..., "
                f"'rejected': ...}}, but the first is of type {type(rows[0]).__name__}.",
                key="data",
                place=where,
                allowed="mappings",
            )
        found = list(dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row))
        allowed = first_few([named(name, 60) for name in found], 12)
        listed = f"one of the columns found ({allowed or 'none'})"
        self._refuse_twice(found, where)
        for part, aliases in ALIASES.items() if rows else ():
            name, key = getattr(self, part), f"{part}_feature"
            missing = [column for column in _columns_in(name, part, found) if column not in found]
            if name != AUTO and missing:
                message = f"{where} has no column {shown(missing[0])}, which {key} names: use {listed}."
                raise DataError(message, key=key, place=where, allowed=allowed)
            if name == AUTO and part in ("chosen", "rejected") and not set(aliases) & set(by_lower_case(found)):
                if any(isinstance(row, Mapping) and is_ranked(row) for row in rows):
                    continue
                message = f"{where} has no column for the {part} answer: set {key} to {listed}."
                if any(isinstance(row, Mapping) and holds_several(row) for row in rows):
                    message = (
                        f"{where} has several answers in a row, but no scores or ranks of them: add either column."
                    )
                raise DataError(message, key=key, place=where, allowed=allowed)

    def _refuse_twice(self, found: Sequence[str], where: str) -> None:
        """Raise DataError where a column is named for two parts of a preference, or twice for one."""
        named_by: dict[str, str] = {}
        for part in ALIASES:
            key, name = f"{part}_feature", getattr(self, part)
            for column in _columns_in(name, part, found) if name != AUTO else ():
                if first := named_by.get(column):
                    again = " twice" if first == key else f", and {first} does, too"
                    message = f"{key} names the column {shown(column)} of {where}{again}: name another for one."
                    raise DataError(message, key=key, place=where)
                named_by[column] = key

    def tell_gaps(self, rows: Iterable[object]) -> bool:
        """Whether rows have the scores that ``min_gap`` asks for, if it is set."""
        return self.selection.min_gap is None or any(isinstance(row, Mapping) and has_scores(row) for row in rows)

    def read(self, rows: Iterable[object]) -> ColumnsRead:
        """Return which columns of ``rows`` are read for which part, and which are not."""
        read: dict[str, dict[str, None]] = {part: {} for part in (*ALIASES, *BESIDE)}
        found: dict[str, bool] = {}  # whether it holds anything
        without_prompt: set[str] = set()
        for row in (row for row in rows if isinstance(row, Mapping)):
            held = {part: self.find(row, part) for part in ALIASES}
            for part, (column, _) in held.items():
                read[part].update(dict.fromkeys(_columns_in(column, part, row) if column else ()))
            for part, column in columns_of_scores(row, self.selection, self.has_several(row)).items():
                read.setdefault(part, {})[column] = None
            read["prompt"].update(dict.fromkeys(self._beside_prompt(row, *held["prompt"])))
            for column, value in row.items():
                found[column] = found.get(column, False) or not (is_null(value) or is_blank(value))
            without_prompt = without_prompt or _perhaps_prompts(row, held)
        names = by_lower_case(found)
        read |= {part: {names[part]: None} for part in BESIDE if part in names and found[names[part]]}
        every = {column for columns in read.values() for column in columns}
        unread = [column for column in found if column not in every]
        parts = {alias: part for part, aliases in ALIASES.items() for alias in aliases} | dict.fromkeys(MEDIA, "")
        parts |= {"history": "prompt"} | dict.fromkeys(without_prompt, "prompt")
        parts |= {column: parts[column.lower()] for column in map(str, unread) if column.lower() in parts}
        doubtful = {column: parts[column] for column in unread if column in parts and found[column]}
        by_part = {part: tuple(columns) for part, columns in read.items() if columns}
        return ColumnsRead(by_part, tuple(map(str, unread)), doubtful)

    def _beside_prompt(self, row: Mapping[str, object], column: str, prompt: object) -> list[str]:
        """The columns that a row's prompt is taken from besides its own: the input of a task, and a history."""
        names = by_lower_case(row)
        is_task = self.prompt == AUTO and column.lower() in TASKS
        beside = ["input"] if is_task and not is_blank(value_of(row, "input")) else []
        beside += ["history"] if isinstance(prompt, str) and is_history(value_of(row, "history")) else []
        return [names[name] for name in beside if name in names]

    def pair_rows(self, row: object, source: str) -> list[tuple[object, str]]:
        """Return the rows of two answers that a row stands for, with their sources.

        A row of which none can be made stays as it is: :func:`parse_row` says why.
        """
        if not isinstance(row, Mapping) or not self.has_several(row):
            return [(row, source)]
        try:
            return list(self._two_answer_rows(row, source))
        except (UnusableRow, RecursionError):
            return [(row, source)]

    def refuse_unranked(self, row: Mapping[str, object]) -> None:
        """Raise UnusableRow where no pair can be made of a row's several answers, or ``min_gap`` leaves it out."""
        if self.has_several(row):
            self._two_answer_rows(row)
        refuse_small_gap(row, self.selection)

    def _two_answer_rows(self, row: Mapping[str, object], source: str = "") -> list[tuple[Values, str]]:
        chosen, rejected = (
            part if name == AUTO else name for part, name in (("chosen", self.chosen), ("rejected", self.rejected))
        )
        return two_answer_rows(row, self.selection, (chosen, rejected), source)

    def has_several(self, row: Mapping[str, object]) -> bool:
        """Whether a row has several answers and not a chosen and a rejected one."""
        return has_completions(row) and any(is_null(self.find(row, part)[1]) for part in ("chosen", "rejected"))

    def find(self, row: Mapping[str, object], part: str) -> tuple[str, object]:
        """The row's column for ``part`` and its value; None where it has none.

        Of several columns for the prompt or the system message, the first that is not blank is taken.
        """
        name = getattr(self, part)
        if name != AUTO:
            values = [row.get(column) for column in _columns_in(name, part, row)]
            texts = [text for text in values if isinstance(text, str) and text.strip()]
            return name, "\n".join(texts) if len(texts) > 1 else next(iter(texts), values[0])
        names = by_lower_case(row)
        columns = [names[alias] for alias in ALIASES[part] if alias in names]
        there = [column for column in columns if not is_null(row[column]) and _may_be_read(column, row[column])]
        telling = [column for column in there if part in ("prompt", "system") and not is_blank(row[column])]
        column = next(iter(telling or there), "")
        return (column, row[column]) if column else ("", None)


def _perhaps_prompts(row: Mapping[str, object], held: Mapping[str, tuple[str, object]]) -> set[str]:
    """The columns of text in a row that is read as two texts without a prompt; ``held``: column and value of a part."""
    answers = [held[part][1] for part in ("chosen", "rejected")]
    if held["prompt"][0] or not all(isinstance(text, str) for text in answers) or parse_dialogue(str(answers[0])):
        return set()
    texts = {name for name, value in row.items() if isinstance(value, str) and len(value.split()) >= FEW_WORDS}
    return texts - {column for column, _ in held.values()}


def by_lower_case(columns: Iterable[object]) -> Mapping[str, str]:
    """Each column by its name without capitals; of two that differ by these alone, the one without."""
    return _by_lower_case(tuple(column for column in columns if isinstance(column, str)))


@lru_cache
def _by_lower_case(names: tuple[str, ...]) -> Mapping[str, str]:
    return {name.lower(): name for name in names} | {name: name for name in names if name == name.lower()}


def value_of(row: Mapping[str, object], name: str) -> object:
    """The value in the column of that name, whatever its capitals, in JSON's types; None where there is none."""
    value = row.get(by_lower_case(row).get(name, name))
    return None if is_null(value) else as_json(value)


def _may_be_read(column: str, value: object) -> bool:
    """Whether a column is what its name says: many call something else a context, but not a list of messages."""
    return column.lower() != "context" or isinstance(decode_messages(as_json(value)), list)


def is_history(value: object) -> bool:
    """Whether a value is a list of questions with their answers, or of messages."""
    turns = value if isinstance(value, list) else []
    as_pairs = all(isinstance(turn, list) and len(turn) == 2 and all(map(_is_said, turn)) for turn in turns)
    as_messages = all(isinstance(turn, Mapping) and turn.keys() & {"role", "from"} for turn in turns)
    return bool(turns) and (as_pairs or as_messages)


def _is_said(value: object) -> bool:
    return value is None or isinstance(value, str)


def rows_in(data: object, name: str) -> Iterable[object]:
    """Return ``data`` if it holds rows one by one, as sequences, generators and data sets do.

    Raises:
        DataError: it is something else, such as a table of columns or a mapping of splits; ``name`` says what it is.
    """
    by_columns = isinstance(data, Mapping | str | bytes) or hasattr(data, "columns")  # pandas, polars, pyarrow
    if not by_columns and (isinstance(data, Iterable) or hasattr(type(data), "__getitem__")):
        return data  # type: ignore[return-value]  # data sets of mlx-lm-lora have no iterator of their own
    raise DataError(
        f"{name} is of type {type(data).__name__}, but must hold rows one by one: give a list of mappings, such as "
        "table.to_dict('records') of pandas.",
        key="data",
        place=name,
        allowed="a list of mappings",
    )


def first_few(items: Sequence[str], count: int, separator: str = ", ") -> str:
    """The first ``count`` items, and how many more there are."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return separator.join(items[:count]) + more


def _columns_in(name: str, part: str, there: Iterable[str]) -> list[str]:
    """The columns that ``name`` stands for: its parts around each ``+``, unless there is a column of that name."""
    joins = part == "prompt" and "+" in name and name not in there
    return [column.strip() for column in name.split("+")] if joins else [name]


def is_blank(value: object) -> bool:
    """Whether a value is text without any, or an empty list."""
    return (isinstance(value, str) and not value.strip()) or (isinstance(value, list) and not value)

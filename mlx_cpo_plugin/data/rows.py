"""Parse a raw row of any format into a conversation or plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from mlx_cpo_plugin.data.messages import (
    Message,
    UnusableRow,
    as_json,
    decode_messages,
    is_null,
    parse_dialogue,
    parse_json,
    parse_messages,
    same_message,
    shared_messages,
    split_system,
)
from mlx_cpo_plugin.data.ranked import (
    BEST_AGAINST_WORST,
    Selection,
    columns_of_scores,
    has_completions,
    has_scores,
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
    "prompt": ("prompt", "conversations", "conversation", "messages", "instruction", "question", "query", "input"),
    "system": ("system", "system_prompt"),
}
IDENTICAL = "both answers are the same"
EMPTY_ANSWER = "an answer is empty"
NO_PROMPT = "there is no prompt before the answers"

# Columns that hold a task, which others may add to, and whole conversations, whose last turn may be an answer.
_TASKS = ("instruction", "question", "query")
_CONVERSATIONS = ("conversations", "conversation", "messages")
# Columns that a task is taken from, too, and those that are read beside the parts of a preference.
_WITH_TASKS = ("input", "history")
_BESIDE = ("tools", "chat_template_kwargs")


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
        doubtful: those of the unread ones that hold something under a usual name -> the part that they may be.
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
    ``selection`` says which pairs are made of rows with several answers or with scores.
    """

    chosen: str = AUTO
    rejected: str = AUTO
    prompt: str = AUTO
    system: str = AUTO
    selection: Selection = BEST_AGAINST_WORST

    @classmethod
    def from_settings(cls, settings: DataSettings, overrides: Mapping[str, object] | None = None) -> Columns:
        """Read ``chosen_feature`` and its siblings from ``settings``; ``overrides`` goes first."""
        keys = {part: f"{part}_feature" for part in ALIASES}
        given = overrides or {}
        names = {part: str(given.get(key) or getattr(settings, key) or AUTO) for part, key in keys.items()}
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
        for part, aliases in ALIASES.items() if rows else ():
            name, key = getattr(self, part), f"{part}_feature"
            missing = [column for column in _columns_in(name, part, found) if column not in found]
            if name != AUTO and missing:
                message = f"{where} has no column {shown(missing[0])}, which {key} names: use {listed}."
                raise DataError(message, key=key, place=where, allowed=allowed)
            if name == AUTO and part in ("chosen", "rejected") and not set(aliases) & set(found):
                if any(isinstance(row, Mapping) and is_ranked(row) for row in rows):
                    continue
                message = f"{where} has no column for the {part} answer: set {key} to {listed}."
                if has_completions(found):
                    message = (
                        f"{where} has several answers in a row, but no scores or ranks of them: add either column."
                    )
                raise DataError(message, key=key, place=where, allowed=allowed)

    def tell_gaps(self, rows: Iterable[object]) -> bool:
        """Whether rows have the scores that ``min_gap`` asks for, if it is set."""
        return self.selection.min_gap is None or any(isinstance(row, Mapping) and has_scores(row) for row in rows)

    def read(self, rows: Iterable[object]) -> ColumnsRead:
        """Return which columns of ``rows`` are read for which part, and which are not."""
        read: dict[str, dict[str, None]] = {part: {} for part in (*ALIASES, *_BESIDE)}
        found: dict[str, bool] = {}  # whether it holds anything
        for row in (row for row in rows if isinstance(row, Mapping)):
            for part in ALIASES:
                column = self.find(row, part)[0]
                read[part].update(dict.fromkeys(_columns_in(column, part, row) if column else ()))
            for part, column in columns_of_scores(row, self.selection, self.has_several(row)).items():
                read.setdefault(part, {})[column] = None
            if self.prompt == AUTO and set(_TASKS) & set(read["prompt"]):
                read["prompt"].update(dict.fromkeys(column for column in _WITH_TASKS if row.get(column)))
            for column, value in row.items():
                found[column] = found.get(column, False) or not (is_null(value) or _is_blank(value))
        read |= {part: {part: None} for part in _BESIDE if found.get(part)}
        every = {column for columns in read.values() for column in columns}
        unread = [column for column in found if column not in every]
        parts = {alias: part for part, aliases in ALIASES.items() for alias in aliases}
        doubtful = {column: parts[column] for column in unread if column in parts and found[column]}
        by_part = {part: tuple(columns) for part, columns in read.items() if columns}
        return ColumnsRead(by_part, tuple(map(str, unread)), doubtful)

    def pair_rows(self, row: object, source: str) -> list[tuple[object, str]]:
        """Return the rows of two answers that a row stands for, with their sources.

        A row of which none can be made stays as it is: :func:`parse_row` says why.
        """
        if not isinstance(row, Mapping) or not self.has_several(row):
            return [(row, source)]
        try:
            return list(self._two_answer_rows(row, source))
        except UnusableRow:
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
        there = [alias for alias in ALIASES[part] if not is_null(row.get(alias))]
        telling = [alias for alias in there if part in ("prompt", "system") and not _is_blank(row[alias])]
        column = next(iter(telling or there), "")
        return column, row.get(column)


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


@dataclass(frozen=True)
class Conversation:
    """Both sides as whole conversations, whose first ``shared`` messages are the same.

    What follows the shared messages is the answer; it ends with an assistant message on either side.

    Attributes:
        tools: what the model may call.
        template_kwargs: the row's own arguments of the chat template.
        partial: the beginning of both answers, where the prompt already contains it.
    """

    chosen: list[Message]
    rejected: list[Message]
    shared: int
    tools: list[object] | None = None
    template_kwargs: Mapping[str, object] = field(default_factory=dict)
    partial: str = ""


@dataclass(frozen=True)
class PlainText:
    """Both sides as text that is tokenised as it stands, without a chat template."""

    chosen: str
    rejected: str


def parse_row(row: object, columns: Columns) -> Conversation | PlainText:
    """Parse one raw row; UnusableRow says why it holds no preference."""
    if not isinstance(row, Mapping):
        raise UnusableRow("the row is not a JSON object")
    columns.refuse_unranked(row)
    chosen, rejected = (decode_messages(as_json(columns.find(row, part)[1])) for part in ("chosen", "rejected"))
    for part, value in (("chosen", chosen), ("rejected", rejected)):
        if is_null(value):
            raise UnusableRow(f"the {part} answer is missing")
        if isinstance(value, str) and not value.strip():
            raise UnusableRow(EMPTY_ANSWER)
    prompt_column, prompt, tools = _prompt_and_tools(row, columns)
    system = _system_messages(columns.find(row, "system")[1])
    template_kwargs = _template_kwargs(row)

    if isinstance(chosen, str) and isinstance(rejected, str):
        dialogues = parse_dialogue(chosen), parse_dialogue(rejected)
        if dialogues[0] and dialogues[1] and _repeats(prompt, chosen, dialogues[0]):
            chosen, rejected = dialogues
        elif prompt is None:
            if system:
                raise UnusableRow(NO_PROMPT)
            if chosen == rejected:
                raise UnusableRow(IDENTICAL)
            return PlainText(chosen, rejected)
    answers = [_answer_messages(answer) for answer in (chosen, rejected)]
    speakers = {message["role"] for answer in answers for message in answer}
    if isinstance(prompt, str) and not prompt.strip() and "user" not in speakers:
        raise UnusableRow("the prompt is empty")
    holds_prompts = columns.prompt != AUTO or prompt_column not in _CONVERSATIONS
    before, answers, partial = _continue(_prompt_messages(prompt), answers, holds_prompts)
    chosen, rejected = (_union(system, _join(before, answer)) for answer in answers)
    _check_preference(chosen, rejected)
    return Conversation(chosen, rejected, shared_messages(chosen, rejected), tools, template_kwargs, partial)


def _check_preference(chosen: list[Message], rejected: list[Message]) -> None:
    """Raise UnusableRow unless both sides answer a prompt and differ."""
    for side in (chosen, rejected):
        if not side or side[-1]["role"] != "assistant":
            raise UnusableRow("an answer does not end with an assistant message")
    if chosen == rejected:
        raise UnusableRow(IDENTICAL)
    alike = shared_messages(chosen, rejected, same_message)
    for side in (chosen, rejected):
        if side[0]["role"] == "assistant" and not alike:
            raise UnusableRow(NO_PROMPT)
        for message in side[alike:]:
            if message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message:
                raise UnusableRow(EMPTY_ANSWER)


def _prompt_and_tools(row: Mapping[str, object], columns: Columns) -> tuple[str, object, list[object] | None]:
    """The prompt's column, the prompt as the row gives it, and the tools that the model may call."""
    column, prompt = columns.find(row, "prompt")
    prompt, tools = decode_messages(as_json(prompt)), _value(row, "tools")
    if isinstance(prompt, Mapping) and "messages" in prompt:
        tools = prompt.get("tools") or tools
    if columns.prompt == AUTO and column in _TASKS and isinstance(prompt, str):
        prompt = _with_material(prompt, row)
    tools = parse_json(tools)
    if not tools or _is_blank(tools):
        return column, prompt, None
    if not isinstance(tools, list):
        raise UnusableRow("the tools are not a list")
    return column, prompt, [parse_json(tool) for tool in tools]


def _with_material(task: str, row: Mapping[str, object]) -> object:
    """A task in Alpaca's format with its input and its history."""
    material, history = row.get("input"), _value(row, "history")
    if isinstance(material, str) and material.strip() and material.strip() not in task:
        task = f"{task}\n{material}"
    if not history:
        return task
    if not isinstance(history, list) or not all(isinstance(turns, list) and len(turns) == 2 for turns in history):
        raise UnusableRow("the history is not a list of questions with their answers")
    turns = [*(text for turn in history for text in turn), task]
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]


def _template_kwargs(row: Mapping[str, object]) -> dict[str, object]:
    values = parse_json(_value(row, "chat_template_kwargs")) or {}
    if not isinstance(values, dict):
        raise UnusableRow("the chat_template_kwargs are not an object")
    return values


def _prompt_messages(prompt: object) -> list[Message]:
    if prompt is None or _is_blank(prompt):
        return []
    if not isinstance(prompt, str):
        return parse_messages(prompt)
    dialogue = parse_dialogue(prompt) or [{"role": "user", "content": prompt}]
    return dialogue[:-1] if dialogue[-1] == {"role": "assistant", "content": ""} else dialogue


def _answer_messages(answer: object) -> list[Message]:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    if isinstance(answer, Mapping) and not answer.keys() & {"role", "from", "messages"}:
        answer = {"role": "assistant", **answer}
    return parse_messages(answer)


def _system_messages(system: object) -> list[Message]:
    system = decode_messages(as_json(system))
    if is_null(system) or _is_blank(system):
        return []
    return [{"role": "system", "content": system}] if isinstance(system, str) else parse_messages(system)


def _repeats(prompt: object, text: str, dialogue: list[Message]) -> bool:
    """Whether a dialogue repeats the prompt, and is not an answer that happens to be written as a dialogue."""
    if isinstance(prompt, str) and prompt.strip() in text:
        return True
    return any(same_message(message, turn) for message in _prompt_messages(prompt) for turn in dialogue) or not prompt


def _continue(
    prompt: list[Message], answers: Sequence[list[Message]], holds_prompts: bool
) -> tuple[list[Message], list[list[Message]], str]:
    """Merge an assistant message at the end of the prompt: it is one of the answers, or the beginning of both.

    Returns the messages before the answers, the answers, and how both begin.
    """
    sides = [list(answer) for answer in answers]
    speaking = [side for side in sides if side and side[0]["role"] == "assistant"]
    if not prompt or prompt[-1]["role"] != "assistant" or not speaking:
        return prompt, sides, ""
    before, last = prompt[:-1], prompt[-1]
    if any(same_message(last, side[0]) for side in speaking):
        return before, sides, ""
    if not holds_prompts or "tool_calls" in last or len(speaking) < len(sides):
        raise UnusableRow("the prompt ends with an answer that is neither of the two")
    partial = last["content"]
    for side in sides:
        said = side[0]["content"]
        if not said.strip() and "tool_calls" not in side[0]:
            raise UnusableRow(EMPTY_ANSWER)
        repeated = bool(partial.strip()) and said.startswith(partial.rstrip())
        side[0] = {**side[0], "content": said if repeated else partial + said}
    if sides[0][0] == sides[1][0]:
        return before, sides, ""
    begins = all(side[0]["content"].startswith(partial) for side in sides)
    return before, sides, partial if begins else partial.rstrip()


def _union(system: list[Message], messages: list[Message]) -> list[Message]:
    """System messages in front of a conversation, without those that it already has."""
    own, _ = split_system(messages)
    return [message for message in system if not any(same_message(message, other) for other in own)] + messages


def _join(prompt: list[Message], side: list[Message]) -> list[Message]:
    """Prompt and answer as one conversation, without the turns that the answer repeats."""
    prompt_system, prompt_turns = split_system(prompt)
    side_system, side_turns = split_system(side)
    system = _union(prompt_system, side_system)
    for size in range(min(len(prompt_turns), len(side_turns)), 0, -1):
        if all(map(same_message, prompt_turns[-size:], side_turns[:size])):
            return system + prompt_turns[:-size] + side_turns
    if side_turns and prompt_turns and side_turns[0]["role"] == "user":
        asked = [message for message in prompt_turns if message["role"] == "user"]
        if any(same_message(message, question) for message in side_turns for question in asked):
            return system + side_turns
        if prompt_turns[-1]["role"] == "user":
            # A single question may be part of a longer one in the answer's list.
            said = [message["content"] for message in side_turns if message["role"] == "user"]
            if len(prompt_turns) == 1 and any(prompt_turns[0]["content"].strip() in text for text in said):
                return system + side_turns
            raise UnusableRow("the answers begin with a question that is not the prompt's")
    return system + prompt_turns + side_turns


def _value(row: Mapping[str, object], column: str) -> object:
    value = row.get(column)
    return None if is_null(value) else as_json(value)


def _is_blank(value: object) -> bool:
    return (isinstance(value, str) and not value.strip()) or value == []

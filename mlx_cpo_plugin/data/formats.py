"""One raw row to a conversation or to plain text, told apart row by row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.wording import named, shown

Message = dict[str, Any]

AUTO = "auto"
# Column names under which the parts of a preference are published, the commonest first.
ALIASES = {
    "chosen": (
        "chosen",
        "preferred_output",
        "preferred",
        "chosen_response",
        "chosen_answer",
        "response_chosen",
        "response_j",
    ),
    "rejected": (
        "rejected",
        "non_preferred_output",
        "dispreferred",
        "non_preferred",
        "rejected_response",
        "rejected_answer",
        "response_rejected",
        "response_k",
    ),
    "prompt": ("prompt", "conversations", "conversation", "messages", "instruction", "question", "query", "input"),
    "system": ("system", "system_prompt"),
}
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}

IDENTICAL = "both answers are the same"
EMPTY_ANSWER = "an answer is empty"
EMPTY_PROMPT = "the prompt is empty"
NO_PROMPT = "there is no prompt before the answers"
NOT_FROM_ASSISTANT = "an answer does not end with an assistant message"

_COLUMNS_SHOWN = 12
_DIALOGUE_TURN = re.compile(r"\n\n(Human|Assistant):")


class UnusableRow(Exception):
    """One row cannot become a pair; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; ``auto`` looks through :data:`ALIASES` in each row."""

    chosen: str = AUTO
    rejected: str = AUTO
    prompt: str = AUTO
    system: str = AUTO

    @classmethod
    def from_settings(cls, settings: Any, overrides: Mapping[str, Any] | None = None) -> Columns:
        """Read ``chosen_feature`` and its siblings from ``settings``; ``overrides`` goes first."""
        names = {}
        for part in ALIASES:
            key = f"{part}_feature"
            names[part] = (overrides or {}).get(key) or getattr(settings, key, None) or AUTO
        return cls(**names)

    def check(self, rows: Iterable[Any], where: str) -> None:
        """Raise DataError, with the columns found, where the rows cannot have what is asked for."""
        found = list(dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row))
        more = f" and {len(found) - _COLUMNS_SHOWN} more" if len(found) > _COLUMNS_SHOWN else ""
        names = ", ".join(named(name, 60) for name in found[:_COLUMNS_SHOWN])
        listed = f"one of the columns found ({names or 'none'}{more})"
        for part, aliases in ALIASES.items():
            name = getattr(self, part)
            if name != AUTO and name not in found:
                raise DataError(f"{where} has no column {shown(name)}, which {part}_feature names: use {listed}.")
            if name == AUTO and part in ("chosen", "rejected") and not set(aliases) & set(found):
                raise DataError(f"{where} has no column for the {part} answer: set {part}_feature to {listed}.")

    def value(self, row: Mapping[str, Any], part: str) -> Any:
        """The row's value for ``part``, None where it has none."""
        name = getattr(self, part)
        if name != AUTO:
            return row.get(name)
        return next((row[alias] for alias in ALIASES[part] if row.get(alias) is not None), None)


@dataclass(frozen=True)
class Conversation:
    """Both sides as whole conversations, whose first ``shared`` messages are the same.

    What follows the shared messages is the answer; it ends with an assistant message on either side.
    """

    chosen: list[Message]
    rejected: list[Message]
    shared: int
    tools: list[Any] | None = None


@dataclass(frozen=True)
class PlainText:
    """Both sides as text that is tokenised as it stands, without a chat template."""

    chosen: str
    rejected: str


def parse_row(row: Any, columns: Columns) -> Conversation | PlainText:
    """Understand one raw row.

    Raises:
        UnusableRow: the row lacks a side, is of the wrong type, or holds no preference.
    """
    if not isinstance(row, Mapping):
        raise UnusableRow("the row is not a JSON object")
    chosen, rejected = (columns.value(row, part) for part in ("chosen", "rejected"))
    for part, value in (("chosen", chosen), ("rejected", rejected)):
        if value is None:
            raise UnusableRow(f"the {part} answer is missing")
        if isinstance(value, str) and not value.strip():
            raise UnusableRow(EMPTY_ANSWER)
    prompt, tools = _prompt_and_tools(row, columns)
    system = _system_messages(columns.value(row, "system"))

    if isinstance(chosen, str) and isinstance(rejected, str):
        dialogues = parse_dialogue(chosen), parse_dialogue(rejected)
        repeats_prompt = prompt is None or (isinstance(prompt, str) and prompt.strip() in chosen)
        if dialogues[0] and dialogues[1] and repeats_prompt:
            return _conversation(system + dialogues[0], system + dialogues[1], tools)
        if prompt is None:
            if system:
                raise UnusableRow(NO_PROMPT)
            if chosen == rejected:
                raise UnusableRow(IDENTICAL)
            return PlainText(chosen, rejected)
    if isinstance(prompt, str) and not prompt.strip() and all(_is_answer_only(side) for side in (chosen, rejected)):
        raise UnusableRow(EMPTY_PROMPT)
    before = _prompt_messages(prompt)
    sides = [_with_system(system, _join(before, _answer_messages(side))) for side in (chosen, rejected)]
    return _conversation(sides[0], sides[1], tools)


def parse_dialogue(text: str) -> list[Message] | None:
    r"""Messages of a dialogue that is written "\n\nHuman: … \n\nAssistant: …", None for other text.

    The last message may be an assistant turn with no text yet, as in a prompt.
    """
    opening, *turns = _DIALOGUE_TURN.split("\n\n" + text.lstrip())
    if opening or "Assistant" not in turns[::2] or turns[0] != "Human":
        return None
    messages: list[Message] = []
    for speaker, words in zip(turns[::2], turns[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + words.strip()
        else:
            messages.append({"role": role, "content": words.strip()})
    return messages


def shared_messages(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many leading messages both sides have in common, at least the last of either left out."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(limit) if chosen[i] != rejected[i]), limit)


def _conversation(chosen: list[Message], rejected: list[Message], tools: list[Any] | None) -> Conversation:
    """Check both sides and split off what they share."""
    for side in (chosen, rejected):
        if not side or side[-1]["role"] != "assistant":
            raise UnusableRow(NOT_FROM_ASSISTANT)
    if chosen == rejected:
        raise UnusableRow(IDENTICAL)
    shared = shared_messages(chosen, rejected)
    for side in (chosen, rejected):
        if side[0]["role"] == "assistant" and not shared:
            raise UnusableRow(NO_PROMPT)
        for message in side[shared:]:
            if message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message:
                raise UnusableRow(EMPTY_ANSWER)
    return Conversation(chosen, rejected, shared, tools)


def _prompt_and_tools(row: Mapping[str, Any], columns: Columns) -> tuple[Any, list[Any] | None]:
    """The prompt as the row gives it, and the tools that the model may call."""
    prompt, tools = columns.value(row, "prompt"), row.get("tools")
    if isinstance(prompt, Mapping) and "messages" in prompt:
        tools = prompt.get("tools") or tools
        prompt = prompt["messages"]
    # Rows in Alpaca's style hold the task in one column and its material in another.
    if columns.prompt == AUTO and isinstance(prompt, str) and prompt == row.get("instruction"):
        material = row.get("input")
        if isinstance(material, str) and material.strip():
            prompt = f"{prompt}\n{material}"
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise UnusableRow("the tools are not valid JSON") from None
    if tools and not isinstance(tools, list):
        raise UnusableRow("the tools are not a list")
    # Columnar files fill every field of the widest tool with null.
    return prompt, [_without_nulls(tool) for tool in tools] if tools else None


def _prompt_messages(prompt: Any) -> list[Message]:
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        return []
    if isinstance(prompt, str):
        dialogue = parse_dialogue(prompt)
        if dialogue and dialogue[-1] == {"role": "assistant", "content": ""}:
            return dialogue[:-1]
        return [{"role": "user", "content": prompt}]
    return _messages(prompt)


def _answer_messages(answer: Any) -> list[Message]:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    if isinstance(answer, Mapping) and "messages" in answer:
        return _messages(answer["messages"])
    if isinstance(answer, Mapping) and "role" not in answer and "from" not in answer:
        return [_message({"role": "assistant", **answer})]
    return _messages(answer)


def _system_messages(system: Any) -> list[Message]:
    if system is None or (isinstance(system, str) and not system.strip()):
        return []
    if isinstance(system, Mapping):
        return [_message(system)]
    if not isinstance(system, str):
        raise UnusableRow("the system message is not text")
    return [{"role": "system", "content": system}]


def _is_answer_only(answer: Any) -> bool:
    return isinstance(answer, str) or all(message["role"] != "user" for message in _answer_messages(answer))


def _with_system(system: list[Message], messages: list[Message]) -> list[Message]:
    """The system column in front, where the conversation brings no system message of its own."""
    return messages if messages and messages[0]["role"] == "system" else system + messages


def _join(prompt: list[Message], side: list[Message]) -> list[Message]:
    """Prompt and answer as one conversation, without repeating turns that the answer's list already holds."""
    prompt_system, prompt_turns = _split_system(prompt)
    side_system, side_turns = _split_system(side)
    system = side_system or prompt_system
    for size in range(min(len(prompt_turns), len(side_turns)), 0, -1):
        if prompt_turns[-size:] == side_turns[:size]:
            return system + prompt_turns[:-size] + side_turns
    users = [message for message in prompt_turns if message["role"] == "user"]
    if side_turns and side_turns[0]["role"] == "user" and any(message in users for message in side_turns):
        return system + side_turns
    return system + prompt_turns + side_turns


def _split_system(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    size = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return messages[:size], messages[size:]


def _messages(value: Any) -> list[Message]:
    if isinstance(value, Mapping):
        return [_message(value)]
    if not isinstance(value, list):
        raise UnusableRow(f"messages are expected, not {_kind(value)}")
    return [_message(message) for message in value]


def _message(value: Any) -> Message:
    """One message as chat templates read it: OpenAI's keys, roles by their usual names, text content."""
    if not isinstance(value, Mapping):
        raise UnusableRow(f"a message is not an object with role and content but {_kind(value)}")
    fields = {name: field for name, field in value.items() if field is not None}
    if "from" in fields and "role" not in fields:
        fields = {"role": fields["from"], "content": fields.get("value", "")}
    role = fields.get("role", "")
    speaker = role.lower() if isinstance(role, str) else None
    if speaker not in ROLES:
        raise UnusableRow("a message has no role" if role == "" else f"a message has the unknown role {shown(role)}")
    message: Message = {**fields, "role": ROLES[speaker], "content": _text(fields.get("content"))}
    calls = _tool_calls(fields, speaker, message["content"])
    message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = calls
        if speaker == "function_call":
            message["content"] = ""
    return message


def _tool_calls(fields: Mapping[str, Any], speaker: str, content: str) -> list[Any]:
    """Calls in OpenAI's form, their arguments as objects, which is what chat templates serialise."""
    calls = fields.get("tool_calls") or []
    if not isinstance(calls, list):
        raise UnusableRow("the tool calls are not a list")
    if speaker == "function_call":
        parsed = _parse_json(content)
        calls = [{"type": "function", "function": call} for call in (parsed if isinstance(parsed, list) else [parsed])]
    result = []
    for call in calls:
        if not isinstance(call, Mapping):
            raise UnusableRow("a tool call is not an object")
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UnusableRow("a tool call does not name its function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parse_json(arguments)
        names = {name: call[name] for name in ("id", "type") if call.get(name) is not None}
        result.append({"type": "function", **names, "function": {**function, "arguments": arguments or {}}})
    return result


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type", "text") != "text" or "text" not in part:
                kind = part.get("type") if isinstance(part, Mapping) else None
                raise UnusableRow(f"a message holds a part of type {shown(kind)}, and only text can be trained on")
        return "".join(str(part["text"]) for part in content)
    raise UnusableRow(f"a message's content is not text but {_kind(content)}")


def _parse_json(text: str) -> Any:
    """The JSON value in ``text``, or the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(field) for name, field in value.items() if field is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)

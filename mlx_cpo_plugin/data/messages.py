"""Bring messages, in whatever form a row has them, into the form that chat templates read."""

from __future__ import annotations

import ast
import json
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from mlx_cpo_plugin.errors import shown
from mlx_cpo_plugin.types import Values

Message = Values

_SPEAKERS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bot", "chatgpt", "model", "function_call"),
    "tool": ("tool", "function", "function_response", "observation"),
}
ROLES = {name: role for role, names in _SPEAKERS.items() for name in names}

# Where a message has its text, the commonest first.
_TEXTS = ("content", "value", "text", "parts")
# What a message has besides its role: other objects with a role are text.
_SAYING = {*_TEXTS, "tool_calls", "function_call"}

_DIALOGUE_TURN = re.compile(r"\n\n(Human|Assistant):")
# A role as JSON and Python write it, and what a written list of messages begins with: "[{", "array([{", "[Message(".
_WRITTEN_ROLE = re.compile(r"""(?:(['"])(?:role|from)\1\s*:|\brole=)\s*['"](\w+)['"]""")
_WRITTEN_LIST = re.compile(r"\s*(?:array\()?\[\s*(?:\{|\w+\()")


class UnusableRow(Exception):
    """A row cannot become a pair; the message is the reason that the report counts it under.

    Attributes:
        by_choice: whether the settings ask for it to be left out.
    """

    by_choice = False


def parse_messages(value: object) -> list[Message]:
    """Messages of a list of objects, or of one; each may be text, and all may stand under ``messages``."""
    if isinstance(value, Mapping):
        value = decode_messages(value["messages"]) if "messages" in value else _turns(value)
    if not isinstance(value, list):
        raise UnusableRow(f"messages are expected, not {kind_of(value)}")
    return [_parse_message(decode_messages(message)) for message in value]


def _turns(value: Mapping[str, object]) -> list[object]:
    """The messages of one object: itself, or those whose roles and texts it has in lists, as `datasets` stores them."""
    lists = {name: column for name, column in value.items() if isinstance(column, list)}
    if not (lists.keys() & {"role", "from"} and lists.keys() & {*_TEXTS}):
        return [value]
    if len(set(map(len, lists.values()))) > 1:
        raise UnusableRow("the lists of a column of messages are not as long as one another")
    return [dict(zip(lists, turn, strict=True)) for turn in zip(*lists.values(), strict=True)]


def _parse_message(value: object) -> Message:
    """One message with OpenAI's keys, a usual role and text as content; keys of other kinds stay."""
    if not isinstance(value, Mapping):
        raise UnusableRow(f"a message is not an object with role and content but {kind_of(value)}")
    fields = dict(value)
    if "from" in fields and "role" not in fields:
        fields = {"role": fields.pop("from"), **fields}
    if fields.get("content") is None:
        where = next((name for name in _TEXTS if isinstance(fields.get(name), str | list)), "content")
        fields["content"] = fields.pop(where, None)
    role = fields.get("role", "")
    speaker = role.lower() if isinstance(role, str) else None
    if speaker not in ROLES:
        raise UnusableRow("a message has no role" if role == "" else f"a message has the unknown role {shown(role)}")
    content = _text(fields.get("content"))
    calls = _tool_calls(fields, content if speaker == "function_call" else None)
    message = {**fields, "role": ROLES[speaker], "content": "" if calls and speaker == "function_call" else content}
    message.pop("tool_calls", None)
    message.pop("function_call", None)
    return {**message, "tool_calls": calls} if calls else message


def _tool_calls(fields: Mapping[str, object], written: str | None) -> list[Values]:
    """Calls in OpenAI's form, their arguments as objects, which templates serialise; ``written`` are some in JSON."""
    calls = fields.get("tool_calls") or []
    if not isinstance(calls, list):
        raise UnusableRow("the tool calls are not a list")
    if written is not None:
        parsed = parse_json(written)
        calls = [{"type": "function", "function": call} for call in (parsed if isinstance(parsed, list) else [parsed])]
    elif not calls and fields.get("function_call"):
        calls = [{"function": fields["function_call"]}]
    result = []
    for call in map(parse_json, calls):
        if _is_hollow(call):  # what a schema makes of a message without calls
            continue
        if not isinstance(call, Mapping):
            raise UnusableRow("a tool call is not an object")
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UnusableRow("a tool call does not name its function")
        names = {name: call[name] for name in ("id", "type") if call.get(name) is not None}
        arguments = parse_json(function.get("arguments")) or {}
        # Templates write what they are given in its order, which columnar files may change.
        ordered = {"name": function["name"], "arguments": arguments}
        result.append({"type": "function", **names, "function": ordered | {**function, **ordered}})
    return result


def with_written_arguments(messages: Sequence[Message]) -> list[Message]:
    """Messages with the arguments of their calls as JSON in text, as some templates want them."""

    def written(call: Values) -> Values:
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    return [
        {**message, "tool_calls": list(map(written, message["tool_calls"]))} if "tool_calls" in message else message
        for message in messages
    ]


def _text(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        for part in parts:
            if not isinstance(part, Mapping) or part.get("type", "text") != "text" or "text" not in part:
                kind = part.get("type") if isinstance(part, Mapping) else None
                raise UnusableRow(f"a message holds a part of type {shown(kind)}, and only text can be trained on")
        return "".join(str(part["text"]) for part in parts)
    raise UnusableRow(f"a message's content is not text but {kind_of(content)}")


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


def decode_messages(value: object) -> object:
    """Decode messages that are written as JSON or Python; any other value, or text that is no list, stays as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", "array([")):
        return value
    role = _WRITTEN_ROLE.search(value)
    if role is None or role[2].lower() not in ROLES:
        return value
    parsed = parse_json(value)
    if parsed is value:
        try:
            parsed = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            if _WRITTEN_LIST.match(value):
                raise UnusableRow("text that looks like a list of messages cannot be decoded") from None
    return as_json(parsed) if _are_messages(parsed) else value


def _are_messages(value: object) -> bool:
    """Whether these are objects with a role, of which at least one says something."""
    if isinstance(value, Mapping):
        messages = value["messages"] if isinstance(value.get("messages"), list) else [value]
    else:
        messages = value if isinstance(value, list) else []
    return all(map(_has_role, messages)) and any(_SAYING & message.keys() for message in messages)


def _has_role(value: object) -> bool:
    role = value.get("role", value.get("from")) if isinstance(value, Mapping) else None
    return isinstance(role, str) and role.lower() in ROLES


def same_message(first: Message, second: Message) -> bool:
    """Whether role, calls and text are the same, up to Unicode normalisation and surrounding white space."""

    def said(message: Message) -> tuple[object, ...]:
        calls = [call["function"] for call in message.get("tool_calls", ())]
        return message["role"], unicodedata.normalize("NFC", message["content"]).strip(), calls

    return said(first) == said(second)


def shared_messages(
    chosen: Sequence[Message], rejected: Sequence[Message], alike: Callable[[Message, Message], bool] = operator.eq
) -> int:
    """How many leading messages both sides have in common, not counting the last one of either."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(limit) if not alike(chosen[i], rejected[i])), limit)


def split_system(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """The system messages at the beginning, and what follows them."""
    size = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return messages[:size], messages[size:]


def parse_json(value: object) -> object:
    """Parse JSON; return text that is not JSON, and any other value, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def as_json(value: object) -> object:
    """``value`` in JSON's types, without the nulls that columnar files fill in for fields of other rows."""
    if isinstance(value, Mapping):
        return {name: as_json(field) for name, field in value.items() if not is_null(field)}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars
        return as_json(value.tolist())
    return value


def is_null(value: object) -> bool:
    """Whether a value is null, or the NaN that tables write for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_hollow(value: object) -> bool:
    return value is None or (isinstance(value, Mapping) and all(map(_is_hollow, value.values())))


def kind_of(value: object) -> str:
    """Name the kind of a value as JSON has it."""
    if value is None:
        return "null"
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)

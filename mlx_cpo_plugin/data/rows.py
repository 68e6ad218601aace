"""Parse a raw row of any format into a conversation or plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mlx_cpo_plugin.data.columns import (
    AUTO,
    CONVERSATIONS,
    FEW_WORDS,
    TASKS,
    Columns,
    is_blank,
    is_history,
    value_of,
)
from mlx_cpo_plugin.data.messages import (
    Message,
    UnusableRow,
    as_json,
    decode_messages,
    is_null,
    kind_of,
    parse_dialogue,
    parse_json,
    parse_messages,
    same_message,
    shared_messages,
    split_system,
)

IDENTICAL = "both answers are the same"
EMPTY_ANSWER = "an answer is empty"
# The share of rows of which something is a property of their file, and after how many of them that shows.
NEARLY_ALL, _ENOUGH_ROWS = 0.9, 50
# Keys under which messages have their thoughts.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
NO_PROMPT = "there is no prompt before the answers"


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
        _require_text_or_messages(value, f"the {part} answer")
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
        elif columns.prompt_repeated and _repeat_question(prompt, chosen, rejected):
            chosen, rejected = (_without_question(str(prompt), answer) for answer in (chosen, rejected))
    answers = [_answer_messages(answer) for answer in (chosen, rejected)]
    speakers = {message["role"] for answer in answers for message in answer}
    if isinstance(prompt, str) and not prompt.strip() and "user" not in speakers:
        raise UnusableRow("the prompt is empty")
    holds_prompts = columns.prompt != AUTO or prompt_column.lower() not in CONVERSATIONS
    before, answers, partial = _continue(_prompt_messages(prompt), answers, holds_prompts)
    chosen, rejected = (_union(system, _join(before, answer)) for answer in answers)
    _check_preference(chosen, rejected)
    return Conversation(chosen, rejected, shared_messages(chosen, rejected), tools, template_kwargs, partial)


def repeating_prompts(rows: Sequence[object], columns: Columns) -> int:
    """How many rows have two answers in text that begin with the prompt, if nearly all with texts and a prompt do."""
    found = asked = 0
    for row in (row for row in rows if isinstance(row, Mapping)):
        texts = [columns.find(row, part)[1] for part in ("prompt", "chosen", "rejected")]
        if all(isinstance(text, str) and text.strip() for text in texts):
            asked += 1
            found += _repeat_question(*texts)
            if asked >= _ENOUGH_ROWS and found < NEARLY_ALL * asked:
                return 0
    return found if found >= NEARLY_ALL * asked else 0


def _repeat_question(prompt: object, chosen: object, rejected: object) -> bool:
    """Whether two answers in text begin with the prompt and go on; few words may be an answer's own."""
    if not isinstance(prompt, str) or len(prompt.split()) < FEW_WORDS:
        return False
    question = prompt.strip()
    answers = [answer.strip() if isinstance(answer, str) else "" for answer in (chosen, rejected)]
    return all(answer.startswith(question) and answer[len(question) :][:1].isspace() for answer in answers)


def _without_question(prompt: str, answer: str) -> str:
    rest = answer.strip().removeprefix(prompt.strip())
    return rest.lstrip("\n") if rest.startswith("\n") else rest.lstrip()


def _require_text_or_messages(value: object, what: str) -> None:
    if not isinstance(value, str | list | Mapping):
        raise UnusableRow(f"{what} is {kind_of(value)}, and neither text nor messages")


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
        for place, message in enumerate(side):
            if message["content"].strip() or "tool_calls" in message:
                continue
            if message["role"] == "assistant" and place >= alike:
                raise UnusableRow(EMPTY_ANSWER)
            if message["role"] in ("user", "assistant") and not thoughts_in(message):
                raise UnusableRow(f"a message of the {message['role']} says nothing")


def thoughts_in(message: Message) -> list[str]:
    """The keys under which a message has thoughts."""
    return [key for key in THOUGHTS if str(message.get(key) or "").strip()]


def _prompt_and_tools(row: Mapping[str, object], columns: Columns) -> tuple[str, object, list[object] | None]:
    """The prompt's column, the prompt as the row gives it, and the tools that the model may call."""
    column, prompt = columns.find(row, "prompt")
    prompt = decode_messages(as_json(prompt))
    tools = value_of(row, "tools") or _functions_as_tools(value_of(row, "functions"))
    if isinstance(prompt, Mapping) and "messages" in prompt:
        tools = prompt.get("tools") or tools
    if isinstance(prompt, str):
        is_task = columns.prompt == AUTO and column.lower() in TASKS
        prompt = _after_history(_with_material(prompt, row) if is_task else prompt, row, is_task)
    tools = parse_json(tools)
    if not tools or is_blank(tools):
        return column, prompt, None
    if not isinstance(tools, list):
        raise UnusableRow("the tools are not a list")
    return column, prompt, [parse_json(tool) for tool in tools]


def _functions_as_tools(functions: object) -> object:
    """What OpenAI called functions as the tools that it has today, in which the description of a function stands."""
    functions = parse_json(functions)
    described = [parse_json(function) for function in functions] if isinstance(functions, list) else []
    if not all(isinstance(function, Mapping) and "name" in function for function in described):
        return None
    return [{"type": "function", "function": function} for function in described]


def _with_material(task: str, row: Mapping[str, object]) -> str:
    """A task in Alpaca's format with its input, unless that is in it already."""
    material = value_of(row, "input")
    if not isinstance(material, str) or not material.strip():
        return task
    own = material.strip()
    is_there = f"\n{own}\n" in f"\n{task.strip()}\n" or (own in task and len(own.split()) >= FEW_WORDS)
    return task if is_there else f"{task}\n{material}"


def _after_history(question: str, row: Mapping[str, object], is_task: bool) -> object:
    """A question behind the earlier ones and their answers, where the row has a history of them.

    A column of that name that holds something else is a mistake beside a task, and nothing beside another prompt.
    """
    history = value_of(row, "history")
    if not history or not (is_history(history) or is_task):
        return question
    if not isinstance(history, list) or not is_history(history):
        raise UnusableRow("the history is not a list of questions with their answers")
    said = history
    if not isinstance(history[0], Mapping):
        turns = [text for turn in history for text in turn]
        said = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]
    before, asked = parse_messages(said), _prompt_messages(question)
    return [*(before[:-1] if before and asked and same_message(before[-1], asked[0]) else before), *asked]


def _template_kwargs(row: Mapping[str, object]) -> dict[str, object]:
    values = parse_json(value_of(row, "chat_template_kwargs")) or {}
    if not isinstance(values, dict):
        raise UnusableRow("the chat_template_kwargs are not an object")
    return values


def _prompt_messages(prompt: object) -> list[Message]:
    if prompt is None or is_blank(prompt):
        return []
    if not isinstance(prompt, str):
        _require_text_or_messages(prompt, "the prompt")
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
    if is_null(system) or is_blank(system):
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

"""Render a conversation with the chat template, and locate the answers in the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from mlx_cpo_plugin.data.messages import Message, UnusableRow, shared_messages, split_system
from mlx_cpo_plugin.data.rows import EMPTY_ANSWER, Conversation
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer, common_start

# A private-use character, which no template contains: it marks where the content of a message is rendered.
_STAND_IN = "\ue000"

# Shorter texts may be a template's own words.
_TELLING = 12

NOT_LOCATED = "the chat template does not show where an answer starts and ends"


class Span(NamedTuple):
    """The characters of one answer.

    Attributes:
        start: where generation would start.
        said_until: the end of its own text and calls.
        end: the end of the turn, or of its content if ``holds_turn_end`` is false.
    """

    start: int
    said_until: int
    end: int
    holds_turn_end: bool = True


class Rendering(NamedTuple):
    """One side as text.

    Attributes:
        text: the whole conversation under the chat template.
        answers: where the answers are, the last one running to the end of the text.
        last_content: what the last answer says.
        fits: whether the text goes on from the generation prompt that is used at inference.
    """

    text: str
    answers: list[Span]
    last_content: str
    fits: bool


def render(row: Conversation, tokenizer: ChatTokenizer) -> tuple[Rendering, Rendering]:
    """Chosen and rejected side of ``row``; system messages join the user's where the template has no such role."""
    row = replace(row, chosen=_clean(row.chosen, tokenizer), rejected=_clean(row.rejected, tokenizer))
    failures = []
    for form in _system_forms(row):
        try:
            form = share_what_renders_alike(form, tokenizer)
            sides = _render_best(form, tokenizer)
            _check_shown(form, sides, tokenizer)
            return sides
        except UnusableRow as error:
            failures.append(error)
    raise failures[0]


def _clean(messages: list[Message], tokenizer: ChatTokenizer) -> list[Message]:
    """Messages without end tokens spelled out in answers: the template adds them."""
    cleaned = []
    for message in messages:
        if message["role"] == "assistant" and message["content"]:
            content, _ = tokenizer.without_end(message["content"])
            if not content.strip() and "tool_calls" not in message:
                raise UnusableRow(EMPTY_ANSWER)
            message = {**message, "content": content}
        cleaned.append(message)
    return cleaned


def _system_forms(row: Conversation) -> Iterator[Conversation]:
    """The row as it is, with its leading system messages merged, and with all of them folded into user messages."""
    yield row
    for keep_first in (True, False):
        chosen, rejected = _fold_system(row.chosen, keep_first), _fold_system(row.rejected, keep_first)
        if (chosen, rejected) != (row.chosen, row.rejected):
            yield replace(row, chosen=chosen, rejected=rejected, shared=shared_messages(chosen, rejected))


def _fold_system(messages: list[Message], keep_first: bool) -> list[Message]:
    """Move system messages into the next user message, or the previous one where none follows before the answer.

    With ``keep_first``, those at the beginning become one system message instead.
    """

    def joined(message: Message, *texts: str) -> Message:
        return {**message, "content": "\n\n".join(filter(str.strip, texts))}

    leading, rest = split_system(messages)
    folded: list[Message] = []
    waiting, last_user = [message["content"] for message in leading], None
    if keep_first and waiting:
        folded, waiting = [joined(leading[0], *waiting)], []
    for message in rest:
        if message["role"] == "system":
            waiting.append(message["content"])
            continue
        if message["role"] == "user":
            last_user = len(folded)
            message, waiting = joined(message, *waiting, message["content"]), []
        elif waiting and last_user is not None:
            folded[last_user] = joined(folded[last_user], folded[last_user]["content"], *waiting)
            waiting = []
        folded.append(message)
    return folded if not waiting else messages


def share_what_renders_alike(row: Conversation, tokenizer: ChatTokenizer) -> Conversation:
    """The row with messages counted as shared that differ only in what the template does not render."""
    variant = tokenizer.template_variants(row.template_kwargs)[0]
    chosen, rejected, shared = row.chosen, row.rejected, row.shared

    def alike(messages: list[Message], other: Message) -> bool:
        replaced = [*messages[:shared], other, *messages[shared + 1 :]]
        try:
            texts = [tokenizer.render(side, row.tools, False, variant) for side in (messages, replaced)]
        except UnusableRow:
            return False
        return tokenizer.reads_alike(*texts)

    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared]["role"] == rejected[shared]["role"]:
        if not alike(rejected, chosen[shared]) or not alike(chosen, rejected[shared]):
            break
        rejected = [*rejected[:shared], chosen[shared], *rejected[shared + 1 :]]
        shared = shared_messages(chosen, rejected)
    if shared == row.shared:
        return row
    return replace(row, rejected=rejected, shared=shared, partial="")


def _check_shown(row: Conversation, sides: tuple[Rendering, Rendering], tokenizer: ChatTokenizer) -> None:
    """Raise UnusableRow for what the template silently drops: an unknown role, a second system message, calls."""
    variant = tokenizer.template_variants(row.template_kwargs)[0]

    def missing(messages: list[Message], marked: Mapping[int, _Marked]) -> bool:
        others = [marked[i].message if i in marked else message for i, message in enumerate(messages)]
        text = tokenizer.render(others, row.tools, False, variant)
        return any(mark not in text for one in marked.values() for mark in one.marks)

    for messages, side, first in zip((row.chosen, row.rejected), sides, (0, row.shared), strict=True):
        marked = _marked(row, messages, side, first)
        with suppress(UnusableRow):  # a template may refuse some of the marks
            if not marked or not missing(messages, marked):
                continue
        for i, one in marked.items():
            try:
                is_missing = missing(messages, {i: one})
            except UnusableRow:
                continue  # a template that refuses the content has read it
            if is_missing:
                what = "the tool calls of a message" if one.is_call else f"a message of the role {messages[i]['role']}"
                raise UnusableRow(f"the chat template leaves out {what}")


class _Marked(NamedTuple):
    """A message with marks in place of what it says or calls."""

    message: Message
    marks: list[str]
    is_call: bool


def _marked(row: Conversation, messages: list[Message], side: Rendering, first: int) -> dict[int, _Marked]:
    """Return messages from ``first`` on of which the text of a side does not show by itself that they are in it."""
    written = "\0".join([str(row.tools), *(f"{one['content']}\0{one.get('tool_calls')}" for one in messages)])
    found = {}
    for i, message in enumerate(messages[first:], first):
        said, calls = message["content"].strip(), message.get("tool_calls", ())
        if calls:
            marks = [f"{_STAND_IN}{i}.{number}{_STAND_IN}" for number in range(len(calls))]
            named = [
                {**call, "function": {**call["function"], "name": mark}}
                for call, mark in zip(calls, marks, strict=True)
            ]
            found[i] = _Marked({**message, "tool_calls": named}, marks, True)
            continue
        # It is there if nothing else has put it there, and it is too long to be the template's own word.
        is_seen = len(said) >= _TELLING and said in side.text and written.count(said) == 1
        if said and message["role"] != "assistant" and not is_seen:
            mark = f"{_STAND_IN}{i}{_STAND_IN}"
            found[i] = _Marked({**message, "content": mark}, [mark], False)
    return found


def _render_best(row: Conversation, tokenizer: ChatTokenizer) -> tuple[Rendering, Rendering]:
    """Both sides under the template variant whose generation prompt fits and leaves the shortest answers."""
    found, failures = [], []
    for variant in tokenizer.template_variants(row.template_kwargs):
        try:
            found.append(_Renderer(row, tokenizer, variant).sides())
        except UnusableRow as error:
            failures.append(error)
    if not found:
        raise failures[-1]

    def quality(sides: tuple[Rendering, Rendering]) -> tuple[bool, int]:
        answers = sum(len(side.text) - side.answers[0].start for side in sides)
        return all(side.fits for side in sides), -answers

    return max(found, key=quality)


class _Renderer:
    """Renders one row under one template variant."""

    def __init__(self, row: Conversation, tokenizer: ChatTokenizer, variant: Mapping[str, object]) -> None:
        self._row, self._tokenizer, self._variant = row, tokenizer, variant

    def sides(self) -> tuple[Rendering, Rendering]:
        row = self._row
        sides = [(messages, self._text(messages)) for messages in (row.chosen, row.rejected)]
        first = None
        if all(messages[row.shared]["role"] == "assistant" for messages, _ in sides):
            # One prompt for both: the two answers are compared given the same context.
            first = self._partial_start(*sides) if row.partial else self._start(row.shared, *sides)
        return self._side(*sides[0], first), self._side(*sides[1], first)

    def _side(self, messages: list[Message], text: str, first: tuple[int, bool] | None) -> Rendering:
        answers, fits = [], True
        for i in range(self._row.shared, len(messages)):
            if messages[i]["role"] != "assistant":
                continue
            start, fitting = first if first and i == self._row.shared else self._start(i, (messages, text))
            fits = fits and fitting
            answers.append(self._answer(messages, i, text, start))
            _require_calls(messages[i], text[answers[-1].start : answers[-1].end])
        return Rendering(text, answers, messages[-1]["content"], fits)

    def _start(self, i: int, *sides: tuple[list[Message], str]) -> tuple[int, bool]:
        """Where generation of answer ``i`` starts in the texts of ``sides``, and whether behind a generation prompt.

        It is behind the longest generation prompt with which all texts begin. Where none fits, as one that opens a
        thinking block which an answer does not have, it is where the prompt and the texts part, or, if that is
        earlier or the turns before the answer read otherwise by themselves, where the answer's content starts.
        """
        messages, texts = sides[0][0][:i], [text for _, text in sides]
        prompts = self._generation_prompts(messages)
        fitting = [len(prompt) for prompt in prompts if all(text.startswith(prompt) for text in texts)]
        if fitting:
            return max(fitting), True
        contents = [self._content(messages, i, text)[0] for messages, text in sides]
        known = [start for start in contents if start is not None]
        parting = max((common_start([prompt, *texts]) for prompt in prompts), default=0)
        turns = self._text(messages) if prompts else ""
        if turns and parting >= len(turns) and all(text.startswith(turns) for text in texts):
            return min([parting, *known]), False
        if len(known) < len(sides):
            raise UnusableRow(NOT_LOCATED)
        return min(known), False

    def _partial_start(self, *sides: tuple[list[Message], str]) -> tuple[int, bool]:
        """The same for an answer whose beginning is part of the prompt."""
        row, texts = self._row, [text for _, text in sides]
        begun = [*row.chosen[: row.shared], {"role": "assistant", "content": row.partial}]
        prompt = self._tokenizer.render(begun, row.tools, False, self._variant, continue_final_message=True)
        if not all(text.startswith(prompt) for text in texts):
            raise UnusableRow(NOT_LOCATED)
        return len(prompt), True

    def _generation_prompts(self, messages: list[Message]) -> list[str]:
        """The generation prompt after ``messages`` under each variant; none where the template refuses them alone."""
        try:
            return [
                self._tokenizer.render(messages, self._row.tools, True, variant)
                for variant in self._tokenizer.template_variants(self._row.template_kwargs)
            ]
        except UnusableRow:
            return []

    def _answer(self, messages: list[Message], i: int, text: str, start: int) -> Span:
        """The span of answer ``i``, whose generation starts at ``start``."""
        if i == len(messages) - 1:
            return Span(start, self._said_until(messages, i, text, start, len(text)), len(text))
        turns = self._text(messages[: i + 1])
        # A thinking template drops the thoughts of earlier answers, so the turns alone may read otherwise.
        if len(turns) > start and text.startswith(turns):
            return Span(start, self._said_until(messages, i, text, start, len(turns)), len(turns))
        end, has_calls = self._content(messages, i, text)[1], "tool_calls" in messages[i]
        if has_calls:  # which come behind the content, and before the next message's
            _require_calls(messages[i], text[start:])
            stop = self._content(messages, i + 1, text)[0]
            end = None if stop is None else self._tokenizer.behind_first_end(text, end or start, stop)
        if end is None or end <= start:
            raise UnusableRow(NOT_LOCATED)
        return Span(start, self._said_until(messages, i, text, start, end), end, holds_turn_end=has_calls)

    def _said_until(self, messages: list[Message], i: int, text: str, start: int, stop: int) -> int:
        """Where the text and calls of answer ``i`` end, before ``stop``, as far as can be found."""
        said = messages[i]["content"]
        as_it_is = said.strip() and text.startswith(said, start)  # which saves a rendering
        ends = [start, start + len(said) if as_it_is else self._content(messages, i, text)[1] or start]
        for call in messages[i].get("tool_calls", ()):
            words = (call["function"]["name"], *_leaves(call["function"]["arguments"]))
            ends.extend(text.rfind(said, start, stop) + len(said) for said in words if said in text[start:stop])
        return max(ends)

    def _content(self, messages: list[Message], i: int, text: str) -> tuple[int | None, int | None]:
        """Start and end of message ``i``'s content: what changes when another content takes its place.

        Either is None where the template changes more than that, and both of an answer that says nothing, as it may.
        """
        if messages[i]["role"] == "assistant" and not messages[i]["content"].strip():
            return None, None
        other = self._text([*messages[:i], {**messages[i], "content": _STAND_IN}, *messages[i + 1 :]])
        before, found, rest = other.partition(_STAND_IN)
        if not found:
            return None, None
        after = rest.rpartition(_STAND_IN)[2]
        return (
            len(before) if text.startswith(before) else None,
            len(text) - len(after) if text.endswith(after) else None,
        )

    def _text(self, messages: list[Message]) -> str:
        return self._tokenizer.render(messages, self._row.tools, False, self._variant)


def _require_calls(message: Message, text: str) -> None:
    """Raise UnusableRow where a text lacks a call of an answer."""
    if any(call["function"]["name"] not in text for call in message.get("tool_calls", ())):
        raise UnusableRow("the chat template leaves out the tool calls of an answer")


def _leaves(value: object) -> list[str]:
    """The strings and numbers in a value, as text."""
    if isinstance(value, Mapping):
        return [leaf for field in value.values() for leaf in _leaves(field)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [str(value)] if isinstance(value, str | int | float) else []

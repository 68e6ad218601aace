"""A conversation to the chat template's text, and where each answer stands in that text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx_cpo_plugin.data.encoding import ChatTokenizer
from mlx_cpo_plugin.data.formats import EMPTY_ANSWER, Conversation, Message, UnusableRow, shared_messages

# A private-use character, which no template knows: it shows where the content of a message is rendered.
_STAND_IN = "\ue000"

NOT_LOCATED = "the chat template does not show where an answer starts and ends"
CALL_LEFT_OUT = "the chat template leaves out the tool calls of an answer"


@dataclass(frozen=True)
class Span:
    """Characters ``start`` to ``end`` of a text, which hold one answer.

    ``start`` is where generation would start, ``end`` the end of the turn, or of its content where
    ``holds_turn_end`` is false.
    """

    start: int
    end: int
    holds_turn_end: bool = True


@dataclass(frozen=True)
class Rendering:
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


@dataclass(frozen=True)
class _Start:
    """Where generation starts, and whether a whole generation prompt stands before it."""

    character: int
    fits: bool


def render(row: Conversation, tokenizer: ChatTokenizer) -> tuple[Rendering, Rendering]:
    """Chosen and rejected side of ``row``; a system message joins the user's where the template has no such role.

    Raises:
        UnusableRow: the template refuses the messages, or an answer is empty or cannot be found in the text.
    """
    row = replace(row, chosen=_clean(row.chosen, tokenizer), rejected=_clean(row.rejected, tokenizer))
    try:
        return _render_best(row, tokenizer)
    except UnusableRow:
        folded = _fold_system(row)
        if folded is None:
            raise
        return _render_best(folded, tokenizer)


def _clean(messages: list[Message], tokenizer: ChatTokenizer) -> list[Message]:
    """Messages whose answers do not spell out the end token, which the template adds anyway."""
    cleaned = []
    for message in messages:
        if message["role"] == "assistant" and message["content"]:
            content, _ = tokenizer.without_end(message["content"])
            if not content.strip() and "tool_calls" not in message:
                raise UnusableRow(EMPTY_ANSWER)
            message = {**message, "content": content}
        cleaned.append(message)
    return cleaned


def _fold_system(row: Conversation) -> Conversation | None:
    """The row with its system message at the beginning of the first user message; None where it has none."""

    def fold(messages: list[Message]) -> list[Message]:
        user = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
        if messages[0]["role"] != "system" or user is None:
            return messages
        content = f"{messages[0]['content']}\n\n{messages[user]['content']}"
        return [*messages[1:user], {**messages[user], "content": content}, *messages[user + 1 :]]

    chosen, rejected = fold(row.chosen), fold(row.rejected)
    if chosen is row.chosen and rejected is row.rejected:
        return None
    return replace(row, chosen=chosen, rejected=rejected, shared=shared_messages(chosen, rejected))


def _render_best(row: Conversation, tokenizer: ChatTokenizer) -> tuple[Rendering, Rendering]:
    """Both sides under the template variant whose generation prompt fits and leaves least to the answers."""
    best: tuple[Rendering, Rendering] | None = None
    failure = UnusableRow(NOT_LOCATED)
    for variant in tokenizer.template_variants:
        try:
            sides = _Renderer(row, tokenizer, variant).sides()
        except UnusableRow as error:
            failure = error
            continue
        if best is None or _preference(sides) > _preference(best):
            best = sides
    if best is None:
        raise failure
    return best


def _preference(sides: tuple[Rendering, Rendering]) -> tuple[bool, int]:
    left_to_answers = sum(len(side.text) - side.answers[0].start for side in sides)
    return all(side.fits for side in sides), -left_to_answers


class _Renderer:
    """Renders one row under one template variant."""

    def __init__(self, row: Conversation, tokenizer: ChatTokenizer, variant: Mapping[str, Any]) -> None:
        self._row, self._tokenizer, self._variant = row, tokenizer, variant

    def sides(self) -> tuple[Rendering, Rendering]:
        row = self._row
        sides = [(messages, self._text(messages)) for messages in (row.chosen, row.rejected)]
        first = None
        if all(messages[row.shared]["role"] == "assistant" for messages, _ in sides):
            # One prompt for both: the two answers are compared given the same context.
            first = self._start(row.shared, *sides)
        return self._side(*sides[0], first), self._side(*sides[1], first)

    def _side(self, messages: list[Message], text: str, first: _Start | None) -> Rendering:
        answers, fits = [], True
        for i in range(self._row.shared, len(messages)):
            if messages[i]["role"] != "assistant":
                continue
            start = first if first and i == self._row.shared else self._start(i, (messages, text))
            fits = fits and start.fits
            answer = self._answer(messages, i, text, start.character)
            for call in messages[i].get("tool_calls", ()):
                if call["function"]["name"] not in text[answer.start : answer.end]:
                    raise UnusableRow(CALL_LEFT_OUT)
            answers.append(answer)
        return Rendering(text, answers, messages[-1]["content"], fits)

    def _start(self, i: int, *sides: tuple[list[Message], str]) -> _Start:
        """Where generation of answer ``i`` starts in the texts of ``sides``, which agree up to there.

        It is behind the longest generation prompt with which all texts begin. Where none fits, as one that opens a
        thinking block which an answer does not have, it is where the prompt and the texts part, or, if that is
        earlier or the turns before the answer read otherwise by themselves, where the answer's content starts.
        """
        messages, texts = sides[0][0][:i], [text for _, text in sides]
        prompts = self._generation_prompts(messages)
        fitting = [len(prompt) for prompt in prompts if all(text.startswith(prompt) for text in texts)]
        if fitting:
            return _Start(max(fitting), True)
        contents = [self._content(messages, i, text)[0] for messages, text in sides]
        known = [start for start in contents if start is not None]
        parting = max((_shared_start([prompt, *texts]) for prompt in prompts), default=0)
        turns = self._text(messages) if prompts else ""
        if turns and parting >= len(turns) and all(text.startswith(turns) for text in texts):
            return _Start(min([parting, *known]), False)
        if len(known) < len(sides):
            raise UnusableRow(NOT_LOCATED)
        return _Start(min(known), False)

    def _generation_prompts(self, messages: list[Message]) -> list[str]:
        """The generation prompt after ``messages`` under each variant; none where the template refuses them alone."""
        try:
            return [
                self._tokenizer.render(messages, self._row.tools, True, variant)
                for variant in self._tokenizer.template_variants
            ]
        except UnusableRow:
            return []

    def _answer(self, messages: list[Message], i: int, text: str, start: int) -> Span:
        """Where answer ``i`` stands, whose generation starts at ``start``."""
        if i == len(messages) - 1:
            return Span(start, len(text))
        turns = self._text(messages[: i + 1])
        # A thinking template drops the thoughts of earlier answers, so the turns alone may read otherwise.
        if len(turns) > start and text.startswith(turns):
            return Span(start, len(turns))
        end = self._content(messages, i, text)[1]
        if end is None or end <= start:
            raise UnusableRow(NOT_LOCATED)
        return Span(start, end, holds_turn_end=False)

    def _content(self, messages: list[Message], i: int, text: str) -> tuple[int | None, int | None]:
        """Start and end of message ``i``'s content: what changes when another content takes its place.

        Either is None where the template changes more than that.
        """
        if not messages[i]["content"].strip():
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


def _shared_start(texts: list[str]) -> int:
    """How many leading characters all ``texts`` have in common."""
    first, last = min(texts), max(texts)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))

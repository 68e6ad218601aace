"""Wrap a tokenizer with what data needs: its chat template, tokens with their offsets, and special tokens."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.data.chat_template import STARTED, WithThinking, is_fallback, read_template, time_held_at
from mlx_cpo_plugin.data.columns import DataSettings
from mlx_cpo_plugin.data.messages import Message, UnusableRow, with_written_arguments
from mlx_cpo_plugin.errors import printable
from mlx_cpo_plugin.types import Tokenizer, Values

TokenIds = NDArray[np.int32]

# Varied text, which two versions of a tokenizer are unlikely to encode alike.
_QUESTION = "Zwölf?"
_SAMPLE = "The quick brown fox, 3.14 and 2026: Zwölf Boxkämpfer, съешь, 敏捷的棕色狐狸 🦊\n\tdef f(x):\n"
# Text that a tokenizer which rewrites its input encodes differently when asked for offsets.
_PROBE = "a b\n<n>\n\nc"
# What templates put around messages, e.g. <|im_start|>, <start_of_turn>, [INST], also where it is no special token.
_CONTROL = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


@dataclass(frozen=True)
class EncodedText:
    """Token ids of a text and their offsets.

    Attributes:
        ids: int32 [T].
        starts, ends: int [T], the first character of each token and the one behind its last; None for tokenizers
            without offsets. Where a tokenizer composes characters, some may lie between two tokens.
    """

    text: str
    ids: TokenIds
    starts: NDArray[np.int64] | None
    ends: NDArray[np.int64] | None
    tokenizer: ChatTokenizer

    def tokens_before(self, character: int) -> int:
        """How many tokens lie entirely in the first ``character`` characters."""
        if self.ends is not None:
            return int(np.searchsorted(self.ends, character, side="right"))
        return common_prefix(self.ids, self.tokenizer.encode(self.text[:character]).ids)

    def tokens_covering(self, character: int) -> int:
        """How many tokens it takes to cover the first ``character`` characters."""
        if self.starts is not None:
            return int(np.searchsorted(self.starts, character, side="left"))
        alone = self.tokenizer.encode(self.text[:character]).ids
        whole = common_prefix(self.ids, alone)
        return whole if whole == len(alone) else whole + 1


class ChatTokenizer:
    """Renders and tokenises conversations with mlx-lm's tokenizer wrapper, or the tokenizer inside it.

    Attributes:
        bos_id, eos_id: the tokenizer's own; None where it has none.
        end_ids: the tokens that end generation.
        special_ids: the tokens that can close a turn: ``end_ids`` and every other special one but BOS and unknown.
        always_opens_answer: whether the template ends with the header of the next answer even where none is asked for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, object] | None = None,
        now: datetime | None = None,
    ) -> None:
        wrapper: Any = tokenizer if hasattr(type(tokenizer), "eos_token_ids") else None
        self._inner: Tokenizer = tokenizer if wrapper is None else wrapper._tokenizer
        self.bos_id: int | None = self._inner.bos_token_id
        self.eos_id: int | None = self._inner.eos_token_id
        ends = {self.eos_id, *(() if wrapper is None else wrapper.eos_token_ids)}
        self.end_ids = frozenset(end for end in ends if end is not None)
        added = getattr(self._inner, "added_tokens_decoder", {})
        special = {token_id for token_id, token in added.items() if getattr(token, "special", False)}
        special = (special | set(self._inner.all_special_ids)) - {self.bos_id, self._inner.unk_token_id}
        self.special_ids: frozenset[int] = frozenset(special) | self.end_ids
        self._end_ids = {str(self._inner.convert_ids_to_tokens(end)): end for end in sorted(self.end_ids)}
        fast = bool(getattr(self._inner, "is_fast", False))
        # The model's own longest sequence is warned of otherwise, whatever is cut afterwards.
        self._quietly: dict[str, object] = {"verbose": False} if fast else {}
        self._has_offsets = fast and (
            self._inner(_PROBE, add_special_tokens=False)["input_ids"]
            == self._inner.encode(_PROBE, add_special_tokens=False)
        )

        own = getattr(self._inner, "chat_template", None)
        self.has_chat_template = bool(getattr(tokenizer, "has_chat_template", False) or own or chat_template)
        self._thinks = getattr(tokenizer, "has_thinking", False) or "enable_thinking" in str(chat_template or own)
        self._thinking_keys = {"enable_thinking", getattr(tokenizer, "_thinking_kwarg", "enable_thinking")}
        self._template_kwargs = dict(template_kwargs or {})
        self._now = now or STARTED
        # A template of Python code in the wrapper would go before the one that is given.
        by_code = chat_template and getattr(tokenizer, "_chat_template", None) is not None
        self._renders: Tokenizer | WithThinking = self._inner if by_code else tokenizer
        self._given_template = {"chat_template": chat_template} if chat_template else {}
        # mlx-lm puts the tokenizer's BOS before the prompts of a model without a template.
        starts_with_bos = self.bos_id is not None and self._inner.encode("a")[:1] == [self.bos_id]
        self._puts_bos = not chat_template and starts_with_bos and is_fallback(own)
        self.always_opens_answer = self.has_chat_template and self._always_opens_answer()
        self._control = self._control_pattern()

    def portable(self) -> ChatTokenizer | None:
        """A copy that another process can use without mlx-lm; None where Python code from elsewhere takes part."""
        if not (type(self._inner).__module__.startswith("transformers.") and getattr(self._inner, "is_fast", False)):
            return None
        copied = copy.copy(self)
        if self._renders is not self._inner:
            if self._renders_by_code():
                return None
            thinking_key = getattr(self._renders, "_thinking_kwarg", "enable_thinking")
            copied._renders = WithThinking(
                self._inner, thinking_key, bool(getattr(self._renders, "has_thinking", False))
            )
        return copied

    @classmethod
    def from_settings(cls, tokenizer: Tokenizer, settings: DataSettings) -> ChatTokenizer:
        """The tokenizer under the chat template and its arguments of a run, at the time when the run began."""
        return cls(tokenizer, read_template(settings.chat_template), settings.chat_template_kwargs, settings.begun)

    def template_variants(self, row_kwargs: Mapping[str, object] | None = None) -> tuple[Mapping[str, object], ...]:
        """Template arguments to try, a row's own first: thinking templates are told when an answer has no thoughts."""
        kwargs = {**self._template_kwargs, **(row_kwargs or {})}
        if not self._thinks or self._thinking_keys & set(kwargs):
            return (kwargs,)
        return kwargs, {**kwargs, "enable_thinking": False}

    def may_write(self, key: str) -> bool:
        """Whether the chat template may write what messages have under a key; one of Python code may."""
        template = str(self._given_template or getattr(self._inner, "chat_template", None))
        return self._renders_by_code() or re.search(rf"(?<!\w){key}(?!\w)", template) is not None

    def _renders_by_code(self) -> bool:
        """Whether mlx-lm's wrapper has a template of Python code, and renders."""
        return self._renders is not self._inner and getattr(self._renders, "_chat_template", None) is not None

    def variant_of(self, prompt: Sequence[int] | TokenIds) -> Values:
        """Return the template arguments that a tokenised prompt was rendered with, by what stands around its text.

        They are as JSON has them, so that they can be written down: a date of YAML is a string.
        """
        question: Message = {"role": "user", "content": _QUESTION}
        text = self.decode(prompt)

        def likeness(variant: Mapping[str, object]) -> int:
            with suppress(UnusableRow):
                before, _, after = self.render([question], None, True, variant).rpartition(_QUESTION)
                return 2 * text.endswith(after) + text.startswith(before)
            return 0

        arguments: Values = json.loads(json.dumps(max(self.template_variants(), key=likeness), default=str))
        return arguments

    def render(
        self,
        messages: Sequence[Message],
        tools: list[object] | None,
        add_generation_prompt: bool = False,
        variant: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> str:
        """The text of ``messages`` under the chat template; UnusableRow where there is none or it refuses them.

        A template that refuses the arguments of calls as objects gets them as JSON.
        """
        if not self.has_chat_template:
            raise UnusableRow("the tokenizer has no chat template")
        kwargs = {**self._given_template, **(variant or {}), **kwargs}
        try:
            return self._rendered(messages, tools, add_generation_prompt, kwargs)
        except UnusableRow:
            written = with_written_arguments(messages)
            if written == list(messages):
                raise
        return self._rendered(written, tools, add_generation_prompt, kwargs)

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: list[object] | None,
        add_generation_prompt: bool,
        kwargs: Mapping[str, object],
    ) -> str:
        try:
            # Templates are code from elsewhere: they may change what they are given, and raise anything.
            with time_held_at(self._now):
                return str(
                    self._renders.apply_chat_template(
                        [dict(message) for message in messages],
                        tools=tools,
                        tokenize=False,
                        add_generation_prompt=add_generation_prompt,
                        **kwargs,
                    )
                )
        except Exception as error:
            words = printable(" ".join(str(error).split())) or type(error).__name__
            raise UnusableRow(f"the chat template refuses the messages ({words[:120]})") from error

    def identity(self) -> str | None:
        """All that its tokens depend on; None where Python code from elsewhere takes part."""
        portable = self.portable()
        if portable is None:
            return None
        derived, inner = ("_inner", "_renders", "_now", "_control"), cast(Any, self._inner)
        template = str(self._given_template or inner.chat_template)
        parts = (
            inner.backend_tokenizer.to_str(),
            type(inner).__name__,
            inner.special_tokens_map,
            template,
            [sorted(x) if isinstance(x, frozenset) else x for name, x in vars(portable).items() if name not in derived],
            portable._renders[1:] if isinstance(portable._renders, WithThinking) else (),
            self._now if "strftime_now" in template else None,
        )
        return repr(parts)

    def digest(self) -> str:
        """A fingerprint of this tokenizer and its template."""
        parts = (
            type(self._inner).__name__,
            len(self._inner),
            self._inner.special_tokens_map,
            self._given_template or getattr(self._inner, "chat_template", None),
            self._template_kwargs,
            self._inner.encode(_SAMPLE),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def encode(self, text: str) -> EncodedText:
        """Tokens of rendered text; the template has put the special tokens in, so none are added."""
        _check_unicode(text)
        if self._has_offsets:
            encoding = self._inner(text, add_special_tokens=False, return_offsets_mapping=True, **self._quietly)
            ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        else:
            ids, offsets = self._inner.encode(text, add_special_tokens=False, **self._quietly), None
        if self._puts_bos and ids[:1] != [self.bos_id]:
            ids, offsets = [self.bos_id, *ids], None if offsets is None else [(0, 0), *offsets]
        if offsets is None:
            return EncodedText(text, as_ids(ids), None, None, self)
        # Tokens of one character's bytes share its place; a token without text gets that of the one before.
        starts, ends = np.maximum.accumulate(np.array(offsets, dtype=np.int64).reshape(-1, 2)).T
        return EncodedText(text, as_ids(ids), starts, ends, self)

    def reads_alike(self, first: str, second: str) -> bool:
        """Whether two texts have the same tokens, which different Unicode forms may have."""
        if first == second or unicodedata.normalize("NFC", first) != unicodedata.normalize("NFC", second):
            return first == second
        return np.array_equal(self.encode(first).ids, self.encode(second).ids)

    def without_first_tokens(self, text: str, count: int) -> str:
        """``text`` without its first ``count`` tokens, one character at least."""
        encoded = self.encode(text)
        count = min(count, len(encoded.ids))
        if encoded.ends is None or not count:
            return text[max(1, math.ceil(len(text) * count / max(1, len(encoded.ids)))) :]
        return text[max(1, int(encoded.ends[count - 1])) :]

    def encode_plain(self, text: str) -> TokenIds:
        """Tokens of text that has no template: the tokenizer's BOS once in front, no end token."""
        _check_unicode(text)
        ids = list(self._inner.encode(text, **self._quietly))
        while len(ids) > 1 and ids[0] == ids[1] == self.bos_id:
            del ids[0]
        while ids and ids[-1] in self.end_ids:
            ids.pop()
        return as_ids(ids)

    def without_end(self, text: str) -> tuple[str, int | None]:
        """``text`` without the end tokens spelled out at its end, and the first of them (None where there are none)."""
        end_id, kept = None, len(text)
        while True:
            stop = kept
            while stop and text[stop - 1].isspace():
                stop -= 1
            spelled = next((end for end in self._end_ids if end and text.endswith(end, 0, stop)), None)
            if spelled is None:
                return text[:kept], end_id
            kept, end_id = stop - len(spelled), self._end_ids[spelled]

    def behind_first_end(self, text: str, start: int, stop: int) -> int | None:
        """Return where the first end token that is spelled out between two places of ``text`` ends, if there is one."""
        places = {end: text.find(end, start, stop) for end in self._end_ids if end}
        return min((place + len(end) for end, place in places.items() if place >= 0), default=None)

    def control_text(self, text: str) -> str:
        """The first special token, or what the template puts around a message, that ``text`` spells out; or empty."""
        found = self._control.search(text) if self._control is not None else None
        return found.group() if found else ""

    def _control_pattern(self) -> re.Pattern[str] | None:
        special = {str(self._inner.convert_ids_to_tokens(token)) for token in self.special_ids}
        if self.bos_id is not None:
            special.add(str(self._inner.convert_ids_to_tokens(self.bos_id)))
        try:
            question = {"role": "user", "content": "x"}
            special.update(_CONTROL.findall(self.render([question], None, False, self.template_variants()[0])))
        except UnusableRow:
            pass
        special.discard("")
        return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))) if special else None

    def decode(self, ids: Sequence[int] | TokenIds) -> str:
        """Text of ``ids``, special tokens included."""
        return str(self._inner.decode([int(token_id) for token_id in ids], skip_special_tokens=False))

    def readable(self, ids: Sequence[int] | TokenIds) -> str:
        """Text of ``ids`` in one line, without special tokens and what the template puts around messages."""
        return " ".join(self.without_control(self.decode(ids), " ").split())

    def without_control(self, text: str, replacement: str = "") -> str:
        """``text`` without special tokens and what the template puts around messages; roles stay."""
        return text if self._control is None else self._control.sub(replacement, text)

    def _always_opens_answer(self) -> bool:
        question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
        try:
            kwargs = self.template_variants()[0]
            asked = self.render([question], None, True, kwargs)
            texts = [self.render(messages, None, False, kwargs) for messages in ([question], [question, answer])]
        except UnusableRow:
            return False
        ending = common_start([text[::-1] for text in texts])
        return asked == texts[0] and bool(texts[0][len(texts[0]) - ending :].strip())


def _check_unicode(text: str) -> None:
    """Raise UnusableRow for lone surrogates, which JSON can spell but no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UnusableRow("the text holds half of a character (a lone surrogate)") from None


def as_ids(ids: object) -> TokenIds:
    """``ids`` as int32 [T]."""
    return np.asarray(ids, dtype=np.int32).reshape(-1)


def common_prefix(first: TokenIds, second: TokenIds) -> int:
    """How many leading tokens both share."""
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size


def common_start(texts: Sequence[str]) -> int:
    """How many leading characters all ``texts`` have in common."""
    return len(os.path.commonprefix(list(texts)))  # noqa: RUF071 - characters are meant, not parts of paths

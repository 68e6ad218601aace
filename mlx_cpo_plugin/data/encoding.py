"""A tokenizer as the data needs it: template text, token ids with their place in the text, and special tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.data.formats import Message, UnusableRow
from mlx_cpo_plugin.wording import printable

TokenIds = NDArray[np.int32]

# Text that a tokenizer which rewrites its input would encode differently when asked for offsets.
_PROBE = "a b\n<n>\n\nc"


@dataclass(frozen=True)
class EncodedText:
    """Token ids of a text, and where each token ends in it.

    Attributes:
        text: what was encoded.
        ids: int32 [T].
        ends: int [T], the character after each token; None for tokenizers that cannot tell.
    """

    text: str
    ids: TokenIds
    ends: NDArray[np.int64] | None
    tokenizer: ChatTokenizer

    def tokens_before(self, character: int) -> int:
        """How many tokens lie wholly in the first ``character`` characters."""
        if self.ends is not None:
            return int(np.searchsorted(self.ends, character, side="right"))
        return common_prefix(self.ids, self.tokenizer.encode(self.text[:character]).ids)

    def tokens_covering(self, character: int) -> int:
        """How many tokens it takes to hold the first ``character`` characters."""
        if self.ends is not None:
            whole = self.tokens_before(character)
            return whole if whole and self.ends[whole - 1] >= character else whole + 1
        alone = self.tokenizer.encode(self.text[:character]).ids
        whole = common_prefix(self.ids, alone)
        return whole if whole == len(alone) else whole + 1


class ChatTokenizer:
    """What turns conversations into tokens: mlx-lm's tokenizer wrapper, or the tokenizer inside it.

    Attributes:
        bos_id, eos_id: the tokenizer's own; None where it has none.
        end_ids: the tokens that end generation.
        special_ids: the tokens that can close a turn: ``end_ids`` and every other special one but BOS and unknown.
        template_variants: template arguments to try; thinking templates need to be told when an answer has no thoughts.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        wrapped = hasattr(type(tokenizer), "eos_token_ids")
        self._inner = tokenizer._tokenizer if wrapped else tokenizer
        self.bos_id: int | None = self._inner.bos_token_id
        self.eos_id: int | None = self._inner.eos_token_id
        ends = set(tokenizer.eos_token_ids) if wrapped else set()
        self.end_ids: frozenset[int] = frozenset(ends | ({self.eos_id} if self.eos_id is not None else set()))
        added = getattr(self._inner, "added_tokens_decoder", {})
        special = {token_id for token_id, token in added.items() if getattr(token, "special", False)}
        special = (special | set(self._inner.all_special_ids)) - {self.bos_id, self._inner.unk_token_id}
        self.special_ids: frozenset[int] = frozenset(special) | self.end_ids
        self._end_texts = [str(self._inner.convert_ids_to_tokens(token_id)) for token_id in sorted(self.end_ids)]
        self._end_id_of = dict(zip(self._end_texts, sorted(self.end_ids), strict=True))
        template = getattr(self._inner, "chat_template", None)
        self.has_chat_template = bool(getattr(tokenizer, "has_chat_template", False) or template)
        thinking = getattr(tokenizer, "has_thinking", False) or "enable_thinking" in str(template)
        self.template_variants: tuple[Mapping[str, Any], ...] = ({}, {"enable_thinking": False}) if thinking else ({},)
        self._has_offsets = self._can_give_offsets()

    def render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        add_generation_prompt: bool = False,
        variant: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of ``messages`` under the chat template.

        Raises:
            UnusableRow: the template refuses the messages.
        """
        if not self.has_chat_template:
            raise UnusableRow("the tokenizer has no chat template")
        try:
            # Templates are code from elsewhere: they may change what they are given, and raise anything.
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(variant or {}),
            )
        except Exception as error:
            words = printable(" ".join(str(error).split())) or type(error).__name__
            raise UnusableRow(f"the chat template refuses the messages ({words[:120]})") from error

    def encode(self, text: str) -> EncodedText:
        """Tokens of rendered text; the template has put the special tokens in, so none are added.

        Raises:
            UnusableRow: the text is not Unicode.
        """
        _check_unicode(text)
        if self._has_offsets:
            encoding = self._inner(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ends = np.fromiter((end for _, end in encoding["offset_mapping"]), dtype=np.int64)
            # Tokens of one character's bytes share its end; a token without text gets that of the one before.
            return EncodedText(text, as_ids(encoding["input_ids"]), np.maximum.accumulate(ends), self)
        return EncodedText(text, as_ids(self._inner.encode(text, add_special_tokens=False)), None, self)

    def encode_plain(self, text: str) -> TokenIds:
        """Tokens of text that has no template: the tokenizer's BOS once in front, no end token.

        Raises:
            UnusableRow: the text is not Unicode.
        """
        _check_unicode(text)
        ids = list(self._inner.encode(text))
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
            spelled = next((end for end in self._end_texts if end and text.endswith(end, 0, stop)), None)
            if spelled is None:
                return text[:kept], end_id
            kept, end_id = stop - len(spelled), self._end_id_of[spelled]

    def is_blank(self, token_id: int) -> bool:
        """Whether a token is only white space."""
        return not self.decode([token_id]).strip()

    def decode(self, ids: Sequence[int] | TokenIds) -> str:
        """Text of ``ids``, special tokens included."""
        return str(self._inner.decode([int(token_id) for token_id in ids], skip_special_tokens=False))

    def _can_give_offsets(self) -> bool:
        if not getattr(self._inner, "is_fast", False):
            return False
        return self._inner(_PROBE, add_special_tokens=False)["input_ids"] == self._inner.encode(
            _PROBE, add_special_tokens=False
        )


def _check_unicode(text: str) -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UnusableRow("the text holds half of a character (a lone surrogate)") from None


def as_ids(ids: Any) -> TokenIds:
    """``ids`` as int32 [T]."""
    return np.asarray(ids, dtype=np.int32).reshape(-1)


def common_prefix(first: TokenIds, second: TokenIds, limit: int | None = None) -> int:
    """How many leading tokens both share, ``limit`` at most."""
    size = min(len(first), len(second)) if limit is None else min(len(first), len(second), limit)
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size

"""Rows to token pairs: what is prompt, what is answer, and which tokens are scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.data.encoding import ChatTokenizer, EncodedText, TokenIds, as_ids, common_prefix
from mlx_cpo_plugin.data.formats import (
    EMPTY_ANSWER,
    IDENTICAL,
    Columns,
    Conversation,
    PlainText,
    parse_row,
)
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.rendering import Rendering, render

NOTHING_BEFORE = "nothing stands before the answers, and the tokenizer has neither a BOS nor an EOS token"
NOTHING_SCORED = "no token of an answer is left to score"


@dataclass(frozen=True)
class Side:
    """One answer with everything before it.

    Attributes:
        ids: int32 [T].
        scored: bool [T].
    """

    ids: TokenIds
    scored: NDArray[np.bool_]


def tokenize(row: Conversation | PlainText, tokenizer: ChatTokenizer, source: str = "") -> PreferencePair:
    """Turn one row into a pair in which exactly the answers' own tokens, end token included, are scored.

    Where a token holds both the last characters of the prompt and the first of an answer, it is scored: the prompt
    then ends one token earlier for both sides. Where the sides share no token at all, BOS (else EOS) is the prompt.

    Raises:
        UnusableRow: an answer is empty, both are the same, or the chat template does not take the messages.
    """
    if isinstance(row, PlainText):
        chosen, rejected = _tokenize_texts(row, tokenizer)
    else:
        chosen, rejected = (_tokenize_side(side, tokenizer) for side in render(row, tokenizer))
    if np.array_equal(chosen.ids, rejected.ids):
        raise UnusableRow(IDENTICAL)
    if chosen.ids[0] != rejected.ids[0] or chosen.scored[0] or rejected.scored[0]:
        context = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if context is None:
            raise UnusableRow(NOTHING_BEFORE)
        chosen, rejected = (
            Side(np.append(as_ids([context]), side.ids), np.append(False, side.scored)) for side in (chosen, rejected)
        )
    return split_pair(chosen, rejected, source)


def prompt_tokens(text: str, tokenizer: ChatTokenizer) -> TokenIds:
    """Return the tokens, int32 [P], behind which a model answers ``text``: those of a row with that prompt.

    Raises:
        UnusableRow: the text is blank, or the chat template does not take it.
    """
    # Two answers that share nothing: what both sides have in common is then the prompt.
    row = parse_row({"prompt": text, "chosen": "A", "rejected": "B"}, Columns())
    return tokenize(row, tokenizer).prompt


def split_pair(chosen: Side, rejected: Side, source: str = "") -> PreferencePair:
    """Split two sides into their shared prompt and what follows it; scored tokens are never part of the prompt.

    Raises:
        UnusableRow: a side has no scored token, both are the same, or no unscored token opens both.
    """
    if not chosen.scored.any() or not rejected.scored.any():
        raise UnusableRow(NOTHING_SCORED)
    if np.array_equal(chosen.ids, rejected.ids):
        raise UnusableRow(IDENTICAL)
    first_scored = min(int(np.argmax(side.scored)) for side in (chosen, rejected))
    size = common_prefix(chosen.ids, rejected.ids, first_scored)
    if not size:
        raise UnusableRow(NOTHING_BEFORE)
    return PreferencePair(
        prompt=chosen.ids[:size],
        chosen=chosen.ids[size:],
        rejected=rejected.ids[size:],
        chosen_scored=chosen.scored[size:],
        rejected_scored=rejected.scored[size:],
        source=source,
    )


def _tokenize_texts(row: PlainText, tokenizer: ChatTokenizer) -> tuple[Side, Side]:
    """Both texts as they stand; what they share as tokens is the prompt."""
    sides = []
    for text in (row.chosen, row.rejected):
        content, end_id = tokenizer.without_end(text)
        if not content.strip():
            raise UnusableRow(EMPTY_ANSWER)
        ids = tokenizer.encode_plain(content)
        end_id = tokenizer.eos_id if end_id is None else end_id
        sides.append(ids if end_id is None else np.append(ids, as_ids([end_id])))
    size = common_prefix(sides[0], sides[1])
    chosen, rejected = (Side(ids, np.arange(len(ids)) >= size) for ids in sides)
    return chosen, rejected


def _tokenize_side(side: Rendering, tokenizer: ChatTokenizer) -> Side:
    """The tokens up to the end of the last answer, and which of them are scored."""
    encoded = tokenizer.encode(side.text)
    last = side.answers[-1]
    first = encoded.tokens_before(last.start)
    stop = _last_turn_end(encoded, encoded.tokens_covering(max(last.said_until, last.start)), tokenizer)
    if stop is not None:
        ids = encoded.ids[:stop]
    else:
        text = side.text[: last.said_until] if tokenizer.always_opens_answer else _without_template_space(side)
        ids = encoded.ids if text == side.text else tokenizer.encode(text).ids
        if tokenizer.eos_id is not None:
            ids = np.append(ids, as_ids([tokenizer.eos_id]))
    scored = np.zeros(len(ids), dtype=np.bool_)
    scored[first:] = True
    for answer in side.answers[:-1]:
        start, stop = encoded.tokens_before(answer.start), encoded.tokens_covering(answer.end)
        end = _turn_end(encoded, start, stop, tokenizer)
        # The token that ends a turn may stand behind it: templates let the next turn's first token end the last one.
        closing = tokenizer.end_ids if answer.holds_turn_end else tokenizer.special_ids
        if end is None:
            end = stop + 1 if int(encoded.ids[stop]) in closing else stop
        scored[start:end] = True
    return Side(ids, scored)


def _last_turn_end(encoded: EncodedText, said: int, tokenizer: ChatTokenizer) -> int | None:
    """Where the last turn ends, all of which is said in the first ``said`` tokens: behind the first end token.

    A template may go on behind it, with the header of a next answer. Where no token ends generation, the turn ends
    with the special ones right behind it, or with the first of them if something is written behind those.
    """
    kinds = [int(token_id) for token_id in encoded.ids[said:]]
    ending = [i for i, token_id in enumerate(kinds) if token_id in tokenizer.end_ids]
    if ending:
        return said + ending[0] + 1
    special = [i for i, token_id in enumerate(kinds) if token_id in tokenizer.special_ids]
    if not special:
        return None
    written = any(
        token_id not in tokenizer.special_ids and not tokenizer.is_blank(token_id) for token_id in kinds[special[0] :]
    )
    return said + special[0 if written or tokenizer.always_opens_answer else -1] + 1


def _turn_end(encoded: EncodedText, start: int, stop: int, tokenizer: ChatTokenizer) -> int | None:
    """Where the answer in tokens ``start`` to ``stop`` ends: behind the first end token after its text.

    Without an end token it ends behind the last special one; None where only text is found.
    """
    tail = stop
    while tail > start and (
        int(encoded.ids[tail - 1]) in tokenizer.special_ids or tokenizer.is_blank(int(encoded.ids[tail - 1]))
    ):
        tail -= 1
    ending = [i for i in range(tail, stop) if int(encoded.ids[i]) in tokenizer.end_ids]
    special = [i for i in range(tail, stop) if int(encoded.ids[i]) in tokenizer.special_ids]
    if ending:
        return ending[0] + 1
    return special[-1] + 1 if special else None


def _without_template_space(side: Rendering) -> str:
    """The text without the white space that the template, not the answer, puts at its end."""
    text = side.text.rstrip()
    own = side.last_content[len(side.last_content.rstrip()) :]
    return text + own if side.text[len(text) :].startswith(own) else text

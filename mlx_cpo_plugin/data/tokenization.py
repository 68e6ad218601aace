"""Rows to token pairs: what is prompt, what is answer, which tokens are scored, and the cut to length."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.data.encoding import ChatTokenizer, EncodedText, TokenIds, as_ids, common_prefix
from mlx_cpo_plugin.data.formats import (
    EMPTY_ANSWER,
    IDENTICAL,
    Columns,
    Conversation,
    PlainText,
    UnusableRow,
    parse_row,
)
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.rendering import Rendering, render
from mlx_cpo_plugin.errors import DataError

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


@dataclass(frozen=True)
class TruncatedPair:
    """A pair that fits, and which of its parts were cut for that."""

    pair: PreferencePair
    prompt_cut: bool = False
    answer_cut: bool = False


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


def truncate(pair: PreferencePair, max_seq_length: int, bos_id: int | None = None) -> TruncatedPair:
    """Fit both sides into ``max_seq_length`` tokens.

    The prompt is cut from its left (a leading BOS stays first); an answer is cut at its end only where it does not
    fit behind a single prompt token. Both sides keep the same prompt.

    Raises:
        DataError: ``max_seq_length`` is below 2.
        UnusableRow: what is left is the same on both sides, or holds no scored token.
    """
    if max_seq_length < 2:
        raise DataError(
            f"max_seq_length is {max_seq_length}, but a prompt token and an answer token need 2: raise max_seq_length."
        )
    if pair.length <= max_seq_length:
        return TruncatedPair(pair)
    room = max_seq_length - 1
    cut = replace(
        pair,
        chosen=pair.chosen[:room],
        rejected=pair.rejected[:room],
        chosen_scored=pair.chosen_scored[:room],
        rejected_scored=pair.rejected_scored[:room],
    )
    if not cut.chosen_scored.any() or not cut.rejected_scored.any():
        raise UnusableRow(f"{NOTHING_SCORED} within max_seq_length {max_seq_length}")
    if np.array_equal(cut.chosen, cut.rejected):
        raise UnusableRow(f"{IDENTICAL} within max_seq_length {max_seq_length}")
    keep = max_seq_length - max(len(cut.chosen), len(cut.rejected))
    prompt_cut = keep < len(pair.prompt)
    if prompt_cut:
        head = 1 if pair.prompt[0] == bos_id else 0
        prompt = np.concatenate([pair.prompt[:head], pair.prompt[len(pair.prompt) - (keep - head) :]])
        cut = replace(cut, prompt=prompt)
    return TruncatedPair(cut, prompt_cut, answer_cut=max(len(pair.chosen), len(pair.rejected)) > room)


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
    first = encoded.tokens_before(side.answers[-1].start)
    stop = _turn_end(encoded, first, len(encoded.ids), tokenizer)
    if stop is not None:
        ids = encoded.ids[:stop]
    else:
        text = _without_template_space(side)
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

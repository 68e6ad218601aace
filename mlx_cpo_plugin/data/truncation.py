"""Pairs that are longer than ``max_seq_length``: cut, left out, or an error."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from mlx_cpo_plugin.data.encoding import ChatTokenizer
from mlx_cpo_plugin.data.formats import IDENTICAL, Conversation, PlainText
from mlx_cpo_plugin.data.messages import UnusableRow, split_system
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.rendering import share_what_renders_alike
from mlx_cpo_plugin.data.tokenization import NOTHING_SCORED, tokenize
from mlx_cpo_plugin.errors import DataError

CUT, DROP, ERROR = OVERLONG = ("cut", "drop", "error")
PROMPT_SHARE = 4
"""A long answer leaves its prompt at least ``max_seq_length`` over this many tokens."""


class OverlongRow(UnusableRow):
    """A row that is left out since it is too long, as the settings ask for."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a pair's prompt and answers."""

    prompt: int
    chosen: int
    rejected: int

    @classmethod
    def of(cls, pair: PreferencePair) -> Lengths:
        return cls(len(pair.prompt), len(pair.chosen), len(pair.rejected))


@dataclass(frozen=True)
class TruncatedPair:
    """A pair that fits, which of its parts were cut for that, and its lengths before."""

    pair: PreferencePair
    whole: Lengths
    prompt_cut: bool = False
    answer_cut: bool = False


def fit(
    row: Conversation | PlainText, tokenizer: ChatTokenizer, source: str, max_seq_length: int, overlong: str = CUT
) -> TruncatedPair:
    """Turn one row into a pair of at most ``max_seq_length`` tokens a side.

    The prompt of a conversation loses its oldest turns first, then the beginnings of its longest messages; its system
    message and last question stay, and so does all that the template writes. Plain text is cut as
    :func:`truncate` does.

    Raises:
        DataError: the row is too long and ``overlong`` is ``error``.
        UnusableRow: the row has no pair, or none that fits.
    """
    pair = tokenize(row, tokenizer, source)
    whole = Lengths.of(pair)
    if pair.length <= max_seq_length:
        return TruncatedPair(pair, whole)
    if overlong == ERROR:
        raise DataError(
            f"{source} has {pair.length} tokens, more than max_seq_length {max_seq_length}: raise max_seq_length, or "
            "set overlong to cut or drop."
        )
    if overlong == DROP:
        raise OverlongRow(f"longer than max_seq_length {max_seq_length}")
    least = max_seq_length // PROMPT_SHARE
    if isinstance(row, Conversation) and len(pair.prompt) > least:
        row = share_what_renders_alike(row, tokenizer)
        least = min(least + _template_tokens(row, tokenizer), max_seq_length - least)
        pair = _shorten_prompt(row, tokenizer, source, max_seq_length, least)
    cut = truncate(pair, max_seq_length, tokenizer.bos_id, least)
    return replace(cut, whole=whole, prompt_cut=len(cut.pair.prompt) < whole.prompt)


def truncate(
    pair: PreferencePair, max_seq_length: int, bos_id: int | None = None, least: int | None = None
) -> TruncatedPair:
    """Fit both sides into ``max_seq_length`` tokens, as tokens.

    The prompt is cut from its left (a leading BOS stays first) to what the longer answer leaves, but not below
    ``least`` tokens; answers that do not fit behind that are cut at their end. Both sides keep the same prompt.

    Args:
        bos_id: the token that stays first.
        least: ``max_seq_length`` over :data:`PROMPT_SHARE` by default.

    Raises:
        DataError: ``max_seq_length`` is below 2.
        UnusableRow: what is left is the same on both sides, or holds no scored token.
    """
    if max_seq_length < 2:
        raise DataError(
            f"max_seq_length is {max_seq_length}, but a prompt token and an answer token need 2: raise max_seq_length."
        )
    whole = Lengths.of(pair)
    if pair.length <= max_seq_length:
        return TruncatedPair(pair, whole)
    keep = min(len(pair.prompt), _prompt_room(pair, max_seq_length, least))
    room = max_seq_length - keep
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
    if keep < len(pair.prompt):
        head = 1 if pair.prompt[0] == bos_id else 0
        cut = replace(cut, prompt=np.concatenate([pair.prompt[:head], pair.prompt[len(pair.prompt) - (keep - head) :]]))
    longest = max(whole.chosen, whole.rejected)
    return TruncatedPair(cut, whole, prompt_cut=keep < whole.prompt, answer_cut=longest > room)


def _prompt_room(pair: PreferencePair, max_seq_length: int, least: int | None) -> int:
    """Tokens that the prompt may have: what the longer answer leaves, and never less than ``least``."""
    left = max_seq_length - max(len(pair.chosen), len(pair.rejected))
    return max(left, max_seq_length // PROMPT_SHARE if least is None else least, 1)


def _template_tokens(row: Conversation, tokenizer: ChatTokenizer) -> int:
    """Tokens of the prompt that no row's text makes shorter, once its oldest turns are gone."""
    for shorter in reversed([row, *_without_oldest_turns(row)]):
        sides = (
            [m if i >= shorter.shared or m["role"] == "assistant" else {**m, "content": ""} for i, m in enumerate(side)]
            for side in (shorter.chosen, shorter.rejected)
        )
        chosen, rejected = sides
        try:
            return len(tokenize(replace(shorter, chosen=chosen, rejected=rejected), tokenizer).prompt)
        except UnusableRow:  # the template does not take what is left
            continue
    return 0


def _shorten_prompt(
    row: Conversation, tokenizer: ChatTokenizer, source: str, max_seq_length: int, least: int
) -> PreferencePair:
    """The pair of the row with as much of its prompt as fits."""
    shorter = [row, *_without_oldest_turns(row)]

    @cache
    def pair_of(turns: int) -> PreferencePair | None:
        try:
            return tokenize(shorter[turns], tokenizer, source)
        except UnusableRow:  # the template does not take what is left
            return None

    def fits(turns: int) -> bool:
        pair = pair_of(turns)
        return pair is not None and len(pair.prompt) <= _prompt_room(pair, max_seq_length, least)

    turns = bisect_left(range(len(shorter)), True, key=fits)
    pair = pair_of(turns) if turns < len(shorter) else None
    if pair is not None:
        return pair
    row = next((shorter[i] for i in reversed(range(len(shorter))) if pair_of(i) is not None), row)
    while True:
        pair = tokenize(row, tokenizer, source)
        excess = len(pair.prompt) - _prompt_room(pair, max_seq_length, least)
        if excess <= 0:
            return pair
        row = _with_shorter_messages(row, tokenizer, excess, max_seq_length)


def _without_oldest_turns(row: Conversation) -> list[Conversation]:
    """The row without its first turn, its first two, and so on; system messages and the last question stay."""
    system, turns = split_system(row.chosen[: row.shared])
    questions = [len(system) + i for i, message in enumerate(turns) if message["role"] == "user"]
    if row.chosen[row.shared]["role"] == "user":
        questions.append(row.shared)
    shorter = []
    for first in questions:
        if first > len(system):
            chosen, rejected = ([*side[: len(system)], *side[first:]] for side in (row.chosen, row.rejected))
            shared = len(system) + row.shared - first
            shorter.append(replace(row, chosen=chosen, rejected=rejected, shared=shared))
    return shorter


def _with_shorter_messages(
    row: Conversation, tokenizer: ChatTokenizer, excess: int, max_seq_length: int
) -> Conversation:
    """The row with ``excess`` tokens fewer at the beginnings of its longest shared messages that are no answers.

    They are cut to one length, below which no message is cut.
    """
    texts = {i: m["content"] for i, m in enumerate(row.chosen[: row.shared]) if m["role"] != "assistant"}
    sizes = {i: len(tokenizer.encode(text).ids) for i, text in texts.items() if text}
    if not sizes:
        raise UnusableRow(f"max_seq_length {max_seq_length} leaves no room beside what the chat template writes")
    left = sum(sizes.values()) - excess
    longest = (
        bisect_right(range(max(sizes.values())), left, key=lambda cap: sum(min(n, cap) for n in sizes.values())) - 1
    )
    shorter = {
        i: tokenizer.without_first_tokens(texts[i], size - max(longest, 0))
        for i, size in sizes.items()
        if size > longest
    }
    chosen, rejected = (
        [{**message, "content": shorter[i]} if i in shorter else message for i, message in enumerate(side)]
        for side in (row.chosen, row.rejected)
    )
    return replace(row, chosen=chosen, rejected=rejected)

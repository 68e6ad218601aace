"""Tokenise rows into pairs: what is prompt, which tokens of the answers are scored, and what is cut to fit."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.data.columns import Columns
from mlx_cpo_plugin.data.messages import Message, UnusableRow, split_system
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.rendering import Rendering, render, share_what_renders_alike
from mlx_cpo_plugin.data.rows import EMPTY_ANSWER, IDENTICAL, Conversation, PlainText, parse_row
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer, TokenIds, as_ids, common_prefix
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.types import Values

CUT, DROP, ERROR = "cut", "drop", "error"
PROMPT_SHARE = 4
"""A long answer leaves its prompt at least ``max_seq_length`` over this many tokens."""

ALIKE = "both answers have the same tokens, though they are not the same"
NOTHING_BEFORE = "nothing stands before the answers, and the tokenizer has neither a BOS nor an EOS token"
NOTHING_SCORED = "no token of an answer is left to score"


class Lengths(NamedTuple):
    """Tokens of the parts of a pair."""

    prompt: int
    chosen: int
    rejected: int

    @classmethod
    def of(cls, pair: PreferencePair) -> Lengths:
        """Return those of ``pair``."""
        return cls(len(pair.prompt), len(pair.chosen), len(pair.rejected))


class OverlongRow(UnusableRow):
    """A row that is too long: the settings leave it out, or a cut would leave nothing of its prompt or an answer.

    Attributes:
        whole: its lengths before any cut.
    """

    def __init__(self, reason: str, whole: Lengths, by_choice: bool = False) -> None:
        super().__init__(reason, whole, by_choice)  # all of them, so that it can be made again from its arguments
        self.reason, self.whole, self.by_choice = reason, whole, by_choice

    def __str__(self) -> str:
        return self.reason


class Side(NamedTuple):
    """One answer with everything before it: its tokens, int32 [T], and which of them are scored, bool [T]."""

    ids: TokenIds
    scored: NDArray[np.bool_]


class TruncatedPair(NamedTuple):
    """A pair that fits.

    Attributes:
        whole: its lengths before it was cut.
        prompt_cut, answer_cut: which of its parts were cut to make it fit.
        control_text: what its row spells out although the chat template writes it, e.g. ``<|im_start|>``.
        unwritten: what its row holds that the chat template has no place for, e.g. ``tools``.
        is_plain: whether its row has no prompt, and is no conversation.
    """

    pair: PreferencePair
    whole: Lengths
    prompt_cut: bool = False
    answer_cut: bool = False
    control_text: str = ""
    unwritten: tuple[str, ...] = ()
    is_plain: bool = False


def tokenize(row: Conversation | PlainText, tokenizer: ChatTokenizer, source: str = "") -> PreferencePair:
    """Turn one row into a pair in which exactly the answers' own tokens, end token included, are scored.

    Where a token holds both the last characters of the prompt and the first of an answer, it is scored: the prompt
    then ends one token earlier for both sides. Where the sides share no token at all, BOS (else EOS) is the prompt.
    """
    if isinstance(row, PlainText):
        chosen, rejected = _tokenize_texts(row, tokenizer)
    else:
        chosen, rejected = (_tokenize_side(side, tokenizer) for side in render(row, tokenizer))
    if chosen.ids[0] != rejected.ids[0] or chosen.scored[0] or rejected.scored[0]:
        context = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if context is None:
            raise UnusableRow(NOTHING_BEFORE)
        chosen, rejected = (
            Side(np.append(as_ids([context]), side.ids), np.append(False, side.scored)) for side in (chosen, rejected)
        )
    return split_pair(chosen, rejected, source)


def prompt_tokens(prompt: str | Values, tokenizer: ChatTokenizer) -> TokenIds:
    """Return the tokens, int32 [P], behind which a model answers a prompt, a text or a row with one."""
    row = {"prompt": prompt} if isinstance(prompt, str) else prompt
    # Two answers that share nothing: what both sides have in common is then the prompt.
    return tokenize(parse_row({**row, "chosen": "A", "rejected": "B"}, Columns()), tokenizer).prompt


def split_pair(chosen: Side, rejected: Side, source: str = "") -> PreferencePair:
    """Split two sides into their shared prompt and what follows; scored tokens are never part of the prompt."""
    if np.array_equal(chosen.ids, rejected.ids):
        raise UnusableRow(ALIKE)
    if not chosen.scored.any() or not rejected.scored.any():
        raise UnusableRow(NOTHING_SCORED)
    first_scored = min(int(np.argmax(side.scored)) for side in (chosen, rejected))
    size = common_prefix(chosen.ids[:first_scored], rejected.ids)
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
    size = common_prefix(*sides)
    chosen, rejected = (Side(ids, np.arange(len(ids)) >= size) for ids in sides)
    return chosen, rejected


def _tokenize_side(side: Rendering, tokenizer: ChatTokenizer) -> Side:
    """The tokens up to the end of the last answer, and which of them are scored."""
    encoded = tokenizer.encode(side.text)
    tokens: list[int] = encoded.ids.tolist()
    last = side.answers[-1]
    first = encoded.tokens_before(last.start)
    stop = _turn_end(tokens, encoded.tokens_covering(last.said_until), len(tokens), tokenizer)
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
        said, stop = encoded.tokens_covering(answer.said_until), encoded.tokens_covering(answer.end)
        end = _turn_end(tokens, said, stop, tokenizer)
        if end is None:  # templates may let the next turn's first token end the last one
            end = stop + (tokens[stop] in (tokenizer.end_ids if answer.holds_turn_end else tokenizer.special_ids))
        scored[encoded.tokens_before(answer.start) : end] = True
    return Side(ids, scored)


def _turn_end(tokens: list[int], said: int, stop: int, tokenizer: ChatTokenizer) -> int | None:
    """Where the turn ends whose text and calls are in the first ``said`` tokens: behind the first end token.

    The template may continue after it, with the header of a next answer. Without an end token, the turn ends with the
    special tokens that follow, or with the first of them if text comes after those; None without any.
    """
    special = [i for i in range(said, stop) if tokens[i] in tokenizer.special_ids]
    ending = [i for i in special if tokens[i] in tokenizer.end_ids]
    if ending or not special:
        return ending[0] + 1 if ending else None
    behind = [token for token in tokens[special[0] : stop] if token not in tokenizer.special_ids]
    written = tokenizer.always_opens_answer or tokenizer.decode(behind).strip()
    return special[0 if written else -1] + 1


def _without_template_space(side: Rendering) -> str:
    """The text without trailing white space that comes from the template and not from the answer."""
    text = side.text.rstrip()
    own = side.last_content[len(side.last_content.rstrip()) :]
    return text + own if side.text[len(text) :].startswith(own) else text


def fit(
    row: Conversation | PlainText, tokenizer: ChatTokenizer, source: str, max_seq_length: int, overlong: str = CUT
) -> TruncatedPair:
    """Turn one row into a pair of at most ``max_seq_length`` tokens a side; UnusableRow says why it has none.

    The prompt of a conversation loses its oldest turns first, then the beginnings of its longest messages; its system
    message and last question stay, and so does all that the template writes. Plain text is cut as
    :func:`truncate` does.

    Raises:
        DataError: the row is too long and ``overlong`` is ``error``.
        OverlongRow: ``overlong`` is ``drop``, or nothing of the prompt or an answer would be left.
    """
    pair = tokenize(row, tokenizer, source)
    whole = Lengths.of(pair)
    if pair.length <= max_seq_length:
        return TruncatedPair(pair, whole)
    if overlong == ERROR:
        raise DataError(
            f"{source} has {pair.length} tokens, more than max_seq_length {max_seq_length}: raise max_seq_length, or "
            "set overlong to cut or drop.",
            key="max_seq_length",
            place=source,
        )
    if overlong == DROP:
        raise OverlongRow(f"longer than max_seq_length {max_seq_length}", whole, by_choice=True)
    least = max_seq_length // PROMPT_SHARE
    try:
        if isinstance(row, Conversation) and whole.prompt > least:
            row = share_what_renders_alike(row, tokenizer)
            template = _template_tokens(row, tokenizer)
            least = min(least + template, max_seq_length - least)
            pair = _shorten_prompt(row, tokenizer, source, max_seq_length, least)
            if len(pair.prompt) <= template < whole.prompt:
                raise UnusableRow(f"nothing of the prompt is left within max_seq_length {max_seq_length}")
        cut = truncate(pair, max_seq_length, tokenizer.bos_id, least)
    except UnusableRow as error:
        raise OverlongRow(str(error), whole) from None
    return cut._replace(whole=whole, prompt_cut=len(cut.pair.prompt) < whole.prompt)


def truncate(
    pair: PreferencePair, max_seq_length: int, bos_id: int | None = None, least: int | None = None
) -> TruncatedPair:
    """Fit both sides into ``max_seq_length`` tokens, as tokens.

    The prompt is cut from its left (a leading ``bos_id`` stays first) to what the longer answer leaves, but not below
    ``least`` tokens, by default ``max_seq_length`` over :data:`PROMPT_SHARE`; answers that do not fit behind that are
    cut at their end, and keep nothing of a turn that is not scored. Both sides keep the same prompt.

    Raises:
        OverlongRow: what is left is the same on both sides, or holds no scored token.
    """
    whole = Lengths.of(pair)
    if pair.length <= max_seq_length:
        return TruncatedPair(pair, whole)
    least = max_seq_length // PROMPT_SHARE if least is None else least
    keep = min(len(pair.prompt), _prompt_room(pair, max_seq_length, least))
    room = max(max_seq_length - keep, 0)
    head = 1 if pair.prompt[0] == bos_id and keep < len(pair.prompt) else 0
    chosen, rejected = _room_for(pair.chosen_scored, room), _room_for(pair.rejected_scored, room)
    if not chosen or not rejected:
        raise OverlongRow(f"{NOTHING_SCORED} within max_seq_length {max_seq_length}", whole)
    cut = replace(
        pair,
        prompt=np.concatenate([pair.prompt[:head], pair.prompt[len(pair.prompt) - (keep - head) :]]),
        chosen=pair.chosen[:chosen],
        rejected=pair.rejected[:rejected],
        chosen_scored=pair.chosen_scored[:chosen],
        rejected_scored=pair.rejected_scored[:rejected],
    )
    if np.array_equal(cut.chosen, cut.rejected):
        raise OverlongRow(f"{IDENTICAL} within max_seq_length {max_seq_length}", whole)
    longest = max(whole.chosen, whole.rejected)
    return TruncatedPair(cut, whole, prompt_cut=keep < whole.prompt, answer_cut=longest > room)


def _room_for(scored: NDArray[np.bool_], room: int) -> int:
    """Tokens of an answer that are left in ``room``: where it is cut, up to the last scored one."""
    if len(scored) <= room:
        return len(scored)
    kept = np.flatnonzero(scored[:room])
    return int(kept[-1]) + 1 if len(kept) else 0


def _prompt_room(pair: PreferencePair, max_seq_length: int, least: int) -> int:
    """Tokens that the prompt may have: what the longer answer leaves, and never less than ``least``."""
    return max(max_seq_length - max(len(pair.chosen), len(pair.rejected)), least, 1)


def _template_tokens(row: Conversation, tokenizer: ChatTokenizer) -> int:
    """Tokens of the prompt that the template writes by itself, once the oldest turns are gone."""
    for shorter in reversed(_without_oldest_turns(row)):
        empty = {i: "" for i, message in enumerate(shorter.chosen[: shorter.shared]) if message["role"] != "assistant"}
        if pair := _tokenized(_with_contents(shorter, empty), tokenizer):
            return len(pair.prompt)
    return 0


def _tokenized(row: Conversation, tokenizer: ChatTokenizer, source: str = "") -> PreferencePair | None:
    try:
        return tokenize(row, tokenizer, source)
    except UnusableRow:  # the template does not take what is left
        return None


def _with_contents(row: Conversation, contents: dict[int, str]) -> Conversation:
    """The row with the contents of shared messages replaced, by position."""

    def changed(side: list[Message]) -> list[Message]:
        return [{**message, "content": contents.get(i, message["content"])} for i, message in enumerate(side)]

    return replace(row, chosen=changed(row.chosen), rejected=changed(row.rejected))


def _shorten_prompt(
    row: Conversation, tokenizer: ChatTokenizer, source: str, max_seq_length: int, least: int
) -> PreferencePair:
    """The pair of the row with as much of its prompt as fits."""
    shorter = _without_oldest_turns(row)

    @cache
    def pair_of(turns: int) -> PreferencePair | None:
        return _tokenized(shorter[turns], tokenizer, source)

    def excess(pair: PreferencePair) -> int:
        return len(pair.prompt) - _prompt_room(pair, max_seq_length, least)

    def fits(turns: int) -> bool:
        pair = pair_of(turns)
        return pair is not None and excess(pair) <= 0

    turns = bisect_left(range(len(shorter)), True, key=fits)
    pair = pair_of(turns) if turns < len(shorter) else None
    if pair is None:
        row = next((shorter[i] for i in reversed(range(len(shorter))) if pair_of(i)), row)
        pair = tokenize(row, tokenizer, source)
        while excess(pair) > 0:
            row = _with_shorter_messages(row, tokenizer, excess(pair), max_seq_length)
            pair = tokenize(row, tokenizer, source)
    return pair


def _without_oldest_turns(row: Conversation) -> list[Conversation]:
    """The row, and without its first turn, its first two, and so on; system messages and the last question stay."""
    system, _ = split_system(row.chosen[: row.shared])
    start = len(system)
    shorter = [row]
    for first in range(start + 1, row.shared + 1):
        if row.chosen[first]["role"] == "user":
            chosen, rejected = ([*side[:start], *side[first:]] for side in (row.chosen, row.rejected))
            shorter.append(replace(row, chosen=chosen, rejected=rejected, shared=start + row.shared - first))
    return shorter


def _with_shorter_messages(
    row: Conversation, tokenizer: ChatTokenizer, excess: int, max_seq_length: int
) -> Conversation:
    """The row with ``excess`` tokens fewer, cut from the beginnings of its longest messages before the answers.

    All that are longer than a common limit are cut to it; answers of earlier turns are left as they are.
    """
    texts = {i: m["content"] for i, m in enumerate(row.chosen[: row.shared]) if m["role"] != "assistant"}
    sizes = {i: len(tokenizer.encode(text).ids) for i, text in texts.items() if text}
    if not sizes:
        raise UnusableRow(f"max_seq_length {max_seq_length} leaves no room beside what the chat template writes")
    left = sum(sizes.values()) - excess
    # The largest cap under which the messages have no more tokens than that.
    caps = range(max(sizes.values()))
    longest = max(bisect_right(caps, left, key=lambda cap: sum(min(size, cap) for size in sizes.values())) - 1, 0)
    return _with_contents(
        row,
        {i: tokenizer.without_first_tokens(texts[i], size - longest) for i, size in sizes.items() if size > longest},
    )

"""Pairs over max_seq_length keep their answers; the prompt gives way first, from its left."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.data_tokenizers import tokenizer_named
from support.refusals import refused

from mlx_cpo_plugin.data.columns import Columns
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.rows import parse_row
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.data.tokens import PROMPT_SHARE, OverlongRow, fit, tokenize, truncate
from mlx_cpo_plugin.errors import DataError

BOS = 1


def make_pair(prompt, chosen, rejected, unscored=0):
    sides = [np.array(side, dtype=np.int32) for side in (prompt, chosen, rejected)]
    return PreferencePair(*sides, *(np.arange(len(side)) >= unscored for side in sides[1:]), source="x.jsonl:1")


def test_a_pair_that_fits_stays_as_it_is():
    pair = make_pair([BOS, 5, 6], [7, 8], [9])

    result = truncate(pair, 5, BOS)

    assert result.pair is pair
    assert not result.prompt_cut
    assert not result.answer_cut


def test_the_prompt_is_cut_from_its_left_until_the_longer_side_fits():
    result = truncate(make_pair([4, 5, 6], [7, 8], [9]), 4)

    assert result.pair.prompt.tolist() == [5, 6]
    assert result.pair.chosen.tolist() == [7, 8]
    assert result.pair.rejected.tolist() == [9]
    assert (result.prompt_cut, result.answer_cut) == (True, False)


def test_a_leading_bos_stays_first():
    result = truncate(make_pair([BOS, 4, 5, 6], [7, 8], [9]), 4, BOS)

    assert result.pair.prompt.tolist() == [BOS, 6]


def test_an_answer_that_does_not_fit_alone_is_cut_at_its_end():
    result = truncate(make_pair([BOS, 4], [7, 8, 9, 10, 2], [9, 2]), 4, BOS)

    assert result.pair.prompt.tolist() == [BOS]
    assert result.pair.chosen.tolist() == [7, 8, 9]
    assert result.pair.rejected.tolist() == [9, 2]
    assert (result.prompt_cut, result.answer_cut) == (True, True)


def test_answers_that_differ_only_behind_the_cut_are_unusable():
    with pytest.raises(UnusableRow) as caught:
        truncate(make_pair([4], [7, 8, 9], [7, 8, 10]), 3)

    assert str(caught.value) == "both answers are the same within max_seq_length 3"


def test_an_answer_whose_scored_tokens_lie_behind_the_cut_is_unusable():
    with pytest.raises(UnusableRow) as caught:
        truncate(make_pair([4], [7, 8, 9], [6, 8, 10], unscored=2), 3)

    assert str(caught.value) == "no token of an answer is left to score within max_seq_length 3"


@pytest.mark.parametrize("length", [0, 1])
def test_a_length_without_room_for_an_answer_makes_a_pair_unusable(length):
    with pytest.raises(UnusableRow, match=rf"left to score within max_seq_length {length}$"):
        truncate(make_pair([4], [7], [8]), length)


IDS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(prompt=IDS, chosen=IDS, rejected=IDS, length=st.integers(2, 30), unscored=st.integers(0, 2))
def test_whatever_is_cut_fits_and_keeps_answers_before_prompt(prompt, chosen, rejected, length, unscored):
    assume(chosen != rejected and unscored < min(len(chosen), len(rejected)))
    pair = make_pair(prompt, chosen, rejected, unscored)
    least = min(len(prompt), max(length // PROMPT_SHARE, 1))
    try:
        result = truncate(pair, length, BOS)
    except UnusableRow:
        kept = chosen[: length - least], rejected[: length - least]
        assert kept[0] == kept[1] or unscored >= length - least
        return
    cut = result.pair

    assert cut.length <= length
    assert len(cut.prompt) >= least
    for side, whole in (("chosen", chosen), ("rejected", rejected)):
        ids, scored = getattr(cut, side).tolist(), getattr(cut, f"{side}_scored")
        assert ids == whole[: length - least]
        assert len(scored) == len(ids)
        assert scored.any()
    kept = cut.prompt.tolist()
    if prompt[0] == BOS:
        assert kept[0] == BOS
        assert len(kept) == 1 or kept[1:] == prompt[-(len(kept) - 1) :]
    else:
        assert kept == prompt[-len(kept) :]
    assert result.prompt_cut == (len(kept) < len(prompt))
    assert not result.prompt_cut or cut.length == length
    assert cut.source == "x.jsonl:1"


# Conversations are cut at the borders of their messages.

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "One cat one cat."},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "Two dogs two dogs."},
    {"role": "assistant", "content": "Second answer."},
    {"role": "user", "content": "What is it?"},
]
ANSWERS = {"chosen": "Yes, the cat.", "rejected": "No."}


def fitted(prompt, length, kind="chatml", **answers):
    tokenizer = ChatTokenizer(tokenizer_named(kind))
    row = parse_row({"prompt": prompt, **ANSWERS, **answers}, Columns())
    return fit(row, tokenizer, "x.jsonl:1", length), tokenizer


def rendered(messages, kind="chatml"):
    return tokenizer_named(kind).apply_chat_template(messages, add_generation_prompt=True)


def test_the_oldest_turns_go_first_and_what_is_left_is_a_conversation():
    seen = []
    whole, _ = fitted([SYSTEM, *TURNS], 10_000)
    for length in range(whole.pair.length, whole.pair.length - 40, -1):
        cut, _ = fitted([SYSTEM, *TURNS], length)
        assert cut.pair.length <= length
        assert cut.pair.chosen.tolist() == whole.pair.chosen.tolist()
        if cut.pair.prompt.tolist() not in seen:
            seen.append(cut.pair.prompt.tolist())

    assert seen[:3] == [rendered([SYSTEM, *TURNS[first:]]) for first in (0, 2, 4)]


def test_a_conversation_says_what_was_cut():
    whole, _ = fitted([SYSTEM, *TURNS], 10_000)

    cut, _ = fitted([SYSTEM, *TURNS], whole.pair.length - 1)

    assert (whole.prompt_cut, whole.answer_cut) == (False, False)
    assert (cut.prompt_cut, cut.answer_cut) == (True, False)
    assert len(cut.pair.prompt) < len(whole.pair.prompt)


@pytest.mark.parametrize("kind", ["chatml", "headers", "no_system", "thinking", "mode_in_system"])
def test_a_last_question_that_is_too_long_loses_its_beginning_and_the_template_stays_whole(kind):
    question = "The cat is on the mat. " * 12 + "Who?"

    cut, tokenizer = fitted([SYSTEM, {"role": "user", "content": question}], 64, kind)
    prompt = tokenizer.decode(cut.pair.prompt)
    empty, _ = fitted([SYSTEM, {"role": "user", "content": "§"}], 10_000, kind)
    before, after = tokenizer.decode(empty.pair.prompt).split("§")

    assert prompt.startswith(before)
    assert prompt.endswith("Who?" + after)
    assert question.endswith(prompt[len(before) : len(prompt) - len(after)])
    assert 54 <= cut.pair.length <= 64


def test_the_longest_message_is_the_one_that_is_cut():
    long_system = {"role": "system", "content": "The cat is on the mat. " * 12 + "Be brief."}

    cut, tokenizer = fitted([long_system, {"role": "user", "content": "What is it?"}], 64)

    assert "user\nWhat is it?<|im_end|>" in tokenizer.decode(cut.pair.prompt)
    assert "Be brief.<|im_end|>" in tokenizer.decode(cut.pair.prompt)


def test_long_messages_share_what_room_there_is():
    long = "The cat is on the mat. " * 12

    cut, tokenizer = fitted(
        [{"role": "system", "content": long + "Be brief."}, {"role": "user", "content": long * 3 + "What is it?"}], 96
    )

    system, question = tokenizer.decode(cut.pair.prompt).split("<|im_end|>")[:2]
    assert system.endswith("Be brief.")
    assert question.endswith("What is it?")
    assert abs(system.count("the mat") - question.count("the mat")) <= 1


def test_calls_and_their_results_go_with_their_turn():
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "the mat the mat the mat"}}}
    prompt = [
        TURNS[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "a cat"},
        *TURNS[3:],
    ]
    whole, _ = fitted(prompt, 10_000)

    cut, _ = fitted(prompt, whole.pair.length - 1)

    assert cut.pair.prompt.tolist() == rendered(TURNS[4:])


def test_a_long_answer_leaves_the_prompt_whole_or_at_least_its_share():
    short, _ = fitted([TURNS[4]], 64, chosen="dog " * 100)
    long, tokenizer = fitted([{"role": "user", "content": "cat " * 100}], 64, chosen="dog " * 100)

    assert short.pair.prompt.tolist() == rendered([TURNS[4]])
    assert (short.pair.length, long.pair.length) == (64, 64)
    assert tokenizer.decode(long.pair.prompt).count("cat") >= 64 // PROMPT_SHARE // 2


def test_messages_that_only_render_alike_are_cut_alike():
    sides = [
        [*({**message, "id": f"{side}{i}"} for i, message in enumerate(TURNS)), {"role": "assistant", "content": side}]
        for side in ("Yes.", "No.")
    ]
    tokenizer = ChatTokenizer(tokenizer_named("chatml"))
    row = parse_row({"chosen": sides[0], "rejected": sides[1]}, Columns())

    cut = fit(row, tokenizer, "x.jsonl:1", tokenize(row, tokenizer).length - 1)

    assert cut.pair.prompt.tolist() == rendered(TURNS[2:])


def test_a_length_below_what_the_template_writes_makes_a_row_unusable():
    with pytest.raises(UnusableRow, match="max_seq_length 8 leaves no room beside what the chat template writes"):
        fitted([TURNS[4]], 8)


def test_rows_that_are_too_long_may_be_left_out_or_end_the_run():
    row = parse_row({"prompt": TURNS, **ANSWERS}, Columns())
    tokenizer = ChatTokenizer(tokenizer_named("chatml"))

    with pytest.raises(OverlongRow, match=r"^longer than max_seq_length 24$"):
        fit(row, tokenizer, "x.jsonl:1", 24, "drop")
    with refused(DataError, key="max_seq_length", place="x.jsonl:1"):
        fit(row, tokenizer, "x.jsonl:1", 24, "error")
    assert fit(row, tokenizer, "x.jsonl:1", 1000, "error").pair.length < 1000


@given(data=st.data(), length=st.integers(20, 120))
def test_any_conversation_is_cut_to_one_that_the_template_writes(data, length):
    words = st.text(st.sampled_from("Yes the cat.,\n é中"), min_size=1, max_size=60).filter(lambda text: text.strip())
    turns = data.draw(st.lists(st.tuples(words, words), max_size=3))
    prompt = [SYSTEM] if data.draw(st.booleans()) else []
    for question, answer in turns:
        prompt += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt.append({"role": "user", "content": data.draw(words)})

    try:
        cut, tokenizer = fitted(prompt, length)
    except OverlongRow as error:
        if str(error) != f"nothing of the prompt is left within max_seq_length {length}":
            raise
        return
    text = tokenizer.decode(cut.pair.prompt)

    assert cut.pair.length <= length
    assert text.startswith("<|im_start|>system\n" if prompt[0] is SYSTEM else "<|im_start|>user\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>") == text.count("<|im_end|>") + 1

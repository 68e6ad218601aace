"""Exactly the answer's own tokens are scored, its end token included, under every kind of chat template."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.data_tokenizers import CHATML, THINKING, make_tokenizer, tokenizer_named

from mlx_cpo_plugin.data.columns import Columns
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.rows import PlainText, parse_row
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.data.tokens import tokenize

CLOSING_KINDS = ["chatml", "headers", "thinking", "open_thinking", "either_thinking", "no_system", "two_ends"]
CHAT_KINDS = [*CLOSING_KINDS, "next_speaker", "bare", "no_end"]
END = {"headers": "<|eot|>", "bare": "<|eos|>", "next_speaker": "<|eos|>", "no_end": ""}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def pair_of(row, kind):
    tokenizer = ChatTokenizer(tokenizer_named(kind) if isinstance(kind, str) else kind)
    return tokenize(parse_row(row, Columns()), tokenizer), tokenizer


def scored_text(pair, side, tokenizer):
    return tokenizer.decode(getattr(pair, side)[getattr(pair, f"{side}_scored")])


def whole_text(pair, side, tokenizer):
    return tokenizer.decode(np.concatenate([pair.prompt, getattr(pair, side)]))


ROW = {"prompt": "What is it?", "chosen": "Yes, the cat.", "rejected": "No."}


@pytest.mark.parametrize("kind", CLOSING_KINDS)
def test_the_answer_and_its_end_token_are_scored_and_nothing_else(kind):
    pair, tokenizer = pair_of(ROW, kind)
    end = END.get(kind, "<|im_end|>")

    assert scored_text(pair, "chosen", tokenizer) == f"Yes, the cat.{end}"
    assert scored_text(pair, "rejected", tokenizer) == f"No.{end}"
    assert pair.chosen_scored.all()
    assert pair.rejected_scored.all()


@pytest.mark.parametrize("kind", ["chatml", "headers", "no_system", "two_ends"])
def test_the_prompt_is_what_generation_starts_from(kind):
    pair, _ = pair_of(ROW, kind)

    inference = tokenizer_named(kind).apply_chat_template([user("What is it?")], add_generation_prompt=True)

    assert pair.prompt.tolist() == inference


def test_ids_and_masks_have_their_types():
    pair, _ = pair_of(ROW, "chatml")

    assert {pair.prompt.dtype, pair.chosen.dtype, pair.rejected.dtype} == {np.dtype(np.int32)}
    assert {pair.chosen_scored.dtype, pair.rejected_scored.dtype} == {np.dtype(np.bool_)}


def test_where_the_boundary_merges_each_side_scores_its_own_tokens():
    pair, tokenizer = pair_of({"prompt": "What is it?", "chosen": "Yes", "rejected": "42"}, "bare")

    # " Yes" is one token that reaches over the boundary; " " and "42" are separate ones.
    assert tokenizer.decode(pair.prompt) == "Q: What is it?\nA:"
    assert scored_text(pair, "chosen", tokenizer) == " Yes<|eos|>"
    assert scored_text(pair, "rejected", tokenizer) == "42<|eos|>"
    assert tokenizer.decode(pair.rejected[~pair.rejected_scored]) == " "


def test_the_space_that_a_template_puts_behind_the_answer_is_not_scored():
    _, tokenizer = pair_of(ROW, "bare")
    pair, _ = pair_of({"prompt": "What is it?", "chosen": "Yes\n\n", "rejected": "No"}, "bare")

    assert scored_text(pair, "rejected", tokenizer) == " No<|eos|>"
    assert scored_text(pair, "chosen", tokenizer) == " Yes\n\n<|eos|>"


def test_a_tokenizer_without_an_end_token_adds_none():
    pair, tokenizer = pair_of(ROW, "no_end")

    assert whole_text(pair, "chosen", tokenizer) == "Q: What is it?\nA: Yes, the cat."


def test_an_end_of_turn_that_is_special_but_no_end_of_generation_is_the_end():
    pair, tokenizer = pair_of(ROW, make_tokenizer(CHATML, eos="<|eos|>"))

    assert scored_text(pair, "chosen", tokenizer) == "Yes, the cat.<|im_end|>"


def test_a_closed_thinking_block_belongs_to_the_prompt():
    pair, tokenizer = pair_of(ROW, "thinking")

    assert tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_thoughts_in_an_answer_are_scored_and_both_sides_keep_one_prompt():
    row = {**ROW, "chosen": "<think>\nIt purrs.\n</think>\n\nYes."}

    pair, tokenizer = pair_of(row, "thinking")

    assert tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n")
    assert scored_text(pair, "chosen", tokenizer) == "<think>\nIt purrs.\n</think>\n\nYes.<|im_end|>"
    assert scored_text(pair, "rejected", tokenizer) == "<think>\n\n</think>\n\nNo.<|im_end|>"


@pytest.mark.parametrize("kind", CLOSING_KINDS)
def test_in_an_answer_of_several_turns_only_the_assistant_is_scored(kind):
    chosen = [user("What is it?"), assistant("Yes, the cat."), user("Sure?"), assistant("Yes.")]
    rejected = [user("What is it?"), assistant("No."), user("Why?"), assistant("Not me.")]
    end = END.get(kind, "<|im_end|>")

    pair, tokenizer = pair_of({"chosen": chosen, "rejected": rejected}, kind)

    assert scored_text(pair, "chosen", tokenizer) == f"Yes, the cat.{end}Yes.{end}"
    assert scored_text(pair, "rejected", tokenizer) == f"No.{end}Not me.{end}"
    context = tokenizer.decode(pair.chosen[~pair.chosen_scored])
    assert "Sure?" in context
    assert "cat" not in context


@pytest.mark.parametrize(("kind", "mode"), [("mode_in_system", "/think"), ("mode_opens_thinking", "/no_think")])
def test_the_template_is_told_not_to_think_only_where_answers_do_not_fit_otherwise(kind, mode):
    pair, tokenizer = pair_of(ROW, kind)

    assert tokenizer.decode(pair.prompt).startswith(f"<|im_start|>system\n{mode}<|im_end|>")
    assert tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n")


def test_earlier_answers_keep_their_end_of_turn_where_it_is_no_end_of_generation():
    chosen = [user("What is it?"), assistant("Yes, the cat."), user("Sure?"), assistant("Yes.")]
    tokenizer = make_tokenizer(THINKING, eos="<|eos|>", thinking=True)

    pair, tokenizer = pair_of({"chosen": chosen, "rejected": [chosen[0], assistant("No.")]}, tokenizer)

    assert scored_text(pair, "chosen", tokenizer) == "Yes, the cat.<|im_end|>Yes.<|im_end|>"


def test_a_next_speaker_that_does_not_end_generation_is_not_scored():
    chosen = [user("What is it?"), assistant("Yes, the cat."), {"role": "tool", "content": "purr"}, assistant("Yes.")]

    pair, tokenizer = pair_of({"chosen": chosen, "rejected": [chosen[0], assistant("No.")]}, "next_speaker")

    assert scored_text(pair, "chosen", tokenizer) == "Yes, the cat.Yes.<|eos|>"


def test_where_the_next_speaker_ends_a_turn_that_token_is_scored():
    chosen = [user("What is it?"), assistant("Yes, the cat."), user("Sure?"), assistant("Yes.")]

    pair, tokenizer = pair_of({"chosen": chosen, "rejected": [chosen[0], assistant("No.")]}, "next_speaker")

    assert scored_text(pair, "chosen", tokenizer) == "Yes, the cat.<|eot|>Yes.<|eos|>"


def test_an_answer_with_and_one_without_thoughts_start_from_what_both_share():
    row = {**ROW, "chosen": "<think>\nIt purrs.\n</think>Yes."}

    pair, tokenizer = pair_of(row, "either_thinking")

    assert tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n<think>")
    assert scored_text(pair, "chosen", tokenizer) == "\nIt purrs.\n</think>Yes.<|im_end|>"
    assert scored_text(pair, "rejected", tokenizer) == "</think>No.<|im_end|>"


def test_answers_are_found_where_later_turns_change_what_stands_before_them():
    chosen = [user("What is it?"), assistant("Yes, the cat."), user("Sure?"), assistant("Yes.")]
    rejected = [chosen[0], assistant("No."), user("Why?"), assistant("Not me.")]

    pair, tokenizer = pair_of({"chosen": chosen, "rejected": rejected, "tools": [{"name": "look"}]}, "tools_last")

    assert scored_text(pair, "chosen", tokenizer) == "Yes, the cat.<|eos|>Yes.<|eos|>"
    assert scored_text(pair, "rejected", tokenizer) == "No.<|eos|>Not me.<|eos|>"


def test_an_opened_thinking_block_does_not_take_the_first_character_of_answers_that_begin_like_it():
    pair, tokenizer = pair_of({"prompt": "What is it?", "chosen": "<a>", "rejected": "<b>"}, "open_thinking")

    assert scored_text(pair, "chosen", tokenizer) == "<a><|im_end|>"
    assert scored_text(pair, "rejected", tokenizer) == "<b><|im_end|>"


def test_a_tool_call_behind_an_opened_thinking_block_starts_where_the_prompt_ends():
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    row = {**ROW, "chosen": [assistant("", tool_calls=[call])]}

    pair, tokenizer = pair_of(row, "open_thinking")

    assert scored_text(pair, "chosen", tokenizer) == "<call>look</call><|im_end|>"
    assert scored_text(pair, "rejected", tokenizer) == "No.<|im_end|>"


def test_tool_messages_inside_an_answer_are_context():
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "mat"}}}
    chosen = [
        user("What is it?"),
        assistant("", tool_calls=[call]),
        {"role": "tool", "content": "a cat"},
        assistant("Yes."),
    ]

    pair, tokenizer = pair_of({"chosen": chosen, "rejected": [user("What is it?"), assistant("No.")]}, "chatml")

    assert scored_text(pair, "chosen", tokenizer) == (
        '<call>{"name": "look", "arguments": {"at": "mat"}}</call><|im_end|>Yes.<|im_end|>'
    )
    assert scored_text(pair, "rejected", tokenizer) == "No.<|im_end|>"


def test_tool_calls_that_the_template_leaves_out_make_the_row_unusable():
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}

    with pytest.raises(UnusableRow, match="leaves out the tool calls"):
        pair_of({**ROW, "chosen": [assistant("", tool_calls=[call])]}, "headers")


def test_calls_of_the_prompt_that_the_template_leaves_out_make_the_row_unusable_though_it_lists_the_tools():
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "mat"}}}
    prompt = [user("look: where?"), assistant("", tool_calls=[call]), {"role": "tool", "content": "on the mat"}]

    with pytest.raises(UnusableRow, match="leaves out the tool calls"):
        pair_of({**ROW, "prompt": prompt}, "headers")


def test_a_second_call_that_the_template_leaves_out_is_noticed_where_results_repeat_the_name_of_the_first():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.tool_calls %}<call>{{ m.tool_calls[0].function | tojson }}</call>{% endif %}"
        "{% if m.role == 'tool' %} by {{ messages[1].tool_calls[0].function.name }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": at}}} for at in ("mat", "rug")]
    results = [{"role": "tool", "content": f"nothing on the {at}"} for at in ("mat", "rug")]
    row = {**ROW, "prompt": [user("Where is it?"), assistant("", tool_calls=calls), *results]}

    with pytest.raises(UnusableRow, match="leaves out the tool calls of a message"):
        tokenize(parse_row(row, Columns()), ChatTokenizer(make_tokenizer(template)))


def test_sides_that_part_at_a_user_turn_have_that_turn_as_context():
    shared = [user("What is it?"), assistant("Yes.")]
    row = {
        "chosen": [*shared, user("Sure?"), assistant("Yes, the cat.")],
        "rejected": [*shared, user("Why?"), assistant("No.")],
    }

    pair, tokenizer = pair_of(row, "chatml")

    assert scored_text(pair, "chosen", tokenizer) == "Yes, the cat.<|im_end|>"
    assert whole_text(pair, "rejected", tokenizer).endswith("Why?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>")
    assert tokenizer.decode(pair.prompt).endswith("Yes.<|im_end|>\n<|im_start|>user\n")


def test_a_system_message_joins_the_user_where_the_template_refuses_it():
    pair, tokenizer = pair_of({**ROW, "system": "Be brief."}, "no_system")

    assert tokenizer.decode(pair.prompt) == (
        "<|bos|><|im_start|>user\nBe brief.\n\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages_that_the_template_refuses_make_the_row_unusable_with_its_words():
    row = {"prompt": [user("a"), user("b")], "chosen": "Yes", "rejected": "No"}

    with pytest.raises(UnusableRow) as caught:
        pair_of(row, "no_system")

    assert str(caught.value) == "the chat template refuses the messages (Turns must alternate)"


def test_without_a_chat_template_conversations_are_unusable_and_say_so():
    with pytest.raises(UnusableRow, match=r"^the tokenizer has no chat template$"):
        pair_of(ROW, "no_template")


@pytest.mark.parametrize("kind", [kind for kind in CHAT_KINDS if kind != "no_end"])
@pytest.mark.parametrize("spelled", ["{end}", "{end}\n", "{end}{end}", " {end} "])
def test_an_end_token_spelled_out_in_the_answer_is_not_doubled(kind, spelled):
    end = END.get(kind, "<|im_end|>")

    pair, tokenizer = pair_of({**ROW, "chosen": "Yes." + spelled.format(end=end)}, kind)

    text = scored_text(pair, "chosen", tokenizer)
    assert text.count(end) == 1
    assert text.replace(" ", "") == f"Yes.{end}"


def test_an_answer_that_is_only_an_end_token_is_empty():
    with pytest.raises(UnusableRow, match="an answer is empty"):
        pair_of({**ROW, "chosen": "<|im_end|>"}, "chatml")


def test_answers_that_the_template_renders_alike_are_the_same():
    with pytest.raises(UnusableRow, match="both answers have the same tokens"):
        pair_of({**ROW, "chosen": "Yes.", "rejected": " Yes. "}, "headers")


MERGING = {"prompt": "What is it?", "chosen": "Yes", "rejected": "42"}
SEVERAL_TURNS = {
    "chosen": [user("What is it?"), assistant("Yes."), user("Sure?"), assistant("Yes, the cat.")],
    "rejected": [user("What is it?"), assistant("No."), user("Why?"), assistant("Not me.")],
}


@pytest.mark.parametrize("row", [ROW, MERGING, SEVERAL_TURNS], ids=["plain", "merging", "several turns"])
@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_a_tokenizer_without_offsets_gives_the_same_pairs(kind, row):
    expected, _ = pair_of(row, kind)

    pair, tokenizer = pair_of(row, tokenizer_named(kind, offsets=False))

    assert tokenizer.encode("Yes").ends is None
    assert pair.prompt.tolist() == expected.prompt.tolist()
    assert pair.rejected_scored.tolist() == expected.rejected_scored.tolist()
    assert pair.chosen_scored.tolist() == expected.chosen_scored.tolist()
    assert pair.chosen.tolist() == expected.chosen.tolist()


# Plain text: no template.


def test_plain_text_has_its_shared_tokens_as_prompt_and_one_bos_and_end():
    pair, tokenizer = pair_of({"chosen": "Q: Who?\nA: Yes", "rejected": "Q: Who?\nA: No"}, "no_template")

    assert tokenizer.decode(pair.prompt) == "<|bos|>Q: Who?\nA:"
    assert scored_text(pair, "chosen", tokenizer) == " Yes<|eos|>"
    assert scored_text(pair, "rejected", tokenizer) == " No<|eos|>"


def test_plain_text_that_spells_out_bos_and_end_has_each_once():
    pair, tokenizer = pair_of({"chosen": "<|bos|>The cat<|eos|>", "rejected": "<|bos|>The dog<|eos|>\n"}, "no_template")

    assert whole_text(pair, "chosen", tokenizer) == "<|bos|>The cat<|eos|>"
    assert whole_text(pair, "rejected", tokenizer) == "<|bos|>The dog<|eos|>"


def test_plain_text_that_shares_no_token_has_an_end_token_as_context_where_there_is_no_bos():
    pair, tokenizer = pair_of({"chosen": "Yes", "rejected": "No"}, "no_template_no_bos")

    assert tokenizer.decode(pair.prompt) == "<|eos|>"
    assert scored_text(pair, "chosen", tokenizer) == "Yes<|eos|>"


def test_plain_text_that_shares_no_token_is_unusable_without_any_token_for_context():
    with pytest.raises(UnusableRow, match="neither a BOS nor an EOS token"):
        pair_of({"chosen": "Yes", "rejected": "No"}, "no_end")


def test_a_text_that_the_other_one_continues_scores_its_end():
    pair, tokenizer = pair_of({"chosen": "The cat", "rejected": "The cat is on"}, "no_template")

    assert scored_text(pair, "chosen", tokenizer) == "<|eos|>"
    assert scored_text(pair, "rejected", tokenizer) == " is on<|eos|>"


def test_plain_text_that_spells_out_its_end_twice_has_it_once():
    pair, tokenizer = pair_of({"chosen": "The cat<|eos|>\n<|eos|>", "rejected": "The dog"}, "no_template")

    assert whole_text(pair, "chosen", tokenizer) == "<|bos|>The cat<|eos|>"


# What holds for any text.

WORDS = st.text(st.sampled_from("Yes No cat .,!\n  éß🦄中<>A:"), min_size=1, max_size=24)


@pytest.mark.parametrize("kind", CHAT_KINDS)
@given(prompt=WORDS, chosen=WORDS, rejected=WORDS)
def test_any_answer_is_scored_whole_with_one_end_token_behind_a_shared_prompt(kind, prompt, chosen, rejected):
    assume(prompt.strip() and chosen.strip() and rejected.strip() and chosen.strip() != rejected.strip())
    if "thinking" in kind:
        chosen, rejected = chosen.lstrip("\n"), rejected.lstrip("\n")
    tokenizer = ChatTokenizer(tokenizer_named(kind))
    shown = (lambda text: text.strip()) if kind == "headers" else (lambda text: text)
    end = END.get(kind, "<|im_end|>")

    pair = tokenize(parse_row({"prompt": prompt, "chosen": chosen, "rejected": rejected}, Columns()), tokenizer)

    assert len(pair.prompt) >= 1
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        text = scored_text(pair, side, tokenizer)
        assert text.endswith(shown(answer) + end)
        # Only characters that share a token with the answer's first may be scored beside it.
        assert text[: len(text) - len(shown(answer) + end)] in (("", " ") if kind in ("bare", "no_end") else ("",))
        whole = whole_text(pair, side, tokenizer)
        assert shown(prompt) in whole
        assert whole.count("<|bos|>") == (1 if kind in ("headers", "no_system") else 0)
        assert whole.rstrip().endswith(end)
        assert not end or not whole.endswith(end + end)


@given(shared=WORDS, chosen=WORDS, rejected=WORDS)
def test_any_plain_texts_are_scored_from_where_they_part(shared, chosen, rejected):
    assume(chosen.strip() and rejected.strip() and chosen != rejected)
    tokenizer = ChatTokenizer(tokenizer_named("no_template"))

    pair = tokenize(PlainText(shared + chosen, shared + rejected), tokenizer)

    assert pair.chosen[0] != pair.rejected[0]
    assert pair.chosen_scored.all()
    assert whole_text(pair, "chosen", tokenizer) == f"<|bos|>{shared}{chosen}<|eos|>"
    assert whole_text(pair, "rejected", tokenizer) == f"<|bos|>{shared}{rejected}<|eos|>"

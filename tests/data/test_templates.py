"""What a template reads and writes beside the messages: time, arguments, BOS, ends of turns."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from support.data_tokenizers import CHATML, HEADERS, make_tokenizer, tokenizer_named
from support.refusals import refused
from tokenizers import normalizers

from mlx_cpo_plugin.data.chat_template import read_template
from mlx_cpo_plugin.data.columns import Columns
from mlx_cpo_plugin.data.rows import parse_row
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.data.tokens import prompt_tokens, tokenize
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.training.identity import check_identity

ROW = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}
TALK = {
    "chosen": [
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Very."},
    ],
    "rejected": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "No."}],
}


def parts(row, tokenizer):
    """Prompt, and the scored text of either side."""
    pair = tokenize(parse_row(row, Columns()), tokenizer)
    return (
        tokenizer.decode(pair.prompt),
        tokenizer.decode(pair.chosen[pair.chosen_scored]),
        tokenizer.decode(pair.rejected[pair.rejected_scored]),
    )


# Time.

DATED = "{{ strftime_now('%d %b %Y %H:%M:%S') }}\n" + CHATML
BEGUN = datetime(2024, 2, 29, 23, 59, 58, tzinfo=UTC)


def test_a_template_is_told_the_time_at_which_the_run_began():
    tokenizer = ChatTokenizer.from_settings(make_tokenizer(DATED), RunSettings.of({"begun": BEGUN}))

    assert parts(ROW, tokenizer)[0].startswith("29 Feb 2024 23:59:58\n")
    assert tokenizer.decode(prompt_tokens("Is it?", tokenizer)).startswith("29 Feb 2024 23:59:58\n")


def test_without_a_run_all_of_a_process_is_told_one_time():
    first, second = (ChatTokenizer(make_tokenizer(DATED)) for _ in range(2))

    assert parts(ROW, first) == parts(ROW, second)


def test_the_templates_of_others_still_tell_the_time_afterwards():
    tokenizer = make_tokenizer(DATED)
    parts(ROW, ChatTokenizer(tokenizer, now=BEGUN))

    text = tokenizer.apply_chat_template([{"role": "user", "content": "Is it?"}], tokenize=False)

    assert datetime.strptime(text.partition("\n")[0], "%d %b %Y %H:%M:%S").year > BEGUN.year


# The template of the settings and its arguments.

MOOD = "{{ mood | default('none') }}:" + CHATML


def test_the_arguments_of_the_settings_reach_the_template_and_those_of_a_row_go_first():
    settings = RunSettings.of({"chat_template_kwargs": {"mood": "calm"}})
    tokenizer = ChatTokenizer.from_settings(make_tokenizer(MOOD), settings)

    assert parts(ROW, tokenizer)[0].startswith("calm:")
    assert parts({**ROW, "chat_template_kwargs": {"mood": "glad", "other": None}}, tokenizer)[0].startswith("glad:")
    assert parts({**ROW, "chat_template_kwargs": '{"mood": "glad"}'}, tokenizer)[0].startswith("glad:")


def test_whether_to_think_is_no_longer_tried_where_it_is_said():
    tokenizer = tokenizer_named("thinking")
    thoughtless = "<think>\n\n</think>\n\n"

    free, told = ChatTokenizer(tokenizer), ChatTokenizer(tokenizer, template_kwargs={"enable_thinking": True})

    assert parts(ROW, free)[0].endswith(thoughtless)
    assert not parts(ROW, told)[0].endswith(thoughtless)
    assert parts({**ROW, "chat_template_kwargs": {"enable_thinking": False}}, told)[0].endswith(thoughtless)


@pytest.mark.parametrize("template", ["thinking", "either_thinking", "mode_in_system", "mode_opens_thinking"])
@pytest.mark.parametrize("answer", ["Yes.", "<think>\nHm.\n</think>\n\nYes."])
def test_the_arguments_that_a_prompt_was_rendered_with_are_found_again(template: str, answer: str) -> None:
    tokenizer = ChatTokenizer(tokenizer_named(template))
    told = {**ROW, "chosen": answer, "rejected": answer.replace("Yes", "No")}

    prompt = tokenize(parse_row(told, Columns()), tokenizer).prompt

    rendered = tokenizer.render([{"role": "user", "content": "Is it?"}], None, True, tokenizer.variant_of(prompt))
    assert tokenizer.decode(prompt) == rendered


def test_the_template_of_the_settings_goes_before_the_tokenizers_own(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(MOOD)

    for given in (MOOD, str(file)):
        tokenizer = ChatTokenizer.from_settings(tokenizer_named("headers"), RunSettings.of({"chat_template": given}))
        assert parts(ROW, tokenizer)[0].startswith("none:<|im_start|>user")


def test_a_template_that_wants_the_arguments_of_calls_as_text_gets_json():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name + ':' + call.function.arguments }}{% endfor %}"
        "<|im_end|>\n{% endfor %}"
    )
    tokenizer = ChatTokenizer(tokenizer_named("chatml"), template)
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "über"}}}

    text = tokenizer.render([{"role": "assistant", "content": "", "tool_calls": [call]}], None)

    assert text == '<|im_start|>assistant\nlook:{"at": "über"}<|im_end|>\n'
    assert call["function"]["arguments"] == {"at": "über"}


def test_a_template_that_is_neither_jinja_nor_a_file_is_an_error():
    with refused(ConfigError, key="chat_template"):
        read_template("chatml")


# BOS.


def test_a_tokenizer_without_a_template_of_its_own_has_its_bos_in_front():
    tokenizer = make_tokenizer(None, eos="<|eos|>", bos="<|bos|>")
    host = pytest.importorskip("mlx_lm_lora.chat_template", reason="mlx-lm-lora 5.8.6 has no template to fall back on")
    assert host.ensure_chat_template(tokenizer)

    assert parts(ROW, ChatTokenizer(tokenizer)) == ("<|bos|>user: Is it?\nassistant:", " Yes.<|eos|>", " No.<|eos|>")


def test_a_template_of_its_own_has_the_bos_that_it_writes_and_no_other():
    own = make_tokenizer(CHATML, bos="<|bos|>")

    assert parts(ROW, ChatTokenizer(own))[0].startswith("<|im_start|>")
    assert parts(ROW, ChatTokenizer(tokenizer_named("headers")))[0].count("<|bos|>") == 1


# Ends of turns.

HEADER = "<|im_start|>assistant\n\n"
# Jinja would drop the last line break of a template.
ALWAYS_OPEN = HEADERS.replace("{% if add_generation_prompt %}", "").replace(
    HEADER + "{% endif %}", "{{ '" + HEADER + "' }}"
)
BARE_OPEN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


@pytest.mark.parametrize("row", [ROW, TALK], ids=["one turn", "several"])
@pytest.mark.parametrize("other_ends", [("<|eot|>",), ()], ids=["an end of generation", "a special token"])
def test_a_header_that_always_follows_is_no_part_of_the_answer(row, other_ends):
    asked, always = (
        ChatTokenizer(make_tokenizer(template, eos="<|eos|>", bos="<|bos|>", other_ends=other_ends))
        for template in (HEADERS, ALWAYS_OPEN)
    )

    assert parts(row, always) == parts(row, asked)
    assert parts(row, always)[2] == "No.<|eot|>"


def test_a_header_without_any_special_token_is_cut_and_the_end_token_added():
    tokenizer = ChatTokenizer(make_tokenizer(BARE_OPEN, eos="<|eos|>"))

    assert parts(ROW, tokenizer) == ("user: Is it?\nassistant:", " Yes.<|eos|>", " No.<|eos|>")


@pytest.mark.parametrize("ending", ["END", "<|im_start|>", "<|im_start|>user\n", "<|pad|>\n\n"])
def test_the_first_end_token_behind_an_answer_ends_it_whatever_follows(ending):
    tokenizer = ChatTokenizer(make_tokenizer(CHATML + "{% if not add_generation_prompt %}" + ending + "{% endif %}"))

    assert parts(ROW, tokenizer)[1:] == ("Yes.<|im_end|>", "No.<|im_end|>")


def test_a_call_ends_with_its_turn_where_a_header_always_follows():
    template = ALWAYS_OPEN.replace(
        "<|eot|>", "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|eot|>"
    )
    tokenizer = ChatTokenizer(make_tokenizer(template, eos="<|eos|>", bos="<|bos|>"))
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": ["mat", 1]}}}
    row = {**ROW, "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}]}

    assert parts(row, tokenizer)[1] == ('<call>{"name": "look", "arguments": {"at": ["mat", 1]}}</call><|eot|>')


# A tokenizer that has changed.


def test_a_refused_resume_says_that_the_tokenizer_has_changed():
    old, new = (
        {"data": name, "tokenizer": ChatTokenizer(make_tokenizer(template)).digest()}
        for name, template in (("a", CHATML), ("b", HEADERS))
    )
    checkpoint = SimpleNamespace(folder="x", values={"identity": old})

    with pytest.raises(ConfigError, match="other settings: data, tokenizer or chat template;"):
        check_identity(checkpoint, new)
    with refused(ConfigError, key="data"):
        check_identity(checkpoint, {**new, "tokenizer": old["tokenizer"]})
    check_identity(checkpoint, {**new, "data": "a"})


def test_a_tokenizer_that_composes_characters_ends_answers_once():
    composing = make_tokenizer(CHATML)
    composing._tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer = ChatTokenizer(composing)

    prompt, chosen, rejected = parts({"prompt": "Cafe\u0301", "chosen": "e\u0301", "rejected": "No e\u0301"}, tokenizer)

    assert prompt == "<|im_start|>user\nCaf\u00e9<|im_end|>\n<|im_start|>assistant\n"
    assert (chosen, rejected) == ("\u00e9<|im_end|>", "No \u00e9<|im_end|>")


def test_turns_in_two_unicode_forms_are_the_same_where_the_tokenizer_composes_them():
    composing = make_tokenizer(CHATML)
    composing._tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    sides = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}, {"role": "user", "content": "Who?"}]
        for text in ("Cafe\u0301", "Caf\u00e9")
    ]
    row = {
        "chosen": [*sides[0], {"role": "assistant", "content": "Yes."}],
        "rejected": [*sides[1], {"role": "assistant", "content": "No."}],
    }

    assert parts(row, ChatTokenizer(composing))[1] == "Yes.<|im_end|>"
    assert "Caf" in parts(row, ChatTokenizer(make_tokenizer(CHATML)))[1]

"""Columns that repeat one another are one conversation; what cannot be joined is left out with its reason."""

import json

import pytest
from support.data_tokenizers import CHATML, make_tokenizer, tokenizer_named

from mlx_cpo_plugin.data.columns import Columns
from mlx_cpo_plugin.data.messages import UnusableRow, decode_messages
from mlx_cpo_plugin.data.rows import PlainText, parse_row
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.data.tokens import tokenize


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def texts(row, tokenizer=None):
    """What is prompt and what is scored on either side, as text."""
    tokenizer = ChatTokenizer(tokenizer or tokenizer_named("chatml"))
    pair = tokenize(parse_row(row, Columns()), tokenizer)
    scored = [tokenizer.decode(pair.chosen[pair.chosen_scored]), tokenizer.decode(pair.rejected[pair.rejected_scored])]
    return tokenizer.decode(pair.prompt), *scored


def said(row):
    """Role and text of the chosen side."""
    return [(message["role"], message["content"]) for message in parse_row(row, Columns()).chosen]


STORY, ONCE, NO = user("A story"), assistant("Once."), assistant("No.")
PLAIN = {"prompt": [STORY], "chosen": [ONCE], "rejected": [NO]}
METADATA = [
    {"id": "1"},
    {"timestamp": 1700000000},
    {"weight": 0.5},
    {"name": "ann"},
    {"extra": {"a": [1, None]}},
    {"reasoning_content": ""},
    {"score": 1.25},
]


@pytest.mark.parametrize("more", METADATA, ids=lambda more: next(iter(more)))
def test_messages_that_differ_in_what_no_template_shows_are_the_same_turns(more):
    talk = [user("Hi"), assistant("Hello."), STORY]
    marked = [{**message, **more} for message in talk]

    assert texts({"chosen": [*marked, ONCE], "rejected": [*talk, NO]}) == texts(
        {"chosen": [*talk, ONCE], "rejected": [*talk, NO]}
    )
    assert texts({"chosen": [*marked, ONCE], "rejected": [*talk, NO]})[1] == "Once.<|im_end|>"


def test_a_key_that_the_template_shows_makes_turns_differ():
    named = make_tokenizer(CHATML.replace("{{ m['role'] }}", "{{ m['role'] }}{{ m.name or '' }}"))
    talk = [user("Hi"), assistant("Hello."), STORY]
    row = {"chosen": [user("Hi"), assistant("Hello.", name="ann"), STORY, ONCE], "rejected": [*talk, NO]}

    assert texts(row)[1] == "Once.<|im_end|>"
    assert texts(row, named)[1].startswith("ann\nHello.<|im_end|>") or "Hello." in texts(row, named)[1]


def test_white_space_that_the_template_trims_makes_no_difference_between_turns():
    talk = [user("Hi"), assistant("Hello."), STORY]
    spaced = [user(" Hi"), assistant("Hello.\n"), STORY]
    row = {"chosen": [*spaced, ONCE], "rejected": [*talk, NO]}

    assert texts(row, tokenizer_named("headers"))[1] == "Once.<|eot|>"
    assert "Hello." in texts(row, tokenizer_named("chatml"))[1]


def test_thoughts_that_the_template_drops_make_no_difference_between_turns():
    row = {
        "chosen": [user("Hi"), assistant("<think>\na\n</think>\n\nHello."), STORY, ONCE],
        "rejected": [user("Hi"), assistant("<think>\nb\n</think>\n\nHello."), STORY, NO],
    }

    assert texts(row, tokenizer_named("thinking"))[1] == "Once.<|im_end|>"


@pytest.mark.parametrize("repeated", ["A story\n", " A story", "A story"])
@pytest.mark.parametrize("more", [{}, {"name": "ann"}, {"id": "7"}])
def test_a_prompt_column_that_the_lists_repeat_stands_once(repeated, more):
    row = {"prompt": repeated, "chosen": [user("A story", **more), ONCE], "rejected": [user("A story", **more), NO]}

    assert texts(row) == texts(PLAIN)


def test_a_prompt_in_another_unicode_form_stands_once():
    row = {
        "prompt": "Cafe\u0301?",
        "chosen": [user("Caf\u00e9?"), ONCE],
        "rejected": [user("Caf\u00e9?"), NO],
    }

    assert said(row) == [("user", "Caf\u00e9?"), ("assistant", "Once.")]


def test_a_prompt_that_is_part_of_the_lists_question_stands_once():
    whole = user("Be brief.\n\nA story")

    assert said({"prompt": "A story", "chosen": [whole, ONCE], "rejected": [whole, NO]}) == [
        ("user", "Be brief.\n\nA story"),
        ("assistant", "Once."),
    ]


def reason(row):
    with pytest.raises(UnusableRow) as caught:
        parse_row(row, Columns())
    return str(caught.value)


def test_two_different_questions_in_a_row_are_left_out():
    row = {"prompt": "A story", "chosen": [user("A poem"), ONCE], "rejected": [user("A poem"), NO]}

    assert reason(row) == "the answers begin with a question that is not the prompt's"


def test_messages_that_end_with_neither_answer_are_left_out():
    row = {"messages": [STORY, assistant("Well.")], "chosen": "Once.", "rejected": "No."}

    assert reason(row) == "the prompt ends with an answer that is neither of the two"


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_messages_that_end_with_one_of_the_answers_lose_it(column):
    assert texts({column: [STORY, ONCE], "chosen": "Once.", "rejected": "No."}) == texts(PLAIN)
    assert texts({column: [STORY, NO], "chosen": "Once.", "rejected": "No."}) == texts(PLAIN)


# A prompt that has the assistant's beginning.

PARTIAL = [user("Capital?"), assistant("The capital is")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PARTIAL, "chosen": " Rome.", "rejected": " Paris."},
        {"prompt": PARTIAL, "chosen": [assistant(" Rome.")], "rejected": [assistant(" Paris.")]},
        {"prompt": PARTIAL, "chosen": "The capital is Rome.", "rejected": "The capital is Paris."},
        {
            "prompt": "\n\nHuman: Capital?\n\nAssistant: The capital is",
            "chosen": " Rome.",
            "rejected": " Paris.",
        },
    ],
    ids=["text", "messages", "repeated", "dialogue"],
)
@pytest.mark.parametrize("kind", ["chatml", "headers", "thinking"])
def test_a_prompt_that_ends_in_a_partial_answer_is_continued(row, kind):
    tokenizer = tokenizer_named(kind)
    prompt, chosen, rejected = texts(row, tokenizer)

    assert prompt == tokenizer.apply_chat_template(PARTIAL, tokenize=False, continue_final_message=True)
    assert (chosen[:6], rejected[:7]) == (" Rome.", " Paris.")


def test_a_call_cannot_be_continued():
    call = [{"type": "function", "function": {"name": "look", "arguments": {}}}]

    assert "neither of the two" in reason({"prompt": [STORY, assistant("", tool_calls=call)], **ANSWERS})


ANSWERS = {"chosen": "Once.", "rejected": "No."}


# System messages.


def test_system_messages_of_two_columns_are_joined_in_order_and_the_same_one_stands_once():
    row = {
        "system": "Be kind.",
        "chosen": [system("Be short."), STORY, ONCE],
        "rejected": [system("Be short."), STORY, NO],
    }

    assert said(row)[:2] == [("system", "Be kind."), ("system", "Be short.")]
    assert said({**row, "system": "Be short. "})[:2] == [("system", "Be short."), ("user", "A story")]


def test_an_empty_system_message_leaves_nothing_behind_where_the_template_has_no_such_role():
    prompt = [system(""), user("Hi")]

    both = [texts({"prompt": prompt[first:], **ANSWERS}, tokenizer_named("no_system"))[0] for first in (0, 1)]

    assert both[0] == both[1]


def test_several_system_messages_keep_their_order_where_the_template_has_no_such_role():
    prompt = [system("A"), system("B"), user("Hi"), assistant("Yes."), system("C"), user("Who?")]

    text, _, _ = texts({"prompt": prompt, **ANSWERS}, tokenizer_named("no_system"))

    assert "user\nA\n\nB\n\nHi<|im_end|>" in text
    assert "user\nC\n\nWho?<|im_end|>" in text


ONE_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}{{ raise_exception('one system') }}"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IGNORING = ONE_SYSTEM.replace("{{ raise_exception('one system') }}{% endif %}", "{% else %}").replace(
    "<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [ONE_SYSTEM, IGNORING], ids=["refuses", "drops"])
def test_a_template_with_one_system_message_gets_one(template):
    text, _, _ = texts({"prompt": [system("A"), system("B"), user("Hi")], **ANSWERS}, make_tokenizer(template))

    assert text == "<|im_start|>system\nA\n\nB<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_role_that_the_template_drops_without_a_word_makes_the_row_unusable():
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
    prompt = [user("Hi"), assistant("Let me look."), {"role": "tool", "content": "a cat"}]

    with pytest.raises(UnusableRow, match="leaves out a message of the role tool"):
        texts({"prompt": prompt, **ANSWERS}, make_tokenizer(template))


@pytest.mark.parametrize("said", ["3 degrees in Oslo", "user"], ids=["an answer says it, too", "the template says it"])
def test_a_dropped_message_is_noticed_whoever_else_says_the_same(said):
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
    prompt = [user("Hi"), assistant("Let me look."), {"role": "tool", "content": said}]

    with pytest.raises(UnusableRow, match="leaves out a message of the role tool"):
        texts({"prompt": prompt, "chosen": f"It is {said}.", "rejected": "No."}, make_tokenizer(template))


def test_a_second_system_message_that_the_answers_quote_is_folded_all_the_same():
    prompt = [system("Be kind."), user("Hi"), system("Speak French please")]
    answers = {"chosen": "I was told: Speak French please", "rejected": "No: Speak French please"}

    text, _, _ = texts({"prompt": prompt, **answers}, make_tokenizer(IGNORING))

    assert text.count("Speak French please") == 1


# Messages that were stored as text.

TALK = [STORY, ONCE]


@pytest.mark.parametrize(
    "written", [json.dumps(TALK), repr(TALK), json.dumps(TALK, indent=1), " " + repr(tuple(TALK[:1]) and TALK)]
)
def test_messages_written_as_text_are_read(written):
    row = {"prompt": "A story", "chosen": written, "rejected": json.dumps([STORY, NO])}

    assert texts(row) == texts(PLAIN)


def test_every_column_may_hold_messages_as_text():
    assert texts({name: json.dumps(value) for name, value in PLAIN.items()}) == texts(PLAIN)
    assert texts({"prompt": json.dumps(STORY), "chosen": json.dumps(ONCE), "rejected": repr(NO)}) == texts(PLAIN)
    assert texts({"prompt": [json.dumps(STORY)], "chosen": [repr(ONCE)], "rejected": [NO]}) == texts(PLAIN)
    openai = {"input": json.dumps({"messages": [STORY]}), "preferred_output": [ONCE], "non_preferred_output": [NO]}
    assert texts(openai) == texts(PLAIN)


@pytest.mark.parametrize(
    "written",
    [
        json.dumps(TALK)[:-9],
        "[{'role': 'user', 'content': 'A story'}\n {'role': 'assistant', 'content': 'Once.'}]",
        "array([{'role': 'user', 'content': 'A'}], dtype=object)",
        "[Message(role='user', content='A')]",
    ],
    ids=["torn", "NumPy", "an array", "objects"],
)
def test_messages_in_a_text_that_cannot_be_decoded_are_left_out_with_that_reason(written):
    assert reason({"prompt": "A story", "chosen": written, "rejected": "No."}) == (
        "text that looks like a list of messages cannot be decoded"
    )


@pytest.mark.parametrize(
    "text",
    [
        "[1] A story",
        "[{",
        '{"role": "admin", "name": "x"}',
        '[{"name": "x"}]',
        'Send [{"role": "user", "content": "Hi"}].',
        "{ role: 'user' }",
        "[a](b) role",
        "",
    ],
)
def test_other_text_that_begins_like_a_list_stays_text(text):
    assert decode_messages(text) == text


def test_plain_text_that_begins_like_a_list_stays_plain():
    row = {"chosen": "[1] One.", "rejected": "[1] Two."}

    assert parse_row(row, Columns()) == PlainText("[1] One.", "[1] Two.")


# Nulls that a schema brings.


def calls(*found):
    return {**PLAIN, "chosen": [{"role": "assistant", "content": "Once.", "tool_calls": list(found)}]}


@pytest.mark.parametrize(
    "hollow", [{"id": None}, {"id": None, "function": {"name": None, "arguments": None}}, None, {"function": None}]
)
def test_calls_of_nulls_are_none(hollow):
    assert texts(calls(hollow)) == texts(PLAIN)


def test_nulls_inside_of_arguments_and_tools_go_but_not_those_of_a_list_or_a_text():
    found = {"function": {"name": "look", "arguments": {"at": {"x": None, "y": 1}, "of": None, "list": [1, None]}}}
    written = {"function": {"name": "look", "arguments": '{"of": null}'}}

    row = parse_row({**calls(found, written), "tools": [{"name": "look", "strict": None}]}, Columns())

    arguments = [call["function"]["arguments"] for call in row.chosen[-1]["tool_calls"]]
    assert arguments == [{"at": {"y": 1}, "list": [1, None]}, {"of": None}]
    assert row.tools == [{"name": "look"}]


def test_missing_values_of_tables_are_missing():
    nan = float("nan")

    assert texts({"system": nan, "prompt": "A story", "chosen": "Once.", "rejected": "No.", "tools": nan}) == texts(
        PLAIN
    )
    assert reason({"prompt": "A story", "chosen": nan, "rejected": "No."}) == "the chosen answer is missing"


# Tasks in Alpaca's columns.


@pytest.mark.parametrize("column", ["instruction", "question", "query"])
def test_a_task_has_its_input(column):
    row = {column: "Translate.", "input": "Katze", **ANSWERS}

    assert said(row)[0] == ("user", "Translate.\nKatze")


def test_an_empty_prompt_column_does_not_hide_the_instruction():
    assert said({"prompt": "", "instruction": "Translate.", "input": "Katze", **ANSWERS})[0] == (
        "user",
        "Translate.\nKatze",
    )


def test_a_history_stands_before_the_task():
    row = {"instruction": "Who?", "history": [["Hi", "Hello."]], **ANSWERS}

    assert said(row)[:3] == [("user", "Hi"), ("assistant", "Hello."), ("user", "Who?")]

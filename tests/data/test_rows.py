"""One raw row of any accepted format becomes a conversation or plain text."""

import numpy as np
import pytest
from support.refusals import refused

from mlx_cpo_plugin.data.columns import Columns
from mlx_cpo_plugin.data.messages import UnusableRow, parse_dialogue
from mlx_cpo_plugin.data.rows import Conversation, PlainText, parse_row, repeating_prompts
from mlx_cpo_plugin.errors import DataError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


QUESTION, GOOD, BAD = user("What is it?"), assistant("A cat."), assistant("A dog.")

SAME_CONVERSATION = {
    "strings with a prompt": {"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."},
    "messages with a prompt list": {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
    "messages with a prompt string": {"prompt": "What is it?", "chosen": [GOOD], "rejected": [BAD]},
    "strings with a prompt list": {"prompt": [QUESTION], "chosen": "A cat.", "rejected": "A dog."},
    "single messages": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "a message without its role": {
        "prompt": QUESTION,
        "chosen": {"content": "A cat."},
        "rejected": {"content": "A dog."},
    },
    "messages under a key": {
        "prompt": "What is it?",
        "chosen": {"messages": [GOOD]},
        "rejected": {"messages": [BAD]},
    },
    "whole conversations": {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
    "whole conversations that repeat the prompt string": {
        "prompt": "What is it?",
        "chosen": [QUESTION, GOOD],
        "rejected": [QUESTION, BAD],
    },
    "whole conversations that repeat the prompt list": {
        "prompt": [QUESTION],
        "chosen": [QUESTION, GOOD],
        "rejected": [QUESTION, BAD],
    },
    "whole conversations beside the chosen one": {
        "messages": [QUESTION, GOOD],
        "chosen": [QUESTION, GOOD],
        "rejected": [QUESTION, BAD],
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "What is it?"}],
        "chosen": {"from": "gpt", "value": "A cat."},
        "rejected": {"from": "gpt", "value": "A dog."},
    },
    "OpenAI": {"input": {"messages": [QUESTION]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    "dialogues": {
        "chosen": "\n\nHuman: What is it?\n\nAssistant: A cat.",
        "rejected": "\n\nHuman: What is it?\n\nAssistant: A dog.",
    },
    "dialogues that repeat the prompt": {
        "prompt": "\n\nHuman: What is it?\n\nAssistant:",
        "chosen": "\n\nHuman: What is it?\n\nAssistant: A cat.",
        "rejected": "\n\nHuman: What is it?\n\nAssistant: A dog.",
    },
    "a dialogue as the prompt": {
        "prompt": "\n\nHuman: What is it?\n\nAssistant:",
        "chosen": "A cat.",
        "rejected": "A dog.",
    },
    "content in parts": {
        "prompt": [
            {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]}
        ],
        "chosen": [GOOD],
        "rejected": [BAD],
    },
    "texts under other keys": {
        "prompt": [{"role": "user", "text": "What is it?"}],
        "chosen": {"role": "model", "parts": [{"text": "A "}, {"text": "cat."}]},
        "rejected": {"role": "assistant", "content": None, "value": "A dog."},
    },
    "roles and texts in lists": {
        "prompt": {"role": ["user"], "content": ["What is it?"]},
        "chosen": {"from": ["gpt"], "value": ["A cat."]},
        "rejected": {"role": ["assistant"], "content": ["A dog."]},
    },
    "names of columns with capitals": {"Question": "What is it?", "Chosen": "A cat.", "REJECTED": "A dog."},
    "a context": {"context": [QUESTION], "chosen": "A cat.", "rejected": "A dog."},
    "fields filled with null": {
        "prompt": [{"role": "user", "content": "What is it?", "tool_calls": None, "name": None}],
        "chosen": [GOOD],
        "rejected": [BAD],
        "tools": None,
        "system": None,
    },
}


@pytest.mark.parametrize("row", SAME_CONVERSATION.values(), ids=SAME_CONVERSATION)
def test_every_format_says_the_same_conversation(row):
    assert parse_row(row, Columns()) == Conversation([QUESTION, GOOD], [QUESTION, BAD], shared=1)


def test_strings_without_a_prompt_are_plain_text():
    assert parse_row({"chosen": "One two.", "rejected": "One three."}, Columns()) == PlainText("One two.", "One three.")


def test_one_dialogue_and_one_other_text_are_plain_text():
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "Hello"}

    assert isinstance(parse_row(row, Columns()), PlainText)


def test_a_dialogue_with_several_turns_keeps_them_and_joins_turns_of_one_speaker():
    text = "\n\nHuman: One\n\nHuman: Two\n\nwith a gap\n\nAssistant: Three\n\nHuman: Four\n\nAssistant: Five"

    assert parse_dialogue(text) == [
        user("One\n\nTwo\n\nwith a gap"),
        assistant("Three"),
        user("Four"),
        assistant("Five"),
    ]


@pytest.mark.parametrize(
    "text", ["Human: alone", "He said\n\nHuman: a\n\nAssistant: b", "Assistant: a\n\nHuman: b", ""]
)
def test_other_text_is_no_dialogue(text):
    assert parse_dialogue(text) is None


def test_the_prompt_is_every_message_that_both_sides_share():
    turns = [system("Be brief."), QUESTION, assistant("Guess."), user("A cat?")]

    row = parse_row({"chosen": [*turns, assistant("Yes.")], "rejected": [*turns, assistant("No.")]}, Columns())

    assert row.shared == 4


def test_sides_that_part_early_keep_all_their_later_turns_in_the_answer():
    chosen = [QUESTION, GOOD, user("Sure?"), assistant("Yes.")]
    rejected = [QUESTION, BAD, user("Sure?"), assistant("Yes.")]

    row = parse_row({"chosen": chosen, "rejected": rejected}, Columns())

    assert (row.shared, row.chosen, row.rejected) == (1, chosen, rejected)


def test_the_last_answer_is_never_shared_even_where_one_side_goes_on():
    row = parse_row({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, GOOD, user("?"), BAD]}, Columns())

    assert row.shared == 1


def test_the_prompt_column_may_hold_history_that_the_answer_list_does_not_repeat():
    history = [user("Hello"), assistant("Hi")]

    row = parse_row(
        {"prompt": [*history, QUESTION], "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, Columns()
    )

    assert row.chosen == [*history, QUESTION, GOOD]


def test_the_prompt_column_may_name_only_the_last_question_of_whole_conversations():
    history = [user("Hello"), assistant("Hi")]
    row = {"prompt": "What is it?", "chosen": [*history, QUESTION, GOOD], "rejected": [*history, QUESTION, BAD]}

    assert parse_row(row, Columns()).chosen == [*history, QUESTION, GOOD]


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."},
        {"system": "Be brief.", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        {
            "system": "Be brief.",
            "prompt": [system("Be brief."), QUESTION],
            "chosen": [GOOD],
            "rejected": [BAD],
        },
        {"prompt": [system("Be brief."), QUESTION], "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        {"prompt": [{"role": "developer", "content": "Be brief."}, QUESTION], "chosen": [GOOD], "rejected": [BAD]},
        {
            "system": "Be brief.",
            "chosen": "\n\nHuman: What is it?\n\nAssistant: A cat.",
            "rejected": "\n\nHuman: What is it?\n\nAssistant: A dog.",
        },
    ],
)
def test_a_system_message_comes_first_and_once(row):
    assert parse_row(row, Columns()).chosen == [system("Be brief."), QUESTION, GOOD]


def test_the_prompt_may_be_several_columns():
    columns = Columns(prompt="task + text")
    row = {"task": "Translate.", "text": "Katze", "chosen": "cat", "rejected": "dog"}

    assert parse_row(row, columns).chosen[0] == user("Translate.\nKatze")
    assert parse_row(row | {"text": None}, columns).chosen[0] == user("Translate.")
    assert parse_row(row | {"task + text": "Hi"}, columns).chosen[0] == user("Hi")
    with refused(DataError, "no column 'text'", key="prompt_feature", place="a.json", allowed="task, chosen, rejected"):
        columns.check([{"task": "Hi", "chosen": "", "rejected": ""}], "a.json")


def test_an_instruction_and_its_input_are_one_prompt():
    row = {"instruction": "Translate.", "input": "Katze", "chosen": "cat", "rejected": "dog"}

    assert parse_row(row, Columns()).chosen[0] == user("Translate.\nKatze")


@pytest.mark.parametrize(
    ("task", "material", "expected"),
    [
        ("Is it negative?", "negative", "Is it negative?\nnegative"),
        ("Say this:\na cat", "a cat", "Say this:\na cat"),
        ("Shorten 'a cat on a mat'.", "a cat on a mat", "Shorten 'a cat on a mat'."),
        ("Say it.", " ", "Say it."),
    ],
)
def test_an_input_is_left_out_only_where_the_instruction_has_it(task, material, expected):
    row = {"instruction": task, "input": material, "chosen": "a", "rejected": "b"}

    assert parse_row(row, Columns()).chosen[0] == user(expected)


def asked(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_a_prompt_that_the_texts_of_nearly_all_rows_begin_with_is_used_once():
    rows = [asked(f"What is number {i}?", f"What is number {i}? {i}.", f" What is number {i}?\n\nA") for i in range(19)]
    odd = asked("What is it now?", "What is it? A cat.", "What is it now? No.")

    assert repeating_prompts([*rows, odd], Columns()) == 19
    row = parse_row(rows[1], Columns(prompt_repeated=True))
    assert (row.chosen, row.rejected[1]) == ([user("What is number 1?"), assistant("1.")], assistant("A"))
    assert parse_row(odd, Columns(prompt_repeated=True)).chosen[1] == assistant("What is it? A cat.")
    assert parse_row(rows[1], Columns()).chosen[1] == assistant("What is number 1? 1.")
    assert repeating_prompts([*rows, odd, odd, odd], Columns()) == 0


@pytest.mark.parametrize(
    "row",
    [
        asked("Hello there", "Hello there! Yes?", "Hello there. No."),
        asked("Go on", "Go on and on.", "Go on, no."),
        asked("What is it", "What is it to you?", "What is it?! No."),
    ],
)
def test_words_that_answers_happen_to_begin_with_are_no_prompt(row):
    assert repeating_prompts([row], Columns()) == 0


def test_code_behind_a_repeated_prompt_keeps_its_indentation():
    row = asked("def add(a, b):\n", "def add(a, b):\n    return a + b", "def add(a, b):\n    pass")

    assert parse_row(row, Columns(prompt_repeated=True)).chosen[1] == assistant("    return a + b")


@pytest.mark.parametrize("history", [[["Hi!", "Hello."]], [user("Hi!"), assistant("Hello.")]])
@pytest.mark.parametrize("columns", [Columns(), Columns(prompt="ask")])
def test_a_history_comes_before_the_prompt_whatever_its_column(history, columns):
    row = {columns.prompt.replace("auto", "prompt"): "What is it?", "history": history}
    row |= {"chosen": "A cat.", "rejected": "A dog."}

    assert parse_row(row, columns).chosen == [user("Hi!"), assistant("Hello."), QUESTION, GOOD]
    assert "history" in columns.read([row]).read["prompt"]


def test_a_history_that_ends_with_the_question_has_it_once_and_a_dialogue_stays_one():
    history = [user("Hi!"), assistant("Hello."), QUESTION]
    row = {"history": history, **asked("What is it?", "A cat.", "A dog.")}

    assert parse_row(row, Columns()).chosen == [*history, GOOD]
    dialogue = {**row, "prompt": "\n\nHuman: What is it?\n\nAssistant:"}
    assert parse_row(dialogue, Columns()).chosen == [*history, GOOD]


@pytest.mark.parametrize("other", [{"history": [{"date": "2020"}]}, {"history": [[1, 2]]}, {"functions": "math"}])
@pytest.mark.parametrize("more", [{}, {"": "0"}, {"functions": ["a"], "context": "reddit/tifu"}])
def test_columns_that_are_called_like_others_and_are_not_are_passed_over(other, more):
    row = {**asked("What is it?", "A cat.", "A dog."), **more, **other}

    assert parse_row(row, Columns()) == parse_row(asked("What is it?", "A cat.", "A dog."), Columns())
    plain = {"chosen": "A cat.", "rejected": "A dog.", **more}
    assert parse_row(plain, Columns()) == PlainText("A cat.", "A dog.")


def test_rows_of_a_pandas_table_may_hold_arrays():
    row = {
        "prompt": np.array([QUESTION]),
        "chosen": np.array([GOOD]),
        "rejected": np.array([BAD]),
        "tags": np.array([]),
    }

    assert parse_row(row, Columns()) == parse_row({**row, "prompt": [QUESTION], "tags": None}, Columns())
    assert Columns().read([row]).read["prompt"] == ("prompt",)


def test_a_history_that_is_none_is_told_or_beside_a_task_refused():
    row = {"prompt": "What is it?", "history": "long", "chosen": "A cat.", "rejected": "A dog."}

    assert parse_row(row, Columns()).chosen == [QUESTION, GOOD]
    assert Columns().read([row]).doubtful == {"history": "prompt"}
    with pytest.raises(UnusableRow, match="the history is not a list of questions"):
        parse_row({**row, "prompt": None, "instruction": "What is it?"}, Columns())


def test_columns_of_text_are_told_where_there_is_no_prompt():
    row = {"task": "What is it?", "id": "row-1", "chosen": "A cat.", "rejected": "A dog."}

    assert Columns().read([row]).doubtful == {"task": "prompt"}
    assert Columns().read([row | {"prompt": "What?"}]).doubtful == {}
    dialogues = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    assert Columns().read([row | dialogues]).doubtful == {}


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "row",
    [
        {"tools": [TOOL], "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."},
        {
            "tools": '[{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]',
            "prompt": "What is it?",
            "chosen": "A cat.",
            "rejected": "A dog.",
        },
        {
            "input": {"messages": [QUESTION], "tools": [{**TOOL, "strict": None}]},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        {"functions": [TOOL["function"]], "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."},
    ],
    ids=["list", "JSON text", "OpenAI input", "functions"],
)
def test_tools_come_as_a_list(row):
    assert parse_row(row, Columns()).tools == [TOOL]


def test_tool_calls_of_either_format_have_their_arguments_as_objects():
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "mat"}}}
    openai = {"role": "assistant", "content": None, "tool_calls": [{**call, "id": "1"}]}
    openai["tool_calls"][0]["function"] = {"name": "look", "arguments": '{"at": "mat"}'}
    sharegpt = {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "mat"}}'}

    row = parse_row({"prompt": [QUESTION], "chosen": openai, "rejected": sharegpt}, Columns())

    assert row.chosen[-1] == {"role": "assistant", "content": "", "tool_calls": [{**call, "id": "1"}]}
    scored = parse_row({"prompt": [QUESTION], "chosen": {**openai, "value": 0.7}, "rejected": BAD}, Columns())
    assert scored.chosen[-1]["content"] == ""
    assert row.rejected[-1] == {"role": "assistant", "content": "", "tool_calls": [call]}


def test_observations_are_tool_messages():
    prompt = [{"from": "human", "value": "Look."}, {"from": "observation", "value": "a cat"}]

    row = parse_row({"conversations": prompt, "chosen": GOOD, "rejected": BAD}, Columns())

    assert row.chosen[1] == {"role": "tool", "content": "a cat"}


@pytest.mark.parametrize("text", ['{"name": "Bob", "role": "user"}', '[{"name": "Bob", "role": "assistant"}]'])
def test_objects_with_a_role_that_say_nothing_are_text(text):
    row = parse_row({"prompt": text, "chosen": text, "rejected": "No."}, Columns())

    assert [message["content"] for message in row.chosen] == [text, text]


def test_written_messages_of_which_one_says_nothing_are_messages():
    text = '[{"role": "user", "content": "Hi"}, {"role": "assistant"}]'

    assert parse_row({"prompt": text, "chosen": "Yes.", "rejected": "No."}, Columns()).chosen[0]["content"] == "Hi"


PROMPT = {"prompt": "What is it?"}
UNUSABLE = [
    (["no", "object"], "the row is not a JSON object"),
    ({**PROMPT, "rejected": "A dog."}, "the chosen answer is missing"),
    ({**PROMPT, "chosen": "A cat.", "rejected": None}, "the rejected answer is missing"),
    ({**PROMPT, "chosen": "A cat.", "rejected": " \n"}, "an answer is empty"),
    ({**PROMPT, "chosen": [assistant("")], "rejected": [BAD]}, "an answer is empty"),
    ({**PROMPT, "chosen": [assistant(None)], "rejected": [BAD]}, "an answer is empty"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"}, "an answer is empty"),
    ({**PROMPT, "chosen": "A cat.", "rejected": "A cat."}, "both answers are the same"),
    ({"chosen": "A cat.", "rejected": "A cat."}, "both answers are the same"),
    ({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, GOOD]}, "both answers are the same"),
    ({"prompt": " ", "chosen": "A cat.", "rejected": "A dog."}, "the prompt is empty"),
    ({"chosen": [GOOD], "rejected": [BAD]}, "there is no prompt before the answers"),
    ({"system": "Be brief.", "chosen": "a", "rejected": "b"}, "there is no prompt before the answers"),
    ({"chosen": [QUESTION], "rejected": [QUESTION, BAD]}, "an answer does not end with an assistant message"),
    ({**PROMPT, "chosen": [], "rejected": [BAD]}, "an answer does not end with an assistant message"),
    ({**PROMPT, "chosen": 3, "rejected": "A dog."}, "the chosen answer is a number, and neither text nor messages"),
    ({"prompt": 3, "chosen": "A cat.", "rejected": "A dog."}, "the prompt is a number, and neither text nor messages"),
    ({**PROMPT, "chosen": ["A cat."], "rejected": [BAD]}, "a message is not an object with role and content but text"),
    (
        {**PROMPT, "chosen": [{"role": "bard", "content": "x"}], "rejected": [BAD]},
        "a message has the unknown role 'bard'",
    ),
    ({**PROMPT, "chosen": [{"content": "x"}], "rejected": [BAD]}, "a message has no role"),
    ({**PROMPT, "chosen": [assistant(3)], "rejected": [BAD]}, "a message's content is not text but a number"),
    (
        {**PROMPT, "chosen": [assistant([{"type": "image", "url": "x"}])], "rejected": [BAD]},
        "a message holds a part of type 'image', and only text can be trained on",
    ),
    ({**PROMPT, "chosen": [assistant("A"), user(" "), GOOD], "rejected": [BAD]}, "a message of the user says nothing"),
    ({"prompt": [user(None)], "chosen": [GOOD], "rejected": [BAD]}, "a message of the user says nothing"),
    (
        {"instruction": "What is it?", "history": [["Hi!", None]], "chosen": "A cat.", "rejected": "A dog."},
        "a message of the assistant says nothing",
    ),
    (
        {"prompt": {"role": ["user"], "content": ["a", "b"]}, "chosen": [GOOD], "rejected": [BAD]},
        "the lists of a column of messages are not as long as one another",
    ),
    ({**PROMPT, "chosen": "a", "rejected": "b", "tools": "{broken"}, "the tools are not a list"),
    ({**PROMPT, "chosen": "a", "rejected": "b", "tools": {"a": 1}}, "the tools are not a list"),
    ({**PROMPT, "chosen": "a", "rejected": "b", "system": 3}, "messages are expected, not a number"),
    (
        {**PROMPT, "chosen": {"from": "function_call", "value": "no JSON"}, "rejected": BAD},
        "a tool call does not name its function",
    ),
]


@pytest.mark.parametrize(("row", "reason"), UNUSABLE, ids=[reason for _, reason in UNUSABLE])
def test_a_row_without_a_preference_says_why(row, reason):
    with pytest.raises(UnusableRow) as caught:
        parse_row(row, Columns())

    assert str(caught.value) == reason


def test_named_columns_are_read_and_no_other():
    columns = Columns(chosen="good", rejected="bad", prompt="ask", system="role")
    row = {"good": "A cat.", "bad": "A dog.", "ask": "What is it?", "role": "Be brief.", "chosen": "x", "prompt": "y"}

    assert parse_row(row, columns).chosen == [system("Be brief."), QUESTION, GOOD]


def test_a_named_column_that_is_missing_is_an_error_with_the_columns_found():
    with refused(DataError, key="chosen_feature", place="train.jsonl", allowed="chosen, rejected"):
        Columns(chosen="good").check([{"chosen": "a", "rejected": "b"}], "train.jsonl")


def test_no_column_for_a_side_is_an_error_with_the_columns_found():
    with refused(DataError, "no column for the chosen answer", place="train.jsonl", allowed="data, answers"):
        Columns().check([{"data": "a", "answers": {"good": "a", "bad": "b"}}], "train.jsonl")
    with refused(DataError, key="chosen_feature", place="train.jsonl", allowed="text, label"):
        Columns().check([{"text": "a"}, {"text": "b", "label": 1}], "train.jsonl")


def test_columns_may_differ_from_row_to_row():
    Columns().check([{"chosen": "a", "rejected": "b"}, {"preferred_output": [], "non_preferred_output": []}], "x.jsonl")


@pytest.mark.parametrize(
    ("columns", "key"),
    [
        (Columns(chosen="good", rejected="good"), "rejected_feature"),
        (Columns(chosen="good", rejected="bad", prompt="good"), "prompt_feature"),
        (Columns(prompt="task+task"), "prompt_feature"),
        (Columns(prompt="task+more", system="more"), "system_feature"),
    ],
)
def test_a_column_that_is_named_twice_is_refused(columns: Columns, key: str) -> None:
    row = dict.fromkeys(("good", "bad", "task", "more", "chosen", "rejected"), "text")

    with refused(DataError, "names the column '(good|task|more)' of a.json", key=key, place="a.json"):
        columns.check([row], "a.json")

"""What looks wrong with the rows of a split is said once, with the first place and how many there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.data_tokenizers import tokenizer_named
from support.refusals import refused

from mlx_cpo_plugin.data import PreferenceDataset, pairs_of_rows
from mlx_cpo_plugin.data.columns import Columns
from mlx_cpo_plugin.data.dataset import load_splits
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.settings.config import RunSettings

ANSWERS = {"chosen": "Yes.", "rejected": "No."}


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i}?", **ANSWERS} for i in range(count)]


def pairs(given: list[dict[str, Any]], kind: str = "chatml", **settings: Any) -> PreferenceDataset:
    return pairs_of_rows(given, tokenizer_named(kind), RunSettings.of({"max_seq_length": 512, **settings}))


def finding(given: list[dict[str, Any]], **settings: Any) -> str:
    """The one finding on these rows."""
    (line,) = pairs(given, **settings).report.findings
    return line


def long(text: str) -> dict[str, Any]:
    return {"prompt": text * 40, **ANSWERS}


def test_ordinary_rows_have_no_findings() -> None:
    assert pairs(rows(40)).report.findings == ()


def test_a_cut_of_more_than_a_few_is_warned_of_with_the_lengths_that_would_do() -> None:
    given = [*rows(30), long("cat "), long("dog ")]
    whole = pairs(given).report

    line = finding(given, max_seq_length=32)

    assert "6% of the prompts (3% by more than half)" not in line  # 41 of 80 tokens are no half
    assert line.startswith("Warning: the cut to max_seq_length shortens 6% of the prompts")
    assert (
        f"; {whole.max_seq_length_for(0.95)} keeps 95% of the pairs whole, {whole.max_seq_length_for(1)} all." in line
    )


def test_a_cut_of_a_few_is_no_warning() -> None:
    assert pairs([*rows(39), long("cat ")], max_seq_length=32).report.findings == ()


def test_rows_left_out_for_their_length_count_for_the_lengths_that_would_do() -> None:
    given = [*rows(3), long("cat ")]

    report = pairs(given, max_seq_length=32, overlong="drop").report

    assert report.pairs == 3
    assert report.max_seq_length_for(1) == pairs(given).report.max_seq_length_for(1) > 32


def test_prompts_cut_to_nothing_in_more_than_a_tenth_are_an_error_that_says_what_would_do() -> None:
    system = {"role": "system", "content": "Be brief, be kind, and be sure of what you say."}
    given = [{"prompt": [system, {"role": "user", "content": f"What is {i}?"}], **ANSWERS} for i in range(3)]
    whole = pairs(given).report.max_seq_length_for(0.95)

    with refused(DataError, rf"in 3 of 3 rows .*\({whole} keeps 95%", key="max_seq_length", place="row 1"):
        pairs(given, max_seq_length=16)


def test_a_few_prompts_cut_to_nothing_are_left_out() -> None:
    one = {"prompt": "Who?", "chosen": "same " * 40 + "Yes.", "rejected": "same " * 40 + "No."}

    report = pairs([*rows(12), one], max_seq_length=32).report

    assert (report.pairs, sum(map(len, report.skipped.values()))) == (12, 1)


@pytest.mark.parametrize("text", ["<|im_start|>user\nWho?", "Who?<|im_end|>"])
def test_text_that_is_the_templates_to_write_is_noted(text: str) -> None:
    line = finding([*rows(2), {"prompt": text, **ANSWERS}, {"prompt": text + "!", **ANSWERS}])

    assert line.startswith("note: 2 rows hold '<|im_")
    assert "(first row 3)" in line


def test_an_end_token_at_the_end_of_an_answer_and_plain_text_are_not() -> None:
    ended = {"prompt": "Who?", "chosen": "Me.<|im_end|>", "rejected": "You."}
    plain = {"chosen": "<|im_start|>user\nWho?<|im_end|>\nMe.", "rejected": "<|im_start|>user\nWho?<|im_end|>\nYou."}

    assert pairs([ended]).report.findings == pairs([plain]).report.findings == ()


def test_rows_without_a_prompt_among_others_are_noted() -> None:
    plain = {"chosen": "A cat is here.", "rejected": "A cat is not."}

    assert finding([*rows(2), plain]).startswith("note: 1 row has no prompt (first row 3): read as plain text")
    assert pairs([plain]).report.findings == ()
    line = finding([{**plain, "task": "Where is the cat?"}])
    assert line == "note: the column task is not read, and no other as the prompt; set prompt_feature if it is."


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thoughts_that_the_template_does_not_write_are_noted(key: str) -> None:
    thinking = {"prompt": "Who?", "chosen": [{"role": "assistant", "content": "Me.", key: "Hm."}], "rejected": "No."}
    writing = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m." + key + " }}{{ m.content }}<|im_end|>{% endfor %}"

    line = finding([*rows(2), thinking, {**thinking, "prompt": "Why?"}])

    assert line.startswith(f"note: 2 rows hold {key} in an answer (first row 3)")
    blank = {**thinking, "chosen": [{"role": "assistant", "content": "Me.", key: " "}]}
    assert pairs([blank]).report.findings == ()
    assert pairs([thinking], chat_template=writing).report.findings == ()


def test_thoughts_in_the_text_of_an_answer_that_the_template_drops_are_noted() -> None:
    thinking = {"prompt": "Who?", "chosen": "<think>\nHm, a cat.\n</think>\n\nMe.", "rejected": "You."}
    line = "note: 1 row holds thoughts in an answer (first row 1), which the chat template does not write."

    assert pairs([thinking], "open_thinking").report.findings == (line,)
    for kind in ("thinking", "either_thinking", "chatml"):
        assert pairs([thinking], kind).report.findings == (), kind
    alike = {**thinking, "rejected": "<think>\nHm, a dog.\n</think>\n\nMe."}
    skipped = pairs([*rows(1), alike], "open_thinking").report.skipped
    assert skipped == {"both answers have the same tokens, though they are not the same": ["row 2"]}


def test_a_prompt_that_answers_repeat_is_told() -> None:
    given = [{"prompt": f"What is {i}?", "chosen": f"What is {i}? Yes.", "rejected": f"What is {i}? No."} for i in "ab"]
    expected = [{"prompt": f"What is {i}?", "chosen": "Yes.", "rejected": "No."} for i in "ab"]

    assert "Both answers begin with the prompt in 2, and are read without it." in pairs(given).report.summary()
    assert [pair.chosen.tolist() for pair in pairs(given)] == [pair.chosen.tolist() for pair in pairs(expected)]


def test_each_thing_that_the_template_does_not_write_is_noted_with_its_own_rows() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    calling = {"prompt": "Who?", **ANSWERS, "tools": [tool]}
    thinking = {**ANSWERS, "chosen": {"role": "assistant", "content": "Yes.", "thinking": "Hm."}}
    given = [*rows(2), calling, {**calling, **thinking, "prompt": "Why?"}, {**thinking, "prompt": "How?"}]
    template = "{% if enable_thinking %}{% endif %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"

    assert set(pairs(given, chat_template=template).report.findings) == {
        "note: 2 rows hold tools (first row 3), which the chat template does not write.",
        "note: 2 rows hold thinking in an answer (first row 4), which the chat template does not write.",
    }


def test_repeated_rows_are_noted() -> None:
    assert finding([*rows(3), rows(3)[1], rows(3)[1]]) == "note: 2 rows repeat an earlier one (row 4 is row 2)."


def test_the_same_prompt_with_another_answer_is_no_repetition() -> None:
    assert pairs([{**rows(1)[0], "chosen": f"Yes, {i}."} for i in range(3)]).report.findings == ()


@pytest.mark.parametrize(("value", "noted"), [(["a.png"], True), ([], False), (None, False)])
def test_pictures_and_sounds_are_noted_where_there_are_any(value: object, noted: bool) -> None:
    report = pairs([{**row, "images": value} for row in rows(2)]).report

    assert any("the column images is not read" in line for line in report.findings) is noted


def test_a_column_under_a_usual_name_that_is_not_read_is_noted() -> None:
    line = finding([{**row, "question": "Who?"} for row in rows(2)])

    assert (
        line == "note: the column question is not read, as the prompt is in prompt; set prompt_feature to read another."
    )


def test_columns_that_are_read_or_blank_or_of_another_name_are_not() -> None:
    given = [{**row, "question": "", "score": 1, "system": "Be brief."} for row in rows(2)]

    report = pairs(given).report

    assert report.findings == ()
    assert report.columns.unread == ("question", "score")
    assert report.columns.read["system"] == ("system",)


def test_a_task_is_read_from_its_input_too() -> None:
    read = Columns().read([{"instruction": "Add.", "input": "1, 2", "history": [], **ANSWERS}])

    assert read.read["prompt"] == ("instruction", "input")
    assert read.unread == ("history",)


def test_columns_that_are_joined_are_each_read() -> None:
    assert Columns(prompt="a+b").read([{"a": "1", "b": "2", "c": "3", **ANSWERS}]).unread == ("c",)


def test_held_out_rows_that_are_trained_on_are_noted(tmp_path: Path) -> None:
    lines = [f'{{"prompt": "What is {i}?", "chosen": "Yes.", "rejected": "No."}}\n' for i in range(6)]
    for split, held in (("train", lines[:4]), ("valid", lines[3:]), ("test", lines[5:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(held), encoding="utf-8")
    settings = RunSettings.of({"data": str(tmp_path), "max_seq_length": 512})

    train, valid, test = load_splits(settings, tokenizer_named("chatml"), ("train", "valid", "test"))

    assert train.report.findings == test.report.findings == ()
    assert valid.report.findings == (
        "note: 1 row is in the training set, too (valid.jsonl:1 is train.jsonl:4): what is measured on them does not "
        "hold for new ones.",
    )


def test_held_out_rows_beside_a_training_set_can_still_be_cut_as_rows(tmp_path: Path) -> None:
    line = '{"prompt": "What is it? ' + "cat " * 40 + '", "chosen": "Yes.", "rejected": "No."}\n'
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text(line, encoding="utf-8")
    settings = RunSettings.of({"data": str(tmp_path), "max_seq_length": None})

    _, valid, _ = load_splits(settings, tokenizer_named("chatml"), ("train", "valid"))

    assert valid.cut_to is not None
    assert tokenizer_named("chatml").decode(valid.cut_to(32)[0].prompt.tolist()).startswith("<|im_start|>user")


def test_findings_are_told_with_the_summary() -> None:
    told: list[str] = []

    pairs([*rows(2), *rows(1)]).tell(told.append)

    assert told == ["Train: 3 rows, 3 pairs.", "note: 1 row repeats an earlier one (row 3 is row 1)."]

"""What is scored, and what stands before it, under the tokenizers and templates that models really have."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from filelock import FileLock
from support.row_forms import FORMS, Preference
from support.tiny import SHARED

from mlx_cpo_plugin.data.columns import Columns
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.rows import parse_row
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.data.tokens import tokenize
from mlx_cpo_plugin.host import load_chat_tokenizer

TOOL = SHARED / "tools" / "real_tokenizers.py"
ROOT = Path(tempfile.gettempdir()) / "real-tokenizers"
pytestmark = [
    pytest.mark.skipif(not TOOL.is_file(), reason=f"{TOOL} is not there, which brings the tokenizers"),
    pytest.mark.slow,
]


@dataclass(frozen=True)
class Family:
    """What is known of a model family: its end of turn, and whether its template drops white space around contents.

    ``own`` is whether the tokenizer has a template at all; without one the host's stands in.
    """

    end: str
    trims: bool = False
    own: bool = True


FAMILIES = {
    "qwen3": Family("<|im_end|>"),
    "gemma3": Family("<end_of_turn>", trims=True),
    "llama2": Family("</s>", own=False),
    "llama3": Family("<|eot_id|>", trims=True),
    "llama3_1": Family("<|eot_id|>", trims=True),
    "gptoss": Family("<|return|>", own=False),
    "deepseek_v3": Family("<\uff5cend\u2581of\u2581sentence\uff5c>"),
}


ANSWERS = [("Yes.", "No."), (" Yes", "No "), ("Yes.\n\nIt is.\n", "\tNo."), ("是的\u3002", "🦄 e\u0301")]


@cache
def loaded(family: str) -> Any:
    ROOT.mkdir(exist_ok=True)
    with FileLock(ROOT / ".lock"):
        if not (ROOT / family / "model.safetensors").is_file():
            made = subprocess.run([sys.executable, TOOL, ROOT, family], capture_output=True, check=False, timeout=600)
            if made.returncode:
                pytest.skip(f"the tokenizer of {family} cannot be fetched")
    return load_chat_tokenizer(str(ROOT / family))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def before(family: str, messages: list[dict[str, str]], **kwargs: Any) -> list[list[int]]:
    """The prompts that mlx-lm gives to the model after ``messages``, one for each way to think."""
    tokenizer = loaded(family)
    kwargs = {"add_generation_prompt": True, **kwargs}
    if FAMILIES[family].own:
        ways = ({}, {"enable_thinking": False})
        return [tokenizer.apply_chat_template(messages, **kwargs, **way) for way in ways]
    return [tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))]


def pair_of(family: str, row: dict[str, Any]) -> Any:
    return tokenize(parse_row(row, Columns()), ChatTokenizer(loaded(family)))


def context(pair: Any, side: str) -> list[int]:
    """The tokens of a side before the first that is scored."""
    scored = getattr(pair, f"{side}_scored")
    return [*pair.prompt.tolist(), *getattr(pair, side)[: scored.argmax()].tolist()]


def scored(family: str, pair: Any, side: str) -> str:
    return str(loaded(family).decode(getattr(pair, side)[getattr(pair, f"{side}_scored")].tolist()))


def check(family: str, row: dict[str, Any], messages: list[dict[str, str]], chosen: str, rejected: str) -> None:
    """The row's answers are scored with their end tokens, behind what mlx-lm puts there after ``messages``."""
    known, pair = FAMILIES[family], pair_of(family, row)
    prompts = before(family, messages)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        text = scored(family, pair, side)
        if known.own:
            assert context(pair, side) in prompts
            assert text == (answer.strip() if known.trims else answer) + known.end
        else:  # the space before the answer may be one token with its first word
            assert any(context(pair, side) in (prompt, prompt[:-1]) for prompt in prompts)
            assert text.lstrip(" ") == answer.lstrip(" ") + known.end


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "answers", [("Yes.", "No."), (" Yes", "No "), ("Yes.\n\nIt is.\n", "\tNo."), ("是的。", "🦄 e\u0301")]
)
def test_answers_are_scored_with_their_spaces_behind_what_mlx_lm_puts_before_them(family, answers):
    row = {"prompt": "Is 7 prime?", "chosen": answers[0], "rejected": answers[1]}

    if family == "qwen3":  # its tokenizer composes characters
        answers = [normalize("NFC", answer) for answer in answers]
    check(family, row, [user("Is 7 prime?")], *answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_earlier_turns_are_context_as_at_inference(family):
    talk = [user("Hi"), assistant("Hello."), user("Is 7 prime?")]

    check(family, {"prompt": talk, "chosen": "Yes.", "rejected": "No."}, talk, "Yes.", "No.")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_a_row_gives_the_same_tokens(family):
    row = Preference(
        system="Be kind.",
        prompt=[user("Hi"), assistant("Hello."), user("Is 7 prime?")],
        chosen=[assistant("Yes."), user("Sure?"), assistant("Very.")],
        rejected=[assistant("No.")],
    )

    pairs = [pair_of(family, form(row, lambda messages: messages)) for form in FORMS.values()]

    for pair in pairs:
        assert (
            scored(family, pair, "chosen").replace(" ", "") == f"Yes.{FAMILIES[family].end}Very.{FAMILIES[family].end}"
        )
        for part in ("prompt", "chosen", "rejected", "chosen_scored", "rejected_scored"):
            assert getattr(pair, part).tolist() == getattr(pairs[0], part).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("begun", ["The capital is", "The capital is "])
def test_a_partial_answer_is_continued_as_mlx_lm_does(family, begun):
    messages = [user("Capital of Italy?"), assistant(begun)]
    row = {"prompt": messages, "chosen": " Rome." if begun[-1] != " " else "Rome.", "rejected": "The capital is Paris."}

    pair = pair_of(family, row)

    prompts = before(family, messages, add_generation_prompt=False, continue_final_message=True)
    for side, city in (("chosen", "Rome."), ("rejected", "Paris.")):
        assert any(context(pair, side) in (prompt, prompt[:-1]) for prompt in prompts)
        assert scored(family, pair, side).lstrip(" ") == city + FAMILIES[family].end


@pytest.mark.parametrize("family", FAMILIES)
def test_two_system_messages_keep_their_order(family):
    prompt = [{"role": "system", "content": text} for text in ("Be kind.", "Be short.")] + [user("Is 7 prime?")]

    pair = pair_of(family, {"prompt": prompt, "chosen": "Yes.", "rejected": "No."})

    text = loaded(family).decode(pair.prompt.tolist())
    assert text.count("Be kind.") == text.count("Be short.") == 1
    assert text.index("Be kind.") < text.index("Be short.") < text.index("Is 7 prime?")


def test_thoughts_are_scored_where_the_answer_has_them_and_context_where_it_has_none():
    thoughts = {
        "prompt": "Is 7 prime?",
        "chosen": "<think>\nOdd.\n</think>\n\nYes.",
        "rejected": "<think>\nHm.\n</think>\n\nNo.",
    }
    none = {"prompt": "Is 7 prime?", "chosen": "Yes.", "rejected": "No."}
    thinking, closed = before("qwen3", [user("Is 7 prime?")])

    pair, other = pair_of("qwen3", thoughts), pair_of("qwen3", none)

    assert context(pair, "chosen") == thinking
    assert scored("qwen3", pair, "chosen") == "<think>\nOdd.\n</think>\n\nYes.<|im_end|>"
    assert context(other, "chosen") == closed
    assert scored("qwen3", other, "chosen") == "Yes.<|im_end|>"


@pytest.mark.parametrize(
    ("content", "found"), [(None, "3 degrees"), ("", "3 degrees"), ("Let me see.", ""), (None, "")]
)
def test_a_call_its_result_and_what_is_made_of_it_are_an_answer_of_two_turns_to_a_thinking_template(content, found):
    def answer(city: str, last: str) -> list[Any]:
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        return [{**assistant(content), "tool_calls": [call]}, {"role": "tool", "content": found}, assistant(last)]

    def wanted(city: str, last: str) -> str:
        call = json.dumps({"name": "weather", "arguments": {"city": city}})
        said = f"{content}\n" if content else ""
        return f"{said}<tool_call>\n{call}\n</tool_call><|im_end|>{last}<|im_end|>"

    sides = {"chosen": ("user", "Yes, in user."), "rejected": ("Rome", "No.")}  # a word of the next turn's header, too
    pair = pair_of("qwen3", {"prompt": "A coat?", **{side: answer(*said) for side, said in sides.items()}})

    for side, said in sides.items():
        assert scored("qwen3", pair, side).replace("<think>\n\n</think>\n\n", "") == wanted(*said)


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_are_scored_or_the_row_says_that_the_template_has_none(family):
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "mat"}}}
    row = {"prompt": "Look!", "chosen": [{**assistant(""), "tool_calls": [call]}], "rejected": "No."}

    if family == "qwen3":
        text = scored(family, pair_of(family, row), "chosen")
        assert text == '<tool_call>\n{"name": "look", "arguments": {"at": "mat"}}\n</tool_call><|im_end|>'
    else:
        with pytest.raises(UnusableRow, match="leaves out the tool calls"):
            pair_of(family, row)

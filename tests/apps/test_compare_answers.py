"""A model is asked several prompts at a time, and answers each as if it were the only one."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from support.architectures import ARCHITECTURES, VOCABULARY, build_architecture

from mlx_cpo_plugin.comparison import answering
from mlx_cpo_plugin.comparison.answering import TOGETHER, answers, groups
from mlx_cpo_plugin.comparison.questions import Question
from mlx_cpo_plugin.comparison.text_metrics import Answer

LONGEST = 12


@dataclass
class Letters:
    """A tokenizer whose tokens are characters, of which one ends an answer."""

    end: int = -1
    text: str = ""
    eos_token_ids: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.eos_token_ids = {self.end}

    @property
    def detokenizer(self) -> Letters:
        return Letters()

    def add_token(self, token: int) -> None:
        self.text += chr(ord("!") + token)

    def finalize(self) -> None:
        self.text += " "


def questions(*lengths: int) -> list[Question]:
    generator = np.random.default_rng(0)
    return [Question("prompt", "", "", generator.integers(1, VOCABULARY, length).tolist()) for length in lengths]


def alone(model: nn.Module, question: Question, end: int) -> Answer:
    """The likeliest next token, again and again."""
    tokens: list[int] = []
    for token, _ in generate_step(mx.array(question.tokens), model, max_tokens=LONGEST):
        if token == end:
            break
        tokens.append(int(token))
    return Answer("".join(chr(ord("!") + token) for token in tokens), len(tokens) < LONGEST, tuple(tokens))


def asked(model: nn.Module, among: list[Question], end: int, said: list[str] | None = None) -> list[Answer]:
    say = [].append if said is None else said.append
    return answers(model, Letters(end), among, LONGEST, "base model", say)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_answer_is_that_to_its_prompt_alone(name: str) -> None:
    model, among = build_architecture(name), questions(9, 30, 3, 1, 17, 9, 25)
    end = alone(model, among[1], -1).tokens[5]

    found = asked(model, among, end)

    assert found == [alone(model, question, end) for question in among]
    assert found[1].finished
    assert len(found[1].tokens) <= 5


def test_an_answer_that_ends_leaves_the_others_as_they_are_and_one_that_is_cut_off_did_not_end() -> None:
    model, among = build_architecture("llama"), questions(5, 8, 13)

    assert {(answer.finished, len(answer.tokens)) for answer in asked(model, among, -1)} == {(False, LONGEST)}


def test_where_caches_cannot_be_joined_prompts_are_asked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, among = build_architecture("llama"), questions(9, 30, 3)
    end = alone(model, among[1], -1).tokens[5]
    together = asked(model, among, end)
    monkeypatch.setattr(answering, "make_prompt_cache", lambda model: [object()])
    monkeypatch.setattr(answering, "BatchGenerator", pytest.fail)

    assert asked(model, among, end) == together


def test_progress_is_told_and_of_no_prompt_nothing() -> None:
    said: list[str] = []
    model = build_architecture("llama")

    assert asked(model, [], -1, said) == []
    assert said == []
    asked(model, questions(4, 6), -1, said)
    assert said == [
        "The base model answers 2 prompts.",
        "The base model has answered 1 of 2 prompts.",
        "The base model has answered 2 of 2 prompts.",
    ]


@given(st.lists(st.integers(1, 2 * TOGETHER), max_size=60), st.integers(1, 512))
def test_no_more_are_asked_together_than_memory_is_meant_for(lengths: list[int], longest: int) -> None:
    found = groups(lengths, longest)

    assert sorted(number for group in found for number in group) == list(range(len(lengths)))
    for group in found:
        taken = len(group) * (max(lengths[number] for number in group) + longest)
        assert taken <= TOGETHER or len(group) == 1


def test_like_prompts_are_asked_together() -> None:
    assert groups([10, 3000, 12, 2990, 11], 100) == [[0, 4, 2], [3], [1]]

"""A model is asked several prompts at a time, and answers each as if it were the only one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from support.architectures import ARCHITECTURES, VOCABULARY, build_architecture
from support.memory_errors import OUT_OF_MEMORY

from mlx_cpo_plugin.comparison import answering
from mlx_cpo_plugin.comparison.answering import MOST_PROMPTS, MOST_TOKENS, answers, can_be_asked_together, groups
from mlx_cpo_plugin.comparison.questions import Question
from mlx_cpo_plugin.comparison.text_metrics import Answer
from mlx_cpo_plugin.kernels import library
from mlx_cpo_plugin.model.products import float32_products

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


def varied(name: str) -> nn.Module:
    """A model whose answers are not the last token of the prompt, again and again."""
    model = build_architecture(name)
    model.update(tree_map(lambda weight: 4 * weight, model.parameters()))
    return model


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
    model, among = varied(name), questions(9, 30, 3, 1, 17, 9, 25)
    end = alone(model, among[1], -1).tokens[5]

    found = asked(model, among, end)

    assert found == [alone(model, question, end) for question in among]
    assert found[1].finished
    assert len(found[1].tokens) <= 5
    assert len({token for answer in found for token in answer.tokens}) > len(among)


def of_whole_groups(name: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


def packed() -> nn.Module:
    model = varied("llama")
    nn.quantize(model, 32, 4, class_predicate=of_whole_groups)
    return model


def in_half_precision() -> nn.Module:
    model = varied("gemma3_text")
    model.set_dtype(mx.bfloat16)
    return model


@pytest.mark.parametrize("build", [packed, in_half_precision, lambda: varied("qwen3")])
def test_with_kernels_too(build: Callable[[], nn.Module], kernels: None) -> None:
    model, among = build(), questions(9, 30, 3, 1, 17, 9, 25)
    used = list[bool]()

    found = answers(model, Letters(), among, LONGEST, "base model", lambda line: used.append(library.in_use()))

    assert all(used[1:])
    with float32_products(model):
        assert found == [alone(model, question, -1) for question in among]


def test_an_answer_that_is_cut_off_did_not_end() -> None:
    model, among = varied("llama"), questions(5, 8, 13)

    assert {(answer.finished, len(answer.tokens)) for answer in asked(model, among, -1)} == {(False, LONGEST)}


def prompts_of(among: list[Question]) -> list[list[int]]:
    return [question.tokens for question in among]


def test_who_reads_padding_into_a_state_is_asked_one_by_one() -> None:
    prompts = prompts_of(questions(9, 30, 3))

    assert can_be_asked_together(varied("llama"), prompts)
    assert not can_be_asked_together(varied("mamba"), prompts)


def test_the_trial_finds_what_the_caches_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "can_be_padded", lambda caches: True)
    prompts = prompts_of(questions(9, 30, 3))

    assert not can_be_asked_together(varied("mamba"), prompts)
    assert can_be_asked_together(varied("mamba2"), prompts)


@pytest.mark.parametrize("error", [ValueError("does not yet support batching"), TypeError("array offset")])
def test_a_model_that_cannot_read_several_prompts_is_asked_one_by_one(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, among = varied("llama"), questions(9, 30, 3)
    together = asked(model, among, -1)

    def fail(*arguments: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(answering, "BatchGenerator", fail)

    assert asked(model, among, -1) == together


def test_memory_that_ends_in_the_trial_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise OUT_OF_MEMORY[2]

    monkeypatch.setattr(answering, "BatchGenerator", fail)

    with pytest.raises(RuntimeError, match="Unable to allocate"):
        asked(varied("llama"), questions(9, 30), -1)


def test_one_prompt_alone_takes_the_way_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "BatchGenerator", pytest.fail)
    model, among = varied("llama"), questions(20)

    assert asked(model, among, -1) == [alone(model, among[0], -1)]


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


@given(st.lists(st.integers(1, 2 * MOST_TOKENS), max_size=60), st.integers(1, 512))
def test_no_more_are_asked_together_than_memory_is_meant_for(lengths: list[int], longest: int) -> None:
    found = groups(lengths, longest)

    assert sorted(number for group in found for number in group) == list(range(len(lengths)))
    for group in found:
        taken = len(group) * (max(lengths[number] for number in group) + longest)
        assert len(group) <= MOST_PROMPTS
        assert taken <= MOST_TOKENS or len(group) == 1


def test_like_prompts_are_asked_together() -> None:
    assert groups([10, 3000, 12, 2990, 11], 100) == [[0, 4, 2], [3], [1]]

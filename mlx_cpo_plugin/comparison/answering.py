"""Greedy answers of a model to many prompts, of which it is asked several at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step, wired_limit
from mlx_lm.models.cache import make_prompt_cache

from mlx_cpo_plugin.comparison.questions import Question, Say, is_told
from mlx_cpo_plugin.comparison.text_metrics import Answer
from mlx_cpo_plugin.model.scoring import prepared_to_answer

# Tokens of prompts and answers at a time: keys and values of so many are in memory together.
TOGETHER = 4096

# The number of a prompt, the tokens of the answer, and whether it came to an end by itself.
_Given = tuple[int, list[int], bool]


def answers(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], max_tokens: int, name: str, say: Say
) -> list[Answer]:
    """Return the greedy answer to every question, at most ``max_tokens`` long."""
    prompts = [question.tokens for question in questions]
    given: dict[int, Answer] = {}
    if prompts:
        say(f"The {name} answers {len(prompts)} prompt{'s' if len(prompts) > 1 else ''}.")
    with prepared_to_answer(model, sum(map(len, prompts)), len(prompts) * max_tokens, say):
        for number, tokens, finished in _answered(model, tokenizer, prompts, max_tokens):
            given[number] = Answer(_text_of(tokenizer, tokens), finished, tuple(tokens))
            if is_told(len(given), len(prompts)):
                say(f"The {name} has answered {len(given)} of {len(prompts)} prompts.")
    return [given[number] for number in range(len(prompts))]


def _answered(model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], max_tokens: int) -> Iterator[_Given]:
    """Yield the answers in the order in which they are complete."""
    if not all(hasattr(cache, "merge") for cache in make_prompt_cache(model)):  # Llama 4
        for number, prompt in enumerate(prompts):
            yield _alone(model, tokenizer, number, prompt, max_tokens)
        return
    for numbers in groups([len(prompt) for prompt in prompts], max_tokens):
        yield from _together(model, tokenizer, {number: prompts[number] for number in numbers}, max_tokens)


def groups(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return the numbers of prompts that are asked together: like ones, and no more than :data:`TOGETHER` allows.

    Args:
        lengths: of the prompts, in tokens.
    """
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not found or (len(found[-1]) + 1) * (lengths[number] + max_tokens) > TOGETHER:
            found.append([])
        found[-1].append(number)
    return found


def _together(model: nn.Module, tokenizer: Any, prompts: dict[int, list[int]], max_tokens: int) -> Iterator[_Given]:
    generator = BatchGenerator(
        model,
        max_tokens=max_tokens,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=len(prompts),
        prefill_batch_size=len(prompts),
    )
    with closing(generator):
        numbers = dict(zip(generator.insert(list(prompts.values())), prompts, strict=True))
        written: dict[int, list[int]] = {number: [] for number in prompts}
        while responses := generator.next_generated():
            for response in responses:
                number = numbers[response.uid]
                if response.finish_reason != "stop":
                    written[number].append(response.token)
                if response.finish_reason is not None:
                    yield number, written[number], response.finish_reason == "stop"


def _alone(model: nn.Module, tokenizer: Any, number: int, prompt: list[int], max_tokens: int) -> _Given:
    tokens: list[int] = []
    with wired_limit(model):
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=max_tokens):
            if token in tokenizer.eos_token_ids:
                return number, tokens, True
            tokens.append(token)
    return number, tokens, False


def _text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    detokenizer = tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return str(detokenizer.text).strip()

"""Greedy answers of a model to many prompts, of which it is asked several at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream, wired_limit

from mlx_cpo_plugin.comparison.questions import Question, Say, is_told
from mlx_cpo_plugin.comparison.text_metrics import Answer
from mlx_cpo_plugin.errors import is_device_fault
from mlx_cpo_plugin.model.caches import ARCHITECTURE_ERRORS, can_be_padded, fresh_caches
from mlx_cpo_plugin.model.scoring import prepared_to_answer

# Prompts at a time, and tokens of theirs and of their answers: keys and values of so many are in memory together.
MOST_PROMPTS, MOST_TOKENS = 32, 4096
# Half precision rounds differently for other shapes; who reads padding is off by several times that.
TOLERANCE = 0.05

Prompts = Sequence[list[int]]
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
        for number, tokens, finished in _answered(model, prompts, max_tokens, tokenizer.eos_token_ids):
            given[number] = Answer(_text_of(tokenizer, tokens), finished, tuple(tokens))
            if is_told(len(given), len(prompts)):
                say(f"The {name} has answered {len(given)} of {len(prompts)} prompts.")
    return [given[number] for number in range(len(prompts))]


def _answered(model: nn.Module, prompts: Prompts, max_tokens: int, ends: set[int]) -> Iterator[_Given]:
    """Yield the answers in the order in which they are complete."""
    together = len(prompts) > 1 and can_be_asked_together(model, prompts)
    for numbers in groups([len(prompt) for prompt in prompts], max_tokens):
        if together and len(numbers) > 1:
            yield from _together(model, {number: prompts[number] for number in numbers}, max_tokens, ends)
        else:
            yield from (_alone(model, number, prompts[number], max_tokens, ends) for number in numbers)


def groups(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return the numbers of prompts that are asked together: like ones, and no more than memory is meant for.

    Args:
        lengths: of the prompts, in tokens.
    """
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        count = len(found[-1]) + 1 if found else math.inf
        if count > MOST_PROMPTS or count * (lengths[number] + max_tokens) > MOST_TOKENS:
            found.append([])
        found[-1].append(number)
    return found


def can_be_asked_together(model: nn.Module, prompts: Prompts) -> bool:
    """Whether two of the prompts, cut short, have the same next tokens together as each by itself.

    Raises:
        RuntimeError, MemoryError: out of memory or a device fault, which says nothing about the model.
    """
    by_length = sorted(prompts, key=len)
    two = [by_length[0][-5:], by_length[-1][-40:]]
    try:
        if not can_be_padded(fresh_caches(model)):
            return False
        together: list[list[tuple[int, mx.array]]] = [[], []]
        for number, response in _responses(model, two, 2, set()):
            together[number].append((response.token, response.logprobs))
    except ARCHITECTURE_ERRORS as error:
        if is_device_fault(error):
            raise
        return False
    for prompt, found in zip(two, together, strict=True):
        for (token, logprobs), expected in zip(
            found, generate_step(mx.array(prompt), model, max_tokens=2), strict=True
        ):
            if not _distance(logprobs, expected[1]) < TOLERANCE:
                return False
            if token != expected[0]:  # of two that are as likely as each other
                break
    return True


def _distance(logprobs: mx.array, expected: mx.array) -> float:
    """Return how far log-probs are from those expected, relative to how far these are from each other."""
    found, wanted = (np.array(each.astype(mx.float32), np.float64) for each in (logprobs, expected))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted - wanted.mean()))


def _together(model: nn.Module, prompts: dict[int, list[int]], max_tokens: int, ends: set[int]) -> Iterator[_Given]:
    numbers, written = list(prompts), {number: list[int]() for number in prompts}
    for place, response in _responses(model, list(prompts.values()), max_tokens, ends):
        number, finished = numbers[place], response.finish_reason == "stop"
        written[number] += [] if finished else [response.token]
        if response.finish_reason is not None:
            yield number, written[number], finished


def _responses(model: nn.Module, prompts: Prompts, max_tokens: int, ends: set[int]) -> Iterator[tuple[int, Any]]:
    """Yield the place of a prompt, and its next token, until all are answered."""
    generator = BatchGenerator(
        model,
        max_tokens=max_tokens,
        stop_tokens=[[token] for token in ends],
        completion_batch_size=len(prompts),
        prefill_batch_size=len(prompts),
    )
    with closing(generator):
        places = {uid: place for place, uid in enumerate(generator.insert(list(prompts)))}
        while responses := generator.next_generated():
            yield from ((places[response.uid], response) for response in responses)


def _alone(model: nn.Module, number: int, prompt: list[int], max_tokens: int, ends: set[int]) -> _Given:
    tokens: list[int] = []
    with wired_limit(model, [generation_stream]):
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=max_tokens):
            if token in ends:
                return number, tokens, True
            tokens.append(token)
    return number, tokens, False


def _text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    detokenizer = tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
    detokenizer.finalize()
    return str(detokenizer.text).strip()

"""What all models are asked: the user's own prompts and those of held-out rows, and the pairs that they score."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_cpo_plugin.data.dataset import load_splits
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.ranked import row_numbers
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.data.tokens import prompt_tokens
from mlx_cpo_plugin.errors import DataError, named, shown
from mlx_cpo_plugin.settings.config import RunSettings

USER_PROMPT = "prompt"
# What held-out rows come from that are in no split.
FILE = "file"
Say = Callable[[str], None]
# Many prompts are told of now and then.
_TOLD = 20


@dataclass(frozen=True)
class Question:
    """What both models are asked.

    Attributes:
        source: where the row stands, e.g. ``test.jsonl:3``; ``prompt`` for the user's own.
        prompt: as text; of a row, as the chat template writes it.
        text: the prompt without what the chat template puts around messages.
        tokens: of the prompt.
        chosen, rejected: the answers in the row; None for the user's own.
    """

    source: str
    prompt: str
    text: str
    tokens: list[int]
    chosen: str | None = None
    rejected: str | None = None


def held_out_pairs(
    settings: RunSettings, tokenizer: Any, *, is_given: bool, needed: bool, say: Say
) -> tuple[str, Sequence[PreferencePair]]:
    """Return a split and its pairs: the test set, or else the validation set, as far as the run itself evaluates it.

    Args:
        is_given: whether the user named the data; it is then taken whole, even a file without a split.
        needed: whether there is nothing to compare without; if not, there may be no pairs.
        say: receives what was skipped or cut.

    Raises:
        DataError: the data is missing or unusable, and needed or given.
    """
    is_file = is_given and isinstance(settings.data, str) and os.path.isfile(os.path.expanduser(settings.data))
    try:
        if not settings.data and not settings.hf_dataset:
            raise DataError(
                "the run's rows are not recorded; name some with --data, or ask with --prompt alone.", key="data"
            )
        train, valid, test = load_splits(settings, tokenizer, _splits(settings, is_file))
        held_out = train if is_file else test or valid
        batches = -1 if is_given else settings.test_batches if test else settings.val_batches
        if not held_out or not batches:
            where = named(str(settings.hf_dataset or settings.data))
            fault = f"{where} holds no held-out rows" if not held_out else "the run's own validations hold no rows"
            others = "name others" if is_given else "name some"
            raise DataError(f"{fault}; {others} with --data, or ask with --prompt alone.", key="data")
    except DataError as error:
        if needed or is_given:
            raise
        say(f"No held-out rows are compared: {error}")
        return "", []
    for line in () if held_out.report.all_used else held_out.report.lines():
        say(line)
    taken = held_out[: None if batches < 0 else batches * settings.batch_size]
    return FILE if is_file else held_out.report.split, taken


def _splits(settings: RunSettings, is_file: bool) -> tuple[str, ...]:
    """Return the splits to read for held-out rows; a validation set may have to be drawn from the training set."""
    if is_file:
        return ("train",)
    return ("train", "valid", "test") if settings.valid_fraction > 0 else ("valid", "test")


def one_of_each_row(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Return the first pair of each row, in their order: all pairs of a row ask the same."""
    numbers = row_numbers(pairs)
    return [pairs[place] for place in np.unique(numbers, return_index=True)[1]]


def uncut(
    pairs: Sequence[PreferencePair], settings: RunSettings, tokenizer: Any, is_file: bool
) -> list[PreferencePair]:
    """Return pairs as they were before they were cut to ``max_seq_length``: half a prompt is nothing to ask.

    Args:
        is_file: whether they are those of a file without a split.
    """
    if all(pair.length < settings.max_seq_length for pair in pairs):
        return list(pairs)
    whole = RunSettings.of({**vars(settings), "max_seq_length": sys.maxsize})
    splits = load_splits(whole, tokenizer, _splits(settings, is_file))
    by_source = {pair.source: pair for split in splits for pair in split}
    return [by_source[pair.source] for pair in pairs]


def own_question(prompt: str, tokenizer: ChatTokenizer) -> Question:
    """Return a prompt of the user's under the chat template.

    Raises:
        DataError: the template does not take it.
    """
    try:
        tokens = prompt_tokens(prompt, tokenizer)
    except UnusableRow as error:
        raise DataError(f"--prompt {shown(prompt)} cannot be asked ({error}); write another.", key="prompt") from error
    return Question(USER_PROMPT, prompt, prompt, tokens.tolist())


def question_of(pair: PreferencePair, tokenizer: ChatTokenizer) -> Question:
    """Return the prompt of a held-out row with the answers that the row has."""
    chosen, rejected = (tokenizer.without_end(tokenizer.decode(ids))[0].strip() for ids in (pair.chosen, pair.rejected))
    prompt = tokenizer.decode(pair.prompt)
    text = tokenizer.without_control(prompt).strip()
    return Question(pair.source, prompt, text, pair.prompt.tolist(), chosen, rejected)


def is_told(number: int, count: int) -> bool:
    """Whether there is a line of progress for one of many prompts, counted from 1."""
    return number in (1, count) or number % max(1, count // _TOLD) == 0

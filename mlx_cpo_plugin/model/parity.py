"""Whether a model can share prompts: it is tried on two pairs before a run, against the plain way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_cpo_plugin.data.batches import collate
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import ConfigError, is_device_fault
from mlx_cpo_plugin.model.caches import can_be_padded, fresh_caches
from mlx_cpo_plugin.model.grouping import PAIR_BY_PAIR, Grouping, grouping_for
from mlx_cpo_plugin.model.logps import AnswerScores, evaluation_mode, score_answers
from mlx_cpo_plugin.model.shared_batch import score_together
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer, share

# Relative, of an answer's log-prob; half precision rounds differently for other shapes.
FLOAT32_TOLERANCE = 1e-4
HALF_TOLERANCE = 3e-2
# What an architecture raises where it does not expect our caches.
ARCHITECTURE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


def choose_scorer(
    model: nn.Module, pairs: Sequence[PreferencePair], wanted: str, say: Callable[[str], None] = print
) -> SharedPromptScorer | None:
    """Return the scorer that shares prompts, or ``None`` where every answer is to be scored by itself.

    Args:
        wanted: ``auto`` checks whether the model allows it, and falls back with a note; ``shared`` insists on it;
            ``plain`` is ``None``, and so is everything for a model that is no ``nn.Module``.

    Raises:
        ConfigError: ``shared`` is wanted, but the model does not allow it.
        RuntimeError, MemoryError: memory ended or the device failed, which says nothing of the model.
    """
    if wanted == "plain" or not pairs or not isinstance(model, nn.Module):
        return None
    try:
        scorer = SharedPromptScorer(model)
        difference = _largest_difference(model, partial(_scores_one_by_one, scorer), sample(pairs))
        fault = f"log-probs differ by {difference:.1e}" if difference > _tolerance(scorer) else ""
    except ARCHITECTURE_ERRORS as error:
        if is_device_fault(error):
            raise
        fault = f"{type(error).__name__}: {error}".splitlines()[0]
    if not fault:
        scorer.grouping = _grouping(model, scorer, pairs)
        return scorer
    if wanted == "shared":
        raise ConfigError(f"scoring is 'shared', but this model cannot share prompts ({fault}); use auto or plain.")
    say(f"This model cannot share the prompt between two answers ({fault}); each is scored by itself.")
    return None


def _grouping(model: nn.Module, scorer: SharedPromptScorer, pairs: Sequence[PreferencePair]) -> Grouping:
    """Return which pairs are scored together: one at a time where several at once would have other scores."""
    if not can_be_padded(fresh_caches(model)):
        return PAIR_BY_PAIR
    try:
        difference = _largest_difference(
            model, lambda pairs: score_together(scorer, [share(pair) for pair in pairs]), sample(pairs)
        )
    except ARCHITECTURE_ERRORS as error:
        if is_device_fault(error):
            raise
        return PAIR_BY_PAIR  # which has just worked
    return grouping_for(model) if difference <= _tolerance(scorer) else PAIR_BY_PAIR


def _scores_one_by_one(scorer: SharedPromptScorer, pairs: Sequence[PreferencePair]) -> AnswerScores:
    return _joined([scorer.score(share(pair)) for pair in pairs])


def _joined(scores: Sequence[AnswerScores]) -> AnswerScores:
    return AnswerScores(*(mx.concatenate(list(column)) for column in zip(*scores, strict=True)))


def sample(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Return two pairs with prompts of two lengths, cut short, since plain scoring holds the logits of all tokens."""
    return [_shortened(pairs[0], prompt=20, answer=12), _shortened(pairs[-1], prompt=11, answer=16)]


def _shortened(pair: PreferencePair, prompt: int, answer: int) -> PreferencePair:
    chosen, rejected = pair.chosen[:answer], pair.rejected[:answer]
    all_chosen, all_rejected = np.ones(len(chosen), bool), np.ones(len(rejected), bool)
    return PreferencePair(pair.prompt[-prompt:], chosen, rejected, all_chosen, all_rejected)


def _largest_difference(
    model: nn.Module, score: Callable[[Sequence[PreferencePair]], AnswerScores], pairs: Sequence[PreferencePair]
) -> float:
    """Return the largest difference from plain log-probs, relative to these or to 1, whichever is larger."""
    with evaluation_mode(model):
        plain, shared = _joined([score_answers(model, collate([pair])) for pair in pairs]), score(pairs)
        mx.eval(plain, shared)
    differences = []
    for side in ("chosen_logps", "rejected_logps"):
        reference, values = np.array(getattr(plain, side)), np.array(getattr(shared, side))
        differences.append(np.abs(values - reference) / np.maximum(np.abs(reference), 1.0))
    largest = float(np.max(differences))  # unlike Python's max, NaN where any difference is
    return largest if np.isfinite(largest) else float("inf")


def _tolerance(scorer: SharedPromptScorer) -> float:
    return HALF_TOLERANCE if scorer.split.dtype in (mx.float16, mx.bfloat16) else FLOAT32_TOLERANCE

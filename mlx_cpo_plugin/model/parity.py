"""Whether a model can share prompts: tried on two pairs before a run, and compared with plain scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_cpo_plugin.data.batches import collate
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import TF32_EPSILON, float32_product_epsilon
from mlx_cpo_plugin.errors import ConfigError, is_device_fault
from mlx_cpo_plugin.kernels import library
from mlx_cpo_plugin.model.buckets import PAIR_BY_PAIR, Grouping, PairSize, grouping_for
from mlx_cpo_plugin.model.caches import ARCHITECTURE_ERRORS, can_be_padded, fresh_caches
from mlx_cpo_plugin.model.layers import HALF_PRECISION
from mlx_cpo_plugin.model.logps import AnswerScores, evaluation_mode, score_answers
from mlx_cpo_plugin.model.shared_prefix import split_shared_prefix
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer, collate_shared

# Relative, of an answer's log-prob; half precision, and TF32, round differently for other shapes.
FLOAT32_TOLERANCE = 1e-4
TF32_TOLERANCE = 1e-2
HALF_TOLERANCE = 3e-2

Score = Callable[[SharedPromptScorer, Sequence[PreferencePair]], AnswerScores]


def choose_scorer(
    model: nn.Module, pairs: Sequence[PreferencePair], wanted: str, say: Callable[[str], None] = print
) -> SharedPromptScorer | None:
    """Return the scorer that shares prompts, or ``None`` where every answer is to be scored by itself.

    Args:
        wanted: ``auto`` checks whether the model allows it, and falls back with a note; ``shared`` insists on it;
            ``plain`` is ``None``, and so is everything for a model that is no ``nn.Module``.

    Raises:
        ConfigError: ``shared`` is wanted, but the model does not allow it.
        RuntimeError, MemoryError: out of memory or a device fault, neither of which says anything about the model.
    """
    if wanted == "plain" or not pairs or not isinstance(model, nn.Module):
        return None
    try:
        scorer = SharedPromptScorer(model)
        trial = _Trial(scorer, pairs)
    except ARCHITECTURE_ERRORS as error:
        fault = _named(error)
    else:
        fault = trial.fault_of(_scores_one_by_one)
    if not fault:
        scorer.grouping = _grouping(trial)
        scorer.packs = library.in_use() and _can_pack(trial)
        return scorer
    if wanted == "shared":
        raise ConfigError(
            f"scoring is 'shared', but this model cannot share prompts ({fault}); use auto or plain.", key="scoring"
        )
    say(f"This model cannot share the prompt between two answers ({fault}); each is scored by itself.")
    return None


def _grouping(trial: _Trial) -> Grouping:
    """Return which pairs share a pass: none where several at once would have other scores."""
    model = trial.scorer.model
    if not can_be_padded(fresh_caches(model)) or trial.fault_of(_scores_together):
        return PAIR_BY_PAIR
    return grouping_for(model)


def _can_pack(trial: _Trial) -> bool:
    """Whether pairs one behind the other have the same scores."""
    return trial.scorer.grouping is not PAIR_BY_PAIR and not trial.fault_of(_scores_packed)


def _named(error: Exception) -> str:
    """Return one line on an error of an architecture; what says nothing about the model is raised."""
    if is_device_fault(error):
        raise error
    return f"{type(error).__name__}: {error}".splitlines()[0]


def expected_grouping(model: nn.Module) -> Grouping | None:
    """Return the grouping of :func:`choose_scorer` as far as it shows without computing; ``None``: plain scoring."""
    try:
        caches = fresh_caches(model)
    except ARCHITECTURE_ERRORS as error:
        if is_device_fault(error):
            raise
        return None
    return grouping_for(model) if can_be_padded(caches) else PAIR_BY_PAIR


def _scores_one_by_one(scorer: SharedPromptScorer, pairs: Sequence[PreferencePair]) -> AnswerScores:
    return _joined([scorer.score(split_shared_prefix(pair)) for pair in pairs])


def _scores_together(scorer: SharedPromptScorer, pairs: Sequence[PreferencePair]) -> AnswerScores:
    splits = [split_shared_prefix(pair) for pair in pairs]
    bucket = scorer.grouping.bucket_for([PairSize.of(split) for split in splits])
    return scorer.score_batch(collate_shared(splits, bucket), bucket.scores_shared)


def _scores_packed(scorer: SharedPromptScorer, pairs: Sequence[PreferencePair]) -> AnswerScores:
    return scorer.score_packed([split_shared_prefix(pair) for pair in pairs])


def _joined(scores: Sequence[AnswerScores]) -> AnswerScores:
    return AnswerScores(*(mx.concatenate(list(column)) for column in zip(*scores, strict=True)))


def _evaluated(scores: AnswerScores) -> AnswerScores:
    mx.eval(scores)  # one after the other: each holds the logits of all its tokens
    return scores


def _sample(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Return two pairs with prompts of two lengths, cut short, since plain scoring holds the logits of all tokens."""
    return [_shortened(pairs[0], prompt=20, answer=12), _shortened(pairs[-1], prompt=11, answer=16)]


def _shortened(pair: PreferencePair, prompt: int, answer: int) -> PreferencePair:
    chosen, rejected = pair.chosen[:answer], pair.rejected[:answer]
    all_chosen, all_rejected = np.ones(len(chosen), bool), np.ones(len(rejected), bool)
    return PreferencePair(pair.prompt[-prompt:], chosen, rejected, all_chosen, all_rejected)


class _Trial:
    """Two short pairs and their plain log-probs, with which every other way to score them is compared."""

    def __init__(self, scorer: SharedPromptScorer, pairs: Sequence[PreferencePair]) -> None:
        self.scorer, self.sample = scorer, _sample(pairs)
        with evaluation_mode(scorer.model):
            self.plain = _joined([_evaluated(score_answers(scorer.model, collate([pair]))) for pair in self.sample])

    def fault_of(self, score: Score) -> str:
        """Return how the log-probs of ``score`` differ from plain ones, or what it raises, if either."""
        try:
            difference = self._largest_difference(score)
        except ARCHITECTURE_ERRORS as error:
            return _named(error)
        tolerance = FLOAT32_TOLERANCE if float32_product_epsilon() < TF32_EPSILON else TF32_TOLERANCE
        if self.scorer.split.dtype in HALF_PRECISION:
            tolerance = HALF_TOLERANCE
        return f"log-probs differ by {difference:.1e}" if difference > tolerance else ""

    def _largest_difference(self, score: Score) -> float:
        """Return the largest difference from plain log-probs, relative to these or to 1, whichever is larger."""
        with evaluation_mode(self.scorer.model):
            scores = _evaluated(score(self.scorer, self.sample))
        differences = []
        for side in ("chosen_logps", "rejected_logps"):
            reference, values = np.array(getattr(self.plain, side)), np.array(getattr(scores, side))
            differences.append(np.abs(values - reference) / np.maximum(np.abs(reference), 1.0))
        largest = float(np.max(differences))  # unlike Python's max, NaN where any difference is
        return largest if np.isfinite(largest) else float("inf")

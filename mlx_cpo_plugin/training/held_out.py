"""Scores of a few held-out rows: is what was saved what was trained?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.checkpoints.adapter import CheckpointError, adapter_in_place
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.logps import evaluation_mode
from mlx_cpo_plugin.model.scoring import prepared_scorer, scored_groups
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer
from mlx_cpo_plugin.training.wiring import Run

# The shortest rows of the first ones: enough to see a difference, and cheap.
ROWS, AMONG = 8, 64
# Relative difference between two passes of one model: a GPU adds in any order.
TOLERANCE = 1e-4
# Changes of the margin below this, in nats, are too small to be compared.
SMALL = 0.05
# A model that is handed on and keeps a smaller share of the margin won is worse than what was trained.
ENOUGH = 0.9


@dataclass(frozen=True)
class HeldOutScores:
    """The log-probs that a model gives the answers of N pairs.

    Attributes:
        logps: float64 [2, N], in nats: of the chosen and of the rejected answers.
    """

    logps: NDArray[np.float64]

    @property
    def margin(self) -> float:
        """The mean log-prob of the chosen minus that of the rejected answers."""
        return float((self.logps[0] - self.logps[1]).mean())

    def is_like(self, other: HeldOutScores) -> bool:
        """Whether both are scores of one model, up to the order of additions."""
        return bool(np.allclose(self.logps, other.logps, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True))


def held_out_rows(*splits: Sequence[object]) -> list[PreferencePair]:
    """Return a few short pairs of the first split that has any."""
    for rows in splits:
        pairs = [pair for pair in rows[:AMONG] if isinstance(pair, PreferencePair)]
        if pairs:
            return sorted(pairs, key=lambda pair: pair.tokens)[:ROWS]
    return []


def held_out_scores(
    model: nn.Module, pairs: Sequence[PreferencePair], scoring: str = "auto", step_size: int | None = None
) -> HeldOutScores:
    """Score ``pairs`` on this rank alone, one after the other; ``scoring`` and ``step_size`` are those of the run."""
    with prepared_scorer(model, pairs, scoring, lambda _: None) as scorer:
        return scores_of(model, pairs, scorer, step_size)


def scores_of(
    model: nn.Module, pairs: Sequence[PreferencePair], scorer: SharedPromptScorer | None, step_size: int | None = None
) -> HeldOutScores:
    """Score ``pairs`` as :func:`held_out_scores` does, with a scorer that was chosen before."""
    logps = []
    with evaluation_mode(model):
        for pair in pairs:
            ((_, scores),) = scored_groups(model, [pair], scorer, step_size)
            mx.eval(scores)
            logps.append(np.array([scores.chosen_logps, scores.rejected_logps], np.float64).reshape(2))
    return HeldOutScores(np.stack(logps, axis=1))


def score_saved(run: Run) -> None:
    """Read back what a run saved, and score the adapter on held-out rows; warn of what is lost or scores otherwise."""
    outputs, rows = run.outputs, held_out_rows(run.val_pairs, run.pairs)
    trained = scores_of(run.model, rows, run.scorer, run.args.seq_step_size)
    try:
        with adapter_in_place(run.model, outputs.adapter_file):
            saved = scores_of(run.model, rows, run.scorer, run.args.seq_step_size)
        if not saved.is_like(trained):
            run.reporter.warn(
                f"{outputs.adapter_file} gives {len(rows)} held-out rows a margin of {saved.margin:+.3f} nats, and the "
                f"model in memory, which has the same parameters, {trained.margin:+.3f}: this device gives different "
                "results for the same computation."
            )
        if run.best.saved and run.best.iteration > 0:
            with adapter_in_place(run.model, outputs.best_file):
                pass  # it can be read, and fits
    except CheckpointError as error:
        run.reporter.warn(str(error))


def margin_retained(before: HeldOutScores, trained: HeldOutScores, handed_on: HeldOutScores) -> float | None:
    """Return the share of the margin won in training that ``handed_on`` has; ``None`` where hardly any was won."""
    won = trained.margin - before.margin
    return (handed_on.margin - before.margin) / won if abs(won) >= SMALL else None


def rounding_cost(
    before: HeldOutScores, trained: HeldOutScores, handed_on: HeldOutScores, name: str = "fused model"
) -> str:
    """Return one sentence on what rounding cost the fused model, ``handed_on``, which is called ``name``."""
    sentence = (
        f"The {name} gives {handed_on.logps.shape[1]} held-out rows a margin of {handed_on.margin:+.3f} nats; "
        f"trained were {trained.margin:+.3f}, from {before.margin:+.3f}"
    )
    kept = margin_retained(before, trained, handed_on)
    is_share = kept is not None and 0 <= kept <= 1.5  # else rounding moved the margin by more than training did
    return f"{sentence}: {kept:.0%} of what was learned." if is_share else f"{sentence}."

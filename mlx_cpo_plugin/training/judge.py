"""The judge of a run: each validation is compared, pair by pair, with the one before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.exchange import add_over_ranks, gather
from mlx_cpo_plugin.training.metrics import PAIR_VALUES
from mlx_cpo_plugin.training.state import Resumable
from mlx_cpo_plugin.training.validation import BestSoFar
from mlx_cpo_plugin.types import Values
from mlx_cpo_plugin.verdict import MEASURES, Change, Verdict, error_of_rows, sums_of_rows, worth_in_rows

_COMPARED = [PAIR_VALUES.index(name) for name in ("loss", "chosen_nll", "margins", "accuracies")]
OTHER_PAIRS = "Whether the model is better than before training is not known: the validation before it had other pairs."


class Judge(Resumable):
    """Says whether the model is better or worse than before training, and when that changes.

    Args:
        digest: of the validation pairs of all ranks; a validation of others is not compared.
        cpo_alpha: weight of the likelihood term in the loss.
        rows: which row each of the N validation pairs of all ranks is from, numbered from 0: int64 [N].

    Attributes:
        before: what is compared of each pair of this rank, from before training; None where it was not validated.
        latest: the verdict on the last validation; None where there is none.
        of_best: that on the best validation.
        told: the outcome that was told last.
    """

    remembered: ClassVar[tuple[str, ...]] = ("digest", "before", "told")

    def __init__(self, digest: str, cpo_alpha: float, rows: NDArray[np.int64]) -> None:
        self.digest, self.cpo_alpha, self.rows = digest, cpo_alpha, rows
        self.before: list[list[float]] | None = None
        self.latest: Verdict | None = None
        self.of_best: Verdict | None = None
        self.told = 0

    def begin(self, values: NDArray[np.float64]) -> None:
        """Take a validation as the one before training; ``values`` are as in :meth:`verdict`."""
        self.before = values[_COMPARED].tolist()

    def verdict(
        self, values: NDArray[np.float64], places: NDArray[np.int64], answers: Mapping[str, float] | None = None
    ) -> Verdict | None:
        """Return how a validation compares with the one before training; None where there is nothing to compare.

        Args:
            values: of this rank's pairs, in their order, float64 [len(PAIR_VALUES), n].
            places: of these among the pairs of all ranks, int64 [n].
            answers: figures of greedy answers, by their names in reports, if there are any.
        """
        if self.before is None:
            return None
        loss, nll, margins, accuracies = values[_COMPARED] - np.array(self.before)
        tokens = values[PAIR_VALUES.index("chosen_tokens")]
        pairs, all_tokens, all_nll = np.sum(gather([len(tokens), tokens.sum(), nll.sum()]), axis=0).tolist()
        # The change per token is a ratio of two sums: what a pair has in its error is the distance from it.
        ratio = all_nll / all_tokens
        per_token = ratio + (nll - ratio * tokens) * pairs / all_tokens
        differences = np.array([loss + self.cpo_alpha * per_token, per_token, margins, accuracies])
        mean = np.sum(gather(differences.sum(1).tolist()), axis=0) / pairs
        count, worth = int(self.rows.max()) + 1, worth_in_rows(self.rows)
        of_rows = sums_of_rows(differences - mean[:, None], self.rows[places], count)
        stderr = error_of_rows(add_over_ranks(of_rows), pairs)
        self.latest = Verdict.of(
            {
                measure.name: Change(of_mean, of_stderr, worth)
                for measure, of_mean, of_stderr in zip(MEASURES, mean.tolist(), stderr.tolist(), strict=True)
            },
            answers or {},
        )
        return self.latest

    def news(self, iteration: int, verdict: Verdict | None) -> tuple[str | None, str | None]:
        """Return a warning and a line, of which at most one is there: what the last verdict changes."""
        if verdict is None or verdict.outcome == self.told:
            return None, None
        self.told = verdict.outcome
        line = f"Iter {iteration}: the model is {verdict.sentence()}"
        if verdict.outcome < 0:
            return f"{line}; {advice(self.cpo_alpha)}.", None
        return None, f"{line}."

    def conclusion(self, best: BestSoFar, best_loaded: bool = False) -> str | None:
        """Return the last sentence on a run: what it left, and which of its validations was the best.

        Args:
            best_loaded: whether the weights of that one are what it left.
        """
        verdict = self.of_best if best_loaded else self.latest
        if verdict is None:
            return OTHER_PAIRS if self.before is None else None
        label = next(measure.label for measure in MEASURES if measure.name == best.measure)
        of_best = f"the best validation, by {label}, was that of iteration {best.iteration}"
        if self.of_best is not None and best.sign * self.of_best.changes[best.measure][0] < 0:
            of_best += ", and the one before training was better"
        return f"The model is {verdict.sentence()}; {of_best if best.iteration else 'no validation was finite'}."

    def state(self) -> Values:
        verdicts = {"latest": self.latest, "of_best": self.of_best}
        return {**super().state(), **{name: verdict and verdict.report() for name, verdict in verdicts.items()}}

    def restore(self, state: Values) -> None:
        """Continue from ``state``; what was validated before training counts only if it was these pairs."""
        if state["digest"] == self.digest:
            self.before, self.told = state["before"], state["told"]
            self.latest, self.of_best = (Verdict.from_report(state[name] or {}) for name in ("latest", "of_best"))
        else:
            self.before, self.told, self.latest, self.of_best = None, 0, None, None


def advice(cpo_alpha: float) -> str:
    """Return what helps where chosen answers become unlikely."""
    if cpo_alpha:
        return "lower learning_rate, or stop earlier"
    return "keep the chosen answers likely with cpo_alpha: 1 (preset: cpo-paper has it), or lower learning_rate"

"""A comparison as plain values, as :mod:`mlx_cpo_plugin.comparison.command` documents them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mlx_cpo_plugin.comparison.measure import Comparison
from mlx_cpo_plugin.comparison.statistics import Measure, figures, finite
from mlx_cpo_plugin.comparison.text_metrics import OF_ANSWERS, answer_values, chrf
from mlx_cpo_plugin.data.ranked import row_numbers

MEANS = {
    "accuracy": "accuracies",
    "margin": "margins",
    "loss": "loss",
    "chosen_logps": "policy_chosen_logps",
    "rejected_logps": "policy_rejected_logps",
}
"""Name in the JSON -> name among the means over pairs."""
OF_PAIRS = (Measure("accuracy", "pairs", is_rate=True), Measure("margin", "pairs"))


def figures_of(
    comparison: Comparison, max_tokens: int, metrics: Sequence[str] = (), decided: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Return all figures.

    Args:
        metrics: of the answers, keys of :data:`mlx_cpo_plugin.comparison.text_metrics.CHRF`.
        decided: what rewards and judges say, see :mod:`mlx_cpo_plugin.comparison.deciding`.
    """
    settings = comparison.settings
    return {
        "loss_type": settings.dpo_cpo_loss_type,
        "beta": settings.beta,
        "max_tokens": max_tokens,
        "models": [contender.description() for contender in comparison.models],
        "measures": [*_of_pairs(comparison), *decided, *_of_answers(comparison, metrics)],
        "answers": [
            {
                "source": question.source,
                "prompt": question.prompt,
                "chosen": question.chosen,
                "rejected": question.rejected,
                "models": [
                    {"text": answer.text, "finished": answer.finished, "tokens": len(answer.tokens)} for answer in given
                ],
            }
            for question, *given in zip(comparison.questions, *comparison.answers, strict=True)
        ],
        "held_out": comparison.held_out or None,
        "preference": [
            {
                **group.description(),
                "models": [
                    {name: finite(preferred.means[place][ours]) for name, ours in MEANS.items()}
                    for preferred in comparison.preferences
                ],
            }
            for place, group in enumerate(comparison.groups)
        ],
    }


def _of_pairs(comparison: Comparison) -> Iterator[dict[str, Any]]:
    if not comparison.groups:
        return
    rows = row_numbers(comparison.groups[0].pairs)
    for measure in OF_PAIRS:
        values = [preferred.of_each(MEANS[measure.name]) for preferred in comparison.preferences]
        yield figures(measure, comparison.names, np.array(values), rows)


def _of_answers(comparison: Comparison, metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the metrics on answers to rows, which have a chosen answer, and the other figures on all answers."""
    names = comparison.names
    places = [place for place, question in enumerate(comparison.questions) if question.chosen is not None]
    references = [comparison.questions[place].chosen or "" for place in places]
    for name in metrics if places else ():
        found = [chrf(name, [given[place].text for place in places], references) for given in comparison.answers]
        entry = figures(Measure(name, "answers", within=(0, 100)), names, np.array([each for each, _ in found]))
        for model, (_, corpus) in zip(entry["models"], found, strict=True):
            model["corpus"] = corpus
        yield entry
    for measure in OF_ANSWERS if comparison.questions else ():
        yield figures(measure, names, np.array([answer_values(measure, given) for given in comparison.answers]))

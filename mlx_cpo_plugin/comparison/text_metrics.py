"""Figures of an answer's text: how like the row's chosen answer it is, how long, how repetitive, whether it ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_cpo_plugin.comparison.statistics import SHARE, Measure
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.training.samples import repetition

# Name -> order of the n-grams of words.
CHRF = {"chrf": 0, "chrf++": 2}
OF_ANSWERS = (
    Measure("length", "answers", sign=0, within=(0, math.inf)),
    Measure("repetition", "answers", sign=-1, within=SHARE),
    Measure("ended", "answers", is_rate=True),
)


class Answer(NamedTuple):
    """What a model answers greedily.

    Attributes:
        finished: whether it came to an end by itself.
        tokens: without the one that ends it.
    """

    text: str
    finished: bool
    tokens: tuple[int, ...] = ()


def answer_values(measure: Measure, answers: Sequence[Answer]) -> NDArray[np.float64]:
    """Return one of :data:`OF_ANSWERS` of each of N answers: float64 [N]; a length is in tokens."""
    of_each = {
        "length": lambda answer: len(answer.tokens),
        "repetition": lambda answer: repetition(answer.tokens),
        "ended": lambda answer: answer.finished,
    }
    return np.array([of_each[measure.name](answer) for answer in answers], np.float64)


def check_metrics(names: Sequence[str]) -> None:
    """Raise ConfigError where the package that computes metrics is missing."""
    if names and find_spec("sacrebleu") is None:
        raise ConfigError(f"--metric {names[0]} needs sacrebleu; run pip install 'mlx-cpo-plugin[compare]'.")


def chrf(name: str, answers: Sequence[str], references: Sequence[str]) -> tuple[NDArray[np.float64], float]:
    """Return chrF of each of N answers, 0 to 100: float64 [N], and that of all of them as one corpus.

    Source: Popović 2015, chrF: character n-gram F-score for automatic MT evaluation; sacreBLEU's default settings.
    """
    from sacrebleu.metrics import CHRF as Metric

    metric = Metric(word_order=CHRF[name])
    pairs = zip(answers, references, strict=True)
    each = [metric.sentence_score(answer, [reference]).score for answer, reference in pairs]
    return np.array(each, np.float64), float(metric.corpus_score(list(answers), [list(references)]).score)

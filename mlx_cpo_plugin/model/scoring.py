"""Pairs are scored without a gradient, by a model that is trained or by one that is prepared for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import mlx.nn as nn
from mlx_lm.utils import get_total_parameters

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import compile_where_it_pays
from mlx_cpo_plugin.kernels import library
from mlx_cpo_plugin.model.compiled import compiled_kernels, computes
from mlx_cpo_plugin.model.logps import AnswerScores, plain_groups
from mlx_cpo_plugin.model.parity import choose_scorer
from mlx_cpo_plugin.model.products import float32_products
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer


@contextmanager
def prepared_scorer(
    model: nn.Module, pairs: Sequence[PreferencePair], wanted: str, say: Callable[[str], None] = print
) -> Iterator[SharedPromptScorer | None]:
    """Yield what scores ``pairs``, as :func:`mlx_cpo_plugin.model.parity.choose_scorer` returns it.

    Until the context ends the model computes as fast as the device can, with the compiled kernels if there is enough
    for them to do.
    """
    with ExitStack() as stack:
        stack.enter_context(compile_where_it_pays())
        stack.enter_context(float32_products(model))
        if _kernels_pay(model, pairs) and library.usable(say):
            stack.enter_context(compiled_kernels(model))
        yield choose_scorer(model, pairs, wanted, say)


def scored_groups(
    model: nn.Module,
    pairs: Sequence[PreferencePair],
    length_normalised: bool = False,
    scorer: SharedPromptScorer | None = None,
) -> Iterator[tuple[list[int], AnswerScores]]:
    """Return the pairs of each pass, by number, and their scores; ``scorer`` shares prompts, ``None`` shares none."""
    if scorer is None:
        return plain_groups(model, pairs, length_normalised)
    return scorer.scored_groups(pairs, length_normalised)


def _kernels_pay(model: nn.Module, pairs: Sequence[PreferencePair]) -> bool:
    if library.in_use() or not library.suits_device() or not computes(model):
        return False
    return library.pays(2 * get_total_parameters(model) * sum(pair.tokens for pair in pairs))

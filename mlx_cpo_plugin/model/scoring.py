"""Models are prepared to compute without a gradient, and score pairs, in a run or by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import get_total_parameters

from mlx_cpo_plugin.data.batches import collate, collate_answers
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import compile_where_it_pays
from mlx_cpo_plugin.kernels import library
from mlx_cpo_plugin.model.compiled import compiled_head, compiled_kernels, computes
from mlx_cpo_plugin.model.logps import AnswerScores, normalised, score_answers, score_rows
from mlx_cpo_plugin.model.parity import choose_scorer
from mlx_cpo_plugin.model.products import float32_products
from mlx_cpo_plugin.model.shared_prefix import is_long, split_shared_prefix
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer

# A token that is written reads all weights by itself, which takes a few times what a token among many takes.
_WRITTEN = 3


@contextmanager
def prepared(
    model: nn.Module, tokens: int, say: Callable[[str], None] = print, compiled_ones: bool = False
) -> Iterator[None]:
    """Let ``model`` compute as fast as the device can until the context ends.

    Args:
        tokens: that it is going to read; the compiled kernels are used if that is enough for them to do.
        compiled_ones: use them for less, too, where they are compiled already, which changes what is rounded.
    """
    with ExitStack() as stack:
        stack.enter_context(compile_where_it_pays())
        stack.enter_context(float32_products(model))
        if _kernels_usable(model, tokens, compiled_ones, say):
            stack.enter_context(compiled_kernels(model))
        yield


@contextmanager
def prepared_scorer(
    model: nn.Module,
    pairs: Sequence[PreferencePair],
    wanted: str,
    say: Callable[[str], None] = print,
    compiled_ones: bool = False,
) -> Iterator[SharedPromptScorer | None]:
    """Yield what scores ``pairs``, as :func:`mlx_cpo_plugin.model.parity.choose_scorer` returns it.

    Until the context ends the model is :func:`prepared` for them.
    """
    with prepared(model, sum(pair.tokens for pair in pairs), say, compiled_ones):
        yield choose_scorer(model, pairs, wanted, say)


@contextmanager
def prepared_to_answer(
    model: nn.Module, prompts: int, answers: int, say: Callable[[str], None] = print
) -> Iterator[None]:
    """Let ``model`` answer as fast as the device can until the context ends.

    Args:
        prompts, answers: the tokens of all of them.
    """
    with ExitStack() as stack:
        stack.enter_context(prepared(model, prompts + _WRITTEN * answers, say, compiled_ones=True))
        if library.in_use():
            stack.enter_context(compiled_head(model))
        yield


def scored_groups(
    model: nn.Module,
    pairs: Sequence[PreferencePair],
    scorer: SharedPromptScorer | None,
    step_size: int | None = None,
    length_normalised: bool = False,
) -> Iterator[tuple[list[int], AnswerScores]]:
    """Yield the pairs of each pass, by number, and their scores.

    Args:
        scorer: shares the prompt between the answers of a pair; without it the answers are padded together.
        step_size: longer pairs are computed each by itself, with ``scorer`` in segments of so many tokens, else one
            answer after the other.
    """
    long = [number for number, pair in enumerate(pairs) if is_long(pair, step_size)]
    for number in long:
        yield [number], normalised(_score_long(model, pairs[number], scorer, step_size), length_normalised)
    others = [number for number in range(len(pairs)) if number not in long]
    together = [pairs[number] for number in others]
    if scorer is not None:
        for group, scores in scorer.scored_groups(together, length_normalised):
            yield [others[place] for place in group], scores
    elif together:
        yield others, score_answers(model, collate(together), length_normalised)


def _score_long(
    model: nn.Module, pair: PreferencePair, scorer: SharedPromptScorer | None, step_size: int | None
) -> AnswerScores:
    """Return the sums of a long pair, evaluated part by part."""
    if scorer is not None:
        return scorer.score_in_segments(split_shared_prefix(pair), step_size)
    sides = []
    for answer, scored in pair.answers:
        batch = collate_answers([(pair.prompt, answer, scored)])
        sides.append((*score_rows(model, batch), batch.token_counts))
        mx.eval(sides[-1])
    return AnswerScores(*(column for columns in zip(*sides, strict=True) for column in columns))


def _kernels_usable(model: nn.Module, tokens: int, compiled_ones: bool, say: Callable[[str], None]) -> bool:
    if library.in_use() or not computes(model):
        return False
    pays = library.pays(2 * get_total_parameters(model) * tokens)
    return (pays or compiled_ones) and library.usable(say, compiling=pays)

"""Long pairs are scored in segments where no gradient follows: the same scores, in the memory of keys and values."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.architectures import ARCHITECTURES, build_architecture
from support.tiny import VOCABULARY, add_adapter, build_model, build_pairs

from mlx_cpo_plugin.data.batches import collate
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model import logps, shared_prompt
from mlx_cpo_plugin.model.compiled import compiled_kernels
from mlx_cpo_plugin.model.logps import AnswerScores, score_answers
from mlx_cpo_plugin.model.scoring import prepared_scorer, scored_groups
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.held_out import held_out_scores
from mlx_cpo_plugin.training.trainer import train_cpo

AT_ONCE = 8


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything over a few tokens be long."""
    for module in (logps, shared_prompt):
        monkeypatch.setattr(module, "LONGEST_AT_ONCE", AT_ONCE)


def pair_of(prompt: int, chosen: int, rejected: int, alike: int = 0, seed: int = 0) -> PreferencePair:
    """A pair of these lengths, whose answers have their first tokens in common."""
    rng = np.random.default_rng(seed)
    parts = [rng.integers(3, VOCABULARY, length).astype(np.int32) for length in (prompt, chosen, rejected)]
    parts[2][:alike] = parts[1][:alike]
    scored = [rng.random(length) < 0.8 for length in (chosen, rejected)]
    scored[1][:alike] = scored[0][:alike]
    for side in scored:
        side[-1] = True
    return PreferencePair(*parts, *scored)


def gathered(groups: Sequence[tuple[list[int], AnswerScores]]) -> dict[str, np.ndarray]:
    """Scores in the order of the pairs, each of which has to come once."""
    numbers = [number for group, _ in groups for number in group]
    assert sorted(numbers) == list(range(len(numbers)))
    columns = zip(*(scores for _, scores in groups), strict=True)
    values = [np.concatenate([np.array(part) for part in column])[np.argsort(numbers)] for column in columns]
    return dict(zip(AnswerScores._fields, values, strict=True))


def assert_like_whole(model: nn.Module, pairs: Sequence[PreferencePair], scorer: SharedPromptScorer | None) -> None:
    """Compare with a pass over each whole answer."""
    found = gathered(list(scored_groups(model, pairs, scorer=scorer)))
    for number, pair in enumerate(pairs):
        for name, expected in score_answers(model, collate([pair]))._asdict().items():
            np.testing.assert_allclose(found[name][number], expected.item(), rtol=1e-4, atol=1e-5, err_msg=name)


# What both answers share, and each of them: over the length or not, and a multiple of it or not.
PAIRS = [
    pair_of(3 * AT_ONCE + 2, 2 * AT_ONCE, 3, seed=1),
    pair_of(4, 3, 2, seed=2),
    pair_of(1, AT_ONCE + 1, 2 * AT_ONCE + 5, seed=3),
    pair_of(5, 3 * AT_ONCE, 2 * AT_ONCE, alike=AT_ONCE + 3, seed=4),
    pair_of(AT_ONCE + 1, 2, 3, seed=5),
    pair_of(2, 3, 4, seed=6),
]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.usefixtures("short_segments")
def test_every_architecture_scores_in_segments_as_it_does_whole(name: str) -> None:
    model = build_architecture(name)
    model.eval()

    assert_like_whole(model, PAIRS, SharedPromptScorer(model))


@pytest.mark.parametrize("wanted", ["auto", "plain"])
@pytest.mark.usefixtures("short_segments", "kernels")
def test_long_pairs_are_scored_among_short_ones_that_share_a_pass(wanted: str) -> None:
    model = add_adapter(build_model())
    with prepared_scorer(model, build_pairs(4), wanted, pytest.fail) as scorer:
        assert scorer is None if wanted == "plain" else scorer is not None and scorer.packs
        assert_like_whole(model, PAIRS, scorer)


@given(
    lengths=st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30)),
    alike=st.integers(0, 20),
    seed=st.integers(0, 100),
)
@settings(max_examples=40)
def test_the_scores_of_any_lengths_are_those_of_a_whole_pass(
    lengths: tuple[int, int, int], alike: int, seed: int
) -> None:
    model, pair = build_model(), pair_of(*lengths, alike=min(alike, lengths[1], lengths[2]), seed=seed)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for module in (logps, shared_prompt):
            patch.setattr(module, "LONGEST_AT_ONCE", AT_ONCE)
        for scorer in (SharedPromptScorer(model), None):
            assert_like_whole(model, [pair], scorer)


def recorded(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, width: Callable[..., int]) -> list[int]:
    """The tokens of every call of a function."""
    widths, original = [], getattr(owner, name)

    def call(*arguments: Any) -> Any:
        widths.append(width(*arguments))
        return original(*arguments)

    monkeypatch.setattr(owner, name, call)
    return widths


@pytest.mark.usefixtures("short_segments")
def test_no_pass_has_more_tokens_and_each_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pair = build_model(), pair_of(3 * AT_ONCE + 2, 2 * AT_ONCE, 3)
    scorer = SharedPromptScorer(model)
    widths = recorded(monkeypatch, scorer.split, "hidden", lambda tokens, caches: tokens.size)

    list(scorer.scored_groups([pair]))

    assert widths == [8, 8, 8, 1, 8, 8, 3]


@pytest.mark.usefixtures("short_segments")
def test_without_shared_prompts_there_are_logits_of_one_long_answer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = build_model(), [pair_of(5, 9, 9), pair_of(3, 4, 4), pair_of(4, 3, 3)]
    rows = recorded(monkeypatch, logps, "score_rows", lambda model, batch: len(batch.tokens))

    list(scored_groups(model, pairs))

    assert rows == [1, 1, 4]


def test_a_gradient_is_not_cut_into_segments(short_segments: None) -> None:
    model, (pair,) = add_adapter(build_model()), [pair_of(3, 2 * AT_ONCE, 2 * AT_ONCE)]
    split = shared_prompt.split_shared_prefix(pair)

    def chosen(differentiate: bool) -> mx.array:
        scorer = SharedPromptScorer(model)
        return scorer.score(split, differentiate).chosen_logps.sum()

    value, _ = nn.value_and_grad(model, lambda model: chosen(True))(model)
    np.testing.assert_allclose(value.item(), chosen(False).item(), rtol=1e-5)


def peak_of(model: nn.Module, compute: Callable[[], object]) -> int:
    """The most bytes that are there beside the model while something is computed."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    compute()
    return mx.get_peak_memory() - before


def test_the_memory_is_that_of_keys_and_values_once(kernels: None) -> None:
    layers, pair = 12, pair_of(3000, 600, 600)
    sizes = {"num_hidden_layers": layers, "num_key_value_heads": 4, "intermediate_size": 512}
    model = add_adapter(build_model(**sizes))
    mx.eval(model.parameters())
    keys_and_values = layers * 2 * 32 * 4 * (3000 + 600)

    with compiled_kernels(model):
        peak = peak_of(model, lambda: held_out_scores(model, [pair]))

    assert peak < 1.6 * keys_and_values


def test_validation_and_the_check_of_what_was_saved_take_less_than_the_step(tmp_path: Path, kernels: None) -> None:
    pair = pair_of(1500, 700, 700)

    def peak(pairs: list[PreferencePair], valid: list[PreferencePair], name: str) -> int:
        model = add_adapter(build_model(num_hidden_layers=6))
        mx.eval(model.parameters())
        args = CPOTrainingArgs(
            iters=1,
            batch_size=1,
            grad_checkpoint=True,
            seq_step_size=64,
            adapter_file=str(tmp_path / name / "adapters.safetensors"),
        )
        return peak_of(model, lambda: train_cpo(model, optimizers.Adam(1e-4), pairs, valid, args))

    short = pair_of(20, 10, 10)
    assert peak([short], [pair], "validated") < peak([pair], [short], "trained")

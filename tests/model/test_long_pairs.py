"""Long pairs are scored in segments where no gradient follows: the same scores, in the memory of keys and values."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
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

from mlx_cpo_plugin import train
from mlx_cpo_plugin.comparison.measure import compare
from mlx_cpo_plugin.data.batches import collate, collate_answers
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.export.trained import Trained
from mlx_cpo_plugin.kernels import library
from mlx_cpo_plugin.model import scoring
from mlx_cpo_plugin.model.caches import SegmentCache
from mlx_cpo_plugin.model.compiled import compiled_kernels
from mlx_cpo_plugin.model.logps import AnswerScores, score_answers, score_rows
from mlx_cpo_plugin.model.scoring import prepared_scorer, scored_groups
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer
from mlx_cpo_plugin.training import held_out, validation
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.held_out import held_out_scores
from mlx_cpo_plugin.training.trainer import train_cpo

STEP = 8


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
    found = gathered(list(scored_groups(model, pairs, scorer, STEP)))
    for number, pair in enumerate(pairs):
        for name, expected in score_answers(model, collate([pair]))._asdict().items():
            np.testing.assert_allclose(found[name][number], expected.item(), rtol=1e-4, atol=1e-5, err_msg=name)


# What both answers share, and each of them: over the length or not, and a multiple of it or not.
PAIRS = [
    pair_of(3 * STEP + 2, 2 * STEP, 3, seed=1),
    pair_of(4, 3, 2, seed=2),
    pair_of(1, STEP + 1, 2 * STEP + 5, seed=3),
    pair_of(5, 3 * STEP, 2 * STEP, alike=STEP + 3, seed=4),
    pair_of(STEP + 1, 2, 3, seed=5),
    pair_of(2, 3, 4, seed=6),
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_scores_in_segments_as_it_does_whole(name: str) -> None:
    model = build_architecture(name)
    model.eval()

    assert_like_whole(model, PAIRS, SharedPromptScorer(model))


@pytest.mark.parametrize("wanted", ["auto", "plain"])
@pytest.mark.usefixtures("kernels")
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


def test_no_pass_has_more_tokens_and_each_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pair = build_model(), pair_of(3 * STEP + 2, 2 * STEP, 3)
    scorer = SharedPromptScorer(model)
    widths = recorded(monkeypatch, scorer.split, "hidden", lambda tokens, caches: tokens.size)

    list(scored_groups(model, [pair], scorer, STEP))

    assert widths == [8, 8, 8, 1, 8, 8, 3]


def test_without_shared_prompts_there_are_logits_of_one_long_answer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = build_model(), [pair_of(5, 9, 9), pair_of(3, 4, 4), pair_of(4, 3, 3)]
    rows = recorded(monkeypatch, scoring, "score_rows", lambda model, batch: len(batch.tokens))
    together = recorded(monkeypatch, scoring, "score_answers", lambda model, batch, *_: len(batch.tokens))

    list(scored_groups(model, pairs, None, STEP))

    assert (rows, together) == ([1, 1], [4])


def test_without_a_step_size_no_pair_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model()
    for scorer in (SharedPromptScorer(model), None):
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "_score_long", pytest.fail)
            assert list(scored_groups(model, PAIRS, scorer))


def test_one_new_token_sees_all_that_came_before() -> None:
    keys = mx.zeros((1, 2, 5, 4))
    cache = SegmentCache(keys, keys)

    assert [cache.make_mask(1, return_array=wanted) for wanted in (False, True)] == [None, None]
    assert cache.make_mask(1, window_size=3).tolist() == [[False] * 3 + [True] * 3]


def peak_of(model: nn.Module, compute: Callable[[], object]) -> int:
    """The most bytes that are there beside the model while something is computed."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    compute()
    return mx.get_peak_memory() - before


def wide_model() -> nn.Module:
    """Twelve layers whose activations are larger than their keys and values."""
    model = add_adapter(build_model(num_hidden_layers=12, num_key_value_heads=4, intermediate_size=512))
    mx.eval(model.parameters())
    return model


def test_the_memory_is_that_of_keys_and_values_once(kernels: None) -> None:
    model, pair = wide_model(), pair_of(3000, 600, 600)
    keys_and_values = 12 * 2 * 32 * 4 * (3000 + 600)

    with compiled_kernels(model):
        peak = peak_of(model, lambda: held_out_scores(model, [pair], step_size=64))

    assert peak < 1.1 * keys_and_values


def test_without_shared_prompts_the_memory_is_that_of_one_answer(kernels: None) -> None:
    model, pair = build_model(vocab_size=4000), pair_of(300, 300, 300)

    one = peak_of(
        model, lambda: mx.eval(score_rows(model, collate_answers([(pair.prompt, pair.chosen, pair.chosen_scored)])))
    )
    both = peak_of(model, lambda: list(scored_groups(model, [pair], None, 256)))

    assert both < 1.2 * one


@pytest.mark.parametrize("wanted", ["auto", "plain"])
@pytest.mark.parametrize("lengths", [(600, 300, 300), (100, 300, 300), (2, 60, 61)], ids=str)
@pytest.mark.parametrize("with_kernels", [library.ALWAYS, library.NONE])
@pytest.mark.slow
def test_validation_and_the_check_of_what_was_saved_take_less_than_the_step(
    wanted: str, lengths: tuple[int, int, int], with_kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(library.VARIABLE, with_kernels)
    long, short = pair_of(*lengths), pair_of(20, 10, 10)

    def peak(pairs: list[PreferencePair], valid: list[PreferencePair], name: str) -> int:
        model = add_adapter(build_model(num_hidden_layers=4))
        mx.eval(model.parameters())
        args = CPOTrainingArgs(
            iters=1,
            batch_size=1,
            grad_checkpoint=True,
            seq_step_size=64,
            scoring=wanted,
            adapter_file=str(tmp_path / name / "adapters.safetensors"),
        )
        return peak_of(model, lambda: train_cpo(model, optimizers.Adam(1e-4), pairs, valid, args))

    assert peak([short], [long], "validated") < peak([long], [short], "trained")


def test_a_run_its_test_and_its_commands_cut_long_pairs_as_its_steps_do(
    model_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: set[int | None] = set()

    def recorded_groups(
        model: nn.Module, pairs: Any, scorer: Any, step_size: int | None, length_normalised: bool = False
    ) -> Any:
        given.add(step_size)
        return scored_groups(model, pairs, scorer, step_size, length_normalised)

    def step_sizes() -> set[int | None]:
        found = set(given)
        given.clear()
        return found

    for module in (held_out, validation):
        monkeypatch.setattr(module, "scored_groups", recorded_groups)
    adapter_path = tmp_path / "adapters"
    settings = {"model": str(model_folder), "data": str(data_folder), "adapter_path": str(adapter_path), "iters": 1}
    settings |= {"efficient_long_context": True, "seq_step_size": 5, "steps_per_sample": 0}

    train(**settings, val_batches=1, test=False)
    assert step_sizes() == {5}
    train(**settings, val_batches=0, test=True, resume="auto")
    assert step_sizes() == {5}
    train(**settings, val_batches=0, test=False, resume="auto", fuse=True)
    assert step_sizes() == {5}
    compare([adapter_path], say=lambda line: None)
    assert step_sizes() == {5}
    other = tmp_path / "other"
    train(**{**settings, "adapter_path": str(other), "seq_step_size": 3}, val_batches=0, test=False)
    step_sizes()
    compare([adapter_path, other], say=lambda line: None)
    assert step_sizes() == {3}
    Trained.load(adapter_path, None, None, lambda line: None)
    assert step_sizes() == {5}

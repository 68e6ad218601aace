"""A long pair has the gradient of float64, and takes the memory of its keys and values twice."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support.tiny import VOCABULARY, add_adapter, build_model, relative_error

from mlx_cpo_plugin.bench.reference_gradient import ReferenceLoss, reference_gradient
from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import compile_where_it_pays
from mlx_cpo_plugin.model import remembered
from mlx_cpo_plugin.model.activations import lean_activations
from mlx_cpo_plugin.model.compiled import compiled_kernels
from mlx_cpo_plugin.model.recompute import checkpointed_layers
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer
from mlx_cpo_plugin.training.long_context import FAR, SegmentGradients
from mlx_cpo_plugin.training.objective import objective_for

STEP = 4


def pair(prompt: int, chosen: int, rejected: int, seed: int = 0) -> PreferencePair:
    rng = np.random.default_rng(seed)
    parts = [rng.integers(3, VOCABULARY, length).astype(np.int32) for length in (prompt, chosen, rejected)]
    return PreferencePair(*parts, *(np.ones(len(part), bool) for part in parts[1:]))


def model_of(trained: int = 3, dropout: float = 0.0) -> nn.Module:
    """Three layers, of which the upper ones are trained."""
    model = add_adapter(build_model(num_hidden_layers=3), dropout=dropout)
    for layer in model.layers[: 3 - trained]:
        layer.freeze()
    return model


def gradient(
    model: nn.Module,
    pairs: list[PreferencePair],
    *,
    checkpointed: bool = False,
    kernels: bool = False,
    step: int = STEP,
) -> dict[str, mx.array]:
    """The gradient in segments; dropout is that of one seed."""
    with ExitStack() as stack:
        stack.enter_context(compile_where_it_pays())
        stack.enter_context(lean_activations())
        stack.enter_context(checkpointed_layers(model, checkpointed))
        if kernels:
            stack.enter_context(compiled_kernels(model))
        model.train()
        method = SegmentGradients(model, objective_for("sigmoid", {"beta": 0.1}), SharedPromptScorer(model), step)
        mx.random.seed(1)
        result = method(pairs, StepTotals.of(pairs))
        mx.eval(result)
        return result.gradient


# Prompt, chosen and rejected answer: far from the prompt's start or near, in one segment or several, without a prompt
# beside the last token of it.
LENGTHS = {
    "far": (FAR * STEP + 9, 3 * STEP + 2, 2 * STEP + 1),
    "far, short answers": (FAR * STEP + 1, 3, 2),
    "near": (2 * STEP, 3 * STEP + 2, STEP),
    "no prefix": (1, STEP + 2, STEP + 3),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("trained", [3, 1])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_gradient_is_that_of_float64(lengths: str, trained: int, checkpointed: bool) -> None:
    pairs = [pair(*LENGTHS[lengths])]
    found = gradient(model_of(trained), pairs, checkpointed=checkpointed)
    loss = ReferenceLoss("sigmoid", beta=0.1, delta=50.0)

    assert relative_error(found, reference_gradient(model_of(trained), pairs, loss, lambda _: None)) < 1e-5


def test_with_the_kernels_it_is_the_same(kernels: None) -> None:
    pairs = [pair(*lengths, seed=seed) for seed, lengths in enumerate(LENGTHS.values())]

    assert relative_error(gradient(model_of(1), pairs, kernels=True), gradient(model_of(1), pairs)) < 1e-5


@pytest.mark.parametrize("lengths", ["far", "near"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_with_dropout_the_same_seed_gives_the_same_bits(lengths: str, checkpointed: bool) -> None:
    pairs = [pair(*LENGTHS[lengths])]
    found = [gradient(model_of(dropout=0.3), pairs, checkpointed=checkpointed) for _ in range(2)]

    assert relative_error(*found) == 0


def test_layers_below_the_first_trained_one_have_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, original = [], remembered._joined

    def counted(*arrays: Any) -> mx.array:
        counts[-1] += 1
        return original(*arrays)

    monkeypatch.setattr(remembered, "_joined", counted)
    for trained in (3, 1):
        counts.append(0)
        gradient(model_of(trained), [pair(*LENGTHS["far"])])

    assert counts[0] == 3 * counts[1] > 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_memory_is_that_of_keys_and_values_and_of_their_gradient(checkpointed: bool, kernels: None) -> None:
    layers, step, long = 12, 64, pair(1500, 300, 300)
    model = add_adapter(build_model(num_hidden_layers=layers, num_key_value_heads=4))
    keys_and_values = layers * 2 * 32 * 4 * (1500 + 300)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    gradient(model, [long], checkpointed=checkpointed, kernels=True, step=step)

    assert mx.get_peak_memory() - before < 2.6 * keys_and_values

"""A model is prepared for scoring: with the compiled kernels where there is enough to do."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import get_total_parameters
from support.architectures import ARCHITECTURES, build_architecture
from support.compiled import use_kernels
from support.tiny import add_adapter, build_model, build_pairs

from mlx_cpo_plugin.kernels import library, operations
from mlx_cpo_plugin.model.compiled import compiled_kernels, computes
from mlx_cpo_plugin.model.scoring import prepared_scorer, prepared_to_answer
from mlx_cpo_plugin.training.validation import scored_batches

PAIRS = build_pairs(6)


def untrained() -> nn.Module:
    model = build_model()
    model.freeze()
    return model


def quantised() -> nn.Module:
    model = build_model()
    nn.quantize(model, 32, 4, class_predicate=lambda name, module: isinstance(module, nn.Linear))
    return model


def chosen_logps(model: nn.Module, wanted: str = "auto", compiled_ones: bool = False) -> tuple[list[float], bool]:
    """Return the scores of all pairs, and whether the kernels computed them."""
    found, used = [], []
    with prepared_scorer(model, PAIRS, wanted, lambda _: None, compiled_ones) as scorer:
        used.append(library.in_use())
        for scores, _ in scored_batches(model, PAIRS, False, batch_size=3, scorer=scorer):
            found += np.array(scores.chosen_logps).tolist()
    assert not library.in_use()
    return found, used[0]


@pytest.mark.parametrize("build", [untrained, lambda: add_adapter(build_model()), build_model, quantised])
@pytest.mark.parametrize("wanted", ["auto", "plain"])
def test_kernels_score_any_model_whose_layers_they_compute(
    build: Callable[[], nn.Module], wanted: str, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    with_kernels = chosen_logps(model, wanted)
    monkeypatch.setenv(library.VARIABLE, library.NONE)
    without = chosen_logps(model, wanted)

    assert (with_kernels[1], without[1]) == (True, False)
    np.testing.assert_allclose(with_kernels[0], without[0], rtol=1e-4)


def test_a_few_pairs_are_not_worth_compiling_them_and_some_models_are_not_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_kernels(monkeypatch)
    assert not chosen_logps(build_architecture("mamba2"))[1]
    monkeypatch.setenv(library.VARIABLE, library.AUTO)
    assert not chosen_logps(untrained())[1]
    assert chosen_logps(untrained(), compiled_ones=True)[1]
    loaded = library.usable
    monkeypatch.setattr(library, "usable", lambda say, compiling: compiling and loaded(say))
    assert not chosen_logps(untrained(), compiled_ones=True)[1]
    monkeypatch.setattr(library, "LEAST_WORK", 0)
    assert chosen_logps(untrained())[1]


def test_a_model_that_computes_with_them_already_goes_on_so(kernels: None) -> None:
    model = untrained()
    with compiled_kernels(model):
        with prepared_scorer(model, PAIRS, "auto"):
            pass
        assert library.in_use()
        mx.eval(model(mx.array([[1, 2]])))


PROMPT = [5, 9, 3, 17, 30, 2, 11, 8, 40, 7, 21, 13]


def answer(model: nn.Module, length: int = 12) -> tuple[list[int], np.ndarray, bool]:
    """Return a greedy answer, the log-probs of all tokens at each of its places, and whether kernels computed them."""
    with prepared_to_answer(model, len(PROMPT), length, lambda _: None):
        steps = list(generate_step(mx.array(PROMPT), model, max_tokens=length))
        used = library.in_use()
    assert not library.in_use()
    return [token for token, _ in steps], np.array([logprobs.astype(mx.float32) for _, logprobs in steps]), used


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_answers_are_the_same_with_kernels(name: str, kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_architecture(name)
    tokens, logprobs, used = answer(model)
    monkeypatch.setenv(library.VARIABLE, library.NONE)
    expected, expected_logprobs, _ = answer(model)

    assert used == computes(model)
    assert tokens == expected
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)


def in_half_precision() -> nn.Module:
    model = add_adapter(build_model())
    model.set_dtype(mx.bfloat16)
    return model


@pytest.mark.parametrize("build", [in_half_precision, quantised, lambda: build_model(tie_word_embeddings=False)])
def test_all_products_of_an_answer_are_theirs(
    build: Callable[[], nn.Module], kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, computed = build(), list[int]()
    linear = operations.linear
    monkeypatch.setattr(
        operations, "linear", lambda x, weight: computed.append(len(weight.arrays[0])) or linear(x, weight)
    )

    _, logprobs, _ = answer(model, length=1)

    assert logprobs.shape[-1] in computed
    widened = build()
    if any(array.dtype == mx.bfloat16 for _, array in tree_flatten(widened.parameters())):
        widened.set_dtype(mx.float32)
    np.testing.assert_allclose(logprobs, answer(widened, length=1)[1], atol=1e-4)


def test_short_answers_are_not_worth_compiling_them_and_long_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, library.AUTO)
    assert answer(untrained())[2]
    loaded = library.usable
    monkeypatch.setattr(library, "usable", lambda say, compiling: compiling and loaded(say))
    assert not answer(untrained())[2]
    model = untrained()
    monkeypatch.setattr(library, "LEAST_WORK", 2 * get_total_parameters(model) * (len(PROMPT) + 2 * 12))
    assert answer(model, length=12)[2], "what is written counts more than what is read"
    assert not answer(model, length=4)[2]

"""A model is prepared for scoring: with the compiled kernels where there is enough to do."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support.architectures import build_architecture
from support.compiled import use_kernels
from support.tiny import add_adapter, build_model, build_pairs

from mlx_cpo_plugin.kernels import library
from mlx_cpo_plugin.model.compiled import compiled_kernels
from mlx_cpo_plugin.model.scoring import prepared_scorer
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


def chosen_logps(model: nn.Module, wanted: str = "auto") -> tuple[list[float], bool]:
    """Return the scores of all pairs, and whether the kernels computed them."""
    found, used = [], []
    with prepared_scorer(model, PAIRS, wanted, lambda _: None) as scorer:
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


def test_a_few_pairs_are_not_worth_them_and_some_models_are_not_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch)
    assert not chosen_logps(build_architecture("mamba2"))[1]
    monkeypatch.setenv(library.VARIABLE, library.AUTO)
    assert not chosen_logps(untrained())[1]
    monkeypatch.setattr(library, "LEAST_WORK", 0)
    assert chosen_logps(untrained())[1]


def test_a_model_that_computes_with_them_already_goes_on_so(kernels: None) -> None:
    model = untrained()
    with compiled_kernels(model):
        with prepared_scorer(model, PAIRS, "auto"):
            pass
        assert library.in_use()
        mx.eval(model(mx.array([[1, 2]])))

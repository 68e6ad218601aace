"""Optimizers take small arrays joined into one: the same numbers to the bit, in fewer operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from support.refusals import refused
from support.tiny import add_adapter, build_model

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training import optimizer_step
from mlx_cpo_plugin.training.optimizer_step import ByName, Joined, OptimizerStep, gradient_norm, layout_for

Make = Callable[[], optimizers.Optimizer]
ALIKE: dict[str, Make] = {
    "sgd": lambda: optimizers.SGD(1e-2, momentum=0.9, weight_decay=0.1),
    "adam": lambda: optimizers.Adam(1e-2, bias_correction=True),
    "adamw": lambda: optimizers.AdamW(optimizers.cosine_decay(1e-2, 5)),
    "adamax": lambda: optimizers.Adamax(1e-2),
    "adagrad": lambda: optimizers.Adagrad(1e-2),
    "adadelta": lambda: optimizers.AdaDelta(1e-2),
    "lion": lambda: optimizers.Lion(1e-2),
    "rmsprop": lambda: optimizers.RMSprop(1e-2),
}
BY_SHAPE: dict[str, Make] = {"adafactor": lambda: optimizers.Adafactor(1e-2), "muon": lambda: optimizers.Muon(1e-2)}


def adapted_model(seed: int = 0) -> nn.Module:
    mx.random.seed(seed)
    model = build_model()
    add_adapter(model)
    return model


def steps_taken(make: Make, count: int = 3) -> Mapping[str, mx.array]:
    """The weights after some steps with random gradients, clipped."""
    model = adapted_model()
    step = OptimizerStep(model, make(), gradients=None, max_norm=1.0)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    for _ in range(count):
        shapes = {name: value.shape for name, value in step.masters.weights().items()}
        step.total = {name: mx.array(rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}
        step.apply()
    return step.masters.weights()


@pytest.mark.parametrize("name", ALIKE)
def test_joined_arrays_are_updated_as_each_by_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = steps_taken(ALIKE[name])
    monkeypatch.setattr(optimizer_step, "layout_for", lambda *_: ByName())
    # Norms that are added up in another order differ in the last bits, and so may what is clipped.
    for key, weights in steps_taken(ALIKE[name]).items():
        np.testing.assert_allclose(np.array(joined[key]), np.array(weights), rtol=1e-5, atol=1e-7, err_msg=key)


def test_a_frozen_model_is_refused() -> None:
    model = adapted_model()
    model.freeze()
    with refused(ConfigError):
        OptimizerStep(model, optimizers.Adam(1e-3), gradients=None)  # type: ignore[arg-type]


def layout_of(make: Make, adapted: nn.Module, **state: Any) -> ByName:
    optimizer = make()
    optimizer.state.update(state)
    return layout_for(optimizer, by_name(adapted.trainable_parameters()))


@pytest.mark.parametrize("size", [1, 1000, 1 << 18])
def test_what_is_joined_comes_apart_as_it_was(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_step, "_JOINED", size)
    weights = by_name(adapted_model().trainable_parameters())
    joined = Joined(weights).tree(weights)
    assert (len(joined["joined"]) == 1) is (size == 1 << 18)
    apart = Joined(weights).arrays(joined)
    assert apart.keys() == weights.keys()
    assert all(mx.array_equal(apart[name], value) for name, value in weights.items())


@pytest.mark.parametrize("name", ALIKE)
def test_small_arrays_are_joined_for_optimizers_that_treat_numbers_alike(name: str) -> None:
    assert isinstance(layout_of(ALIKE[name], adapted_model()), Joined)


@pytest.mark.parametrize("name", BY_SHAPE)
def test_optimizers_that_look_at_shapes_get_arrays_by_name(name: str) -> None:
    assert not isinstance(layout_of(BY_SHAPE[name], adapted_model()), Joined)


def test_an_optimizer_with_a_past_and_one_of_a_stranger_get_arrays_by_name() -> None:
    class Strange(optimizers.Adam):
        pass

    def watched() -> optimizers.Optimizer:
        optimizer = ALIKE["adam"]()
        apply = optimizer.apply_gradients
        optimizer.apply_gradients = lambda *trees: apply(*trees)  # type: ignore[method-assign]
        return optimizer

    model = adapted_model()
    first = next(iter(model.trainable_parameters()))
    assert not isinstance(layout_of(lambda: Strange(1e-2), model), Joined)
    assert not isinstance(layout_of(watched, model), Joined)
    assert not isinstance(layout_of(ALIKE["adam"], model, **{first: {}}), Joined)


def test_large_arrays_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_step, "_SMALL", 8)
    assert not isinstance(layout_of(ALIKE["adam"], adapted_model()), Joined)


@pytest.mark.parametrize("shape", [(), (7,), (300_000,), (3, 5), (4_001, 2_503), (2, 300, 130)])
def test_the_norm_is_that_in_float64_however_many_numbers_there_are(shape: tuple[int, ...]) -> None:
    values = mx.random.normal(shape) * 1e-3

    found = gradient_norm({"a": values, "b": mx.ones(3)})

    expected = np.sqrt((np.array(values, np.float64) ** 2).sum() + 3)
    assert found == pytest.approx(expected, rel=2e-7)
    assert gradient_norm({"a": values}) == pytest.approx(np.sqrt(expected**2 - 3), rel=2e-6)

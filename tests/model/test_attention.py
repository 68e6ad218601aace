"""Attention that keeps no scores: values and gradients are those of the float64 formula."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base, llama
from numpy.typing import NDArray
from support.devices import pretended
from support.tiny import add_adapter, build_model

from mlx_cpo_plugin.device import CUDA, METAL
from mlx_cpo_plugin.model import attention
from mlx_cpo_plugin.model.activations import lean_activations
from mlx_cpo_plugin.model.attention import Mask, lean_attention

Array = NDArray[np.float64]
SCALE = 0.3
# Queries and keys: one block, several, several over a prompt, a last block of one query.
SIZES = [(7, 7), (20, 20), (20, 33), (17, 40)]


@pytest.fixture(autouse=True)
def blocks_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)


def arrays(count: int, total: int) -> list[Array]:
    """Queries of six heads, keys and values of two, values of another size, and a gradient of the output."""
    rng = np.random.default_rng(0)
    shapes = [(2, 6, count, 8), (2, 2, total, 8), (2, 2, total, 5), (2, 6, count, 5)]
    return [rng.normal(0, 1, shape) for shape in shapes]


def seen(count: int, total: int, window: int | None = None) -> NDArray[np.bool_]:
    distance = (np.arange(count) + total - count)[:, None] - np.arange(total)
    return (distance >= 0) & (distance < (window or total))


def by_scores_of(queries: Array, keys: Array, values: Array, by_output: Array, added: Array) -> tuple[Array, Array]:
    """Return the weights of the values and the gradient by the scores, which ``added`` is a part of."""
    groups = queries.shape[1] // keys.shape[1]
    scores = SCALE * queries @ np.repeat(keys, groups, axis=1).swapaxes(-1, -2) + added
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    by_weights = by_output @ np.repeat(values, groups, axis=1).swapaxes(-1, -2)
    return weights, weights * (by_weights - (weights * by_weights).sum(-1, keepdims=True))


def reference(queries: Array, keys: Array, values: Array, by_output: Array, added: Array) -> list[Array]:
    """Return the output and the gradients by queries, keys and values."""
    groups = queries.shape[1] // keys.shape[1]
    wide_keys, wide_values = np.repeat(keys, groups, axis=1), np.repeat(values, groups, axis=1)
    weights, by_scores = by_scores_of(queries, keys, values, by_output, added)
    by_keys, by_values = SCALE * by_scores.swapaxes(-1, -2) @ queries, weights.swapaxes(-1, -2) @ by_output

    def narrow(array: Array) -> Array:
        return array.reshape(array.shape[0], keys.shape[1], groups, *array.shape[2:]).sum(2)

    return [weights @ wide_values, SCALE * by_scores @ wide_keys, narrow(by_keys), narrow(by_values)]


def computed(given: list[mx.array], mask: Mask) -> list[mx.array]:
    outputs, gradients = mx.vjp(lambda *qkv: [lean_attention(*qkv, SCALE, mask)], given[:3], given[3:])
    return [*outputs, *gradients]


MASKS: dict[str, Callable[[int, int], tuple[Mask, Array]]] = {
    "none": lambda n, s: (None, np.zeros((n, s))),
    "causal": lambda n, s: ("causal", np.where(seen(n, s), 0, -np.inf)),
    "boolean": lambda n, s: (mx.array(seen(n, s, 6)), np.where(seen(n, s, 6), 0, -np.inf)),
    "one row": lambda n, s: (mx.arange(s)[None] < s - n + 1, np.where(np.arange(s) < s - n + 1, 0, -np.inf)[None]),
    "added": lambda n, s: (mx.arange(n * s).reshape(n, s) / n / s, np.arange(n * s).reshape(n, s) / n / s),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("count", "total"), SIZES)
def test_values_and_gradients_equal_the_float64_formula(count: int, total: int, mask: str) -> None:
    wide = arrays(count, total)
    ours, added = MASKS[mask](count, total)

    values = computed([mx.array(array.astype(np.float32)) for array in wide], ours)

    for value, expected in zip(values, reference(*wide, added), strict=True):
        np.testing.assert_allclose(np.array(value), expected, rtol=1e-4, atol=1e-5)


def test_a_mask_for_each_row_of_the_batch_is_that_rows() -> None:
    wide = arrays(20, 33)
    mask = np.stack([seen(20, 33), seen(20, 33, 9)])[:, None]

    values = computed([mx.array(array.astype(np.float32)) for array in wide], mx.array(mask))

    for value, expected in zip(values, reference(*wide, np.where(mask, 0, -np.inf)), strict=True):
        np.testing.assert_allclose(np.array(value), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 6, 20, 33), (2, 1, 20, 33), (20, 33), (1, 33), (6, 20, 1), (1, 1, 1, 1)])
def test_what_is_added_to_the_scores_has_its_gradient(shape: tuple[int, ...]) -> None:
    wide = arrays(20, 33)
    added = np.random.default_rng(1).normal(0, 1, shape)
    by_added = by_scores_of(*wide, added)[1]
    for axis, size in enumerate((1,) * (4 - len(shape)) + shape):
        by_added = by_added.sum(axis, keepdims=True) if size == 1 else by_added

    given = [mx.array(array.astype(np.float32)) for array in (*wide[:3], added)]
    _, gradients = mx.vjp(
        lambda *qkv: [lean_attention(*qkv[:3], SCALE, qkv[3])], given, [mx.array(wide[3].astype(np.float32))]
    )

    np.testing.assert_allclose(np.array(gradients[3]), by_added.reshape(shape), rtol=1e-4, atol=1e-5)


def test_half_precision_stays_half_precision() -> None:
    wide = arrays(20, 20)

    values = computed([mx.array(array.astype(np.float32)).astype(mx.bfloat16) for array in wide], "causal")

    for value, expected in zip(values, reference(*wide, MASKS["causal"](20, 20)[1]), strict=True):
        assert value.dtype == mx.bfloat16
        assert np.linalg.norm(np.array(value.astype(mx.float32)) - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.usefixtures("choices_of_a_cpu")
def test_models_use_it_while_the_context_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def record(queries: mx.array, *rest: mx.array) -> mx.array:
        used.append(queries.shape[2])
        return lean_attention(queries, *rest)

    monkeypatch.setattr("mlx_cpo_plugin.model.activations.lean_attention", record)
    model = build_model()
    with lean_activations():
        mx.eval(model(mx.zeros((1, 20), mx.int32)))

    assert used == [20, 20]  # both layers
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention


@pytest.mark.usefixtures("choices_of_a_cpu")
def test_no_scores_are_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", 128)
    layers, heads, tokens = 4, 4, 1024
    model = add_adapter(build_model(num_hidden_layers=layers, num_attention_heads=heads))

    def peak() -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(mx.grad(lambda scale: model.model(None, None, input_embeddings * scale).sum())(mx.array(1.0)))
        return mx.get_peak_memory()

    input_embeddings = model.model.embed_tokens(mx.zeros((1, tokens), mx.int32))
    plain = peak()
    with lean_activations():
        lean = peak()

    assert plain - lean > 0.8 * layers * heads * tokens * tokens * 4


def test_weights_of_scores_far_apart_are_right() -> None:
    wide = arrays(20, 20)
    wide[0] *= 100

    values = computed([mx.array(array.astype(np.float32)) for array in wide], "causal")

    for value, expected in zip(values, reference(*wide, MASKS["causal"](20, 20)[1]), strict=True):
        assert np.linalg.norm(np.array(value) - expected) < 1e-4 * np.linalg.norm(expected)


def test_a_gpu_has_its_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "power_of_two", lambda x: pytest.fail("an exponential of ours was taken"))
    used: list[str] = []
    kernel = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast, "scaled_dot_product_attention", lambda *args, **named: used.append("") or kernel(*args, **named)
    )
    wide = arrays(20, 20)

    with pretended(METAL):
        output = lean_attention(*(mx.array(array.astype(np.float32)) for array in wide[:3]), SCALE, "causal")

    expected = reference(*wide, MASKS["causal"](20, 20)[1])[0]
    np.testing.assert_allclose(np.array(output), expected, rtol=1e-4, atol=1e-5)
    assert used == [""]


def test_models_keep_the_attention_of_a_device_that_has_a_kernel_for_its_gradient() -> None:
    mlx_lms = llama.scaled_dot_product_attention

    with pretended(CUDA), lean_activations():
        assert llama.scaled_dot_product_attention is mlx_lms
    with pretended(METAL), lean_activations():
        assert llama.scaled_dot_product_attention is not mlx_lms

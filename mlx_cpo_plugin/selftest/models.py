"""Tiny models of random weights, and pairs of token ids, on which a device is tested."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.layers import stored_weight

VOCABULARY = 512
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"sliding_window": 32, "sliding_window_pattern": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
}
# Tokens of (prompt, chosen, rejected): like and unlike lengths, and enough for attention to work in blocks.
_LENGTHS = ((90, 50, 44), (40, 30, 9), (150, 60, 52), (12, 20, 24))


def build_model(
    architecture: str = "llama", *, dtype: mx.Dtype = mx.float32, train_type: str = "lora", bits: int | None = None
) -> nn.Module:
    """Return a model with adapters that are not zero; the same weights for the same arguments.

    Args:
        dtype: of the base model's weights; adapters are float32, as mlx_lm makes them.
        train_type: ``lora``, ``dora`` or ``full``.
        bits: quantise the base model to so many bits.
    """
    # On the CPU, whose random numbers and roundings are then the same beside every device.
    with mx.stream(mx.cpu):
        module = import_module(f"mlx_lm.models.{architecture}")
        mx.random.seed(0)
        arguments = {"model_type": architecture, **_COMMON, **ARCHITECTURES[architecture]}
        model: nn.Module = module.Model(module.ModelArgs.from_dict(arguments))
        model.set_dtype(dtype)
        if bits is not None:
            nn.quantize(model, group_size=32, bits=bits)
        if train_type != "full":
            model.freeze()
            linear_to_lora_layers(model, -1, {"rank": 4, "scale": 4.0, "dropout": 0.0}, use_dora=train_type == "dora")
        for _, layer in model.named_modules():
            if "lora_b" in layer:  # as adapters begin, the gradient of A would be zero
                layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape)
        mx.eval(model.parameters())
    return model


def unquantised(model: nn.Module) -> nn.Module:
    """Replace the quantised layers of ``model`` by layers with the weights that they stand for, and return it."""
    layers: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            continue
        weight = stored_weight(module)
        layer: nn.Module = (
            nn.Embedding(1, 1) if isinstance(module, nn.QuantizedEmbedding) else nn.Linear(1, 1, bias="bias" in module)
        )
        layer.weight = weight
        if "bias" in module:
            layer.bias = module.bias
        layer.freeze()
        layers.append((name, layer))
    if layers:
        model.update_modules(tree_unflatten(layers))
    return model


def build_pairs() -> list[PreferencePair]:
    """Return pairs of random token ids; the answers of one begin alike, and one has an unscored token."""
    rng = np.random.default_rng(0)
    pairs = []
    for number, lengths in enumerate(_LENGTHS):
        prompt, chosen, rejected = (rng.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths)
        if number == 0:
            rejected[:8] = chosen[:8]
        chosen_scored, rejected_scored = np.ones(len(chosen), bool), np.ones(len(rejected), bool)
        if number == 1:
            chosen_scored[3] = False
        source = f"pair {number + 1}"
        pairs.append(PreferencePair(prompt, chosen, rejected, chosen_scored, rejected_scored, source))
    return pairs


def shortened(pairs: Sequence[PreferencePair], prompt: int, answer: int) -> list[PreferencePair]:
    """Return pairs with the last tokens of each prompt and the first ones of each answer, those that still differ."""
    short = [
        PreferencePair(
            pair.prompt[-prompt:],
            pair.chosen[:answer],
            pair.rejected[:answer],
            pair.chosen_scored[:answer],
            pair.rejected_scored[:answer],
            source=pair.source,
        )
        for pair in pairs
    ]
    return [
        pair
        for pair in short
        if pair.chosen_scored.any() and pair.rejected_scored.any() and not np.array_equal(pair.chosen, pair.rejected)
    ]

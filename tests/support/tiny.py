"""Tiny models, pairs and rows, and how arrays are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_cpo_plugin.data.pair import PreferencePair

TESTS = Path(__file__).parents[1]
SHARED = TESTS.parents[1] / "shared"
VOCABULARY = 96


# Texts that YAML would read as something else where they are not quoted.
LIKE_OTHER_YAML = (
    *("no", "On", "yes", "null", "~", "12:30", "1e-5", "0o17", "08", "010", "1_000", "2026-11-26", "0x1f", "=", "<<"),
    *(
        "!x",
        "&a",
        "*a",
        "a: b",
        "a #b",
        "- a",
        "? a",
        "'",
        '"',
        "[a",
        "{a",
        "%a",
        "@a",
        "`a",
        "...",
        "---",
        "a\nb",
        "\t",
    ),
)


SENTENCES = [
    "The shop opens at nine in the morning.",
    "A blue kite flies over the quiet harbour.",
    "Please tell me how many apples are in the basket.",
    "There are seven apples in the basket, my friend.",
    "I do not know and I do not care.",
    "Every evening the old lighthouse keeper counts the ships.",
]


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_model(seed: int = 0, **overrides: Any) -> nn.Module:
    """A llama of two layers with random weights."""
    mx.random.seed(seed)
    arguments = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    model = llama.Model(llama.ModelArgs(**(arguments | overrides)))
    mx.eval(model.parameters())
    return model


def add_adapter(model: nn.Module, *, dora: bool = False, dropout: float = 0.0, scale: float = 10.0) -> nn.Module:
    """LoRA or DoRA of rank 4 with a B that is not zero, so that every parameter has a gradient."""
    model.freeze()
    config = {"rank": 4, "scale": scale, "dropout": dropout}
    linear_to_lora_layers(model, -1, config, use_dora=dora)
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.02 * mx.random.normal(module.lora_b.shape)
    return model


def build_pairs(count: int, seed: int = 0, longest: int = 12, vocabulary: int = VOCABULARY) -> list[PreferencePair]:
    """Random pairs of mixed lengths."""
    rng = np.random.default_rng(seed)

    def tokens() -> np.ndarray:
        return rng.integers(3, vocabulary, rng.integers(1, longest + 1)).astype(np.int32)

    pairs = []
    for number in range(count):
        prompt, chosen, rejected = tokens(), tokens(), tokens()
        scored = [np.ones(len(answer), bool) for answer in (chosen, rejected)]
        pairs.append(PreferencePair(prompt, chosen, rejected, *scored, source=f"row {number}"))
    return pairs


def contrary(pairs: list[PreferencePair]) -> list[PreferencePair]:
    """The pairs with the answers exchanged: the more a model learns from the ones, the worse it judges the others."""
    return [
        PreferencePair(pair.prompt, pair.rejected, pair.chosen, pair.rejected_scored, pair.chosen_scored, pair.source)
        for pair in pairs
    ]


def parameters(model: nn.Module) -> dict[str, np.ndarray]:
    """The trainable parameters as numpy arrays."""
    return {name: np.array(value) for name, value in tree_flatten(model.trainable_parameters())}


def saved_arrays(file: Path) -> dict[str, bytes]:
    """What a file of arrays holds, to the bit, whatever it says of itself."""
    return {name: np.array(value).tobytes() for name, value in mx.load(str(file)).items()}


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray], tolerance: float = 0.0) -> None:
    """Both hold the same arrays, up to a relative error of the whole array; 0 means to the bit."""
    assert left.keys() == right.keys()
    for name in left:
        error = np.linalg.norm(left[name].astype(np.float64) - right[name])
        assert error <= tolerance * np.linalg.norm(right[name]), f"{name}: {error}"


def relative_error(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """That of all arrays of a gradient together."""
    assert found.keys() == expected.keys()
    errors = [np.array(found[name], np.float64) - np.array(expected[name], np.float64) for name in found]
    sizes = [np.array(value, np.float64) for value in expected.values()]
    squares = [sum(float((x**2).sum()) for x in arrays) for arrays in (errors, sizes)]
    return float(np.sqrt(squares[0] / squares[1]))


def preference_rows(count: int) -> list[dict[str, str]]:
    """Rows whose chosen answer is friendly and whose rejected one is curt."""
    return [
        {
            "prompt": f"Please tell me how many apples are in basket {number}.",
            "chosen": f"There are {number} apples in the basket, my friend.",
            "rejected": "I do not know and I do not care." if number % 2 else "I do not know.",
        }
        for number in range(count)
    ]


def write_data(folder: Path) -> Path:
    """Write train, valid and test files of 10, 4 and 4 preference rows into a new folder, and return it."""
    folder.mkdir()
    for name, count in (("train", 10), ("valid", 4), ("test", 4)):
        lines = [json.dumps(row) for row in preference_rows(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder

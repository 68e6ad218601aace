"""Tiny models, tokenizers and pairs that the tests share."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Compilation on a CPU costs seconds of a C++ compiler; tests that are about it switch it on for themselves.
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
# Tests and their child processes share the cores; OpenBLAS's threads would wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_cpo_plugin.blas import use_fast_blas
from mlx_cpo_plugin.data.pair import PreferencePair

use_fast_blas()

# A shell that runs the tests in the background has them, and all that they start, ignore these.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How long an example takes says how busy the machine is.
hypothesis_settings.register_profile("without deadline", deadline=None)
hypothesis_settings.load_profile("without deadline")

SHARED = Path(__file__).parents[2] / "shared"
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


@pytest.fixture
def shared() -> Path:
    """The folder with real models and rows."""
    if not SHARED.is_dir():
        pytest.skip(f"needs real models and rows in {SHARED}")
    return SHARED


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


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with a ChatML template, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def model_folder(tokenizer_folder: Path) -> Path:
    """A llama of two layers that ``mlx_lm.load`` loads, beside its tokenizer."""
    config = {
        "model_type": "llama",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": 320,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
    }
    model = build_model(**{key: value for key, value in config.items() if key not in ("model_type", "eos_token_id")})
    (tokenizer_folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tokenizer_folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return tokenizer_folder


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


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """train, valid and test files of 10, 4 and 4 preference rows."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("train", 10), ("valid", 4), ("test", 4)):
        lines = [json.dumps(row) for row in preference_rows(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def settings(model_folder: Path, data_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """What a call of the host's ``main`` needs to train for two iterations."""
    return {
        "model": str(model_folder),
        "data": str(data_folder),
        "train": True,
        "train_mode": "cpo",
        "adapter_path": str(tmp_path / "adapters"),
        "iters": 2,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "steps_per_report": 1,
        "fuse": False,
    }


@pytest.fixture
def run_main() -> Callable[..., None]:
    """The host's own ``main``, with the plugin active."""
    import mlx_cpo_plugin

    mlx_cpo_plugin.activate()
    from mlx_lm_lora.train import main

    return main

"""Fixtures that tests of every folder use.

The process that starts the workers loads this file, too, so what imports mlx_lm is imported where it is used.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from mlx.utils import tree_flatten
from support.compiled import use_kernels
from support.devices import pretended
from support.fresh_environment import open_workshop

from mlx_cpo_plugin.blas import usable_cores
from mlx_cpo_plugin.device import CPU

# How long an example takes says how busy the machine is. CI tries the same examples each time, everybody else new ones.
hypothesis_settings.register_profile(
    "own",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=25,
    derandomize="CI" in os.environ,
)
hypothesis_settings.load_profile("own")


# Hundreds of processes start: none compiles again what another one has.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_configure(config: pytest.Config) -> None:
    """What worker processes share is made by the process that starts them; kernels are for tests that ask for them.

    Slow tests are for those who name tests, or a folder of them; each worker decides it alike.
    """
    os.environ["MLX_CPO_PLUGIN_KERNELS"] = "none"
    os.environ["MLX_ENABLE_TF32"] = "0"  # float64 references are compared with float32, on a GPU, too
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    if not hasattr(config, "workerinput"):
        config.add_cleanup(open_workshop())
    if config.args_source is config.ArgsSource.TESTPATHS and not (config.option.markexpr or config.option.keyword):
        config.option.markexpr = "not slow"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker more than there are cores: many tests wait for processes and browsers."""
    return usable_cores() + 1


# Folders whose files take longest: no worker is left alone with one of them at the end.
LONGEST = {"apps", "model", "training"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs and compiling are slow; begin with what takes long."""
    for item in items:
        if {"run_main", "kernels"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, item.path.parent.name not in LONGEST))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What fixtures of a module compute does not depend on the test before, either."""
    _reset_random_numbers()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Whatever ran before, every test finds the generators alike, and as ones that nobody has seeded."""
    _reset_random_numbers()


def _reset_random_numbers() -> None:
    np.random.seed(0)
    np.random.random_sample()
    mx.random.seed(2**40)


@pytest.fixture
def choices_of_a_cpu() -> Iterator[None]:
    """What is chosen is what suits a CPU, whatever computes it: for tests of these choices."""
    with pretended(CPU):
        yield


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and operations use the compiled kernels."""
    use_kernels(monkeypatch)


@pytest.fixture
def shared() -> Path:
    """The folder with real models and rows."""
    from support.tiny import SHARED

    if not SHARED.is_dir():
        pytest.skip(f"needs real models and rows in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with a ChatML template, trained on a few sentences."""
    from support.tiny import CHAT_TEMPLATE, SENTENCES
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
    from support.tiny import build_model

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


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """train, valid and test files of 10, 4 and 4 preference rows."""
    from support.tiny import write_data

    return write_data(tmp_path / "data")


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
        "steps_per_sample": 0,  # most tests read no answers, which take longer than their training
    }


@pytest.fixture
def quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs do little of what takes longer than all else of a tiny one: time products, draw curves, score rows."""
    from mlx_cpo_plugin import blas
    from mlx_cpo_plugin.publish import card
    from mlx_cpo_plugin.training import held_out

    monkeypatch.setattr(blas, "gigaflops", lambda *_, **__: 1.0)
    monkeypatch.setattr(card, "as_png", lambda *_: b"\x89PNG")
    monkeypatch.setattr(held_out, "ROWS", 2)


@pytest.fixture
def run_main(quick_runs: None) -> Callable[..., None]:
    """The host's own ``main``, with the plugin active."""
    import mlx_cpo_plugin

    mlx_cpo_plugin.activate()
    from mlx_lm_lora.train import main

    return main

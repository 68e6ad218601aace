"""The pieces of mlx-lm-lora that the trainer builds on; its modules take them from here.

A piece that only one feature needs is looked up when it is used: a version without it lacks this feature alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache
from mlx_lm.tuner.callbacks import TrainingCallback as TrainingCallback
from mlx_lm.utils import load_tokenizer
from mlx_lm_lora.trainer.sft_trainer import SFTTrainingArgs as SFTTrainingArgs

from mlx_cpo_plugin._version import NEWEST_TESTED_HOST, host_version
from mlx_cpo_plugin.errors import ConfigError, first_line, is_out_of_memory
from mlx_cpo_plugin.missing_paths import looks_like_path, nearest_path
from mlx_cpo_plugin.types import Tokenizer

FakeQuantizer = Callable[[mx.array, int, int], mx.array]

# Modules of mlx_lm.models that the host imports in order to change them.
_MODULES_WITH_RECURRENCES = ("bailing_moe_linear", "gated_delta", "jamba", "mamba", "ssm")


def fake_quantizer() -> FakeQuantizer:
    """Return the host's quantiser: symmetric, (array, bits, group_size) -> array of the same shape.

    Raises:
        ConfigError: this version of the host has none.
    """
    module, name = "mlx_lm_lora.trainer.sft_trainer", "_symmetric_fake_quantize_tensor"
    try:
        quantizer: FakeQuantizer = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"qat_enable needs {module}.{name}, which mlx-lm-lora {host_version()} does not have; "
            f"set qat_enable: false, or {_install_tested_host()}.",
            key="qat_enable",
        ) from error
    return quantizer


@contextmanager
def memory_safe_recurrences(model: nn.Module, chunk_size: int, say: Callable[[str], None] = print) -> Iterator[None]:
    """Switch on the host's memory-bounded recurrences where ``model`` has recurrent layers, until the context ends."""
    try:
        from mlx_lm_lora.recurrent_patch import enable_memory_safe_recurrences, model_uses_recurrence
    except ImportError as error:
        if _keeps_states(model):
            say(
                f"recurrence_chunk_size has no effect and recurrent layers take more memory, since mlx-lm-lora "
                f"{host_version()} lacks what it needs ({first_line(error)}); {_install_tested_host()}."
            )
        yield
        return
    if not model_uses_recurrence(model):
        yield
        return
    with _models_restored():
        enable_memory_safe_recurrences(chunk_size=chunk_size)
        yield


def _install_tested_host() -> str:
    return f"install mlx-lm-lora {NEWEST_TESTED_HOST}"


def _keeps_states(model: nn.Module) -> bool:
    caches = make_prompt_cache(model)
    inner = [part for cache in caches for part in (cache.caches if isinstance(cache, CacheList) else [cache])]
    return any(isinstance(cache, ArraysCache) for cache in inner)


@contextmanager
def _models_restored() -> Iterator[None]:
    """Restore functions and methods of mlx_lm's models when the context ends."""
    for name in _MODULES_WITH_RECURRENCES:
        with suppress(ImportError):  # an older mlx_lm lacks some of these models
            import_module(f"mlx_lm.models.{name}")
    modules = [module for path, module in list(sys.modules.items()) if path.startswith("mlx_lm.models.") and module]
    classes = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]
    before: dict[object, dict[str, object]] = {owner: dict(vars(owner)) for owner in (*modules, *classes)}
    try:
        yield
    finally:
        for owner, names in before.items():
            for name, value in list(vars(owner).items()):
                if name not in names:
                    delattr(owner, name)
                elif names[name] is not value:
                    setattr(owner, name, names[name])


def load_chat_tokenizer(model: str, option: str = "model") -> Tokenizer:
    """Load the tokenizer of a model folder or hub name, with the host's fallback chat template if it has none.

    Args:
        option: what names the model, for errors.

    Raises:
        ConfigError: there is no such model, or its tokenizer cannot be read.
    """
    missing, near = not os.path.exists(model), None
    with suppress(OSError):  # of a folder that cannot be searched
        near = nearest_path(Path(model)) if missing else None
    advice = f"did you mean {near}?" if near else "give a local folder or the name of a model on the hub."
    if missing and looks_like_path(model):
        raise ConfigError(f"{option} names {model!r}, which does not exist: {advice}", key="model", allowed=near or "")
    try:
        # Said outright: transformers would ask otherwise, and run the folder's code after one keystroke.
        tokenizer = load_tokenizer(model, {"trust_remote_code": False})
    except Exception as error:  # the hub client raises many kinds, offline and for unknown names
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"The tokenizer of model {model!r} cannot be loaded ({first_line(error)}); {advice}",
            key="model",
            allowed=near or "",
        ) from error
    give_chat_template(tokenizer)
    return tokenizer


def give_chat_template(tokenizer: Tokenizer) -> None:
    """Give a tokenizer that has no chat template the host's fallback, if this version of the host has one."""
    try:
        from mlx_lm_lora.chat_template import ensure_chat_template
    except ImportError:  # host 5.8.6 has no fallback template
        return
    ensure_chat_template(tokenizer)


def parts_of(dataset: Sequence[object] | None) -> list[Sequence[object] | None]:
    """Return the data sets that the host's wrappers hold; of any other data set itself."""
    from mlx_lm_lora.trainer.datasets import CacheDataset, ConcatenatedDataset

    if isinstance(dataset, CacheDataset) and hasattr(dataset, "_data"):
        return parts_of(dataset._data)
    if isinstance(dataset, ConcatenatedDataset) and hasattr(dataset, "_data"):
        return [part for inner in dataset._data for part in parts_of(inner)]
    return [dataset]

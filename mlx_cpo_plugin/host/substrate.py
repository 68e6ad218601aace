"""The pieces of mlx-lm-lora that the trainer builds on; every other module takes them from here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.utils import load_tokenizer
from mlx_lm_lora.recurrent_patch import enable_memory_safe_recurrences, model_uses_recurrence
from mlx_lm_lora.trainer.sft_trainer import SFTTrainingArgs
from mlx_lm_lora.trainer.sft_trainer import _symmetric_fake_quantize_tensor as _fake_quantize

from mlx_cpo_plugin.errors import ConfigError, first_line

# The host's quantiser: symmetric, (array, bits, group_size) -> array of the same shape.
fake_quantize: Callable[[mx.array, int, int], mx.array] = _fake_quantize


def protect_recurrences(model: Any, chunk_size: int) -> None:
    """Switch on the host's memory-bounded recurrences where ``model`` has recurrent layers."""
    if model_uses_recurrence(model):
        enable_memory_safe_recurrences(chunk_size=chunk_size)


def load_chat_tokenizer(model: str) -> Any:
    """Load the tokenizer of a model folder or hub name, with the host's fallback chat template if it has none.

    Raises:
        ConfigError: there is no such model, or its tokenizer cannot be read.
    """
    try:
        # Said outright: transformers would ask otherwise, and run the folder's code after one keystroke.
        tokenizer = load_tokenizer(model, {"trust_remote_code": False})
    except Exception as error:  # the hub client raises many kinds, offline and for unknown names
        raise ConfigError(
            f"The tokenizer of model {model!r} cannot be loaded ({first_line(error)}); "
            "give a local folder or the name of a model on the hub."
        ) from error
    try:
        from mlx_lm_lora.chat_template import ensure_chat_template
    except ImportError:  # host 5.8.6 has no fallback template
        return tokenizer
    ensure_chat_template(tokenizer)
    return tokenizer


__all__ = ["SFTTrainingArgs", "TrainingCallback", "fake_quantize", "load_chat_tokenizer", "protect_recurrences"]

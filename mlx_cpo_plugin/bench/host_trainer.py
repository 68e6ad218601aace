"""mlx-lm-lora's own CPO trainer on given batches, with the least that it takes to run here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.training.trainer import CPOTrainingArgs

LIMIT_KEY = "max_recommended_working_set_size"


def train(
    model: nn.Module,
    optimizer: optimizers.Optimizer,
    pairs: Sequence[PreferencePair],
    batches: Sequence[Sequence[int]] | None,
    arguments: CPOTrainingArgs,
    training_callback: Any,
) -> list[str]:
    """Train on ``batches``, the indices of the pairs of each iteration, or on what the host draws if there are none.

    Returns what had to be patched, in words.
    """
    from mlx_lm_lora.trainer import cpo_trainer

    patches = make_runnable()
    if batches is not None:
        patches.append(give_batches(cpo_trainer, batches))
    host_train = getattr(cpo_trainer, "_host_train_cpo", cpo_trainer.train_cpo)
    arguments_class = getattr(cpo_trainer, "_host_CPOTrainingArgs", cpo_trainer.CPOTrainingArgs)
    known = {field.name for field in fields(arguments_class)}
    host_train(
        model=model,
        optimizer=optimizer,
        train_dataset=[host_row(pair) for pair in pairs],
        args=arguments_class(**{name: value for name, value in asdict(arguments).items() if name in known}),
        training_callback=training_callback,
    )
    return patches


def make_runnable() -> list[str]:
    """Patch what stops the host's trainer on a device without Metal; return the patches in words."""
    if mx.metal.is_available():
        return []
    info = dict(mx.device_info())
    mx.device_info = lambda *_: {LIMIT_KEY: 0, **info}
    mx.disable_compile()
    return [
        f"mx.device_info() was given the key {LIMIT_KEY}, which mlx-lm-lora reads and only Metal has",
        "mx.compile is off for mlx-lm-lora, whose compiled step raises IndexError without Metal",
    ]


def give_batches(cpo_trainer: ModuleType, batches: Sequence[Sequence[int]]) -> str:
    """Let the host collate the given rows, in its own way, instead of drawing some; return the patch in words."""
    collate = cpo_trainer.iterate_cpo_batches
    waiting = iter(batches)

    def iterate_given_batches(
        dataset: Sequence[Any], batch_size: int, max_seq_length: int, train: bool = False
    ) -> Iterator[Any]:
        rows = [dataset[index] for index in next(waiting)]
        yield from collate(rows, batch_size=len(rows), max_seq_length=max_seq_length)

    cpo_trainer.iterate_cpo_batches = iterate_given_batches  # type: ignore[attr-defined]  # any module
    return "mlx-lm-lora got the same rows in each iteration, padded its own way, instead of drawing them itself"


def host_row(pair: PreferencePair) -> dict[str, Any]:
    """Return a pair as the host's collation takes it; all tokens after the prompt are scored."""
    return {
        "chosen": [*pair.prompt.tolist(), *pair.chosen.tolist()],
        "rejected": [*pair.prompt.tolist(), *pair.rejected.tolist()],
        "chosen_prompt_length": len(pair.prompt),
        "rejected_prompt_length": len(pair.prompt),
    }

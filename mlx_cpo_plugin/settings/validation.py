"""Whether a value fits its option: type, range and choices."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import SequenceMatcher, get_close_matches
from numbers import Integral, Real
from typing import Any

from mlx_cpo_plugin.errors import ConfigError, named, shown
from mlx_cpo_plugin.types import LossType, Option

Place = Callable[[str], str]
"""Key, e.g. ``lora_parameters.rank`` -> where it was given, e.g. ``in my.yaml, line 3``."""

KEYS_OF_OTHERS = {
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_schedule",
    "lr_scheduler": "lr_schedule",
    "scheduler": "lr_schedule",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "grad_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "grad_checkpoint",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_steps": "iters, which counts micro-batches",
    "num_iters": "iters, which counts micro-batches",
    "logging_steps": "steps_per_report",
    **dict.fromkeys(("eval_steps", "eval_every", "val_every"), "steps_per_eval"),
    "eval_strategy": "eval_per_epoch, or steps_per_eval",
    "save_strategy": "save_per_epoch, or save_every",
    "save_steps": "save_every",
    "steps_per_save": "save_every",
    "save_total_limit": "keep_checkpoints",
    "per_device_eval_batch_size": "batch_size, which is that of validation, too",
    "eval_batch_size": "batch_size, which is that of validation, too",
    "val_set_size": "valid_fraction",
    "val_size": "valid_fraction",
    "warmup_steps": "warmup_ratio, or warmup in lr_schedule",
    "num_warmup_steps": "warmup_ratio, or warmup in lr_schedule",
    "weight_decay": "optimizer_config, which takes it under the optimizer's name",
    "gradient_clipping": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "gamma_beta_ratio": "simpo_gamma, which is the ratio times beta",
    "prompt_column": "prompt_feature",
    "chosen_column": "chosen_feature",
    "rejected_column": "rejected_feature",
    "system_column": "system_feature",
    "max_length": "max_seq_length",
    "max_prompt_length": "max_seq_length, which is that of prompt and answer together",
    "sequence_len": "max_seq_length",
    "cutoff_len": "max_seq_length",
    "q_group_size": "load_in_4bits, which takes the largest group size that divides the layers",
    "q_bits": "load_in_4bits, load_in_6bits or load_in_8bits",
    "output_dir": "adapter_path",
    "wandb_project": "wandb",
    "hf_dataset.split": "hf_dataset.train_split",
    **dict.fromkeys(("hf_dataset.name", "hf_dataset.subset"), "hf_dataset.config"),
    "model_name_or_path": "model",
    "base_model": "model",
    "dataset": "data",
    "dataset_name": "data",
    "resume_from_checkpoint": "resume",
    "load_best_model_at_end": "load_best",
    "optim": "optimizer",
    **dict.fromkeys(("loss", "loss_type", "cpo_loss_type", "dpo_loss_type", "pref_loss"), "dpo_cpo_loss_type"),
    **dict.fromkeys(("cpo_loss", "dpo_loss"), "dpo_cpo_loss_type"),
    **dict.fromkeys(("cpo_beta", "dpo_beta", "pref_beta", "rl_beta", "simpo_beta"), "beta"),
    **dict.fromkeys(("pref_ftx", "rpo_alpha", "sft_weight"), "cpo_alpha"),
    "fine_tune_type": "train_type",
    "finetuning_type": "train_type",
    "lora_layers": "num_layers",
    "use_dora": "train_type, which may be dora",
    "use_rslora": "lora_parameters.scale, which is alpha over the root of the rank",
    "rank": "lora_parameters.rank",
    "scale": "lora_parameters.scale",
    "lora_r": "lora_parameters.rank",
    "lora_rank": "lora_parameters.rank",
    "lora_alpha": "lora_parameters.scale, which is alpha over the rank",
    "lora_scale": "lora_parameters.scale",
    "lora_dropout": "lora_parameters.dropout",
    "lora_target": "lora_parameters.keys",
    "lora_target_modules": "lora_parameters.keys",
    "target_modules": "lora_parameters.keys",
    **dict.fromkeys(("lora_parameters.r", "lora_parameters.lora_rank"), "lora_parameters.rank"),
    "lora_parameters.lora_alpha": "lora_parameters.scale, which is alpha over the rank",
    "lora_parameters.lora_dropout": "lora_parameters.dropout",
    **{
        f"hf_dataset.{part}_column": f"hf_dataset.{part}_feature" for part in ("prompt", "chosen", "rejected", "system")
    },
    **dict.fromkeys(("lr_schedule.warmup_steps", "lr_schedule.num_warmup_steps"), "lr_schedule.warmup"),
    "lora_parameters.alpha": "lora_parameters.scale, which is alpha over the rank",
    "lora_parameters.target_modules": "lora_parameters.keys",
}
"""Key of other trainers -> what means the same here."""

_MUCH_MORE = 0.1

LARGEST_INTEGER = 2**31 - 1
"""What an option without a maximum may be: MLX's own integers have 32 bits."""


def check(option: Option, value: object, place: Place, key: str = "") -> Any:
    """Return ``value`` converted to the type of ``option``, after all checks; integers are accepted as floats.

    Args:
        key: the name to use in messages, when it is not the option's own.

    Raises:
        ConfigError: the value has another type, is not finite, is out of range or is no choice.
    """
    key = key or option.name
    meant = option.spelled(value) if option.spelled else value
    if meant is None and option.optional:
        return None
    if option.listed is not None and isinstance(meant, list | tuple):
        return option.listed(list(meant), key, place)
    converted = _convert(option.type, meant)
    if option.choices and isinstance(converted, str) and converted not in option.choices:
        converted = converted.lower()
    if converted is None or not _within(option, converted):
        raise refused(key, value, place(key), option.allowed())
    if option.type is int and option.maximum is None and abs(converted) > LARGEST_INTEGER:
        raise refused(key, value, place(key), f"a whole number up to {LARGEST_INTEGER}")
    return converted if option.inside is None else option.inside(converted, key, place)


def refused(key: str, value: object, where: str, allowed: str) -> ConfigError:
    """Return the error for a value that is not allowed; ``where`` and ``allowed`` are phrases of the sentence."""
    return ConfigError(
        f"{key} is {shown(value)} {where}, but must be {allowed}.", key=key, place=where, allowed=allowed
    )


def unknown(
    kind: str,
    name: object,
    known: Iterable[str],
    where: str,
    inside: str = "",
    *,
    read: Container[str] | None = None,
) -> ConfigError:
    """Return the error for an unknown ``kind`` of name, such as a key; it suggests the nearest known one.

    Args:
        inside: the mapping that it stands in, with a dot at its end.
        read: those of the known names that have an effect here, by default all; no other is suggested.
    """
    known = sorted(known)
    name = named(name)
    if (meant := KEYS_OF_OTHERS.get(inside + as_key(name))) is not None:
        key, meant = inside + name, as_flags(meant, known) if kind == "option" else meant
        allowed = meant.partition(",")[0]
        article = "an" if kind[0] in "aeiou" else "a"
        sentence = f"{key} is not {article} {kind} of this plugin ({where}); did you mean {meant}?"
        return ConfigError(sentence, key=key, place=where, allowed=allowed)
    allowed = ", ".join(known) if len(known) <= 14 else ""
    advice = f"known are {allowed}." if allowed else "remove it."
    if close := _nearest(name.lower(), known, known if read is None else read):
        allowed = inside + close
        advice = f"did you mean {allowed}?"
    key = inside + name
    return ConfigError(f"Unknown {kind} {key} {where}; {advice}", key=key, place=where, allowed=allowed)


def as_key(name: str) -> str:
    """Return how an option of a command line, or a key in another spelling, is written in YAML."""
    return name.lstrip("-").replace("-", "_").lower()


def as_flags(meant: str, flags: Container[str]) -> str:
    """Return what a key of another trainer means with the flags of those that it names."""

    def flag_of(found: re.Match[str]) -> str:
        key, _, inner = found[0].partition(".")
        flag = f"--{key.replace('_', '-')}"
        return found[0] if flag not in flags else f"{flag} '{{{inner}: ...}}'" if inner else flag

    return re.sub(r"^\w+(\.\w+)?|\b[a-z]+_\w+", flag_of, meant)


def _nearest(name: str, known: Sequence[str], read: Container[str]) -> str | None:
    """Return the name that is most like ``name`` and is read here, unless one that is not read is much more like it."""
    near = get_close_matches(name, known, n=len(known))
    for each in near:
        if each in read:
            return each if _likeness(name, near[0]) - _likeness(name, each) < _MUCH_MORE else None
    return None


def _likeness(name: str, other: str) -> float:
    return SequenceMatcher(None, other, name).ratio()


def not_read(
    option: str, value: object, where: str, loss: LossType, losses: Iterable[LossType], chosen: str = ""
) -> ConfigError:
    """Return the error for an option that is set, but not used by the loss; ``chosen`` says which loss and where."""
    readers = ", ".join(other.name for other in losses if other.reads(option))
    return ConfigError(
        f"{option} is {shown(value)} {where}, but is not used by {chosen or f'the loss {loss.name}'}; "
        f"remove it, or use one of {readers}.",
        key=option,
        place=where,
        allowed=readers,
    )


def _convert(kind: type, value: object) -> Any:
    """Return the value as ``kind``, or None when it is something else."""
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind is int:
        return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if kind is float:
        with suppress(OverflowError):
            if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
        return None
    if kind is str:
        return os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if kind is dict:
        return dict(value) if isinstance(value, Mapping) else None
    if isinstance(value, str):  # a list as words of a command line
        return [part.strip() for part in value.split(",")]
    if isinstance(value, Mapping):  # a single entry needs no list around it
        return [value]
    return list(value) if isinstance(value, list | tuple) else None


def _within(option: Option, value: Any) -> bool:
    return (
        (not option.choices or value in option.choices)
        and (option.above is None or value > option.above)
        and (option.minimum is None or value >= option.minimum)
        and (option.below is None or value < option.below)
        and (option.maximum is None or value <= option.maximum)
    )

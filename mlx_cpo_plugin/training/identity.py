"""What determines the trained weights of a run, and what differs where a run is resumed otherwise."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np

from mlx_cpo_plugin.checkpoints.adapter import describe_adapter
from mlx_cpo_plugin.checkpoints.folder import Checkpoint
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import LONGEST_VALUE, ConfigError, named
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.plugins import loss_types
from mlx_cpo_plugin.settings.nested import spans_run
from mlx_cpo_plugin.settings.options import DATA_OPTIONS, MODEL_OPTIONS
from mlx_cpo_plugin.settings.run_settings import plain_settings
from mlx_cpo_plugin.settings.yaml_settings import dump_settings
from mlx_cpo_plugin.training.arguments import FREE_TO_CHANGE, CPOTrainingArgs, option_of
from mlx_cpo_plugin.training.optimizer_step import learning_rates
from mlx_cpo_plugin.types import Values

# Steps at which learning-rate schedules are compared.
_SCHEDULE_STEPS = (0, 1, 10, 100, 1000, 10_000)
_SAMPLED = 32
_LOSS_OPTION = "loss option "
_TEMPLATE = ("chat_template", "chat_template_kwargs")
_MODEL, _DATA = ([option.name for option in options] for options in (MODEL_OPTIONS, DATA_OPTIONS))
# Entry of an identity that is a digest, or follows from settings -> the settings that it follows from.
_SETTINGS_BEHIND = {
    "model": _MODEL,
    "train_type": _MODEL,
    "lora_parameters": _MODEL,
    "data": [*_DATA, "overlong", *_TEMPLATE],
    "tokenizer": ["model", *_TEMPLATE],
    "optimizer": ["optimizer", "optimizer_config", "learning_rate", "lr_schedule", "warmup_ratio"],
}
# What is said of a digest where none of these differs.
_OTHERWISE = {
    "model": "model (other weights or layers)",
    "tokenizer": "tokenizer or chat template",
    "optimizer": "optimizer",
}


def identity(
    args: CPOTrainingArgs, model: nn.Module, optimizer: optimizers.Optimizer, pairs: Sequence[PreferencePair]
) -> Values:
    """Return all that determines the trained weights, as plain values by key."""
    settings = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in FREE_TO_CHANGE}
    loss = loss_types().get(args.loss_type)
    left_out = {*settings, *(option.name for option in (loss.options if loss else ()) if option.free_on_resume)}
    settings |= {f"{_LOSS_OPTION}{name}": value for name, value in args.loss_options.items() if name not in left_out}
    adapter = describe_adapter(model)
    return {
        **{name: value if _is_plain(value) or value is None else repr(value) for name, value in settings.items()},
        "train_type": adapter["fine_tune_type"],
        "lora_parameters": repr(adapter["lora_parameters"]),
        "model": _model_digest(model),
        "data": data_digest(pairs),
        "tokenizer": getattr(pairs, "tokenizer", ""),
        "optimizer": _optimizer_description(optimizer),
        "ranks": mx.distributed.init().size(),
    }


def recorded(
    args: CPOTrainingArgs, model: nn.Module, optimizer: optimizers.Optimizer, pairs: Sequence[PreferencePair]
) -> Values:
    """Return the ``settings`` of a run by YAML key, and its ``rows`` by file, to tell what changed in an identity.

    Of each file these are the number of its pairs and digests of them, in their order and in any.
    """
    settings = args.run_settings
    if settings is None:
        settings = args.as_settings(optimizer, describe_adapter(model))
    files: dict[str, list[bytes]] = {}
    for pair in pairs:
        files.setdefault(pair.source.rpartition(":")[0], []).append(_digest([pair]))
    rows = {
        file: [len(digests), *(hashlib.sha256(b"".join(some)).hexdigest()[:16] for some in (digests, sorted(digests)))]
        for file, digests in files.items()
    }
    return {"settings": plain_settings(settings), "rows": rows}


def check_identity(checkpoint: Checkpoint, present: Values, now: Mapping[str, Values] | None = None) -> None:
    """Raise a ConfigError that names what differs from the run that wrote the checkpoint.

    Args:
        present: the :func:`identity` of the run that is to go on.
        now: what :func:`recorded` returned of it.
    """
    saved: Values = checkpoint.values["identity"]
    before = checkpoint.values.get("recorded", {})
    # Of a schedule an identity has the rates of a few steps, between which others may lie.
    was, is_now = (of.get("settings", {}).get("lr_schedule") for of in (before, now or {}))
    if saved.get("optimizer") == present.get("optimizer") and was != is_now:
        saved = {**saved, "lr_schedule": was}
        present = {**present, "lr_schedule": is_now}
    differing = [key for key in sorted({*saved, *present}) if saved.get(key) != present.get(key)]
    # What counts is the tokens; if they differ, the tokenizer may be why.
    if "tokenizer" in differing and ("data" not in differing or not saved.get("tokenizer")):
        differing.remove("tokenizer")
    if not differing:
        return
    told = dict(_differences(saved, present, differing, before, now or {}))
    listed = ", ".join(told.values())
    raise ConfigError(
        f"The run in {checkpoint.folder} cannot be resumed with other settings: {listed}; set them back, or start anew "
        "with another adapter_path, from its weights with resume_adapter_file.",
        key=next(iter(told)) if len(told) == 1 else "",
    )


def _differences(
    saved: Values,
    present: Values,
    differing: Sequence[str],
    before: Mapping[str, Values],
    now: Mapping[str, Values],
) -> Iterator[tuple[str, str]]:
    """Yield the YAML key of each difference with a phrase on it."""
    was, is_now = before.get("settings", {}), now.get("settings", {})
    for entry in differing:
        behind = _SETTINGS_BEHIND.get(entry, [])
        changes = [change for name in behind for change in _changes(name, was.get(name), is_now.get(name))]
        if entry == "optimizer" and any(
            spans_run(of.get("lr_schedule"), of.get("warmup_ratio")) for of in (was, is_now)
        ):
            length = _changes("iters", was.get("iters"), is_now.get("iters"))
            changes += [(key, f"{phrase} (the learning rate depends on it)") for key, phrase in length]
        if changes:
            yield from changes
        elif entry == "data":
            files = ", ".join(_changed_rows(before.get("rows", {}), now.get("rows", {})))
            yield "data", f"data: {files}" if files else "data"
        elif entry in _OTHERWISE:
            yield entry, _OTHERWISE[entry]
        elif not entry.startswith(_LOSS_OPTION) or "loss_type" not in differing:  # another loss has other options
            option = option_of(entry)
            key = option.name if option else entry.removeprefix(_LOSS_OPTION)
            yield from _changes(key, saved.get(entry), present.get(entry))


def _changes(key: str, old: object, new: object) -> Iterator[tuple[str, str]]:
    """Yield a setting, or those inside it, where the old and the new value differ, with a phrase on that."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            yield from _changes(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield key, f"{key}: {' → '.join(_as_in_yaml(value) for value in (old, new))}"


def _as_in_yaml(value: object) -> str:
    if isinstance(value, str):
        return named(value, LONGEST_VALUE)
    return named(dump_settings([value], flow=True, width=math.inf).strip()[1:-1], LONGEST_VALUE)


def _changed_rows(before: Mapping[str, Sequence[object]], now: Mapping[str, Sequence[object]]) -> Iterator[str]:
    """Yield one phrase on each file whose pairs are others, or in another order."""
    for file in sorted({*before, *now}):
        old, new, name = before.get(file), now.get(file), file or "the set"
        if old is None or new is None:
            yield f"{name} was not read" if old is None else f"{name} is not read any more"
        elif old[0] != new[0]:
            yield f"{name} had {old[0]} pairs and has {new[0]}"
        elif old[2] != new[2]:
            yield f"{name} has pairs that differ"
        elif old[1] != new[1]:
            yield f"{name} has its pairs in another order"


def _model_digest(model: nn.Module) -> str:
    """Digest the names, shapes and dtypes of the frozen parameters, and some numbers of each."""
    trainable = set(by_name(model.trainable_parameters()))
    digest = hashlib.sha256()
    for name, value in sorted(by_name(model.parameters()).items()):
        digest.update(f"{name} {value.shape} {value.dtype}".encode())
        if name not in trainable and value.size:
            step = max(1, value.size // _SAMPLED)
            digest.update(np.array(value.reshape(-1)[::step][:_SAMPLED].astype(mx.float32)).tobytes())
    return digest.hexdigest()[:16]


def data_digest(pairs: Iterable[PreferencePair], whole: bool = False) -> str:
    """Return the SHA-256 of the pairs' tokens and masks, in hexadecimal digits: the ``whole`` of it, or 16 of them."""
    return _digest(pairs).hex()[: None if whole else 16]


def _digest(pairs: Iterable[PreferencePair]) -> bytes:
    digest = hashlib.sha256()
    for pair in pairs:
        for part in (pair.prompt, pair.chosen, pair.rejected, pair.chosen_scored, pair.rejected_scored):
            digest.update(len(part).to_bytes(4, "little"))
            digest.update(part.tobytes())
    return digest.digest()


def _optimizer_description(optimizer: optimizers.Optimizer) -> str:
    """Return the class, its numbers, and its learning rate or some values of its schedule."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in sorted(vars(optimizer).items())}
    numbers = {key: value for key, value in plain.items() if _is_plain(value) and key[0] != "_"}
    return f"{type(optimizer).__name__} {numbers} {learning_rates(optimizer, _SCHEDULE_STEPS)}"


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float | str | list)

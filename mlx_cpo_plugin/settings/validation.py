"""Whether one value fits its option: type, range and choices, and what dictionaries may hold."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.settings.options import FURTHER_LIMITS, LORA_PARAMETERS, TRACKERS
from mlx_cpo_plugin.types import LossType, Option
from mlx_cpo_plugin.wording import named, shown

Place = Callable[[str], str]
"""Maps a key, e.g. ``lora_parameters.rank``, to where it was given, e.g. ``in my.yaml, line 3``."""

DATASET_KEYS = (
    "path",
    "config",
    "train_split",
    "valid_split",
    "test_split",
    "chosen_feature",
    "rejected_feature",
    "prompt_feature",
    "system_feature",
    "train_mode",
    "mask_prompt",
    "text_feature",
    "chat_feature",
    "completion_feature",
)
# What is passed on to `datasets`: not where it writes (cache_dir), nor whether it runs code (trust_remote_code).
DATASET_CONFIG_KEYS = ("name", "data_dir", "data_files", "revision", "token")
SCHEDULE_KEYS = ("name", "arguments", "warmup", "warmup_init")
LARGE = 10**15
"""Nothing is counted so far; MLX and NumPy cannot hold integers much larger."""


def check(option: Option, value: Any, place: Place, key: str = "") -> Any:
    """Return ``value`` as the type of ``option``: a whole number becomes a float where a float is asked for.

    Args:
        option: what is allowed.
        value: as the YAML file, the command line or the call gave it.
        place: where each key was given.
        key: the name to use in messages, when it is not the option's own.

    Raises:
        ConfigError: the value has another type, is not finite, is out of range or is no choice.
    """
    key = key or option.name
    if value is None and option.optional:
        return None
    further, allowed = FURTHER_LIMITS.get(key, (None, option.allowed()))
    converted = _convert(option.type, value)
    if converted is None or not _within(option, converted) or (further is not None and not further(converted)):
        if option.type is str and converted is None:
            allowed = option.allowed()
        excess = _excess(option.type, value)
        raise ConfigError(f"{key} is {shown(value)} {place(key)}, but must be {allowed}{excess}.")
    if key in _INSIDES:
        return _INSIDES[key](converted, place)
    return converted


def unknown(kind: str, name: object, known: Iterable[str], where: str, inside: str = "") -> ConfigError:
    """Return the error for a key or option that nobody reads, with the nearest known one.

    Args:
        kind: what it is, e.g. ``key``.
        name: the name as it was given.
        known: the names that there are.
        where: where it was given, in words.
        inside: the mapping that it stands in, with a dot at its end.
    """
    known = sorted(known)
    name = named(name)
    close = get_close_matches(name.lower(), known, n=1)
    if close:
        advice = f"did you mean {inside}{close[0]}?"
    else:
        advice = f"known are {', '.join(known)}." if len(known) <= 14 else "remove it."
    return ConfigError(f"Unknown {kind} {inside}{name} {where}; {advice}")


def not_read(
    option: str, value: object, where: str, loss: LossType, losses: Iterable[LossType], chosen: str = ""
) -> ConfigError:
    """Return the error for an option that must not be set with a loss that does not read it.

    Args:
        where: where it was given, in words.
        losses: all that there are.
        chosen: what the loss is and where that was given, with ", which" at its end; "the loss ..." when it is empty.
    """
    readers = ", ".join(other.name for other in losses if other.reads(option))
    return ConfigError(
        f"{option} is {shown(value)} {where}, but {chosen or f'the loss {loss.name}'} does not read it; "
        f"remove it, or use one of {readers}."
    )


def _convert(kind: type, value: Any) -> Any:
    """Return the value as ``kind``, or None when it is something else."""
    if kind is bool:
        return value if isinstance(value, bool) else None
    if _excess(kind, value):
        return None
    if kind is int:
        return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if kind is float:
        if not isinstance(value, Real) or isinstance(value, bool):
            return None
        return _finite(value)
    if kind is str:
        return os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if kind is dict:
        return dict(value) if isinstance(value, Mapping) else None
    if kind is list:
        if isinstance(value, Mapping):  # a single entry needs no list around it
            return [value]
        return list(value) if isinstance(value, list | tuple) else None
    return value


def _excess(kind: type, value: Any) -> str:
    """Return what a value of the right type has too much of, in words; empty for nothing."""
    if kind is int and isinstance(value, Integral) and abs(int(value)) >= LARGE:
        return f", below {LARGE:.0e}"
    if kind is str and isinstance(value, str) and not _is_text(value):
        return " without NUL and halves of characters"
    return ""


def _is_text(value: str) -> bool:
    """Whether a text can be printed, and be part of a path."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def _finite(value: Real) -> float | None:
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _within(option: Option, value: Any) -> bool:
    if option.choices and value not in option.choices:
        return False
    if option.above is not None and not value > option.above:
        return False
    if option.minimum is not None and value < option.minimum:
        return False
    if option.below is not None and not value < option.below:
        return False
    return option.maximum is None or value <= option.maximum


def _lora_parameters(value: dict[str, Any], place: Place) -> dict[str, Any]:
    options = {option.name: option for option in LORA_PARAMETERS}
    for name in value:
        if name not in options:
            raise unknown("key", name, options, place(f"lora_parameters.{name}"), "lora_parameters.")
    return {
        name: check(option, value.get(name, option.default), place, f"lora_parameters.{name}")
        for name, option in options.items()
    }


def _optimizer_config(value: dict[str, Any], place: Place) -> dict[str, Any]:
    import mlx.optimizers as optimizers

    classes = {"adam": optimizers.Adam, "adamw": optimizers.AdamW, "muon": optimizers.Muon}
    for optimizer, arguments in value.items():
        key = f"optimizer_config.{optimizer}"
        if optimizer not in classes:
            raise unknown("key", optimizer, classes, place(key), "optimizer_config.")
        if not isinstance(arguments, Mapping):
            raise ConfigError(f"{key} is {shown(arguments)} {place(key)}, but must be a mapping.")
        parameters = inspect.signature(classes[optimizer]).parameters
        known = {name: parameter.default for name, parameter in parameters.items() if name != "learning_rate"}
        for name, argument in arguments.items():
            if name not in known:
                raise unknown("key", name, known, place(f"{key}.{name}"), f"{key}.")
            _check_like(known[name], argument, f"{key}.{name}", place)
    return {optimizer: dict(value.get(optimizer, {})) for optimizer in classes}


def _check_like(default: Any, value: Any, key: str, place: Place) -> None:
    """Refuse an argument of an optimizer that is of another type than its default."""
    if isinstance(default, bool | int | float):
        check(Option(key, type(default), default, ""), value, place)
    elif isinstance(default, list | tuple) and (
        not isinstance(value, list | tuple)
        or len(value) != len(default)
        or any(_convert(float, item) is None for item in value)
    ):
        raise ConfigError(f"{key} is {shown(value)} {place(key)}, but must be a list of {len(default)} numbers.")


def _lr_schedule(value: dict[str, Any], place: Place) -> dict[str, Any]:
    import mlx.optimizers.schedulers as schedulers

    schedules = {
        name: inspect.signature(function)
        for name, function in inspect.getmembers(schedulers, inspect.isfunction)
        if function.__module__ == schedulers.__name__ and name != "join_schedules"
    }
    for name in value:
        if name not in SCHEDULE_KEYS:
            raise unknown("key", name, SCHEDULE_KEYS, place(f"lr_schedule.{name}"), "lr_schedule.")
    check(Option("name", str, "", "", choices=tuple(schedules)), value.get("name"), place, "lr_schedule.name")
    arguments = check(Option("arguments", list, [], ""), value.get("arguments"), place, "lr_schedule.arguments")
    signature = schedules[value["name"]]
    try:
        signature.bind(*arguments)
        numeric = all(_convert(float, argument) is not None for argument in arguments)
    except TypeError:
        numeric = False
    if not numeric:
        raise ConfigError(
            f"lr_schedule.arguments is {shown(arguments)} {place('lr_schedule.arguments')}, "
            f"but {value['name']} takes the numbers {', '.join(signature.parameters)}."
        )
    schedule = {"name": value["name"], "arguments": arguments}
    for option in (
        Option("warmup", int, 0, "", minimum=0),
        Option("warmup_init", float, 0.0, "", minimum=0),
    ):
        if option.name in value:
            schedule[option.name] = check(option, value[option.name], place, f"lr_schedule.{option.name}")
    return schedule


def _hf_dataset(value: list[Any], place: Place) -> list[dict[str, Any]]:
    for position, entry in enumerate(value):
        key = f"hf_dataset.{position}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            raise ConfigError(
                f"hf_dataset has the entry {shown(entry)} {place(key)}, but each entry must be a mapping with a path."
            )
        for name in entry:
            if name not in DATASET_KEYS:
                raise unknown("key", name, DATASET_KEYS, place(f"{key}.{name}"), "hf_dataset.")
            if name.endswith(("_split", "_feature")):
                check(Option(f"{key}.{name}", str, None, "", optional=True), entry[name], place)
        _dataset_config(entry.get("config"), f"{key}.config", place)
    return [dict(entry) for entry in value]


def _dataset_config(value: Any, key: str, place: Place) -> None:
    if value is not None and not isinstance(value, str | Mapping):
        raise ConfigError(f"{key} is {shown(value)} {place(key)}, but must be a name or a mapping.")
    for name in value if isinstance(value, Mapping) else ():
        if name not in DATASET_CONFIG_KEYS:
            raise unknown("key", name, DATASET_CONFIG_KEYS, place(f"{key}.{name}"), f"{key}.")


def _report_to(value: list[Any], place: Place) -> list[str] | None:
    for position, name in enumerate(value):
        if name not in (*TRACKERS, "none"):
            where = place(f"report_to.{position}")
            raise ConfigError(f"report_to is {shown(name)} {where}, but must be one of {', '.join(TRACKERS)}, none.")
    trackers = list(dict.fromkeys(name for name in value if name != "none"))
    if trackers and "none" in value:
        where = place("report_to")
        raise ConfigError(f"report_to is {shown(value)} {where}, but none stands alone; remove one of them.")
    return trackers or None


_INSIDES: dict[str, Callable[[Any, Place], Any]] = {
    "lora_parameters": _lora_parameters,
    "optimizer_config": _optimizer_config,
    "lr_schedule": _lr_schedule,
    "hf_dataset": _hf_dataset,
    "report_to": _report_to,
}

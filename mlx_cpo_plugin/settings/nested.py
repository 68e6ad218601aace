"""Checks beyond type and range, mostly of values inside mappings and lists: the functions for ``Option.inside``."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

from mlx_cpo_plugin.errors import ConfigError, DataError, shown
from mlx_cpo_plugin.settings.validation import Place, check, refused, unknown
from mlx_cpo_plugin.types import Option, Values

# Value of ``optimizer`` -> its class in mlx.optimizers, which is imported where it is needed.
OPTIMIZERS = {
    "adam": "Adam",
    "adamw": "AdamW",
    "muon": "Muon",
    "sgd": "SGD",
    "adafactor": "Adafactor",
    "lion": "Lion",
}
MOST_PROMPTS = 16
TRACKERS = ("wandb", "tensorboard", "trackio", "swanlab")


def module_paths(names: list[str], key: str, place: Place) -> list[str]:
    """Return each path of a module once."""
    if not names or not all(isinstance(name, str) and name for name in names):
        raise refused(key, names, place(key), "a list of modules, e.g. [self_attn.q_proj, self_attn.v_proj]")
    return list(dict.fromkeys(names))


LORA_PARAMETERS: tuple[Option, ...] = (
    Option("rank", int, 8, "Rank of the adapter matrices.", minimum=1),
    Option(
        "dropout", float, 0.0, "Probability with which an adapter input is dropped in training.", minimum=0, below=1
    ),
    Option("scale", float, 10.0, "Factor on the adapter's output.", above=0),
    Option(
        "keys",
        list,
        None,
        "Modules to adapt, as paths inside a layer, e.g. self_attn.q_proj; all linear ones when left out.",
        title="Target modules",
        optional=True,
        inside=module_paths,
    ),
)
_COLUMNS = ("chosen", "rejected", "prompt", "system", "text", "chat", "completion")
WEIGHT = Option("weight", float, 1.0, "How often an epoch has each training pair of a set.", above=0, maximum=1000)
DATASET_KEYS = (
    *("path", "weight", "config", "train_mode", "mask_prompt", "train_split", "valid_split", "test_split"),
    *(f"{column}_feature" for column in _COLUMNS),
)
SET_KEYS = ("path", WEIGHT.name, *(f"{column}_feature" for column in _COLUMNS[:4]))
WHOLE_RUN = ("linear", "cosine", "constant")
"""Schedules from ``learning_rate`` on that span the run; all others are MLX's, which count steps."""
_WARMUP = (Option("warmup", int, 0, "", minimum=0), Option("warmup_init", float, 0.0, "", minimum=0))


def spans_run(lr_schedule: Values | None, warmup_ratio: float | None) -> bool:
    """Return whether the learning rate of a step depends on how many the run has."""
    return bool(warmup_ratio) or (lr_schedule or {}).get("name") in ("linear", "cosine")


def home_expanded(path: str, key: str, place: Place) -> str:
    """Expand ``~`` or ``~user`` at the beginning of a path."""
    return os.path.expanduser(path)


def auto_if_true(resume: object) -> object:
    """Read true as ``auto``, and false as nothing to resume."""
    words: Values = {"true": "auto", "false": None}
    return words.get(str(resume).lower(), resume)


def folder_name(name: str, key: str, place: Place) -> str:
    """Refuse a name that would lead outside the folder it is looked up in."""
    if {"/", "\\"} & set(name) or not name.strip(". "):
        raise refused(key, name, place(key), "the name of a folder without / and \\, or null")
    return name


def repository(name: str, key: str, place: Place) -> str:
    """Refuse what cannot be the name of a repository on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise refused(key, name, place(key), "name or account/name, of letters, digits, '-', '_' and '.'") from None
    return name


def count_or_all(batches: int, key: str, place: Place) -> int:
    """Refuse 0 where -1 means all."""
    if batches == 0:
        raise refused(key, batches, place(key), "a whole number >= 1, or -1 for all")
    return batches


def lora_parameters(value: Values, key: str, place: Place) -> Values:
    """Return rank, dropout and scale, with defaults for those that are left out, and keys where they are given."""
    if value.get("alpha") is not None and value.get("scale") is not None:  # as mlx-lm-lora reads it
        raise ConfigError(
            f"{key}.alpha is {shown(value['alpha'])} {place(f'{key}.alpha')}, beside scale, which alone counts; remove "
            "alpha.",
            key=f"{key}.alpha",
            place=place(f"{key}.alpha"),
        )
    _only_known(value, [option.name for option in LORA_PARAMETERS], key, place)
    checked = {
        option.name: check(option, value.get(option.name, option.default), place, f"{key}.{option.name}")
        for option in LORA_PARAMETERS
    }
    return {name: part for name, part in checked.items() if part is not None}


def optimizer_config(value: Values, key: str, place: Place) -> Values:
    """Return the arguments of each optimizer by name, checked against its signature."""
    import mlx.optimizers as optimizers

    _only_known(value, OPTIMIZERS, key, place)
    for optimizer, arguments in value.items():
        inner = f"{key}.{optimizer}"
        if not isinstance(arguments, Mapping):
            raise refused(inner, arguments, place(inner), "a mapping")
        parameters = inspect.signature(getattr(optimizers, OPTIMIZERS[optimizer])).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items() if name != "learning_rate"}
        _only_known(arguments, defaults, inner, place)
        for name, argument in arguments.items():
            _check_like(defaults[name], argument, f"{inner}.{name}", place)
    return {optimizer: dict(value.get(optimizer, {})) for optimizer in OPTIMIZERS}


def _check_like(default: object, value: object, key: str, place: Place) -> None:
    """Refuse an argument whose type differs from that of its default."""
    if isinstance(default, bool | int | float):
        check(Option(key, type(default), default, ""), value, place)
    elif default is None and value is not None:  # a number that is not used by default
        check(Option(key, float, default, ""), value, place)
    elif isinstance(default, list | tuple) and not (_is_numbers(value) and len(value) == len(default)):
        raise refused(key, value, place(key), f"a list of {len(default)} numbers")


def _is_numbers(value: object) -> TypeGuard[Sequence[float]]:
    return isinstance(value, list | tuple) and all(
        isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item) for item in value
    )


def named_schedule(value: object) -> object:
    """Read the name of a schedule as a mapping."""
    return {"name": value} if isinstance(value, str) else value


def lr_schedule(value: Values, key: str, place: Place) -> Values:
    """Return a schedule's name and, for one of MLX's, its arguments, checked against its signature."""
    import mlx.optimizers.schedulers as schedulers

    schedules = {
        name: inspect.signature(function)
        for name, function in inspect.getmembers(schedulers, inspect.isfunction)
        if function.__module__ == schedulers.__name__ and name != "join_schedules"
    }
    _only_known(value, ("name", "arguments", *(own.name for own in _WARMUP)), key, place)
    choices = (*WHOLE_RUN, *schedules)
    name = check(Option("name", str, "", "", choices=choices), value.get("name"), place, f"{key}.name")
    warmup = {own.name: check(own, value[own.name], place, f"{key}.{own.name}") for own in _WARMUP if own.name in value}
    if name in WHOLE_RUN:
        if "arguments" in value:
            inner = f"{key}.arguments"
            raise refused(
                inner,
                value["arguments"],
                place(inner),
                f"left out: {name} takes learning_rate and the length of the run",
            )
        return {"name": name, **warmup}
    arguments = check(Option("arguments", list, [], ""), value.get("arguments"), place, f"{key}.arguments")
    try:
        schedules[name].bind(*arguments)
        fits = _is_numbers(arguments)
    except TypeError:
        fits = False
    if not fits:
        numbers = ", ".join(schedules[name].parameters)
        raise refused(f"{key}.arguments", arguments, place(f"{key}.arguments"), f"a list of {name}'s numbers {numbers}")
    return {"name": name, "arguments": arguments, **warmup}


def number_of_layers(value: int, key: str, place: Place) -> int:
    """Return the number; 0 would mean all layers to the host."""
    if not value:
        raise refused(key, value, place(key), "a whole number >= 1, or -1 for all")
    return value


def hf_dataset(value: list[Values], key: str, place: Place) -> list[Values]:
    """Return the entries, each with a path and known keys only."""
    for position, entry in enumerate(value):
        inner = f"{key}.{position}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            raise refused(inner, entry, place(inner), "a mapping with a path")
        _only_known(entry, DATASET_KEYS, inner, place, told_as=key)
        _checked_entry(entry, inner, place)
        config = entry.get("config")
        if config is not None and not isinstance(config, str | Mapping):
            raise refused(f"{inner}.config", config, place(f"{inner}.config"), "a name or a mapping")
        if isinstance(config, Mapping):
            # Passed on to `datasets`: not where it writes (cache_dir), nor whether it runs code (trust_remote_code).
            _only_known(config, ("name", "data_dir", "data_files", "revision", "token"), f"{inner}.config", place)
    return [dict(entry) for entry in value]


def sets_of_rows(value: list[Values], key: str, place: Place) -> list[Values]:
    """Return the sets that are mixed, each with a path, its weight and the columns that it names."""
    if not value:
        raise refused(key, value, place(key), "a folder, a file or a name, or a list with at least one set")
    sets = []
    for position, entry in enumerate(value):
        inner = f"{key}.{position}"
        entry = {"path": entry} if isinstance(entry, str | os.PathLike) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str | os.PathLike):
            raise refused(inner, entry, place(inner), "a mapping with a path")
        _only_known(entry, SET_KEYS, inner, place, told_as=key)
        path = home_expanded(os.fspath(entry["path"]), inner, place)
        sets.append({**entry, "path": path, **_checked_entry(entry, inner, place)})
    if len({os.path.normpath(entry["path"]) for entry in sets}) < len(sets):
        raise refused(key, [entry["path"] for entry in sets], place(key), "sets that differ; weight repeats one")
    return sets


def _checked_entry(entry: Values, inner: str, place: Place) -> Values:
    """Return the weight of a set, where it is given, after its splits and columns have been checked, too."""
    for name in entry:
        if name.endswith(("_split", "_feature")):
            check(Option(f"{inner}.{name}", str, None, "", optional=True), entry[name], place)
    given = entry.get(WEIGHT.name)
    return {} if given is None else {WEIGHT.name: check(WEIGHT, given, place, f"{inner}.{WEIGHT.name}")}


def prompts_of_file(value: object) -> object:
    """Read text alone as the path of a file with prompts."""
    return [{"file": value}] if isinstance(value, str) else value


def sample_prompts(value: list[str | Values], key: str, place: Place) -> list[str | Values] | None:
    """Return prompts, each a text or a row with a prompt or messages; those of a file in its place."""
    from mlx_cpo_plugin.data.sample_prompts import read_prompts

    wanted = f"a file, or a list of at most {MOST_PROMPTS} prompts, each a text or a mapping with prompt or messages"
    prompts: list[object] = []
    for item in value:
        if isinstance(item, Mapping) and list(item) == ["file"] and isinstance(item["file"], str):
            try:
                prompts += read_prompts(Path(item["file"]).expanduser())
            except DataError as error:
                raise ConfigError(f"{key} {place(key)}: {error}", key=key, place=place(key)) from error
        else:
            prompts.append(item)
    if len(prompts) > MOST_PROMPTS:
        raise refused(key, f"{len(prompts)} prompts", place(key), wanted)
    checked: list[str | Values] = []
    for prompt in prompts:
        if isinstance(prompt, Mapping) and (prompt.get("prompt") or prompt.get("messages")):
            checked.append(dict(prompt))
        elif isinstance(prompt, str) and prompt.strip():
            checked.append(prompt)
        else:
            raise refused(key, prompt, place(key), wanted)
    return checked or None


def report_to(value: list[str], key: str, place: Place) -> list[str] | None:
    """Return each tracker once, or None for ``none``."""
    for position, name in enumerate(value):
        if name not in (*TRACKERS, "none"):
            raise refused(key, name, place(f"{key}.{position}"), f"one of {', '.join(TRACKERS)}, none")
    trackers = list(dict.fromkeys(name for name in value if name != "none"))
    if trackers and "none" in value:
        raise refused(key, value, place(key), "none alone, or trackers without it")
    return trackers or None


def _only_known(value: Iterable[str], known: Iterable[str], key: str, place: Place, told_as: str | None = None) -> None:
    known = list(known)
    for name in value:
        if name not in known:
            raise unknown("key", name, known, place(f"{key}.{name}"), f"{told_as or key}.")

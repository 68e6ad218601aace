"""``run_settings.yaml``: what a run was configured with, as a configuration file that repeats it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from glob import glob
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.checkpoints import RUN_SETTINGS
from mlx_cpo_plugin.checkpoints.run_identity import RunRecord
from mlx_cpo_plugin.plugins import loss_types, train_modes
from mlx_cpo_plugin.settings.command_line import known_options
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.settings.cpo_options import CPO_OPTIONS, LOSS_OPTION
from mlx_cpo_plugin.settings.options import COMMON_OPTIONS
from mlx_cpo_plugin.settings.yaml_settings import dump_settings, read_yaml
from mlx_cpo_plugin.types import Option, Values

_LOCAL_PATHS = ("model", "data", "adapter_path", "resume_adapter_file", "chat_template")


def options_of(loss_type: str) -> tuple[dict[str, Option], set[str]]:
    """Return the options of a CPO run with this loss by name, and the names of those that only other losses read."""
    losses = loss_types()
    own = losses[loss_type].options if loss_type in losses else ()
    options = {option.name: option for option in (*COMMON_OPTIONS, *CPO_OPTIONS, *own)}
    of_losses = {option.name for loss in losses.values() for option in loss.options}
    return options, of_losses - {option.name for option in own}


def recorded_settings(settings: RunSettings) -> Values:
    """Return the settings that have a part in the run as plain values; local paths become absolute."""
    mode = train_modes()[settings.train_mode]
    losses = [loss_types()[settings.dpo_cpo_loss_type]] if mode.has(LOSS_OPTION) else []
    values = {name: getattr(settings, name, None) for name in known_options([mode], losses)}
    # A loaded model and rows of a call have no name.
    values = {name: value for name, value in values.items() if value or name not in ("model", "data")}
    for key in _LOCAL_PATHS:
        path = values.get(key)
        if isinstance(path, str) and (key == "adapter_path" or os.path.exists(path)):
            values[key] = os.path.abspath(path)
    for key in ("data", "hf_dataset"):
        if isinstance(sets := values.get(key), list):
            values[key] = [_with_absolute_paths(entry) for entry in sets]
    return plain_settings({"train_mode": mode.name, **values})


def _with_absolute_paths(entry: Values) -> Values:
    """An entry of ``data`` or ``hf_dataset`` with its local path absolute, or those of the files that it loads."""
    config = entry.get("config")
    if isinstance(config, Mapping) and "data_files" in config:  # the path names a format, such as json
        return {**entry, "config": {**config, "data_files": _absolute(config["data_files"])}}
    return {**entry, "path": _absolute(entry["path"])}


def _absolute(paths: Any) -> Any:
    """Local paths, or patterns that match some, as absolute ones; also inside of lists and mappings."""
    if isinstance(paths, Mapping):
        return {name: _absolute(inner) for name, inner in paths.items()}
    if isinstance(paths, list | tuple):
        return [_absolute(inner) for inner in paths]
    return os.path.abspath(paths) if isinstance(paths, str) and (os.path.exists(paths) or glob(paths)) else paths


def as_yaml(values: Values, run: RunRecord) -> str:
    """Return the text of the record; its first line is a comment that names versions and device, the second the run."""
    import mlx.core as mx

    names = ("mlx-cpo-plugin", "mlx-lm-lora", "mlx-lm", "mlx")
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    began = f"# run {run.run.id}, begun {run.run.begun.isoformat()}"
    if run.origin is not None:
        began += f", from run {run.origin.run_id} after iteration {run.origin.iteration}"
    nameless = [what for key, what in (("model", "a loaded model"), ("data", "rows")) if key not in values]
    if nameless:
        began += f"\n# started by a call that was given {' and '.join(nameless)}, whose names are not known"
    return f"# {versions}, {system}, {mx.default_device()}\n{began}\n{dump_settings(dict(values))}"


def read_run_settings(folder: Path) -> tuple[Values, str]:
    """Return the settings and the versions that a run left in its adapter folder; both empty if it left none."""
    file = folder / RUN_SETTINGS
    if not file.exists():
        return {}, ""
    values = read_yaml(file).values
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return values, first.removeprefix("#").strip() if first.startswith("#") else ""


@cache
def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def plain_values(value: object) -> Any:
    """Return a value with the types of YAML and JSON only, without access tokens."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items() if key != "token"}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def plain_settings(values: Values) -> Values:
    """Return :func:`plain_values` of what is set, except ``resume``, which says how a run went on, not what it is."""
    return {key: plain_values(value) for key, value in values.items() if value is not None and key != "resume"}

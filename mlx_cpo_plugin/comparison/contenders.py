"""The models of a comparison: the base model first, then what each folder holds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load

from mlx_cpo_plugin.atomic_files import check_safetensors
from mlx_cpo_plugin.blas import use_fast_blas
from mlx_cpo_plugin.checkpoints import ADAPTER_CONFIG, ADAPTER_FILE, BEST, RUN_SETTINGS
from mlx_cpo_plugin.checkpoints.run_identity import run_in
from mlx_cpo_plugin.errors import ConfigError, UserError, first_line, is_device_fault, named
from mlx_cpo_plugin.model.layers import WITH_ADAPTER
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.report.record import names_of_runs
from mlx_cpo_plugin.run.building import QUANTISED_LOADS, quantise_base, quantised_load
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.settings.command_line import ON_THE_COMMAND_LINE
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.settings.run_settings import read_run_settings
from mlx_cpo_plugin.types import Values

BASE, TUNED = "base", "tuned"
MODEL_CONFIG = "config.json"


@dataclass(frozen=True)
class Contender:
    """A model that takes part.

    Attributes:
        name: ``base``; ``tuned`` for a single adapter, or else what its folder differs by from the others.
        settings: name the base model and the precision that it is loaded in.
        adapter_path: what is put on; None for the base model, and for a folder that holds a whole model.
    """

    name: str
    settings: RunSettings
    adapter_path: Path | None = None

    def description(self) -> dict[str, Any]:
        """Return what the JSON says of it."""
        path = self.adapter_path
        train_type = _adapter_config(path).get("fine_tune_type", self.settings.train_type) if path else None
        return {
            "name": self.name,
            "model": self.settings.model,
            "adapter_path": path and str(path),
            "train_type": train_type,
        }

    def same_base(self, other: Contender) -> bool:
        """Whether :func:`load_base` would load the same again."""
        return _base_of(self.settings) == _base_of(other.settings)


def contenders(folders: Sequence[Path], model: str | None, data: str | None) -> list[Contender]:
    """Return the base model and what ``folders`` hold; data, loss and base model are those of the first run in them.

    Args:
        folders: adapters of runs, adapters with no record of their run, and whole models.
        model, data: in place of the run's.

    Raises:
        ConfigError: a folder holds neither, is given twice, or nobody knows its base model; or an adapter is damaged.
    """
    kinds = [kind_of_folder(folder) for folder in folders]
    records = [run_folder(folder) for folder in folders]
    first = next((record for record in records if (record / RUN_SETTINGS).is_file()), records[0])
    settings = run_settings(first, model, data)
    run = run_in(first)
    settings.begun = run.begun if run else None  # which templates tell that print the date
    found = [Contender(BASE, settings)]
    for folder, record, kind, name in zip(folders, records, kinds, distinct_names(folders), strict=True):
        own = settings
        if kind == MODEL_CONFIG:
            whole = dict.fromkeys(QUANTISED_LOADS, False) | {"model": str(folder)}
            found.append(Contender(name, RunSettings.of({**vars(settings), **whole})))
            continue
        _check_files(folder)  # before any of them is asked
        if record != first and (record / RUN_SETTINGS).is_file():
            own = run_settings(record, model, data)
        elif record != first and model is None and (named_model := _adapter_config(folder).get("model")):
            own = RunSettings.of({**vars(settings), "model": str(named_model)})
        found.append(Contender(name, own, folder))
    return found


def kind_of_folder(folder: Path) -> str:
    """Return the file that says what a folder holds: that of an adapter, or :data:`MODEL_CONFIG` of a whole model.

    Raises:
        ConfigError: it holds neither.
    """
    if (folder / MODEL_CONFIG).is_file() and not (folder / ADAPTER_CONFIG).exists():
        return MODEL_CONFIG
    for name in (ADAPTER_FILE, ADAPTER_CONFIG):
        if not (folder / name).is_file():
            raise ConfigError(
                f"There is no {name} in {named(str(folder))}; give the adapter_path of a run that was saved.",
                place=str(folder),
            )
    return ADAPTER_CONFIG


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each folder: as many of its last parts as tell it from the others.

    Raises:
        ConfigError: a folder is given twice.
    """
    paths = [os.path.abspath(folder) for folder in folders]
    twice = next((folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1), None)
    if twice is not None:
        raise ConfigError(f"{named(str(twice))} is given twice; give each folder once.", place=str(twice))
    return [TUNED] if len(folders) == 1 else names_of_runs(folders, taken=BASE)


def _adapter_config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _base_of(settings: RunSettings) -> tuple[Any, ...]:
    return settings.model, quantised_load(settings), _is_frozen(settings)


def _is_frozen(settings: RunSettings) -> bool:
    """As in the run: scores are computed, and rounded, otherwise where the head is trained."""
    return settings.train_type != "full" or settings.num_layers > 0


def run_folder(adapter_path: Path) -> Path:
    """Return the adapter folder of a run, which holds that of its best adapter."""
    path = Path(os.path.abspath(adapter_path))
    parent = path.parent
    inside = path.name.startswith(BEST) and (parent / RUN_SETTINGS).is_file()
    return parent if inside and not (adapter_path / RUN_SETTINGS).exists() else adapter_path


def run_settings(adapter_path: Path, model: str | None, data: str | None) -> RunSettings:
    """Return the settings of the run, with ``model`` and ``data`` in place of its own where they are given.

    Raises:
        ConfigError: they are not known, or no longer accepted.
    """
    record = adapter_path / RUN_SETTINGS
    recorded: dict[str, Any] = {}
    call: dict[str, Any] = {"train_mode": "cpo", "train": True, "model": model, "data": data}
    if record.is_file():
        call["config"] = str(record)
        recorded, _ = read_run_settings(adapter_path)
        if model is None and "model" not in recorded:
            raise ConfigError(
                f"{RUN_SETTINGS} in {named(str(adapter_path))} names no model, since the run was started by a call "
                "that was given a loaded one; give --model, and --data for rows.",
                key="model",
            )
    elif model is None:
        raise ConfigError(
            f"There is no {RUN_SETTINGS} in {named(str(adapter_path))}; give --model, and --data for rows.", key="model"
        )
    settings = config.resolve(call, call_place=ON_THE_COMMAND_LINE).settings
    if data is not None:
        settings.hf_dataset = None  # which would go before data
    elif "data" not in recorded:
        settings.data = ""  # the default is where another run's may be
    return settings


def load_base(settings: RunSettings) -> tuple[nn.Module, Any]:
    """Load the model without any adapter, in the precision of the run.

    Raises:
        ConfigError: it cannot be loaded.
    """
    model, tokenizer = load_model(settings.model, quantised_load(settings))
    if _is_frozen(settings):
        model.freeze()
    model.eval()
    return model, tokenizer


def load_model(name: str, precision: str | None = None, option: str = "--model") -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer, and quantise its weights if ``precision``, a setting's key, says so.

    Raises:
        ConfigError: it cannot be loaded; ``option`` gives another one. Or the BLAS that the environment names cannot.
    """
    use_fast_blas()
    try:
        model, tokenizer = load(name)[:2]
        if precision is not None:
            quantise_base(model, precision)
    except UserError:
        raise
    except Exception as error:  # the hub client and the architectures raise many kinds
        if is_device_fault(error):
            raise
        raise ConfigError(
            f"model {name!r} cannot be loaded ({first_line(error)}); check its files or give {option}.", key="model"
        ) from error
    return model, tokenizer


def put_on(model: nn.Module, contender: Contender) -> None:
    """Put an adapter over the layers of its base model, or, of full training, over the weights.

    Raises:
        ConfigError: it is damaged, or not one for this model.
    """
    path = str(contender.adapter_path)
    file = Path(path) / ADAPTER_FILE
    try:
        load_adapters(model, path)
    except (ValueError, OSError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        if is_device_fault(error):
            raise
        raise ConfigError(
            f"The adapter in {named(path)} does not fit model {contender.settings.model!r} "
            f"({first_line(error)}); give the model that it was trained from.",
            key="model",
            place=path,
        ) from error
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, WITH_ADAPTER)]
    wanted = {f"{name}.{leaf}" for name, module in layers for leaf in ("lora_a", "lora_b", "m") if leaf in module}
    saved, loaded = set(cast(Values, mx.load(str(file)))), by_name(model.parameters())
    if missing := wanted - saved:
        raise _damaged(file, f"it lacks {len(missing)} of {len(wanted)} tensors, {min(missing)} for one")
    if broken := next((name for name in sorted(saved & loaded.keys()) if not mx.isfinite(loaded[name]).all()), None):
        raise _damaged(file, f"{broken} holds numbers that are not finite")
    model.eval()


def _check_files(folder: Path) -> None:
    """Raise ConfigError where an adapter is cut short, or its configuration does not say how layers are adapted."""
    try:
        check_safetensors(folder / ADAPTER_FILE)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(folder / ADAPTER_FILE, first_line(error)) from error
    config = _adapter_config(folder)
    if config.get("fine_tune_type") == "full":
        return
    parameters = config.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    numbers = (config.get("num_layers"), parameters.get("rank"), parameters.get("scale"))
    if not all(isinstance(number, int | float) for number in numbers):
        raise _damaged(folder / ADAPTER_CONFIG, "there is no num_layers, or no rank and scale in lora_parameters")


def _damaged(file: Path, fault: str) -> ConfigError:
    return ConfigError(
        f"The adapter {named(str(file))} cannot be read ({fault}); it is damaged, give another.",
        key="adapter_path",
        place=str(file),
    )

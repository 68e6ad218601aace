"""The model of a run, built through the host: quantised if asked for, with a fresh adapter."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import hf_repo_to_path, load_config
from mlx_lm_lora.train import build_lora_config
from mlx_lm_lora.utils import from_pretrained
from mlx_lm_lora.visuals import Colors, print_info

from mlx_cpo_plugin.blas import use_fast_blas
from mlx_cpo_plugin.data.encoding import read_template
from mlx_cpo_plugin.errors import ConfigError, first_line, is_device_fault
from mlx_cpo_plugin.settings.quantisation import GROUP_SIZES

QUANTISED_LOADS: dict[str, dict[str, Any]] = {
    "load_in_4bits": {"bits": 4},
    "load_in_6bits": {"bits": 6},
    "load_in_8bits": {"bits": 8},
    "load_in_mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}


def load_model(settings: SimpleNamespace) -> tuple[nn.Module, Any]:
    """Load the model with fresh adapters, the same ones for the same seed.

    Raises:
        ConfigError: the model cannot be loaded or quantised as asked, or ``resume_adapter_file`` belongs to another
            kind of adapter.
    """
    use_fast_blas()
    np.random.seed(settings.seed)
    mx.random.seed(settings.seed)
    print_info(f"Loading model: {Colors.CYAN}{settings.model}{Colors.RESET}")
    try:
        model, tokenizer, _ = from_pretrained(model=settings.model, lora_config=build_lora_config(settings))
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        if is_device_fault(error):
            raise
        raise ConfigError(
            f"model {settings.model!r} cannot be loaded ({first_line(error)}); check its files or take another model."
        ) from error
    if settings.resume_adapter_file is not None and settings.train:
        check_resumed_adapter(settings, len(model.layers))
    precision = quantised_load(settings)
    if precision:
        if "quantization" in load_config(model_folder(settings.model)):
            raise ConfigError(f"model {settings.model!r} is quantised already; remove {precision}.")
        print_info(quantise_base(model, precision))
    if settings.num_layers > len(model.layers):
        print_info(f"num_layers is {settings.num_layers}; all {len(model.layers)} layers of the model are trained.")
    freeze_untrained_layers(model, settings)
    template = read_template(getattr(settings, "chat_template", None))
    if template:
        tokenizer.chat_template = template  # which a fused model takes along
    return model, tokenizer


def quantised_load(settings: Any) -> str | None:
    """Return the key of the precision to load in, if one is set."""
    return next((key for key in QUANTISED_LOADS if getattr(settings, key)), None)


def freeze_untrained_layers(model: nn.Module, settings: Any) -> None:
    """Leave only the last ``num_layers`` layers to be trained, in full training of some layers."""
    if settings.train_type == "full" and settings.num_layers > 0:
        model.freeze()
        for layer in model.layers[-settings.num_layers :]:
            layer.unfreeze()


def quantise_base(model: nn.Module, key: str) -> str:
    """Quantise the base weights of ``model`` as the setting ``key`` says; return what was done, in a sentence.

    The groups are the largest that divide the width of every layer; a layer that no group divides stays as it is.

    Raises:
        ConfigError: there is no layer that can be quantised.
    """
    packing = {"group_size": group_size_for(model), **QUANTISED_LOADS[key]}
    if packing["group_size"] is None:
        raise ConfigError(
            f"{key} needs layers whose width divides by {min(GROUP_SIZES)}; remove it: the model has none."
        )
    left_out = [module for module in quantisable_layers(model) if module.weight.shape[-1] % packing["group_size"]]
    kept = {id(module) for module in left_out}
    nn.quantize(
        model, **packing, class_predicate=lambda _, module: hasattr(module, "to_quantized") and id(module) not in kept
    )
    if hasattr(model, "args"):
        model.args.quantization = {"mode": "affine", **packing}
        model.args.quantization_config = model.args.quantization
    sentence = f"{key}: weights of {packing['bits']} bits, in groups of {packing['group_size']}"
    if not left_out:
        return f"{sentence}."
    widths = ", ".join(str(width) for width in sorted({module.weight.shape[-1] for module in left_out}))
    return f"{sentence}; {len(left_out)} layers, {widths} wide, do not divide by that and stay as they are."


def group_size_for(model: nn.Module) -> int | None:
    """Return the largest group size of MLX that divides all widths that one divides; ``None`` where none does."""
    widths = [module.weight.shape[-1] for module in quantisable_layers(model)]
    divisible = [width for width in widths if width % min(GROUP_SIZES) == 0]
    fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in divisible)]
    return max(fitting) if divisible else None


def quantisable_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that MLX can quantise."""
    return [module for module in model.modules() if hasattr(module, "to_quantized")]


def check_resumed_adapter(settings: SimpleNamespace, layers: int) -> None:
    """Hold the settings to the ``adapter_config.json`` beside ``resume_adapter_file``.

    Without this an adapter of another scale, which its file does not show, would begin as something else.

    Args:
        layers: how many the model has.

    Raises:
        ConfigError: the adapter is of another kind, rank, scale or number of layers than the settings ask for.
    """
    file = Path(settings.resume_adapter_file)
    folders = [file.parent] + ([file.parents[2]] if file.parent.parent.name.startswith("checkpoints") else [])
    config_file = next((path for folder in folders if (path := folder / "adapter_config.json").is_file()), None)
    if config_file is None:
        print_info(f"There is no adapter_config.json beside {file}: lora_parameters and num_layers are the settings'.")
        return
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        saved = saved_adapter(config, layers)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{config_file} cannot be read ({first_line(error)}); restore or remove it.") from error
    wanted: dict[str, Any] = {
        "train_type": settings.train_type,
        "num_layers": counted(settings.num_layers, layers),
        **{f"lora_parameters.{key}": value for key, value in settings.lora_parameters.items()},
    }
    if saved["train_type"] == "full" or wanted["train_type"] == "full":
        saved = {"train_type": saved["train_type"]}
    differing = {key: value for key, value in saved.items() if value is not None and wanted.get(key) != value}
    dropout = differing.pop("lora_parameters.dropout", None)
    if differing:
        told = ", ".join(f"{key} {value} (here {wanted.get(key, 'all')})" for key, value in differing.items())
        raise ConfigError(
            f"resume_adapter_file {str(file)!r} was trained with {told}, as {config_file} says; set these likewise."
        )
    if dropout is not None:
        here = wanted["lora_parameters.dropout"]
        print_info(f"The adapter was trained with dropout {dropout}; it goes on with {here}.")


def saved_adapter(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return what an ``adapter_config.json`` of mlx_lm or mlx-lm-lora says, under the names of the settings."""
    parameters = config.get("lora_parameters") or {}
    kind = config.get("fine_tune_type") or config.get("train_type")
    if kind is None and "use_dora" in parameters:
        kind = "dora" if parameters["use_dora"] else "lora"
    number = config.get("num_layers", parameters.get("num_layers"))
    return {
        "train_type": kind,
        "num_layers": None if number is None else counted(int(number), layers),
        **{f"lora_parameters.{key}": parameters.get(key) for key in ("rank", "scale", "dropout", "keys")},
    }


def counted(num_layers: int, layers: int) -> int:
    """Return how many layers ``num_layers`` means; below 1 it means all."""
    return layers if num_layers < 1 else min(num_layers, layers)


def model_folder(model: str) -> Path:
    """Return the local folder of a model that has been loaded."""
    return Path(model) if Path(model).exists() else Path(hf_repo_to_path(model))

"""The model and the optimizer of a run, built through the host: quantised if asked for, with a fresh adapter."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import mlx.optimizers.schedulers as schedulers
import numpy as np
from mlx_lm.tuner.utils import build_schedule, linear_to_lora_layers
from mlx_lm.utils import hf_repo_to_path, load_config
from mlx_lm.utils import load_model as load_base_model
from mlx_lm_lora.train import build_lora_config
from mlx_lm_lora.utils import from_pretrained
from mlx_lm_lora.visuals import Colors, print_info

from mlx_cpo_plugin.blas import use_fast_blas
from mlx_cpo_plugin.checkpoints import ADAPTER_CONFIG, ADAPTER_FILE, CHECKPOINTS
from mlx_cpo_plugin.checkpoints.adapter import adaptable_modules, adaptable_outside_layers, read_without_call
from mlx_cpo_plugin.console import ESCAPES, is_live
from mlx_cpo_plugin.data.batches import BatchSize, micro_batches_of, training_plan
from mlx_cpo_plugin.data.chat_template import read_template
from mlx_cpo_plugin.errors import ConfigError, first_line, is_device_fault, shown
from mlx_cpo_plugin.host import SFTTrainingArgs
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.settings.nested import OPTIMIZERS, WHOLE_RUN
from mlx_cpo_plugin.settings.options import GROUP_SIZES
from mlx_cpo_plugin.training.quantizer import USUAL_GROUP_SIZE
from mlx_cpo_plugin.types import Tokenizer, Values

QUANTISED_LOADS: dict[str, Values] = {
    "load_in_4bits": {"bits": 4},
    "load_in_6bits": {"bits": 6},
    "load_in_8bits": {"bits": 8},
    "load_in_mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}


def info(line: str) -> None:
    """Print a line as the host prints information, without its colours where none are shown."""
    if is_live(sys.stdout):
        print_info(line)
    else:
        print(f"[INFO] {ESCAPES.sub('', line)}")


def load_model(settings: RunSettings, loaded: tuple[nn.Module, Tokenizer] | None = None) -> tuple[nn.Module, Tokenizer]:
    """Load model and tokenizer, or take those that are loaded; the model gets a fresh adapter, the same for a seed.

    Raises:
        ConfigError: the model cannot be loaded or quantised as asked, or an adapter that
            is resumed or tested is of another kind.
    """
    use_fast_blas()
    np.random.seed(settings.seed)
    mx.random.seed(settings.seed)
    if loaded is None:
        info(f"Loading model: {Colors.CYAN}{settings.model}{Colors.RESET}")
    with _loading(settings):
        model, tokenizer = loaded or from_pretrained(model=settings.model)[:2]
        choose_trained_weights(model, settings)
    _fit_to_settings(model, settings)
    template = read_template(settings.chat_template)
    if template:
        tokenizer.chat_template = template  # which a fused model takes along
    return model, tokenizer


@contextmanager
def _loading(settings: RunSettings) -> Iterator[None]:
    """Turn what a model's files raise into ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        if is_device_fault(error):
            raise
        raise ConfigError(
            f"model {settings.model!r} cannot be loaded ({first_line(error)}); check its files or take another model.",
            key="model",
        ) from error


def _fit_to_settings(model: nn.Module, settings: RunSettings) -> None:
    """Quantise the base weights as asked for, and check what the settings assume of the model."""
    if settings.resume_adapter_file is not None and settings.train:
        _check_adapter(settings, model, "resume_adapter_file", Path(settings.resume_adapter_file))
    elif settings.adapter_path and not settings.train:
        _check_adapter(settings, model, "adapter_path", Path(settings.adapter_path) / ADAPTER_FILE)
    precision = quantised_load(settings)
    if precision:
        if any("scales" in module for module in model.modules()):
            raise ConfigError(f"The model is quantised already; remove {precision}.", key=precision)
        info(quantise_base(model, precision))
    if settings.num_layers > len(model.layers):
        info(f"num_layers is {settings.num_layers}; all {len(model.layers)} layers of the model are trained.")


def unevaluated_model(settings: RunSettings) -> nn.Module:
    """Return the model that ``settings`` would train, with its adapter; none of its arrays is evaluated.

    Raises:
        ConfigError: as :func:`load_model`.
    """
    with _loading(settings):
        model, _ = load_base_model(model_folder(settings.model), lazy=True)
        choose_trained_weights(model, settings)
    _fit_to_settings(model, settings)
    return model


def is_on_this_machine(model: str) -> bool:
    """Whether the files of a model need not be fetched."""
    try:
        return bool(model) and model_folder(model).is_dir()  # one that a call gave has no name
    except Exception:  # the hub client raises many kinds for what is not in its cache
        return False


def positions_of(model: str) -> int | None:
    """Return the ``max_position_embeddings`` of a model, if it is on this machine and its configuration has them."""
    config = load_config(model_folder(model)) if is_on_this_machine(model) else {}
    return positions_in(config)


def positions_in(config: Values) -> int | None:
    """Return the ``max_position_embeddings`` of a model's ``config.json``, if it has them."""
    of_text = config.get("text_config") or {}
    positions = config.get("max_position_embeddings") or of_text.get("max_position_embeddings")
    return positions if isinstance(positions, int) else None


def model_folder(model: str) -> Path:
    """Return the local folder of a model.

    Raises:
        Exception: of many kinds, whatever the hub client raises for one that is not in its cache and cannot be fetched.
    """
    return Path(model) if Path(model).exists() else Path(hf_repo_to_path(model))


def choose_trained_weights(model: nn.Module, settings: RunSettings) -> None:
    """Add fresh adapters, or in full training leave only the last ``num_layers`` trainable."""
    adapter = build_lora_config(settings)
    if adapter is not None:
        model.freeze()
        keys = settings.lora_parameters.get("keys")
        if keys:
            _check_keys(keys, model, settings.num_layers)
            adapter["keys"] = keys  # which the host leaves out
        elif left_out := read_without_call(model):
            adapter["keys"] = sorted(set().union(*map(adaptable_modules, model.layers)) - left_out)
            info(f"No adapter for {', '.join(sorted(left_out))}: the model's code reads these weights by itself.")
        linear_to_lora_layers(model, adapter["num_layers"], adapter, use_dora=adapter["use_dora"])
    elif settings.num_layers > 0:
        model.freeze()
        for layer in model.layers[-settings.num_layers :]:
            layer.unfreeze()


def _check_keys(keys: Sequence[str], model: nn.Module, num_layers: int) -> None:
    """Refuse a module that none of the trained layers has, and that is not outside of all: mlx_lm passes over it."""
    known = sorted(set().union(*map(adaptable_modules, model.layers[-max(num_layers, 0) :])))
    outside = adaptable_outside_layers(model)
    read = read_without_call(model)
    for key in keys:
        if key in read:
            raise ConfigError(
                f"lora_parameters.keys has {shown(key)}, but the model's code reads its weight by itself, past an "
                "adapter; leave it out.",
                key="lora_parameters.keys",
            )
        if key in known or key in outside:
            continue
        last = key.rpartition(".")[2]
        near = [name for name in known if name.rpartition(".")[2] == last] or get_close_matches(key, known, n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}."
        raise ConfigError(
            f"lora_parameters.keys has {shown(key)}, but no trained layer of the model has such a module; {advice}",
            key="lora_parameters.keys",
            allowed=", ".join(near or known),
        )


def quantised_load(settings: RunSettings) -> str | None:
    """Return the key of the precision to load in, if one is set."""
    return next((key for key in QUANTISED_LOADS if getattr(settings, key)), None)


def quantise_base(model: nn.Module, key: str) -> str:
    """Quantise the base weights of ``model`` as the setting ``key`` says; return one sentence on what was done.

    The groups are the largest that divide the width of every layer; a layer that no group divides stays as it is, and
    one for which the model asks for more bits, such as a router, gets these, as where mlx_lm converts it.

    Raises:
        ConfigError: there is no layer that can be quantised.
    """
    packing = {"group_size": group_size_for(model), **QUANTISED_LOADS[key]}
    size = packing["group_size"]
    if size is None:
        raise ConfigError(
            f"{key} needs layers whose width divides by {min(GROUP_SIZES)}; remove it: the model has none.",
            key=key,
        )

    asked_for = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    own: dict[str, Values] = {}
    left_out: list[int] = []

    def how(path: str, module: nn.Module) -> Values | bool:
        if not hasattr(module, "to_quantized"):
            return False
        width = module.weight.shape[-1]
        if width % size:
            left_out.append(width)
            return False
        wanted: Values | bool = asked_for(path, module)
        if isinstance(wanted, dict):
            fits = width % wanted.get("group_size", USUAL_GROUP_SIZE) == 0
            own[path] = wanted = wanted if fits else wanted | {"group_size": size}
        return wanted

    nn.quantize(model, **packing, class_predicate=how)
    if hasattr(model, "args"):
        model.args.quantization = model.args.quantization_config = {"mode": "affine", **packing, **own}
    sentence = f"{key}: weights of {packing['bits']} bits, in groups of {size}"
    if own:
        bits = " or ".join(map(str, sorted({layer.get("bits", packing["bits"]) for layer in own.values()})))
        sentence += f"; {len(own)} layers of {bits} bits, as the model asks"
    if left_out:
        widths = ", ".join(map(str, sorted(set(left_out))))
        sentence += f"; {len(left_out)} layers, {widths} wide, do not divide by that and stay as they are"
    return f"{sentence}."


def group_size_for(model: nn.Module) -> int | None:
    """Return the largest group size of MLX that divides all widths that one divides; ``None`` where none does."""
    widths = [module.weight.shape[-1] for module in _quantisable_layers(model)]
    divisible = [width for width in widths if width % min(GROUP_SIZES) == 0]
    fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in divisible)]
    return max(fitting) if divisible else None


def _quantisable_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "to_quantized")]


def _check_adapter(settings: RunSettings, model: nn.Module, key: str, file: Path) -> None:
    """Compare the settings with the ``adapter_config.json`` beside an adapter, by mlx_lm or mlx-lm-lora.

    Without this an adapter of another scale, which its file does not show, would be something else here.

    Args:
        key: of the setting that names it.
    """
    folders = [file.parent] + ([file.parents[2]] if file.parent.parent.name.startswith(CHECKPOINTS) else [])
    config_file = next((path for folder in folders if (path := folder / ADAPTER_CONFIG).is_file()), None)
    if config_file is None:
        info(f"There is no {ADAPTER_CONFIG} beside {file}: lora_parameters and num_layers are the settings'.")
        return

    layers = len(model.layers)

    def adapted(num_layers: int) -> int:
        return layers if num_layers < 1 else min(num_layers, layers)

    wanted: Values = {"train_type": settings.train_type, "num_layers": adapted(settings.num_layers)}
    wanted |= {f"lora_parameters.{key}": settings.lora_parameters[key] for key in ("rank", "scale", "dropout")}
    there, outside = set().union(*map(adaptable_modules, model.layers)), adaptable_outside_layers(model)

    def modules(keys: Sequence[str] | None) -> str:
        found = there if keys is None else (there | outside).intersection(keys)
        return "all" if found == there else f"[{', '.join(sorted(found))}]"

    wanted["lora_parameters.keys"] = modules(settings.lora_parameters.get("keys"))
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        parameters = config.get("lora_parameters") or {}
        kind = config.get("fine_tune_type") or config.get("train_type")
        if kind is None and "use_dora" in parameters:
            kind = "dora" if parameters["use_dora"] else "lora"
        number = config.get("num_layers", parameters.get("num_layers"))
        saved = {
            "train_type": kind,
            "num_layers": None if number is None else adapted(int(number)),
            **{f"lora_parameters.{key}": parameters.get(key) for key in ("rank", "scale", "dropout")},
            "lora_parameters.keys": modules(parameters.get("keys")),
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{config_file} cannot be read ({first_line(error)}); restore or remove it.",
            key=key,
            place=str(config_file),
        ) from error
    if "full" in (saved["train_type"], wanted["train_type"]):
        saved = {"train_type": saved["train_type"]}
    differing = {name: value for name, value in saved.items() if value is not None and wanted.get(name) != value}
    dropout = differing.pop("lora_parameters.dropout", None)
    if differing:
        told = ", ".join(f"{name} {value} (here {wanted[name]})" for name, value in differing.items())
        raise ConfigError(
            f"{key} {str(file)!r} was trained with {told}, as {config_file} says; set these likewise.",
            key=", ".join(differing),
            place=str(config_file),
            allowed=", ".join(str(value) for value in differing.values()),
        )
    if dropout is not None and settings.train:
        here = wanted["lora_parameters.dropout"]
        info(f"The adapter was trained with dropout {dropout}; it goes on with {here}.")


def build_optimizer(settings: RunSettings, steps: int = 1) -> optimizers.Optimizer:
    """Return the optimizer with its learning rate or schedule.

    Args:
        steps: optimizer steps of the run, which the schedules by name and ``warmup_ratio`` span.

    Raises:
        ConfigError: ``lr_schedule`` or ``optimizer_config`` holds what the schedule or optimizer does not take.
    """
    name = settings.optimizer.lower()
    try:
        rate = _learning_rate(settings, steps)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"lr_schedule {settings.lr_schedule!r} cannot be built ({error}); correct it.", key="lr_schedule"
        ) from error
    try:
        # Adafactor's own default is to pass over the learning rate.
        arguments = ({"relative_step": False} if name == "adafactor" else {}) | settings.optimizer_config.get(name, {})
        return getattr(optimizers, OPTIMIZERS[name])(learning_rate=rate, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optimizer_config for {name!r} is not accepted ({error}); correct it.", key="optimizer_config"
        ) from error


def _learning_rate(settings: RunSettings, steps: int) -> float | Callable[[mx.array], mx.array]:
    """Return the learning rate, or the schedule of it by the number of steps that are done."""
    schedule = dict(settings.lr_schedule or {"name": "constant"})
    warmup = schedule.setdefault("warmup", math.ceil(settings.warmup_ratio * steps))
    name, rate = schedule["name"], settings.learning_rate
    built: Callable[[mx.array], mx.array]
    if name not in WHOLE_RUN:
        built = build_schedule(schedule)
        return built
    if name == "constant" and not warmup:
        return rate
    # As in transformers the rate peaks in the step after the warm-up, and reaches its end one step after the run.
    rest = max(1, steps - warmup)
    ends = {"constant": rate, "linear": 0.0}
    built = schedulers.linear_schedule(rate, ends[name], rest) if name in ends else schedulers.cosine_decay(rate, rest)
    if warmup:
        rising = schedulers.linear_schedule(schedule.get("warmup_init", 0.0), rate, warmup)
        built = schedulers.join_schedules([rising, built], [warmup])
    return built


def optimizer_steps(settings: RunSettings, train_set: Sequence[Any]) -> int:
    """Return the optimizer steps of a run of ``settings.iters``, at least 1."""
    if not train_set:
        return 1
    size = BatchSize(settings.batch_size, settings.batch_tokens, settings.gradient_accumulation_steps)
    lengths = [0 if settings.batch_tokens is None else pair.tokens for pair in train_set]
    plan = training_plan(lengths, size, iters=settings.iters or 1, seed=settings.seed)
    return sum(micro_batch.closes_window for micro_batch in plan)


def iterations(settings: RunSettings, train_set: Sequence[Any], say: Callable[[str], None] = info) -> int:
    """Return ``iters``, or what ``epochs`` amounts to, or the host's default."""
    if settings.iters is not None:
        return int(settings.iters)
    if settings.epochs is not None:
        batch_tokens = settings.batch_tokens
        if batch_tokens is None:
            return int(settings.epochs) * math.ceil(len(train_set) / settings.batch_size)
        size = BatchSize(settings.batch_size, batch_tokens)
        return micro_batches_of(settings.epochs, [pair.tokens for pair in train_set], size, settings.seed)
    default = int(SFTTrainingArgs().iters)
    say(f"Neither iters nor epochs is set; training for {default} iterations.")
    return default

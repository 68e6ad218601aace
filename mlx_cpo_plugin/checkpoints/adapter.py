"""Adapters on disk: written atomically, loadable by mlx_lm, and read back."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from mlx_cpo_plugin.atomic_files import replace_whole
from mlx_cpo_plugin.checkpoints import ADAPTER_CONFIG
from mlx_cpo_plugin.errors import UserError, is_out_of_memory
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.types import Values

_DORA_LAYERS = (DoRALinear, DoRAEmbedding)
_ADAPTED_LAYERS = (LoRALinear, LoRASwitchLinear, LoRAEmbedding, *_DORA_LAYERS)
# As mlx_lm.tuner.utils.linear_to_lora_layers has them, beside what has a method to_lora.
_ADAPTABLE_LAYERS = (
    *(nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding),
    *(SwitchLinear, QuantizedSwitchLinear),
)


class CheckpointError(UserError):
    """An adapter or checkpoint cannot be written or read, or is not what was trained."""


def save_adapter(model: nn.Module, adapter_file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the trainable parameters to ``adapter_file`` (safetensors) with metadata, atomically."""
    weights = by_name(model.trainable_parameters())
    write_atomically(adapter_file, lambda path: mx.save_safetensors(str(path), weights, dict(metadata or {})))


def save_adapter_config(model: nn.Module, adapter_file: Path) -> None:
    """Write ``adapter_config.json`` so that ``mlx_lm.load(..., adapter_path=)`` rebuilds the adapter's layers.

    What :func:`describe_adapter` returns is written into it; other keys of an existing file are kept.
    """
    path = adapter_file.parent / ADAPTER_CONFIG
    config: Values = {}
    with suppress(OSError, ValueError, TypeError):  # none, or a torn one: all that matters is written below
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    text = json.dumps(config | describe_adapter(model), indent=4, sort_keys=True, default=str)
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def describe_adapter(model: nn.Module) -> Values:
    """Return ``fine_tune_type``, ``num_layers`` and ``lora_parameters`` of a model as mlx_lm's loader reads them."""
    adapters = [module for module in model.modules() if isinstance(module, _ADAPTED_LAYERS)]
    if not adapters:
        return {"fine_tune_type": "full", "num_layers": -1, "lora_parameters": {}}
    layers = [_adapted_modules(layer) for layer in model.layers]
    # The first layer that has one: not each of a hybrid model's has every kind of module.
    start = next((number for number, adapted in enumerate(layers) if adapted), 0)
    adapted = set().union(*layers)
    # mlx_lm takes whole paths, too, but none unless they are named.
    outside = adaptable_outside_layers(model) & _adapted_modules(model)
    is_every = adapted >= set().union(*map(adaptable_modules, model.layers[start:])) and not outside
    targets = {} if is_every else {"keys": sorted(adapted | outside)}
    first = adapters[0]
    return {
        "fine_tune_type": "dora" if isinstance(first, _DORA_LAYERS) else "lora",
        # mlx_lm takes the last n layers, and all of them for any n < 1.
        "num_layers": len(model.layers) - start if start else -1,
        "lora_parameters": {
            "rank": int(first.lora_a.shape[1 if not isinstance(first, LoRASwitchLinear) else -2]),
            "scale": float(first.scale),
            "dropout": round(1 - first.dropout._p_1, 6),
            **targets,
        },
    }


def adaptable_modules(layer: nn.Module) -> set[str]:
    """Return the paths inside a layer of the modules that have an adapter, or that mlx_lm could give one."""
    adapted = _adapted_modules(layer)
    return adapted | {
        name
        for name, module in layer.named_modules()
        if (isinstance(module, _ADAPTABLE_LAYERS) or hasattr(module, "to_lora"))
        and not any(name.startswith(f"{path}.") for path in adapted)
    }


def read_without_call(model: nn.Module) -> set[str]:
    """Return the paths inside layers of such modules whose weight the code around them reads, past an adapter."""
    found = set()
    for layer in model.layers:
        modules = dict(layer.named_modules())
        for path in adaptable_modules(layer):
            owner, _, name = path.rpartition(".")
            if owner in modules and name in _weights_read_in(modules[owner].__class__):  # one of a list has no name
                found.add(path)
    return found


@cache
def _weights_read_in(kind: type) -> frozenset[str]:
    """Return the attributes of which the code of a class reads the weight; none where there is no source of it."""
    try:
        return frozenset(re.findall(r"\bself\.(\w+)\.weight\b", inspect.getsource(kind)))
    except (OSError, TypeError):
        return frozenset()


def adaptable_outside_layers(model: nn.Module) -> set[str]:
    """Return the paths of such modules that are in no layer, as an embedding or a head."""
    inside = {id(module) for layer in model.layers for module in layer.modules()}
    paths = {name for name, module in model.named_modules() if id(module) not in inside}
    return paths & adaptable_modules(model)


def _adapted_modules(layer: nn.Module) -> set[str]:
    return {name for name, module in layer.named_modules() if "lora_a" in module}


def load_adapter(model: nn.Module, adapter_file: Path) -> None:
    """Load parameters saved by :func:`save_adapter` into a model that trains the same ones, each in the model's dtype.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds other names or shapes than the model trains.
    """
    own = by_name(model.trainable_parameters())
    saved = _read(adapter_file, own)
    model.update(tree_unflatten([(name, value.astype(own[name].dtype)) for name, value in saved.items()]))


@contextmanager
def adapter_in_place(model: nn.Module, adapter_file: Path) -> Iterator[None]:
    """Give ``model`` the parameters in ``adapter_file`` until the context ends; then it has its own again."""
    own = by_name(model.trainable_parameters())
    load_adapter(model, adapter_file)
    try:
        yield
    finally:
        model.update(tree_unflatten(list(own.items())))


def verify_adapter(model: nn.Module, adapter_file: Path) -> None:
    """Check that the file holds the trainable parameters of ``model`` bit for bit; the model is not touched.

    Raises:
        CheckpointError: the file is missing or unreadable, or a parameter differs.
    """
    own = by_name(model.trainable_parameters())
    saved = _read(adapter_file, own)
    for name, value in own.items():
        if saved[name].dtype != value.dtype or not mx.array_equal(saved[name], value, equal_nan=True).item():
            raise CheckpointError(
                f"{name!r} in the adapter {adapter_file} is not what was trained; another process or the disk "
                "changed it.",
                place=str(adapter_file),
            )


def save_and_verify(
    model: nn.Module, adapter_file: Path, say: Callable[[str], None], metadata: Mapping[str, str] | None = None
) -> None:
    """Save the adapter and read it back; if something has happened to the file, say so and write it once more."""
    save_adapter(model, adapter_file, metadata)
    try:
        verify_adapter(model, adapter_file)
    except CheckpointError as error:
        say(f"{error} It is written again.")
        save_adapter(model, adapter_file, metadata)
        verify_adapter(model, adapter_file)


def adapter_metadata(adapter_file: Path) -> dict[str, str]:
    """Return what a file of :func:`save_adapter` says of itself.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    with _readable(adapter_file):
        loaded: Any = mx.load(str(adapter_file), return_metadata=True)
    return dict(loaded[1])


def _read(adapter_file: Path, expected: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Return the arrays in ``adapter_file`` by name, which are those of ``expected`` in name and shape."""
    with _readable(adapter_file):
        weights: dict[str, mx.array] = dict(mx.load(str(adapter_file)))  # type: ignore[arg-type]  # safetensors: a dict
        mx.eval(weights)
    for name, value in expected.items():
        if name in weights and weights[name].shape != value.shape:
            raise CheckpointError(
                f"The adapter {adapter_file} has {name!r} as {weights[name].shape}, but the model trains "
                f"{value.shape}; use the lora_parameters and model that it was trained with.",
                key="lora_parameters",
                place=str(adapter_file),
            )
    if differing := sorted(weights.keys() ^ expected.keys()):
        fault = "has {!r}, which the model does not train" if differing[0] in weights else "lacks {!r}"
        raise CheckpointError(
            f"The adapter {adapter_file} {fault.format(differing[0])}; set train_type, num_layers and lora_parameters "
            "to what it was trained with.",
            key="train_type",
            place=str(adapter_file),
        )
    return weights


@contextmanager
def _readable(adapter_file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"The adapter {adapter_file} cannot be read ({error}); give another file.", place=str(adapter_file)
        ) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``path``, flush to the disk, then rename: ``path`` is never half-written.

    Raises:
        CheckpointError: it cannot be written; an older file is left as it was.
    """
    try:
        replace_whole(path, write)
    except (OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path} cannot be written ({error}); free space or change adapter_path.",
            key="adapter_path",
            place=str(path),
        ) from error

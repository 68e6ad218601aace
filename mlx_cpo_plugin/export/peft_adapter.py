"""``--to peft``: an adapter that PEFT loads onto the model in PyTorch.

Both compute ``y = W x + s B A x``, PEFT with ``s = lora_alpha / r``; of DoRA both divide by the length of each row of
the sum and multiply by a learned one. mlx_lm keeps A and B transposed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from mlx_cpo_plugin.checkpoints import ADAPTER_CONFIG
from mlx_cpo_plugin.comparison.questions import Say
from mlx_cpo_plugin.export.errors import ExportError
from mlx_cpo_plugin.export.trained import Trained
from mlx_cpo_plugin.model.layers import widths
from mlx_cpo_plugin.types import Values

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LAYER = re.compile(r"model\.layers\.(?P<number>\d+)\.(?P<path>.+)")


def write_peft_adapter(trained: Trained, folder: Path, base_model: str | None, say: Say) -> list[str]:
    """Write the adapter into ``folder``, read it back, score it and return notes.

    Args:
        base_model: what PEFT loads it onto, in place of the run's model.

    Raises:
        ExportError: it is of full training, of layers that PEFT has no adapter for or that PyTorch's model does not
            have, or it does not score as it did.
    """
    adapters = _adapters(trained)
    name = base_model or trained.settings.model
    weights = {key: array for path, module in adapters.items() for key, array in _arrays(path, module).items()}
    mx.save_safetensors(str(folder / WEIGHTS), weights, {"format": "pt"})
    config = _config(adapters, trained.model, name)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _put_back(adapters, folder)
    scores = trained.scores_of(trained.model)
    if not scores.is_like(trained.scores):
        raise ExportError(
            f"Read back, the adapter gives {len(trained.rows)} held-out rows a margin of {scores.margin:+.3f} nats in "
            f"place of {trained.scores.margin:+.3f}; this is a fault of the export: please report it."
        )
    say(
        f"Read back, {len(adapters)} layers give {len(trained.rows)} held-out rows the log-probs of the adapter: a "
        f"margin of {scores.margin:+.3f} nats."
    )
    notes = []
    if trained.bits_of_base:
        notes.append(
            f"It was trained on weights of {trained.bits_of_base} bits; PyTorch's model has others, with which its "
            "answers may differ a little."
        )
        say(notes[-1] + ("" if base_model else " --base-model names the model to load it onto."))
    return notes


def _adapters(trained: Trained) -> dict[str, nn.Module]:
    """Return the layers with an adapter by their names in PyTorch's model, which are those on disk."""
    modules = {name: module for name, module in trained.model.named_modules() if "lora_a" in module}
    if not modules:
        raise ExportError(
            "PEFT holds adapters, and full training has left whole weights: export these with --to mlx or --to gguf.",
            key="to",
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in trained.base.glob("model*.safetensors"):
        shapes |= {name: tuple(array.shape) for name, array in mx.load(str(file)).items()}  # type: ignore[union-attr]  # a dict; arrays are not read
    for name, module in modules.items():
        if type(module).__name__ not in (LoRALinear.__name__, DoRALinear.__name__):
            raise ExportError(
                f"PEFT has no adapter for {name}, {type(module).__name__}; export with --to mlx.", key="to"
            )
        inputs, outputs = widths(module.linear)
        on_disk = shapes.get(f"{name}.weight")
        packed = "scales" in module.linear and f"{name}.scales" in shapes
        if not _LAYER.fullmatch(name) or not on_disk or (on_disk != (outputs, inputs) and not packed):
            raise ExportError(
                f"The layer {name} has another name or shape in PyTorch's model of type "
                f"{trained.config.get('model_type')}: PEFT would not find it. Export with --to mlx.",
                key="to",
            )
    return modules


def _arrays(path: str, module: nn.Module) -> dict[str, mx.array]:
    """Return the tensors of one layer by PEFT's names: A [r, input], B [output, r], of DoRA the lengths [output]."""
    arrays = {"lora_A.weight": module.lora_a.T, "lora_B.weight": module.lora_b.T}
    if "m" in module:
        arrays["lora_magnitude_vector"] = module.m
    return {f"{_PREFIX}{path}.{kind}": mx.contiguous(array) for kind, array in arrays.items()}


def _config(adapters: Mapping[str, nn.Module], model: nn.Module, base_model: str) -> Values:
    """Return the ``adapter_config.json`` of PEFT."""
    first = next(iter(adapters.values()))
    rank = int(first.lora_a.shape[1])
    alpha = float(first.scale) * rank
    targets, layers = _targets(adapters, model)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": round(1 - first.dropout._p_1, 6),
        "use_dora": "m" in first,
        "use_rslora": False,
        "target_modules": targets,
        "layers_to_transform": layers,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _targets(adapters: Mapping[str, nn.Module], model: nn.Module) -> tuple[list[str], list[int] | None]:
    """Return ``target_modules`` and ``layers_to_transform``: short names where PEFT finds the same layers by them."""
    layers = sorted({int(match["number"]) for name in adapters if (match := _LAYER.fullmatch(name))})
    short = {name.rpartition(".")[2] for name in adapters}

    def found(name: str) -> bool:
        match = _LAYER.fullmatch(name)
        return bool(match and int(match["number"]) in layers and name.rpartition(".")[2] in short)

    # The linear layer inside an adapter is none of PyTorch's model.
    names = {name.removesuffix(".linear") for name, module in model.named_modules() if "weight" in module}
    if {name for name in names if found(name)} != set(adapters):
        return sorted(adapters), None
    return sorted(short), None if len(layers) == len(model.layers) else layers


def _put_back(adapters: Mapping[str, nn.Module], folder: Path) -> None:
    """Give the layers what the files say, and nothing else."""
    config: Any = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    weights: Any = mx.load(str(folder / WEIGHTS))
    for name, module in adapters.items():
        module.lora_a = weights.pop(f"{_PREFIX}{name}.lora_A.weight").T
        module.lora_b = weights.pop(f"{_PREFIX}{name}.lora_B.weight").T
        module.scale = config["lora_alpha"] / config["r"]
        if config["use_dora"]:
            module.m = weights.pop(f"{_PREFIX}{name}.lora_magnitude_vector")
    if weights:
        raise ExportError(
            f"{WEIGHTS} holds {min(weights)}, of no layer; this is a fault of the export: please report it."
        )

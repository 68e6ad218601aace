"""Base models with towers for images or sound, which mlx_lm drops on loading and a fused model keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.utils import load_config

from mlx_cpo_plugin.errors import first_line, is_device_fault
from mlx_cpo_plugin.parameters import by_name

_TOWER_CONFIGS = ("vision_config", "audio_config", "video_config", "speech_config")
# Parts of names that only the language model has.
_OF_TEXT = {"language_model", "text_model", "lm_head", "embed_tokens"}


@dataclass(frozen=True)
class TextAndTowers:
    """The weights of a multimodal base model.

    Attributes:
        towers: the weights that are not the language model's, by their names on disk; not read yet.
        names: name of a parameter of the language model -> its name on disk.
    """

    towers: Mapping[str, mx.array]
    names: Mapping[str, str]

    def joined(self, model: nn.Module) -> nn.Module:
        """Return a module with the language model's present weights and the towers, all by their names on disk."""
        weights = {self._on_disk(name): value for name, value in by_name(model.parameters()).items()}
        whole = nn.Module()
        for key, value in tree_unflatten(list({**self.towers, **weights}.items())).items():
            whole[key] = value
        whole.args = model.args
        return whole

    def _on_disk(self, name: str) -> str:
        if name in self.names:
            return self.names[name]
        # Quantising and its reverse add and remove scales and biases beside a weight.
        stem, _, kind = name.rpartition(".")
        return f"{self.names[f'{stem}.weight'].rpartition('.')[0]}.{kind}"


def text_and_towers(model: nn.Module, base: Path, say: Callable[[str], None]) -> TextAndTowers | None:
    """Return the weights of a multimodal base; ``None`` if it is not multimodal, or its parts cannot be told apart.

    Which of its weights the language model has is seen from the arrays that its ``sanitize`` passes on.
    """
    if not any(key in load_config(base) for key in _TOWER_CONFIGS):
        return None
    weights: dict[str, mx.array] = {}
    for file in sorted(base.glob("model*.safetensors")):
        weights |= mx.load(str(file))  # type: ignore[arg-type]  # safetensors: a dict
    fault, kept = "", weights
    try:
        model_class: Any = type(model)
        fresh = model_class(model.args)  # sanitize changes the model, too; no array of this one is ever computed
        kept = fresh.sanitize(dict(weights)) if hasattr(fresh, "sanitize") else weights
    except Exception as error:  # architectures raise of many kinds
        if is_device_fault(error):
            raise
        fault = first_line(error)
    passed_on = {id(array): name for name, array in kept.items()}
    names = {passed_on[id(array)]: name for name, array in weights.items() if id(array) in passed_on}
    towers = {name: array for name, array in weights.items() if id(array) not in passed_on}
    towers = {name: array for name, array in towers.items() if not _OF_TEXT & set(name.split("."))}
    if not towers:
        return None
    # An adapter's layers are one level deeper than those on disk.
    own = {name.replace(".linear.", ".").replace(".embedding.", ".") for name in by_name(model.parameters())}
    own = {name for name in own if name not in names and not name.endswith((".lora_a", ".lora_b", ".m"))}
    strange = [name for name in own if f"{name.rpartition('.')[0]}.weight" not in names]
    if strange:
        fault = fault or f"{min(strange)} has no counterpart in its files"
    if any(name.endswith(".scales") for name in towers):
        fault = fault or "its towers are quantised"
    if fault:
        say(f"The base model is multimodal, but the fused model will be its language model alone ({fault}).")
        return None
    say(f"The base model is multimodal: its {len(towers)} other weights go into the fused model as they are.")
    return TextAndTowers(towers, names)

"""The model of a run as the host would build it, without loading its weights: shapes without numbers."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from mlx_lm_lora.train import build_lora_config

from mlx_cpo_plugin.run.loading import freeze_untrained_layers, model_folder, quantise_base, quantised_load


def unevaluated_model(settings: Any) -> nn.Module:
    """Return the model that ``settings`` would train, with its adapter; none of its arrays is evaluated.

    Raises:
        Exception: whatever the host or the architecture raises where the model is missing or cannot be built.
    """
    model, _ = load_model(model_folder(settings.model), lazy=True)
    adapter = build_lora_config(settings)
    if adapter is not None:
        model.freeze()
        linear_to_lora_layers(model, adapter["num_layers"], adapter, use_dora=adapter["use_dora"])
    freeze_untrained_layers(model, settings)
    precision = quantised_load(settings)
    if precision is not None:
        quantise_base(model, precision)
    return model

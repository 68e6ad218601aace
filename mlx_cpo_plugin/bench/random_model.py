"""Models of random weights: in memory, or as a folder that any trainer loads, with a tokenizer that reads numbers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import save_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_cpo_plugin.bench.cases import Case, case_of_shape, share
from mlx_cpo_plugin.bench.shapes import Shape
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.settings.config import RunSettings

_CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def random_model(config: Mapping[str, Any], seed: int) -> nn.Module:
    """Return the model of a shape's configuration, the same weights for the same seed."""
    mx.random.seed(seed)
    architecture = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model: nn.Module = architecture.Model(architecture.ModelArgs.from_dict(dict(config)))
    model.set_dtype(getattr(mx, config["torch_dtype"]))
    if "quantization" in config:
        nn.quantize(model, **config["quantization"])
    return model


def case_in_folder(shape: Shape, rows: int | None, folder: Path) -> Case:
    """Return the case of a shape whose model lies in ``folder``, with its pairs as text, for all trainers.

    Raises:
        ConfigError: not all trainers can train such a model.
    """
    if shape.bits:
        raise ConfigError("TRL cannot read a base of 4 bits; leave 4bit out of the shape, or compare with host alone.")
    case = case_of_shape(shape, rows)
    config = shape.model_config()
    end = shape.vocabulary - 1
    save_model(folder, random_model(config, case.settings.seed))
    described = config | {"architectures": [_CLASSES[shape.architecture]], "bos_token_id": None, "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    _number_tokenizer(shape.vocabulary).save_pretrained(folder)
    for pair in case.pairs:
        pair.chosen[-1] = pair.rejected[-1] = end  # others would append it
    settings = RunSettings.of(vars(case.settings) | {"model": str(folder)})
    share(settings)
    rows_of_text = [
        {"prompt": _text(pair.prompt), "chosen": " " + _text(pair.chosen), "rejected": " " + _text(pair.rejected)}
        for pair in case.pairs
    ]
    return Case(case.name, settings, case.pairs, rows=rows_of_text)


def _number_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose text is the numbers of the tokens; the last one ends an answer."""
    tokenizer = Tokenizer(models.WordLevel({str(token): token for token in range(vocabulary)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=str(vocabulary - 1))


def _text(tokens: Any) -> str:
    return " ".join(map(str, tokens.tolist()))

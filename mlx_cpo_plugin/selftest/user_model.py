"""The self-test of a user's own model and first rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin import cpo
from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import ConfigError, DataError, first_line
from mlx_cpo_plugin.host import load_chat_tokenizer
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.plugins import train_modes
from mlx_cpo_plugin.run.building import load_model
from mlx_cpo_plugin.selftest.checks import WAYS, Check, MethodFor, Outcome, compared, plain_batches, tested_objective
from mlx_cpo_plugin.selftest.float64_gradient import physical_memory
from mlx_cpo_plugin.selftest.models import shortened, unquantised
from mlx_cpo_plugin.selftest.reference import Reference, reference_of
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.wiring import training_environment

ROWS, PROMPT, ANSWER = 2, 96, 48


def checks_of_config(config_file: str) -> list[Check]:
    """Return the checks of the model and the first rows of a configuration, each row cut short.

    Raises:
        UserError: the configuration, its model or its rows are at fault.
    """
    settings = config.resolve({"config": config_file, "train": True}).settings
    mode = train_modes()[settings.train_mode]
    if mode.load_dataset is not cpo.load_dataset:
        raise ConfigError(
            f"--config takes configurations of cpo; the rows of {mode.name} are of its plugin's own kind.", key="config"
        )
    train_set, _, _ = mode.load_dataset(settings, load_chat_tokenizer(settings.model))
    pairs = shortened(list(train_set[:ROWS]), PROMPT, ANSWER)
    if not pairs:
        raise DataError(f"The first {ROWS} training rows of {config_file} have the same first {ANSWER} answer tokens.")
    user_model = _UserModel(settings, pairs)
    return [Check(f"your model: {way}", partial(user_model.check, method)) for way, method in WAYS.items()]


class _UserModel:
    """A user's model beside its float64 counterpart's results, computed when the first check asks for them."""

    def __init__(self, settings: RunSettings, pairs: Sequence[PreferencePair]) -> None:
        self.settings, self.pairs = settings, pairs
        self._model: nn.Module | None = None
        self._reference: Reference | None = None
        self._compared_with = ""

    def check(self, method_for: MethodFor) -> Outcome:
        """Compare one way to compute the gradient with float64."""
        exact = self._exact()
        model = self._trained_model()
        args = CPOTrainingArgs(recurrence_chunk_size=self.settings.recurrence_chunk_size)
        with training_environment(model, args):
            result = method_for(model, tested_objective(), self.pairs)(self.pairs, StepTotals.of(self.pairs))
            mx.eval(result)
        outcome = compared(result, exact, _lowest_precision(model))
        return replace(outcome, detail="; ".join(filter(None, [outcome.detail, self._compared_with])))

    def _exact(self) -> Reference:
        if self._reference is None:
            try:
                model = unquantised(self._loaded())
                needed = sum(value.size for value in by_name(model.parameters()).values()) * mx.float64.size
                if 2 * needed > physical_memory():  # activations and gradients need room beside the weights
                    raise ValueError(f"it takes {needed / 1e9:.0f} GB in float64, more than half of the memory")
                self._reference = reference_of(model, self.pairs, tested_objective(), recompute=True)
            except ValueError as error:
                self._compared_with = f"compared with plain batches on this device, since {first_line(error)}"
                with training_environment(self._trained_model(), CPOTrainingArgs()):
                    method = plain_batches(self._trained_model(), tested_objective(), self.pairs)
                    self._reference = Reference.of_result(method(self.pairs, StepTotals.of(self.pairs)))
        return self._reference

    def _trained_model(self) -> nn.Module:
        if self._model is None:
            self._model = self._loaded()
        return self._model

    def _loaded(self) -> nn.Module:
        """Load the model with adapters that are not zero, the same ones each time."""
        model, _ = load_model(self.settings)
        with mx.stream(mx.cpu):
            mx.random.seed(self.settings.seed + 1)
            for _, module in model.named_modules():
                if "lora_b" in module:
                    module.lora_b = 0.01 * mx.random.normal(module.lora_b.shape).astype(module.lora_b.dtype)
            mx.eval(model.parameters())
        return model


def _lowest_precision(model: nn.Module) -> mx.Dtype:
    floats = [value.dtype for value in by_name(model.parameters()).values() if mx.issubdtype(value.dtype, mx.floating)]
    return max(floats, key=lambda dtype: float(mx.finfo(dtype).eps))

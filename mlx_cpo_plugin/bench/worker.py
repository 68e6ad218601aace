"""One measured process: ``python -m mlx_cpo_plugin.bench.worker FOLDER`` does the job that lies in a folder.

Each trainer runs in a process of its own, so neither inherits memory, caches or replaced functions from the other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import get_total_parameters

from mlx_cpo_plugin.bench import host_trainer
from mlx_cpo_plugin.bench.cases import load_pairs
from mlx_cpo_plugin.bench.counting import Work, counted_work
from mlx_cpo_plugin.bench.job import COUNT, EPOCH, HOST, REFERENCE, TIME, Job, Measurement, gradient_file
from mlx_cpo_plugin.bench.random_model import random_model
from mlx_cpo_plugin.bench.recording import peak_resident, tell_progress
from mlx_cpo_plugin.bench.reference_gradient import ReferenceLoss, reference_gradient
from mlx_cpo_plugin.blas import in_use, use_fast_blas
from mlx_cpo_plugin.checkpoints import ADAPTER_FILE
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.run.building import build_optimizer, load_model
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, train_cpo

ADAPTER_SCALE = 0.01


class IterationRecorder:
    """A training callback that keeps time and tokens of each iteration, and the work of the second one.

    Whatever a trainer tries out before it begins would count with the first iteration.
    """

    def __init__(self, work: Work | None) -> None:
        self.seconds: list[float] = []
        self.processor_times: list[float] = [time.process_time()]
        self.tokens: list[int] = [0]
        self.losses: list[float] = []
        self.work = work
        self.backbone_tokens: int | None = None
        self.head_positions: float | None = None

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        """Take note of one iteration."""
        self.seconds.append(1 / info["iterations_per_second"])
        self.processor_times.append(time.process_time())
        self.tokens.append(int(info["trained_tokens"]))
        self.losses.append(float(info["train_loss"]))
        if self.work is not None:
            if len(self.seconds) == 2:
                self.backbone_tokens, self.head_positions = self.work.backbone_tokens, self.work.head_tokens
            self.work.clear()
        tell_progress(len(self.seconds))

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        """Nothing is validated."""


def main() -> None:
    """Do the job in the folder that the command line names, and leave what was found there."""
    folder = Path(sys.argv[1])
    job = Job.load(folder)
    use_fast_blas()  # so that both trainers multiply with the same one
    if job.trainer == REFERENCE:
        compute_reference(job, folder)
    else:
        measure(job, folder).save(folder)


def compute_reference(job: Job, folder: Path) -> None:
    """Build the model, and leave the float64 gradient of the job's first batch in ``folder``."""
    mx.disable_compile()
    settings = RunSettings.of(job.settings)
    model = build_model(job, settings)
    model.train()
    pairs = load_pairs(Path(job.pairs_file))
    batch = [pairs[index] for index in job.batches[0]]
    gradient = reference_gradient(model, batch, ReferenceLoss.from_settings(settings), tell_progress)
    with mx.stream(mx.cpu):
        save_gradient(gradient_file(folder), gradient)


def measure(job: Job, folder: Path) -> Measurement:
    """Build the model, train it for the job's iterations, and return what was found."""
    counts = job.task == COUNT
    if counts:
        mx.disable_compile()
    settings = RunSettings.of(job.settings)
    model = build_model(job, settings)
    optimizer = build_optimizer(settings)
    if counts:
        keep_first_gradient(optimizer, gradient_file(folder))
    arguments = CPOTrainingArgs.from_settings(settings, folder / ADAPTER_FILE)
    pairs = load_pairs(Path(job.pairs_file))
    patches: list[str] = []

    mx.reset_peak_memory()
    with counted_work(model) if counts else nullcontext() as work:
        recorder = IterationRecorder(work)
        if job.trainer == HOST:
            batches = None if job.task == EPOCH else job.batches
            patches = host_trainer.train(model, optimizer, pairs, batches, arguments, recorder)
        else:
            train_cpo(model, optimizer, pairs, None, arguments, training_callback=recorder)
    blas = in_use()
    return Measurement(
        seconds=recorder.seconds,
        processor_seconds=np.diff(recorder.processor_times).tolist(),
        scored_tokens=np.diff(recorder.tokens).tolist(),
        peak_memory=mx.get_peak_memory(),
        peak_resident=peak_resident(),
        weights=layer_weights(model),
        head_weights=head_weights(model),
        patches=patches,
        losses=recorder.losses,
        blas=blas.name if blas else "",
        dtype=dtype_of(model),
        backbone_tokens=recorder.backbone_tokens,
        head_positions=recorder.head_positions,
    )


def build_model(job: Job, settings: RunSettings) -> nn.Module:
    """Return the job's model with adapters, the same weights for the same seed; those that are timed begin at zero."""
    if job.model_config is None:
        model, _ = load_model(settings)
    else:
        model = random_model(job.model_config, settings.seed)
        model.freeze()
        linear_to_lora_layers(model, settings.num_layers, settings.lora_parameters)
    if job.task not in (TIME, EPOCH):
        fill_adapters(model, settings.seed + 1)
    mx.eval(model.parameters())
    return model


def fill_adapters(model: nn.Module, seed: int) -> None:
    """Give B of each adapter numbers: at zero, as it begins, the gradient of A would be zero and nothing to compare."""
    mx.random.seed(seed)
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = (ADAPTER_SCALE * mx.random.normal(module.lora_b.shape)).astype(module.lora_b.dtype)


def keep_first_gradient(optimizer: optimizers.Optimizer, file: Path) -> None:
    """Let ``optimizer`` write the first gradient that it is given, in float32."""
    apply_gradients = optimizer.apply_gradients

    def keeping_gradients(gradients: dict[str, Any], parameters: dict[str, Any]) -> Any:
        if not file.exists():
            save_gradient(file, by_name(gradients))
        return apply_gradients(gradients, parameters)

    optimizer.apply_gradients = keeping_gradients  # type: ignore[method-assign]  # this one optimizer only


def save_gradient(file: Path, gradient: Mapping[str, mx.array]) -> None:
    """Write a gradient in float32."""
    mx.save_safetensors(str(file), {name: value.astype(mx.float32) for name, value in gradient.items()})


def dtype_of(model: nn.Module) -> str:
    """Return the dtype of the weights, adapters aside; ``4 bits`` and the like where they are quantised."""
    for module in model.modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            return f"{module.bits} bits"
    weights = by_name(model.parameters())
    return next(str(value.dtype) for name, value in weights.items() if "lora" not in name).removeprefix("mlx.core.")


def layer_weights(model: nn.Module) -> int | None:
    """Return how many weights of the layers a token is multiplied with; ``None`` where experts are picked."""
    if any(isinstance(module, SwitchLinear | QuantizedSwitchLinear) for module in model.modules()):
        return None
    return sum(get_total_parameters(layer) for layer in model.layers)


def head_weights(model: nn.Module) -> int | None:
    """Return vocabulary times hidden size, where the model tells them."""
    arguments = getattr(model, "args", None)
    sizes = [getattr(arguments, name, None) for name in ("vocab_size", "hidden_size")]
    return sizes[0] * sizes[1] if all(isinstance(size, int) for size in sizes) else None  # type: ignore[operator]  # checked


if __name__ == "__main__":
    main()

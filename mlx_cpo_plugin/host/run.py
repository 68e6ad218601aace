"""A whole run of a registered train mode, built from the host's pieces: data, model, training, test, fusing."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.tuner import callbacks
from mlx_lm.tuner.utils import build_schedule, print_trainable_parameters
from mlx_lm.utils import hf_repo_to_path, load_config, save_config
from mlx_lm_lora.train import build_lora_config
from mlx_lm_lora.utils import (
    find_lmstudio_models_path,
    from_pretrained,
    save_pretrained_merged,
    save_to_lmstudio_merged,
)
from mlx_lm_lora.visuals import Colors, print_info, print_section, print_success

from mlx_cpo_plugin.blas import use_fast_blas
from mlx_cpo_plugin.checkpoints.adapter import load_adapter
from mlx_cpo_plugin.checkpoints.resuming import planned_run
from mlx_cpo_plugin.checkpoints.run_folder import is_done, only_run_in, record_done, written_files_recorded
from mlx_cpo_plugin.checkpoints.run_identity import FUSED, TESTED, RunIdentity, run_in
from mlx_cpo_plugin.data import PreferenceDataset
from mlx_cpo_plugin.data.batches import BatchSize, micro_batches_of
from mlx_cpo_plugin.data.encoding import read_template
from mlx_cpo_plugin.errors import ConfigError, first_line, is_device_fault
from mlx_cpo_plugin.host.substrate import SFTTrainingArgs, TrainingCallback, load_chat_tokenizer
from mlx_cpo_plugin.trackers import HostWandb, TrackerCallback, described_settings, require_clients, tracked_run
from mlx_cpo_plugin.training.metrics import METRICS_NAME, MetricsFile
from mlx_cpo_plugin.training.ranks import ranks_end_together
from mlx_cpo_plugin.types import TrainMode

_OPTIMIZERS = {"adam": optimizers.Adam, "adamw": optimizers.AdamW, "muon": optimizers.Muon}
QUANTISED_LOADS: dict[str, dict[str, Any]] = {
    "load_in_4bits": {"bits": 4, "group_size": 128},
    "load_in_6bits": {"bits": 6, "group_size": 128},
    "load_in_8bits": {"bits": 8, "group_size": 128},
    "load_in_mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}


@ranks_end_together()
def run_mode(settings: SimpleNamespace, mode: TrainMode, training_callback: TrainingCallback | None = None) -> None:
    """Carry out ``mode`` with resolved settings: whatever can be wrong with data or paths shows before the model loads.

    Raises:
        UserError: settings, data, model or files are at fault; says which and what to do.
    """
    is_main = mx.distributed.init().rank() == 0
    check_destinations(settings)
    settings.run_identity = run_identity(settings)
    settings.begun = settings.run_identity.begun

    print_info("Loading datasets")
    train_set, valid_set, test_set = mode.load_dataset(settings, load_chat_tokenizer(settings.model))
    for rows in (train_set, valid_set, test_set):
        if isinstance(rows, PreferenceDataset) and rows.report.split in wanted_splits(settings) and is_main:
            rows.tell(print_info)
    model, tokenizer = load_model(settings)

    with only_run_in(Path(settings.adapter_path)) if settings.adapter_path else nullcontext():
        carry_out(settings, mode, model, tokenizer, (train_set, valid_set, test_set), training_callback)


def carry_out(
    settings: SimpleNamespace,
    mode: TrainMode,
    model: nn.Module,
    tokenizer: Any,
    sets: tuple[Sequence[Any], Sequence[Any], Sequence[Any]],
    training_callback: TrainingCallback | None,
) -> None:
    """Train, test and fuse, as far as this is wanted and not done yet."""
    is_main = mx.distributed.init().rank() == 0
    train_set, valid_set, test_set = sets
    folder, run = Path(settings.adapter_path or ""), settings.run_identity
    if settings.train:
        print_section("Training")
        # Only the first rank has a callback.
        with tracked_run(settings, with_wandb(settings, training_callback)) if is_main else nullcontext() as callback:
            train_mode(settings, mode, model, train_set, valid_set, callback)
            if settings.test and not is_done(folder, TESTED, run):
                report_on_test_set(settings, mode, model, test_set, callback)
                record_done(folder, TESTED, run)
    else:
        if settings.adapter_path:
            load_adapter(model, adapter_file(settings))
        report_on_test_set(settings, mode, model, test_set)

    mx.clear_cache()
    if settings.fuse and settings.train and is_main and not is_done(folder, FUSED, run):
        print_section("Fusing Model")
        with written_files_recorded(folder):
            fuse(settings, model, tokenizer)
        record_done(folder, FUSED, run)


def run_identity(settings: SimpleNamespace) -> RunIdentity:
    """Return which run this is going to be, or whose adapter is tested.

    Raises:
        ConfigError: it is to be resumed, and there is nothing to go on from.
    """
    folder = Path(settings.adapter_path or "")
    if settings.train:
        return planned_run(folder, getattr(settings, "resume", None))
    return (run_in(folder) if settings.adapter_path else None) or RunIdentity.new()


def wanted_splits(settings: SimpleNamespace) -> tuple[str, ...]:
    """Return the splits that the run reads."""
    return (("train", "valid") if settings.train else ()) + (("test",) if settings.test else ())


def check_destinations(settings: SimpleNamespace) -> None:
    """Find out before anything is loaded what would fail afterwards, even after hours of training.

    Raises:
        ConfigError: ``adapter_path`` cannot be written to, would have the model overwritten, or holds no adapter to
            test; ``resume_adapter_file`` is missing; there is no client to report through or no LM Studio to export to.
    """
    if settings.train and not settings.adapter_path:
        raise ConfigError("adapter_path is empty; give a folder for the adapter.")
    if settings.train:
        check_writable(Path(settings.adapter_path))
    elif settings.adapter_path and not os.path.isfile(adapter_file(settings)):
        raise ConfigError(
            f"There is no {adapter_file(settings)} to test; train it first, or let adapter_path name another folder."
        )
    fused_beside_adapter = settings.fuse and settings.train and settings.lm_studio_name is None
    if fused_beside_adapter and os.path.realpath(settings.adapter_path) == os.path.realpath(settings.model):
        raise ConfigError(
            f"adapter_path is the model's own folder, {settings.model!r}, where fuse would overwrite the model; "
            "give another folder, or set fuse: false."
        )
    if settings.train and settings.report_to:
        require_clients(settings.report_to)
    if settings.wandb is not None and callbacks.wandb is None:
        raise ConfigError("wandb is set, but the package is missing; run 'pip install wandb' or remove the key.")
    resume = settings.resume_adapter_file
    if resume is not None and not os.path.isfile(resume):
        raise ConfigError(
            f"resume_adapter_file is {str(resume)!r}, but there is no such file; give an existing adapter."
        )
    if settings.fuse and settings.train and settings.lm_studio_name is not None:
        try:
            find_lmstudio_models_path()
        except FileNotFoundError as error:
            raise ConfigError(f"lm_studio_name is set, but {error}; install LM Studio or remove the key.") from error


def check_writable(folder: Path) -> None:
    """Find out, without making it, whether ``adapter_path`` can be made and written to.

    Raises:
        ConfigError: what is there already stands in the way.
    """
    # os.path, since Path.exists raises where a parent cannot be searched.
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        fault = "is a file" if there.is_file() else "cannot be written to"
        raise ConfigError(f"adapter_path is {str(folder)!r}, but {there} {fault}; give another folder.")


def adapter_file(settings: SimpleNamespace) -> Path:
    """Return where the run leaves its adapter."""
    return Path(settings.adapter_path) / "adapters.safetensors"


def with_wandb(settings: SimpleNamespace, callback: TrainingCallback | None) -> TrainingCallback | None:
    """Wrap ``callback`` in the host's W&B callback if ``wandb`` names a project and ``report_to`` leaves W&B to it."""
    if settings.wandb is None or "wandb" in (settings.report_to or ()):
        return callback

    def begin() -> TrainingCallback:
        Path(settings.adapter_path).mkdir(parents=True, exist_ok=True)
        return callbacks.WandBCallback(
            project_name=settings.wandb,
            log_dir=settings.adapter_path,
            config=described_settings(settings),
            wrapped_callback=callback,
        )

    return HostWandb(begin)


def load_model(settings: SimpleNamespace) -> tuple[nn.Module, Any]:
    """Load the model with fresh adapters, the same ones for the same seed.

    Raises:
        ConfigError: the model cannot be loaded or quantised as asked.
    """
    use_fast_blas()
    np.random.seed(settings.seed)
    mx.random.seed(settings.seed)
    precision = next((key for key in QUANTISED_LOADS if getattr(settings, key)), None)
    print_info(f"Loading model: {Colors.CYAN}{settings.model}{Colors.RESET}")
    try:
        model, tokenizer, _ = from_pretrained(
            model=settings.model,
            lora_config=build_lora_config(settings),
            # A copy: the host's loader may keep or change what it is given.
            quantized_load=dict(QUANTISED_LOADS[precision]) if precision else None,
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        if is_device_fault(error):
            raise
        if precision and "[quantize]" in str(error):
            raise ConfigError(
                f"{precision} needs layers whose width divides by {QUANTISED_LOADS[precision]['group_size']}, which "
                f"model {settings.model!r} does not have; remove {precision} or take another model."
            ) from error
        raise ConfigError(
            f"model {settings.model!r} cannot be loaded ({first_line(error)}); check its files or take another model."
        ) from error
    if precision and "quantization" in load_config(model_folder(settings.model)):
        raise ConfigError(f"model {settings.model!r} is quantised already; remove {precision}.")
    if settings.train_type == "full" and settings.num_layers > 0:
        model.freeze()
        for layer in model.layers[-settings.num_layers :]:
            layer.unfreeze()
    template = read_template(getattr(settings, "chat_template", None))
    if template:
        tokenizer.chat_template = template  # which a fused model takes along
    return model, tokenizer


def train_mode(
    settings: SimpleNamespace,
    mode: TrainMode,
    model: nn.Module,
    train_set: Sequence[Any],
    valid_set: Sequence[Any],
    training_callback: TrainingCallback | None,
) -> None:
    """Train from fresh or resumed weights."""
    # The host seeds here too: dropout does not depend on how much randomness loading took.
    mx.random.seed(settings.seed)
    settings.iters = iterations(settings, train_set)
    if settings.resume_adapter_file is not None:
        print_info(f"Loading fine-tuned weights from {Colors.CYAN}{settings.resume_adapter_file}{Colors.RESET}")
        load_adapter(model, Path(settings.resume_adapter_file))
    print_trainable_parameters(model)
    print_info(f"Training mode: {Colors.YELLOW}{mode.name.upper()}{Colors.RESET}")
    mode.train(
        model=model,
        optimizer=build_optimizer(settings),
        train_dataset=train_set,
        val_dataset=valid_set,
        args=settings,
        adapter_file=adapter_file(settings),
        training_callback=training_callback,
    )


def iterations(settings: SimpleNamespace, train_set: Sequence[Any]) -> int:
    """Return ``iters``, or what ``epochs`` amounts to, or the host's default."""
    if settings.iters is not None:
        return int(settings.iters)
    if settings.epochs is not None:
        batch_tokens = getattr(settings, "batch_tokens", None)
        if batch_tokens is None:
            return int(settings.epochs) * math.ceil(len(train_set) / settings.batch_size)
        size = BatchSize(settings.batch_size, batch_tokens)
        return micro_batches_of(settings.epochs, [pair.tokens for pair in train_set], size, settings.seed)
    default = int(SFTTrainingArgs().iters)
    print_info(f"Neither iters nor epochs is set; training for {default} iterations.")
    return default


def build_optimizer(settings: SimpleNamespace) -> optimizers.Optimizer:
    """Return the optimizer with its learning rate or schedule.

    Raises:
        ConfigError: ``lr_schedule`` or ``optimizer_config`` holds what the schedule or optimizer does not take.
    """
    name = settings.optimizer.lower()
    try:
        rate = build_schedule(settings.lr_schedule) if settings.lr_schedule else settings.learning_rate
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ConfigError(f"lr_schedule {settings.lr_schedule!r} cannot be built: {error}.") from error
    try:
        return _OPTIMIZERS[name](learning_rate=rate, **settings.optimizer_config.get(name, {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer_config for {name!r} is not accepted: {error}.") from error


def report_on_test_set(
    settings: SimpleNamespace,
    mode: TrainMode,
    model: nn.Module,
    test_set: Sequence[Any],
    callback: TrainingCallback | None = None,
) -> None:
    """Evaluate the model on the test set, and report the metrics on the first rank."""
    print_section("Testing")
    metrics = mode.evaluate(model, test_set, settings)
    if mx.distributed.init().rank() == 0:
        report_test(settings, mode, metrics, callback)


def report_test(
    settings: SimpleNamespace, mode: TrainMode, metrics: Mapping[str, float], callback: TrainingCallback | None
) -> None:
    """Print the test metrics in the host's shape, append them to the metrics file, and send them to the trackers."""
    print(f"{Colors.BOLD}Test Results:{Colors.RESET}")
    labels = {"loss": "Loss", "accuracies": "Accuracy", "margins": "Margin"}
    for name, label in labels.items():
        if name in metrics:
            print(f"  {Colors.YELLOW}{label}:{Colors.RESET} {metrics[name]:.3f}")
    print(f"\n{Colors.CYAN}{mode.title} Test Metrics:{Colors.RESET}")
    for name, value in metrics.items():
        if name not in labels:
            print(f"  {Colors.WHITE}{name}:{Colors.RESET} {value:.3f}")
    named = {f"test_{name}": value for name, value in metrics.items()}
    if settings.adapter_path:
        file = MetricsFile(Path(settings.adapter_path) / METRICS_NAME, settings.run_identity.id)
        file.append("test", named)
    if isinstance(callback, TrackerCallback):
        callback.on_test_report(named)


def fuse(settings: SimpleNamespace, model: nn.Module, tokenizer: Any) -> None:
    """Fuse the adapter into the model through the host, into LM Studio or beside the adapter, and complete it."""
    de_quantize = settings.lm_studio_name is not None or not any(getattr(settings, key) for key in QUANTISED_LOADS)
    if de_quantize:
        # Over a quantised base the host would round the merged weights to its bits first.
        fused = [
            (name, module.fuse(dequantize=True)) for name, module in model.named_modules() if hasattr(module, "fuse")
        ]
        model.update_modules(tree_unflatten(fused))
    if settings.lm_studio_name is not None:
        save_to_lmstudio_merged(
            model=model, tokenizer=tokenizer, new_model_name=settings.lm_studio_name, de_quantize=True
        )
        complete_fused_model(find_lmstudio_models_path() / "mlx_lm_lora" / settings.lm_studio_name, settings.model)
        return
    save_pretrained_merged(
        model=model,
        tokenizer=tokenizer,
        save_path=settings.adapter_path,
        de_quantize=de_quantize,
    )
    complete_fused_model(Path(settings.adapter_path), settings.model)
    print_success(f"Model fused and saved to {Colors.CYAN}{settings.adapter_path}{Colors.RESET}")


def model_folder(model: str) -> Path:
    """Return the local folder of a model that has been loaded."""
    return Path(model) if Path(model).exists() else Path(hf_repo_to_path(model))


def complete_fused_model(folder: Path, base_model: str) -> None:
    """Give a fused model what the host leaves behind: without its end tokens it would not stop generating.

    These are the keys of the base model's ``config.json`` that the model class itself does not read, among them
    ``eos_token_id``, its ``generation_config.json``, and code of its own.
    """
    base_folder = model_folder(base_model)
    # Whether the fused model is quantised only the host has written down.
    base = {key: value for key, value in load_config(base_folder).items() if not key.startswith("quantization")}
    save_config({**base, **load_config(folder)}, folder / "config.json")
    for pattern in ("generation_config.json", "*.py"):
        for file in base_folder.glob(pattern):
            shutil.copy(file, folder)

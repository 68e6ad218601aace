"""What is found out before a run's first step, by the run itself and by ``mlx-cpo check``: one list of refusals."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np

from mlx_cpo_plugin import cpo
from mlx_cpo_plugin.checkpoints import ADAPTER_FILE, PREVIOUS
from mlx_cpo_plugin.checkpoints.adapter import load_adapter
from mlx_cpo_plugin.checkpoints.resuming import planned_run
from mlx_cpo_plugin.checkpoints.run_folder import fault_of, refuse_if_in_use
from mlx_cpo_plugin.checkpoints.run_identity import RunIdentity, run_in
from mlx_cpo_plugin.data import PreferenceDataset
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.plugins import is_built_in, train_modes
from mlx_cpo_plugin.publish.hub import require_token
from mlx_cpo_plugin.run.building import build_optimizer, optimizer_steps, positions_of, quantised_load
from mlx_cpo_plugin.run.fusing import fused_folder
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.settings.run_settings import read_run_settings
from mlx_cpo_plugin.trackers import require_clients
from mlx_cpo_plugin.training.call import check_vocabulary, training_arguments
from mlx_cpo_plugin.training.exits import out_of_memory_explained
from mlx_cpo_plugin.training.objective import objective_for
from mlx_cpo_plugin.training.optimizer_step import learning_rates
from mlx_cpo_plugin.training.resumption import restore
from mlx_cpo_plugin.training.wiring import Run, training_environment

# The largest learning rates that are usual, by optimizer, and how far above them one is noted.
USUAL_RATES = {"sgd": 1.0, "muon": 0.05}
USUAL_RATE = 1e-3
FAR_ABOVE = 10.0
# Steps at which a schedule is looked at.
_LOOKED_AT = 50


def adapter_file(settings: RunSettings) -> Path:
    """Return where the run leaves its adapter."""
    return Path(settings.adapter_path) / ADAPTER_FILE


def run_identity(settings: RunSettings) -> RunIdentity:
    """Return which run this is going to be, or whose adapter is tested."""
    folder = Path(settings.adapter_path or "")
    if settings.train:
        return planned_run(folder, settings.resume)
    return (run_in(folder) if settings.adapter_path else None) or RunIdentity.new()


def _refuse_run_of_other_mode(settings: RunSettings) -> None:
    """Keep a mode from elsewhere, which may put nothing aside, from writing among what another mode has left."""
    folder, mode = Path(settings.adapter_path), train_modes()[settings.train_mode]
    if is_built_in(mode):
        return
    there = read_run_settings(folder)[0].get("train_mode")
    if there == mode.name or (there is None and not adapter_file(settings).exists()):
        return
    what = "an adapter" if there is None else f"a run of train_mode {there}"
    raise ConfigError(
        f"adapter_path {folder} holds {what}; give another folder for a run of {mode.name}.",
        key="adapter_path",
        place=str(folder),
    )


def check_destinations(settings: RunSettings) -> None:
    """Find out before anything is loaded what would fail afterwards, even after hours of training.

    Raises:
        ConfigError: ``adapter_path`` cannot be written to, would have the model overwritten, or holds no adapter to
            test; ``resume_adapter_file`` is missing; there is no client to report through, no token to push
            with or no LM Studio to export to.
    """
    if settings.train and not settings.adapter_path:
        raise ConfigError("adapter_path is empty; give a folder for the adapter.", key="adapter_path")
    if settings.train:
        check_writable(Path(settings.adapter_path))
        _refuse_run_of_other_mode(settings)
        require_clients(settings)
        if settings.push_to_hub is not None:
            require_token(settings.push_to_hub)
    elif settings.adapter_path and not os.path.isfile(adapter_file(settings)):
        raise ConfigError(
            f"There is no {adapter_file(settings)} to test; train it first, or let adapter_path name another folder.",
            key="adapter_path",
        )
    resume = settings.resume_adapter_file
    if resume is not None and not os.path.isfile(resume):
        missing = Path(resume)
        aside = sorted(missing.parent.glob(f"{PREVIOUS}/*/{missing.name}"), key=lambda path: path.stat().st_mtime)
        advice = f"did you mean {str(aside[-1])!r}?" if aside else "give an existing adapter."
        raise ConfigError(
            f"resume_adapter_file is {str(resume)!r}, but there is no such file; {advice}",
            key="resume_adapter_file",
        )
    if settings.fuse and settings.train:
        try:
            fused = fused_folder(settings)
        except FileNotFoundError as error:
            raise ConfigError(
                f"lm_studio_name is set, but {error}; install LM Studio or remove the key.", key="lm_studio_name"
            ) from error
        if os.path.realpath(fused) == os.path.realpath(settings.model):
            key = "adapter_path" if settings.lm_studio_name is None else "lm_studio_name"
            raise ConfigError(
                f"{key} is the model's own folder, {settings.model!r}, where fuse would overwrite the model; "
                "give another, or set fuse: false.",
                key=key,
            )


def check_writable(folder: Path) -> None:
    """Find out, without making it, whether ``adapter_path`` can be made and written to.

    Raises:
        ConfigError: what is there already stands in the way.
    """
    # os.path, since Path.exists raises where a parent cannot be searched.
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if fault := fault_of(there):
        raise ConfigError(
            f"adapter_path is {str(folder)!r}, but {there} {fault}; give another folder.",
            key="adapter_path",
            place=str(there),
        )


@contextmanager
def rehearsed(
    settings: RunSettings,
    model: nn.Module,
    train_set: PreferenceDataset,
    valid_set: PreferenceDataset,
    probing: bool = False,
) -> Iterator[Run]:
    """Yield a run of CPO as it stands before its first step; nothing in its folder is changed.

    Args:
        settings: with ``iters``, ``run_identity`` and ``begun``.
        probing: compute with the model to find out what it allows; otherwise its weights may be unevaluated.

    Raises:
        UserError: whatever the run itself would refuse.
    """
    refuse_if_in_use(Path(settings.adapter_path))
    if settings.resume_adapter_file is not None:
        load_adapter(model, Path(settings.resume_adapter_file))
    check_vocabulary(model, train_set, "train")
    check_vocabulary(model, valid_set, "valid")
    args = training_arguments(cpo.arguments(settings, adapter_file(settings)))
    objective = objective_for(args.loss_type, args.loss_settings(), None, args.cpo_alpha)
    optimizer = build_optimizer(settings, optimizer_steps(settings, train_set))
    held_out = valid_set if args.val_batches else PreferenceDataset(split="valid")
    with out_of_memory_explained(), training_environment(model, args) as environment:
        run = Run(model, optimizer, objective, train_set, held_out, args, environment, None, probing)
        restore(run)
        yield run


def plan_notes(settings: RunSettings, optimizer: optimizers.Optimizer, steps: int) -> list[str]:
    """Return notes on a learning rate far too large, a warm-up longer than the run, and weights that stay as they are.

    Args:
        steps: optimizer steps of the run.
    """
    notes = []
    rates = learning_rates(optimizer, np.unique(np.linspace(0, steps - 1, _LOOKED_AT, dtype=int)))
    usual = USUAL_RATES.get(settings.optimizer, USUAL_RATE)
    if max(rates) > FAR_ABOVE * usual:
        notes.append(
            f"note: the learning rate reaches {max(rates):g}; with {settings.optimizer} up to {usual:g} is usual."
        )
    named, warmup = "lr_schedule.warmup", (settings.lr_schedule or {}).get("warmup", 0)
    if settings.warmup_ratio:
        named, warmup = "warmup_ratio", math.ceil(settings.warmup_ratio * steps)
    if warmup >= steps:
        notes.append(
            f"note: {named} makes {warmup} optimizer steps of warm-up, and the run has {steps}: the learning rate only "
            f"reaches {max(rates):g}."
        )
    if settings.train_type == "full" and (key := quantised_load(settings)):
        notes.append(
            f"note: train_type full trains only what {key} leaves unquantised, such as norms; use lora, or do without "
            f"{key}."
        )
    return notes


def position_notes(model: str, pairs: Sequence[PreferencePair]) -> list[str]:
    """Return a note on pairs that are longer than the ``max_position_embeddings`` of a model on this machine."""
    positions = positions_of(model) if pairs else None
    beyond = [pair for pair in pairs if positions is not None and pair.length > positions]
    if not beyond:
        return []
    number = "1 pair has" if len(beyond) == 1 else f"{len(beyond)} pairs have"
    return [
        f"note: {number} more than the {positions} positions that the model knows (first {beyond[0].source}, with "
        f"{beyond[0].length} tokens); lower max_seq_length to {positions}."
    ]

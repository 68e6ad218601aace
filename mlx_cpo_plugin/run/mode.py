"""A whole run of a registered train mode, built from the host's pieces: data, model, training, test, fusing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from shlex import quote

import mlx.core as mx
import mlx.nn as nn
from mlx_lm_lora.visuals import Colors, print_info, print_section, print_success

from mlx_cpo_plugin.checkpoints import ADAPTER_CONFIG, METRICS_FILE, RUN_SETTINGS
from mlx_cpo_plugin.checkpoints.adapter import load_adapter
from mlx_cpo_plugin.checkpoints.run_folder import (
    is_done,
    only_run_in,
    record_data,
    record_done,
    record_files,
    record_undone,
)
from mlx_cpo_plugin.checkpoints.run_identity import FUSED, PUSHED, TESTED
from mlx_cpo_plugin.data import PreferenceDataset
from mlx_cpo_plugin.errors import UserError, first_line
from mlx_cpo_plugin.exchange import is_first_rank
from mlx_cpo_plugin.host import TrainingCallback, give_chat_template, load_chat_tokenizer
from mlx_cpo_plugin.plugins import metrics_of, sets_of
from mlx_cpo_plugin.publish.card import PLOT_FILE, model_card, write_card
from mlx_cpo_plugin.publish.hub import PushAfterRunError, push, upload_of
from mlx_cpo_plugin.publish.usage import usage
from mlx_cpo_plugin.run.building import build_optimizer, iterations, load_model, optimizer_steps, quantised_load
from mlx_cpo_plugin.run.fusing import Fusing, fused_as, fused_folder, holds_model
from mlx_cpo_plugin.run.preflight import adapter_file, check_destinations, plan_notes, position_notes, run_identity
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.trackers import TrackerCallback, tracked_run
from mlx_cpo_plugin.training.held_out import held_out_rows, held_out_scores
from mlx_cpo_plugin.training.identity import data_digest
from mlx_cpo_plugin.training.metrics import MetricsFile
from mlx_cpo_plugin.types import Tokenizer, TrainMode, Values

Sets = tuple[Sequence[object], Sequence[object], Sequence[object]]


def run_mode(
    settings: RunSettings,
    mode: TrainMode,
    training_callback: TrainingCallback | None = None,
    loaded: tuple[nn.Module, Tokenizer] | None = None,
) -> tuple[nn.Module, Tokenizer]:
    """Carry out ``mode`` with resolved settings: whatever can be wrong with data or paths shows before the model loads.

    Args:
        loaded: a model and its tokenizer, in place of those that ``settings.model`` names.

    Returns:
        model and tokenizer; the model is empty where it was fused.

    Raises:
        UserError: settings, data, model or files are at fault; says which and what to do.
    """
    check_destinations(settings)
    settings.run_identity = run_identity(settings)
    settings.begun = settings.run_identity.begun

    print_info("Loading datasets")
    if loaded is not None:
        give_chat_template(loaded[1])
    sets = sets_of(mode, settings, loaded[1] if loaded else load_chat_tokenizer(settings.model))
    wanted = (("train", "valid") if settings.train else ()) + (("test",) if settings.test else ())
    for rows in sets if is_first_rank() else ():
        if isinstance(rows, PreferenceDataset) and rows.report.split in wanted:
            rows.tell(print_info)
    model, tokenizer = load_model(settings, loaded)

    if not settings.train:
        if settings.adapter_path:
            load_adapter(model, adapter_file(settings))
        report_on_test_set(settings, mode, model, sets[2])
        return model, tokenizer
    with only_run_in(Path(settings.adapter_path)):
        train_test_and_fuse(settings, mode, model, tokenizer, sets, training_callback)
    return model, tokenizer


def train_test_and_fuse(
    settings: RunSettings,
    mode: TrainMode,
    model: nn.Module,
    tokenizer: Tokenizer,
    sets: Sets,
    training_callback: TrainingCallback | None,
) -> None:
    """Do what of these is wanted and not done yet; ``model`` is empty after fusing."""
    train_set, valid_set, test_set = sets
    folder, run = Path(settings.adapter_path), settings.run_identity
    fusing = None
    if settings.fuse and is_first_rank():
        rows = held_out_rows(valid_set, train_set)
        before = held_out_scores(model, rows, settings.scoring, settings.step_size) if rows else None
        fusing = Fusing(settings, before, rows, print_info, run=run)

    print_section("Training")
    # Only the first rank has a callback.
    with tracked_run(settings, training_callback) if is_first_rank() else nullcontext() as callback:
        train_mode(settings, mode, model, train_set, valid_set, callback)
        on_what = _tested_on(settings, test_set) if settings.test else ""
        tests = settings.test and not is_done(folder, TESTED, run, on_what)
        if tests:
            report_on_test_set(settings, mode, model, test_set, callback)
            record_done(folder, TESTED, run, on_what)

    mx.clear_cache()
    if fusing is not None and not (is_done(folder, FUSED, run, fused_as(settings)) and holds_model(settings)):
        print_section("Fusing Model")
        record_undone(folder, FUSED)  # what is there is replaced in several steps
        fused = fusing.fuse(model, tokenizer)
        record_done(folder, FUSED, run, fused_as(settings))
        print_success(f"Model fused and saved to {Colors.CYAN}{fused}{Colors.RESET}")
    # A mode from elsewhere may leave no more than an adapter, or not even that.
    if is_first_rank() and (folder / RUN_SETTINGS).exists() and (folder / ADAPTER_CONFIG).exists():
        arguments = template_arguments(train_set)
        describe(settings, sets, arguments, anew=("test",) if tests else ())
        for line in next_commands(settings, bool(valid_set or test_set), arguments):
            print(line)


def _tested_on(settings: RunSettings, test_set: Sequence[object]) -> str:
    """Return what tells one test of a run from another; empty where a mode has sets of its own."""
    return f"{data_digest(test_set)} {settings.test_batches}" if isinstance(test_set, PreferenceDataset) else ""


def template_arguments(pairs: Sequence[object]) -> Values:
    """Return the arguments of the chat template that the first pair's prompt was rendered with; empty without pairs."""
    if not (isinstance(pairs, PreferenceDataset) and pairs and pairs.chat_tokenizer):
        return {}
    return pairs.chat_tokenizer.variant_of(pairs[0].prompt)


def next_commands(settings: RunSettings, held_out: bool, arguments: Values | None = None) -> list[str]:
    """Return the commands that judge and use what a run has left, one a line.

    Args:
        held_out: whether there are rows to compare the models on; if not, a prompt has to do.
        arguments: of the chat template, as in training.
    """
    adapter, base = str(settings.adapter_path), settings.model or "MODEL"  # a loaded one that a call gave
    named = "" if settings.model else f" --model {base}"
    asked = "" if held_out and settings.data else " --prompt 'Hi!'"
    lines = [f"Compare:  mlx-cpo compare {quote(adapter)}{named}{asked}"]
    if settings.fuse:
        lines += [f"Generate: {line}" for line in usage("mlx", str(fused_folder(settings)), arguments=arguments).lines]
    else:
        # Without it mlx_lm would load the base model as it is, and use the template of that.
        if not (quantised_load(settings) or settings.chat_template):
            lines += [f"Generate: {line}" for line in usage("adapter", adapter, base, arguments).lines]
        if settings.model and settings.data:
            config = quote(str(Path(settings.adapter_path) / RUN_SETTINGS))
            lines.append(f"Fuse:     mlx_lm_lora.train --config {config} --resume auto --fuse")
    return lines


def describe(settings: RunSettings, sets: Sets, arguments: Values, anew: Collection[str] = ()) -> None:
    """Write the model card of what the run has left; where that fails one warning says so.

    Args:
        arguments: of the chat template, as in training.
        anew: splits that were measured anew, though the run had finished.
    """
    folder, run = Path(settings.adapter_path), settings.run_identity
    data = {
        rows.report.split: {"rows": rows.report.rows, "pairs": len(rows), "sha256": data_digest(rows, whole=True)}
        for rows in sets
        if isinstance(rows, PreferenceDataset) and rows
    }
    try:
        record_data(folder, run, data, arguments, anew)
        fused = fused_folder(settings) if settings.fuse else folder
        merged = "`config.json` and `model*.safetensors`: the model with the adapter merged"
        name = write_card(model_card(folder, notes=[merged] if settings.fuse and fused == folder else ()), folder)
        record_files(folder, [name, PLOT_FILE])
        print(f"Model card: {folder / name}")
        if fused != folder:
            write_card(model_card(folder, "mlx", here=fused.name), fused)
    except (OSError, UserError) as error:
        print(f"Warning: the model card cannot be written ({first_line(error)}).")


def push_run(settings: RunSettings) -> None:
    """Push the adapter of a complete run to ``push_to_hub``, if that is set and it has not been pushed there.

    Raises:
        PushAfterRunError: the hub refuses it or cannot be reached; the run is complete and saved.
    """
    repo = settings.push_to_hub
    if not (repo and settings.train and is_first_rank()):
        return
    folder, run = Path(settings.adapter_path or ""), settings.run_identity
    if is_done(folder, PUSHED, run, repo):
        return
    try:
        push(upload_of(folder, repo), repo, private=settings.hub_private_repo, say=print)
    except UserError as error:
        again = f"mlx-cpo push {quote(str(folder))} {repo}" + ("" if settings.hub_private_repo else " --public")
        raise PushAfterRunError(
            f"{error} The run is complete and saved in {folder}; push it later with: {again}", key="push_to_hub"
        ) from error
    record_done(folder, PUSHED, run, repo)


def train_mode(
    settings: RunSettings,
    mode: TrainMode,
    model: nn.Module,
    train_set: Sequence[object],
    valid_set: Sequence[object],
    training_callback: TrainingCallback | None,
) -> None:
    """Train from fresh or resumed weights."""
    # The host seeds here too: dropout does not depend on how much randomness loading took.
    mx.random.seed(settings.seed)
    settings.iters = iterations(settings, train_set)
    if settings.resume_adapter_file is not None:
        print_info(f"Loading fine-tuned weights from {Colors.CYAN}{settings.resume_adapter_file}{Colors.RESET}")
        load_adapter(model, Path(settings.resume_adapter_file))
    steps = optimizer_steps(settings, train_set)
    optimizer = build_optimizer(settings, steps)
    pairs = train_set if isinstance(train_set, PreferenceDataset) else ()
    for note in [*plan_notes(settings, optimizer, steps), *position_notes(settings.model, pairs)]:
        print(note)
    mode.train(
        model=model,
        optimizer=optimizer,
        train_dataset=train_set,
        val_dataset=valid_set,
        args=settings,
        adapter_file=adapter_file(settings),
        training_callback=training_callback,
    )
    if is_first_rank() and not adapter_file(settings).exists():
        # The model may be fused all the same.
        print(f"Warning: {mode.name} has written no adapter to {adapter_file(settings)}.")


def report_on_test_set(
    settings: RunSettings,
    mode: TrainMode,
    model: nn.Module,
    test_set: Sequence[object],
    callback: TrainingCallback | None = None,
) -> None:
    """Evaluate the model, print the metrics in the host's shape, and send them to metrics file and trackers."""
    print_section("Testing")
    metrics = metrics_of(mode, model, test_set, settings)
    if not is_first_rank():
        return
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
        MetricsFile(Path(settings.adapter_path) / METRICS_FILE, settings.run_identity.id).append("test", named)
    if isinstance(callback, TrackerCallback):
        callback.on_test_report(named)

"""What a run is going to do, in a few lines before its first step."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import mlx.core as mx
from mlx_lm.utils import get_total_parameters

from mlx_cpo_plugin.checkpoints.adapter import describe_adapter
from mlx_cpo_plugin.data import PreferenceDataset
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.plugins import loss_types
from mlx_cpo_plugin.settings.cpo_options import LOSS_OPTION
from mlx_cpo_plugin.settings.run_settings import options_of
from mlx_cpo_plugin.settings.yaml_settings import dump_settings
from mlx_cpo_plugin.training.objective import name_of
from mlx_cpo_plugin.training.wiring import Run
from mlx_cpo_plugin.types import Values

# Said by the other lines of the summary, or before it.
_SAID_ELSEWHERE = (
    *("model", "train", "train_type", "num_layers", "lora_parameters", LOSS_OPTION, "beta", "cpo_alpha"),
    *("batch_size", "batch_tokens", "gradient_accumulation_steps", "iters", "epochs"),
)
_NOT_USED = ("reference_model_path",)
_OF_VALIDATIONS = (
    *("steps_per_eval", "eval_per_epoch", "val_batches", "save_best", "load_best", "early_stopping_patience"),
)
_OF_TRACKERS = ("project", "run_name")


def summary(run: Run) -> list[str]:
    """Return the lines: the loss, a step, the length of the run, what is trained, and every other option that acts."""
    lines = [_loss_line(run), _step_line(run), _length_line(run), _trained_line(run)]
    options = acting(run.recorded["settings"], run.args.loss_type, run.val_pairs)
    return [*lines, f"Set: {_flow(options)}"] if options else lines


def acting(values: Values, loss_type: str, val_pairs: PreferenceDataset) -> Values:
    """Return those of the settings ``values`` that differ from their default, have a part in the run, and need a word.

    Of a mapping such as ``optimizer_config``, only what differs.
    """
    options, unread = options_of(loss_type)
    silent = {*_SAID_ELSEWHERE, *_NOT_USED, *unread}
    silent.update(() if val_pairs else _OF_VALIDATIONS)
    silent.update(() if values.get("report_to") or values.get("wandb") else _OF_TRACKERS)
    if not any("valid_fraction" in note for note in val_pairs.report.notes):
        silent.add("valid_fraction")
    if (values.get("lr_schedule") or {}).get("arguments"):
        silent.add("learning_rate")
    if values.get("qat_mode", "affine") != "affine":  # which has bits and group size of its own
        silent.update(("qat_bits", "qat_group_size"))
    found = {}
    for name, option in options.items():
        value = values.get(name)
        shown = all(values.get(key, options[key].default) in among for key, among in option.shown_when.items())
        is_default = value is None or value == option.default or value == _absolute(option.default)
        if is_default or name in silent or not shown:
            continue
        if isinstance(value, Mapping) and isinstance(option.default, Mapping):
            value = {key: inner for key, inner in value.items() if inner != option.default.get(key)}
            if name == "optimizer_config":
                value = value.get(str(values.get("optimizer", options["optimizer"].default)), {})
        if value != {}:
            found[name] = value
    return found


def _absolute(default: object) -> object:
    """Return a default as the record of a run has it, if it is a path."""
    return os.path.abspath(default) if isinstance(default, str) else default


def _loss_line(run: Run) -> str:
    args, objective, loss = run.args, run.objective, loss_types().get(run.args.loss_type)
    if loss is None or objective.fn is not loss.fn:
        return f"Objective: the function {name_of(objective.fn)}, given by the call; beta {objective.beta:g}"
    named = [name for option in loss.options if (name := option.name) == "beta" or name in loss.formula]
    options = ", ".join(f"{name} {objective.options[name]}" for name in named)
    likelihood = f", plus {args.cpo_alpha:g} times the chosen answers' nll" if args.cpo_alpha else ""
    return f"Objective: {loss.title}, {loss.formula}{likelihood}" + (f"; {options}" if options else "")


def _step_line(run: Run) -> str:
    args, ranks = run.args, mx.distributed.init().size()
    if args.batch_tokens is None:
        micro_batch, together = counted(args.batch_size, "pair"), args.batch_size * args.gradient_accumulation_steps
        total = f" = {counted(together, 'pair')}"
    else:
        micro_batch, total = f"at most {args.batch_tokens:,} tokens", ""
    shared = f", shared by {ranks} ranks" if ranks > 1 else ""
    return f"Step: {micro_batch} x {args.gradient_accumulation_steps} accumulated{total}{shared}"


def _length_line(run: Run) -> str:
    steps = pairs = 0
    for micro_batch in run.plan():
        if micro_batch.closes_window:
            steps, pairs = steps + 1, pairs + len(micro_batch.window)
    epochs = pairs / len(run.pairs)
    return (
        f"Run: {counted(run.args.iters, 'iteration')}, {counted(steps, 'optimizer step')}, "
        f"{epochs:.3g} epoch{'s' * (epochs != 1)} of {counted(len(run.pairs), 'pair')}"
    )


def _trained_line(run: Run) -> str:
    adapter = describe_adapter(run.model)
    trained = sum(array.size for array in by_name(run.model.trainable_parameters()).values())
    total = get_total_parameters(run.model)
    kind, layers = adapter["fine_tune_type"], len(run.model.layers)
    details = [{"lora": "LoRA", "dora": "DoRA"}.get(kind, "full weights")]
    details += [_flow(adapter["lora_parameters"])] if adapter["lora_parameters"] else []
    if adapter["num_layers"] > 0:
        details.append(f"last {adapter['num_layers']} of {layers} layers")
    size = f"{counted(trained, 'parameter')}, {trained / total:.2%} of the model's {total:,}"
    return f"Trained: {size}; {', '.join(details)}"


def counted(number: int, thing: str) -> str:
    """Return ``1 pair`` or ``2 pairs``."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _flow(values: Values) -> str:
    """Return settings as they stand in a configuration file, on one line."""
    return dump_settings(dict(values), flow=True, width=math.inf).strip().removeprefix("{").removesuffix("}")

"""The training arguments of transformers, which TRL and LLaMA-Factory share and Axolotl renames."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_cpo_plugin.convert.conversion import Conversion, Source, is_off, merged
from mlx_cpo_plugin.settings.nested import TRACKERS

BEST_BY = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
EACH_EPOCH = {"steps_per_eval": "eval_per_epoch", "save_every": "save_per_epoch"}
"""Steps between validations or saves -> the setting that has one at the end of each epoch instead."""
BY_NAME = {
    "linear": "linear",
    "polynomial": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant_with_warmup": "constant",
}
"""Schedule of transformers -> that of this project over the whole run, which ends at 0 where it falls."""
ADAMW_BETAS, ADAMW_EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Length:
    """How long a run is.

    Attributes:
        batch_size: pairs in a micro-batch.
        accumulation: micro-batches in an optimizer step.
        epoch: micro-batches in an epoch; ``None`` where the number of rows is not known.
        steps: optimizer steps of the run; ``None`` where it is not known.
    """

    batch_size: int
    accumulation: int
    epoch: int | None
    steps: int | None

    def iterations(self, steps: float | None) -> int | None:
        """Return a number of optimizer steps, or below 1 a share of the run's, as iterations; ``None``: not known."""
        if steps is not None and steps < 1:
            steps = steps * self.steps if self.steps is not None else None
        return None if steps is None else max(1, math.ceil(steps)) * self.accumulation


@dataclass(frozen=True)
class ScheduleRequest:
    """A schedule of learning rates as transformers has it.

    Attributes:
        name: of the schedule.
        peak: learning rate after the warm-up.
        warmup: optimizer steps of the warm-up, or below 1 its share of the run.
        end: learning rate at the end, where the schedule does not end at 0.
    """

    name: str
    peak: float
    warmup: float
    end: float = 0.0


def convert_length(
    source: Source,
    conversion: Conversion,
    rows: int | None,
    size: tuple[str, int] = ("per_device_train_batch_size", 8),
    epochs: tuple[str, float] = ("num_train_epochs", 3.0),
) -> Length:
    """Convert batch size, accumulation, and epochs or ``max_steps``.

    Args:
        rows: of the training set, if known, among them those that are held out.
        size, epochs: the keys of the batch size and the epochs, each with its default.
    """
    batch_size = source.count(*size, least=1)
    accumulation = source.count("gradient_accumulation_steps", 1, least=1)
    conversion.put("batch_size", batch_size, source.gives(size[0]))
    conversion.put("gradient_accumulation_steps", accumulation, source.gives("gradient_accumulation_steps"))
    conversion.tell(
        f"{size[0]} {batch_size} is for each device, batch_size for all of them together: multiply it by the number "
        "of devices that the file was written for."
    )
    epoch = math.ceil(max(1, rows - conversion.held_out) / batch_size) if rows else None
    steps, passes = source.count("max_steps", -1), source.number(*epochs)
    if steps > 0:
        conversion.put("iters", steps * accumulation, given=True)
        conversion.tell(f"max_steps {steps} counts optimizer steps, iters micro-batches: {steps * accumulation}.")
        return Length(batch_size, accumulation, epoch, steps)
    _put_epochs(passes, epochs[0], epoch, source.gives(epochs[0]), conversion)
    steps = None if epoch is None else math.ceil(passes * math.ceil(epoch / accumulation))
    return Length(batch_size, accumulation, epoch, steps)


def _put_epochs(passes: float, key: str, epoch: int | None, given: bool, conversion: Conversion) -> None:
    if passes == int(passes):
        conversion.put("epochs", int(passes), given)
    elif epoch is not None:
        conversion.put("iters", math.ceil(passes * epoch), given)
        conversion.tell(f"{key} {passes:g} is not a whole number, so iters is set to what it comes to.")
    else:
        conversion.put("epochs", math.ceil(passes), given)
        conversion.tell(f"{key} {passes:g} is not a whole number and was rounded up; give --rows for an exact one.")


def convert_schedule(request: ScheduleRequest, conversion: Conversion, length: Length) -> None:
    """Write ``lr_schedule``, which spans the run by its name, or say what it needs."""
    name, peak, warmup = request.name, request.peak, _warmup_steps(request.warmup, length)
    if name == "constant":  # which has no warm-up in transformers either
        return
    if name not in BY_NAME:
        has_warmup = name != "reduce_lr_on_plateau" and request.warmup > 0
        after = " after the warm-up" if has_warmup else ""
        conversion.tell(f"The schedule {name} has no counterpart: the learning rate stays at {peak:g}{after}.")
        if not has_warmup:
            return
        name = "constant_with_warmup"
    if request.end and name != "constant_with_warmup":
        if warmup is not None and length.steps is not None:
            _put_schedule_with_end(request, conversion, length.steps, warmup)
            return
        conversion.tell(
            f"The schedule {name} needs the number of optimizer steps, and the file only has epochs: until you convert "
            f"it again with --rows, the number of training rows, the learning rate stays at {peak:g}."
        )
        name = "constant_with_warmup"
    if name != "constant_with_warmup" or warmup != 0:
        conversion.settings["lr_schedule"] = {"name": BY_NAME[name], "warmup": warmup} if warmup else BY_NAME[name]
    if warmup is None:
        conversion.settings["warmup_ratio"] = request.warmup


def _put_schedule_with_end(request: ScheduleRequest, conversion: Conversion, steps: int, warmup: int) -> None:
    """Write one of MLX's schedules, whose warm-up goes on for a step with the full rate."""
    rest = max(1, steps - warmup - bool(warmup))
    is_line = BY_NAME[request.name] == "linear"
    arguments = [request.peak, request.end, rest] if is_line else [request.peak, rest, request.end]
    schedule = {"name": "linear_schedule" if is_line else "cosine_decay", "arguments": arguments}
    conversion.settings["lr_schedule"] = schedule | ({"warmup": warmup} if warmup else {})
    conversion.tell(f"The schedule {request.name} is lr_schedule, which counts optimizer steps, warmup's too.")


def _warmup_steps(warmup: float, length: Length) -> int | None:
    """Return the optimizer steps of the warm-up; ``None``: a share of an unknown number."""
    if warmup >= 1 or warmup <= 0:
        return max(0, int(warmup))
    return None if length.steps is None else math.ceil(warmup * length.steps)


def convert_optimizer(source: Source, conversion: Conversion, key: str, name: str) -> None:
    """Convert the optimizer and its arguments; PyTorch's and MLX's AdamW differ in their defaults."""
    keys = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
    betas = [source.number(f"adam_beta{number}", beta) for number, beta in enumerate(ADAMW_BETAS, 1)]
    epsilon, decay = source.number("adam_epsilon", ADAMW_EPSILON), source.number("weight_decay", 0.0)
    if name == "muon":
        conversion.put("optimizer", "muon", given=True)
        conversion.put("optimizer_config", {"muon": {"weight_decay": decay}}, any(map(source.gives, keys)))
        conversion.tell("muon is MLX's, with its own momentum and number of Newton-Schulz steps.")
        return
    plain = name.removeprefix("paged_")
    other = plain.partition("_")[0]
    if other in ("adafactor", "lion", "sgd"):
        arguments = {
            "adafactor": {"scale_parameter": False, "weight_decay": decay},  # as transformers calls it
            "lion": {"betas": betas, "weight_decay": decay},
            "sgd": {"weight_decay": decay},
        }[other]
        conversion.put("optimizer", other, given=True)
        conversion.put("optimizer_config", {other: arguments}, given=True)
        _tell_of_bits(name, key, other, conversion)
        return
    conversion.put("optimizer", "adamw", source.gives(key))
    arguments = {"betas": betas, "eps": epsilon, "weight_decay": decay, "bias_correction": True}
    conversion.put("optimizer_config", {"adamw": arguments}, any(map(source.gives, keys)))
    if not plain.startswith("adamw"):
        conversion.tell(f"{key} {name} has no counterpart: adamw takes its place, and may want another learning rate.")
    else:
        _tell_of_bits(name, key, "adamw", conversion)


def _tell_of_bits(name: str, key: str, ours: str, conversion: Conversion) -> None:
    if any(part in name for part in ("8bit", "4bit", "bnb", "paged", "fp8")):
        conversion.tell(f"{key} {name} keeps its state in fewer bits or elsewhere; {ours} has it whole, in memory.")


def convert_intervals(source: Source, conversion: Conversion, length: Length, logging_steps: float) -> None:
    """Convert the steps between reports, validations and saves; ours count micro-batches."""
    evaluation = source.raw("eval_strategy", source.raw("evaluation_strategy"))  # the latter in older versions
    validates = not is_off(evaluation)
    reports = source.number("logging_steps", logging_steps)
    wanted = [("logging", "steps_per_report", reports), ("save", "save_every", 500)]
    for what, key, default in [*wanted, ("eval", "steps_per_eval", reports)] if validates else wanted:
        strategy = evaluation if what == "eval" else source.raw(f"{what}_strategy", "steps")
        steps = length.iterations(source.number(f"{what}_steps", default))
        if is_off(strategy):
            conversion.tell(f"{what}_strategy {strategy} has no counterpart: {key} keeps its default.")
        elif strategy == "epoch" and key in EACH_EPOCH:
            conversion.settings[EACH_EPOCH[key]] = True
        elif strategy != "best":  # which convert_checkpoints reads
            put_interval(conversion, key, length.epoch if strategy == "epoch" else steps, source.gives(f"{what}_steps"))
    if validates:
        conversion.put("val_batches", -1, given=False)
    tell_of_intervals(conversion, length)


def tell_of_intervals(conversion: Conversion, length: Length) -> None:
    """Say that the steps between reports and the like are other ones here."""
    if length.accumulation > 1:
        conversion.tell(
            "logging_steps, eval_steps and save_steps count optimizer steps; steps_per_report, steps_per_eval and "
            f"save_every count micro-batches, {length.accumulation} for each."
        )


def put_interval(conversion: Conversion, key: str, iterations: int | None, given: bool) -> None:
    """Set the iterations between two reports, validations or saves, or say that they depend on the rows."""
    if iterations is None:
        conversion.tell(f"{key} depends on the number of training rows and keeps its default; give --rows.")
    else:
        conversion.put(key, iterations, given)


def convert_tracking(source: Source, conversion: Conversion) -> None:
    """Convert where reports and the model go to; nothing leaves the machine where the file does not say so."""
    convert_hub(source, conversion, source.flag("push_to_hub"))
    wanted = source.raw("report_to", [])
    names = [str(name) for name in (wanted if isinstance(wanted, list) else str(wanted).split(","))]
    put_trackers(conversion, [name.strip() for name in names if not is_off(name.strip())])
    project, run_name = source.raw("project"), source.raw("run_name")
    if conversion.settings.get("report_to"):
        conversion.settings |= merged({"project": project, "run_name": run_name and str(run_name).replace("/", "-")})


def convert_hub(source: Source, conversion: Conversion, pushes: bool) -> None:
    """Convert whether the run pushes, which is the name of the repository here, and private by default."""
    if not pushes:
        return
    name = source.text("hub_model_id")
    if name is None:
        conversion.tell("push_to_hub is the name of a repository here; set it to have the adapter pushed.")
        return
    conversion.settings["push_to_hub"] = name
    if source.flag("hub_private_repo", True):
        conversion.tell("push_to_hub makes a private repository; set hub_private_repo: false for a public one.")
    else:
        conversion.settings["hub_private_repo"] = False


def put_trackers(conversion: Conversion, names: list[str]) -> None:
    """Set ``report_to`` to the trackers that there are."""
    known = [name for name in names if name in TRACKERS]
    if known:
        conversion.settings["report_to"] = known
    for name in names:
        if name not in TRACKERS:
            conversion.tell(f"report_to {name} has no counterpart; there are {', '.join(TRACKERS)}.")


def convert_checkpoints(source: Source, conversion: Conversion) -> None:
    """Convert how many checkpoints stay, which is the best, and whether to resume."""
    if source.count("save_total_limit") is not None:
        conversion.put("keep_checkpoints", max(1, source.count("save_total_limit")), given=True)
    metric = str(source.raw("metric_for_best_model", "loss")).removeprefix("eval_")
    source.raw("greater_is_better")
    loads_best = source.flag("load_best_model_at_end")
    if loads_best or source.raw("save_strategy") == "best":
        if metric in BEST_BY:
            conversion.settings |= {"save_best": BEST_BY[metric], **({"load_best": True} if loads_best else {})}
        else:
            conversion.tell(
                f"metric_for_best_model {metric} has no counterpart; save_best takes margin, accuracy, loss."
            )
    resume = source.raw("resume_from_checkpoint")
    if not is_off(resume):
        conversion.settings["resume"] = "auto"
        conversion.tell("resume_from_checkpoint is resume: auto; checkpoints of other programs cannot be read.")


def convert_rest(source: Source, conversion: Conversion, grad_checkpoint: bool, given: bool) -> None:
    """Convert the norm of gradients, the seed and the recomputation of activations.

    Args:
        grad_checkpoint: whether activations are recomputed.
        given: whether the file says so.
    """
    # To transformers null is no limit; Axolotl leaves it out.
    unlimited = source.is_null("max_grad_norm") and conversion.source_name != "Axolotl"
    norm = 0.0 if unlimited else source.number("max_grad_norm", 1.0)
    if norm > 0:
        conversion.put("max_grad_norm", norm, source.gives("max_grad_norm"))
    conversion.put("seed", source.count("seed", 42), source.gives("seed"))
    conversion.put("grad_checkpoint", grad_checkpoint, given)
    # Merging is a step of its own in the other programs.
    conversion.put("fuse", False, given=False)


def convert_training_arguments(
    source: Source,
    conversion: Conversion,
    rows: int | None,
    *,
    learning_rate: float,
    logging_steps: float,
    grad_checkpoint: bool,
    gives_checkpointing: bool,
    optimizer: str | None = None,
) -> None:
    """Convert what TRL and LLaMA-Factory name alike, from the length of the run to its checkpoints.

    Args:
        rows: of the training set, if known.
        learning_rate, logging_steps: the program's defaults.
        grad_checkpoint, gives_checkpointing: as in :func:`convert_rest`.
        optimizer: in place of what ``optim`` says.
    """
    length = convert_length(source, conversion, rows)
    rate = source.number("learning_rate", learning_rate)
    conversion.put("learning_rate", rate, source.gives("learning_rate"))
    convert_schedule(schedule_of(source, rate), conversion, length)
    convert_optimizer(source, conversion, "optim", optimizer or str(source.raw("optim", "adamw_torch_fused")))
    convert_rest(source, conversion, grad_checkpoint, gives_checkpointing)
    convert_intervals(source, conversion, length, logging_steps)
    convert_checkpoints(source, conversion)


def warmup_of(source: Source) -> tuple[float | None, float | None]:
    """Return the steps of the warm-up, or below 1 their share as newer versions have it, and the share of its own key.

    Raises:
        ConfigError: there cannot be as many.
    """
    steps, share = source.number("warmup_steps"), source.number("warmup_ratio")
    if steps is not None and steps < 0:
        raise source.refuse("warmup_steps", "it must be at least 0")
    if share is not None and not 0 <= share < 1:
        raise source.refuse("warmup_ratio", "it must be at least 0 and below 1")
    return steps, share


def schedule_of(source: Source, peak: float) -> ScheduleRequest:
    """Read the schedule from the keys that transformers has for it."""
    name = str(source.raw("lr_scheduler_type", "linear"))
    steps, share = warmup_of(source)
    warmup = steps or share or 0.0
    arguments = source.inside("lr_scheduler_kwargs")
    end = 0.0
    if name == "cosine_with_min_lr":
        end = arguments.number("min_lr", peak * arguments.number("min_lr_rate", 0.0))
    elif name == "polynomial":
        end = arguments.number("lr_end", 1e-7)
        name = name if arguments.number("power", 1.0) == 1 else "polynomial of another power than 1"
    elif name == "cosine_with_restarts" and arguments.count("num_cycles", 1) != 1:
        name = "cosine_with_restarts of several cycles"
    return ScheduleRequest(name, peak, warmup, end)

"""The CPO training run: one loop, readable from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers

from mlx_cpo_plugin.activations import lean_activations
from mlx_cpo_plugin.batches import BatchSize, collate, scored_tokens, training_plan
from mlx_cpo_plugin.checkpointing import checkpointed_layers
from mlx_cpo_plugin.checkpoints import save_adapter, save_adapter_config, save_checkpoint, verify_adapter
from mlx_cpo_plugin.cpo import SCORING
from mlx_cpo_plugin.data import as_pairs
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import ConfigError, DataError
from mlx_cpo_plugin.evaluation import evaluate_pairs
from mlx_cpo_plugin.gradients import AnswerGradients, BatchGradients, GradientMethod, SharedPromptGradients
from mlx_cpo_plugin.grouping import PairSize, padding_rooms
from mlx_cpo_plugin.host.substrate import SFTTrainingArgs, TrainingCallback, protect_recurrences
from mlx_cpo_plugin.long_context import SegmentGradients
from mlx_cpo_plugin.memory import device_memory_limit
from mlx_cpo_plugin.metrics import MetricsFile
from mlx_cpo_plugin.objective import Objective, objective_for
from mlx_cpo_plugin.optimizer_step import OptimizerStep
from mlx_cpo_plugin.parity import choose_scorer
from mlx_cpo_plugin.qat import FakeQuantisation, fake_quantised
from mlx_cpo_plugin.quantised_layers import unpacked_products
from mlx_cpo_plugin.reporting import ProgressReporter
from mlx_cpo_plugin.scoring import compilation_pays, compile_where_it_pays, score_answers
from mlx_cpo_plugin.shared_prompt import SharedPromptScorer, share

DEFAULT_SEQ_STEP_SIZE = 512


@dataclass
class CPOTrainingArgs(SFTTrainingArgs):
    """The settings of :func:`train_cpo`: those of the host's SFT training, and CPO's own."""

    loss_type: str = field(default="sigmoid", metadata={"help": "Preference loss, e.g. sigmoid, hinge, ipo or dpop."})
    beta: float = field(default=0.1, metadata={"help": "Temperature inside the loss."})
    delta: float = field(default=50.0, metadata={"help": "Coefficient of the drift penalty of dpop."})
    reference_model_path: str | None = field(default=None, metadata={"help": "Not used: CPO has no reference model."})
    loss_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of a registered loss beside beta and delta."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the order of the pairs."})
    scoring: str = field(
        default="auto", metadata={"help": "Share the prompt of a pair's answers (shared), or not (plain); auto tries."}
    )
    batch_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens that the pairs of a batch have at most, instead of batch_size."},
    )
    compile: bool | None = field(default=None, metadata={"help": "Compile the step; by default on a GPU only."})

    @classmethod
    def from_settings(cls, settings: Any, adapter_file: Path) -> CPOTrainingArgs:
        """Take the arguments from a namespace of resolved settings, named as in YAML."""
        step_size = settings.seq_step_size or DEFAULT_SEQ_STEP_SIZE
        return cls(
            loss_type=settings.dpo_cpo_loss_type,
            beta=settings.beta,
            delta=settings.delta,
            loss_options=dict(settings.loss_options),
            batch_size=settings.batch_size,
            iters=settings.iters,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            val_batches=settings.val_batches,
            steps_per_report=settings.steps_per_report,
            steps_per_eval=settings.steps_per_eval,
            steps_per_save=settings.save_every,
            max_seq_length=settings.max_seq_length,
            adapter_file=str(adapter_file),
            grad_checkpoint=settings.grad_checkpoint,
            seq_step_size=step_size if settings.efficient_long_context else None,
            recurrence_chunk_size=settings.recurrence_chunk_size,
            qat_enable=settings.qat_enable,
            qat_bits=settings.qat_bits,
            qat_group_size=settings.qat_group_size,
            qat_mode=settings.qat_mode,
            qat_start_step=settings.qat_start_step,
            qat_interval=settings.qat_interval,
            seed=settings.seed,
            scoring=settings.scoring,
            batch_tokens=settings.batch_tokens,
        )

    def loss_settings(self) -> Mapping[str, Any]:
        """Return the values of the losses' options by name."""
        return {"beta": self.beta, "delta": self.delta, **self.loss_options}


def train_cpo(
    model: nn.Module,
    optimizer: optimizers.Optimizer,
    train_dataset: Sequence[Any],
    val_dataset: Sequence[Any] | None = None,
    args: CPOTrainingArgs | None = None,
    loss_fn: Callable[..., mx.array] | None = None,
    training_callback: TrainingCallback | None = None,
) -> None:
    """Train ``model`` on preference pairs and leave the adapter in ``args.adapter_file``.

    Args:
        model: an mlx_lm model whose trainable parameters are the adapter (or everything).
        train_dataset, val_dataset: pairs, or the host's tokenised preference rows.
        loss_fn: replaces the loss that ``args.loss_type`` names; same signature as a registered loss.
        training_callback: receives the host's ``on_train_loss_report`` and ``on_val_loss_report``.

    Raises:
        ConfigError: a setting is out of range.
        DataError: there is no pair to train on.
        CheckpointError: the adapter cannot be written, or does not score the same when loaded back.
    """
    args = args or CPOTrainingArgs()
    check_training_args(args)
    objective = objective_for(args.loss_type, args.loss_settings(), loss_fn)
    pairs = as_pairs(train_dataset, args.max_seq_length)
    val_pairs = as_pairs(val_dataset or [], args.max_seq_length)
    if not pairs:
        raise DataError("There is no preference pair to train on; check the data with 'mlx-cpo check'.")

    world = mx.distributed.init()
    adapter_file = Path(args.adapter_file)
    metrics_file = MetricsFile(adapter_file.parent / "metrics.jsonl" if world.rank() == 0 else None)
    reporter = ProgressReporter(objective.beta, training_callback, metrics_file)
    plan = training_plan(
        [pair.tokens for pair in pairs],
        BatchSize(args.batch_size, args.batch_tokens, args.gradient_accumulation_steps),
        iters=args.iters,
        seed=args.seed,
        rank=world.rank(),
        world_size=world.size(),
    )

    def validate(iteration: int) -> None:
        started = time.perf_counter()
        quantisation.active = False  # whatever step it follows: validations are comparable, and with the final test
        means, _ = evaluate_pairs(
            model, val_pairs, objective, batch_size=args.batch_size, num_batches=args.val_batches, scorer=scorer
        )
        reporter.report_validation(iteration, means, time.perf_counter() - started)

    with training_environment(model, args) as quantisation:
        scorer = choose_scorer(model, pairs, args.scoring, reporter.say)
        step = OptimizerStep(model, optimizer, *gradient_methods(model, objective, scorer, pairs, args))
        optimizer_step = 1
        if world.rank() == 0:
            save_adapter_config(model, adapter_file)
        if val_pairs:
            with reporter.pause():
                validate(iteration=1)

        for iteration, micro_batch in reporter.iterations_of(plan, args.iters):
            quantisation.active = args.qat_enable and quantisation.applies_to(optimizer_step)
            batch_pairs = [pairs[index] for index in micro_batch.indices]
            if batch_pairs:
                losses, scores = step.add(batch_pairs, micro_batch.window_pairs, quantisation.active)
                reporter.add(losses, scores, scored_tokens(batch_pairs))
            if micro_batch.closes_window:
                reporter.add_step(step.apply())
                optimizer_step += 1
            reporter.count_iteration()

            if iteration % args.steps_per_report == 0 or iteration == args.iters:
                reporter.report_training(iteration, optimizer.learning_rate.item(), micro_batch.epoch)
            if val_pairs and (iteration % args.steps_per_eval == 0 or iteration == args.iters):
                with reporter.pause():
                    validate(iteration)
            if iteration % args.steps_per_save == 0 and world.rank() == 0:
                checkpoint = save_checkpoint(model, adapter_file, iteration)
                reporter.say(f"Iter {iteration}: Saved adapter weights to {adapter_file} and {checkpoint}.")

        quantisation.active = False
        if world.rank() == 0:
            save_adapter(model, adapter_file)
            verify_saved_adapter(model, adapter_file, min(pairs, key=lambda pair: pair.length), scorer)
            reporter.say(f"Saved final weights to {adapter_file}.")


def gradient_methods(
    model: nn.Module,
    objective: Objective,
    scorer: SharedPromptScorer | None,
    pairs: Sequence[PreferencePair],
    args: CPOTrainingArgs,
) -> tuple[GradientMethod, GradientMethod, float]:
    """Return how gradients are computed, how those of long pairs are, and above how many tokens a pair is long."""
    long_above = args.seq_step_size if args.seq_step_size is not None else float("inf")
    if scorer is None:
        return BatchGradients(model, objective), AnswerGradients(model, objective), long_above
    whole = SegmentGradients(model, objective, scorer)
    in_segments = SegmentGradients(model, objective, scorer, args.seq_step_size)
    compiled, grouping = compilation_pays(args.compile), scorer.grouping
    if compiled:  # for few shapes; without compilation nothing is padded further than the longest of a group
        sizes = [PairSize.of(share(pair)) for pair in pairs]
        grouping = replace(grouping, rooms=padding_rooms(sizes, grouping.budget))
    shared = SharedPromptGradients(model, objective, scorer, whole.pair_gradients, grouping, compiled)
    return shared, in_segments, long_above


def evaluate_cpo(
    model: nn.Module,
    dataset: Sequence[Any],
    batch_size: int,
    num_batches: int,
    beta: float,
    delta: float,
    max_seq_length: int,
    loss_type: str,
    loss_fn: Callable[..., mx.array] | None = None,
    loss_options: Mapping[str, Any] | None = None,
    scoring: str = "auto",
) -> tuple[float, list[float], int, dict[str, float]]:
    """Return loss, [chosen reward, rejected reward], scored tokens, and the other means over pairs by name.

    The signature and the result are the host's; ``loss_options`` holds options of losses beside beta and delta,
    ``scoring`` is ``auto``, ``shared`` or ``plain``. ``num_batches`` -1 means all.
    """
    objective = objective_for(loss_type, {"beta": beta, "delta": delta, **(loss_options or {})}, loss_fn)
    pairs = as_pairs(dataset, max_seq_length)
    with compile_where_it_pays(), unpacked_products(model):
        scorer = choose_scorer(model, pairs, scoring)
        means, tokens = evaluate_pairs(
            model, pairs, objective, batch_size=batch_size, num_batches=num_batches, scorer=scorer
        )
    rewards = [means.pop("chosen_reward"), means.pop("rejected_reward")]
    return means.pop("loss"), rewards, tokens, means


@contextmanager
def training_environment(model: nn.Module, args: CPOTrainingArgs) -> Iterator[FakeQuantisation]:
    """Put model and device into the state that training wants; undo it however training ends."""
    protect_recurrences(model, args.recurrence_chunk_size)
    limit = device_memory_limit()
    with ExitStack() as stack:
        stack.enter_context(compile_where_it_pays(args.compile))
        stack.enter_context(lean_activations())
        stack.enter_context(unpacked_products(model))
        stack.enter_context(checkpointed_layers(model, args.grad_checkpoint))
        quantisation = FakeQuantisation()
        if args.qat_enable:
            quantisation = stack.enter_context(
                fake_quantised(
                    model,
                    bits=args.qat_bits,
                    group_size=args.qat_group_size,
                    start_step=args.qat_start_step,
                    interval=args.qat_interval,
                )
            )
        if limit is not None:
            stack.callback(mx.set_wired_limit, mx.set_wired_limit(limit))
        stack.callback(model.eval)
        model.train()
        yield quantisation


def verify_saved_adapter(
    model: nn.Module, adapter_file: Path, pair: PreferencePair, scorer: SharedPromptScorer | None
) -> None:
    """Load the adapter back and check that it gives ``pair`` the same log-probs to the bit."""
    model.eval()

    def logps() -> mx.array:
        scores = score_answers(model, collate([pair])) if scorer is None else scorer.score(share(pair))
        return mx.concatenate([scores.chosen_logps, scores.rejected_logps])

    verify_adapter(model, adapter_file, logps)


def check_training_args(args: CPOTrainingArgs) -> None:
    """Check what a direct caller gave; runs that come from YAML were checked with file and line before.

    Raises:
        ConfigError: names the argument, its value and what is allowed.
    """
    rules: list[tuple[str, bool, str]] = [
        (name, getattr(args, name) >= 1, "at least 1")
        for name in (
            "batch_size",
            "iters",
            "gradient_accumulation_steps",
            "steps_per_report",
            "steps_per_eval",
            "steps_per_save",
            "qat_start_step",
            "qat_interval",
        )
    ]
    rules.append(("beta", args.beta > 0, "above 0"))
    rules.append(("delta", args.delta >= 0, "at least 0"))
    rules.append(("qat_bits", 2 <= args.qat_bits <= 16, "from 2 to 16"))
    rules.append(("val_batches", args.val_batches >= 1 or args.val_batches == -1, "at least 1, or -1 for all"))
    rules.append(("max_seq_length", args.max_seq_length >= 4, "at least 4"))
    rules.append(("batch_tokens", args.batch_tokens is None or args.batch_tokens >= 1, "at least 1, or None"))
    rules.append(("scoring", args.scoring in SCORING.choices, SCORING.allowed()))
    rules.append(("qat_mode", args.qat_mode == "affine", "'affine'"))
    for name, holds, allowed in rules:
        if not holds:
            raise ConfigError(f"{name} is {getattr(args, name)!r}, but must be {allowed}.")

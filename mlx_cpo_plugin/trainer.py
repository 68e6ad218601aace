"""The CPO training run: one loop, readable from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers

from mlx_cpo_plugin.activations import lean_activations
from mlx_cpo_plugin.alarms import DisplacementAlarm, last_good_weights_kept
from mlx_cpo_plugin.batches import BatchSize, collate, scored_tokens, training_plan
from mlx_cpo_plugin.best import BEST_ADAPTER_NAME, BestSoFar, PlateauAdvice
from mlx_cpo_plugin.checkpointing import checkpointed_layers
from mlx_cpo_plugin.checkpoints import save_adapter, save_adapter_config, save_checkpoint, verify_adapter
from mlx_cpo_plugin.data import as_pairs
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.evaluation import evaluate_pairs
from mlx_cpo_plugin.gradients import AnswerGradients, BatchGradients, GradientMethod, SharedPromptGradients
from mlx_cpo_plugin.grouping import PairSize, padding_rooms
from mlx_cpo_plugin.host.substrate import TrainingCallback, protect_recurrences
from mlx_cpo_plugin.long_context import SegmentGradients
from mlx_cpo_plugin.memory import device_memory_limit
from mlx_cpo_plugin.memory_estimate import memory_report
from mlx_cpo_plugin.metrics import MetricsFile
from mlx_cpo_plugin.objective import Objective, objective_for
from mlx_cpo_plugin.optimizer_step import OptimizerStep
from mlx_cpo_plugin.parity import choose_scorer
from mlx_cpo_plugin.qat import FakeQuantisation, fake_quantised
from mlx_cpo_plugin.quantised_layers import unpacked_products
from mlx_cpo_plugin.reporting import ProgressReporter
from mlx_cpo_plugin.scoring import compilation_pays, compile_where_it_pays, score_answers
from mlx_cpo_plugin.shared_prompt import SharedPromptScorer, share
from mlx_cpo_plugin.stopping import StoppedError, only_run_in, stop_requests
from mlx_cpo_plugin.training_args import CPOTrainingArgs, check_training_args
from mlx_cpo_plugin.training_state import RunCheckpoints, TrainingState, identity


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
        TrainingError: losses or gradients are no numbers, nothing is trained, or memory is at an end.
        StoppedError: Ctrl-C or SIGTERM; what was done is saved.
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
    best = BestSoFar(args.save_best or "loss", args.early_stopping_patience)
    plateau, displacement = PlateauAdvice(args.loss_type, args.iters), DisplacementAlarm(args.loss_type)
    plan = training_plan(
        [pair.tokens for pair in pairs],
        BatchSize(args.batch_size, args.batch_tokens, args.gradient_accumulation_steps),
        iters=args.iters,
        seed=args.seed,
        rank=world.rank(),
        world_size=world.size(),
    )

    def validate(iteration: int) -> dict[str, float]:
        started = time.perf_counter()
        quantisation.active = False  # whatever step it follows: validations are comparable, and with the final test
        means, _ = evaluate_pairs(
            model, val_pairs, objective, batch_size=args.batch_size, num_batches=args.val_batches, scorer=scorer
        )
        reporter.report_validation(iteration, means, time.perf_counter() - started)
        return means

    def save_weights() -> None:
        if world.rank() == 0:
            save_adapter(model, adapter_file)

    with (
        only_run_in(adapter_file.parent),
        stop_requests() as stop,
        training_environment(model, args) as quantisation,
        last_good_weights_kept(save_weights),
    ):
        scorer = choose_scorer(model, pairs, args.scoring, reporter.say)
        step = OptimizerStep(
            model, optimizer, *gradient_methods(model, objective, scorer, pairs, args), args.max_grad_norm
        )
        state = TrainingState(
            model, step, {"reporter": reporter, "best": best, "plateau": plateau, "displacement": displacement}
        )
        checkpoints = RunCheckpoints(
            adapter_file.parent, args.keep_checkpoints, identity(args, model, optimizer, pairs)
        )
        for line in memory_report(model, optimizer, pairs, scorer, args):
            reporter.say(line)
        if args.resume is not None:
            checkpoints.resume(args.resume, state, reporter.say)
        reporter.start_trackers()
        if state.iteration == 0:
            checkpoints.begin(state)
        if world.rank() == 0:
            save_adapter_config(model, adapter_file)
        if val_pairs and state.iteration == 0:
            with reporter.pause():
                validate(iteration=1)

        for iteration, micro_batch in reporter.iterations_of(plan, args.iters, done=state.iteration):
            quantisation.active = args.qat_enable and quantisation.applies_to(step.number)
            batch_pairs = [pairs[index] for index in micro_batch.indices]
            if batch_pairs:
                losses, scores = step.add(batch_pairs, micro_batch.window_pairs, quantisation.active)
                reporter.add(losses, scores, scored_tokens(batch_pairs))
                reporter.warn(displacement.warning(iteration, scores))
            if micro_batch.closes_window:
                reporter.add_step(step.apply())
            reporter.count_iteration()
            state.iteration = iteration

            if iteration % args.steps_per_report == 0 or iteration == args.iters:
                reporter.report_training(iteration, optimizer.learning_rate.item(), micro_batch.epoch)
            if val_pairs and (iteration % args.steps_per_eval == 0 or iteration == args.iters):
                with reporter.pause():
                    means = validate(iteration)
                if best.improved(iteration, means) and args.save_best is not None and world.rank() == 0:
                    save_adapter(model, adapter_file.with_name(BEST_ADAPTER_NAME))
                reporter.warn(plateau.advice(iteration, means))
            stopping = stop.agreed()
            if iteration % args.steps_per_save == 0 and world.rank() == 0:
                numbered = save_checkpoint(model, adapter_file, iteration)
                reporter.say(f"Iter {iteration}: Saved adapter weights to {adapter_file} and {numbered}.")
            if iteration % args.steps_per_save == 0 or iteration == args.iters or stopping or best.exhausted:
                checkpoints.save(state)
            if stopping:
                save_weights()
                raise StoppedError(iteration, stop.signal_number)
            if best.exhausted:
                reporter.say(f"Iter {iteration}: stopping, no validation since {best.iteration} was better.")
                break

        quantisation.active = False
        save_weights()
        if world.rank() == 0:
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

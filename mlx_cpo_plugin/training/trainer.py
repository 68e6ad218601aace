"""The CPO training run: one loop, readable from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers

from mlx_cpo_plugin.blas import use_fast_blas
from mlx_cpo_plugin.checkpoints.adapter import (
    describe_adapter,
    save_adapter,
    save_adapter_config,
    save_checkpoint,
    verify_adapter,
    write_atomically,
)
from mlx_cpo_plugin.checkpoints.training_state import RunCheckpoints, Stateful, TrainingState, identity
from mlx_cpo_plugin.data import as_pairs
from mlx_cpo_plugin.data.batches import BatchSize, MicroBatch, collate, scored_tokens, training_plan
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.host.substrate import TrainingCallback, memory_safe_recurrences
from mlx_cpo_plugin.layers.activations import lean_activations
from mlx_cpo_plugin.layers.checkpointing import checkpointed_layers
from mlx_cpo_plugin.layers.quantised import unpacked_products
from mlx_cpo_plugin.scoring.answers import compilation_pays, compile_where_it_pays, score_answers
from mlx_cpo_plugin.scoring.grouping import PairSize, padding_rooms
from mlx_cpo_plugin.scoring.memory import device_memory_limit
from mlx_cpo_plugin.scoring.parity import choose_scorer
from mlx_cpo_plugin.scoring.shared_prompt import SharedPromptScorer, share
from mlx_cpo_plugin.settings.run_settings import FILE_NAME as RUN_SETTINGS
from mlx_cpo_plugin.settings.run_settings import as_yaml, recorded_arguments
from mlx_cpo_plugin.training.alarms import DisplacementAlarm, last_good_weights_kept
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs, check_training_args
from mlx_cpo_plugin.training.best import BEST_ADAPTER_NAME, BestSoFar, PlateauAdvice
from mlx_cpo_plugin.training.evaluation import evaluate_pairs
from mlx_cpo_plugin.training.gradients import AnswerGradients, BatchGradients, GradientMethod, SharedPromptGradients
from mlx_cpo_plugin.training.long_context import SegmentGradients
from mlx_cpo_plugin.training.memory_estimate import Way, memory_report
from mlx_cpo_plugin.training.memory_watch import MemoryWatch
from mlx_cpo_plugin.training.metrics import MetricsFile
from mlx_cpo_plugin.training.objective import Objective, objective_for
from mlx_cpo_plugin.training.optimizer_step import OptimizerStep
from mlx_cpo_plugin.training.qat import FakeQuantisation, fake_quantised
from mlx_cpo_plugin.training.ranks import ranks_end_together
from mlx_cpo_plugin.training.reporting import ProgressReporter
from mlx_cpo_plugin.training.stopping import StoppedError, StopRequest, only_run_in, stop_requests


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
        loss_fn: replaces the loss that ``args.loss_type`` names; it is called like this loss, with those of its options
            that it takes.
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
    use_fast_blas()
    objective = objective_for(args.loss_type, args.loss_settings(), loss_fn, args.cpo_alpha)
    pairs = as_pairs(train_dataset, args.max_seq_length)
    val_pairs = as_pairs(val_dataset or [], args.max_seq_length)
    if not pairs:
        raise DataError("There is no preference pair to train on; check the data with 'mlx-cpo check'.")

    with (
        ranks_end_together(),
        only_run_in(Path(args.adapter_file).parent),
        stop_requests() as stop,
        training_environment(model, args) as quantisation,
        last_good_weights_kept(partial(save_weights, model, Path(args.adapter_file))),
    ):
        run = _Run(model, optimizer, objective, pairs, val_pairs, args, quantisation, training_callback)
        run.begin()
        run.train(stop)
        run.finish()


class _Run:
    """A training run inside its environment: its parts, and what is done with them before, during and after."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: optimizers.Optimizer,
        objective: Objective,
        pairs: Sequence[PreferencePair],
        val_pairs: Sequence[PreferencePair],
        args: CPOTrainingArgs,
        quantisation: FakeQuantisation,
        training_callback: TrainingCallback | None,
    ) -> None:
        self.model, self.objective, self.args, self.quantisation = model, objective, args, quantisation
        self.pairs, self.val_pairs = pairs, val_pairs
        self.adapter_file = Path(args.adapter_file)
        self.is_first_rank = mx.distributed.init().rank() == 0
        metrics_file = MetricsFile(self.adapter_file.parent / "metrics.jsonl" if self.is_first_rank else None)
        self.reporter = ProgressReporter(objective, training_callback, metrics_file)
        self.best = BestSoFar(args.save_best or "loss", args.early_stopping_patience)
        self.plateau = PlateauAdvice(args.loss_type, args.iters)
        self.displacement = DisplacementAlarm(args.loss_type)
        self.scorer = choose_scorer(model, pairs, args.scoring, self.reporter.say)
        self.memory = MemoryWatch(model, Way.of(args, None if self.scorer is None else self.scorer.grouping))
        self.step = OptimizerStep(
            model, optimizer, *gradient_methods(model, objective, self.scorer, pairs, args), args.max_grad_norm
        )
        remembering: dict[str, Stateful] = {"reporter": self.reporter, "best": self.best}
        remembering |= {"plateau": self.plateau, "displacement": self.displacement}
        self.state = TrainingState(model, self.step, remembering)
        self.checkpoints = RunCheckpoints(
            self.adapter_file.parent, args.keep_checkpoints, identity(args, model, optimizer, pairs)
        )

    def begin(self) -> None:
        """Go on from a checkpoint if that is wanted; otherwise validate what there is before training."""
        for line in memory_report(self.model, self.step.optimizer, self.pairs, self.scorer, self.args):
            self.reporter.say(line)
        if self.args.resume is not None:
            self.checkpoints.resume(self.args.resume, self.state, self.reporter.say)
        self.reporter.start_trackers()
        if self.is_first_rank:
            save_adapter_config(self.model, self.adapter_file)
            self.save_settings()
        if self.state.iteration == 0:
            self.checkpoints.begin(self.state)
            if self.val_pairs:
                self.validate(iteration=1)

    def save_settings(self) -> None:
        """Write down what the run was configured with."""
        values = self.args.run_settings
        if values is None:
            values = recorded_arguments(self.args, self.step.optimizer, describe_adapter(self.model))
        text = as_yaml(values)
        write_atomically(
            self.adapter_file.with_name(RUN_SETTINGS), lambda partial: partial.write_text(text, encoding="utf-8")
        )

    def train(self, stop: StopRequest) -> None:
        """Work through the plan, from where the state is to its end, or to where the run is to stop."""
        args, reporter, step = self.args, self.reporter, self.step
        chosen_tokens = [pair.chosen_tokens for pair in self.pairs]
        for iteration, micro_batch in reporter.iterations_of(self.plan(), args.iters, done=self.state.iteration):
            self.quantisation.active = args.qat_enable and self.quantisation.applies_to(step.number)
            pairs = [self.pairs[index] for index in micro_batch.indices]
            if pairs:
                self.prepare_for_risk(pairs)
                losses, scores = step.add(pairs, micro_batch.totals(chosen_tokens), self.quantisation.active)
                reporter.add(losses, scores, scored_tokens(pairs))
                reporter.warn(self.displacement.warning(iteration, scores))
            if micro_batch.closes_window:
                reporter.add_step(step.apply())
            reporter.count_iteration()
            self.state.iteration = iteration

            last = iteration == args.iters
            if last or iteration % args.steps_per_report == 0:
                reporter.report_training(iteration, step.optimizer.learning_rate.item(), micro_batch.epoch)
            if self.val_pairs and (last or iteration % args.steps_per_eval == 0):
                self.validate_and_compare(iteration)
            stopping, exhausted = stop.agreed(), self.best.exhausted
            if iteration % args.steps_per_save == 0:
                self.save_numbered(iteration)
            if last or stopping or exhausted or iteration % args.steps_per_save == 0:
                self.checkpoints.save(self.state)
            if stopping:
                save_weights(self.model, self.adapter_file)
                raise StoppedError(iteration, stop.signal_number)
            if exhausted:
                reporter.say(f"Iter {iteration}: stopping, no validation since {self.best.iteration} was better.")
                break

    def prepare_for_risk(self, pairs: Sequence[PreferencePair]) -> None:
        """Warn, and save what is done, before a micro-batch for which memory may not suffice."""
        risk = self.memory.risk(pairs, self.step.number)
        if risk is None:
            return
        self.reporter.warn(risk)
        # Ranks save together: a checkpoint of one alone is none to go on from.
        if self.state.iteration and mx.distributed.init().size() == 1:
            self.checkpoints.save(self.state)

    def finish(self) -> None:
        """Save the adapter, and see that it can be loaded."""
        self.quantisation.active = False
        save_weights(self.model, self.adapter_file)
        if self.is_first_rank:
            shortest = min(self.pairs, key=lambda pair: pair.length)
            verify_saved_adapter(self.model, self.adapter_file, shortest, self.scorer)
            self.reporter.say(f"Saved final weights to {self.adapter_file}.")

    def plan(self) -> Iterator[MicroBatch]:
        """Return the micro-batches of the whole run, as this rank has them."""
        args, world = self.args, mx.distributed.init()
        return training_plan(
            [pair.tokens for pair in self.pairs],
            BatchSize(args.batch_size, args.batch_tokens, args.gradient_accumulation_steps),
            iters=args.iters,
            seed=args.seed,
            rank=world.rank(),
            world_size=world.size(),
        )

    def validate(self, iteration: int) -> dict[str, float]:
        """Report the means over the validation pairs, and return them."""
        args, started = self.args, time.perf_counter()
        self.quantisation.active = False  # whatever step it follows, to be comparable with the others
        with self.reporter.pause():
            means, _ = evaluate_pairs(
                self.model,
                self.val_pairs,
                self.objective,
                batch_size=args.batch_size,
                num_batches=args.val_batches,
                scorer=self.scorer,
            )
            self.reporter.report_validation(iteration, means, time.perf_counter() - started)
        return means

    def validate_and_compare(self, iteration: int) -> None:
        """Validate, and keep the adapter beside the last one where it is the best so far."""
        means = self.validate(iteration)
        if self.best.improved(iteration, means) and self.args.save_best is not None and self.is_first_rank:
            save_adapter(self.model, self.adapter_file.with_name(BEST_ADAPTER_NAME))
        self.reporter.warn(self.plateau.advice(iteration, means))

    def save_numbered(self, iteration: int) -> None:
        """Save the adapter as it is, and once more under the number of the iteration."""
        if self.is_first_rank:
            numbered = save_checkpoint(self.model, self.adapter_file, iteration)
            self.reporter.say(f"Iter {iteration}: Saved adapter weights to {self.adapter_file} and {numbered}.")


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
    cpo_alpha: float = 0.0,
) -> tuple[float, list[float], int, dict[str, float]]:
    """Return loss, [chosen reward, rejected reward], scored tokens, and the other means over pairs by name.

    The signature and the result are the host's; ``loss_options`` holds options of losses beside beta and delta,
    ``scoring`` is ``auto``, ``shared`` or ``plain``, and ``cpo_alpha`` weighs the negative log-likelihood of the chosen
    answers in the loss, a mean over all their tokens. ``num_batches`` -1 means all.
    """
    use_fast_blas()
    objective = objective_for(loss_type, {"beta": beta, "delta": delta, **(loss_options or {})}, loss_fn, cpo_alpha)
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
    limit = device_memory_limit()
    with ExitStack() as stack:
        stack.enter_context(memory_safe_recurrences(model, args.recurrence_chunk_size))
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


def save_weights(model: nn.Module, adapter_file: Path) -> None:
    """Save the adapter as it is, on the first rank."""
    if mx.distributed.init().rank() == 0:
        save_adapter(model, adapter_file)


def verify_saved_adapter(
    model: nn.Module, adapter_file: Path, pair: PreferencePair, scorer: SharedPromptScorer | None
) -> None:
    """Load the adapter back and check that it gives ``pair`` the same log-probs to the bit."""
    model.eval()

    def logps() -> mx.array:
        scores = score_answers(model, collate([pair])) if scorer is None else scorer.score(share(pair))
        return mx.concatenate([scores.chosen_logps, scores.rejected_logps])

    verify_adapter(model, adapter_file, logps)

"""The CPO training run: one loop, readable from top to bottom."""

from __future__ import annotations

import shutil
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

from mlx_cpo_plugin._version import __version__, host_version
from mlx_cpo_plugin.blas import use_fast_blas
from mlx_cpo_plugin.checkpoints.adapter import (
    CheckpointError,
    adapter_in_place,
    describe_adapter,
    save_adapter,
    save_adapter_config,
    save_and_verify,
    save_checkpoint,
    write_atomically,
)
from mlx_cpo_plugin.checkpoints.folder import Checkpoint, read_checkpoint
from mlx_cpo_plugin.checkpoints.resuming import find_start, once_put_aside
from mlx_cpo_plugin.checkpoints.run_folder import (
    begin_run,
    goes_on,
    only_run_in,
    record_done,
    written_files_recorded,
)
from mlx_cpo_plugin.checkpoints.run_identity import TRAINED
from mlx_cpo_plugin.console import lasting_output
from mlx_cpo_plugin.data import PreferenceDataset
from mlx_cpo_plugin.data.batches import BatchSize, MicroBatch, last_step_start, scored_tokens, training_plan
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import compilation_pays, compile_where_it_pays, wired_limit
from mlx_cpo_plugin.errors import ConfigError, DataError, StoppedError
from mlx_cpo_plugin.host import SFTTrainingArgs, TrainingCallback, memory_safe_recurrences
from mlx_cpo_plugin.model.activations import lean_activations
from mlx_cpo_plugin.model.grouping import Grouping, PairSize, padding_rooms
from mlx_cpo_plugin.model.parity import choose_scorer
from mlx_cpo_plugin.model.products import float32_products
from mlx_cpo_plugin.model.recompute import checkpointed_layers
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer, share
from mlx_cpo_plugin.settings.run_settings import FILE_NAME as RUN_SETTINGS
from mlx_cpo_plugin.settings.run_settings import as_yaml, recorded_arguments
from mlx_cpo_plugin.training.alarms import DisplacementAlarm
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.best import BEST_ADAPTER_NAME, BestSoFar, PlateauAdvice
from mlx_cpo_plugin.training.call import pairs_of, training_arguments
from mlx_cpo_plugin.training.evaluation import evaluate_pairs
from mlx_cpo_plugin.training.exits import LastWhole, out_of_memory_told, saved_on_the_way_out, saved_sentence
from mlx_cpo_plugin.training.gradients import AnswerGradients, BatchGradients, GradientMethod, SharedPromptGradients
from mlx_cpo_plugin.training.held_out import held_out_rows, scores_of
from mlx_cpo_plugin.training.long_context import SegmentGradients
from mlx_cpo_plugin.training.memory_estimate import Way, memory_report
from mlx_cpo_plugin.training.memory_watch import MemoryWatch
from mlx_cpo_plugin.training.metrics import METRICS_NAME, MetricsFile, lines_of
from mlx_cpo_plugin.training.objective import Objective, objective_for
from mlx_cpo_plugin.training.optimizer_step import OptimizerStep
from mlx_cpo_plugin.training.qat import FakeQuantisation, fake_quantised
from mlx_cpo_plugin.training.reporting import ProgressReporter
from mlx_cpo_plugin.training.state import (
    RunCheckpoints,
    Stateful,
    TrainingState,
    can_go_on,
    check_identity,
    data_digest,
    identity,
)
from mlx_cpo_plugin.training.stopping import StopRequest, stop_requests


def train_cpo(
    model: nn.Module,
    optimizer: optimizers.Optimizer,
    train_dataset: Sequence[Any],
    val_dataset: Sequence[Any] | None = None,
    args: CPOTrainingArgs | SFTTrainingArgs | None = None,
    loss_fn: Callable[..., Any] | None = None,
    training_callback: TrainingCallback | None = None,
    tokenizer: Any = None,
) -> None:
    """Train ``model`` on preference pairs and leave the adapter in ``args.adapter_file``.

    Args:
        model: an mlx_lm model whose trainable parameters are the adapter (or everything).
        train_dataset, val_dataset: pairs, the host's tokenised preference rows, or raw rows; see
            :func:`mlx_cpo_plugin.training.call.pairs_of`.
        args: settings, as CPOTrainingArgs or as the host's own; see
            :func:`mlx_cpo_plugin.training.call.training_arguments`.
        loss_fn: replaces the loss that ``args.loss_type`` names; it is called like this loss, with those of its options
            that it takes, or like the host's ``cpo_loss`` where it has its parameters.
        training_callback: receives the host's ``on_train_loss_report`` and ``on_val_loss_report``; where it has a
            ``stream`` that it prints on, what the run says goes there, too.
        tokenizer: of the model; only raw rows need it.

    Raises:
        ConfigError: a setting is out of range.
        DataError: there is no pair to train on.
        CheckpointError: the adapter cannot be written, or does not score the same when loaded back.
        TrainingError: losses or gradients are no numbers, nothing is trained, or memory is at an end.
        StoppedError: Ctrl-C, SIGTERM or SIGHUP; what was done is saved.
        Exception: whatever a callback raises; what was done is saved.
    """
    args = training_arguments(args)
    use_fast_blas()
    objective = objective_for(args.loss_type, args.loss_settings(), loss_fn, args.cpo_alpha)
    pairs = pairs_of(train_dataset, args.max_seq_length, tokenizer)
    val_pairs = pairs_of(val_dataset if args.val_batches else None, args.max_seq_length, tokenizer, "valid")
    if not pairs:
        raise DataError("There is no preference pair to train on; check the data with 'mlx-cpo check'.")

    with (
        lasting_output(),
        only_run_in(Path(args.adapter_file).parent),
        stop_requests() as stop,
        out_of_memory_told(),
        training_environment(model, args) as quantisation,
    ):
        run = _Run(model, optimizer, objective, pairs, val_pairs, args, quantisation, training_callback)
        run.introduce()
        if not run.begin():
            return
        with saved_on_the_way_out(run.save_on_the_way_out, stop, run.reporter.say):
            run.train(stop)
        run.finish()
        if stop.agreed():
            raise run.stopped(stop)


class _Run:
    """A training run inside its environment: its parts, and what is done with them before, during and after."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: optimizers.Optimizer,
        objective: Objective,
        pairs: PreferenceDataset,
        val_pairs: PreferenceDataset,
        args: CPOTrainingArgs,
        quantisation: FakeQuantisation,
        training_callback: TrainingCallback | None,
    ) -> None:
        self.model, self.objective, self.args, self.quantisation = model, objective, args, quantisation
        self.pairs, self.val_pairs = pairs, val_pairs
        self.adapter_file = Path(args.adapter_file)
        self.folder = self.adapter_file.parent
        self.is_first_rank = mx.distributed.init().rank() == 0
        self.last_step_start = last_step_start(
            [pair.tokens for pair in pairs], batch_size_of(args), iters=args.iters, seed=args.seed or 0
        )
        usable = partial(can_go_on, iters=args.iters, last_step_start=self.last_step_start)
        self.start = find_start(self.folder, args.resume, args.run_identity, usable)
        run = self.start.record.run
        if args.run_identity not in (None, run):
            raise ConfigError(f"Another run has used {self.folder} since this one was started; start it again.")
        # What adapters say of themselves.
        self.metadata = {"run": run.id}
        metrics_file = MetricsFile(self.folder / METRICS_NAME if self.is_first_rank else None, run.id)
        self.reporter = ProgressReporter(objective, training_callback, metrics_file)
        validated = data_digest(pairs_to_validate(val_pairs, args))
        saves_best = args.save_best is not None
        self.best = BestSoFar(args.save_best or "loss", args.early_stopping_patience, validated, saves_best)
        self.plateau = PlateauAdvice(args.loss_type, args.iters, validated)
        self.displacement = DisplacementAlarm(args.loss_type)
        self.scorer = self.choose_scorer()
        self.memory = MemoryWatch(model, Way.of(args, None if self.scorer is None else self.scorer.grouping))
        self.step = OptimizerStep(
            model, optimizer, *gradient_methods(model, objective, self.scorer, pairs, args), args.max_grad_norm
        )
        remembering: dict[str, Stateful] = {"reporter": self.reporter, "best": self.best}
        remembering |= {"plateau": self.plateau, "displacement": self.displacement}
        self.state = TrainingState(model, self.step, remembering)
        self.identity = identity(args, model, optimizer, pairs)
        constants = {"identity": self.identity, "iters": args.iters, "scorer": scorer_values(self.scorer)}
        self.checkpoints = RunCheckpoints(self.folder, run, args.keep_checkpoints, self.last_step_start, constants)
        self.last_whole = LastWhole(self.state)
        self.last_checkpoint: Path | None = None

    def choose_scorer(self) -> SharedPromptScorer | None:
        """Return the scorer of the run that is gone on with, or that which the model allows."""
        checkpoint = self.start.checkpoint
        if checkpoint is not None and checkpoint.values["identity"].get("scoring") == self.args.scoring:
            return scorer_of(self.model, checkpoint.values["scorer"])
        return choose_scorer(self.model, self.pairs, self.args.scoring, self.reporter.say)

    def introduce(self) -> None:
        """Say who trains, where the run was started by a call, and what became of the rows."""
        if self.args.run_settings is None:
            self.reporter.say(f"mlx-cpo-plugin {__version__} trains CPO in mlx-lm-lora {host_version()}.")
        for pairs in (self.pairs, self.val_pairs):
            pairs.tell(self.reporter.say)

    def begin(self) -> bool:
        """Go on from a checkpoint, or begin anew; return whether there is anything to do."""
        checkpoint, say = self.start.checkpoint, self.reporter.say
        if checkpoint is not None:
            check_identity(checkpoint.values["identity"], self.identity, checkpoint)
            self.state.restore(checkpoint)
            for note in self.start.notes:
                say(note)
            if not self.is_to_go_on():
                self.reporter.go_on_in_trackers(checkpoint)  # which a test is still to be told to
                return False
        for line in memory_report(self.model, self.step.optimizer, self.pairs, self.scorer, self.args):
            say(line)
        self.take_folder()
        with written_files_recorded(self.folder):
            self.reporter.start_trackers()
        if self.is_first_rank:
            save_adapter_config(self.model, self.adapter_file)
            self.save_settings()
        if checkpoint is None:
            if self.val_pairs:
                self.validate(iteration=1, before_training=True)
            if self.last_step_start == 0:
                self.save_checkpoint()
        return True

    def is_to_go_on(self) -> bool:
        """Return whether a restored run has anything left to do; say so where it has not.

        Raises:
            ConfigError: a new run would have nothing to do.
        """
        record, done, iters = self.start.record, self.state.iteration, self.args.iters
        other_iters = self.start.checkpoint is not None and self.start.checkpoint.values["iters"] != iters
        if done >= iters and other_iters:
            done_already = f"The run in {self.start.folder} has done {done} iterations, and iters is {iters}"
            if not self.start.continues:
                raise ConfigError(f"{done_already}; raise iters to go on from it.")
            self.reporter.say(f"{done_already}: nothing was changed; raise iters to go on.")
            return False
        if self.start.continues and TRAINED in record.done and (done >= iters or self.best.exhausted):
            ends = ("iters",) * (done >= iters) + ("early_stopping_patience",) * self.best.exhausted
            self.reporter.say(
                f"The run in {self.folder} finished at iteration {done}: nothing was changed; raise "
                f"{' and '.join(ends)} to go on."
            )
            return False
        return True

    def take_folder(self) -> None:
        """Make the adapter folder that of this run, with what it goes on from."""
        checkpoint, continues, say = self.start.checkpoint, self.start.continues, self.reporter.say
        settings = self.args.run_settings or {}
        in_use = [Path(path) for key in ("model", "data") if isinstance(path := settings.get(key), str)]
        if not continues:
            for note in self.start.notes if checkpoint is None else ():
                say(note)
        if continues:
            goes_on(self.folder, self.start.record)
        else:
            begin_run(self.folder, self.start.record, say, in_use)
        if checkpoint is None:
            return
        there = checkpoint.folder if checkpoint.folder.exists() else once_put_aside(checkpoint, self.folder)
        self.reporter.go_on(lines_of(there.parent.parent / METRICS_NAME), checkpoint)
        self.restore_best(checkpoint, there / BEST_ADAPTER_NAME)
        if not continues:
            self.save_checkpoint()
        say(f"Resuming after iteration {self.state.iteration} from {checkpoint.folder}.")

    def restore_best(self, checkpoint: Checkpoint, saved: Path) -> None:
        """Have beside the adapter the best one so far, which a checkpoint holds as ``saved``."""
        before = checkpoint.values["best"]
        if before["value"] is None:
            return
        best_file = self.adapter_file.with_name(BEST_ADAPTER_NAME)
        if not self.best.goes_on_from(before):
            self.reporter.say(
                f"The best validation so far, by {before['measure']} at iteration {before['iteration']}, cannot be "
                "compared with what save_best and the validation pairs are now: the search begins anew."
            )
            if self.is_first_rank and best_file.exists():
                best_file.rename(best_file.with_stem(f"{best_file.stem}-{before['measure']}-{before['iteration']:07d}"))
        elif self.best.saves and self.is_first_rank and saved.exists():
            write_atomically(best_file, lambda partial: shutil.copyfile(saved, partial))

    def save_checkpoint(self) -> Path:
        """Save what resuming needs, with the best adapter so far; return where."""
        best_file = self.adapter_file.with_name(BEST_ADAPTER_NAME)
        holds_best = self.is_first_rank and self.best.saves and self.best.value is not None
        # The user may have moved it elsewhere.
        files = {BEST_ADAPTER_NAME: best_file} if holds_best and best_file.exists() else {}
        self.last_checkpoint = self.checkpoints.save(self.last_whole.state, files)
        return self.last_checkpoint

    def save_settings(self) -> None:
        """Write down what the run was configured with."""
        values = self.args.run_settings
        if values is None:
            values = recorded_arguments(self.args, self.step.optimizer, describe_adapter(self.model))
        text = as_yaml(values, self.start.record)
        write_atomically(
            self.adapter_file.with_name(RUN_SETTINGS), lambda partial: partial.write_text(text, encoding="utf-8")
        )

    def train(self, stop: StopRequest) -> None:
        """Work through the plan, from where the state is to its end, or to where the run is to stop."""
        args, reporter, step = self.args, self.reporter, self.step
        chosen_tokens = [pair.chosen_tokens for pair in self.pairs]
        if stop.agreed():
            raise self.stopped(stop)
        self.make_up_for_validation()
        if self.best.exhausted:
            self.say_exhausted()
            return
        for iteration, micro_batch in reporter.iterations_of(self.plan(), args.iters, done=self.state.iteration):
            self.quantisation.active = args.qat_enable and self.quantisation.applies_to(step.number)
            pairs = [self.pairs[index] for index in micro_batch.indices]
            self.prepare_for_risk(pairs)
            with self.last_whole.kept():
                if pairs:
                    losses, scores = step.add(pairs, micro_batch.totals(chosen_tokens), self.quantisation.active)
                    reporter.add(losses, scores, scored_tokens(pairs))
                    reporter.warn(self.displacement.warning(iteration, scores))
                norm = step.apply() if micro_batch.closes_window else None
                self.state.iteration = iteration
            if norm is not None:
                reporter.add_step(norm)
            reporter.count_iteration()

            last = iteration == args.iters
            if last or iteration % args.steps_per_report == 0:
                reporter.report_training(iteration, step.optimizer.learning_rate.item(), micro_batch.epoch)
            if self.val_pairs and (last or iteration % args.steps_per_eval == 0):
                self.validate(iteration)
            stopping, exhausted = stop.agreed(), self.best.exhausted
            if iteration % args.steps_per_save == 0:
                self.save_numbered(iteration)
            before_last_step = iteration == self.last_step_start
            if last or stopping or exhausted or before_last_step or iteration % args.steps_per_save == 0:
                self.save_checkpoint()
            if stopping:
                save_weights(self.model, self.adapter_file, self.metadata)
                raise self.stopped(stop)
            if exhausted:
                self.say_exhausted()
                break

    def make_up_for_validation(self) -> None:
        """Validate where a run goes on from an iteration after which it failed before it had validated."""
        done, args = self.state.iteration, self.args
        due = done and (done == args.iters or done % args.steps_per_eval == 0)
        if self.val_pairs and due and self.best.last != done:
            self.validate(done)
            self.save_checkpoint()

    def say_exhausted(self) -> None:
        """Tell that the run ends early, since validations have not become better."""
        best = self.best.iteration
        self.reporter.say(f"Iter {self.state.iteration}: stopping, no validation since {best} was better.")

    def prepare_for_risk(self, pairs: Sequence[PreferencePair]) -> None:
        """Warn, and save what is done, before a micro-batch for which memory may not suffice."""
        risk = self.memory.risk(pairs, self.step.number) if pairs else None
        if risk is None:
            return
        self.reporter.warn(risk)
        if self.state.iteration and self.saves_alone:
            self.save_checkpoint()

    def stopped(self, stop: StopRequest) -> StoppedError:
        """Return what ends a run that was asked to stop, once its last checkpoint has been looked at.

        Raises:
            CheckpointError: the checkpoint is not whole.
        """
        if self.last_checkpoint is not None:
            read_checkpoint(self.last_checkpoint)
        return StoppedError(self.state.iteration, stop.signal_number, self.how_to_go_on)

    @property
    def how_to_go_on(self) -> str:
        """What to do after a run that has ended early, by the route that it was started by."""
        if self.args.run_settings is not None:
            return (
                "run the same command with resume: auto (or --resume auto) to go on, or with other settings and these "
                "weights as resume_adapter_file"
            )
        return (
            "call train_cpo once more with resume='auto' in its arguments to go on, or start another run with these "
            "weights as resume_adapter_file"
        )

    def save_on_the_way_out(self) -> str:
        """Save what is whole after something has failed; return a sentence on what there is then."""
        if not self.is_first_rank:
            return ""
        return saved_sentence(
            self.last_whole.state.iteration,
            self.adapter_file,
            lambda: save_weights(self.model, self.adapter_file, self.metadata),
            self.save_checkpoint if self.saves_alone and self.step.optimizer_is_whole else None,
            self.how_to_go_on,
        )

    @property
    def saves_alone(self) -> bool:
        """Whether a checkpoint that no other rank writes is one to go on from."""
        return mx.distributed.init().size() == 1

    def finish(self) -> None:
        """Save the adapter, and see that it can be loaded."""
        self.quantisation.active = False
        if self.is_first_rank:
            save_and_verify(self.model, self.adapter_file, self.reporter.say, self.metadata)
            self.score_saved()
            record_done(self.folder, TRAINED)
            self.reporter.say(f"Saved final weights to {self.adapter_file}.")

    def score_saved(self) -> None:
        """Score what was saved, read back, on held-out rows; a file that is lost or scores otherwise is told."""
        rows = held_out_rows(self.val_pairs, self.pairs)
        trained = scores_of(self.model, rows, self.scorer)
        best = self.adapter_file.with_name(BEST_ADAPTER_NAME)
        for file in [self.adapter_file] + [best] * (self.args.save_best is not None and self.best.iteration > 0):
            try:
                with adapter_in_place(self.model, file):
                    saved = scores_of(self.model, rows, self.scorer)
            except CheckpointError as error:
                self.reporter.warn(str(error))
                continue
            if file == best:
                self.reporter.say(
                    f"{file.name}, of iteration {self.best.iteration}, gives {len(rows)} held-out rows a margin of "
                    f"{saved.margin:+.3f} nats; that of the last iteration {trained.margin:+.3f}."
                )
            elif not saved.is_like(trained):
                self.reporter.warn(
                    f"{file} gives {len(rows)} held-out rows a margin of {saved.margin:+.3f} nats, and the model in "
                    f"memory, which has the same parameters, {trained.margin:+.3f}: this device does not compute alike "
                    "twice."
                )

    def plan(self) -> Iterator[MicroBatch]:
        """Return the micro-batches of the whole run, as this rank has them."""
        args, world = self.args, mx.distributed.init()
        return training_plan(
            [pair.tokens for pair in self.pairs],
            batch_size_of(args),
            iters=args.iters,
            seed=args.seed or 0,
            rank=world.rank(),
            world_size=world.size(),
        )

    def validate(self, iteration: int, before_training: bool = False) -> None:
        """Report the means over the validation pairs; after training, keep the adapter if it is the best so far."""
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
            seconds = time.perf_counter() - started
            advice = None if before_training else self.compare(iteration, means)
            self.reporter.report_validation(iteration, means, seconds)  # in the end, since a callback may raise
        self.reporter.warn(advice)

    def compare(self, iteration: int, means: Mapping[str, float]) -> str | None:
        """Keep the adapter beside the last one where a validation is the best so far; return what there is to tell."""
        if self.best.saves and self.best.is_best(means) and self.is_first_rank:
            best = {**self.metadata, "iteration": str(iteration)}
            save_and_verify(self.model, self.adapter_file.with_name(BEST_ADAPTER_NAME), self.reporter.say, best)
        self.best.take_note(iteration, means)  # now that the file is written
        return self.plateau.advice(iteration, means)

    def save_numbered(self, iteration: int) -> None:
        """Save the adapter as it is, and once more under the number of the iteration."""
        if self.is_first_rank:
            numbered = save_checkpoint(self.model, self.adapter_file, iteration, self.metadata)
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
    loss_fn: Callable[..., Any] | None = None,
    loss_options: Mapping[str, Any] | None = None,
    scoring: str = "auto",
    cpo_alpha: float = 0.0,
    tokenizer: Any = None,
) -> tuple[float, list[float], mx.array, dict[str, float]]:
    """Return loss, [chosen reward, rejected reward], scored tokens, int32 [], and the other means over pairs by name.

    The signature and the result are the host's; ``loss_options`` holds options of losses beside beta and delta,
    ``scoring`` is ``auto``, ``shared`` or ``plain``, and ``cpo_alpha`` weighs the negative log-likelihood of the chosen
    answers in the loss, a mean over all their tokens. ``num_batches`` -1 means all. Data sets, ``loss_fn`` and
    ``tokenizer`` are as in :func:`train_cpo`.
    """
    use_fast_blas()
    objective = objective_for(loss_type, {"beta": beta, "delta": delta, **(loss_options or {})}, loss_fn, cpo_alpha)
    pairs = pairs_of(dataset, max_seq_length, tokenizer, "test")
    if not pairs:
        raise DataError("There is no preference pair to evaluate on; check the data with 'mlx-cpo check'.")
    if not pairs.report.all_used:
        pairs.tell(print)
    with out_of_memory_told(), compile_where_it_pays(), float32_products(model):
        scorer = choose_scorer(model, pairs, scoring)
        means, tokens = evaluate_pairs(
            model, pairs, objective, batch_size=batch_size, num_batches=num_batches, scorer=scorer
        )
    rewards = [means.pop("chosen_reward"), means.pop("rejected_reward")]
    return means.pop("loss"), rewards, mx.array(tokens), means


@contextmanager
def training_environment(model: nn.Module, args: CPOTrainingArgs) -> Iterator[FakeQuantisation]:
    """Put model and device into the state that training wants; undo it however training ends."""
    limit = wired_limit()
    with ExitStack() as stack:
        stack.enter_context(memory_safe_recurrences(model, args.recurrence_chunk_size))
        stack.enter_context(compile_where_it_pays(args.compile))
        stack.enter_context(lean_activations())
        stack.enter_context(float32_products(model))
        stack.enter_context(checkpointed_layers(model, args.grad_checkpoint))
        quantisation = FakeQuantisation()
        if args.qat_enable:
            quantisation = stack.enter_context(
                fake_quantised(
                    model,
                    bits=args.qat_bits,
                    group_size=args.qat_group_size,
                    quantizer=args.qat_quantizer,
                    mode=args.qat_mode,
                    start_step=args.qat_start_step,
                    interval=args.qat_interval,
                )
            )
        if limit is not None:
            stack.callback(mx.set_wired_limit, mx.set_wired_limit(limit))
        stack.callback(model.eval)
        model.train()
        yield quantisation


def save_weights(model: nn.Module, adapter_file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Save the adapter as it is, on the first rank."""
    if mx.distributed.init().rank() == 0:
        save_adapter(model, adapter_file, metadata)


def batch_size_of(args: CPOTrainingArgs) -> BatchSize:
    """Return how much goes into a micro-batch and a step."""
    return BatchSize(args.batch_size, args.batch_tokens, args.gradient_accumulation_steps)


def pairs_to_validate(pairs: Sequence[PreferencePair], args: CPOTrainingArgs) -> Sequence[PreferencePair]:
    """Return the pairs that a validation takes."""
    return pairs if args.val_batches < 0 else pairs[: args.val_batches * args.batch_size]


def scorer_values(scorer: SharedPromptScorer | None) -> dict[str, float] | None:
    """Return how pairs are scored, as plain values: what a probe has found out holds for the whole run."""
    return None if scorer is None else {"overhead": scorer.grouping.overhead, "budget": scorer.grouping.budget}


def scorer_of(model: nn.Module, values: Mapping[str, float] | None) -> SharedPromptScorer | None:
    """Return the scorer that :func:`scorer_values` described."""
    if values is None:
        return None
    scorer = SharedPromptScorer(model)
    scorer.grouping = Grouping(values["overhead"], values["budget"])
    return scorer

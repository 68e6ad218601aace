"""The CPO training run: one loop, readable from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers

from mlx_cpo_plugin._version import __version__, host_version
from mlx_cpo_plugin.blas import kernel_threads, use_fast_blas
from mlx_cpo_plugin.checkpoints.adapter import save_and_verify
from mlx_cpo_plugin.checkpoints.run_folder import only_run_in, record_done
from mlx_cpo_plugin.checkpoints.run_identity import TRAINED
from mlx_cpo_plugin.console import lasting_output
from mlx_cpo_plugin.data.batches import scored_tokens
from mlx_cpo_plugin.data.dataset import require_validation
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import DataError
from mlx_cpo_plugin.host import SFTTrainingArgs, TrainingCallback
from mlx_cpo_plugin.model.scoring import prepared_scorer
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs, check_loss_options
from mlx_cpo_plugin.training.call import check_callback, pairs_of, training_arguments
from mlx_cpo_plugin.training.duration import Forecast
from mlx_cpo_plugin.training.exits import StopRequest, out_of_memory_explained, saved_on_failure, stop_requests
from mlx_cpo_plugin.training.held_out import score_saved
from mlx_cpo_plugin.training.objective import objective_for
from mlx_cpo_plugin.training.resumption import begin
from mlx_cpo_plugin.training.summary import summary
from mlx_cpo_plugin.training.validation import evaluate_pairs, unused_without_validation
from mlx_cpo_plugin.training.wiring import Run, training_environment
from mlx_cpo_plugin.types import Tokenizer


def train_cpo(
    model: nn.Module,
    optimizer: optimizers.Optimizer,
    train_dataset: Sequence[object],
    val_dataset: Sequence[object] | None = None,
    args: CPOTrainingArgs | SFTTrainingArgs | None = None,
    loss_fn: Callable[..., mx.array] | None = None,
    training_callback: TrainingCallback | None = None,
    tokenizer: Tokenizer | None = None,
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
        training_callback: receives the host's ``on_train_loss_report`` and ``on_val_loss_report``; if it has a
            ``stream`` that it prints to, the run prints there, too.
        tokenizer: of the model; only raw rows need it.

    Raises:
        ConfigError: a setting is out of range.
        DataError: there is no pair to train on.
        CheckpointError: the adapter cannot be written, or differs when it is read back.
        TrainingError: a loss or gradient is not finite, nothing is trained, or the device is out of memory.
        StoppedError: Ctrl-C, SIGTERM or SIGHUP; what was done is saved.
        Exception: whatever a callback raises; what was done is saved.
    """
    args = training_arguments(args)
    use_fast_blas()
    objective = objective_for(args.loss_type, args.loss_settings(), loss_fn, args.cpo_alpha)
    pairs = pairs_of(train_dataset, args.max_seq_length, tokenizer, model=model)
    val_pairs = pairs_of(val_dataset if args.val_batches else None, args.max_seq_length, tokenizer, "valid", model)
    if not pairs:
        raise DataError("There is no preference pair to train on; check the data with 'mlx-cpo check'.", key="data")
    require_validation(args, val_pairs)
    check_callback(training_callback, validates=bool(val_pairs))

    with (
        lasting_output(),
        only_run_in(Path(args.adapter_file).parent),
        stop_requests() as stop,
        out_of_memory_explained(),
        training_environment(model, args) as environment,
    ):
        run = Run(model, optimizer, objective, pairs, val_pairs, args, environment, training_callback)
        introduce(run)
        if not begin(run):
            return
        if run.start.checkpoint is None:
            sample(run, 1, before_training=True)
            validate(run, 1, before_training=True)
            if run.extends_from == 0:
                run.outputs.save_checkpoint()
        with saved_on_failure(run.outputs.save_after_failure, stop, run.reporter.say):
            train(run, stop)
        finish(run)
        if stop.agreed():
            raise run.outputs.stopped(stop.signal_number)


def introduce(run: Run) -> None:
    """Say who trains, where a call started the run, what became of the rows, and what is going to be done."""
    if run.args.run_settings is None:
        run.reporter.say(f"mlx-cpo-plugin {__version__} trains CPO in mlx-lm-lora {host_version()}.")
    if run.kernels:
        threads = kernel_threads()
        run.reporter.say(f"Compiled kernels compute the layers, on {threads} thread{'s' if threads > 1 else ''}.")
    run.pairs.tell(run.reporter.say)
    run.val_pairs.tell(run.reporter.say)
    run.reporter.say(None if run.val_pairs else unused_without_validation(run.args))
    for line in summary(run):
        run.reporter.say(line)


def train(run: Run, stop: StopRequest) -> None:
    """Train from where the state is to the end of the plan, or to where the run is to stop."""
    if stop.agreed():
        raise run.outputs.stopped(stop.signal_number)
    make_up_for_validation(run)
    if not run.best.out_of_patience:
        iterate(run, stop)
    if run.best.out_of_patience:
        run.reporter.say(f"Iter {run.state.iteration}: stopping, no validation since {run.best.iteration} was better.")


def iterate(run: Run, stop: StopRequest) -> None:
    """Work through the plan: each iteration is a micro-batch, and the last one of a step updates the weights."""
    args, step, reporter, outputs = run.args, run.step, run.reporter, run.outputs
    chosen_tokens = [pair.chosen_tokens for pair in run.pairs]
    forecast = Forecast(run.tokens_of_plan(), run.state.iteration)
    for iteration, micro_batch in reporter.iterations_of(run.plan(), args.iters, done=run.state.iteration):
        pairs = [run.pairs[index] for index in micro_batch.indices]
        save_before_risk(run, pairs)
        with run.state.computing(iteration), run.quantisation.during(step.number):
            if pairs:
                losses, scores = step.add(pairs, micro_batch.totals(chosen_tokens), run.quantisation.active)
                reporter.add(losses, scores, scored_tokens(pairs))
                if not run.val_pairs:  # by which the judge finds out more
                    reporter.warn(run.displacement.warning(iteration, scores))
            norm = step.apply() if micro_batch.closes_window else None
        reporter.count_iteration(norm)
        if norm is not None:
            for line in run.memory.corrected():
                reporter.say(line)
            run.buffers.raise_to(run.memory.computing)
        reporter.say(forecast.line(iteration))

        last = iteration == args.iters
        if last or iteration % args.steps_per_report == 0:
            reporter.report_training(iteration, step.optimizer.learning_rate.item(), micro_batch.epoch)
        validates = last or run.validates_after(iteration)
        if run.samples.are_due(iteration, validates, last):
            sample(run, iteration)
        if validates:
            validate(run, iteration)

        stopping, out_of_patience = stop.agreed(), run.best.out_of_patience
        save_due = run.saves_after(iteration)
        if save_due:
            outputs.save_numbered(iteration)
        if save_due or last or stopping or out_of_patience or iteration == run.extends_from:
            outputs.save_checkpoint()
        if stopping:
            outputs.save_adapter()
            raise outputs.stopped(stop.signal_number)
        if out_of_patience:
            return


def save_before_risk(run: Run, pairs: Sequence[PreferencePair]) -> None:
    """Warn, and save what is done, before a micro-batch for which memory may not suffice."""
    risk = run.memory.risk(pairs, run.step.number) if pairs else None
    run.reporter.warn(risk)
    if risk is not None and run.state.iteration and run.outputs.saves_alone:
        run.outputs.save_checkpoint()


def sample(run: Run, iteration: int, before_training: bool = False) -> None:
    """Let the model answer a few prompts, for people to read."""
    with run.reporter.pause():
        samples = run.samples.take(iteration, before_training)
    run.reporter.report_samples(iteration, samples, introduce=before_training)


def validate(run: Run, iteration: int, before_training: bool = False) -> None:
    """Score the validation pairs, compare them with those before training, and keep the adapter if it is the best."""
    if not run.val_pairs:
        return
    args, best, started = run.args, run.best, time.perf_counter()
    with run.reporter.pause():
        size = {"batch_size": args.batch_size, "num_batches": args.val_batches}
        validation = evaluate_pairs(
            run.model, run.val_pairs, run.objective, **size, scorer=run.scorer, step_size=args.seq_step_size
        )
        seconds = time.perf_counter() - started
        means = validation.means | run.samples.figures_of(iteration)
        verdict = None
        if before_training:
            run.judge.begin(validation.values)
        else:
            verdict = run.judge.verdict(validation.values, validation.places, run.samples.compared())
            if best.saved and best.is_best(means):
                run.outputs.save_best(iteration)
            best.add(iteration, means)  # now that the file is written
            if best.iteration == iteration:
                run.judge.of_best = verdict
        run.reporter.report_validation(iteration, means, seconds, verdict, *run.judge.news(iteration, verdict))


def make_up_for_validation(run: Run) -> None:
    """Validate where a run resumes after an iteration whose validation had failed."""
    done, args = run.state.iteration, run.args
    due = done and (done == args.iters or run.validates_after(done))
    if run.val_pairs and due and run.best.last != done:
        validate(run, done)
        run.outputs.save_checkpoint()


def finish(run: Run) -> None:
    """Save the adapter, with the best or the last weights, and make sure that it loads and scores as it should."""
    outputs, best, say = run.outputs, run.best, run.reporter.say
    fault = outputs.take_best(outputs.best_file) if run.args.load_best else ""
    loaded = run.args.load_best and not fault
    run.reporter.warn(f"{fault} The last weights are saved instead." if fault else None)
    if outputs.is_main:
        iteration = best.iteration if loaded else run.state.iteration
        save_and_verify(run.model, outputs.adapter_file, say, outputs.metadata(iteration))
        score_saved(run)
        if loaded:
            run.reporter.report_best(best.iteration, best.means, run.judge.of_best)
        record_done(outputs.folder, TRAINED)
        say(f"Saved final weights to {outputs.adapter_file}.")
        if run.val_pairs:
            say(run.judge.conclusion(best, loaded))
        if best.saved and best.value is not None:
            where = outputs.adapter_file if loaded else outputs.best_file.parent
            say(f"{where} has the weights of iteration {best.iteration}, the best by {best.name}: {best.value:.3f}.")


def evaluate_cpo(
    model: nn.Module,
    dataset: Sequence[object],
    batch_size: int,
    num_batches: int,
    beta: float,
    delta: float,
    max_seq_length: int,
    loss_type: str,
    loss_fn: Callable[..., mx.array] | None = None,
    loss_options: Mapping[str, object] | None = None,
    scoring: str = "auto",
    cpo_alpha: float = 0.0,
    tokenizer: Tokenizer | None = None,
    seq_step_size: int | None = None,
) -> tuple[float, list[float], mx.array, dict[str, float]]:
    """Return loss, [chosen reward, rejected reward], scored tokens, int32 [], and the other means over pairs by name.

    The signature and the result are the host's; ``loss_options`` holds options of losses beside beta and delta,
    ``scoring`` is ``auto``, ``shared`` or ``plain``, and ``cpo_alpha`` weighs the negative log-likelihood of the chosen
    answers in the loss, a mean over all their tokens. ``num_batches`` -1 means all; longer pairs than ``seq_step_size``
    are computed in segments of so many tokens. Data sets, ``loss_fn`` and ``tokenizer`` are as in :func:`train_cpo`.
    """
    use_fast_blas()
    check_loss_options(loss_type, loss_options or {})
    objective = objective_for(loss_type, {"beta": beta, "delta": delta, **(loss_options or {})}, loss_fn, cpo_alpha)
    pairs = pairs_of(dataset, max_seq_length, tokenizer, "test", model)
    if not pairs:
        raise DataError("There is no preference pair to evaluate on; check the data with 'mlx-cpo check'.")
    if not pairs.report.all_used:
        pairs.tell(print)
    with out_of_memory_explained(), prepared_scorer(model, pairs, scoring) as scorer:
        means, tokens, *_ = evaluate_pairs(
            model,
            pairs,
            objective,
            batch_size=batch_size,
            num_batches=num_batches,
            scorer=scorer,
            step_size=seq_step_size,
        )
    rewards = [means.pop("chosen_reward"), means.pop("rejected_reward")]
    return means.pop("loss"), rewards, mx.array(tokens), means

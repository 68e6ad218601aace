"""How long a run takes: measured on two of its own micro-batches, with its model and nothing written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_cpo_plugin.data.batches import MicroBatch
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.training.duration import expected_seconds, spoken
from mlx_cpo_plugin.training.validation import evaluate_pairs
from mlx_cpo_plugin.training.wiring import Run

Clock = Callable[[], float]


def measured_duration(run: Run, clock: Clock = time.perf_counter) -> str:
    """Return a sentence on how long a run takes, which cannot train any more afterwards.

    The micro-batch of median length is computed twice, since the first time compiles, and the longest one once; where
    only some steps are fake-quantised, these of either kind.
    """
    plan = [micro_batch for micro_batch in run.plan() if micro_batch.indices][run.state.iteration :]
    if not plan:
        return "Time: nothing is left to do."
    parts, training, on = _by_quantisation(run, plan), 0.0, []
    for fake_quantised, part in parts.items():
        by_tokens = sorted(part, key=lambda micro_batch: _tokens(run, micro_batch))
        median, longest = by_tokens[len(by_tokens) // 2], by_tokens[-1]
        _seconds_of(run, median, fake_quantised, clock)
        measured = {_tokens(run, some): _seconds_of(run, some, fake_quantised, clock) for some in (longest, median)}
        training += expected_seconds(measured.items(), (_tokens(run, some) for some in part))
        on.append(" and ".join(f"{tokens} tokens ({seconds:.1f} s)" for tokens, seconds in sorted(measured.items())))
    training += _closing(plan) * _seconds_of_update(run, clock)
    if True in parts:
        training += _closing(parts[True]) * _seconds_of_rounding(run, clock)
    validating = _validations(run) * _seconds_of_validation(run, clock)
    among = f", validations {spoken(validating)} of it" if validating else ""
    return (
        f"Time: about {spoken(training + validating)} for {len(plan)} iterations{among}, by micro-batches of "
        f"{' and fake-quantised ones of '.join(on)}, the median and the longest, measured just now."
    )


def _by_quantisation(run: Run, plan: Sequence[MicroBatch]) -> dict[bool, list[MicroBatch]]:
    """Return the micro-batches of steps that are not fake-quantised, and of those that are, as far as there are any."""
    parts: dict[bool, list[MicroBatch]] = {False: [], True: []}
    step = run.step.number
    for micro_batch in plan:
        parts[run.quantisation.applies_to(step)].append(micro_batch)
        step += micro_batch.closes_window
    return {kind: part for kind, part in parts.items() if part}


def _closing(plan: Sequence[MicroBatch]) -> int:
    return sum(micro_batch.closes_window for micro_batch in plan)


def _tokens(run: Run, micro_batch: MicroBatch) -> int:
    return sum(run.pairs[index].tokens for index in micro_batch.indices)


def _seconds_of(run: Run, micro_batch: MicroBatch, fake_quantised: bool, clock: Clock) -> float:
    """The seconds of the gradient of a micro-batch."""
    totals = micro_batch.totals([pair.chosen_tokens for pair in run.pairs])
    began = clock()
    with run.quantisation.during(run.args.qat_start_step if fake_quantised else 0):
        run.step.add([run.pairs[index] for index in micro_batch.indices], totals, run.quantisation.active)
    return clock() - began


def _seconds_of_update(run: Run, clock: Clock) -> float:
    """The seconds of an update of the weights, which is made twice, since the first one compiles."""
    gradient = run.step.total
    run.step.apply()
    run.step.total = gradient
    began = clock()
    run.step.apply()
    mx.synchronize()
    return clock() - began


def _seconds_of_rounding(run: Run, clock: Clock) -> float:
    """The seconds in which the weights are rounded before a step that is fake-quantised."""
    began = clock()
    run.quantisation.update()
    return clock() - began


def _validations(run: Run) -> int:
    """How many validations are to come, the one before training included."""
    done, last = run.state.iteration, run.args.iters
    return sum(run.validates_after(iteration) for iteration in range(done + 1, last)) + 1 + (done == 0)


def _seconds_of_validation(run: Run, clock: Clock) -> float:
    """The seconds of a validation, from those of one batch of median length."""
    args = run.args
    pairs: Sequence[PreferencePair] = run.val_pairs
    if args.val_batches >= 0:
        pairs = pairs[: args.val_batches * args.batch_size]
    if not pairs:
        return 0.0
    middle = max(0, (len(pairs) - args.batch_size) // 2)
    batch = sorted(pairs, key=lambda pair: pair.tokens)[middle : middle + args.batch_size]
    began = clock()
    size, step_size = args.batch_size, args.seq_step_size
    evaluate_pairs(run.model, batch, run.objective, batch_size=size, scorer=run.scorer, step_size=step_size)
    mx.synchronize()
    return (clock() - began) / sum(pair.tokens for pair in batch) * sum(pair.tokens for pair in pairs)

"""The parts of a training run, wired up before its loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx_lm.utils import get_total_parameters

from mlx_cpo_plugin.checkpoints import METRICS_FILE
from mlx_cpo_plugin.checkpoints.resuming import find_start
from mlx_cpo_plugin.data import PreferenceDataset
from mlx_cpo_plugin.data.batches import BatchSize, MicroBatch, epoch_ends, last_step_start, training_plan
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.ranked import row_numbers
from mlx_cpo_plugin.device import BufferLimit, compilation_pays, compile_where_it_pays, wired_limit
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.exchange import gather, is_first_rank
from mlx_cpo_plugin.host import TrainingCallback
from mlx_cpo_plugin.kernels import library
from mlx_cpo_plugin.model.activations import lean_activations
from mlx_cpo_plugin.model.buckets import PAIR_BY_PAIR, Grouping, grouping_for
from mlx_cpo_plugin.model.compiled import compiled_kernels, suits
from mlx_cpo_plugin.model.parity import choose_scorer, expected_grouping
from mlx_cpo_plugin.model.products import float32_products
from mlx_cpo_plugin.model.recompute import checkpointed_layers
from mlx_cpo_plugin.model.recurrences import recurrences_in_chunks
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer
from mlx_cpo_plugin.training import calibration
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.gradients import ARITHMETIC, gradients_for
from mlx_cpo_plugin.training.identity import data_digest, identity, recorded
from mlx_cpo_plugin.training.judge import Judge
from mlx_cpo_plugin.training.memory_estimate import MemoryEstimate
from mlx_cpo_plugin.training.metrics import MetricsFile
from mlx_cpo_plugin.training.objective import Objective
from mlx_cpo_plugin.training.optimizer_step import OptimizerStep
from mlx_cpo_plugin.training.outputs import Outputs
from mlx_cpo_plugin.training.qat import FakeQuantisation, fake_quantised
from mlx_cpo_plugin.training.reporting import DisplacementAlarm, ProgressReporter
from mlx_cpo_plugin.training.samples import Samples
from mlx_cpo_plugin.training.state import TrainingState, can_resume
from mlx_cpo_plugin.training.validation import BestSoFar


class Run:
    """The parts of a training run inside its environment; making it changes nothing in its folder.

    Args:
        probing: compute with the model to find out what it allows. Without it the run cannot train, and evaluates the
            model's weights only where a checkpoint has to be compared with them.

    Attributes:
        start: where it begins.
        scorer: ``None`` where the model cannot share prompts.
        identity: all that determines the trained weights, by key; ``recorded`` is what explains a difference.
        epoch_ends: the iterations that end an epoch, where anything depends on them.
        extends_from: the iteration that a run with more ``iters`` goes on from.
        buffers: how many of those that a step frees MLX keeps; only of a run that can train.

    Raises:
        ConfigError: there is nothing to resume, or another run has used the folder meanwhile.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optimizers.Optimizer,
        objective: Objective,
        pairs: PreferenceDataset,
        val_pairs: PreferenceDataset,
        args: CPOTrainingArgs,
        environment: ExitStack,
        training_callback: TrainingCallback | None,
        probing: bool = True,
    ) -> None:
        self.model, self.objective, self.args = model, objective, args
        self.pairs, self.val_pairs = pairs, val_pairs
        folder = Path(args.adapter_file).parent
        lengths = [pair.tokens for pair in pairs]
        size, seed = batch_size_of(args), args.seed or 0
        by_epoch = args.eval_per_epoch or args.save_per_epoch
        self.epoch_ends = epoch_ends(lengths, size, iters=args.iters, seed=seed) if by_epoch else frozenset()
        # At its end a run reports and validates where one with more iters may not.
        ends_alike = not args.iters % args.steps_per_report and (not val_pairs or self.validates_after(args.iters))
        self.extends_from = last_step_start(lengths, size, iters=args.iters + ends_alike, seed=seed)
        usable = partial(can_resume, iters=args.iters, extends_from=self.extends_from)
        self.start = find_start(folder, args.resume, args.run_identity, usable)
        run_id = self.start.record.run.id
        if args.run_identity not in (None, self.start.record.run):
            raise ConfigError(
                f"Another run has used {folder} since this one was started; start it again.", key="adapter_path"
            )

        metrics_file = MetricsFile(folder / METRICS_FILE if is_first_rank() else None, run_id)
        self.reporter = ProgressReporter(objective, training_callback, metrics_file)
        validating = val_pairs if args.val_batches < 0 else val_pairs[: args.val_batches * args.batch_size]
        validated = data_digest(validating)
        saves_best = args.load_best or args.save_best is not None
        self.best = BestSoFar(args.save_best or "loss", args.early_stopping_patience, validated, saves_best)
        self.judge = Judge(validated, args.cpo_alpha, row_numbers(validating))
        self.displacement = DisplacementAlarm(args.cpo_alpha)

        say, warn = self.reporter.say, self.reporter.warn
        if self.start.checkpoint is not None and self.start.checkpoint.values.get("arithmetic", 1) != ARITHMETIC:
            warn(
                "This run began with another version of mlx-cpo-plugin, which rounded otherwise: from here on its "
                "results are not the same to the bit."
            )
        self.samples = Samples(model, args, val_pairs, val_pairs.chat_tokenizer or pairs.chat_tokenizer, say, warn)
        self.kernels = probing and self._choose_kernels(environment)
        self.quantisation = environment.enter_context(quantisation_of(model, args, self.kernels))
        self.scorer = self._choose_scorer() if probing else None
        overhead = self._choose_grouping()
        gradients = gradients_for(
            model, objective, self.scorer, pairs, step_size=args.seq_step_size, compiled=args.compile
        )
        self.step = OptimizerStep(model, optimizer, gradients, args.max_grad_norm)
        resumable = {name: getattr(self, name) for name in ("reporter", "best", "judge", "samples", "displacement")}
        self.state = TrainingState(model, self.step, resumable)
        if probing:
            grouping = None if self.scorer is None else self.scorer.grouping
            self.memory = MemoryEstimate(model, optimizer, pairs, args, grouping)
            self.buffers = BufferLimit(self.memory.computing)  # steps differ in length, and each leaves its own
            environment.callback(self.buffers.undo)
        else:
            self.memory = expected_memory(model, optimizer, pairs, args)
        comparing = probing or self.start.checkpoint is not None  # which reads some of every weight
        self.identity = identity(args, model, optimizer, pairs) if comparing else {}
        self.recorded = recorded(args, model, optimizer, pairs)
        if overhead is not None:
            self.recorded["settings"]["pass_overhead"] = overhead
        constants = {
            "identity": self.identity,
            "recorded": self.recorded,
            "iters": args.iters,
            "kernels": self.kernels,
            "arithmetic": ARITHMETIC,
            "scorer": self.scorer and self.scorer.found(),
            "extends_from": self.extends_from,
        }
        self.outputs = Outputs(model, self.state, self.best, args, self.start.record, constants, self.reporter.say)

    def _choose_scorer(self) -> SharedPromptScorer | None:
        """Return a scorer that the model allows; what a probe found holds for the whole run, resumed or not."""
        checkpoint = self.start.checkpoint
        if checkpoint is None or checkpoint.values["identity"].get("scoring") != self.args.scoring:
            return choose_scorer(self.model, self.pairs, self.args.scoring, self.reporter.say)
        found = checkpoint.values["scorer"]
        if found is None:
            return None
        scorer = SharedPromptScorer(self.model)
        scorer.grouping = Grouping(found["overhead"], found["budget"])
        scorer.packs = self.kernels and bool(found.get("packs"))
        return scorer

    def _choose_grouping(self) -> int | None:
        """Let as many pairs share a pass as is fastest here; return its overhead where it is not the device's default.

        It is what the settings say, or what a long run measures; a resumed run keeps that which it began with.
        """
        model, args, scorer, checkpoint = self.model, self.args, self.scorer, self.start.checkpoint
        if checkpoint is not None:
            return checkpoint.values.get("recorded", {}).get("settings", {}).get("pass_overhead")
        if scorer is None or scorer.grouping is PAIR_BY_PAIR:
            return args.pass_overhead
        overhead = args.pass_overhead
        if overhead is None and calibration.pays(work_of(model, args, self.pairs)):
            compiled = compilation_pays(args.compile)
            most = args.batch_tokens or args.batch_size * max(pair.tokens for pair in self.pairs)
            overhead = gather(calibration.overhead(model, self.objective, scorer, self.pairs, compiled, most))[0]
        if overhead is not None:
            scorer.grouping = grouping_for(model, overhead)
        return overhead

    def _choose_kernels(self, environment: ExitStack) -> bool:
        """Let the model compute with the compiled kernels, if it can and the run is long enough, or began with them."""
        checkpoint, suited = self.start.checkpoint, kernels_suit(self.model, self.args)
        if checkpoint is not None:
            wanted = bool(checkpoint.values.get("kernels"))
        else:
            wanted = suited and kernels_pay(self.model, self.args, self.pairs)
        if wanted and suited and library.usable(self.reporter.say):
            environment.enter_context(compiled_kernels(self.model))
            return True
        if wanted and checkpoint is not None:
            self.reporter.warn(
                "This run began with compiled kernels, which are not available here: from here on it is slower, and "
                "its results are not the same to the bit."
            )
        return False

    def tokens_of_plan(self) -> list[int]:
        """Return the tokens of each micro-batch of the whole run, as this rank has them."""
        return [sum(self.pairs[index].tokens for index in some.indices) for some in self.plan()]

    def validates_after(self, iteration: int) -> bool:
        """Whether a validation is due after an iteration, the last one or not."""
        args = self.args
        return iteration in self.epoch_ends if args.eval_per_epoch else iteration % args.steps_per_eval == 0

    def saves_after(self, iteration: int) -> bool:
        """Whether the adapter is due to be saved after an iteration."""
        args = self.args
        return iteration in self.epoch_ends if args.save_per_epoch else iteration % args.steps_per_save == 0

    def plan(self) -> Iterator[MicroBatch]:
        """Return the micro-batches of the whole run, as this rank has them."""
        world = mx.distributed.init()
        return training_plan(
            [pair.tokens for pair in self.pairs],
            batch_size_of(self.args),
            iters=self.args.iters,
            seed=self.args.seed or 0,
            rank=world.rank(),
            world_size=world.size(),
        )


def kernels_suit(model: nn.Module, args: CPOTrainingArgs) -> bool:
    """Whether the compiled kernels can compute a run."""
    return not compilation_pays(args.compile) and suits(model)


def kernels_pay(model: nn.Module, args: CPOTrainingArgs, pairs: Sequence[PreferencePair]) -> bool:
    """Whether a run that they can compute is long enough for them."""
    return library.pays(work_of(model, args, pairs))


def work_of(model: nn.Module, args: CPOTrainingArgs, pairs: Sequence[PreferencePair]) -> float:
    """Return about how many multiplications and additions a run takes; one of unknown length is taken for an epoch."""
    epoch = sum(pair.tokens for pair in pairs)
    per_iteration = args.batch_tokens or epoch / len(pairs) * args.batch_size
    tokens = per_iteration * args.iters if args.iters else epoch
    return 6 * get_total_parameters(model) * tokens


def grouping_expected(model: nn.Module, args: CPOTrainingArgs, pairs: Sequence[PreferencePair]) -> Grouping | None:
    """Return how a run will group its pairs, as far as that shows without computing; ``None``: each by itself."""
    grouping = expected_grouping(model) if args.scoring != "plain" else None
    if grouping in (None, PAIR_BY_PAIR):
        return grouping
    overhead = args.pass_overhead
    if overhead is None and calibration.pays(work_of(model, args, pairs)):
        overhead = calibration.known_overhead(model, compilation_pays(args.compile))
    return grouping_for(model, overhead)


def kernels_expected(
    model: nn.Module, args: CPOTrainingArgs, pairs: Sequence[PreferencePair]
) -> AbstractContextManager[None]:
    """Return a context in which an estimate counts with the kernels if the run is going to have them."""
    found = library.suits_device() and library.compiler() is not None
    return library.used() if found and kernels_suit(model, args) and kernels_pay(model, args, pairs) else nullcontext()


def expected_memory(
    model: nn.Module, optimizer: optimizers.Optimizer, pairs: Sequence[PreferencePair], args: CPOTrainingArgs
) -> MemoryEstimate:
    """Return what a run takes, as far as that shows without computing; no array is evaluated."""
    with kernels_expected(model, args, pairs):
        return MemoryEstimate(model, optimizer, pairs, args, grouping_expected(model, args, pairs))


@contextmanager
def training_environment(model: nn.Module, args: CPOTrainingArgs) -> Iterator[ExitStack]:
    """Prepare model and device for training; undo it, and what is entered on the stack, however training ends."""
    limit = wired_limit()
    with ExitStack() as stack:
        stack.enter_context(recurrences_in_chunks(model, args.recurrence_chunk_size))
        stack.enter_context(compile_where_it_pays(args.compile))
        stack.enter_context(lean_activations())
        stack.enter_context(float32_products(model))
        stack.enter_context(checkpointed_layers(model, args.grad_checkpoint))
        if limit is not None:
            stack.callback(mx.set_wired_limit, mx.set_wired_limit(limit))
        stack.callback(model.eval)
        model.train()
        yield stack


def quantisation_of(
    model: nn.Module, args: CPOTrainingArgs, kernels: bool = False
) -> AbstractContextManager[FakeQuantisation]:
    """Return a context in which a model can be fake-quantised, if that is wanted.

    Args:
        kernels: whether the compiled kernels compute it.
    """
    if not args.qat_enable:
        return nullcontext(FakeQuantisation())
    return fake_quantised(
        model,
        bits=args.qat_bits,
        group_size=args.qat_group_size,
        quantizer=args.qat_quantizer,
        mode=args.qat_mode,
        start_step=args.qat_start_step,
        interval=args.qat_interval,
        kernels=kernels,
    )


def batch_size_of(args: CPOTrainingArgs) -> BatchSize:
    """Return the size of a micro-batch and of a step."""
    return BatchSize(args.batch_size, args.batch_tokens, args.gradient_accumulation_steps)

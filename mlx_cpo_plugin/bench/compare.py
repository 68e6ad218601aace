"""Runs both trainers alternately, each in fresh processes, and compares their measurements.

Their gradients are compared with a float64 gradient where there is one, else with that of mlx-lm-lora.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np

from mlx_cpo_plugin.bench.cases import Case
from mlx_cpo_plugin.bench.job import HOST, PLUGIN, REFERENCE, Measurement, gradient_file
from mlx_cpo_plugin.bench.runs import Batches, MeasurementError, Runs, Say

COUNTED_ITERATIONS = 2
REFERENCE_TASK = "gradient of the first batch"


@dataclass(frozen=True)
class TrainerResult:
    """What one trainer took for one case.

    Attributes:
        seconds: of each timed iteration of each repeat, [repeats][iterations].
        processor_seconds: the same, summed over cores; other programs on the machine disturb it less.
        pair_counts: pairs of each timed iteration.
        peak_memory, peak_resident: bytes, the median over repeats.
        backbone_tokens, head_positions: of one counted iteration.
        counted_pairs: pairs of that iteration.
    """

    seconds: list[list[float]]
    processor_seconds: list[list[float]]
    pair_counts: list[int]
    peak_memory: int
    peak_resident: int
    backbone_tokens: int
    head_positions: float
    counted_pairs: int

    @property
    def seconds_per_pair(self) -> list[float]:
        """Of every timed iteration of every repeat."""
        return self._per_pair(self.seconds)

    @property
    def processor_seconds_per_pair(self) -> list[float]:
        """Of every timed iteration of every repeat."""
        return self._per_pair(self.processor_seconds)

    def _per_pair(self, figures: list[list[float]]) -> list[float]:
        return [figure / pairs for repeat in figures for figure, pairs in zip(repeat, self.pair_counts, strict=True)]


@dataclass(frozen=True)
class GradientDifferences:
    """How far the trainers' first gradients are from a reference: norm of the difference over that of the reference.

    Attributes:
        reference: whose gradient is the reference, :data:`REFERENCE` or :data:`HOST`; ``None`` if there is none.
        host: of mlx-lm-lora; ``None`` if unknown, or if its gradient of this case is itself the reference.
        plugin: of this project's trainer; ``None`` if unknown, as where the reference is zero.
    """

    reference: str | None
    host: float | None
    plugin: float | None

    @property
    def host_is_reference(self) -> bool:
        """Whether mlx-lm-lora has no difference because its gradient is the reference."""
        return self.reference == HOST and self.host is None


@dataclass(frozen=True)
class Comparison:
    """Both trainers on one case.

    Attributes:
        repeats, iterations: how often each trainer was timed, and over how many iterations each time.
        lengths: mean tokens of a timed pair, by part.
        least_work: floating-point operations that a pair of mean lengths takes at least, see :func:`least_work`;
            ``None`` if unknown.
        gradients: how far those of the first batch are from a reference.
        notes: what was done to make the two comparable, one sentence each.
    """

    case: Case
    host: TrainerResult
    plugin: TrainerResult
    repeats: int
    iterations: int
    lengths: dict[str, float]
    least_work: float | None
    gradients: GradientDifferences
    notes: tuple[str, ...]

    @property
    def speed_ratio(self) -> float:
        """How many times as fast as mlx-lm-lora: seconds of each repeat against those of its neighbour; the median."""
        return _ratio_of_repeats(self.host.seconds, self.plugin.seconds)

    @property
    def processor_ratio(self) -> float:
        """The same by processor seconds."""
        return _ratio_of_repeats(self.host.processor_seconds, self.plugin.processor_seconds)

    @property
    def memory_ratio(self) -> float:
        """Peak memory as a share of mlx-lm-lora's."""
        return self.plugin.peak_memory / self.host.peak_memory


def _ratio_of_repeats(host: list[list[float]], plugin: list[list[float]]) -> float:
    return median(sum(theirs) / sum(ours) for theirs, ours in zip(host, plugin, strict=True))


def compare(case: Case, *, iterations: int, repeats: int, say: Say) -> Comparison:
    """Measure both trainers on ``case``.

    Args:
        iterations: timed iterations of each process, after one to warm up.
        repeats: timed processes of each trainer, alternating.
        say: takes progress, a few words at a time.

    Raises:
        MeasurementError: a process failed; says which and why.
    """
    with tempfile.TemporaryDirectory(prefix="mlx-cpo-bench-") as folder:
        return _Comparing(case, Path(folder), say).compare(iterations, repeats)


class _Comparing(Runs):
    def compare(self, iterations: int, repeats: int) -> Comparison:
        counted = self.case.batches(COUNTED_ITERATIONS)
        host_count, notes = self._count_host(counted)
        counts = {HOST: host_count, PLUGIN: self.run("count", PLUGIN, counted)}
        differences = self._gradient_differences(counted[:1], notes)

        batches = self.case.batches(iterations + 1)
        timings = self.time_in_turn([HOST, PLUGIN], batches, repeats)
        for theirs, ours in zip(timings[HOST], timings[PLUGIN], strict=True):
            if theirs.scored_tokens != ours.scored_tokens:
                raise MeasurementError("the two trainers did not train on the same rows; report this.")
        timed = [self.case.pairs[index] for batch in batches[1:] for index in batch]
        lengths = {
            part: float(np.mean([len(getattr(pair, part)) for pair in timed]))
            for part in ("prompt", "chosen", "rejected")
        }
        host, plugin = (
            _result(timings[trainer], counts[trainer], batches, counted_pairs=len(counted[1]))
            for trainer in (HOST, PLUGIN)
        )
        return Comparison(
            case=self.case,
            host=host,
            plugin=plugin,
            repeats=repeats,
            iterations=iterations,
            lengths=lengths,
            least_work=least_work(lengths, counts[PLUGIN]),
            gradients=differences,
            notes=(*self.case.notes, *host_count.patches, *notes),
        )

    def _count_host(self, counted: Batches) -> tuple[Measurement, list[str]]:
        """Count the host's work, without ``efficient_long_context`` from now on where the host fails with it."""
        try:
            return self.run("count", HOST, counted), []
        except MeasurementError as error:
            if not self.case.settings.efficient_long_context:
                raise
            self.host_changes = {"efficient_long_context": False}
            note = f"mlx-lm-lora runs without efficient_long_context, which fails on this model ({_quoted(error)})"
            return self.run("count", HOST, counted), [note]

    def _gradient_differences(self, first_batch: Batches, notes: list[str]) -> GradientDifferences:
        """Compare both trainers with float64, or with the host where that fails; add to ``notes``."""
        plugin, host = (gradient_file(self.folder_of("count", trainer)) for trainer in (PLUGIN, HOST))
        try:
            reference = self._compute_reference(first_batch)
        except MeasurementError as error:
            notes.append(f"the gradient could not be computed in float64 ({_quoted(error)})")
            return self._differences_from_host(host, plugin, first_batch, notes)
        return _differences(REFERENCE, reference, host, plugin)

    def _compute_reference(self, first_batch: Batches) -> Path:
        """Return the file with the float64 gradient."""
        self.work(REFERENCE_TASK, REFERENCE, first_batch)
        return gradient_file(self.folder_of(REFERENCE_TASK, REFERENCE))

    def _differences_from_host(
        self, host: Path, plugin: Path, first_batch: Batches, notes: list[str]
    ) -> GradientDifferences:
        """Compare the plugin with the host, and both with a host that takes a pair as a whole if need be."""
        if self.host_changes or not self.case.settings.efficient_long_context:
            notes.append("the gradient is compared with that of mlx-lm-lora")
            return GradientDifferences(HOST, None, relative_difference(plugin, host))
        task = "count without efficient_long_context"
        try:
            self.run(task, HOST, first_batch, efficient_long_context=False)
        except MeasurementError as error:
            notes.append(
                f"no gradient to compare with, since mlx-lm-lora cannot take a pair as a whole ({_quoted(error)})"
            )
            return GradientDifferences(None, None, None)
        notes.append("gradients are compared with that of mlx-lm-lora without efficient_long_context")
        return _differences(HOST, gradient_file(self.folder_of(task, HOST)), host, plugin)


def _differences(name: str, reference: Path, host: Path, plugin: Path) -> GradientDifferences:
    return GradientDifferences(name, relative_difference(host, reference), relative_difference(plugin, reference))


def _result(timings: Sequence[Measurement], count: Measurement, batches: Batches, counted_pairs: int) -> TrainerResult:
    return TrainerResult(
        seconds=[timing.seconds[1:] for timing in timings],
        processor_seconds=[timing.processor_seconds[1:] for timing in timings],
        pair_counts=[len(batch) for batch in batches[1:]],
        peak_memory=int(median(timing.peak_memory or 0 for timing in timings)),
        peak_resident=int(median(timing.peak_resident for timing in timings)),
        backbone_tokens=count.backbone_tokens or 0,
        head_positions=count.head_positions or 0,
        counted_pairs=counted_pairs,
    )


def _quoted(error: Exception) -> str:
    """Return a sentence as a part of another one."""
    return str(error).rstrip(".")


def relative_difference(file: Path, reference: Path) -> float | None:
    """Return the norm of the difference of two gradients over that of the reference; ``None`` if the latter is zero.

    What only ``file`` has is left aside: mlx-lm-lora's ``efficient_long_context`` trains frozen weights, too.
    """
    ours, theirs = (
        {name: np.array(value, np.float64) for name, value in mx.load(str(path)).items()}  # type: ignore[union-attr]  # safetensors: a dict
        for path in (file, reference)
    )
    if not theirs.keys() <= ours.keys():
        raise MeasurementError(f"{file.parent.name} and {reference.parent.name} trained other parameters; report this.")
    norm = math.sqrt(sum(float(np.square(value).sum()) for value in theirs.values()))
    if norm == 0:
        return None
    return math.sqrt(sum(float(np.square(ours[name] - theirs[name]).sum()) for name in theirs)) / norm


def least_work(lengths: dict[str, float], measurement: Measurement) -> float | None:
    """Return ``(P + C + R) * 4 N + (C + R) * 4 V H`` floating-point operations for a pair.

    N weights of the layers and V H of the head, each multiplied once forwards and once backwards to the activations,
    as for an adapter of small rank on frozen weights; the products inside attention are not counted.
    """
    if measurement.weights is None or measurement.head_weights is None:
        return None
    answers = lengths["chosen"] + lengths["rejected"]
    return 4 * ((lengths["prompt"] + answers) * measurement.weights + answers * measurement.head_weights)

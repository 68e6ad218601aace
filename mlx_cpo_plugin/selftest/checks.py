"""What is tested on a device, and how far each result may be from float64."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.utils import load_adapters

from mlx_cpo_plugin.checkpoints import ADAPTER_FILE
from mlx_cpo_plugin.checkpoints.adapter import save_adapter, save_adapter_config
from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import TF32_EPSILON, compile_where_it_pays, current_device, float32_product_epsilon
from mlx_cpo_plugin.errors import first_line
from mlx_cpo_plugin.model.buckets import PAIR_BY_PAIR, Grouping
from mlx_cpo_plugin.model.parity import choose_scorer
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer
from mlx_cpo_plugin.plugins import loss_types
from mlx_cpo_plugin.selftest.models import build_model, build_pairs
from mlx_cpo_plugin.selftest.reference import Reference, reference_of
from mlx_cpo_plugin.selftest.tiny_run import KILLED_AT, run_in_child
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.gradient_methods import AnswerGradients, BatchGradients, GradientMethod, PairGradients
from mlx_cpo_plugin.training.gradients import SharedPromptGradients, gradients_for
from mlx_cpo_plugin.training.long_context import SegmentGradients
from mlx_cpo_plugin.training.objective import Objective, objective_for
from mlx_cpo_plugin.training.qat import fake_quantised
from mlx_cpo_plugin.training.wiring import quantisation_of, training_environment

# Sums of thousands of float32 products carry hundreds of its roundings; half-precision products are summed in float32,
# so only what goes from layer to layer is rounded to half precision.
FLOAT32_ROUNDINGS, HALF_ROUNDINGS = 800, 16
# The quantiser of mlx-lm-lora works in float64, too, as MLX's own does not.
QAT: dict[str, Any] = {"bits": 8, "group_size": 32, "quantizer": "host"}
SEGMENT = 16
# What weights may differ by where sums are added up in any order.
SUMMED_IN_ANY_ORDER = 1e-4

MethodFor = Callable[[nn.Module, Objective, Sequence[PreferencePair]], GradientMethod]


@dataclass(frozen=True)
class Outcome:
    """The result of one check.

    Attributes:
        status: ``ok`` or ``failed``; ``info`` where something is measured and not judged.
        error: the largest relative error; ``None`` where there is none.
        tolerance: what it may be.
    """

    name: str
    status: str
    detail: str
    error: float | None = None
    tolerance: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Check:
    """A check by name; ``run`` returns its outcome, and raises whatever goes wrong."""

    name: str
    run: Callable[[], Outcome]

    def outcome(self) -> Outcome:
        """Run it; whatever it raises is a failure that its row tells."""
        started = time.perf_counter()
        try:
            with redirect_stdout(io.StringIO()):  # what loading a model prints would tear the table
                outcome = self.run()
        except Exception as error:  # a check is there to find out what goes wrong, whatever that is
            outcome = Outcome(self.name, "failed", f"{type(error).__name__}: {first_line(error)}")
        return replace(outcome, name=self.name, seconds=time.perf_counter() - started)


def all_checks() -> list[Check]:
    """Return the checks of this device, in the order in which they run."""
    return [
        *(Check(f"loss {name}", partial(check_loss, name)) for name in loss_types()),
        *_way_checks(),
        *_model_checks(),
        Check("adapter saved, loaded by mlx_lm", check_saved_adapter),
        Check("killed and resumed", check_resumed_run),
        Check("time and memory of a run", measure_run),
    ]


def _way_checks() -> Iterator[Check]:
    for suffix, dtype in {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}.items():
        arguments = {"dtype": dtype}
        for way, method in WAYS.items():
            yield Check(f"{way}, {suffix}", partial(check_gradient, method, arguments))
        yield Check(
            f"gradient checkpointing, {suffix}", partial(check_gradient, as_a_run_does, arguments, grad_checkpoint=True)
        )


def _model_checks() -> Iterator[Check]:
    models: dict[str, dict[str, Any]] = {
        "sliding window (gemma3_text)": {"architecture": "gemma3_text"},
        "mixture of experts (qwen3_moe)": {"architecture": "qwen3_moe"},
        "DoRA": {"train_type": "dora"},
        "full fine-tuning": {"train_type": "full"},
        "base of 4 bits": {"bits": 4},
        "base of 8 bits, DoRA": {"bits": 8, "train_type": "dora"},
    }
    for name, arguments in models.items():
        yield Check(name, partial(check_gradient, as_a_run_does, arguments))
    yield Check("QAT", partial(check_gradient, as_a_run_does, {}, qat=True))
    yield Check("QAT, plain batches", partial(check_gradient, plain_batches, {}, qat=True))


def plain_batches(model: nn.Module, objective: Objective, pairs: Sequence[PreferencePair]) -> GradientMethod:
    """All answers of the pairs in one padded pass."""
    return BatchGradients(model, objective)


def answer_by_answer(model: nn.Module, objective: Objective, pairs: Sequence[PreferencePair]) -> GradientMethod:
    """One answer at a time, with its prompt."""
    return AnswerGradients(model, objective)


def pair_by_pair(model: nn.Module, objective: Objective, pairs: Sequence[PreferencePair]) -> GradientMethod:
    """A prompt once for both answers, one pair at a time."""
    return _shared(model, objective, PAIR_BY_PAIR)


def groups_of_pairs(model: nn.Module, objective: Objective, pairs: Sequence[PreferencePair]) -> GradientMethod:
    """A prompt once for both answers, all pairs in one padded pass."""
    return _shared(model, objective, Grouping(overhead=1e9, budget=1e9))


def in_segments(model: nn.Module, objective: Objective, pairs: Sequence[PreferencePair]) -> GradientMethod:
    """Long pairs, segment by segment."""
    return SegmentGradients(model, objective, SharedPromptScorer(model), SEGMENT)


def as_a_run_does(model: nn.Module, objective: Objective, pairs: Sequence[PreferencePair]) -> GradientMethod:
    """What a run with default settings chooses on this device; the model has to be able to share prompts."""
    scorer = choose_scorer(model, pairs, "shared")
    return gradients_for(model, objective, scorer, pairs)


WAYS: dict[str, MethodFor] = {
    "plain batches": plain_batches,
    "answer by answer": answer_by_answer,
    "shared prompt, pair by pair": pair_by_pair,
    "shared prompt, groups": groups_of_pairs,
    "shared prompt, segments": in_segments,
    "as a run chooses": as_a_run_does,
}


def _shared(model: nn.Module, objective: Objective, grouping: Grouping) -> GradientMethod:
    return SharedPromptGradients(model, objective, SharedPromptScorer(model), grouping)


def check_loss(name: str) -> Outcome:
    """Compare values and gradients of a loss with those of the same function in float64, over a wide range."""
    objective = objective_for(name, {})
    values = np.concatenate([-np.geomspace(1e-2, 300, 40), -np.geomspace(300, 1e-2, 40)])
    chosen, rejected = np.repeat(values, len(values)), np.tile(values, len(values))

    def with_slopes(dtype: mx.Dtype) -> list[np.ndarray]:
        def total(chosen: mx.array, rejected: mx.array) -> tuple[mx.array, mx.array]:
            losses = objective.fn(chosen, rejected, **objective.options)
            return losses.sum(), losses

        arrays = [mx.array(each.astype(np.float32)).astype(dtype) for each in (chosen, rejected)]
        (_, losses), slopes = mx.value_and_grad(total, argnums=(0, 1))(*arrays)
        mx.eval(losses, slopes)
        return [np.array(array, np.float64) for array in (losses, *slopes)]

    ours = with_slopes(mx.float32)
    with mx.stream(mx.cpu):
        exact = with_slopes(mx.float64)
    errors = [np.max(np.abs(a - b) / np.maximum(np.abs(b), 1)) for a, b in zip(ours, exact, strict=True)]
    return _judged({"values": errors[0], "gradients": max(errors[1:])}, FLOAT32_ROUNDINGS * mx.finfo(mx.float32).eps)


def check_gradient(
    method_for: MethodFor, arguments: Mapping[str, Any], *, grad_checkpoint: bool = False, qat: bool = False
) -> Outcome:
    """Compare log-probs, losses and gradient of some pairs, computed as ``method_for`` says, with float64.

    Args:
        arguments: of :func:`mlx_cpo_plugin.selftest.models.build_model`.
    """
    objective, pairs, model = tested_objective(), build_pairs(), build_model(**arguments)
    quantisation_args = {f"qat_{name}": value for name, value in QAT.items()}
    args = CPOTrainingArgs(grad_checkpoint=grad_checkpoint, qat_enable=qat, **quantisation_args)
    with training_environment(model, args) as environment:
        environment.enter_context(quantisation_of(model, args)).active = qat
        result = method_for(model, objective, pairs)(pairs, StepTotals.of(pairs), qat)
        mx.eval(result)
    exact = _reference(tuple(sorted(arguments.items(), key=lambda item: item[0])), qat)
    return compared(result, exact, arguments.get("dtype", mx.float32))


@lru_cache(maxsize=2)
def _reference(arguments: tuple[tuple[str, Any], ...], qat: bool) -> Reference:
    """Return the reference of a tiny model, which the ways to one gradient share."""
    model = build_model(**dict(arguments))
    with fake_quantised(model, **QAT) as quantisation:
        quantisation.active = qat
        return reference_of(model, build_pairs(), tested_objective())


def tested_objective() -> Objective:
    """Return the loss of which gradients are taken: it sees both log-probs, and the likelihood term."""
    return objective_for("sigmoid", {"beta": 0.1}, cpo_alpha=0.5)


def compared(result: PairGradients, exact: Reference, dtype: mx.Dtype) -> Outcome:
    """Return the errors of a result of a model whose activations are of ``dtype``."""
    errors = {"scores": exact.score_error(result), "gradient": exact.gradient_error(result)}
    return _judged(errors, tolerance_for(dtype))


def tolerance_for(dtype: mx.Dtype) -> float:
    """Return the relative error that results of a model of this dtype may have on the device at hand."""
    if dtype != mx.float32:
        return HALF_ROUNDINGS * float(mx.finfo(dtype).eps)
    epsilon = float32_product_epsilon()
    return (HALF_ROUNDINGS if epsilon == TF32_EPSILON else FLOAT32_ROUNDINGS) * epsilon


def _judged(errors: Mapping[str, float], tolerance: float) -> Outcome:
    largest = float(np.max(list(errors.values())))
    detail = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return Outcome("", "ok" if largest <= tolerance else "failed", detail, largest, tolerance)


def check_saved_adapter() -> Outcome:
    """Save a LoRA adapter, have mlx_lm load it onto the base model, and compare log-probs."""
    pairs, objective = build_pairs(), objective_for("sigmoid", {})
    step = StepTotals.of(pairs)
    trained = build_model()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ADAPTER_FILE
        save_adapter(trained, file)
        save_adapter_config(trained, file)
        loaded = load_adapters(build_model(train_type="full"), folder)
    with compile_where_it_pays():
        scores = [BatchGradients(model, objective)(pairs, step).scores for model in (trained, loaded)]
        mx.eval(scores)
    errors = [
        np.max(np.abs(np.array(a, np.float64) - np.array(b, np.float64)) / np.maximum(np.abs(np.array(a)), 1))
        for a, b in zip(*scores, strict=True)
    ]
    return _judged({"scores": float(np.max(errors))}, tolerance_for(mx.float32))


def check_resumed_run() -> Outcome:
    """Kill a run after a checkpoint, resume it, and compare its adapter with that of a run that was left alone."""
    with tempfile.TemporaryDirectory() as folder:
        whole, resumed = (Path(folder) / name for name in ("whole", "resumed"))
        run_in_child(whole)
        run_in_child(resumed, kill_at=KILLED_AT)
        run_in_child(resumed, resume=True)
        weights = [load_arrays(path / ADAPTER_FILE) for path in (whole, resumed)]
    differences = [float(np.max(np.abs(weights[0][name] - weights[1][name]))) for name in weights[0]]
    return _judged({"weights": max(differences)}, 0.0 if current_device().ordered_sums else SUMMED_IN_ANY_ORDER)


def load_arrays(file: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file by name."""
    return {name: np.array(value) for name, value in dict(mx.load(str(file))).items()}  # type: ignore[arg-type]  # a dict


def measure_run() -> Outcome:
    """Train a few steps as a run does, and tell time and memory; they are not judged."""
    with tempfile.TemporaryDirectory() as folder:
        reports = run_in_child(Path(folder))
    steady = reports[len(reports) // 2 :]  # compiling and first allocations are over
    tokens = sum(report["tokens_per_second"] for report in steady) / len(steady)
    peak = max(report["peak_memory"] for report in reports)
    return Outcome("", "info", f"{tokens:,.0f} scored tokens a second, peak {1000 * peak:,.0f} MB")

"""Memory that may not suffice is warned of, and memory that has ended is never taken for anything else."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import pytest
from mlx.utils import tree_flatten
from support.memory_errors import OUT_OF_MEMORY
from support.tiny import add_adapter, build_model, build_pairs

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import TrainingError, is_device_fault, is_out_of_memory
from mlx_cpo_plugin.host import TrainingCallback
from mlx_cpo_plugin.training import memory_estimate
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.exits import out_of_memory_explained
from mlx_cpo_plugin.training.memory_estimate import MemoryWatch, PassMemory
from mlx_cpo_plugin.training.trainer import train_cpo


def test_where_what_is_free_is_not_known_nothing_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch_of(None, monkeypatch).risk(build_pairs(2), step=1) is None


def passes() -> PassMemory:
    return PassMemory(add_adapter(build_model()), CPOTrainingArgs(batch_size=2), grouping=None)


def watch_of(free: int | None, monkeypatch: pytest.MonkeyPatch) -> MemoryWatch:
    monkeypatch.setattr(memory_estimate, "free_memory", lambda: free)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 0)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 0)
    return MemoryWatch(passes())


def estimate(pairs: list[PreferencePair]) -> int:
    return math.ceil(passes().largest(pairs)[0])


def test_what_a_micro_batch_took_corrects_the_estimate_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = build_pairs(2)
    held, taken = 10**6, 3 * estimate(pairs)
    watch = watch_of(2 * estimate(pairs), monkeypatch)
    monkeypatch.setattr(mx, "get_active_memory", lambda: held)

    assert watch.risk(pairs, step=1) is None
    monkeypatch.setattr(mx, "get_peak_memory", lambda: held + taken)
    assert f"may need about {taken / 1e9:.2f} GB" in (watch.risk(pairs, step=2) or "")


def test_an_estimate_above_what_is_free_is_a_warning_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = build_pairs(2)

    assert watch_of(estimate(pairs), monkeypatch).risk(pairs, step=3) is None
    line = watch_of(estimate(pairs) - 1, monkeypatch).risk(pairs, step=3)
    assert re.match(r"Step 3: the micro-batch with row [01] may need about .* GB are free; if the process", line or "")


def test_what_was_computed_once_is_no_risk_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = build_pairs(2, longest=4), build_pairs(2, longest=40)
    watch = watch_of(estimate(short) - 1, monkeypatch)

    risks = [watch.risk(pairs, step=1) is not None for pairs in (short, short, long, short, long)]

    assert risks == [True, False, True, False, False]


def test_a_gradient_for_which_there_is_no_memory_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = sum(value.nbytes for _, value in tree_flatten(add_adapter(build_model()).trainable_parameters()))

    watch_of(sizes, monkeypatch).risk(build_pairs(2), step=3)
    with pytest.raises(TrainingError, match=r"^Step 3: the gradient alone needs .* GB are free; train fewer"):
        watch_of(sizes - 1, monkeypatch).risk(build_pairs(2), step=3)


def test_before_a_risk_a_run_warns_and_saves_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_pairs = build_pairs(6)
    monkeypatch.setattr(memory_estimate, "free_memory", lambda: 2**40 if not risky else 2**20)
    monkeypatch.setattr(PassMemory, "largest", lambda *_: (2**30, "row 0"))
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 0)
    risky: list[int] = []
    saved_at: list[list[str]] = []

    class Callback(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            saved_at.append(sorted(path.name for path in (tmp_path / "checkpoints").glob("0*")))
            if train_info["iteration"] == 2:
                risky.append(1)

    train_cpo(
        add_adapter(build_model()),
        optimizers.Adam(learning_rate=1e-3),
        run_pairs,
        args=CPOTrainingArgs(
            adapter_file=str(tmp_path / "adapters.safetensors"), batch_size=1, iters=5, steps_per_report=1
        ),
        training_callback=Callback(),
    )

    assert saved_at == [[], [], ["0000002"], ["0000002"], ["0000002", "0000004"]]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("warning") == 1


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_is_known_on_every_device_and_behind_other_errors(error: Exception) -> None:
    wrapped = ValueError("the layer failed")
    wrapped.__cause__ = error

    assert is_out_of_memory(error)
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize(
    ("error", "of_the_device"),
    [
        (RuntimeError("[matmul] Last dimension of first input with shape (1,2) must match"), False),
        (ValueError("out of memory of the cache"), False),
        (RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error"), True),
        (RuntimeError("[Compile::eval_cpu] Failed to compile function"), True),
    ],
)
def test_other_errors_are_not_out_of_memory(error: Exception, of_the_device: bool) -> None:
    assert not is_out_of_memory(error)
    assert is_device_fault(error) == of_the_device


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum"),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU)"),
        RuntimeError("cudaMallocAsync(&data, size) failed: out of memory"),
        MemoryError(),
    ],
)
def test_what_a_gpu_says_when_memory_ends_becomes_a_sentence(error: Exception) -> None:
    with (
        pytest.raises(TrainingError, match=r"^The device is out of memory; lower max_seq_length, batch_size or"),
        out_of_memory_explained(),
    ):
        raise error


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"^\[matmul\] shapes"), out_of_memory_explained():
        raise RuntimeError("[matmul] shapes do not fit")

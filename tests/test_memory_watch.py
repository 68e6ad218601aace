"""A micro-batch for which there is no memory is not begun."""

from __future__ import annotations

import resource
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import add_adapter, build_model, build_pairs

from mlx_cpo_plugin.data.batches import BatchSize
from mlx_cpo_plugin.training import memory_watch
from mlx_cpo_plugin.training.alarms import TrainingError, last_good_weights_kept
from mlx_cpo_plugin.training.memory_estimate import ModelSizes, Way, bytes_for
from mlx_cpo_plugin.training.memory_watch import MemoryWatch, free_memory

GIGABYTE = 2**30


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The root of a machine with 8 GB that are available and 2 GB of swap space, of which 1 is free."""
    for folder in ("proc/self", "sys/fs/cgroup"):
        (tmp_path / folder).mkdir(parents=True)
    lines = ["MemTotal: 16777216 kB", "MemAvailable: 8388608 kB", "SwapTotal: 2097152 kB", "SwapFree: 1048576 kB"]
    (tmp_path / "proc/meminfo").write_text("\n".join([*lines, "HugePages_Total:       0"]) + "\n")
    (tmp_path / "proc/self/statm").write_text("1000 500 200 1 0 300 0\n")
    return tmp_path


def test_what_is_available_and_swap_space_are_free(machine: Path) -> None:
    assert free_memory(machine) == 9 * GIGABYTE


@pytest.mark.parametrize(("limit", "free"), [("max", 9), (str(4 * GIGABYTE), 3), (str(GIGABYTE // 2), 0)])
def test_a_container_leaves_what_its_limit_does_and_files_do_not_count(machine: Path, limit: str, free: int) -> None:
    (machine / "sys/fs/cgroup/memory.max").write_text(limit + "\n")
    (machine / "sys/fs/cgroup/memory.stat").write_text(f"anon {GIGABYTE}\nfile {5 * GIGABYTE}\n")

    assert free_memory(machine) == free * GIGABYTE


def test_a_limit_of_the_process_leaves_what_it_has_not_taken(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (GIGABYTE, resource.RLIM_INFINITY))

    assert free_memory(machine) == GIGABYTE - 1000 * resource.getpagesize()


def test_where_nothing_is_known_or_a_gpu_computes_nothing_is_stopped(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert free_memory(machine / "nowhere") is None
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert free_memory(machine) is None

    watch_of(None, monkeypatch).check(build_pairs(2), step=1)


def watch_of(free: int | None, monkeypatch: pytest.MonkeyPatch) -> MemoryWatch:
    monkeypatch.setattr(memory_watch, "free_memory", lambda: free)
    return MemoryWatch(add_adapter(build_model()), Way(BatchSize(2), grouping=None))


def test_a_micro_batch_is_stopped_only_if_it_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = build_pairs(2)
    way = Way(BatchSize(2), grouping=None)
    least = memory_watch.CERTAIN_SHARE * bytes_for(ModelSizes(add_adapter(build_model()), way), pairs, way)

    watch_of(round(least) + 1, monkeypatch).check(pairs, step=3)
    with pytest.raises(
        TrainingError, match=r"^Step 3: the micro-batch with row [01] needs about .* GB are free; lower"
    ):
        watch_of(round(least) - 1, monkeypatch).check(pairs, step=3)


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
        last_good_weights_kept(lambda: pytest.fail("saved")),
    ):
        raise error


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"^\[matmul\] shapes"), last_good_weights_kept(lambda: None):
        raise RuntimeError("[matmul] shapes do not fit")

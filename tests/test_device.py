"""The device is asked in one place; every choice that depends on it is made under every kind of device."""

from __future__ import annotations

import ast
import resource
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.devices import pretended

from mlx_cpo_plugin import device
from mlx_cpo_plugin.device import CPU, CUDA, DEVICES, METAL, Device, current_device, free_memory
from mlx_cpo_plugin.kernels import library
from mlx_cpo_plugin.selftest import checks
from mlx_cpo_plugin.selftest.checks import as_a_run_does, check_gradient
from mlx_cpo_plugin.selftest.tiny_run import train

PACKAGE = Path(device.__file__).parent
# How to ask MLX, Python or the system what computes here.
QUESTIONS = {
    *("mx.default_device", "mx.DeviceType", "mx.device_info", "mx.get_memory_limit", "mx.metal", "mx.cuda"),
    *("sys.platform", "platform.system", "platform.machine", "os.uname"),
}
ASKED_ELSEWHERE = {
    "blas.py": {"sys.platform"},  # decides before MLX is imported
    "settings/run_settings.py": {"mx.default_device", "platform.system", "platform.machine"},  # heads a file
    "bench/report.py": {"mx.default_device", "platform.machine", "sys.platform"},  # heads a report
    "bench/recording.py": {"sys.platform"},  # units of the system's peak memory
    "bench/host_trainer.py": {"mx.metal", "mx.device_info"},  # patches what the host's trainer reads
    "bench/unsloth_worker.py": {"mx.metal"},  # asks for the peer, whose environment has nothing of this package
    "training/samples.py": {"mx.default_device"},  # generates on the stream of the run
}
GIGABYTE = 2**30


def questions_in(file: Path) -> set[str]:
    attributes = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute))
    return {ast.unparse(node) for node in attributes} & QUESTIONS


def test_the_device_is_asked_in_one_place() -> None:
    asked = {str(file.relative_to(PACKAGE)): questions_in(file) for file in PACKAGE.rglob("*.py")}
    assert asked.pop("device.py") > {"mx.default_device", "mx.cuda"}
    assert {file: questions for file, questions in asked.items() if questions} == ASKED_ELSEWHERE


@pytest.mark.parametrize(("gpu", "cuda", "kind"), [(False, True, CPU), (True, True, CUDA), (True, False, METAL)])
def test_the_kind_follows_from_the_default_device(
    gpu: bool, cuda: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu if gpu else mx.cpu, 0))
    monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)

    assert current_device() is DEVICES[kind]


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.slow
def test_every_field_that_differs_between_devices_is_read_under_each(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {"a": mx.zeros(1)}
    monkeypatch.setattr(
        checks, "run_in_child", lambda folder, **_: folder.mkdir(exist_ok=True) or _save(folder, arrays)
    )
    with pretended(kind) as recorded:
        for arguments in ({"bits": 4}, {}):
            outcome = check_gradient(as_a_run_does, arguments)
            assert outcome.status == "ok", outcome.detail
        train(tmp_path / "run", callback=lambda report: None)
        checks.check_resumed_run()
        library.suits_device()

    differing = {field.name for field in fields(Device) if len({getattr(d, field.name) for d in DEVICES.values()}) > 1}
    assert differing - recorded.read <= {"kind"}  # which is a name


def _save(folder: Path, arrays: dict[str, Any]) -> None:
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)


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


def test_what_is_free_is_not_known_outside_linux_and_not_asked_of_a_gpu(machine: Path) -> None:
    assert free_memory(machine / "nowhere") is None
    for kind in (METAL, CUDA):
        with pretended(kind):
            assert free_memory(machine) is None


def test_compilation_is_off_on_the_cpu_only_while_the_context_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_compilation_is_on", lambda: True)
    calls: list[str] = []
    monkeypatch.setattr(mx, "disable_compile", lambda: calls.append("off"))
    monkeypatch.setattr(mx, "enable_compile", lambda: calls.append("on"))

    def fail() -> None:
        with device.compile_where_it_pays(wanted=False):
            assert calls == ["off"]
            raise KeyError

    with device.compile_where_it_pays(wanted=True):
        assert calls == []
    with pretended(METAL), device.compile_where_it_pays():
        assert calls == []
    with pytest.raises(KeyError):
        fail()

    assert calls == ["off", "on"]

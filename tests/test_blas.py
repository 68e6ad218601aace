"""MLX's matrix products on a Linux CPU go to a fast BLAS wherever CPO may run, and nowhere else."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.fresh_environment import FreshEnvironment, installed_environment
from support.refusals import refused

from mlx_cpo_plugin import blas, linkage
from mlx_cpo_plugin.commands import doctor
from mlx_cpo_plugin.errors import ConfigError

slots = linkage.call_slots("libmlx.so", blas.FUNCTIONS)
pytestmark = pytest.mark.skipif(not slots, reason="needs a build of MLX that calls a BLAS in a library of its own")

needs_package = pytest.mark.skipif(
    not any(blas._functions_found()), reason=f"needs {blas.DISTRIBUTION} or an OpenBLAS of the system"
)

# Prints the file that products of float32 go to, and what of it this process has loaded.
TELL = """
import json, sys
from mlx_cpo_plugin import linkage
(slot,) = linkage.call_slots("libmlx.so", ["cblas_sgemm"]).values()
maps = open("/proc/self/maps").read()
print(json.dumps([linkage.file_of(linkage.target(slot)), "libscipy_openblas.so" in maps, "mlx_lm_lora" in sys.modules]))
"""
ROUTES = {
    "import mlx_lm_lora.train": "import mlx_lm_lora.train",
    "the app's import": "from mlx_lm_lora.trainer.cpo_trainer import CPOTrainingArgs, train_cpo",
    "mlx.core first": "import mlx.core as mx; mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8))); import mlx_lm_lora.train",
}
# Where start-up files are not read, as with `python -S`.
OWN_ROUTES = {
    "activate() afterwards": "import mlx_lm_lora.train; import mlx_cpo_plugin; mlx_cpo_plugin.activate()",
    "loading a model": """
from types import SimpleNamespace
from mlx_cpo_plugin.run.building import load_model
try:
    load_model(SimpleNamespace(seed=0, model="/none", load_in_4bits=0, load_in_6bits=0, load_in_8bits=0))
except Exception:
    pass
""",
    "evaluate_cpo": """
from mlx_cpo_plugin import evaluate_cpo
try:
    evaluate_cpo(None, [], 1, 1, 0.1, 50.0, 512, "sigmoid")
except Exception:
    pass
""",
    "train_cpo": """
from mlx_cpo_plugin import train_cpo
try:
    train_cpo(None, None, [])
except Exception:
    pass
""",
}


@pytest.fixture(scope="module")
def environment() -> FreshEnvironment:
    return installed_environment("wheel")


@pytest.fixture
def slots_restored() -> Iterator[None]:
    """What the test binds is bound back."""
    before = {slot: linkage.target(slot) for slot in slots.values()}
    yield
    for slot, address in before.items():
        linkage.redirect(slot, address)


@pytest.fixture
def reference_in_use(slots_restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX calls the BLAS of its wheel, as it does in a process in which nobody did anything."""
    monkeypatch.delenv(blas.VARIABLE, raising=False)
    reference = next((file for file in loaded_files() if Path(file).name.startswith("libblas-")), None)
    if reference is None:
        pytest.skip("needs a wheel of MLX that carries the reference BLAS")
    library = ctypes.CDLL(reference)
    for name, slot in slots.items():
        linkage.redirect(slot, ctypes.cast(library[name], ctypes.c_void_p).value or 0)


def loaded_files() -> list[str]:
    return [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]


def told_by(environment: FreshEnvironment, code: str, *flags: str, **variables: str) -> tuple[str, bool, bool]:
    printed = environment.printed(*flags, "-c", code + TELL, LD_PRELOAD="", **variables)
    file, loaded, host_imported = json.loads(printed.splitlines()[-1])
    return file, loaded, host_imported


@needs_package
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.slow
def test_every_route_multiplies_with_openblas(environment: FreshEnvironment, route: str) -> None:
    file, _, _ = told_by(environment, ROUTES[route])

    assert "openblas" in file


@needs_package
@pytest.mark.parametrize("route", OWN_ROUTES)
@pytest.mark.slow
def test_where_start_up_files_are_not_read_the_plugins_own_calls_bind_it(
    environment: FreshEnvironment, route: str
) -> None:
    file, _, _ = told_by(environment, OWN_ROUTES[route], "-S", PYTHONPATH=environment.search_path)

    assert "openblas" in file


@needs_package
@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.slow
def test_children_multiply_with_openblas(environment: FreshEnvironment, tmp_path: Path, method: str) -> None:
    work = "def work():\n    import mlx_lm_lora.train\n" + textwrap.indent(TELL, "    ")
    script = tmp_path / "parent.py"
    script.write_text(
        f"""{work}
if __name__ == "__main__":
    import multiprocessing
    child = multiprocessing.get_context({method!r}).Process(target=work)
    child.start()
    child.join()
"""
    )

    file, *_ = json.loads(environment.printed(script, LD_PRELOAD="").splitlines()[-1])

    assert "openblas" in file


@pytest.mark.parametrize(
    "code", ["", "import mlx.core, mlx.nn", "import numpy; numpy.ones((9, 9)) @ numpy.ones((9, 9))"]
)
@pytest.mark.slow
def test_a_process_without_the_host_is_left_alone(environment: FreshEnvironment, code: str) -> None:
    # Asking is done without MLX where MLX is not imported: no library called libmlx.so is loaded then.
    probe = TELL.replace('(slot,) = linkage.call_slots("libmlx.so", ["cblas_sgemm"]).values()', "import mlx.core")
    probe = probe.replace("linkage.file_of(linkage.target(slot))", '"mlx_cpo_plugin.blas" in sys.modules')
    ended = environment.start(environment.python, "-c", code + probe, LD_PRELOAD="")

    assert json.loads(ended.stdout) == [False, False, False]


@pytest.mark.slow
def test_start_up_does_not_import_what_binding_needs(environment: FreshEnvironment) -> None:
    printed = environment.start(environment.python, "-c", "import sys; print(*sys.modules)").stdout.split()

    assert "mlx_cpo_plugin.activation.finder" in printed
    assert not {"ctypes", "mlx_cpo_plugin.blas", "mlx_cpo_plugin.linkage"} & set(printed)


@pytest.mark.slow
def test_none_leaves_the_reference_blas(environment: FreshEnvironment) -> None:
    file, loaded, host_imported = told_by(environment, ROUTES["import mlx_lm_lora.train"], MLX_CPO_PLUGIN_BLAS="none")

    assert not loaded
    assert host_imported
    assert blas._is_reference(file)


@pytest.mark.slow
def test_a_switched_off_plugin_binds_nothing(environment: FreshEnvironment) -> None:
    file, loaded, _ = told_by(environment, ROUTES["import mlx_lm_lora.train"], MLX_CPO_PLUGIN_DISABLE="1")

    assert not loaded
    assert blas._is_reference(file)


@needs_package
@pytest.mark.slow
def test_a_path_is_what_products_go_to(environment: FreshEnvironment, tmp_path: Path) -> None:
    (tmp_path / "mine.so").symlink_to(linkage.file_of(next(blas._functions_found())["cblas_sgemm"]))

    file, _, _ = told_by(environment, ROUTES["import mlx_lm_lora.train"], MLX_CPO_PLUGIN_BLAS=str(tmp_path / "mine.so"))

    assert Path(file) == tmp_path / "mine.so"


@pytest.mark.parametrize("kind", ["missing", "not a library", "without products"])
def test_a_library_that_cannot_be_used_is_named(
    reference_in_use: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "text.so").write_text("no library")
    file = {"missing": "none.so", "not a library": str(tmp_path / "text.so"), "without products": "libm.so.6"}[kind]
    monkeypatch.setenv(blas.VARIABLE, file)

    with refused(ConfigError, file, key=blas.VARIABLE):
        blas.use_fast_blas()


@pytest.mark.slow
def test_a_library_that_cannot_be_used_is_one_sentence_and_exit_code_2(
    environment: FreshEnvironment, settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "my.yaml").write_text(json.dumps(settings))
    (tmp_path / "text.so").write_text("no library")
    file = "text.so"

    ended = environment.run(
        environment.host_script, "--config", "my.yaml", folder=tmp_path, MLX_CPO_PLUGIN_BLAS=file, LD_PRELOAD=""
    )

    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert f"{blas.VARIABLE} is {file}" in line
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "adapters").exists()


@pytest.mark.slow
def test_other_modes_do_not_mind_a_library_that_cannot_be_used(environment: FreshEnvironment) -> None:
    file, _, _ = told_by(environment, ROUTES["import mlx_lm_lora.train"], MLX_CPO_PLUGIN_BLAS="/none.so")

    assert blas._is_reference(file)


@needs_package
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_right(reference_in_use: None, dtype: str, transposed: bool) -> None:
    blas.use_fast_blas()
    assert not blas.in_use().is_reference
    rng = np.random.default_rng(3)
    left, right = rng.standard_normal((2, 70, 70)) + (1j * rng.standard_normal((2, 70, 70)) if dtype[0] == "c" else 0)

    product = mx.array(left.astype(dtype)) @ (
        mx.array(right.astype(dtype)).T if transposed else mx.array(right.astype(dtype))
    )

    expected = left @ (right.T if transposed else right)
    np.testing.assert_allclose(np.array(product), expected, atol=2e-5)


@needs_package
def test_gradients_agree_with_the_reference_blas_to_rounding(reference_in_use: None) -> None:
    weights = mx.random.normal((96, 64), key=mx.random.key(1))
    inputs = mx.random.normal((50, 96), key=mx.random.key(2))

    def gradient() -> np.ndarray:
        return np.array(mx.grad(lambda matrix: mx.sum(mx.tanh(inputs @ matrix) ** 2))(weights))

    slow = gradient()
    blas.use_fast_blas()

    np.testing.assert_allclose(gradient(), slow, rtol=1e-4, atol=1e-5)


@needs_package
def test_slots_that_the_linker_protects_are_bound(reference_in_use: None) -> None:
    for slot in slots.values():
        page = ctypes.c_void_p(slot & -mmap.PAGESIZE)
        assert ctypes.CDLL(None).mprotect(page, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ) == 0

    blas.use_fast_blas()

    assert not blas.in_use().is_reference


@needs_package
def test_a_blas_that_is_not_the_reference_stays(
    slots_restored: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Somebody preloaded one, or MLX was built with one."""
    (tmp_path / "libmine.so").symlink_to(linkage.file_of(next(blas._functions_found())["cblas_sgemm"]))
    monkeypatch.setenv(blas.VARIABLE, str(tmp_path / "libmine.so"))
    blas.use_fast_blas()
    before = [linkage.target(slot) for slot in slots.values()]
    monkeypatch.delenv(blas.VARIABLE)
    monkeypatch.setattr(blas, "_functions_found", lambda: iter([dict.fromkeys(blas.FUNCTIONS, 1)]))

    blas.use_fast_blas()

    assert [linkage.target(slot) for slot in slots.values()] == before


@pytest.fixture
def openblas() -> Iterator[tuple[ctypes.CDLL, str]]:
    """An OpenBLAS and how its names begin; it has as many threads afterwards as before."""
    library = ctypes.CDLL(linkage.file_of(next(blas._functions_found())["cblas_sgemm"]))
    prefix = next(prefix for prefix in blas.PREFIXES if hasattr(library, f"{prefix}openblas_get_num_threads"))
    before = library[f"{prefix}openblas_get_num_threads"]()
    yield library, prefix
    library[f"{prefix}openblas_set_num_threads"](before)


@needs_package
@pytest.mark.parametrize(
    ("cores", "variables", "expected"), [(1, {}, 1), (2, {}, 1), (4, {}, 3), (4, {"OMP_NUM_THREADS": "2"}, 7)]
)
def test_openblas_leaves_a_core_unless_the_environment_says_how_many(
    openblas: tuple[ctypes.CDLL, str],
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    variables: dict[str, str],
    expected: int,
) -> None:
    library, prefix = openblas
    for name in blas.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(blas, "usable_cores", lambda: cores)
    library[f"{prefix}openblas_set_num_threads"](7)

    blas._leave_a_core(library, prefix)

    assert library[f"{prefix}openblas_get_num_threads"]() == expected


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("300000 100000", 3), ("50000 100000", 1), ("6400000 100000", 8), (None, 8)],
)
def test_a_containers_quota_bounds_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str | None, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")

    assert blas.usable_cores(tmp_path / "cpu.max") == expected


@pytest.mark.parametrize("pretended", ["macOS", "GPU"])
def test_nothing_happens_on_macos_and_on_a_gpu(
    reference_in_use: None, monkeypatch: pytest.MonkeyPatch, pretended: str
) -> None:
    if pretended == "macOS":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setenv(blas.VARIABLE, "/none.so")
    before = [linkage.target(slot) for slot in slots.values()]

    blas.use_fast_blas()

    assert [linkage.target(slot) for slot in slots.values()] == before
    assert blas.in_use() is None
    assert blas.description() == blas.advice() == ""
    assert doctor.check_blas() == []


def test_without_a_library_a_run_goes_on_and_says_what_to_install(
    reference_in_use: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas, "_functions_found", lambda: iter(()))

    blas.use_fast_blas()

    assert blas.in_use().is_reference
    assert f"pip install {blas.DISTRIBUTION}" in blas.advice()
    (finding,) = doctor.check_blas()
    assert finding.status == "warning"
    assert finding.remedy == blas.advice()


def test_a_system_that_forbids_it_costs_speed_and_not_the_run(
    reference_in_use: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(slot: int, address: int) -> None:
        raise OSError("mprotect failed")

    monkeypatch.setattr(linkage, "redirect", refuse)

    blas.use_fast_blas()

    assert blas.in_use().is_reference


def test_integers_of_64_bits_are_refused(reference_in_use: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_openblas_config", lambda library: "OpenBLAS 0.3.30 USE64BITINT DYNAMIC_ARCH")
    library = next(iter(blas_libraries()), None)
    if library is None:
        pytest.skip(f"needs {blas.DISTRIBUTION} or an OpenBLAS of the system")
    monkeypatch.setenv(blas.VARIABLE, library)

    with refused(ConfigError, "64 bits", key=blas.VARIABLE):
        blas.use_fast_blas()


def blas_libraries() -> list[str]:
    """Paths of the OpenBLAS libraries that can be loaded here."""
    return [file for file in loaded_files() if "openblas" in Path(file).name and "openblas64" not in Path(file).name]


@needs_package
def test_the_doctor_names_the_blas_and_its_speed(reference_in_use: None) -> None:
    (finding,) = doctor.check_blas()

    assert finding.status == "ok"
    assert finding.detail.startswith("OpenBLAS 0.")
    assert "GFLOP/s" in finding.detail
    assert blas.in_use().file in finding.detail


def test_the_doctor_names_a_variable_that_is_wrong(reference_in_use: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(blas.VARIABLE, "/none.so")

    (finding,) = doctor.check_blas()

    assert finding.status == "failed"
    assert "/none.so" in finding.detail


def test_measuring_leaves_random_numbers_alone() -> None:
    mx.random.seed(7)
    expected = np.array(mx.random.uniform(shape=(3,)))
    mx.random.seed(7)

    assert blas.gigaflops(rows=64, seconds=0.0) > 0

    np.testing.assert_array_equal(np.array(mx.random.uniform(shape=(3,))), expected)


def test_slots_are_those_that_the_linker_lists() -> None:
    """The addresses that are read from memory are those of the file."""
    try:
        listed = subprocess.run(
            ["readelf", "-rW", str(Path(mx.__file__).parent / "lib" / "libmlx.so")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs readelf and a libmlx.so beside mlx.core")
    offsets = {line.split()[4]: int(line.split()[0], 16) for line in listed.splitlines() if "cblas_" in line}

    distances = {slots[name] - offsets[name] for name in blas.FUNCTIONS}

    assert len(distances) == 1

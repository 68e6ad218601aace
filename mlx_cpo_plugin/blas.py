"""A fast BLAS for MLX on a Linux CPU.

MLX's Linux wheels carry the reference BLAS, which uses neither SIMD nor a second core. MLX calls three of its
functions, the matrix products; they are redirected to OpenBLAS. This works whether or not ``mlx.core`` has been
imported, and affects no other library of the process: nothing is loaded into the global namespace.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from mlx_cpo_plugin import linkage
from mlx_cpo_plugin.errors import ConfigError

VARIABLE = "MLX_CPO_PLUGIN_BLAS"
SET_THREADS = "openblas_set_num_threads"
# What openblas_get_parallel() returns.
_OPENMP = 2
AUTO, NONE = "auto", "none"
DISTRIBUTION = "scipy-openblas32"
SYSTEM_LIBRARY = "libopenblas.so.0"

FUNCTIONS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
# SciPy's builds of OpenBLAS prefix every name, so that several of them fit into one process.
PREFIXES = ("", "scipy_")
_REFERENCE = re.compile(r"lib(ref|c)?blas\b")
_FAST = re.compile(r"openblas|mkl|blis|flexiblas|armpl|nvpl|atlas")

# Set by users who choose the number of threads themselves.
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class Blas(NamedTuple):
    """The library that multiplies MLX's matrices; ``is_reference``: whether it is the slow one of MLX's wheels."""

    file: str
    name: str
    is_reference: bool


def use_fast_blas() -> None:
    """Redirect MLX's products to a fast BLAS, unless they use one already or ``MLX_CPO_PLUGIN_BLAS`` is ``none``.

    On macOS, on a GPU and where MLX has its BLAS built in, nothing happens. Calling it again changes nothing.

    Raises:
        ConfigError: ``MLX_CPO_PLUGIN_BLAS`` names a library that cannot be used.
    """
    wanted = os.environ.get(VARIABLE, "").strip() or AUTO
    if not is_used_here() or wanted.lower() == NONE:
        return
    if wanted.lower() == AUTO:
        if _is_reference(_file_in_use()):
            with suppress(OSError):  # where the kernel forbids it, only speed is lost
                _bind(next(_functions_found(), {}))
        return
    file = Path(wanted).expanduser()
    try:
        _bind(_functions_of(ctypes.CDLL(str(file.absolute()) if file.exists() else wanted)))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{VARIABLE} is {wanted}, which cannot be used ({error}); "
            f"set it to the path of a BLAS library for this machine, to {AUTO} or to {NONE}.",
            key=VARIABLE,
        ) from error


def is_used_here() -> bool:
    """Whether MLX computes on a Linux CPU and calls a BLAS that can be exchanged."""
    if sys.platform != "linux":
        return False
    from mlx_cpo_plugin.device import CPU, current_device  # imports MLX

    return current_device().kind == CPU and bool(_slots())


def in_use() -> Blas | None:
    """Return the BLAS that MLX calls; None where :func:`is_used_here` is false."""
    if not is_used_here():
        return None
    file = _file_in_use()
    if _is_reference(file):
        return Blas(file, "the reference BLAS of MLX's wheel", True)
    return Blas(file, " ".join(_openblas_config(ctypes.CDLL(file)).split()[:2]) or os.path.basename(file), False)


def gigaflops(rows: int = 1024, seconds: float = 0.05) -> float:
    """Return the best rate of float32 products of square matrices in ``seconds``, in 1e9 operations a second."""
    import mlx.core as mx

    matrix = mx.ones((rows, rows))
    mx.eval(matrix @ matrix)  # the library starts its threads
    times = [float("inf")]
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        mx.eval(matrix @ matrix)
        times.append(time.perf_counter() - started)
    return 2 * rows**3 / min(times) / 1e9


def description() -> str:
    """Return name and speed of the BLAS that MLX calls; empty where :func:`is_used_here` is false."""
    blas = in_use()
    if blas is None:
        return ""
    # The speed of the reference BLAS does not grow with the matrices, the time for a product of 1024 rows would.
    rate = gigaflops(256) if blas.is_reference else gigaflops()
    return f"{blas.name}, {rate:.0f} GFLOP/s"


def advice() -> str:
    """Return what to do about a slow BLAS; empty where it is not slow, or was chosen."""
    blas = in_use()
    if blas is None or not blas.is_reference or os.environ.get(VARIABLE, "").strip().lower() == NONE:
        return ""
    return f"pip install {DISTRIBUTION}, or set {VARIABLE} to the path of an OpenBLAS, which is many times faster"


@cache
def _slots() -> Mapping[str, int]:
    """Return the slots through which MLX calls :data:`FUNCTIONS`; none where it calls them otherwise."""
    slots = linkage.call_slots("libmlx.so", FUNCTIONS)
    return slots if slots.keys() == set(FUNCTIONS) else {}


def _file_in_use() -> str:
    file = linkage.file_of(linkage.target(_slots()[FUNCTIONS[0]]))
    return os.path.realpath(file) if file else ""


def _is_reference(file: str) -> bool:
    return bool(_REFERENCE.match(os.path.basename(file))) and not _FAST.search(file)


def _openblas_config(library: ctypes.CDLL) -> str:
    """Return version and build options of an OpenBLAS; empty for any other library."""
    for prefix in PREFIXES:
        if hasattr(library, f"{prefix}openblas_get_config"):
            get_config = library[f"{prefix}openblas_get_config"]
            get_config.restype = ctypes.c_char_p
            return os.fsdecode(get_config())
    return ""


def _functions_found() -> Iterator[dict[str, int]]:
    """Yield the functions of each library that can be loaded: the Python environment's, then the system's."""
    package = find_spec(DISTRIBUTION.replace("-", "_"))
    folders = (package and package.submodule_search_locations) or []
    for library in (
        *(file for folder in folders for file in sorted(Path(folder, "lib").glob("lib*.so"))),
        SYSTEM_LIBRARY,
    ):
        with suppress(OSError, ValueError):  # for another processor, damaged, or missing
            yield _functions_of(ctypes.CDLL(str(library)))


def _functions_of(library: ctypes.CDLL) -> dict[str, int]:
    """Return the addresses of :data:`FUNCTIONS` in a library that is about to be used.

    Raises:
        ValueError: it lacks them, or takes integers of 64 bits where MLX passes 32.
    """
    prefix = next((prefix for prefix in PREFIXES if all(hasattr(library, prefix + name) for name in FUNCTIONS)), None)
    if prefix is None:
        raise ValueError(f"it has no function {FUNCTIONS[0]}")
    if "USE64BITINT" in _openblas_config(library):
        raise ValueError("its integers have 64 bits, MLX's 32")
    _leave_a_core(library, prefix)
    return {name: ctypes.cast(library[prefix + name], ctypes.c_void_p).value or 0 for name in FUNCTIONS}


def usable_cores(quota_file: Path = _CPU_QUOTA) -> int:
    """Return how many cores this process may use at a time, by its affinity and its container's quota (cgroup v2)."""
    if not hasattr(os, "sched_getaffinity"):  # macOS, which has no container either
        return os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = quota_file.read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # there is none: "max"
        return cores


def _leave_a_core(library: ctypes.CDLL, prefix: str) -> None:
    """Give an OpenBLAS one thread less than there are cores, unless the environment says how many.

    Its threads wait for one another in every product. While another process, or MLX's own thread, occupies one of their
    cores, a product takes many times as long as on one thread. The number depends on nothing that changes between runs
    on a machine, since it determines the order of summation.
    """
    if hasattr(library, prefix + SET_THREADS) and not any(map(os.environ.get, THREAD_VARIABLES)):
        library[prefix + SET_THREADS](max(1, usable_cores() - 1))


def _bind(functions: Mapping[str, int]) -> None:
    for name, address in functions.items():
        slot = _slots()[name]
        if linkage.target(slot) != address:
            linkage.redirect(slot, address)


def product() -> int | None:
    """Return the address of ``cblas_sgemm`` in the OpenBLAS that MLX calls; None where it calls another library.

    One that is built with OpenMP is none, either: there each thread that calls it has a number of threads of its own.
    """
    if not is_used_here() or not _file_in_use():
        return None
    library = ctypes.CDLL(_file_in_use())
    prefix = _openblas_prefix(library)
    if prefix is None or library[f"{prefix}openblas_get_parallel"]() == _OPENMP:
        return None
    return linkage.target(_slots()[FUNCTIONS[0]])


def _openblas_prefix(library: ctypes.CDLL) -> str | None:
    """Return what the names of an OpenBLAS with threads begin with; None for any other library."""
    return next((prefix for prefix in PREFIXES if hasattr(library, prefix + SET_THREADS)), None)


def kernel_threads() -> int:
    """Return how many threads the compiled kernels have: as many as there are cores, or as the environment says."""
    chosen = next((value for value in map(os.environ.get, THREAD_VARIABLES) if value), "")
    return int(chosen) if chosen.isdigit() and int(chosen) else usable_cores()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let each product take one thread until the context ends: those who call it have threads of their own."""
    library = ctypes.CDLL(_file_in_use())
    prefix = _openblas_prefix(library)
    assert prefix is not None
    before = library[f"{prefix}openblas_get_num_threads"]()
    library[prefix + SET_THREADS](1)
    try:
        yield
    finally:
        library[prefix + SET_THREADS](before)

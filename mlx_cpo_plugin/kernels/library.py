"""The compiled operations: built once for a processor and a version of MLX, checked, cached, and loaded.

They need a C++ compiler once. Without one, MLX's own operations compute the same, more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from filelock import FileLock

from mlx_cpo_plugin import blas
from mlx_cpo_plugin.device import current_device

VARIABLE = "MLX_CPO_PLUGIN_KERNELS"
AUTO, ALWAYS, NONE = "auto", "always", "none"
# Multiplications and additions of a run, below which kernels are not used: at the best rates of today's processors they
# take longer than compiling does. The choice depends on nothing else, so that it is the same for the same run.
LEAST_WORK = 3e12
COMPILERS = ("g++", "clang++", "c++")
SOURCE = Path(__file__).parent / "source"
# What contracts a product and a sum is as exact; nothing that reorders sums is switched on.
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")

FUNCTIONS = ("linear", "norm", "rotation", "attention", "silu_gate", "gelu", "head")


class KernelError(Exception):
    """The kernels cannot be built or do not work here."""


def pays(work: float) -> bool:
    """Whether a run of so much ``work``, in floating point operations, is to use kernels; see :data:`VARIABLE`."""
    wanted = os.environ.get(VARIABLE, "").strip().lower() or AUTO
    return wanted == ALWAYS or (wanted != NONE and work >= LEAST_WORK)


def suits_device() -> bool:
    """Whether models are computed on a CPU with an OpenBLAS, which is what the kernels are for."""
    return current_device().takes_kernels and blas.product() is not None


def usable(say: Callable[[str], None] = print) -> bool:
    """Load the kernels, compiled before or now; return whether that worked.

    They need a CPU, an OpenBLAS and, the first time, a C++ compiler.
    """
    if not suits_device():
        return False
    file = cached_file()
    if not file.exists():
        if compiler() is None:
            return False
        started = time.perf_counter()
        try:
            compile_into(file)
        except KernelError as error:
            say(f"The kernels for this processor cannot be built, so training is slower: {error}")
            return False
        say(f"Compiled the kernels for this processor, once for all runs, in {time.perf_counter() - started:.0f} s.")
    load(file)
    return True


def compiler() -> str | None:
    """Return the path of a C++ compiler, that of ``CXX`` first."""
    found = (shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS) if name)
    return next((path for path in found if path), None)


def cached_file() -> Path:
    """Return where the kernels of this version, for this MLX and this processor, are kept."""
    digest = hashlib.sha256()
    for part in (*sorted(SOURCE.iterdir()), Path(__file__)):
        digest.update(part.read_bytes())
    digest.update(f"{version('mlx')} {sys.version_info[:2]} {_processor()}".encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-cpo-plugin"
    return folder / f"kernels-{digest.hexdigest()[:16]}.so"


def compile_into(file: Path) -> None:
    """Compile the kernels, compare them with MLX's own operations, and keep them as ``file``.

    Raises:
        KernelError: there is no compiler, it fails, or results differ.
    """
    path, mlx_folder = compiler(), Path(mx.__file__).parent
    if path is None:
        raise KernelError("there is no C++ compiler")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if file.exists():
                return
            draft = file.with_suffix(".draft.so")
            libraries = mlx_folder / "lib"
            linking = (f"-I{mlx_folder / 'include'}", f"-L{libraries}", "-lmlx", f"-Wl,-rpath,{libraries}")
            _run([path, *FLAGS, str(SOURCE / "calls.cpp"), "-o", str(draft), *linking])
            _run([sys.executable, "-m", "mlx_cpo_plugin.kernels.check", str(draft)])
            os.replace(draft, file)
    except OSError as error:
        raise KernelError(str(error)) from error


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line.lower()] or result.stderr.splitlines()
        reason = lines[0] if lines else f"exit code {result.returncode}"
        raise KernelError(f"{Path(command[0]).name}: {reason}")


def _processor() -> str:
    """Return what an instruction set goes by."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    named = ("model name", "flags", "Features", "CPU")
    return " ".join(dict.fromkeys(line for line in lines if line.startswith(named)))


@cache
def _library(file: Path) -> ctypes.PyDLL:
    library = ctypes.PyDLL(str(file))
    library.cpo_call.restype = ctypes.c_char_p
    library.cpo_size.restype = ctypes.c_int64
    product = blas.product()
    assert product is not None
    library.cpo_start(blas.kernel_threads(), ctypes.c_void_p(product))
    array = mx.zeros((3, 5))
    if library.cpo_size(ctypes.py_object(array)) != array.size:
        raise KernelError("MLX lays out its arrays otherwise than expected")
    return library


def call(name: str, inputs: Sequence[mx.array], outputs: int, numbers: Sequence[float] = ()) -> list[mx.array]:
    """Return what the operation ``name`` makes of ``inputs``, as a node of MLX's graph.

    Raises:
        ValueError: it does not take such arrays.
    """
    results = [mx.array(0) for _ in range(outputs)]
    fault = _loaded().cpo_call(
        FUNCTIONS.index(name),
        len(inputs),
        _pointers(inputs),
        outputs,
        _pointers(results),
        (ctypes.c_double * len(numbers))(*numbers),
    )
    if fault:
        raise ValueError(fault.decode())
    return results


def _pointers(arrays: Sequence[mx.array]) -> Any:
    kind: Any = ctypes.py_object * len(arrays)
    return kind(*arrays)


def load(file: Path) -> None:
    """Use the kernels of ``file`` from now on."""
    global _current
    _current = _library(file)


def in_use() -> bool:
    """Whether models compute with the kernels."""
    return _in_use


@contextmanager
def used() -> Iterator[None]:
    """Say so until the context ends."""
    global _in_use
    _in_use = True
    try:
        yield
    finally:
        _in_use = False


_current: ctypes.PyDLL | None = None
_in_use = False


def _loaded() -> ctypes.PyDLL:
    assert _current is not None, "the kernels are not loaded"
    return _current

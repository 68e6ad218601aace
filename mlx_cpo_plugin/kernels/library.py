"""The compiled operations: built once for a processor and a version of MLX, checked, cached, and loaded.

They need a C++ compiler once. Without one, MLX's own operations compute the same, more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from filelock import FileLock

from mlx_cpo_plugin import blas
from mlx_cpo_plugin.atomic_files import cache_folder
from mlx_cpo_plugin.device import current_device
from mlx_cpo_plugin.errors import ConfigError

VARIABLE = "MLX_CPO_PLUGIN_KERNELS"
AUTO, ALWAYS, NONE = "auto", "always", "none"
# Multiplications and additions of a run, below which kernels are not used: at the best rates of today's processors they
# take longer than compiling does. The choice of a run depends on nothing else, so that it is the same once more.
LEAST_WORK = 3e12
COMPILERS = ("g++", "clang++", "c++")
SOURCE = Path(__file__).parent / "source"
_MLX = Path(mx.__file__).parent
_DIGEST_SIZE = hashlib.sha256().digest_size
# What contracts a product and a sum is as exact; nothing that reorders sums is switched on.
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")

# Files that this process could not make or load; None where there is no place for one.
_failed: set[Path | None] = set()

FUNCTIONS = ("linear", "norm", "rotation", "attention", "silu_gate", "gelu", "head")


class KernelError(Exception):
    """The kernels cannot be built or do not work here."""


def wanted() -> str:
    """Return what :data:`VARIABLE` says.

    Raises:
        ConfigError: it says something else.
    """
    value = os.environ.get(VARIABLE, "").strip().lower() or AUTO
    if value not in (AUTO, ALWAYS, NONE):
        raise ConfigError(f"{VARIABLE} is {value}; set it to {AUTO}, {ALWAYS} or {NONE}.")
    return value


def pays(work: float) -> bool:
    """Whether a run of so much ``work``, in floating point operations, is to use kernels."""
    return wanted() == ALWAYS or (wanted() == AUTO and work >= LEAST_WORK)


def suits_device() -> bool:
    """Whether models are computed on a CPU with an OpenBLAS, which is what the kernels are for."""
    return current_device().takes_kernels and blas.product() is not None


def usable(say: Callable[[str], None] = print, compiling: bool = True) -> bool:
    """Load the kernels; return whether that worked.

    They need a CPU, an OpenBLAS and, the first time, a C++ compiler. What fails is said and is not tried again; that
    there is no compiler is only said where they are wanted in any case.

    Args:
        compiling: them, where that was not done before.
    """
    if wanted() == NONE or not suits_device():
        return False
    file: Path | None = None
    if None in _failed:
        return False
    try:
        file = cached_file()
        if file in _failed:
            return False
        if not is_whole(file):
            if not compiling or (compiler() is None and wanted() == AUTO):
                return False
            say("Compiling kernels for this processor, once for all runs.")
            compile_into(file)
        load(file)
    except KernelError as error:
        say(f"The kernels for this processor cannot be used, so this takes longer: {error}")
        _failed.add(file)
        return False
    return True


def compiler() -> str | None:
    """Return the path of a C++ compiler, that of ``CXX`` first."""
    found = (shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS) if name)
    return next((path for path in found if path), None)


def cached_file() -> Path:
    """Return where the kernels of this version, for this MLX and this processor, are kept.

    Raises:
        KernelError: there is no such place.
    """
    digest = hashlib.sha256()
    try:
        for part in sorted(SOURCE.iterdir()):
            digest.update(part.read_bytes())
        size = (_MLX / "lib" / "libmlx.so").stat().st_size
        folder = cache_folder()
    except (OSError, RuntimeError) as error:
        raise KernelError(str(error)) from error
    digest.update(f"{FLAGS} {version('mlx')} {size} {sysconfig.get_config_var('SOABI')} {_processor()}".encode())
    digest.update(" ".join(platform.libc_ver()).encode())  # a home may be that of containers of several systems
    return folder / f"kernels-{digest.hexdigest()[:16]}.so"


def is_whole(file: Path) -> bool:
    """Whether a file is there as :func:`compile_into` left it: a damaged library ends the process that loads it."""
    try:
        content = file.read_bytes()
    except OSError:
        return False
    return content[-_DIGEST_SIZE:] == _digest(content[:-_DIGEST_SIZE])


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def compile_into(file: Path) -> None:
    """Compile the kernels, compare them with MLX's own operations, and keep them as ``file``.

    Raises:
        KernelError: there is no compiler, it fails, or results differ.
    """
    path = compiler()
    if path is None:
        raise KernelError("there is no C++ compiler")
    draft, libraries = file.with_suffix(".draft.so"), _MLX / "lib"
    linking = (f"-I{_MLX / 'include'}", f"-L{libraries}", "-lmlx", f"-Wl,-rpath,{libraries}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if is_whole(file):
                return
            try:
                _run([path, *FLAGS, str(SOURCE / "calls.cpp"), "-o", str(draft), *linking])
                _run([sys.executable, "-m", "mlx_cpo_plugin.kernels.check", str(draft)])
                content = draft.read_bytes()
                draft.write_bytes(content + _digest(content))
                os.replace(draft, file)
            finally:
                draft.unlink(missing_ok=True)
    except (OSError, NotImplementedError) as error:  # the latter where a file system has no locks
        raise KernelError(str(error)) from error


def _run(command: Sequence[str]) -> None:
    english = {**os.environ, "LC_ALL": "C"}
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, env=english, text=True, errors="replace"
    )
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
    library.cpo_use_tiles.restype = ctypes.c_bool
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
        raise ValueError(f"{name}: {fault.decode()}")
    return results


def _pointers(arrays: Sequence[mx.array]) -> Any:
    kind: Any = ctypes.py_object * len(arrays)
    return kind(*arrays)


def load(file: Path) -> None:
    """Use the kernels of ``file`` from now on.

    Raises:
        KernelError: it cannot be loaded.
    """
    global _current
    try:
        _current = _library(file)
    except OSError as error:
        raise KernelError(str(error)) from error


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

"""The device that MLX computes on: every choice that depends on it is a field of :class:`Device`."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx

CPU, METAL, CUDA = "CPU", "Metal", "CUDA"
# Of 10 bits of fraction.
TF32_EPSILON = 2.0**-11
Attention = Literal["ours", "kernel forwards", "kernels"]


@dataclass(frozen=True)
class Device:
    """What one kind of device is good at.

    Attributes:
        kind: :data:`CPU`, :data:`METAL` or :data:`CUDA`.
        compiles: compiling a step pays. On a CPU each shape costs a run of a C++ compiler, which takes many seconds,
            and on CUDA it took 7 s on an H200, the first step a minute.
        attention: whose attention keeps no scores for the backward pass: ours, MLX's kernel forwards and ours
            backwards, or MLX's kernels.
        fused_cross_entropy: cross-entropy is one kernel, which sums in float32 whatever the dtype of the logits.
        fast_exponential: exp costs little more than a product. On a CPU it takes 8 ns, as long as 60 products.
        fast_half_products: products with packed and half-precision weights are fast; elsewhere they are widened to
            float32, and so are the activations.
        weight_read_tokens: what reading a weight costs beside multiplying with it, in tokens; an estimate for GPUs.
        layer_start_flops: what starting a layer's operations costs, forwards and backwards, in FLOPs.
        ordered_sums: the same operations give the same bits. A GPU adds up in whatever order its threads end.
        rounded_products: float32 may be multiplied as TF32, with 10 bits of fraction, unless MLX_ENABLE_TF32 is 0.
        reports_exhausted_memory: running out of memory is an exception, and not the end of the process.
        takes_kernels: the compiled kernels of this package are for it.
        hoards_buffers: MLX keeps freed buffers for later, up to the memory of the device.
    """

    kind: str
    compiles: bool
    attention: Attention
    fused_cross_entropy: bool
    fast_exponential: bool
    fast_half_products: bool
    weight_read_tokens: int
    layer_start_flops: float
    ordered_sums: bool
    rounded_products: bool
    reports_exhausted_memory: bool
    takes_kernels: bool
    hoards_buffers: bool


def _gpu(kind: str, attention: Attention, compiles: bool) -> Device:
    return Device(
        kind=kind,
        compiles=compiles,
        attention=attention,
        fused_cross_entropy=True,
        fast_exponential=True,
        fast_half_products=True,
        weight_read_tokens=256,
        layer_start_flops=0.0,
        ordered_sums=False,
        rounded_products=True,
        reports_exhausted_memory=True,
        takes_kernels=False,
        hoards_buffers=True,
    )


DEVICES = {
    CPU: Device(
        kind=CPU,
        compiles=False,
        attention="ours",
        fused_cross_entropy=False,
        fast_exponential=False,
        fast_half_products=False,
        weight_read_tokens=48,
        layer_start_flops=5e7,
        ordered_sums=True,
        rounded_products=False,
        reports_exhausted_memory=False,
        takes_kernels=True,
        hoards_buffers=False,
    ),
    METAL: _gpu(METAL, "kernel forwards", compiles=True),
    CUDA: _gpu(CUDA, "kernels", compiles=False),
}

# A device to take in place of the real one: its kernels are then their definitions, which MLX has for every device.
_override: Device | None = None


def current_device() -> Device:
    """Return the device at hand."""
    if _override is not None:
        return _override
    if mx.default_device().type == mx.DeviceType.cpu:
        return DEVICES[CPU]
    return DEVICES[CUDA if mx.cuda.is_available() else METAL]


def float32_product_epsilon() -> float:
    """Return the relative rounding of what is multiplied in float32: that of TF32, where products are rounded to it."""
    rounded = current_device().rounded_products and os.environ.get("MLX_ENABLE_TF32") != "0"
    return TF32_EPSILON if rounded else float(mx.finfo(mx.float32).eps)


def device_name() -> str:
    """Return what the device calls itself."""
    return str(mx.device_info().get("device_name", platform.machine()))


class BufferLimit:
    """Lets MLX keep so many bytes of freed buffers, where it would hoard them; a lower limit from before stays."""

    def __init__(self, size: float) -> None:
        self._size = round(size)
        self._before = mx.set_cache_limit(self._size) if current_device().hoards_buffers else 0
        self._set()

    def raise_to(self, size: float) -> None:
        """Let it keep more, if this is more."""
        self._size = max(self._size, round(size))
        self._set()

    def undo(self) -> None:
        """Go back to the limit from before."""
        self._size = self._before
        self._set()

    def _set(self) -> None:
        if current_device().hoards_buffers:
            mx.set_cache_limit(min(self._size, self._before))


def wired_limit() -> int | None:
    """Return the bytes that Metal recommends to keep wired, or ``None`` where there is no such limit."""
    limit = mx.device_info().get("max_recommended_working_set_size")
    return int(limit) if limit else None


def device_memory() -> int:
    """Return the bytes that a process may use: what Metal recommends, elsewhere MLX's own limit."""
    return wired_limit() or mx.get_memory_limit()


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process can still have, swap space included; ``None`` where that is not known.

    It is known on Linux, and asked where MLX does not raise when memory runs out.

    Args:
        root: of the file system.
    """
    if current_device().reports_exhausted_memory:
        return None
    try:
        machine = _table(root / "proc/meminfo")
        free = 1024 * (machine["MemAvailable"] + machine["SwapFree"])
    except (OSError, KeyError, ValueError):
        return None
    return max(0, min([free, *_free_by_limits(root)]))


def _free_by_limits(root: Path) -> list[int]:
    """Return what the limits of the process and of its container leave."""
    free = []
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    if allowed != resource.RLIM_INFINITY:
        pages = int((root / "proc/self/statm").read_text(encoding="ascii").split()[0])
        free.append(allowed - pages * os.sysconf("SC_PAGESIZE"))
    container = root / "sys/fs/cgroup"
    try:
        limit = int((container / "memory.max").read_text(encoding="ascii"))
        free.append(limit - _table(container / "memory.stat")["anon"])  # the page cache can be reclaimed
    except (OSError, KeyError, ValueError):
        pass  # there is no container, or none with a limit
    return free


def _table(file: Path) -> dict[str, int]:
    """Read lines of a name and a number."""
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {fields[0].rstrip(":"): int(fields[1]) for fields in lines if len(fields) > 1}


def compilation_pays(wanted: bool | None = None) -> bool:
    """Whether steps are to be compiled: as ``wanted``, by default where the device gains by it."""
    return current_device().compiles if wanted is None else wanted


@contextmanager
def compile_where_it_pays(wanted: bool | None = None) -> Iterator[None]:
    """Switch ``mx.compile`` off until the context ends, unless :func:`compilation_pays`."""
    # Who switched compilation off for the whole process keeps it off afterwards.
    if compilation_pays(wanted) or not _compilation_is_on():
        yield
        return
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def _compilation_is_on() -> bool:
    """Whether ``mx.compile`` compiles: MLX does not say, but a function that it has traced is not called again."""
    calls = 0

    def identity(x: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        return x

    compiled, argument = mx.compile(identity), mx.array(0.0)
    for _ in range(3):  # the very first of a process may be traced twice
        compiled(argument)
    return calls < 3

"""Devices that are not there: their kernels are their definitions, which MLX computes on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import pytest

from mlx_cpo_plugin import device
from mlx_cpo_plugin.device import DEVICES, Device


class RecordedDevice(Device):
    """A device that keeps the names of its fields that are read."""

    read: set[str]

    def __getattribute__(self, name: str) -> Any:
        if name in Device.__dataclass_fields__:
            object.__getattribute__(self, "read").add(name)
        return object.__getattribute__(self, name)


@contextmanager
def pretended(kind: str, **changes: Any) -> Iterator[RecordedDevice]:
    """Take a device of this kind, with other values where ``changes`` has them, in place of the real one."""
    recorded = RecordedDevice.__new__(RecordedDevice)
    object.__setattr__(recorded, "read", set())
    for name, value in asdict(replace(DEVICES[kind], **changes)).items():
        object.__setattr__(recorded, name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_override", recorded)
        patch.setenv("MLX_ENABLE_TF32", "0")  # the definitions multiply in float32
        yield recorded

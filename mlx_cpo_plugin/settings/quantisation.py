"""What MLX's quantiser takes, as data: bits, group sizes and modes."""

from __future__ import annotations

from typing import Any

from mlx_cpo_plugin.errors import ConfigError

AUTO, MLX, HOST = "auto", "mlx", "host"

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# Mode of mx.quantize -> the bits and group size that it brings along.
MODES: dict[str, dict[str, Any]] = {
    "affine": {},
    "mxfp4": {"group_size": 32, "bits": 4},
    "nvfp4": {"group_size": 16, "bits": 4},
    "mxfp8": {"group_size": 32, "bits": 8},
}


def mlx_quantises(bits: int, group_size: int, mode: str = "affine") -> bool:
    """Whether ``mx.quantize`` takes these together."""
    return mode != "affine" or (bits in BITS and group_size in GROUP_SIZES)


def check_quantizer(quantizer: str, bits: int, group_size: int, mode: str) -> None:
    """Refuse what the quantiser of ``qat_quantizer`` does not do.

    Raises:
        ConfigError: says what it takes.
    """
    if quantizer == MLX and not mlx_quantises(bits, group_size, mode):
        raise ConfigError(
            f"qat_quantizer is mlx, which takes qat_bits {_listed(BITS)} and qat_group_size {_listed(GROUP_SIZES)}, "
            f"not {bits} and {group_size}; change them, or set qat_quantizer: host."
        )
    if quantizer == HOST and mode != "affine":
        raise ConfigError(f"qat_mode is {mode}, which qat_quantizer: host does not have; set qat_quantizer: mlx.")


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}"

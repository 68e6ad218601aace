"""Versions: the plugin's own, and those of mlx-lm-lora that it is tested with."""

from __future__ import annotations

import sys

__version__ = "0.1.0"

OLDEST_TESTED_HOST = "5.8.6"
NEWEST_TESTED_HOST = "5.10.2"


def host_version() -> str:
    """Return the version of the imported mlx-lm-lora."""
    return str(getattr(sys.modules.get("mlx_lm_lora"), "__version__", "of unknown version"))

"""Paths in settings: the home folder has its full name from one place on."""

from __future__ import annotations

import os

PATHS = (
    "model",
    "data",
    "adapter_path",
    "resume",
    "resume_adapter_file",
    "reference_model_path",
)


def expanded(path: str) -> str:
    """Return a path, with ``~`` or ``~user`` at its beginning as the folder that it stands for."""
    return os.path.expanduser(path)

"""What ``--json`` of a command names: a file that is written once all figures are there, or standard output."""

from __future__ import annotations

import os
from pathlib import Path

from mlx_cpo_plugin.atomic_files import is_stream, replace_whole
from mlx_cpo_plugin.errors import ConfigError, shown

STANDARD_OUTPUT = "-"


def _is_file(to: str | None) -> bool:
    """Whether figures go into a file."""
    return to not in (None, STANDARD_OUTPUT)


def check_json(to: str | None) -> None:
    """Look at what can be told before anything is measured.

    Raises:
        ConfigError: nothing can be written there.
    """
    if not _is_file(to):
        return
    if not to:
        raise ConfigError(f"--json {shown(to)} is a folder; give a file.", key="json")
    check_writable("--json", Path(to))


def check_writable(option: str, file: Path) -> None:
    """Find out whether a file can be written that an option names, before hours of measurements.

    Raises:
        ConfigError: it cannot.
    """
    key = option.removeprefix("--")
    if file.is_dir():
        raise ConfigError(f"{option} {shown(str(file))} is a folder; give a file.", key=key)
    if not file.parent.is_dir():
        raise ConfigError(f"{option} {file}: there is no folder {file.parent}; make it first.", key=key)
    if not os.access(file if is_stream(file) else file.parent, os.W_OK):
        raise ConfigError(f"{option} {file}: nothing can be written there (permission denied); give another.", key=key)


def write_json(to: str, text: str, option: str = "--json") -> None:
    """Print the text, or write the file that an option names.

    Raises:
        ConfigError: it cannot be written.
    """
    if not _is_file(to):
        print(text)
        return
    try:
        replace_whole(Path(to), lambda partial: partial.write_text(text + "\n", encoding="utf-8"))
    except OSError as error:
        key = option.removeprefix("--")
        raise ConfigError(f"{option} {to} cannot be written ({error.strerror}); give another.", key=key) from error

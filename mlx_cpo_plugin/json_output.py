"""What ``--json`` of a command names: a file that is written once all figures are there, or standard output."""

from __future__ import annotations

from pathlib import Path

from mlx_cpo_plugin.atomic_files import replace_whole
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
    if not to or Path(to).is_dir():
        raise ConfigError(f"--json {shown(to)} is a folder; give a file.", key="json")
    if not Path(to).parent.is_dir():
        raise ConfigError(f"--json {to}: there is no folder {Path(to).parent}; make it first.", key="json")


def write_json(to: str, text: str) -> None:
    """Print the text, or write the file.

    Raises:
        ConfigError: it cannot be written.
    """
    if not _is_file(to):
        print(text)
        return
    try:
        replace_whole(Path(to), lambda partial: partial.write_text(text + "\n", encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--json {to} cannot be written ({error.strerror}); give another.", key="json") from error

"""The mistakes that a person can mend, each told in one sentence."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user gave is wrong.

    The message is one sentence: what is wrong, where (file, line, key), what to do.
    Commands print it without a traceback and end with its exit code.
    """

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(UserError):
    """Preference data cannot be read or holds too few usable rows."""


class PluginError(UserError):
    """Two plugins claim one name, or the plugin is only partly hooked into mlx-lm-lora."""


def first_line(error: BaseException) -> str:
    """What a foreign exception says, cut to fit into a sentence; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200].rstrip(".")

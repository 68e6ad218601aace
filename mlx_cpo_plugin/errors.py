"""Errors the user can fix, each with a one-sentence message, and formatting of values in such messages."""

from __future__ import annotations

import errno

LONGEST_VALUE = 60
LONGEST_NAME = 300


class UserError(ValueError):
    """An error in what the user provided.

    The message is one sentence: what is wrong, where (file, line, key), what to do.
    Commands print it without a traceback and end with its exit code.

    Attributes:
        key: the setting to change, e.g. ``lora_parameters.rank``.
        place: where the fault is: of a setting, where it was given, e.g. ``in my.yaml, line 3``; otherwise the row,
            e.g. ``train.jsonl:12``, the file or the folder.
        allowed: what may stand there instead.

    Each is empty where it is not known.
    """

    exit_code = 2

    def __init__(self, message: str, *, key: str = "", place: str = "", allowed: str = "") -> None:
        super().__init__(message)
        self.key, self.place, self.allowed = key, place, allowed


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(UserError):
    """Preference data cannot be read or holds too few usable rows."""


class PluginError(UserError):
    """Two plugins claim one name, or the plugin is only partly hooked into mlx-lm-lora."""


class TrainingError(UserError):
    """Training cannot continue; the last good weights are kept."""


class StoppedError(UserError):
    """A run stopped because it was asked to; what was done is saved.

    Attributes:
        exit_code: of the process, as shells know it for a process that a signal ended.
    """

    def __init__(self, iteration: int, signal_number: int, how_to_resume: str) -> None:
        after = f"stopped after iteration {iteration}, which is saved; {how_to_resume}."
        super().__init__(after if iteration else "stopped before iteration 1; nothing is trained yet: start it again.")
        self.exit_code = 128 + signal_number


# Parts of the messages of Metal's, CUDA's, the CPU's and C++'s allocators when memory runs out.
_OUT_OF_MEMORY = ("[malloc", "[metal::malloc]", "insufficient memory", "out of memory", "alloc_failed", "bad_alloc")
LOWER_THESE = "lower max_seq_length, batch_size or batch_tokens, or switch on grad_checkpoint or efficient_long_context"
OUT_OF_MEMORY = f"The device is out of memory; {LOWER_THESE}."
# Beginnings of MLX's messages when the device or its compiler fails, whatever is computed.
_DEVICE_FAULTS = ("[metal", "[compile", "[cuda", "cuda", "cublas", "cudnn")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or its cause, is an out-of-memory error of Python, MLX or the system."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def is_device_fault(error: BaseException) -> bool:
    """Whether an error is due to the device or its memory, not to the model."""
    text = str(error).lower()
    return (isinstance(error, RuntimeError) and text.startswith(_DEVICE_FAULTS)) or is_out_of_memory(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, shortened; its type where there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200].rstrip(".")


def shown(value: object) -> str:
    """Return a value roughly as in YAML, on one line and shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = printable(repr(value))
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def named(name: object, longest: int = LONGEST_NAME) -> str:
    """Return the name of a key, file or column, printable and shortened in the middle."""
    text = printable(name if isinstance(name, str) else shown(name))
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[3 - longest // 2 :]}"


def printable(text: str) -> str:
    """Return ``text`` with escapes in place of line breaks, control characters and lone surrogates."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)

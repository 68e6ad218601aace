"""Where a chat template comes from, and what it is told from outside: the time, and whether to think."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import RLock
from types import SimpleNamespace
from typing import NamedTuple

from mlx_cpo_plugin.data.messages import Message
from mlx_cpo_plugin.errors import ConfigError, first_line, printable, shown
from mlx_cpo_plugin.types import Tokenizer

_LOCK = RLock()
# Templates see the same time throughout a process.
STARTED = datetime.now(UTC)


class WithThinking(NamedTuple):
    """A tokenizer whose template is told whether to think in the way in which mlx-lm's wrapper tells it."""

    tokenizer: Tokenizer
    key: str
    thinks: bool

    def apply_chat_template(self, messages: list[Message], **kwargs: object) -> str:
        if "enable_thinking" in kwargs:
            kwargs[self.key] = kwargs.pop("enable_thinking")
        return self.tokenizer.apply_chat_template(messages, **{self.key: self.thinks, **kwargs, "return_dict": False})


def read_template(given: str | None) -> str | None:
    """The Jinja text given by ``chat_template``: that text, or a file; ConfigError where it is neither."""
    if not given or is_jinja(given):
        return given or None
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(
            f"chat_template is {shown(given)}, which is neither Jinja nor a file that can be read "
            f"({printable(reason)}): give a template's text or its file.",
            key="chat_template",
        ) from error


def is_jinja(text: str) -> bool:
    """Whether a text is a template, and no name of one."""
    return "{{" in text or "{%" in text


def is_fallback(template: object) -> bool:
    """Whether a chat template is the one that mlx-lm-lora gives to tokenizers which have none."""
    try:
        from mlx_lm_lora.chat_template import DEFAULT_CHAT_TEMPLATE
    except ImportError:  # 5.8.6 has no fallback template
        return False
    return bool(template == DEFAULT_CHAT_TEMPLATE)


@contextmanager
def time_held_at(now: datetime) -> Iterator[None]:
    """Make ``strftime_now`` of templates return ``now``: `transformers` passes its own ``datetime`` to templates."""
    from transformers.utils import chat_template_utils  # costly, and there before any tokenizer

    with _LOCK:
        clock = getattr(chat_template_utils, "datetime", None)
        chat_template_utils.datetime = SimpleNamespace(now=lambda *_: now)
        try:
            yield
        finally:
            chat_template_utils.datetime = clock

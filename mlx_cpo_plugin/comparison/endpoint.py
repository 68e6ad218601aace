"""A judge behind an OpenAI-compatible endpoint that the user names; nothing is sent to any other."""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import time
from collections.abc import Callable
from typing import Any
from urllib import error, parse, request

from mlx_cpo_plugin.comparison.judge import verdict_in
from mlx_cpo_plugin.errors import ConfigError, UserError, first_line, named, printable, shown

PATH = "/chat/completions"
TRIES, LONGEST_WAIT = 4, 60.0
MOST_BYTES = 2**22
# What may pass: too early, too many, and what servers and proxies say when they are busy.
PASSING = (408, 425, 429, 500, 502, 503, 504)


class Endpoint:
    """Sends prompts to ``URL/chat/completions``; what may pass is tried again, up to :data:`TRIES` times.

    Args:
        url: with or without ``/chat/completions``.
        model: as the endpoint names it.
        key_variable: environment variable that holds the key; None: none is sent.
        timeout: seconds without an answer after which a try has failed.
        wait: sleeps for some seconds.

    Raises:
        ConfigError: the URL is none, or the variable is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str | None = None,
        timeout: float = 60.0,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            parts = parse.urlsplit(url)
            is_endpoint = parts.scheme in ("http", "https") and bool(parts.hostname)
            url.encode("ascii")
            (parts.hostname or "").encode("idna")
        except ValueError:  # UnicodeError is one
            is_endpoint = False
        if not is_endpoint or parts.username or parts.query:
            raise ConfigError(
                f"--judge-url {named(url)} is no endpoint; write https://HOST/v1, and give a key by --judge-key.",
                key="judge_url",
            )
        path = parts.path.rstrip("/")
        self.url = parse.urlunsplit(parts._replace(path=path if path.endswith(PATH) else path + PATH, fragment=""))
        self.name = f"{model} at {parts.netloc}"
        self.model, self.timeout, self.wait, self.key_variable = model, timeout, wait, key_variable
        self.headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key_variable is not None:
            key = os.environ.get(key_variable, "").strip()
            if not key or not key.isascii() or not key.isprintable():
                raise ConfigError(
                    f"--judge-key {named(key_variable)} is to name an environment variable that holds the key; it is "
                    f"{'unusable' if key else 'not set'}.",
                    key="judge_key",
                )
            self.headers["Authorization"] = f"Bearer {key}"
        self.options: dict[str, Any] = {"temperature": 0}
        self._open = request.build_opener(_NoRedirects).open

    def __call__(self, prompt: str) -> float | None:
        """Return the verdict on a judge's prompt.

        Raises:
            UserError: there is no reply.
        """
        return verdict_in(self.reply(prompt))

    def reply(self, prompt: str) -> str:
        """Return what the model says to a prompt.

        Raises:
            UserError: there is no reply.
        """
        for left in reversed(range(TRIES)):
            seconds: float | None = None
            try:
                return _content(self._sent(prompt))
            except error.HTTPError as fault:
                reason, seconds = f"it says {fault.code}", _retry_after(fault.headers.get("Retry-After"))
                if fault.code == 400 and self.options and b"temperature" in fault.read(MOST_BYTES):
                    self.options, seconds = {}, 0.0  # models that reason take no temperature but their own
                elif fault.code not in PASSING:
                    raise self._refused(fault.code) from fault
            except (OSError, http.client.HTTPException) as fault:
                cause = getattr(fault, "reason", fault)
                if isinstance(cause, ConnectionRefusedError):
                    raise self._error("nobody listens there", "start the server, or give another URL") from fault
                timed_out = isinstance(cause, TimeoutError)
                reason = f"no answer within {self.timeout:g} seconds" if timed_out else _words(cause)
            except _Rubbish as fault:
                reason = str(fault)
            seconds = 2.0 ** (TRIES - 1 - left) if seconds is None else seconds
            if not left or seconds > LONGEST_WAIT:
                break
            self.wait(seconds)
        raise self._error(reason, "try again later, or give another endpoint")

    def _sent(self, prompt: str) -> bytes:
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], **self.options}
        asked = request.Request(self.url, json.dumps(body).encode(), self.headers, method="POST")
        with self._open(asked, timeout=self.timeout) as reply:
            content: bytes = reply.read(MOST_BYTES)
        return content

    def _refused(self, code: int) -> UserError:
        if code in (401, 403):
            given = f"the key in {self.key_variable}" if self.key_variable else "a request without a key"
            return self._error(f"it refuses {given} ({code})", "name the variable of a valid key by --judge-key")
        if code == 404:
            return self._error("it knows no such path or model (404)", "check the URL and --judge-model")
        if 300 <= code < 400:
            return self._error(f"it redirects to another address ({code})", "give that one")
        return self._error(f"it says {code}", "check the URL and --judge-model")

    def _error(self, reason: str, advice: str) -> UserError:
        return UserError(f"The judge {named(self.name)} gives no verdict: {reason}; {advice}.", key="judge_url")


class _Rubbish(Exception):
    """A reply that is no chat completion."""


class _NoRedirects(request.HTTPRedirectHandler):
    """The key is for the host that the user named."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _content(body: bytes) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        content = None
    if not isinstance(content, str):
        raise _Rubbish(f"its reply is no chat completion but {shown(body[:60].decode('utf-8', 'replace'))}")
    return content


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a ``Retry-After``, which may be a date, too; None where there is none that can be read."""
    try:
        return max(0.0, float(value or ""))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value or "").timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _words(cause: object) -> str:
    return printable(first_line(cause) if isinstance(cause, BaseException) else str(cause)[:200])

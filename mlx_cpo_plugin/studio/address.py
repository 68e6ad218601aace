"""Where the page is reached: a port that listens before the page is built, and the address that leads a browser in."""

from __future__ import annotations

import errno
import socket
import tempfile
import webbrowser
from html import escape
from pathlib import Path
from threading import Thread

from mlx_cpo_plugin.errors import ConfigError

HOST = "127.0.0.1"
DEFAULT_PORT = 7870
TOKEN = "token"
_PORTS_TRIED = 50


def listen(wanted: int | None) -> socket.socket:
    """Listen on the wanted port, or else on the first free one from :data:`DEFAULT_PORT` on.

    Whoever connects before anything is served waits for it.

    Raises:
        ConfigError: the wanted one is taken, or none is free.
    """
    fault = ""
    for port in [wanted] if wanted is not None else range(DEFAULT_PORT, DEFAULT_PORT + _PORTS_TRIED):
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
            listening.listen()
        except OverflowError:
            listening.close()
            raise ConfigError(f"--port is {wanted}, but must be between 0 and 65535.", key="port") from None
        except OSError as error:
            listening.close()
            fault = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            continue
        return listening
    unusable = f"Port {wanted} {fault}" if wanted is not None else "No port is free"
    raise ConfigError(f"{unusable}; choose another one with --port.", key="port")


def announce(port: int, token: str, open_browser: bool) -> None:
    """Print the address with the token, and lead the browser there."""
    address = f"http://{HOST}:{port}/?{TOKEN}={token}"
    print(f"The page is at\n    {address}\nCtrl-C closes it; a run that it started continues.", flush=True)
    if open_browser:
        Thread(target=webbrowser.open, args=[opening_file(address).as_uri()], daemon=True).start()


def opening_file(address: str) -> Path:
    """Write a file that leads to the address, for the browser: every account sees the words a browser is started with.

    It is in the page's own folder for temporary files, which goes with the page.
    """
    file = Path(tempfile.mkdtemp()) / "open.html"
    file.write_text(html_leading_to(address), encoding="utf-8")
    return file


def html_leading_to(address: str) -> str:
    """Return a page that goes on to an address at once."""
    link = escape(address)
    return (
        '<!doctype html><meta charset="utf-8"><meta name="referrer" content="no-referrer">'
        f'<meta http-equiv="refresh" content="0; url={link}"><a href="{link}">CPO training</a>'
    )

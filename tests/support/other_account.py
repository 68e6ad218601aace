"""What another account of this machine gets of the page; a superuser runs it, and it becomes that account."""

import encodings.idna  # noqa: F401 - connecting imports it, which the other account may not be able to do
import json
import os
import sys
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

NOBODY = 65534
REQUESTS = (
    ("GET", "/", None),
    ("GET", "/config", None),
    ("GET", "/gradio_api/info", None),
    ("GET", "/gradio_api/heartbeat/x", None),
    ("GET", "/gradio_api/file=/etc/passwd", None),
    ("POST", "/gradio_api/upload", b"--x\r\n"),
    ("POST", "/gradio_api/queue/join", json.dumps({"data": [], "fn_index": 0, "session_hash": "x"})),
)


def is_read(path: str) -> bool:
    """Whether a file is read, or a folder listed."""
    with suppress(OSError):
        return bool(list(Path(path).iterdir()) if Path(path).is_dir() else Path(path).read_bytes() or True)
    return False


def answer(home: str, method: str, path: str, body: bytes | str | None) -> int:
    """The status of what the page says to a request without the token."""
    connection = HTTPConnection(urlsplit(home).netloc, timeout=30)
    connection.request(method, path, body)
    return connection.getresponse().status


def words() -> dict[str, str]:
    """The command lines of all processes, by their numbers."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found[process.name] = (process / "cmdline").read_bytes().decode(errors="replace")
    return found


if __name__ == "__main__":
    home, *files = sys.argv[1:]
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    seen = {
        "read": [file for file in files if is_read(file)],
        "answers": [answer(home, *request) for request in REQUESTS],
        "words": words(),
    }
    print(json.dumps(seen))

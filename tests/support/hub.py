"""A hub on this machine that takes commits of models, for the hub's own client."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_a_test"


class Hub:
    """What the hub holds and was asked.

    Attributes:
        repos: full name -> whether it is private, and its files.
        refusals: part of a path -> the status that a request to it is answered with.
        asked: method and path of every request.
    """

    def __init__(self) -> None:
        self.url = ""
        self.repos: dict[str, tuple[bool, dict[str, bytes]]] = {}
        self.refusals: dict[str, int] = {}
        self.asked: list[str] = []

    def answer(self, path: str, authorised: bool, body: bytes) -> tuple[int, Any]:
        """Return status and JSON of the answer to a request."""
        status = next((status for part, status in self.refusals.items() if part in path), 200)
        if not authorised or status != 200:
            return (status if authorised else 401), {"error": "refused by the test"}
        if path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values.get('organization') or 'me'}/{values['name']}"
            if name in self.repos:
                return 409, {"error": "it is there", "url": f"{self.url}/{name}"}
            self.repos[name] = values.get("private") or values.get("visibility") == "private", {}
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if name not in self.repos:
            return 404, {"error": "Repository not found"}
        private, files = self.repos[name]
        if "/preupload/" in path:
            named = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": each, "uploadMode": "regular", "shouldIgnore": False} for each in named]
            return 200, {"files": modes}
        if "/commit/" in path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/{name}/commit/0", "commitOid": "0" * 40}
        return 200, {"id": name, "private": private, "siblings": [], "tags": []}


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Answer on loopback until the context ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            status, values = hub.answer(path, self.headers.get("Authorization") == f"Bearer {TOKEN}", body)
            content = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if path.startswith("/api/models/") and status == 404 and not hub.refusals:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

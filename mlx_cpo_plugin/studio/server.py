"""Serves the page to this machine alone."""

from __future__ import annotations

import os
import socket
import threading
import webbrowser
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_cpo_plugin.errors import ConfigError

HOST = "127.0.0.1"
DEFAULT_PORT = 7870
_PORTS_TRIED = 50


class OwnPageOnly:
    """Refuses requests that do not come from the page itself.

    A page of another origin could send requests to this machine through the browser. They tell their origin, and where
    a name was made to point here, the name that they were sent to.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self.app = app
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and not self.is_own(scope):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"This page answers to itself only."})
            return
        await self.app(scope, receive, send)

    def is_own(self, scope: Scope) -> bool:
        """Whether host, and where they are told origin and referring site, are those of the page."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if headers.get("host") not in self.hosts:
            return False
        if "origin" in headers and urlsplit(headers["origin"]).netloc not in self.hosts:
            return False
        return headers.get("sec-fetch-site", "none") in ("none", "same-origin")


def free_port(wanted: int | None) -> int:
    """Return the wanted port, or else the first free one from :data:`DEFAULT_PORT` on.

    Raises:
        ConfigError: the wanted one is taken, or none is free.
    """
    for port in [wanted] if wanted is not None else range(DEFAULT_PORT, DEFAULT_PORT + _PORTS_TRIED):
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((HOST, port))
            except (OSError, OverflowError):
                continue
            return port
    taken = f"Port {wanted} is taken" if wanted is not None else "No port is free"
    raise ConfigError(f"{taken}; give another one with --port.")


def serve(page: gr.Blocks, port: int, appearance: dict[str, Any], open_browser: bool) -> None:
    """Serve the page until Ctrl-C."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None), page, "", server_name=HOST, server_port=port, footer_links=[], **appearance
    )
    address = f"http://{HOST}:{port}"
    print(f"The page is at {address}; Ctrl-C ends it, and lets a run that it started go on.", flush=True)
    if open_browser:
        threading.Timer(1, webbrowser.open, [address]).start()
    uvicorn.run(OwnPageOnly(app, port), host=HOST, port=port, log_level="warning", timeout_graceful_shutdown=1)

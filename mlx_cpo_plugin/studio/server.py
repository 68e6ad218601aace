"""Serves the page to this machine only, and only to whoever has the printed token."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode, urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_cpo_plugin.studio.address import HOST, TOKEN, html_leading_to
from mlx_cpo_plugin.studio.page import Page

OTHER_SITE = "This page does not answer other sites."
NO_TOKEN = "This page belongs to whoever started it; open the address with the token that mlx-cpo studio printed."


class OwnPageOnly:
    """Refuses requests that do not come from the page itself, or not from whoever started it.

    A page of another origin could send requests to this machine through the browser. They tell their origin, and where
    a name was made to point here, the name that they were sent to. Other accounts of this machine can send any request,
    but do not know the token. The first visit brings it in the address, as ``?token=``, and gets a cookie for all that
    follows; programs may send it as ``Authorization: Bearer``.

    Args:
        app: what is asked where nothing is amiss.
        port: where the page is served.
        token: what has to be known.
    """

    def __init__(self, app: ASGIApp, port: int, token: str) -> None:
        self.app = app
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
        self.token = token
        self.cookie = f"mlx-cpo-studio-{port}"  # cookies know no ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        request = HTTPConnection(scope)
        in_address = self.is_token(request.query_params.get(TOKEN))
        # Whoever follows the address comes from a file or a terminal: another site, that knows the token.
        if not self.is_own(request.headers, any_site=in_address):
            answer: ASGIApp = PlainTextResponse(OTHER_SITE, 403)
        elif in_address and scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/":
            answer = self.first_visit(request)
        elif in_address or self.is_token(request.cookies.get(self.cookie)) or self.is_token(_bearer(request.headers)):
            answer = self.app
        else:
            answer = PlainTextResponse(NO_TOKEN, 403)
        if scope["type"] == "websocket" and answer is not self.app:
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: the browser gets a 403
            return
        await answer(scope, receive, send)

    def is_own(self, headers: Mapping[str, str], any_site: bool = False) -> bool:
        """Whether host, and where they are told origin and, unless ``any_site``, referring site, are the page's."""
        if headers.get("host") not in self.hosts:
            return False
        if "origin" in headers and urlsplit(headers["origin"]).netloc not in self.hosts:
            return False
        return any_site or headers.get("sec-fetch-site", "none") in ("none", "same-origin")

    def is_token(self, given: str | None) -> bool:
        """Whether this is the token, compared in constant time."""
        return given is not None and secrets.compare_digest(given.encode("utf-8", "replace"), self.token.encode())

    def first_visit(self, request: HTTPConnection) -> HTMLResponse:
        """Return a page that sets the cookie and goes on to the address without the token.

        An HTTP redirect would not do: to a browser, where it began would still be another site, which gets no cookie.
        """
        rest = urlencode([(name, value) for name, value in request.query_params.multi_items() if name != TOKEN])
        address = f"/?{rest}" if rest else "/"
        response = HTMLResponse(html_leading_to(address), headers={"Cache-Control": "no-store"})
        response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
        return response


def _bearer(headers: Mapping[str, str]) -> str | None:
    kind, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else None


def serve(page: Page, listening: socket.socket, token: str, appearance: dict[str, Any]) -> None:
    """Serve the page until Ctrl-C."""
    app = build_app(page, listening.getsockname()[1], appearance, token)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    _Server(config).run([listening])


class _Server(uvicorn.Server):
    """Ends in silence: a tab that is open listens for as long as the server lives, which is no error at its end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").disabled = True
        await super().shutdown(sockets)


def build_app(page: Page, port: int, appearance: dict[str, Any], token: str) -> OwnPageOnly:
    """Return the page as it is served, with nothing in front of it or beside it that does without the token."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    app = FastAPI(openapi_url=None)
    app.get("/changes")(lambda: PlainTextResponse(page.changes(), headers={"Cache-Control": "no-store"}))
    app = gr.mount_gradio_app(
        app,
        page.blocks,
        "",
        server_name=HOST,
        server_port=port,
        footer_links=[],
        run_history=False,  # of all that is typed and answered, which the browser would write at every click
        ssr_mode=False,  # it would be served by another process, at another port
        **appearance,
    )
    return OwnPageOnly(app, port, token)

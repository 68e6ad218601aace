"""The page answers to its own origin and to whoever has its token, whatever is asked of it."""

from __future__ import annotations

import argparse
import asyncio
import re
import secrets
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from support.extras import STUDIO
from support.refusals import refused

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.studio import address
from mlx_cpo_plugin.studio.address import listen, opening_file

if TYPE_CHECKING:
    from starlette.testclient import TestClient

pytestmark = STUDIO
PORT = 7870
TOKEN = secrets.token_urlsafe()
HOME = f"http://127.0.0.1:{PORT}"
COOKIE = f"mlx-cpo-studio-{PORT}"


@pytest.fixture(scope="module")
def server() -> ModuleType:
    from mlx_cpo_plugin.studio import server

    return server


@pytest.fixture(scope="module")
def app(server: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from mlx_cpo_plugin.studio.page import appearance, build_page

    page = build_page(tmp_path_factory.mktemp("root"), "")
    return server.build_app(page, PORT, appearance(), TOKEN)


@pytest.fixture
def client(app: Any) -> TestClient:
    from starlette.testclient import TestClient

    return TestClient(app, base_url=HOME, follow_redirects=False)


def requests_of(routes: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Method and path of every route, of mounted applications and included routers, too."""
    for route in routes:
        path = prefix + re.sub(r"{[^}]*}", "x", getattr(route, "path", ""))
        for method in getattr(route, "methods", None) or ["GET"]:
            yield method, path
        inner = getattr(route, "original_router", route)
        yield from requests_of(getattr(inner, "routes", None) or [], path)


def test_no_route_is_answered_without_the_token_or_with_a_wrong_one(
    app: Any, client: TestClient, server: ModuleType
) -> None:
    from fastapi import FastAPI

    assert isinstance(app.app, FastAPI)
    requests = set(requests_of(app.app.routes))
    assert {"/config", "/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/heartbeat/x"} <= {
        path for _, path in requests
    }

    for method, path in [*sorted(requests), ("GET", "/nowhere")]:
        for wrong in ({}, {"cookie": f"{COOKIE}={TOKEN[:-1]}"}, {"authorization": "Bearer x"}):
            answer = client.request(method, path or "/", headers=wrong)

            assert answer.status_code == 403, (method, path)
            if method != "HEAD":
                assert answer.text == server.NO_TOKEN
        assert client.request(method, path or "/", params={"token": "é"}).status_code == 403


def test_a_websocket_is_closed_without_the_token(server: ModuleType) -> None:
    async def never(*_: Any) -> None:
        raise AssertionError

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "websocket",
        "path": "/",
        "query_string": b"",
        "headers": [(b"host", f"127.0.0.1:{PORT}".encode())],
    }
    with ThreadPoolExecutor(1) as thread:  # a browser of other tests has an event loop in this one
        thread.submit(asyncio.run, server.OwnPageOnly(never, PORT, TOKEN)(scope, never, send)).result()

    assert [message["type"] for message in sent] == ["websocket.close"]


def test_the_address_with_the_token_gives_a_cookie_that_opens_all_else(client: TestClient) -> None:
    first = client.get("/", params={"token": TOKEN, "__theme": "dark"}, headers={"Sec-Fetch-Site": "cross-site"})

    assert first.status_code == 200
    assert TOKEN not in first.text
    assert 'url=/?__theme=dark"' in first.text
    given = first.headers["set-cookie"]
    assert given.startswith(f"{COOKIE}={TOKEN};")
    assert {"httponly", "samesite=strict", "path=/"} <= set(given.lower().split("; "))
    assert client.get("/config").status_code == 200
    assert "gradio" in client.get("/").text


@pytest.mark.parametrize(
    "how", [{"headers": {"Authorization": f"Bearer {TOKEN}"}}, {"params": {"token": TOKEN}}], ids=["header", "address"]
)
def test_a_program_may_send_the_token_with_each_request(client: TestClient, how: dict[str, Any]) -> None:
    assert client.get("/config", **how).status_code == 200


@pytest.mark.parametrize(
    ("headers", "own"),
    [
        ({"host": "127.0.0.1:7870"}, True),
        ({"host": "localhost:7870", "origin": "http://localhost:7870"}, True),
        ({"host": "127.0.0.1:7870", "sec-fetch-site": "same-origin"}, True),
        ({"host": "evil.example:7870"}, False),
        ({"host": "127.0.0.1:7870", "origin": "http://evil.example"}, False),
        ({"host": "127.0.0.1:7870", "origin": "null"}, False),
        ({"host": "127.0.0.1:7870", "sec-fetch-site": "cross-site"}, False),
        ({"host": "127.0.0.1:7870", "sec-fetch-site": "same-site"}, False),
        ({"host": ""}, False),
    ],
)
def test_with_the_token_only_the_page_itself_is_answered(
    headers: dict[str, str], own: bool, server: ModuleType
) -> None:
    from starlette.responses import PlainTextResponse
    from starlette.testclient import TestClient

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("seen")(scope, receive, send)

    client = TestClient(server.OwnPageOnly(answer, PORT, TOKEN), base_url=HOME, cookies={COOKIE: TOKEN})

    answered = client.get("/config", headers=headers)

    assert (answered.status_code, answered.text) == ((200, "seen") if own else (403, server.OTHER_SITE))


def test_the_script_of_the_page_can_ask_whether_there_is_something_new(client: TestClient) -> None:
    def asked() -> str:
        answer = client.get("/changes", headers={"Authorization": f"Bearer {TOKEN}"})
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        return answer.text

    before = asked()
    assert asked() == before


def test_the_browser_keeps_no_record_of_what_is_typed_and_answered(client: TestClient) -> None:
    config = client.get("/config", headers={"Authorization": f"Bearer {TOKEN}"}).json()

    assert config["run_history"] is False


def test_the_cookie_of_a_page_at_another_port_is_none_of_this_one(client: TestClient) -> None:
    assert client.get("/config", headers={"cookie": f"mlx-cpo-studio-7871={TOKEN}"}).status_code == 403


def test_two_pages_never_have_the_same_token(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from mlx_cpo_plugin.studio import command, page, server

    monkeypatch.setattr(page, "build_page", lambda *_: None)
    monkeypatch.setattr(server, "serve", lambda *_: None)
    for _ in range(2):
        command.serve(argparse.Namespace(config=None, port=0, no_browser=True))

    tokens = re.findall(r"http://127\.0\.0\.1:\d+/\?token=([\w-]+)$", capsys.readouterr().out, re.MULTILINE)
    assert len(set(tokens)) == 2
    assert all(len(token) >= 40 for token in tokens)


def test_the_browser_is_given_a_file_that_only_its_owner_reads_and_no_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    file = opening_file(f"{HOME}/?token={TOKEN}")

    assert TOKEN not in file.as_uri()
    assert TOKEN in file.read_text()
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_who_connects_before_the_page_is_built_is_answered_when_it_is() -> None:
    with listen(0) as listening, socket.create_connection(listening.getsockname()) as early:
        early.sendall(b"hello")
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.recv(5) == b"hello"


def test_a_port_that_is_taken_is_refused_and_without_a_wish_the_next_one_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for port in (99999, -1):
        with refused(ConfigError, f"--port is {port}, but must be between 0 and 65535", key="port"):
            listen(port)
    with listen(0) as taken:
        port = taken.getsockname()[1]
        with refused(ConfigError, f"Port {port} is taken", key="port"):
            listen(port)
        monkeypatch.setattr(address, "DEFAULT_PORT", port)
        with listen(None) as other:
            assert other.getsockname()[1] > port


def test_gradio_is_imported_without_writing_stubs() -> None:
    """Which takes as long as the rest of the import; the components have their events all the same."""
    script = """if True:
        import sys
        opened = []
        sys.addaudithook(lambda event, values: opened.append(values[0]) if event == "open" else None)
        from mlx_cpo_plugin.studio.command import gradio_writes_no_stubs
        finders = [*sys.meta_path]
        with gradio_writes_no_stubs():
            import gradio
        assert sys.meta_path == finders
        gradio.Textbox.change, gradio.Blocks.load
        print([path for path in opened if str(path).endswith(".pyi")])
    """
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"

"""The page in a browser: each module of tests that asks for it has one server and one browser of its own."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from support.studio_pages import Server


@pytest.fixture(scope="module")
def root(model_folder: Path) -> Iterator[Path]:
    """A folder with data and a configuration, into which every account may go."""
    from support.studio_pages import fill

    with tempfile.TemporaryDirectory(prefix="studio-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        fill(folder, model_folder)
        yield folder


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def server(root: Path, port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from support.studio_pages import serving

    with serving(root, port, tmp_path_factory.mktemp("browser"), "--config", "my.yaml") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from support.studio_pages import BROWSER, playwright

    preloaded = os.environ.pop("LD_PRELOAD", None)  # a BLAS is nothing for a browser
    with playwright.sync_playwright() as engine:
        yield engine.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
    if preloaded is not None:
        os.environ["LD_PRELOAD"] = preloaded


@pytest.fixture(scope="module")
def visits(browser: Any) -> Iterator[Any]:
    """What visits of one person share: the token, and scripts that were fetched and compiled once."""
    with browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce") as context:
        yield context


@pytest.fixture
def page(server: Server, visits: Any) -> Iterator[Any]:
    from support.studio_pages import PATIENCE, expect, is_outside

    shutil.rmtree(server.state, ignore_errors=True)  # what other tests have typed
    page = visits.new_page()
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page.outside = []
    page.on("request", lambda request: page.outside.append(request.url) if is_outside(request.url, server) else None)
    page.goto(server.address)
    expect(page.locator("#verdict p").first).to_be_visible()  # by then the form is as it was left
    yield page
    assert page.outside == []
    page.close()

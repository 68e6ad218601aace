"""The page in a browser: one server, one browser and one window for all tests of a worker, as a person has them.

To open the page costs more than most of what is done on it, so a test takes over the window that the one before has
left, with the first configuration opened, on the first tab.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from support.studio_pages import Server

SIZE = {"width": 1280, "height": 900}


@pytest.fixture(scope="session")
def served(model_folder: Path) -> Iterator[Path]:
    """The folder of the page, into which every account may go."""
    with tempfile.TemporaryDirectory(prefix="studio-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def root(served: Path, model_folder: Path) -> Path:
    """The folder of the page with data and a configuration, and nothing of other modules."""
    from support.studio_pages import fill

    for left in served.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()
    fill(served, model_folder)
    return served


@pytest.fixture(scope="session")
def server(served: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from support.studio_pages import fill, serving

    fill(served, model_folder)
    with serving(served, tmp_path_factory.mktemp("browser"), "--config", "my.yaml") as server:
        yield server


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from support.studio_pages import BROWSER, playwright

    preloaded = os.environ.pop("LD_PRELOAD", None)  # a BLAS is nothing for a browser
    with playwright.sync_playwright() as engine:
        yield engine.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
    if preloaded is not None:
        os.environ["LD_PRELOAD"] = preloaded


@pytest.fixture(scope="session")
def visits(browser: Any) -> Iterator[Any]:
    """What visits of one person share: the token, and scripts that were fetched and compiled once."""
    from support.studio_pages import PATIENCE, expect

    expect.set_options(timeout=PATIENCE)
    with browser.new_context(viewport=SIZE, reduced_motion="reduce") as context:
        context.set_default_timeout(PATIENCE)
        yield context


@pytest.fixture(scope="session")
def window(server: Server, visits: Any) -> Iterator[Any]:
    """The page, opened once."""
    from support.studio_pages import is_outside

    page = visits.new_page()
    page.outside = []
    page.on("request", lambda request: page.outside.append(request.url) if is_outside(request.url, server) else None)
    page.goto(server.address)
    yield page
    page.close()


@pytest.fixture
def page(server: Server, root: Path, window: Any) -> Iterator[Any]:
    """The window as a test finds it: the file as it is on the disk, in a form in which nothing else was typed."""
    from support.studio_pages import begin_anew

    window.set_viewport_size(SIZE)
    window.emulate_media(color_scheme="light")
    shutil.rmtree(server.state, ignore_errors=True)  # what other tests have typed
    begin_anew(window, root)
    yield window
    assert window.outside == []

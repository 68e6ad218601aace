"""The page as it is served, and what is done with it in a browser; whoever imports this needs playwright."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from support.tiny import preference_rows

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDS = [
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium"),
    pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra 'studio'"),
    pytest.mark.slow,
]
PATIENCE = 120_000
expect = playwright.expect


class Server(NamedTuple):
    """The page as it runs.

    Attributes:
        home: its address without the token.
        address: the one that is printed.
        opened: holds the words that the browser was started with, once it was.
        pid: of its process.
        state: the folder in which it keeps what was typed.
    """

    home: str
    address: str
    opened: Path
    pid: int
    state: Path

    @property
    def token(self) -> str:
        return self.address.partition("token=")[2]


def fill(folder: Path, model_folder: Path) -> None:
    (folder / "data").mkdir()
    for name, count in (("train", 10), ("valid", 4), ("test", 4)):
        lines = [json.dumps(row) for row in preference_rows(count)]
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "model": str(model_folder),
        "data": "data",
        "train": True,
        "train_mode": "cpo",
        "adapter_path": "adapters",
        "iters": 200,
        "batch_size": 2,
        "learning_rate": 0.001,
        "steps_per_report": 5,
        "steps_per_eval": 50,
        "fuse": False,
        "top_p": 0.5,
    }
    (folder / "my.yaml").write_text("# mine\n" + yaml.safe_dump(settings, sort_keys=False))


@contextmanager
def serving(root: Path, home: Path, *words: str) -> Iterator[Server]:
    """Serve the page of a folder; ``home`` holds what it keeps outside of it."""
    opened, script = home / "words", home / "browser.py"
    script.write_text(f"import os, sys\nopen({str(opened)!r}, 'w').write(' '.join(sys.argv))")
    command = [sys.executable, "-m", "mlx_cpo_plugin", "studio", "--port", "0", *words]
    environment = os.environ | {"BROWSER": f"{sys.executable} {script} %s", "XDG_STATE_HOME": str(home)}
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        address = next(line.strip() for line in process.stdout if "http://" in line)
        page, _, token = address.partition("?token=")
        assert token
        yield Server(page, address, opened, process.pid, home / "mlx-cpo-studio")
        process.terminate()


def is_outside(url: str, server: Server) -> bool:
    return not url.startswith((server.home, "data:", "blob:"))


def write(page: Any, key: str, text: str) -> None:
    page.locator(f"#field-{key}").locator("input, textarea").click()
    page.keyboard.press("Control+a")
    page.keyboard.type(text)


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


SHOWN_AS_ON_DISK = """text => {
    const lines = [...document.querySelectorAll("#yaml .cm-line")].map(line => line.textContent);
    const state = document.querySelector("#file-state")?.textContent ?? "";
    return lines.join("\\n").trim() === text.trim() && state.includes("my.yaml: no unsaved changes");
}"""


def begin_anew(page: Any, root: Path) -> None:
    """Bring an open page to where it is when it is opened: the file as it is on the disk, on the first tab."""
    text, asked = (root / "my.yaml").read_text(), page.locator("#confirm")
    tab(page, "Train")
    expect(page.locator("#verdict p").first).to_be_visible()  # by then the form is as it was left
    if asked.is_visible():
        page.click("#refrain")
        expect(asked).to_be_hidden()
    if page.evaluate(SHOWN_AS_ON_DISK, text):
        return
    name = page.locator("#file input")
    if name.input_value() != "my.yaml":
        name.fill("my.yaml")
        page.keyboard.press("Enter")
    else:
        page.click("#open")
        page.wait_for_function(f"text => document.querySelector('#confirm') || ({SHOWN_AS_ON_DISK})(text)", arg=text)
        if asked.is_visible():
            asked.click()
    page.wait_for_function(SHOWN_AS_ON_DISK, arg=text)

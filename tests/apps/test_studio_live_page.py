"""The page in a browser: every tab follows what runs, long work is cancelled, keys and screen readers find the way."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="needs playwright")
from support.studio_pages import NEEDS, Server, expect, tab, write

from mlx_cpo_plugin.checkpoints.run_folder import only_run_in

pytestmark = NEEDS
TABS = ("Train", "Check", "Run", "Compare", "Chat", "Runs")
ACTIVE = "document.activeElement"
NOTES = "window.Notification = class { static permission = 'granted'; constructor(title) { window.told = title; } }"


@pytest.fixture(scope="module")
def elsewhere(root: Path) -> Path:
    """The folder of a run that the page did not start."""
    folder = root / "elsewhere"
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {"kind": "valid", "iteration": 1, "val_loss": 0.7, "val_accuracies": 0.5, "val_margins": 0.0},
        {"kind": "sample", "iteration": 1, "prompt": "Hi!", "answer": "Hello."},
        *({"kind": "train", "iteration": step, "train_loss": 1 / step, "learning_rate": 1e-5} for step in range(1, 31)),
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run_settings.yaml").write_text("iters: 60\n")
    return folder


def test_a_run_of_the_command_line_is_followed_on_every_tab_of_every_window_to_its_end(
    page: Any, visits: Any, server: Server, elsewhere: Path
) -> None:
    other = visits.new_page()
    other.add_init_script(NOTES)
    other.goto(server.home)
    tab(other, "Compare")

    with only_run_in(elsewhere):
        tab(page, "Run")
        for window in (page, other):
            expect(window.locator("#banner")).to_contain_text("Iteration 30 of 60 (50 %)")
            expect(window).to_have_title("50% · MLX CPO")
        expect(page.locator("#curve-loss svg")).to_be_visible()
        expect(page.locator("#stop")).to_be_disabled()
        expect(page.locator("#start")).to_be_enabled()
        for name in TABS:
            tab(other, name)
            expect(other.locator("#banner")).to_be_visible()

    for window in (page, other):
        expect(window).to_have_title("MLX CPO")
    assert "cause unknown" in other.evaluate("window.told")
    other.close()


def test_a_check_says_that_it_works_and_ends_when_it_is_cancelled(page: Any, server: Server) -> None:
    tab(page, "Check")
    expect(page.locator("#check-cancel")).to_be_hidden()

    page.click("#check")

    expect(page.locator("#check-said")).to_contain_text("Checking")
    expect(page.locator("#check")).to_be_disabled()
    page.click("#check-cancel")
    expect(page.locator("#check-said .note")).to_have_text("Cancelled.")
    expect(page.locator("#check")).to_be_enabled()
    assert "inspection" not in children(server.pid)


def test_a_check_ends_when_its_tab_is_closed(visits: Any, server: Server) -> None:
    page = visits.new_page()
    page.goto(server.home)
    tab(page, "Check")
    page.click("#check")
    expect(page.locator("#check-said")).to_contain_text("Checking")
    assert "inspection" in children(server.pid)

    page.close()

    while "inspection" in children(server.pid):
        pass


def children(pid: int) -> str:
    """The command lines of the processes that a process has started."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    numbers = [number for file in found for number in file.read_text().split()]
    return "\n".join(subprocess.run(["ps", "-o", "args=", "-p", ",".join(numbers) or "0"], **PIPED).stdout.splitlines())


PIPED: dict[str, Any] = {"capture_output": True, "text": True, "check": False}


def test_tabs_are_chosen_by_arrow_keys_the_file_is_near_and_focus_is_seen(page: Any) -> None:
    for _ in range(10):
        page.keyboard.press("Tab")
        assert page.evaluate(f"parseFloat(getComputedStyle({ACTIVE}).outlineWidth)") >= 2
        if page.evaluate(f"{ACTIVE}.closest('#file') !== null"):
            break
    else:
        pytest.fail("The file is not within ten steps.")

    page.get_by_role("tab", name="Train", exact=True).focus()
    for key, name in (("ArrowRight", "Check"), ("End", "Runs"), ("ArrowRight", "Train"), ("ArrowLeft", "Runs")):
        page.keyboard.press(key)
        expect(page.get_by_role("tab", name=name, exact=True)).to_be_focused()
        expect(page.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")


def test_a_field_at_fault_says_so_and_names_the_sentence_until_it_is_right(page: Any) -> None:
    beta = page.locator("#field-beta").locator("input, textarea")

    write(page, "beta", "-1")
    expect(beta).to_have_attribute("aria-invalid", "true")
    expect(beta).to_have_attribute("aria-describedby", "error-beta")

    write(page, "beta", "0.2")
    expect(beta).not_to_have_attribute("aria-invalid", re.compile(".*"))


def axe_core() -> Path | None:
    """The accessibility checker, where npm has put it into a folder above this one or among its global packages."""
    folders = [folder / "node_modules" for folder in Path(__file__).parents]
    try:
        found = subprocess.run(["npm", "root", "-g"], **PIPED).stdout.strip()
    except OSError:
        found = ""
    files = [folder / "axe-core" / "axe.min.js" for folder in [*folders, *([Path(found)] if found else [])]]
    return next((file for file in files if file.is_file()), None)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Any, elsewhere: Path, scheme: str) -> None:
    script = axe_core()
    if script is None:
        pytest.skip("needs axe-core: npm install axe-core, in a folder above the tests or with --global")
    page.emulate_media(color_scheme=scheme)
    page.reload()
    write(page, "beta", "-1")
    expect(page.locator("#error-beta")).to_be_visible()
    tab(page, "Run")
    page.locator("#run-picker input").click()
    page.get_by_role("option", name="elsewhere", exact=True).click()
    expect(page.locator("#curve-loss svg")).to_be_visible()
    page.evaluate(script.read_text())

    for name in TABS:
        tab(page, name)
        expect(page.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']}).then(result => result.violations)")
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == [], name

"""The page in a real browser: fill the form, fix a mistake, train, watch, stop, go on, compare, keep a report.

And as other accounts of the machine see it.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from support.studio_pages import NEEDS, PATIENCE, Server, expect, tab, write
from support.tiny import TESTS

pytestmark = NEEDS


def test_the_form_is_filled_by_keyboard_alone_and_a_mistake_is_told_beside_its_field_until_it_is_fixed(
    page: Any,
) -> None:
    beta = page.locator("#field-beta").locator("input, textarea")
    for _ in range(40):
        page.keyboard.press("Tab")
        if beta.evaluate("field => field === document.activeElement"):
            break
    page.keyboard.press("Control+a")
    page.keyboard.type("-1")

    expect(page.locator("#error-beta")).to_have_text("beta is -1 in the form, but must be a number > 0.")
    expect(page.locator("#verdict")).to_contain_text("beta is -1")

    write(page, "beta", "0.05")
    expect(page.locator("#error-beta")).to_be_hidden()
    expect(page.locator("#verdict")).to_contain_text("Ready to train.")
    expect(page.locator("#yaml")).to_contain_text("beta: 0.05")

    delta = page.locator("#field-delta")
    expect(delta).to_be_hidden()
    page.get_by_role("radio", name="DPOP").click()
    expect(delta).to_be_visible()
    page.get_by_role("radio", name="Hinge").click()
    expect(delta).to_be_hidden()


def open_changed(page: Any, root: Path, name: str, **changes: Any) -> None:
    """Open a file that has the settings of the first one, with changes."""
    settings = yaml.safe_load((root / "my.yaml").read_text())
    (root / name).write_text(yaml.safe_dump(settings | changes))
    page.locator("#file").locator("input").fill(name)
    page.keyboard.press("Enter")
    page.click("#open")
    expect(page.locator("#said")).to_contain_text(f"Opened {name}")


def test_a_saved_file_keeps_comments_and_keys_without_a_field_and_an_opened_one_fills_the_form(
    page: Any, root: Path
) -> None:
    write(page, "beta", "0.2")
    expect(page.locator("#yaml")).to_contain_text("beta: 0.2")
    page.locator("#file").locator("input").fill("mine/other.yaml")
    page.keyboard.press("Enter")
    page.click("#save")

    expect(page.locator("#said")).to_contain_text("Saved mine/other.yaml")
    text = (root / "mine" / "other.yaml").read_text()
    assert text == (root / "my.yaml").read_text() + "beta: 0.2\n"

    open_changed(page, root, "second.yaml", beta=0.7, dpo_cpo_loss_type="dpop", delta=5)

    expect(page.locator("#field-beta").locator("input, textarea")).to_have_value("0.7")
    expect(page.locator("#field-delta")).to_be_visible()
    expect(page.locator("#field-delta").locator("input, textarea")).to_have_value("5")
    expect(page.locator("#yaml")).to_contain_text("dpo_cpo_loss_type: dpop")

    page.locator("#file").locator("input").fill("../stolen.yaml")
    page.keyboard.press("Enter")
    page.click("#save")

    expect(page.locator("#said")).to_contain_text("lies outside")
    assert not (root.parent / "stolen.yaml").exists()


def test_a_run_is_started_watched_stopped_found_again_gone_on_with_compared_and_reported(
    page: Any, visits: Any, server: Server, root: Path
) -> None:
    tab(page, "Run")
    page.click("#start")
    expect(page.locator("#status")).to_contain_text("Running")
    expect(page.locator("#curve-loss")).to_be_visible()
    expect(page.locator("#status progress")).to_be_visible()
    page.click("#stop")
    expect(page.locator("#status")).to_contain_text("Stopped and saved")
    expect(page.locator("#run-said")).not_to_contain_text("press again")

    page.click("#resume")
    expect(page.locator("#status")).to_contain_text("Running")
    again = visits.new_page()
    again.goto(server.address)
    tab(again, "Run")
    expect(again.locator("#status")).to_contain_text(re.compile("Running|Finished"), timeout=PATIENCE)
    again.close()
    expect(page.locator("#status")).to_contain_text("Finished")
    expect(page.locator("#console")).to_contain_text("Saved final weights")
    assert (root / "adapters" / "adapters.safetensors").exists()

    tab(page, "Compare")
    expect(page.locator("#compare-run input")).to_have_value("adapters")
    page.locator("#compare-prompt textarea").fill("Please tell me how many apples are in basket 3.")
    page.click("#compare")
    expect(page.locator("#compare-answers tbody tr").first).to_contain_text("%")
    expect(page.locator("#compare-answers article").first).to_contain_text("Tuned model")

    tab(page, "Chat")
    expect(page.locator("#chat-run input")).to_have_value("adapters")
    message = page.locator("#chat-prompt textarea")
    message.fill("How many apples are in basket 3?")
    page.keyboard.press("Enter")
    expect(page.locator("#chat-said")).to_contain_text("Loading")
    message.fill("And in basket 4?")
    page.keyboard.press("Enter")  # before there is an answer, after which it is asked
    for side in ("base", "tuned"):
        expect(page.locator(f"#chat-{side} [data-testid=bot]")).to_have_count(2, timeout=3 * PATIENCE)  # four answers
        expect(page.locator(f"#chat-{side} [data-testid=user]").last).to_contain_text("And in basket 4?")
    expect(message).to_have_value("")

    tab(page, "Runs")
    page.get_by_label("adapters", exact=True).check()
    page.click("#show-runs")
    expect(page.locator("#runs-curves svg").first).to_be_visible()
    expect(page.locator("#runs-table th[scope=col]").first).to_have_text("adapters")
    page.click("#make-report")
    with page.expect_download() as download:
        page.locator("#report a").first.click()
    assert "<svg" in Path(download.value.path()).read_text(encoding="utf-8")


def test_nothing_is_too_wide_or_fetched_from_elsewhere_and_every_field_has_a_label(page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    page.reload()
    expect(page.locator("#verdict")).to_contain_text("Ready")

    for width, names in ((1280, ("Check", "Run", "Compare", "Runs", "Train")), (390, ("Train",))):
        page.set_viewport_size({"width": width, "height": 900})
        for name in names:
            tab(page, name)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
    unlabelled = page.evaluate(
        """() => [...document.querySelectorAll('[id^=field-] input, [id^=field-] textarea')]
            .filter(field => !field.labels?.length && !field.getAttribute('aria-label')).length"""
    )
    assert unlabelled == 0
    assert page.outside == []


def test_a_browser_without_the_token_sees_one_sentence(server: Server, browser: Any) -> None:
    page = browser.new_page()

    answer = page.goto(server.home)

    assert answer.status == 403
    assert "open the address with the token" in page.inner_text("body")
    page.close()


def test_the_browser_that_the_page_starts_is_led_in_and_its_words_tell_no_token(server: Server, browser: Any) -> None:
    while not server.opened.exists() or not server.opened.read_text():
        os.kill(server.pid, 0)
        Event().wait(0.05)  # the core is for the page
    page = browser.new_page()
    words = server.opened.read_text()
    file = Path(words.partition("file://")[2])

    page.goto(file.as_uri())

    expect(page.locator("#yaml")).to_contain_text("train_mode")
    assert page.url == server.home
    assert server.token not in words
    assert modes([file, file.parent, file.parent.parent]) == [0o600, 0o700, 0o700]
    page.close()


def modes(paths: list[Path]) -> list[int]:
    return [stat.S_IMODE(path.stat().st_mode) for path in paths]


def test_paths_outside_the_folder_are_used_once_confirmed_and_rows_lengths_and_scored_tokens_shown(
    page: Any, root: Path, tmp_path: Path, data_folder: Path
) -> None:
    (root / "linked").symlink_to(data_folder)
    open_changed(page, root, "outside.yaml", data="linked", adapter_path=str(tmp_path / "adapters"))

    tab(page, "Check")
    page.click("#check")
    expect(page.locator("#check-said")).to_contain_text(f"data: {data_folder}")
    expect(page.locator("#check-said")).to_contain_text(f"adapter_path: {tmp_path / 'adapters'}")
    expect(page.locator("#check-summary")).to_be_empty()
    page.locator("#check-outside input").check()
    page.click("#check")
    expect(page.locator("#check-summary tbody tr").first).to_contain_text("10")
    expect(page.locator("#check-pairs article mark").first).to_contain_text("apples in the basket")
    expect(page.locator("#lengths-chosen canvas, #lengths-chosen svg").first).to_be_visible()

    tab(page, "Run")
    page.click("#start")
    expect(page.locator("#run-said")).to_contain_text(f"adapter_path: {tmp_path / 'adapters'}")
    assert not (tmp_path / "adapters").exists()
    page.locator("#run-outside input").check()
    page.click("#start")
    expect(page.locator("#run-said")).to_contain_text("Started in")
    page.click("#stop")
    expect(page.locator("#status")).to_contain_text(re.compile("Stopped at once|Stopped and saved"))


def test_a_run_whose_rows_lie_outside_is_compared_once_they_are_confirmed(
    page: Any, root: Path, data_folder: Path
) -> None:
    (root / "earlier").mkdir()
    (root / "earlier" / "metrics.jsonl").write_text('{"kind": "train", "iteration": 1, "train_loss": 0.5}\n')
    (root / "earlier" / "run_settings.yaml").write_text(f"data: {data_folder}\n")

    tab(page, "Compare")
    page.locator("#compare-run").locator("input").click()
    page.get_by_role("option", name="earlier").click()
    page.click("#compare")

    expect(page.locator("#compare-said")).to_contain_text(f"data: {data_folder}")
    expect(page.locator("#compare-outside input")).not_to_be_checked()


def test_another_account_reads_nothing_asks_nothing_and_sees_no_token(page: Any, server: Server, root: Path) -> None:
    open_changed(page, root, "private.yaml", adapter_path="private", iters=2)
    page.locator("#file").locator("input").fill("hidden/private.yaml")
    page.keyboard.press("Enter")
    page.click("#save")
    expect(page.locator("#said")).to_contain_text("Saved hidden/private.yaml")
    tab(page, "Run")
    page.click("#start")
    expect(page.locator("#console")).to_contain_text("private/adapters.safetensors")
    expect(page.locator("#status")).to_contain_text("Finished")

    written = [folder for name in ("hidden", "private") for folder in (root / name, *(root / name).rglob("*"))]
    assert {root / "private" / name for name in ("studio.yaml", "console.log", "adapters.safetensors")} < set(written)
    assert all(mode & 0o077 == 0 for mode in modes(written)), dict(zip(written, modes(written), strict=True))
    if os.geteuid() != 0:
        pytest.skip("needs a superuser to be another account")

    script = TESTS / "support" / "other_account.py"
    command = [sys.executable, str(script), server.home, *map(str, written)]
    seen = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert seen["read"] == []
    assert set(seen["answers"]) == {403}
    assert str(server.pid) in seen["words"]
    assert server.token not in "".join(seen["words"].values())


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/config", {"Origin": "http://evil.example"}),
        ("/config", {"Host": "evil.example"}),
        ("/gradio_api/queue/join", {"Sec-Fetch-Site": "cross-site"}),
        ("/gradio_api/file=/etc/passwd", {}),
        ("/gradio_api/file=../../../../etc/passwd", {}),
    ],
)
def test_other_origins_and_other_files_are_refused(server: Server, path: str, headers: dict[str, str]) -> None:
    connection = HTTPConnection(urlsplit(server.home).netloc, timeout=PATIENCE / 1000)
    connection.request("GET", path, headers={"Authorization": f"Bearer {server.token}"} | headers)

    response = connection.getresponse()

    assert response.status in (403, 404)
    assert b"root:" not in response.read()

"""The form in a real browser: what it shows is what is saved and trained, and nothing that was typed is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.studio_pages import NEEDS, Server, expect, serving, tab, write

pytestmark = NEEDS


@pytest.fixture(autouse=True)
def _files_of_other_tests_are_gone(root: Path) -> Iterator[None]:
    kept = (root / "my.yaml").read_text()
    yield
    for file in root.glob("*.yaml"):
        file.unlink()
    (root / "my.yaml").write_text(kept)


def field(page: Any, key: str) -> Any:
    return page.locator(f"#field-{key}").locator("input, textarea").first


def pick(page: Any, control: str, name: str) -> None:
    page.locator(f"#{control} input").click()
    page.get_by_role("option", name=name, exact=True).click()


def test_what_is_typed_pasted_and_deleted_is_in_the_yaml_and_judged(page: Any, visits: Any) -> None:
    shown, verdict = page.locator("#yaml"), page.locator("#verdict")
    write(page, "beta", "0.9")
    expect(shown).to_contain_text("beta: 0.9")
    expect(verdict).to_contain_text("beta is 0.9")

    visits.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate("navigator.clipboard.writeText('0.04')")
    page.keyboard.press("Control+a")
    page.keyboard.press("Control+v")
    expect(shown).to_contain_text("beta: 0.04")
    expect(verdict).not_to_contain_text("beta is 0.9")

    page.keyboard.press("Backspace")
    page.keyboard.press("Backspace")
    expect(shown).to_contain_text("beta: 0")
    expect(page.locator("#error-beta")).to_have_text("beta is 0.0 in the form, but must be a number > 0.")
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    expect(shown).not_to_contain_text("beta")
    expect(page.locator("#error-beta")).to_be_hidden()
    expect(shown.locator("[contenteditable=true]")).to_have_count(0)


def test_save_takes_the_last_key_and_refuses_what_is_wrong(page: Any, root: Path) -> None:
    write(page, "beta", "0.0625")
    page.click("#save")
    expect(page.locator("#said")).to_contain_text("Saved my.yaml")
    assert yaml.safe_load((root / "my.yaml").read_text())["beta"] == 0.0625

    write(page, "beta", "-1")
    page.click("#save")
    expect(page.locator("#said")).to_contain_text("Not saved: beta is -1")
    assert yaml.safe_load((root / "my.yaml").read_text())["beta"] == 0.0625


def test_save_is_pressed_right_after_a_new_name_is_typed(page: Any, root: Path) -> None:
    page.locator("#file input").click()
    page.keyboard.press("Control+a")
    page.keyboard.type("new.yaml")
    page.click("#save")

    expect(page.locator("#said")).to_contain_text("Saved new.yaml")
    expect(page.locator("#file-state")).to_contain_text("new.yaml: no unsaved changes")
    assert (root / "new.yaml").read_text() == (root / "my.yaml").read_text()


def test_picking_a_file_opens_it_and_what_was_not_saved_of_the_other_is_back_when_that_is_picked(
    page: Any, root: Path, server: Server
) -> None:
    (root / "other.yaml").write_text(
        "# of eighteen lines\ntrain: true\ntrain_mode: cpo\nmodel: somewhere/else\nseed: 7\n"
    )
    page.reload()
    expect(page.locator("#verdict p").first).to_be_visible()
    write(page, "beta", "0.3")
    expect(page.locator("#file-state")).to_contain_text("Unsaved changes in my.yaml")

    pick(page, "file", "other.yaml")
    expect(field(page, "model")).to_have_value("somewhere/else")
    expect(field(page, "beta")).to_have_value("")
    expect(page.locator("#file-state")).to_contain_text("other.yaml: no unsaved changes")
    page.click("#save")
    expect(page.locator("#said")).to_contain_text("Saved other.yaml")
    assert len((root / "other.yaml").read_text().splitlines()) == 5

    pick(page, "file", "my.yaml")
    expect(field(page, "beta")).to_have_value("0.3")
    expect(page.locator("#file-state")).to_contain_text("Unsaved changes in my.yaml")
    page.click("#open")
    expect(page.locator("#said")).to_contain_text("would be lost")
    page.click("#confirm")
    expect(field(page, "beta")).to_have_value("")
    expect(page.locator("#confirm")).to_be_hidden()


def test_save_asks_before_it_overwrites_what_was_changed_elsewhere(page: Any, root: Path) -> None:
    write(page, "beta", "0.2")
    elsewhere = (root / "my.yaml").read_text() + "seed: 5\n"
    (root / "my.yaml").write_text(elsewhere)

    page.click("#save")
    expect(page.locator("#said")).to_contain_text("my.yaml has changed on the disk since it was opened")
    assert (root / "my.yaml").read_text() == elsewhere
    page.click("#refrain")
    expect(page.locator("#confirm")).to_be_hidden()
    page.click("#save")
    page.click("#confirm")
    expect(page.locator("#said")).to_contain_text("Saved my.yaml")
    assert yaml.safe_load((root / "my.yaml").read_text())["beta"] == 0.2


def test_a_reload_and_a_restarted_server_bring_the_form_back_and_ctrl_c_ends_it_in_silence_though_a_tab_is_open(
    visits: Any, root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = visits.new_page()
    with serving(root, tmp_path, "--no-browser") as server:
        page.goto(server.address)
        expect(page.locator("#verdict")).to_contain_text("No model is chosen")
        write(page, "beta", "0.3")
        page.get_by_role("radio", name="DPOP").click()
        write(page, "delta", "7")
        expect(page.locator("#yaml")).to_contain_text("delta: 7")
        page.reload()
        expect(field(page, "delta")).to_have_value("7")
        capfd.readouterr()
        os.kill(server.pid, signal.SIGINT)
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
    assert capfd.readouterr().err == ""
    with serving(root, tmp_path, "--no-browser") as server:
        page.goto(server.address)
        expect(field(page, "delta")).to_have_value("7")
        expect(page.locator("#file-state")).to_contain_text("Unsaved changes in a new configuration")
        page.close()


def test_a_loss_shows_what_it_reads_and_a_preset_its_loss(page: Any) -> None:
    for key in ("delta", "simpo-gamma", "alphapo-alpha"):
        expect(page.locator(f"#field-{key}")).to_be_hidden()
    page.get_by_role("radio", name="SimPO").click()
    expect(page.locator("#field-simpo-gamma")).to_be_visible()
    expect(page.locator("#verdict")).to_contain_text("from 2 to 10 is usual")

    page.get_by_role("radio", name="Sigmoid").click()
    expect(page.locator("#field-simpo-gamma")).to_be_hidden()
    pick(page, "field-preset", "simpo")
    expect(page.get_by_role("radio", name="SimPO")).to_be_checked()
    expect(page.locator("#field-simpo-gamma")).to_be_visible()
    expect(page.locator("#verdict")).to_contain_text("preset simpo sets")
    expect(field(page, "beta")).to_have_attribute("placeholder", "2.0")
    page.get_by_role("radio", name="Hinge").click()
    expect(page.locator("#yaml")).not_to_contain_text("preset")
    expect(page.locator("#verdict")).to_contain_text("Ready to train.")


def test_model_and_data_are_picked_from_this_machine_and_the_first_pairs_shown(page: Any, root: Path) -> None:
    pairs = page.locator("#first-pairs article")
    expect(pairs.first).to_contain_text("apples")
    write(page, "data", "./nowhere")
    expect(pairs).to_have_count(0)
    expect(page.locator("#verdict")).to_contain_text("data names './nowhere', which does not exist")
    expect(page.locator("#verdict")).not_to_contain_text("Ready")

    pick(page, "pick-data", "data/valid.jsonl")
    expect(field(page, "data")).to_have_value("data/valid.jsonl")
    expect(page.locator("#yaml")).to_contain_text("data: data/valid.jsonl")
    expect(pairs.first).to_be_visible()
    pick(page, "field-quantisation", "8 bits")
    expect(page.locator("#yaml")).to_contain_text("load_in_8bits: true")


def test_in_a_narrow_window_the_file_comes_first_and_all_is_of_one_width(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})

    boxes = {
        name: page.locator(f"#{name}").bounding_box() for name in ("file", "open", "save", "verdict", "field-beta")
    }

    tops = [box["y"] for box in boxes.values()]
    assert tops == sorted(tops)
    assert tops[2] < 400
    edges = {name: box["x"] + box["width"] for name, box in boxes.items()}
    assert max(edges.values()) <= edges["save"]


def test_a_folder_that_holds_a_run_is_asked_about_and_another_is_proposed(page: Any, root: Path) -> None:
    (root / "adapters").mkdir()
    (root / "adapters" / "metrics.jsonl").write_text('{"kind": "train", "iteration": 3, "train_loss": 0.5}\n')
    write(page, "iters", "1")
    tab(page, "Run")

    page.click("#start")
    expect(page.locator("#used-folder")).to_contain_text("adapters holds a run at iteration 3")
    expect(page.locator("#used-resume")).to_be_hidden()
    assert not (root / "adapters" / "studio.yaml").exists()
    page.get_by_role("button", name="Train in adapters-2").click()
    expect(page.locator("#run-said")).to_contain_text("Started in")
    expect(page.locator("#status")).to_contain_text("Finished")

    assert yaml.safe_load((root / "adapters-2" / "studio.yaml").read_text())["adapter_path"] == "adapters-2"
    assert (root / "adapters" / "metrics.jsonl").exists()
    tab(page, "Train")
    expect(page.locator("#yaml")).to_contain_text("adapter_path: adapters-2")


def test_memory_and_time_are_estimated_beside_start(page: Any) -> None:
    tab(page, "Run")  # which ends too soon with a tiny model for a click on Cancel

    page.click("#estimate")

    expect(page.locator("#plan")).to_contain_text("Estimate: about")
    expect(page.locator("#plan")).to_contain_text("Time: about")
    expect(page.locator("#estimate-cancel")).to_be_hidden()


def test_the_yaml_stays_in_view_while_the_form_is_scrolled(page: Any) -> None:
    page.locator("#field-learning-rate").scroll_into_view_if_needed()
    page.mouse.wheel(0, 600)

    expect(page.locator("#yaml")).to_be_in_viewport()

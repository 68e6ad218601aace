"""``mlx-cpo doctor`` tells what is in place, what is not, and what to do."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from support.compiled import skip_where_there_are_none
from support.fresh_environment import FreshEnvironment, installed_environment

from mlx_cpo_plugin import plugins
from mlx_cpo_plugin.activation import patches
from mlx_cpo_plugin.commands import doctor
from mlx_cpo_plugin.commands.doctor import START_UP_FILES, Finding
from mlx_cpo_plugin.errors import PluginError
from mlx_cpo_plugin.kernels import library

ROUTES = [
    "route mlx_lm_lora.train",
    "route python -m mlx_lm_lora train",
    "route python -m mlx_lm_lora.train",
    "route mlx_lm_lora.train.main({...})",
    "route mlx_lm_lora.train.run(namespace)",
    "route mlx_lm_lora.trainer.cpo_trainer",
]


@pytest.fixture
def environment() -> FreshEnvironment:
    """The plugin installed from a wheel."""
    return installed_environment("wheel")


def report_of(environment: FreshEnvironment, **variables: str) -> tuple[int, dict[str, Any]]:
    """The exit code of ``mlx-cpo doctor --json``, and its findings by name."""
    ended = environment.start(environment.folder / "bin" / "mlx-cpo", "doctor", "--json", **variables)
    report = json.loads(ended.stdout)
    assert report["ok"] == (ended.returncode == 0)
    return ended.returncode, {finding["name"]: finding for finding in report["findings"]}


@pytest.mark.slow
def test_a_healthy_installation_is_found_healthy(environment: FreshEnvironment) -> None:
    code, findings = report_of(environment)

    assert code == 0
    assert {name: finding["status"] for name, finding in findings.items() if name.startswith("route")} == dict.fromkeys(
        ROUTES, "ok"
    )
    for name in ("python", "mlx-cpo-plugin", "mlx-lm-lora", "mlx", "mlx-lm", "pluggy", "backend", "start-up files"):
        assert findings[name]["status"] == "ok"
    assert findings["plugin mlx-cpo-plugin"]["about"]["loss_types"][:4] == ["sigmoid", "hinge", "ipo", "dpop"]


@pytest.mark.slow
def test_a_plugin_that_is_turned_off_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_CPO_PLUGIN_DISABLE", "1")
    name, command = "mlx_lm_lora.trainer.cpo_trainer", doctor.routes()["mlx_lm_lora.trainer.cpo_trainer"]

    for finding in (*doctor.check_switch(), doctor.route_finding(name, doctor.told_by(command))):
        assert (finding.status, finding.remedy) == ("failed", "unset MLX_CPO_PLUGIN_DISABLE")


def test_both_start_up_files_beside_each_other_are_fine(tmp_path: Path) -> None:
    for name in START_UP_FILES:
        (tmp_path / name).touch()

    assert doctor.check_start_up_files([tmp_path / "other", tmp_path], are_read=True).status == "ok"


@pytest.mark.parametrize("present", [[], START_UP_FILES[:1], START_UP_FILES[1:]], ids=["none", "pth", "start"])
def test_a_missing_start_up_file_is_a_failure_with_a_remedy(tmp_path: Path, present: list[str]) -> None:
    for name in present:
        (tmp_path / name).touch()

    finding = doctor.check_start_up_files([tmp_path], are_read=False)

    assert finding.status == "failed"
    assert all(name in finding.detail for name in present)
    assert "pip install" in finding.remedy


def test_start_up_files_that_python_does_not_read_are_a_failure(tmp_path: Path) -> None:
    for name in START_UP_FILES:
        (tmp_path / name).touch()

    finding = doctor.check_start_up_files([tmp_path], are_read=False)

    assert finding.status == "failed"
    assert str(tmp_path) in finding.detail


def test_the_hosts_script_is_where_its_distribution_was_installed() -> None:
    assert Path(doctor.routes()["mlx_lm_lora.train"][1]).is_file()


@pytest.mark.parametrize("version", ["5.8.6", "5.9.0", "5.10.0", "5.10.2"])
def test_tested_hosts_are_fine(version: str) -> None:
    assert patches.untested_host_warning(version) == ""


@pytest.mark.parametrize("version", ["5.8.5", "5.10.3", "6.0.0rc1", "4.99.99", "of unknown version"])
def test_other_hosts_are_named_in_a_warning(version: str) -> None:
    warning = patches.untested_host_warning(version)

    assert version in warning
    assert "5.8.6 to 5.10.2" in warning


def test_a_route_that_does_not_reach_the_plugin_says_how_it_ended() -> None:
    finding = doctor.route_finding("of the test", doctor.told_by(["sh", "-c", "echo first; echo 'the host answered'"]))

    assert finding.status == "failed"
    assert finding.detail == "not hooked: the host answered"


def test_a_route_that_cannot_be_tried_is_a_failure() -> None:
    assert doctor.route_finding("of the test", doctor.told_by(["/no/such/command"])).status == "failed"


def test_two_plugins_that_claim_one_name_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def conflict() -> None:
        raise PluginError("registered twice")

    monkeypatch.setattr(plugins, "loss_types", conflict)

    (finding,) = doctor.check_plugins()

    assert (finding.status, finding.detail) == ("failed", "PluginError: registered twice")


def test_a_plugin_that_was_skipped_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "train_modes", lambda: warnings.warn("it is skipped", RuntimeWarning, stacklevel=1))

    *_, finding = doctor.check_plugins()

    assert (finding.status, finding.detail) == ("warning", "it is skipped")


@pytest.mark.parametrize(
    ("variables", "status", "words"),
    [
        ({library.VARIABLE: "garbage"}, "failed", "garbage; set it to auto, always or none"),
        ({library.VARIABLE: "none"}, "ok", f"switched off by {library.VARIABLE}"),
        ({"XDG_CACHE_HOME": "/proc"}, "warning", "cannot be kept in /proc/mlx-cpo-plugin"),
        ({"PATH": "/nowhere", "CXX": ""}, "warning", "there is no C++ compiler"),
    ],
    ids=str,
)
def test_kernels_are_told_as_a_run_will_find_them(
    variables: dict[str, str], status: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_where_there_are_none()
    for name, value in ({library.VARIABLE: "auto", "XDG_CACHE_HOME": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/proc")  # root may write everywhere

    (finding,) = doctor.check_kernels()

    assert (finding.status, words in finding.detail) == (status, True)


def test_damaged_kernels_are_not_taken_for_compiled_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_where_there_are_none()
    monkeypatch.setenv(library.VARIABLE, "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cached_file().parent.mkdir()
    library.cached_file().write_bytes(b"short")

    assert not doctor.check_kernels()[0].detail.startswith("compiled")


def test_without_mlx_the_remedy_is_its_and_nothing_is_tried_that_stands_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_routes", lambda: pytest.fail("tried"))
    monkeypatch.delitem(sys.modules, "mlx_cpo_plugin.device")
    monkeypatch.setitem(sys.modules, "mlx.core", None)  # type: ignore[arg-type]  # None: it cannot be imported

    findings = {finding.name: finding for finding in doctor.diagnose()}

    for name in ("mlx", "backend"):
        assert findings[name].status == "failed"
        assert findings[name].remedy == doctor.NEEDS_BACKEND
    assert findings["routes, plugins"].status == "warning"


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("failed", 1)])
def test_only_a_failure_makes_the_exit_code_1(
    status: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda: [Finding("thing", status, "seen", "fix it")])

    assert doctor.run_doctor() == code

    printed = capsys.readouterr().out
    assert "thing: seen" in printed
    assert "-> fix it" in printed

"""The command ``mlx-cpo``."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pytest

import mlx_cpo_plugin
from mlx_cpo_plugin import __main__ as entry
from mlx_cpo_plugin import cli, plugins
from mlx_cpo_plugin.commands import check as data_check
from mlx_cpo_plugin.commands import doctor
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.settings.cpo_options import PRESETS


@pytest.fixture(autouse=True)
def command_line_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` and `check` set the process's command line."""
    monkeypatch.setattr(sys, "argv", ["pytest"])


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings that the data check was called with."""
    calls: list[Any] = []
    monkeypatch.setattr(data_check, "run_check", lambda settings, mode, timed: calls.append(settings))
    return calls


def test_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])

    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == f"mlx-cpo-plugin {mlx_cpo_plugin.__version__}"


@pytest.mark.parametrize("error", [RuntimeError("[malloc] Unable to allocate 8 bytes"), MemoryError()])
def test_a_device_without_memory_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(chosen: object) -> int:
        raise error

    monkeypatch.setattr(cli.losses, "run_losses", fail)

    assert cli.main(["losses"]) == 2

    assert capsys.readouterr().err.startswith("error: The device is out of memory; ")


def test_mlx_that_cannot_be_imported_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(chosen: object) -> int:
        raise ImportError("libmlx.so: cannot open shared object file", name="mlx.core")

    monkeypatch.setattr(cli.doctor, "run_doctor", fail)
    monkeypatch.setattr(cli.losses, "run_losses", fail)

    assert cli.main(["losses"]) == 2

    assert capsys.readouterr().err == (
        "error: mlx.core cannot be imported (libmlx.so: cannot open shared object file); `mlx-cpo doctor` says what to "
        "do.\n"
    )


def test_help_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])

    printed = capsys.readouterr().out
    commands = ("train", "check", "convert", "report", "compare", "demo", "doctor", "losses", "bench", "studio")
    for command in commands:
        assert f"    {command} " in printed


@pytest.mark.parametrize(
    ("settings", "words", "noted"),
    [("", [], True), ("test: true", [], True), ("train: true", [], False), ("", ["--train"], False)],
)
def test_check_notes_that_the_run_needs_to_be_told_to_train(
    settings: str,
    words: list[str],
    noted: bool,
    checked: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "my.yaml").write_text(f"train_mode: cpo\nmodel: m\n{settings}\n")

    assert cli.main(["check", "--config", str(tmp_path / "my.yaml"), *words]) == 0

    assert ("note: the run needs --train, or train: true in its file." in capsys.readouterr().out) == noted
    assert checked[0].train


def test_the_help_of_check_speaks_of_checking_and_begins_with_its_own_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["check", "--help"]) == 0

    usage, about, first, second, *_ = capsys.readouterr().out.split("\n\n")
    assert usage.startswith("usage: mlx-cpo check ")
    assert about.startswith("Show what a run would train on")
    assert first.startswith("options:")
    assert "--longest" in first
    assert second.startswith("preference loss:")


@pytest.mark.parametrize("command", ["compare", "convert", "report", "doctor", "losses", "bench", "studio", "demo"])
def test_the_help_of_a_command_says_in_a_sentence_what_it_does(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])

    usage, about, *_ = capsys.readouterr().out.split("\n\n")
    assert usage.startswith(f"usage: mlx-cpo {command} ")
    assert about[0].isupper()
    assert about.endswith(".")


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_configuration_file_that_is_not_there_is_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = cli.main([command, "--config", str(tmp_path / "none.yaml")])
    except SystemExit as ended:
        code = ended.code

    assert code == 2
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["nonsense"], ["doctor", "--nonsense"]])
def test_a_command_that_does_not_exist_ends_with_exit_code_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)

    assert ended.value.code == 2


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_the_command_quietly() -> None:
    command = [sys.executable, "-m", "mlx_cpo_plugin", "losses"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()

        assert process.stderr.read() == b""

    assert process.returncode == 0


def test_an_interrupt_ends_the_command_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run_doctor", interrupted)
    monkeypatch.setattr(sys, "argv", ["mlx-cpo", "doctor"])

    assert entry.main() == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_an_interrupt_while_modules_are_imported_ends_the_command_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(MetaPathFinder):
        def find_spec(self, fullname: str, *arguments: object) -> None:
            if fullname == "mlx_cpo_plugin.cli":
                raise KeyboardInterrupt

    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "mlx_cpo_plugin.cli")
    monkeypatch.delattr(mlx_cpo_plugin, "cli")

    assert entry.main() == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_losses_lists_every_registered_loss(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["losses"]) == 0

    printed = capsys.readouterr().out
    for loss in plugins.loss_types().values():
        assert all(text in printed for text in (loss.name, loss.title, loss.formula, loss.source))
    assert "delta: a number >= 0, default 50.0" in printed
    assert "With each of them: cpo_alpha, a number >= 0, default 0.0" in printed
    assert "preset: cpo-paper sets beta 0.1, cpo_alpha 1.0; Xu et al. 2024" in printed


def test_losses_as_json_hold_the_options_with_their_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["losses", "--json"]) == 0

    losses = {loss["name"]: loss for loss in json.loads(capsys.readouterr().out)}
    assert list(losses) == list(plugins.loss_types())
    assert losses["ipo"]["length_normalised"] is True
    beta, delta = losses["dpop"]["options"]
    assert (beta["name"], beta["default"], beta["allowed"]) == ("beta", 0.1, "a number > 0")
    assert (delta["name"], delta["default"], delta["allowed"]) == ("delta", 50.0, "a number >= 0")
    presets = {preset["name"]: preset["values"] for loss in losses.values() for preset in loss["presets"]}
    assert presets == {preset.name: preset.values for preset in PRESETS}
    assert [preset["name"] for preset in losses["simpo"]["presets"]] == ["simpo", "cpo-simpo"]


@pytest.mark.parametrize(("words", "as_json"), [(["doctor"], False), (["doctor", "--json"], True)])
def test_doctor_gives_its_exit_code(words: list[str], as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(doctor, "run_doctor", lambda as_json, *others: calls.append(as_json) or 1)

    assert cli.main(words) == 1
    assert calls == [as_json]


def test_train_hands_its_arguments_to_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import mlx_lm_lora.train as host

    config = tmp_path / "my.yaml"
    config.write_text("train_mode: sft\n")
    seen = []
    monkeypatch.setattr(host, "main", lambda: seen.append(sys.argv[1:]))

    assert cli.main(["train", "--config", str(config), "--help"]) == 0
    assert seen == [["--config", str(config), "--help"]]


@pytest.mark.parametrize("command", ["train", "check", "demo"])
def test_nothing_runs_while_the_plugin_is_turned_off(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLX_CPO_PLUGIN_DISABLE", "1")

    assert cli.main([command]) == 2
    assert capsys.readouterr().err == (
        "error: MLX_CPO_PLUGIN_DISABLE turns the plugin off; unset it to train with CPO.\n"
    )


def test_check_resolves_the_config_with_overrides(
    tmp_path: Path, checked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("train_mode: cpo\nbeta: 0.02\niters: 3\nepochs: 2\n")

    assert cli.main(["check", "--config", str(config), "--iters", "9"]) == 0

    (settings,) = checked
    assert (settings.beta, settings.iters) == (0.02, 9)
    assert capsys.readouterr().out.startswith("note: ")


def test_check_of_another_mode_is_refused(
    tmp_path: Path, checked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("train_mode: sft\ntrain: true\n")

    assert cli.main(["check", "--config", str(config)]) == 2

    assert checked == []
    assert capsys.readouterr().err.startswith(f"error: {config} asks for no train mode that `mlx-cpo check` knows")


def test_check_says_where_the_config_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "missing.yaml"

    assert cli.main(["check", "--config", str(config)]) == 2

    assert (
        capsys.readouterr().err
        == f"error: The configuration file {config} cannot be read (No such file or directory); check the path.\n"
    )


def test_a_mistake_is_one_sentence_without_a_traceback(
    tmp_path: Path, checked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("train_mode: cpo\ntrain: true\nbeta: 0\n")

    assert cli.main(["check", "--config", str(config)]) == 2

    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"error: beta is 0 in {config}, line 3, but must be a number > 0.\n"


def test_a_mistake_that_shows_later_is_one_sentence_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigError("something is wrong with the data.")

    monkeypatch.setattr(data_check, "run_check", refuse)

    assert cli.main(["check", "--train", "--train-mode", "cpo"]) == 2
    assert capsys.readouterr().err == "error: something is wrong with the data.\n"

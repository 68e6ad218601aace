"""Which train mode a call asks for, and what its command line accepts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from mlx_lm_lora.train import build_parser as build_host_parser
from support.stranger_plugins import CompetingPlugin, registered

from mlx_cpo_plugin.errors import ConfigError, PluginError
from mlx_cpo_plugin.plugins import loss_types, train_modes
from mlx_cpo_plugin.settings import command_line, config
from mlx_cpo_plugin.settings.options import GROUPS
from mlx_cpo_plugin.settings.yaml_settings import parse_value


def write(folder: Path, content: str | Mapping[str, Any]) -> Path:
    file = folder / "my.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(dict(content)), encoding="utf-8")
    return file


@pytest.fixture
def competitor() -> Iterator[None]:
    with registered(CompetingPlugin()):
        yield


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (["--train-mode", "cpo"], "cpo"),
        (["--train-mode=cpo"], "cpo"),
        (["--train", "--train-m", "cpo"], "cpo"),
        (["--train"], None),
        ([], None),
        (["--train", "cpo"], None),
        (["--train-mode", "sft"], None),
        (["--train-mode", "dpo"], None),
        (["--train-mode", "cop"], None),
        (["--train-mode"], None),
        (["--help", "--train-mode", "cpo"], "cpo"),
        (["-h"], None),
        (["--he"], None),
        (["--list-reward-functions"], None),
        (["--beta", "high", "--train-mode", "cpo"], "cpo"),
        (["--group-size", "many", "--sft-loss-type", "none", "--train-mode", "cpo"], "cpo"),
        (["--unheard-of", "1", "--train-mode", "cpo"], "cpo"),
        (["--train-mode", "cpo", "--train-mode", "sft"], None),
        (["--model", "cpo"], None),
        (["-c", "my.yaml"], "cpo"),
        (["-cmy.yaml"], "cpo"),
        (["--config=my.yaml"], "cpo"),
        (["--conf", "my.yaml"], "cpo"),
        (["-c", "my.yaml", "--train-mode", "sft"], None),
        (["-c", "missing.yaml"], None),
        (["-c", "missing.yaml", "--train-mode", "cpo"], "cpo"),
    ],
)
def test_mode_that_a_command_line_asks_for(
    line: list[str],
    name: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path, "train_mode: cpo\n")
    monkeypatch.chdir(tmp_path)

    mode = command_line.requested_mode(line)

    assert (mode and mode.name) == name
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("train_mode: cpo\n", "cpo"),
        ("train_mode: 'cpo'  # mine\n", "cpo"),
        ("train_mode: sft\n", None),
        ("train_mode: sft\nbeta: [\n", None),
        ("train_mode:\n", None),
        ("beta: 0.1\n", None),
        ("", None),
        ("- train_mode\n", None),
        ("train_mode: cpo\nbeta: [\n", None),
        ('"train_mode": "cpo"\nbeta: 1\n', "cpo"),
        ('train_mode : "cpo"\nbeta: 1\nbeta: 2\n', "cpo"),
        ("beta: 1\n# caf\xe9\ntrain_mode: cpo\n", "cpo"),
        ("x:\n  train_mode: cpo\n", None),
    ],
)
def test_mode_that_a_yaml_file_asks_for_even_one_that_is_refused(
    content: str, name: str | None, tmp_path: Path
) -> None:
    file = write(tmp_path, content)

    found = [
        command_line.requested_mode(call)
        for call in (["-c", str(file)], {"config": file}, SimpleNamespace(config=file))
    ]

    assert [mode and mode.name for mode in found] == [name] * 3


def mistake(*line: str) -> ConfigError | None:
    """What a command line that is left to mlx-lm-lora is refused for."""
    try:
        command_line.refuse_mistakes(line)
    except ConfigError as error:
        return error
    return None


@pytest.mark.parametrize("name", ["cop", "CPO", "cpo_", "ccpo", "7", "[cpo]"])
def test_a_misspelt_mode_in_a_file_is_refused_with_its_line_and_the_modes_that_there_are(
    name: str, tmp_path: Path
) -> None:
    file = write(tmp_path, f"train: true\ntrain_mode: {name}\n")

    error = mistake("--config", str(file))

    assert error is not None
    assert (error.key, error.place) == ("train_mode", f"in {file}, line 2")
    assert {"sft", "cpo"} <= set(error.allowed.removeprefix("one of ").split(", "))


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo", "orpo", "grpo", "klpo", "xpo", "kto", ""])
def test_modes_of_mlx_lm_lora_and_those_that_resemble_none_of_ours_are_left_to_it(name: str, tmp_path: Path) -> None:
    assert mistake("-c", str(write(tmp_path, f"train_mode: {name}\n"))) is None


@pytest.mark.parametrize(
    "line", [[], ["--train-mode", "sft"], ["--beta", "high"], ["--config"], ["-h", "-c", "no.yaml"]]
)
def test_a_command_line_without_a_file_is_left_to_mlx_lm_lora(line: list[str]) -> None:
    assert mistake(*line) is None


def test_a_file_whose_mode_the_command_line_overrides_may_misspell_it(tmp_path: Path) -> None:
    assert mistake("-c", str(write(tmp_path, "train_mode: cop\n")), "--train-mode", "sft") is None


@pytest.mark.parametrize("content", ["train_mode: sft\nbeta: 1\nbeta: 2\n", "train_mode: sft\n1: 2\n"])
def test_a_file_that_mlx_lm_lora_takes_is_left_to_it(content: str, tmp_path: Path) -> None:
    assert mistake("-c", str(write(tmp_path, content))) is None


@pytest.mark.parametrize("content", ["", "- sft\n", "train_mode: sft\nbeta: [\n"])
def test_a_file_that_mlx_lm_lora_cannot_read_is_refused_whichever_mode_it_names(content: str, tmp_path: Path) -> None:
    file = write(tmp_path, content)

    error = mistake("-c", str(file))

    assert error is not None
    assert error.place.startswith(f"in {file}")


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    error = mistake("-c", str(tmp_path / "no.yaml"), "--train-mode", "sft")

    assert error is not None
    assert error.key == "config"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ({"train_mode": "cpo"}, "cpo"),
        ({"train_mode": None}, None),
        ({}, None),
        (argparse.Namespace(train_mode="cpo"), "cpo"),
        (argparse.Namespace(train_mode="sft", config=None), None),
        (SimpleNamespace(train_mode="cpo"), "cpo"),
        (SimpleNamespace(), None),
    ],
)
def test_mode_that_a_call_asks_for(call: Any, name: str | None) -> None:
    mode = command_line.requested_mode(call)

    assert (mode and mode.name) == name


@pytest.mark.usefixtures("judged")
def test_mode_from_elsewhere_is_found() -> None:
    mode = command_line.requested_mode(["--train-mode", "judged", "--temper", "2"])

    assert mode is not None
    assert mode.name == "judged"


@pytest.mark.usefixtures("competitor")
def test_other_modes_go_on_while_two_plugins_claim_one() -> None:
    assert command_line.requested_mode(["--train-mode", "sft"]) is None


@pytest.mark.usefixtures("competitor")
@pytest.mark.parametrize("call", [["--train-mode", "cpo"], {"train_mode": "cpo"}])
def test_claim_of_two_plugins_on_cpo_is_told_when_cpo_is_asked_for(call: Any) -> None:
    assert command_line.requested_mode(call) is not None
    with pytest.raises(PluginError, match="registered twice"):
        config.resolve(call)


def test_command_line_holds_only_what_was_given() -> None:
    assert vars(command_line.build_parser().parse_args(["--train"])) == {"train": True}


def test_command_line_accepts_all_flags_of_mlx_lm_lora() -> None:
    flags = {flag for action in build_host_parser()._actions for flag in action.option_strings}

    assert flags <= set(command_line.build_parser()._option_string_actions)


def test_every_option_stands_in_a_group_with_its_default() -> None:
    flags = command_line.build_parser()._option_string_actions

    for option in command_line.known_options(train_modes().values(), loss_types().values()).values():
        help, _, default = str(flags[option.flag].help).replace("%%", "%").partition(" (default: ")
        assert option.group in GROUPS
        assert help == option.help
        if option.type is not dict:  # of which only what is not empty is shown
            expected = "none" if option.default is None else option.default
            assert parse_value(default.removesuffix(")")) == expected, option.name


def groups_of(text: str) -> dict[str, str]:
    """The groups of a help text by their headings."""
    parts = re.split(r"^(\S.*):$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_help_begins_with_the_losses_and_ends_with_other_modes() -> None:
    groups = groups_of(command_line.build_parser().format_help())

    assert list(groups) == ["options", *GROUPS, "other train modes of mlx-lm-lora"]
    for loss in loss_types().values():
        assert f"{loss.name} {loss.formula}" in " ".join(groups["preference loss"].split())
    assert "--latent-weight" not in command_line.build_parser(other_modes=False).format_help()


def test_lines_of_the_help_fit_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    lines = command_line.build_parser().format_help().splitlines()

    choices = [line for line in lines if "{" in line]
    assert [line for line in lines if len(line) > 80 and line not in choices] == []


@pytest.mark.usefixtures("rank", "judged")
def test_help_lists_modes_losses_and_options_of_plugins_under_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.explicit(["--help"])

    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "{sigmoid,hinge,ipo,dpop,simpo,alphapo,rank}" in shown
    theirs = {heading: " ".join(text.split()) for heading, text in groups_of(shown).items() if heading[:5] == "from "}
    assert len(theirs) == 2
    assert any("Margin of the ranking. (default: 0.5)" in text for text in theirs.values())
    assert any("How strict the judge is, 1 being 100 %." in text for text in theirs.values())
    assert "--no-fuse" in shown


@pytest.mark.parametrize(
    ("line", "all_modes"),
    [
        (["--help"], True),
        (["-h"], True),
        (["--he"], True),
        (["--beta", "high", "-h"], True),
        (["--train-mode", "sft", "--help"], False),
        (["-c", "my.yaml", "--help"], False),
        (["--train"], False),
        (["--train-mode"], False),
    ],
)
def test_help_is_that_of_all_modes_unless_one_is_named(line: list[str], all_modes: bool) -> None:
    assert command_line.asks_for_all_help(line) is all_modes

"""YAML files: numbers, lines of keys, and files that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import LIKE_OTHER_YAML

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.settings import config, yaml_settings
from mlx_cpo_plugin.settings.yaml_settings import SettingsLoader, dump_settings, parse_settings, parse_value

TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(LIKE_OTHER_YAML)


def write(folder: Path, content: str | Mapping[str, Any]) -> Path:
    file = folder / "my.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(dict(content)), encoding="utf-8")
    return file


def from_words(*line: str) -> SimpleNamespace:
    return config.resolve(list(line)).settings


def refusal(file: Path) -> ConfigError:
    """The error for a file."""
    with pytest.raises(ConfigError) as caught:
        yaml_settings.read_yaml(file)
    return caught.value


def test_exponent_without_a_dot_is_a_number(tmp_path: Path) -> None:
    file = write(tmp_path, "a: 1e-5\nb: -2E+3\nc: .5\nd: 1.\ne: 12\nf: 1e\ng: .inf\nh: e5\ni: 1:30.5\n")

    assert yaml_settings.read_yaml(file).values == {
        "a": 1e-5,
        "b": -2000.0,
        "c": 0.5,
        "d": 1.0,
        "e": 12,
        "f": "1e",
        "g": float("inf"),
        "h": "e5",
        "i": "1:30.5",
    }


@given(st.floats(allow_nan=False))
def test_every_float_as_python_or_json_writes_it_is_read_back(number: float) -> None:

    text = repr(number).replace("inf", ".inf")

    assert parse_value(text) == number
    assert isinstance(parse_value(text), float)


@pytest.mark.parametrize("value", ["12:30", "1:30.5", "010", "-0777", "08", "0o17", "2026-11-26", "0b", "0x"])
def test_what_yaml_1_1_makes_another_number_of_is_text(value: str, tmp_path: Path) -> None:
    file = write(tmp_path, f"train_mode: cpo\ntrain: true\niters: {value}\n")

    assert yaml_settings.read_yaml(file).values["iters"] == value
    with pytest.raises(ConfigError) as caught:
        from_words("-c", str(file))
    assert (caught.value.key, caught.value.place) == ("iters", f"in {file}, line 3")


@pytest.mark.parametrize(("value", "number"), [("0", 0), ("-12", -12), ("1_000", 1000), ("0x1f", 31), ("0b101", 5)])
def test_whole_numbers(value: str, number: int) -> None:
    assert parse_value(value) == number


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(TEXTS, VALUES, min_size=1, max_size=3), st.booleans())
def test_what_is_written_is_read_back_here_and_by_every_user_of_pyyaml(values: dict[str, Any], flow: bool) -> None:
    text = dump_settings(values, flow=flow)

    assert parse_settings(text, "x.yaml").values == values
    assert yaml.safe_load(text) == values


def test_other_users_of_pyyaml_see_no_change() -> None:
    theirs, ours = yaml.SafeLoader.yaml_implicit_resolvers, SettingsLoader.yaml_implicit_resolvers

    assert ours is not theirs
    assert all(ours[first] is not theirs[first] for first in theirs)


def test_lines_of_nested_keys_are_known(tmp_path: Path) -> None:
    file = write(tmp_path, "model: m\nlora_parameters:\n  rank: 4\nhf_dataset:\n- path: p\n  config: {name: x}\n")

    assert yaml_settings.read_yaml(file).lines == {
        "model": 1,
        "lora_parameters": 2,
        "lora_parameters.rank": 3,
        "hf_dataset": 4,
        "hf_dataset.0": 5,
        "hf_dataset.0.path": 5,
        "hf_dataset.0.config": 6,
        "hf_dataset.0.config.name": 6,
    }


def test_anchors_and_merges_are_followed(tmp_path: Path) -> None:
    content = "train_mode: cpo\ntrain: true\nlora_parameters: &l {rank: 4}\njudge_config: {<<: *l, rank: 2}\n"

    resolved = from_words("-c", str(write(tmp_path, content)))

    assert (resolved.lora_parameters["rank"], resolved.judge_config) == (4, {"rank": 2})


@pytest.mark.parametrize(
    ("content", "key", "line"),
    [
        ("", "", None),
        ("# only a comment\n", "", None),
        ("- beta\n- delta\n", "", None),
        ("beta\n", "", None),
        ("beta: 1\nbeta: 2\n", "beta", 2),
        ("lora_parameters:\n  rank: 1\n  rank: 2\n", "lora_parameters.rank", 3),
        ("a: 1\n? [b]\n: 2\n", "", 2),
        ("beta: 1\ndelta: 2: 3\n", "", 2),
        ("a: 1\n---\nb: 2\n", "", 2),
        ("a: 1\nb: \x07\n", "", 2),
        ("a: !!timestamp 2024-99-99\n", "", None),
        ("a: 1\nb: !!python/object/apply:os.getcwd []\n", "", 2),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_line(
    content: str, key: str, line: int | None, tmp_path: Path
) -> None:
    file = write(tmp_path, content)

    error = refusal(file)

    assert (error.key, error.place) == (key, f"in {file}" + (f", line {line}" if line else ""))


@pytest.mark.parametrize("name", ["no.yaml", ".", "a\0b"])
def test_a_file_that_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / name).key == "config"


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_bytes(b"beta: 0.1\n# caf\xe9\n")

    error = refusal(file)

    assert error.place == f"in {file}, line 2"
    assert "UTF-8" in str(error)


def test_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_bytes(b"\xef\xbb\xbfbeta: 0.1\n")

    assert yaml_settings.read_yaml(file).values == {"beta": 0.1}

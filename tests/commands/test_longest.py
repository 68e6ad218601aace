"""``mlx-cpo check --longest`` says how long a pair may be, by shapes."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.refusals import refused

from mlx_cpo_plugin import cli
from mlx_cpo_plugin.commands import longest
from mlx_cpo_plugin.commands.longest import SAVINGS, estimate, longest_pair, pair_of, run_longest, shares_of
from mlx_cpo_plugin.errors import ConfigError, DataError
from mlx_cpo_plugin.plugins import train_modes
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.types import TrainMode

SHARES = (0.5, 0.25, 0.25)


@pytest.fixture
def own_model(model_folder: Path, tmp_path: Path) -> Path:
    """A model whose files a test may change."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def given(own_model: Path, data_folder: Path) -> dict[str, Any]:
    return {"model": str(own_model), "data": str(data_folder), "train": True, "train_mode": "cpo"}


def printed(given: dict[str, Any], mode: TrainMode | None = None) -> str:
    stream = io.StringIO()
    run_longest(config.resolve(given).settings, mode or train_modes()["cpo"], stream)
    return stream.getvalue()


def table(text: str) -> dict[str, list[int]]:
    """The lengths of each line by its title."""
    lines = [line for line in text.splitlines() if line.startswith(("  as given", "  with "))]
    return {line[:36].strip(): [int(word.replace(",", "")) for word in line[36:].split()] for line in lines}


def test_the_table_has_a_line_for_each_saving_and_evaluates_no_array(given: dict[str, Any]) -> None:
    before = mx.get_active_memory()
    mx.reset_peak_memory()

    lines = table(printed(given))

    assert mx.get_peak_memory() - before < 100_000
    assert list(lines) == ["as given", *(f"with {key}" for key in SAVINGS), "with all of these"]
    assert all(tokens == prompt + chosen + rejected for tokens, prompt, chosen, rejected in lines.values())
    assert lines["with efficient_long_context"][0] > lines["as given"][0]


def test_a_setting_that_does_not_fit_the_model_is_told_as_by_a_run(given: dict[str, Any]) -> None:
    given["lora_parameters"] = {"rank": 8, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.nowhere"]}

    with refused(ConfigError, "self_attn.nowhere", key="lora_parameters.keys"):
        printed(given)


@pytest.mark.parametrize("key", SAVINGS)
def test_what_the_settings_save_already_is_no_line_of_its_own(given: dict[str, Any], key: str) -> None:
    assert f"with {key}" not in table(printed({**given, key: True}))


def test_a_model_that_is_quantised_on_disk_is_not_quantised_again(given: dict[str, Any], own_model: Path) -> None:
    file = own_model / "config.json"
    before = printed(given)
    found = {**json.loads(file.read_text(encoding="utf-8")), "quantization": {"group_size": 32, "bits": 4}}
    file.write_text(json.dumps(found), encoding="utf-8")

    assert "with load_in_4bits" in table(before)
    assert "with load_in_4bits" not in table(printed(given))


def test_a_pair_is_split_like_the_largest_one_of_the_data() -> None:
    pair = pair_of(1000, (0.7, 0.2, 0.1))

    assert (len(pair.prompt), len(pair.chosen), len(pair.rejected)) == (700, 200, 100)
    assert shares_of(pair) == (0.7, 0.2, 0.1)


@pytest.mark.parametrize("setting", [{}, {"efficient_long_context": True}], ids=str)
def test_more_memory_never_shortens_the_pair_which_fits_and_one_token_more_does_not(
    given: dict[str, Any], setting: dict[str, Any]
) -> None:
    found = estimate(config.resolve({**given, **setting}).settings, [pair_of(64, SHARES)])
    memory = [found.weights + 2**power for power in range(20, 34, 2)]

    pairs = [longest_pair(found, SHARES, device) for device in memory]

    tokens = [0 if pair is None else pair.tokens for pair in pairs]
    assert tokens == sorted(tokens)
    assert tokens[-1] > 100 * max(1, tokens[0])
    for pair, device in zip(pairs, memory, strict=True):
        if pair is not None:
            assert found.total_with(pair) <= device < found.total_with(pair_of(pair.tokens + 4, SHARES))


def test_where_not_even_the_weights_fit_no_pair_does(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longest, "device_memory", lambda: 1000)

    assert "as given                                  none\n" in printed(given)


def test_a_model_of_unknown_shapes_is_refused_in_a_sentence(given: dict[str, Any], own_model: Path) -> None:
    (own_model / "config.json").write_text('{"model_type": "unheard_of"}', encoding="utf-8")

    with refused(ConfigError, key="model"):
        printed(given)


def test_a_mode_that_reads_its_own_rows_is_refused(given: dict[str, Any]) -> None:
    stranger = replace(train_modes()["cpo"], load_dataset=lambda *_: ([], [], []))

    with refused(ConfigError, key="train_mode"):
        printed(given, stranger)


def test_data_without_pairs_for_training_is_refused(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longest, "load_splits", lambda *_: ([], [], []))

    with refused(DataError, key="data"):
        printed(given)


def test_the_command_takes_it_beside_the_arguments_of_a_run(
    given: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["pytest"])
    words = ["check", "--model", given["model"], "--data", given["data"], "--train-mode", "cpo", "--longest"]

    assert cli.main(words) == 0
    assert "as given" in table(capsys.readouterr().out)

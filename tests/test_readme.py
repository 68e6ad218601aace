"""What the README shows is run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from mlx_lm.utils import load_tokenizer

from mlx_cpo_plugin import cli, cpo, data, plugins
from mlx_cpo_plugin.settings.options import SUBSTRATE_OPTIONS
from mlx_cpo_plugin.settings.presets import PRESETS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def config(settings: dict[str, Any], tmp_path: Path) -> Path:
    """The README's config, with a tiny model and rows in place of those that it names."""
    (text,) = blocks("yaml")
    values = yaml.safe_load(text)
    local = {key: settings[key] for key in ("model", "data", "adapter_path")}
    assert set(local) <= set(values)
    for key, value in local.items():
        text = re.sub(rf"^{key}: \S+", f"{key}: {value}", text, flags=re.MULTILINE)
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return path


def test_the_config_trains_with_the_values_that_it_shows(
    config: Path, run_main: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_main({"config": str(config)})

    lines = [json.loads(line) for line in (tmp_path / "adapters" / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["valid", "train", "valid", "test"]
    assert lines[1]["iteration"] == 3  # an epoch of 10 rows in batches of 4
    assert lines[1]["learning_rate"] == pytest.approx(5e-6)
    assert "hooks active" in capsys.readouterr().out


def test_the_config_can_be_checked(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not cli.main(["check", "--config", str(config)])

    assert "10" in capsys.readouterr().out


def test_every_row_is_read(settings: dict[str, Any], tmp_path: Path) -> None:
    (rows,) = blocks("json")
    (tmp_path / "rows.jsonl").write_text(rows)
    tokenizer = load_tokenizer(settings["model"])
    from mlx_cpo_plugin.settings.config import resolve

    resolved = resolve({**settings, "data": str(tmp_path / "rows.jsonl")}).settings

    train, _, _ = data.load_dataset(resolved, tokenizer)

    assert len(train) == len(rows.splitlines())
    for pair in train:
        answer = pair.chosen[pair.chosen_scored].tolist()
        assert tokenizer.decode(answer).removesuffix("<|im_end|>").strip()


def test_the_loss_registers_and_computes() -> None:
    (code,) = blocks("python")
    module = ModuleType("readme")
    exec(code, vars(module))
    manager = plugins.get_plugin_manager()
    manager.register(module, name="readme")
    try:
        rank = plugins.loss_types()["rank"]
    finally:
        manager.unregister(module)

    import mlx.core as mx

    value = rank.fn(mx.array([-1.0]), mx.array([-2.0]), rank_margin=1.5)
    assert value.item() == pytest.approx(0.5)  # 1.5 - (-1 + 2)


def test_the_settings_tables_name_every_option_of_cpo_with_its_default() -> None:
    of_losses = [option for loss in cpo.register_loss_types() for option in loss.options]
    for option in (cpo.LOSS, cpo.CPO_ALPHA, *of_losses):
        assert re.search(rf"\| `{option.name}` \| `?{option.default}`? \|", README)
    for loss in plugins.loss_types():
        assert f"| `{loss}` |" in README
    for preset in PRESETS:
        values = [f"`{name}: {value}`" for name, value in preset.values.items()]
        assert f"| `{preset.name}` | {', '.join(values)} |" in README


def test_every_key_that_the_readme_mentions_exists() -> None:
    known = {option.name for option in (*SUBSTRATE_OPTIONS, *cpo.register_train_modes()[0].options)}
    (settings_section,) = re.findall(r"^## Settings\n(.*?)^## ", README, flags=re.MULTILINE | re.DOTALL)
    words = set(re.findall(r"`([a-z]+_[a-z_0-9]+)`", settings_section))

    assert words - known == {"nll_loss"}  # a metric


def test_the_commands_exist() -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    subcommands = {match for line in commands for match in re.findall(r"mlx-cpo (\w+)", line)}

    for subcommand in subcommands:
        ended = subprocess.run(
            [sys.executable, "-m", "mlx_cpo_plugin", subcommand, "--help"], capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, subcommand
    assert subcommands == {"bench", "check", "compare", "convert", "doctor", "demo", "report", "studio"}

"""What the README and the pages in docs/ show is run, and what exists is in them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from mlx_lm.utils import load_tokenizer
from support.prepared import Prepared, run_module
from support.tiny import CHAT_TEMPLATE

import mlx_cpo_plugin
from mlx_cpo_plugin import cli, data, plugins
from mlx_cpo_plugin.settings.command_line import known_options
from mlx_cpo_plugin.settings.config import resolve
from mlx_cpo_plugin.settings.cpo_options import PRESETS
from mlx_cpo_plugin.sweep.plan import KEYS, read_sweep

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.rglob("*.md")}
PAGES = {name: text for name, text in PAGES.items() if re.fullmatch(r"(docs/)?[\w-]+\.md", name)}
README = PAGES["README.md"]
FOR_USERS = {name: text for name, text in PAGES.items() if name == "README.md" or name.startswith("docs/")}


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.MULTILINE | re.DOTALL)


def without_numbers(text: str) -> list[str]:
    return [re.sub(r"-?\d+(\.\d+)?(e-\d+)?", "N", line) for line in text.splitlines()]


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


def test_the_config_trains_with_the_values_that_it_shows_and_prints_what_the_readme_shows(
    config: Path, run_main: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_main({"config": str(config)})

    rows = [json.loads(line) for line in (tmp_path / "adapters" / "metrics.jsonl").read_text().splitlines()]
    lines = [row for row in rows if row["kind"] != "sample"]
    assert [line["kind"] for line in lines] == ["valid", "train", "valid", "test"]
    assert lines[1]["iteration"] == 3  # an epoch of 10 rows in batches of 4
    assert lines[1]["learning_rate"] == pytest.approx(2e-5)
    printed = re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out).replace(str(tmp_path) + "/", "")
    shown = [text for text in blocks("text") if "hooks active" in text]
    assert len(shown) == 1
    # On a terminal a sentence goes on in further lines. Of some the end depends on the machine or the config.
    whole = re.sub(r"\n  +", " ", shown[0])
    starts = [
        re.split(r"; BLAS|; beta| \(weights| epoch|(?<=Set:)|: loss -N ±| --model", line)[0]
        for line in without_numbers(whole)
    ]
    for start in filter(None, starts):
        assert any(line.startswith(start) for line in without_numbers(printed)), start


def test_the_config_can_be_checked(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not cli.main(["check", "--config", str(config)])

    assert "10" in capsys.readouterr().out


@pytest.mark.parametrize("page", [name for name in FOR_USERS if blocks("json", name)])
def test_every_row_is_read(page: str, settings: dict[str, Any], tmp_path: Path) -> None:
    rows = "".join(blocks("json", page))
    (tmp_path / "rows.jsonl").write_text(rows)
    tokenizer = load_tokenizer(settings["model"])
    with_calls = CHAT_TEMPLATE.replace(
        "<|im_end|>", "{{ message.tool_calls | tojson if message.tool_calls }}<|im_end|>"
    )
    values = {**settings, "data": str(tmp_path / "rows.jsonl"), "chat_template": with_calls}
    resolved = resolve(values).settings

    train, _, _ = data.load_dataset(resolved, tokenizer)

    assert len(train) == len(rows.splitlines())
    for pair in train:
        answer = pair.chosen[pair.chosen_scored].tolist()
        assert tokenizer.decode(answer).removesuffix("<|im_end|>").strip()


def test_the_loss_registers_and_computes() -> None:
    (code,) = blocks("python", "docs/plugins.md")
    module = ModuleType("docs")
    exec(code, vars(module))
    manager = plugins.get_plugin_manager()
    manager.register(module, name="docs")
    try:
        rank = plugins.loss_types()["rank"]
    finally:
        manager.unregister(module)

    import mlx.core as mx

    value = rank.fn(mx.array([-1.0]), mx.array([-2.0]), rank_margin=1.5)
    assert value.item() == pytest.approx(0.5)  # 1.5 - (-1 + 2)


def options() -> dict[str, Any]:
    return known_options(plugins.train_modes().values(), plugins.loss_types().values())


def default_in_words(value: Any) -> str:
    if isinstance(value, dict):
        return f"`{yaml.safe_dump(value, default_flow_style=True, sort_keys=False).strip()}`"
    if isinstance(value, str):
        return f"`{value}`"
    return {"None": "none", "True": "true", "False": "false"}.get(str(value), str(value))


def documented_defaults(page: str) -> list[tuple[str, str]]:
    """Names and defaults in the tables that have a column of defaults beside that of names."""
    tables = re.findall(r"^\| \w+ \| default \|.*\n((?:\|.*\n)+)", FOR_USERS[page], flags=re.MULTILINE)
    return [row for table in tables for row in re.findall(r"^\| `(\w+)` \| (.*?) \|", table, flags=re.MULTILINE)]


def test_the_settings_page_has_every_option_with_its_default() -> None:
    documented = documented_defaults("docs/settings.md")

    assert sorted(documented) == sorted((name, default_in_words(option.default)) for name, option in options().items())


@pytest.mark.parametrize("page", [name for name in FOR_USERS if documented_defaults(name)])
def test_defaults_are_the_same_on_every_page(page: str) -> None:
    for name, default in documented_defaults(page):
        assert default == default_in_words(options()[name].default), name


def test_the_page_about_losses_has_every_loss_and_preset() -> None:
    page = PAGES["docs/losses.md"]
    for loss in plugins.loss_types():
        assert f"| `{loss}` |" in page
    for preset in PRESETS:
        values = [f"`{name}: {value}`" for name, value in preset.values.items()]
        assert f"| `{preset.name}` | {', '.join(values)} |" in page


@pytest.mark.parametrize("page", FOR_USERS)
def test_every_key_in_yaml_exists(page: str) -> None:
    for block in blocks("yaml", page):
        if page == "docs/sweep.md":
            continue
        values = yaml.safe_load(block)
        assert set(values) <= {*options(), "train_mode"}
        resolve({"train_mode": "cpo", "train": True, **values})  # which refuses values and what contradicts itself
    for key in re.findall(r"`([a-z_0-9]+): [^`]*`", FOR_USERS[page]):
        assert key in {*options(), "train_mode", "rank_margin", *OF_OTHERS}, key


def test_the_sweep_that_the_page_shows_is_one(settings: dict[str, Any], tmp_path: Path) -> None:
    (block,) = blocks("yaml", "docs/sweep.md")
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "sweep.yaml").write_text(block)

    sweep = read_sweep(tmp_path / "sweep.yaml")

    assert len(sweep.runs) == (4 + 4) * 3
    assert set(yaml.safe_load(block)) == {*KEYS} - {"output"}


# Keys that the pages quote from elsewhere: configurations of other trainers, and notes.
OF_OTHERS = {"halve_at", "rl", "stage", "pref_loss", "enable_thinking"}


@pytest.mark.slow
def test_the_commands_exist_and_none_is_missing(tmp_path: Path) -> None:
    def help_of(*words: str) -> str:
        output = tmp_path / "-".join(("help", *words))
        ended = Prepared(run_module, "mlx_cpo_plugin", *words, "--help", output=output).ended()
        assert ended.code == 0, words
        return ended.printed

    documented = {match for text in FOR_USERS.values() for match in re.findall(r"\bmlx-cpo (\w+)", text)}

    assert documented == set(re.findall(r"^    (\w+) ", help_of(), flags=re.MULTILINE))
    for command in documented:
        help_of(command)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", PAGES[page]):
        file, _, heading = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("page", PAGES)
def test_every_module_and_test_that_is_named_exists(page: str) -> None:
    package = Path(mlx_cpo_plugin.__file__).parent
    for name in set(re.findall(r"`(?:mlx_cpo_plugin/)?((?:[a-z_]+/)*[a-z_]+\.py)`", PAGES[page])):
        assert (ROOT if name.startswith("tests/") else package).joinpath(name).exists(), name

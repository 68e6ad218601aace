"""Plugins: the hooks, what strangers add through them, and what happens when a stranger's plugin is broken."""

from __future__ import annotations

import json
import re
import sys
import textwrap
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from support.fresh_environment import FreshEnvironment, add_distribution, installed_environment
from support.stranger_plugins import CompetingPlugin, RankPlugin, registered

from mlx_cpo_plugin import hookspecs, plugins
from mlx_cpo_plugin.errors import PluginError
from mlx_cpo_plugin.types import LossType, Option

RANK = """
import mlx.core as mx
from mlx_cpo_plugin import LossType, Option, hookimpl


def rank(chosen_logps, rejected_logps, beta, rank_margin):
    return mx.maximum(rank_margin - beta * (chosen_logps - rejected_logps), 0)


@hookimpl
def register_loss_types():
    beta = Option("beta", float, 2.0, "Temperature.", above=0)
    margin = Option("rank_margin", float, 0.5, "Margin.", minimum=0, shown_when={"dpo_cpo_loss_type": ("rank",)})
    return [
        LossType("rank", "RRHF", rank, "max(0, rank_margin - beta * logits)", options=(beta, margin),
                 length_normalised=True)
    ]
"""


def hooks() -> list[str]:
    return [name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT_NAME}_spec")]


@pytest.fixture
def environment() -> FreshEnvironment:
    """The plugin installed from a wheel."""
    return installed_environment("wheel")


@pytest.fixture
def rank_config(settings: dict) -> dict:
    return {**settings, "dpo_cpo_loss_type": "rank", "rank_margin": 0.3, "beta": 1.5}


def write(tmp_path: Path, config: dict) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@pytest.mark.slow
def test_a_third_party_loss_is_accepted_listed_validated_and_trained(
    environment: FreshEnvironment, rank_config: dict, tmp_path: Path
) -> None:
    path = add_distribution(tmp_path, "rank-loss", RANK)
    config = write(tmp_path, rank_config)

    def run(*words: str) -> CompletedProcess[str]:
        return environment.run(environment.host_script, "--config", config, *words, PYTHONPATH=path)

    listed = json.loads(environment.printed("-m", "mlx_cpo_plugin", "losses", "--json", PYTHONPATH=path))
    from_yaml = run()
    from_flags = run("--dpo-cpo-loss-type", "rank", "--rank-margin", "9")
    refused = run("--rank-margin", "-1")
    write(tmp_path, {**rank_config, "rank_margin": -1})
    refused_with_line = run()

    (entry,) = [entry for entry in listed if entry["name"] == "rank"]
    assert [option["name"] for option in entry["options"]] == ["beta", "rank_margin"]
    assert from_yaml.returncode == 0, from_yaml.stderr
    assert from_flags.returncode == 0, from_flags.stderr
    first, second = (float(re.search(r"Iter 1: loss ([\d.]+)", run.stdout).group(1)) for run in (from_yaml, from_flags))
    assert second - first > 5  # the margin that the flag asks for is wider by 8.7
    assert refused.returncode == refused_with_line.returncode == 2
    assert "rank_margin" in refused.stderr
    assert f"rank_margin is -1 in {config}, line " in refused_with_line.stderr
    assert "but must be a number >= 0" in refused_with_line.stderr


@pytest.mark.slow
def test_a_broken_plugin_is_named_and_skipped(environment: FreshEnvironment, settings: dict, tmp_path: Path) -> None:
    path = add_distribution(tmp_path, "broken-loss", "raise RuntimeError('half installed')")

    ended = environment.run(environment.host_script, "--config", write(tmp_path, settings), PYTHONPATH=path)

    assert ended.returncode == 0, ended.stderr
    assert "broken_loss" in ended.stderr
    assert "broken-loss 1.0 is skipped: RuntimeError: half installed" in ended.stderr


@pytest.mark.slow
def test_two_plugins_with_one_name_are_an_error_that_names_both(
    environment: FreshEnvironment, settings: dict, tmp_path: Path
) -> None:
    for name in ("rank-loss", "other-rank"):
        path = add_distribution(tmp_path, name, RANK)
    command = [environment.host_script, "--config", write(tmp_path, settings)]

    ended = environment.run(*command, PYTHONPATH=path)
    blocked = environment.run(*command, PYTHONPATH=path, MLX_CPO_PLUGIN_BLOCK="other_rank")

    assert ended.returncode == 2
    assert "'rank' is registered twice" in ended.stderr
    assert "rank-loss 1.0" in ended.stderr
    assert "other-rank 1.0" in ended.stderr
    named = re.search(r"block it with MLX_CPO_PLUGIN_BLOCK=(\w+) or MLX_CPO_PLUGIN_BLOCK=(\w+)\.", ended.stderr)
    assert named is not None
    assert {*named.groups()} == {"rank_loss", "other_rank"}
    assert blocked.returncode == 0, blocked.stderr


def test_the_built_in_mode_and_losses_come_through_the_hooks() -> None:
    manager = plugins.get_plugin_manager()

    (built_in,) = [row for row in plugins.registered_distributions() if row["plugin"] == plugins.BUILT_IN]

    assert {mode.name for modes in manager.hook.register_train_modes() for mode in modes} == {"cpo"}
    assert built_in["loss_types"] == ["sigmoid", "hinge", "ipo", "dpop", "simpo", "alphapo"]
    assert list(plugins.loss_types())[:6] == built_in["loss_types"]


def test_a_mode_that_another_plugin_has_is_an_error() -> None:
    with registered(CompetingPlugin()), pytest.raises(PluginError, match="train mode 'cpo' is registered twice"):
        plugins.train_modes()


@pytest.mark.parametrize("name", ["seed", "preset", "cpo_alpha"])
def test_a_loss_whose_option_is_a_setting_of_every_run_is_named_and_skipped(name: str) -> None:
    class Claiming(RankPlugin):
        @hookspecs.hookimpl
        def register_loss_types(self) -> list:
            return [LossType("claims", "Claims", lambda *_, **__: None, "", options=(Option(name, float, 2.5, ""),))]

    with registered(Claiming()), pytest.warns(RuntimeWarning, match=f"claims has an option {name}, which is a setting"):
        assert "claims" not in plugins.loss_types()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"name": ["x"]}, "the name of a mode or loss must be text"),
        ({"name": ""}, "the name of a mode or loss must be text"),
        ({"fn": None}, "bad has no function where one is called"),
        ({"options": (Option("config", float, 2.5, ""),)}, "an option called 'config', which cannot be one"),
        ({"options": (Option("train_mode", str, "", ""),)}, "an option called 'train_mode', which cannot be one"),
        ({"options": (Option("my-o", float, 2.5, ""),)}, "an option called 'my-o', which cannot be one"),
        ({"options": (Option("own", set, None, ""),)}, "the option own of bad is of no type that options have"),
    ],
)
def test_a_loss_that_would_fail_where_it_is_used_is_named_and_skipped(values: dict[str, Any], reason: str) -> None:
    class Bad(RankPlugin):
        @hookspecs.hookimpl
        def register_loss_types(self) -> list:
            return [LossType(**{"name": "bad", "title": "", "fn": lambda *_: None, "formula": "", **values})]

    with registered(Bad()), pytest.warns(RuntimeWarning, match=reason):
        assert list(plugins.loss_types())[:1] == ["sigmoid"]


def test_a_hook_that_ends_the_process_is_named_and_skipped() -> None:
    class Leaving(RankPlugin):
        @hookspecs.hookimpl
        def register_loss_types(self) -> list:
            sys.exit("no licence")

    with registered(Leaving()), pytest.warns(RuntimeWarning, match="SystemExit: no licence"):
        assert "sigmoid" in plugins.loss_types()


def entry_point(name: str, distribution: str, value: str = "types:ModuleType") -> EntryPoint:
    found = EntryPoint(name, value, hookspecs.ENTRY_POINT_GROUP)
    vars(found)["dist"] = SimpleNamespace(name=distribution, version="1.0")
    return found


def test_of_two_entry_points_with_one_name_the_second_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [entry_point("losses", "first"), entry_point("losses", "first"), entry_point("losses", "second")]
    given.append(entry_point(plugins.BUILT_IN, "third"))
    monkeypatch.setattr(plugins, "entry_points", lambda **_: given)

    with pytest.warns(RuntimeWarning) as told:
        manager = plugins.get_plugin_manager.__wrapped__()

    texts = [str(warning.message) for warning in told]
    assert len(texts) == 2
    assert texts[0].startswith(
        "Plugin 'losses' from second 1.0 is skipped: PluginError: first 1.0 has one of this name"
    )
    assert texts[1].startswith(f"Plugin '{plugins.BUILT_IN}' from third 1.0 is skipped")
    assert manager.has_plugin(plugins.BUILT_IN)


def test_a_hook_that_returns_something_else_is_named_and_skipped() -> None:
    class Wrong(RankPlugin):
        @hookspecs.hookimpl
        def register_loss_types(self) -> list:
            return ["rank"]

    with registered(Wrong()), pytest.warns(RuntimeWarning, match="must return LossType objects, not str"):
        assert "rank" not in plugins.loss_types()


@pytest.mark.parametrize("hook", hooks())
def test_every_hook_has_types_a_paragraph_and_an_example_that_runs(hook: str) -> None:
    function = getattr(hookspecs, hook)
    paragraph, _, example = function.__doc__.partition("Example::\n")
    module = ModuleType("example")
    exec(textwrap.dedent(example), vars(module))

    manager = plugins.get_plugin_manager()
    manager.register(module, name="example")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (row,) = [row for row in plugins.registered_distributions() if row["plugin"] == "example"]
    finally:
        manager.unregister(module)

    assert len(paragraph.split()) > 20
    assert function.__annotations__["return"]
    assert row["train_modes"] or row["loss_types"]


def test_every_hook_is_documented_and_called_in_a_test() -> None:
    tests = Path(__file__).parent
    page = (tests.parent / "docs" / "plugins.md").read_text(encoding="utf-8")

    assert len(hooks()) >= 2
    for hook in hooks():
        assert f"`{hook}`" in page
        assert any(f"def {hook}" in path.read_text() for path in tests.rglob("*.py"))

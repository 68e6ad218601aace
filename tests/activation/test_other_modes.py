"""With the plugin installed, a run in one of mlx-lm-lora's own train modes is the run that it is without the plugin."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fresh_environment import installed_environment

pytestmark = pytest.mark.slow

# Calls the host with every function that would load or train replaced by one that records what it was given.
RECORD = """
import contextlib, io, json, sys, types
import mlx.nn as nn
import mlx_lm_lora.train as host

records = []

def plain(value):
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (types.SimpleNamespace, host.SFTTrainingArgs)) or type(value).__name__ == "Namespace":
        return plain(vars(value))
    return type(value).__name__

def recorder(name, result=None):
    def record(*positional, **named):
        records.append([name, plain(positional), plain(named)])
        return result
    return record

model = nn.Sequential(nn.Linear(2, 2))
host.from_pretrained = recorder("from_pretrained", (model, "tokenizer", "adapters.safetensors"))
host.load = recorder("load", (model, "tokenizer"))
host.load_dataset = recorder("load_dataset", ([1], [2], [3]))
host.load_adapters = recorder("load_adapters")
host.save_pretrained_merged = recorder("save_pretrained_merged")
for mode in ("sft", "dpo", "orpo"):
    setattr(host, "train_" + mode, recorder("train_" + mode))
host.evaluate_sft = recorder("evaluate_sft", (1.0, 2))
for mode in ("dpo", "orpo"):
    setattr(host, "evaluate_" + mode, recorder("evaluate_" + mode, (1.0, [0.0, 0.0], 2, {"margins": 0.5})))

def outcome_of(arguments):
    records.clear()
    console = isinstance(arguments, list)
    sys.argv = before = ["mlx_lm_lora.train", *(arguments if console else [])]
    printed, errors, ended = io.StringIO(), io.StringIO(), "returned"
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            host.main() if console else host.main(arguments)
        except (Exception, SystemExit) as error:
            ended = repr(error)
    return {
        "calls": list(records), "ended": ended, "printed": printed.getvalue(), "errors": errors.getvalue(),
        "argv": "untouched" if sys.argv is before else sys.argv,
    }

calls = json.load(open("calls.json"))
print(json.dumps({name: outcome_of(arguments) for name, arguments in calls.items()}))
"""

Outcomes = tuple[dict[str, Any], dict[str, Any]]

YAML = """\
train_mode: {mode}
train: true
test: true
beta: 0.7
delta: 3.0
unknown_key: 1
iters: 5
learning_rate: 1e-4
"""

CALLS: dict[str, Any] = {
    "no arguments": [],
    "sft by default": ["--train", "--iters", "3"],
    "sft with a config": ["--config", "sft.yaml", "--batch-size", "2"],
    "sft with an abbreviated flag": ["--conf=sft.yaml", "--grad", "--val-b", "4"],
    "dpo": ["--train", "--train-mode", "dpo", "--beta", "0.3", "--dpo-cpo-loss-type", "ipo", "--test"],
    "dpo with a config": ["--config", "dpo.yaml", "--efficient-long-context"],
    "dpo over a cpo config": ["--config", "cpo.yaml", "--train-mode", "dpo"],
    "orpo": ["--train", "--train-mode", "orpo", "--epochs", "2"],
    "main of sft": {"train": True, "iters": 4, "fuse": False},
    "main of dpo": {"train": True, "train_mode": "dpo", "config": "dpo.yaml", "beta": 0.2},
    "a mistake": ["--train-mode", "sft", "--batch-size", "many"],
    "an unknown flag": ["--train-mode", "sft", "--chosen-feature", "good"],
    "an unknown mode": ["--train-mode", "nonsense"],
    "a config that is no YAML": ["--config", "broken.yaml"],
}
# Without the plugin these end in a traceback.
UNREADABLE: dict[str, Any] = {
    "a missing config": ["--config", "missing.yaml"],
    "an empty config": ["--config", "empty.yaml"],
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What each call did with the plugin and without: functions, their arguments, how it ended, what it printed."""
    folder = tmp_path_factory.mktemp("calls")
    for mode in ("sft", "dpo", "cpo"):
        (folder / f"{mode}.yaml").write_text(YAML.format(mode=mode))
    (folder / "broken.yaml").write_text("train_mode: sft\n  - [")
    (folder / "empty.yaml").write_text("")
    (folder / "calls.json").write_text(json.dumps({**CALLS, **UNREADABLE, "cpo": ["--config", "cpo.yaml"]}))
    environment = installed_environment("wheel")
    with_plugin = environment.printed("-c", RECORD, folder=folder)
    without = environment.printed("-c", RECORD, folder=folder, MLX_CPO_PLUGIN_DISABLE="1")
    return json.loads(with_plugin), json.loads(without)


def test_other_modes_call_the_same_functions_with_the_same_arguments(outcomes: Outcomes) -> None:
    with_plugin, without = outcomes

    for name in CALLS:
        assert with_plugin[name] == without[name], name
        assert with_plugin[name]["argv"] == "untouched", name


def test_a_configuration_that_the_host_cannot_read_is_one_sentence(outcomes: Outcomes) -> None:
    with_plugin, without = outcomes

    for name in UNREADABLE:
        assert "SystemExit" not in without[name]["ended"]
        assert with_plugin[name]["ended"] == "SystemExit(2)"
        assert with_plugin[name]["errors"].startswith("error: ")
        assert with_plugin[name]["errors"].count("\n") == 1


def test_the_comparison_sees_what_runs_call(outcomes: Outcomes) -> None:
    _, without = outcomes

    reached = [name for name, _, _ in without["dpo"]["calls"]]
    expected = "from_pretrained load load_dataset train_dpo evaluate_dpo save_pretrained_merged"
    assert reached == expected.split(), without["dpo"]["ended"]
    _, _, named = without["sft with a config"]["calls"][2]
    assert named["args"]["batch_size"] == 2


def test_a_cpo_run_goes_another_way_with_the_plugin(outcomes: Outcomes) -> None:
    with_plugin, without = (outcome["cpo"] for outcome in outcomes)

    assert with_plugin["errors"].startswith("error: Unknown key unknown_key")
    assert with_plugin["calls"] == []
    assert without["calls"][0][0] == "from_pretrained"

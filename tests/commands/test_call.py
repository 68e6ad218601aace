"""``mlx_cpo_plugin.train``: what it takes and returns, and that it trains what the command trains."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pandas
import pytest
import yaml
from datasets import Dataset, DatasetDict
from mlx.utils import tree_flatten
from mlx_lm import generate, load
from support.refusals import refused
from support.stranger_plugins import JudgedPlugin, registered
from support.tiny import assert_same, parameters, preference_rows, saved_arrays

import mlx_cpo_plugin
from mlx_cpo_plugin import TrainingResult, cli
from mlx_cpo_plugin.activation.patches import resolved_settings
from mlx_cpo_plugin.data.reading import read_splits
from mlx_cpo_plugin.errors import ConfigError, DataError, StoppedError, UserError
from mlx_cpo_plugin.training.state import random_seed

RunMain = Callable[..., None]
Settings = dict[str, Any]
DOCS = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")

FEW = {"iters": 2, "batch_size": 2, "learning_rate": 1e-3, "steps_per_report": 1, "steps_per_sample": 0}
ROWS = preference_rows(6)


@pytest.fixture
def train(quick_runs: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., TrainingResult]:
    """The call, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return mlx_cpo_plugin.train


@pytest.mark.slow
def test_a_call_trains_what_the_command_trains_and_returns_it(
    settings: Settings, run_main: RunMain, train: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    run_main({**settings, "test": True})

    result = train(**{**settings, "test": True, "adapter_path": "mine"})

    assert result.adapter_path == tmp_path / "mine"
    ours, theirs = (saved_arrays(Path(folder) / "adapters.safetensors") for folder in ("mine", "adapters"))
    assert ours == theirs
    assert {name: value.tobytes() for name, value in parameters(result.model).items()} == ours
    assert not result.model.training
    assert isinstance(generate(result.model, result.tokenizer, "Please tell me", max_tokens=2), str)


@pytest.mark.slow
def test_the_result_has_every_report_and_the_newest_of_each_metric(
    settings: Settings, train: Callable[..., TrainingResult]
) -> None:
    result = train(**{**settings, "test": True, "steps_per_sample": 1})

    lines = [json.loads(line) for line in (result.adapter_path / "metrics.jsonl").read_text().splitlines()]
    assert result.history == lines
    newest = {line["kind"]: line for line in lines}
    assert {"valid", "train", "test", "sample"} <= newest.keys()
    for metric, kind in {"train_loss": "train", "val_margins": "valid", "test_loss": "test"}.items():
        assert result.metrics[metric] == newest[kind][metric]
    assert all(isinstance(value, int | float) for value in result.metrics.values())
    assert result.verdict is not None
    assert "history" not in repr(result)


@pytest.mark.slow
def test_a_resumed_call_returns_the_history_of_the_whole_run(
    settings: Settings, train: Callable[..., TrainingResult]
) -> None:
    train(**settings)

    result = train(**{**settings, "iters": 4, "resume": "auto"})

    assert [line["iteration"] for line in result.history if line["kind"] == "train"] == [1, 2, 3, 4]


FORMS: dict[str, Callable[[Path], Any]] = {
    "a list": lambda _: ROWS,
    "a generator": lambda _: (row for row in ROWS),
    "a Dataset": lambda _: Dataset.from_list(ROWS),
    "an iterable Dataset": lambda _: Dataset.from_list(ROWS).to_iterable_dataset(),
    "splits": lambda _: {"train": ROWS, "valid": ROWS[:2]},
    "a DatasetDict": lambda _: DatasetDict(train=Dataset.from_list(ROWS), validation=Dataset.from_list(ROWS[:2])),
    "a path": lambda folder: folder / "rows.jsonl",
    "a path of a split": lambda folder: {"train": folder / "rows.jsonl"},
    "a list of paths": lambda folder: [folder / "rows.jsonl"],
}


@pytest.fixture(scope="module")
def trained_on_rows(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The adapter that comes of a file of the rows."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    result = mlx_cpo_plugin.train(
        str(model_folder), str(folder / "rows.jsonl"), **FEW, adapter_path=str(folder / "adapters")
    )
    return parameters(result.model)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_rows_in_any_form_train_the_same_adapter(
    form: str,
    model_folder: Path,
    train: Callable[..., TrainingResult],
    tmp_path: Path,
    trained_on_rows: dict[str, np.ndarray],
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    result = train(model_folder, FORMS[form](tmp_path), **FEW, val_batches=0)

    assert_same(parameters(result.model), trained_on_rows)


@pytest.mark.slow
def test_rows_by_split_are_trained_validated_and_tested_on(
    model_folder: Path, train: Callable[..., TrainingResult]
) -> None:
    result = train(model_folder, {"train": ROWS, "dev": ROWS[:3], "test": ROWS[:2]}, **FEW, test=True)

    assert {"train_loss", "val_loss", "test_loss"} <= result.metrics.keys()


@pytest.mark.slow
def test_a_loaded_model_gets_the_adapter_in_place_and_is_not_named(
    model_folder: Path, train: Callable[..., TrainingResult]
) -> None:
    model, tokenizer = load(str(model_folder))

    result = train((model, tokenizer), ROWS, **FEW)

    assert result.model is model
    assert result.tokenizer is tokenizer
    (file,) = result.adapter_path.glob("adapters.safetensors")
    assert_same(parameters(model), {name: np.array(value) for name, value in mx.load(str(file)).items()})
    assert not {"model", "data"} & yaml.safe_load((result.adapter_path / "run_settings.yaml").read_text()).keys()
    reloaded, _ = load(str(model_folder), adapter_path=str(result.adapter_path))
    tokens = mx.array([[5, 6, 7]])
    assert mx.array_equal(reloaded(tokens), model(tokens))


@pytest.mark.slow
def test_commands_that_are_advised_need_no_name_that_the_call_has_not_given(
    model_folder: Path, train: Callable[..., TrainingResult], capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(load(str(model_folder)), {"train": ROWS, "valid": ROWS[:2]}, **FEW)

    printed = capsys.readouterr().out
    (advised,) = re.findall(r"^Compare: +mlx-cpo (.*)$", printed, flags=re.MULTILINE)
    assert "Fuse:" not in printed
    assert cli.main([word.replace("MODEL", str(model_folder)) for word in shlex.split(advised)]) == 0
    assert (result.adapter_path / "adapters.safetensors").is_file()


def outside_the_model() -> dict[str, Any]:
    """What a run may change only while it lasts."""
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("mlx_lm.models.") and module]
    owners = [nn, mx, mx.fast, nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.Module, nn.losses, *modules]
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    return {
        **{f"{owner} {name}": value for owner in owners for name, value in vars(owner).items()},
        "signals": signals,
        "streams": (sys.stdout, sys.stderr, sys.argv),
        "hooks": (sys.excepthook, threading.excepthook),
        "random numbers": (random_seed(), [str(part) for part in np.random.get_state()]),
    }


@pytest.mark.slow
def test_one_process_trains_again_and_again_and_nothing_is_left_patched(
    model_folder: Path, train: Callable[..., TrainingResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["notebook", "--beta", "no number"])
    plain = train(model_folder, ROWS, **FEW, adapter_path="0")
    loaded = load(str(model_folder))
    before = outside_the_model()

    train(model_folder, ROWS, **FEW, adapter_path="1", train_type="dora", qat_enable=True, grad_checkpoint=True)
    train(
        model_folder, ROWS, **FEW, adapter_path="2", train_type="full", load_in_4bits=False, efficient_long_context=True
    )
    train(loaded, ROWS, **FEW, adapter_path="3", load_in_4bits=True, num_layers=1)

    assert outside_the_model() == before
    again = train(model_folder, ROWS, **FEW, adapter_path="4")
    assert_same(parameters(again.model), parameters(plain.model))


@pytest.mark.slow
def test_a_thread_trains_too(model_folder: Path, train: Callable[..., TrainingResult]) -> None:
    results: list[TrainingResult] = []
    thread = threading.Thread(target=lambda: results.append(train(model_folder, ROWS, **FEW)))

    thread.start()
    thread.join()

    assert results[0].metrics["train_loss"]


@pytest.mark.slow
def test_a_file_gives_what_the_call_does_not(
    settings: Settings, train: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({**settings, "beta": 0.3, "seed": 5}))

    result = train(config=tmp_path / "my.yaml", beta=0.2)

    used = yaml.safe_load((result.adapter_path / "run_settings.yaml").read_text())
    assert (used["beta"], used["seed"], used["iters"]) == (0.2, 5, 2)


@pytest.mark.slow
def test_fusing_is_asked_for_and_returns_the_fused_model(
    settings: Settings, train: Callable[..., TrainingResult]
) -> None:
    result = train(**{**settings, "fuse": True})

    assert not any("lora_a" in module for module in result.model.modules())
    written = mx.load(str(result.adapter_path / "model.safetensors"))
    assert {name for name, _ in tree_flatten(result.model.parameters())} == written.keys()


@pytest.mark.parametrize(
    ("mistake", "key", "allowed"),
    [
        ({"betta": 0.05}, "betta", "beta"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size", "batch_size"),
        ({"beta": -1}, "beta", "a number > 0"),
        ({"epochs": "two"}, "epochs", "a whole number >= 1 or null"),
        ({"lora_parameters": {"ranks": 4}}, "lora_parameters.ranks", "lora_parameters.rank"),
    ],
)
def test_a_wrong_keyword_is_the_error_that_a_wrong_key_is(
    mistake: Settings, key: str, allowed: str, train: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    with refused(ConfigError, key=key, place="in the call", allowed=allowed):
        train("a model", ROWS, **mistake)
    assert not list(tmp_path.iterdir())


def test_rows_are_no_data_of_a_mode_that_reads_its_own(
    model_folder: Path, train: Callable[..., TrainingResult]
) -> None:
    with registered(JudgedPlugin()), refused(ConfigError, key="data", place="in the call"):
        train(model_folder, ROWS, train_mode="judged")


@pytest.mark.parametrize("model", [7, [], ("model", "tokenizer"), nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model: Any, train: Callable[..., TrainingResult]) -> None:
    with refused(ConfigError, key="model", place="in the call"):
        train(model, ROWS)


@pytest.mark.parametrize("data", [ROWS[0], {}, {"valid": ROWS}, [], ["no row"], {"train": []}, {"train": "no.jsonl"}])
def test_what_holds_no_rows_to_train_on_is_refused(
    data: Any, model_folder: Path, train: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    with pytest.raises(DataError):
        train(model_folder, data)

    assert not (tmp_path / "adapters").exists()


@pytest.mark.parametrize(
    ("others", "place", "allowed"),
    [
        ({"vaild": ROWS[:2]}, "vaild", "valid"),
        ({"validaton": ROWS[:2]}, "validaton", "valid"),
        ({"held": ROWS[:2]}, "held", "train, valid, test"),
        ({"valid": 3}, "data['valid']", "a list of mappings"),
        ({"valid": True}, "data['valid']", "a list of mappings"),
        ({"valid": ROWS[0]}, "data['valid']", "a list of mappings"),
        ({"valid": ["row"]}, "data['valid']", "mappings"),
    ],
)
def test_a_mapping_with_what_is_no_split_is_refused(
    others: Any, place: str, allowed: str, model_folder: Path, train: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    with refused(DataError, key="data", place=place, allowed=allowed):
        train(model_folder, {"train": ROWS, **others})
    assert not list(tmp_path.iterdir())


def test_a_split_that_is_none_is_not_there_and_those_of_other_rows_are_passed_over(model_folder: Path) -> None:
    rows = {"train_prefs": ROWS, "train_sft": ["other rows"], "valid": None}

    found = read_splits(resolved_settings({"train_mode": "cpo", "train": True}), ("train", "valid"), rows)

    assert [len(group.rows) for group in found["train"]] == [len(ROWS)]
    assert not found["valid"]


def test_a_table_of_columns_is_told_how_to_give_its_rows(
    model_folder: Path, train: Callable[..., TrainingResult]
) -> None:
    with refused(DataError, "DataFrame.*to_dict", key="data"):
        train(model_folder, pandas.DataFrame(ROWS))


def test_a_misspelt_model_folder_is_told_with_the_one_that_is_there(
    train: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    (tmp_path / "models" / "smollm").mkdir(parents=True)

    with refused(ConfigError, "does not exist", key="model", allowed="models/smollm"):
        train("models/smolm", ROWS)
    with refused(ConfigError, "does not exist", key="model", allowed=""):
        train("./nowhere", ROWS)


def test_what_is_no_model_with_its_tokenizer_is_refused(
    model_folder: Path, train: Callable[..., TrainingResult]
) -> None:
    model, tokenizer = load(str(model_folder))

    for pair in ((model, None), (nn.Linear(2, 2), tokenizer)):
        with refused(ConfigError, key="model", place="in the call"):
            train(pair, ROWS)


def test_a_callback_without_the_methods_of_the_host_is_refused_before_loading(
    train: Callable[..., TrainingResult],
) -> None:
    with refused(ConfigError, key="training_callback", place="in the call"):
        train("a model", ROWS, training_callback=print)


@pytest.mark.slow
def test_a_test_without_a_folder_returns_its_metrics(
    model_folder: Path, train: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    result = train(model_folder, {"test": ROWS}, train=False, test=True, adapter_path="", batch_size=2)

    assert {"test_loss", "test_accuracies"} <= result.metrics.keys()
    assert [row["kind"] for row in result.history] == ["test"]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_data_is_refused(train: Callable[..., TrainingResult]) -> None:
    with refused(ConfigError, key="data", place="in the call"):
        train("a model", 7)


def test_a_loaded_model_that_has_an_adapter_or_is_to_be_fused_is_refused(
    model_folder: Path, train: Callable[..., TrainingResult]
) -> None:
    model, tokenizer = load(str(model_folder))

    with refused(ConfigError, key="fuse"):
        train((model, tokenizer), ROWS, fuse=True)

    model.layers[0].self_attn.q_proj.lora_a = mx.zeros(1)
    with refused(ConfigError, "has an adapter already", key="model", place="in the call"):
        train((model, tokenizer), ROWS)


@pytest.mark.slow
def test_a_call_with_a_loaded_model_that_was_stopped_is_made_again(
    model_folder: Path, train: Callable[..., TrainingResult]
) -> None:
    class Interrupting:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            signal.raise_signal(signal.SIGINT)

        def on_val_loss_report(self, info: dict[str, Any]) -> None:
            pass

    settings = {**FEW, "iters": 3, "save_every": 1, "steps_per_report": 1}
    straight = train(load(str(model_folder)), ROWS, **settings, adapter_path="straight")
    loaded = load(str(model_folder))
    with pytest.raises(StoppedError):
        train(loaded, ROWS, **settings, adapter_path="stopped", training_callback=Interrupting())
    assert not any("lora_a" in module for module in loaded[0].modules())

    result = train(loaded, ROWS, **settings, adapter_path="stopped", resume="auto")

    assert_same(parameters(result.model), parameters(straight.model))


@pytest.mark.slow
def test_what_fails_is_an_exception_and_never_an_exit(
    settings: Settings, train: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    for wrong in ({"model": "no/such/folder/here"}, {"data": "no/such/folder/here"}, {"resume": "nowhere"}):
        with pytest.raises(UserError):
            train(**{**settings, **wrong})


@pytest.mark.slow
def test_the_examples_of_the_page_run(
    model_folder: Path, data_folder: Path, train: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    mlx_cpo_plugin.activate()
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        assert '"iters"' not in block or '"iters": 100' in block
        here = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model_folder))
        exec(here.replace('"iters": 100', '"iters": 2'), names)

    assert len(blocks) == 3
    assert (tmp_path / "adapters" / "model.safetensors").is_file()  # main fuses
    assert (tmp_path / "mine" / "adapters.safetensors").is_file()

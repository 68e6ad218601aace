"""A whole run: what is wrong is said in one sentence before anything is written, and what is fused is complete."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load
from support.refusals import refused
from support.stranger_plugins import registered

from mlx_cpo_plugin import cli
from mlx_cpo_plugin.checkpoints.run_identity import read_record
from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.hookspecs import hookimpl
from mlx_cpo_plugin.run import mode as host_run
from mlx_cpo_plugin.run.mode import next_commands
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.training import metrics
from mlx_cpo_plugin.types import TrainMode

GENERATE = import_module("mlx_lm.generate")  # which the function of that name hides
Settings = dict[str, Any]
RunMain = Callable[..., None]


@pytest.fixture
def own_model(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be damaged or completed."""
    return Path(shutil.copytree(model_folder, tmp_path / "own_model"))


def with_broken_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights")


def with_unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')


def with_other_dimensions(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))


@pytest.mark.parametrize("damage", [with_broken_weights, with_unknown_architecture, with_other_dimensions])
def test_a_model_that_cannot_be_loaded_is_one_sentence(
    settings: Settings, run_main: RunMain, own_model: Path, damage: Callable[[Path], None]
) -> None:
    damage(own_model)

    with refused(match=r"\([^\n]*[^.]\);", key="model"):
        run_main({**settings, "model": str(own_model)})

    assert not Path(settings["adapter_path"]).exists()


@pytest.mark.parametrize("inner", ["", "adapters"])
def test_a_file_in_the_place_of_the_adapter_folder_is_found_before_anything_is_loaded(
    settings: Settings, run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    monkeypatch.setattr(host_run, "load_chat_tokenizer", lambda model: pytest.fail("the tokenizer was loaded"))
    (tmp_path / "file").write_text("")

    with refused(match="is a file", key="adapter_path", place=str(tmp_path / "file")):
        run_main({**settings, "adapter_path": str(tmp_path / "file" / inner)})


def test_an_adapter_folder_that_cannot_be_written_to_is_found_before_anything_is_loaded(
    settings: Settings, run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Permissions do not bind the superuser, so the answer of the operating system is given here.
    monkeypatch.setattr("os.access", lambda path, mode: False)

    with refused(match="cannot be written to", key="adapter_path", place=str(tmp_path)):
        run_main(settings)


def test_fuse_does_not_overwrite_the_model(settings: Settings, run_main: RunMain, own_model: Path) -> None:
    before = (own_model / "model.safetensors").read_bytes()

    with refused(match="the model's own folder", key="adapter_path"):
        run_main({**settings, "model": str(own_model), "adapter_path": str(own_model), "fuse": True})

    assert (own_model / "model.safetensors").read_bytes() == before


def test_a_test_without_an_adapter_says_so(settings: Settings, run_main: RunMain) -> None:
    with refused(match="to test", key="adapter_path"):
        run_main({**settings, "train": False, "test": True})


def test_a_test_alone_needs_no_folder_that_can_be_written_to(
    settings: Settings, run_main: RunMain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main(settings)
    # Permissions do not bind the superuser, so whatever would write fails here.
    monkeypatch.setattr(host_run, "only_run_in", lambda folder: pytest.fail("the folder was locked"))

    def refuse(path: Path, line: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(metrics, "_append", refuse)

    run_main({**settings, "train": False, "test": True})

    assert "Test Results" in capsys.readouterr().out


def test_a_test_alone_fuses_nothing_and_reads_the_test_rows_only(
    settings: Settings, run_main: RunMain, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main(settings)
    capsys.readouterr()

    run_main({**settings, "train": False, "test": True, "fuse": True})

    assert [line for line in capsys.readouterr().out.splitlines() if " rows" in line or "none." in line] == [
        "\x1b[94m[INFO]\x1b[0m Test: 4 rows, 4 pairs."
    ]
    assert not (Path(settings["adapter_path"]) / "model.safetensors").exists()


@pytest.mark.parametrize("changes", [{"data": "nowhere/"}, {"model": "nowhere/at/all"}])
def test_nothing_is_written_or_reported_before_data_and_model_are_known_to_be_good(
    settings: Settings, run_main: RunMain, monkeypatch: pytest.MonkeyPatch, changes: Settings
) -> None:
    client = ModuleType("wandb")
    client.__file__ = __file__
    client.init = lambda **_: pytest.fail("W&B was started")  # type: ignore[attr-defined]  # a module of this test's own
    monkeypatch.setitem(sys.modules, "wandb", client)

    with pytest.raises(UserError):
        run_main({**settings, "wandb": "project", **changes})

    assert not Path(settings["adapter_path"]).exists()


@pytest.fixture
def chat_model(own_model: Path) -> Path:
    """A model whose turns end with another token than its tokenizer's EOS, as those of Gemma and Llama 3 do."""
    tokenizer = json.loads((own_model / "tokenizer_config.json").read_text())
    (own_model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": "<|endoftext|>"}))
    config = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps(config | {"eos_token_id": [0], "architectures": ["Some"]}))
    (own_model / "generation_config.json").write_text('{"eos_token_id": [0, 2], "temperature": 0.5}')
    return own_model


@pytest.mark.parametrize("exported", [False, True], ids=["beside the adapter", "into LM Studio"])
def test_a_fused_model_ends_its_turns_where_the_base_model_does(
    settings: Settings,
    run_main: RunMain,
    chat_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exported: bool,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".lmstudio" / "models").mkdir(parents=True)
    fused = tmp_path / ".lmstudio/models/mlx_lm_lora/mine" if exported else Path(settings["adapter_path"])

    run_main({**settings, "model": str(chat_model), "fuse": True, "lm_studio_name": "mine" if exported else None})

    _, tokenizer, config = load(str(fused), return_config=True)
    assert tokenizer.eos_token_ids == {0, 2}
    assert config["architectures"] == ["Some"]
    assert json.loads((fused / "generation_config.json").read_text())["temperature"] == 0.5


@pytest.fixture
def quantised_model(model_folder: Path, tmp_path: Path) -> Path:
    """The model with weights of 4 bits."""
    from mlx_lm import convert

    convert(str(model_folder), str(tmp_path / "quantised"), quantize=True, q_bits=4, q_group_size=64)
    return tmp_path / "quantised"


def test_a_quantised_model_that_was_fused_without_quantisation_says_so(
    settings: Settings, run_main: RunMain, quantised_model: Path
) -> None:
    run_main({**settings, "model": str(quantised_model), "fuse": True, "fuse_bits": 16})

    fused, _, config = load(settings["adapter_path"], return_config=True)
    assert not {"quantization", "quantization_config"} & set(config)
    assert not any(hasattr(module, "bits") for module in fused.modules())


def test_an_adapter_over_a_quantised_base_is_fused_without_rounding_it(
    settings: Settings, run_main: RunMain, quantised_model: Path
) -> None:
    run_main(
        {**settings, "model": str(quantised_model), "fuse": True, "fuse_bits": 16, "iters": 20, "learning_rate": 1e-2}
    )

    fused, _ = load(settings["adapter_path"])
    adapted, _ = load(str(quantised_model), adapter_path=settings["adapter_path"])
    tokens = mx.array([[5, 6, 7, 8]])
    assert mx.allclose(fused(tokens), adapted(tokens), atol=1e-3)


def test_a_quantised_model_is_not_quantised_again(settings: Settings, run_main: RunMain, quantised_model: Path) -> None:
    with refused(match="quantised already", key="load_in_8bits"):
        run_main({**settings, "model": str(quantised_model), "load_in_8bits": True})


def test_an_interrupted_command_ends_with_one_sentence_and_its_exit_code(
    settings: Settings, run_main: RunMain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(host_run, "train_mode", interrupted)
    places = [f"--{key.replace('_', '-')}={settings[key]}" for key in ("model", "data", "adapter_path")]
    monkeypatch.setattr(sys, "argv", ["mlx_lm_lora.train", "--train", "--train-mode=cpo", "--no-fuse", *places])

    with pytest.raises(SystemExit) as ended:
        run_main()

    assert ended.value.code == 130
    assert "interrupted: the adapter that was saved last, if any, is in adapter_path" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):  # a program that calls main is told as it is used to
        run_main(settings)


def test_the_commands_that_a_run_ends_with_work(
    settings: Settings, run_main: RunMain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown() -> dict[str, list[str]]:
        lines = re.findall(r"^(Compare|Generate|Fuse): +(.*)$", capsys.readouterr().out, flags=re.MULTILINE)
        return {name: shlex.split(command) for name, command in lines}

    def call(main: Callable[[], None], words: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", words)
        main()
        return words[0]

    folder = Path(settings["adapter_path"]).with_name("my adapters")
    run_main({**settings, "adapter_path": str(folder)})
    commands = shown()

    assert commands["Compare"][0] == "mlx-cpo"
    assert cli.main(commands["Compare"][1:]) == 0
    assert call(GENERATE.main, [*commands["Generate"], "--max-tokens", "1"]) == "mlx_lm.generate"
    capsys.readouterr()
    assert call(run_main, commands["Fuse"]) == "mlx_lm_lora.train"
    fused = shown()
    assert (folder / "config.json").is_file()
    assert fused.keys() == {"Compare", "Generate"}
    assert call(GENERATE.main, [*fused["Generate"], "--max-tokens", "1"]) == "mlx_lm.generate"


def test_a_finished_run_is_tested_again_on_other_rows_and_told_of_by_what_it_was_measured_on(
    settings: Settings, run_main: RunMain, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(settings["data"], tmp_path / "rows"))
    mine = {**settings, "data": str(data), "test": True, "val_batches": -1, "resume": "auto"}
    run_main(mine)
    folder = Path(settings["adapter_path"])
    first = read_record(folder)
    for split in ("test", "valid"):
        rows = (data / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (data / f"{split}.jsonl").write_text("".join(rows[:-1]))

    run_main(mine)
    run_main(mine)

    second = read_record(folder)
    assert first is not None
    assert second is not None
    assert second.data["test"]["pairs"] == first.data["test"]["pairs"] - 1
    assert second.data["valid"] == first.data["valid"]
    tests = [line for line in map(json.loads, (folder / "metrics.jsonl").open()) if line["kind"] == "test"]
    assert len(tests) == 2


def test_what_mlx_lm_would_load_otherwise_is_not_generated_with() -> None:
    quantised = next_commands(RunSettings(load_in_4bits=True, fuse=False), held_out=False)

    assert not any("mlx_lm.generate" in line for line in quantised)
    assert any("compare" in line and "--prompt" in line for line in quantised)


def test_what_the_base_models_template_would_render_otherwise_is_not_generated_with() -> None:
    settings = {"adapter_path": "a", "model": "m", "data": "d", "chat_template": "{{ messages }}"}

    adapter = next_commands(RunSettings(fuse=False, **settings), held_out=True)
    fused = next_commands(RunSettings(fuse=True, **settings), held_out=True)

    assert not any("mlx_lm.generate" in line for line in adapter)
    assert any("mlx_lm.generate" in line for line in fused)


def test_arguments_of_the_template_are_those_of_training_in_all_that_is_written_of_a_run(
    settings: Settings, run_main: RunMain, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main({**settings, "chat_template_kwargs": {"date": date(2026, 11, 28)}})

    folder = Path(settings["adapter_path"])
    asked = """--prompt 'Hi!' --chat-template-config '{"date": "2026-11-28"}'\n"""
    assert asked in capsys.readouterr().out
    assert asked in (folder / "README.md").read_text()
    assert cli.main(["export", str(folder), "--to", "mlx"]) == 0
    assert asked in capsys.readouterr().out
    assert asked in (folder.with_name(f"{folder.name}-mlx") / "README.md").read_text()


class OwnLoop:
    """A mode that trains by itself and writes an adapter alone; functions of its own may be others."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        self.functions = functions

    @hookimpl
    def register_train_modes(self) -> list[TrainMode]:
        def train(*, adapter_file: Path, **_: Any) -> None:
            adapter_file.parent.mkdir(parents=True, exist_ok=True)
            mx.save_safetensors(str(adapter_file), {"weight": mx.zeros(3)})

        mode = TrainMode("own", "Own", "", lambda *_: ((1, 2), (), ()), train, lambda *_: {})
        return [replace(mode, **self.functions)]


def of_own_loop(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key != "steps_per_sample"} | {"train_mode": "own"}


def test_a_mode_with_a_loop_of_its_own_gets_no_card_and_no_commands_that_would_fail(
    settings: Settings, run_main: RunMain, capsys: pytest.CaptureFixture[str]
) -> None:
    with registered(OwnLoop()):
        run_main(of_own_loop(settings))

    out = capsys.readouterr().out
    assert not any(word in out for word in ("Compare:", "Generate:", "Fuse:", "Model card:"))
    assert [file.name for file in Path(settings["adapter_path"]).glob("[!.]*")] == ["adapters.safetensors"]


def test_a_mode_that_writes_no_adapter_is_told(
    settings: Settings, run_main: RunMain, capsys: pytest.CaptureFixture[str]
) -> None:
    with registered(OwnLoop(train=lambda **_: None)):
        run_main(of_own_loop(settings))

    assert f"Warning: own has written no adapter to {settings['adapter_path']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "returned", "sentence"),
    [
        ("load_dataset", [[]], "load_dataset of the train mode 'own', from .*, returns .* must return three sequences"),
        ("load_dataset", ([1], 3, None), "returns list, but must return three sequences"),
        ("evaluate", None, "evaluate of the train mode 'own', from .*, returns NoneType, .* names to floats"),
        ("evaluate", {"accuracy": "good"}, "returns dict, but must return a mapping"),
    ],
)
def test_a_mode_that_returns_something_else_is_named(
    settings: Settings, run_main: RunMain, function: str, returned: Any, sentence: str
) -> None:
    strange = OwnLoop(load_dataset=lambda *_: ([1], [1], [1]))
    strange.functions[function] = lambda *_: returned

    with registered(strange), refused(match=sentence):
        run_main({**of_own_loop(settings), "test": True})


def test_what_is_done_is_told_from_what_another_call_asks_for(
    settings: Settings, run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused model of other bits, in another place or not there any more is made; one that is there is left alone."""
    (tmp_path / ".lmstudio" / "models").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    fused = Path(settings["adapter_path"]) / "model.safetensors"
    resumed = {**settings, "fuse": True, "resume": "auto", "fuse_bits": 4}
    run_main(resumed)
    size, written = fused.stat().st_size, fused.stat().st_mtime_ns

    run_main(resumed)
    assert fused.stat().st_mtime_ns == written
    run_main({**resumed, "fuse_bits": 8})
    assert fused.stat().st_size > size
    run_main({**resumed, "lm_studio_name": "elsewhere"})
    assert (tmp_path / ".lmstudio/models/mlx_lm_lora/elsewhere/model.safetensors").stat().st_size == size
    run_main({**resumed, "fuse_bits": 8})
    fused.unlink()
    run_main({**resumed, "fuse_bits": 8})
    assert fused.exists()


def test_a_kill_behind_a_fused_model_lets_no_other_one_pass_for_it(
    settings: Settings, run_main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Path(settings["adapter_path"]) / "config.json"
    resumed = {**settings, "fuse": True, "resume": "auto"}
    run_main({**resumed, "fuse_bits": 16})

    def killed(folder: Path, part: str, *_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(host_run, "record_done", killed)
        with pytest.raises(KeyboardInterrupt):
            run_main({**resumed, "fuse_bits": 8})
    assert "quantization" in json.loads(config.read_text())
    run_main({**resumed, "fuse_bits": 16})

    assert "quantization" not in json.loads(config.read_text())


def test_a_damaged_record_of_an_earlier_run_stops_no_new_one(settings: Settings, run_main: RunMain) -> None:
    run_main(settings)
    record = Path(settings["adapter_path"]) / "run_settings.yaml"
    record.write_text("{ damaged")

    run_main(settings)

    assert "train_mode: cpo" in record.read_text()


def test_a_mode_from_elsewhere_is_refused_in_the_folder_of_another_modes_run(
    settings: Settings, run_main: RunMain
) -> None:
    run_main(settings)
    adapter = Path(settings["adapter_path"]) / "adapters.safetensors"
    before = adapter.read_bytes()

    with registered(OwnLoop()), refused(match="holds a run of train_mode cpo; give another", key="adapter_path"):
        run_main(of_own_loop(settings))
    assert adapter.read_bytes() == before

    (adapter.parent / "run_settings.yaml").unlink()  # as a loop of another mode's own leaves it
    with registered(OwnLoop()), refused(match="holds an adapter; give another", key="adapter_path"):
        run_main(of_own_loop(settings))
    assert adapter.read_bytes() == before

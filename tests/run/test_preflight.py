"""What a run refuses before its first step, ``mlx-cpo check`` refuses in the same words; neither changes anything."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import pytest
import yaml
from filelock import FileLock
from support.refusals import refused
from support.tiny import saved_arrays

from mlx_cpo_plugin.checkpoints import LOCK
from mlx_cpo_plugin.commands import check as data_check
from mlx_cpo_plugin.commands.check import run_check
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import ConfigError, DataError, UserError
from mlx_cpo_plugin.plugins import train_modes
from mlx_cpo_plugin.run.building import build_optimizer, unevaluated_model
from mlx_cpo_plugin.run.mode import run_mode
from mlx_cpo_plugin.run.preflight import plan_notes, position_notes
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.settings.config import RunSettings

Configured = Callable[..., RunSettings]


@pytest.fixture
def configured(model_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configured:
    """Settings of a short run in an empty working directory, with changes."""
    monkeypatch.chdir(tmp_path)
    given = {"train_mode": "cpo", "train": True, "model": str(model_folder), "data": str(data_folder)}
    given |= {"adapter_path": str(tmp_path / "adapters"), "iters": 2, "batch_size": 2, "steps_per_sample": 0}
    return lambda **changed: config.resolve({**given, **changed}).settings


def check(settings: RunSettings) -> str:
    stream = io.StringIO()
    run_check(settings, train_modes()["cpo"], stream, examples=0)
    return stream.getvalue()


def run(settings: RunSettings) -> None:
    run_mode(settings, train_modes()["cpo"])


def refusal_of(what: Callable[[RunSettings], Any], settings: RunSettings) -> UserError:
    with pytest.raises(UserError) as caught:
        what(settings)
    return caught.value


def files_in(folder: Path) -> list[tuple[str, int]]:
    """Every file and when it was written; a lock, which older versions of filelock truncate, only by its name."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return sorted((str(path), 0 if path.name == LOCK else path.lstat().st_mtime_ns) for path in files)


def assert_both_refuse(configured: Configured, folder: Path, **changed: Any) -> None:
    before = files_in(folder)
    in_check = refusal_of(check, configured(**changed))
    assert files_in(folder) == before
    in_run = refusal_of(run, configured(**changed))

    assert str(in_check) == str(in_run)
    assert (type(in_check), in_check.key, in_check.place) == (type(in_run), in_run.key, in_run.place)


CONFIGS = {
    "an adapter path that is a file": {"adapter_path": "a_file"},
    "an adapter path that is empty": {"adapter_path": ""},
    "a run to resume that is not there": {"resume": "nowhere"},
    "an adapter to resume that is not there": {"resume_adapter_file": "nowhere.safetensors"},
    "an adapter of another kind": {"resume_adapter_file": "foreign.safetensors"},
    "modules that the model has not": {"lora_parameters": {"keys": ["nope"]}},
    "a model without weights": {"model": "no_weights"},
    "a model that is not there": {"model": "./nowhere"},
    "data that is not there": {"data": "./nowhere"},
    "rows that are too long": {"max_seq_length": 8, "overlong": "error"},
    "a template that is not there": {"chat_template": "nowhere.jinja"},
    "the model's own folder for the fused model": {"model": "no_weights", "adapter_path": "no_weights", "fuse": True},
    "the best of no validations": {"load_best": True, "val_batches": 0},
}


@pytest.mark.parametrize("changed", CONFIGS.values(), ids=CONFIGS.keys())
def test_check_refuses_what_a_run_refuses(
    configured: Configured, tmp_path: Path, model_folder: Path, changed: dict[str, Any]
) -> None:
    (tmp_path / "a_file").write_text("x", encoding="utf-8")
    mx.save_safetensors(str(tmp_path / "foreign.safetensors"), {"foreign": mx.zeros(3)})
    shutil.copytree(model_folder, tmp_path / "no_weights", ignore=shutil.ignore_patterns("*.safetensors"))

    assert_both_refuse(configured, tmp_path, **changed)


def test_check_refuses_to_resume_a_run_of_other_settings(configured: Configured, tmp_path: Path) -> None:
    run(configured(save_every=1))

    assert_both_refuse(configured, tmp_path, resume="auto", iters=4, learning_rate=1e-3)
    shutil.copytree(tmp_path / "adapters", tmp_path / "other")
    began = str(tmp_path / "other" / "adapters.safetensors")
    assert_both_refuse(configured, tmp_path, resume="auto", iters=4, resume_adapter_file=began)
    assert_both_refuse(configured, tmp_path, resume=str(tmp_path / "adapters"), iters=1, adapter_path="new")
    assert "Steps of the run: 4 iterations" in check(configured(resume="auto", iters=4))


def test_check_refuses_to_resume_with_another_schedule_that_parts_later(configured: Configured, tmp_path: Path) -> None:
    falls = {"name": "step_decay", "arguments": [1e-4, 0.1, 150]}
    run(configured(save_every=1, lr_schedule=falls))

    assert_both_refuse(
        configured, tmp_path, resume="auto", iters=4, lr_schedule={**falls, "arguments": [1e-4, 0.1, 160]}
    )
    assert "Steps of the run: 4 iterations" in check(configured(resume="auto", iters=4, lr_schedule=falls))


def test_check_refuses_a_folder_in_use_and_one_without_a_place_for_earlier_runs(
    configured: Configured, tmp_path: Path
) -> None:
    run(configured())
    with FileLock(tmp_path / "adapters" / LOCK):
        assert_both_refuse(configured, tmp_path)
    previous = tmp_path / "adapters" / "previous"
    previous.symlink_to(tmp_path)
    assert_both_refuse(configured, tmp_path)
    previous.unlink()
    previous.write_text("mine")

    assert_both_refuse(configured, tmp_path)


def test_check_refuses_tokens_that_the_model_does_not_know(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_few_words(settings: RunSettings) -> nn.Module:
        model = unevaluated_model(settings)
        model.args.vocab_size = 5
        return model

    monkeypatch.setattr(data_check, "unevaluated_model", of_few_words)

    with refused(DataError, "but the model's vocabulary ends at 4", key="data"):
        check(configured())


def test_an_adapter_that_was_put_aside_is_named_where_it_is_to_be_gone_on_from(
    configured: Configured, tmp_path: Path
) -> None:
    run(configured())
    run(configured(resume_adapter_file=str(tmp_path / "adapters" / "adapters.safetensors")))
    (aside,) = (tmp_path / "adapters" / "previous").glob("*/adapters.safetensors")
    (tmp_path / "adapters" / "adapters.safetensors").unlink()

    with refused(ConfigError, f"did you mean '{aside}'?", key="resume_adapter_file"):
        check(configured(resume_adapter_file=str(tmp_path / "adapters" / "adapters.safetensors")))


@pytest.mark.slow
def test_the_settings_of_a_run_repeat_it_also_where_what_it_began_with_was_put_aside(
    configured: Configured, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    own = {"resume_adapter_file": str(folder / "adapters.safetensors"), "save_every": 1}
    run(configured())
    run(configured(**own))
    run(configured(**own, iters=3, resume="auto"))
    (aside,) = (folder / "previous").glob("*/adapters.safetensors")

    repeated = yaml.safe_load((folder / "run_settings.yaml").read_text())
    assert repeated["resume_adapter_file"] == str(aside)
    run(config.resolve({**repeated, "adapter_path": str(tmp_path / "again")}).settings)

    assert arrays_in(tmp_path / "again") == arrays_in(folder)


def arrays_in(folder: Path) -> dict[str, bytes]:
    return saved_arrays(folder / "adapters.safetensors")


@pytest.mark.slow
def test_the_settings_of_a_run_that_began_from_a_checkpoint_name_it(configured: Configured, tmp_path: Path) -> None:
    run(configured(save_every=1))
    run(configured(resume=str(tmp_path / "adapters"), adapter_path="second", iters=4))

    repeated = yaml.safe_load((tmp_path / "second" / "run_settings.yaml").read_text())
    assert Path(repeated["resume"]).parent == tmp_path / "adapters" / "checkpoints"
    run(config.resolve({**repeated, "adapter_path": "third"}).settings)

    assert arrays_in(tmp_path / "third") == arrays_in(tmp_path / "second")


def test_check_tells_everything_that_is_refused(configured: Configured) -> None:
    stream, settings = io.StringIO(), configured(resume="nowhere", lora_parameters={"keys": ["nope"]})

    with pytest.raises(UserError, match=r"^resume is 'nowhere'"):
        run_check(settings, train_modes()["cpo"], stream, examples=0)

    assert "error: lora_parameters.keys has 'nope'" in stream.getvalue()
    assert "Train: 10 rows, 10 pairs." in stream.getvalue()


def test_what_is_refused_twice_is_told_once(configured: Configured) -> None:
    stream = io.StringIO()

    with pytest.raises(UserError, match=r"^resume is 'nowhere'"):
        run_check(configured(resume="nowhere"), train_modes()["cpo"], stream, examples=0)

    assert "error: " not in stream.getvalue()


def notes(configured: Configured, steps: int = 100, **changed: Any) -> list[str]:
    settings = configured(**changed)
    optimizer: optimizers.Optimizer = build_optimizer(settings, steps)
    return plan_notes(settings, optimizer, steps)


@pytest.mark.parametrize(
    ("optimizer", "usual", "far_too_large"), [("adam", 1e-3, 1.0), ("muon", 0.02, 5.0), ("sgd", 1.0, 100.0)]
)
def test_a_learning_rate_far_above_the_usual_is_noted(
    configured: Configured, optimizer: str, usual: float, far_too_large: float
) -> None:
    assert notes(configured, optimizer=optimizer, learning_rate=usual) == []
    (line,) = notes(configured, optimizer=optimizer, learning_rate=far_too_large)
    assert line.startswith(f"note: the learning rate reaches {far_too_large:g}; with {optimizer} up to ")


def test_the_rate_that_a_schedule_reaches_is_what_counts(configured: Configured) -> None:
    rises = {"name": "cosine_decay", "arguments": [1.0, 100], "warmup": 50}

    (line,) = notes(configured, learning_rate=1e-5, lr_schedule=rises)

    assert line.startswith("note: the learning rate reaches ")


def test_a_warmup_longer_than_the_run_is_noted_with_the_rate_that_it_reaches(configured: Configured) -> None:
    schedule = {"name": "constant", "warmup": 100}

    assert notes(configured, 101, learning_rate=1e-4, lr_schedule=schedule) == []
    assert notes(configured, 11, learning_rate=1e-4, lr_schedule=schedule) == [
        "note: lr_schedule.warmup makes 100 optimizer steps of warm-up, and the run has 11: the learning rate only "
        "reaches 1e-05."
    ]
    assert notes(configured, 3, learning_rate=1e-4, warmup_ratio=0.5) == []
    (line,) = notes(configured, 1, learning_rate=1e-4, warmup_ratio=0.5)
    assert line.startswith("note: warmup_ratio makes 1 optimizer steps of warm-up, and the run has 1")


def test_full_training_of_a_quantised_load_is_noted(configured: Configured) -> None:
    assert notes(configured, train_type="full") == []
    assert notes(configured, load_in_4bits=True) == []
    (line,) = notes(configured, train_type="full", load_in_4bits=True)
    assert "load_in_4bits" in line


@pytest.mark.parametrize("key", ["save_best", "early_stopping_patience", "eval_per_epoch"])
def test_settings_without_validation_are_named_by_check(configured: Configured, key: str) -> None:
    value = {"save_best": "loss", "early_stopping_patience": 2, "eval_per_epoch": True}[key]
    assert f"{key} has no effect" in check(configured(val_batches=0, **{key: value}))


def test_pairs_beyond_the_positions_of_the_model_are_noted(tmp_path: Path, build_pair: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 20}}))
    pairs: list[PreferencePair] = [build_pair(length, f"x:{length}") for length in (20, 22, 30)]

    assert position_notes(str(tmp_path), pairs[:1]) == []
    assert position_notes(str(tmp_path), pairs) == [
        "note: 2 pairs have more than the 20 positions that the model knows (first x:22, with 22 tokens); lower "
        "max_seq_length to 20."
    ]
    assert position_notes("some/model-that-is-not-here", pairs) == []


@pytest.fixture
def build_pair() -> Callable[[int, str], PreferencePair]:
    import numpy as np

    def build(length: int, source: str) -> PreferencePair:
        prompt, answer = np.arange(length - 3, dtype=np.int32), np.arange(3, dtype=np.int32)
        return PreferencePair(prompt, answer, answer[::-1], answer >= 0, answer >= 0, source)

    return build


def test_a_run_prints_the_notes_that_check_prints(
    configured: Configured, capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "short")
    file = tmp_path / "short" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 10}))
    changed = {"model": str(tmp_path / "short"), "learning_rate": 0.5}
    in_check = [line for line in check(configured(**changed)).splitlines() if line.startswith("note: ")][-2:]

    run(configured(**changed))

    printed = capsys.readouterr().out
    assert "learning rate" in in_check[0]
    assert "positions" in in_check[1]
    assert all(f"{line}\n" in printed for line in in_check)

"""Every key of the shared substrate has its effect on a CPO run that goes through the host's ``main``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load
from mlx_lm_lora import recurrent_patch
from support.refusals import refused
from support.tiny import assert_same, preference_rows

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.model import recompute as checkpointing
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer
from mlx_cpo_plugin.training import long_context, trainer
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs


@dataclass
class Outcome:
    """What a run left behind."""

    folder: Path
    output: str

    @property
    def adapter(self) -> dict[str, np.ndarray]:
        return {name: np.array(value) for name, value in mx.load(str(self.folder / "adapters.safetensors")).items()}

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "adapter_config.json").read_text())

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["kind"] == kind]


@pytest.fixture
def run(
    settings: dict[str, Any],
    run_main: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Outcome]:
    """Run with some settings changed, each time into a folder of its own."""
    folders = iter(tmp_path / f"run{number}" for number in range(9))

    def run(**changes: Any) -> Outcome:
        changed = {"adapter_path": str(next(folders)), **changes}
        run_main({**settings, **changed})
        return Outcome(Path(changed["adapter_path"]), capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def adapters() -> dict[str, dict[str, np.ndarray]]:
    """What runs trained, by their settings, so that runs that many tests compare with are trained once."""
    return {}


def differs(left: Outcome, right: Outcome) -> bool:
    return are_different(left.adapter, right.adapter)


def are_different(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    try:
        assert_same(left, right)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1e-4},
        {"optimizer": "adamw", "optimizer_config": {"adamw": {"weight_decay": 10.0}}},
        {"optimizer": "muon"},
        {"optimizer_config": {"adam": {"betas": [0.5, 0.5]}}},
        {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-2, 10]}},
        {"seed": 7},
        {"batch_size": 1},
        {"gradient_accumulation_steps": 2},
        {"iters": 3},
        {"max_seq_length": 48},
        {"lora_parameters": {"dropout": 0.5}},
        {"lora_parameters": {"scale": 1.0}},
        {"beta": 0.01},
        {"dpo_cpo_loss_type": "dpop"},
        {"dpo_cpo_loss_type": "dpop", "delta": 1.0},
        {"cpo_alpha": 1.0},
        {"label_smoothing": 0.2},
        {"dpo_cpo_loss_type": "simpo", "simpo_gamma": 2.0},
        {"dpo_cpo_loss_type": "alphapo", "alphapo_alpha": -1.0},
        {"preset": "cpo-paper"},
        {"qat_enable": True, "qat_bits": 2},
        {"qat_enable": True, "qat_bits": 2, "qat_group_size": 0},
        {"qat_enable": True, "qat_bits": 2, "qat_start_step": 2},
        {"qat_enable": True, "qat_bits": 2, "qat_interval": 2},
    ],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items())[:60],
)
def test_the_trained_adapter_depends_on_the_key(
    run: Callable[..., Outcome], changes: dict[str, Any], adapters: dict[str, dict[str, np.ndarray]]
) -> None:
    # The last key named is the one under test: the run beside it differs in nothing else.
    last = list(changes)[-1]
    without = {key: value for key, value in changes.items() if key != last}

    if str(without) not in adapters:
        adapters[str(without)] = run(**without).adapter

    assert are_different(run(**changes).adapter, adapters[str(without)])


def test_the_same_call_twice_gives_the_same_adapter_to_the_bit(run: Callable[..., Outcome]) -> None:
    first = run()
    mx.random.seed(4711)  # what the process drew before plays no part
    np.random.seed(4711)

    assert not differs(run(), first)


def test_the_final_test_holds_the_likelihood_as_validations_do(run: Callable[..., Outcome]) -> None:
    trained = str(run().folder)
    for cpo_alpha in (0.0, 0.5):
        tested = run(train=False, test=True, adapter_path=trained, cpo_alpha=cpo_alpha)
    without, with_nll = tested.metrics("test")

    assert with_nll["test_loss"] == pytest.approx(without["test_loss"] + 0.5 * without["test_nll_loss"])


def test_lora_parameters_set_the_rank(run: Callable[..., Outcome]) -> None:
    outcome = run(lora_parameters={"rank": 3})

    assert outcome.adapter["model.layers.0.self_attn.q_proj.lora_a"].shape == (128, 3)
    assert outcome.config["lora_parameters"] == {"rank": 3, "dropout": 0.0, "scale": 10.0}


@pytest.mark.parametrize("train_type", ["lora", "dora", "full"])
def test_train_type_decides_what_is_trained_and_mlx_lm_loads_it(
    run: Callable[..., Outcome], model_folder: Path, train_type: str
) -> None:
    outcome = run(train_type=train_type)

    leaves = {name.rsplit(".", 1)[-1] for name in outcome.adapter}
    expected = {"lora": {"lora_a", "lora_b"}, "dora": {"lora_a", "lora_b", "m"}, "full": {"weight"}}
    assert leaves == expected[train_type]
    assert outcome.config["fine_tune_type"] == train_type
    tuned, _ = load(str(model_folder), adapter_path=str(outcome.folder))
    base, _ = load(str(model_folder))
    tokens = mx.array([[5, 6, 7]])
    assert not mx.allclose(tuned(tokens), base(tokens), atol=1e-6)


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_num_layers_counts_from_the_last(run: Callable[..., Outcome], train_type: str) -> None:
    outcome = run(num_layers=1, train_type=train_type)

    assert {name.split(".")[2] for name in outcome.adapter} == {"1"}


@pytest.mark.parametrize(
    ("key", "bits", "mode", "train_type"),
    [
        ("load_in_4bits", 4, "affine", "dora"),
        ("load_in_6bits", 6, "affine", "lora"),
        ("load_in_8bits", 8, "affine", "lora"),
        ("load_in_mxfp4", 4, "mxfp4", "lora"),
        ("load_in_mxfp4", 4, "mxfp4", "dora"),
    ],
)
def test_quantised_loads_train_and_fuse(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, key: str, bits: int, mode: str, train_type: str
) -> None:
    loaded: list[dict[str, Any]] = []
    quantise = nn.quantize

    def quantise_and_note(model: nn.Module, **packing: Any) -> None:
        loaded.append(packing)
        quantise(model, **packing)

    monkeypatch.setattr(nn, "quantize", quantise_and_note)
    outcome = run(**{key: True}, fuse=True, train_type=train_type)

    assert (loaded[0]["bits"], loaded[0].get("mode", "affine")) == (bits, mode)
    assert "quantization" not in json.loads((outcome.folder / "config.json").read_text())
    fused, _ = load(str(outcome.folder))
    assert not hasattr(fused.layers[0].self_attn.q_proj, "bits")
    assert np.abs(outcome.adapter["model.layers.0.self_attn.q_proj.lora_b"]).max() > 0


def test_fuse_saves_the_merged_model_beside_the_adapter(run: Callable[..., Outcome], model_folder: Path) -> None:
    outcome = run(fuse=True)

    fused, _ = load(str(outcome.folder))
    adapted, _ = load(str(model_folder), adapter_path=str(outcome.folder))
    tokens = mx.array([[5, 6, 7]])
    assert mx.allclose(fused(tokens), adapted(tokens), atol=1e-4)
    assert not (run(fuse=False).folder / "model.safetensors").exists()


def test_lm_studio_name_exports_there(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with refused(key="lm_studio_name"):
        run(fuse=True, lm_studio_name="mine")
    (tmp_path / ".lmstudio" / "models").mkdir(parents=True)

    folder = tmp_path / ".lmstudio/models/mlx_lm_lora/mine"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "notes.txt"):
        (folder / name).write_text("somebody's")

    first = run(fuse=True, lm_studio_name="mine")
    run(adapter_path=str(first.folder), resume="auto", fuse=True, lm_studio_name="mine", fuse_bits=8)

    assert hasattr(load(str(folder))[0].layers[0].self_attn.q_proj, "bits")
    (aside,) = (folder / "previous").iterdir()
    assert {path.name: path.read_text() for path in aside.iterdir()} == dict.fromkeys(
        ("config.json", "model.safetensors", "model-00001-of-00002.safetensors"), "somebody's"
    )
    assert (folder / "notes.txt").read_text() == "somebody's"
    run(fuse=True, lm_studio_name="mine")  # another run
    (other,) = set((folder / "previous").iterdir()) - {aside}
    assert hasattr(load(str(other))[0].layers[0].self_attn.q_proj, "bits")


def test_epochs_count_passes_over_the_rows(run: Callable[..., Outcome]) -> None:
    outcome = run(epochs=2, iters=None, batch_size=4)

    assert outcome.metrics("train")[-1]["iteration"] == 6


def test_iters_default_to_the_hosts_hundred(run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    class BegunError(Exception):
        pass

    def begin(args: CPOTrainingArgs, **_: Any) -> None:
        raise BegunError(args.iters)

    monkeypatch.setattr(trainer, "train_cpo", begin)

    with pytest.raises(BegunError, match=r"^100$"):
        run(iters=None)


def test_reports_validations_and_saves_come_when_asked(run: Callable[..., Outcome]) -> None:
    outcome = run(iters=6, steps_per_report=2, steps_per_eval=3, save_every=4)

    assert [info["iteration"] for info in outcome.metrics("train")] == [2, 4, 6]
    assert [info["iteration"] for info in outcome.metrics("valid")] == [1, 3, 6]
    assert [file.name for file in outcome.folder.glob("0*")] == ["0000004_adapters.safetensors"]


def test_val_batches_limit_the_validation(run: Callable[..., Outcome]) -> None:
    two, everything, more = (run(val_batches=limit).metrics("valid")[0]["val_loss"] for limit in (1, -1, 2))

    assert two != everything
    assert everything == more


def test_test_prints_loss_accuracy_and_margin_but_no_perplexity(run: Callable[..., Outcome]) -> None:
    outcome = run(test=True)

    for label in ("Loss:", "Accuracy:", "Margin:"):
        assert label in outcome.output
    assert "erplexity" not in outcome.output
    assert outcome.metrics("test")[0]["test_loss"] > 0
    limited = run(test=True, test_batches=1, batch_size=1)
    assert limited.metrics("test")[0]["test_loss"] != outcome.metrics("test")[0]["test_loss"]


@pytest.mark.parametrize("train_type", ["lora", "dora", "full"])
def test_test_alone_evaluates_the_trained_adapter(run: Callable[..., Outcome], train_type: str) -> None:
    trained = run(test=True, train_type=train_type)

    again = run(train=False, test=True, train_type=train_type, adapter_path=str(trained.folder))

    first, second = again.metrics("test")
    assert second["test_loss"] == pytest.approx(first["test_loss"], rel=1e-6)


def test_resume_adapter_file_starts_from_its_weights(run: Callable[..., Outcome]) -> None:
    first = run()
    resumed = run(iters=1, learning_rate=1e-12, resume_adapter_file=str(first.folder / "adapters.safetensors"))

    assert_same(resumed.adapter, first.adapter, tolerance=1e-6)


def test_a_missing_resume_adapter_file_is_an_error_before_anything_is_written(
    run: Callable[..., Outcome], tmp_path: Path
) -> None:
    with refused(key="resume_adapter_file"):
        run(resume_adapter_file="nowhere.safetensors", adapter_path=str(tmp_path / "untouched"))

    assert not (tmp_path / "untouched").exists()


def test_hf_dataset_entries_are_loaded_without_train_mode_in_them(run: Callable[..., Outcome], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"q": r["prompt"], "a": r["chosen"], "b": r["rejected"]}) + "\n" for r in preference_rows(10)
        )
    )
    entry = {
        "path": "json",
        "config": {"data_files": str(rows)},
        "train_split": "train[:80%]",
        "valid_split": "train[-20%:]",
        "prompt_feature": "q",
        "chosen_feature": "a",
        "rejected_feature": "b",
    }

    outcome = run(hf_dataset=[entry], epochs=1, iters=None, batch_size=1)

    assert outcome.metrics("train")[-1]["iteration"] == 8
    assert outcome.metrics("valid")


def test_grad_checkpoint_recomputes_every_layer(run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = mx.checkpoint, []
    monkeypatch.setattr(checkpointing.mx, "checkpoint", lambda function: calls.append(1) or original(function))

    plain = run()
    assert not calls
    checkpointed = run(grad_checkpoint=True)

    assert len(calls) >= 2 * 2
    assert_same(checkpointed.adapter, plain.adapter, tolerance=1e-4)


def test_efficient_long_context_goes_in_segments_above_the_step_size(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, sizes = long_context.pieces, []
    monkeypatch.setattr(long_context, "pieces", lambda segment, size: sizes.append(size) or original(segment, size))

    run(efficient_long_context=True)
    assert not any(sizes)  # no pair is longer than 512 tokens
    run(efficient_long_context=True, seq_step_size=16)

    assert [size for size in sizes if size] == [16] * 3 * 4  # the shared part and both answers of four pairs


@pytest.mark.parametrize("scoring", ["shared", "plain"])
def test_scoring_decides_whether_prompts_are_computed_once(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, scoring: str
) -> None:
    original, shared = SharedPromptScorer.score, []
    monkeypatch.setattr(
        SharedPromptScorer, "score", lambda *args, **named: shared.append(1) or original(*args, **named)
    )

    outcome = run(scoring=scoring)

    assert bool(shared) == (scoring == "shared")
    assert_same(outcome.adapter, run().adapter, tolerance=1e-3)


def test_batch_tokens_decides_how_many_pairs_are_in_a_batch(run: Callable[..., Outcome]) -> None:
    whole = run(batch_tokens=100_000, batch_size=1, iters=None, epochs=2)
    by_pairs = run(batch_size=100, iters=None, epochs=2)
    one_by_one = run(batch_tokens=1, iters=None, epochs=1)

    assert [line["iteration"] for line in whole.metrics("train")] == [1, 2]
    assert_same(whole.adapter, by_pairs.adapter, tolerance=1e-5)
    assert [line["iteration"] for line in one_by_one.metrics("train")] == list(range(1, 10 + 1))


def test_recurrence_chunk_size_reaches_the_hosts_recurrences(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(recurrent_patch, "model_uses_recurrence", lambda model: True)
    monkeypatch.setattr(recurrent_patch, "enable_memory_safe_recurrences", lambda chunk_size: sizes.append(chunk_size))

    run(recurrence_chunk_size=17)

    assert set(sizes) == {17}


def test_wandb_without_its_package_is_one_sentence(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)

    with refused(key="wandb"):
        run(wandb="my-project")


def test_a_model_that_is_not_there_is_one_sentence(run: Callable[..., Outcome], tmp_path: Path) -> None:
    with refused(ConfigError, key="model"):
        run(model=str(tmp_path / "no-model"))

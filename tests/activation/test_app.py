"""An app that trains through the host's modules, shows what its callback prints, and discards all other output."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import pytest
from support.refusals import refused
from support.tiny import preference_rows

import mlx_cpo_plugin
from mlx_cpo_plugin.errors import DataError, StoppedError

mlx_cpo_plugin.activate()

FORMS: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {
    "dialogues": lambda row: {
        side: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}" for side in ("chosen", "rejected")
    },
    "OpenAI": lambda row: {
        "input": {"messages": [{"role": "user", "content": row["prompt"]}]},
        "preferred_output": [{"role": "assistant", "content": row["chosen"]}],
        "non_preferred_output": [{"role": "assistant", "content": row["rejected"]}],
    },
}


class AppCallback:
    """Prints what it is told on the app's own stream."""

    def __init__(self, stream: io.StringIO) -> None:
        self.stream = stream
        self.train: list[dict[str, Any]] = []
        self.valid: list[dict[str, Any]] = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self.train.append(json.loads(json.dumps(info)))
        print(f"step {info['iteration']}", file=self.stream)

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self.valid.append(json.loads(json.dumps(info)))


def run_app(settings: dict[str, Any], callback: Any) -> None:
    """Load, train and test as an app does that knows the host's modules only."""
    from mlx_lm_lora.train import CONFIG_DEFAULTS, build_lora_config, evaluate_model
    from mlx_lm_lora.trainer.cpo_trainer import CPOTrainingArgs, train_cpo
    from mlx_lm_lora.trainer.datasets import CacheDataset, load_dataset
    from mlx_lm_lora.utils import from_pretrained

    args = SimpleNamespace(**{**CONFIG_DEFAULTS, **settings})
    np.random.seed(args.seed)
    mx.random.seed(args.seed)
    discarded = io.StringIO()
    with contextlib.redirect_stdout(discarded), contextlib.redirect_stderr(discarded):
        model, tokenizer, adapter_file = from_pretrained(
            model=args.model, new_adapter_path=args.adapter_path, lora_config=build_lora_config(args)
        )
        train_rows, valid_rows, test_rows = load_dataset(args, tokenizer)
        train_cpo(
            model=model,
            optimizer=optimizers.Adam(learning_rate=args.learning_rate),
            train_dataset=CacheDataset(train_rows),
            val_dataset=CacheDataset(valid_rows),
            args=CPOTrainingArgs(
                batch_size=args.batch_size,
                iters=args.iters or math.ceil(len(train_rows) / args.batch_size),
                val_batches=args.val_batches,
                steps_per_report=args.steps_per_report,
                steps_per_eval=args.steps_per_eval,
                steps_per_save=args.save_every,
                adapter_file=adapter_file,
                max_seq_length=args.max_seq_length,
                gradient_accumulation_steps=args.gradient_accumulation_steps,
                beta=args.beta,
                loss_type=args.dpo_cpo_loss_type,
                delta=args.delta,
                seq_step_size=None,
                reference_model_path=args.reference_model_path,
                qat_enable=args.qat_enable,
            ),
            training_callback=callback,
        )
        if args.test:
            evaluate_model(
                args=args,
                model=model,
                tokenizer=tokenizer,
                reference_model=None,
                judge_model=None,
                judge_tokenizer=None,
                test_set=CacheDataset(test_rows),
            )


def metrics(folder: Path, kind: str, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if row["kind"] == kind]


def write_rows(folder: Path, form: str, **counts: int) -> None:
    for split, count in counts.items():
        rows = [FORMS[form](row) for row in preference_rows(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_run_of_the_app_has_the_losses_of_the_yaml_run(
    form: str, settings: dict[str, Any], data_folder: Path, tmp_path: Path, run_main: Callable[..., None]
) -> None:
    write_rows(data_folder, form, train=10, valid=4, test=4)
    common = {**settings, "iters": 4, "seed": 7, "max_seq_length": 48, "steps_per_eval": 2, "test": True}
    callback = AppCallback(io.StringIO())

    run_app({**common, "adapter_path": str(tmp_path / "app")}, callback)
    run_main({**common, "adapter_path": str(tmp_path / "yaml")})

    for kind, name in (("train", "train_loss"), ("valid", "val_loss")):
        app, yaml = (metrics(tmp_path / route, kind, name) for route in ("app", "yaml"))
        assert len(app) == len(yaml) > 1
        np.testing.assert_allclose(app, yaml, rtol=1e-6)
    assert [info["train_loss"] for info in callback.train] == metrics(tmp_path / "app", "train", "train_loss")
    assert "seed: 7\n" in (tmp_path / "app" / "run_settings.yaml").read_text()


def test_what_the_apps_user_must_know_is_on_the_callbacks_stream(
    settings: dict[str, Any], data_folder: Path, tmp_path: Path
) -> None:
    with (data_folder / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Hi", "chosen": "Same.", "rejected": "Same."}) + "\n")
    callback = AppCallback(io.StringIO())

    run_app(settings, SimpleNamespace(wrapped_callback=callback, **reports_to(callback)))

    shown = callback.stream.getvalue()
    assert shown.startswith("mlx-cpo-plugin ")
    assert "Train: 11 rows, 10 pairs, 1 skipped (both answers are the same: train.jsonl:11)." in shown
    assert f"Saved final weights to {settings['adapter_path']}" in shown


def reports_to(callback: Any) -> dict[str, Any]:
    return {name: getattr(callback, name) for name in ("on_train_loss_report", "on_val_loss_report")}


def test_a_callback_that_prints_where_all_is_printed_gets_no_line_twice(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_cpo_plugin.training.metrics import MetricsFile
    from mlx_cpo_plugin.training.objective import objective_for
    from mlx_cpo_plugin.training.reporting import ProgressReporter

    stream = io.StringIO()
    reporter = ProgressReporter(objective_for("sigmoid", {}), AppCallback(stream), MetricsFile(None, ""))

    with contextlib.redirect_stdout(stream):
        reporter.say("A line.")

    assert stream.getvalue() == "A line.\n"


def test_the_app_may_validate_not_at_all(settings: dict[str, Any]) -> None:
    callback = AppCallback(io.StringIO())

    run_app({**settings, "val_batches": 0}, callback)

    assert (len(callback.train), callback.valid) == (2, [])


def test_an_app_that_is_stopped_is_told_how_to_go_on(settings: dict[str, Any]) -> None:
    callback = AppCallback(io.StringIO())
    report = callback.on_train_loss_report

    def stop(info: dict[str, Any]) -> None:
        report(info)
        os.kill(os.getpid(), signal.SIGTERM)

    callback.on_train_loss_report = stop  # type: ignore[method-assign]

    with pytest.raises(StoppedError, match="resume_adapter_file"):
        run_app({**settings, "iters": 50}, callback)

    assert len(callback.train) < 5


def test_rows_that_cannot_be_used_end_the_apps_run_with_one_sentence(
    settings: dict[str, Any], data_folder: Path
) -> None:
    (data_folder / "train.jsonl").write_text(json.dumps({"prompt": "Hi", "answer": "Hello."}) + "\n")

    with refused(DataError, key="chosen_feature", place="train.jsonl"):
        run_app(settings, AppCallback(io.StringIO()))


def test_a_run_whose_model_is_not_known_is_compared_with_the_one_that_is_named(
    settings: dict[str, Any], data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_cpo_plugin.cli import main

    run_app(settings, AppCallback(io.StringIO()))
    folder = settings["adapter_path"]

    assert "names are not known" in (Path(folder) / "run_settings.yaml").read_text()
    assert main(["compare", folder]) == 2
    assert "names no model" in capsys.readouterr().err
    assert main(["compare", folder, "--model", settings["model"]]) == 2
    assert "the run's rows are not recorded; name some with --data" in capsys.readouterr().err
    given = ["--model", settings["model"], "--data", str(data_folder), "--max-tokens", "2", "--rows", "1"]
    assert main(["compare", folder, *given]) == 0

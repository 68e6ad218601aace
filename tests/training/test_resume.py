"""A run that is killed, stopped or torn goes on to the bit, or says why it cannot."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from support import killed_runs
from support.prepared import Prepared
from support.refusals import refused
from support.resumable_runs import StopAt, checkpoints, cut_short, metrics, policy, stopped, train
from support.stranger_plugins import registered
from support.tiny import assert_same, build_pairs

from mlx_cpo_plugin.checkpoints.folder import CheckpointFolder, read_checkpoint
from mlx_cpo_plugin.checkpoints.run_folder import only_run_in
from mlx_cpo_plugin.checkpoints.run_identity import RunIdentity
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.hookspecs import hookimpl
from mlx_cpo_plugin.run.building import build_optimizer
from mlx_cpo_plugin.settings.config import RunSettings
from mlx_cpo_plugin.training.state import random_seed
from mlx_cpo_plugin.types import LossType, Option


@pytest.mark.parametrize(
    "case",
    [
        "in an empty folder",
        "anew in a used folder",
        "from an earlier checkpoint",
        "from another folder into a used one",
    ],
)
@pytest.mark.slow
def test_a_run_killed_between_any_two_file_operations_loses_nothing_and_ends_like_one_that_was_not(
    tmp_path: Path, case: str
) -> None:
    ended = Prepared(killed_runs.goes_on_from_every_state, tmp_path, case, output=tmp_path / "told").ended()

    assert ended.code == 0, ended.told
    outcome = json.loads(ended.printed.splitlines()[-1])
    assert outcome["moments"] > 100
    assert outcome["states"] > 40
    assert outcome["faults"] == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_says_how_to_go_on_and_loses_nothing(tmp_path: Path, number: signal.Signals) -> None:
    whole = train(tmp_path / "whole")

    error = stopped(tmp_path / "run", 5, number)

    assert error.exit_code == 128 + number
    assert str(error).startswith("stopped after iteration 5, which is saved; start it again with resume: auto (or ")
    assert checkpoints(tmp_path / "run")[-1] == "0000005"
    assert_same(train(tmp_path / "run", resume="auto"), whole)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_stopping_twice_means_now(tmp_path: Path) -> None:
    class StopTwice(StopAt):
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            super().on_train_loss_report(info)
            super().on_train_loss_report(info)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callback=StopTwice(5, signal.SIGINT))

    assert checkpoints(tmp_path) == ["0000002", "0000004"]


def test_signals_mean_what_they_did_before_once_a_run_is_over(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    train(tmp_path / "whole", iters=1)
    stopped(tmp_path / "stopped", 1)

    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sgd", {"momentum": 0.9}),
        ("sgd", {}),
        ("adafactor", {}),
        ("adafactor", {"beta_1": 0.9}),
        ("adafactor", {"relative_step": True}),
        ("lion", {"weight_decay": 0.1}),
    ],
)
@pytest.mark.slow
def test_every_optimizer_goes_on_to_the_bit(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    def optimizer(**others: Any) -> optimizers.Optimizer:
        config = {name: {**arguments, **others}}
        return build_optimizer(RunSettings(optimizer=name, learning_rate=1e-2, optimizer_config=config))

    whole = train(tmp_path / "whole", optimizer=optimizer())
    stopped(tmp_path / "run", 5, optimizer=optimizer())

    assert_same(train(tmp_path / "run", resume="auto", optimizer=optimizer()), whole)
    with refused(ConfigError, "other settings", key="optimizer"):
        train(tmp_path / "run", resume="auto", optimizer=optimizer(weight_decay=0.3))


def test_adafactor_takes_the_learning_rate_and_its_numbers_are_part_of_a_run(tmp_path: Path) -> None:
    def trained(folder: str, rate: float, **more: Any) -> dict[str, np.ndarray]:
        settings = RunSettings(optimizer="adafactor", learning_rate=rate, optimizer_config={"adafactor": more})
        return train(tmp_path / folder, optimizer=build_optimizer(settings), iters=3, resume="auto")

    slow, fast = trained("slow", 1e-4), trained("fast", 1e-1)

    assert any(not np.array_equal(slow[name], fast[name]) for name in slow)
    with refused(ConfigError, "other settings", key="optimizer"):
        trained("slow", 1e-4, eps=[1e-30, 1e-2])


def test_an_option_of_a_loss_that_is_free_on_resume_may_change(tmp_path: Path) -> None:
    def loss(chosen_logps: mx.array, rejected_logps: mx.array, beta: float, note: float, size: float) -> mx.array:
        return rejected_logps - chosen_logps

    class Noting:
        @hookimpl
        def register_loss_types(self) -> list[LossType]:
            free, size = Option("note", float, 1.0, "", free_on_resume=True), Option("size", float, 1.0, "")
            return [LossType("noting", "Noting", loss, "", options=(Option("beta", float, 0.1, ""), free, size))]

    with registered(Noting()):
        own = {"loss_type": "noting", "iters": 3, "resume": "auto"}
        train(tmp_path, **own, loss_options={"note": 1.0, "size": 1.0})
        train(tmp_path, **own | {"iters": 6}, loss_options={"note": 2.0, "size": 1.0})
        with refused(ConfigError, "other settings", key="size"):
            train(tmp_path, **own | {"iters": 9}, loss_options={"note": 2.0, "size": 2.0})


def test_more_iterations_go_on_from_a_finished_run(tmp_path: Path) -> None:
    # Ten iterations end with a step, so nothing is cut short there.
    train(tmp_path / "run", iters=6)

    longer = train(tmp_path / "run", iters=12, resume="auto")

    assert_same(longer, train(tmp_path / "whole", iters=12))


def test_a_run_that_is_complete_stays_as_it_is(tmp_path: Path) -> None:
    whole = train(tmp_path)

    assert_same(train(tmp_path, resume="auto"), whole)


def test_another_runs_folder_or_checkpoint_can_be_gone_on_from(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    stopped(tmp_path / "run", 5)

    assert_same(train(tmp_path / "from_run", resume=str(tmp_path / "run")), whole)
    assert_same(train(tmp_path / "from_one", resume=str(tmp_path / "run" / "checkpoints" / "0000004")), whole)


def test_without_a_checkpoint_auto_begins_and_a_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", resume="auto")

    assert "There is no checkpoint in" in capsys.readouterr().out
    with refused(ConfigError, key="resume", place=str(tmp_path / "nowhere")):
        train(tmp_path / "run", resume=str(tmp_path / "nowhere"))


def other_pairs() -> list[PreferencePair]:
    return build_pairs(11, seed=1)


def other_model() -> nn.Module:
    model = policy()
    model.model.norm.weight = 2 * model.model.norm.weight
    return model


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 1}, "seed: 0 → 1"),
    "loss": ({"loss_type": "dpop"}, "dpo_cpo_loss_type: ipo → dpop"),
    "beta and batch size": ({"beta": 0.4, "batch_size": 3}, "batch_size: 2 → 3, beta: 0.5 → 0.4"),
    "more rows": ({"pairs": build_pairs(12)}, "data: the set had 11 pairs and has 12"),
    "other rows": ({"pairs": other_pairs()}, "data: the set has pairs that differ"),
    "order": ({"pairs": build_pairs(11)[::-1]}, "data: the set has its pairs in another order"),
    "model": ({"model": other_model()}, "model (other weights or layers)"),
    "learning rate": ({"optimizer": optimizers.AdamW(learning_rate=2e-2)}, "learning_rate: 0.01 → 0.02"),
    "optimizer": ({"optimizer": optimizers.Adam(learning_rate=1e-2)}, "optimizer: adamw → adam"),
    "weight decay": ({"optimizer": optimizers.AdamW(1e-2, weight_decay=0.3)}, "optimizer"),
    "adapter": ({"model": policy(dora=True)}, "train_type: lora → dora"),
    "scale": ({"model": policy(scale=5.0)}, "lora_parameters.scale: 10.0 → 5.0"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.slow
def test_another_run_is_refused_with_what_differs_by_its_key(tmp_path: Path, change: str) -> None:
    train(tmp_path, iters=2)
    arguments, told = CHANGES[change]

    with pytest.raises(ConfigError) as refused:
        train(tmp_path, resume="auto", **arguments)

    assert f" cannot be resumed with other settings: {told}; set them back" in str(refused.value)
    assert refused.value.key == ("" if "," in told else told.split(":")[0].split(" (")[0])


def test_what_differs_in_a_configured_run_is_told_by_key_and_by_file(
    settings: dict[str, Any], run_main: Callable[..., None]
) -> None:
    run_main(settings)

    def refused(**changes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            run_main({**settings, "resume": "auto", **changes})
        return str(caught.value)

    assert "settings: learning_rate: 0.001 → 0.002; set" in refused(learning_rate=2e-3)
    rank = {"lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 10.0}}
    assert "settings: lora_parameters.rank: 8 → 4; set" in refused(**rank)
    assert "settings: lr_schedule: null → " in refused(lr_schedule="cosine")
    file = Path(settings["data"]) / "train.jsonl"
    rows = file.read_text().splitlines()
    file.write_text("\n".join(rows[:-1]))
    assert "settings: data: train.jsonl had 10 pairs and has 9; set" in refused()
    file.write_text("\n".join(rows[::-1]))
    assert "settings: data: train.jsonl has its pairs in another order; set" in refused()
    file.rename(file.with_name("train_1.jsonl"))
    assert "train_1.jsonl was not read" in refused()


def altered(checkpoint: Path) -> None:
    file = checkpoint / "adapters.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def without_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def foreign(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    (checkpoint / "holiday.jpg").write_bytes(b"sea")


@pytest.mark.parametrize("damage", [cut_short, altered, without_manifest, foreign])
@pytest.mark.slow
def test_a_torn_checkpoint_is_told_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    whole = train(tmp_path / "whole")
    stopped(tmp_path / "run", 5)
    damage(tmp_path / "run" / "checkpoints" / "0000005")

    resumed = train(tmp_path / "run", resume="auto")

    printed = capsys.readouterr().out
    assert "0000005 is incomplete or corrupt" in printed
    assert "Resuming after iteration 4" in printed
    assert_same(resumed, whole)


@pytest.mark.parametrize("lost", ["best", "last", "sums"])
def test_a_checkpoint_of_another_version_is_an_error_that_says_so(tmp_path: Path, lost: str) -> None:
    stopped(tmp_path, 5)
    folder = tmp_path / "checkpoints" / "0000005"
    values = folder / "values.json"
    values.write_text(values.read_text().replace(f'"{lost}"', '"renamed"'))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["values.json"] = {
        "bytes": values.stat().st_size,
        "sha256": hashlib.sha256(values.read_bytes()).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))

    with refused(ConfigError, "another version of mlx-cpo-plugin", key="resume"):
        train(tmp_path, resume="auto")


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    train(tmp_path / "two")
    train(tmp_path / "three", keep_checkpoints=3)

    # The ninth is the one before the last optimizer step.
    assert checkpoints(tmp_path / "two") == ["0000009", "0000010"]
    assert checkpoints(tmp_path / "three") == ["0000008", "0000009", "0000010"]


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    def train_where_files_end_at(size: int) -> str:
        arguments = (tmp_path / "run", size)
        ended = Prepared(killed_runs.on_a_full_disk, *arguments, output=tmp_path / f"told-{size}").ended()
        return (ended.told.splitlines() or [""])[-1]

    assert train_where_files_end_at(10**9) == ""
    before = checkpoints(tmp_path / "run")
    largest = max(path.stat().st_size for path in (tmp_path / "run" / "checkpoints" / before[-1]).iterdir())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / before[-1])

    told = train_where_files_end_at(largest - 1)

    assert "cannot be written" in told
    assert told.startswith("CheckpointError ")
    assert checkpoints(tmp_path / "run") == before[:-1]
    read_checkpoint(tmp_path / "run" / "checkpoints" / before[-2])


def test_what_a_killed_run_had_not_finished_is_swept_away(tmp_path: Path) -> None:
    run = RunIdentity.new()
    folder = CheckpointFolder(tmp_path, run.id, keep=2)
    for name in (".123-partial-0000001", ".123-removed-0000003"):
        (tmp_path / name).mkdir()

    folder.save(2, {"adapters": {"a": mx.ones(3)}}, {"iteration": 2, "run": run.plain()})

    assert [path.name for path in tmp_path.iterdir()] == ["0000002"]


@pytest.mark.slow
def test_a_second_run_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mlx_cpo_plugin.checkpoints.run_folder import only_run_in\n"
        "with only_run_in(Path(sys.argv[1])):\n"
        "    print('in', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with refused(ConfigError, "Another run is writing", key="adapter_path"):
            train(tmp_path)
        other.kill()

    train(tmp_path, iters=1)  # a process that is dead holds no lock


def test_a_lock_ends_with_its_run(tmp_path: Path) -> None:
    for _ in range(2):
        with only_run_in(tmp_path):
            pass


def test_the_random_generator_goes_on_from_its_seed() -> None:
    mx.random.seed(2**40 + 12345)
    mx.random.uniform(shape=(5,))
    seed = random_seed()
    following = np.array(mx.random.uniform(shape=(5,)))

    mx.random.seed(seed)

    np.testing.assert_array_equal(np.array(mx.random.uniform(shape=(5,))), following)

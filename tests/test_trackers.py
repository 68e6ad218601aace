"""Trackers: what they are told, under which names, and that none of them stops or repeats a run."""

from __future__ import annotations

import json
import struct
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import pytest
from support.refusals import refused
from support.tiny import add_adapter, build_model, build_pairs

from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.run import mode as host_run
from mlx_cpo_plugin.settings import config
from mlx_cpo_plugin.settings.nested import TRACKERS
from mlx_cpo_plugin.settings.run_settings import plain_values
from mlx_cpo_plugin.trackers import RunDescription, TensorboardTracker, TrackerCallback, client_of, trl_names
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.trainer import train_cpo

RunMain = Callable[..., None]
Settings = dict[str, Any]


class Client:
    """Stands in for the module, and for the run, of W&B, Trackio and SwanLab."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished: list[dict[str, Any]] = []
        self.id = self.name = "run-7"

    def init(self, **arguments: Any) -> Client:
        self.begun.append(arguments)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, **arguments: Any) -> None:
        self.finished.append(arguments)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    """The one client that W&B, Trackio and SwanLab have together."""
    client = Client()
    module = ModuleType("stand_in")
    module.__file__ = "stand_in.py"
    module.init = client.init  # type: ignore[attr-defined]  # a module of this test's own
    for name in ("wandb", "trackio", "swanlab"):
        monkeypatch.setitem(sys.modules, name, module)
    return client


def test_training_reports_have_the_names_that_trl_gives_them() -> None:
    report = {
        "train_loss": 0.1,
        "train_chosen_reward": 0.2,
        "train_rejected_reward": 0.3,
        "train_accuracies": 0.4,
        "train_margins": 0.5,
        "train_policy_chosen_logps": -6.0,
        "train_policy_rejected_logps": -7.0,
        "train_chosen_logits_mean": 8.0,
        "train_rejected_logits_mean": 9.0,
        "train_nll_loss": 1.0,
        "train_gradient_norm": 1.1,
        "learning_rate": 1e-6,
        "epoch": 0.5,
        "tokens_per_second": 12.0,
        "trained_tokens": 300.0,
        "optimizer_steps": 25,
    }

    assert trl_names(report) == {
        "train/loss": 0.1,
        "train/rewards/chosen": 0.2,
        "train/rewards/rejected": 0.3,
        "train/rewards/accuracies": 0.4,
        "train/rewards/margins": 0.5,
        "train/logps/chosen": -6.0,
        "train/logps/rejected": -7.0,
        "train/logits/chosen": 8.0,
        "train/logits/rejected": 9.0,
        "train/nll_loss": 1.0,
        "train/grad_norm": 1.1,
        "train/learning_rate": 1e-6,
        "train/epoch": 0.5,
        "train/tokens_per_second": 12.0,
        "train/trained_tokens": 300.0,
        "train/global_step": 25,
    }


def test_validations_and_the_final_test_have_the_prefixes_that_transformers_gives_them() -> None:
    assert trl_names({"val_loss": 1.0, "val_margins": 2.0, "val_time": 3.0}) == {
        "eval/loss": 1.0,
        "eval/rewards/margins": 2.0,
        "eval/runtime": 3.0,
    }
    assert trl_names({"test_loss": 1.0, "test_accuracies": 0.5}) == {"test/loss": 1.0, "test/rewards/accuracies": 0.5}


def test_what_is_not_finite_is_not_sent(tmp_path: Path) -> None:
    sent: list[dict[str, float]] = []

    class Sending(Recorder):
        def log(self, values: dict[str, float], step: int) -> None:
            sent.append(values)

    callback = TrackerCallback({"recorder": Sending()}, RunDescription("p", "n", tmp_path, {}))
    callback.on_train_loss_report(
        {"iteration": 1, "train_loss": float("nan"), "train_margins": float("inf"), "epoch": 1, "note": "text"}
    )

    assert sent == [{"train/epoch": 1}]


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "swanlab"])
def test_a_run_reports_training_validation_and_test_to_a_tracker(
    settings: Settings, run_main: RunMain, client: Client, tracker: str
) -> None:
    run_main({**settings, "report_to": tracker, "test": True, "project": "mine", "run_name": "first"})

    (begun,) = client.begun
    assert (begun["project"], begun["name"], begun["config"]["beta"]) == ("mine", "first", 0.1)
    kinds = [next(name for name in values if name.endswith("loss")) for _, values in client.logged]
    steps = [step for step, _ in client.logged]
    assert [*zip(steps, kinds, strict=True)] == [
        (1, "eval/loss"),
        (1, "train/loss"),
        (2, "train/loss"),
        (2, "eval/loss"),
        (2, "test/loss"),
    ]
    assert {"train/rewards/margins", "train/logps/chosen", "train/grad_norm", "train/learning_rate"} <= client.logged[
        1
    ][1].keys()
    assert len(client.finished) == 1


def test_the_same_numbers_are_sent_that_the_metrics_file_has(
    settings: Settings, run_main: RunMain, client: Client
) -> None:
    run_main({**settings, "report_to": "wandb"})

    lines = map(json.loads, (Path(settings["adapter_path"]) / "metrics.jsonl").read_text().splitlines())
    written = [line["train_margins"] for line in lines if line["kind"] == "train"]
    assert [values["train/rewards/margins"] for _, values in client.logged if "train/loss" in values] == written


def test_the_key_wandb_alone_reports_to_its_project_under_the_names_of_mlx_lm(
    settings: Settings, run_main: RunMain, client: Client
) -> None:
    run_main({**settings, "wandb": "ours"})

    assert [(begun["project"], begun["name"]) for begun in client.begun] == [("ours", "adapters")]
    assert [(step, "val_loss" if "val_loss" in values else "train_loss") for step, values in client.logged] == [
        (1, "val_loss"),
        (1, "train_loss"),
        (2, "train_loss"),
        (2, "val_loss"),
    ]
    assert {"train_margins", "train_gradient_norm", "learning_rate"} <= client.logged[1][1].keys()
    assert client.finished == [{"exit_code": 0}]


def test_project_and_run_are_named_after_the_plugin_and_the_adapter_folder(
    settings: Settings, run_main: RunMain, client: Client
) -> None:
    run_main({**settings, "report_to": ["swanlab"]})

    assert (client.begun[0]["project"], client.begun[0]["name"]) == ("mlx-cpo", "adapters")


def test_the_key_wandb_names_the_project_of_the_one_run_that_report_to_begins(
    settings: Settings, run_main: RunMain, client: Client
) -> None:
    run_main({**settings, "report_to": "wandb", "wandb": "ours"})

    assert [begun["project"] for begun in client.begun] == ["ours"]


@pytest.mark.parametrize("choice", [{"report_to": "none"}, {"project": "mine"}])
def test_nothing_is_sent_unless_a_tracker_is_named(
    settings: Settings, run_main: RunMain, client: Client, choice: Settings
) -> None:
    run_main({**settings, **choice})

    assert client.begun == client.logged == []


@pytest.mark.parametrize("form", ["wandb, trackio", ["wandb", "trackio"], ["wandb", "trackio", "wandb"]])
def test_several_trackers_are_a_list_or_divided_by_commas(form: Any) -> None:
    resolved = config.resolve({"train_mode": "cpo", "train": True, "report_to": form}).settings

    assert resolved.report_to == ["wandb", "trackio"]


ANY_TRACKER = "one of wandb, tensorboard, trackio, swanlab, none"


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        ("mlflow", ANY_TRACKER),
        ("all", ANY_TRACKER),
        (["wandb", 3], ANY_TRACKER),
        (["none", "wandb"], "none alone, or trackers without it"),
        (True, "a list or null"),
    ],
)
def test_what_is_no_tracker_is_refused(value: Any, allowed: str) -> None:
    with refused(ConfigError, key="report_to", place="in the call", allowed=allowed):
        config.resolve({"train_mode": "cpo", "train": True, "report_to": value})


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("what", ["missing", "a folder of logs"])
def test_a_missing_client_is_one_sentence_before_anything_is_loaded(
    settings: Settings, run_main: RunMain, monkeypatch: pytest.MonkeyPatch, tracker: str, what: str
) -> None:
    monkeypatch.setattr(host_run, "load_chat_tokenizer", lambda model: pytest.fail("the tokenizer was loaded"))
    module = client_of(tracker)
    folder = ModuleType(module)
    folder.__file__ = None
    monkeypatch.setitem(sys.modules, module, None if what == "missing" else folder)  # type: ignore[arg-type]  # None: no such module

    with pytest.raises(
        ConfigError,
        match=rf"^report_to names {tracker}, but its client {module} is missing; run pip install "
        rf"'mlx-cpo-plugin\[{tracker}\]', or remove {tracker} from report_to\.$",
    ):
        run_main({**settings, "report_to": [tracker]})

    assert not Path(settings["adapter_path"]).exists()


def test_a_client_that_does_not_fit_what_else_is_installed_is_one_sentence(
    settings: Settings, run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text("raise TypeError('Descriptors cannot be created directly.')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)

    with pytest.raises(ConfigError, match=r"its client wandb cannot be imported \(Descriptors cannot be created"):
        run_main({**settings, "report_to": ["wandb"]})


def test_every_tracker_has_an_extra_of_its_name() -> None:
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for tracker in TRACKERS:
        assert extras["optional-dependencies"][tracker][0].startswith(client_of(tracker))


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(
    settings: Settings,
    run_main: RunMain,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failing: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr(client, failing, fail)

    run_main({**settings, "report_to": "trackio"})

    assert (Path(settings["adapter_path"]) / "adapters.safetensors").is_file()
    done = "updated" if failing == "log" else "finished"
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: trackio")]
    assert warnings == [f"Warning: trackio could not be {done} (no network); training continues."]


def test_a_tracker_that_cannot_start_is_left_out_while_others_are_told(
    settings: Settings, run_main: RunMain, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("swanlab")
    module.__file__ = "swanlab.py"
    module.init = lambda **_: 1 / 0  # type: ignore[attr-defined]  # a module of this test's own
    monkeypatch.setitem(sys.modules, "swanlab", module)

    run_main({**settings, "report_to": ["swanlab", "wandb"]})

    assert [step for step, _ in client.logged] == [1, 1, 2, 2]
    assert len(client.finished) == 1


def test_a_run_that_fails_is_finished_as_failed(
    settings: Settings, run_main: RunMain, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_run, "report_on_test_set", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        run_main({**settings, "report_to": "wandb", "test": True})

    assert client.finished == [{"exit_code": 1}]


def test_settings_are_sent_as_plain_values_without_tokens() -> None:
    settings = {
        "hf_dataset": [{"path": "rows", "config": {"name": "en", "token": "hf_secret"}}],
        "adapter_path": Path("adapters"),
        "betas": (0.9, 0.999),
        "iters": None,
    }

    assert plain_values(settings) == {
        "hf_dataset": [{"path": "rows", "config": {"name": "en"}}],
        "adapter_path": "adapters",
        "betas": [0.9, 0.999],
        "iters": None,
    }


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.started: list[str | None] = []
        self.told: list[tuple[int, str]] = []

    def start(self, run: RunDescription, run_id: str | None) -> str:
        self.started.append(run_id)
        return run_id or f"id-{len(self.started)}"

    def log(self, values: dict[str, float], step: int) -> None:
        self.told += [(step, name) for name in ("train/loss", "eval/loss") if name in values]

    def finish(self, failed: bool) -> None:
        pass


class EndAt:
    """A callback of the caller that ends the run at a report, 0 being the validation before training."""

    def __init__(self, iteration: int | None) -> None:
        self.iteration = iteration

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        if info["iteration"] == self.iteration:
            raise InterruptedError

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        if self.iteration == 0:
            raise InterruptedError


def train(folder: Path, tracker: Any, end_at: int | None = None, **arguments: Any) -> TrackerCallback:
    callback = TrackerCallback({"recorder": tracker}, RunDescription("p", "n", folder, {}), EndAt(end_at))
    mx.random.seed(7)
    settings = {
        "iters": 8,
        "steps_per_report": 1,
        "steps_per_eval": 2,
        "steps_per_save": 3,
        "adapter_file": str(folder / "adapters.safetensors"),
    }
    model, adam = add_adapter(build_model()), optimizers.Adam(learning_rate=1e-3)
    train_cpo(
        model, adam, build_pairs(8), build_pairs(2, seed=1), CPOTrainingArgs(**settings | arguments), None, callback
    )
    return callback


EVERY_REPORT = sorted(
    [*((step, "train/loss") for step in range(1, 9)), *((step, "eval/loss") for step in (1, 2, 4, 6, 8))]
)


@pytest.mark.parametrize("end_at", [4, 6, 8])
def test_a_resumed_run_goes_on_in_the_tracker_and_tells_nothing_twice(tmp_path: Path, end_at: int) -> None:
    tracker = Recorder()
    with pytest.raises(InterruptedError):
        train(tmp_path, tracker, end_at=end_at)

    train(tmp_path, tracker, resume="auto")

    assert tracker.started == [None, "id-1"]
    # The report at which the run ended may be missing: it stands in the metrics file, but did not get out.
    assert sorted(tracker.told) == [told for told in EVERY_REPORT if told != (end_at, "train/loss")]


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_anew_in_the_tracker(tmp_path: Path) -> None:
    tracker, second = Recorder(), Recorder()
    with pytest.raises(InterruptedError):
        train(tmp_path, tracker, end_at=0)

    train(tmp_path, second, resume="auto")

    assert second.started == [None]
    assert sorted(second.told) == EVERY_REPORT


def test_a_run_that_begins_anew_in_the_same_folder_is_another_run_in_the_tracker(tmp_path: Path) -> None:
    tracker = Recorder()

    train(tmp_path, tracker)
    train(tmp_path, tracker)

    assert tracker.started == [None, None]
    assert sorted(tracker.told) == sorted(2 * EVERY_REPORT)


def test_a_test_that_a_finished_run_had_not_made_is_told_to_the_run_that_the_tracker_had(tmp_path: Path) -> None:
    train(tmp_path, Recorder())
    tracker = Recorder()

    callback = train(tmp_path, tracker, resume="auto")
    callback.on_test_report({"test_loss": 1.0})

    assert tracker.started == ["id-1"]


def test_a_run_that_began_without_a_tracker_can_be_resumed_with_one(tmp_path: Path) -> None:
    train(tmp_path, Recorder(), iters=3)
    tracker = Recorder()

    train(tmp_path, tracker, resume="auto")

    assert [step for step, name in tracker.told if name == "train/loss"] == [4, 5, 6, 7, 8]


def test_a_tracker_that_could_not_start_is_told_nothing(tmp_path: Path) -> None:
    class Broken(Recorder):
        def start(self, run: RunDescription, run_id: str | None) -> str:
            raise ConnectionError

    tracker = Broken()

    train(tmp_path, tracker)

    assert tracker.told == []


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars in the event files of a folder by name, as (step, value)."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for record in records(file.read_bytes()):
            event = Event.FromString(record)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def records(data: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file: eight bytes of length, four of its checksum, the record, four of its checksum."""
    start = 0
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        yield data[start + 12 : start + 12 + length]
        start += 12 + length + 4


@pytest.fixture
def tensorboard() -> None:
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")


@pytest.mark.usefixtures("tensorboard")
def test_tensorboard_files_hold_every_report_of_a_run(settings: Settings, run_main: RunMain) -> None:
    run_main({**settings, "report_to": "tensorboard", "run_name": "first", "test": True})

    folder = Path(settings["adapter_path"])
    found = scalars(folder / "runs" / "first")
    lines = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    assert found["train/rewards/margins"] == [
        (line["iteration"], pytest.approx(line["train_margins"])) for line in lines if line["kind"] == "train"
    ]
    assert [step for step, _ in found["eval/loss"]] == [1, 2]
    assert [step for step, _ in found["test/loss"]] == [2]


@pytest.mark.usefixtures("tensorboard")
def test_tensorboard_has_one_folder_for_a_resumed_run_and_another_for_a_new_one(tmp_path: Path) -> None:
    interrupted, resumed, anew = (TensorboardTracker("tensorboard") for _ in range(3))
    with pytest.raises(InterruptedError):
        train(tmp_path, interrupted, end_at=5)
    interrupted.finish(failed=True)
    train(tmp_path, resumed, resume="auto")
    resumed.finish(failed=False)
    train(tmp_path, anew)
    anew.finish(failed=False)

    first, second = (scalars(tmp_path / "runs" / name) for name in ("n", "n-2"))
    assert [step for step, _ in first["train/loss"]] == [1, 2, 3, 4, 6, 7, 8]
    assert [step for step, _ in second["train/loss"]] == [1, 2, 3, 4, 5, 6, 7, 8]

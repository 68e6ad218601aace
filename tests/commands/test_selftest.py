"""The self-test proves a device, and each branch for a GPU computes what the CPU's does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm_lora
import pytest
from support.devices import pretended

from mlx_cpo_plugin.cli import main
from mlx_cpo_plugin.commands import doctor
from mlx_cpo_plugin.device import CUDA, METAL
from mlx_cpo_plugin.model import logps as answers
from mlx_cpo_plugin.plugins import loss_types
from mlx_cpo_plugin.selftest import checks, command, user_model
from mlx_cpo_plugin.selftest.checks import WAYS, Check, Outcome, as_a_run_does, check_gradient, plain_batches
from mlx_cpo_plugin.selftest.tiny_run import KILLED_AT, run_in_child

GPU_CASES: dict[str, tuple[checks.MethodFor, dict[str, Any], dict[str, Any]]] = {
    **{way: (method, {}, {}) for way, method in WAYS.items()},
    "bfloat16": (as_a_run_does, {"dtype": mx.bfloat16}, {}),
    "gradient checkpointing": (as_a_run_does, {}, {"grad_checkpoint": True}),
    "experts": (as_a_run_does, {"architecture": "qwen3_moe"}, {}),
    "sliding window": (as_a_run_does, {"architecture": "gemma3_text"}, {}),
    "full": (as_a_run_does, {"train_type": "full"}, {}),
    "4 bits": (as_a_run_does, {"bits": 4}, {}),
    "QAT": (as_a_run_does, {}, {"qat": True}),
}


# What differs between GPUs is whose attention they take.
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *((METAL, case) for case in GPU_CASES),
        *(pytest.param(CUDA, case, marks=pytest.mark.slow) for case in (*WAYS, "sliding window")),
    ],
)
def test_the_branches_for_a_gpu_have_the_gradient_of_float64(kind: str, case: str) -> None:
    method, arguments, options = GPU_CASES[case]
    with pretended(kind):
        outcome = check_gradient(method, arguments, **options)
    assert outcome.status == "ok", outcome.detail


@pytest.mark.parametrize("name", loss_types())
def test_every_loss_agrees_with_itself_in_float64(name: str) -> None:
    assert checks.check_loss(name).status == "ok"


@pytest.mark.parametrize("arguments", [{"train_type": "dora"}, {"bits": 8, "train_type": "dora"}])
def test_dora_has_the_gradient_of_float64(arguments: dict[str, Any]) -> None:
    assert check_gradient(as_a_run_does, arguments).status == "ok"


def test_an_adapter_that_mlx_lm_loads_scores_alike() -> None:
    assert checks.check_saved_adapter().status == "ok"


@pytest.mark.slow
def test_a_run_is_killed_where_it_says(tmp_path: Path) -> None:
    run_in_child(tmp_path, kill_at=KILLED_AT)
    assert not (tmp_path / "adapters.safetensors").exists() or (tmp_path / "checkpoints").is_dir()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == KILLED_AT


@pytest.mark.parametrize(("resumed_at", "status"), [(1.0, "ok"), (1.0 + 1e-7, "failed")])
def test_a_resumed_run_has_to_end_with_the_same_bits(
    resumed_at: float, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path, *, kill_at: int | None = None, resume: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        mx.save_safetensors(str(folder / "adapters.safetensors"), {"a": mx.array([resumed_at if resume else 1.0])})

    monkeypatch.setattr(checks, "run_in_child", run)
    assert checks.check_resumed_run().status == status


@pytest.mark.parametrize("wrong", [1 + 2e-4, float("nan")])
def test_a_device_that_computes_something_else_fails(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = answers.log_normaliser
    monkeypatch.setattr(answers, "log_normaliser", lambda logits: right(logits) * wrong)
    assert check_gradient(plain_batches, {}).status == "failed"


def test_a_gradient_that_is_off_fails_though_the_scores_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_a_gradient(*arguments: Any) -> Any:
        method = plain_batches(*arguments)

        def compute(*call: Any) -> Any:
            result = method(*call)
            return result._replace(gradient={name: 0.999 * value for name, value in result.gradient.items()})

        return compute

    outcome = check_gradient(half_a_gradient, {})
    assert outcome.status == "failed"
    assert outcome.error == pytest.approx(1e-3, rel=0.01)


def broken() -> Outcome:
    raise RuntimeError("[metal] no such kernel\nand more")


@pytest.fixture
def two_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One check that breaks, before one that passes; nothing else is looked at."""
    found = [Check("broken", broken), Check("sound", lambda: Outcome("", "ok", "scores 1e-9", 1e-9, 1e-4))]
    monkeypatch.setattr(command, "all_checks", lambda: found)
    monkeypatch.setattr(doctor, "diagnose", lambda: [doctor.Finding("python", "ok", "3")])


def test_a_check_that_breaks_is_a_failed_row_and_the_others_go_on(
    two_checks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--selftest"]) == 1
    rows = capsys.readouterr().out.splitlines()
    assert any(row.startswith("failed   broken") and row.endswith("[metal] no such kernel") for row in rows)
    assert any(row.startswith("ok       sound") for row in rows)


def test_json_holds_what_a_bug_report_needs(two_checks: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--selftest", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["findings"][0]["name"] == "python"
    assert [(check["name"], check["status"]) for check in report["selftest"]] == [("broken", "failed"), ("sound", "ok")]
    assert report["selftest"][1]["error"] == 1e-9


def test_the_users_own_model_and_rows_are_tested_too(
    two_checks: None,
    model_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "all_checks", list)
    file = tmp_path / "my.yaml"
    file.write_text(f"model: {model_folder}\ndata: {data_folder}\ntrain_mode: cpo\n")
    assert main(["doctor", "--config", str(file), "--json"]) == 0
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)["selftest"]}
    assert set(found) == {f"your model: {way}" for way in WAYS}
    assert all(check["status"] == "ok" and check["error"] < 1e-4 for check in found.values())


def test_a_model_too_large_for_float64_is_compared_with_plain_scoring_and_says_so(
    model_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_model, "physical_memory", lambda: 1000)
    file = tmp_path / "my.yaml"
    file.write_text(f"model: {model_folder}\ndata: {data_folder}\ntrain_mode: cpo\n")
    outcome = user_model.checks_of_config(str(file))[0].outcome()
    assert outcome.status == "ok"
    assert "plain batches on this device" in outcome.detail


@pytest.mark.slow
def test_the_doctor_judges_the_host_that_is_imported_not_the_one_that_is_installed(tmp_path: Path) -> None:
    vendored = tmp_path / "mlx_lm_lora"
    vendored.mkdir()
    (vendored / "__init__.py").write_text('__version__ = "3.1.2"\n')
    script = (
        "from mlx_cpo_plugin.commands.doctor import check_version; print(check_version('mlx-lm-lora', 'mlx_lm_lora'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    child = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "status='failed'" in child.stdout
    assert "3.1.2" in child.stdout
    assert str(vendored) in child.stdout


@pytest.mark.slow
def test_a_run_with_a_host_that_is_too_old_ends_in_one_sentence(tmp_path: Path) -> None:
    shutil.copytree(Path(mlx_lm_lora.__file__).parent, tmp_path / "mlx_lm_lora")
    (tmp_path / "mlx_lm_lora" / "_version.py").write_text('__version__ = "3.1.2"\n')
    (tmp_path / "my.yaml").write_text("train_mode: cpo\n")
    script = "import sys; sys.argv[1:] = ['--config', 'my.yaml']; from mlx_lm_lora.train import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    child = subprocess.run(
        [sys.executable, "-c", f"import mlx_cpo_plugin; mlx_cpo_plugin.activate(); {script}"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 2
    assert child.stdout == ""
    assert len(child.stderr.strip().splitlines()) == 1
    assert "3.1.2 is too old" in child.stderr

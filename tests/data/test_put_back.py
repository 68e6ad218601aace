"""What a run changes in other people's modules and in the process is as it was before, however the run ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx_lm_lora.trainer.sft_trainer as host_trainer
import pytest
from support.architectures import build_architecture
from support.refusals import refused
from support.tiny import add_adapter, build_model, build_pairs

from mlx_cpo_plugin import cli
from mlx_cpo_plugin.data import reading
from mlx_cpo_plugin.device import compile_where_it_pays
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.host import memory_safe_recurrences
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.qat import fake_quantised
from mlx_cpo_plugin.training.trainer import evaluate_cpo, training_environment

ENDINGS = [None, ValueError, KeyboardInterrupt]
ModelNames = dict[tuple[str, str], Any]


@contextmanager
def ending(error: type[BaseException] | None) -> Iterator[None]:
    """End the block with an error, or without one."""
    with suppress(*[error] if error else []):
        yield


def names_of_models() -> ModelNames:
    """Everything in the modules and classes of mlx_lm's models, by owner and name."""
    names: ModelNames = {}
    for path, module in list(sys.modules.items()):
        if not path.startswith("mlx_lm.models."):
            continue
        for name, value in vars(module).items():
            names[path, name] = value
            if isinstance(value, type) and value.__module__ == path:
                names |= {(f"{path}.{value.__qualname__}", inner): one for inner, one in vars(value).items()}
    return names


@pytest.fixture
def recurrent_models() -> None:
    for name in ("bailing_moe_linear", "gated_delta", "jamba", "kimi_linear", "mamba", "qwen3_5", "qwen3_next", "ssm"):
        import_module(f"mlx_lm.models.{name}")


@pytest.mark.usefixtures("recurrent_models")
@pytest.mark.parametrize("error", ENDINGS)
@pytest.mark.parametrize("name", ["qwen3_next", "mamba"])
def test_the_hosts_recurrences_are_put_back(name: str, error: type[BaseException] | None) -> None:
    model = add_adapter(build_architecture(name), scale=1.0)
    gated_delta = import_module("mlx_lm.models.gated_delta")
    before = names_of_models()

    for chunk_size in (4, 8):
        with ending(error), training_environment(model, CPOTrainingArgs(recurrence_chunk_size=chunk_size)):
            assert gated_delta.gated_delta_ops is not before["mlx_lm.models.gated_delta", "gated_delta_ops"]
            if error is not None:
                raise error

    after = names_of_models()
    assert after.keys() == before.keys()
    assert [key for key in before if after[key] is not before[key]] == []


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_a_host_without_recurrences_costs_only_these(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm_lora.recurrent_patch", None)
    told: list[str] = []

    model = build_model() if name == "llama" else build_architecture(name)
    with memory_safe_recurrences(model, 4, told.append):
        pass

    assert len(told) == (name == "qwen3_next")
    assert all("recurrence_chunk_size has no effect" in line and "install mlx-lm-lora" in line for line in told)


def test_a_host_without_the_quantiser_costs_only_qat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(host_trainer, "_symmetric_fake_quantize_tensor")
    model = add_adapter(build_model())

    with training_environment(model, CPOTrainingArgs()):
        pass
    with (
        refused(ConfigError, key="qat_enable"),
        fake_quantised(model, bits=8, group_size=64, quantizer="host"),
    ):
        pass


@pytest.fixture
def traces() -> Iterator[Callable[[], int]]:
    """Counts how often a compiled function runs in Python when it is called five times: five only if none compiles."""

    def count() -> int:
        calls: list[int] = []

        def function(x: mx.array) -> mx.array:
            calls.append(1)
            return x

        compiled, argument = mx.compile(function), mx.array(0.0)
        for _ in range(5):
            compiled(argument)
        return len(calls)

    yield count
    mx.disable_compile()  # as all other tests want it


def evaluate() -> None:
    evaluate_cpo(add_adapter(build_model()), build_pairs(2), 1, -1, 0.1, 1.0, 64, "sigmoid")


@pytest.mark.parametrize("error", ENDINGS)
def test_compilation_that_the_user_switched_off_stays_off(
    traces: Callable[[], int], error: type[BaseException] | None
) -> None:
    mx.disable_compile()

    for wanted in (None, True, False):
        with ending(error), compile_where_it_pays(wanted):
            if error is not None:
                raise error
    evaluate()

    assert traces() == 5


@pytest.mark.parametrize("error", ENDINGS)
def test_compilation_that_was_on_is_on_again(traces: Callable[[], int], error: type[BaseException] | None) -> None:
    mx.enable_compile()

    with ending(error), compile_where_it_pays(wanted=False):
        assert traces() == 5
        if error is not None:
            raise error

    assert traces() < 5


@pytest.mark.parametrize("command", ["train", "check"])
def test_the_command_line_of_the_process_is_put_back(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["a program", "of mine"]
    monkeypatch.setattr(sys, "argv", arguments)

    with suppress(SystemExit):
        cli.main([command, "--config", "no such file.yaml", "--train-mode", "cpo"])

    assert sys.argv is arguments
    assert arguments == ["a program", "of mine"]


@pytest.mark.parametrize("error", ENDINGS)
def test_a_module_that_only_looks_like_torch_is_put_back(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    stub = ModuleType("torch")
    monkeypatch.setitem(sys.modules, "torch", stub)

    with ending(error), reading._library("here", "it cannot be loaded", "load it again"):
        assert "torch" not in sys.modules
        if error is not None:
            raise error

    assert sys.modules["torch"] is stub

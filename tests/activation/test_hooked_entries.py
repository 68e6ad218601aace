"""What the hooked ``main`` and ``run`` of mlx-lm-lora do with a call."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx_lm_lora.train as host
import pytest
from mlx_lm_lora.trainer import cpo_trainer, dpo_trainer, dsla_trainer
from support.refusals import refused

import mlx_cpo_plugin
from mlx_cpo_plugin import blas, exchange
from mlx_cpo_plugin._version import host_version
from mlx_cpo_plugin.activation import hook_state, patches
from mlx_cpo_plugin.errors import ConfigError, DataError, PluginError
from mlx_cpo_plugin.run import mode as host_run
from mlx_cpo_plugin.settings import command_line

mlx_cpo_plugin.activate()

CPO = {"train_mode": "cpo", "train": True, "beta": 0.02, "iters": 3}


class Recorder:
    """A function that remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *positional: Any, **named: Any) -> str:
        self.calls.append((positional, named))
        return "the host's result"


@pytest.fixture
def host_function() -> Recorder:
    """Stands for the host's own ``main`` or ``run``."""
    return Recorder()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Stands for the plugin's run."""
    recorder = Recorder()
    monkeypatch.setattr(host_run, "run_mode", recorder)
    return recorder


@pytest.fixture
def nothing_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hook is in place and there is no fault, until the test ends."""
    monkeypatch.setattr(hook_state, "active", [])
    monkeypatch.setattr(hook_state, "faults", {})


def test_main_hands_another_mode_to_the_host_as_it_came_in(
    host_function: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = patches.wrapped_main(host_function)
    settings = {"train_mode": "dpo", "anything": 1}
    command_line = ["mlx_lm_lora.train", "--train-mode", "sft"]
    monkeypatch.setattr(sys, "argv", command_line)

    results = [main(), main(None), main(settings), main(args=settings)]

    assert results == ["the host's result"] * 4
    assert host_function.calls == [((), {}), ((None,), {}), ((settings,), {}), ((), {"args": settings})]
    assert host_function.calls[2][0][0] is settings
    assert sys.argv is command_line


def test_run_hands_another_mode_to_the_host_as_it_came_in(host_function: Recorder) -> None:
    run = patches.wrapped_run(host_function)
    namespace = SimpleNamespace(train_mode="sft", anything=1)

    run(namespace, "callback")
    run(args=namespace, training_callback="callback")

    assert host_function.calls == [
        ((namespace, "callback"), {}),
        ((), {"args": namespace, "training_callback": "callback"}),
    ]
    assert host_function.calls[0][0][0] is namespace


def test_main_gives_the_host_resolved_settings_to_print(host_function: Recorder) -> None:
    patches.wrapped_main(host_function)(CPO)

    ((settings,), _) = host_function.calls[0]
    assert (settings["beta"], settings["iters"], settings["batch_size"]) == (0.02, 3, 1)
    assert settings["config"] is None
    assert settings["plugin_resolved"] is True


@contextmanager
def piped(text: str) -> Iterator[str]:
    """The path of a pipe that gives a text once."""
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    try:
        yield f"/dev/fd/{reading}"
    finally:
        os.close(reading)


def test_a_configuration_that_can_be_read_only_once_is_left_to_the_host(
    runs: Recorder, host_function: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with piped("train_mode: cpo\ntrain: true\nbeta: 0.02\niters: 3\n") as config:
        monkeypatch.setattr(sys, "argv", ["mlx_lm_lora.train", "--config", config, "--iters", "4"])
        host.main()
    ((settings, mode, _), _) = runs.calls[0]
    assert (mode.name, settings.beta, settings.iters) == ("cpo", 0.02, 4)

    with piped("train_mode: sft\n") as config:
        monkeypatch.setattr(sys, "argv", ["mlx_lm_lora.train", "--config", config])
        patches.wrapped_main(host_function)()
        assert host_function.calls
        assert Path(config).read_text() == "train_mode: sft\n"  # nobody has before


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_prints_the_banner_and_all_print_errors(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def host_main(args: Any = None) -> None:
        print("A banner.")
        print("Something is wrong.", file=sys.stderr)

    monkeypatch.setattr(exchange, "is_first_rank", lambda: rank == 0)

    patches.wrapped_main(host_main)(CPO)

    assert capsys.readouterr() == ("" if rank else "A banner.\n", "Something is wrong.\n")


@pytest.mark.parametrize("wrap", [patches.wrapped_main, patches.wrapped_run])
def test_arguments_that_the_host_does_not_take_are_an_error_for_cpo_too(wrap: Any, runs: Recorder) -> None:
    def host_call(args: Any = None) -> None: ...

    with pytest.raises(TypeError):
        wrap(host_call)(SimpleNamespace(**CPO), "another")
    with pytest.raises(TypeError):
        wrap(host_call)(args=SimpleNamespace(**CPO), unknown=1)
    assert runs.calls == []


@pytest.mark.parametrize("kind", [Namespace, SimpleNamespace, type("Settings", (SimpleNamespace,), {})])
def test_run_of_any_namespace_is_the_plugins(kind: Any, host_function: Recorder, runs: Recorder) -> None:
    callback = object()

    patches.wrapped_run(host_function)(kind(**CPO), callback)

    (settings, mode, passed_on), _ = runs.calls[0]
    assert (settings.beta, settings.batch_size, mode.name) == (0.02, 1, "cpo")
    assert passed_on is callback
    assert host_function.calls == []


def test_run_of_an_object_that_only_has_attributes_is_the_plugins(host_function: Recorder, runs: Recorder) -> None:
    class Settings:
        def __init__(self) -> None:
            vars(self).update(CPO)

    patches.wrapped_run(host_function)(Settings(), training_callback="callback")

    (settings, _, callback), _ = runs.calls[0]
    assert (settings.beta, callback) == (0.02, "callback")


@pytest.mark.parametrize(
    ("products", "named"), [("OpenBLAS 1.2, 34 GFLOP/s", "; BLAS: OpenBLAS 1.2, 34 GFLOP/s"), ("", "")]
)
def test_a_run_is_announced_in_one_line(
    runs: Recorder,
    nothing_hooked: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    products: str,
    named: str,
) -> None:
    hook_state.active += ["train_cpo", "run"]
    monkeypatch.setattr(blas, "description", lambda: products)

    patches.wrapped_run(Recorder())(SimpleNamespace(**CPO))

    assert capsys.readouterr().out == (
        f"mlx-cpo-plugin {mlx_cpo_plugin.__version__} runs cpo in mlx-lm-lora {host_version()}; "
        f"hooks active: train_cpo, run{named}\n"
    )


def test_a_run_with_a_slow_blas_says_what_to_install(
    runs: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blas, "advice", lambda: "pip install a-fast-one")

    patches.wrapped_run(Recorder())(SimpleNamespace(**CPO))

    assert "pip install a-fast-one" in capsys.readouterr().out


def test_an_untested_host_is_warned_of_once(
    runs: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules["mlx_lm_lora"], "__version__", "6.1.0")
    run = patches.wrapped_run(Recorder())

    run(SimpleNamespace(**CPO))
    run(SimpleNamespace(**CPO))

    assert capsys.readouterr().err.count("warning: mlx-lm-lora 6.1.0 is outside the range") == 1


def test_notes_are_printed(runs: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    patches.wrapped_run(Recorder())(SimpleNamespace(**CPO, reference_model_path="base"))

    assert capsys.readouterr().out.startswith("note: ")


def test_a_mistake_on_the_console_is_one_sentence_and_exit_code_2(
    host_function: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mlx_lm_lora.train", "--train", "--train-mode", "cpo", "--beta", "0"])

    with pytest.raises(SystemExit) as ended:
        patches.wrapped_main(host_function)()

    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: beta is 0.0 on the command line, but must be a number > 0.\n"
    assert host_function.calls == []


def test_a_mistake_that_the_run_finds_is_one_sentence_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(settings: Any = None) -> None:
        raise DataError("train.jsonl, line 3 is no JSON.")

    monkeypatch.setattr(sys, "argv", ["mlx_lm_lora.train", "--train", "--train-mode", "cpo"])

    with pytest.raises(SystemExit) as ended:
        patches.wrapped_main(main)()

    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: train.jsonl, line 3 is no JSON.\n"


@pytest.mark.parametrize("content", ["train_mode: cop\n", None])
def test_what_the_host_would_end_in_a_traceback_is_one_sentence_on_the_command_line(
    host_function: Recorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
) -> None:
    file = tmp_path / "my.yaml"
    if content:
        file.write_text(content)
    monkeypatch.setattr(sys, "argv", ["mlx_lm_lora.train", "--config", str(file)])

    with pytest.raises(SystemExit) as ended:
        patches.wrapped_main(host_function)()

    assert ended.value.code == 2
    assert str(file) in capsys.readouterr().err
    assert host_function.calls == []


def test_a_fault_while_looking_for_mistakes_does_not_keep_the_host_from_its_own_modes(
    host_function: Recorder, nothing_hooked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "refuse_mistakes", lambda words: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["mlx_lm_lora.train", "--train-mode", "sft"])

    patches.wrapped_main(host_function)()

    assert len(host_function.calls) == 1


def test_a_mistake_in_a_call_from_python_is_raised(host_function: Recorder) -> None:
    with refused(ConfigError, key="beta", place="in the call"):
        patches.wrapped_main(host_function)(CPO | {"beta": 0})
    with refused(ConfigError, key="beta", place="in the call"):
        patches.wrapped_run(host_function)(SimpleNamespace(**CPO | {"beta": 0}))


def test_a_fault_while_asking_for_the_mode_bars_cpo_and_nothing_else(
    host_function: Recorder, runs: Recorder, nothing_hooked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(call: Any) -> None:
        raise RuntimeError("a fault for the test")

    monkeypatch.setattr(command_line, "requested_mode", fail)
    main, run = patches.wrapped_main(host_function), patches.wrapped_run(host_function)

    main({"train_mode": "sft"})
    run(SimpleNamespace(train_mode="dpo"))

    assert len(host_function.calls) == 2
    for entry in (lambda: main(CPO), lambda: run(SimpleNamespace(**CPO))):
        with pytest.raises(PluginError, match=r"only partly hooked.*RuntimeError: a fault for the test"):
            entry()
    assert len(host_function.calls) == 2
    assert runs.calls == []


def test_cpo_without_a_plugin_that_registers_it_does_not_reach_the_hosts(
    host_function: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "requested_mode", lambda call: None)

    with pytest.raises(PluginError, match="No loaded plugin registers the train mode 'cpo'"):
        patches.wrapped_run(host_function)(SimpleNamespace(**CPO))
    assert host_function.calls == []


def test_only_the_names_of_cpo_are_replaced() -> None:
    # The host's CPOTrainingArgs is its DPOTrainingArgs under another name.
    assert host.DPOTrainingArgs is dpo_trainer.DPOTrainingArgs is cpo_trainer._host_CPOTrainingArgs
    assert host.CPOTrainingArgs is cpo_trainer.CPOTrainingArgs is mlx_cpo_plugin.CPOTrainingArgs
    assert dpo_trainer.DPOTrainingArgs.__module__ == "mlx_lm_lora.trainer.dpo_trainer"
    assert dsla_trainer.cpo_loss is cpo_trainer.cpo_loss
    assert cpo_trainer.cpo_loss.__module__ == "mlx_lm_lora.trainer.cpo_trainer"


def test_hooked_functions_keep_their_names_and_signatures() -> None:
    assert (host.main.__name__, host.run.__name__) == ("main", "run")
    assert host.main.__wrapped__ is host._host_main
    assert host.run.__wrapped__ is host._host_run


def test_the_source_of_a_hooked_module_stays_readable() -> None:
    import inspect

    assert "def train_cpo(" in inspect.getsource(cpo_trainer)
    assert host.__spec__.loader.get_source(host.__name__) == inspect.getsource(host)

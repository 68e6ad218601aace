"""The base model and the tuned one answer in turn from one place in memory, each as it would alone."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load

pytest.importorskip("support.gradio_import", reason="needs the extra 'studio'")

from mlx_cpo_plugin.studio import chat as chat_process
from mlx_cpo_plugin.studio import chat_tab
from mlx_cpo_plugin.studio.chat import BothModels
from mlx_cpo_plugin.studio.chat_tab import NOTHING, Chat, Chats, asked_of
from mlx_cpo_plugin.studio.child import ChildError

QUESTION = [{"role": "user", "content": "How many apples are in the basket?"}]
TOKENS = mx.array([[1, 5, 9, 2]])


@pytest.fixture(params=["lora", "dora", "full"])
def adapter_path(request: pytest.FixtureRequest, settings: dict[str, Any], run_main: Any) -> Path:
    """A run of a few steps, of some of the layers, that moves the model."""
    run_main(settings | {"train_type": request.param, "num_layers": 1, "learning_rate": 0.05, "iters": 3})
    return Path(settings["adapter_path"])


def logits(model: Any) -> list[float]:
    flat: list[float] = model(TOKENS).flatten().tolist()
    return flat


def test_each_side_computes_what_it_computes_when_it_is_loaded_alone(adapter_path: Path, model_folder: Path) -> None:
    both = BothModels(adapter_path)
    alone = {
        "base": logits(load(str(model_folder))[0]),
        "tuned": logits(load(str(model_folder), adapter_path=str(adapter_path))[0]),
    }
    assert alone["base"] != alone["tuned"]

    for side in ("tuned", "base", "base", "tuned", "base"):
        assert logits(both.become(side)) == pytest.approx(alone[side], abs=1e-5)


def test_what_had_no_answer_is_not_asked_again() -> None:
    def turns(question: str, answer: str) -> list[dict[str, Any]]:
        parts = [{"type": "text", "text": answer}]  # as Gradio gives it back
        return [{"role": "user", "content": question, "metadata": None}, {"role": "assistant", "content": parts}]

    asked = asked_of([*turns("A?", "a"), *turns("B?", NOTHING)], "C?", "Be brief.")

    assert [(turn["role"], turn["content"]) for turn in asked] == [
        ("system", "Be brief."),
        ("user", "A?"),
        ("assistant", "a"),
        ("user", "C?"),
    ]


def test_a_new_conversation_of_one_visit_is_none_of_another() -> None:
    chats = Chats()
    before = [chats.conversation(visit) for visit in ("a", "b")]

    chats.begin_anew("a")

    assert [chats.conversation(visit) == number for visit, number in zip("ab", before, strict=True)] == [False, True]


def test_an_adapter_that_was_trained_on_since_is_loaded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chat, "is_alive", True)
    monkeypatch.setattr(Chat, "end", lambda chat: None)
    monkeypatch.setattr(chat_tab.subprocess, "Popen", lambda *_, **__: None)
    chats, file = Chats(), tmp_path / "adapters.safetensors"
    file.write_bytes(b"first")
    first = chats.of("visit", tmp_path, tmp_path)
    assert chats.of("visit", tmp_path, tmp_path) is first

    file.write_bytes(b"second")

    assert chats.of("visit", tmp_path, tmp_path) is not first


def test_a_model_that_fails_in_its_own_way_is_a_reply_and_the_next_question_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: BothModels, *_: object) -> Iterator[str]:
        raise RuntimeError("[conv] no such kernel.\nmore")

    questions = [{"base": [], "tuned": [], "max_tokens": 1, "temperature": 0.0}] * 2
    replies = io.StringIO()
    monkeypatch.setattr(chat_process.BothModels, "__init__", lambda self, folder: None)
    monkeypatch.setattr(chat_process.BothModels, "answer", fail)
    monkeypatch.setattr(chat_process.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["chat", "folder"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(each) + "\n" for each in questions)))
    monkeypatch.setattr(sys, "stdout", replies)

    assert chat_process.main() == 0

    told = [{"error": "The models cannot answer: [conv] no such kernel."}, {"done": True}]
    assert [json.loads(line) for line in replies.getvalue().splitlines()] == [{"ready": True}, *told, *told]


@pytest.fixture
def chat(model_folder: Path, tmp_path: Path) -> Iterator[Chat]:
    """A process with an adapter that changes nothing."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "run_settings.yaml").write_text(f"model: {model_folder}\ntrain_mode: cpo\n")
    config = {"fine_tune_type": "full", "num_layers": -1, "lora_parameters": {}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shutil.copyfile(model_folder / "model.safetensors", folder / "adapters.safetensors")
    chat = Chat(folder, tmp_path)
    yield chat
    chat.end()


@pytest.mark.slow
def test_a_conversation_of_several_turns_is_answered_by_both_until_it_is_stopped(chat: Chat) -> None:
    turns = QUESTION
    for _ in range(2):
        answers = dict(chat.ask(base=turns, tuned=turns, max_tokens=4, temperature=0.0))
        assert answers["base"] == answers["tuned"]
        turns = [*turns, {"role": "assistant", "content": "Seven."}, *QUESTION]

    with pytest.raises(ChildError):
        list(chat.ask(base=[{"role": "user", "content": "\ud800"}], tuned=turns, max_tokens=4, temperature=0.0))

    answering = chat.ask(base=QUESTION, tuned=QUESTION, max_tokens=100_000, temperature=1.0)
    next(answering)
    chat.stop()
    assert {side for side, _ in answering} <= {"base", "tuned"}
    assert chat.is_alive


@pytest.mark.slow
def test_a_run_without_an_adapter_is_told_and_another_run_ends_the_chat_before(tmp_path: Path) -> None:
    chats = Chats()
    first = chats.of("visit", tmp_path / "a", tmp_path)

    second = chats.of("visit", tmp_path / "b", tmp_path)

    assert not first.is_alive
    with pytest.raises(ChildError, match=r"adapters\.safetensors"):
        second.load()
    chats.end("visit")
    assert not second.is_alive

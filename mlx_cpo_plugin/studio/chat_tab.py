"""Talk to the base model and the tuned one side by side, over several turns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr

from mlx_cpo_plugin.checkpoints import ADAPTER_FILE
from mlx_cpo_plugin.errors import UserError
from mlx_cpo_plugin.studio.child import PYTHON, Cancelled, ChildError
from mlx_cpo_plugin.studio.live_runs import LiveRuns, state_of_file
from mlx_cpo_plugin.studio.messages import fault_html, note_html

NOTHING = "(no answer)"

Messages = list[dict[str, Any]]


class Chat:
    """A process that holds a base model and its tuned one.

    Args:
        adapter_path: that of a run.
        root: where it runs.
    """

    def __init__(self, adapter_path: Path, root: Path) -> None:
        self.adapter_path, self.weights = adapter_path, state_of_file(adapter_path / ADAPTER_FILE)
        self._process = subprocess.Popen(
            [*PYTHON, "-m", "mlx_cpo_plugin.studio.chat", str(adapter_path)],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.is_ready = self.is_ended = False

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def load(self) -> None:
        """Wait until both models are in memory.

        Raises:
            ChildError: they cannot be loaded.
        """
        if not self.is_ready:
            self._reply()
            self.is_ready = True

    def ask(self, **request: Any) -> Iterator[tuple[str, str]]:
        """Yield the side and its answer as far as it goes, until both have answered; see ``chat.py``.

        Raises:
            ChildError: a model cannot be asked that, or the process has ended.
        """
        self.load()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the missing reply says so
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        fault: ChildError | None = None
        while True:
            try:
                reply = self._reply()
            except ChildError as error:
                fault = error
                if not self.is_alive:
                    raise
                continue
            if "done" in reply:
                break
            yield reply["side"], reply["text"]
        if fault is not None:
            raise fault

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            if self.is_ended:
                raise Cancelled("Stopped.")
            killed = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
            raise ChildError(f"The models' process ended (exit code {code}{killed}).")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ChildError(str(reply["error"]))
        return reply

    def stop(self) -> None:
        """End the answers that are being given."""
        self._process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """End the process; its number may be another's once it has ended."""
        self.is_ended = True
        if self.is_alive:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Chats:
    """The chat of each visit of the page, at most one."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._chats: dict[str, Chat] = {}
        self._conversations: Counter[str] = Counter()

    def conversation(self, visit: str | None) -> int:
        """Return the number of the conversation that a visit is in."""
        with self._lock:
            return self._conversations[visit or ""]

    def begin_anew(self, visit: str | None) -> None:
        """Let a visit begin its next conversation."""
        with self._lock:
            self._conversations[visit or ""] += 1
        self.stop(visit)

    def of(self, visit: str | None, adapter_path: Path, root: Path) -> Chat:
        """Return the chat of a visit with this adapter, begun if need be; that of another, or older, one ends."""
        with self._lock:
            chat = self._chats.get(visit or "")
        weights = state_of_file(adapter_path / ADAPTER_FILE)
        if chat is not None and (chat.adapter_path, chat.weights) == (adapter_path, weights) and chat.is_alive:
            return chat
        self.end(visit)
        chat = Chat(adapter_path, root)
        with self._lock:
            self._chats[visit or ""] = chat
        return chat

    def stop(self, visit: str | None) -> None:
        """End the answers that the chat of a visit is giving, or its loading."""
        with self._lock:
            chat = self._chats.get(visit or "")
        if chat is not None and chat.is_ready and chat.is_alive:
            chat.stop()
        else:
            self.end(visit)

    def end(self, visit: str | None) -> None:
        """End the chat of a visit, if there is one."""
        with self._lock:
            chat = self._chats.pop(visit or "", None)
        if chat is not None:
            chat.end()

    def end_all(self) -> None:
        """End all of them."""
        for visit in list(self._chats):
            self.end(visit)


def build_chat_tab(live: LiveRuns, chats: Chats) -> gr.Dropdown:
    """Lay out the tab; return the control that names the run, whose choices are those at the time."""
    run = gr.Dropdown(live.reported(), label="Run", info="Whose adapter and base model answer.", elem_id="chat-run")
    with gr.Row():
        sides = [
            gr.Chatbot(
                label=title,
                height=420,
                min_width=300,
                render_markdown=False,
                buttons=["copy"],
                elem_id=f"chat-{side}",
            )
            for side, title in (("base", "Base model"), ("tuned", "Tuned model"))
        ]
    said = gr.HTML("", elem_id="chat-said")
    prompt = gr.Textbox(
        "",
        lines=1,
        label="Message",
        info="Enter sends it, Shift+Enter begins a new line.",
        elem_id="chat-prompt",
        max_lines=8,
    )
    with gr.Row():
        send = gr.Button("Send", variant="primary", size="md", elem_id="chat-send")
        stop = gr.Button("Stop", variant="stop", size="md", interactive=False, elem_id="chat-stop")
        clear = gr.Button("New conversation", size="md", elem_id="chat-clear")
    with gr.Accordion("Settings", open=False):
        system = gr.Textbox("", label="System prompt", info="Empty: none.", elem_id="chat-system")
        temperature = gr.Slider(
            0, 1.5, value=0, step=0.05, label="Temperature", info="0 takes the likeliest token.", elem_id="chat-heat"
        )
        tokens = gr.Slider(16, 1024, value=256, step=16, label="Tokens of an answer at most", elem_id="chat-tokens")

    def talk(
        request: gr.Request,
        name: str | None,
        text: str,
        system: str,
        temperature: float,
        tokens: int,
        *histories: Messages,
    ) -> Iterator[dict[Any, Any]]:
        idle = {send: gr.update(interactive=True), stop: gr.update(interactive=False)}
        if not text.strip():
            yield idle | {said: note_html("Write a message first.")}
            return
        answers = {"base": "", "tuned": ""}
        conversation = chats.conversation(request.session_hash)

        def shown(nothing: str = "") -> dict[Any, Any]:
            if chats.conversation(request.session_hash) != conversation:
                return {}  # another has begun meanwhile
            question = {"role": "user", "content": text}
            given = [answer or nothing for answer in answers.values()]
            return {
                side: [*history, question, *([{"role": "assistant", "content": answer}] if answer else [])]
                for side, history, answer in zip(sides, histories, given, strict=True)
            }

        try:
            (record,) = live.records([name] if name else [])
        except UserError as error:
            yield idle | {said: fault_html(error)}
            return
        yield shown() | {
            said: note_html(f"Loading the models of {name}, where they are not loaded yet."),
            prompt: "",
            send: gr.update(interactive=False),
            stop: gr.update(interactive=True),
        }
        try:
            chat = chats.of(request.session_hash, record.folder, live.root)
            chat.load()
            asked = {side: asked_of(history, text, system) for side, history in zip(answers, histories, strict=True)}
            for side, answer in chat.ask(**asked, max_tokens=int(tokens), temperature=temperature):
                answers[side] = answer
                yield shown() | {said: note_html(f"The {side} model answers.")}
            html = ""
        except Cancelled as error:
            html = note_html(str(error))
        except UserError as error:
            html = fault_html(error)
        yield idle | shown(NOTHING) | {said: html}

    def halt(request: gr.Request) -> None:
        chats.stop(request.session_hash)

    def begin_anew(request: gr.Request) -> list[Any]:
        chats.begin_anew(request.session_hash)
        return [[], [], ""]

    gr.on(
        [send.click, prompt.submit],
        talk,
        [run, prompt, system, temperature, tokens, *sides],
        [*sides, said, prompt, send, stop],
        show_progress="hidden",
        concurrency_limit=None,
        trigger_mode="always_last",  # what is sent while an answer is being written follows it
    )
    stop.click(halt, queue=False)
    clear.click(begin_anew, None, [*sides, said], queue=False)
    run.change(begin_anew, None, [*sides, said], queue=False)
    return run


def asked_of(history: Messages, text: str, system: str = "") -> Messages:
    """Return what a model is asked: the conversation as Gradio gives it back, without what had no answer."""
    turns: Messages = [{"role": "system", "content": system}] if system.strip() else []
    for question, answer in zip(history[::2], history[1::2], strict=False):
        if _text(answer["content"]) != NOTHING:
            turns += [{"role": turn["role"], "content": _text(turn["content"])} for turn in (question, answer)]
    return [*turns, {"role": "user", "content": text}]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)

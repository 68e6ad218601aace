"""``--to ollama``: a GGUF file and the Modelfile from which Ollama makes a model.

Ollama's templates are Go's. What stands around the messages is found by rendering conversations with the model's own
chat template, and written only if putting it together again gives the same text for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_cpo_plugin.comparison.questions import Say
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.export.errors import ExportError
from mlx_cpo_plugin.export.gguf_file import TYPES, check_gguf, write_gguf
from mlx_cpo_plugin.export.trained import Trained
from mlx_cpo_plugin.run.building import positions_in

MODELFILE = "Modelfile"
# What Ollama takes for a prompt and its answer where nothing is said.
USUAL_CONTEXT = 4096
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
_SYSTEM, _TURNS = "Zsystem0Z", ("Zuser1Z", "Zassistant1Z", "Zuser2Z", "Zassistant2Z", "Zuser3Z")


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template puts around messages.

    Attributes:
        opening: before the first message of the user, where there is no system message.
        before_system, after_system: around the system message, up to the first message of the user; None where the
            template takes none.
        before_answer, after_answer: between a message of the user and the answer, and between that and the next one.
        asks: after the last message of the user, for an answer.
    """

    opening: str
    before_system: str | None
    after_system: str | None
    before_answer: str
    after_answer: str
    asks: str

    def render(self, turns: Sequence[str], system: str | None) -> str:
        """Return what the Go template of :meth:`go_template` gives; ``turns`` begin and end with the user's."""
        text = self.opening if system is None else f"{self.before_system}{system}{self.after_system}"
        for place, turn in enumerate(turns):
            is_last = place == len(turns) - 1
            text += turn + (self.after_answer if place % 2 else self.asks if is_last else self.before_answer)
        return text

    def go_template(self) -> str:
        """Return the template as Ollama has it, of its variables ``.System`` and ``.Messages``."""
        opening = _go(self.opening)
        if self.before_system is not None and self.after_system is not None:
            system = f"{_go(self.before_system)}{{{{ .System }}}}{_go(self.after_system)}"
            opening = f"{{{{ if .System }}}}{system}{{{{ else }}}}{opening}{{{{ end }}}}"
        asks = _go(self.asks)
        if self.asks != self.before_answer:
            is_last = "{{ if eq (len (slice $.Messages $place)) 1 }}"
            asks = f"{is_last}{asks}{{{{ else }}}}{_go(self.before_answer)}{{{{ end }}}}"
        after = f"{{{{ if $answered }}}}{_go(self.after_answer)}{{{{ end }}}}"
        return (
            f"{{{{ $answered := false }}}}{opening}{{{{ range $place, $message := .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{after}{{{{ .Content }}}}{asks}'
            '{{ else if eq .Role "assistant" }}{{ .Content }}{{ $answered = true }}{{ end }}{{ end }}'
        )


def write_ollama(trained: Trained, folder: Path, bits: int, say: Say) -> list[str]:
    """Write Modelfile and GGUF file into ``folder``, and return notes on them.

    Raises:
        ExportError: see :func:`write_gguf`, or the chat template has no form in Ollama.
    """
    check_gguf(trained)
    bos = trained.inner_tokenizer.bos_token if trained.adds_bos else ""
    form = chat_format(
        ChatTokenizer.from_settings(trained.tokenizer, trained.settings), bos, trained.template_arguments
    )
    file = folder / f"model-{TYPES[bits]}.gguf"
    (folder / MODELFILE).write_text(modelfile(trained, form, file.name), encoding="utf-8")
    notes = write_gguf(trained, file, bits, say)
    if form.before_system is None:
        notes.append("The chat template takes no system message: Ollama's SYSTEM has no effect.")
        say(notes[-1])
    return notes


def modelfile(trained: Trained, form: ChatFormat, gguf_name: str) -> str:
    """Return the Modelfile: model, template, where answers end, and how the base model is to be sampled."""
    tokens, inner = trained.tokenizer, trained.inner_tokenizer
    ends = sorted({inner.eos_token_id, *getattr(tokens, "eos_token_ids", ())} - {None})
    positions = positions_in(trained.config)
    context = max(USUAL_CONTEXT, trained.settings.max_seq_length)
    sampling: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # most models have none
        sampling = json.loads((trained.base / "generation_config.json").read_text(encoding="utf-8"))
    lines = [
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{form.go_template()}"""',
        *(f"PARAMETER stop {json.dumps(inner.convert_ids_to_tokens(end), ensure_ascii=False)}" for end in ends),
        f"PARAMETER num_ctx {min(context, positions or context)}",
        *(f"PARAMETER {ours} {sampling[theirs]}" for theirs, ours in _SAMPLING.items() if sampling.get(theirs)),
    ]
    return "\n".join(lines) + "\n"


def chat_format(tokenizer: ChatTokenizer, bos: str = "", variant: Mapping[str, object] | None = None) -> ChatFormat:
    """Return what the chat template puts around messages.

    Args:
        bos: what llama.cpp puts before the text by itself.
        variant: arguments of the template, as in training.

    Raises:
        ExportError: it does more than put fixed text around them.
    """

    def render(turns: Sequence[str], system: str | None) -> str:
        roles = ("user", "assistant")
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(turns)]
        return tokenizer.render(messages, None, True, variant).removeprefix(bos)

    try:
        opening, before_answer, after_answer, asks = _around(render, _TURNS[:3], None)
    except (UnusableRow, ValueError) as error:
        raise _no_form(f"it does not render a plain conversation: {error}") from error
    before_system = after_system = None
    with suppress(UnusableRow, ValueError):
        before_system, after_system, _ = _around(render, _TURNS[:1], _SYSTEM)
    form = ChatFormat(opening, before_system, after_system, before_answer, after_answer, asks)
    for number in (1, 3, 5):
        for text in (None,) if before_system is None else (None, _SYSTEM):
            if render(_TURNS[:number], text) != form.render(_TURNS[:number], text):
                raise _no_form("it does more than put fixed text around messages")
    if '"""' in form.go_template():
        raise _no_form('it has """ in it')
    return form


def _around(render: Callable[[Sequence[str], str | None], str], turns: Sequence[str], system: str | None) -> list[str]:
    """Return the texts between the messages of a conversation, first what comes before and last what comes behind.

    Raises:
        ValueError: a message does not stand there as it is, once.
    """
    parts, rest = [], render(turns, system)
    for message in ([system] if system else []) + list(turns):
        if rest.count(message) != 1:
            raise ValueError("a message does not stand in its text exactly once")
        before, _, rest = rest.partition(message)
        parts.append(before)
    return [*parts, rest]


def _no_form(why: str) -> ExportError:
    return ExportError(
        f"The chat template cannot be written for Ollama ({why}); export with --to gguf, which has it as it is.",
        key="to",
    )


def _go(text: str) -> str:
    """Return text as it stands in a Go template."""
    return text.replace("{{", '{{ "{{" }}')

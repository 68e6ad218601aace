"""What to type to use a model that a run has left, in each of its forms."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from shlex import quote
from typing import NamedTuple

SHELL, PYTHON = "sh", "python"


class Usage(NamedTuple):
    """Lines that use a model, and the language that they are written in, :data:`SHELL` or :data:`PYTHON`."""

    language: str
    lines: tuple[str, ...]


def usage(
    form: str, here: str, base: str = "", arguments: Mapping[str, object] | None = None, fetched: bool = False
) -> Usage:
    """Return how to use a model.

    Args:
        form: ``adapter``, ``mlx``, ``peft``, ``gguf`` or ``ollama``.
        here: its folder or repository.
        base: the model that an adapter belongs to.
        arguments: of the chat template, as in training.
        fetched: whether ``here`` is a repository.
    """
    match form:
        case "adapter":
            fetching: tuple[str, ...] = ()
            if fetched:  # mlx_lm fetches models, but no adapters
                repository, here = here, here.rpartition("/")[2]
                fetching = (f"hf download {quote(repository)} --local-dir {quote(here)}",)
            return Usage(
                SHELL, (*fetching, _generate(f"--model {quote(base)} --adapter-path {quote(here)}", arguments))
            )
        case "mlx":
            return Usage(SHELL, (_generate(f"--model {quote(here)}", arguments),))
        case "gguf":
            return Usage(SHELL, (f"llama-cli -m {quote(here)}/*.gguf -p 'Hi!'",))
        case "ollama":
            name = re.sub(r"[^\w.-]", "-", here.rpartition("/")[2]).lower()
            return Usage(SHELL, (f"ollama create {name} -f {quote(here + '/Modelfile')}", f"ollama run {name}"))
        case "peft":
            load = f"model = AutoPeftModelForCausalLM.from_pretrained({json.dumps(here, ensure_ascii=False)})"
            return Usage(PYTHON, ("from peft import AutoPeftModelForCausalLM", load))
    raise ValueError(form)


def _generate(model: str, arguments: Mapping[str, object] | None) -> str:
    template = f" --chat-template-config {quote(json.dumps(arguments))}" if arguments else ""
    return f"mlx_lm.generate {model} --prompt 'Hi!'{template}"

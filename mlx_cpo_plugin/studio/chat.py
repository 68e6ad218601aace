"""Talk to the base model and the tuned one: ``python -m mlx_cpo_plugin.studio.chat ADAPTER_PATH``.

A process of its own, so that no model stays with the page. It reads one JSON object a line::

    {"base": [{"role": "user", "content": "Hi!"}], "tuned": [...], "max_tokens": 256, "temperature": 0.0}

and writes ``{"side": "base", "text": "Hel"}``, the answer as far as it goes, again and again, at last
``{"done": true}``; what is wrong is ``{"error": "..."}``. SIGINT ends an answer.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler

from mlx_cpo_plugin.comparison.contenders import Contender, contenders, load_base, put_on
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.data.tokens import prompt_tokens
from mlx_cpo_plugin.errors import DataError, UserError, first_line
from mlx_cpo_plugin.model.scoring import prepared_to_answer

SIDES = ("base", "tuned")
SECONDS_BETWEEN_PARTS = 0.5

Messages = Sequence[dict[str, str]]


class BothModels:
    """A base model and the same tuned, in memory once as far as they are the same.

    Args:
        adapter_path: that of a run.

    Raises:
        ConfigError: there is no such adapter, or no base model to it.
    """

    def __init__(self, adapter_path: Path) -> None:
        base, tuned = contenders([adapter_path], None, None)
        self.model, self.tokenizer = load_base(base.settings)
        self.chat_tokenizer = ChatTokenizer.from_settings(self.tokenizer, base.settings)
        self._modules, self._arrays = self._put_on(tuned)
        self.side = "tuned"

    def _put_on(self, tuned: Contender) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the modules and arrays of the base model that the adapter has replaced, by name."""
        modules, arrays = _leaves(self.model), _arrays(self.model)
        put_on(self.model, tuned)
        now = dict(self.model.named_modules())
        replaced = {name: module for name, module in modules.items() if now[name] is not module}
        inside = tuple(f"{name}." for name in replaced)
        left = {name: array for name, array in _arrays(self.model).items() if not name.startswith(inside)}
        return replaced, {name: arrays[name] for name, array in left.items() if arrays[name] is not array}

    def become(self, side: str) -> nn.Module:
        """Return the model of this side; the one before is no longer it."""
        if side != self.side:
            now = dict(self.model.named_modules())
            modules = {name: now[name] for name in self._modules}
            arrays = {name: array for name, array in _arrays(self.model).items() if name in self._arrays}
            self.model.update_modules(tree_unflatten(list(self._modules.items())))
            self.model.update(tree_unflatten(list(self._arrays.items())))
            self._modules, self._arrays, self.side = modules, arrays, side
        return self.model

    def answer(self, side: str, messages: Messages, max_tokens: int, temperature: float) -> Iterator[str]:
        """Yield the answer to a conversation, token by token as far as it goes.

        Raises:
            DataError: the chat template does not take the conversation.
        """
        try:
            tokens = prompt_tokens({"prompt": list(messages)}, self.chat_tokenizer)
        except UnusableRow as error:
            raise DataError(f"This cannot be asked: {error}. Begin anew, or write another.", key="prompt") from error
        model, text = self.become(side), ""
        with prepared_to_answer(model, len(tokens), max_tokens):
            for response in stream_generate(
                model,
                self.tokenizer,
                tokens.tolist(),
                max_tokens=max_tokens,
                sampler=make_sampler(temp=temperature),
            ):
                text += response.text
                yield text


def _leaves(model: nn.Module) -> dict[str, nn.Module]:
    return dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))


def _arrays(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def main() -> int:
    """Answer what stands on standard input until it is closed."""
    asked_to_stop = False

    def stop(number: int, frame: object) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True

    signal.signal(signal.SIGINT, stop)
    replies = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no reply

    def say(**reply: Any) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    try:
        both = BothModels(Path(sys.argv[1]))
    except Exception as error:
        say(error=_reason(error))
        return 2
    say(ready=True)
    for line in sys.stdin:
        request, asked_to_stop = json.loads(line), False
        try:
            for side in SIDES:
                if asked_to_stop:
                    break
                said, text = time.monotonic(), ""
                for text in both.answer(side, request[side], request["max_tokens"], request["temperature"]):
                    if time.monotonic() - said > SECONDS_BETWEEN_PARTS:
                        said = time.monotonic()
                        say(side=side, text=text)
                    if asked_to_stop:
                        break
                say(side=side, text=text)
        except Exception as error:
            say(error=_reason(error))
        say(done=True)
    return 0


def _reason(error: Exception) -> str:
    """Return why the models do not answer; architectures and devices fail in all ways."""
    return str(error) if isinstance(error, UserError) else f"The models cannot answer: {first_line(error)}."


if __name__ == "__main__":
    sys.exit(main())

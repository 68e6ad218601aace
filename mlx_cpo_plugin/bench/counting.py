"""Counts what a training run computes: tokens through the layers, positions through the output head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cpo_plugin.kernels import operations


@dataclass
class Work:
    """What went through a model while it was watched.

    Attributes:
        layer_shapes: (rows, tokens) of each call of the first layer; a call that is computed again counts again.
        head_logits: logits of each call of the output head.
        vocabulary: logits that the whole head has for a position.
    """

    layer_shapes: list[tuple[int, int]] = field(default_factory=list)
    head_logits: list[int] = field(default_factory=list)
    vocabulary: int = 1

    @property
    def backbone_tokens(self) -> int:
        """Tokens that went through every layer, padding included."""
        return sum(rows * tokens for rows, tokens in self.layer_shapes)

    @property
    def head_tokens(self) -> float:
        """Positions for which logits were computed; a position with half of its logits counts half."""
        return sum(self.head_logits) / self.vocabulary

    def clear(self) -> None:
        """Forget everything counted so far."""
        self.layer_shapes.clear()
        self.head_logits.clear()


@contextmanager
def counted_work(model: nn.Module) -> Iterator[Work]:
    """Count the work of ``model`` until the context ends; compilation must be off, or only tracing is seen."""
    work = Work()
    first_layer = model.layers[0]
    with ExitStack() as stack:
        stack.enter_context(
            _watched(first_layer, "__call__", lambda x, _: work.layer_shapes.append((x.shape[0], x.shape[1])))
        )
        for module, method in _heads(model):
            layer: Any = getattr(module, "linear", module)  # inside an adapter, if there is one
            work.vocabulary = len(layer.weight)
            stack.enter_context(_watched(module, method, lambda _, logits: work.head_logits.append(logits.size)))
        stack.enter_context(_watched_kernel(lambda hidden: work.head_logits.append(len(hidden) * work.vocabulary)))
        yield work


@contextmanager
def _watched_kernel(record: Callable[[mx.array], None]) -> Iterator[None]:
    """Record the hidden states that the compiled head is given."""
    original = operations.target_scores

    def watched(hidden: mx.array, *args: Any) -> Any:
        record(hidden)
        return original(hidden, *args)

    setattr(operations, "target_scores", watched)  # noqa: B010 - mypy knows the function
    try:
        yield
    finally:
        setattr(operations, "target_scores", original)  # noqa: B010 - as above


def _heads(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return what can turn hidden states into logits: the output layer, and embeddings that are tied to it."""
    heads = []
    for name, module in model.named_modules():
        if name.split(".")[-1] == "lm_head":
            heads.append((module, "__call__"))
        elif hasattr(module, "as_linear"):
            heads.append((module, "as_linear"))
    return heads


@contextmanager
def _watched(module: nn.Module, method: str, record: Callable[[mx.array, Any], None]) -> Iterator[None]:
    """Record the first argument and the result of each call of one module's method.

    The method is replaced in the class, with an eye on this one module only: trainers that checkpoint replace the
    class's method in turn, so both a layer's first run and its second one pass here.
    """
    owner = type(module)
    original = getattr(owner, method)
    is_own = method in vars(owner)

    def watched(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        result = original(self, x, *args, **kwargs)
        if self is module:
            record(x, result)
        return result

    setattr(owner, method, watched)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, method, original)
        else:
            delattr(owner, method)

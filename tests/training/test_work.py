"""How much a training run computes. It counts work and takes no time, so it says the same on every machine.

A number below that falls after a change is a gain: lower it here. One that rises is work that nobody needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import pytest
from mlx.utils import tree_flatten
from support.tiny import VOCABULARY, add_adapter, build_model, build_pairs

from mlx_cpo_plugin.bench.counting import Work, counted_work
from mlx_cpo_plugin.bench.shapes import Shape
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model import parity
from mlx_cpo_plugin.model.buckets import PAIR_BY_PAIR
from mlx_cpo_plugin.model.recompute import checkpointed_layers
from mlx_cpo_plugin.training.trainer import CPOTrainingArgs, train_cpo

# Two pairs of 40 + 20 + 18 tokens: in one pass, the prompts without their last tokens, then all answers from there.
ALIKE = Shape(prompt=40, chosen=20, rejected=18, batch=2, vocabulary=VOCABULARY)
# Two of 40 + 20 + 10, pair by pair: each prompt, then each answer by itself to save memory, and the prompt again for
# its gradient.
UNLIKE = replace(ALIKE, rejected=10)


def logits(*positions: int) -> int:
    """Of positions that are scored together: each over the vocabulary once, and for the word of each by itself."""
    return sum(count * (VOCABULARY + count) for count in positions)


# Shape and settings -> tokens through the layers, logits out of the head, and passes of an iteration.
WORK_OF_AN_ITERATION = [
    (ALIKE, {}, 2 * (39 + 2 * 20), logits(2 * (20 + 18)), 2),
    (ALIKE, {"grad_checkpoint": True}, 2 * 2 * (39 + 2 * 20), logits(2 * (20 + 18)), 4),
    (UNLIKE, {}, 2 * (2 * 39 + 20 + 10), 2 * logits(20, 10), 8),
    (UNLIKE, {"grad_checkpoint": True}, 2 * (39 + 2 * 39 + 2 * (20 + 10)), 2 * logits(20, 10), 14),
    (UNLIKE, {"seq_step_size": 32}, 2 * (2 * 39 + 20 + 10), 2 * logits(20, 10), 12),
]

# 60 pairs of mixed lengths in batches of two: 9,092 tokens, of which 5,962 are the answers'.
EPOCH_TOKENS = 13_086
EPOCH_LOGITS = 2_188_884
EPOCH_PASSES = 60
# 40 pairs of mixed lengths in batches of two: each compiled function with each of its shapes.
COMPILED_SHAPES = 8


class IterationWork:
    """A training callback that keeps the work of every iteration but the first, which may hold what a run tries out."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.tokens_through_layers: list[int] = []
        self.logits_out_of_head: list[int] = []
        self.passes: list[int] = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        if info["iteration"] > 1:
            self.tokens_through_layers.append(self.work.backbone_tokens)
            self.logits_out_of_head.append(sum(self.work.head_logits))
            self.passes.append(len(self.work.layer_shapes))
        self.work.clear()


def train(folder: Path, pairs: list[PreferencePair], iterations: int, **arguments: Any) -> IterationWork:
    """Train in batches of two, and return what each iteration after the first computed."""
    model = add_adapter(build_model())
    settings = CPOTrainingArgs(
        batch_size=2,
        iters=iterations,
        steps_per_report=1,
        adapter_file=str(folder / "adapters.safetensors"),
        **arguments,
    )
    with counted_work(model) as work:
        recorder = IterationWork(work)
        train_cpo(model, optimizers.SGD(learning_rate=0.01), pairs, args=settings, training_callback=recorder)
    return recorder


def test_tokens_and_positions_of_every_forward_pass_are_counted() -> None:
    model = build_model()
    with counted_work(model) as work:
        model(mx.zeros((2, 7), mx.int32))
        model.model(mx.zeros((1, 5), mx.int32))

    assert work.layer_shapes == [(2, 7), (1, 5)]
    assert (work.backbone_tokens, work.head_tokens) == (19, 14)


def test_an_output_layer_of_its_own_is_seen_too() -> None:
    model = build_model(tie_word_embeddings=False)
    with counted_work(model) as work:
        model(mx.zeros((2, 7), mx.int32))

    assert work.head_tokens == 14


def test_what_is_computed_again_for_the_gradient_counts_again() -> None:
    model = add_adapter(build_model())

    def logits_sum(model: nn.Module) -> mx.array:
        return model(mx.zeros((2, 7), mx.int32)).sum()

    with counted_work(model) as work, checkpointed_layers(model):
        mx.eval(nn.value_and_grad(model, logits_sum)(model))

    assert (work.backbone_tokens, work.head_tokens) == (2 * 14, 14)


def test_another_model_of_the_same_class_does_not_count_and_nothing_stays_behind() -> None:
    model, other = build_model(), build_model()
    call = type(model.layers[0]).__call__
    with counted_work(model) as work:
        other(mx.zeros((2, 7), mx.int32))

    assert work.backbone_tokens == 0
    assert type(model.layers[0]).__call__ is call


@pytest.mark.parametrize(("shape", "arguments", "tokens", "logits", "passes"), WORK_OF_AN_ITERATION)
@pytest.mark.usefixtures("choices_of_a_cpu")
def test_an_iteration_computes_exactly_this_much(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: Shape,
    arguments: dict[str, Any],
    tokens: int,
    logits: int,
    passes: int,
) -> None:
    if shape is UNLIKE:
        monkeypatch.setattr(parity, "grouping_for", lambda model: PAIR_BY_PAIR)

    work = train(tmp_path, shape.pairs(4), iterations=2, **arguments)

    assert work.tokens_through_layers == [tokens]
    assert work.logits_out_of_head == [logits]
    assert work.passes == [passes]


@pytest.mark.slow
def test_an_epoch_of_mixed_lengths_computes_exactly_this_much(tmp_path: Path) -> None:
    pairs = build_pairs(60, longest=100)

    work = train(tmp_path, pairs, iterations=60)

    # The second epoch, since the first iteration is not counted.
    counts = (work.tokens_through_layers, work.logits_out_of_head, work.passes)
    assert [sum(count[-30:]) for count in counts] == [EPOCH_TOKENS, EPOCH_LOGITS, EPOCH_PASSES]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """What ``mx.compile`` would compile, without a compiler: each function with each of its kinds of arguments."""
    entries: set[Any] = set()
    numbers = count()

    def record(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        number = next(numbers)

        def call(*args: Any, **kwargs: Any) -> Any:
            values = tree_flatten([args, kwargs])
            kinds = [(path, _kind(value)) for path, value in values]  # type: ignore[misc]
            entries.add((number, *kinds))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(mx, "compile", record)
    return entries


def _kind(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, mx.array) else value


@pytest.mark.slow
def test_an_epoch_of_mixed_lengths_is_compiled_for_few_shapes(tmp_path: Path, compiled: set[Any]) -> None:
    train(tmp_path, build_pairs(40, longest=200), iterations=20, compile=True)

    assert len(compiled) == COMPILED_SHAPES

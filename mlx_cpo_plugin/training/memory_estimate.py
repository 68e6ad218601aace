"""The peak of a run's memory, estimated from shapes alone, before anything is computed.

What a token keeps for the backward pass follows from the widths of the layers; the factors below were fitted to what
llama models take on a CPU. On a GPU nothing was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np

from mlx_cpo_plugin.data.batches import LENGTH_MULTIPLE, BatchSize
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import current_device, device_memory
from mlx_cpo_plugin.model.attention import QUERY_BLOCK
from mlx_cpo_plugin.model.buckets import GROUP_SIZES, Grouping, PairSize
from mlx_cpo_plugin.model.head import BLOCK_ELEMENTS, FEWEST_ROWS, ROWS_ELEMENTS
from mlx_cpo_plugin.model.layers import is_half, linear_layers, widths
from mlx_cpo_plugin.model.memory import activation_size, kept_bytes_of_layers
from mlx_cpo_plugin.model.parity import sample
from mlx_cpo_plugin.model.products import widened_bytes
from mlx_cpo_plugin.model.shared_prefix import split_shared_prefix
from mlx_cpo_plugin.model.shared_prompt import LONGEST_SIDE_BY_SIDE, SharedPromptScorer, can_batch_sides
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.optimizer_step import bytes_of_copies

if TYPE_CHECKING:
    from mlx_cpo_plugin.training.arguments import CPOTrainingArgs

# What several products read is kept once.
KEPT_SHARE = 0.9
# What is alive at once while a layer is gone through backwards, as multiples of what goes into and out of its products.
LAYER_WORKING = 1.0
LAYER_COMPUTED_AGAIN = 3.5
# Arrays that are alive at once: attention scores of one layer, blocks of logits, the largest parameter's updates.
SCORES_AT_ONCE = 12
LOGITS_AT_ONCE = 5
UPDATES_AT_ONCE = 3
# Keys and values of a pair computed part by part: kept, put together, and their gradients.
KEYS_AT_ONCE = 4
# Plain scoring: all logits and their gradient; those that are scored, in float32, on their way to a log-prob and back.
PLAIN_LOGITS, PLAIN_SCORED = 2, 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a run.

    Attributes:
        weights: the model's, those of the adapter included, and the float32 copies of trained ones of half precision.
        optimizer: the optimizer's state.
        computing: gradients, and the activations that are kept and worked with.
        largest: what takes most, in words.
        widening: what weights of half precision would take more in float32; 0 where that would not be faster.
    """

    weights: int
    optimizer: int
    computing: int
    largest: str
    widening: int = 0

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.optimizer + self.computing

    def lines(self, device: int) -> list[str]:
        """Return a sentence; a warning where the ``device`` has fewer bytes than that, a note where more are faster."""
        lines = [
            f"Memory: about {_gigabytes(self.total)} at most (weights {_gigabytes(self.weights)}, "
            f"optimizer {_gigabytes(self.optimizer)}, gradients and activations {_gigabytes(self.computing)} "
            f"for {self.largest}), of {_gigabytes(device)} on this device."
        ]
        if self.total > device:
            lines.append(
                "Warning: this device has less memory than that; lower max_seq_length, batch_size or batch_tokens, or "
                "switch on grad_checkpoint or efficient_long_context."
            )
        if self.widening and self.total + self.widening <= device:
            lines.append(
                "note: half-precision weights are widened to float32 for each product, which is what this processor is "
                f"fast with; stored in float32 they take {(self.total + self.widening) / self.total:.1f} times the "
                "memory, and the run is a little faster: "
                "mlx_lm.convert --hf-path MODEL --mlx-path FOLDER --dtype float32, then model: FOLDER."
            )
        return lines


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e9:.3f} GB"


@dataclass(frozen=True)
class Way:
    """How gradients are computed.

    Attributes:
        batch: what a micro-batch of one rank holds, and how many of them a step.
        grouping: which pairs share a pass, over prompts computed once; ``None``: every answer is scored by itself.
        step_size: tokens of a part of a pair that is longer; ``None``: nothing is cut into parts.
        checkpointed: whether layers are computed again in the backward pass.
        fake_quantised: whether the weights are fake-quantised.
    """

    batch: BatchSize
    grouping: Grouping | None
    step_size: int | None = None
    checkpointed: bool = False
    fake_quantised: bool = False

    @classmethod
    def of(cls, args: CPOTrainingArgs, grouping: Grouping | None) -> Way:
        """Return what the settings of a run ask for."""
        ranks = mx.distributed.init().size()
        tokens = None if args.batch_tokens is None else -(-args.batch_tokens // ranks)
        return cls(
            batch=BatchSize(-(-args.batch_size // ranks), tokens, args.gradient_accumulation_steps),
            grouping=grouping,
            step_size=args.seq_step_size,
            checkpointed=args.grad_checkpoint,
            fake_quantised=args.qat_enable,
        )


def memory_report(
    model: nn.Module,
    optimizer: optimizers.Optimizer,
    pairs: Sequence[PreferencePair],
    scorer: SharedPromptScorer | None,
    args: CPOTrainingArgs,
) -> list[str]:
    """Return what a run says of its memory before it begins: a line, and a warning where the device has less.

    Args:
        optimizer: initialised with the trainable parameters.
        scorer: as the run uses it.
    """
    way = Way.of(args, None if scorer is None else scorer.grouping)
    return estimated_memory(model, optimizer, pairs, way).lines(device_memory())


def estimated_memory(
    model: nn.Module, optimizer: optimizers.Optimizer, pairs: Sequence[PreferencePair], way: Way
) -> MemoryEstimate:
    """Return the peak of a run; no array of the model or the optimizer is evaluated for it.

    Args:
        optimizer: initialised with the trainable parameters.
        pairs: at least one.
    """
    sizes = ModelSizes(model, way)
    passes = _passes(sizes, pairs, way)
    if way.grouping is not None:  # whether prompts can be shared was tried against plain scores
        passes += [(sizes.plain(pair, rows=2), "the check for shared prompts") for pair in sample(pairs)]
    computing, largest = max(passes, key=lambda taken: taken[0])
    # While the first step is taken, the parameters from before it are kept for comparison.
    kept = sum(4 * array.size for array in by_name(model.trainable_parameters()).values())
    updating = kept + sizes.gradient + UPDATES_AT_ONCE * sizes.largest_parameter
    return MemoryEstimate(
        weights=sum(array.nbytes for array in by_name(model.parameters()).values()) + bytes_of_copies(model),
        optimizer=sum(array.nbytes for array in by_name(optimizer.state).values()),
        computing=round(max(computing, updating)),
        largest=largest,
        widening=_widening(model),
    )


def _widening(model: nn.Module) -> int:
    """Return what half-precision weights would take more in float32, where a CPU widens them for each product."""
    if current_device().fast_half_products or not any(is_half(module) for module in model.modules()):
        return 0
    return sum(array.nbytes for array in by_name(model.parameters()).values() if array.dtype.size == 2)


def bytes_for(sizes: ModelSizes, pairs: Sequence[PreferencePair], way: Way) -> int:
    """Return what gradients and activations of a micro-batch take."""
    return round(max(taken for taken, _ in _passes(sizes, pairs, way)))


Taken = tuple[float, str]


def _passes(sizes: ModelSizes, pairs: Sequence[PreferencePair], way: Way) -> list[Taken]:
    """Return the bytes of the passes that may take most, with what they compute."""
    limit = float("inf") if way.step_size is None else way.step_size
    cut, whole = [[p for p in pairs if (p.length > limit) == long] for long in (True, False)]
    waiting = (way.batch.accumulation > 1) * sizes.gradient
    taken: list[Taken] = []
    if way.grouping is None:
        if whole:
            pair = max(whole, key=lambda pair: pair.length)
            taken.append((waiting + sizes.plain(pair, 2 * _pairs_of(way.batch, pair, len(whole))), _named(pair)))
        if cut:
            pair = max(cut, key=lambda pair: pair.length)
            several = (2 + _has_several(way.batch, pairs)) * sizes.gradient
            taken.append((waiting + several + sizes.plain(pair, rows=1), _named(pair)))
        return taken
    group = _largest_group(whole, way)
    if group is not None:
        room, count, longest = group
        others = (way.batch.tokens is not None or way.batch.pairs > count) * sizes.gradient
        taken.append((waiting + others + sizes.together(room, count), f"{count} pairs at once, up to {longest.source}"))
    waiting += _has_several(way.batch, pairs) * sizes.gradient
    short = [p for p in whole if max(len(p.chosen), len(p.rejected)) <= LONGEST_SIDE_BY_SIDE]
    for candidates in (whole, short):
        if candidates:
            pair = max(candidates, key=lambda pair: pair.tokens)
            taken.append((waiting + sizes.alone(pair), _named(pair)))
    if cut:
        pair = max(cut, key=lambda pair: pair.tokens)
        taken.append((waiting + sizes.in_parts(pair, way.step_size), _named(pair)))
    return taken


def _named(pair: PreferencePair) -> str:
    return f"the longest pair, {pair.source}" if pair.source else "the longest pair"


def _has_several(batch: BatchSize, pairs: Sequence[PreferencePair]) -> bool:
    return len(pairs) > 1 and (batch.pairs > 1 or batch.tokens is not None)


def _pairs_of(batch: BatchSize, pair: PreferencePair, available: int) -> int:
    """Return how many pairs of about this length a micro-batch holds."""
    return min(available, batch.pairs if batch.tokens is None else max(1, batch.tokens // pair.tokens))


def _largest_group(pairs: Sequence[PreferencePair], way: Way) -> tuple[PairSize, int, PreferencePair] | None:
    """Return the room of the largest group of pairs of like length, their number, and the longest of them."""
    assert way.grouping is not None
    order = sorted(pairs, key=lambda pair: pair.tokens)
    shared = np.array([len(pair.prompt) for pair in order])
    answers = np.array([max(len(pair.chosen), len(pair.rejected)) for pair in order])
    tokens = np.array([pair.tokens for pair in order])
    best, found = 0, None
    for count in GROUP_SIZES[1:]:
        if count > len(order) or (way.batch.tokens is None and count > way.batch.pairs):
            break
        rooms = [np.lib.stride_tricks.sliding_window_view(part, count) for part in (shared, answers, tokens)]
        most_shared, most_answers = rooms[0].max(1), rooms[1].max(1)
        padded = count * (most_shared + 2 * most_answers)
        padded[padded > way.grouping.budget] = 0
        if way.batch.tokens is not None:
            padded[rooms[2].sum(1) > way.batch.tokens] = 0
        at = int(padded.argmax())
        if padded[at] > best:
            best = padded[at]
            size = PairSize(int(most_shared[at]), int(most_answers[at]), 2 * int(most_answers[at]))
            found = size, count, order[at + count - 1]
    return found


class ModelSizes:
    """What passes through a model take, in bytes, beside its weights and the optimizer's state."""

    def __init__(self, model: nn.Module, way: Way) -> None:
        trainable = by_name(model.trainable_parameters())
        self.gradient = sum(array.nbytes for array in trainable.values())
        self.largest_parameter = max((array.nbytes for array in trainable.values()), default=0)
        self.head_is_trained = any("layers" not in name.split(".") for name in trainable)
        self.size = activation_size(model)
        self.kept = kept_bytes_of_layers(model)
        self.width = max(sum(sum(widths(module)) for module in linear_layers(layer)) for layer in model.layers)
        self.widened = widened_bytes(model)
        self.checkpointed = way.checkpointed
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)]
        self.vocabulary = max((len(embedding.weight) for embedding in embeddings), default=0)
        arguments: Any = getattr(model, "args", None)
        self.hidden = int(getattr(arguments, "hidden_size", None) or widths(linear_layers(model.layers[0])[0])[0])
        self.heads = int(getattr(arguments, "num_attention_heads", None) or 0)
        key_heads = int(getattr(arguments, "num_key_value_heads", None) or self.heads)
        head_size = int(getattr(arguments, "head_dim", None) or self.hidden // max(self.heads, 1))
        self.trained_layers = sum(kept > 0 for kept in self.kept)
        self.key_bytes = (2 * key_heads * head_size or 2 * self.hidden) * self.size * self.trained_layers
        self.rounding_errors: int = _rounding_errors(model, self.size) if way.fake_quantised else 0

    def alone(self, pair: PreferencePair) -> float:
        """Return what a pair takes that is computed by itself: both answers side by side, or one after the other."""
        cut = split_shared_prefix(pair)
        if can_batch_sides(cut):
            return self.together(PairSize.of(cut), 1)
        return self.in_parts(pair, None)

    def together(self, room: PairSize, count: int) -> float:
        """Return what ``count`` pairs take, each padded to ``room``, in one pass."""
        seen = room.shared + room.answer
        attention = [Attention(count, room.shared, room.shared), Attention(2 * count, room.answer, seen)]
        return self._pass(count * room.tokens, 2 * count * seen, attention, self._head(count * room.scored))

    def in_parts(self, pair: PreferencePair, step_size: int | None) -> float:
        """Return what a pair takes whose shared tokens and answers follow each other, in pieces of ``step_size``."""
        cut = split_shared_prefix(pair)
        shared = 0 if cut.prefix is None else len(cut.prefix)
        parts = [(cut.chosen, shared), (cut.rejected, shared)] + ([] if cut.prefix is None else [(cut.prefix, 0)])
        most = 0.0
        for part, before in parts:
            length = len(part)
            tokens = min(length, step_size or length)
            attention = [Attention(1, tokens, before + length)]
            head = self._head(min(len(part.targets), tokens))
            most = max(most, self._pass(tokens, KEYS_AT_ONCE * (before + length), attention, head))
        return most + 2 * self.gradient  # those of the two answers wait for the loss

    def plain(self, pair: PreferencePair, rows: int) -> float:
        """Return what a padded batch of so many answers takes that are as long as the pair's longer one."""
        width = -(-(pair.length - 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        scored = rows * max(int(pair.chosen_scored.sum()), int(pair.rejected_scored.sum()))
        logits = self.vocabulary * (PLAIN_LOGITS * rows * width * self.size + PLAIN_SCORED * scored * 4)
        return self._pass(rows * width, 0, [Attention(rows, width, width)], logits)

    def _pass(self, tokens: float, keys: float, attention: Sequence[Attention], head: float) -> float:
        """Return what a forward and a backward pass take.

        Args:
            tokens: that go through the layers.
            keys: tokens whose keys and values are put together with those of others.
            head: bytes that the head works with.
        """
        working: float = SCORES_AT_ONCE * max(part.scores for part in attention) * self.heads * self.size
        held: float = keys * self.key_bytes + self.rounding_errors
        if self.checkpointed:
            held += tokens * self.hidden * self.size * len(self.kept)
            working += LAYER_COMPUTED_AGAIN * tokens * max(self.kept)
        else:
            held += KEPT_SHARE * tokens * sum(self.kept)
            working += LAYER_WORKING * tokens * self.width * self.size
        return max(held, self.gradient) + max(working, head) + self.widened

    def _head(self, scored: float) -> float:
        """Return what the head works with that is gone through block by block."""
        if not self.head_is_trained:
            return LOGITS_AT_ONCE * BLOCK_ELEMENTS * 4
        rows = min(scored, max(FEWEST_ROWS, ROWS_ELEMENTS // max(self.vocabulary, 1)))
        # The gradient of the head comes block by block, too.
        return LOGITS_AT_ONCE * rows * self.vocabulary * 4 + UPDATES_AT_ONCE * self.vocabulary * self.hidden * self.size


@dataclass(frozen=True)
class Attention:
    """So many rows, in which so many queries see so many keys."""

    rows: int
    queries: int
    keys: int

    @property
    def scores(self) -> int:
        """Numbers that are computed at once, of each head."""
        return self.rows * min(self.queries, QUERY_BLOCK) * self.keys


def _rounding_errors(model: nn.Module, size: int) -> int:
    """Return the bytes by which fake-quantised weights differ from the others: all are kept for the backward pass."""
    return sum(
        (module.weight.size if not hasattr(module, "bits") else module.weight.size * 32 // module.bits) * size
        for layer in model.layers
        for module in linear_layers(layer)
    )

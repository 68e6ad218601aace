"""The peak of a run's memory, from the shapes of its arrays, corrected upwards by what its micro-batches take.

What a token keeps for the backward pass follows from the widths of the layers. The factors were fitted to llama models
on a CPU; on a GPU nothing was measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers

from mlx_cpo_plugin.data.batches import LENGTH_MULTIPLE
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import current_device, free_memory
from mlx_cpo_plugin.errors import LOWER_THESE, TrainingError
from mlx_cpo_plugin.model.attention import QUERY_BLOCK
from mlx_cpo_plugin.model.buckets import GROUP_SIZES, Grouping
from mlx_cpo_plugin.model.head import BLOCK_ELEMENTS, FEWEST_ROWS, ROWS_ELEMENTS
from mlx_cpo_plugin.model.layers import is_half, linear_layers, widths
from mlx_cpo_plugin.model.memory import activation_size, kept_bytes_of_layers
from mlx_cpo_plugin.model.products import widened_bytes
from mlx_cpo_plugin.model.shared_prompt import can_batch_sides
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.optimizer_step import bytes_of_copies

# A layer in the backward pass, as multiples of the inputs and outputs of its products.
LAYER_WORKING, LAYER_RECOMPUTED = 1.25, 3.75
# Arrays that are alive at once: scores of a layer's attention, blocks of logits, updates of the largest parameter, and
# keys and values of a pair in segments.
SCORES_AT_ONCE, LOGITS_AT_ONCE, UPDATES_AT_ONCE, KEYS_AT_ONCE = 12, 5, 3, 8
# What an activation other than the lean SwiGLU keeps, as a multiple of its width; fitted to the GELU of Gemma 3.
ACTIVATION_KEPT = 7
# Scored tokens of a short pair, for which a head in half precision is widened in the largest blocks.
FEW_SCORED = 64
# Plain scoring: all logits and their gradient; those that are scored, in float32, on their way to a log-prob and back.
PLAIN_LOGITS, PLAIN_SCORED = 2, 7


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a run.

    Attributes:
        weights: the model's, those of the adapter included, and the float32 copies of trained ones of half precision.
        optimizer: the optimizer's state.
        computing: gradients, and the activations that are kept and worked with.
        largest: description of the pass that takes most.
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
            lines.append(f"Warning: this device has less memory than that; {LOWER_THESE}.")
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


def estimated_memory(
    model: nn.Module,
    optimizer: optimizers.Optimizer,
    pairs: Sequence[PreferencePair],
    args: CPOTrainingArgs,
    grouping: Grouping | None,
) -> MemoryEstimate:
    """Return the peak of a run; no array of the model or the optimizer is evaluated for it.

    Args:
        optimizer: initialised with the trainable parameters.
        pairs: at least one.
        grouping: which pairs share a pass over shared prefixes; ``None``: every answer is scored by itself.
    """
    passes = PassMemory(model, args, grouping)
    computing, largest = passes.largest(pairs)
    parameters = by_name(model.parameters()).values()
    widened = not current_device().fast_half_products and any(is_half(module) for module in model.modules())
    return MemoryEstimate(
        weights=sum(array.nbytes for array in parameters) + bytes_of_copies(model),
        optimizer=sum(array.nbytes for array in by_name(optimizer.state).values()),
        computing=round(max(computing, passes.updating)),
        largest=largest,
        widening=sum(array.nbytes for array in parameters if array.dtype.size == 2) if widened else 0,
    )


class PassMemory:
    """What micro-batches take in bytes, beside the weights and the optimizer's state.

    Attributes:
        gradient: of one micro-batch.
        updating: the most that taking an optimizer step takes.
    """

    def __init__(self, model: nn.Module, args: CPOTrainingArgs, grouping: Grouping | None) -> None:
        ranks = mx.distributed.init().size()
        self.pairs = -(-args.batch_size // ranks)
        self.tokens = None if args.batch_tokens is None else -(-args.batch_tokens // ranks)
        self.step_size = float("inf") if args.seq_step_size is None else args.seq_step_size
        self.grouping = grouping

        trainable = by_name(model.trainable_parameters())
        self.gradient = sum(array.nbytes for array in trainable.values())
        in_float32 = 4 * sum(array.size for array in trainable.values())
        self.waiting = in_float32 * (args.gradient_accumulation_steps > 1)
        # The parameters from before the first step are kept for comparison, and the sum from before its last part.
        largest_parameter = max((array.nbytes for array in trainable.values()), default=0)
        self.updating = in_float32 + self.waiting + self.gradient + UPDATES_AT_ONCE * largest_parameter

        self.size = activation_size(model)
        kept, linear = kept_bytes_of_layers(model), [linear_layers(layer) for layer in model.layers]
        widest = max(sum(sum(widths(module)) for module in layer) for layer in linear) * self.size
        shape: Any = getattr(model, "args", None)
        hidden = int(getattr(shape, "hidden_size", None) or widths(linear[0][0])[0])
        self.heads = int(getattr(shape, "num_attention_heads", None) or 0)
        trained_layers = sum(size > 0 for size in kept)
        self.kept, self.working = float(sum(kept)), LAYER_WORKING * widest
        if not hasattr(sys.modules[type(model.layers[0]).__module__], "swiglu"):
            widest_output = max(widths(module)[1] for layer in linear for module in layer)
            self.kept += ACTIVATION_KEPT * widest_output * self.size * trained_layers
        if args.grad_checkpoint:
            self.kept, self.working = hidden * self.size * len(kept), LAYER_RECOMPUTED * max(kept)
        key_heads = int(getattr(shape, "num_key_value_heads", None) or self.heads)
        head_size = int(getattr(shape, "head_dim", None) or hidden // max(self.heads, 1))
        self.keys = (2 * key_heads * head_size or 2 * hidden) * self.size * trained_layers
        # QAT keeps by how much each weight is rounded.
        weights = [m.weight.size * 32 // getattr(m, "bits", 32) for layer in linear for m in layer]
        self.constant = widened_bytes(model) + self.size * sum(weights) * args.qat_enable

        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)]
        self.vocabulary = max((len(embedding.weight) for embedding in embeddings), default=0)
        self.head = LOGITS_AT_ONCE * BLOCK_ELEMENTS * 4
        if any(map(is_half, embeddings)) and not current_device().fast_half_products:
            self.head += LOGITS_AT_ONCE * min(self.vocabulary, BLOCK_ELEMENTS // FEW_SCORED) * hidden * 4
        if any("layers" not in name.split(".") for name in trainable):  # its gradient comes in blocks of rows
            rows = max(FEWEST_ROWS, ROWS_ELEMENTS // max(self.vocabulary, 1))
            self.head = self.vocabulary * (LOGITS_AT_ONCE * rows * 4 + UPDATES_AT_ONCE * hidden * self.size)

    def largest(self, pairs: Sequence[PreferencePair]) -> tuple[float, str]:
        """Return the bytes of the largest pass over micro-batches of ``pairs``, with a description of it.

        Which pass a pair takes is decided in :mod:`mlx_cpo_plugin.training.gradients`.
        """
        at_once = len(pairs) if self.tokens is not None else min(len(pairs), self.pairs)
        several = self.gradient * (at_once > 1)
        long = [pair for pair in pairs if pair.length > self.step_size]
        whole = [pair for pair in pairs if pair.length <= self.step_size]
        passes: list[tuple[float, str]] = []
        if self.grouping is None:
            for some, rows in ((whole, 2 * at_once), (long, 1)):
                if some:
                    pair = max(some, key=lambda pair: pair.length)
                    if self.tokens is not None:
                        rows = min(rows, 2 * max(1, self.tokens // pair.tokens))
                    waiting = (2 * self.gradient + several) * (some is long)
                    passes.append((self._plain(pair, rows) + waiting, _named(pair)))
            return self._largest(passes)
        beside = [pair for pair in whole if can_batch_sides(len(pair.chosen), len(pair.rejected))]
        alone = long + [pair for pair in whole if not can_batch_sides(len(pair.chosen), len(pair.rejected))]
        if beside:
            pair = max(beside, key=_padded_tokens)
            passes.append((self._pass(_padded_tokens(pair)) + several, _named(pair)))
        if alone:
            pair = max(alone, key=lambda pair: pair.length)
            part = max(len(pair.prompt), len(pair.chosen), len(pair.rejected))
            tokens = min(part, self.step_size) if pair.length > self.step_size else part
            passes.append((self._pass(tokens, pair.length) + 2 * self.gradient + several, _named(pair)))
        if at_once > 1 and whole:
            pair = max(whole, key=_padded_tokens)
            tokens = min(self.grouping.budget, min(at_once, max(GROUP_SIZES)) * _padded_tokens(pair))
            passes.append((self._pass(tokens) + several, f"several pairs at once, up to {pair.source}"))
        return self._largest(passes)

    def _largest(self, passes: list[tuple[float, str]]) -> tuple[float, str]:
        taken, description = max(passes)
        return taken + self.waiting, description

    def _plain(self, pair: PreferencePair, rows: int) -> float:
        """Return what a padded batch of so many answers takes that are as long as the pair's longer one."""
        tokens = rows * -(-(pair.length - 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        scored = rows * max(int(pair.chosen_scored.sum()), int(pair.rejected_scored.sum()))
        logits = self.vocabulary * (PLAIN_LOGITS * tokens * self.size + PLAIN_SCORED * scored * 4)
        return self._pass(tokens, logits=logits)

    def _pass(self, tokens: float, cached: int = 0, logits: float | None = None) -> float:
        """Return what a forward and a backward pass take.

        Args:
            tokens: that go through the layers.
            cached: tokens of a pair that is computed part by part.
            logits: bytes that the head works with; ``None``: as it does in blocks.
        """
        scores = SCORES_AT_ONCE * self.heads * min(QUERY_BLOCK, tokens) * max(tokens, cached) * self.size
        held = max(tokens * self.kept + KEYS_AT_ONCE * cached * self.keys, self.gradient)
        return held + max(tokens * self.working + scores, self.head if logits is None else logits) + self.constant


def _padded_tokens(pair: PreferencePair) -> int:
    return len(pair.prompt) + 2 * max(len(pair.chosen), len(pair.rejected))


def _named(pair: PreferencePair) -> str:
    return f"the longest pair, {pair.source}" if pair.source else "the longest pair"


class MemoryWatch:
    """Compares micro-batches with the memory that is free: on a CPU the process would end without a word."""

    def __init__(self, passes: PassMemory) -> None:
        self.passes = passes
        self._most_tried = 0.0
        self._correction = 1.0
        self._before: tuple[int, int, float] | None = None

    def risk(self, pairs: Sequence[PreferencePair], step: int) -> str | None:
        """Return what to say before a micro-batch that may need more than is free, and more than any one before it.

        Raises:
            TrainingError: the gradient alone, which is there as a whole in the end, needs more than is free.
        """
        free = free_memory()
        if free is None:
            return None
        free += mx.get_cache_memory()  # what MLX has kept of arrays that are gone
        longest = max(pairs, key=lambda pair: pair.tokens).source or "a row without a source"
        if self.passes.gradient > free:
            raise TrainingError(
                f"Step {step}: the gradient alone needs {self.passes.gradient / 1e9:.2f} GB, but {free / 1e9:.2f} GB "
                "are free; train fewer parameters (train_type: lora, lower num_layers or rank) or free memory."
            )
        needed = self._needed(pairs)
        if needed <= max(free, self._most_tried):
            return None
        self._most_tried = needed
        return (
            f"Step {step}: the micro-batch with {longest} may need about {needed / 1e9:.2f} GB, and {free / 1e9:.2f} "
            f"GB are free; if the process ends here without a word, {LOWER_THESE}."
        )

    def _needed(self, pairs: Sequence[PreferencePair]) -> float:
        """Return the bytes of a micro-batch, corrected upwards by the last one that was a new peak."""
        peak = mx.get_peak_memory()
        if self._before is not None and peak > self._before[0]:
            self._correction = max(self._correction, (peak - self._before[1]) / self._before[2])
        estimate = self.passes.largest(pairs)[0]
        self._before = peak, mx.get_active_memory(), estimate
        return self._correction * estimate

"""What a run takes: weights and optimizer exactly, activations by shapes until the first step has been measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import current_device, device_memory, free_memory
from mlx_cpo_plugin.errors import LOWER_THESE
from mlx_cpo_plugin.kernels import library
from mlx_cpo_plugin.model.attention import query_block
from mlx_cpo_plugin.model.buckets import Grouping
from mlx_cpo_plugin.model.layers import is_half, linear_layers, widths
from mlx_cpo_plugin.model.memory import activation_size, kept_bytes_of_layers, remembered_by_token
from mlx_cpo_plugin.model.products import widened_bytes
from mlx_cpo_plugin.model.shared_prompt import can_batch_sides
from mlx_cpo_plugin.parameters import by_name
from mlx_cpo_plugin.training.arguments import CPOTrainingArgs
from mlx_cpo_plugin.training.long_context import FAR
from mlx_cpo_plugin.training.optimizer_step import bytes_of_copies
from mlx_cpo_plugin.training.quantizer import Quantizer, bytes_of_errors, bytes_of_operands

# An estimate that is off by this factor, and by this share of the device's memory, is corrected on the console.
FAR_OFF, SHARE_OF_DEVICE = 1.25, 0.02
# The steps whose peaks correct it.
CORRECTING = ("first", "second")
# Scores of a block of queries, and what their gradient is computed from.
_SCORES_AT_A_TIME = 9
# Keys and values of a layer, the gradient that arrives, that of its attention, and their sum.
_COPIES_OF_LAYER = 3
# What attention layers of mlx_lm call the number of their heads.
_HEADS = ("n_heads", "num_heads", "num_attention_heads")


class MemoryEstimate:
    """Bytes at the peak of a run; no array of the model or the optimizer is evaluated for it.

    Whether the compiled kernels compute the run is as :func:`mlx_cpo_plugin.kernels.library.in_use` says now.

    Args:
        optimizer: initialised with the trainable parameters.
        pairs: at least one.
        grouping: which pairs share a pass over shared prefixes; ``None``: every answer is scored by itself.

    Attributes:
        weights: the model's, those of the adapter included, float32 copies of trained ones of half precision, and what
            the kernels keep of weights rounded for QAT.
        optimizer: the optimizer's state.
        computing: gradients and activations of the pair that takes most.
        largest: this pair.
        widening: what weights of half precision would take more in float32; 0 where that would not be faster.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optimizers.Optimizer,
        pairs: Sequence[PreferencePair],
        args: CPOTrainingArgs,
        grouping: Grouping | None,
    ) -> None:
        self.args, self.grouping = args, grouping
        parameters, trainable = by_name(model.parameters()).values(), by_name(model.trainable_parameters()).values()
        self.weights = sum(array.nbytes for array in parameters) + bytes_of_copies(model)
        self.optimizer = sum(array.nbytes for array in by_name(optimizer.state).values())
        kernels = library.in_use()
        widened = not (kernels or current_device().fast_half_products) and any(map(is_half, model.modules()))
        self.widening = sum(array.nbytes for array in parameters if array.dtype.size == 2) if widened else 0

        size, kept = activation_size(model), kept_bytes_of_layers(model)
        # Beside what all layers keep, a layer's backward pass makes gradients as large, which products may copy.
        self.by_token = sum(kept) + 2 * max(kept)
        if args.grad_checkpoint:  # the inputs of the layers are kept, and one layer at a time is recomputed
            self.by_token = size * widths(linear_layers(model.layers[0])[0])[0] * len(kept) + 3 * max(kept)
        # MLX takes the memory of several blocks of attention scores before the first is done; the kernels keep none.
        heads = max(getattr(module, name, 0) for module in model.modules() for name in _HEADS)
        self.heads = 0 if kernels else heads
        self.keys_by_token = size * remembered_by_token(model)
        self.layers = len(kept)
        # Logits, their softmax and their gradient.
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)]
        self.logits_by_token = 3 * size * max((len(module.weight) for module in embeddings), default=0)

        self.gradient = sum(array.nbytes for array in trainable)
        in_float32 = 4 * sum(array.size for array in trainable)
        # The kernels widen weights while they read them.
        self.constant = (not kernels) * widened_bytes(model) + in_float32 * (args.gradient_accumulation_steps > 1)
        if args.qat_enable:
            quantizer = Quantizer.of(args)
            if kernels:
                self.weights += bytes_of_operands(model, quantizer)
            else:
                self.constant += bytes_of_errors(model, quantizer, size)
        # The first step is compared with the weights from before it.
        self.updating = self.gradient + in_float32

        self.largest = max(pairs, key=self._activations)
        self.computing = self._computing([self.largest])
        self._basis, self._peak = "Estimate", mx.get_peak_memory()
        # Of other models in the process, say. Own arrays that are not evaluated yet only make it smaller.
        self._others = max(0, mx.get_active_memory() - self.weights - self.optimizer)
        self._before = self._peak
        self._correction, self._tried, self._warned, self._corrections = 1.0, 0.0, 0.0, 0

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.optimizer + round(self.computing)

    def total_with(self, pair: PreferencePair) -> int:
        """Return the peak of a run on pairs like this one."""
        return self.weights + self.optimizer + round(self._computing([pair]))

    def lines(self, device: int) -> list[str]:
        """Return a sentence; a warning where the ``device`` has fewer bytes than that, a note where more are faster."""
        lines = [
            f"{self._basis}: about {_gigabytes(self.total)} of memory (weights {_gigabytes(self.weights)}, optimizer "
            f"{_gigabytes(self.optimizer)}, gradients and activations {_gigabytes(self.computing)} with the largest "
            f"pair, {_named(self.largest)}); this device has {_gigabytes(device)}."
        ]
        whole = self.total + self._others
        if self._before - whole > SHARE_OF_DEVICE * device and self._before > FAR_OFF * whole:
            lines.append(f"note: loading the model took more, {_gigabytes(self._before)}, which reports count, too.")
        if whole > device:
            held = f" beside the {_gigabytes(self._others)} that this process holds already"
            lines.append(
                f"Warning: this device has less memory than that{held if self.total <= device else ''}; {LOWER_THESE}."
            )
        if self.widening and whole + self.widening <= device:
            lines.append(
                "note: half-precision weights are widened to float32 for each product, which is what this processor is "
                f"fast with; stored in float32 they take {(self.total + self.widening) / self.total:.1f} times the "
                "memory, and the run is a little faster: "
                "mlx_lm.convert --hf-path MODEL --mlx-path FOLDER --dtype float32, then model: FOLDER."
            )
        return lines

    def risk(self, pairs: Sequence[PreferencePair], step: int) -> str | None:
        """Return what to say before a micro-batch that may need more than is free, and more than one warned of before.

        On a CPU the process would end without a word.
        """
        # Only upwards: a warning in vain costs less than the work since the last checkpoint.
        computing, free = self._computing(pairs), free_memory()
        needed, self._tried = max(1.0, self._correction) * computing, max(self._tried, computing)
        if free is None or needed <= max(free + mx.get_cache_memory(), self._warned):
            return None
        self._warned = needed
        return (
            f"Step {step}: the micro-batch with {_named(max(pairs, key=self._activations))} may need about "
            f"{_gigabytes(needed)}, and {_gigabytes(free)} are free; if the process ends here without a word, "
            f"{LOWER_THESE}."
        )

    def corrected(self) -> list[str]:
        """Correct the estimate by the peak of each of the first steps; return its lines once more where it was far off.

        The optimizer's state takes its memory when the first step ends, so the second may take more.
        """
        peak, device = mx.get_peak_memory(), device_memory()
        self._corrections += 1
        # More was taken before, or this rank had no pairs.
        if self._corrections > len(CORRECTING) or peak <= self._peak or not self._tried:
            return []
        self._basis, self._peak = f"Estimate after the {CORRECTING[self._corrections - 1]} step", peak
        fixed, before, taken = self.weights + self.optimizer, self._correction, peak - self._others
        said, self._correction = fixed + before * self._tried, max(0.0, taken - fixed) / self._tried
        self.computing *= self._correction / before if before else 1.0
        far_off = abs(taken - said) > SHARE_OF_DEVICE * device and not 1 / FAR_OFF < taken / said < FAR_OFF
        return self.lines(device) if far_off else []

    def _computing(self, pairs: Sequence[PreferencePair]) -> float:
        """Return the bytes of a micro-batch beside weights and optimizer, and of a step."""
        activations = max(map(self._activations, pairs))
        return self.constant + max(self.updating, self.gradient + activations)

    def _activations(self, pair: PreferencePair) -> float:
        """Return the bytes of a pass over pairs or padded answers like these; gradients.py decides which it is."""
        args, ranks = self.args, mx.distributed.init().size()
        pairs = -(-args.batch_size // ranks)
        if args.batch_tokens is not None:
            pairs = max(1, args.batch_tokens // (ranks * pair.tokens))
        step_size, sides = args.seq_step_size or math.inf, (len(pair.chosen), len(pair.rejected))
        if self.grouping is None:
            rows = 1 if pair.length > step_size else 2 * pairs
            return rows * pair.length * (self.by_token + self.logits_by_token)
        if pair.length <= step_size and can_batch_sides(*sides):
            tokens = len(pair.prompt) + 2 * max(sides)
            return max(tokens, min(self.grouping.budget, pairs * tokens)) * self.by_token
        # Keys and values and their gradient, of which those of a layer are there a few times while it is computed; near
        # the start also what is appended to them, and the gradient of the other answer.
        queries = min(step_size, max(len(pair.prompt), *sides))
        is_far = len(pair.prompt) > FAR * min(step_size, max(sides))  # its last token is read with the answers
        copies = 2 + _COPIES_OF_LAYER / self.layers if is_far else 4
        scores = self.heads * pair.length
        blocks = _SCORES_AT_A_TIME * 4 * scores * min(queries, query_block(scores)) if scores else 0
        return queries * self.by_token + pair.length * copies * self.keys_by_token + blocks


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e9:.3f} GB"


def _named(pair: PreferencePair) -> str:
    return pair.source or "a row without a source"

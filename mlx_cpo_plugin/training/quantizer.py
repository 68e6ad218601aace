"""What becomes of a model's weights where it is deployed quantised."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

from mlx_cpo_plugin.device import current_device
from mlx_cpo_plugin.host import fake_quantizer
from mlx_cpo_plugin.kernels.operations import BITS, Weight
from mlx_cpo_plugin.model.layers import ADAPTED, STACKED, WITH_ADAPTER, base_of, dense_dtype, merged_weight, widths
from mlx_cpo_plugin.settings.options import AUTO, HOST, MLX, MODES, mlx_quantises

# Numbers that are rounded at a time: for some bits MLX takes twenty times their memory meanwhile.
_BLOCK = 1 << 20
# Of MLX's quantised layers where neither is said.
_BITS, USUAL_GROUP_SIZE = 4, 64


class WithQat(Protocol):
    """Settings with those of QAT."""

    qat_bits: int
    qat_group_size: int
    qat_mode: str
    qat_quantizer: str


class Quantizer:
    """Rounds weights as one that deploys the model does.

    Args:
        name: ``mlx``, which packs as ``mlx_lm.convert`` and ``fuse_bits`` do; ``host``, mlx-lm-lora's symmetric one;
            ``auto``, the former where it has these bits and this group size.
        group_size: 0 or less: one scale for the whole tensor, which only the host's has.
        mode: of ``mx.quantize``; all but ``affine`` bring their own bits and group size.

    Attributes:
        by_row: whether each row of a weight is rounded by itself.
        is_of_mlx: whether it is MLX's, which also takes embeddings.
        mode: as given.
    """

    def __init__(self, name: str, bits: int, group_size: int, mode: str = "affine") -> None:
        is_host = name == HOST or (name == AUTO and not mlx_quantises(bits, group_size, mode))
        self._host = fake_quantizer() if is_host else None
        self.bits, self.group_size = MODES[mode].get("bits", bits), MODES[mode].get("group_size", group_size)
        self.mode = mode
        self.is_of_mlx, self.by_row = not is_host, self.group_size > 0

    @classmethod
    def of(cls, settings: WithQat) -> Quantizer:
        """Return the one that QAT trains for."""
        return cls(settings.qat_quantizer, settings.qat_bits, settings.qat_group_size, settings.qat_mode)

    @property
    def how(self) -> dict[str, Any]:
        """What MLX's quantisation is told."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def rounded(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """Return a float32 weight [..., output, input] as quantisation leaves it, which finds it in ``dtype``."""
        if self._host is not None:
            return self._host(weight, self.bits, self.group_size)
        if not self.takes(weight.shape[-1]):
            return weight
        return mx.dequantize(*mx.quantize(weight.astype(dtype), **self.how), **self.how).astype(mx.float32)

    def packed(self, weight: mx.array, dtype: mx.Dtype) -> list[mx.array]:
        """Return the same packed, where it :meth:`packs`."""
        return list(mx.quantize(weight.astype(dtype), group_size=self.group_size, bits=self.bits))

    def takes(self, inputs: int) -> bool:
        """Whether weights with so many inputs are quantised."""
        return self._host is not None or inputs % self.group_size == 0

    def packs(self, inputs: int) -> bool:
        """Whether the compiled kernels unpack what becomes of weights with so many inputs."""
        return self.is_of_mlx and self.mode == "affine" and self.bits in BITS and self.takes(inputs)


@dataclass(frozen=True)
class QuantisedModules:
    """What a quantizer takes of a model, with and without adapters.

    Attributes:
        layers: linear ones inside layers, and all with an adapter; none of a quantised base without one.
        heads: linear ones outside layers.
        usual: the quantizer of all that are not in ``others``.
        others: the id of a module -> its own quantizer.
    """

    layers: list[nn.Module]
    heads: list[nn.Module]
    embeddings: list[nn.Module]
    usual: Quantizer
    others: Mapping[int, Quantizer]

    def quantizer_of(self, module: nn.Module) -> Quantizer:
        """Return what rounds the weight of one of the modules."""
        return self.others.get(id(module), self.usual)


def quantised_modules(model: nn.Module, quantizer: Quantizer) -> QuantisedModules:
    """Return the modules of a model that are quantised where it is deployed."""
    others = _own_quantizers(model, quantizer)
    modules = [module for module in model.modules() if others.get(id(module), quantizer) is not None]
    adapters = [module for module in modules if isinstance(module, ADAPTED)]
    adapted = {id(base_of(module)) for module in model.modules() if isinstance(module, WITH_ADAPTER)}
    kinds = (nn.Linear, *STACKED) if quantizer.is_of_mlx else nn.Linear
    linears = [module for module in modules if isinstance(module, kinds) and id(module) not in adapted]
    inside = {id(module) for layer in getattr(model, "layers", ()) for module in layer.modules()}
    embeddings = [m for m in modules if isinstance(m, nn.Embedding | LoRAEmbedding) and id(m) not in adapted]
    return QuantisedModules(
        adapters + [module for module in linears if id(module) in inside],
        [module for module in linears if id(module) not in inside],
        embeddings if quantizer.is_of_mlx else [],
        quantizer,
        {key: own for key, own in others.items() if own is not None},
    )


def _own_quantizers(model: nn.Module, usual: Quantizer) -> dict[int, Quantizer | None]:
    """Return what a model asks of MLX for some of its modules, such as routers, by ids; None: leave them whole."""
    predicate = getattr(model, "quant_predicate", None)
    if predicate is None or not usual.is_of_mlx:
        return {}
    own: dict[int, Quantizer | None] = {}
    for path, module in model.named_modules():
        base = base_of(module)
        if not (hasattr(base, "to_quantized") or "scales" in base):
            continue
        wanted = predicate(path, base) if usual.takes(widths(base)[0]) else False
        if isinstance(wanted, Mapping):
            own[id(module)] = Quantizer(
                MLX, wanted.get("bits", _BITS), wanted.get("group_size", USUAL_GROUP_SIZE), wanted.get("mode", "affine")
            )
        elif not wanted:
            own[id(module)] = None
    return own


class KernelOperand:
    """What the compiled kernels multiply with in place of a module's weight, rounded for all passes of a step.

    It is the merged weight as it will be deployed or, where the layer's own call is needed beside it, what rounding
    adds to it.
    """

    def __init__(self, module: nn.Module, quantizer: Quantizer) -> None:
        self._module, self._quantizer = module, quantizer
        self._weight: Weight | None = None

    @property
    def weight(self) -> Weight:
        """As :meth:`update` left it."""
        if self._weight is None:
            self.update()
        assert self._weight is not None
        return self._weight

    def update(self) -> None:
        """Round the weight as it is now; the kernels train adapters alone, so one without stays as it is."""
        if self._weight is not None and not isinstance(self._module, ADAPTED):
            return
        module, quantizer, dtype = self._module, self._quantizer, dense_dtype(self._module)
        if needs_own_call(module):
            self._weight = Weight(self._in_blocks(lambda merged: [quantizer.rounded(merged, dtype) - merged]))
        elif is_packed(module, quantizer):
            arrays = self._in_blocks(lambda merged: quantizer.packed(merged, dtype))
            self._weight = Weight(arrays, quantizer.bits, quantizer.group_size)
        else:
            self._weight = Weight(self._in_blocks(lambda merged: [quantizer.rounded(merged, dtype)]))

    def _in_blocks(self, rounded: Callable[[mx.array], list[mx.array]]) -> tuple[mx.array, ...]:
        inputs, outputs = widths(base_of(self._module))
        size = max(1, _BLOCK // inputs) if self._quantizer.by_row else outputs
        blocks = []
        for start in range(0, outputs, size):
            blocks.append(rounded(merged_weight(self._module, slice(start, start + size))))
            mx.eval(blocks[-1])  # before the next, or all would be in memory
        arrays = tuple(mx.concatenate(list(parts)) for parts in zip(*blocks, strict=True))
        mx.eval(arrays)
        return arrays


def needs_own_call(module: nn.Module) -> bool:
    """Whether a layer's gradient takes more than its input and a weight that holds the adapter: of DoRA and dropout."""
    return isinstance(module, ADAPTED) and (not isinstance(module, LoRALinear) or module.dropout._p_1 < 1)


def is_packed(module: nn.Module, quantizer: Quantizer) -> bool:
    """Whether the compiled kernels multiply with a module's weight packed."""
    return quantizer.packs(widths(base_of(module))[0]) and not needs_own_call(module)


def bytes_of_operands(model: nn.Module, quantizer: Quantizer) -> int:
    """Return what a run with the compiled kernels keeps of rounded weights."""
    modules = quantised_modules(model, quantizer)
    total = 0.0
    for module in (*modules.layers, *(modules.heads or modules.embeddings)):  # of embeddings those that are heads, too
        by_weight, own = float(mx.float32.size), modules.quantizer_of(module)
        if is_packed(module, own):
            by_weight = own.bits / 8 + 2 * dense_dtype(module).size / own.group_size
        total += by_weight * math.prod(widths(base_of(module)))
    return round(total)


def bytes_of_errors(model: nn.Module, quantizer: Quantizer, size: int) -> int:
    """Return what a pass without the kernels holds of rounding errors, in numbers of ``size`` bytes."""
    modules = quantised_modules(model, quantizer)
    in_rows = current_device().fused_cross_entropy  # and in blocks of the vocabulary elsewhere
    whole = [*modules.layers, *((modules.heads or modules.embeddings) if in_rows else ())]
    bases = [base_of(module) for module in whole]
    return sum(size * math.prod(base.weight.shape[:-1]) * widths(base)[0] for base in bases)

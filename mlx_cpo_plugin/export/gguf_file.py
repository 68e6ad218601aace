"""``--to gguf``: the adapter merged into its model, in one file for llama.cpp and what is built on it.

GGUF names tensors its own way, has pairs of rotary dimensions of llama side by side where mlx_lm has them in halves,
and adds the 1 of Gemma's norms to the weights. Which names belong to which, the package gguf knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from numpy.typing import NDArray

from mlx_cpo_plugin.comparison.questions import Say
from mlx_cpo_plugin.export.errors import ExportError
from mlx_cpo_plugin.export.gguf_tokenizer import add_tokenizer, check_tokenizer
from mlx_cpo_plugin.export.trained import Trained
from mlx_cpo_plugin.model.layers import ADAPTED, merged_weight, stored_weight
from mlx_cpo_plugin.training.held_out import ENOUGH, HeldOutScores, margin_retained, rounding_cost

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Bits -> what llama.cpp calls them.
TYPES = {16: "f16", 8: "q8_0"}
# Nats a token, by bits: more than rounding moves log-probs by on average, and less than a tensor in a wrong place does.
WRONG = {16: 0.05, 8: 0.5}
_BLOCK = 32
_HALF_MAX = 65504.0

Change = Callable[[mx.array], mx.array]
Factors = NDArray[np.float32]


@dataclass(frozen=True)
class Family:
    """How GGUF keeps a type of model.

    Attributes:
        name: of the architecture in llama.cpp.
        interleaved: whether pairs of rotary dimensions lie side by side.
        norm_shift: what is added to the weights of norms.
    """

    name: str
    interleaved: bool = False
    norm_shift: float = 0.0


# The model_type of mlx_lm's class.
FAMILIES = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma3": Family("gemma3", norm_shift=1.0),
    "gemma3_text": Family("gemma3", norm_shift=1.0),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file.

    Attributes:
        name, gguf_name: in mlx_lm's model and in the file.
        shape: in both.
        read: returns its float32 value in mlx_lm's model, with the adapter merged.
        change, undo: from mlx_lm's values to those of the file, and back.
    """

    name: str
    gguf_name: str
    shape: tuple[int, ...]
    read: Callable[[], mx.array]
    change: Change
    undo: Change


def write_gguf(trained: Trained, file: Path, bits: int, say: Say) -> list[str]:
    """Write the fused model to ``file``, read it back, score it and return notes; ``trained.model`` is then empty.

    Args:
        bits: 16 for float16, 8 for ``q8_0``; vectors are float32.

    Raises:
        ExportError: llama.cpp's form of the model or of its tokenizer is not known here, or the file does not score as
            the adapter.
    """
    family = check_gguf(trained)
    tensors = _tensors(trained.text_model, family)
    factors = _rope_factors(trained.text_model)
    _write(file, trained, family, tensors, factors, bits)
    model_class: Any = type(trained.text_model)
    trained.model.update(tree_map(lambda _: mx.array([]), trained.model.parameters()))
    scores = trained.scores_of(_read_back(file, tensors, model_class(trained.text_model.args), factors))
    _check_scores(trained, scores, file, WRONG[bits])
    sentence = rounding_cost(trained.before, trained.scores, scores, f"{TYPES[bits]} file")
    say(sentence)
    kept = margin_retained(trained.before, trained.scores, scores)
    if bits == 8 and kept is not None and kept < ENOUGH:
        say("Warning: rounding cost more than a tenth of that; take --bits 16.")
    notes = [f"Weights of matrices in {TYPES[bits]}, of vectors in float32.", sentence]
    if trained.text_model is not trained.model:
        notes.append("The language model alone: what the base model has for images is not in the file.")
        say(notes[-1])
    return notes


def require_gguf() -> None:
    """Raise ExportError where the package that writes the file is missing."""
    if find_spec("gguf") is None:
        raise ExportError(
            "A GGUF file is written with the package gguf, which is missing: pip install 'mlx-cpo-plugin[gguf]'.",
            key="to",
        )


def check_gguf(trained: Trained) -> Family:
    """Return the family of a model, or find out, before anything is written, why it has none.

    Raises:
        ExportError: see :func:`write_gguf`.
    """
    kind = str(trained.config.get("model_type"))
    family = FAMILIES.get(kind)
    if family is None:
        raise ExportError(
            f"There is no GGUF writer for models of type {kind}, only for {', '.join(FAMILIES)}; export with --to mlx.",
            key="to",
            allowed=", ".join(FAMILIES),
        )
    args: Any = trained.text_model.args
    scaling = _scaling(args)
    if scaling not in ("default", "linear", "llama3"):
        raise ExportError(
            f"The model scales its positions by {scaling!r}, which is not written to GGUF; export with --to mlx.",
            key="to",
        )
    if "sliding_attention" in (getattr(args, "layer_types", None) or ()) and family.name == "llama":
        raise ExportError(
            "llama.cpp has no sliding windows for a model of type llama, as this one has; export with --to mlx.",
            key="to",
        )
    check_tokenizer(trained.tokenizer, args.vocab_size)
    return family


def _scaling(args: Any) -> str:
    scaling = getattr(args, "rope_scaling", None) or {}
    return str(scaling.get("type") or scaling.get("rope_type", "default"))


# The tensors


def _tensors(model: nn.Module, family: Family) -> list[Tensor]:
    """Return what the file holds, in the order of the model.

    Raises:
        ExportError: a weight of the model has no name in GGUF.
    """
    import gguf

    args: Any = model.args
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    names = gguf.get_tensor_name_map(architecture, args.num_hidden_layers)
    heads = {"q_proj": args.num_attention_heads, "k_proj": args.num_key_value_heads}
    found = []
    for name, shape, read in _weights(model):
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ExportError(
                f"{name} has no place in a GGUF file of type {family.name}; export with --to mlx.", key="to"
            )
        change = undo = _as_it_is
        layer = name.split(".")[-2]
        if family.interleaved and layer in heads and not args.rope_traditional:
            change, undo = partial(_interleaved, heads=heads[layer]), partial(_in_halves, heads=heads[layer])
        elif family.norm_shift and layer.endswith("norm"):
            change, undo = partial(mx.add, family.norm_shift), partial(_minus, shift=family.norm_shift)
        found.append(Tensor(name, gguf_name, shape, read, change, undo))
    return found


def _weights(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Callable[[], mx.array]]]:
    """Yield name, shape and a function that returns the float32 value of each parameter of the merged, dense model."""
    for path, module in model.named_modules():
        if path.endswith((".linear", ".embedding")):
            continue  # inside an adapter
        layer = module.linear if isinstance(module, ADAPTED) else module
        for kind in layer:
            shape = tuple(getattr(layer[kind], "shape", ()))
            if not isinstance(layer[kind], mx.array) or kind.startswith("_") or kind in ("scales", "biases"):
                continue
            if kind != "weight" or (layer is module and "scales" not in module):
                yield f"{path}.{kind}", shape, partial(_value, layer, kind)
                continue
            width = shape[-1] * 32 // layer.bits if "scales" in layer else shape[-1]
            read = stored_weight if layer is module else merged_weight
            yield f"{path}.{kind}", (*shape[:-1], width), partial(read, module)


def _value(module: nn.Module, kind: str) -> mx.array:
    value: mx.array = module[kind].astype(mx.float32)
    return value


def _as_it_is(weight: mx.array) -> mx.array:
    return weight


def _minus(weight: mx.array, shift: float) -> mx.array:
    return weight - shift


def _interleaved(weight: mx.array, heads: int) -> mx.array:
    """Return the rows [heads * 2 * n, ...] of rotary pairs that lie in halves such that each pair lies side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _in_halves(weight: mx.array, heads: int) -> mx.array:
    """Undo :func:`_interleaved`."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


# Writing


def _write(
    file: Path, trained: Trained, family: Family, tensors: Sequence[Tensor], factors: Factors | None, bits: int
) -> None:
    """Write the file tensor by tensor, so that no second model is in memory."""
    import gguf

    args: Any = trained.text_model.args
    writer = gguf.GGUFWriter(file, family.name)
    try:
        _add_architecture(writer, args, family, trained.settings.model, bits)
        add_tokenizer(writer, trained.tokenizer, args.vocab_size, trained.adds_bos, trained.template_arguments)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.nbytes)
        kinds = {tensor.gguf_name: _kind(tensor.shape, bits) for tensor in tensors}
        for tensor in tensors:
            block, size = gguf.GGML_QUANT_SIZES[kinds[tensor.gguf_name]]
            count = int(np.prod(tensor.shape)) // block * size
            row = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
            writer.add_tensor_info(tensor.gguf_name, row, np.dtype(np.uint8), count, kinds[tensor.gguf_name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for tensor in tensors:
            values = np.array(tensor.change(tensor.read()))
            if kinds[tensor.gguf_name] == gguf.GGMLQuantizationType.F16 and np.abs(values).max(initial=0) > _HALF_MAX:
                raise ExportError(f"{tensor.name} has weights that are beyond float16; take --bits 8.", key="bits")
            writer.write_tensor_data(gguf.quants.quantize(values, kinds[tensor.gguf_name]).view(np.uint8))
    finally:
        writer.close()


def _kind(shape: Sequence[int], bits: int) -> Any:
    """Return the type of a tensor: vectors are float32, and so are matrices of 8 bits float16 where no block fits."""
    from gguf import GGMLQuantizationType as Kind

    if len(shape) == 1:
        return Kind.F32
    return Kind.Q8_0 if bits == 8 and shape[-1] % _BLOCK == 0 else Kind.F16


def _add_architecture(writer: GGUFWriter, args: Any, family: Family, name: str, bits: int) -> None:
    import gguf

    head = getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads
    writer.add_type("model")
    writer.add_name(Path(name).name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if bits == 8 else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(args.num_hidden_layers)
    writer.add_context_length(args.max_position_embeddings or 2048)
    writer.add_embedding_length(args.hidden_size)
    writer.add_feed_forward_length(args.intermediate_size)
    writer.add_head_count(args.num_attention_heads)
    writer.add_head_count_kv(args.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(args.rms_norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_vocab_size(args.vocab_size)
    if family.name == "gemma3":
        writer.add_sliding_window(args.sliding_window)
        writer.add_sliding_window_pattern(args.sliding_window_pattern)
        writer.add_rope_freq_base_swa(args.rope_local_base_freq)
    if _scaling(args) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(args.rope_scaling["factor"])


def _rope_factors(model: nn.Module) -> Factors | None:
    """Return what llama.cpp divides the rotary frequencies of Llama 3 by, float32 [head / 2]; None for other models."""
    if _scaling(model.args) != "llama3":
        return None
    rope = model.layers[0].self_attn.rope
    plain = float(model.args.rope_theta) ** (np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims)
    return (np.array(rope._freqs, np.float64) / plain).astype(np.float32)


# Reading back


def _read_back(file: Path, tensors: Sequence[Tensor], model: nn.Module, factors: Factors | None) -> nn.Module:
    """Return the model with the weights in the file; vectors and the embedding in float32, others in float16.

    Raises:
        ExportError: the file has another tensor than was written, or lacks one.
    """
    stored: Any = mx.load(str(file), format="gguf")
    if factors is not None and not np.array_equal(np.array(stored.pop("rope_freqs.weight")), factors):
        raise ExportError("The file has other rotary frequencies than the model; please report it.")
    weights = []
    for tensor in tensors:
        stem = tensor.gguf_name.removesuffix(".weight")
        value = stored.pop(tensor.gguf_name)
        if f"{stem}.scales" in stored:
            # In half precision each product with them would be rounded.
            scales, biases = (stored.pop(f"{stem}.{kind}").astype(mx.float32) for kind in ("scales", "biases"))
            value = mx.dequantize(value, scales, biases, group_size=_BLOCK, bits=8).astype(mx.float16)
        is_head = "embed_tokens" in tensor.name
        weights.append((tensor.name, tensor.undo(value.astype(mx.float32) if is_head else value)))
    if stored:
        raise ExportError(f"The file holds {min(stored)}, which was not written; please report it.")
    model.load_weights(weights)
    model.eval()
    return model


def _check_scores(trained: Trained, scores: HeldOutScores, file: Path, too_much: float) -> None:
    """Compare the log-probs of the file with those of the adapter.

    Args:
        too_much: nats a token.

    Raises:
        ExportError: they differ by more than rounding.
    """
    counts = [(pair.chosen_tokens, int(pair.rejected_scored.sum())) for pair in trained.rows]
    apart = float((np.abs(scores.logps - trained.scores.logps).T / counts).mean())
    if not apart < too_much:
        raise ExportError(
            f"Read back, {file.name} gives answers log-probs {apart:.2f} nats a token away from those of the adapter, "
            "more than rounding explains; please report it, or export with --to mlx."
        )

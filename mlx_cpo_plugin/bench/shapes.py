"""Synthetic work: a model of random weights and pairs of random tokens, described in one line of text."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import ConfigError

HEAD_DIMENSION = 64
_LETTERS = {
    "P": "prompt",
    "C": "chosen",
    "R": "rejected",
    "B": "batch",
    "V": "vocabulary",
    "H": "hidden",
    "L": "layers",
}
_REQUIRED = ("prompt", "chosen", "rejected")
_ARCHITECTURES = ("llama", "qwen3")
# Words that switch something on -> the field that they set, and to what.
_SWITCHES: dict[str, tuple[str, Any]] = {
    "long": ("long", True),
    "bf16": ("dtype", "bfloat16"),
    "4bit": ("bits", 4),
    **{name: ("architecture", name) for name in _ARCHITECTURES},
}
_EXAMPLE = "P256,C128,R96,B2"


@dataclass(frozen=True)
class Shape:
    """Lengths of a pair and sizes of a model.

    Attributes:
        prompt, chosen, rejected: tokens of each pair.
        batch: pairs of an iteration.
        vocabulary, hidden, layers: sizes of the model; ``hidden`` is a multiple of 64, the size of an attention head.
        long: whether ``efficient_long_context`` is on.
        architecture: ``llama`` or ``qwen3``.
        dtype: of the weights, ``float32`` or ``bfloat16``.
        bits: of each weight of the quantised base, 4 or 0; 0 is none.
    """

    prompt: int
    chosen: int
    rejected: int
    batch: int = 1
    vocabulary: int = 32000
    hidden: int = 576
    layers: int = 8
    long: bool = False
    architecture: str = "llama"
    dtype: str = "float32"
    bits: int = 0

    def __str__(self) -> str:
        """The text from which :func:`parse_shape` makes the same shape."""
        words = [f"{letter}{getattr(self, name)}" for letter, name in _LETTERS.items()]
        defaults = {field.name: field.default for field in fields(self)}
        words += [word for word, (name, value) in _SWITCHES.items() if getattr(self, name) == value != defaults[name]]
        return ",".join(words)

    @property
    def tokens(self) -> int:
        """Tokens of a pair, the prompt counted once."""
        return self.prompt + self.chosen + self.rejected

    @property
    def title(self) -> str:
        """One line for tables."""
        long = ", efficient_long_context" if self.long else ""
        weights = (f", {self.bits} bits" if self.bits else "") + (f", {self.dtype}" if self.dtype != "float32" else "")
        return (
            f"P{self.prompt} C{self.chosen} R{self.rejected}, batch {self.batch}{long} "
            f"({self.architecture}, hidden {self.hidden}, {self.layers} layers, vocabulary {self.vocabulary}{weights})"
        )

    def model_config(self) -> dict[str, Any]:
        """The configuration of the model, as mlx_lm reads it."""
        heads = self.hidden // HEAD_DIMENSION
        groups = next(size for size in (3, 4, 2, 1) if heads % size == 0)
        multiple = HEAD_DIMENSION if self.bits else 1  # quantised weights come in whole groups
        return {
            "model_type": self.architecture,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.hidden * 8 // 3 // multiple * multiple,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // groups,
            "head_dim": HEAD_DIMENSION,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.prompt + max(self.chosen, self.rejected),
            "tie_word_embeddings": True,
            "torch_dtype": self.dtype,
        } | ({"quantization": {"group_size": HEAD_DIMENSION, "bits": self.bits}} if self.bits else {})

    def pairs(self, count: int) -> list[PreferencePair]:
        """Return ``count`` pairs of random tokens; every token of the answers is scored."""
        generator = np.random.default_rng(0)

        def tokens(length: int) -> Any:
            return generator.integers(0, self.vocabulary, length).astype(np.int32)

        pairs = []
        for number in range(count):
            chosen, rejected = tokens(self.chosen), tokens(self.rejected)
            chosen[0], rejected[0] = 0, 1  # answers that begin alike would be less work
            scored = (np.ones(self.chosen, bool), np.ones(self.rejected, bool))
            pairs.append(PreferencePair(tokens(self.prompt), chosen, rejected, *scored, source=f"random pair {number}"))
        return pairs


def parse_shape(text: str) -> Shape:
    """Read a shape such as ``P256,C128,R96,B2,V32000,H576,L8,long``; P, C and R have to be given.

    Raises:
        ConfigError: a part is unknown, given twice, missing or out of range.
    """
    values: dict[str, Any] = {}
    for word in text.replace(" ", "").split(","):
        name, value = _part(word, text)
        if name in values:
            raise ConfigError(f"--shape {text}: {word} gives {name} a second time; remove one.")
        values[name] = value
    missing = [letter for letter, name in _LETTERS.items() if name in _REQUIRED and name not in values]
    if missing:
        raise ConfigError(f"--shape {text} has no {' and no '.join(missing)}; write it like {_EXAMPLE}.")
    shape = Shape(**values)
    if shape.hidden % HEAD_DIMENSION:
        raise ConfigError(f"--shape {text}: H{shape.hidden} must be a multiple of {HEAD_DIMENSION}.")
    if shape.vocabulary < 2:
        raise ConfigError(f"--shape {text}: V{shape.vocabulary} must be at least 2, for answers that differ.")
    return shape


def _part(word: str, text: str) -> tuple[str, Any]:
    if word.lower() in _SWITCHES:
        return _SWITCHES[word.lower()]
    found = re.fullmatch(r"([a-zA-Z])(\d+)", word)
    if found is None or found[1].upper() not in _LETTERS:
        known = ", ".join([*(f"{letter} ({name})" for letter, name in _LETTERS.items()), *_SWITCHES])
        raise ConfigError(f"--shape {text}: {word!r} is none of {known}; write it like {_EXAMPLE}.")
    if int(found[2]) < 1:
        raise ConfigError(f"--shape {text}: {word} must be at least 1.")
    return _LETTERS[found[1].upper()], int(found[2])

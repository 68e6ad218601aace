"""A tokenizer as llama.cpp reads it from a GGUF file.

llama.cpp knows two kinds of BPE: over bytes, as of GPT-2, whose way of splitting text it has by name; and over
characters with bytes for what is unknown, as of SentencePiece, which joins the pair of the highest score first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mlx_cpo_plugin.export.errors import ExportError
from mlx_cpo_plugin.types import Tokenizer, Values

if TYPE_CHECKING:
    from gguf import GGUFWriter

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is split before the merges -> llama.cpp's name of it.
_SPLITS: dict[tuple[str, ...], str] = {
    ("gpt2",): "gpt-2",
    ("digit", "gpt2"): "smollm",
    (_CONTRACTIONS + _REST, "bytes"): "qwen2",
    (_CONTRACTIONS + "{1,3}" + _REST, "bytes"): "llama-bpe",
}
_SPACE = "\u2581"
# Below that of every merge.
_NO_MERGE = -1e6


def check_tokenizer(tokenizer: Tokenizer, vocabulary: int) -> None:
    """Find out whether llama.cpp can have this tokenizer.

    Args:
        vocabulary: rows of the embedding.

    Raises:
        ExportError: it is of a kind, or splits text in a way, that llama.cpp has no name for that is known here.
    """
    described = _described(tokenizer)
    model = described["model"]
    if model["type"] != "BPE":
        raise _unknown(f"it is of the kind {model['type']}")
    if not model.get("byte_fallback"):
        _split_name(described)
    if (largest := max(model["vocab"].values())) >= vocabulary:
        raise _unknown(f"it has the token {largest}, and the model's embedding {vocabulary} rows")


def add_tokenizer(
    writer: GGUFWriter, tokenizer: Tokenizer, vocabulary: int, adds_bos: bool, template_arguments: Values
) -> None:
    """Add tokens, merges or scores, special tokens and chat template to the metadata of a file.

    Args:
        adds_bos: whether llama.cpp is to put BOS before what it is given.
        template_arguments: of the chat template, as in training; llama.cpp has values of its own for some.

    Raises:
        ExportError: see :func:`check_tokenizer`.
    """
    described, inner = _described(tokenizer), _inner(tokenizer)
    model = described["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    by_characters = bool(model.get("byte_fallback"))
    texts, types = _tokens(described, vocabulary, by_characters)
    writer.add_tokenizer_model("llama" if by_characters else "gpt2")
    writer.add_tokenizer_pre("default" if by_characters else _split_name(described))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    if by_characters:
        writer.add_token_scores(_scores(texts, merges))
        writer.add_add_space_prefix(_puts_space(described))
    else:
        writer.add_token_merges(merges)
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(False)
    for token, add in (
        (inner.bos_token_id, writer.add_bos_token_id),
        (inner.eos_token_id, writer.add_eos_token_id),
        (inner.unk_token_id, writer.add_unk_token_id),
        (inner.pad_token_id, writer.add_pad_token_id),
    ):
        if token is not None:
            add(token)
    ends: Any = getattr(tokenizer, "eos_token_ids", ())
    other_ends = sorted(set(ends) - {inner.eos_token_id})
    if other_ends:
        writer.add_eot_token_id(other_ends[-1])
    if tokenizer.chat_template:
        writer.add_chat_template(with_arguments(tokenizer.chat_template, template_arguments))


def with_arguments(template: str, arguments: Values) -> str:
    """Return a chat template that renders with these arguments, whatever it is given for them."""
    named = {name: value for name, value in arguments.items() if name.isidentifier()}  # a template can have no others
    return "".join(f"{{% set {name} = {_literal(value)} %}}\n" for name, value in named.items()) + template


def _literal(value: object) -> str:
    """Return a plain value as Jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value)


def _inner(tokenizer: Tokenizer) -> Any:
    return getattr(tokenizer, "_tokenizer", tokenizer)


def _described(tokenizer: Tokenizer) -> Values:
    """Return what ``tokenizer.json`` says."""
    backend = getattr(_inner(tokenizer), "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise _unknown("it is not one of the library tokenizers")
    described: Values = json.loads(backend.to_str())
    return described


def _unknown(why: str) -> ExportError:
    return ExportError(f"The tokenizer has no form in GGUF that is known here: {why}; export with --to mlx.", key="to")


def _parts(step: Any) -> Iterator[Any]:
    """Yield the steps of a normaliser or pre-tokenizer, those of sequences one by one."""
    if step:
        inner = step.get("pretokenizers") or step.get("normalizers")
        if inner is None:
            yield step
        for part in inner or ():
            yield from _parts(part)


def _split_name(described: Values) -> str:
    """Return llama.cpp's name for the way in which text is split.

    Raises:
        ExportError: it has none that is known here.
    """
    steps = []
    for part in _parts(described["pre_tokenizer"]):
        if part["type"] == "ByteLevel":
            steps.append("gpt2" if part.get("use_regex", True) else "bytes")
        elif part["type"] == "Digits" and part["individual_digits"]:
            steps.append("digit")
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            steps.append(str(part["pattern"].get("Regex")))
        else:
            steps.append(str(part["type"]))
    name = _SPLITS.get(tuple(steps))
    if name is None:
        raise _unknown("it splits text otherwise than GPT-2, Llama 3, Qwen and SmolLM")
    return name


def _tokens(described: Values, vocabulary: int, by_characters: bool) -> tuple[list[str], list[int]]:
    """Return text and type of every row of the embedding; rows without a token get one that is never used."""
    from gguf import TokenType

    model = described["model"]
    texts = [f"[PAD{row}]" for row in range(vocabulary)]
    types = [int(TokenType.UNUSED)] * vocabulary
    for text, token in model["vocab"].items():
        texts[token] = text
        is_byte = by_characters and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        types[token] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    # Gemma's tokenizer has one more than the embedding, for images.
    for added in (token for token in described["added_tokens"] if token["id"] < vocabulary):
        texts[added["id"]] = added["content"] if added["special"] else added["content"].replace(_SPACE, " ")
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    unknown = model["vocab"].get(model.get("unk_token"))
    if by_characters and unknown is not None:
        types[unknown] = int(TokenType.UNKNOWN)
    return texts, types


def _scores(texts: list[str], merges: list[str]) -> list[float]:
    """Return a score for each token such that the pair that is merged first has the highest one."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        ranks.setdefault(left + right, rank)
    return [float(-ranks[text]) if text in ranks else _NO_MERGE for text in texts]


def _puts_space(described: Values) -> bool:
    """Whether the tokenizer puts a space before the text."""
    normalisers = [part["type"] for part in _parts(described["normalizer"])]
    splits = list(_parts(described["pre_tokenizer"]))
    prepends = any(part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never" for part in splits)
    return prepends or "Prepend" in normalisers

"""Prompts that a model answers while it trains: the user's own, or those of held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_cpo_plugin.data.files import kind_of, read_file
from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer
from mlx_cpo_plugin.data.tokens import prompt_tokens
from mlx_cpo_plugin.errors import DataError, first_line, named, printable, shown
from mlx_cpo_plugin.types import Values

# Of the validation set: as many prompts, of rows among the first ones, preferably not longer than this many tokens.
HELD_OUT, AMONG, SHORT = 2, 64, 512


class SamplePrompt(NamedTuple):
    """A prompt as the model gets it.

    Attributes:
        source: the row that it is from, or its number among the user's own.
        text: as a person reads it.
        tokens: under the chat template.
    """

    source: str
    text: str
    tokens: list[int]


def read_prompts(path: Path) -> list[object]:
    """Return the prompts of a file: of ``.txt`` each line, of a data file each row.

    Raises:
        DataError: it cannot be read.
    """
    if kind_of(path.name) != ".txt":
        return [row.value for row in read_file(path)]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        file, reason = named(str(path)), printable(getattr(error, "strerror", None) or first_line(error))
        raise DataError(f"{file} cannot be read ({reason}): check the file.", place=file) from error
    return [line for line in lines if line.strip()]


def own_prompts(prompts: Sequence[str | Values], tokenizer: ChatTokenizer, longest: int) -> list[SamplePrompt]:
    """Return the user's prompts, each a text or a row with ``prompt`` or ``messages``, as rows of data are rendered.

    Args:
        longest: prompt, in tokens.

    Raises:
        DataError: the template does not take one, or it is too long.
    """
    rendered = []
    for number, prompt in enumerate(prompts, 1):
        try:
            tokens = prompt_tokens(prompt, tokenizer)
        except UnusableRow as error:
            raise DataError(
                f"Prompt {number} of sample_prompts, {shown(prompt)}, cannot be asked ({error}); write another.",
                key="sample_prompts",
            ) from error
        if len(tokens) > longest:
            raise DataError(
                f"Prompt {number} of sample_prompts has {len(tokens)} tokens, max_seq_length is {longest}; shorten it.",
                key="sample_prompts",
                allowed=f"at most {longest} tokens",
            )
        text = prompt if isinstance(prompt, str) else tokenizer.readable(tokens)
        rendered.append(SamplePrompt(f"prompt {number}", text, tokens.tolist()))
    return rendered


def held_out_prompts(pairs: Sequence[PreferencePair], tokenizer: ChatTokenizer) -> list[SamplePrompt]:
    """Return the first different prompts of held-out rows, short ones if there are any."""
    chosen: dict[tuple[int, ...], PreferencePair] = {}
    for pair in sorted(pairs[:AMONG], key=lambda pair: max(len(pair.prompt), SHORT)):
        chosen.setdefault(tuple(pair.prompt.tolist()), pair)
    return [
        SamplePrompt(pair.source, tokenizer.readable(pair.prompt), list(tokens))
        for tokens, pair in list(chosen.items())[:HELD_OUT]
    ]

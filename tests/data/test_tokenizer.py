"""Tokens know where they stand in their text, with and without the tokenizer's help."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import NewlineTokenizer
from support.data_tokenizers import tokenizer_named

from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.tokenizer import ChatTokenizer


@pytest.mark.parametrize("offsets", [True, False], ids=["offsets", "no offsets"])
@given(text=st.text(st.sampled_from("The answer is Yes.\n"), min_size=1, max_size=30), data=st.data())
def test_tokens_before_lie_inside_and_tokens_covering_reach_to_the_character(offsets, text, data):
    tokenizer = ChatTokenizer(tokenizer_named("chatml", offsets=offsets))
    character = data.draw(st.integers(1, len(text)))

    encoded = tokenizer.encode(text)
    before, covering = encoded.tokens_before(character), encoded.tokens_covering(character)

    assert tokenizer.decode(encoded.ids) == text
    assert len(tokenizer.decode(encoded.ids[:before])) <= character <= len(tokenizer.decode(encoded.ids[:covering]))
    if offsets:
        assert covering - before in (0, 1)


def test_a_token_that_reaches_over_a_character_covers_it_but_is_not_before_it():
    for offsets in (True, False):
        encoded = ChatTokenizer(tokenizer_named("chatml", offsets=offsets)).encode("Yes, the answer")

        assert (encoded.tokens_before(12), encoded.tokens_covering(12), len(encoded.ids)) == (3, 4, 4)


@pytest.mark.parametrize("offsets", [True, False], ids=["offsets", "no offsets"])
@pytest.mark.parametrize("way", ["encode", "encode_plain"])
def test_half_of_a_surrogate_pair_makes_a_row_unusable(offsets, way):
    tokenizer = ChatTokenizer(tokenizer_named("chatml", offsets=offsets))

    with pytest.raises(UnusableRow, match=r"^the text holds half of a character \(a lone surrogate\)$"):
        getattr(tokenizer, way)("Yes \ud800.")


def test_every_byte_of_a_character_is_covered_with_it():
    encoded = ChatTokenizer(tokenizer_named("chatml")).encode("🦄No")

    assert encoded.tokens_before(1) == encoded.tokens_covering(1) == len(encoded.ids) - 1


def test_a_tokenizer_that_rewrites_its_text_is_asked_without_offsets():
    inner = tokenizer_named("chatml")._tokenizer
    rewriting = NewlineTokenizer(tokenizer_object=inner.backend_tokenizer, eos_token="<|im_end|>")

    encoded = ChatTokenizer(rewriting).encode("a\nb")

    assert encoded.ends is None
    assert encoded.ids.tolist() == inner.encode("a<n>b")


def test_the_tokenizer_inside_the_wrapper_reads_like_the_wrapper():
    wrapped = tokenizer_named("chatml")

    outside, inside = ChatTokenizer(wrapped), ChatTokenizer(wrapped._tokenizer)

    assert outside.end_ids == inside.end_ids
    assert outside.special_ids == inside.special_ids
    assert outside.encode("Yes.").ids.tolist() == inside.encode("Yes.").ids.tolist()

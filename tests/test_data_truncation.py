"""Pairs over max_seq_length keep their answers; the prompt gives way first, from its left."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mlx_cpo_plugin.data.messages import UnusableRow
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.data.truncation import PROMPT_SHARE, truncate
from mlx_cpo_plugin.errors import DataError

BOS = 1


def make_pair(prompt, chosen, rejected, unscored=0):
    sides = [np.array(side, dtype=np.int32) for side in (prompt, chosen, rejected)]
    return PreferencePair(*sides, *(np.arange(len(side)) >= unscored for side in sides[1:]), source="x.jsonl:1")


def test_a_pair_that_fits_stays_as_it_is():
    pair = make_pair([BOS, 5, 6], [7, 8], [9])

    result = truncate(pair, 5, BOS)

    assert result.pair is pair
    assert not result.prompt_cut
    assert not result.answer_cut


def test_the_prompt_is_cut_from_its_left_until_the_longer_side_fits():
    result = truncate(make_pair([4, 5, 6], [7, 8], [9]), 4)

    assert result.pair.prompt.tolist() == [5, 6]
    assert result.pair.chosen.tolist() == [7, 8]
    assert result.pair.rejected.tolist() == [9]
    assert (result.prompt_cut, result.answer_cut) == (True, False)


def test_a_leading_bos_stays_first():
    result = truncate(make_pair([BOS, 4, 5, 6], [7, 8], [9]), 4, BOS)

    assert result.pair.prompt.tolist() == [BOS, 6]


def test_an_answer_that_does_not_fit_alone_is_cut_at_its_end():
    result = truncate(make_pair([BOS, 4], [7, 8, 9, 10, 2], [9, 2]), 4, BOS)

    assert result.pair.prompt.tolist() == [BOS]
    assert result.pair.chosen.tolist() == [7, 8, 9]
    assert result.pair.rejected.tolist() == [9, 2]
    assert (result.prompt_cut, result.answer_cut) == (True, True)


def test_answers_that_differ_only_behind_the_cut_are_unusable():
    with pytest.raises(UnusableRow) as caught:
        truncate(make_pair([4], [7, 8, 9], [7, 8, 10]), 3)

    assert str(caught.value) == "both answers are the same within max_seq_length 3"


def test_an_answer_whose_scored_tokens_lie_behind_the_cut_is_unusable():
    with pytest.raises(UnusableRow) as caught:
        truncate(make_pair([4], [7, 8, 9], [6, 8, 10], unscored=2), 3)

    assert str(caught.value) == "no token of an answer is left to score within max_seq_length 3"


def test_a_length_without_room_for_an_answer_is_an_error():
    with pytest.raises(DataError, match=r"^max_seq_length is 1, but .* need 2: raise max_seq_length\.$"):
        truncate(make_pair([4], [7], [8]), 1)


IDS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(prompt=IDS, chosen=IDS, rejected=IDS, length=st.integers(2, 30), unscored=st.integers(0, 2))
def test_whatever_is_cut_fits_and_keeps_answers_before_prompt(prompt, chosen, rejected, length, unscored):
    assume(chosen != rejected and unscored < min(len(chosen), len(rejected)))
    pair = make_pair(prompt, chosen, rejected, unscored)
    least = min(len(prompt), max(length // PROMPT_SHARE, 1))
    try:
        result = truncate(pair, length, BOS)
    except UnusableRow:
        kept = chosen[: length - least], rejected[: length - least]
        assert kept[0] == kept[1] or unscored >= length - least
        return
    cut = result.pair

    assert cut.length <= length
    assert len(cut.prompt) >= least
    for side, whole in (("chosen", chosen), ("rejected", rejected)):
        ids, scored = getattr(cut, side).tolist(), getattr(cut, f"{side}_scored")
        assert ids == whole[: length - least]
        assert len(scored) == len(ids)
        assert scored.any()
    kept = cut.prompt.tolist()
    if prompt[0] == BOS:
        assert kept[0] == BOS
        assert len(kept) == 1 or kept[1:] == prompt[-(len(kept) - 1) :]
    else:
        assert kept == prompt[-len(kept) :]
    assert result.prompt_cut == (len(kept) < len(prompt))
    assert not result.prompt_cut or cut.length == length
    assert cut.source == "x.jsonl:1"

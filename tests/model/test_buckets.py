"""Which pairs are computed together."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.architectures import build_architecture
from support.devices import pretended
from support.tiny import build_model, build_pairs

from mlx_cpo_plugin.device import METAL
from mlx_cpo_plugin.model import memory
from mlx_cpo_plugin.model.buckets import (
    GROUP_SIZES,
    MOST_SHAPES,
    PAIR_BY_PAIR,
    Grouping,
    PairSize,
    bucket_shapes,
    grouping_for,
)
from mlx_cpo_plugin.model.parity import choose_scorer
from mlx_cpo_plugin.model.shared_prefix import split_shared_prefix


def kept_bytes(model: nn.Module) -> int:
    return sum(memory.kept_bytes_of_layers(model))


SIZES = st.builds(PairSize, st.integers(1, 300), st.integers(2, 200), st.integers(1, 400), st.booleans())


def cost(groups: list[list[int]], sizes: list[PairSize], grouping: Grouping) -> float:
    return sum(
        grouping.overhead + len(group) * grouping.bucket_for([sizes[number] for number in group]).tokens
        for group in groups
    )


@given(st.lists(SIZES, min_size=1, max_size=20), st.integers(0, 500), st.integers(0, 3000))
def test_every_pair_is_in_one_group_within_the_budget(sizes: list[PairSize], overhead: int, budget: int) -> None:
    grouping = Grouping(overhead, budget)

    groups = grouping.groups(sizes)

    assert sorted(number for group in groups for number in group) == list(range(len(sizes)))
    for group in groups:
        bucket = grouping.bucket_for([sizes[number] for number in group])
        assert len(group) in GROUP_SIZES
        assert len(group) == 1 or len(group) * bucket.tokens <= budget
        assert all(bucket.fits(sizes[number]) for number in group)
    assert cost(groups, sizes, grouping) <= cost([[number] for number in range(len(sizes))], sizes, grouping)


def test_pairs_of_like_length_are_put_together_and_others_are_not() -> None:
    small, large = PairSize(10, 5, 8), PairSize(200, 90, 150)

    groups = Grouping(overhead=50, budget=1000).groups([small, large, small, large, small])

    assert sorted(map(sorted, groups)) == [[0, 2], [1, 3], [4]]


def test_nothing_is_put_together_where_that_saves_nothing() -> None:
    sizes = [PairSize(10, 5, 8)] * 4

    assert PAIR_BY_PAIR.groups(sizes) == [[0], [1], [2], [3]]
    assert len(Grouping(overhead=1, budget=19).groups(sizes)) == 4


def test_pairs_that_no_bucket_holds_together_share_no_pass() -> None:
    sizes = [PairSize(61, 30, 60), PairSize(30, 61, 60)]

    assert len(Grouping(overhead=500, budget=5000).groups(sizes)) == 1
    assert len(Grouping(overhead=500, budget=5000, buckets=bucket_shapes(sizes, 300)).groups(sizes)) == 2


def test_a_group_is_padded_to_the_smallest_bucket_that_it_fits_in() -> None:
    buckets = (PairSize(16, 16, 16), PairSize(32, 16, 32, True), PairSize(64, 64, 64, True))
    grouping = Grouping(0, 0, buckets)

    assert grouping.bucket_for([PairSize(10, 5, 8), PairSize(9, 12, 16)]) == buckets[0]
    assert grouping.bucket_for([PairSize(10, 5, 8, True)]) == buckets[1]
    assert grouping.bucket_for([PairSize(17, 5, 8), PairSize(9, 17, 8)]) == buckets[2]


@given(st.lists(SIZES, min_size=1, max_size=60), st.integers(0, 5000))
def test_there_are_few_shapes_and_a_bucket_for_every_pair(sizes: list[PairSize], budget: int) -> None:
    buckets = bucket_shapes(sizes, budget)

    assert all(any(bucket.fits(size) for bucket in buckets) for size in sizes)
    grouping = Grouping(100, budget, buckets)
    groups = [group for batch in (sizes, sizes[::2], sizes[:7]) for group in grouping.groups(batch)]
    shapes = {(len(group), grouping.bucket_for([sizes[number] for number in group])) for group in groups}
    assert len(shapes) <= MOST_SHAPES


def test_buckets_follow_the_lengths_of_the_data() -> None:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(4.5, 0.8, (2000, 2))).astype(int) + 2
    sizes = [PairSize(int(shared), int(answer), int(answer)) for shared, answer in lengths]
    grouping = Grouping(0, 0, bucket_shapes(sizes, budget=0))

    padded = sum(grouping.bucket_for([size]).tokens for size in sizes)

    one_bucket = max(size.shared for size in sizes) + 2 * max(size.answer for size in sizes)
    assert padded < 1.3 * sum(size.tokens for size in sizes)
    assert padded < 0.2 * one_bucket * len(sizes)


def test_the_size_of_a_pair_is_what_it_computes() -> None:
    pair = next(pair for pair in build_pairs(9) if min(len(pair.chosen), len(pair.rejected)) > 2)
    pair.rejected[:2] = pair.chosen[0], pair.chosen[1] + 1
    split = split_shared_prefix(pair)

    size = PairSize.of(split)

    assert split.prefix is not None
    assert (size.shared, size.scores_shared) == (len(split.prefix), True)
    assert size.answer == max(len(split.chosen), len(split.rejected))
    assert size.scored == pair.chosen_scored.sum() + pair.rejected_scored.sum() - 1


@pytest.mark.usefixtures("choices_of_a_cpu")
def test_larger_layers_put_fewer_pairs_together() -> None:
    small, large = (grouping_for(build_model(hidden_size=size, intermediate_size=2 * size)) for size in (32, 256))

    assert small.budget > large.budget > 0


def test_a_device_that_is_nearly_full_puts_fewer_pairs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model()
    whole = grouping_for(model).budget
    monkeypatch.setattr(memory, "device_memory", lambda: mx.get_active_memory() + 10_000_000)

    assert grouping_for(model).budget < whole


@pytest.mark.parametrize(("name", "together"), [("llama", True), ("gemma3_text", True), ("qwen3_next", False)])
def test_models_whose_memory_is_no_list_of_tokens_are_computed_pair_by_pair(name: str, together: bool) -> None:
    scorer = choose_scorer(build_architecture(name), build_pairs(4), "auto", pytest.fail)

    assert scorer is not None
    assert (scorer.grouping != PAIR_BY_PAIR) == together


def test_a_model_that_miscounts_padding_is_computed_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_cpo_plugin.model.caches import PaddedCache

    monkeypatch.setattr(PaddedCache, "offset", property(lambda self: self.padded))
    scorer = choose_scorer(build_model(), build_pairs(4), "auto", pytest.fail)

    assert scorer is not None
    assert scorer.grouping == PAIR_BY_PAIR


@pytest.mark.usefixtures("choices_of_a_cpu")
def test_what_a_token_keeps_grows_with_the_width_of_the_layers() -> None:
    narrow, wide = (kept_bytes(build_model(hidden_size=size)) for size in (32, 64))
    half = build_model()
    half.set_dtype(mx.bfloat16)
    packed = build_model(hidden_size=64)
    nn.quantize(packed, group_size=32, bits=4)

    assert narrow < wide
    assert kept_bytes(packed) == wide
    assert kept_bytes(half) == narrow  # a CPU computes in float32
    with pretended(METAL):
        assert kept_bytes(half) == narrow / 2

"""Which pairs are trained when, and how they lie in arrays."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import build_pairs

from mlx_cpo_plugin.data.batches import (
    BatchSize,
    MicroBatch,
    collate,
    evaluation_plan,
    micro_batches_of,
    scored_tokens,
    training_plan,
)

sizes = st.integers(1, 40)


def plan(
    lengths: list[int],
    batch_size: int = 4,
    batch_tokens: int | None = None,
    accumulation: int = 1,
    iters: int = 20,
    seed: int = 0,
    **ranks: int,
) -> list[MicroBatch]:
    size = BatchSize(batch_size, batch_tokens, accumulation)
    return list(training_plan(lengths, size, iters=iters, seed=seed, **ranks))


@given(rows=sizes, batch_size=st.integers(1, 50), accumulation=st.integers(1, 5), seed=st.integers(0, 9))
def test_every_epoch_sees_each_pair_exactly_once(rows: int, batch_size: int, accumulation: int, seed: int) -> None:
    per_epoch = -(-rows // batch_size)

    micro_batches = plan(
        list(range(rows)), batch_size=batch_size, accumulation=accumulation, seed=seed, iters=3 * per_epoch
    )

    for epoch in range(3):
        batches = micro_batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert Counter(index for batch in batches for index in batch.indices) == Counter(range(rows))
        assert [batch.epoch for batch in batches] == [epoch + done / per_epoch for done in range(1, per_epoch + 1)]
        assert batches[-1].epoch == epoch + 1


@given(rows=sizes, batch_size=st.integers(1, 9), accumulation=st.integers(1, 5), iters=st.integers(1, 30))
def test_each_step_counts_exactly_the_pairs_that_it_holds(
    rows: int, batch_size: int, accumulation: int, iters: int
) -> None:
    micro_batches = plan([1] * rows, batch_size=batch_size, accumulation=accumulation, iters=iters)

    assert len(micro_batches) == iters
    assert micro_batches[-1].closes_window
    held = 0
    for batch in micro_batches:
        held += len(batch.indices)
        if batch.closes_window:
            assert held == len(batch.window)
            held = 0


@given(rows=sizes, batch_size=st.integers(1, 6), accumulation=st.integers(1, 5))
def test_accumulating_takes_the_same_pairs_as_one_large_batch(rows: int, batch_size: int, accumulation: int) -> None:
    def steps(batch_size: int, accumulation: int) -> list[set[int]]:
        epoch = plan(list(range(rows)), batch_size=batch_size, accumulation=accumulation, iters=-(-rows // batch_size))
        result: list[set[int]] = [set()]
        for batch in epoch:
            result[-1].update(batch.indices)
            if batch.closes_window:
                result.append(set())
        return result[:-1]

    assert steps(batch_size, accumulation) == steps(batch_size * accumulation, 1)


@given(rows=sizes, batch_size=st.integers(1, 9), ranks=st.integers(1, 4))
def test_ranks_share_each_micro_batch_without_overlap(rows: int, batch_size: int, ranks: int) -> None:
    alone = plan(list(range(rows)), batch_size=batch_size, iters=7)
    together = [
        plan(list(range(rows)), batch_size=batch_size, iters=7, rank=rank, world_size=ranks) for rank in range(ranks)
    ]

    for number, whole in enumerate(alone):
        shares = [shard[number] for shard in together]
        assert sorted(index for share in shares for index in share.indices) == sorted(whole.indices)
        assert {share.window for share in shares} == {whole.window}


lengths_of_pairs = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(lengths=lengths_of_pairs, batch_tokens=st.integers(1, 120), accumulation=st.integers(1, 4))
def test_a_batch_by_tokens_takes_what_fits_and_an_epoch_each_pair_once(
    lengths: list[int], batch_tokens: int, accumulation: int
) -> None:
    iters = micro_batches_of(2, lengths, BatchSize(4, batch_tokens, accumulation), seed=0)

    micro_batches = plan(lengths, batch_tokens=batch_tokens, accumulation=accumulation, iters=iters)

    for epoch in range(2):
        batches = [batch for batch in micro_batches if epoch < batch.epoch <= epoch + 1]
        assert Counter(index for batch in batches for index in batch.indices) == Counter(range(len(lengths)))
        for batch, following in pairwise(batches):
            tokens = sum(lengths[index] for index in batch.indices)
            assert tokens <= batch_tokens or len(batch.indices) == 1
            assert tokens + lengths[following.indices[0]] > batch_tokens
        assert batches[-1].closes_window
        assert sum(batch.closes_window for batch in batches) == -(-len(batches) // accumulation)


@given(rows=sizes, batch_size=st.integers(1, 9), accumulation=st.integers(1, 5), epochs=st.integers(1, 3))
def test_the_micro_batches_of_epochs_by_pairs_are_those_that_the_host_counts(
    rows: int, batch_size: int, accumulation: int, epochs: int
) -> None:
    counted = micro_batches_of(epochs, [1] * rows, BatchSize(batch_size, None, accumulation), seed=0)

    assert counted == epochs * -(-rows // batch_size)


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int) -> list[tuple[int, ...]]:
        return [batch.indices for batch in plan([1] * 30, seed=seed, iters=16)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1)[:8] != order(1)[8:]


@given(rows=sizes, batch_size=st.integers(1, 9), num_batches=st.integers(-1, 6), ranks=st.integers(1, 3))
def test_evaluation_sees_the_first_pairs_once(rows: int, batch_size: int, num_batches: int, ranks: int) -> None:
    if num_batches == 0:
        num_batches = -1
    pairs = build_pairs(rows)

    seen = [
        pair.source
        for rank in range(ranks)
        for batch in evaluation_plan(pairs, batch_size=batch_size, num_batches=num_batches, rank=rank, world_size=ranks)
        for pair in batch
    ]

    expected = pairs if num_batches < 0 else list(islice(pairs, num_batches * batch_size))
    assert sorted(seen) == sorted(pair.source for pair in expected)


@given(count=st.integers(1, 6), seed=st.integers(0, 50))
def test_arrays_hold_each_scored_token_where_it_is_predicted(count: int, seed: int) -> None:
    pairs = build_pairs(count, seed)
    for pair in pairs:
        pair.chosen_scored[: len(pair.chosen) // 2] = False

    batch = collate(pairs)

    tokens, width = np.array(batch.tokens), batch.tokens.shape[1]
    answers = [(p.prompt, p.chosen, p.chosen_scored) for p in pairs]
    answers += [(p.prompt, p.rejected, p.rejected_scored) for p in pairs]
    positions, targets, rows = map(np.array, (batch.scored_positions, batch.targets, batch.target_rows))
    for row, (prompt, answer, scored) in enumerate(answers):
        whole = np.concatenate([prompt, answer])
        assert tokens[row, : len(whole)].tolist() == whole.tolist()
        mine = rows == row
        assert targets[mine].tolist() == answer[scored].tolist()
        predicted_at = positions[mine] - row * (width - 1)
        assert whole[predicted_at + 1].tolist() == answer[scored].tolist()
    assert set(rows[rows >= len(answers)]) <= {len(answers)}
    assert int(batch.token_counts.sum().item()) == scored_tokens(pairs)

"""Sharing a prompt between two answers changes nothing but the work: same log-probs, same gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from support.architectures import ARCHITECTURES, SHARING, build_architecture
from support.tiny import add_adapter, build_model, build_pairs

from mlx_cpo_plugin.data.batches import StepTotals, collate
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.errors import ConfigError
from mlx_cpo_plugin.model import parity, shared_prompt
from mlx_cpo_plugin.model.buckets import PAIR_BY_PAIR, Grouping, PairSize
from mlx_cpo_plugin.model.caches import can_be_padded, fresh_caches
from mlx_cpo_plugin.model.logps import AnswerScores, score_answers
from mlx_cpo_plugin.model.parity import choose_scorer
from mlx_cpo_plugin.model.recompute import checkpointed_layers
from mlx_cpo_plugin.model.recurrences import recurrences_in_chunks
from mlx_cpo_plugin.model.shared_prefix import split_shared_prefix
from mlx_cpo_plugin.model.shared_prompt import SharedPromptScorer
from mlx_cpo_plugin.training.gradient_methods import BatchGradients, GradientMethod, PairGradients
from mlx_cpo_plugin.training.gradients import SharedPromptGradients
from mlx_cpo_plugin.training.long_context import SegmentGradients
from mlx_cpo_plugin.training.objective import Objective, objective_for
from mlx_cpo_plugin.training.qat import fake_quantised


def mixed_pairs() -> list[PreferencePair]:
    """Three pairs of mixed prompt lengths; the answers of the first begin alike."""
    pairs = build_pairs(3, seed=4, longest=14)
    first = pairs[0]
    alike = min(len(first.chosen), len(first.rejected)) // 2
    first.rejected[:alike] = first.chosen[:alike]
    assert len({len(pair.prompt) for pair in pairs}) > 1
    return pairs


def segments(model: nn.Module, objective: Objective, scorer: SharedPromptScorer) -> GradientMethod:
    return SegmentGradients(model, objective, scorer, step_size=8)


def one_after_the_other(model: nn.Module, objective: Objective, scorer: SharedPromptScorer) -> GradientMethod:
    return SegmentGradients(model, objective, scorer)


def side_by_side(model: nn.Module, objective: Objective, scorer: SharedPromptScorer) -> GradientMethod:
    gradients = SharedPromptGradients(model, objective, scorer, PAIR_BY_PAIR)
    gradients.one_after_the_other = pytest.fail

    def compute(pairs: list[PreferencePair], step: StepTotals) -> PairGradients:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared_prompt, "PADDING_ALLOWED", 1.0)
            return gradients(pairs, step)

    return compute


def in_one_pass(model: nn.Module, objective: Objective, scorer: SharedPromptScorer) -> GradientMethod:
    gradients = BatchGradients(model, objective, scorer)

    def compute(pairs: list[PreferencePair], step: StepTotals) -> PairGradients:
        longest = Grouping(0, 0).bucket_for([PairSize.of(split_shared_prefix(pair)) for pair in pairs])
        bucket = replace(longest, shared=longest.shared + 3, answer=longest.answer + 2)
        return gradients(pairs, step, bucket=bucket)

    return compute


WAYS: dict[str, Callable[..., GradientMethod]] = {
    "in one pass": in_one_pass,
    "side by side": side_by_side,
    "one after the other": one_after_the_other,
    "in segments": segments,
}


def assert_same_gradients(ours: PairGradients, plain: PairGradients, tolerance: float = 1e-4) -> None:
    for name, value in ours.scores._asdict().items():
        np.testing.assert_allclose(np.array(value), np.array(getattr(plain.scores, name)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(ours.losses), np.array(plain.losses), rtol=1e-4)
    trees = [{name: np.array(value) for name, value in tree_flatten(gradients.gradient)} for gradients in (ours, plain)]
    scale = np.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in trees[1].values()))
    assert trees[0].keys() == trees[1].keys()
    for name, value in trees[1].items():
        assert np.linalg.norm(trees[0][name].astype(np.float64) - value) <= tolerance * scale, name


@pytest.fixture
def compare(subtests: pytest.Subtests) -> Callable[..., None]:
    """Compare the gradient of every way with the plain one."""
    return partial(compare_every_way, subtests)


def compare_every_way(
    subtests: pytest.Subtests,
    model: nn.Module,
    tolerance: float = 1e-4,
    within: AbstractContextManager[object] | None = None,
) -> None:
    model.train()
    pairs, goal = mixed_pairs(), objective_for("ipo", {"beta": 0.3})
    step = StepTotals.of([*pairs, *build_pairs(2)])  # as a micro-batch of a larger step
    plain = BatchGradients(model, goal)(pairs, step)
    mx.eval(plain)
    with within or nullcontext():
        for way, method in WAYS.items():
            if method is in_one_pass and not can_be_padded(fresh_caches(model)):
                continue  # what this model remembers cannot be padded
            with subtests.test(way):
                assert_same_gradients(method(model, goal, SharedPromptScorer(model))(pairs, step), plain, tolerance)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_the_plain_gradient(name: str, compare: Callable[..., None]) -> None:
    compare(add_adapter(build_architecture(name), scale=1.0), tolerance=5e-4)


def lora(**arguments: Any) -> nn.Module:
    return add_adapter(build_model(**arguments))


def quantised() -> nn.Module:
    model = lora()
    nn.quantize(model, group_size=32, bits=4)
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {
    "lora": lora,
    "dora": lambda: add_adapter(build_model(), dora=True),
    "full": build_model,
    "untied head": lambda: lora(tie_word_embeddings=False),
    "full with an untied head": lambda: build_model(tie_word_embeddings=False),
    "quantised base": quantised,
}


@pytest.mark.parametrize(
    ("kind", "around"),
    [
        *((kind, "nothing") for kind in KINDS),
        ("lora", "checkpointing"),
        ("lora", "qat"),
        ("dora", "checkpointing and qat"),
        ("full", "checkpointing and qat"),
        ("quantised base", "checkpointing and qat"),
    ],
)
def test_every_kind_of_training_has_the_plain_gradient(kind: str, around: str, compare: Callable[..., None]) -> None:
    model = KINDS[kind]()
    with ExitStack() as stack:
        if "qat" in around:
            stack.enter_context(fake_quantised(model, bits=4, group_size=32)).active = True
        stack.enter_context(checkpointed_layers(model, "checkpointing" in around))
        compare(model)


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_next", "lfm2", "deepseek_v2"])
@pytest.mark.slow
def test_checkpointed_layers_pass_gradients_through_every_kind_of_cache(
    name: str, compare: Callable[..., None]
) -> None:
    model = add_adapter(build_architecture(name), scale=1.0)
    with checkpointed_layers(model):
        compare(model, tolerance=5e-4)


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.slow
def test_checkpointed_layers_pass_gradients_through_what_layers_hand_on(name: str, subtests: pytest.Subtests) -> None:
    model = build_architecture(name)
    model.train()
    pairs, goal = mixed_pairs(), objective_for("ipo", {"beta": 0.3})
    plain = BatchGradients(model, goal)(pairs, StepTotals.of(pairs))
    mx.eval(plain)
    ways = {"plain": BatchGradients(model, goal)}
    if name != "afm7":  # whose caches have methods of their own
        ways |= {way: method(model, goal, SharedPromptScorer(model)) for way, method in WAYS.items()}

    with checkpointed_layers(model):
        for way, gradients in ways.items():
            with subtests.test(way):
                assert_same_gradients(gradients(pairs, StepTotals.of(pairs)), plain, tolerance=5e-4)


class Given(nn.Module):
    """A layer that is given a module and a dict to compute with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.array([2.0])

    def __call__(self, x: mx.array, activation: nn.Module, by_name: dict[str, mx.array]) -> mx.array:
        return activation(self.weight * x) + by_name["shift"]


def test_a_module_that_a_checkpointed_layer_is_given_stays_one() -> None:
    model = nn.Module()
    model.layers = [Given(), Given()]
    x, shift = mx.array([3.0]), mx.array([1.0])

    def total(x: mx.array, shift: mx.array) -> mx.array:
        for layer in model.layers:
            x = layer(x, nn.PReLU(), by_name={"shift": shift})
        return x.sum()

    with checkpointed_layers(model):
        assert total(x, shift).item() == 15
        assert [slope.item() for slope in mx.grad(total, (0, 1))(x, shift)] == [4, 3]


@pytest.mark.parametrize("around", ["nothing", "checkpointing"])
@pytest.mark.parametrize("name", ["qwen3_next", "mamba", "mamba2", "jamba"])
def test_recurrences_in_chunks_pass_gradients_to_their_parameters_and_through_their_states(
    name: str, around: str, compare: Callable[..., None]
) -> None:
    model = add_adapter(build_architecture(name), scale=1.0)

    @contextmanager
    def in_chunks() -> Iterator[None]:
        with recurrences_in_chunks(model, chunk_size=4), checkpointed_layers(model, around == "checkpointing"):
            yield

    compare(model, tolerance=5e-4, within=in_chunks())


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_dropout_in_recurrences_is_that_of_the_forward_pass(name: str) -> None:
    model = add_adapter(build_architecture(name), scale=1.0, dropout=0.4)
    model.train()
    pairs, gradients = mixed_pairs(), []
    for chunked in (nullcontext(), recurrences_in_chunks(model, chunk_size=1000)):
        with chunked:
            mx.random.seed(3)
            gradients.append(BatchGradients(model, objective_for("ipo", {"beta": 0.3}))(pairs, StepTotals.of(pairs)))
            mx.eval(gradients)

    assert_same_gradients(*gradients)


@given(seed=st.integers(0, 10_000), alike=st.integers(0, 12))
@settings(max_examples=60)
def test_a_split_pair_is_the_pair(seed: int, alike: int) -> None:
    (pair,) = build_pairs(1, seed)
    alike = min(alike, len(pair.chosen), len(pair.rejected))
    pair.rejected[:alike] = pair.chosen[:alike]

    split = split_shared_prefix(pair)

    shared = split.prefix.inputs[0].tolist() if split.prefix is not None else []
    for side, answer in ((split.chosen, pair.chosen), (split.rejected, pair.rejected)):
        whole = [*pair.prompt.tolist(), *answer.tolist()]
        assert [*shared, *side.inputs[0].tolist()] == whole[:-1]
        at = (side.positions + len(shared) + 1).tolist()
        predicted = dict(zip(at, side.targets.tolist(), strict=True))
        if split.prefix is not None:
            predicted |= dict(zip((split.prefix.positions + 1).tolist(), split.prefix.targets.tolist(), strict=True))
        assert predicted == {len(pair.prompt) + at: token for at, token in enumerate(answer.tolist())}


def test_what_the_answers_have_in_common_is_computed_once() -> None:
    (pair,) = build_pairs(1, seed=3)
    chosen = np.array([7, 8, 9, 10, 11], np.int32)
    pair = PreferencePair(pair.prompt, chosen, np.array([7, 8, 9, 50], np.int32), np.ones(5, bool), np.ones(4, bool))

    split = split_shared_prefix(pair)

    assert split.prefix is not None
    assert len(split.prefix) == len(pair.prompt) + 3 - 1
    assert split.chosen.inputs[0].tolist() == [9, 10]
    assert split.rejected.inputs[0].tolist() == [9]


def test_answers_of_which_one_continues_the_other_are_scored() -> None:
    ones = np.ones
    pair = PreferencePair(
        np.array([5], np.int32), np.array([7, 8, 9], np.int32), np.array([7, 8], np.int32), ones(3, bool), ones(2, bool)
    )
    model = build_model()

    shared, plain = SharedPromptScorer(model).score(split_shared_prefix(pair)), score_answers(model, collate([pair]))

    np.testing.assert_allclose(np.array(shared.chosen_logps), np.array(plain.chosen_logps), rtol=1e-5)
    np.testing.assert_allclose(np.array(shared.rejected_logps), np.array(plain.rejected_logps), rtol=1e-5)


def test_auto_falls_back_with_one_line_where_scores_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity._Trial, "_largest_difference", lambda *_: 0.5)
    said: list[str] = []

    assert choose_scorer(build_model(), build_pairs(3), "auto", said.append) is None

    (line,) = said
    assert line.startswith("This model cannot share the prompt between two answers (log-probs differ by 5.0e-01); each")
    with pytest.raises(ConfigError, match="scoring is 'shared', but this model cannot share prompts"):
        choose_scorer(build_model(), build_pairs(3), "shared", said.append)


def test_log_probs_that_are_no_numbers_are_not_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    score = SharedPromptScorer.score
    monkeypatch.setattr(
        SharedPromptScorer, "score", lambda *args: AnswerScores(*(mx.full(x.shape, mx.nan) for x in score(*args)))
    )

    assert choose_scorer(build_model(), build_pairs(3), "auto", lambda line: None) is None


def test_a_model_that_drops_what_its_caches_hold_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_cpo_plugin.model.caches import SegmentCache

    monkeypatch.setattr(SegmentCache, "update_and_fetch", lambda self, keys, values: (keys, values))
    said: list[str] = []

    assert choose_scorer(build_model(), build_pairs(5), "auto", said.append) is None
    assert len(said) == 1


def test_a_model_without_a_known_backbone_is_scored_the_plain_way() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(96, 8)

        def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
            return self.embedding.as_linear(self.embedding(tokens))

    said: list[str] = []

    assert choose_scorer(Bare(), build_pairs(3), "auto", said.append) is None
    assert "has no backbone of its own" in said[0]


def test_plain_is_never_shared() -> None:
    assert choose_scorer(build_model(), build_pairs(3), "plain") is None
    assert choose_scorer(build_model(), build_pairs(3), "shared") is not None


def test_half_precision_shares_too() -> None:
    model = build_model()
    model.set_dtype(mx.bfloat16)

    assert choose_scorer(model, build_pairs(6, longest=30), "auto", pytest.fail) is not None

"""Pairs packed into one row have the gradient of float64, answer by answer, on every architecture."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models import gemma2
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from support.architectures import COMMON, build_architecture
from support.tiny import VOCABULARY, add_adapter, build_model, build_pairs, relative_error

from mlx_cpo_plugin.bench.reference_gradient import ReferenceLoss, reference_gradient
from mlx_cpo_plugin.data.batches import StepTotals
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.device import compile_where_it_pays
from mlx_cpo_plugin.model.activations import lean_activations
from mlx_cpo_plugin.model.backbone import SplitModel
from mlx_cpo_plugin.model.compiled import compiled_kernels, suits
from mlx_cpo_plugin.model.packed import Row, lay_out, packed_groups, score_packed
from mlx_cpo_plugin.model.parity import choose_scorer
from mlx_cpo_plugin.model.products import float32_products
from mlx_cpo_plugin.model.recompute import checkpointed_layers
from mlx_cpo_plugin.model.shared_prefix import split_shared_prefix
from mlx_cpo_plugin.selftest.models import unquantised
from mlx_cpo_plugin.training.gradients import SharedPromptGradients
from mlx_cpo_plugin.training.objective import objective_for


def quantised(bits: int) -> nn.Module:
    model = build_model()
    nn.quantize(model, group_size=32, bits=bits)
    return add_adapter(model)


def half(dtype: mx.Dtype) -> nn.Module:
    model = build_model()
    model.set_dtype(dtype)
    return add_adapter(model)


def with_head_bias() -> nn.Module:
    """A head that adds as much as no probe of large numbers shows."""
    model = build_model(tie_word_embeddings=False)
    head = nn.Linear(32, VOCABULARY)
    head.weight, head.bias = model.lm_head.weight, mx.random.normal((VOCABULARY,))
    model.lm_head = head
    return add_adapter(model)


def with_adapted_head(bits: int | None = None) -> nn.Module:
    """An adapter on the head, too; one of 3 bits is none of the kernels'."""
    model = add_adapter(build_model(tie_word_embeddings=False))
    linear = nn.QuantizedLinear.from_linear(model.lm_head, group_size=32, bits=bits) if bits else model.lm_head
    head = LoRALinear.from_base(linear, r=4, scale=10.0)
    head.lora_b = 0.02 * mx.random.normal(head.lora_b.shape)
    model.lm_head = head
    return model


def with_adapted_embedding() -> nn.Module:
    """An adapter on the embedding, which is the head, too."""
    model = add_adapter(build_model())
    embedding = LoRAEmbedding.from_base(model.model.embed_tokens, r=4, scale=10.0)
    embedding.lora_b = 0.02 * mx.random.normal(embedding.lora_b.shape)
    model.model.embed_tokens = embedding
    return model


def with_soft_cap() -> nn.Module:
    """Logits that are capped, and so are no plain product."""
    arguments = {**COMMON, "model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8.0}
    mx.random.seed(0)
    model = gemma2.Model(gemma2.ModelArgs.from_dict(arguments))
    mx.eval(model.parameters())
    return add_adapter(model)


KINDS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: lambda name=name: add_adapter(build_architecture(name))
        for name in ("llama", "qwen2", "qwen3", "gemma3_text", "phi3", "olmo2", "cohere2", "granite")
    },
    "untied head": lambda: add_adapter(build_model(tie_word_embeddings=False)),
    "one head": lambda: add_adapter(build_model(num_attention_heads=1, num_key_value_heads=1)),
    "biases": lambda: add_adapter(build_model(attention_bias=True, mlp_bias=True)),
    "head with a bias": with_head_bias,
    "adapter on the embedding": with_adapted_embedding,
    "adapter on the head": with_adapted_head,
    "adapter on a head of 3 bits": lambda: with_adapted_head(3),
    "dora": lambda: add_adapter(build_model(), dora=True),
    "bfloat16": lambda: half(mx.bfloat16),
    "float16": lambda: half(mx.float16),
    "4 bits": lambda: quantised(4),
    "8 bits": lambda: quantised(8),
}
PAIRS = build_pairs(4, seed=3, longest=30)


def gradient(
    model: nn.Module, pairs: list[PreferencePair] = PAIRS, checkpointed: bool = False, packs: bool = True
) -> dict[str, mx.array]:
    """The gradient with the kernels, packed or not."""
    with ExitStack() as stack:
        stack.enter_context(compile_where_it_pays())
        stack.enter_context(lean_activations())
        stack.enter_context(float32_products(model))
        stack.enter_context(checkpointed_layers(model, checkpointed))
        stack.enter_context(compiled_kernels(model))
        model.train()
        scorer = choose_scorer(model, pairs, "shared")
        assert scorer is not None
        assert scorer.packs
        scorer.packs = packs
        method = SharedPromptGradients(model, objective_for("sigmoid", {"beta": 0.1}), scorer, scorer.grouping)
        result = method(pairs, StepTotals.of(pairs))
        mx.eval(result.gradient)
        return result.gradient


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_float64(kind: str, kernels: None) -> None:
    found = [gradient(KINDS[kind](), packs=packs) for packs in (True, False)]
    with mx.stream(mx.cpu):
        loss = ReferenceLoss("sigmoid", beta=0.1, delta=50.0)
        expected = reference_gradient(unquantised(KINDS[kind]()), PAIRS, loss, lambda _: None)

        for each in found:
            assert relative_error(each, expected) < 2e-5


def test_a_capped_head_or_one_with_a_bias_is_not_taken_for_a_product() -> None:
    for model in (with_head_bias(), with_soft_cap()):
        assert SplitModel(model).head_weight is None
    assert SplitModel(add_adapter(build_model())).head_weight is not None


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "dora", "4 bits"])
def test_checkpointing_changes_nothing(kind: str, kernels: None) -> None:
    assert relative_error(gradient(KINDS[kind](), checkpointed=True), gradient(KINDS[kind]())) < 1e-6


def test_the_last_layer_computes_keys_and_values_of_all_tokens_and_all_else_of_those_that_are_read(
    kernels: None, tmp_path: Path
) -> None:
    model, graph = add_adapter(build_model(num_hidden_layers=2)), tmp_path / "graph.dot"
    layout = lay_out([split_shared_prefix(pair) for pair in PAIRS])
    with lean_activations(), compiled_kernels(model):
        scores = score_packed(SplitModel(model), layout)
    mx.export_to_dot(str(graph), scores.chosen_logps, scores.rejected_logps)

    # Of the last layer's two calls together, each of the 7 products is evaluated once.
    assert len(re.findall('label ?="CPOLinear"', graph.read_text())) == 2 * 7
    assert 0 < layout.read.size < layout.tokens.size


def test_a_packed_pass_takes_less_memory_than_padded_ones(kernels: None) -> None:
    pairs = build_pairs(8, seed=1, longest=200)
    peaks = []
    for packs in (True, False):
        model = add_adapter(build_model(num_hidden_layers=4))
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        gradient(model, pairs, packs=packs)
        peaks.append(mx.get_peak_memory() - before)

    assert peaks[0] < peaks[1]


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next", "mamba", "mamba2", "lfm2", "gpt_oss", "deepseek_v2"])
def test_mixtures_of_experts_and_recurrences_are_not_for_the_kernels(name: str) -> None:
    assert not suits(add_adapter(build_architecture(name)))


def test_only_adapters_are_trained_with_the_kernels() -> None:
    full, with_norm = build_model(), add_adapter(build_model())
    with_norm.model.norm.unfreeze()

    assert suits(add_adapter(build_model()))
    assert not suits(full)
    assert not suits(with_norm)


@given(seed=st.integers(0, 2**31), count=st.integers(1, 6), longest=st.integers(1, 9))
def test_each_token_of_a_layout_stands_where_its_own_text_has_it(seed: int, count: int, longest: int) -> None:
    pairs = build_pairs(count, seed=seed, longest=longest)
    layout = lay_out([split_shared_prefix(pair) for pair in pairs])
    tokens, read, scored = np.array(layout.tokens[0]), np.array(layout.read), set()

    def seen_by(at: int, row: Row) -> list[int]:
        (segment,) = [s for s in row.segments if s.first_query <= at < s.first_query + s.queries]
        own = range(segment.first_own_key, segment.first_own_key + at - segment.first_query + 1)
        return [*range(segment.first_prefix_key, segment.first_prefix_key + segment.prefix_keys), *own]

    for at in range(len(read)):
        assert seen_by(at, layout.read_row) == seen_by(read[at], layout.row)
    assert np.array_equal(layout.read_row.positions, layout.row.positions[read])
    for at, target, row in zip(*map(np.array, (layout.scored, layout.targets, layout.rows)), strict=True):
        seen = seen_by(at, layout.read_row)
        pair = pairs[row % count]
        texts = [np.concatenate([pair.prompt, answer]) for answer in (pair.chosen, pair.rejected)]
        for side in (0, 1) if row >= 2 * count else (row // count,):
            assert np.array_equal(tokens[seen], texts[side][: len(seen)])
            assert texts[side][len(seen)] == target
            assert layout.read_row.positions[at] == len(seen) - 1
            scored.add((row % count, side, len(seen)))
    assert len(scored) == layout.token_counts.sum() == sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)


@given(sizes=st.lists(st.integers(1, 300), max_size=30), budget=st.integers(1, 500))
def test_groups_keep_the_order_and_the_budget_and_are_even(sizes: list[int], budget: int) -> None:
    groups = packed_groups(sizes, float(budget))

    assert [number for group in groups for number in group] == list(range(len(sizes)))
    assert all(sum(sizes[number] for number in group) <= budget for group in groups if len(group) > 1)
    if len(set(sizes)) == 1 and sizes[0] * len(sizes) <= budget:
        assert len(groups) == 1


def test_two_passes_are_of_like_size() -> None:
    assert packed_groups([10] * 12, 100) == [list(range(6)), list(range(6, 12))]

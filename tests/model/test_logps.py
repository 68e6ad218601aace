"""Log-probs of answers against a float64 reference that scores one answer at a time."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import cohere2, gemma3_text, mamba, qwen3_moe
from support.tiny import add_adapter, assert_same, build_model, build_pairs

from mlx_cpo_plugin.data.batches import collate
from mlx_cpo_plugin.data.pair import PreferencePair
from mlx_cpo_plugin.model.logps import score_answers


def reference_logps(model: nn.Module, prompt: np.ndarray, answer: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Log-prob of each scored token in float64, from the logits of the one unpadded sequence."""
    tokens = np.concatenate([prompt, answer])
    logits = np.array(model(mx.array(tokens)[None, :-1]).astype(mx.float32)[0], np.float64)
    logits -= logits.max(-1, keepdims=True)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    positions = len(prompt) + np.flatnonzero(scored) - 1
    return logps[positions, answer[scored]]


def reference_sides(model: nn.Module, pairs: list[PreferencePair]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    chosen = [reference_logps(model, pair.prompt, pair.chosen, pair.chosen_scored) for pair in pairs]
    rejected = [reference_logps(model, pair.prompt, pair.rejected, pair.rejected_scored) for pair in pairs]
    return chosen, rejected


def test_log_probs_are_sums_over_the_scored_tokens() -> None:
    model, pairs = build_model(), build_pairs(7)
    pairs[2].chosen_scored[:-1] = False

    scores = score_answers(model, collate(pairs))

    chosen, rejected = reference_sides(model, pairs)
    np.testing.assert_allclose(np.array(scores.chosen_logps), [logps.sum() for logps in chosen], rtol=2e-6)
    np.testing.assert_allclose(np.array(scores.rejected_logps), [logps.sum() for logps in rejected], rtol=2e-6)


def test_length_normalised_log_probs_are_means() -> None:
    model, pairs = build_model(), build_pairs(7)

    scores = score_answers(model, collate(pairs), length_normalised=True)

    chosen, rejected = reference_sides(model, pairs)
    np.testing.assert_allclose(np.array(scores.chosen_logps), [logps.mean() for logps in chosen], rtol=2e-6)
    np.testing.assert_allclose(np.array(scores.rejected_logps), [logps.mean() for logps in rejected], rtol=2e-6)


def test_logits_are_the_mean_raw_logit_of_the_answer_tokens_on_both_sides() -> None:
    model, pairs = build_model(), build_pairs(3)

    scores = score_answers(model, collate(pairs))

    for side, means in (("chosen", scores.chosen_logits), ("rejected", scores.rejected_logits)):
        for pair, mean in zip(pairs, means.tolist(), strict=True):
            answer = getattr(pair, side)
            logits = np.array(model(mx.array(np.concatenate([pair.prompt, answer]))[None, :-1])[0])
            expected = logits[len(pair.prompt) - 1 + np.arange(len(answer)), answer].mean()
            assert mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_models_are_summed_in_float32(dtype: mx.Dtype) -> None:
    model, pairs = build_model(), build_pairs(4, longest=60)
    model.set_dtype(dtype)

    scores = score_answers(model, collate(pairs))

    chosen, _ = reference_sides(model, pairs)
    assert scores.chosen_logps.dtype == mx.float32
    # Logits differ by the padding's order of sums in half precision; a bfloat16 sum would be off by percents.
    np.testing.assert_allclose(np.array(scores.chosen_logps), [logps.sum() for logps in chosen], rtol=2e-3)


ARCHITECTURES = {
    "qwen3_moe": lambda: qwen3_moe.Model(
        qwen3_moe.ModelArgs(
            model_type="qwen3_moe", hidden_size=32, num_hidden_layers=2, intermediate_size=32, num_attention_heads=4,
            num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=16,
            rms_norm_eps=1e-5, vocab_size=96, num_key_value_heads=2, head_dim=8, rope_theta=1e4,
            tie_word_embeddings=False, max_position_embeddings=128, norm_topk_prob=True,
        )
    ),
    "gemma3_text": lambda: gemma3_text.Model(
        gemma3_text.ModelArgs(
            model_type="gemma3_text", hidden_size=32, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2,
            head_dim=16, vocab_size=96, num_key_value_heads=1, sliding_window=8, sliding_window_pattern=2,
        )
    ),
    "cohere2": lambda: cohere2.Model(
        cohere2.ModelArgs(
            model_type="cohere2", hidden_size=32, head_dim=8, num_hidden_layers=2, intermediate_size=32,
            num_attention_heads=4, num_key_value_heads=2, vocab_size=96, sliding_window=8, sliding_window_pattern=2,
        )
    ),
    "mamba": lambda: mamba.Model(
        mamba.ModelArgs(
            model_type="mamba", vocab_size=96, hidden_size=32, intermediate_size=64, state_size=4, num_hidden_layers=2,
            conv_kernel=3, use_bias=False, use_conv_bias=True, time_step_rank=4,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_changes_nothing_whatever_the_architecture(name: str) -> None:
    mx.random.seed(0)
    model, pairs = ARCHITECTURES[name](), build_pairs(4)

    scores = score_answers(model, collate(pairs))

    chosen, rejected = reference_sides(model, pairs)
    np.testing.assert_allclose(np.array(scores.chosen_logps), [logps.sum() for logps in chosen], rtol=1e-5)
    np.testing.assert_allclose(np.array(scores.rejected_logps), [logps.sum() for logps in rejected], rtol=1e-5)


def test_gradients_equal_those_of_a_float64_model_scored_answer_by_answer() -> None:
    pairs = build_pairs(5)
    model, wide = add_adapter(build_model()), add_adapter(build_model())
    wide.load_weights([(name, mx.array(np.array(v))) for name, v in tree_flatten(model.parameters())])
    with mx.stream(mx.cpu):
        wide.set_dtype(mx.float64)
    weights = np.random.default_rng(0).normal(size=10)

    def batched(model: nn.Module) -> mx.array:
        scores = score_answers(model, collate(pairs))
        logps = mx.concatenate([scores.chosen_logps, scores.rejected_logps])
        return (logps * mx.array(weights.astype(np.float32))).sum()

    def one_by_one(model: nn.Module) -> mx.array:
        answers = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
        total = mx.array(0.0, mx.float64)
        for (prompt, answer), weight in zip(answers, weights, strict=True):
            logits = model(mx.array(np.concatenate([prompt, answer]))[None, :-1])[0, len(prompt) - 1 :]
            picked = mx.take_along_axis(logits, mx.array(answer)[:, None], axis=-1)[:, 0]
            total = total + mx.array(weight, mx.float64) * (picked - mx.logsumexp(logits, axis=-1)).sum()
        return total

    _, gradient = nn.value_and_grad(model, batched)(model)
    with mx.stream(mx.cpu):
        _, reference = nn.value_and_grad(wide, one_by_one)(wide)
        mx.eval(reference)

    as_numpy = [{name: np.array(v) for name, v in tree_flatten(tree)} for tree in (gradient, reference)]
    assert as_numpy[1]["model.layers.0.self_attn.q_proj.lora_a"].dtype == np.float64
    assert_same(*as_numpy, tolerance=2e-5)

"""Tiny models of many architectures, with random weights, for tests that must hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn

VOCABULARY = 96

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {
        "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "moe_intermediate_size": 16, "norm_topk_prob": True,
    },
    "gemma3_text": {
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
    "phi3": {},
    "olmo2": {},
    "deepseek_v2": {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "qk_nope_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1,
        "topk_method": "gready", "routed_scaling_factor": 1.0, "attention_bias": False,
        "rope_scaling": {
            "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "mscale": 1.0,
            "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
        },
    },
    # Its attention adds scores of positions as if they were a mask.
    "deepseek_v3": {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "qk_nope_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        "attention_bias": False,
    },
    "cohere2": {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2},
    "granite": {
        "logits_scaling": 4.0, "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
        "attention_bias": False, "mlp_bias": False,
    },
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # Remembers token ids besides keys and values.
    "longcat_flash_ngram": {
        "num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2, "n_routed_experts": 4,
        "zero_expert_num": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "routed_scaling_factor": 1.0, "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 3, "emb_neighbor_num": 3, "emb_split_num": 2,
    },
    # Its layers are not called layers.
    "gpt_neox": {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.5},
    "falcon_h1": {
        "head_dim": 8, "mamba_d_conv": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_d_state": 8, "mamba_n_heads": 4,
        "mamba_n_groups": 1,
    },
    "qwen3_next": {
        "num_hidden_layers": 4, "head_dim": 8, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 3, "num_experts": 4,
        "num_experts_per_tok": 2, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [], "moe_intermediate_size": 16, "partial_rotary_factor": 0.5, "full_attention_interval": 2,
    },
    "mamba": {
        "intermediate_size": 64, "state_size": 4, "conv_kernel": 3, "use_bias": False, "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "jamba": {
        "mamba_d_conv": 4, "mamba_d_state": 4, "mamba_expand": 2, "mamba_dt_rank": 4, "attn_layer_offset": 1,
        "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2,
        "num_experts_per_tok": 1,
    },
    "mamba2": {
        "num_heads": 4, "head_dim": 16, "state_size": 8, "conv_kernel": 3, "n_groups": 1, "use_bias": False,
        "use_conv_bias": True, "time_step_rank": "auto", "layer_norm_epsilon": 1e-5, "time_step_limit": [0.0, 100.0],
        "expand": 2, "chunk_size": 8, "residual_in_fp32": False, "rms_norm": True, "hidden_act": "silu",
    },
    "lfm2": {
        "num_hidden_layers": 3, "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 32,
        "block_ff_dim": 48, "block_multiple_of": 16, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
    },
}  # fmt: skip


# Layers that hand keys and values on to later ones.
SHARING: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8, "global_head_dim": 16, "sliding_window": 7,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "hunyuan": {
        "num_hidden_layers": 4, "use_cla": True, "cla_share_factor": 2, "attention_bias": False, "use_qk_norm": True,
        "moe_topk": 1, "num_experts": 1, "num_shared_expert": 0, "use_mixed_mlp_moe": False,
        "rope_scaling": {"alpha": 2.0, "factor": 1.0, "type": "dynamic"},
    },
    "afm7": {
        "hidden_dim": 32, "num_layers": 3, "num_kv_reuse_layers": 2, "num_heads": 4, "num_kv_heads": 2,
        "vocab_size": VOCABULARY,
    },
}  # fmt: skip


def build_architecture(name: str, seed: int = 0, **more: Any) -> nn.Module:
    """Build the model, with ``more`` arguments in place of the tiny ones.

    Those that its architecture does not know are left out as mlx_lm leaves them out.
    """
    module: Any = import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    arguments = module.ModelArgs.from_dict({"model_type": name, **COMMON, **(ARCHITECTURES | SHARING)[name], **more})
    build: Callable[[Any], nn.Module] = module.Model
    model = build(arguments)
    mx.eval(model.parameters())
    return model

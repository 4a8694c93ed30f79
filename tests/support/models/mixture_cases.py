"""Switches of classes with experts, each turned once."""

from __future__ import annotations

from typing import Any

import pytest

_MULTIPLIERS = {
    "attention_bias": True,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
_WHOLE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}

_SWITCHES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2_moe": {
        "no-bias": {"qkv_bias": False},
        "tied": {"tie_word_embeddings": True},
        "summing-to-one": {"norm_topk_prob": True},
        "a-dense-layer": {"mlp_only_layers": [0]},
        "every-other-layer": {"decoder_sparse_step": 2},
        "two-shared": {"shared_expert_intermediate_size": 104},
        "none-shared": {"shared_expert_intermediate_size": 0},
        "windows": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    },
    "olmoe": {
        "biased": {"attention_bias": True},
        "summing-to-one": {"norm_topk_prob": True, "num_key_value_heads": 6},
    },
    "flex_olmo": {
        "biased": {"attention_bias": True},
        "summing-to-one": {"norm_topk_prob": True, "tie_word_embeddings": True},
    },
    "granitemoe": {"multipliers": _MULTIPLIERS, "tied": {"tie_word_embeddings": True}},
    "dots1": {
        "biased": {"attention_bias": True},
        "summing-to-one": {"norm_topk_prob": True},
        "all-dense": {"first_k_dense_replace": 3},
        "all-sparse": {"first_k_dense_replace": 0, "n_group": 1},
        "two-shared": {"n_shared_experts": 2},
        "none-shared": {"n_shared_experts": 0},
        "windows": {"sliding_window": 8, "max_window_layers": 1},
    },
    "glm4_moe": {
        "biased": {"attention_bias": True},
        "no-norms": {"use_qk_norm": False},
        "whole-heads": {**_WHOLE, "partial_rotary_factor": 1.0},
        "as-scored": {"norm_topk_prob": False, "first_k_dense_replace": 2},
    },
    "solar_open": {"biased": {"attention_bias": True}, "as-scored": {"norm_topk_prob": False}},
    "exaone_moe": {
        "as-scored": {"norm_topk_prob": False, "num_shared_experts": 2},
        "all-nope": {"layer_types": ["full_attention"] * 3},
        "all-sliding": {"layer_types": ["sliding_attention"] * 3},
        "dense-at-the-end": {"mlp_layer_types": ["sparse", "sparse", "dense"]},
        "two-dense": {"first_k_dense_replace": 2},
    },
    "hy_v3": {
        "biased": {"attention_bias": True, "mlp_bias": True},
        "two-shared": {"num_shared_experts": 2},
        "dense-between": {"mlp_layer_types": ["sparse", "dense", "sparse"]},
    },
    "minimax_m2": {
        "whole-heads": _WHOLE,
        "multi-head": {"num_key_value_heads": 6, "head_dim": 24, "tie_word_embeddings": True},
    },
    "deepseek_v2": {
        "direct-queries": {"q_lora_rank": None},
        "biased": {"attention_bias": True, "mlp_bias": True},
        "groups": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
        "groups-that-it-ignores": {"n_group": 2, "topk_group": 1},
        "two-shared": {"n_shared_experts": 2},
        "none-shared": {"n_shared_experts": 0},
        "all-dense": {"first_k_dense_replace": 3},
    },
    "mellum": {
        "biased": {"attention_bias": True},
        "as-scored": {"norm_topk_prob": False, "tie_word_embeddings": True},
        "dense-between": {"mlp_layer_types": ["sparse", "dense", "sparse"]},
        "windows": {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8,
            "rope_parameters": dict.fromkeys(
                ("full_attention", "sliding_attention"), _WHOLE["rope_parameters"]
            ),
        },
    },
    "deepseek_v32": {
        "biased": {"attention_bias": True, "n_shared_experts": 2},
        "dense-between": {"mlp_layer_types": ["sparse", "dense", "sparse"]},
    },
    "glm_moe_dsa": {
        "biased": {"attention_bias": True, "tie_word_embeddings": True},
        "all-indexed": {"indexer_types": None},
        "a-pattern": {"indexer_types": None, "index_topk_pattern": "FSS"},
    },
    "afmoe": {
        "biased": {"attention_bias": True},
        "scaled-embedding": {"mup_enabled": True, "tie_word_embeddings": True},
        "all-sliding": {"layer_types": ["sliding_attention"] * 3},
        "all-sparse": {"num_dense_layers": 0, "num_shared_experts": 1},
    },
    "llama4_text": {
        "biased": {"attention_bias": True, "use_qk_norm": False},
        "all-turned": {"no_rope_layers": [1, 1, 1], "tie_word_embeddings": True},
        "no-temperature": {"attn_temperature_tuning": False},
        "all-sparse": {"interleave_moe_layer_step": 1, "num_experts_per_tok": 2},
        "listed": {"moe_layers": [0, 2]},
    },
    "phimoe": {
        "biased": {"attention_bias": True, "lm_head_bias": True},
        "tied": {"tie_word_embeddings": True, "sliding_window": 8},
        "longrope": {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "short_mscale": 1.1,
                "long_mscale": 1.2,
                "original_max_position_embeddings": 16,
            }
        },
    },
    "hunyuan_v1_moe": {
        "biased": {"attention_bias": True},
        "tied": {"tie_word_embeddings": True, "moe_topk": [2, 2, 2]},
        "alpha": {
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 1e4,
                "alpha": 1000.0,
                "factor": 1.0,
            }
        },
    },
    "glm4_moe_lite": {
        "direct-queries": {"q_lora_rank": None},
        "biased": {"attention_bias": True},
        "dense-between": {"mlp_layer_types": ["sparse", "dense", "sparse"]},
        "as-scored": {"norm_topk_prob": False, "n_shared_experts": 0},
    },
}

MIXTURE_CASES = [
    pytest.param(model_type, overrides, id=f"{model_type}-{name}")
    for model_type, cases in _SWITCHES.items()
    for name, overrides in cases.items()
]

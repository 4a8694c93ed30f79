"""Switches of classes with sizes per kind of layer, each turned once, and eleven or more layers."""

from __future__ import annotations

from typing import Any

import pytest

MANY: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "num_hidden_layers": 12,
        "layer_types": None,
        "num_kv_shared_layers": 4,
        "num_experts": 12,
        "enable_moe_block": True,
    },
    "mimo_v2_flash": {"num_hidden_layers": 13, "layer_types": None, "n_routed_experts": 12},
    "longcat_flash": {"num_hidden_layers": 22, "num_layers": 11, "n_routed_experts": 12},
    "laguna": {
        "num_hidden_layers": 11,
        "num_attention_heads_per_layer": [6, 4, 2, 6, 4, 2, 6, 4, 2, 6, 4],
        "layer_types": ["full_attention", *["sliding_attention"] * 10],
        "num_experts": 12,
    },
    "cohere2_moe": {"num_hidden_layers": 11, "num_experts": 12},
}
"""What more than ten layers and experts are in the words of each class."""

_SWITCHES: dict[str, dict[str, dict[str, Any]]] = {
    "gemma4_text": {
        "keys-are-values": {"attention_k_eq_v": True},
        "keys-are-values-of-as-many-heads": {
            "attention_k_eq_v": True,
            "num_global_key_value_heads": None,
        },
        "borrowed-keys": {"num_kv_shared_layers": 1},
        "borrowed-keys-wide-blocks": {"num_kv_shared_layers": 1, "use_double_wide_mlp": True},
        "experts": {"enable_moe_block": True, "tie_word_embeddings": False},
        "no-inputs-per-layer": {"hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0},
        "biased": {"attention_bias": True, "num_kv_shared_layers": 1, "attention_k_eq_v": True},
    },
    "mimo_v2_flash": {
        "biased": {"attention_bias": True, "tie_word_embeddings": True},
        "values-as-they-are": {"attention_value_scale": None},
        "all-full": {"layer_types": ["full_attention"] * 3},
        "dense-between": {"mlp_layer_types": ["sparse", "dense", "sparse"]},
        "as-scored": {"norm_topk_prob": False},
    },
    "longcat_flash": {
        "biased": {"attention_bias": True, "tie_word_embeddings": True},
        "no-idle-experts": {"zero_expert_num": 0},
        "yarn": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 16,
            }
        },
    },
    "laguna": {
        "a-gate-per-channel": {"gating": "per-element"},
        "as-many-heads": {"num_attention_heads_per_layer": None, "attention_bias": True},
        "router-within-bounds": {"moe_router_logit_softcapping": 3.0},
        "all-sparse": {"mlp_layer_types": ["sparse"] * 3, "tie_word_embeddings": True},
        "all-full": {"layer_types": ["full_attention"] * 3},
    },
    "cohere2_moe": {
        "sums": {"shared_expert_combination_strategy": "sum", "attention_bias": True},
        "sigmoid": {"expert_selection_fn": "sigmoid"},
        "sigmoid-as-scored": {"expert_selection_fn": "sigmoid", "norm_topk_prob": False},
        "none-shared": {"num_shared_experts": 0, "tie_word_embeddings": True},
        "rms-norm": {"rms_norm_eps": 1e-6},
        "still-dense-layers": {"prefix_dense_sliding_window_pattern": 2},
        "another-scale": {"logit_scale": 0.5, "prefix_dense_intermediate_size": None},
    },
}

BY_KIND_CASES = [
    pytest.param(model_type, overrides, id=f"{model_type}-{name}")
    for model_type, cases in _SWITCHES.items()
    for name, overrides in cases.items()
]

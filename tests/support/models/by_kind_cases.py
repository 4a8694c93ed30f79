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
}

BY_KIND_CASES = [
    pytest.param(model_type, overrides, id=f"{model_type}-{name}")
    for model_type, cases in _SWITCHES.items()
    for name, overrides in cases.items()
]

"""Tiny models whose layers keep a state, and every switch of their configs turned once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

_SIZES: Mapping[str, object] = {
    "vocab_size": 131,
    "hidden_size": 96,
    "intermediate_size": 152,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NEMOTRON = {
    **{name: size for name, size in _SIZES.items() if name != "num_hidden_layers"},
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "head_dim": 24,
    "mamba_num_heads": 6,
    "mamba_head_dim": 10,
    "n_groups": 2,
    "ssm_state_size": 14,
    "conv_kernel": 3,
    "chunk_size": 8,
    "n_routed_experts": 6,
    "moe_intermediate_size": 52,
    "moe_shared_expert_intermediate_size": 44,
    "routed_scaling_factor": 1.5,
}
_MAMBA: Mapping[str, object] = {
    "mamba_n_heads": 6,
    "mamba_d_head": 32,
    "mamba_n_groups": 2,
    "mamba_d_state": 14,
    "mamba_d_conv": 3,
    "mamba_chunk_size": 8,
}
_GRANITE = {
    **_SIZES,
    **_MAMBA,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_local_experts": 5,
    "shared_intermediate_size": 44,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}

STATE_SPACES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "nemotron_h": ("NemotronHForCausalLM", _NEMOTRON),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", _GRANITE),
}
"""``model_type`` -> class, fields of its config."""

LONG: Mapping[str, dict[str, Any]] = {
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention"] * 3,
        "n_routed_experts": 12,
        "moe_latent_size": 36,
    },
    "granitemoehybrid": {
        "num_hidden_layers": 11,
        "layer_types": [*["linear_attention"] * 5, "full_attention", *["linear_attention"] * 5],
        "num_local_experts": 12,
    },
}
"""More than ten layers, and experts where a model has them: as text, 10 comes before 2."""

_SWITCHES: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "nemotron_h": {
        "biased": {"use_bias": True, "mlp_bias": True},
        "no-convolution-bias": {"use_conv_bias": False},
        "narrow-experts": {"moe_latent_size": 36},
        "narrow-experts-biased": {"moe_latent_size": 36, "mlp_bias": True},
        "groups-of-experts": {"n_group": 2, "topk_group": 1, "norm_topk_prob": False},
        "no-experts": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
        "all-states": {"layers_block_type": ["linear_attention"] * 3, "use_cache": False},
        "no-states": {"layers_block_type": ["full_attention", "moe", "full_attention", "mlp"]},
        "one-group": {"n_groups": 1, "mlp_hidden_act": "silu"},
    },
    "granitemoehybrid": {
        "biased": {"mamba_proj_bias": True, "attention_bias": True},
        "no-convolution-bias": {"mamba_conv_bias": False},
        "dense": {"num_local_experts": 0},
        "turned": {"position_embedding_type": "rope"},
        "tied": {"tie_word_embeddings": True},
        "all-attention": {"layer_types": ["full_attention"] * 4},
        "all-states": {"layer_types": None, "use_cache": False},
        "sizes-that-follow": {"mamba_d_head": "auto", "mamba_n_groups": 1},
    },
}

STATE_SPACE_CASES = [
    *(pytest.param(name, {}, id=name) for name in STATE_SPACES),
    *(
        pytest.param(name, overrides, id=f"{name}-{case}")
        for name, cases in _SWITCHES.items()
        for case, overrides in cases.items()
    ),
]


def as_first_published(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in the words of the first files of its class."""
    fields = dict(config)
    if "time_step_limit" in fields:
        fields["time_step_limit"] = [0.0, float("inf")]  # JSON has no such number; Python reads it
    if fields["model_type"] == "nemotron_h":
        letters = {"linear_attention": "M", "moe": "E", "full_attention": "*", "mlp": "-"}
        kinds = fields.pop("layers_block_type")
        fields["hybrid_override_pattern"] = "".join(letters[kind] for kind in kinds)
        fields["num_hidden_layers"] = len(kinds)
        fields |= {"rope_theta": 10_000, "sliding_window": None, "mamba_proj_bias": False}
    if fields["model_type"] == "granitemoehybrid":
        old = {"linear_attention": "mamba", "full_attention": "attention"}
        fields["layer_types"] = [old[kind] for kind in fields["layer_types"]]
        fields |= {"position_embedding_type": "nope", "mamba_d_head": "auto", "init_method": "mup"}
        fields |= {"normalization_function": "rmsnorm", "rope_theta": 10_000}
    return fields

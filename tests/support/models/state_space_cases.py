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

STATE_SPACES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "nemotron_h": ("NemotronHForCausalLM", _NEMOTRON),
}
"""``model_type`` -> class, fields of its config."""

LONG: Mapping[str, dict[str, Any]] = {
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention"] * 3,
        "n_routed_experts": 12,
        "moe_latent_size": 36,
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
    return fields

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
_LFM2 = {
    **_SIZES,
    "layer_types": ["conv", "full_attention"] * 2,
    "conv_L_cache": 3,
}
_LFM2_MOE = {
    **_LFM2,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 52,
    "num_dense_layers": 1,
    "routed_scaling_factor": 1.5,
}
_FALCON = {
    **_SIZES,
    **_MAMBA,
    "head_dim": 24,
    "mamba_d_head": 10,
    "mamba_d_ssm": 60,
    "lm_head_multiplier": 0.5,
    "embedding_multiplier": 2.0,
    "mlp_multipliers": [0.5, 1.5],
    "key_multiplier": 0.5,
    "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9],
}
_MAMBA2 = {
    "vocab_size": 131,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_heads": 6,
    "head_dim": 32,
    "n_groups": 2,
    "state_size": 14,
    "conv_kernel": 3,
    "chunk_size": 8,
    "pad_token_id": None,
    "use_cache": False,
}
_JAMBA = {
    **_SIZES,
    "num_experts": 5,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 3,
    "expert_layer_offset": 2,
    "mamba_d_state": 14,
    "mamba_d_conv": 3,
    "mamba_dt_rank": 7,
}
_BAMBA = {**_SIZES, **_MAMBA, "attn_layer_indices": [1, 3]}
_KIMI = {
    **_SIZES,
    "num_key_value_heads": 6,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 14,
    "moe_intermediate_size": 52,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "linear_head_dim": 10,
    "linear_num_heads": 4,
    "linear_conv_kernel_dim": 3,
}

STATE_SPACES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "nemotron_h": ("NemotronHForCausalLM", _NEMOTRON),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", _GRANITE),
    "lfm2": ("Lfm2ForCausalLM", _LFM2),
    "lfm2_moe": ("Lfm2MoeForCausalLM", _LFM2_MOE),
    "falcon_h1": ("FalconH1ForCausalLM", _FALCON),
    "mamba2": ("Mamba2ForCausalLM", _MAMBA2),
    "jamba": ("JambaForCausalLM", _JAMBA),
    "bamba": ("BambaForCausalLM", _BAMBA),
    "kimi_linear": ("KimiLinearForCausalLM", _KIMI),
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
    "lfm2": {"num_hidden_layers": 11, "layer_types": None, "full_attn_idxs": [2, 5, 8, 10]},
    "lfm2_moe": {
        "num_hidden_layers": 11,
        "layer_types": [*["conv", "conv", "full_attention"] * 3, "conv", "conv"],
        "num_experts": 12,
    },
    "falcon_h1": {"num_hidden_layers": 11},
    "mamba2": {"num_hidden_layers": 11},
    "jamba": {"num_hidden_layers": 11, "num_experts": 12, "attn_layer_period": 4},
    "bamba": {"num_hidden_layers": 11, "attn_layer_indices": [3, 9, 10]},
    "kimi_linear": {"num_hidden_layers": 11, "layer_types": None, "num_local_experts": 12},
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
    "lfm2": {
        "biased": {"conv_bias": True},
        "untied": {"tie_word_embeddings": False},
        "width-as-stated": {"block_auto_adjust_ff_dim": False},
        "width-by-a-factor": {"block_ffn_dim_multiplier": 1.3, "block_multiple_of": 8},
        "all-attention": {"layer_types": None},
        "all-convolution": {"layer_types": ["conv"] * 4, "use_cache": False},
    },
    "lfm2_moe": {
        "biased": {"conv_bias": True, "tie_word_embeddings": False},
        "as-scored": {"norm_topk_prob": False, "use_expert_bias": False},
        "all-dense": {"num_dense_layers": 4},
        "all-sparse": {"num_dense_layers": 0},
    },
    "falcon_h1": {
        "biased": {"mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True},
        "biased-out": {"projectors_bias": True},
        "no-convolution-bias": {"mamba_conv_bias": False},
        "normed": {"mamba_rms_norm": True},
        "normed-behind-the-gate": {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
        "tied": {"tie_word_embeddings": True},
        "sizes-that-follow": {"mamba_d_head": "auto", "mamba_d_ssm": None},
    },
    "mamba2": {
        "biased": {"use_bias": True},
        "no-convolution-bias": {"use_conv_bias": False},
        "tied": {"tie_word_embeddings": True},
        "one-group": {"n_groups": 1, "expand": 1, "head_dim": 16},
    },
    "jamba": {
        "biased": {"mamba_proj_bias": True},
        "no-convolution-bias": {"mamba_conv_bias": False},
        "tied": {"tie_word_embeddings": True},
        "no-experts": {"num_experts": 1},
        "rank-that-follows": {"mamba_dt_rank": "auto"},
        "attention-first": {"attn_layer_offset": 0, "expert_layer_offset": 0},
    },
    "kimi_linear": {
        "biased": {"attention_bias": True},
        "groups-of-experts": {"n_group": 2, "topk_group": 1, "norm_topk_prob": False},
        "two-shared": {"n_shared_experts": 2},
        "sparse-between": {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
    },
    "bamba": {
        "biased": {"mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True},
        "no-convolution-bias": {"mamba_conv_bias": False},
        "tied": {"tie_word_embeddings": True},
        "all-states": {"attn_layer_indices": [], "use_cache": False},
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
    if fields["model_type"] in {"lfm2", "lfm2_moe"}:
        fields["tie_embedding"] = fields.pop("tie_word_embeddings")
        fields |= {"conv_dim": 96, "conv_dim_out": 96, "conv_use_xavier_init": True}
        fields |= {"theta": 1e6, "use_pos_enc": True, "num_heads": 6}
    if fields["model_type"] == "lfm2":
        fields["block_ff_dim"] = fields.pop("intermediate_size")
        fields |= {"intermediate_size": 1, "block_norm_eps": 1e-5, "block_use_swiglu": True}
        fields |= {"block_dim": 96, "block_mlp_init_scale": 1.0, "block_out_init_scale": 1.0}
    if fields["model_type"] == "kimi_linear":
        kinds = fields.pop("layer_types")
        full = [n + 1 for n, kind in enumerate(kinds) if kind == "full_attention"]
        fields["linear_attn_config"] = {
            "full_attn_layers": full,
            "kda_layers": [n + 1 for n in range(len(kinds)) if n + 1 not in full],
            "head_dim": fields.pop("linear_head_dim"),
            "num_heads": fields.pop("linear_num_heads"),
            "short_conv_kernel_size": fields.pop("linear_conv_kernel_dim"),
        }
        fields["first_k_dense_replace"] = fields.pop("mlp_layer_types").count("dense")
        fields |= {"head_dim": 72, "mla_use_nope": True, "use_grouped_topk": True}
        fields |= {"moe_router_activation_func": "sigmoid", "moe_layer_freq": 1}
        fields |= {"num_nextn_predict_layers": 0, "rope_theta": 1e4, "rope_scaling": None}
    if fields["model_type"] in {"bamba", "jamba", "falcon_h1"}:
        rope = fields.pop("rope_parameters", {"rope_theta": 10_000})
        fields |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
        fields |= {"use_mamba_kernels": True, "num_logits_to_keep": 1}
    return fields

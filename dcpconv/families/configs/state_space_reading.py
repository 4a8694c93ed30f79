"""What classes with layers that keep a state say in their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dcpconv.families.configs.hf_fields import HfConfig

_MAMBA = frozenset(
    {
        *("mamba_d_head", "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_conv"),
        *("mamba_expand", "mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias"),
        *("time_step_limit", "num_logits_to_keep", "use_mamba_kernels"),
    }
)
"""Fields that say nothing about a model without layers that keep a state."""

_CONVOLUTION = frozenset(
    {
        *("conv_L_cache", "conv_bias", "conv_dim", "conv_dim_out", "conv_use_xavier_init"),
        *("full_attn_idxs", "use_expert_bias", "block_ff_dim", "block_multiple_of", "block_dim"),
        *("block_ffn_dim_multiplier", "block_auto_adjust_ff_dim", "block_use_swiglu"),
        *("block_mlp_init_scale", "block_norm_eps", "block_out_init_scale"),
        *("block_use_xavier_init", "tie_embedding", "num_heads", "theta"),
    }
)

_OWN: Mapping[str, frozenset[str]] = {
    "granitemoehybrid": _MAMBA | {"position_embedding_type"},
    "bamba": _MAMBA | {"attn_layer_indices", "z_loss_coefficient"},
    "falcon_h1": _MAMBA
    | {
        *("mamba_d_ssm", "mamba_norm_before_gate", "mamba_rms_norm", "mamba_use_mlp"),
        *("projectors_bias", "lm_head_multiplier", "mlp_multipliers", "key_multiplier"),
        *("attention_in_multiplier", "attention_out_multiplier", "ssm_multipliers"),
        *("ssm_in_multiplier", "ssm_out_multiplier"),
    },
    "jamba": _MAMBA
    | {
        *("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset"),
        *("mamba_dt_rank", "use_mambapy", "use_associative_scan"),
    },
    "kimi_linear": frozenset(
        {
            *("model_max_length", "num_experts_per_token", "num_shared_experts", "moe_renormalize"),
            *("num_expert_group", "linear_attn_config", "linear_head_dim", "linear_num_heads"),
            *("linear_conv_kernel_dim", "mlp_layer_types", "first_k_dense_replace", "head_dim"),
        }
    ),
    "lfm2": _CONVOLUTION,
    "lfm2_moe": _CONVOLUTION,
    "mamba2": frozenset(
        {
            *("num_heads", "state_size", "n_groups", "expand", "conv_kernel", "use_conv_bias"),
            *("use_bias", "chunk_size", "residual_in_fp32", "rescale_prenorm_residual"),
            *("time_step_rank", "time_step_limit", "time_step_min", "time_step_max"),
            "time_step_floor",
        }
    ),
    "nemotron_h": frozenset(
        {
            *("layers_block_type", "hybrid_override_pattern", "mtp_layers_block_type"),
            *("mtp_hybrid_override_pattern", "mlp_hidden_act", "mamba_hidden_act", "use_conv_bias"),
            *("time_step_min", "time_step_max", "time_step_limit", "time_step_floor", "expand"),
            *("time_step_rank", "chunk_size", "mamba_proj_bias", "mamba_ssm_cache_dtype"),
            *("moe_shared_expert_intermediate_size", "moe_shared_expert_overlap", "use_bias"),
            *("residual_in_fp32", "rescale_prenorm_residual", "use_mamba_kernels"),
            *("n_routed_experts", "num_logits_to_keep", "mamba_rms_norm"),
        }
    ),
}
"""Fields that a class has besides those that its table looks at."""


_FEATURES: Mapping[str, frozenset[str]] = {
    "state_space": frozenset({"linear_attention", "hybrid"}),
    "short_convolution": frozenset({"conv"}),
}
"""Feature -> words for layers that have it; no class has both."""


def own_values(config: HfConfig, file: Path) -> Mapping[str, object]:
    """``ModelSpec`` fields that a class states in a way of its own.

    Args:
        config: What every class says.
        file: For errors.
    """
    del file
    values: dict[str, object] = {}
    kinds = config.layer_types or []
    for name, words in _FEATURES.items():
        count = sum(kind in words for kind in kinds)
        if count:
            values["special"] = {name: f"in {count} of {config.num_hidden_layers} layers"}
    if (
        config.model_type == "granitemoehybrid"
        and _extra(config, "position_embedding_type") != "rope"
    ):
        values["positions"] = "none"
    return values


def _extra(config: HfConfig, name: str) -> object:
    return (config.model_extra or {}).get(name)


def own_names(config: HfConfig) -> frozenset[str]:
    """Fields that are looked at, which other classes do not have; the tables look at others."""
    return _OWN[config.model_type]


def layer_words(config: HfConfig, file: Path) -> list[str] | None:
    """One word per layer, where the class has a window and makes them up: none has."""
    del config, file
    return None

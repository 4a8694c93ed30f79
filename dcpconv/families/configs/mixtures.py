"""Classes of transformers with experts beside those in ``model_types``, by ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dcpconv.families.configs.mixtures_apart import APART
from dcpconv.families.configs.model_type import (
    ANY,
    BIASES,
    EXPERTS,
    LATENT,
    LLAMA,
    QK_NORM,
    SIGMOID,
    WINDOWS,
    ModelType,
    Routing,
)

_MLP_BIAS = frozenset({"mlp_bias"})
_LATENTS = LATENT | {"latent_bias", "o_bias"}
_WHOLE_NORMS = frozenset({"qk_norm_whole"})
_POST_NORMS = frozenset({"no_pre_norms", "post_norms"})
_MULTIPLIERS = frozenset(
    ("query_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
)
_ROUTED: dict[str, object] = {
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
}


def _mellum(fields: Mapping[str, object]) -> Mapping[str, object]:
    """The words of layers, and RoPE for those words alone.

    Source: ``MellumConfig.__post_init__`` of transformers 5.23.0.
    """
    count, ropes = fields.get("num_hidden_layers"), fields.get("rope_parameters")
    words = fields.get("layer_types")
    if words is None and isinstance(count, int) and count <= 100_000:
        words = ["full_attention"] * count
    if not isinstance(words, list) or not isinstance(ropes, Mapping):
        return fields
    kept = {word: rope for word, rope in ropes.items() if word in words}
    return {**fields, "layer_types": words, "rope_parameters": kept or ropes}


MIXTURES: Mapping[str, ModelType] = {
    **APART,
    "qwen2_moe": ModelType(
        "Qwen2MoeForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32_768,
            "rope_theta": 10_000.0,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "qkv_bias": True,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        routing=Routing(shared="any", shared_gate=True, dense="any"),
        expresses=ANY | WINDOWS | EXPERTS | {"qkv_bias"},
        requires=EXPERTS,
    ),
    "olmoe": ModelType(
        "OlmoeForCausalLM",
        {
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "rope_theta": 10_000.0,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "eos_token_id": 50_279,
            "pad_token_id": 1,
        },
        {"qk_norm_whole": True},
        routing=Routing(),
        expresses=ANY | BIASES | EXPERTS | _WHOLE_NORMS,
        requires=EXPERTS | _WHOLE_NORMS,
    ),
    "flex_olmo": ModelType(
        "FlexOlmoForCausalLM",
        {
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "rope_theta": 500_000.0,
            "num_experts": 7,
            "num_experts_per_tok": 5,
            "eos_token_id": 100_257,
            "pad_token_id": 100_277,
        },
        {"pre_norms": False, "post_norms": True, "qk_norm_whole": True},
        routing=Routing(),
        expresses=ANY | BIASES | EXPERTS | _WHOLE_NORMS | _POST_NORMS,
        requires=EXPERTS | _WHOLE_NORMS | _POST_NORMS,
    ),
    "granitemoe": ModelType(
        "GraniteMoeForCausalLM",
        LLAMA | {"attention_multiplier": 1.0, "num_local_experts": 8, "num_experts_per_tok": 2},
        routing=Routing(norm_topk=True),
        expresses=ANY | BIASES | EXPERTS | _MULTIPLIERS,
        requires=EXPERTS,
    ),
    "mellum": ModelType(
        "MellumForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131_072,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
            "sliding_window": 1024,
            "moe_intermediate_size": 896,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        {"qk_norm": True},
        routing=Routing(dense="any"),
        expresses=ANY | BIASES | WINDOWS | QK_NORM | EXPERTS,
        requires=QK_NORM | EXPERTS,
        completes=_mellum,
    ),
    "dots1": ModelType(
        "Dots1ForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
            "rope_theta": 10_000.0,
            "sliding_window": 4096,
            "max_window_layers": 62,
            "n_group": 1,
            "topk_group": 1,
        },
        {"qk_norm": True},
        routing=SIGMOID,
        expresses=ANY | BIASES | WINDOWS | QK_NORM | EXPERTS,
        requires=QK_NORM | EXPERTS,
        allows={"scoring_func": ("sigmoid", "noaux_tc")},
    ),
    "glm4_moe": ModelType(
        "Glm4MoeForCausalLM",
        {
            **_ROUTED,
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "moe_intermediate_size": 1408,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
            "first_k_dense_replace": 1,
        },
        routing=SIGMOID,
        expresses=ANY | QK_NORM | EXPERTS | {"qkv_bias", "partial_rotary"},
        requires=EXPERTS,
    ),
    "solar_open": ModelType(
        "SolarOpenForCausalLM",
        {
            **_ROUTED,
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "moe_intermediate_size": 1280,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
        },
        routing=replace(SIGMOID, dense="none"),
        expresses=ANY | EXPERTS | {"qkv_bias"},
        requires=EXPERTS,
        assumes={"first_k_dense_replace": 0},
    ),
    "exaone_moe": ModelType(
        "ExaoneMoeForCausalLM",
        {
            **_ROUTED,
            "tie_word_embeddings": False,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "rope_theta": 10_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "moe_intermediate_size": 1024,
            "num_experts": 64,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "bos_token_id": 1,
            "eos_token_id": 53,
            "pad_token_id": 0,
        },
        {"qk_norm": True},
        routing=replace(SIGMOID, dense="any"),
        expresses=ANY | WINDOWS | QK_NORM | EXPERTS | {"no_rope_layers"},
        requires=QK_NORM | EXPERTS,
    ),
    "hy_v3": ModelType(
        "HYV3ForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "rope_theta": 11_158_840.0,
            "moe_intermediate_size": 1536,
            "num_experts": 192,
            "num_experts_per_tok": 8,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "router_scaling_factor": 2.826,
        },
        {"qk_norm": True},
        routing=replace(SIGMOID, norm_topk=True, groups=False, dense="any"),
        expresses=ANY | BIASES | _MLP_BIAS | QK_NORM | EXPERTS,
        requires=QK_NORM | EXPERTS,
        assumes={"first_k_dense_replace": 1, "n_group": None},
    ),
    "minimax_m2": ModelType(
        "MiniMaxM2ForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 196_608,
            "rope_theta": 5_000_000.0,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "bos_token_id": 200_034,
            "eos_token_id": 200_020,
        },
        {"qk_norm_whole": True},
        routing=Routing("sigmoid", selection_bias=True, norm_topk=True),
        expresses=ANY | EXPERTS | _WHOLE_NORMS | {"partial_rotary"},
        requires=EXPERTS | _WHOLE_NORMS,
        allows={
            "use_qk_norm": (True,),
            "qk_norm_type": ("per_layer",),
            "use_routing_bias": (True,),
            "use_mtp": (False, True),
            "num_mtp_modules": (0, 1, 2, 3),
            "mtp_transformer_layers": (0, 1),
            "shared_moe_mode": ("sigmoid",),
            "layernorm_full_attention_beta": (1.0,),
            "layernorm_linear_attention_beta": (1.0,),
            "layernorm_mlp_beta": (1.0,),
        },
        assumes={"shared_expert_intermediate_size": None},
    ),
    "deepseek_v2": ModelType(
        "DeepseekV2ForCausalLM",
        {
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
            "rope_theta": 10_000.0,
            "moe_intermediate_size": 1407,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "topk_method": "greedy",
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        routing=Routing(norm_topk=False, groups=True, scaled=True, shared="whole", dense="first"),
        expresses=ANY | EXPERTS | _LATENTS | _MLP_BIAS,
        requires=EXPERTS | LATENT,
        allows={"scoring_func": ("softmax",)},
        assumes={"norm_topk_prob": False},
    ),
    "glm4_moe_lite": ModelType(
        "Glm4MoeLiteForCausalLM",
        {
            **_ROUTED,
            "tie_word_embeddings": False,
            "num_key_value_heads": 20,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 202_752,
            "rope_theta": 10_000.0,
            "moe_intermediate_size": 1536,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "n_routed_experts": 64,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.8,
            "q_lora_rank": 768,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        routing=replace(SIGMOID, dense="any"),
        expresses=ANY | EXPERTS | _LATENTS,
        requires=EXPERTS | LATENT,
        assumes={"first_k_dense_replace": 1},
    ),
}
"""Source: ``configuration_*.py`` and ``modeling_*.py`` of transformers 5.23.0."""

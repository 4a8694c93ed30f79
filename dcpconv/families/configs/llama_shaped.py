"""Classes of transformers that are a Llama but for a few things, by ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping

from dcpconv.families.configs.model_type import ANY, BIASES, GEMMA, GLM, LLAMA, WINDOWS, ModelType

_MLP_BIAS = frozenset({"mlp_bias"})
_NOPE = frozenset({"no_rope_layers"})
_GEMMA_PARTS = frozenset({"norm", "embedding_multiplier"})
_COHERE_PARTS = frozenset({"norm", "parallel_residual"})

LLAMA_SHAPED: Mapping[str, ModelType] = {
    "smollm3": ModelType(
        "SmolLM3ForCausalLM",
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32_768,
            "rope_theta": 2_000_000.0,
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
            "pad_token_id": 128_004,
        },
        expresses=ANY | BIASES | _MLP_BIAS | WINDOWS | _NOPE,
    ),
    "ernie4_5": ModelType(
        "Ernie4_5ForCausalLM",
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "rope_theta": 500_000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        expresses=ANY | BIASES | _MLP_BIAS,
    ),
    "helium": ModelType(
        "HeliumForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 20,
            "head_dim": 128,
            "rms_norm_eps": 1e-8,
            "max_position_embeddings": 4096,
            "rope_theta": 100_000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
        },
        expresses=ANY | _MLP_BIAS | {"qkv_bias"},
    ),
    "internlm3": ModelType(
        "LlamaForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32_768,
            "rope_theta": 10_000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        },
        expresses=ANY | BIASES | _MLP_BIAS,
    ),
    "seed_oss": ModelType(
        "SeedOssForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 524_288,
            "rope_theta": 10_000.0,
            "attention_bias": True,
            "attention_out_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        expresses=ANY | BIASES | _MLP_BIAS,
    ),
    "cwm": ModelType(
        "CwmForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1_000_000.0,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "sliding_window": 8192,
            "bos_token_id": 128_000,
            "eos_token_id": [128_001, 128_008, 128_009],
        },
        expresses=ANY | _MLP_BIAS | WINDOWS,
    ),
    "ministral3": ModelType(
        "Ministral3ForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 262_144,
            "rope_theta": 1_000_000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1_000_000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16_384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 11,
        },
        expresses=ANY | {"sliding_window"},
    ),
    "arcee": ModelType(
        "ArceeForCausalLM",
        {
            "tie_word_embeddings": False,
            "hidden_act": "relu2",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "rope_theta": 10_000.0,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
        },
        {"gated": False},
        expresses=ANY | BIASES | _MLP_BIAS | {"ungated"},
        requires=frozenset({"ungated"}),
    ),
    "exaone4": ModelType(
        "Exaone4ForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "rope_theta": 10_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        {"pre_norms": False, "post_norms": True, "qk_norm": True},
        expresses=ANY | WINDOWS | _NOPE | {"qk_norm", "no_pre_norms", "post_norms"},
        requires=frozenset({"qk_norm", "no_pre_norms", "post_norms"}),
    ),
    "glm4": ModelType(
        "Glm4ForCausalLM",
        GLM,
        {"post_norms": True},
        expresses=ANY | {"partial_rotary", "qkv_bias", "post_norms"},
        requires=frozenset({"post_norms"}),
    ),
    "granite": ModelType(
        "GraniteForCausalLM",
        LLAMA | {"attention_multiplier": 1.0},
        expresses=ANY
        | BIASES
        | _MLP_BIAS
        | {
            "query_multiplier",
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
        },
    ),
    "cohere": ModelType(
        "CohereForCausalLM",
        {
            "tie_word_embeddings": True,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "rope_theta": 500_000.0,
            "logit_scale": 0.0625,
            "bos_token_id": 5,
            "eos_token_id": 255_001,
            "pad_token_id": 0,
        },
        {"norm": "layernorm", "parallel_residual": True},
        expresses=ANY | BIASES | _COHERE_PARTS | {"logits_scaling", "qk_norm_heads"},
        requires=_COHERE_PARTS,
    ),
    "gemma": ModelType(
        "GemmaForCausalLM",
        GEMMA | {"num_key_value_heads": 16},
        {"norm": "rmsnorm_plus_one"},
        expresses=ANY | BIASES | _GEMMA_PARTS,
        requires=_GEMMA_PARTS,
    ),
}
"""Source: ``configuration_*.py`` and ``modeling_*.py`` of transformers 5.23.0; the configs of
``internlm3`` make models of ``LlamaForCausalLM`` there."""

"""What transformers' classes fill in where config.json is silent, by ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelType:
    """One class of transformers.

    Attributes:
        class_name: What ``architectures`` lists.
        defaults: Value of each config.json field that is left out.  Sizes are never left out:
            transformers writes every field that only the class knows.
        implied: ``ModelSpec`` fields that the class's code fixes and no file states.
        experts: ``Experts`` fields that the class's code fixes and no file states.
        expresses: Features that the class can hold, by name, or ``None`` where we write no
            config.json for it.
        requires: Features that a model of the class always has.
    """

    class_name: str
    defaults: Mapping[str, object]
    implied: Mapping[str, object] = field(default_factory=dict)
    experts: Mapping[str, object] = field(default_factory=dict)
    expresses: frozenset[str] | None = None
    requires: frozenset[str] = frozenset()


_ANY = frozenset({"rope_scaling", "activation"})
_BIASES = frozenset({"qkv_bias", "o_bias"})
_WINDOWS = frozenset({"sliding_window", "layer_types"})
_EXPERTS = frozenset({"experts"})
_QK_NORM = frozenset({"qk_norm"})

_LLAMA: dict[str, object] = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MISTRAL: dict[str, object] = _LLAMA | {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
_QWEN: dict[str, object] = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "rope_theta": 10_000.0,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
_GEMMA: dict[str, object] = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "rope_theta": 10_000.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

MODEL_TYPES: Mapping[str, ModelType] = {
    "llama": ModelType("LlamaForCausalLM", _LLAMA, expresses=_ANY | _BIASES | {"mlp_bias"}),
    "mistral": ModelType("MistralForCausalLM", _MISTRAL, expresses=_ANY | {"sliding_window"}),
    "mixtral": ModelType(
        "MixtralForCausalLM",
        _MISTRAL
        | {
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        expresses=_ANY | _EXPERTS | {"sliding_window"},
        requires=_EXPERTS,
    ),
    "qwen2": ModelType(
        "Qwen2ForCausalLM",
        _QWEN | {"num_key_value_heads": 32, "max_window_layers": 28},
        {"qkv_bias": True},
        expresses=_ANY | _WINDOWS | {"qkv_bias"},
        requires=frozenset({"qkv_bias"}),
    ),
    "qwen2_moe": ModelType(
        "Qwen2MoeForCausalLM",
        _QWEN
        | {
            "num_key_value_heads": 16,
            "max_window_layers": 28,
            "qkv_bias": True,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "qwen3": ModelType(
        "Qwen3ForCausalLM",
        _QWEN | {"num_key_value_heads": 32, "head_dim": 128, "max_window_layers": 28},
        {"qk_norm": True},
        expresses=_ANY | _BIASES | _WINDOWS | _QK_NORM,
        requires=_QK_NORM,
    ),
    "qwen3_moe": ModelType(
        "Qwen3MoeForCausalLM",
        _QWEN
        | {
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        {"qk_norm": True},
        expresses=_ANY | _BIASES | _QK_NORM | _EXPERTS | {"sliding_window"},
        requires=_QK_NORM | _EXPERTS,
    ),
    "phi3": ModelType(
        "Phi3ForCausalLM",
        {
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "rope_theta": 10_000.0,
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 32_000,
            "pad_token_id": 32_000,
        },
        expresses=_ANY | {"partial_rotary", "sliding_window"},
    ),
    "gemma": ModelType(
        "GemmaForCausalLM",
        _GEMMA | {"num_key_value_heads": 16},
        {"norm": "rmsnorm_plus_one"},
    ),
    "gemma2": ModelType(
        "Gemma2ForCausalLM",
        _GEMMA
        | {
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        {"norm": "rmsnorm_plus_one", "post_norms": True},
        expresses=_ANY
        | _BIASES
        | _WINDOWS
        | {
            "norm",
            "post_norms",
            "attn_softcap",
            "final_softcap",
            "query_multiplier",
            "embedding_multiplier",
        },
        requires=frozenset({"norm", "post_norms", "embedding_multiplier"}),
    ),
    "olmo2": ModelType(
        "Olmo2ForCausalLM",
        {
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "rope_theta": 10_000.0,
            "eos_token_id": 50_279,
            "pad_token_id": 1,
        },
        {"pre_norms": False, "post_norms": True, "qk_norm_whole": True},
        expresses=_ANY | _BIASES | {"no_pre_norms", "post_norms", "qk_norm_whole"},
        requires=frozenset({"no_pre_norms", "post_norms", "qk_norm_whole"}),
    ),
    "glm": ModelType(
        "GlmForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1.5625e-07,
            "max_position_embeddings": 131_072,
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
            "eos_token_id": [151_329, 151_336, 151_338],
            "pad_token_id": 151_329,
        },
        expresses=_ANY | {"partial_rotary", "qkv_bias"},
    ),
    "granite": ModelType(
        "GraniteForCausalLM",
        _LLAMA | {"attention_multiplier": 1.0},
    ),
    "granitemoeshared": ModelType(
        "GraniteMoeSharedForCausalLM",
        _LLAMA
        | {
            "attention_multiplier": 1.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 0,
        },
        experts={"norm_topk": True},
        expresses=_ANY
        | _BIASES
        | _EXPERTS
        | {
            "query_multiplier",
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
        },
        requires=_EXPERTS,
    ),
    "ernie4_5_moe": ModelType(
        "Ernie4_5_MoeForCausalLM",
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "rope_theta": 500_000.0,
            "moe_intermediate_size": 1536,
            "moe_k": 6,
            "moe_num_experts": 64,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        experts={"norm_topk": True, "selection_bias": True},
        expresses=_ANY | _BIASES | _EXPERTS | {"mlp_bias", "head_bias"},
        requires=_EXPERTS,
    ),
    "deepseek_v3": ModelType(
        "DeepseekV3ForCausalLM",
        {
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096,
            "rope_theta": 10_000.0,
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "first_k_dense_replace": 3,
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        experts={"scoring": "sigmoid", "selection_bias": True},
        expresses=_ANY | _EXPERTS | {"latent_attention", "latent_bias", "o_bias"},
        requires=_EXPERTS | {"latent_attention"},
    ),
}
"""Source: ``configuration_*.py`` of transformers 5.23.0; a test asks the classes themselves."""

SAME_KEYS: Mapping[str, str] = {"mistral": "llama"}
"""Classes whose tensors are named as another class names them, so that one table serves both."""

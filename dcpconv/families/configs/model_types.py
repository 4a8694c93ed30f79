"""What transformers' classes fill in where config.json is silent, by ``model_type``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from dcpconv.families.configs.model_type import (
    ANY,
    BIASES,
    EXPERTS,
    GEMMA,
    GLM,
    LLAMA,
    QK_NORM,
    SIGMOID,
    WINDOWS,
    ModelType,
    Routing,
)

_MISTRAL: dict[str, object] = LLAMA | {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
_MUSE = frozenset({"norm", "post_norms", "attention_gate", "bare_norms"})

_MUSE_GLIMMER = ModelType(
    "MuseGlimmerForConditionalGeneration",
    {
        "tie_word_embeddings": False,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "rope_theta": 10_000.0,
        "sliding_window": 2048,
        "final_logit_softcapping": 20.0,
        "output_multiplier": 0.19611613513818404,
        "bos_token_id": 200_000,
        "eos_token_id": 200_001,
    },
    {"norm": "rmsnorm_plus_one", "post_norms": True, "attention_gate": True, "bare_norms": True},
    expresses=_MUSE
    | BIASES
    | WINDOWS
    | {"activation", "final_softcap", "logits_scaling", "no_rope_layers", "rope_scaling"},
    requires=_MUSE | {"final_softcap"},
    is_copied=True,
)
"""Source: ``configuration_muse_glimmer.py``, ``modeling_muse_glimmer.py`` of transformers 5.23.0.
The norm behind the last layer scales by its weight alone."""

_QWEN: dict[str, object] = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "rope_theta": 10_000.0,
    "use_sliding_window": False,
    "sliding_window": 4096,
}

_GPT_OSS_PARTS = frozenset({"sinks", "clamped_glu", "expert_bias"})

_HERE: Mapping[str, ModelType] = {
    "llama": ModelType("LlamaForCausalLM", LLAMA, expresses=ANY | BIASES | {"mlp_bias"}),
    "mistral": ModelType("MistralForCausalLM", _MISTRAL, expresses=ANY | {"sliding_window"}),
    "mixtral": ModelType(
        "MixtralForCausalLM",
        _MISTRAL
        | {
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        routing=Routing(norm_topk=True),
        expresses=ANY | EXPERTS | {"sliding_window"},
        requires=EXPERTS,
    ),
    "qwen2": ModelType(
        "Qwen2ForCausalLM",
        _QWEN | {"num_key_value_heads": 32, "max_window_layers": 28},
        {"qkv_bias": True},
        expresses=ANY | WINDOWS | {"qkv_bias"},
        requires=frozenset({"qkv_bias"}),
    ),
    "qwen3": ModelType(
        "Qwen3ForCausalLM",
        _QWEN | {"num_key_value_heads": 32, "head_dim": 128, "max_window_layers": 28},
        {"qk_norm": True},
        expresses=ANY | BIASES | WINDOWS | QK_NORM,
        requires=QK_NORM,
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
        routing=Routing(dense="any"),
        expresses=ANY | BIASES | QK_NORM | EXPERTS | {"sliding_window"},
        requires=QK_NORM | EXPERTS,
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
        expresses=ANY | {"partial_rotary", "sliding_window"},
    ),
    "gemma2": ModelType(
        "Gemma2ForCausalLM",
        GEMMA
        | {
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        {"norm": "rmsnorm_plus_one", "post_norms": True},
        expresses=ANY
        | BIASES
        | WINDOWS
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
        expresses=ANY | BIASES | {"no_pre_norms", "post_norms", "qk_norm_whole"},
        requires=frozenset({"no_pre_norms", "post_norms", "qk_norm_whole"}),
    ),
    "glm": ModelType(
        "GlmForCausalLM",
        GLM,
        expresses=ANY | {"partial_rotary", "qkv_bias"},
    ),
    "granitemoeshared": ModelType(
        "GraniteMoeSharedForCausalLM",
        LLAMA
        | {
            "attention_multiplier": 1.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 0,
        },
        routing=Routing(norm_topk=True, shared="any"),
        expresses=ANY
        | BIASES
        | EXPERTS
        | {
            "query_multiplier",
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
        },
        requires=EXPERTS,
    ),
    "gpt_oss": ModelType(
        "GptOssForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "rope_theta": 150_000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150_000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "sliding_window": 128,
            "attention_bias": True,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
        },
        {"sinks": True},
        routing=Routing(norm_topk=True, bias=True),
        expresses=BIASES | WINDOWS | EXPERTS | _GPT_OSS_PARTS | {"rope_scaling"},
        requires=EXPERTS | _GPT_OSS_PARTS,
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
        routing=Routing(selection_bias=True, norm_topk=True, shared="whole", dense="strided"),
        expresses=ANY | BIASES | EXPERTS | {"mlp_bias", "head_bias"},
        requires=EXPERTS,
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
        routing=SIGMOID,
        expresses=ANY | EXPERTS | {"latent_attention", "latent_bias", "o_bias"},
        requires=EXPERTS | {"latent_attention"},
    ),
    "muse_glimmer": _MUSE_GLIMMER,
}
"""Source: ``configuration_*.py`` of transformers 5.23.0; a test asks the classes themselves."""

_ELSEWHERE: Mapping[str, str] = {
    "llama_shaped": (
        "smollm3 ernie4_5 helium internlm3 seed_oss cwm ministral3 arcee exaone4 glm4 granite "
        "cohere gemma"
    ),
    "hybrids": ("qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text gemma3_text qwen3_next"),
    "by_kind": "gemma4_text mimo_v2_flash laguna cohere2_moe longcat_flash",
    "towers": (
        "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe gemma3 gemma4 kimi_k25 llama4 mistral3 "
        "internvl llava"
    ),
    "state_spaces": (
        "nemotron_h granitemoehybrid lfm2 lfm2_moe falcon_h1 mamba2 jamba bamba kimi_linear"
    ),
    "mixtures": (
        "deepseek_v32 glm_moe_dsa afmoe llama4_text hunyuan_v1_moe phimoe qwen2_moe olmoe "
        "flex_olmo granitemoe mellum dots1 glm4_moe solar_open exaone_moe hy_v3 minimax_m2 "
        "deepseek_v2 glm4_moe_lite"
    ),
    "classics": ("phi starcoder2 stablelm gpt_neox gpt2 falcon bloom"),
}
"""Module -> its classes; a module is imported when one of them is asked for."""

MODULES: Mapping[str, str] = {
    name: module for module, names in _ELSEWHERE.items() for name in names.split()
}
"""Class -> the module that knows it, of those that are not known here."""


class _ModelTypes(Mapping[str, ModelType]):
    """All classes, of which few are needed at a time."""

    def __getitem__(self, name: str) -> ModelType:
        if name in _HERE:
            return _HERE[name]
        module = MODULES[name]
        found = import_module(f"dcpconv.families.configs.{module}")
        known: Mapping[str, ModelType] = getattr(found, module.upper())
        return known[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*MODULES, *_HERE))  # of two with one class name the last counts

    def __len__(self) -> int:
        return len(_HERE) + len(MODULES)


MODEL_TYPES: Mapping[str, ModelType] = _ModelTypes()

SAME_KEYS: Mapping[str, str] = {"mistral": "llama"}
"""Classes whose tensors are named as another class names them, so that one table serves both."""

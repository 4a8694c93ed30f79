"""Classes of transformers whose layers are of several kinds, by ``model_type``.

Their config.json is written as it was read, since no other class computes what they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dcpconv.families.configs.model_type import BIASES, EXPERTS, GEMMA, QK_NORM, ModelType, Routing

_GATED_DELTA: dict[str, object] = {
    "tie_word_embeddings": False,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
}
_ROUTED: dict[str, object] = {
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
_PARTS = QK_NORM | {
    "rope_scaling",
    "norm",
    "partial_rotary",
    "layer_types",
    "qkv_bias",
    "o_bias",
    "activation",
}
_IMPLIED: dict[str, object] = {"norm": "rmsnorm_plus_one", "qk_norm": True}

_QWEN = ModelType(
    "Qwen3_5ForConditionalGeneration",
    _GATED_DELTA,
    _IMPLIED,
    expresses=_PARTS,
    requires=QK_NORM | {"norm"},
    allows={
        "attn_output_gate": (True,),
        "mamba_ssm_dtype": ("float32",),
        "mtp_num_hidden_layers": (0, 1, 2, 3),
        "mtp_use_dedicated_embeddings": (False,),
    },
    is_copied=True,
)
_QWEN_MOE = replace(
    _QWEN,
    class_name="Qwen3_5MoeForConditionalGeneration",
    defaults=_GATED_DELTA | {"num_key_value_heads": 2} | _ROUTED,
    routing=Routing(norm_topk=True, shared="any", shared_gate=True),
    expresses=_PARTS | EXPERTS,
    requires=QK_NORM | EXPERTS | {"norm"},
)

_GEMMA3 = ModelType(
    "Gemma3ForCausalLM",
    GEMMA
    | {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10_000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
    },
    {"norm": "rmsnorm_plus_one", "post_norms": True, "qk_norm": True},
    expresses=BIASES,
    allows={"_sliding_window_pattern": tuple(range(1, 64))},
    is_copied=True,
)

HYBRIDS: Mapping[str, ModelType] = {
    "qwen3_5": _QWEN,
    "qwen3_5_text": replace(_QWEN, class_name="Qwen3_5ForCausalLM"),
    "qwen3_5_moe": _QWEN_MOE,
    "qwen3_5_moe_text": replace(
        _QWEN_MOE,
        class_name="Qwen3_5MoeForCausalLM",
        takes={
            "qwen3_next": dict.fromkeys(
                ("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "intermediate_size")
            )
        },
    ),
    "gemma3_text": _GEMMA3,
    "qwen3_next": replace(
        _QWEN_MOE,
        class_name="Qwen3NextForCausalLM",
        defaults=_GATED_DELTA
        | {"num_key_value_heads": 2}
        | _ROUTED
        | {"num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True},
        routing=Routing(shared="any", shared_gate=True, dense="any"),
        takes={"qwen3_5_moe_text": {"norm_topk_prob": True}},
    ),
}
"""Source: ``configuration_*.py`` and ``modeling_*.py`` of transformers 5.23.0."""

"""Classes of transformers whose layers of two kinds have sizes of their own, by ``model_type``.

Their config.json is written as it was read, since no other class computes what they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dcpconv.families.configs.model_type import (
    BIASES,
    GEMMA,
    LATENT,
    SIGMOID,
    ModelType,
    Routing,
)

_FULL = "full_attention"
_SLIDING = "sliding_attention"


def _gemma4(fields: Mapping[str, object]) -> Mapping[str, object]:
    """The words of layers, of which the last sees everything, and the sizes of those that do.

    Source: ``Gemma4TextConfig.__post_init__`` of transformers 5.23.0, which writes those sizes by
    layer; the published files state them once.
    """
    count, words = fields.get("num_hidden_layers"), fields.get("layer_types")
    if words is None and isinstance(count, int) and count <= 100_000:
        words = [_SLIDING if (layer + 1) % 6 else _FULL for layer in range(count)]
    if not isinstance(words, list) or not words:
        return fields
    found = {**fields, "layer_types": [*words[:-1], _FULL]}
    own = fields.get("per_layer_config")
    first = next(iter(own.values()), None) if isinstance(own, Mapping) else None
    if not isinstance(first, Mapping):
        return {"global_head_dim": 512, **found}
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    return {**found, **{names[name]: size for name, size in first.items() if name in names}}


def _words(fields: Mapping[str, object], name: str, words: list[str]) -> Mapping[str, object]:
    """Fields with a word per layer, as they state it or as their class makes it up."""
    return {**fields, name: fields.get(name) or words}


def _count(fields: Mapping[str, object], name: str = "num_hidden_layers") -> int:
    count = fields.get(name)
    return count if isinstance(count, int) and 0 <= count <= 100_000 else 0


def _mimo(fields: Mapping[str, object]) -> Mapping[str, object]:
    """Source: ``MiMoV2FlashConfig.__post_init__`` of transformers 5.23.0."""
    count, window = _count(fields), fields.get("sliding_window_size")
    full = (layer == 0 or (layer + 1) % 6 == 0 for layer in range(count))
    found = _words(fields, "layer_types", [_FULL if sees else _SLIDING for sees in full])
    found = _words(found, "mlp_layer_types", _after_dense(1, count))
    scale = fields.get("routed_scaling_factor")
    return {
        **found,
        "routed_scaling_factor": 1.0 if scale is None else scale,
        **({"sliding_window": window + 1} if isinstance(window, int) else {}),
    }


def _laguna(fields: Mapping[str, object]) -> Mapping[str, object]:
    """Source: ``LagunaConfig.__post_init__`` of transformers 5.23.0."""
    count, heads = _count(fields), fields.get("num_attention_heads")
    found = _words(fields, "layer_types", [_FULL] * count)
    found = _words(found, "mlp_layer_types", _after_dense(1, count))
    stated, gating = fields.get("num_attention_heads_per_layer"), fields.get("gating")
    return {
        **found,
        "num_attention_heads_per_layer": stated or [heads] * count,
        "gating": gating if gating in {True, "per-head"} else "per-element",
    }


def _cohere2(fields: Mapping[str, object]) -> Mapping[str, object]:
    """Source: ``Cohere2MoeConfig.__post_init__`` of transformers 5.23.0."""
    dense = min(_count(fields, "first_k_dense_replace"), _count(fields))
    words = []
    for many, name in (
        (dense, "prefix_dense_sliding_window_pattern"),
        (_count(fields) - dense, "sliding_window_pattern"),
    ):
        step = fields.get(name)
        step = step if isinstance(step, int) and step > 0 else 1
        words += [_SLIDING if (layer + 1) % step else _FULL for layer in range(many)]
    found = _words(fields, "layer_types", words)
    found = _words(found, "mlp_layer_types", _after_dense(dense, _count(fields)))
    # One of two kinds of norm; a field without a value is none.
    return {name: v for name, v in found.items() if name != "rms_norm_eps" or v is not None}


def _longcat(fields: Mapping[str, object]) -> Mapping[str, object]:
    """What the class calls otherwise, under both names.

    Source: ``attribute_map`` and ``num_hidden_layers`` of ``LongcatFlashConfig``.
    """
    found = dict(fields)
    if "num_layers" not in fields:
        found["num_layers"] = _count(fields) // 2 if "num_hidden_layers" in fields else 28
    for own, name, default in (
        ("ffn_hidden_size", "intermediate_size", 12_288),
        ("expert_ffn_hidden_size", "moe_intermediate_size", 2048),
    ):
        found[own] = found[name] = fields.get(own, fields.get(name, default))
    return {**found, "num_hidden_layers": 2 * _count(found, "num_layers")}


def _after_dense(dense: int, count: int) -> list[str]:
    """One word per layer: plain blocks first, then experts."""
    return ["dense" if layer < dense else "sparse" for layer in range(count)]


BY_KIND: Mapping[str, ModelType] = {
    "gemma4_text": ModelType(
        "Gemma4ForCausalLM",
        GEMMA
        | {
            "vocab_size": 262_144,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
            "sliding_window": 512,
            "rope_parameters": {
                _FULL: {
                    "rope_type": "proportional",
                    "rope_theta": 1_000_000.0,
                    "partial_rotary_factor": 0.25,
                },
                _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            },
            "vocab_size_per_layer_input": 262_144,
            "hidden_size_per_layer_input": 256,
            "attention_k_eq_v": False,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "enable_moe_block": False,
        },
        {"post_norms": True, "qk_norm": True, "query_multiplier": 1.0},
        routing=Routing(norm_topk=True),
        expresses=frozenset({"qkv_bias", "o_bias"}),
        allows={"use_bidirectional_attention": (False, "vision")},
        completes=_gemma4,
        is_copied=True,
    ),
    "mimo_v2_flash": ModelType(
        "MiMoV2FlashForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 4,
            "head_dim": 192,
            "v_head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "rope_parameters": {
                word: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.334}
                for word, theta in ((_FULL, 5_000_000.0), (_SLIDING, 10_000.0))
            },
            "sliding_window": 129,
            "attention_value_scale": 0.707,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "n_group": 1,
            "topk_group": 1,
            "bos_token_id": 1,
        },
        routing=replace(SIGMOID, shared="none", dense="any"),
        expresses=frozenset({"qkv_bias"}),
        completes=_mimo,
        is_copied=True,
    ),
    "laguna": ModelType(
        "LagunaForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131_072,
            "rope_parameters": {
                _FULL: {
                    "rope_type": "default",
                    "rope_theta": 500_000.0,
                    "partial_rotary_factor": 0.5,
                },
                _SLIDING: {
                    "rope_type": "default",
                    "rope_theta": 10_000.0,
                    "partial_rotary_factor": 1.0,
                },
            },
            "sliding_window": 512,
            "gating": True,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_routed_scaling_factor": 1.0,
            "moe_router_logit_softcapping": 0.0,
        },
        {"qk_norm": True},
        routing=Routing(
            "sigmoid",
            selection_bias=True,
            norm_topk=True,
            scaled=True,
            shared="any",
            dense="any",
        ),
        expresses=BIASES,
        allows={"moe_apply_router_weight_on_input": (False,)},
        completes=_laguna,
        is_copied=True,
    ),
    "cohere2_moe": ModelType(
        "Cohere2MoeForCausalLM",
        {
            "tie_word_embeddings": True,
            "head_dim": 128,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "rope_theta": 10_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "prefix_dense_sliding_window_pattern": 1,
            "logit_scale": 0.0625,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_shared_experts": 0,
            "shared_expert_combination_strategy": "average",
            "expert_selection_fn": "softmax",
            "norm_topk_prob": True,
            "bos_token_id": 5,
            "eos_token_id": 255_001,
            "pad_token_id": 0,
        },
        {"parallel_residual": True},
        routing=Routing(shared="whole", dense="any"),
        expresses=BIASES,
        completes=_cohere2,
        is_copied=True,
    ),
    "longcat_flash": ModelType(
        "LongcatFlashForCausalLM",
        {
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "rope_theta": 10_000_000.0,
            "n_routed_experts": 512,
            "zero_expert_num": 256,
            "moe_topk": 12,
            "routed_scaling_factor": 6.0,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        routing=Routing(selection_bias=True, scaled=True),
        expresses=LATENT | {"latent_bias", "o_bias"},
        allows={
            "attention_method": ("MLA",),
            "mla_scale_kv_lora": (True,),
            "mla_scale_q_lora": (True,),
            "router_bias": (False,),
            "zero_expert_type": ("identity",),
        },
        completes=_longcat,
        is_copied=True,
    ),
}
"""Source: ``configuration_*.py`` and ``modeling_*.py`` of transformers 5.23.0."""

"""Fields of config.json that only some classes with experts have."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dcpconv.core.spec import Experts, ModelSpec
from dcpconv.families.configs.experts import shared_width

Fields = dict[str, object]


def own_fields(model_type: str, spec: ModelSpec) -> Fields:
    """What a class has beside the fields of every class.

    Args:
        model_type: A key of ``MIXTURES``, or ``deepseek_v3``.
        spec: The model.
    """
    experts, write = spec.experts, _OWN.get(model_type)
    return {} if experts is None or write is None else write(spec, experts)


def _counted(experts: Experts) -> Fields:
    """Routed experts as Qwen names them."""
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "norm_topk_prob": experts.norm_topk,
    }


def _routed(experts: Experts) -> Fields:
    """Experts as DeepSeek names them."""
    return {
        "moe_intermediate_size": experts.ffn_size,
        "n_routed_experts": experts.count,
        "n_shared_experts": shared_width(experts) // experts.ffn_size,
        "num_experts_per_tok": experts.per_token,
        "norm_topk_prob": experts.norm_topk,
        "routed_scaling_factor": experts.routed_scale,
        "n_group": experts.groups,
        "topk_group": experts.top_groups,
    }


def _latent(spec: ModelSpec) -> Fields:
    if spec.latent is None:
        return {}
    return {
        "q_lora_rank": spec.latent.q_rank,
        "kv_lora_rank": spec.latent.kv_rank,
        "qk_nope_head_dim": spec.latent.nope_dim,
        "qk_rope_head_dim": spec.head_dim,
        "v_head_dim": spec.latent.value_dim,
    }


def _kinds(spec: ModelSpec, experts: Experts) -> list[str]:
    """One word per layer, ``dense`` or ``sparse``."""
    dense = set(experts.dense_layers)
    return ["dense" if layer in dense else "sparse" for layer in range(spec.n_layers)]


def _words(spec: ModelSpec) -> list[str]:
    kind = "full_attention" if spec.sliding_window is None else "sliding_attention"
    return list(spec.layer_types or (kind,) * spec.n_layers)


def _deepseek_v3(spec: ModelSpec, experts: Experts) -> Fields:
    return {
        **_routed(experts),
        **_latent(spec),
        "first_k_dense_replace": len(experts.dense_layers),
        "scoring_func": experts.scoring,
        "topk_method": "noaux_tc",
    }


def _deepseek_v2(spec: ModelSpec, experts: Experts) -> Fields:
    return {
        **_routed(experts),
        **_latent(spec),
        "first_k_dense_replace": len(experts.dense_layers),
        "mlp_bias": spec.mlp_bias,
        "scoring_func": experts.scoring,
        "topk_method": "greedy" if experts.groups == 1 else "group_limited_greedy",
    }


def _glm4_moe_lite(spec: ModelSpec, experts: Experts) -> Fields:
    return {**_routed(experts), **_latent(spec), "mlp_layer_types": _kinds(spec, experts)}


def _qwen2_moe(spec: ModelSpec, experts: Experts) -> Fields:
    return {
        **_counted(experts),
        "moe_intermediate_size": experts.ffn_size,
        "shared_expert_intermediate_size": shared_width(experts),
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(experts.dense_layers),
        "use_sliding_window": spec.sliding_window is not None,
        "sliding_window": spec.sliding_window,
        "max_window_layers": spec.n_layers,
        "layer_types": _words(spec),
    }


def _olmoe(spec: ModelSpec, experts: Experts) -> Fields:
    del spec
    return {**_counted(experts), "intermediate_size": experts.ffn_size}


def _granitemoe(spec: ModelSpec, experts: Experts) -> Fields:
    return {
        "intermediate_size": experts.ffn_size,
        "attention_multiplier": spec.query_multiplier or spec.head_dim**-0.5,
        "embedding_multiplier": spec.embedding_multiplier,
        "residual_multiplier": spec.residual_multiplier,
        "logits_scaling": spec.logits_scaling,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
    }


def _granitemoeshared(spec: ModelSpec, experts: Experts) -> Fields:
    return {**_granitemoe(spec, experts), "shared_intermediate_size": shared_width(experts)}


def _mellum(spec: ModelSpec, experts: Experts) -> Fields:
    """RoPE by kind of layer, as it was read or alike for all; the class looks at no other."""
    words = _words(spec)
    stated = spec.stated.get("rope_parameters") if spec.architecture == "mellum" else None
    scaling = spec.rope_scaling
    rope = {
        "rope_type": "default" if scaling is None else scaling.kind,
        **(scaling.parameters if scaling is not None else {}),
        "rope_theta": spec.rope_theta,
    }
    return {
        **_counted(experts),
        "num_local_experts": experts.count,
        "moe_intermediate_size": experts.ffn_size,
        "mlp_layer_types": _kinds(spec, experts),
        "sliding_window": spec.sliding_window,
        "layer_types": words,
        "rope_parameters": stated or dict.fromkeys(sorted(set(words)), rope),
    }


def _dots1(spec: ModelSpec, experts: Experts) -> Fields:
    types = _words(spec)
    return {
        **_routed(experts),
        "first_k_dense_replace": len(experts.dense_layers),
        "sliding_window": spec.sliding_window,
        "max_window_layers": next(
            (n for n, word in enumerate(types) if word != "full_attention"), spec.n_layers
        ),
        "layer_types": types,
    }


def _glm4_moe(spec: ModelSpec, experts: Experts) -> Fields:
    return {
        **_routed(experts),
        "first_k_dense_replace": len(experts.dense_layers),
        "partial_rotary_factor": spec.partial_rotary_factor,
        "use_qk_norm": spec.qk_norm,
    }


def _solar_open(spec: ModelSpec, experts: Experts) -> Fields:
    del spec
    return _routed(experts)


def _exaone_moe(spec: ModelSpec, experts: Experts) -> Fields:
    """The class takes no null for the window, and as soon as there is one, turns only what slides:
    where everything sees everything, a window as long as the sequence says whether it turns."""
    window, words = spec.sliding_window, _words(spec)
    if window is None:
        window = spec.max_seq_len
        kept = set(spec.no_rope_layers)
        words = [
            "full_attention" if layer in kept else "sliding_attention"
            for layer in range(spec.n_layers)
        ]
    routed = _routed(experts)
    return {
        **routed,
        "num_experts": routed.pop("n_routed_experts"),
        "num_shared_experts": routed.pop("n_shared_experts"),
        "mlp_layer_types": _kinds(spec, experts),
        "sliding_window": window,
        "layer_types": words,
    }


def _hy_v3(spec: ModelSpec, experts: Experts) -> Fields:
    return {
        "moe_intermediate_size": experts.ffn_size,
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "num_shared_experts": shared_width(experts) // experts.ffn_size,
        "router_scaling_factor": experts.routed_scale,
        "mlp_layer_types": _kinds(spec, experts),
        "mlp_bias": spec.mlp_bias,
    }


def _minimax_m2(spec: ModelSpec, experts: Experts) -> Fields:
    return {
        "intermediate_size": experts.ffn_size,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "partial_rotary_factor": spec.partial_rotary_factor,
        "rotary_dim": int(spec.head_dim * spec.partial_rotary_factor),
    }


_OWN: Mapping[str, Callable[[ModelSpec, Experts], Fields]] = {
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "dots1": _dots1,
    "exaone_moe": _exaone_moe,
    "flex_olmo": _olmoe,
    "glm4_moe": _glm4_moe,
    "glm4_moe_lite": _glm4_moe_lite,
    "granitemoe": _granitemoe,
    "granitemoeshared": _granitemoeshared,
    "hy_v3": _hy_v3,
    "mellum": _mellum,
    "minimax_m2": _minimax_m2,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "solar_open": _solar_open,
}

_ATTENTION = ("attention_bias", ("qkv_bias", "o_bias"))
_QKV = ("attention_bias", ("qkv_bias",))
_LATENT = ("attention_bias", ("latent_bias", "o_bias"))
SWITCHES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "dots1": _ATTENTION,
    "flex_olmo": _ATTENTION,
    "glm4_moe": _QKV,
    "glm4_moe_lite": _LATENT,
    "granitemoe": _ATTENTION,
    "granitemoeshared": _ATTENTION,
    "hy_v3": _ATTENTION,
    "mellum": _ATTENTION,
    "olmoe": _ATTENTION,
    "qwen2_moe": ("qkv_bias", ("qkv_bias",)),
    "solar_open": _QKV,
}
"""The field that adds biases, and the features that come and go with it."""

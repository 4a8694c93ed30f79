"""What classes with sizes per kind of layer say in their config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dcpconv.families.configs.hf_fields import HfConfig

Values = Mapping[str, object]


def own_values(config: HfConfig, file: Path) -> Values:
    """``ModelSpec`` fields that a class states in a way of its own.

    Args:
        config: What every class says.
        file: For errors.
    """
    del file
    return _OWN[config.model_type](config)


def own_names(config: HfConfig) -> frozenset[str]:
    """Fields that are looked at, which other classes do not have; the tables look at others."""
    names = _NAMES[config.model_type]
    if config.model_type == "gemma4_text" and not _is_by_kind(config):
        return names - {"per_layer_config"}
    stated = config.model_extra or {}
    agreeing = _agreeing(config) if config.model_type == "mimo_v2_flash" else {}
    return names | {name for name, value in agreeing.items() if stated.get(name) == value}


def layer_words(config: HfConfig, file: Path) -> list[str] | None:
    """One word per layer: every class has them made up before."""
    del config, file
    return None


def _gemma4(config: HfConfig) -> Values:
    """Source: ``Gemma4TextAttention``, ``Gemma4TextDecoderLayer`` of transformers 5.23.0."""
    borrowing, width = _stated(config, "num_kv_shared_layers"), _stated(config, "global_head_dim")
    heads = _stated(config, "num_global_key_value_heads")
    special = {
        "layer_scalars": "a factor per layer",
        "value_norm": "on values, without weights",
        "sizes_by_layer": f"heads of {width} in layers that see everything",
    }
    if borrowing:
        special["borrowed_keys"] = f"{borrowing} layers take keys and values of earlier ones"
    if _stated(config, "attention_k_eq_v"):
        special["keys_as_values"] = f"keys are the values, of {heads} heads, where all is seen"
    if _stated(config, "hidden_size_per_layer_input"):
        special["per_layer_inputs"] = "an embedding of its own for every layer"
    experts = config.num_experts if _stated(config, "enable_moe_block") else None
    if experts:
        special["mixed_experts"] = "experts beside a plain block in every layer"
    return {
        "embedding_multiplier": config.hidden_size**0.5,
        "special": special,
        **({} if experts else {"experts": None}),
    }


def _is_by_kind(config: HfConfig) -> bool:
    """Whether sizes that are stated layer by layer follow from the kinds of layers."""
    stated, words = _stated(config, "per_layer_config"), config.layer_types or []
    if not isinstance(stated, Mapping):
        return True
    first = next(iter(stated.values()), None)
    full = [str(layer) for layer, word in enumerate(words) if word == "full_attention"]
    return (
        sorted(layer.lstrip("0") or "0" for layer in stated) == sorted(full)
        and isinstance(first, Mapping)
        and first.keys() <= {"head_dim", "num_key_value_heads"}
        and all(one == first for one in stated.values())
    )


def _mimo(config: HfConfig) -> Values:
    """Source: ``MiMoV2FlashAttention`` of transformers 5.23.0."""
    scale, heads = _stated(config, "attention_value_scale"), config.num_key_value_heads or 0
    sizes = f"{2 * heads} kv heads in layers with a window, values of {config.v_head_dim}"
    special = {"sizes_by_layer": sizes}
    if scale not in {None, 1.0}:
        special["value_scale"] = f"values are multiplied by {scale}"
    has_sinks = "sliding_attention" in (config.layer_types or [])
    return {"special": special, "sinks": has_sinks}


def _agreeing(config: HfConfig) -> Values:
    """What the published file says in words of its own, which the class does not look at, and what
    it has to say all the same: what the class does."""
    types, mlps = config.layer_types or [], _stated(config, "mlp_layer_types") or []
    ropes = config.rope_parameters or {}
    thetas = {
        word: rope.get("rope_theta") for word, rope in ropes.items() if isinstance(rope, Mapping)
    }
    heads = config.num_key_value_heads or 0
    return {
        "hybrid_layer_pattern": [int(word == "sliding_attention") for word in types],
        "moe_layer_freq": [int(word == "sparse") for word in mlps],
        "layernorm_epsilon": config.rms_norm_eps,
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "attention_chunk_size": (config.sliding_window or 0) - 1,
        "swa_num_attention_heads": config.num_attention_heads,
        "swa_num_key_value_heads": 2 * heads,
        "swa_head_dim": config.head_dim,
        "swa_v_head_dim": config.v_head_dim,
        "swa_rope_theta": thetas.get("sliding_attention"),
    }


def _laguna(config: HfConfig) -> Values:
    """Source: ``LagunaAttention``, ``LagunaTopKRouter`` of transformers 5.23.0."""
    gating, softcap = _stated(config, "gating"), _stated(config, "moe_router_logit_softcapping")
    heads = _stated(config, "num_attention_heads_per_layer") or []
    each = "channel" if gating == "per-element" else "head"
    special = {"softplus_gate": f"the softplus of a projection is a factor on every {each}"}
    if len({*map(str, heads)}) > 1:
        special["sizes_by_layer"] = "query heads"
    if softcap:
        special["router_softcap"] = f"{softcap}"
    return {"special": special}


def _cohere2(config: HfConfig) -> Values:
    """Source: ``Cohere2MoeAttention``, ``Cohere2MoeSparseMoeBlock``, ``Cohere2MoeForCausalLM`` of
    transformers 5.23.0."""
    scale, words = _stated(config, "logit_scale"), config.layer_types or []
    mlps = _stated(config, "mlp_layer_types") or []
    turns = _stated(config, "prefix_dense_sliding_window_pattern") == 1
    special = {}
    if config.n_shared_experts and _stated(config, _COMBINED) == "average":
        special["averaged_experts"] = "half of what shared and routed experts give together"
    if _stated(config, "expert_selection_fn") == "sigmoid":
        special["sigmoid_scores"] = "of the chosen experts"
    width = _stated(config, "prefix_dense_intermediate_size")
    # Its class always states this one, so that it is left over where the other is stated too.
    has_rms = _stated(config, "layer_norm_eps") is not None
    return {
        "logits_scaling": 1.0 / scale if isinstance(scale, int | float) and scale > 0 else 0.0,
        "norm": "rmsnorm" if has_rms else "layernorm",
        "no_rope_layers": tuple(
            layer
            for layer, (word, mlp) in enumerate(zip(words, mlps, strict=False))
            if word != "sliding_attention" and not (turns and mlp == "dense")
        ),
        "special": special,
        **({"ffn_size": width} if width is not None else {}),
    }


def _longcat(config: HfConfig) -> Values:
    """Source: ``LongcatFlashDecoderLayer``, ``LongcatFlashMLA``, ``LongcatFlashExperts`` of
    transformers 5.23.0."""
    idle = _stated(config, "zero_expert_num")
    special = {
        "double_layers": "two of attention in each, beside one of experts",
        "latent_scales": "factors on what comes out of the ranks",
    }
    if idle:
        special["idle_experts"] = f"{idle} that hand on what they see"
    return {"special": special}


_COMBINED = "shared_expert_combination_strategy"
_OWN: Mapping[str, Callable[[HfConfig], Values]] = {
    "cohere2_moe": _cohere2,
    "gemma4_text": _gemma4,
    "laguna": _laguna,
    "longcat_flash": _longcat,
    "mimo_v2_flash": _mimo,
}
_GEMMA4 = frozenset(
    {
        *("per_layer_config", "global_head_dim", "num_global_key_value_heads"),
        *("attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp", "enable_moe_block"),
        *("vocab_size_per_layer_input", "hidden_size_per_layer_input"),
    }
)
_NAMES: Mapping[str, frozenset[str]] = {
    "cohere2_moe": frozenset(
        {
            *("logit_scale", "sliding_window_pattern", "prefix_dense_sliding_window_pattern"),
            *("prefix_dense_intermediate_size", "expert_selection_fn", "mlp_layer_types"),
            _COMBINED,
        }
    ),
    "gemma4_text": _GEMMA4,
    "laguna": frozenset(
        {
            *("gating", "num_attention_heads_per_layer", "mlp_layer_types"),
            "moe_router_logit_softcapping",
        }
    ),
    "longcat_flash": frozenset(
        {"num_layers", "ffn_hidden_size", "expert_ffn_hidden_size", "zero_expert_num"}
    ),
    "mimo_v2_flash": frozenset({"attention_value_scale", "mlp_layer_types", "sliding_window_size"}),
}


def _stated(config: HfConfig, name: str) -> Any:
    return (config.model_extra or {}).get(name)

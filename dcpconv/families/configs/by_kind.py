"""Classes of transformers whose layers of two kinds have sizes of their own, by ``model_type``.

Their config.json is written as it was read, since no other class computes what they do.
"""

from __future__ import annotations

from collections.abc import Mapping

from dcpconv.families.configs.model_type import GEMMA, ModelType, Routing

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
}
"""Source: ``configuration_*.py`` and ``modeling_*.py`` of transformers 5.23.0."""

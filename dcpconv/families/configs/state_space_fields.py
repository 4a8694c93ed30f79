"""What classes with layers that keep a state say, in the fields of all the others.

Each function takes the fields of a config.json, with the defaults of its class, and gives them back
with those that stand in for its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Fields = Mapping[str, object]

_WORDS: Mapping[str, str] = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "hybrid": "linear_attention",
}
"""Earlier words for kinds of layers.  Source: ``_LEGACY_LAYER_TYPE_REMAP``, and what the first
files say."""

_MOST_LAYERS = 100_000
"""A hostile file might ask for billions."""

_NO_END = 2**31 - 1
"""Positions of a model that counts none."""

_LETTERS: Mapping[str, str] = {
    "M": "linear_attention",
    "E": "moe",
    "*": "full_attention",
    "-": "mlp",
}
"""Source: ``NemotronHConfig._pattern_to_list`` of transformers 5.23.0."""


def words(said: object) -> list[str] | None:
    """What a list says of each layer, in today's words; ``None`` where it is no list."""
    return [_WORDS.get(str(word), str(word)) for word in said] if isinstance(said, list) else None


def _without(fields: Fields, *names: str) -> dict[str, object]:
    return {name: value for name, value in fields.items() if name not in names}


def _lacking(kinds: Sequence[str], word: str) -> list[int]:
    """Layers that are of another kind."""
    return [layer for layer, kind in enumerate(kinds) if kind != word]


def nemotron_h(fields: Fields) -> Fields:
    """One block per layer, which a word or a letter names; one switch for biases of state spaces.

    Source: ``NemotronHConfig.__post_init__`` of transformers 5.23.0.
    """
    kinds = words(fields.get("layers_block_type") or fields.get("layer_types"))
    pattern = fields.get("hybrid_override_pattern")
    if kinds is None and isinstance(pattern, str):
        kinds = [_LETTERS.get(letter, letter) for letter in pattern]
    kinds = kinds or ["linear_attention", "moe", "full_attention", "mlp"]
    seen = _without(fields, "use_bias", "n_routed_experts")
    return {
        **seen,
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "hidden_act": fields.get("mlp_hidden_act"),
        "num_experts": fields.get("n_routed_experts") if "moe" in kinds else 0,
        "n_shared_experts": 1,
        "shared_expert_intermediate_size": fields.get("moe_shared_expert_intermediate_size"),
        "mlp_only_layers": _lacking(kinds, "moe"),
    }


def _all(fields: Fields, word: str) -> list[str]:
    """The same word for every layer."""
    count = fields.get("num_hidden_layers")
    return [word] * count if isinstance(count, int) and count <= _MOST_LAYERS else []


def granitemoehybrid(fields: Fields) -> Fields:
    """A plain block in every layer, beside experts where it has some.

    Source: ``GraniteMoeHybridConfig.__post_init__`` and ``GraniteMoeHybridDecoderLayer`` of
    transformers 5.23.0.
    """
    kinds = words(fields.get("layer_types"))
    return {
        **_without(fields, "shared_intermediate_size"),
        "layer_types": kinds or _all(fields, "linear_attention"),
        "moe_intermediate_size": fields.get("intermediate_size"),
        "intermediate_size": fields.get("shared_intermediate_size"),
    }


def lfm2(fields: Fields) -> Fields:
    """Short convolutions in layers without attention; a width that the class computes.

    Source: ``Lfm2Config.__post_init__`` and ``Lfm2MLP`` of transformers 5.23.0.
    """
    kinds, full = words(fields.get("layer_types")), fields.get("full_attn_idxs")
    if kinds is None:
        kinds = _all(fields, "conv" if isinstance(full, list) else "full_attention")
        for layer in full if isinstance(full, list) else ():
            if isinstance(layer, int) and layer < len(kinds):
                kinds[layer] = "full_attention"
    width = fields.get("block_ff_dim", fields.get("intermediate_size"))
    factor, multiple = (fields.get(f"block_{n}") for n in ("ffn_dim_multiplier", "multiple_of"))
    if fields.get("block_auto_adjust_ff_dim") and isinstance(width, int):
        width = int(2 * width / 3)
        if isinstance(factor, int | float) and isinstance(multiple, int) and multiple > 0:
            width = multiple * -(-int(factor * width) // multiple)
    tied = fields.get("tie_embedding", fields["tie_word_embeddings"])
    return {
        **fields,
        "layer_types": kinds,
        "intermediate_size": width,
        "tie_word_embeddings": tied,
    }


def falcon_h1(fields: Fields) -> Fields:
    """A state and attention beside each other in every layer."""
    return {**fields, "layer_types": _all(fields, "hybrid")}


def mamba2(fields: Fields) -> Fields:
    """States in every layer, no attention, no feed-forward block, nothing that counts positions."""
    expand, hidden = fields.get("expand"), fields.get("hidden_size")
    inner = expand * hidden if isinstance(expand, int) and isinstance(hidden, int) else None
    return {
        **_without(fields, "use_bias"),
        "num_attention_heads": fields.get("num_heads"),
        "intermediate_size": inner,
        "max_position_embeddings": _NO_END,
        "layer_types": _all(fields, "linear_attention"),
    }


def jamba(fields: Fields) -> Fields:
    """Attention and experts, each at a stride; experts as wide as the plain block.

    Source: ``JambaConfig`` of transformers 5.23.0, ``layers_block_type`` and
    ``layers_num_experts``.
    """
    count, experts = fields.get("num_hidden_layers"), fields.get("num_experts")
    layers = range(count if isinstance(count, int) and count <= _MOST_LAYERS else 0)
    attends, routes = (_strided(fields, name) for name in ("attn", "expert"))
    return {
        **fields,
        "layer_types": ["full_attention" if attends(n) else "linear_attention" for n in layers],
        "num_experts": experts if isinstance(experts, int) and experts > 1 else 0,
        "mlp_only_layers": [layer for layer in layers if not routes(layer)],
    }


def _strided(fields: Fields, name: str) -> Callable[[int], bool]:
    step, start = fields.get(f"{name}_layer_period"), fields.get(f"{name}_layer_offset")
    if not isinstance(step, int) or step < 1:
        return lambda _: False
    return lambda layer: layer % step == start


def rank(fields: Fields) -> Fields:
    """The rank of step sizes as a number.  Source: ``JambaConfig.__post_init__``, same version."""
    hidden = fields.get("hidden_size")
    if fields.get("mamba_dt_rank") != "auto" or not isinstance(hidden, int):
        return fields
    return {**fields, "mamba_dt_rank": -(-hidden // 16)}


def bamba(fields: Fields) -> Fields:
    """Attention in the layers that a list names.  Source: ``BambaConfig.layers_block_type``."""
    kinds, full = _all(fields, "linear_attention"), fields.get("attn_layer_indices")
    for layer in full if isinstance(full, list) else ():
        if isinstance(layer, int) and layer < len(kinds):
            kinds[layer] = "full_attention"
    return {**fields, "layer_types": kinds}


_KIMI: Mapping[str, str] = {
    "model_max_length": "max_position_embeddings",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
}
"""Source: ``KimiLinearConfig.attribute_map`` of transformers 5.23.0."""


def kimi_linear(fields: Fields) -> Fields:
    """Delta attention in most layers; words of its own for what others have too.

    Source: ``KimiLinearConfig.__post_init__`` of transformers 5.23.0.
    """
    seen = _without(fields, "first_k_dense_replace", *_KIMI)
    seen |= {others: fields[own] for own, others in _KIMI.items() if own in fields}
    kinds, inner = words(fields.get("layer_types")), fields.get("linear_attn_config")
    full = inner.get("full_attn_layers") if isinstance(inner, Mapping) else None
    if kinds is None:
        kinds = _all(fields, "linear_attention")
        layers = full if isinstance(full, list) else range(5, len(kinds) + 1, 4)
        for layer in layers:
            if isinstance(layer, int) and 0 < layer <= len(kinds):
                kinds[layer - 1] = "full_attention"
    first, blocks = fields.get("first_k_dense_replace", 1), words(fields.get("mlp_layer_types"))
    dense = list(range(first)) if isinstance(first, int) and first <= len(kinds) else []
    return {
        **seen,
        "layer_types": kinds,
        "mlp_only_layers": dense if blocks is None else _lacking(blocks, "sparse"),
    }


def head_width(fields: Fields) -> Fields:
    """The width of a head of queries and keys, as a field.  Source: the same."""
    parts = fields.get("qk_nope_head_dim"), fields.get("qk_rope_head_dim")
    if not isinstance(parts[0], int) or not isinstance(parts[1], int):
        return fields
    return {**fields, "qk_head_dim": parts[0] + parts[1]}

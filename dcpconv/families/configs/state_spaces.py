"""Classes of transformers with layers that keep a state, by ``model_type``.

Their config.json is written as it was read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dcpconv.families.configs.model_type import ModelType, Routing

Fields = Mapping[str, object]

_WORDS: Mapping[str, str] = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "hybrid": "linear_attention",
}
"""Earlier words for kinds of layers.  Source: ``_LEGACY_LAYER_TYPE_REMAP``, and what the first
files say."""

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


def _nemotron_h(fields: Fields) -> Fields:
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


STATE_SPACES: Mapping[str, ModelType] = {
    "nemotron_h": ModelType(
        "NemotronHForCausalLM",
        {
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 21_504,
            "mlp_hidden_act": "relu2",
            "layer_norm_epsilon": 1e-5,
            "max_position_embeddings": 4096,
            "ssm_state_size": 128,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "n_groups": 8,
            "conv_kernel": 4,
            "use_bias": False,
            "use_conv_bias": True,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "moe_intermediate_size": 7688,
            "moe_shared_expert_intermediate_size": 7688,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        {"positions": "none", "gated": False},
        routing=Routing("sigmoid", selection_bias=True, groups=True, scaled=True, shared="any"),
        expresses=frozenset({"mlp_bias", "state_space", "positions", "ungated", "experts"}),
        assumes={"attention_bias": False, "sliding_window": None},
        is_copied=True,
        stands_in=_nemotron_h,
    ),
}
"""Source: ``configuration_*.py`` and ``modeling_*.py`` of transformers 5.23.0."""

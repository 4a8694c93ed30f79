"""Classes of transformers with layers that keep a state, by ``model_type``.

Their config.json is written as it was read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dcpconv.families.configs.model_type import BIASES, ModelType, Routing

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


def _all(fields: Fields, word: str) -> list[str]:
    """The same word for every layer."""
    count = fields.get("num_hidden_layers")
    return [word] * count if isinstance(count, int) and count <= _MOST_LAYERS else []


def _granitemoehybrid(fields: Fields) -> Fields:
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


_LAYERS: dict[str, object] = {
    "tie_word_embeddings": False,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
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
    "granitemoehybrid": ModelType(
        "GraniteMoeHybridForCausalLM",
        {
            **_LAYERS,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
            "rope_theta": 10_000.0,
            "attention_multiplier": 1.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 1024,
            "mamba_n_heads": 128,
            "mamba_d_head": "auto",
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        routing=Routing(norm_topk=True),
        expresses=BIASES | {"state_space", "positions", "experts"},
        allows={"init_method": ("mup",), "normalization_function": ("rmsnorm",)},
        is_copied=True,
        stands_in=_granitemoehybrid,
    ),
}
"""Source: ``configuration_*.py`` and ``modeling_*.py`` of transformers 5.23.0."""

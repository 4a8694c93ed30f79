"""What the tests of config.json share: a tiny file, a plain model, what transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dcpconv.core.spec import ModelSpec
from dcpconv.families.configs.model_types import MODEL_TYPES

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 96,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
LLAMA3: dict[str, Any] = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = ModelSpec(
    vocab_size=37,
    hidden_size=96,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    head_dim=16,
    ffn_size=56,
    norm_eps=3e-6,
    rope_theta=490_000.0,
    max_seq_len=64,
    dtype="bf16",
    bos_token_id=3,
    eos_token_id=(4, 5),
    origin="hf-llama",
)
"""A Llama without features."""

OWN_WORDS: dict[str, dict[str, str]] = {
    "llama4_text": {"intermediate_size": "intermediate_size_mlp"},
    "granitemoehybrid": {"intermediate_size": "shared_intermediate_size"},
    "lfm2": {"rms_norm_eps": "norm_eps"},
    "lfm2_moe": {"rms_norm_eps": "norm_eps"},
    "kimi_linear": {"max_position_embeddings": "model_max_length"},
    "mamba2": {"rms_norm_eps": "layer_norm_epsilon", "num_attention_heads": "num_heads"},
    "cohere": {"rms_norm_eps": "layer_norm_eps"},
    "nemotron_h": {"rms_norm_eps": "layer_norm_epsilon", "hidden_act": "mlp_hidden_act"},
}
"""Field of most classes -> what a class calls it."""

UNSAID: dict[str, set[str]] = {
    "lfm2": {"hidden_act"},
    "lfm2_moe": {"hidden_act"},
    "mamba2": {"num_key_value_heads", "intermediate_size", "max_position_embeddings"},
}
"""Fields that a class has nothing like."""
_COMPUTED = {"lfm2"}
"""Classes that compute the width of the feed-forward block, as other tests compare with tensors."""


def save(directory: Path, fields: dict[str, Any], name: str = "config.json") -> Path:
    """Writes a parameter file into ``directory``; returns that."""
    (directory / name).write_text(json.dumps(fields))
    return directory


def as_written(value: int | tuple[int, ...] | None) -> int | list[int] | None:
    """Tokens as JSON has them."""
    return list(value) if isinstance(value, tuple) else value


def assert_same_model(spec: ModelSpec, config: Any) -> None:
    """``spec`` says what transformers' ``config`` says."""
    known = MODEL_TYPES.get(config.model_type, MODEL_TYPES["llama"])  # of a class with a tower
    own = {name: spelling for spelling, name in known.spellings.items()}
    own |= OWN_WORDS.get(config.model_type, {})

    def says(name: str, value: object) -> bool:
        """Whether the class says so too, or has nothing to say."""
        spelling = own.get(name, name)
        return (
            name in known.silent
            or name in UNSAID.get(config.model_type, ())
            or getattr(config, spelling, value if known.spellings else None) == value
        )

    head_dim = getattr(config, "head_dim", None)
    assert spec.architecture == config.model_type
    assert spec.vocab_size == config.vocab_size
    assert spec.hidden_size == config.hidden_size
    is_computed = known.ffn_times is not None or config.model_type in _COMPUTED
    assert says("intermediate_size", spec.ffn_size) or is_computed
    assert spec.n_layers == config.num_hidden_layers
    assert says("num_attention_heads", spec.n_heads)
    if spec.latent is None and not getattr(config, "multi_query", False):
        assert says("num_key_value_heads", spec.n_kv_heads)
    assert spec.head_dim == (head_dim or config.hidden_size // config.num_attention_heads)
    has_layer_norms = config.model_type in {"cohere", "cohere2_moe"}
    eps = "layer_norm_eps" if has_layer_norms else "rms_norm_eps"
    assert says(eps, spec.norm_eps)
    assert says("max_position_embeddings", spec.max_seq_len)
    assert spec.tied == config.tie_word_embeddings
    if "rope_parameters" not in known.silent and spec.positions == "rope":
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)
        assert spec.rope_theta == rope["rope_theta"]
        assert spec.partial_rotary_factor == rope.get("partial_rotary_factor", 1.0)
        kind = rope["rope_type"]
        assert (spec.rope_scaling.kind if spec.rope_scaling else "default") == kind
    activation = getattr(config, "hidden_activation", None)
    assert spec.activation == activation if activation else says("hidden_act", spec.activation)
    assert spec.bos_token_id == getattr(config, "bos_token_id", None)
    assert as_written(spec.eos_token_id) == getattr(config, "eos_token_id", None)
    assert spec.pad_token_id == config.pad_token_id
    window = getattr(config, "sliding_window", None) or None
    types = getattr(config, "layer_types", None)
    if types is not None and "sliding_attention" not in types:
        window = None
    assert spec.sliding_window == window
    if types is not None and len(set(types)) > 1:
        assert spec.layer_types == tuple(types)
    assert spec.attn_logit_softcap == getattr(config, "attn_logit_softcapping", None)
    assert spec.final_logit_softcap == getattr(config, "final_logit_softcapping", None)
    assert (spec.dtype is None) == (config.dtype is None)


def change(changes: dict[str, Any]) -> ModelSpec:
    """``PLAIN`` with some fields replaced."""
    return ModelSpec.model_validate(dict(PLAIN) | changes)

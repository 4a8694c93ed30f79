"""Fields of config.json that only some classes shaped like a Llama have."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dcpconv.core.spec import ModelSpec

Fields = dict[str, object]

_TRAINED_LENGTH = "original_max_position_embeddings"
_TEMPERATURE = "llama_4_scaling_beta"


def _mlp_bias(spec: ModelSpec) -> Fields:
    return {"mlp_bias": spec.mlp_bias}


def _words(spec: ModelSpec) -> list[str]:
    kind = "full_attention" if spec.sliding_window is None else "sliding_attention"
    return list(spec.layer_types or (kind,) * spec.n_layers)


def _smollm3(spec: ModelSpec) -> Fields:
    return {
        "mlp_bias": spec.mlp_bias,
        "no_rope_layers": [int(n not in spec.no_rope_layers) for n in range(spec.n_layers)],
        "use_sliding_window": spec.sliding_window is not None,
        "sliding_window": spec.sliding_window,
        "layer_types": _words(spec),
    }


def _internlm3(spec: ModelSpec) -> Fields:
    """Both spellings: transformers 5 maps one to the other, the class's own code has only these."""
    return {"mlp_bias": spec.mlp_bias, "qkv_bias": spec.qkv_bias, "bias": spec.mlp_bias}


def _seed_oss(spec: ModelSpec) -> Fields:
    return {
        "attention_bias": spec.qkv_bias,
        "attention_out_bias": spec.o_bias,
        "mlp_bias": spec.mlp_bias,
    }


def _cwm(spec: ModelSpec) -> Fields:
    """A number for the window also where nothing slides: the class takes no null."""
    return {
        "mlp_bias": spec.mlp_bias,
        "sliding_window": spec.sliding_window or spec.max_seq_len,
        "layer_types": _words(spec),
    }


def _ministral3(spec: ModelSpec) -> Fields:
    """A temperature of 0 for a model without one: the class does not do without the number."""
    scaling = spec.rope_scaling
    stated = {"rope_type": "default"} if scaling is None else {"rope_type": scaling.kind}
    return {
        "sliding_window": spec.sliding_window,
        "rope_parameters": {
            _TEMPERATURE: 0.0,
            _TRAINED_LENGTH: spec.max_seq_len,
            **stated,
            **(scaling.parameters if scaling is not None else {}),
            "rope_theta": spec.rope_theta,
        },
    }


def _exaone4(spec: ModelSpec) -> Fields:
    window = spec.sliding_window
    words = _words(spec)
    if window is None and spec.no_rope_layers:
        window = spec.max_seq_len  # nothing slides, and the class turns only what slides
        words = ["full_attention"] * spec.n_layers
    return {"sliding_window": window, "layer_types": words}


def _glm4(spec: ModelSpec) -> Fields:
    return {"partial_rotary_factor": spec.partial_rotary_factor}


def _granite(spec: ModelSpec) -> Fields:
    return {
        "mlp_bias": spec.mlp_bias,
        "attention_multiplier": spec.query_multiplier or spec.head_dim**-0.5,
        "embedding_multiplier": spec.embedding_multiplier,
        "residual_multiplier": spec.residual_multiplier,
        "logits_scaling": spec.logits_scaling,
    }


def _cohere(spec: ModelSpec) -> Fields:
    return {
        "layer_norm_eps": spec.norm_eps,
        "logit_scale": 1.0 / spec.logits_scaling,
        "use_qk_norm": spec.qk_norm_heads,
    }


OWN_FIELDS: Mapping[str, Callable[[ModelSpec], Fields]] = {
    "smollm3": _smollm3,
    "helium": _mlp_bias,
    "internlm3": _internlm3,
    "seed_oss": _seed_oss,
    "cwm": _cwm,
    "ministral3": _ministral3,
    "arcee": _mlp_bias,
    "exaone4": _exaone4,
    "glm4": _glm4,
    "granite": _granite,
    "cohere": _cohere,
}

_ATTENTION = ("attention_bias", ("qkv_bias", "o_bias"))
SWITCHES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "smollm3": _ATTENTION,
    "ernie4_5": ("use_bias", ("qkv_bias", "o_bias", "mlp_bias")),
    "helium": ("attention_bias", ("qkv_bias",)),
    "internlm3": ("attention_bias", ("qkv_bias", "o_bias", "mlp_bias")),
    "arcee": _ATTENTION,
    "glm4": ("attention_bias", ("qkv_bias",)),
    "granite": _ATTENTION,
    "cohere": _ATTENTION,
    "gemma": _ATTENTION,
}
"""The field that adds biases, and the features that come and go with it."""

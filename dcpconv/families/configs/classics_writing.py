"""Fields of config.json that only some of the older classes have, and what these cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from dcpconv.core.spec import ModelSpec
from dcpconv.families.configs.classics import CLASSICS
from dcpconv.families.configs.parameters import Refusal

Fields = dict[str, object]


_POSITIONS: Mapping[str, tuple[str, ...]] = {
    "gpt2": ("learned",),
    "bloom": ("alibi",),
    "falcon": ("rope", "alibi"),
}
"""What tells positions apart in a class, where it is not RoPE alone."""


def rules(model_type: str, spec: ModelSpec, name: str) -> Iterator[Refusal]:
    """What a class cannot hold of ``spec`` that is no feature.

    Args:
        model_type: Of transformers; any class that is not of this kind has no such rules.
        spec: The model.
        name: Of the class, for the reasons.
    """
    known = CLASSICS.get(model_type)
    if known is None:
        return
    has_groups = spec.n_kv_heads not in {1, spec.n_heads}
    if "num_key_value_heads" in known.silent and spec.n_kv_heads != spec.n_heads:
        reason = f"{spec.n_kv_heads} for {spec.n_heads} heads: {name} has as many of both"
        yield Refusal("n_kv_heads", reason)
    if "intermediate_size" in known.silent and spec.ffn_size != 4 * spec.hidden_size:
        reason = f"{name} has four times the hidden size {spec.hidden_size}"
        yield Refusal("ffn_size", f"{spec.ffn_size}: {reason}")
    tells = _POSITIONS.get(model_type, ("rope",))
    if spec.positions not in tells and "positions" in (known.expresses or ()):
        reason = f"{name} has {' or '.join(tells)} for positions"
        yield Refusal("positions", f"{spec.positions}: {reason}")
    if model_type == "gpt_neox" and spec.parallel_residual and not spec.parallel_norms:
        yield Refusal("parallel_residual", f"one norm for both: {name} has a norm for each")
    if model_type == "falcon" and has_groups and not spec.parallel_residual:
        reason = f"{name} has groups only where attention is beside feed-forward"
        yield Refusal("n_kv_heads", f"{spec.n_kv_heads} for {spec.n_heads} heads: {reason}")


def _phi(spec: ModelSpec) -> Fields:
    return {"partial_rotary_factor": spec.partial_rotary_factor, "qk_layernorm": spec.qk_norm}


def _starcoder2(spec: ModelSpec) -> Fields:
    return {"sliding_window": spec.sliding_window}


def _stablelm(spec: ModelSpec) -> Fields:
    return {
        "partial_rotary_factor": spec.partial_rotary_factor,
        "use_qkv_bias": spec.qkv_bias,
        "qk_layernorm": spec.qk_norm_heads,
        "use_parallel_residual": spec.parallel_residual,
    }


def _gpt_neox(spec: ModelSpec) -> Fields:
    return {
        "partial_rotary_factor": spec.partial_rotary_factor,
        "use_parallel_residual": spec.parallel_residual,
    }


def _gpt2(spec: ModelSpec) -> Fields:
    return {"scale_attn_weights": "query_multiplier" not in spec.features()}


def _falcon(spec: ModelSpec) -> Fields:
    """The first architecture where it can hold the model, as the published files of such models
    have it."""
    is_new = spec.parallel_norms or spec.n_kv_heads not in {1, spec.n_heads}
    return {
        "new_decoder_architecture": is_new,
        "num_ln_in_parallel_attn": (2 if spec.parallel_norms else 1) if is_new else None,
        "multi_query": spec.n_kv_heads == 1,
        "parallel_attn": spec.parallel_residual,
        "alibi": spec.positions == "alibi",
    }


OWN_FIELDS: Mapping[str, Callable[[ModelSpec], Fields]] = {
    "phi": _phi,
    "starcoder2": _starcoder2,
    "stablelm": _stablelm,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
    "falcon": _falcon,
}
"""Fields that only some classes have."""

SWITCHES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "starcoder2": ("use_bias", ("qkv_bias", "o_bias", "mlp_bias")),
    "gpt_neox": ("attention_bias", ("qkv_bias", "o_bias")),
    "falcon": ("bias", ("qkv_bias", "o_bias", "mlp_bias")),
}
"""The field that adds biases, and the features that come and go with it."""

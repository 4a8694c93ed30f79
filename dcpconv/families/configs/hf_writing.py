"""transformers' config.json, written in the spelling of versions 4 and 5 at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite, isnan

from dcpconv.core.dtypes import BY_LABEL, dtype_named
from dcpconv.core.errors import NotExpressibleError, SpecError
from dcpconv.core.record import Json
from dcpconv.core.spec import ModelSpec
from dcpconv.families.configs import classics_writing, gpt_oss, mixture_writing
from dcpconv.families.configs.experts import shared_width, strided, unfit
from dcpconv.families.configs.hf_fields import TEXT
from dcpconv.families.configs.llama_shaped_writing import OWN_FIELDS, SWITCHES
from dcpconv.families.configs.model_type import base_of, class_name, heads_of, label_fields
from dcpconv.families.configs.model_types import MODEL_TYPES, SAME_KEYS
from dcpconv.families.configs.parameters import Refusal, Wishes, turned_otherwise, unexpressed

_ATTENTION = ("attention_bias", ("qkv_bias", "o_bias"))
_SWITCHES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    **SWITCHES,
    **mixture_writing.SWITCHES,
    **classics_writing.SWITCHES,
    "llama": _ATTENTION,
    "qwen3": _ATTENTION,
    "qwen3_moe": _ATTENTION,
    "gemma2": _ATTENTION,
    "olmo2": _ATTENTION,
    "gpt_oss": _ATTENTION,
    "glm": ("attention_bias", ("qkv_bias",)),
    "ernie4_5_moe": ("use_bias", ("qkv_bias", "o_bias", "mlp_bias", "head_bias")),
}
"""The field that adds biases, and the features that come and go with it."""

_OWN_HEAD_DIM = frozenset(
    name for name, known in MODEL_TYPES.items() if "head_dim" not in known.silent
) - {"granitemoe", "granitemoeshared", "helium", "olmoe", "phi3"}
"""Classes that heed ``head_dim``; the others divide the hidden size by the heads."""

_ANY_HEADS = frozenset({"gpt_oss"})
"""Classes that do not ask that the heads divide the hidden size."""


def refusals(family: str, spec: ModelSpec) -> tuple[Refusal, ...]:
    """What a class cannot hold of ``spec``, and what it would miss.

    Args:
        family: ``hf-<model_type>``, or ``hf`` for the class that ``spec`` names.
        spec: The model.
    """
    model_type = _model_type(family, spec)
    known = MODEL_TYPES.get(model_type)
    if known is None or known.expresses is None:
        return (Refusal("architecture", f"{model_type}: no config.json is written for it"),)
    name = known.class_name
    if known.is_copied:
        if model_type in {spec.architecture, _nested_type(spec)}:
            return ()
        if spec.architecture not in known.takes or known.routing is None or spec.experts is None:
            return (Refusal("architecture", f"{spec.architecture}: {name} is another model"),)
        reasons = unfit(known.routing, spec.experts, name, spec.n_layers)
        expresses = known.expresses | heads_of(model_type)
        found = unexpressed(spec, expresses, name=name, requires=known.requires)
        return (*found, *(Refusal("experts", why) for why in reasons))
    features = spec.features()
    expresses = known.expresses | heads_of(model_type)
    requires = known.requires if spec.head == "lm" else known.requires - {"head_bias"}
    found = unexpressed(spec, expresses, name=name, requires=requires)
    switch, together = _switch(model_type, spec)
    if not features.keys() >= set(together):
        reason = f"{name} has one switch, {switch}, for {', '.join(together)}"
        found += [Refusal(f, f"{features[f]}: {reason}") for f in together if f in features]
    found += turned_otherwise(spec, model_type, name=name)
    found += classics_writing.rules(model_type, spec, name)
    scaling = spec.rope_scaling
    if model_type == "phi3" and scaling is not None and scaling.kind != "longrope":
        found.append(Refusal("rope_scaling", f"{scaling}: {name} knows longrope only"))
    if spec.hidden_size % spec.n_heads and model_type not in _ANY_HEADS:
        reason = f"{name} wants a divisor of the hidden size {spec.hidden_size}"
        found.append(Refusal("n_heads", f"{spec.n_heads}: {reason}"))
    elif model_type not in _OWN_HEAD_DIM and spec.head_dim * spec.n_heads != spec.hidden_size:
        reason = f"{name} divides the hidden size by the heads"
        found.append(Refusal("head_dim", f"{spec.head_dim}: {reason}"))
    if spec.experts is not None and known.routing is not None:
        reasons = unfit(known.routing, spec.experts, name, spec.n_layers)
        found += [Refusal("experts", why) for why in reasons]
    return tuple(found)


def base(family: str, spec: ModelSpec) -> str | None:
    """What stands before the base model where the class that is written says another thing than
    its table; ``None`` where it does not."""
    return base_of(_model_type(family, spec), spec.head)


def write(family: str, spec: ModelSpec, wishes: Wishes) -> dict[str, object]:
    """config.json for ``spec``, in the order it should be printed.

    RoPE and dtype are spelled both ways, since transformers 4 does not look at
    ``rope_parameters`` and silently falls back to theta 10000.  A token nobody named is written as
    null, because a field left out means the class's own default.

    Args:
        family: ``hf-<model_type>``, or ``hf`` for the class that ``spec`` names.
        spec: What to describe; features that do not fit are left out, see ``refusals``.
        wishes: The dtype, by default what ``spec`` says.

    Raises:
        NotExpressibleError: No config.json is written for this class.
    """
    model_type = _model_type(family, spec)
    known = MODEL_TYPES.get(model_type)
    if known is None or known.expresses is None:
        raise NotExpressibleError(
            f"no config.json is written for {model_type}",
            [("known", name) for name, known in MODEL_TYPES.items() if known.expresses is not None],
        )
    label = wishes.dtype or spec.dtype
    if known.is_copied:
        return _as_read(spec, model_type, label)
    fields: dict[str, object] = {
        "architectures": [class_name(known, spec.head)],
        "model_type": model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.ffn_size,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": spec.activation,
        "max_position_embeddings": spec.max_seq_len,
        "rms_norm_eps": spec.norm_eps,
        **_rope(spec),
        "tie_word_embeddings": spec.tied,
    }
    switch, together = _switch(model_type, spec)
    if switch:
        fields[switch] = spec.features().keys() >= set(together)
    fields |= _OWN_FIELDS.get(model_type, _nothing)(spec)
    fields |= mixture_writing.own_fields(model_type, spec)
    fields = known.written(fields)
    eos = spec.eos_token_id
    fields |= {
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": spec.pad_token_id,
    }
    if spec.bos_token_id is None and model_type == "cwm":
        del fields["bos_token_id"]  # the one class that takes no null
    if model_type == "mellum":  # takes what stands outside for what its kinds of layers have
        del fields["rope_theta"], fields["rope_scaling"]
    fields |= label_fields(spec.n_classes)
    if label is not None:
        name = _torch_name(label)
        fields |= {"dtype": name, "torch_dtype": name}
    if spec.architecture != model_type:
        return fields  # what is left over describes another class
    return fields | {key: spec.extra[key] for key in sorted(spec.extra)}


def _switch(model_type: str, spec: ModelSpec) -> tuple[str, tuple[str, ...]]:
    """The field that adds biases, or nothing, and the features that come and go with it in a class
    with this head."""
    switch, together = _SWITCHES.get(model_type, ("", ()))
    if spec.head == "lm":
        return switch, together
    return switch, tuple(feature for feature in together if feature != "head_bias")


def _nested_type(spec: ModelSpec) -> object:
    """The class of the language model alone, where a class has it beside a tower."""
    inner = spec.stated.get(TEXT)
    return inner.get("model_type") if isinstance(inner, Mapping) else None


def _as_read(spec: ModelSpec, model_type: str, label: str | None) -> dict[str, object]:
    """What was read, or the part of it that is of the language model, with the type of the tensors
    that are written."""
    left = ("_name_or_path", "transformers_version")
    fields: dict[str, object] = {k: _spelled(v) for k, v in spec.stated.items() if k not in left}
    inner = fields.get(TEXT)
    if spec.tied != fields.get("tie_word_embeddings", spec.tied):
        fields["tie_word_embeddings"] = spec.tied  # the tensors have said otherwise
    known = MODEL_TYPES[model_type]
    if model_type != spec.architecture:
        own: dict[str, object] = {
            "architectures": [class_name(known, spec.head)],
            "model_type": model_type,
            "tie_word_embeddings": spec.tied,
            **known.takes.get(spec.architecture, {}),
        }
        fields, inner = {**(inner if isinstance(inner, Mapping) else fields), **own}, None
        fields = {name: value for name, value in fields.items() if own.get(name, "") is not None}
    if label is not None:
        fields |= {"dtype": _torch_name(label), "torch_dtype": _torch_name(label)}
        if isinstance(inner, Mapping):
            fields[TEXT] = {**inner, "dtype": _torch_name(label)}
    return fields


def _spelled(value: Json) -> Json:
    """Numbers that JSON has none for, as transformers 5 writes them.

    Source: ``_encode_special_floats`` of ``configuration_utils.py``, transformers 5.23.0.
    """
    if isinstance(value, float) and not isfinite(value):
        return {"__float__": "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return [_spelled(one) for one in value] if isinstance(value, list) else value


def _model_type(family: str, spec: ModelSpec) -> str:
    """The class to write for: a model keeps its own where both name their tensors alike."""
    if not family.startswith("hf-"):
        return spec.architecture
    named = family.removeprefix("hf-")
    return spec.architecture if SAME_KEYS.get(spec.architecture) == named else named


def _nothing(spec: ModelSpec) -> dict[str, object]:
    del spec
    return {}


def _llama(spec: ModelSpec) -> dict[str, object]:
    return {"mlp_bias": spec.mlp_bias}


def _mistral(spec: ModelSpec) -> dict[str, object]:
    return {"sliding_window": spec.sliding_window}


def _qwen(spec: ModelSpec) -> dict[str, object]:
    window = spec.sliding_window
    kind = "full_attention" if window is None else "sliding_attention"
    types = spec.layer_types or (kind,) * spec.n_layers
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": next(
            (n for n, word in enumerate(types) if word != "full_attention"), spec.n_layers
        ),
        "layer_types": list(types),
    }


def _qwen3_moe(spec: ModelSpec) -> dict[str, object]:
    if spec.experts is None:
        return {}
    return {
        "use_sliding_window": spec.sliding_window is not None,
        "sliding_window": spec.sliding_window,
        "moe_intermediate_size": spec.experts.ffn_size,
        "num_experts": spec.experts.count,
        "num_local_experts": spec.experts.count,
        "num_experts_per_tok": spec.experts.per_token,
        "norm_topk_prob": spec.experts.norm_topk,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(spec.experts.dense_layers),
    }


def _mixtral(spec: ModelSpec) -> dict[str, object]:
    if spec.experts is None:
        return {}
    return {
        "intermediate_size": spec.experts.ffn_size,
        "sliding_window": spec.sliding_window,
        "num_local_experts": spec.experts.count,
        "num_experts_per_tok": spec.experts.per_token,
    }


def _phi3(spec: ModelSpec) -> dict[str, object]:
    name = "original_max_position_embeddings"
    fields: dict[str, object] = {
        "sliding_window": spec.sliding_window,
        "partial_rotary_factor": spec.partial_rotary_factor,
        name: spec.extra.get(name, spec.max_seq_len),
    }
    if spec.rope_scaling is None:
        return fields
    factors = dict(spec.rope_scaling.parameters)
    fields[name] = factors.pop(name, fields[name])
    if factors.keys() == {"long_factor", "short_factor"}:
        # transformers 4 takes three fields and no other.
        fields["rope_scaling"] = {"type": spec.rope_scaling.kind, **_sorted(factors)}
    return fields


def _gemma2(spec: ModelSpec) -> dict[str, object]:
    multiplier = spec.query_multiplier or spec.head_dim**-0.5
    scalar = multiplier**-2
    return {
        "hidden_activation": spec.activation,
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "attn_logit_softcapping": spec.attn_logit_softcap,
        "final_logit_softcapping": spec.final_logit_softcap,
        "sliding_window": spec.sliding_window,
        "layer_types": list(spec.layer_types or ("full_attention",) * spec.n_layers),
    }


def _glm(spec: ModelSpec) -> dict[str, object]:
    return {"partial_rotary_factor": spec.partial_rotary_factor}


def _ernie(spec: ModelSpec) -> dict[str, object]:
    experts = spec.experts
    if experts is None:
        return {}
    first, last, step = strided(experts, spec.n_layers) or (0, spec.n_layers - 1, 1)
    # Its shared experts are as wide as the routed ones, so their number follows from the width.
    return {
        "moe_intermediate_size": experts.ffn_size,
        "moe_k": experts.per_token,
        "moe_num_experts": experts.count,
        "moe_num_shared_experts": shared_width(experts) // experts.ffn_size,
        "moe_layer_start_index": first,
        "moe_layer_end_index": last,
        "moe_layer_interval": step,
    }


_OWN_FIELDS: Mapping[str, Callable[[ModelSpec], dict[str, object]]] = {
    **OWN_FIELDS,
    **classics_writing.OWN_FIELDS,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "qwen3_moe": _qwen3_moe,
    "phi3": _phi3,
    "gemma2": _gemma2,
    "glm": _glm,
    "gpt_oss": gpt_oss.own_fields,
    "ernie4_5_moe": _ernie,
}
"""Fields that only some classes have."""


def _rope(spec: ModelSpec) -> dict[str, object]:
    scaling: dict[str, object] | None = None
    if spec.rope_scaling is not None:
        scaling = {"rope_type": spec.rope_scaling.kind, **_sorted(spec.rope_scaling.parameters)}
    partial = spec.partial_rotary_factor
    return {
        "rope_theta": spec.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            **(scaling or {"rope_type": "default"}),
            "rope_theta": spec.rope_theta,
            **({"partial_rotary_factor": partial} if partial != 1.0 else {}),
        },
    }


def _sorted(fields: Mapping[str, Json]) -> dict[str, Json]:
    return {key: fields[key] for key in sorted(fields)}


def _torch_name(dtype: str) -> str:
    known = dtype_named(dtype)
    if known is None:
        raise SpecError("unknown dtype", [("found", dtype), ("expected", ", ".join(BY_LABEL))])
    return known.name

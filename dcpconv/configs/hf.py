"""transformers' config.json, read in the spelling of any version and written in both at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from dcpconv.configs.hf_fields import HfConfig
from dcpconv.configs.model_types import MODEL_TYPES
from dcpconv.configs.parameters import Refusal, checked
from dcpconv.dtypes import BY_LABEL, BY_NAME
from dcpconv.errors import NotExpressibleError, SpecError
from dcpconv.spec import Experts, ModelSpec, RopeScaling

FILE = "config.json"

EXPRESSES: Mapping[str, frozenset[str]] = {
    "llama": frozenset({"rope_scaling", "qkv_bias", "o_bias", "mlp_bias", "activation"}),
    "mistral": frozenset({"rope_scaling", "sliding_window", "activation"}),
}
"""Features that a class can hold, for every class we write."""

SAME_KEYS: Mapping[str, str] = {"mistral": "llama"}
"""Classes whose tensors are named as another class names them, so that one table serves both."""

_ROPE_OWN = ("rope_theta", "partial_rotary_factor", "rope_type", "type")
"""Fields of a RoPE mapping that ``ModelSpec`` holds itself."""

_NOT_CARRIED = ("_name_or_path", "transformers_version")
"""Where and by what the source was written: untrue of anything we write."""


def is_config(fields: Mapping[str, object]) -> bool:
    """Whether ``fields`` are those of a config.json."""
    return "model_type" in fields or "architectures" in fields


def read(fields: Mapping[str, object], file: Path) -> ModelSpec:
    """The model that a config.json describes, with the defaults of its class.

    Raises:
        SpecError: Facts list every field that is missing or does not fit.
    """
    fields = _with_defaults(fields)
    config = checked(HfConfig, fields, file)
    head_dim = config.head_dim
    if head_dim is None:
        if config.hidden_size % config.num_attention_heads:
            raise SpecError(
                "head_dim is not stated and does not follow",
                [
                    ("file", file),
                    ("field", f"hidden_size: {config.hidden_size}"),
                    ("field", f"num_attention_heads: {config.num_attention_heads}"),
                ],
            )
        head_dim = config.hidden_size // config.num_attention_heads
    window, layer_types = _windows(config)
    values: dict[str, object] = {
        "architecture": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": head_dim,
        "ffn_size": config.intermediate_size,
        "norm_eps": config.rms_norm_eps,
        "max_seq_len": config.max_position_embeddings,
        "tied": config.tie_word_embeddings,
        "dtype": _dtype(config),
        **_rope(config, file),
        "sliding_window": window,
        "layer_types": layer_types,
        "qkv_bias": config.attention_bias if config.qkv_bias is None else config.qkv_bias,
        "o_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "activation": _activation(config),
        "attn_logit_softcap": config.attn_logit_softcapping,
        "final_logit_softcap": config.final_logit_softcapping,
        "query_multiplier": _query_multiplier(config),
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": config.logits_scaling,
        "experts": _experts(config, file),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _ids(config.eos_token_id),
        "pad_token_id": config.pad_token_id,
        "extra": {k: v for k, v in (config.model_extra or {}).items() if k not in _NOT_CARRIED},
    }
    if config.model_type in {"gemma", "gemma2"}:
        values["embedding_multiplier"] = config.hidden_size**0.5
    known = MODEL_TYPES.get(config.model_type)
    return checked(ModelSpec, values | dict(known.implied if known else {}), file)


def refusals(model_type: str, spec: ModelSpec) -> tuple[Refusal, ...]:
    """What the class behind ``model_type`` cannot hold of ``spec``."""
    if model_type not in EXPRESSES:
        return (Refusal("architecture", f"{model_type}: no config.json is written for it"),)
    name = MODEL_TYPES[model_type].class_name
    found = [
        Refusal(feature, f"{value}: {name} has nothing for it")
        for feature, value in spec.features().items()
        if feature not in EXPRESSES[model_type]
    ]
    if model_type == "llama" and spec.qkv_bias != spec.o_bias:
        feature = "qkv_bias" if spec.qkv_bias else "o_bias"
        found.append(
            Refusal(feature, f"{spec.features()[feature]}: {name} has one switch for q, k, v and o")
        )
    if spec.hidden_size % spec.n_heads:
        found.append(
            Refusal(
                "n_heads",
                f"{spec.n_heads}: {name} wants a divisor of the hidden size {spec.hidden_size}",
            )
        )
    return tuple(found)


def write(
    spec: ModelSpec, *, model_type: str | None = None, dtype: str | None = None
) -> dict[str, object]:
    """config.json for ``spec``, in the order it should be printed.

    RoPE and dtype are spelled both ways, since transformers 4 does not look at
    ``rope_parameters`` and silently falls back to theta 10000.  A token nobody named is written as
    null, because a field left out means the class's own default.

    Args:
        spec: What to describe; features that do not fit are left out, see ``refusals``.
        model_type: The class to write for, by default the one ``spec`` came from.
        dtype: Label or torch name of the written tensors, by default what ``spec`` says.

    Raises:
        NotExpressibleError: No config.json is written for this class.
        SpecError: The vocabulary size is not known.
    """
    model_type = model_type or spec.architecture
    if model_type not in EXPRESSES:
        raise NotExpressibleError(
            f"no config.json is written for {model_type}",
            [("known", name) for name in EXPRESSES],
        )
    if spec.vocab_size is None:
        raise SpecError("vocab_size is not known", hint="take it from the embedding's shape")
    label = dtype or spec.dtype
    fields: dict[str, object] = {
        "architectures": [MODEL_TYPES[model_type].class_name],
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
        **_written_rope(spec),
        "tie_word_embeddings": spec.tied,
    }
    if model_type == "llama":
        fields |= {"attention_bias": spec.qkv_bias and spec.o_bias, "mlp_bias": spec.mlp_bias}
    if model_type == "mistral":
        fields["sliding_window"] = spec.sliding_window
    eos = spec.eos_token_id
    fields |= {
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": spec.pad_token_id,
    }
    if label is not None:
        name = _torch_name(label)
        fields |= {"dtype": name, "torch_dtype": name}
    return fields | {key: spec.extra[key] for key in sorted(spec.extra)}


def generation_config(spec: ModelSpec) -> dict[str, object]:
    """generation_config.json for ``spec``: the tokens that start, end and fill a sequence."""
    eos = spec.eos_token_id
    fields = {
        "_from_model_config": True,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": spec.pad_token_id,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _with_defaults(fields: Mapping[str, object]) -> dict[str, object]:
    model_type = fields.get("model_type")
    architectures = fields.get("architectures")
    if model_type is None and isinstance(architectures, list):
        # Early exports name only the class, and spell it LLaMAForCausalLM.
        classes = {known.class_name.lower(): name for name, known in MODEL_TYPES.items()}
        model_type = next(
            (classes[name] for c in architectures if (name := str(c).lower()) in classes), None
        )
    merged = dict(fields)
    if "max_sequence_length" in merged:  # what early exports call it
        merged.setdefault("max_position_embeddings", merged.pop("max_sequence_length"))
    if isinstance(model_type, str):
        merged["model_type"] = model_type
        known = MODEL_TYPES.get(model_type)
        for key, value in (known.defaults if known else {}).items():
            merged.setdefault(key, value)
    return merged


def _rope(config: HfConfig, file: Path) -> dict[str, object]:
    """Source: ``modeling_rope_utils.py`` of transformers 5.23.0, ``convert_rope_params_to_dict``:
    a filled ``rope_scaling`` beats ``rope_parameters``, and a field inside beats one outside."""
    stated: Mapping[str, object] = config.rope_scaling or config.rope_parameters or {}
    nested = {name: value for name, value in stated.items() if isinstance(value, dict)}
    if nested:
        # One mapping per layer type; the layers that see everything speak for the model.
        stated = nested.get("full_attention", next(iter(nested.values())))
    kind = stated.get("rope_type", stated.get("type", "default"))
    scaling = None
    if kind is not None and kind != "default":
        parameters = {key: value for key, value in stated.items() if key not in _ROPE_OWN}
        # "su" is what Phi-3 called longrope before transformers did.
        scaling = checked(
            RopeScaling,
            {"kind": "longrope" if kind == "su" else kind, "parameters": parameters},
            file,
        )
    partial = stated.get("partial_rotary_factor", config.partial_rotary_factor)
    theta = stated.get("rope_theta", config.rope_theta)
    return {
        "rope_theta": 10_000.0 if theta is None else theta,
        "partial_rotary_factor": 1.0 if partial is None else partial,
        "rope_scaling": scaling,
    }


def _written_rope(spec: ModelSpec) -> dict[str, object]:
    scaling: dict[str, object] | None = None
    if spec.rope_scaling is not None:
        scaling = {"rope_type": spec.rope_scaling.kind, **_sorted(spec.rope_scaling.parameters)}
    return {
        "rope_theta": spec.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            **(scaling or {"rope_type": "default"}),
            "rope_theta": spec.rope_theta,
        },
    }


def _sorted(fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {key: fields[key] for key in sorted(fields)}


def _windows(config: HfConfig) -> tuple[int | None, tuple[str, ...] | None]:
    """The window, and one word per layer where layers differ in it.

    Source: the ``__post_init__`` of each class in transformers 5.23.0.
    """
    window = (config.sliding_window or None) if config.use_sliding_window else None
    types = config.layer_types
    if types is None and window is not None:
        layers = range(config.num_hidden_layers)
        last = config.max_window_layers
        slides = None
        if config.model_type in {"qwen2", "qwen3"} and last is not None:
            slides = [layer >= last for layer in layers]
        elif config.model_type == "qwen2_moe" and last is not None:
            slides = [layer % 2 == 0 and layer < last for layer in layers]
        elif config.model_type == "gemma2":
            slides = [layer % 2 == 0 for layer in layers]
        if slides is not None:
            types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    if types is not None:
        if not any("sliding" in word for word in types):
            window = None
        if len(set(types)) == 1:
            types = None
    return window, None if types is None else tuple(types)


def _experts(config: HfConfig, file: Path) -> Experts | None:
    if not config.num_experts:
        return None
    width = config.moe_intermediate_size or config.intermediate_size
    shared, shared_width = config.n_shared_experts or 0, config.shared_expert_intermediate_size
    if shared_width and not shared:
        shared = 1
    return checked(
        Experts,
        {
            "count": config.num_experts,
            "per_token": config.num_experts_per_tok,
            "ffn_size": width,
            "shared_count": shared,
            "shared_ffn_size": (shared_width or width) if shared else None,
            "norm_topk": config.norm_topk_prob,
            "first_dense_layers": config.first_dense_layers,
        },
        file,
    )


def _query_multiplier(config: HfConfig) -> float | None:
    if config.query_pre_attn_scalar is not None:
        return float(config.query_pre_attn_scalar**-0.5)
    return config.attention_multiplier


def _activation(config: HfConfig) -> str:
    name = config.hidden_activation or config.hidden_act
    if config.model_type == "gemma" and name == "gelu":
        # Gemma's first files say gelu and mean the tanh form; transformers reads them so.
        return "gelu_pytorch_tanh"
    return "silu" if name == "swish" else name


def _dtype(config: HfConfig) -> str | None:
    stated = config.dtype or config.torch_dtype
    return None if stated == "auto" else stated


def _ids(value: int | list[int] | None) -> int | tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) else value


def _torch_name(dtype: str) -> str:
    known = BY_LABEL.get(dtype) or BY_NAME.get(dtype.removeprefix("torch."))
    if known is None:
        raise SpecError("unknown dtype", [("found", dtype), ("expected", ", ".join(BY_LABEL))])
    return known.name

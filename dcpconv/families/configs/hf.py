"""transformers' config.json, read in the spelling of any version."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from dcpconv.core.errors import SpecError
from dcpconv.core.record import slots_of
from dcpconv.core.spec import Experts, LatentAttention, ModelSpec, RopeScaling
from dcpconv.families.configs.fields import unaccounted
from dcpconv.families.configs.hf_fields import TEXT, HfConfig, nested_text
from dcpconv.families.configs.model_type import ModelType, classes_of, head_of
from dcpconv.families.configs.model_types import MODEL_TYPES, MODULES, SAME_KEYS
from dcpconv.families.configs.parameters import checked

_TRAINED_LENGTH = "original_max_position_embeddings"
_PHI3_TRAINED_LENGTH = 4096
"""Source: ``configuration_phi3.py`` of transformers 5.23.0."""

_ROPE_OWN = ("rope_theta", "partial_rotary_factor", "rope_type", "type")
"""Fields of a RoPE mapping that ``ModelSpec`` holds itself."""

_TEMPERATURE = "llama_4_scaling_beta"
"""Grows with the position; 0 for none.  Source: ``modeling_ministral3.py``, same version."""

_READERS: Mapping[str, str] = {
    "llama_shaped": "llama_shaped_reading",
    "mixtures": "mixture_reading",
    "classics": "classics_reading",
    "hybrids": "hybrid_reading",
    "by_kind": "by_kind_reading",
    "state_spaces": "state_space_reading",
    "gpt_oss": "gpt_oss",
    "muse_glimmer": "muse_glimmer",
}
"""Class, or the module that knows it -> the one that reads what only they say; it has
``own_names``, ``own_values`` and ``layer_words``."""

_BY_KIND = frozenset({"gemma3_text", "gemma4_text", "laguna", "mimo_v2_flash"})
"""Classes that are written as they are read and whose layers of two kinds turn otherwise."""

_OTHERWISE = {"kimi_k2": "deepseek_v3"}
"""What the code beside a published file calls a class that transformers has.

Source: moonshotai/Kimi-K2-Instruct ``config.json``, whose ``architectures`` name that class."""

_NOT_CARRIED = ("_name_or_path", "transformers_version")
"""Where and by what the source was written: untrue of anything we write."""


def read(fields: Mapping[str, object], file: Path) -> ModelSpec:
    """The model that a config.json describes, with the defaults of its class.

    Raises:
        SpecError: Facts list every field that is missing or does not fit.
    """
    fields = _with_defaults(fields)
    text = nested_text(fields, _language(fields))
    known = MODEL_TYPES.get(str(text.get("model_type")))
    seen = known.stands_in(text) if known and known.stands_in else text
    config = checked(HfConfig, seen, file)
    model_type = str(fields.get("model_type") or config.model_type)
    outer = MODEL_TYPES.get(model_type)
    unheeded = tuple(_unheeded(text, known))
    config = config.model_copy(update=dict(known.assumes) if known else {})
    head_dim = config.qk_rope_head_dim if config.kv_lora_rank else config.head_dim
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
    window, layer_types = _windows(config, file)
    own = _own_reader(config.model_type)
    values: dict[str, object] = {
        "architecture": model_type,
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
        **_biases(config),
        "activation": _activation(config),
        "attn_logit_softcap": config.attn_logit_softcapping,
        "final_logit_softcap": config.final_logit_softcapping,
        "query_multiplier": _query_multiplier(config),
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": config.logits_scaling,
        "experts": _experts(config, outer if outer and outer.routing else known, file),
        "latent": _latent(config, file),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _ids(config.eos_token_id),
        "pad_token_id": config.pad_token_id,
        "head": (head := head_of(config.architectures or (), known, outer)),
        "n_classes": classes_of(fields) if head.startswith("score") else None,
        "origin": "hf-" + SAME_KEYS.get(model_type, model_type),
        "unaccounted": (
            *unaccounted(
                config.model_extra or {},
                used=_spellings() | (own.own_names(config) if own else frozenset()),
                harmless_if=known.allows if known else None,
            ),
            *_rope_strangers(config, is_by_kind=config.model_type in _BY_KIND),
            *unheeded,
        ),
        "extra": {k: v for k, v in (config.model_extra or {}).items() if k not in _NOT_CARRIED},
        "stated": fields,
    }
    if config.model_type in {"gemma", "gemma2", "gemma3_text"}:
        values["embedding_multiplier"] = config.hidden_size**0.5
    values |= own.own_values(config, file) if own else {}
    return checked(ModelSpec, values | dict(known.implied if known else {}), file)


def _experts(config: HfConfig, known: ModelType | None, file: Path) -> Experts | None:
    if not config.num_experts:
        return None
    from dcpconv.families.configs.experts import read_experts  # noqa: PLC0415 - most have none

    return read_experts(config, known, file)


def _language(fields: Mapping[str, object]) -> object:
    """The class whose language model a file describes: its own, or the one beside a tower."""
    model_type, inner = fields.get("model_type"), fields.get(TEXT)
    known = MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    if known is None or known.language is None:
        return model_type
    stated = inner.get("model_type") if isinstance(inner, Mapping) else None
    return known.language or stated


def _own_reader(model_type: str) -> Any:
    """The module that reads what only this class says, or ``None``."""
    module = _READERS.get(MODULES.get(model_type, model_type))
    return None if module is None else import_module(f"dcpconv.families.configs.{module}")


def _unheeded(fields: Mapping[str, object], known: ModelType | None) -> Iterator[str]:
    """Fields that the class does not look at and that say something else than it does."""
    slots = slots_of(HfConfig)
    for slot, value in (known.assumes if known else {}).items():
        name = next((name for name in slots[slot].names if name in fields), "")
        if name and (fields[name] or None) != (value or None):
            yield f"{name}: {fields[name]!r}"


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
        model_type = merged["model_type"] = _OTHERWISE.get(model_type, model_type)
        known = MODEL_TYPES.get(str(_language(merged)))
        inner = merged.get(TEXT)
        holder = merged if not isinstance(inner, Mapping) else dict(inner)
        own = MODEL_TYPES.get(model_type)
        defaults = {**(known.defaults if known else {}), **(own.defaults if own else {})}
        for key, value in defaults.items():
            holder.setdefault(key, value)
        if known and known.routing and known.routing.dense == "none":
            # No layer has a plain block whose width it could be.
            holder.setdefault("intermediate_size", holder.get("moe_intermediate_size"))
        if known and known.completes:
            holder = dict(known.completes(holder))
        if known is not None:
            holder = known.read(holder)
        merged = {**merged, TEXT: holder} if isinstance(inner, Mapping) else holder
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
    kind = "default" if kind == "mrope" else kind  # all its dimensions are alike for text
    scaling = None
    if (kind is not None and kind != "default") or stated.get(_TEMPERATURE):
        parameters = {key: value for key, value in stated.items() if key not in _ROPE_OWN}
        if config.model_type == "phi3":
            # Its class knows one kind, which it once called otherwise, and the first length is
            # stated outside.
            kind = "longrope" if kind in {"su", "yarn"} else kind
            trained = (config.model_extra or {}).get(_TRAINED_LENGTH, _PHI3_TRAINED_LENGTH)
            parameters[_TRAINED_LENGTH] = trained
        scaling = checked(RopeScaling, {"kind": kind or "default", "parameters": parameters}, file)
    partial = stated.get("partial_rotary_factor", config.partial_rotary_factor)
    theta = stated.get("rope_theta", config.rope_theta)
    return {
        "rope_theta": 10_000.0 if theta is None else theta,
        "partial_rotary_factor": 1.0 if partial is None else partial,
        "rope_scaling": scaling,
    }


def _spellings() -> frozenset[str]:
    """Every name of a field that is used: a file may hold several, of which the first counts."""
    return frozenset(name for slot in slots_of(HfConfig).values() for name in slot.names)


_ROPE_KNOWN = frozenset(
    {
        *_ROPE_OWN,
        *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        *("low_freq_factor", "high_freq_factor", "long_factor", "short_factor", "truncate"),
        *(_TRAINED_LENGTH, "finetuned"),
        *("mrope_section", "mrope_interleaved"),  # all alike for text
    }
)
"""Source: ``modeling_rope_utils.py`` of transformers 5.23.0; what else stands there is a class's
own, such as the temperature ``llama_4_scaling_beta``."""


def _rope_strangers(config: HfConfig, *, is_by_kind: bool) -> Iterator[str]:
    """What a RoPE mapping says beyond ``RopeScaling``.

    Args:
        config: What every class says.
        is_by_kind: Whether layers of two kinds turn otherwise, and only models of the class may.
    """
    stated: Mapping[str, object] = config.rope_scaling or config.rope_parameters or {}
    nested = [value for value in stated.values() if isinstance(value, dict)]
    if any(value != nested[0] for value in nested) and not is_by_kind:
        yield "rope_parameters: another one per layer type"
    for name, value in (nested[0] if nested else stated).items():
        if name not in _ROPE_KNOWN and value is not None and (name != _TEMPERATURE or value):
            yield f"rope_parameters.{name}: {value!r}"


def _biases(config: HfConfig) -> dict[str, object]:
    """Which projections have biases.

    A class does not look at the switches of another, which may stand in its file all the same.

    Source: the ``nn.Linear`` calls of each class in transformers 5.23.0.
    """
    everywhere = bool(config.use_bias)
    attention = everywhere or config.attention_bias
    stated = {
        "qkv_bias": attention if config.qkv_bias is None else config.qkv_bias,
        "o_bias": attention,
        "mlp_bias": everywhere or config.mlp_bias,
        "head_bias": everywhere,
    }
    known = MODEL_TYPES.get(config.model_type)
    if known is None or known.expresses is None:
        return dict(stated)
    return {name: has and name in known.expresses for name, has in stated.items()}


def _windows(config: HfConfig, file: Path) -> tuple[int | None, tuple[str, ...] | None]:
    """The window, and one word per layer where layers differ in it.

    Source: the ``__post_init__`` of each class in transformers 5.23.0.
    """
    window = (config.sliding_window or None) if config.use_sliding_window else None
    types = config.layer_types
    if types is None and window is not None:
        layers = range(config.num_hidden_layers)
        last = config.max_window_layers
        slides = None
        if config.model_type in {"qwen2", "qwen3", "dots1"} and last is not None:
            slides = [layer >= last for layer in layers]
        elif config.model_type == "qwen2_moe" and last is not None:
            slides = [layer % 2 == 0 and layer < last for layer in layers]
        elif config.model_type == "gemma2":
            slides = [layer % 2 == 0 for layer in layers]
        if slides is not None:
            types = ["sliding_attention" if slide else "full_attention" for slide in slides]
        elif (own := _own_reader(config.model_type)) is not None:
            types = own.layer_words(config, file)
    if types is not None:
        if not any("sliding" in word for word in types):
            window = None
        if len(set(types)) == 1:
            types = None
    return window, None if types is None else tuple(types)


def _latent(config: HfConfig, file: Path) -> LatentAttention | None:
    if config.kv_lora_rank is None:
        return None
    return checked(
        LatentAttention,
        {
            "q_rank": config.q_lora_rank,
            "kv_rank": config.kv_lora_rank,
            "nope_dim": config.qk_nope_head_dim,
            "value_dim": config.v_head_dim,
            "bias": config.attention_bias,
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

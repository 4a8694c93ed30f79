"""The params.json of Meta's Llama 4 releases, read by way of what transformers calls the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from dcpconv.core.record import Json, Record, field
from dcpconv.core.spec import Count, ModelSpec, Positive, RopeScaling, Size
from dcpconv.families.configs import hf, meta_llama4_tower
from dcpconv.families.configs.ffn import ffn_width
from dcpconv.families.configs.fields import unaccounted
from dcpconv.families.configs.hf_fields import nested_text
from dcpconv.families.configs.meta import LENGTH
from dcpconv.families.configs.parameters import Refusal, Wishes, checked, unexpressed

_NAME = "Meta's Llama 4"
_PARTS = frozenset({"experts", "scaled_inputs"})
_EXPRESSES = _PARTS | {
    *("no_rope_layers", "layer_types", "chunked_attention", "qk_norm_plain", "temperature"),
    "rope_scaling",
}
_SCALING: Mapping[str, object] = {
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
"""What Meta's code fixes.  Source: ``apply_scaling`` in llama-models 0.3.0 ``llama4/model.py``."""

_TRAINED_LENGTH = 262_144
"""Tokens; the file does not say.  Source: ``max_context_length`` of transformers' conversion script
``convert_llama4_weights_to_hf.py`` for base models."""

_HARMLESS = ("max_batch_size", "model_parallel_size", "dcpconv")


class _Experts(Record, extra="allow"):
    num_experts: Count
    capacity_factor: Annotated[float, field(gt=-1)] = 1.0
    auto_scale_F: bool = True  # noqa: N815 - as the file spells it
    top_k: Count = 1
    interleave_moe_layer_step: Count = 1


class _Params(Record, extra="allow"):
    dim: Size
    n_layers: Count
    n_heads: Count
    n_kv_heads: Count | None = None
    head_dim: Size | None = None
    vocab_size: Size
    multiple_of: Size = 256
    ffn_dim_multiplier: Positive | None = None
    ffn_exp: Positive | None = None
    norm_eps: Positive = 1e-5
    attention_chunk_size: Size | None = None
    rope_theta: Positive = 500_000.0
    use_scaled_rope: bool = False
    rope_scaling_factor: Positive | None = None
    rope_high_freq_factor: Positive | None = None
    nope_layer_interval: Count | None = None
    use_qk_norm: bool = False
    attn_temperature_tuning: bool = False
    floor_scale: Size = 8192
    attn_scale: Positive = 0.1
    max_seq_len: Size = field(default=_TRAINED_LENGTH, names=("max_seq_len", LENGTH))
    moe_args: dict[str, Json] | None = None
    vision_args: dict[str, Json] | None = None


class _Routed(_Params, extra="allow"):
    """With experts, whose width follows from numbers that Meta's code then needs."""

    ffn_dim_multiplier: Positive
    ffn_exp: Positive
    moe_args: dict[str, Json]


_DENSE: Mapping[str, object] = {
    "num_local_experts": 0,
    "moe_layers": [],
    "interleave_moe_layer_step": 0,
}
"""How config.json says that no layer has experts.  Source: transformers'
``convert_llama4_weights_to_hf.py``."""


def read(fields: Mapping[str, object], file: Path) -> ModelSpec:
    """The model that a params.json describes: a language model, and the tower beside it.

    Its fields may lie in ``model``.

    Raises:
        SpecError: Facts list every field that does not fit.

    Source: ``write_model`` in transformers' ``convert_llama4_weights_to_hf.py``.
    """
    inner = fields.get("model")
    fields = inner if isinstance(inner, Mapping) else fields
    params = checked(_Params if fields.get("moe_args") is None else _Routed, fields, file)
    stated = _as_hf(params)
    strangers = dict(params.model_extra or {})
    if isinstance(params, _Routed):
        routed = checked(_Experts, params.moe_args, file)
        stated |= _experts(params, routed)
        strangers |= routed.model_extra or {}
    else:
        stated |= _DENSE
    of_tower: tuple[str, ...] = ()
    if params.vision_args is not None:
        stated, of_tower = meta_llama4_tower.beside(stated, params.vision_args, file)
    spec = hf.read(stated, file)
    return spec.model_copy(
        update={
            "origin": "meta-llama4",
            "unaccounted": (*unaccounted(strangers, harmless=_HARMLESS), *of_tower),
        }
    )


def _as_hf(params: _Params) -> dict[str, object]:
    """Of a model without experts.  Source: ``ModelArgs`` and ``TransformerBlock`` of llama-models
    0.3.0."""
    layers = range(params.n_layers)
    interval = params.nope_layer_interval
    turned = [int(interval is None or (layer + 1) % interval != 0) for layer in layers]
    words = {1: "chunked_attention" if params.attention_chunk_size else "full_attention"}
    width = ffn_width(params.dim, params.multiple_of, params.ffn_dim_multiplier)
    fields: dict[str, object] = {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "vocab_size": params.vocab_size,
        "hidden_size": params.dim,
        "intermediate_size": width,
        "intermediate_size_mlp": width,
        "num_hidden_layers": params.n_layers,
        "num_attention_heads": params.n_heads,
        "num_key_value_heads": params.n_kv_heads or params.n_heads,
        "head_dim": max(1, params.dim // params.n_heads),
        "hidden_act": "silu",
        "max_position_embeddings": params.max_seq_len,
        "rms_norm_eps": params.norm_eps,
        "rope_theta": params.rope_theta,
        "tie_word_embeddings": False,
        "no_rope_layers": turned,
        "layer_types": [words.get(turns, "full_attention") for turns in turned],
        "use_qk_norm": params.use_qk_norm,
        # Its class wants a number also where no layer's word asks for chunks.
        "attention_chunk_size": params.attention_chunk_size or 8192,
        "attn_temperature_tuning": params.attn_temperature_tuning,
        "floor_scale": params.floor_scale,
        "attn_scale": params.attn_scale,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": params.rope_theta}
    if params.use_scaled_rope:
        rope |= {
            "rope_type": "llama3",
            "factor": params.rope_scaling_factor or 16.0,
            "high_freq_factor": params.rope_high_freq_factor or 1.0,
            **_SCALING,
        }
    return {**fields, "rope_parameters": rope}


def _experts(params: _Routed, routed: _Experts) -> dict[str, object]:
    """What layers with experts add.  Source: ``MoE.__init__``, same package."""
    width = int(2 * int(params.ffn_exp * params.dim) / 3)
    width = int(params.ffn_dim_multiplier * width)
    if routed.auto_scale_F:
        width = int(width / (routed.capacity_factor + 1))
    return {
        "intermediate_size": width + -width % params.multiple_of,
        "num_local_experts": routed.num_experts,
        "num_experts_per_tok": routed.top_k,
        "interleave_moe_layer_step": routed.interleave_moe_layer_step,
    }


def refusals(family: str, spec: ModelSpec) -> tuple[Refusal, ...]:
    """What Meta's code cannot hold of ``spec``."""
    del family
    experts, layers = spec.experts, range(spec.n_layers)
    requires = _PARTS if experts is not None else frozenset[str]()
    found = unexpressed(spec, _EXPRESSES, name=_NAME, requires=requires)
    if experts is not None:
        sparse = [layer for layer in layers if layer not in experts.dense_layers]
        if _interval(sparse, spec.n_layers) is None:
            found.append(Refusal("experts", f"in layers {_shown(sparse)}: {_NAME} has a stride"))
    if spec.no_rope_layers and _interval(spec.no_rope_layers, spec.n_layers) is None:
        why = f"{_shown(spec.no_rope_layers)}: {_NAME} has a stride"
        found.append(Refusal("no_rope_layers", why))
    words = spec.layer_types or ()
    wanted = {layer for layer, word in enumerate(words) if word == "full_attention"}
    if "chunked_attention" in spec.special and wanted != set(spec.no_rope_layers):
        why = f"in others than those with RoPE: {_NAME} has it where RoPE turns"
        found.append(Refusal("chunked_attention", why))
    if spec.rope_scaling is not None and not _is_scaled_as_meta(spec.rope_scaling):
        reason = f"{_NAME} stretches as Llama 3.1 does"
        found.append(Refusal("rope_scaling", f"{spec.rope_scaling}: {reason}"))
    if spec.head_dim * spec.n_heads != spec.hidden_size:
        found.append(
            Refusal("head_dim", f"{spec.head_dim}: {_NAME} divides dim by the heads"),
        )
    if spec.tied:
        found.append(Refusal("tied", f"head and embedding: {_NAME} has two tensors"))
    return (*found, *meta_llama4_tower.refusals(spec.stated))


def write(family: str, spec: ModelSpec, wishes: Wishes) -> dict[str, object]:
    """params.json for ``spec``, as Meta's reference code reads it."""
    del family, wishes
    stated = nested_text(spec.stated, None)
    experts, unturned = spec.experts, spec.no_rope_layers
    fields: dict[str, object] = {
        "dim": spec.hidden_size,
        "n_layers": spec.n_layers,
        "n_heads": spec.n_heads,
        "n_kv_heads": spec.n_kv_heads,
        "vocab_size": spec.vocab_size,
        "multiple_of": 1,
        # Without rounding, the multiplier alone gives the width of plain blocks.
        "ffn_dim_multiplier": (spec.ffn_size + 0.5) / ffn_width(spec.hidden_size, 1, None),
        "ffn_exp": 4.0,
        "norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "use_scaled_rope": spec.rope_scaling is not None,
        "nope_layer_interval": _interval(unturned, spec.n_layers) if unturned else None,
        "use_qk_norm": "qk_norm_plain" in spec.special,
        "attention_chunk_size": (
            stated.get("attention_chunk_size") if "chunked_attention" in spec.special else None
        ),
        "attn_temperature_tuning": "temperature" in spec.special,
        LENGTH: spec.max_seq_len,
    }
    fields |= {name: stated[name] for name in ("floor_scale", "attn_scale") if name in stated}
    if experts is not None:
        sparse = [n for n in range(spec.n_layers) if n not in experts.dense_layers]
        fields["moe_args"] = {
            "num_experts": experts.count,
            # The width of a plain block over this and one is the width of an expert.
            "capacity_factor": spec.ffn_size / (experts.ffn_size + 0.5) - 1.0,
            "auto_scale_F": True,
            "top_k": experts.per_token,
            "interleave_moe_layer_step": _interval(sparse, spec.n_layers),
        }
    if spec.rope_scaling is not None:
        fields["rope_scaling_factor"] = spec.rope_scaling.parameters.get("factor")
        fields["rope_high_freq_factor"] = spec.rope_scaling.parameters.get("high_freq_factor")
    vision = meta_llama4_tower.write(spec.stated)
    return fields if vision is None else {**fields, "vision_args": vision}


def _interval(layers: Sequence[int], count: int) -> int | None:
    """The step such that these are every so many layers, counted from 1; ``None`` for none."""
    step = layers[0] + 1 if layers else 0
    return step if step and list(layers) == list(range(step - 1, count, step)) else None


def _shown(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "") or "none"


def _is_scaled_as_meta(scaling: RopeScaling) -> bool:
    free = ("factor", "high_freq_factor")
    fixed = {name: value for name, value in scaling.parameters.items() if name not in free}
    return scaling.kind == "llama3" and fixed == _SCALING

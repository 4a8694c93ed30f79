"""What only some classes with experts say in their config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dcpconv.core.errors import SpecError
from dcpconv.families.configs.experts import BY_LAYER, has_llama4
from dcpconv.families.configs.hf_fields import HfConfig
from dcpconv.families.configs.llama_shaped_reading import layer_words as shaped_words
from dcpconv.families.configs.llama_shaped_reading import unturned_layers

Values = Mapping[str, object]


def own_values(config: HfConfig, file: Path) -> Values:
    """``ModelSpec`` fields that a class states in a way of its own.

    Args:
        config: What every class says.
        file: For errors.
    """
    read = _OWN.get(config.model_type)
    return {} if read is None else read(config, file)


def own_names(config: HfConfig) -> frozenset[str]:
    """Fields that are looked at, which other classes do not have."""
    model_type = config.model_type
    names = _NAMES.get(model_type, frozenset())
    if model_type == "minimax_m2" and set(_stated(config, "attn_type_list") or ()) <= {1}:
        names |= {"attn_type_list"}  # the earlier MiniMax has 0 for layers of another kind
    return names | {"mlp_layer_types"} if model_type in BY_LAYER else names


def layer_words(config: HfConfig, file: Path) -> list[str] | None:
    """One word per layer, where the class makes them up from other fields.

    Args:
        config: Of a class that has a window and does not state ``layer_types``.
        file: For errors.
    """
    if config.model_type != "afmoe":
        return shaped_words(config, file)
    period = _stated(config, "global_attn_every_n_layers")
    if not isinstance(period, int) or period < 1:
        raise SpecError(
            "layer_types are not stated and do not follow",
            [("file", file), ("field", f"global_attn_every_n_layers: {period!r}")],
        )
    slides = ((layer + 1) % period != 0 for layer in range(config.num_hidden_layers))
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _exaone(config: HfConfig, file: Path) -> Values:
    return {"no_rope_layers": unturned_layers(config, file)}


def _glm4(config: HfConfig, file: Path) -> Values:
    del file
    return {"qk_norm": bool(_stated(config, "use_qk_norm"))}


def _minimax(config: HfConfig, file: Path) -> Values:
    """Source: ``MiniMaxM2Config.convert_rope_params_to_dict`` of transformers 5.23.0."""
    del file
    turned, stated = _stated(config, "rotary_dim"), config.rope_parameters or {}
    says = stated.get("partial_rotary_factor", config.partial_rotary_factor)
    if says is not None or not isinstance(turned, int) or not config.head_dim:
        return {}
    return {"partial_rotary_factor": turned / config.head_dim}


def _indexed(config: HfConfig, file: Path) -> Values:
    del file
    best, heads = _stated(config, "index_topk"), _stated(config, "index_n_heads")
    return {"special": {"indexer": f"the {best} tokens that {heads} heads beside attention choose"}}


def _afmoe(config: HfConfig, file: Path) -> Values:
    """Source: ``AfmoeAttention`` and ``AfmoeModel.forward`` of transformers 5.23.0: the layers that
    see everything do not turn."""
    words = config.layer_types or layer_words(config, file) or []
    multiplier = config.hidden_size**0.5 if _stated(config, "mup_enabled") else 1.0
    return {
        "no_rope_layers": _others(words, "sliding_attention"),
        "embedding_multiplier": multiplier,
    }


def _llama4(config: HfConfig, file: Path) -> Values:
    """Source: ``Llama4TextConfig.__post_init__``, ``Llama4TextAttention`` and ``Llama4TextMoe``."""
    del file
    count, turns = config.num_hidden_layers, _stated(config, "no_rope_layers")
    if not turns:
        step = _stated(config, "no_rope_layer_interval")
        turns = [(layer + 1) % step for layer in range(count)] if isinstance(step, int) else []
    unturned = tuple(layer for layer in range(count) if layer < len(turns) and not turns[layer])
    words = config.layer_types or [
        "full_attention" if layer in unturned else "chunked_attention" for layer in range(count)
    ]
    chunk = _stated(config, "attention_chunk_size")
    has_experts = bool(config.num_experts) and any(has_llama4(config, n) for n in range(count))
    special = {}
    if has_experts:
        special["scaled_inputs"] = "tokens are weighed before experts see them"
    if "chunked_attention" in words and isinstance(chunk, int):
        special["chunked_attention"] = f"{chunk} tokens see each other"
    if _stated(config, "use_qk_norm") and len(unturned) < count:
        special["qk_norm_plain"] = "on q and k behind RoPE, without weights"
    if _stated(config, "attn_temperature_tuning") and unturned:
        special["temperature"] = f"grows with the position, by {_stated(config, 'attn_scale')}"
    return {
        "no_rope_layers": unturned,
        "layer_types": tuple(words) if len(set(words)) > 1 else None,
        "ffn_size": _stated(config, "intermediate_size_mlp"),
        "special": special,
        **({} if has_experts else {"experts": None}),
    }


def _phimoe(config: HfConfig, file: Path) -> Values:
    del file
    return {"head_bias": bool(_stated(config, "lm_head_bias"))}


def _others(words: Sequence[str], word: str) -> tuple[int, ...]:
    return tuple(layer for layer, one in enumerate(words) if one != word)


_OWN: Mapping[str, Callable[[HfConfig, Path], Values]] = {
    "afmoe": _afmoe,
    "deepseek_v32": _indexed,
    "exaone_moe": _exaone,
    "glm_moe_dsa": _indexed,
    "llama4_text": _llama4,
    "glm4_moe": _glm4,
    "minimax_m2": _minimax,
    "phimoe": _phimoe,
}
_INDEX = frozenset({"index_topk", "index_n_heads", "index_head_dim"})
_NAMES: Mapping[str, frozenset[str]] = {
    "afmoe": frozenset({"mup_enabled", "global_attn_every_n_layers"}),
    "deepseek_v32": _INDEX,
    "glm_moe_dsa": _INDEX
    | {"indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"},
    "llama4_text": frozenset(
        {
            *("moe_layers", "interleave_moe_layer_step", "intermediate_size_mlp", "use_qk_norm"),
            *("no_rope_layers", "no_rope_layer_interval", "attention_chunk_size"),
            *("attn_temperature_tuning", "floor_scale", "attn_scale"),
        }
    ),
    "deepseek_v2": frozenset({"topk_method"}),
    "exaone_moe": frozenset({"sliding_window_pattern"}),
    "glm4_moe": frozenset({"use_qk_norm"}),
    "minimax_m2": frozenset({"rotary_dim", "mlp_intermediate_size"}),
    "phimoe": frozenset({"lm_head_bias", "input_jitter_noise"}),
}


def _stated(config: HfConfig, name: str) -> Any:
    return (config.model_extra or {}).get(name)

"""What only some classes with experts say in their config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dcpconv.families.configs.experts import BY_LAYER
from dcpconv.families.configs.hf_fields import HfConfig
from dcpconv.families.configs.llama_shaped_reading import layer_words, unturned_layers

__all__ = ["layer_words", "own_names", "own_values"]

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


_OWN: Mapping[str, Callable[[HfConfig, Path], Values]] = {
    "exaone_moe": _exaone,
    "glm4_moe": _glm4,
    "minimax_m2": _minimax,
}
_NAMES: Mapping[str, frozenset[str]] = {
    "deepseek_v2": frozenset({"topk_method"}),
    "exaone_moe": frozenset({"sliding_window_pattern"}),
    "glm4_moe": frozenset({"use_qk_norm"}),
    "minimax_m2": frozenset({"rotary_dim", "mlp_intermediate_size"}),
}


def _stated(config: HfConfig, name: str) -> Any:
    return (config.model_extra or {}).get(name)

"""What classes with sizes per kind of layer say in their config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dcpconv.families.configs.hf_fields import HfConfig

Values = Mapping[str, object]


def own_values(config: HfConfig, file: Path) -> Values:
    """``ModelSpec`` fields that a class states in a way of its own.

    Args:
        config: What every class says.
        file: For errors.
    """
    del file
    return _OWN[config.model_type](config)


def own_names(config: HfConfig) -> frozenset[str]:
    """Fields that are looked at, which other classes do not have; the tables look at others."""
    return _GEMMA4 if _is_by_kind(config) else _GEMMA4 - {"per_layer_config"}


def layer_words(config: HfConfig, file: Path) -> list[str] | None:
    """One word per layer: every class has them made up before."""
    del config, file
    return None


def _gemma4(config: HfConfig) -> Values:
    """Source: ``Gemma4TextAttention``, ``Gemma4TextDecoderLayer`` of transformers 5.23.0."""
    borrowing, width = _stated(config, "num_kv_shared_layers"), _stated(config, "global_head_dim")
    heads = _stated(config, "num_global_key_value_heads")
    special = {
        "layer_scalars": "a factor per layer",
        "value_norm": "on values, without weights",
        "sizes_by_layer": f"heads of {width} in layers that see everything",
    }
    if borrowing:
        special["borrowed_keys"] = f"{borrowing} layers take keys and values of earlier ones"
    if _stated(config, "attention_k_eq_v"):
        special["keys_as_values"] = f"keys are the values, of {heads} heads, where all is seen"
    if _stated(config, "hidden_size_per_layer_input"):
        special["per_layer_inputs"] = "an embedding of its own for every layer"
    experts = config.num_experts if _stated(config, "enable_moe_block") else None
    if experts:
        special["mixed_experts"] = "experts beside a plain block in every layer"
    return {
        "embedding_multiplier": config.hidden_size**0.5,
        "special": special,
        **({} if experts else {"experts": None}),
    }


def _is_by_kind(config: HfConfig) -> bool:
    """Whether sizes that are stated layer by layer follow from the kinds of layers."""
    stated, words = _stated(config, "per_layer_config"), config.layer_types or []
    if not isinstance(stated, Mapping):
        return True
    first = next(iter(stated.values()), None)
    full = [str(layer) for layer, word in enumerate(words) if word == "full_attention"]
    return (
        sorted(layer.lstrip("0") or "0" for layer in stated) == sorted(full)
        and isinstance(first, Mapping)
        and first.keys() <= {"head_dim", "num_key_value_heads"}
        and all(one == first for one in stated.values())
    )


_OWN: Mapping[str, Callable[[HfConfig], Values]] = {"gemma4_text": _gemma4}
_GEMMA4 = frozenset(
    {
        *("per_layer_config", "global_head_dim", "num_global_key_value_heads"),
        *("attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp", "enable_moe_block"),
        *("vocab_size_per_layer_input", "hidden_size_per_layer_input"),
    }
)


def _stated(config: HfConfig, name: str) -> Any:
    return (config.model_extra or {}).get(name)

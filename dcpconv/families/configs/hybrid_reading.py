"""What classes with layers of several kinds say in their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dcpconv.families.configs.hf_fields import HfConfig


def own_values(config: HfConfig, file: Path) -> Mapping[str, object]:
    """``ModelSpec`` fields that a class states in a way of its own.

    Args:
        config: What every class says.
        file: For errors.
    """
    del file
    if config.model_type == "gemma3_text":
        return {}
    words = config.layer_types or _words(config)
    return {"layer_types": tuple(words)} if len(set(words)) > 1 else {}


def own_names(config: HfConfig) -> frozenset[str]:
    """Fields that are looked at, which other classes do not have; the tables look at others."""
    if config.model_type == "gemma3_text":
        return frozenset({"sliding_window_pattern", "rope_local_base_freq"})
    return frozenset({"full_attention_interval"})


def layer_words(config: HfConfig, file: Path) -> list[str] | None:
    """One word per layer, where the class has a window and makes them up.

    Source: ``Gemma3TextConfig.__post_init__`` of transformers 5.23.0.
    """
    del file
    pattern = (config.model_extra or {}).get("sliding_window_pattern")
    if not isinstance(pattern, int) or pattern < 1:
        return None
    return [
        "sliding_attention" if (layer + 1) % pattern else "full_attention"
        for layer in range(config.num_hidden_layers)
    ]


def _words(config: HfConfig) -> list[str]:
    """Source: ``Qwen3NextConfig.__post_init__`` of transformers 5.23.0."""
    interval = (config.model_extra or {}).get("full_attention_interval")
    if not isinstance(interval, int) or interval < 1:
        return []
    return [
        "linear_attention" if (layer + 1) % interval else "full_attention"
        for layer in range(config.num_hidden_layers)
    ]

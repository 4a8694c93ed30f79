"""What gpt-oss says in its config.json that no other class does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dcpconv.core.errors import SpecError

if TYPE_CHECKING:
    from dcpconv.core.spec import ModelSpec
    from dcpconv.families.configs.hf_fields import HfConfig

_NAMES = frozenset({"swiglu_alpha", "swiglu_limit", "experts_per_token", "initial_context_length"})
"""The last two are in the published files, beside the names that transformers looks at."""


def own_names(config: HfConfig) -> frozenset[str]:
    """Fields that ``own_values`` looks at, which other classes do not have."""
    del config
    return _NAMES


def own_values(config: HfConfig, file: Path) -> Mapping[str, object]:
    """``ModelSpec`` fields that the class states in a way of its own.

    Args:
        config: What every class says.
        file: For errors.

    Source: ``GptOssExperts`` of transformers 5.23.0, whose gate is always a sigmoid.
    """
    found = {}
    for field, name in (("glu_limit", "swiglu_limit"), ("glu_alpha", "swiglu_alpha")):
        value = (config.model_extra or {}).get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise SpecError(
                "parameter file has 1 field that cannot be used",
                [("file", file), ("field", f"{name}: expected a positive number, found {value!r}")],
            )
        found[field] = value
    return {**found, "activation": "silu"}


def layer_words(config: HfConfig, file: Path) -> list[str]:
    """One word per layer where the file states none: every other layer has the window.

    Source: ``GptOssConfig.__post_init__`` of transformers 5.23.0.
    """
    del file
    words = ("sliding_attention", "full_attention")
    return [words[layer % 2] for layer in range(config.num_hidden_layers)]


def own_fields(spec: ModelSpec) -> dict[str, object]:
    """Fields of config.json that other classes do not have."""
    experts = spec.experts
    if experts is None:
        return {}
    window = spec.sliding_window
    kind = "full_attention" if window is None else "sliding_attention"
    return {
        "intermediate_size": experts.ffn_size,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "hidden_act": "silu",
        "swiglu_alpha": spec.glu_alpha,
        "swiglu_limit": spec.glu_limit,
        "sliding_window": window,
        "layer_types": list(spec.layer_types or (kind,) * spec.n_layers),
    }

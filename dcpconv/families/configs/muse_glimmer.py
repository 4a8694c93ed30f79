"""Muse Glimmer: gated attention between norms without weights, beside a vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcpconv.core.errors import SpecError

if TYPE_CHECKING:
    from dcpconv.families.configs.hf_fields import HfConfig

_PERIOD = 4
"""One layer of so many sees everything and does not turn, counted from the last."""

_NAMES = frozenset(
    {
        *("output_multiplier", "layer_rope_theta", "qk_scale_factor", "post_norm_eps"),
        *("projector_hidden_act", "image_token_id", "video_token_id"),
    }
)


def own_names(config: HfConfig) -> frozenset[str]:
    """Fields that ``own_values`` looks at and those that torchtitan has a number for."""
    del config
    return _NAMES


def own_values(config: HfConfig, file: Path) -> Mapping[str, object]:
    """``ModelSpec`` fields that the class states in a way of its own.

    Args:
        config: What every class says.
        file: For errors.
    """
    multiplier = _stated(config, "output_multiplier")
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float) or multiplier <= 0:
        raise SpecError(
            "parameter file has 1 field that cannot be used",
            [
                ("file", file),
                ("field", f"output_multiplier: expected a positive number, found {multiplier!r}"),
            ],
        )
    thetas = _stated(config, "layer_rope_theta")
    layers = range(config.num_hidden_layers)
    if isinstance(thetas, list):
        still = tuple(layer for layer in layers if layer < len(thetas) and not thetas[layer])
    else:
        still = tuple(layer for layer in layers if _sees_everything(config, layer))
    return {"logits_scaling": 1.0 / multiplier, "no_rope_layers": still}


def layer_words(config: HfConfig, file: Path) -> list[str]:
    """One word per layer where the file states none."""
    del file
    words = ("sliding_attention", "full_attention")
    return [words[_sees_everything(config, n)] for n in range(config.num_hidden_layers)]


def _sees_everything(config: HfConfig, layer: int) -> bool:
    return (config.num_hidden_layers - 1 - layer) % _PERIOD == 0


def _stated(config: HfConfig, name: str) -> Any:
    return (config.model_extra or {}).get(name)

"""What only some classes shaped like a Llama say in their config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dcpconv.core.errors import SpecError
from dcpconv.families.configs.hf_fields import HfConfig

Values = Mapping[str, object]

_CWM_PERIOD = 4
"""One layer of so many sees everything, the first of them."""


def own_values(config: HfConfig, file: Path) -> Values:
    """``ModelSpec`` fields that a class states in a way of its own.

    Args:
        config: What every class says.
        file: For errors.
    """
    read = _OWN.get(config.model_type)
    return {} if read is None else read(config, file)


def own_names(config: HfConfig) -> frozenset[str]:
    """Fields that ``own_values`` and ``layer_words`` look at, which other classes do not have."""
    return _NAMES.get(config.model_type, frozenset())


def layer_words(config: HfConfig, file: Path) -> list[str] | None:
    """One word per layer, where the class makes them up from other fields.

    Args:
        config: Of a class that has a window and does not state ``layer_types``.
        file: For errors.

    Source: the ``__post_init__`` of each config class in transformers 5.23.0.
    """
    layers = range(config.num_hidden_layers)
    if config.model_type == "smollm3":
        slides = [layer in _without_rope(config, file) for layer in layers]
    elif config.model_type == "cwm":
        slides = [layer % _CWM_PERIOD != 0 for layer in layers]
    elif config.model_type in {"exaone4", "exaone_moe"}:
        period = _stated(config, "sliding_window_pattern")
        if not isinstance(period, int) or period < 1:
            raise SpecError(
                "layer_types are not stated and do not follow",
                [("file", file), ("field", f"sliding_window_pattern: {period!r}")],
            )
        slides = [(layer + 1) % period != 0 for layer in layers]
    else:
        return None
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _smollm3(config: HfConfig, file: Path) -> Values:
    return {"no_rope_layers": _without_rope(config, file)}


def _without_rope(config: HfConfig, file: Path) -> tuple[int, ...]:
    """Layers without RoPE: those with a 0, or else one of every interval."""
    turns = _stated(config, "no_rope_layers")
    count = config.num_hidden_layers
    if turns is None:
        interval = _stated(config, "no_rope_layer_interval")
        if not isinstance(interval, int) or interval < 1:
            raise _misfit(file, "no_rope_layer_interval", "a positive number", interval)
        turns = [(layer + 1) % interval != 0 for layer in range(count)]
    is_list = isinstance(turns, Sequence) and not isinstance(turns, str)
    if not is_list or len(turns) < count or any(turn not in {0, 1} for turn in turns):
        raise _misfit(file, "no_rope_layers", f"0 or 1 for each of {count} layers", turns)
    return tuple(layer for layer in range(count) if not turns[layer])


def unturned_layers(config: HfConfig, file: Path) -> tuple[int, ...]:
    """Layers of an EXAONE that RoPE leaves alone.

    Source: ``Exaone4Attention`` of transformers 5.23.0: as soon as there is a window, the layers
    that see everything do not turn."""
    if config.sliding_window is None:
        return ()
    words = config.layer_types or layer_words(config, file) or []
    return tuple(layer for layer, word in enumerate(words) if word != "sliding_attention")


def _exaone4(config: HfConfig, file: Path) -> Values:
    return {"no_rope_layers": unturned_layers(config, file)}


def _cohere(config: HfConfig, file: Path) -> Values:
    """Source: ``CohereForCausalLM.forward``, ``CohereAttention.__init__`` of the same version."""
    scale = _stated(config, "logit_scale")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale <= 0:
        raise _misfit(file, "logit_scale", "a positive number", scale)
    return {
        "logits_scaling": 1.0 / scale,
        "qk_norm_heads": bool(_stated(config, "use_qk_norm")),
    }


def _internlm3(config: HfConfig, file: Path) -> Values:
    """Source: ``attribute_map`` of ``InternLM3Config``; the class's own code gives q, k and v their
    bias by ``qkv_bias``, all else by ``bias``."""
    del file
    everywhere = bool(_stated(config, "bias")) or config.mlp_bias
    qkv = config.attention_bias if config.qkv_bias is None else config.qkv_bias
    return {"qkv_bias": qkv, "o_bias": everywhere, "mlp_bias": everywhere}


def _seed_oss(config: HfConfig, file: Path) -> Values:
    del file
    return {"o_bias": bool(_stated(config, "attention_out_bias"))}


_OWN: Mapping[str, Callable[[HfConfig, Path], Values]] = {
    "smollm3": _smollm3,
    "exaone4": _exaone4,
    "cohere": _cohere,
    "internlm3": _internlm3,
    "seed_oss": _seed_oss,
}
_NAMES: Mapping[str, frozenset[str]] = {
    "smollm3": frozenset({"no_rope_layers", "no_rope_layer_interval"}),
    "exaone4": frozenset({"sliding_window_pattern"}),
    "cohere": frozenset({"logit_scale", "use_qk_norm"}),
    "internlm3": frozenset({"bias"}),
    "seed_oss": frozenset({"attention_out_bias"}),
}


def _stated(config: HfConfig, name: str) -> Any:
    return (config.model_extra or {}).get(name)


def _misfit(file: Path, name: str, expected: str, found: object) -> SpecError:
    return SpecError(
        "parameter file has 1 field that cannot be used",
        [("file", file), ("field", f"{name}: expected {expected}, found {found!r}")],
    )

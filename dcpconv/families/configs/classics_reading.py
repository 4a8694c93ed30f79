"""What only some of the older classes say in their config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dcpconv.core.errors import SpecError
from dcpconv.families.configs.hf_fields import HfConfig

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
    """Fields that ``own_values`` looks at, which other classes do not have, and those that say
    again what others have said."""
    return _NAMES.get(config.model_type, frozenset())


def layer_words(config: HfConfig, file: Path) -> None:
    """No class here has windows in some layers only."""
    del config, file


def _phi(config: HfConfig, file: Path) -> Values:
    del file
    return {"qk_norm": bool(_stated(config, "qk_layernorm"))}


def _stablelm(config: HfConfig, file: Path) -> Values:
    del file
    return {
        "qkv_bias": bool(_stated(config, "use_qkv_bias")),
        "qk_norm_heads": bool(_stated(config, "qk_layernorm")),
        "parallel_residual": bool(_stated(config, "use_parallel_residual")),
    }


def _gpt_neox(config: HfConfig, file: Path) -> Values:
    del file
    is_parallel = bool(_stated(config, "use_parallel_residual"))
    return {"parallel_residual": is_parallel, "parallel_norms": is_parallel}


def _gpt2(config: HfConfig, file: Path) -> Values:
    del file
    return {"query_multiplier": None if _stated(config, "scale_attn_weights") else 1.0}


def _falcon(config: HfConfig, file: Path) -> Values:
    """Source: ``FalconAttention``, ``FalconDecoderLayer`` of transformers 5.23.0."""
    is_new = bool(_stated(config, "new_decoder_architecture"))
    has_bias = bool(_stated(config, "bias"))
    norms = _stated(config, "num_ln_in_parallel_attn")
    n_heads = config.num_attention_heads
    if is_new and not _stated(config, "parallel_attn"):
        raise SpecError(
            "parameter file has 1 field that cannot be used",
            [
                ("file", file),
                ("field", "parallel_attn: expected true with new_decoder_architecture"),
            ],
        )
    if is_new:
        n_kv_heads = config.num_key_value_heads or n_heads
    else:
        n_kv_heads = 1 if _stated(config, "multi_query") else n_heads
    return {
        "n_kv_heads": n_kv_heads,
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), has_bias),
        "positions": "alibi" if _stated(config, "alibi") else "rope",
        "parallel_residual": is_new or bool(_stated(config, "parallel_attn")),
        "parallel_norms": is_new and norms in {None, 2},
    }


_OWN: Mapping[str, Callable[[HfConfig, Path], Values]] = {
    "phi": _phi,
    "stablelm": _stablelm,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
    "falcon": _falcon,
}
_NAMES: Mapping[str, frozenset[str]] = {
    "phi": frozenset({"qk_layernorm"}),
    "stablelm": frozenset({"use_qkv_bias", "qk_layernorm", "use_parallel_residual"}),
    "gpt_neox": frozenset({"use_parallel_residual"}),
    "gpt2": frozenset({"scale_attn_weights", "n_ctx"}),
    "falcon": frozenset(
        {
            *("alibi", "bias", "multi_query", "new_decoder_architecture"),
            *("num_ln_in_parallel_attn", "parallel_attn", "rotary"),
        }
    ),
}


def _stated(config: HfConfig, name: str) -> Any:
    return (config.model_extra or {}).get(name)

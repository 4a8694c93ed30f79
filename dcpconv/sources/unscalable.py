"""Quantised weights that are more than numbers times factors: told by name, with what to do."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from dcpconv.core.catalog import TensorEntry


@dataclass(frozen=True, slots=True)
class _Kind:
    """A way to quantise that is told by the end of a key.

    Attributes:
        end: How the key ends.
        name: What people call it.
        use: What gets the weights out of it.
    """

    end: str
    name: str
    use: str


_BY_TRANSFORMERS = "load it with transformers, call model.dequantize(), and save that"
_BY_ITS_TOOL = "decompress it with compressed-tensors (ModelCompressor), and save that"
_BY_RELEASE = "take the unquantised release, or dequantise it with the tool that wrote it"

_KINDS = (
    _Kind(".qweight", "GPTQ or AWQ: integers packed into words", _BY_RELEASE),
    _Kind(".weight.absmax", "4 bits of bitsandbytes", _BY_TRANSFORMERS),
    _Kind(".SCB", "8 bits of bitsandbytes", _BY_TRANSFORMERS),
    _Kind(".weight_scale_2", "NVFP4 of Model Optimizer", _BY_RELEASE),
    _Kind(".weight_global_scale", "NVFP4 of compressed-tensors", _BY_ITS_TOOL),
    _Kind(".weight_packed", "packed integers of compressed-tensors", _BY_ITS_TOOL),
    _Kind(".codebooks", "AQLM", _BY_RELEASE),
    _Kind(".W_q", "HQQ", _BY_TRANSFORMERS),
    _Kind(".weight._data", "Quanto", _BY_RELEASE),
)
"""Source: transformers 5.23 ``quantizers/`` and the packages that they name."""


def unscalable(
    tensors: Mapping[str, TensorEntry], made: Collection[str]
) -> Iterator[tuple[str, str]]:
    """One ``(key, reason)`` for each kind that is there, under its first key.

    Args:
        tensors: As stored.
        made: Keys of weights that can be multiplied out.
    """
    told: set[str] = set()
    for kind in _KINDS:
        keys = [key for key in tensors if key.endswith(kind.end) and key not in made]
        fresh = [key for key in keys if key.removesuffix(kind.end) not in told]
        told.update(key.removesuffix(kind.end) for key in keys)
        if fresh:
            more = f", and {len(fresh) - 1} more" if len(fresh) > 1 else ""
            yield fresh[0], f"is {kind.name}{more}: {kind.use}"

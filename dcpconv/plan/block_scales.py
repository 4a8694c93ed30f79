"""Weights in one byte with a factor per block of 128 by 128, as DeepSeek-V3 is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dcpconv.core.catalog import TensorEntry
from dcpconv.core.spec import ModelSpec
from dcpconv.plan.coverage import Fault, Piece, Target, as_stored
from dcpconv.sources.fitting import bare

SCALE = "_scale_inv"
"""What the key of the factors adds to the key of the weight.  Source: the model's index.json."""

FACTORS = (SCALE, "_scale")
"""What the key of factors of any kind adds to the key of a weight in one byte.  Only those of
``SCALE`` belong to blocks; others belong to rows or tensors, in compressed-tensors' checkpoints."""

_BLOCK = (128, 128)


def scales_of(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Factors of every matrix of one-byte floats that has them, by the key of the matrix."""
    return {
        weight: entry
        for key, entry in entries.items()
        if key.endswith(SCALE)
        and (weight := key.removesuffix(SCALE)) in entries
        and entries[weight].dtype.itemsize == 1
        and entries[weight].dtype.is_floating_point
        and entry.dtype.is_floating_point
        and len(entries[weight].shape) == len(entry.shape) == 2
    }


def factors_along(
    made: Mapping[str, Target], scales: Mapping[str, TensorEntry], root: str, target: str
) -> tuple[dict[str, Target], list[Fault]]:
    """Factors that go along with tensors which stay as they are, and those that cannot.

    Args:
        made: Targets by key.
        scales: From ``scales_of``.
        root: What stands before the keys of the source.
        target: Name of the target's naming.
    """
    along: dict[str, Target] = {}
    faults = []
    for key, tensor in made.items():
        for piece in tensor.pieces:
            weight = bare(piece.entry.key.removeprefix(root))
            scale = scales.get(weight)
            if scale is None:
                continue
            if len(tensor.pieces) == 1 and piece.wanted is None:
                name = key + SCALE
                along[name] = as_stored(name, scale)
            else:
                why = f"its blocks have no place in {target}; dequantize the weights"
                faults.append(Fault(weight + SCALE, why))
    return along, faults


def with_scale(
    piece: Piece, scales: Mapping[str, TensorEntry], root: str, block: tuple[int, int]
) -> tuple[Piece, Fault | None]:
    """The piece with its factors to be multiplied in, if any, and what is wrong with them."""
    weight = bare(piece.entry.key.removeprefix(root))
    scale = scales.get(weight)
    if scale is None:
        return piece, None
    down, across = (-(-n // size) for n, size in zip(piece.entry.shape, block, strict=True))
    fault = None
    if scale.shape != (down, across):
        fault = Fault.unlike(weight + SCALE, [down, across], list(scale.shape))
    return replace(piece, scale=scale, block=block), fault


def block_of(spec: ModelSpec | None) -> tuple[int, int]:
    """Rows and columns of a block, from the config where it says."""
    stated = spec.extra.get("quantization_config") if spec else None
    size = stated.get("weight_block_size") if isinstance(stated, dict) else None
    if isinstance(size, list) and len(size) == 2:
        down, across = size
        if isinstance(down, int) and isinstance(across, int) and min(down, across) > 0:
            return down, across
    return _BLOCK

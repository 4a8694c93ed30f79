"""Weights in one byte with a factor per block of 128 by 128, as DeepSeek-V3 is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dcpconv.core.catalog import TensorEntry
from dcpconv.core.dtypes import DType
from dcpconv.core.spec import ModelSpec
from dcpconv.plan.coverage import Coverage, Fault, Piece, Target, as_stored
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
    return stated_block(spec.extra if spec else None) or _BLOCK


def stated_block(fields: Mapping[str, object] | None) -> tuple[int, int] | None:
    """Rows and columns of a block, from a config of any model; ``None`` where it does not say."""
    stated = fields.get("quantization_config") if fields is not None else None
    size = stated.get("weight_block_size") if isinstance(stated, dict) else None
    if isinstance(size, list) and len(size) == 2:
        down, across = size
        if isinstance(down, int) and isinstance(across, int) and min(down, across) > 0:
            return down, across
    return None


def multiplied_out(
    coverage: Coverage, dtype: DType, stated: tuple[int, int] | None = None
) -> Coverage:
    """The account of keys as they are stored, with every matrix multiplied by its factors.

    No table is needed: a matrix and its factors find each other by name, and the number of factors
    says how large a block is.

    Args:
        coverage: From ``cover_as_stored``.
        dtype: Type of the products.
        stated: Rows and columns of a block, where a config says; blocks of 128 are tried first
            otherwise.
    """
    entries = {target.key: target.pieces[0].entry for target in coverage.targets}
    scales = scales_of(entries)
    targets: list[Target] = []
    faults: list[Fault] = []
    for target in coverage.targets:
        key, entry = target.key, target.pieces[0].entry
        scale = scales.get(key)
        if key.endswith(SCALE) and key.removesuffix(SCALE) in scales:
            continue
        if scale is not None:
            block = _block_for(entry.shape, scale.shape, stated)
            if block is None:
                sizes = zip(entry.shape, stated or _BLOCK, strict=True)
                fault = [-(-length // size) for length, size in sizes]
                faults.append(Fault.unlike(key + SCALE, fault, list(scale.shape)))
                continue
            target = replace(  # noqa: PLW2901 - the same target, multiplied out
                target, dtype=dtype, pieces=(Piece(entry, scale=scale, block=block),)
            )
        targets.append(target)
    return replace(coverage, targets=tuple(targets), misshapen=(*coverage.misshapen, *faults))


def not_in_blocks(coverage: Coverage) -> tuple[Fault, ...]:
    """Weights in one byte whose factors are of another kind: nothing here multiplies them out."""
    entries = {target.key: target.pieces[0].entry for target in coverage.targets}
    return tuple(
        Fault(key, f"only matrices with X{SCALE} can be multiplied out")
        for key, entry in entries.items()
        if entry.dtype.itemsize == 1 and any(key + suffix in entries for suffix in FACTORS)
    )


def _block_for(
    shape: tuple[int, ...], grid: tuple[int, ...], stated: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns of a block that make as many factors as there are."""
    found = []
    for length, count, usual in zip(shape, grid, stated or _BLOCK, strict=True):
        sizes = [usual]
        if stated is None and count:
            # A power of two, of which at most one fits where there are several blocks; or the
            # length in equal parts.
            sizes += [1 << n for n in range(length.bit_length() + 1)]
            sizes += [length // count] if length % count == 0 and length else []
        size = next((size for size in sizes if -(-length // size) == count), None)
        if size is None:
            return None
        found.append(size)
    return found[0], found[1]

"""Weights in few bits with factors beside them: multiplied out, or carried along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dcpconv.core.catalog import TensorEntry
from dcpconv.core.dtypes import DType
from dcpconv.plan.coverage import Coverage, Fault, Target, as_stored
from dcpconv.sources.fitting import bare
from dcpconv.sources.understanding import Source

SCALE = "_scale_inv"
"""What the key of the factors adds to the key of the weight.  Source: the model's index.json."""

FACTORS = (SCALE, "_scale")
"""What the key of factors of any kind adds to the key of a weight in one byte.  Only those of
``SCALE`` belong to blocks; others belong to rows or tensors, in compressed-tensors' checkpoints."""


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


def with_products(coverage: Coverage, source: Source, dtype: DType) -> Coverage:
    """The account with what became of factors, and the type of what is multiplied out.

    Args:
        coverage: Of a source whose weights may have factors.
        source: The source.
        dtype: Type of the products.
    """
    scaled = source.scaled
    if scaled is None:
        return coverage
    root = source.weights.root
    targets = tuple(
        replace(target, dtype=dtype)
        if any(piece.entry.factors for piece in target.pieces)
        else target
        for target in coverage.targets
    )
    ignored = [
        Fault(bare(scaled.names[root + fault.key].removeprefix(root)), fault.why)
        for fault in coverage.ignored
        if root + fault.key in scaled.names
    ]
    dropped = [Fault(key, why) for key, why in scaled.dropped]
    unlike = [Fault.unlike(key, list(shape), list(found)) for key, shape, found in scaled.unlike]
    refused = [Fault(key, why) for key, why in scaled.refused]
    return replace(
        coverage,
        targets=targets,
        ignored=(*coverage.ignored, *ignored, *dropped),
        misshapen=(*coverage.misshapen, *unlike, *refused),
    )

"""Whether two names that should be one tensor really hold the same bytes."""

from __future__ import annotations

from collections.abc import Iterable

from dcpconv.engine.execute import fill
from dcpconv.plan.coverage import as_stored
from dcpconv.plan.fills import fill_of
from dcpconv.sources.recognition import Weights
from dcpconv.stores.local import Sources

_BLOCK = 8 << 20
"""Bytes of each tensor that are compared at a time."""


def differing(weights: Weights, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of the pairs ``(key, owner)`` whose tensors are not equal bit for bit.

    Both are read once, in blocks; a head of 500 MB takes well under a second.

    Args:
        weights: Where the tensors are.
        pairs: Bare keys.
    """
    unequal = []
    with Sources.of(weights.catalog) as sources:
        for key, owner in pairs:
            one, other = weights.entries[key], weights.entries[owner]
            if (one.dtype, one.shape) != (other.dtype, other.shape) or not _equal(
                weights, key, owner, sources
            ):
                unequal.append((key, owner))
    return unequal


def _equal(weights: Weights, key: str, owner: str, sources: Sources) -> bool:
    entry = weights.entries[key]
    row_nbytes = entry.nbytes // max(1, entry.shape[0]) if entry.shape else entry.nbytes
    rows = max(1, _BLOCK // max(1, row_nbytes))
    both = [as_stored(name, weights.entries[name]) for name in (key, owner)]
    length = entry.shape[0] if entry.shape else 1
    for start in range(0, length, rows):
        offsets = (start, *(0,) * (len(entry.shape) - 1)) if entry.shape else ()
        sizes = (min(rows, length - start), *entry.shape[1:]) if entry.shape else ()
        read = []
        for target in both:
            box = fill_of(target, offsets, sizes)
            buffer = memoryview(bytearray(box.nbytes))
            fill(box, source=sources, into=buffer)
            read.append(buffer)
        if read[0] != read[1]:
            return False
    return True

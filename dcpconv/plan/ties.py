"""Whether two names that should be one tensor really hold the same bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from dcpconv.core.catalog import TensorEntry
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
            if not are_equal(weights.entries[key], weights.entries[owner], sources):
                unequal.append((key, owner))
    return unequal


def are_equal(entry: TensorEntry, other: TensorEntry, sources: Sources) -> bool:
    """Whether two tensors of a checkpoint hold the same, bit for bit.

    Args:
        entry: One.
        other: The other.
        sources: The files that both are in.
    """
    one, two = _given(entry), _given(other)
    is_alike = (one.dtype, one.shape, one.updates) == (two.dtype, two.shape, two.updates)
    return is_alike and _equal(one, two, sources)


def _given(entry: TensorEntry) -> TensorEntry:
    """The tensor, or what an adapter has in its place."""
    given = [update.given for update in entry.updates]
    return given[-1] if given and given[-1] is not None and len(given) == 1 else entry


def _equal(entry: TensorEntry, other: TensorEntry, sources: Sources) -> bool:
    row_nbytes = entry.nbytes // max(1, entry.shape[0]) if entry.shape else entry.nbytes
    rows = max(1, _BLOCK // max(1, row_nbytes))
    both = [as_stored(one.key, replace(one, updates=())) for one in (entry, other)]
    length = entry.shape[0] if entry.shape else 1
    for start in range(0, length, rows):
        offsets = (start, *(0,) * (len(entry.shape) - 1)) if entry.shape else ()
        sizes = (min(rows, length - start), *entry.shape[1:]) if entry.shape else ()
        read = []
        for target in both:
            box = fill_of(target, offsets, sizes)
            buffer = bytearray(box.nbytes)  # unlike a view of it, compared at the speed of memory
            fill(box, source=sources, into=memoryview(buffer))
            read.append(buffer)
        if read[0] != read[1]:
            return False
    return True

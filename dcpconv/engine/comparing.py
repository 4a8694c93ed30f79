"""Two boxes beside each other: equal byte for byte, or by how much their values differ.

Bytes are compared first; only what is unequal is read again and measured, with numpy.  Memory: two
buffers of ``_SIZE`` bytes per thread, and a megabyte to measure with.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpconv.core.dtypes import DType
from dcpconv.core.outline import Fill
from dcpconv.engine.boxes import Box
from dcpconv.engine.desks import Desk
from dcpconv.engine.sharing import Stretch, share, stretches
from dcpconv.stores.local import Sources

if TYPE_CHECKING:
    from dcpconv.engine.measuring import Measured

CHUNK = 1 << 20
"""Bytes of each side read and used at a time: they stay in a core's cache between the two."""

_SIZE = 2 * CHUNK
"""Bytes of a buffer: a chunk of each side lies in its halves."""

Pair = tuple[Fill, Fill]
Both = tuple[Sources, Sources]

_memcmp = ctypes.CDLL(None).memcmp  # releases the GIL, and memoryview's == is 40 times as slow
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the same elements of both sides into a desk's buffers."""

    sources: Both

    def read(
        self, stretch: Stretch, start: int, stop: int, desk: Desk
    ) -> tuple[memoryview, memoryview]:
        """Elements ``start`` to ``stop`` of either side, as stored."""
        found = []
        for box, sources, at in zip(stretch.boxes, self.sources, (0, CHUNK), strict=True):
            view = desk.tile[at : at + (stop - start) * _dtype_of(box).itemsize]
            if box.fill.scales:
                from dcpconv.engine.dequantise import (  # noqa: PLC0415 - few have factors
                    Computed,
                )

                made = Computed(box.fill)
                made.read(start, stop, sources=sources, into=view, scratch=lambda: desk.scratch)
            else:
                box.read(
                    start,
                    stop,
                    sources=sources,
                    into=view,
                    scratch=lambda: desk.scratch,
                    slices=desk.slices,
                    at=at,
                )
            found.append(view)
        return found[0], found[1]


def step_of(boxes: Sequence[Box]) -> int:
    """Elements of which every side fits into a chunk."""
    return CHUNK // max(_dtype_of(box).itemsize for box in boxes)


def are_equal(
    pairs: Iterable[Pair],
    *,
    sources: Both,
    jobs: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[bool]:
    """Whether both sides of every pair hold the same bytes; of one that does not, what follows the
    first difference is not read.

    Args:
        pairs: Fills of as many elements and one element type; taken one by one.
        sources: Where the parts' files are open, on either side.
        jobs: Threads; as many as there are CPUs, 4 at most, by default.
        progress: Called from the threads with bytes of one side compared since its last call.

    Raises:
        FormatError: A source file is missing, unreadable or too short.
        SourceChangedError: A source file changed after it was planned with.
    """
    unequal: set[int] = set()
    count = 0
    reader = Reader(sources)

    def listed() -> Iterable[Stretch]:
        nonlocal count
        for stretch in stretches(pairs):
            count = stretch.number + 1
            yield stretch

    def compare(stretch: Stretch, desk: Desk) -> None:
        step = step_of(stretch.boxes)
        for start in range(stretch.start, stretch.stop, step):
            if stretch.number in unequal:
                break
            stop = min(start + step, stretch.stop)
            one, other = reader.read(stretch, start, stop, desk)
            if _memcmp(_address(one), _address(other), len(one)):
                unequal.add(stretch.number)
        if progress is not None:
            progress((stretch.stop - stretch.start) * stretch.boxes[0].itemsize)

    share(listed(), compare, jobs=jobs, size=_SIZE, buffers=2)
    for side in sources:
        side.require_unchanged()
    return [number not in unequal for number in range(count)]


def measure(
    pairs: Iterable[Pair],
    *,
    sources: Both,
    jobs: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Measured]:
    """By how much the two sides of every pair differ, in fp32, or fp64 for types that need it.

    Sums are kept in fp64, and added in the order of the elements whatever the threads do.

    Args:
        pairs: Fills of as many elements; element types may differ, and what has scales is compared
            as it is worth in the fill's target type.
        sources: As for ``are_equal``.
        jobs: Likewise.
        progress: Likewise.

    Raises:
        FormatError: A source file is missing, unreadable or too short.
        SourceChangedError: A source file changed after it was planned with.
    """
    from dcpconv.engine.measuring import Measure, joined  # noqa: PLC0415 - imports numpy

    reader = Reader(sources)
    found: dict[int, dict[int, Measured]] = {}
    lock = threading.Lock()
    own = threading.local()

    def compare(stretch: Stretch, desk: Desk) -> None:
        step = step_of(stretch.boxes)
        one, other = (_dtype_of(box) for box in stretch.boxes)
        measured = own.__dict__.setdefault("measured", None) or Measure()
        own.measured = measured
        parts = []
        for start in range(stretch.start, max(stretch.stop, stretch.start + 1), step):
            stop = min(start + step, stretch.stop)
            both = reader.read(stretch, start, stop, desk)
            parts.append(measured(*both, dtypes=(one, other), first=start))
        with lock:
            found.setdefault(stretch.number, {})[stretch.start] = joined(parts)
        if progress is not None:
            progress((stretch.stop - stretch.start) * stretch.boxes[0].itemsize)

    share(stretches(pairs), compare, jobs=jobs, size=_SIZE, buffers=2)
    for side in sources:
        side.require_unchanged()
    return [joined(held for _, held in sorted(found[number].items())) for number in sorted(found)]


def _dtype_of(box: Box) -> DType:
    """Type of the elements that are compared."""
    return box.fill.target_dtype if box.fill.scales else box.fill.source_dtype


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0

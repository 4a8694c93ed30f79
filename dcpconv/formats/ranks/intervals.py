"""Intervals of a flattened tensor as boxes of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dcpconv.core.catalog import Chunk, Extent
from dcpconv.formats.boxes import Region


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of elements of a long vector that lies in one place.

    Attributes:
        start: Its first element, from the start of the vector.
        numel: Its length, in elements.
        file: Where it lies.
        offset: Byte of its first element in that file.
    """

    start: int
    numel: int
    file: str
    offset: int


def boxes_of(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Region]:
    """The fewest boxes that hold elements ``start`` to ``stop`` of a tensor in C order.

    They come in that order, so they lie one after the other where the interval lies in one piece:
    the rest of a row, whole rows, the beginning of a row, and so in every dim.

    >>> [*boxes_of((3, 4), 2, 10)]
    [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 2))]
    >>> [*boxes_of((), 0, 1)]
    [((), ())]
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = 1
    for length in shape[1:]:
        row *= length
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        yield from _within(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _within(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        yield (first, *zeros), (last - first, *shape[1:])
    if last * row < stop:
        yield from _within(shape, last, 0, stop - last * row)


def chunks_of(
    shape: tuple[int, ...],
    segments: Sequence[Segment],
    *,
    at: int,
    itemsize: int,
    first: int = 0,
    stop: int | None = None,
) -> Iterator[Chunk]:
    """The chunks of a tensor, or of an interval of it, that lies flat in a vector.

    Args:
        shape: Of the tensor.
        segments: Of the vector, in order, without gaps or overlaps.
        at: Where in the vector element ``first`` lies.
        itemsize: Bytes of an element.
        first: First element of the interval.
        stop: Its end; the end of the tensor by default.
    """
    if stop is None:
        stop = 1
        for length in shape:
            stop *= length
    place = bisect_right(segments, at, key=lambda segment: segment.start) - 1
    while first < stop:
        segment = segments[place]
        inside = at - segment.start
        numel = min(stop - first, segment.numel - inside)
        offset = segment.offset + inside * itemsize
        for offsets, sizes in boxes_of(shape, first, first + numel):
            nbytes = itemsize
            for length in sizes:
                nbytes *= length
            yield Chunk(offsets, sizes, Extent(segment.file, offset, nbytes))
            offset += nbytes
        first, at, place = first + numel, at + numel, place + 1


def _within(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Region]:
    for offsets, sizes in boxes_of(shape[1:], start, stop):
        yield (row, *offsets), (1, *sizes)

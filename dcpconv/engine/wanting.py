"""Which bytes of its sources a piece of work will read, so that they can be fetched before."""

from __future__ import annotations

from collections.abc import Iterator

from dcpconv.core.outline import Loop, Part
from dcpconv.engine.boxes import Box
from dcpconv.engine.units import Run, Stretch, Tile, Unit
from dcpconv.stores.ahead import Wanted
from dcpconv.stores.fetching import GAP


def of_unit(unit: Unit | None) -> Iterator[Wanted]:
    """What a unit of a conversion reads; factors and adapters beside it are read when needed."""
    if isinstance(unit, Run):
        yield unit.file, unit.source_offset, unit.nbytes
    elif isinstance(unit, Tile):
        yield from of_box(unit.box, unit.start, unit.stop)
    elif isinstance(unit, Stretch):
        for piece in unit.pieces:
            yield from of_unit(piece)


def of_box(box: Box, start: int, stop: int) -> Iterator[Wanted]:
    """What an interval of a box reads.

    Args:
        box: The box.
        start: First element of the interval.
        stop: End of the interval.
    """
    for part in box.parts_in(start, stop):
        yield from _of_part(part, box.itemsize)


def _of_part(part: Part, itemsize: int) -> Iterator[Wanted]:
    loops = tuple(sorted(part.loops, key=lambda loop: -loop[1]))
    for offset, nbytes in _spans(part.offset, loops, itemsize):
        yield part.file, offset, nbytes


def _spans(offset: int, loops: tuple[Loop, ...], itemsize: int) -> Iterator[tuple[int, int]]:
    """Spans of a nest, the longest step first, that have no gap worth skipping."""
    reach = itemsize * (1 + sum((count - 1) * step for count, step, _ in loops))
    inner = itemsize * (1 + sum((count - 1) * step for count, step, _ in loops[1:]))
    if not loops or loops[0][1] * itemsize - inner <= GAP:
        yield offset, reach
        return
    count, step, _ = loops[0]
    for index in range(count):
        yield from _spans(offset + index * step * itemsize, loops[1:], itemsize)

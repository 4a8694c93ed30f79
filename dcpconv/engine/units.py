"""Cut a file of a result into units of work, each small enough to buffer or left to the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dcpconv.core.outline import Fill, OutFile
from dcpconv.engine.boxes import Box

LONG_RUN = 128 << 10
"""Bytes from which a run is left to the kernel; shorter ones are cheaper to gather in a buffer."""

UNIT = 64 << 20
"""Bytes of one unit of work, about: no thread is left alone with one huge tensor."""


CACHED = 1 << 20
"""Bytes to buffer at a time where only the order changes: fits in a core's cache, 1.5 to 2 times as
fast as 4 MiB.  Boxes of short runs are read in longer tiles, for fewer and longer reads."""


@dataclass(frozen=True, slots=True)
class Given:
    """Bytes to write as they are."""

    offset: int
    data: bytes

    @property
    def nbytes(self) -> int:
        """Length in the target file."""
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Run:
    """A contiguous copy out of a source file."""

    offset: int
    nbytes: int
    file: str
    source_offset: int


@dataclass(frozen=True, slots=True)
class Tile:
    """Elements ``start`` to ``stop`` of a box; ``payload`` is where the box itself starts."""

    offset: int
    nbytes: int
    box: Box
    start: int
    stop: int
    payload: int


Write = Given | Run | Tile


@dataclass(frozen=True, slots=True)
class Stretch:
    """Pieces close together, to be put together in a buffer and written at once.

    Attributes:
        offset: First byte in the target file.
        nbytes: From there to the end of the last piece; what no piece covers is zero.
        pieces: By offset.
    """

    offset: int
    nbytes: int
    pieces: tuple[Write, ...]


Unit = Write | Stretch


FAR_UNIT = 8 << 20
"""The same for what a network brings or takes, which is held in memory until it is done."""


def units(
    file: OutFile,
    *,
    block: int,
    tile: int,
    within: tuple[int, int] | None = None,
    is_far: bool = False,
) -> Iterator[Unit]:
    """Every unit of a file, by offset.

    Args:
        file: What to write.
        within: ``(start, stop)``, in bytes of the file: nothing else is written.  Neither may lie
            inside an element of a payload.
        block: File system block, in bytes.  What of a long run lies on whole blocks of both files
            becomes a ``Run`` of its own; the ends join their neighbours.
        tile: Bytes of a ``Stretch`` and of a ``Tile`` at most, in either type.
        is_far: Whether bytes come from a store or go into one.

    Raises:
        ValueError: Pieces overlap or exceed the file, or leave out elements of a box.
    """
    long, unit = min(LONG_RUN, tile), FAR_UNIT if is_far else UNIT
    room = min(CACHED, tile)
    held: list[Write] = []
    start, stop = within or (0, file.nbytes)
    for piece in _pieces(file, start, stop, block=block, tile=tile, long=long, unit=unit):
        alone = _is_alone(piece, long)
        if held:
            begin, last = held[0].offset, held[-1]
            is_near = piece.offset - last.offset - last.nbytes < block
            if alone or not is_near or piece.offset + piece.nbytes - begin > room:
                yield _stretch(held)
                held = []
        if alone:
            yield piece
        else:
            held.append(piece)
    if held:
        yield _stretch(held)


def _is_alone(piece: Write, long: int) -> bool:
    if isinstance(piece, Tile):
        return piece.box.fill.is_computed
    return piece.nbytes >= long


def _stretch(pieces: list[Write]) -> Stretch:
    begin, last = pieces[0].offset, pieces[-1]
    return Stretch(begin, last.offset + last.nbytes - begin, tuple(pieces))


def _pieces(
    file: OutFile, start: int, stop: int, *, block: int, tile: int, long: int, unit: int
) -> Iterator[Write]:
    end = 0
    items: list[tuple[int, bytes | Fill]] = [*file.literals, *file.payloads]
    for offset, what in sorted(items, key=lambda item: item[0]):
        nbytes = len(what) if isinstance(what, bytes) else what.nbytes
        if not nbytes:
            continue
        if offset < end or offset + nbytes > file.nbytes:
            raise ValueError(
                f"{file.name}: {nbytes} bytes at {offset} overlap what ends at {end}, "
                f"or exceed {file.nbytes}"
            )
        end = offset + nbytes
        low, high = max(start - offset, 0), min(stop - offset, nbytes)
        if low >= high:
            continue
        data = what if isinstance(what, bytes) else what.data
        if data is not None:
            yield Given(offset + low, data[low:high])
        elif isinstance(what, Fill):
            yield from _payload(
                offset, what, low, high, block=block, tile=tile, long=long, unit=unit
            )


def _payload(
    offset: int, fill: Fill, low: int, high: int, *, block: int, tile: int, long: int, unit: int
) -> Iterator[Write]:
    """Bytes ``low`` to ``high`` of a payload."""
    box = Box(fill)
    itemsize = fill.target_dtype.itemsize
    position, end = low // itemsize, high // itemsize
    if position * itemsize != low or end * itemsize != high:
        raise ValueError(f"{low} or {high} lies inside an element of {itemsize} bytes")
    for part in () if fill.is_computed else box.long_runs(long):
        begin, stop = max(part.target, position), min(part.target + part.numel, end)
        if begin >= stop:
            continue
        yield from _tiles(offset, box, position, begin, tile=tile)
        position = stop
        source = part.offset + (begin - part.target) * itemsize
        nbytes = (stop - begin) * itemsize
        at = offset + begin * itemsize
        yield from _runs(at, part.file, source, nbytes, block=block, long=long, unit=unit)
    is_one_run = not fill.is_computed and len(fill.parts) == 1 and not box.is_relabelled
    if position * itemsize == low and is_one_run:
        yield Run(offset + low, high - low, fill.parts[0].file, fill.parts[0].offset + low)
    else:
        yield from _tiles(offset, box, position, end, tile=tile)


def _tiles(offset: int, box: Box, start: int, stop: int, *, tile: int) -> Iterator[Tile]:
    if start == stop:
        return
    itemsize = widest = box.fill.target_dtype.itemsize
    if box.fill.changes:
        from dcpconv.engine.grids import ROWS  # noqa: PLC0415 - few are worked out

        widest = max(itemsize, box.fill.computed_dtype.itemsize)
        row = widest * max(changed.entry.shape[-1] for changed in box.fill.changes)
        tile = min(tile, max(CACHED, ROWS * row))  # no less than a product computes at a time
    elif not box.is_fragmented:
        tile = min(tile, CACHED)
    step = box.tile(tile // max(widest, box.itemsize) * box.itemsize)
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        nbytes = (end - begin) * itemsize
        yield Tile(offset + begin * itemsize, nbytes, box, begin, end, offset)


def _runs(
    offset: int, file: str, source_offset: int, nbytes: int, *, block: int, long: int, unit: int
) -> Iterator[Run]:
    """A long run with its ends cut off where that leaves whole blocks on both sides."""
    head = -offset % block
    whole = (nbytes - head) // block * block
    if (offset - source_offset) % block or whole < long:
        head, whole = 0, nbytes
    if head:
        yield Run(offset, head, file, source_offset)
    done, end = head, head + whole
    while done < end:
        # The last one takes what would be too short to be a unit.
        length = unit if end - done >= unit + long else end - done
        yield Run(offset + done, length, file, source_offset + done)
        done += length
    if end < nbytes:
        yield Run(offset + end, nbytes - end, file, source_offset + end)

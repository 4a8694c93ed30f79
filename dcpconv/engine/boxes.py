"""Read a target box out of scattered source bytes, in target order.

A relabelled, sharded or stacked box is a nest of loops over the source (``Part``).  The box is
built in tiles small enough to buffer: ``restrict`` cuts every nest down to a tile, and the pieces
are read with as few system calls as their bytes allow: one ``preadv`` puts a thousand rows where
they belong.  Memory is the caller's tile and scratch, never more.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from dcpconv.core.outline import Fill, Loop, Part, longest_gap, run_of, starts_of
from dcpconv.stores.local import SourceFile, Sources

if TYPE_CHECKING:
    from dcpconv.engine.spans import Assign

MAX_GAP = 8 << 10
"""Bytes between two wanted runs that are cheaper to read and drop than to skip: about as long as a
system call takes."""

MAX_IOVECS = 1024
"""Buffers in one ``preadv``: ``IOV_MAX`` on Linux and macOS."""

SHORT_RUN = 256
"""Runs below this many bytes are spread by strided assignment: as iovecs they would cost more in
bookkeeping than in bytes."""

LONG_RUN = 8 << 10
"""The same where one call assigns a whole nest: from so many bytes on, copying them a second time
costs more than a buffer of their own."""

MAX_SLICES = 1 << 14
"""Slices kept per buffer, 200 bytes each."""

JUNK = memoryview(bytearray(MAX_GAP))  # gaps are read into it by every thread and by nobody out

ByteRun = tuple[int, int, int]
"""``(source offset, target offset, nbytes)``."""

Pieces = tuple[tuple[int, int], ...]
"""``(target offset or -1 to drop, nbytes)``, in the order of the source."""

Pread = tuple[int, int, Pieces]
"""One ``preadv``: ``(source offset, nbytes, pieces)``."""


def restrict(part: Part, start: int, stop: int, *, itemsize: int) -> tuple[Part, ...]:
    """Return the elements of ``part`` that land in ``start <= target < stop``, as few nests.

    Args:
        part: Any nest whose target steps are positive.
        start: First element of the interval, in elements of the target box.
        stop: End of the interval.
        itemsize: Bytes per element, in which ``Part.offset`` moves.

    >>> rows = Part("a", 0, 0, ((4, 10, 3), (3, 1, 1)))
    >>> [(p.offset, p.target, p.loops) for p in restrict(rows, 2, 9, itemsize=1)]
    [(2, 2, ()), (10, 3, ((2, 10, 3), (3, 1, 1)))]
    """
    nest = tuple(sorted(part.loops, key=lambda loop: -loop[2]))
    found = _cut(part.offset, part.target, nest, start, stop, itemsize)
    return tuple(
        Part(part.file, offset, target, loops, part.half) for offset, target, loops in found
    )


def _cut(
    offset: int, target: int, loops: tuple[Loop, ...], start: int, stop: int, itemsize: int
) -> Iterator[tuple[int, int, tuple[Loop, ...]]]:
    span = sum((count - 1) * step for count, _, step in loops)
    if target >= stop or target + span < start:
        return
    if start <= target and target + span < stop:
        yield offset, target, _merged(loops)
        return
    (count, source_step, step), inner = loops[0], loops[1:]
    reach = span - (count - 1) * step
    touched = max(0, -((target + reach - start) // step))
    whole = max(0, -((target - start) // step))
    whole_end = min(count, (stop - 1 - target - reach) // step + 1)
    touched_end = min(count, (stop - 1 - target) // step + 1)
    if whole >= whole_end:
        whole = whole_end = touched_end
    for index in range(touched, whole):
        at = offset + index * source_step * itemsize
        yield from _cut(at, target + index * step, inner, start, stop, itemsize)
    if whole < whole_end:
        at = offset + whole * source_step * itemsize
        kept = ((whole_end - whole, source_step, step), *inner)
        yield at, target + whole * step, _merged(kept)
    for index in range(whole_end, touched_end):
        at = offset + index * source_step * itemsize
        yield from _cut(at, target + index * step, inner, start, stop, itemsize)


def _merged(loops: Iterable[Loop]) -> tuple[Loop, ...]:
    """Without loops that run once, and with neighbours joined that step as one."""
    kept: list[Loop] = []
    for count, source_step, step in loops:
        if count == 1:
            continue
        if kept and kept[-1][1:] == (count * source_step, count * step):
            kept[-1] = (kept[-1][0] * count, source_step, step)
        else:
            kept.append((count, source_step, step))
    return tuple(kept)


class Slices:
    """Slices of one buffer, kept from tile to tile: making one takes longer than reading into it.

    Args:
        buffer: What they are slices of.
    """

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self._kept: dict[tuple[int, int], tuple[Pieces, list[memoryview]]] = {}
        self._count = 0

    def of(self, base: int, pieces: Pieces) -> list[memoryview]:
        """Where the pieces go, ``base`` bytes into the buffer."""
        # The identity of a tuple that the entry itself keeps alive: hashing it would take longer.
        key = (base, id(pieces))
        found = self._kept.get(key)
        if found is None:
            if self._count + len(pieces) > MAX_SLICES:
                self._kept.clear()
                self._count = 0
            found = self._kept[key] = (pieces, _slices(self.buffer, base, pieces))
            self._count += len(pieces)
        return found[1]


class Box:
    """A ``Fill`` prepared for being read tile by tile.

    Attributes:
        fill: What it consists of.
        itemsize: Bytes per element as read.
        is_relabelled: Whether any part is more than one run.
        is_fragmented: Whether any part has runs too short to read one by one.

    Raises:
        ValueError: The parts do not have as many elements as the box.
    """

    __slots__ = ("_ends", "_targets", "fill", "is_fragmented", "is_relabelled", "itemsize")

    def __init__(self, fill: Fill) -> None:
        covered = sum(part.numel for part in fill.parts)
        if covered != fill.numel:
            raise ValueError(f"parts cover {covered} of the {fill.numel} elements of a fill")
        self.fill = fill
        self.itemsize = fill.source_dtype.itemsize
        self.is_relabelled = not all(part.is_contiguous for part in fill.parts)
        self.is_fragmented = any(
            not part.is_contiguous and run_of(part.loops) * self.itemsize < SHORT_RUN
            for part in fill.parts
        )
        self._targets = [part.target for part in fill.parts]
        self._ends = list(accumulate((_end(part) for part in fill.parts), max))

    def parts_in(self, start: int, stop: int) -> Iterator[Part]:
        """Everything that lands in the interval, cut to it."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._targets, stop)
        for part in self.fill.parts[first:last]:
            yield from restrict(part, start, stop, itemsize=self.itemsize)

    def is_hole(self, start: int, stop: int, *, sources: Sources) -> bool:
        """Whether the interval comes from nothing but holes of sparse files."""
        for part in self.parts_in(start, stop):
            reach = self.itemsize * (1 + sum((count - 1) * step for count, step, _ in part.loops))
            with sources.open(part.file) as source:
                if not source.is_hole(part.offset, reach):
                    return False
        return True

    def long_runs(self, nbytes: int) -> tuple[Part, ...]:
        """Every contiguous run of at least ``nbytes`` as a part of its own, by target."""
        found: list[Part] = []
        for part in self.fill.parts:
            run = run_of(part.loops)
            if run * self.itemsize < nbytes:
                continue
            outer = tuple(loop for loop in part.loops if loop[1:] != (1, 1))
            found.extend(
                Part(part.file, part.offset + source, part.target + target // self.itemsize, loops)
                for loops in [((run, 1, 1),) if run > 1 else ()]
                for source, target in starts_of(outer, self.itemsize)
            )
        return tuple(sorted(found, key=lambda part: part.target))

    def tile(self, nbytes: int) -> int:
        """Elements per tile of at most ``nbytes`` that cuts as few loops as possible."""
        most = max(1, nbytes // self.itemsize)
        steps = {step for part in self.fill.parts for _, _, step in part.loops if step <= most}
        step = max(steps, default=1)
        return most // step * step

    def read(
        self,
        start: int,
        stop: int,
        *,
        sources: Sources,
        into: memoryview,
        scratch: Callable[[], memoryview] = lambda: memoryview(bytearray(1 << 20)),
        slices: Slices | None = None,
        at: int = 0,
        assign: Assign | None = None,
    ) -> None:
        """Put elements ``start`` to ``stop``, in the source dtype, into ``into``.

        Args:
            start: First element of the interval.
            stop: End of the interval.
            sources: Where the parts' files are open.
            into: Bytes of exactly the interval.
            scratch: Gives room, 4 KiB or more, for runs too short to read one by one.
            slices: Of the buffer that ``into`` is part of, where many intervals are read into it.
            at: Where ``into`` begins in that buffer.
            assign: How to copy a whole nest at once, for memory that is read into but once: rows
                are then read with what lies between them, and not each to its place.
        """
        runs: dict[str, list[ByteRun]] = {}
        for part in self.parts_in(start, stop):
            base = (part.target - start) * self.itemsize
            if part.is_contiguous:
                found = (part.offset, base, part.numel * self.itemsize)
                runs.setdefault(part.file, []).append(found)
            elif not _is_spread(part.loops, self.itemsize, at_once=assign is not None):
                with sources.open(part.file) as source:
                    nest = _nest_reads(part.loops, self.itemsize)
                    if slices is None:
                        _perform(source, part.offset, nest, into=into, base=base)
                    else:
                        for begin, nbytes, pieces in nest:
                            views = slices.of(at + base, pieces)
                            source.read(part.offset + begin, views, nbytes)
            else:
                from dcpconv.engine.spans import spread  # noqa: PLC0415 - few runs are short

                with sources.open(part.file) as source:
                    spread(
                        source,
                        part,
                        self.itemsize,
                        into[base:],
                        scratch=scratch(),
                        gap=MAX_GAP,
                        assign=assign,
                    )
        read_runs(runs, sources=sources, into=into)


def read_runs(
    runs: dict[str, list[ByteRun]], *, sources: Sources, into: memoryview, base: int = 0
) -> None:
    """Read every run of every file to its place in ``into``, neighbours together."""
    for file, found in runs.items():
        found.sort()
        with sources.open(file) as source:
            _perform(source, 0, _reads(found), into=into, base=base)


def _end(part: Part) -> int:
    return part.target + 1 + sum((count - 1) * step for count, _, step in part.loops)


def _is_spread(loops: tuple[Loop, ...], itemsize: int, *, at_once: bool) -> bool:
    """Whether runs go through scratch memory."""
    run = run_of(loops) * itemsize
    return run < SHORT_RUN or (
        at_once and run < LONG_RUN and longest_gap(loops, itemsize) <= MAX_GAP
    )


@lru_cache(maxsize=16)
def _nest_reads(loops: tuple[Loop, ...], itemsize: int) -> tuple[Pread, ...]:
    """Reads for a nest, relative to its first element: the same for all heads of all layers."""
    nbytes = run_of(loops) * itemsize
    outer = sorted((loop for loop in loops if loop[1:] != (1, 1)), key=lambda loop: -loop[1])
    starts = starts_of(outer, itemsize)
    starts.sort()
    return tuple(_reads((source, target, nbytes) for source, target in starts))


def _reads(runs: Iterable[ByteRun]) -> Iterator[Pread]:
    """Group runs, sorted by source, so that each group is one ``preadv``."""
    begin = end = 0
    pieces: list[tuple[int, int]] = []
    for source, target, nbytes in runs:
        gap = source - end
        if pieces and (gap < 0 or gap > MAX_GAP or len(pieces) > MAX_IOVECS - 2):
            yield begin, end - begin, tuple(pieces)
            pieces = []
        if not pieces:
            begin = source
        elif gap:
            pieces.append((-1, gap))
        elif pieces[-1][0] + pieces[-1][1] == target:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + nbytes)
            end = source + nbytes
            continue
        pieces.append((target, nbytes))
        end = source + nbytes
    if pieces:
        yield begin, end - begin, tuple(pieces)


def _perform(
    source: SourceFile, offset: int, reads: Iterable[Pread], *, into: memoryview, base: int
) -> None:
    for at, nbytes, pieces in reads:
        source.read(offset + at, _slices(into, base, pieces), nbytes)


def _slices(into: memoryview, base: int, pieces: Pieces) -> list[memoryview]:
    return [
        into[base + target : base + target + length] if target >= 0 else JUNK[:length]
        for target, length in pieces
    ]

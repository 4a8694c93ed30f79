"""Spans of a file that are read whole, gaps and all, and whose elements are then moved apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Literal

from dcpconv.core.outline import Loop, Part, longest_gap, run_of, starts_of
from dcpconv.stores.local import SourceFile

Assign = Callable[[tuple[Loop, ...], int, memoryview, memoryview], None]
"""Copies a nest of elements of so many bytes between two buffers that begin at its first one."""

_CODES: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


def spread(
    source: SourceFile,
    part: Part,
    itemsize: int,
    into: memoryview,
    *,
    scratch: memoryview,
    gap: int,
    assign: Assign | None = None,
) -> None:
    """Read source spans whole and move the elements of each to their places.

    Args:
        source: The part's file.
        part: A nest that is more than one run.
        itemsize: Bytes per element.
        into: Memory that begins at the first element's place.
        scratch: Room for a span.
        gap: Bytes between runs that are read and dropped at most.
        assign: How to move them, if not by ``assign_runs``.
    """
    move = assign or assign_runs
    loops = tuple(sorted(part.loops, key=lambda loop: -loop[1]))
    for at, target, nest in _spans(0, 0, loops, itemsize, len(scratch), gap):
        span = _reach(nest, itemsize)
        view = scratch[:span]
        source.read(part.offset + at, [view], span)
        move(nest, itemsize, view, into[target:])


def _spans(
    offset: int, target: int, loops: tuple[Loop, ...], itemsize: int, room: int, gap: int
) -> Iterator[tuple[int, int, tuple[Loop, ...]]]:
    """Cut a nest, ordered by source, into nests whose source span fits and has no long gap."""
    dense = longest_gap(loops, itemsize) <= gap
    if dense and _reach(loops, itemsize) <= room:
        yield offset, target, loops
        return
    (count, source_step, step), inner = loops[0], loops[1:]
    together = 1
    if dense and (reach := _reach(inner, itemsize)) <= room:
        together += (room - reach) // (source_step * itemsize)
    for index in range(0, count, together):
        some = min(together, count - index)
        nest = ((some, source_step, step), *inner) if some > 1 else inner
        a, b = index * source_step * itemsize, index * step * itemsize
        if some > 1:
            yield offset + a, target + b, nest
        else:
            yield from _spans(offset + a, target + b, nest, itemsize, room, gap)


def _reach(loops: tuple[Loop, ...], itemsize: int) -> int:
    """Bytes of the source from a nest's first element to its last."""
    return itemsize * (1 + sum((count - 1) * step for count, step, _ in loops))


def assign_runs(
    loops: tuple[Loop, ...], itemsize: int, source: memoryview, into: memoryview
) -> None:
    """``Assign`` one loop at a time, with the standard library alone."""
    width, vector, starts = _strides(loops, itemsize)
    code = _CODES[width]
    reach = itemsize * (1 + sum((count - 1) * step for count, _, step in loops))
    read, write = source.cast(code), into[:reach].cast(code)
    count, source_step, step = vector
    read_reach, write_reach = (count - 1) * source_step + 1, (count - 1) * step + 1
    for a, b in starts:
        if source_step:
            write[b : b + write_reach : step] = read[a : a + read_reach : source_step]
        else:  # one element many times over, as Tensor.expand() leaves it
            write[b : b + write_reach : step] = memoryview(bytes(read[a : a + 1]) * count).cast(
                code
            )


@lru_cache(maxsize=16)
def _strides(
    loops: tuple[Loop, ...], itemsize: int
) -> tuple[int, Loop, tuple[tuple[int, int], ...]]:
    """``(bytes per unit, the loop to vectorise, where it starts)``, steps and starts in units."""
    width, units = units_of(loops, itemsize)
    vector = max(units, key=lambda loop: (loop[0], loop[1:] == (1, 1)))
    units.remove(vector)
    return width, vector, tuple(starts_of(units, 1))


def units_of(loops: tuple[Loop, ...], itemsize: int) -> tuple[int, list[Loop]]:
    """The same nest over the widest integers that fit: their bytes, and loops that step in them.

    >>> units_of(((4, 10, 4), (4, 1, 1)), 2)
    (4, [(4, 5, 2), (2, 1, 1)])
    """
    run = run_of(loops) * itemsize
    outer = [(c, s * itemsize, t * itemsize) for c, s, t in loops if (s, t) != (1, 1)]
    width = next(
        width
        for width in (8, 4, 2, 1)
        if run % width == 0 and all(s % width == 0 and t % width == 0 for _, s, t in outer)
    )
    units = [(count, s // width, t // width) for count, s, t in outer]
    if run > width or not units:
        units.append((run // width, 1, 1))
    return width, units

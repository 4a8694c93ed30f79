"""Cut a part of a matrix in scaled blocks so that few elements need few factors at a time.

The factor of an element follows from its place in the *source* matrix, whatever place it goes to.
Neighbours of the target may lie far apart in the source, so the cuts go where the source has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dcpconv.core.outline import BlockScale, Part

Span = tuple[int, int]
"""``(first, count)`` of factors, in C order."""


def in_blocks(
    part: Part, scale: BlockScale, *, itemsize: int, numel: int, room: int
) -> Iterator[tuple[Part, Span]]:
    """The same elements as parts that are small enough, each with the factors that it needs.

    Args:
        part: Elements of the matrix, each at any place of the target.
        scale: What the blocks are.
        itemsize: Bytes per element of the matrix.
        numel: Most elements of a part.
        room: Most factors of a part; at least 1.

    >>> from dcpconv.core.dtypes import BY_NAME
    >>> scale = BlockScale("a", 0, 24, 6, (2, 3), "a", 24, BY_NAME["float32"], (2, 2))
    >>> rows = Part("a", 6, 0, ((2, 12, 6), (6, 1, 1)))
    >>> [(p.offset, p.numel, s) for p, s in in_blocks(rows, scale, itemsize=1, numel=9, room=4)]
    [(6, 6, (0, 2)), (18, 6, (2, 2))]
    """
    first = (part.offset - scale.offset) // itemsize
    last = first + sum((count - 1) * step for count, step, _ in part.loops)
    span = _span(scale, first, last)
    if part.numel <= numel and span[1] <= room:
        yield part, span
        return
    at = max(range(len(part.loops)), key=lambda at: (part.loops[at][0] - 1) * part.loops[at][1])
    count, step, target_step = part.loops[at]
    for start, stop in ((0, count // 2), (count // 2, count)):
        kept = ((stop - start, step, target_step),) if stop - start > 1 else ()
        half = replace(
            part,
            offset=part.offset + start * step * itemsize,
            target=part.target + start * target_step,
            loops=(*part.loops[:at], *kept, *part.loops[at + 1 :]),
        )
        yield from in_blocks(half, scale, itemsize=itemsize, numel=numel, room=room)


def _span(scale: BlockScale, first: int, last: int) -> Span:
    """Factors of all elements from ``first`` to ``last`` of the matrix."""
    down, across = scale.block
    blocks_across = scale.factors_shape[1]
    row, column = divmod(first, scale.columns)
    last_row, last_column = divmod(last, scale.columns)
    if row == last_row:
        begin, end = column // across, last_column // across
    else:
        begin, end = 0, blocks_across - 1
    low = row // down * blocks_across + begin
    return low, last_row // down * blocks_across + end - low + 1

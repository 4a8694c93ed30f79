"""Read weights in scaled blocks multiplied out, and such as adapters change, for files and for
live tensors alike.

The factors of a matrix are read as the elements need them, so that memory stays within the caller's
buffers whatever the size of the matrix or of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from dcpconv.core.dtypes import DType
from dcpconv.core.outline import BlockScale, Fill, Part
from dcpconv.engine import cast
from dcpconv.engine.boxes import Box
from dcpconv.engine.spans import Assign
from dcpconv.stores.local import Sources

_SPARE = 4
"""Share of the scratch memory that is not for elements: a quarter is for short runs and factors."""

Span = tuple[int, int]
"""``(first, count)`` of factors, in C order."""


def multiply_out(
    box: Box,
    start: int,
    stop: int,
    *,
    source: memoryview,
    into: memoryview,
    sources: Sources,
    scratch: memoryview,
    dtype: DType | None = None,
) -> tuple[int, int]:
    """Multiply elements ``start`` to ``stop`` of a box by the factors of their blocks.

    Args:
        box: A box whose fill has scales.
        start: First element of the interval.
        stop: End of the interval.
        source: The elements as they are stored, writable memory.
        into: As many elements of ``dtype``.
        sources: Where the factors' files are open.
        scratch: Room for factors, 4 KiB or more.
        dtype: Type of the products; the fill's target dtype by default.

    Returns:
        ``(overflowed, underflowed)``, as ``cast``.
    """
    fill, itemsize = box.fill, box.itemsize
    overflowed = underflowed = 0
    for part in box.parts_in(start, stop):
        scale = next(scale for scale in fill.scales if scale.holds(part, itemsize))
        width = scale.factors_dtype.itemsize
        room = len(scratch) // width
        for cut, (first, count) in in_blocks(
            part, scale, itemsize=itemsize, numel=cast.STEP, room=room
        ):
            factors = scratch[: count * width]
            with sources.open(scale.factors_file) as opened:
                opened.read(scale.factors_offset + first * width, [factors], len(factors))
            over, under = cast.dequantise(
                source,
                into,
                source_dtype=fill.source_dtype,
                target_dtype=dtype or fill.target_dtype,
                part=replace(cut, target=cut.target - start),
                scale=scale,
                factors=factors,
                first=first,
            )
            overflowed += over
            underflowed += under
    return overflowed, underflowed


def work_out(
    box: Box,
    start: int,
    stop: int,
    *,
    source: memoryview,
    into: memoryview,
    sources: Sources,
    scratch: memoryview,
) -> None:
    """Make elements ``start`` to ``stop`` of a box, in ``fill.computed_dtype``: multiplied out, and
    changed as adapters say.

    Args:
        box: A box whose fill has changes.
        start: First element of the interval.
        stop: End of the interval.
        source: The elements as they are stored, writable memory.
        into: As many elements of the computed dtype.
        sources: Where the files are open.
        scratch: Room for factors, 4 KiB or more.
    """
    from dcpconv.engine import merging  # noqa: PLC0415 - few conversions merge adapters

    fill = box.fill
    dtype = fill.computed_dtype
    if fill.scales:
        multiply_out(
            box,
            start,
            stop,
            source=source,
            into=into,
            sources=sources,
            scratch=scratch,
            dtype=dtype,
        )
    else:
        cast.cast(source, into, source_dtype=fill.source_dtype, target_dtype=dtype)
    values = cast.tensor(into, dtype)
    merging.merge(fill, box.parts_in(start, stop), values, start, sources)


class Computed:
    """A box of scaled blocks, or one that adapters change, that reads as if it were stored so.

    Attributes:
        itemsize: Bytes per element as it reads: of the fill's target dtype.
        is_relabelled: Always, since no element is read where it goes.
    """

    __slots__ = ("_box", "is_relabelled", "itemsize")

    def __init__(self, fill: Fill) -> None:
        if fill.changes and fill.target_dtype is not fill.computed_dtype:
            raise ValueError(f"{fill.target_dtype} would round what {fill.computed_dtype} holds")
        self._box = Box(fill)
        self.itemsize = fill.target_dtype.itemsize
        self.is_relabelled = True

    def tile(self, nbytes: int) -> int:
        """Elements per tile of at most ``nbytes`` that cuts as few loops as possible."""
        return self._box.tile(nbytes // self.itemsize * self._box.itemsize)

    def read(
        self,
        start: int,
        stop: int,
        *,
        sources: Sources,
        into: memoryview,
        scratch: Callable[[], memoryview] = lambda: memoryview(bytearray(1 << 20)),
        assign: Assign | None = None,
    ) -> None:
        """Put elements ``start`` to ``stop``, as they are computed, into ``into``.

        Args:
            start: First element of the interval.
            stop: End of the interval.
            sources: Where the files are open.
            into: Memory of exactly the interval.
            scratch: Gives room, 16 KiB or more; what is allocated beside it is small, or what
                ``merging`` says.
            assign: As ``Box.read`` takes it.
        """
        room = scratch()
        spare, stored = room[: len(room) // _SPARE], room[len(room) // _SPARE :]
        step = self._box.tile(len(stored))
        make = work_out if self._box.fill.changes else multiply_out
        for at in range(start, stop, step):
            end = min(at + step, stop)
            source = stored[: (end - at) * self._box.itemsize]
            self._box.read(
                at, end, sources=sources, into=source, scratch=lambda: spare, assign=assign
            )
            make(
                self._box,
                at,
                end,
                source=source,
                into=into[(at - start) * self.itemsize : (end - start) * self.itemsize],
                sources=sources,
                scratch=spare,
            )


def in_blocks(
    part: Part, scale: BlockScale, *, itemsize: int, numel: int, room: int
) -> Iterator[tuple[Part, Span]]:
    """The same elements as parts that are small enough, each with the factors that it needs.

    The factor of an element follows from its place in the *source* matrix, whatever place it goes
    to.  Neighbours of the target may lie far apart in the source, so the cuts go where the source
    has them.

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
    first = scale.element(part, itemsize)
    last = first + scale.packed * sum((count - 1) * step for count, step, _ in part.loops)
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
    row, column = divmod(first, scale.columns)
    last_row, last_column = divmod(last, scale.columns)
    if row != last_row:
        column, last_column = 0, scale.columns - 1
    low = scale.factor(row, column)
    return low, scale.factor(last_row, last_column) - low + 1


def plain_box(box: Box | Computed) -> Box:
    """The box as it is stored, whose elements a computed one is made of."""
    return box._box if isinstance(box, Computed) else box  # noqa: SLF001  of the same module

"""Read weights in scaled blocks multiplied out, and such as adapters change, for files and for
live tensors alike.

The factors of a matrix are read as the elements need them, so that memory stays within the caller's
buffers whatever the size of the matrix or of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dcpconv.core.dtypes import DType
from dcpconv.core.outline import Fill
from dcpconv.engine import cast, merging
from dcpconv.engine.blocks import in_blocks
from dcpconv.engine.boxes import Box
from dcpconv.stores.local import Sources

_SPARE = 4
"""Share of the scratch memory that is not for elements: a quarter is for short runs and factors."""


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
        scale = next(
            scale
            for scale in fill.scales
            if scale.file == part.file and 0 <= part.offset - scale.offset < scale.numel * itemsize
        )
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
    ) -> None:
        """Put elements ``start`` to ``stop``, as they are computed, into ``into``.

        Args:
            start: First element of the interval.
            stop: End of the interval.
            sources: Where the files are open.
            into: Memory of exactly the interval.
            scratch: Gives room, 16 KiB or more; what is allocated beside it is small, or what
                ``merging`` says.
        """
        room = scratch()
        spare, stored = room[: len(room) // _SPARE], room[len(room) // _SPARE :]
        step = self._box.tile(len(stored))
        make = work_out if self._box.fill.changes else multiply_out
        for at in range(start, stop, step):
            end = min(at + step, stop)
            source = stored[: (end - at) * self._box.itemsize]
            self._box.read(at, end, sources=sources, into=source, scratch=lambda: spare)
            make(
                self._box,
                at,
                end,
                source=source,
                into=into[(at - start) * self.itemsize : (end - start) * self.itemsize],
                sources=sources,
                scratch=spare,
            )

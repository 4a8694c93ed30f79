"""Which source bytes become which target bytes: coverage in, copies out, still nothing read."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, product

from dcpconv.core.catalog import Chunk, Extent, KeyPath, TensorEntry, c_strides
from dcpconv.core.dtypes import FP4, DType
from dcpconv.core.errors import FormatError
from dcpconv.core.layout import Limits, anonymous, nest, overlap
from dcpconv.core.outline import BlockScale, Changed, Fill, Loop, OutChunk, OutTensor, Part
from dcpconv.formats.boxes import Region
from dcpconv.plan.coverage import Coverage, Piece, Target
from dcpconv.plan.derived import encode


def fill_of(
    target: Target,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    *,
    dtype: DType | None = None,
) -> Fill:
    """How a region of a target tensor gets its elements.

    The region may be a whole tensor on its way to a file, or the shard of one rank.

    Args:
        target: The tensor, with its pieces.
        offsets: First element of the region in every dim.
        sizes: Length of the region in every dim.
        dtype: Element type to store; the source's own by default.

    Raises:
        FormatError: The stored chunks do not cover the region exactly once.
    """
    numel = _prod(sizes)
    if target.values is not None:
        stored = dtype or target.dtype
        box = _box(target.values, target.shape, offsets, sizes)
        return Fill(stored, stored, numel, (), encode(box, stored))
    parts: list[Part] = []
    if numel:
        for piece in target.pieces:
            parts.extend(_parts(piece, target.shape, offsets, sizes))
        if len(parts) > 1:
            parts.sort(key=lambda part: part.target)
            is_plain = not any(p.entry.factors or p.entry.updates for p in target.pieces)
            parts = [*_joined(parts, target.pieces[0].entry.dtype)] if is_plain else parts
        covered = sum(part.numel for part in parts)
        if covered != numel:
            raise FormatError(
                "the stored chunks do not cover the tensor exactly once",
                [
                    ("key", target.key),
                    ("region", f"offsets {list(offsets)} sizes {list(sizes)}"),
                    ("expected", f"{numel} elements, found {covered}"),
                ],
                hint="a rank file is missing, or two runs were saved into one directory",
            )
    scales = tuple(chain.from_iterable(_scales(piece.entry) for piece in target.pieces))
    changes = tuple(chain.from_iterable(_changes(piece.entry) for piece in target.pieces))
    source = target.pieces[0].entry.dtype if scales or changes else target.dtype
    return Fill(source, dtype or target.dtype, numel, tuple(parts), scales=scales, changes=changes)


def _joined(parts: Iterable[Part], dtype: DType) -> Iterator[Part]:
    """The same with parts in one that follow each other on both sides: what a rank held of a flat
    tensor is the rest of a row, some rows, and the beginning of another."""
    held: Part | None = None
    for part in parts:
        is_plain = part.is_contiguous and dtype is not FP4
        if (
            held is not None
            and is_plain
            and held.is_contiguous
            and held.file == part.file
            and held.target + held.numel == part.target
            and held.offset + held.numel * dtype.itemsize == part.offset
        ):
            held = Part(held.file, held.offset, held.target, _run(held.numel + part.numel))
            continue
        if held is not None:
            yield held
        held = replace(part, loops=_run(part.numel)) if is_plain else part
    if held is not None:
        yield held


@lru_cache(maxsize=1024)
def _run(numel: int) -> tuple[Loop, ...]:
    """One run of so many elements; ranks hold as many as others, so that few are in memory."""
    return ((numel, 1, 1),) if numel > 1 else ()


def whole(shape: tuple[int, ...]) -> tuple[Region, ...]:
    """One chunk: the whole tensor."""
    return (((0,) * len(shape), shape),)


def row_chunks(shape: tuple[int, ...], n: int) -> tuple[Region, ...]:
    """Rows split over ``n`` ranks as FSDP2 does: ceil(rows / n) each, the last ones fewer or none.

    Source:
        torch 2.13 ``Shard._split_tensor`` in ``torch/distributed/tensor/placement_types.py``,
        which follows ``torch.chunk``.

    >>> row_chunks((5, 2), 3)
    (((0, 0), (2, 2)), ((2, 0), (2, 2)), ((4, 0), (1, 2)))
    """
    if n <= 1 or not shape or shape[0] == 0:
        return whole(shape)
    rows = -(-shape[0] // n)
    return tuple(
        ((start, *(0,) * (len(shape) - 1)), (min(rows, shape[0] - start), *shape[1:]))
        for start in range(0, shape[0], rows)
    )


def make_plan(
    coverage: Coverage,
    *,
    path_of: Callable[[str], KeyPath],
    regions: Callable[[tuple[int, ...]], Sequence[Region]] = whole,
    dtype_of: Callable[[Target], DType] | None = None,
) -> tuple[OutTensor, ...]:
    """The tensors of a result and how each of their chunks is filled.

    Args:
        coverage: A coverage without faults.
        path_of: Where a bare target key nests in the result.
        regions: Boxes that a tensor of some shape is stored as.
        dtype_of: Element type to store a tensor as; its own by default.
    """
    made: list[OutTensor] = []
    for target in coverage.targets:
        path = path_of(target.key)
        dtype = dtype_of(target) if dtype_of else target.dtype
        made.append(
            OutTensor(
                key=".".join(map(str, path)),
                path=path,
                dtype=dtype,
                shape=target.shape,
                chunks=tuple(
                    OutChunk(offsets, sizes, fill_of(target, offsets, sizes, dtype=dtype))
                    for offsets, sizes in regions(target.shape)
                ),
                tied_to=".".join(map(str, path_of(target.tied_to))) if target.tied_to else None,
            )
        )
    return tuple(made)


def _parts(
    piece: Piece, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> Iterable[Part]:
    entry = piece.entry
    chunks = entry.chunks
    if (
        piece.wanted is None
        and len(chunks) == 1
        and chunks[0].strides is None
        and sizes == entry.shape == chunks[0].sizes
    ):
        numel = entry.numel
        loops = ((numel, 1, 1),) if numel > 1 else ()
        extent = chunks[0].extent
        return (Part(extent.file, extent.offset, 0, loops),)
    return _general_parts(piece, shape, offsets, sizes)


def _general_parts(
    piece: Piece, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> Iterable[Part]:
    wanted = piece.wanted or anonymous(shape)
    placed = piece.placed or anonymous(piece.entry.shape)
    target_base, target_steps = wanted.affine(c_strides(sizes), offsets)
    itemsize = piece.entry.dtype.itemsize
    boxes = [
        box
        for wanted_box in wanted.boxes(offsets, sizes)
        if (box := overlap(wanted_box, piece.limit)) is not None
    ]
    for chunk in piece.entry.chunks:
        if 0 in chunk.sizes:
            continue
        strides = chunk.strides or c_strides(chunk.sizes)
        source_base, source_steps = placed.affine(strides, chunk.offsets)
        stored = list(placed.boxes(chunk.offsets, chunk.sizes))
        for box in boxes:
            for stored_box in stored:
                both = overlap(box, stored_box)
                if both is None:
                    continue
                place = _address(source_base, source_steps, both)
                target = _address(target_base, target_steps, both)
                loops = nest(both, _Steps(source_steps), _Steps(target_steps))
                if piece.entry.dtype is FP4:
                    yield from _halves(chunk.extent, place, target, loops)
                    continue
                offset = chunk.extent.offset + itemsize * place
                yield Part(chunk.extent.file, offset, target, loops)


def _halves(extent: Extent, place: int, target: int, loops: tuple[Loop, ...]) -> Iterable[Part]:
    """Elements of which two share a byte, as parts that read whole bytes.

    A loop over neighbours becomes two, over the lower and over the upper halves.
    """
    at = next((at for at, (_, step, _) in enumerate(loops) if step % 2), None)
    if at is None:
        halved = tuple((count, step // 2, target_step) for count, step, target_step in loops)
        yield Part(extent.file, extent.offset + place // 2, target, halved, place % 2)
        return
    count, step, target_step = loops[at]
    for first in range(2):
        some = (count - first + 1) // 2
        kept = ((some, 2 * step, 2 * target_step),) if some > 1 else ()
        rest = (*loops[:at], *kept, *loops[at + 1 :])
        yield from _halves(extent, place + first * step, target + first * target_step, rest)


def _scales(entry: TensorEntry) -> Iterable[BlockScale]:
    """The factors of every stored box."""
    factors = entry.factors
    if factors is None:
        return
    theirs = factors.entry.chunks
    is_packed = entry.dtype is FP4
    pairs = list(zip(entry.chunks, theirs, strict=False))
    are_whole = len(entry.chunks) == len(theirs) == 1
    if (
        any(chunk.strides for chunk in theirs)
        or (any(chunk.strides for chunk in entry.chunks) and not is_packed)
        or not (are_whole or (len(entry.chunks) == len(theirs) and _are_aligned(entry, pairs)))
    ):
        raise FormatError(
            "a tensor in scaled blocks is not stored in one piece",
            [("key", entry.key), ("chunks", len(entry.chunks))],
            hint="convert it as it is into an hf directory first, then dequantize that",
        )
    for chunk, scale in pairs:
        rows, columns = factors.matrix if are_whole else (0, chunk.sizes[-1])
        yield BlockScale(
            file=chunk.extent.file,
            offset=chunk.extent.offset,
            numel=entry.numel if are_whole else _prod(chunk.sizes),
            columns=columns,
            block=factors.block,
            factors_file=scale.extent.file,
            factors_offset=scale.extent.offset,
            factors_dtype=factors.entry.dtype,
            factors_shape=factors.grid if are_whole else (scale.sizes[0], scale.sizes[1]),
            rows=rows,
            packed=2 if is_packed else 1,
        )


def _are_aligned(entry: TensorEntry, pairs: Iterable[tuple[Chunk, Chunk]]) -> bool:
    """Whether every box of a matrix consists of the whole blocks whose factors are in one box."""
    factors = entry.factors
    if factors is None or entry.dtype is FP4 or {len(entry.shape), len(factors.entry.shape)} != {2}:
        return False
    sizes = factors.block
    if any(length % size for length, size in zip(entry.shape, sizes, strict=True)):
        return False
    return all(
        whole == count * size
        for box, theirs in pairs
        for own, of_factors in ((box.offsets, theirs.offsets), (box.sizes, theirs.sizes))
        for whole, count, size in zip(own, of_factors, sizes, strict=True)
    )


def _changes(entry: TensorEntry) -> Iterable[Changed]:
    if not entry.updates:
        return
    for chunk in entry.chunks:
        if chunk.strides is not None and chunk.strides != c_strides(chunk.sizes):
            raise FormatError(
                "a tensor that the adapter changes is not stored in C order",
                [("key", entry.key), ("strides", list(chunk.strides))],
                hint="convert the base as it is first, then merge into that",
            )
        yield Changed(entry, chunk)


def _box(
    values: Sequence[float],
    shape: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
) -> list[float]:
    strides = c_strides(shape)
    ranges = (range(o, o + n) for o, n in zip(offsets, sizes, strict=True))
    places = (sum(map(operator.mul, at, strides)) for at in product(*ranges))
    return [values[place] for place in places]


class _Steps(dict[str, int]):
    """Steps where an axis that one side keeps in its keys does not move within a tensor."""

    def __missing__(self, axis: str) -> int:
        return 0


def _address(base: int, steps: Mapping[str, int], box: Limits) -> int:
    return base + sum(box[axis][0] * step for axis, step in steps.items() if axis in box)


def _prod(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result

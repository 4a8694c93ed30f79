"""Which boxes of a tensor one rank holds, from mesh and placements alone.

Source:
    torch 2.13 ``torch/distributed/tensor/_utils.py`` (``compute_local_shape_and_global_offset``)
    and ``placement_types.py`` (``Shard``, ``_StridedShard``): a dim of n is cut over k ranks into
    runs of ceil(n / k), so that the last ranks may hold less, or nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

from dcpconv.core.catalog import Chunk, Extent
from dcpconv.formats.torchfile.pieces import MeshPlacement
from dcpconv.formats.torchfile.stored import StoredTensor

Runs = tuple[tuple[int, int], ...]
"""What a rank holds of one dim: ``(start, length)``, in the order in which it holds them."""


@dataclass(frozen=True, slots=True)
class RankBox:
    """A box of a tensor, and where it lies in what the rank held.

    Attributes:
        offsets: First element in the whole.
        sizes: In elements.
        inside: First element in the local tensor.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    inside: tuple[int, ...]


def local_runs(
    shape: Sequence[int],
    mesh: Sequence[int],
    coordinate: Sequence[int],
    placements: Sequence[MeshPlacement],
    order: Iterable[int],
) -> tuple[Runs, ...]:
    """What the rank at ``coordinate`` holds of every dim.

    Args:
        shape: Of the whole tensor.
        mesh: Ranks along every axis of the mesh.
        coordinate: The rank's place on every axis.
        placements: One for every axis.
        order: Axes in the order in which they cut.

    >>> shard = MeshPlacement("shard", 0)
    >>> local_runs((67,), (2,), (1,), [shard], [0])
    (((34, 33),),)
    >>> local_runs((8,), (2, 2), (0, 1), [MeshPlacement("strided", 0, 2), shard], [0, 1])
    (((4, 2),),)
    """
    held: list[Runs] = [((0, length),) for length in shape]
    for axis in order:
        placed, parts, index = placements[axis], mesh[axis], coordinate[axis]
        if placed.kind == "shard":
            held[placed.dim] = _share(held[placed.dim], parts, index)
        elif placed.kind == "strided":
            pieces = (
                _share(held[placed.dim], placed.factor, piece) for piece in range(placed.factor)
            )
            held[placed.dim] = tuple(run for runs in pieces for run in _share(runs, parts, index))
    return tuple(map(_joined, held))


def local_shape(runs: Iterable[Runs]) -> tuple[int, ...]:
    """The shape of what a rank holds.

    >>> local_shape((((0, 3), (5, 3)), ((0, 6),)))
    (6, 6)
    """
    return tuple(sum(length for _, length in dim) for dim in runs)


def parts(runs: Sequence[Runs]) -> Iterator[RankBox]:
    """The boxes that a rank holds: one, unless the runs of a dim have gaps.

    >>> [part.offsets for part in parts([((0, 3), (5, 3)), ((0, 6),)])]
    [(0, 0), (5, 0)]
    """
    starts = [[0, *accumulate(length for _, length in dim)] for dim in runs]
    placed = [
        [(run, start) for run, start in zip(dim, begin, strict=False) if run[1]]
        for dim, begin in zip(runs, starts, strict=True)
    ]
    for box in product(*placed):
        yield RankBox(
            offsets=tuple(start for (start, _), _ in box),
            sizes=tuple(length for (_, length), _ in box),
            inside=tuple(inside for _, inside in box),
        )


def chunk(part: RankBox, local: StoredTensor, file: str) -> Chunk:
    """A box of a local tensor, as the bytes it lies in."""
    if part.sizes == local.shape and local.is_contiguous:
        return Chunk(part.offsets, part.sizes, Extent(file, local.offset, local.nbytes))
    strides = local.strides
    first = sum(map(math.prod, zip(part.inside, strides, strict=True)))
    last = sum((size - 1) * stride for size, stride in zip(part.sizes, strides, strict=True))
    nbytes = (last + 1) * local.dtype.itemsize if math.prod(part.sizes) else 0
    extent = Extent(file, local.offset + first * local.dtype.itemsize, nbytes)
    is_contiguous = math.prod(part.sizes) * local.dtype.itemsize == nbytes and _descends(
        part.sizes, strides
    )
    return Chunk(part.offsets, part.sizes, extent, None if is_contiguous else strides)


def whole(tensor: StoredTensor) -> RankBox:
    """All of a tensor that a rank held alone."""
    nothing = (0,) * len(tensor.shape)
    return RankBox(nothing, tensor.shape, nothing)


def _share(runs: Runs, parts: int, index: int) -> Runs:
    """The run of ``torch.chunk`` that ``index`` gets, out of elements that may have gaps."""
    total = sum(length for _, length in runs)
    size = -(-total // parts)
    low, high = min(index * size, total), min((index + 1) * size, total)
    found: list[tuple[int, int]] = []
    position = 0
    for start, length in runs:
        first, last = max(low, position), min(high, position + length)
        if first < last:
            found.append((start + first - position, last - first))
        position += length
    return tuple(found)


def _joined(runs: Runs) -> Runs:
    """The same elements in the fewest runs.

    >>> _joined(((0, 2), (2, 3), (7, 1)))
    ((0, 5), (7, 1))
    """
    found: list[tuple[int, int]] = []
    for start, length in runs:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return tuple(found)


def _descends(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements follow each other in C order."""
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True

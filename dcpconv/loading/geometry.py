"""Which boxes of a distributed tensor this rank holds, and where they lie in its local tensor.

Source: torch 2.13 ``torch/distributed/tensor/_utils.py`` (placements apply from left to right) and
``placement_types.py`` (``_StridedShard``: split into ``split_factor`` blocks, then each sharded,
which is how FSDP2 shards what tensor parallelism has sharded already).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

Interval = tuple[int, int]
"""``(first index, length)`` along one dim."""


@dataclass(frozen=True, slots=True)
class Split:
    """One mesh dim that splits one tensor dim.

    Attributes:
        dim: Dim of the tensor.
        ranks: Size of the mesh dim.
        rank: This rank's place on it.
        blocks: ``split_factor`` of a ``_StridedShard``; 1 for a ``Shard``.
    """

    dim: int
    ranks: int
    rank: int
    blocks: int = 1


@dataclass(frozen=True, slots=True)
class Held:
    """A box that a rank holds.

    Attributes:
        offsets: Where it begins in the whole tensor.
        local: Where it begins in the local tensor.
        sizes: Its lengths.
    """

    offsets: tuple[int, ...]
    local: tuple[int, ...]
    sizes: tuple[int, ...]


def held_boxes(shape: Sequence[int], splits: Iterable[Split]) -> tuple[Held, ...]:
    """The boxes of a tensor that are left after all splits; none where a rank holds nothing.

    >>> held_boxes((5, 2), [Split(0, ranks=2, rank=1)])
    (Held(offsets=(3, 0), local=(0, 0), sizes=(2, 2)),)
    >>> [box.offsets for box in held_boxes((8,), [Split(0, 2, 0, blocks=2)])]
    [(0,), (4,)]
    """
    dims: list[list[Interval]] = [[(0, length)] for length in shape]
    for split in splits:
        blocks = [_chunk(dims[split.dim], split.blocks, block) for block in range(split.blocks)]
        dims[split.dim] = _joined(
            interval for block in blocks for interval in _chunk(block, split.ranks, split.rank)
        )
    placed: list[list[tuple[int, int, int]]] = []
    for intervals in dims:
        local = 0
        placed.append([])
        for start, length in intervals:
            if length:
                placed[-1].append((start, local, length))
            local += length
    return tuple(
        Held(tuple(s for s, _, _ in box), tuple(at for _, at, _ in box), tuple(n for *_, n in box))
        for box in product(*placed)
    )


def local_shape(shape: Sequence[int], boxes: Iterable[Held]) -> tuple[int, ...] | None:
    """Shape of a local tensor that holds ``boxes``; ``None`` where there are none."""
    ends = [[at + n for at, n in zip(box.local, box.sizes, strict=True)] for box in boxes]
    if not ends:
        return None if 0 not in shape else tuple(shape)
    return tuple(max(dim) for dim in zip(*ends, strict=True))


def _chunk(intervals: list[Interval], count: int, index: int) -> list[Interval]:
    """Chunk ``index`` of ``count``, as ``torch.chunk`` cuts: all of the same length but the last
    ones, which are shorter or empty."""
    total = sum(length for _, length in intervals)
    size = -(-total // count)
    begin, end = min(index * size, total), min((index + 1) * size, total)
    found, at = [], 0
    for start, length in intervals:
        low, high = max(begin - at, 0), min(end - at, length)
        if low < high:
            found.append((start + low, high - low))
        at += length
    return found


def _joined(intervals: Iterable[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for start, length in intervals:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((start, length))
    return joined

"""Pieces of distributed tensors: what one rank held, and what says where it belongs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NoReturn

from dcpconv.core.errors import FormatError
from dcpconv.formats.torchfile.stored import StoredTensor


@dataclass(frozen=True)
class Mesh:
    """Ranks in rows and columns.

    Attributes:
        axes: ``(size, stride)`` pairs of every axis, most often one; strides are in ``ranks``.
        ranks: Global ranks in the order that strides count in; of a larger mesh where this one is
            a slice of it.
        own: The rank that wrote it, where it says so.
    """

    axes: tuple[tuple[tuple[int, int], ...], ...]
    ranks: tuple[int, ...]
    own: int | None = None

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Ranks along every axis."""
        return tuple(math.prod(size for size, _ in axis) for axis in self.axes)

    def coordinate(self, rank: int) -> tuple[int, ...] | None:
        """Where a rank is, or ``None`` where it is not part of the mesh.

        >>> Mesh((((2, 2),), ((2, 1),)), (0, 1, 2, 3)).coordinate(2)
        (1, 0)
        """
        if rank not in self._coordinates:
            self._coordinates[rank] = self._find(rank)
        return self._coordinates[rank]

    def _find(self, rank: int) -> tuple[int, ...] | None:
        if rank not in self._places:
            return None
        place = self._places[rank]
        coordinate = []
        for axis in self.axes:
            index = 0
            for size, stride in axis:
                index = index * size + place // stride % size
            coordinate.append(index)
        return tuple(coordinate)

    def rank_at(self, coordinate: tuple[int, ...]) -> int | None:
        """The rank that is somewhere, or ``None`` where that is outside the mesh.

        >>> Mesh((((2, 2),), ((2, 1),)), (4, 5, 6, 7)).rank_at((1, 0))
        6
        """
        is_inside = len(coordinate) == len(self.shape) and all(
            0 <= index < size for index, size in zip(coordinate, self.shape, strict=True)
        )
        if not is_inside:
            return None
        place = 0
        for index, axis in zip(coordinate, self.axes, strict=True):
            rest = index
            for size, stride in reversed(axis):
                rest, inner = divmod(rest, size)
                place += inner * stride
        return self.ranks[place] if place < len(self.ranks) else None

    def seen_by(self, own: int | None) -> Mesh:
        """The same ranks, as another of them wrote it."""
        mesh = Mesh(self.axes, self.ranks, own)
        # A thousand files would make a thousand tables of a thousand ranks.
        shared = {name: getattr(self, name) for name in ("shape", "_places", "_coordinates")}
        mesh.__dict__.update(shared)
        return mesh

    @cached_property
    def _coordinates(self) -> dict[int, tuple[int, ...] | None]:
        return {}

    @cached_property
    def _places(self) -> Mapping[int, int]:
        return {rank: place for place, rank in enumerate(self.ranks)}


@dataclass(frozen=True, slots=True)
class MeshPlacement:
    """What one axis of a mesh does with a tensor.

    Attributes:
        kind: ``strided`` is ``_StridedShard``: the tensor is cut into ``factor`` pieces first, and
            each of them is shared out.
        dim: Of the tensor that is cut.
        factor: Of a strided placement.
    """

    kind: Literal["shard", "strided", "replicate", "partial"]
    dim: int = 0
    factor: int = 1


@dataclass(frozen=True)
class MeshTensor:
    """One rank's part of a ``DTensor``.

    Attributes:
        shape: Of the whole.
        local: What the rank held.
        mesh: Which ranks there are.
        placements: One for every axis of the mesh.
        order: Axes of the mesh in the order in which they cut.
    """

    shape: tuple[int, ...]
    local: StoredTensor
    mesh: Mesh
    placements: tuple[MeshPlacement, ...]
    order: tuple[int, ...]

    @property
    def world(self) -> int:
        """Ranks that hold the whole together."""
        return math.prod(self.mesh.shape)

    def whole(self) -> StoredTensor | None:
        """The tensor, where this part is all of it."""
        alone = zip(self.mesh.shape, self.placements, strict=True)
        is_whole = all(size == 1 or placed.kind == "replicate" for size, placed in alone)
        return self.local if is_whole and self.local.shape == self.shape else None

    def __setstate__(self, state: object) -> NoReturn:
        raise FormatError("a pickle may not change a tensor that it has made")


@dataclass(frozen=True)
class ShardedParts:
    """One rank's parts of a ``ShardedTensor``.

    Attributes:
        shape: Of the whole.
        parts: Offsets, sizes and bytes of every part.
        world: Parts that the whole has, over all ranks.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], tuple[int, ...], StoredTensor], ...]
    world: int

    def whole(self) -> StoredTensor | None:
        """The tensor, where one part is all of it."""
        for _, sizes, tensor in self.parts:
            if sizes == self.shape:
                return tensor
        return None

    def __setstate__(self, state: object) -> NoReturn:
        raise FormatError("a pickle may not change a tensor that it has made")


RankPiece = MeshTensor | ShardedParts
"""What one rank held of a tensor that several ranks hold together."""


def stored_tensors(piece: RankPiece) -> tuple[StoredTensor, ...]:
    """The bytes of a piece."""
    if isinstance(piece, MeshTensor):
        return (piece.local,)
    return tuple(tensor for *_, tensor in piece.parts)

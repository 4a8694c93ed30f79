"""Which regions of which tensors this rank needs, and the memory that each belongs in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

from dcpconv.core.errors import DcpconvError
from dcpconv.loading.geometry import Held, Split, held_boxes, local_shape
from dcpconv.loading.model import Place


@dataclass(frozen=True, slots=True)
class Wish:
    """An interval of a region of a tensor; equal on ranks that hold the same.

    Attributes:
        key: FQN that it is offered under.
        offsets: Where the region begins.
        sizes: Its lengths.
        start: First element of the region that is wanted, in C order.
        stop: End of the interval.
    """

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Need:
    """A wish, and where this rank will put what it gets."""

    wish: Wish
    place: Place
    local: tuple[int, ...]

    @property
    def into(self) -> Tensor:
        """Live memory; ask only once the model is materialised."""
        memory = self.place.local
        if self.place.flat is not None:
            return memory
        for dim, (at, length) in enumerate(zip(self.local, self.wish.sizes, strict=True)):
            memory = memory.narrow(dim, at, length)
        return memory


def needs_of(place: Place, key: str) -> Iterator[Need]:
    """What this rank holds of a tensor.

    Raises:
        DcpconvError: It is distributed in a way that has no boxes.
    """
    tensor = place.tensor
    shape = tuple(tensor.shape) if place.flat is None else place.flat.shape
    zeros = (0,) * len(shape)
    if place.flat is not None:
        start, stop = place.flat.interval
        if start < stop:
            yield Need(Wish(key, zeros, shape, start, stop), place, zeros)
        return
    boxes = _boxes(tensor, place) if isinstance(tensor, DTensor) else held_boxes(shape, ())
    for box in boxes:
        numel = math.prod(box.sizes)
        if numel:
            yield Need(Wish(key, box.offsets, box.sizes, 0, numel), place, box.local)


def _boxes(tensor: DTensor, place: Place) -> tuple[Held, ...]:
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return ()
    splits = []
    for mesh_dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            continue
        if not _is_shard(placement):
            raise DcpconvError(
                "a parameter is distributed in a way that cannot be loaded",
                [("fqn", place.fqn), ("placement", placement), ("expected", "Shard or Replicate")],
            )
        dim = placement.dim % len(tensor.shape)  # type: ignore[attr-defined]
        blocks = int(getattr(placement, "split_factor", 1))
        ranks = tensor.device_mesh.size(mesh_dim)
        splits.append(Split(dim, ranks, coordinate[mesh_dim], blocks))
    local = tuple(tensor._local_tensor.shape)  # noqa: SLF001 - to_local() takes 50 times as long
    boxes = _boxes_of(tuple(tensor.shape), tuple(splits), local)
    if boxes is not None:
        return boxes
    raise DcpconvError(
        "a parameter's local shape does not follow from its placements",
        [("fqn", place.fqn), ("placements", tensor.placements), ("local", list(local))],
    )


@lru_cache(maxsize=1 << 12)
def _boxes_of(
    shape: tuple[int, ...], splits: tuple[Split, ...], local: tuple[int, ...]
) -> tuple[Held, ...] | None:
    """Boxes that make up a local tensor, ``None`` if its shape is another; layers have the same."""
    # FSDP2 shards what tensor parallelism left: last, though its mesh dim comes first.
    inner = [split for split in splits if split.blocks > 1]
    outer = [split for split in splits if split.blocks == 1]
    for order in (splits, [*outer, *(Split(s.dim, s.ranks, s.rank) for s in inner)]):
        boxes = held_boxes(shape, order)
        found = local_shape(shape, boxes)
        if found == local or (found is None and 0 in local):
            return boxes
    return None


def _is_shard(placement: Placement) -> bool:
    """Whether it is a ``Shard`` or the ``_StridedShard`` of FSDP2 over tensor parallelism, which
    is a class of its own since torch 2.10."""
    return isinstance(placement, Shard) or type(placement).__name__ == "_StridedShard"

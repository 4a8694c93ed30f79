"""The tensors that ranks hold, as a checkpoint: its files are the items of their save plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from dcpconv.core.catalog import Catalog, Chunk, Extent, KeyPath, TensorEntry
from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.errors import FormatError
from dcpconv.formats.boxes import inspect_boxes

SOURCE = Path("the state dict")
"""What errors and reports call the source."""


@dataclass(frozen=True, slots=True)
class Held:
    """What all ranks hold together.

    Attributes:
        catalog: Every tensor; its chunks are items, and the extents' files are their places.
        items: By place, ``rank/number of the item in the rank's plan``.
    """

    catalog: Catalog
    items: Mapping[str, WriteItem] = field(default_factory=dict)

    def with_ties(self, pairs: Iterable[tuple[str, str]]) -> tuple[Held, tuple[Tie, ...]]:
        """The same, with those tensors marked as tied that the ranks hold in the same boxes, and
        the items whose bytes have to be equal for that to be so.

        Args:
            pairs: ``(second name, owner)``, as stored.
        """
        tensors = self.catalog.tensors
        tied: dict[str, str] = {}
        ties: list[Tie] = []
        for second, owner in pairs:
            if second not in tensors or owner not in tensors:
                continue
            one, other = tensors[second], tensors[owner]
            owned = {chunk.offsets: chunk for chunk in other.chunks}
            found = [(chunk, owned.get(chunk.offsets)) for chunk in one.chunks]
            if (one.dtype, one.shape) != (other.dtype, other.shape) or any(
                twin is None or twin.sizes != chunk.sizes for chunk, twin in found
            ):
                continue
            tied[second] = owner
            ties += [
                Tie(
                    rank=rank_of(chunk.extent.file),
                    second=self.items[chunk.extent.file],
                    owner=self.items[twin.extent.file],
                )
                for chunk, twin in found
                if twin is not None
            ]
        return replace(self, catalog=replace(self.catalog, tied=tied)), tuple(ties)


@dataclass(frozen=True, slots=True)
class Tie:
    """Two items that hold the same box of one tensor under two names.

    Attributes:
        rank: Who holds the second name's, and can compare the two.
        second: The second name's item.
        owner: The other one.
    """

    rank: int
    second: WriteItem
    owner: WriteItem


def rank_of(place: str) -> int:
    """The rank that holds an item."""
    return int(place.partition("/")[0])


def number_of(place: str) -> int:
    """Which item of that rank's plan it is."""
    return int(place.partition("/")[2])


def held_by(plans: Sequence[SavePlan]) -> Held:
    """What all ranks hold together, in the order in which torch lists it in ``.metadata``.

    Args:
        plans: By rank, as the planner made them of all ranks: a replica is in one plan only.

    Raises:
        FormatError: Boxes leave a gap or overlap, an element type is unknown, or torch has left
            the items out because they are those of the save before.
    """
    if not all(getattr(plan, "usable", True) for plan in plans):  # torch 2.6 has no such field
        raise FormatError(
            "a cached save plan lists no tensors",
            [("found", "a planner with enable_plan_caching=True")],
            hint="save with a planner that does not cache its plans",
        )
    items: dict[str, WriteItem] = {}
    sizes: dict[str, int] = {}
    entries: dict[str, TensorEntry] = {}
    boxes: dict[str, list[Chunk]] = {}
    objects: dict[str, object] = {}
    paths: dict[str, KeyPath] = {}
    problems: list[str] = []
    for rank, plan in enumerate(plans):
        paths |= plan.planner_data or {}
        for number, item in enumerate(plan.items):
            key = item.index.fqn
            if item.type is WriteItemType.BYTE_IO or item.tensor_data is None:
                objects[key] = None
                continue
            dtype = BY_NAME.get(str(item.tensor_data.properties.dtype).removeprefix("torch."))
            if dtype is None:
                problems.append(f"{key}: {item.tensor_data.properties.dtype} is not known")
                continue
            box, place = item.tensor_data.chunk, f"{rank}/{number}"
            chunk_sizes = tuple(box.sizes)
            entry = TensorEntry(key, dtype, tuple(item.tensor_data.size), ())
            nbytes = replace(entry, shape=chunk_sizes).nbytes
            items[place], sizes[place] = item, nbytes
            entries.setdefault(key, entry)
            found = boxes.setdefault(key, [])
            if nbytes:
                found.append(Chunk(tuple(box.offsets), chunk_sizes, Extent(place, 0, nbytes)))
    for key, entry in entries.items():
        chunks = boxes[key]
        entries[key] = replace(entry, chunks=tuple(chunks))
        found_boxes = [(chunk.offsets, chunk.sizes) for chunk in chunks]
        problems += [f"{key}: {text}" for text in inspect_boxes(entry.shape, found_boxes)]
    if problems:
        raise FormatError(
            "the ranks do not hold every element once", [("problem", text) for text in problems]
        )
    return Held(Catalog("dcp", Path(), SOURCE, sizes, entries, objects, paths), items)


def unequal(pairs: Iterable[tuple[str, str]]) -> FormatError:
    """The error for names of one tensor that hold different values, each with its owner."""
    return FormatError(
        "two names of one tensor hold different values",
        [("key", f"{key} is tied to {owner}") for key, owner in dict.fromkeys(pairs)],
        hint='spec="tied=false" saves them as two tensors, and says so in the config',
    )

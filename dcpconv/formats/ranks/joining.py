"""The same state dict as several ranks saved it, put together: one entry for every tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from dcpconv.core.catalog import Chunk, Identity, KeyPath, TensorEntry
from dcpconv.core.dtypes import DType
from dcpconv.core.errors import FormatError
from dcpconv.formats.boxes import Region, inspect_boxes
from dcpconv.formats.ranks.dtensors import (
    RankBox,
    Runs,
    chunk,
    local_runs,
    local_shape,
    parts,
    whole,
)
from dcpconv.formats.ranks.intervals import Segment, chunks_of
from dcpconv.formats.torchfile.pieces import (
    Mesh,
    MeshPlacement,
    MeshTensor,
    RankPiece,
    ShardedParts,
)
from dcpconv.formats.torchfile.stored import StoredTensor

_AT_MOST = 8
"""Faults named per kind: one lost row would otherwise name every tensor."""


@dataclass(frozen=True, slots=True)
class RankFile:
    """What one rank saved.

    Attributes:
        name: Of the file, relative to the directory.
        rank: Whose it is.
        identity: Of the file, when it was read.
        leaves: Path and value by flat key.
    """

    name: str
    rank: int
    identity: Identity
    leaves: Mapping[str, tuple[KeyPath, object]]

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return self.identity[2]


@dataclass(slots=True)
class Joined:
    """Everything in the files of all ranks.

    Attributes:
        tensors: By key; a tensor that every rank holds alike comes from the first file.
        objects: Values that are no tensors, from the first file that has them.
        paths: How a key is nested, where that is more than ``(key,)``.
        tied: Key -> key of another tensor that shares its storage.
        alike: Keys of tensors that every rank saved whole.
        faults: What keeps the files from being one checkpoint: label and value.
    """

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    objects: dict[str, object] = field(default_factory=dict)
    paths: dict[str, KeyPath] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    alike: list[str] = field(default_factory=list)
    faults: list[tuple[str, object]] = field(default_factory=list)

    def require(self, directory: Path) -> None:
        """Raises what is wrong, all of it at once.

        Raises:
            FormatError: The files do not fit together.
        """
        if self.faults:
            more = len(self.faults) - _AT_MOST
            rest = [("and", f"{more} more")] if more > 0 else []
            raise FormatError(
                "the files of the ranks do not make a whole",
                [("directory", directory), *self.faults[:_AT_MOST], *rest],
                hint="they are of different saves, or the copy is incomplete; copy all again",
            )


HeldPiece = tuple[RankFile, object]


def join(files: Sequence[RankFile]) -> Joined:
    """One entry for every key, out of what each rank held of it.

    Every file is gone through once; nothing is read.
    """
    held: dict[str, list[HeldPiece]] = {}
    joined = Joined()
    for file in files:
        for key, (path, leaf) in file.leaves.items():
            if path != (key,):
                joined.paths.setdefault(key, path)
            if isinstance(leaf, (StoredTensor, MeshTensor, ShardedParts)):
                held.setdefault(key, []).append((file, leaf))
            else:
                joined.objects.setdefault(key, leaf)
    for key in held.keys() & joined.objects.keys():
        joined.faults.append(("key", f"{key} is a tensor in some files and none in others"))
    for key, each in held.items():
        entry, faults = entry_of(key, each)
        joined.faults += faults
        if entry is not None:
            joined.tensors[key] = entry
        if isinstance(each[0][1], StoredTensor):
            joined.alike.append(key)
    joined.tied.update(_tied(files, joined.tensors))
    return joined


def entry_of(
    key: str, held: Sequence[HeldPiece]
) -> tuple[TensorEntry | None, list[tuple[str, object]]]:
    """One tensor out of what each rank held of it, and what is wrong with it."""
    plain = [(file, leaf) for file, leaf in held if isinstance(leaf, StoredTensor)]
    pieces = [(file, leaf) for file, leaf in held if not isinstance(leaf, StoredTensor)]
    if plain and all(isinstance(leaf, ShardedParts) and not leaf.parts for _, leaf in pieces):
        return _replicated(key, plain)
    if plain:
        names = f"whole in {plain[0][0].name}, in pieces in {pieces[0][0].name}"
        return None, [("key", f"{key} is {names}")]
    return _sharded(key, [(file, leaf) for file, leaf in held if isinstance(leaf, RankPiece)])


def entry_of_slices(
    key: str, held: Sequence[tuple[RankFile, StoredTensor]], shape: tuple[int, ...]
) -> tuple[TensorEntry | None, list[tuple[str, object]]]:
    """A tensor of which every rank held the next run of elements, in C order, and what is wrong."""
    numel, start = math.prod(shape), 0
    segments: list[Segment] = []
    dtypes: dict[DType, str] = {}
    for file, tensor in held:
        if start >= numel and segments:  # what follows are the same runs on replicas
            break
        if len(tensor.shape) != 1 or not tensor.is_contiguous:
            return None, [("key", f"{key}: {list(tensor.shape)} in {file.name}")]
        dtypes.setdefault(tensor.dtype, file.name)
        if tensor.shape[0]:
            segments.append(Segment(start, tensor.shape[0], file.name, tensor.offset))
        start += tensor.shape[0]
    if start != numel:
        return None, [("key", f"{key}: expected {numel} elements, found {start}")]
    if len(dtypes) > 1:
        return None, [("key", f"{key} is {_by_file(dtypes)}")]
    dtype = held[0][1].dtype
    chunks = chunks_of(shape, segments, at=0, itemsize=dtype.itemsize)
    return TensorEntry(key, dtype, shape, tuple(chunks)), []


def _by_file(dtypes: Mapping[DType, str]) -> str:
    return ", ".join(f"{dtype} in {name}" for dtype, name in dtypes.items())


def _replicated(
    key: str, held: Sequence[tuple[RankFile, StoredTensor]]
) -> tuple[TensorEntry | None, list[tuple[str, object]]]:
    file, first = held[0]
    for other, tensor in held[1:]:
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            one, two = _kind(file, first), _kind(other, tensor)
            return None, [("key", f"{key} is {one} and {two}")]
    return TensorEntry(key, first.dtype, first.shape, (chunk(whole(first), first, file.name),)), []


def _sharded(
    key: str, held: Sequence[tuple[RankFile, RankPiece]]
) -> tuple[TensorEntry | None, list[tuple[str, object]]]:
    shapes = {piece.shape: file for file, piece in held}
    if len(shapes) > 1:
        found = ", ".join(f"{list(shape)} in {file.name}" for shape, file in shapes.items())
        return None, [("key", f"{key} is of shape {found}")]
    shape = held[0][1].shape
    found_parts, faults = _parts(held)
    if faults:
        return None, [(label, f"{key}: {value}") for label, value in faults]
    dtypes: dict[DType, str] = {}
    chunks: dict[Region, Chunk] = {}
    for file, part, tensor in found_parts:
        dtypes.setdefault(tensor.dtype, file.name)
        is_empty = 0 in part.sizes and 0 not in shape
        if not is_empty and (part.offsets, part.sizes) not in chunks:
            chunks[part.offsets, part.sizes] = chunk(part, tensor, file.name)
    if len(dtypes) > 1:
        return None, [("key", f"{key} is {_by_file(dtypes)}")]
    if not dtypes:
        return None, [("key", f"{key} has no bytes in any file")]
    wrong = _inspected(shape, tuple(chunks))
    entry = TensorEntry(key, next(iter(dtypes)), shape, tuple(chunks.values()))
    return entry, [("key", f"{key}: {text}") for text in wrong]


@functools.lru_cache(maxsize=64)
def _inspected(shape: tuple[int, ...], boxes: tuple[Region, ...]) -> tuple[str, ...]:
    """The layers of a model lie alike."""
    return inspect_boxes(shape, boxes)


_Part = tuple[RankFile, RankBox, StoredTensor]


def _parts(
    held: Sequence[tuple[RankFile, RankPiece]],
) -> tuple[list[_Part], list[tuple[str, object]]]:
    """Boxes and their bytes, by the cuts from the first axis of the mesh to the last; where local
    shapes say otherwise, from the last to the first, which is how FSDP2 cuts what tensor
    parallelism has cut before.  The two differ only where rows do not come out even."""
    faults: list[tuple[str, object]] = []
    for is_reversed in (False, True):
        found: list[_Part] = []
        misfits: list[tuple[str, object]] = []
        for file, piece in held:
            if isinstance(piece, ShardedParts):
                nothing = (0,) * len(piece.shape)
                found += [(file, RankBox(at, sizes, nothing), t) for at, sizes, t in piece.parts]
                continue
            if any(placed.kind == "partial" for placed in piece.placements):
                return [], [("key", f"{file.name} holds a term of a sum, not the tensor")]
            coordinate = _coordinate(piece.mesh, file.rank)
            if coordinate is None:
                ranks = piece.mesh.ranks
                reason = f"rank {file.rank} is not in its mesh of {len(ranks)}"
                misfits.append(("file", f"{file.name}: {reason}"))
                continue
            boxes, shape = _held_boxes(
                piece.shape,
                piece.mesh.shape,
                coordinate,
                piece.placements,
                piece.order,
                is_reversed=is_reversed,
            )
            if shape != piece.local.shape:
                reason = f"expected {list(shape)} of it, found {list(piece.local.shape)}"
                misfits.append(("file", f"{file.name}: {reason}"))
            found += [(file, part, piece.local) for part in boxes]
        if not misfits:
            return found, []
        faults = faults or misfits
    return [], faults


def _coordinate(mesh: Mesh, rank: int) -> tuple[int, ...] | None:
    found = mesh.coordinate(rank)
    return mesh.coordinate(mesh.own) if found is None and mesh.own is not None else found


@functools.lru_cache(maxsize=1 << 16)
def _held_boxes(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[MeshPlacement, ...],
    order: tuple[int, ...],
    *,
    is_reversed: bool,
) -> tuple[tuple[RankBox, ...], tuple[int, ...]]:
    """The boxes of a rank and the shape of what it holds; layers of a model ask the same."""
    if is_reversed:
        order = tuple(reversed(order))
        placements = tuple(
            MeshPlacement("shard", placed.dim) if placed.kind == "strided" else placed
            for placed in placements
        )
    runs: Sequence[Runs] = local_runs(shape, mesh, coordinate, placements, order)
    held = local_shape(runs)
    return (tuple(parts(runs)) or (RankBox((0,) * len(shape), held, (0,) * len(shape)),)), held


def _tied(files: Iterable[RankFile], tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Keys that share their bytes with an earlier one, told by the first file that holds both."""
    tied: dict[str, str] = {}
    told: set[str] = set()
    for file in files:
        owners: dict[object, str] = {}
        for key, (_, leaf) in file.leaves.items():
            local = _bytes_of(leaf)
            if key in told or local is None or not local.nbytes or key not in tensors:
                continue
            told.add(key)
            region = (local.storage_key, local.offset, local.shape, local.strides, local.dtype)
            owner = owners.setdefault(region, key)
            if owner != key and tensors[owner].shape == tensors[key].shape:
                tied[key] = owner
        if len(told) == len(tensors):
            break
    return tied


def _bytes_of(leaf: object) -> StoredTensor | None:
    if isinstance(leaf, StoredTensor):
        return leaf
    if isinstance(leaf, MeshTensor):
        return leaf.local
    return leaf.parts[0][2] if isinstance(leaf, ShardedParts) and leaf.parts else None


def _kind(file: RankFile, tensor: StoredTensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} in {file.name}"


def writers(files: Iterable[RankFile]) -> dict[str, int]:
    """The rank that each file says it is of, where all of its tensors agree on one."""
    said: dict[str, int] = {}
    for file in files:
        own = {
            leaf.mesh.own
            for _, leaf in file.leaves.values()
            if isinstance(leaf, MeshTensor) and leaf.mesh.own is not None
        }
        if len(own) == 1:
            said[file.name] = next(iter(own))
    return said


def mesh_ranks(files: Iterable[RankFile]) -> int:
    """Ranks that the meshes and shards of the first file that has any speak of; 0 for none."""
    for file in files:
        pieces = [leaf for _, leaf in file.leaves.values() if isinstance(leaf, RankPiece)]
        if pieces:
            return max(
                chain(
                    (
                        max(p.mesh.ranks, default=-1) + 1
                        for p in pieces
                        if isinstance(p, MeshTensor)
                    ),
                    (p.world for p in pieces if isinstance(p, ShardedParts)),
                )
            )
    return 0

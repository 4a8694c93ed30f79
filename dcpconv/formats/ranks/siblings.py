"""Rank files of one save, of which most pickles differ in nothing but the rank that wrote them.

A thousand files of three hundred tensors say the same thing a thousand times.  A pickle that was
read is kept; of a file whose pickle is the same byte for byte, but for the numbers of the rank,
only the places of its records are read.

Source: torch 2.13 ``torch/distributed/device_mesh.py`` (``_rank``, ``_coordinate_on_dim`` and
``_dim_group_names`` of a ``DeviceMesh`` are the only values in a state dict of DTensors that follow
from the rank).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dcpconv.core.catalog import KeyPath
from dcpconv.formats.torchfile.archive import Archive
from dcpconv.formats.torchfile.contents import Contents, leaves_in, opened
from dcpconv.formats.torchfile.pieces import Mesh, MeshTensor, ShardedParts
from dcpconv.formats.torchfile.stored import StoredTensor

_MEMO = rb"(?:q.|r....)?"
_NUMBER = rb"(?:K.|M..|J....)"
_RANK = re.compile(rb"X\x05\x00\x00\x00_rank" + _MEMO + rb"(?P<rank>" + _NUMBER + rb")", re.DOTALL)
_PLACE = re.compile(
    rb"X\x12\x00\x00\x00_coordinate_on_dim" + _MEMO + rb"(?P<rank>" + _NUMBER + rb"+)", re.DOTALL
)
_GROUPS = re.compile(rb"X\x10\x00\x00\x00_dim_group_names" + _MEMO + rb"\]" + _MEMO + rb"\(?")
"""A name, its place in the memo, and what follows it in a pickle of protocol 2."""

_WIDTHS: Final = {b"K"[0]: "<B", b"M"[0]: "<H", b"J"[0]: "<i"}

_MOST: Final = 32
"""Pickles that are kept: numbers and names of groups have several lengths, and ranks hold as many
rows as others, or fewer."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A file that was read.

    Attributes:
        own: The rank that all its meshes name, or ``None`` where none does.
        leaves: What it holds.
        places: Offset and length of the storages of its tensors.
    """

    own: int | None
    leaves: Mapping[str, tuple[KeyPath, object]]
    places: Mapping[str, tuple[int, int]]


class Siblings:
    """Reads the files of one save, one after the other."""

    def __init__(self) -> None:
        self._known: dict[bytes, _Known] = {}

    def read(self, path: Path) -> Contents:
        """One file, as ``read_leaves`` does.

        Raises:
            NotACheckpointError: There is no such file.
            FormatError: The file is damaged, unsafe, or holds no mapping.
        """
        with opened(path) as (archive, identity):
            data, own = _without_rank(archive.read("data.pkl"))
            known = self._known.get(data)
            leaves = _moved(known, archive, own) if known is not None else None
            if leaves is not None:
                return Contents(identity, leaves, ())
            contents = leaves_in(archive, identity)
            if known is None and len(self._known) < _MOST:
                found = _remembered(contents, archive, own)
                if found is not None:
                    self._known[data] = found
            return contents


def _without_rank(pickle: bytes) -> tuple[bytes, frozenset[int]]:
    """A pickle with zeros in place of what names its rank and its groups, and the rank."""
    data = bytearray(pickle)
    own: set[int] = set()
    for found in _RANK.finditer(pickle):
        (number,) = struct.unpack(_WIDTHS[found["rank"][0]], found["rank"][1:])
        own.add(number)
        data[found.start("rank") + 1 : found.end("rank")] = bytes(len(found["rank"]) - 1)
    for found in _PLACE.finditer(pickle):
        data[found.start("rank") : found.end("rank")] = bytes(len(found["rank"]))
    for found in _GROUPS.finditer(pickle):
        for start, stop in _unused_names(pickle, found.end()):
            data[start:stop] = bytes(stop - start)
    return bytes(data), frozenset(own)


def _unused_names(pickle: bytes, at: int) -> Iterator[tuple[int, int]]:
    """Where the names of process groups lie that nothing but their own list refers to: a name of
    one character may also be that of a storage."""
    while pickle[at : at + 1] == b"X":
        start = at + 5
        stop = start + int.from_bytes(pickle[at + 1 : start], "little")
        memo = pickle[stop : stop + 1]
        at = stop + {b"q": 2, b"r": 5}.get(memo, 0)
        used = {b"q": b"h", b"r": b"j"}.get(memo, b"") + pickle[stop + 1 : at]
        if not used or used not in pickle[at:]:
            yield start, stop


def _remembered(contents: Contents, archive: Archive, own: frozenset[int]) -> _Known | None:
    """What later files are compared with; ``None`` where a rank's number has another meaning."""
    keys: set[str] = set()
    for _, leaf in contents.leaves.values():
        if isinstance(leaf, MeshTensor):
            if leaf.mesh.own is not None and {leaf.mesh.own} != own:
                return None
            keys.add(leaf.local.storage_key)
        elif isinstance(leaf, StoredTensor):
            keys.add(leaf.storage_key)
        elif isinstance(leaf, ShardedParts):
            return None  # each says where its parts are
    if len(own) > 1:
        return None
    places = {key: archive.extent(f"data/{key}") for key in keys}
    return _Known(next(iter(own), None), contents.leaves, places)


def _moved(
    known: _Known, archive: Archive, own: frozenset[int]
) -> dict[str, tuple[KeyPath, object]] | None:
    """The same tensors where this file has them; ``None`` where it has other storages."""
    if len(own) != (known.own is not None):
        return None
    shifts: dict[str, int] = {}
    for key, (offset, nbytes) in known.places.items():
        there, found = archive.extent(f"data/{key}")
        if found != nbytes:
            return None
        shifts[key] = there - offset
    meshes: dict[int, Mesh] = {}
    rank = next(iter(own), None)

    def moved(leaf: object) -> object:
        if isinstance(leaf, StoredTensor):
            return leaf.moved(shifts[leaf.storage_key])
        if not isinstance(leaf, MeshTensor):
            return leaf
        mesh = meshes.get(id(leaf.mesh))
        if mesh is None:
            is_own = leaf.mesh.own is not None
            mesh = meshes[id(leaf.mesh)] = leaf.mesh.seen_by(rank) if is_own else leaf.mesh
        local = leaf.local.moved(shifts[leaf.local.storage_key])
        return MeshTensor(leaf.shape, local, mesh, leaf.placements, leaf.order)

    return {key: (path, moved(leaf)) for key, (path, leaf) in known.leaves.items()}

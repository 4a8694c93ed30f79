"""Rank files of one save, of which most pickles differ in nothing but the rank that wrote them.

A thousand files of three hundred tensors say the same thing a thousand times.  A pickle that was
read is kept; of a file whose pickle is the same byte for byte, but for the numbers of the rank,
only the places of its records are read.

Source: torch 2.13 ``torch/distributed/device_mesh.py`` (``_rank``, ``_coordinate_on_dim``,
``_dim_group_names`` and ``_hash`` of a ``DeviceMesh`` are the only values in a state dict of
DTensors that follow from the rank or the process), and of torch 2.6, where no ``_rank`` is and
``_dim_group_infos`` has tags, ranks and names of groups.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
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
_LIST = rb"\]" + _MEMO + rb"\(?"
_PLACE = re.compile(
    rb"X\x12\x00\x00\x00_coordinate_on_dim" + _MEMO + rb"(?:" + _LIST + rb")?"
    rb"(?P<place>" + _NUMBER + rb"+)",
    re.DOTALL,
)
_HASH = re.compile(rb"X\x05\x00\x00\x00_hash" + _MEMO + rb"\x8a\x08(?P<hash>.{8})", re.DOTALL)
_NAMES = re.compile(rb"X\x10\x00\x00\x00_dim_group_names" + _MEMO + _LIST, re.DOTALL)
_INFOS = re.compile(rb"X\x10\x00\x00\x00_dim_group_infos" + _MEMO + _LIST, re.DOTALL)
"""A name, its place in the memo, and what follows it in a pickle of protocol 2."""

_RANKS = re.compile(_LIST + rb"(?P<ranks>" + _NUMBER + rb"+)[ae]", re.DOTALL)
_END_OF_INFO = re.compile(rb"\x87" + _MEMO + rb"a?", re.DOTALL)
_ONE_NUMBER = re.compile(_NUMBER, re.DOTALL)

_WIDTHS: Final = {b"K"[0]: "<B", b"M"[0]: "<H", b"J"[0]: "<i"}

_MOST: Final = 32
"""Pickles that are kept: numbers and names of groups have several lengths, and ranks hold as many
rows as others, or fewer."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A file that was read.

    Attributes:
        own: The rank that all its meshes name, or where it is in them; ``None`` where none says.
        names_rank: Whether it is the rank.
        leaves: What it holds.
        places: Offset and length of the storages of its tensors.
    """

    own: tuple[int, ...] | None
    names_rank: bool
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
            data, own, names_rank = _without_rank(archive.read("data.pkl"))
            known = self._known.get(data)
            leaves = _moved(known, archive, own) if known is not None else None
            if leaves is not None:
                return Contents(identity, leaves, ())
            contents = leaves_in(archive, identity)
            if known is None and len(self._known) < _MOST:
                found = _remembered(contents, archive, own, names_rank=names_rank)
                if found is not None:
                    self._known[data] = found
            return contents


def _without_rank(pickle: bytes) -> tuple[bytes, frozenset[tuple[int, ...]], bool]:
    """A pickle with zeros in place of what names its rank and its groups; the ranks that its meshes
    name or, with ``False``, where in them it is."""
    data = bytearray(pickle)
    ranks: set[tuple[int, ...]] = set()
    places: set[tuple[int, ...]] = set()
    for pattern, group, said in ((_RANK, "rank", ranks), (_PLACE, "place", places)):
        for found in pattern.finditer(pickle):
            said.add(_without_numbers(pickle, data, *found.span(group)))
    for found in _HASH.finditer(pickle):
        data[found.start("hash") : found.end("hash")] = bytes(8)
    for found in _NAMES.finditer(pickle):
        at = found.end()
        while (name := _name(pickle, at)) is not None:
            at = _without_name(pickle, data, name)
    for found in _INFOS.finditer(pickle):
        _without_infos(pickle, data, found.end())
    return bytes(data), frozenset(ranks or places), bool(ranks)


def _without_numbers(pickle: bytes, data: bytearray, start: int, stop: int) -> tuple[int, ...]:
    """Put zeros in place of some numbers; returns them."""
    numbers: list[int] = []
    for found in _ONE_NUMBER.finditer(pickle, start, stop):
        numbers += struct.unpack(_WIDTHS[found[0][0]], found[0][1:])
        data[found.start() + 1 : found.end()] = bytes(len(found[0]) - 1)
    return tuple(numbers)


def _without_infos(pickle: bytes, data: bytearray, at: int) -> None:
    """Put zeros in place of triples: a tag, a list of ranks, a name."""
    while (tag := _name(pickle, at)) is not None:
        ranks = _RANKS.match(pickle, tag[2])
        name = _name(pickle, ranks.end()) if ranks else None
        end = _END_OF_INFO.match(pickle, name[2]) if name else None
        if ranks is None or name is None or end is None:
            return
        _without_name(pickle, data, tag)
        _without_numbers(pickle, data, *ranks.span("ranks"))
        _without_name(pickle, data, name)
        at = end.end()


def _name(pickle: bytes, at: int) -> tuple[int, int, int] | None:
    """Where a string begins and ends, and what comes after its place in the memo."""
    if pickle[at : at + 1] != b"X":
        return None
    start = at + 5
    stop = start + int.from_bytes(pickle[at + 1 : start], "little")
    return start, stop, stop + {b"q": 2, b"r": 5}.get(pickle[stop : stop + 1], 0)


def _without_name(pickle: bytes, data: bytearray, name: tuple[int, int, int]) -> int:
    """Put zeros in place of a name that nothing refers to: one of one character may also be that of
    a storage.  Returns what comes after it."""
    start, stop, after = name
    memo = {b"q": b"h", b"r": b"j"}.get(pickle[stop : stop + 1], b"")
    used = memo + pickle[stop + 1 : after]
    if not used or used not in pickle[after:]:
        data[start:stop] = bytes(stop - start)
    return after


def _remembered(
    contents: Contents, archive: Archive, own: frozenset[tuple[int, ...]], *, names_rank: bool
) -> _Known | None:
    """What later files are compared with; ``None`` where a rank's number has another meaning."""
    keys: set[str] = set()
    said = next(iter(own), None)
    for _, leaf in contents.leaves.values():
        if isinstance(leaf, MeshTensor):
            if leaf.mesh.own != _rank(leaf.mesh, said, names_rank=names_rank):
                return None
            keys.add(leaf.local.storage_key)
        elif isinstance(leaf, StoredTensor):
            keys.add(leaf.storage_key)
        elif isinstance(leaf, ShardedParts):
            return None  # each says where its parts are
    if len(own) > 1:
        return None
    places = {key: archive.extent(f"data/{key}") for key in keys}
    return _Known(said, names_rank, contents.leaves, places)


def _rank(mesh: Mesh, said: tuple[int, ...] | None, *, names_rank: bool) -> int | None:
    """The rank that a mesh speaks of."""
    if said is None:
        return None
    return said[0] if names_rank else mesh.rank_at(said)


def _moved(
    known: _Known, archive: Archive, own: frozenset[tuple[int, ...]]
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
    said = next(iter(own), None)

    def moved(leaf: object) -> object:
        if isinstance(leaf, StoredTensor):
            return leaf.moved(shifts[leaf.storage_key])
        if not isinstance(leaf, MeshTensor):
            return leaf
        mesh = meshes.get(id(leaf.mesh))
        if mesh is None:
            rank = _rank(leaf.mesh, said, names_rank=known.names_rank)
            mesh = meshes[id(leaf.mesh)] = leaf.mesh.seen_by(rank)
        local = leaf.local.moved(shifts[leaf.local.storage_key])
        return MeshTensor(leaf.shape, local, mesh, leaf.placements, leaf.order)

    return {key: (path, moved(leaf)) for key, (path, leaf) in known.leaves.items()}

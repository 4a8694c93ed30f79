"""Compressed items of a DCP, unpacked.

Nothing seeks in a compressed item, so all of them are unpacked once, a piece at a time, into a
directory for temporary files (``TMPDIR``), and read there.  It is gone when the process ends.

Source: torch 2.13 ``distributed/checkpoint/_extension.py``, ``ZStandard``: one frame per item.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final

from dcpconv.core.catalog import Extent, Identity
from dcpconv.core.errors import FormatError, NoSpaceError
from dcpconv.formats.dcp.metadata import MetadataContents
from dcpconv.stores.local import OpenFile, identities_of, require_unchanged

_PIECE: Final = 1 << 20
"""Bytes that are unpacked at once."""
_WINDOW: Final = 1 << 27
"""Bytes that a frame may look back, and so takes in memory; zstd itself allows as much."""
_BESIDE: Final = 1 << 20
"""Bytes of an item besides its tensor: pickle, names, padding."""
_LARGEST_OBJECT: Final = 1 << 28
"""Bytes of an unpacked item that is no tensor."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Where the unpacked items lie.

    Attributes:
        path: The directory.
        contents: What ``.metadata`` lists, each item where it lies now.
    """

    path: Path
    contents: MetadataContents


_Key = tuple[str, tuple[tuple[str, Identity], ...]]
_KEPT: dict[_Key, tuple[tempfile.TemporaryDirectory[str], Unpacked]] = {}
"""By directory and the state of its files; each is removed when the process ends."""


def unpacked(
    path: Path, contents: MetadataContents, identities: Mapping[str, Identity]
) -> Unpacked:
    """The items of a DCP with compressed ones, unpacked.

    Args:
        path: The DCP directory.
        contents: What its ``.metadata`` lists.
        identities: Of ``.metadata``.

    Raises:
        FormatError: A file is no regular one.
        NoSpaceError: The disk for temporary files is full.
        SourceChangedError: A file changed meanwhile.
    """
    limits = _limits(contents)
    files = sorted({item.file for item in limits})
    known = {**identities, **identities_of(path, files)}
    key = (os.path.realpath(path), tuple(sorted(known.items())))
    if key not in _KEPT:
        scratch = tempfile.TemporaryDirectory(prefix="dcpconv-unpacked-")
        places: dict[Extent, Extent] = {}
        problems: list[str] = []
        for file in files:
            if file in known:
                mine = {item: limit for item, limit in limits.items() if item.file == file}
                problems += _unpack(path / file, Path(scratch.name) / file, contents, mine, places)
        require_unchanged(path, known)
        moved = _moved(contents, places)
        whole = replace(moved, problems=(*contents.problems, *problems))
        _KEPT[key] = scratch, Unpacked(Path(scratch.name), whole)
    return _KEPT[key][1]


def contents_in(path: Path) -> MetadataContents | None:
    """What lies in a directory that ``unpacked`` made; ``None`` for any other."""
    return next((one.contents for _, one in _KEPT.values() if one.path == path), None)


def _limits(contents: MetadataContents) -> dict[Extent, int]:
    """How long every item may become; 0 for those that are not compressed."""
    found = dict.fromkeys(contents.objects.values(), _LARGEST_OBJECT)
    for tensor in contents.tensors.values():
        for chunk in tensor.chunks:
            nbytes = math.prod(chunk.sizes) * tensor.dtype.itemsize
            found[chunk.item] = max(found.get(chunk.item, 0), nbytes + _BESIDE)
    return {item: limit if item in contents.packed else 0 for item, limit in found.items()}


def _unpack(
    source: Path,
    target: Path,
    contents: MetadataContents,
    limits: Mapping[Extent, int],
    places: dict[Extent, Extent],
) -> list[str]:
    problems = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with OpenFile(source) as file, target.open("wb") as made:
            for item in sorted(limits, key=lambda item: item.offset):
                start, room = made.tell(), limits[item] or item.nbytes
                stream = _Part(file, item)
                read = _reader(stream) if item in contents.packed else stream.read
                try:
                    while room >= 0 and (piece := read(_PIECE)):
                        made.write(piece)
                        room -= len(piece)
                except _errors() as error:
                    problems.append(f"{item.file}, item at byte {item.offset}: {error}")
                if room < 0:
                    problems.append(
                        f"{item.file}, item at byte {item.offset} expands to more than"
                        f" {limits[item] or item.nbytes:,} bytes"
                    )
                if made.tell() == start:
                    made.write(b"\0")  # no item is empty: a damaged one is told once, above
                places[item] = Extent(item.file, start, made.tell() - start)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise FormatError(
                "a file cannot be unpacked", [("file", source), ("reason", error.strerror)]
            ) from error
        raise NoSpaceError(
            "the disk for temporary files cannot hold the unpacked items",
            [("directory", target.parent)],
            hint="set TMPDIR to a directory on a larger disk",
        ) from error
    return problems


class _Part:
    """One item of a file as a stream."""

    def __init__(self, file: OpenFile, item: Extent) -> None:
        self._file = file
        self._at, self._end = item.offset, item.offset + item.nbytes

    def read(self, nbytes: int = -1) -> bytes:
        """The next bytes of the item; none at its end."""
        left = self._end - self._at
        data = self._file.read(self._at, left if nbytes < 0 else min(nbytes, left))
        self._at += len(data)
        return data


def _reader(stream: _Part) -> Callable[[int], bytes]:
    import zstandard  # noqa: PLC0415 - an extra, and only for compressed items

    part: Any = stream  # of a stream it only asks for read()
    opened: IO[bytes] = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(part)
    return opened.read


def _errors() -> type[Exception]:
    import zstandard  # noqa: PLC0415 - an extra, and only for compressed items

    found: type[Exception] = zstandard.ZstdError
    return found


def _moved(contents: MetadataContents, places: Mapping[Extent, Extent]) -> MetadataContents:
    """The same with every item at its new place; lost ones keep theirs, where nothing is."""
    return replace(
        contents,
        tensors={
            key: replace(
                tensor,
                chunks=tuple(
                    replace(chunk, item=places.get(chunk.item, chunk.item))
                    for chunk in tensor.chunks
                ),
            )
            for key, tensor in contents.tensors.items()
        },
        objects={key: places.get(item, item) for key, item in contents.objects.items()},
        packed=frozenset(),
    )

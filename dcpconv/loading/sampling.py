"""A few KiB of every file: enough to tell two checkpoints of one shape apart, cheap on any storage.

Headers alone cannot tell a base model from its fine-tuned one, nor a whole file from one whose
second half is still a hole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from dcpconv.core.catalog import Catalog
from dcpconv.core.errors import FormatError
from dcpconv.stores.remote import RemotePath

_PLACES = 64
"""Places that are looked at in all files together, evenly."""
_LEAST = 4
"""Places in each file, whatever their number: both ends and two between."""
_NBYTES = 64
"""Bytes at such a place; a file that is no larger than its share is read whole."""
_TENSORS = 512
"""Tensors that are looked at besides, evenly chosen: a fine-tuned model may differ in few."""
_NBYTES_OF_TENSOR = 16
"""Bytes in the middle of each: 8 KiB in all."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One file of a checkpoint.

    Attributes:
        file: Relative to the checkpoint.
        nbytes: Its size.
        digest: Of the sampled bytes.
    """

    file: str
    nbytes: int
    digest: str


def sample(catalog: Catalog) -> tuple[Sampled, ...]:
    """Size and sampled bytes of every file that holds tensors.

    Raises:
        FormatError: A file cannot be read, or has become shorter.
    """
    count = max(_LEAST, _PLACES // max(1, len(catalog.files)))
    inside = _in_tensors(catalog)
    found = []
    for file, nbytes in sorted(catalog.files.items()):
        path = catalog.path / file
        hasher = hashlib.sha256()
        if isinstance(path, RemotePath):
            hasher.update(path.ranged.info.tag.encode())  # the store tells objects apart itself
            found.append(Sampled(file, nbytes, hasher.hexdigest()[:16]))
            continue
        try:
            with path.open("rb", buffering=0) as opened:
                for offset, length in (*_places(nbytes, count), *inside.get(file, ())):
                    hasher.update(os.pread(opened.fileno(), length, offset))
        except OSError as error:
            raise FormatError(
                "source file cannot be read", [("file", path), ("reason", error.strerror)]
            ) from error
        found.append(Sampled(file, nbytes, hasher.hexdigest()[:16]))
    return tuple(found)


def _in_tensors(catalog: Catalog) -> dict[str, list[tuple[int, int]]]:
    """Middles of tensors, by file."""
    extents = [chunk.extent for entry in catalog.tensors.values() for chunk in entry.chunks[:1]]
    found: dict[str, list[tuple[int, int]]] = {}
    for extent in extents[:: -(-len(extents) // _TENSORS) or 1]:
        length = min(extent.nbytes, _NBYTES_OF_TENSOR)
        middle = extent.offset + (extent.nbytes - length) // 2
        found.setdefault(extent.file, []).append((middle, length))
    return found


def _places(nbytes: int, count: int) -> Iterator[tuple[int, int]]:
    """Where to look: evenly, both ends included.

    >>> list(_places(100, 4)), list(_places(1000, 3))
    ([(0, 100)], [(0, 64), (468, 64), (936, 64)])
    """
    if nbytes <= count * _NBYTES:
        yield 0, nbytes
        return
    for n in range(count):
        yield (nbytes - _NBYTES) * n // (count - 1), _NBYTES

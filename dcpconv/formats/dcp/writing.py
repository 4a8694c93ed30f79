"""What a DCP directory that we write will look like: where every item goes, and ``.metadata``.

An item is a frame around raw bytes, and ``.metadata`` names its absolute offset, so items may lie
anywhere: each is placed so that its payload starts where the source's does modulo a disk block,
which lets the engine clone blocks instead of copying them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from dcpconv.core.catalog import Extent, KeyPath
from dcpconv.core.errors import FormatError
from dcpconv.core.outline import Fill, OutFile, Outline, OutTensor
from dcpconv.formats.dcp.metadata_writer import WrittenObject, WrittenTensor, write_metadata
from dcpconv.formats.dcp.names import METADATA_FILE
from dcpconv.formats.torchfile.frames import object_frame, tensor_frame

_ALIGNMENT: Final = 64
"""Where payloads start that have nothing to line up with: a cache line, and any element type."""


def outline(
    tensors: Sequence[OutTensor],
    objects: Mapping[KeyPath, object],
    *,
    modulus: int = 4096,
    max_file_size: int | None = None,
    stem: str = "",
) -> Outline:
    """Place every tensor and object; ``.metadata`` is the commit file.

    Chunk i of every tensor goes to ``__i_0.distcp``, as if rank i had saved it; objects come first
    in ``__0_0.distcp``.  A tensor tied to an earlier one of the same boxes names the same items
    and takes no space.  Keys are the paths joined with dots, as torch spells them.

    Args:
        tensors: In the order they are placed in.
        objects: Values that are not tensors, by path.
        modulus: Block size that payloads keep their source's alignment to; fewer than this many
            zeros lie before an item.
        max_file_size: In bytes; a file that would grow beyond it is continued in ``__i_1.distcp``
            and so on.  A single item may be larger.
        stem: Goes into the names of all files but ``.metadata``, where others have to stay.

    Raises:
        FormatError: Two values have the same key, or an object cannot be stored.
        ValueError: A fill does not have the size of its box.
    """
    counts = Counter([*(_join(tensor.path) for tensor in tensors), *map(_join, objects)])
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise FormatError(
            "two values would have the same key",
            [("key", key) for key in twice],
            hint="DCP joins the parts of a path with dots; rename one of them",
        )

    width = max((len(tensor.chunks) for tensor in tensors), default=1)
    ranks = [_Rank(number, modulus, max_file_size, stem) for number in range(width)]
    written_objects = [
        WrittenObject(_join(path), path, ranks[0].place_object(object_frame(value)))
        for path, value in objects.items()
    ]
    written: dict[str, WrittenTensor] = {}
    for tensor in tensors:
        boxes = tuple((chunk.offsets, chunk.sizes) for chunk in tensor.chunks)
        owner = written.get(tensor.tied_to) if tensor.tied_to is not None else None
        if owner and (owner.dtype, owner.shape, owner.boxes) == (tensor.dtype, tensor.shape, boxes):
            items = owner.items
        else:
            items = tuple(
                rank.place_tensor(tensor, chunk.sizes, chunk.fill)
                for rank, chunk in zip(ranks, tensor.chunks, strict=False)
            )
        written[tensor.key] = WrittenTensor(
            _join(tensor.path), tensor.path, tensor.dtype, tensor.shape, boxes, items
        )
    metadata = write_metadata(tuple(written.values()), written_objects)
    files = tuple(file for rank in ranks for file in rank.files())
    return Outline(files=files, commit=((METADATA_FILE, metadata),))


def _join(path: KeyPath) -> str:
    return ".".join(map(str, path))


class _Rank:
    """The files of one rank, the last of them still growing."""

    def __init__(self, number: int, modulus: int, max_file_size: int | None, stem: str) -> None:
        self._prefix = f"__{stem}_{number}" if stem else f"__{number}"
        self._modulus = modulus
        self._limit = max_file_size
        self._finished: list[OutFile] = []
        self._nbytes = 0
        self._literals: list[tuple[int, bytes]] = []
        self._payloads: list[tuple[int, Fill]] = []

    def place_object(self, archive: bytes) -> Extent:
        """Append an item that is known whole."""
        item = self._start(0, 1, 0, len(archive))
        self._literals.append((item.offset, archive))
        return item

    def place_tensor(self, tensor: OutTensor, sizes: tuple[int, ...], fill: Fill) -> Extent:
        """Append an item around the bytes of ``fill``."""
        frame = tensor_frame(tensor.dtype, sizes)
        if fill.nbytes != frame.payload_nbytes:
            raise ValueError(f"{tensor.key}: {fill.nbytes} bytes fill a box of {sizes}")
        residue, modulus = fill.congruence(self._modulus), self._modulus
        if residue is None:
            residue, modulus = 0, _ALIGNMENT
        item = self._start(len(frame.head), modulus, residue, frame.nbytes)
        payload = item.offset + len(frame.head)
        self._literals.append((item.offset, frame.head))
        self._payloads.append((payload, fill))
        self._literals.append((payload + frame.payload_nbytes, frame.tail))
        return item

    def files(self) -> Iterator[OutFile]:
        """All files; a rank without items has none."""
        yield from self._finished
        if self._nbytes:
            yield self._current()

    def _start(self, head: int, modulus: int, residue: int, nbytes: int) -> Extent:
        offset = self._nbytes + (residue - head - self._nbytes) % modulus
        if self._limit is not None and self._nbytes and offset + nbytes > self._limit:
            self._finished.append(self._current())
            self._literals, self._payloads = [], []
            offset = (residue - head) % modulus
        self._nbytes = offset + nbytes
        return Extent(self._name(), offset, nbytes)

    def _name(self) -> str:
        return f"{self._prefix}_{len(self._finished)}.distcp"

    def _current(self) -> OutFile:
        return OutFile(self._name(), self._nbytes, tuple(self._literals), tuple(self._payloads))

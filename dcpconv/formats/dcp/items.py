"""Where the bytes of a tensor lie inside an item of a ``.distcp`` file.

An item is a whole ``torch.save`` archive.  What comes before its payload depends only on the
tensor's type and layout, so one item of a kind is parsed and the others are compared with it: a
checkpoint of 91,000 items costs as many small reads and a few dozen parses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dcpconv.core.catalog import Chunk, Extent
from dcpconv.core.dtypes import DType
from dcpconv.core.errors import FormatError
from dcpconv.formats.dcp.metadata import StoredChunk
from dcpconv.formats.dcp.objects import OpaqueObject
from dcpconv.formats.dcp.safetensors_items import Blobs
from dcpconv.formats.torchfile.archive import (
    Archive,
    StoredTensor,
    UnreadableTensor,
    read_archive,
    read_tensors,
)
from dcpconv.stores.local import OpenFile

_ZIP: Final = b"PK"
_READ_AHEAD: Final = 64 << 10
"""Bytes read at once where items are so small that several heads lie in them."""


@dataclass(frozen=True, slots=True)
class NestedTensors:
    """A value of containers with tensors in them, and its item."""

    item: Extent
    value: object


@dataclass(frozen=True, slots=True)
class _Kind:
    head: bytes  # all before the payload: the recipe of the tensor is part of it
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None


def locate(
    path: Path, wanted: Sequence[tuple[str, DType, StoredChunk]]
) -> Iterator[tuple[int, Chunk | str]]:
    """Find the payload of every chunk, in the order of the files.

    Args:
        path: The DCP directory.
        wanted: Key, element type and chunk; every item lies inside its file.

    Yields:
        Index in ``wanted``, and the chunk as stored or what is wrong with its item.

    Raises:
        OSError: A file cannot be read.
    """
    blobs = Blobs(path)
    kinds: dict[tuple[int, DType, tuple[int, ...]], list[_Kind]] = {}
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i][2].item.file, _start(wanted[i])))
    with _one_file_at_a_time(path) as window:
        for place, index in enumerate(order):
            key, dtype, chunk = wanted[index]
            item = chunk.item
            following = wanted[order[place + 1]][2].item if place + 1 < len(order) else item
            is_near = following.file == item.file and following.offset - item.offset < 16 << 10
            window.open(item, ahead=_READ_AHEAD if is_near else 0)

            likely = kinds.get((item.nbytes, dtype, chunk.sizes))
            if likely and likely[0].head and window.expect(likely[0].head):
                yield index, _chunk(chunk, likely[0])
                continue
            if not window.starts_with(_ZIP) and blobs.is_one(item):
                yield index, blobs.find(key, dtype, chunk)
                continue
            known = kinds.setdefault((item.nbytes, dtype, chunk.sizes), [])
            kind = next((kind for kind in known if window.starts_with(kind.head)), None)
            if kind is None:
                parsed = _parse(window, item, dtype, chunk.sizes)
                if isinstance(parsed, str):
                    yield index, parsed
                    continue
                kind = parsed
                if kind.head:
                    known.append(kind)
            yield index, _chunk(chunk, kind)


def read_objects(
    path: Path, wanted: Iterable[tuple[str, Extent]]
) -> Iterator[tuple[str, object | NestedTensors | OpaqueObject]]:
    """Every value that is not a tensor; what cannot be read without trust is an ``OpaqueObject``.

    Args:
        path: The DCP directory.
        wanted: Key and item, which lies inside its file.

    Yields:
        Key and value, in the order of ``wanted``.

    Raises:
        OSError: A file cannot be read.
    """
    with _one_file_at_a_time(path) as window:
        for key, item in wanted:
            window.open(item, ahead=0)
            try:
                value, tensors = read_tensors(_archive(window, item))
            except FormatError as error:
                yield key, OpaqueObject(item, error.in_one_line)
                continue
            if not tensors:
                yield key, value
            elif isinstance(value, (dict, list)):
                yield key, NestedTensors(item, value)
            else:
                yield key, OpaqueObject(item, "it holds tensors")


def _chunk(stored: StoredChunk, kind: _Kind) -> Chunk:
    item = stored.item
    extent = Extent(item.file, item.offset + kind.offset, kind.nbytes)
    return Chunk(stored.offsets, stored.sizes, extent, kind.strides)


def _start(wanted: tuple[str, DType, StoredChunk]) -> int:
    return wanted[2].item.offset


def _parse(window: _Window, item: Extent, dtype: DType, sizes: tuple[int, ...]) -> _Kind | str:
    try:
        archive = _archive(window, item)
        tensor, _ = read_tensors(archive)
        if isinstance(tensor, UnreadableTensor):
            return f"tensor is {tensor.kind}"
        if not isinstance(tensor, StoredTensor):
            return "item is not a tensor"
        if (tensor.dtype, tensor.shape) != (dtype, sizes):
            return (
                f"item holds {tensor.dtype} {list(tensor.shape)},"
                f" .metadata says {dtype} {list(sizes)}"
            )
        payload = tensor.offset - tensor.offset_elements * dtype.itemsize
        recipe, _ = archive.extent("data.pkl")
    except FormatError as error:
        return error.in_one_line
    head = window.read(0, payload) if recipe < payload else b""
    strides = None if tensor.is_contiguous else tensor.strides
    return _Kind(head, tensor.offset, tensor.nbytes, strides)


def _archive(window: _Window, item: Extent) -> Archive:
    return read_archive(window.read, item.nbytes, f"{item.file}, item at byte {item.offset}")


@dataclass(frozen=True, slots=True)
class _SameHead:
    """What an item has to begin with, as others of its type and shape do."""

    head: bytes
    file: str
    offset: int

    def __call__(self, found: bytes) -> None:
        if found != self.head:
            raise FormatError(
                "item does not begin as others of its type and shape do",
                [("file", self.file), ("item", f"at byte {self.offset}")],
                hint="copy the checkpoint to a disk and try again there: items are read there",
            )


class _Window:
    """Reads inside one item of one file, and keeps the last piece read for the items after it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name: str | None = None
        self._file: OpenFile | None = None
        self._item = Extent("", 0, 0)
        self._ahead = 0
        self._offset = 0
        self._bytes = b""

    def open(self, item: Extent, *, ahead: int) -> None:
        """Turn to ``item``; ``ahead`` is how many bytes a read should fetch at least."""
        if item.file != self._name:
            self.close()
            self._file = OpenFile(self._path / item.file)
            self._name, self._bytes = item.file, b""
        self._item, self._ahead = item, ahead

    def close(self) -> None:
        """Close the file; turning to an item opens it again."""
        if self._file is not None:
            self._file.close()
            self._file, self._name = None, None

    def expect(self, head: bytes) -> bool:
        """Have the first bytes of the item compared when its payload is read, where a look at each
        item would take longer than all the rest; ``False`` where it costs nothing."""
        assert self._file is not None  # noqa: S101  open() came first
        if self._file.expect is None:
            return False
        from dcpconv.stores.ranged import Heading  # noqa: PLC0415 - files here need none

        item = self._item
        check = _SameHead(head, str(self._path / item.file), item.offset)
        self._file.expect(Heading(item.offset, len(head), check))
        return True

    def starts_with(self, head: bytes) -> bool:
        """Whether these are the first bytes of the item."""
        return self.read(0, len(head)) == head

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes of the item, fewer only at its end."""
        nbytes = max(0, min(nbytes, self._item.nbytes - offset))
        start = self._item.offset + offset
        skip = start - self._offset
        if not 0 <= skip <= skip + nbytes <= len(self._bytes):
            assert self._file is not None  # noqa: S101  open() came first
            self._bytes = self._file.read(start, max(nbytes, self._ahead))
            self._offset, skip = start, 0
        return self._bytes[skip : skip + nbytes]


@contextmanager
def _one_file_at_a_time(path: Path) -> Iterator[_Window]:
    window = _Window(path)
    try:
        yield window
    finally:
        window.close()

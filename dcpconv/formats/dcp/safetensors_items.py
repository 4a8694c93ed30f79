"""Items of a DCP file that torch wrote as one safetensors blob.

With ``serialization_format=SAFETENSORS`` the tensors of a file are gathered into one blob at its
end, and every item is said to begin where the blob does: key and header say where it really lies.

Source:
    torch 2.13 ``distributed/checkpoint/filesystem.py``, ``_write_files_from_queue``.
"""

from __future__ import annotations

from pathlib import Path

from dcpconv.core.catalog import Chunk, Extent, TensorEntry
from dcpconv.core.dtypes import DType
from dcpconv.core.errors import FormatError
from dcpconv.formats.dcp.metadata import StoredChunk
from dcpconv.formats.safetensors.files import saved_offsets
from dcpconv.formats.safetensors.header import parse_entries, parse_header
from dcpconv.stores.local import OpenFile

_Blob = tuple[dict[str, TensorEntry], dict[str, tuple[int, ...]]]


class Blobs:
    """The blobs of a directory, each read once.

    Args:
        path: The DCP directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: dict[tuple[str, int], bool] = {}
        self._read: dict[tuple[str, int], _Blob] = {}

    def is_one(self, item: Extent) -> bool:
        """Whether a blob begins where an item is said to begin."""
        place = (item.file, item.offset)
        if place not in self._seen:
            with OpenFile(self._path / item.file) as file:
                self._seen[place] = file.read(item.offset + 8, 1) == b"{"
        return self._seen[place]

    def find(self, key: str, dtype: DType, chunk: StoredChunk) -> Chunk | str:
        """Where a chunk lies in the blob at the offset of its item, or why it is not there."""
        place = (chunk.item.file, chunk.item.offset)
        try:
            if place not in self._read:
                self._read[place] = self._open(*place)
        except FormatError as error:
            return error.in_one_line
        entries, offsets = self._read[place]
        entry = entries.get(key)
        if entry is None:
            return f"the safetensors items of {chunk.item.file} do not hold it"
        if (entry.dtype, entry.shape) != (dtype, chunk.sizes):
            found = f"{entry.dtype} {list(entry.shape)}"
            return f"item holds {found}, .metadata says {dtype} {list(chunk.sizes)}"
        if offsets.get(key, chunk.offsets) != chunk.offsets:
            # Two chunks of one key in one file: the writer kept the last one only.
            return f"item holds the chunk at {list(offsets[key])}, not at {list(chunk.offsets)}"
        return Chunk(chunk.offsets, chunk.sizes, entry.chunks[0].extent)

    def _open(self, file: str, offset: int) -> _Blob:
        where = f"{file}, safetensors at byte {offset}"
        with OpenFile(self._path / file) as opened:
            size = opened.nbytes

            def read(at: int, nbytes: int) -> bytes:
                return opened.read(offset + at, nbytes)

            start, header = parse_header(read, size - offset, where)
        entries = parse_entries(header, offset + start, size, file, where)
        metadata: object = header.get("__metadata__")
        return {entry.key: entry for entry in entries}, saved_offsets(metadata, where)

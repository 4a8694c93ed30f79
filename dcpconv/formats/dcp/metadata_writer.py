"""The bytes of ``.metadata``, put together by hand: no torch, and 100,000 tensors a second.

Every name, class, element type, shape and file name goes into the pickle's memo first; after that
a tensor is a short template of references.  Shapes and properties are therefore shared between the
tensors of one file, which torch's readers cannot tell from separate ones: they change neither.

Source: ``pickletools`` on what torch 2.13 writes; CPython ``Lib/pickle.py`` (protocol 4).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from dcpconv.core.catalog import Extent, KeyPath
from dcpconv.core.dtypes import DType
from dcpconv.formats.boxes import Region

Sizes = tuple[int, ...]

_VERSION: Final = "1.0.0"
"""``CURRENT_DCP_VERSION`` of torch 2.6 to 2.13."""


@dataclass(frozen=True, slots=True)
class WrittenObject:
    """A value that is not a tensor, and where its item lies."""

    key: str
    path: KeyPath
    item: Extent


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """A tensor, its boxes, and where the item of each lies."""

    key: str
    path: KeyPath
    dtype: DType
    shape: Sizes
    boxes: tuple[Region, ...]
    items: tuple[Extent, ...]


def write_metadata(tensors: Sequence[WrittenTensor], objects: Sequence[WrittenObject]) -> bytes:
    """What torch's ``FileSystemWriter`` would pickle for these items, but for two things.

    ``storage_meta`` has no path and no id of this save: a checkpoint should not tell where it was
    written, and equal input gives equal bytes.
    """
    memo = _Memo()
    checkpoint = "torch.distributed.checkpoint.metadata"
    new = {name: memo.instance(checkpoint, name) for name in _CLASSES}
    info = memo.instance("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    name = {text: memo.put(_text(text)) for text in _FIELDS}
    properties = _remember_properties(memo, new["TensorProperties"], tensors)
    sizes = _remember_sizes(memo, tensors)
    items = [item for tensor in tensors for item in tensor.items] + [row.item for row in objects]
    files = {file: memo.put(_text(file)) for file in dict.fromkeys(item.file for item in items)}

    described, nesting, stored = [], [], []
    for tensor in tensors:
        described.append(memo.keep(_text(tensor.key)))
        key = memo.last()
        chunks = b"".join(
            b"%b}(%b%b%b%bub"
            % (new["ChunkStorageMetadata"], name["offsets"], sizes[at], name["sizes"], sizes[box])
            for at, box in tensor.boxes
        )
        described.append(
            b"%b}(%b%b%b%b%b](%beub"
            % (
                *(new["TensorStorageMetadata"], name["properties"], properties[tensor.dtype]),
                *(name["size"], sizes[tensor.shape], name["chunks"], chunks),
            )
        )
        nesting.append(key + _path(tensor.path))
        for hint, ((at, _), item) in enumerate(zip(tensor.boxes, tensor.items, strict=True)):
            stored.append(
                b"%b}(%b%b%b%b%b%bub"
                % (
                    *(new["MetadataIndex"], name["fqn"], key),
                    *(name["index"], _int(hint), name["offset"], sizes[at]),
                )
            )
            stored.append(_storage_info(info, name, files, item))
    for row in objects:
        described.append(memo.keep(_text(row.key)) + new["BytesStorageMetadata"])
        key = memo.last()
        nesting.append(key + _path(row.path))
        stored.append(b"%b}(%b%b%bNub" % (new["MetadataIndex"], name["fqn"], key, name["index"]))
        stored.append(_storage_info(info, name, files, row.item))

    return b"".join(
        [
            b"\x80\x04",
            *memo.prelude,
            *(new["Metadata"], b"}("),
            *(_text("state_dict_metadata"), b"}(", *described, b"u"),
            *(_text("planner_data"), b"}(", *nesting, b"u"),
            *(_text("storage_data"), b"}(", *stored, b"u"),
            *(_text("storage_meta"), _storage_meta(new["StorageMeta"])),
            *(_text("version"), _text(_VERSION)),
            b"ub.",
        ]
    )


_CLASSES: Final = (
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "MetadataIndex",
    "StorageMeta",
)
_FIELDS: Final = (
    *("properties", "size", "chunks", "offsets", "sizes"),
    *("fqn", "index", "offset", "relative_path", "length"),
)


class _Memo:
    """Hands out references to values that are pickled once.

    The prelude builds a value, memoizes it and takes it off the stack again; memo numbers are the
    order of all ``MEMOIZE`` opcodes, so the prelude must be complete before ``keep`` is used.
    """

    def __init__(self) -> None:
        self.prelude: list[bytes] = []
        self._count = 0

    def put(self, value: bytes) -> bytes:
        """Add a value to the prelude; returns the opcode that brings it back."""
        self.prelude.append(value + b"\x940")
        self._count += 1
        return self.last()

    def instance(self, module: str, name: str) -> bytes:
        """Add a class; returns the opcodes that make an object of it, still without state."""
        return self.put(f"c{module}\n{name}\n".encode()) + b")\x81"

    def keep(self, value: bytes) -> bytes:
        """Memoize a value where it stands."""
        self._count += 1
        return value + b"\x94"

    def last(self) -> bytes:
        """The opcode that brings back what was memoized last."""
        index = self._count - 1
        return b"h%c" % index if index < 256 else b"j" + _uint32(index)


def _remember_properties(
    memo: _Memo, new: bytes, tensors: Iterable[WrittenTensor]
) -> dict[DType, bytes]:
    layout = memo.put(b"ctorch.serialization\n_get_layout\n" + _text("torch.strided") + b"\x85R")
    contiguous = memo.put(b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\0\x85R")
    return {
        # dtype, layout, requires_grad, memory format, pin_memory: TensorProperties.__getstate__
        dtype: memo.put(
            b"%b(ctorch\n%b\n%b\x89%b\x89tb" % (new, dtype.name.encode(), layout, contiguous)
        )
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors)
    }


def _remember_sizes(memo: _Memo, tensors: Sequence[WrittenTensor]) -> dict[Sizes, bytes]:
    size = memo.put(b"ctorch\nSize\n")
    distinct = dict.fromkeys(tensor.shape for tensor in tensors)
    for tensor in tensors:
        for box in tensor.boxes:
            distinct.update(dict.fromkeys(box))
    return {
        sizes: memo.put(b"%b(%bt\x85R" % (size, b"".join(map(_int, sizes)))) for sizes in distinct
    }


def _storage_info(
    new: bytes, name: dict[str, bytes], files: dict[str, bytes], item: Extent
) -> bytes:
    return b"%b}(%b%b%b%b%b%bub" % (
        *(new, name["relative_path"], files[item.file]),
        *(name["offset"], _int(item.offset), name["length"], _int(item.nbytes)),
    )


def _storage_meta(new: bytes) -> bytes:
    fields = ("checkpoint_id", "save_id", "load_id")
    return b"%b}(%b%b]ub" % (
        new,
        b"".join(_text(field) + b"N" for field in fields),
        _text("modules"),
    )


def _path(path: KeyPath) -> bytes:
    parts = (_text(part) if isinstance(part, str) else _int(part) for part in path)
    return b"(%bt" % b"".join(parts)


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    if len(encoded) < 256:
        return b"\x8c%c" % len(encoded) + encoded
    return b"X" + _uint32(len(encoded)) + encoded


def _int(value: int) -> bytes:
    if value < 1 << 8:
        return b"K%c" % value
    if value < 1 << 16:
        return b"M" + _uint16(value)
    if value < 1 << 31:
        return b"J" + _int32(value)
    return b"\x8a\x08" + _int64(value)


_uint16 = struct.Struct("<H").pack
_uint32 = struct.Struct("<I").pack
_int32 = struct.Struct("<i").pack
_int64 = struct.Struct("<q").pack

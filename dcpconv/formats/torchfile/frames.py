"""The frame around a tensor or value that we write: one whole ``torch.save`` archive.

Source:
    torch 2.13 ``torch/serialization.py`` (``_save``), ``torch/_tensor.py``
    (``Tensor._reduce_ex_internal``).
"""

from __future__ import annotations

import functools
import math
import struct
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from dcpconv.core.dtypes import DType
from dcpconv.formats.torchfile.pickling import dumps
from dcpconv.formats.torchfile.stand_ins import Call, Persistent, Ref
from dcpconv.formats.torchfile.zip_records import (
    CENTRAL,
    CENTRAL_SIG,
    END,
    END64,
    END64_SIG,
    END_SIG,
    LOCAL,
    LOCAL_SIG,
    LOCATOR,
    LOCATOR_SIG,
    MAX16,
    MAX32,
    PADDING_ID,
    ZIP64_ID,
)

STORAGE_ALIGNMENT: Final = 64
"""Where torch puts a payload when nothing else matters, in bytes (``_get_storage_alignment``)."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What surrounds a tensor's bytes: ``head + payload + tail`` is one whole archive."""

    head: bytes
    tail: bytes
    payload_nbytes: int

    @property
    def nbytes(self) -> int:
        """Length of the whole archive."""
        return len(self.head) + self.payload_nbytes + len(self.tail)


def tensor_call(
    dtype: DType, shape: Sequence[int], *, storage_key: str, requires_grad: bool = False
) -> Call:
    """The recipe of a contiguous tensor that has a storage of its own."""
    numel = math.prod(shape)
    strides = tuple(
        math.prod(max(1, size) for size in shape[dim + 1 :]) for dim in range(len(shape))
    )
    place: tuple[object, ...] = (0, tuple(shape), strides, requires_grad, OrderedDict())
    if dtype.storage:
        kind, counted = Ref("torch", dtype.storage), numel
    else:
        kind, counted = Ref("torch.storage", "UntypedStorage"), numel * dtype.itemsize
    storage = Persistent(("storage", kind, storage_key, "cpu", counted))
    if dtype.storage:
        return Call(Ref("torch._utils", "_rebuild_tensor_v2"), (storage, *place))
    element = Ref("torch", dtype.name)
    return Call(Ref("torch._utils", "_rebuild_tensor_v3"), (storage, *place, element))


def add_frame_records(layout: ArchiveLayout, value: object) -> None:
    """Place what every archive starts with: the pickle of ``value``, byte order and version.

    torch writes ``.format_version``, ``.storage_alignment`` and ``.data/serialization_id`` too; no
    reader needs them, and the first would promise torch's own spacing of payloads
    (``torch/serialization.py``, ``_get_offset``).
    """
    layout.add("data.pkl", dumps(value))
    layout.add("byteorder", b"little")
    layout.add("version", b"3\n")


@functools.lru_cache(maxsize=4096)
def tensor_frame(dtype: DType, shape: tuple[int, ...], *, requires_grad: bool = False) -> Frame:
    """The archive around one contiguous tensor, as ``torch.save(tensor)`` makes it.

    Readable by ``torch.load`` of torch 2.6 and later, with ``weights_only`` and ``mmap`` or
    without.  The payload itself is its elements in C order.
    """
    layout = ArchiveLayout()
    value = tensor_call(dtype, shape, storage_key="0", requires_grad=requires_grad)
    add_frame_records(layout, value)
    nbytes = math.prod(shape) * dtype.itemsize
    payload = layout.add_payload("data/0", nbytes, modulus=1, residue=0)
    layout.finish()
    head = b"".join(data for offset, data in layout.literals if offset < payload)
    tail = b"".join(data for offset, data in layout.literals if offset >= payload)
    return Frame(head, tail, nbytes)


def object_frame(value: object) -> bytes:
    """The whole archive of a value that holds no tensor, as ``torch.save(value)`` makes it."""
    layout = ArchiveLayout()
    add_frame_records(layout, value)
    layout.finish()
    return b"".join(data for _, data in layout.literals)


@dataclass(slots=True)
class ArchiveLayout:
    """Places records one after another and writes down every byte that is not payload.

    Deterministic: no times, no ids.  Payload checksums are 0, because the bytes are not at hand
    and torch never looks (``torch.serialization.set_crc32_options`` and ``skip_data`` rely on it).

    Attributes:
        position: Where the next record's header goes; after ``finish``, the archive's length.
        literals: ``(offset, bytes)``; padding is left out, it is zeros.
    """

    position: int = 0
    literals: list[tuple[int, bytes]] = field(default_factory=list)
    _directory: list[bytes] = field(default_factory=list)

    def add(self, name: str, data: bytes) -> None:
        """Place a small record together with its bytes."""
        self._header(name, len(data), zlib.crc32(data), modulus=1, residue=0)
        self._literal(data)

    def add_payload(self, name: str, nbytes: int, *, modulus: int, residue: int) -> int:
        """Place a record whose bytes come from elsewhere; returns their offset.

        Args:
            name: _Record name below the archive's directory.
            nbytes: Length of the payload.
            modulus: The payload starts where ``offset % modulus == residue``; at most 32768, so
                that the padding fits an extra field.
            residue: See ``modulus``.
        """
        self._header(name, nbytes, 0, modulus=modulus, residue=residue)
        offset = self.position
        self.position += nbytes
        return offset

    def finish(self) -> None:
        """Place the directory and the end record."""
        offset, directory = self.position, b"".join(self._directory)
        count, size = len(self._directory), len(directory)
        self._literal(directory)
        if count >= MAX16 or size >= MAX32 or offset >= MAX32:
            end64 = END64.pack(END64_SIG, END64.size - 12, 45, 45, 0, 0, count, count, size, offset)
            locator = LOCATOR.pack(LOCATOR_SIG, 0, self.position, 1)
            self._literal(end64 + locator)
        short = min(count, MAX16)
        self._literal(
            END.pack(END_SIG, 0, 0, short, short, min(size, MAX32), min(offset, MAX32), 0)
        )

    def _literal(self, data: bytes) -> None:
        self.literals.append((self.position, data))
        self.position += len(data)

    def _header(self, name: str, nbytes: int, crc: int, *, modulus: int, residue: int) -> None:
        raw_name, header = f"archive/{name}".encode(), self.position
        is_wide = nbytes >= MAX32
        short = MAX32 if is_wide else nbytes
        version = 45 if is_wide or header >= MAX32 else 20
        extra = struct.pack("<2H2Q", ZIP64_ID, 16, nbytes, nbytes) if is_wide else b""
        start = header + LOCAL.size + len(raw_name) + len(extra)
        padding = 0
        if start % modulus != residue:
            padding = (residue - start - 4) % modulus
            extra += PADDING_ID + struct.pack("<H", padding)
        local = LOCAL.pack(
            LOCAL_SIG, version, 0, 0, 0, 0, crc, short, short, len(raw_name), len(extra) + padding
        )
        self._literal(local + raw_name + extra)
        self.position += padding

        wide = [nbytes, nbytes] if is_wide else []
        wide += [header] if header >= MAX32 else []
        extra = struct.pack(f"<2H{len(wide)}Q", ZIP64_ID, 8 * len(wide), *wide) if wide else b""
        self._directory.append(
            CENTRAL.pack(
                CENTRAL_SIG,
                *(version, version, 0, 0, 0, 0, crc, short, short),
                *(len(raw_name), len(extra), 0, 0, 0, 0, min(header, MAX32)),
            )
            + raw_name
            + extra
        )

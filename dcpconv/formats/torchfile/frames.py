"""The frame around a tensor or value that we write: one whole ``torch.save`` archive.

Source:
    torch 2.13 ``torch/serialization.py`` (``_save``), ``torch/_tensor.py``
    (``Tensor._reduce_ex_internal``).
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dcpconv.core.dtypes import DType
from dcpconv.formats.torchfile.pickling import dumps
from dcpconv.formats.torchfile.stand_ins import Call, Persistent, Ref
from dcpconv.formats.torchfile.zip_records import ArchiveLayout

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

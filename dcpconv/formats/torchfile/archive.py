"""One ``torch.save`` archive: the tensors in it, and the frame around a tensor we write.

A ``.pth`` file is one such archive; so is each item of a DCP file.  A tensor is a recipe in
``data.pkl`` (storage, offset, sizes, strides) over raw little-endian bytes in a record ``data/N``.

Source:
    torch 2.13 ``torch/serialization.py`` (``_save``, ``_load``), ``torch/_utils.py``
    (``_rebuild_*``), ``torch/_tensor.py`` (``Tensor._reduce_ex_internal``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, NoReturn

from dcpconv.core.dtypes import BY_NAME, BY_STORAGE, DType
from dcpconv.core.errors import FormatError
from dcpconv.formats.torchfile import distributed
from dcpconv.formats.torchfile.pieces import MeshTensor, ShardedParts, stored_tensors
from dcpconv.formats.torchfile.stored import StoredTensor, UnreadableTensor, whole_numbers
from dcpconv.formats.torchfile.unpickling import (
    HARMLESS,
    Allowed,
    Ref,
    calls,
    check_size,
    loads,
)
from dcpconv.formats.torchfile.zip_records import Archive, ReadAt, read_archive

__all__ = [
    "NAMES",
    "Archive",
    "ReadAt",
    "StoredTensor",
    "UnreadableTensor",
    "least_nbytes",
    "read_archive",
    "read_tensors",
]


@dataclass(frozen=True)
class _Storage:
    where: str
    key: str
    dtype: DType | None
    offset: int
    nbytes: int

    def __setstate__(self, state: object) -> NoReturn:
        raise FormatError("a pickle may not change a storage")


def read_tensors(
    archive: Archive, *, names: Allowed | None = None
) -> tuple[object, tuple[StoredTensor, ...]]:
    """The saved value with ``StoredTensor`` in place of tensors, and all of these in its order; a
    distributed tensor is a ``Piece``.  Globals are what ``names`` says, by default ``NAMES``.

    Raises:
        FormatError: The pickle names anything unknown, or a tensor reaches outside its storage.
    """
    extents: dict[str, tuple[int, int]] = {}

    def find_storage(pid: object) -> _Storage:
        return _find_storage(archive, extents, pid)

    data = archive.read("data.pkl")
    value = loads(data, allowed=names or NAMES, where=archive.where, persistent_load=find_storage)
    check_size(value, len(data), archive.where)

    found: dict[int, StoredTensor] = {}
    ahead = [value]
    while ahead:
        node = ahead.pop()
        if isinstance(node, StoredTensor):
            found.setdefault(id(node), node)
        elif isinstance(node, (MeshTensor, ShardedParts)):
            ahead.extend(stored_tensors(node))
        elif isinstance(node, dict):
            ahead.extend(reversed(node.values()))
        elif isinstance(node, (list, tuple)):
            ahead.extend(reversed(node))
    return value, tuple(found.values())


def least_nbytes(data: bytes, where: str) -> int:
    """Bytes that the storages named by a ``data.pkl`` take together, wherever they lie.

    Raises:
        FormatError: The pickle is cut short, or names anything unknown.
    """
    found: dict[str, int] = {}

    def count(pid: object) -> _Storage:
        kind, key, _, numel = pid[1:] if isinstance(pid, tuple) and len(pid) == 5 else (None,) * 4
        if not (isinstance(kind, Ref) and isinstance(key, str) and isinstance(numel, int)):
            raise FormatError("pickle refers to something that is not a storage", [("file", where)])
        dtype = BY_STORAGE.get(kind.name)
        found[key] = numel * (dtype.itemsize if dtype else 1)
        return _Storage(where, key, dtype, 0, found[key])

    loads(data, allowed=NAMES, where=where, persistent_load=count)
    return sum(found.values())


def _find_storage(archive: Archive, extents: dict[str, tuple[int, int]], pid: object) -> _Storage:
    match pid:
        case ("storage", Ref(_, kind), str(key), _, int(numel)):
            pass
        case _:
            raise FormatError(
                "pickle refers to something that is not a storage",
                [("file", archive.where), ("found", repr(pid)[:200])],
            )
    dtype = BY_STORAGE.get(kind)
    if key not in extents:
        extents[key] = archive.extent(f"data/{key}")
    offset, available = extents[key]
    nbytes = numel * (dtype.itemsize if dtype else 1)
    if not 0 <= nbytes <= available:
        raise FormatError(
            "storage does not fit its record",
            [
                ("file", archive.where),
                ("record", f"data/{key}"),
                ("expected", f"{nbytes} bytes"),
                ("found", f"{available} bytes"),
            ],
            hint="the file was cut short or altered; fetch or save it again",
        )
    return _Storage(archive.where, key, dtype, offset, nbytes)


def _rebuild(
    storage: object,
    dtype: DType | None,
    offset: object,
    shape: object,
    strides: object,
    requires_grad: object = False,  # noqa: FBT002 (torch's recipes pass it by position)
    metadata: object = None,
) -> StoredTensor | UnreadableTensor:
    if not isinstance(storage, _Storage) or dtype is None:
        raise FormatError("tensor has no storage of a known element type")
    facts = [
        ("file", storage.where),
        ("record", f"data/{storage.key}"),
        ("tensor", f"{dtype} {shape} at element {offset}, strides {strides}"),
    ]
    shape, strides = whole_numbers(shape), whole_numbers(strides)
    if shape is None or strides is None or len(shape) != len(strides):
        raise FormatError("tensor has no sensible shape", facts)
    if type(offset) is not int or offset < 0 or math.prod(shape) * dtype.itemsize >= 1 << 63:
        raise FormatError("tensor has no sensible size", facts)
    if metadata:  # conjugate or negative bit: the bytes are not the values
        return UnreadableTensor(f"lazily negated or conjugated ({metadata})")
    nbytes = 0
    if math.prod(shape):
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        nbytes = (last + 1) * dtype.itemsize
    if offset * dtype.itemsize + nbytes > storage.nbytes:
        needed = offset * dtype.itemsize + nbytes
        facts += [("expected", f"at least {needed} bytes"), ("found", f"{storage.nbytes} bytes")]
        raise FormatError("tensor reaches beyond its storage", facts)
    return StoredTensor(
        storage_key=storage.key,
        dtype=dtype,
        offset_elements=offset,
        shape=shape,
        strides=strides,
        offset=storage.offset + offset * dtype.itemsize,
        nbytes=nbytes,
        requires_grad=bool(requires_grad),
    )


def _rebuild_v2(storage: object, *args: object) -> StoredTensor | UnreadableTensor:
    offset, shape, strides, requires_grad, _hooks, *metadata = args
    dtype = storage.dtype if isinstance(storage, _Storage) else None
    return _rebuild(storage, dtype, offset, shape, strides, requires_grad, *metadata)


def _rebuild_v1(storage: object, *args: object) -> StoredTensor | UnreadableTensor:
    return _rebuild_v2(storage, *args, False, None)


def _rebuild_v3(storage: object, *args: object) -> StoredTensor | UnreadableTensor:
    offset, shape, strides, requires_grad, _hooks, ref, *metadata = args
    dtype = BY_NAME.get(ref.name) if isinstance(ref, Ref) else None
    return _rebuild(storage, dtype, offset, shape, strides, requires_grad, *metadata)


def _rebuild_parameter(data: object, requires_grad: object, *_hooks_and_state: object) -> object:
    if not isinstance(data, StoredTensor):
        return data
    return replace(data, requires_grad=bool(requires_grad), is_parameter=True)


def _rebuild_from_type(func: object, kind: object, args: object, state: object) -> object:
    """A plain tensor or parameter with Python attributes (a buffer has some), which are dropped;
    or one rank's part of a distributed tensor, whose attributes are all there is to it."""
    if func == distributed.WRAPPER:
        return distributed.rebuild(kind, args, state)
    if not (isinstance(kind, Ref) and callable(func) and isinstance(args, tuple)):
        raise FormatError("tensor has no recipe")
    return func(*args)


def _unreadable(kind: str) -> Callable[..., UnreadableTensor]:
    return lambda *_args: UnreadableTensor(kind)


NAMES: Final[Allowed] = {
    **HARMLESS,
    **distributed.NAMES,
    **{
        (module, name): Ref
        for module in ("torch", "torch.cuda")
        for name in (*BY_STORAGE, "QInt8Storage", "QUInt8Storage", "QInt32Storage")
    },
    ("torch.storage", "UntypedStorage"): Ref,
    ("torch.storage", "_UntypedStorage"): Ref,
    ("torch", "UntypedStorage"): Ref,
    ("torch", "Tensor"): Ref,
    ("torch._tensor", "Tensor"): Ref,
    ("torch.nn.parameter", "Parameter"): Ref,
    ("torch.nn.parameter", "Buffer"): Ref,
    ("torch._utils", "_rebuild_tensor"): _rebuild_v1,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch._utils", "_rebuild_sparse_tensor"): _unreadable("sparse"),
    ("torch.serialization", "_get_layout"): calls("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_qtensor"): _unreadable("quantized"),
    **{
        ("torch", f"per_{scheme}"): Ref
        for scheme in (
            "tensor_affine",
            "tensor_symmetric",
            "channel_affine",
            "channel_symmetric",
            "channel_affine_float_qparams",
        )
    },
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unreadable("meta, without data"),
    ("torch._utils", "_rebuild_nested_tensor"): _unreadable("nested"),
}
"""Globals that a ``torch.save`` file of weights may name, and what each stands for."""

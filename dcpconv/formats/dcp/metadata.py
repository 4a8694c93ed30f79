"""What a DCP directory's ``.metadata`` says, read without trust and without torch.

The file is one pickle of ``torch.distributed.checkpoint.metadata.Metadata``.  Each of its classes
is read as an inert record whose state is checked field by field before anything relies on it.

Source: torch 2.13 ``distributed/checkpoint/{metadata,filesystem}.py``; older writers lack
``planner_data``, ``storage_meta`` or ``version`` and took ``TensorProperties`` from
``torch/distributed/_shard/sharded_tensor/metadata.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

from dcpconv.core.catalog import Extent, KeyPath
from dcpconv.core.dtypes import BY_NAME, DType
from dcpconv.core.errors import FormatError
from dcpconv.formats.dcp.transforms import require_unpackable
from dcpconv.formats.torchfile.stand_ins import HARMLESS, Ref
from dcpconv.formats.torchfile.unpickling import loads

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A box of a tensor and the file item that holds it: a whole ``torch.save`` archive."""

    offsets: Sizes
    sizes: Sizes
    item: Extent


@dataclass(frozen=True, slots=True)
class ListedTensor:
    """A tensor as ``.metadata`` describes it; empty chunks and replicas are left out."""

    dtype: DType
    shape: Sizes
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True, slots=True)
class MetadataContents:
    """What ``.metadata`` lists.

    Attributes:
        tensors: By key, in the order of the file.
        objects: The item of every value that is not a tensor, by key.
        paths: How a key is nested, where that is more than ``(key,)``.
        is_nesting_known: Whether ``paths`` can be relied on; else every key looks flat.
        problems: What is wrong with single keys, one line each; those keys are left out.
        save_id: What the writer called the save: a string, or not to be relied on.
        packed: Items that are compressed.
    """

    tensors: Mapping[str, ListedTensor]
    objects: Mapping[str, Extent]
    paths: Mapping[str, KeyPath]
    is_nesting_known: bool
    problems: tuple[str, ...]
    save_id: object = field(default=None, compare=False)
    packed: frozenset[Extent] = frozenset()


def read_metadata(data: bytes, *, where: str) -> MetadataContents:
    """Check and simplify the bytes of a ``.metadata`` file.

    Args:
        data: The whole file.
        where: Its path, for error messages.

    Raises:
        FormatError: It is not the pickle of a ``Metadata``, it names code, or its items went
            through a stream transform (compression, encryption) that cannot be undone here.
    """
    root = loads(data, allowed=_ALLOWED, where=where)
    if not isinstance(root, _Metadata):
        raise FormatError(
            "not the metadata of a distributed checkpoint",
            [("file", where), ("found", type(root).__name__)],
        )
    try:
        fields = _fields(root, _Metadata)
        listed = _mapping(fields.get("state_dict_metadata"), "state_dict_metadata")
        stored = _mapping(fields.get("storage_data"), "storage_data")
        nesting = _mapping(fields.get("planner_data") or {}, "planner_data")
    except _MalformedError as error:
        raise FormatError(
            "metadata of a distributed checkpoint is malformed",
            [("file", where), ("reason", error)],
        ) from None

    problems: list[str] = []
    items: _Items = {}
    packed: set[Extent] = set()
    for index, info in stored.items():
        problem = _read_item(index, info, items, packed, where)
        if problem:
            problems.append(problem)

    tensors: dict[str, ListedTensor] = {}
    objects: dict[str, Extent] = {}
    budget = _Budget(len(data), where)
    for key, record in listed.items():
        match _read_value(key, record, items, budget):
            case ListedTensor() as tensor:
                tensors[str(key)] = tensor
            case Extent() as item:
                objects[str(key)] = item
            case str(problem):
                problems.append(f"{_show(key)}: {problem}")
    paths = _read_paths(nesting, listed, problems)
    about = getattr(fields.get("storage_meta"), "state", None)
    save_id = about.get("save_id") if isinstance(about, dict) else None
    return MetadataContents(
        tensors, objects, paths, bool(nesting), tuple(problems), save_id, frozenset(packed)
    )


# ------------------------------------------------------------------------- stand-ins for classes


class _Record:
    """An object of a class that is only named; ``state`` stays unset where it has no attributes."""

    __slots__ = ("state",)
    state: object

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Metadata(_Record):
    __slots__ = ()


class _Tensor(_Record):
    __slots__ = ()


class _Bytes(_Record):
    __slots__ = ()


class _Chunk(_Record):
    __slots__ = ()


class _Properties(_Record):
    __slots__ = ()


class _Index(_Record):
    # Hashed by identity: while the pickle is read its fields may not be there yet.
    __slots__ = ()


class _Info(_Record):
    __slots__ = ()


class _Ignored(_Record):
    __slots__ = ()


def _ignored(*_args: object) -> None:
    """Stand for a call whose result is not looked at."""


_OTHER_DTYPES = (
    *("complex32", "qint8", "quint8", "qint32", "quint4x2", "quint2x4", "float4_e2m1fn_x2"),
    *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in range(1, 8)),
)
"""Element types that torch has and we have not: known by name, so that the key can be blamed."""

_CHECKPOINT: Final = "torch.distributed.checkpoint.metadata"
_SHARDED: Final = "torch.distributed._shard.sharded_tensor.metadata"
_ALLOWED: Final[dict[tuple[str, str], Callable[..., object]]] = {
    **HARMLESS,
    **{("torch", name): Ref for name in _OTHER_DTYPES},
    (_CHECKPOINT, "Metadata"): _Metadata,
    (_CHECKPOINT, "TensorStorageMetadata"): _Tensor,
    (_CHECKPOINT, "BytesStorageMetadata"): _Bytes,
    (_CHECKPOINT, "ChunkStorageMetadata"): _Chunk,
    (_CHECKPOINT, "TensorProperties"): _Properties,
    (_SHARDED, "TensorProperties"): _Properties,
    (_CHECKPOINT, "_MEM_FORMAT_ENCODING"): _ignored,
    (_SHARDED, "MEM_FORMAT_ENCODING"): _ignored,
    # Python 3.11.0 to 3.11.4 pickle an enum's member as an attribute of its class.
    # Source: CPython pull request 105519, which went back to the value.
    ("builtins", "getattr"): _ignored,
    (_CHECKPOINT, "MetadataIndex"): _Index,
    (_CHECKPOINT, "StorageMeta"): _Ignored,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Info,
    ("torch.serialization", "_get_layout"): _ignored,
    ("torch", "Size"): tuple,
}


# ------------------------------------------------------------------------------- checking fields


class _MalformedError(Exception):
    """One key, or the whole file, is not as torch writes it."""


class _Budget:
    """Bounds the chunks looked at: shared lists let a short pickle describe very many.

    A chunk takes more than one byte of an honest file.
    """

    def __init__(self, chunks: int, where: str) -> None:
        self._left = chunks
        self._where = where

    def spend(self, chunks: int) -> None:
        self._left -= chunks
        if self._left < 0:
            raise FormatError("metadata expands to far more than its size", [("file", self._where)])


def _fields(record: object, kind: type[_Record]) -> Mapping[object, object]:
    state = getattr(record, "state", None)
    if type(record) is not kind or not isinstance(state, dict):
        raise _MalformedError(f"expected {kind.__name__[1:]}, found {type(record).__name__}")
    return state


def _mapping(value: object, name: str) -> Mapping[object, object]:
    if not isinstance(value, dict):
        raise _MalformedError(f"{name} is {type(value).__name__}, not a dict")
    return value


def _show(value: object) -> str:
    """A value in a message; a hostile one may have a ``repr`` without end."""
    if isinstance(value, str):
        return value if len(value) <= 200 else f"{value[:200]}..."
    if isinstance(value, int) and abs(value) < 1 << 128:
        return str(value)
    return type(value).__name__


def _sizes(value: object, name: str) -> Sizes:
    if not isinstance(value, tuple) or len(value) > 64:  # torch tensors have at most 64 dims
        raise _MalformedError(f"{name} is not a torch.Size")
    if odd := [n for n in value if type(n) is not int or not 0 <= n < 1 << 62]:
        raise _MalformedError(f"{name} holds {_show(odd[0])}")
    return value


_Items = dict[tuple[str, Sizes | None], Extent]
"""By key and offsets of the chunk; an object has no offsets."""


def _read_item(
    index: object, info: object, items: _Items, packed: set[Extent], where: str
) -> str | None:
    """Add one entry of ``storage_data`` to ``items``, or say why not."""
    key = "storage_data"
    try:
        key, offsets = _read_index(index)
        fields = _fields(info, _Info)
        extent = Extent(
            _file(fields.get("relative_path")),
            _number(fields.get("offset"), "an item's offset", least=0),
            _number(fields.get("length"), "an item's length", least=1),
        )
        if transform := fields.get("transform_descriptors"):
            require_unpackable(transform, [("file", where), ("key", key)])
            packed.add(extent)
        items[key, offsets] = extent
    except _MalformedError as error:
        return f"{_show(key)}: {error}"
    return None


def _read_index(index: object) -> tuple[str, Sizes | None]:
    fields = _fields(index, _Index)
    key, offsets = fields.get("fqn"), fields.get("offset")
    if not isinstance(key, str):
        raise _MalformedError("an item's key is not a string")
    return key, None if offsets is None else _sizes(offsets, f"{_show(key)}: an item's offsets")


def _number(value: object, name: str, *, least: int) -> int:
    if type(value) is not int or not least <= value < 1 << 62:
        raise _MalformedError(f"{name} is {_show(value)}")
    return value


def _file(value: object) -> str:
    if not isinstance(value, str) or not _stays_inside(value):
        raise _MalformedError(f"file {_show(value)} is not inside the checkpoint")
    return value


@functools.lru_cache(maxsize=1024)
def _stays_inside(file: str) -> bool:
    parts = PurePosixPath(file).parts
    return (
        bool(parts)
        and "/".join(parts) == file
        and ".." not in parts
        and not file.startswith("/")
        and not set(file) & set("\0\\:")
    )


def _read_value(
    key: object, record: object, items: _Items, budget: _Budget
) -> ListedTensor | Extent | str:
    """One entry of ``state_dict_metadata``, or what is wrong with it."""
    if not isinstance(key, str):
        return "key is not a string"
    if isinstance(record, _Bytes):
        return items.get((key, None), "no item is recorded for this object")
    if not isinstance(record, _Tensor):
        return f"is neither a tensor nor an object, but {type(record).__name__}"
    try:
        return _read_tensor(key, record, items, budget)
    except _MalformedError as error:
        return str(error)


def _read_tensor(key: str, record: _Tensor, items: _Items, budget: _Budget) -> ListedTensor:
    fields = _fields(record, _Tensor)
    dtype = _read_dtype(fields.get("properties"))
    shape = _sizes(fields.get("size"), "size")
    if math.prod(shape) * dtype.itemsize >= 1 << 62:
        raise _MalformedError(f"shape {list(shape)} is absurd")
    listed = fields.get("chunks")
    if not isinstance(listed, list):
        raise _MalformedError("chunks are not a list")
    budget.spend(len(listed))

    is_empty = 0 in shape
    lost: list[Sizes] = []
    chunks: dict[tuple[Sizes, Sizes], StoredChunk] = {}
    for chunk in listed:
        chunk_fields = _fields(chunk, _Chunk)
        offsets = _sizes(chunk_fields.get("offsets"), "a chunk's offsets")
        sizes = _sizes(chunk_fields.get("sizes"), "a chunk's sizes")
        if not len(offsets) == len(sizes) == len(shape):
            raise _MalformedError(
                f"a chunk has {len(sizes)} sizes and {len(offsets)} offsets,"
                f" the tensor {len(shape)} dims"
            )
        if (0 in sizes and not is_empty) or (offsets, sizes) in chunks:
            continue
        item = items.get((key, offsets))
        if item is None:
            lost.append(offsets)
        else:
            chunks[offsets, sizes] = StoredChunk(offsets, sizes, item)
    if lost:
        places = ", ".join(str(list(offsets)) for offsets in lost)
        raise _MalformedError(f"no item is recorded for the chunk at {places}")
    return ListedTensor(dtype, shape, tuple(chunks.values()))


def _read_dtype(properties: object) -> DType:
    state = getattr(properties, "state", None)
    if type(properties) is not _Properties or not isinstance(state, tuple) or not state:
        raise _MalformedError("properties are malformed")
    ref = state[0]
    if not isinstance(ref, Ref):
        raise _MalformedError("dtype is malformed")
    dtype = BY_NAME.get(ref.name)
    if dtype is None:
        raise _MalformedError(f"element type {ref} is not supported")
    return dtype


def _read_paths(
    nesting: Mapping[object, object], listed: Mapping[object, object], problems: list[str]
) -> dict[str, KeyPath]:
    paths: dict[str, KeyPath] = {}
    for key, path in nesting.items():
        if not isinstance(key, str) or key not in listed:
            continue
        if (
            not isinstance(path, tuple)
            or not 0 < len(path) <= 100
            or not all(type(part) in {str, int} for part in path)
        ):
            problems.append(f"{_show(key)}: planner_data is not a path of strings and integers")
        elif path != (key,):
            paths[key] = path
    return paths

"""A ``Source`` or ``Adapter`` as few bytes, for the other processes of a job: they open no file.

Tensors are most of it.  Those that lie in their files without changes on the way travel as columns
of numbers; a table of keys that comes with the package travels as its name, because which table a
source has is told by identity.
"""

from __future__ import annotations

import io
import os
import pickle
import zlib
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dcpconv.core.catalog import Chunk, Extent, Identity, TensorEntry
from dcpconv.core.dtypes import BY_NAME, FP4, DType
from dcpconv.families.keymaps import Keymap, keymaps
from dcpconv.sources.adapters.record import Adapter
from dcpconv.sources.understanding import Source
from dcpconv.stores.remote import Origin, RemotePath

Packed = TypeVar("Packed", Source, Adapter)


def pack(
    source: Source | Adapter, beside: object = None, entries: Iterable[TensorEntry] = ()
) -> bytes:
    """The source, about 20 bytes per tensor where keys repeat as those of layers do.

    Args:
        source: What was opened.
        beside: What else is known of it, which may refer to the source or to parts of it.
        entries: Tensors in there that are not the source's own.
    """
    every = {id(entry): entry for entry in (*source.catalog.tensors.values(), *entries)}
    plain = [entry for entry in every.values() if _is_plain(entry)]
    stream = io.BytesIO()
    packing = _Packing(stream, {id(entry): n for n, entry in enumerate(plain)})
    packing.dump(_columns(plain))
    packing.dump((source, beside))  # by the same pickler: it refers to keys in the columns
    return zlib.compress(stream.getbuffer(), 1)


def unpack(data: bytes) -> tuple[Any, Any]:
    """What was packed, and what beside it, by a process of the same job: it is unpickled."""
    unpacking = _Unpacking(io.BytesIO(zlib.decompress(data)))
    unpacking.plain = _entries(*unpacking.load())
    source, beside = unpacking.load()
    return source, beside


def rebased(source: Packed, old: Path, new: Path, identities: Mapping[str, Identity]) -> Packed:
    """The same checkpoint under another path.

    Args:
        source: As it was understood.
        old: What it was opened as.
        new: Where the same files are.
        identities: What those files are.
    """

    def moved(path: Path) -> Path:
        if isinstance(new, RemotePath):
            return path  # it means the same in every process
        return Path(os.path.normpath(new / os.path.relpath(path, old)))

    catalog = source.catalog
    catalog = replace(
        catalog, path=moved(catalog.path), source=moved(catalog.source), identities=identities
    )
    if isinstance(source, Adapter):
        return replace(source, path=moved(source.path), catalog=catalog)
    return replace(source, catalog=catalog, weights=replace(source.weights, catalog=catalog))


def _is_plain(entry: TensorEntry) -> bool:
    return (
        not entry.updates
        and entry.factors is None
        and all(chunk.strides is None for chunk in entry.chunks)
    )


def _columns(entries: list[TensorEntry]) -> tuple[Any, ...]:
    """Keys, dtypes, counts of dims, of chunks, and all numbers in a row."""
    files: dict[str, int] = {}
    numbers = array("q")
    for entry in entries:
        numbers.extend(entry.shape)
        for chunk in entry.chunks:
            numbers.extend(chunk.offsets)
            numbers.extend(chunk.sizes)
            extent = chunk.extent
            file = files.setdefault(extent.file, len(files))
            numbers.extend((file, extent.offset, extent.nbytes))
    names = sorted({entry.dtype.name for entry in entries})
    dtypes = {name: n for n, name in enumerate(names)}
    return (
        [entry.key for entry in entries],
        names,
        array("H", [dtypes[entry.dtype.name] for entry in entries]),
        array("H", [len(entry.shape) for entry in entries]),
        array("L", [len(entry.chunks) for entry in entries]),
        list(files),
        numbers,
    )


def _entries(
    keys: list[str],
    names: list[str],
    dtypes: array[int],
    dims: array[int],
    chunks: array[int],
    files: list[str],
    numbers: array[int],
) -> list[TensorEntry]:
    made: list[TensorEntry] = []
    types = [BY_NAME[name] for name in names]
    known: dict[tuple[int, ...], tuple[int, ...]] = {}  # layers have the same shapes
    at = 0

    def take(count: int) -> tuple[int, ...]:
        nonlocal at
        found = tuple(numbers[at : at + count])
        at += count
        return known.setdefault(found, found)

    for key, dtype, ndim, count in zip(keys, dtypes, dims, chunks, strict=True):
        shape = take(ndim)
        boxes = []
        for _ in range(count):
            offsets, sizes = take(ndim), take(ndim)
            file, offset, nbytes = numbers[at : at + 3]
            at += 3
            boxes.append(Chunk(offsets, sizes, Extent(files[file], offset, nbytes)))
        made.append(TensorEntry(key, types[dtype], shape, tuple(boxes)))
    return made


class _Packing(pickle.Pickler):
    """Numbers in place of plain entries, names in place of what is told by identity."""

    def __init__(self, stream: io.BytesIO, numbers: Mapping[int, int]) -> None:
        super().__init__(stream, protocol=5)
        self._numbers = numbers

    def reducer_override(self, obj: object) -> Any:
        """A store goes along with what is known of its objects: nobody asks for that again."""
        if isinstance(obj, RemotePath):
            return RemotePath, (obj.origin, obj.key)
        return obj.told() if isinstance(obj, Origin) else NotImplemented

    def persistent_id(self, obj: object) -> int | tuple[str, str] | None:
        """What stands for an object that the other side has, or makes of the columns."""
        if isinstance(obj, TensorEntry):
            return self._numbers.get(id(obj))
        if isinstance(obj, DType) and _KNOWN.get(obj.name) is obj:
            return "dtype", obj.name
        if isinstance(obj, Keymap) and keymaps().get(obj.name) is obj:
            return "table", obj.name
        return None


class _Unpacking(pickle.Unpickler):
    """The way back."""

    plain: list[TensorEntry]

    def persistent_load(self, pid: int | tuple[str, str]) -> object:
        """The object that something stands for."""
        if isinstance(pid, int):
            return self.plain[pid]
        kind, name = pid
        return _KNOWN[name] if kind == "dtype" else keymaps()[name]


_KNOWN = {**BY_NAME, FP4.name: FP4}

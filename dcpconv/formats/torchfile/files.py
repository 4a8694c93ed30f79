"""The ``torch`` form: one ``torch.save`` file, or the shard files of an old Hugging Face model.

Memory: the pickle and its keys, never a payload.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from dcpconv.core.catalog import Catalog, Chunk, Extent, KeyPath, TensorEntry
from dcpconv.core.errors import DcpconvError, FormatError, NotACheckpointError
from dcpconv.formats.torchfile.archive import (
    Archive,
    Read,
    StoredTensor,
    UnreadableTensor,
    least_nbytes,
    read_archive,
    read_tensors,
)
from dcpconv.formats.torchfile.nesting import flatten, key_of
from dcpconv.formats.torchfile.outline import outline
from dcpconv.formats.torchfile.pieces import MeshTensor, ShardedParts

__all__ = ["INDEX_FILE", "SINGLE_FILE", "is_torch_file", "outline", "read_catalog"]

INDEX_FILE: Final = "pytorch_model.bin.index.json"
SINGLE_FILE: Final = "pytorch_model.bin"

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""``torch/serialization.py`` ``MAGIC_NUMBER``, pickled: the form before zip archives."""

_TENSORS: Final = (StoredTensor, UnreadableTensor, MeshTensor, ShardedParts)

_LARGEST_PICKLE: Final = 1 << 28
"""Bytes to look through for the pickle of a file whose directory is gone; 16x a 671B model's."""


def is_torch_file(path: Path) -> bool:
    """Whether ``torch.save`` wrote the file, told by its first bytes; cut short or not."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
            if start.startswith(_LEGACY_MAGIC):
                return True
            if not start.startswith(_ZIP_MAGIC):
                return False
            name = start[30 : 30 + int.from_bytes(start[26:28], "little")]
            if name.endswith(b"/data.pkl"):
                return True
            size = os.fstat(file.fileno()).st_size
            return "data.pkl" in read_archive(_reader(file.fileno()), size, str(path))
    except (OSError, FormatError):
        return False


def is_one_in_a_directory(path: Path) -> bool:
    """Whether a directory holds one checkpoint of this form, by its usual name or as one file."""
    return path.is_dir() and (
        any((path / name).is_file() for name in (INDEX_FILE, SINGLE_FILE))
        or len([*path.glob("*.pth")]) == 1
    )


def read_catalog(path: Path) -> Catalog:
    """Everything in a ``torch.save`` file, or in a directory that holds such files.

    A directory is read through its ``pytorch_model.bin.index.json``, else as its
    ``pytorch_model.bin``, else as its only ``*.pth`` file.

    Raises:
        NotACheckpointError: There is no such file.
        FormatError: A file is damaged, unsafe, in the form before zip archives, or holds something
            else than a mapping of names to tensors.
    """
    if not path.is_dir():
        return _catalog(path.parent, path, {path.name: _read_file(path)})
    if (path / INDEX_FILE).is_file():
        return _read_shard_files(path)
    candidates = [path / SINGLE_FILE] if (path / SINGLE_FILE).is_file() else [*path.glob("*.pth")]
    if len(candidates) != 1:
        raise NotACheckpointError(
            "directory does not hold one torch.save checkpoint",
            [
                ("directory", path),
                ("expected", f"{INDEX_FILE}, {SINGLE_FILE} or one *.pth file"),
                *(("found", candidate.name) for candidate in sorted(candidates)),
            ],
            hint="name the file itself",
        )
    return _catalog(path, path, {candidates[0].name: _read_file(candidates[0])})


@dataclass(frozen=True, slots=True)
class Contents:
    """One file, flattened.

    Attributes:
        nbytes: Length of the file.
        leaves: Path and value by flat key; a ``StoredTensor`` or ``Piece`` where it was a tensor.
        notes: What a user should know.
    """

    nbytes: int
    leaves: Mapping[str, tuple[KeyPath, object]]
    notes: tuple[str, ...]


def require_whole(path: Path) -> None:
    """Refuses one rank's share of something larger; any other file may pass, damaged or not.

    Raises:
        FormatError: The file holds pieces of distributed tensors.
    """
    try:
        contents = read_leaves(path)
    except DcpconvError:
        return
    _refuse_shares(path, contents)


def _read_file(path: Path) -> Contents:
    contents = read_leaves(path)
    _refuse_shares(path, contents)
    return contents


def _refuse_shares(path: Path, contents: Contents) -> None:
    pieces = {
        key: leaf
        for key, (_, leaf) in contents.leaves.items()
        if isinstance(leaf, (MeshTensor, ShardedParts))
    }
    if not pieces:
        return
    world = max(piece.world for piece in pieces.values())
    is_numbered = re.search(r"rank_?\d+\.", path.name) is not None
    shown = [("key", f"{key} of shape {list(piece.shape)}") for key, piece in pieces.items()][:3]
    raise FormatError(
        "file is one rank's share of a checkpoint, not the whole",
        [("file", path), ("ranks", world), ("in pieces", len(pieces)), *shown],
        hint=f"give the directory: {path.resolve().parent}"
        if is_numbered
        else f"give the directory with the files of all {world} ranks, under the names they had",
    )


def read_leaves(path: Path) -> Contents:
    """One file, flattened; pieces of distributed tensors are as they are.

    Raises:
        NotACheckpointError: There is no such file.
        FormatError: The file is damaged, unsafe, or holds no mapping.
    """
    value, nbytes = read_value(path)
    if not isinstance(value, dict):
        what = "one tensor" if isinstance(value, StoredTensor) else f"a {type(value).__name__}"
        raise FormatError(
            "file holds no mapping of names to tensors",
            [("file", path), ("expected", "a dict, such as model.state_dict()"), ("found", what)],
            hint="save a state_dict instead",
        )
    return flattened(value, nbytes, str(path))


def read_value(path: Path) -> tuple[object, int]:
    """What a file holds, with a ``StoredTensor`` or ``Piece`` for every tensor, and its length.

    Raises:
        NotACheckpointError: There is no such file.
        FormatError: The file is damaged or unsafe.
    """
    where = str(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise NotACheckpointError(
            "file cannot be read", [("file", path), ("reason", error.strerror)]
        ) from error
    with file:
        nbytes = os.fstat(file.fileno()).st_size
        read = _reader(file.fileno())
        if read(0, len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
            raise FormatError(
                "file is in the form torch.save wrote before version 1.6",
                [("file", path)],
                hint="convert it with --engine torch, or load and save it again with torch",
            )
        if nbytes == 0 or read(0, len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            raise FormatError(
                "file was not written by torch.save",
                [("file", path), ("expected", repr(_ZIP_MAGIC)), ("found", repr(read(0, 16)))],
            )
        return _read_value(_open_archive(read, nbytes, where)), nbytes


def _reader(descriptor: int) -> Read:
    return lambda offset, nbytes: os.pread(descriptor, nbytes, offset)


def _open_archive(read: Read, nbytes: int, where: str) -> Archive:
    try:
        archive = read_archive(read, nbytes, where)
    except FormatError as error:
        needed = _bytes_needed(read, nbytes, where)
        if needed <= nbytes:
            raise
        raise FormatError(
            "file is shorter than its tensors",
            [
                ("file", where),
                ("expected", f"more than {needed} bytes"),
                ("found", f"{nbytes} bytes"),
            ],
            hint="the download or save was interrupted; fetch this file again",
        ) from error
    if "constants.pkl" in archive:
        raise FormatError(
            "file is a TorchScript program, not a checkpoint",
            [("file", where)],
            hint="load it with torch.jit.load and save its state_dict()",
        )
    return archive


def _bytes_needed(read: Read, nbytes: int, where: str) -> int:
    """Bytes of all storages, where the pickle at the front is whole; else 0."""
    header = read(0, 30)
    start = 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    try:
        return least_nbytes(read(start, min(nbytes, _LARGEST_PICKLE)), where)
    except FormatError:
        return 0


def _read_value(archive: Archive) -> object:
    try:
        return read_tensors(archive)[0]
    except FormatError as error:
        names = [str(value) for label, value in error.facts if label == "global"]
        if not any(name.startswith("torch.nn.modules.") for name in names):
            raise
        raise FormatError(
            "file holds a whole pickled nn.Module, which needs its code to be read",
            error.facts,
            hint="save model.state_dict() instead",
        ) from error


def flattened(value: dict[object, object], nbytes: int, where: str) -> Contents:
    """The leaves of what ``read_value`` has read.

    Raises:
        FormatError: Tensors are of kinds that cannot be converted, or two have one key.
    """
    leaves: dict[str, tuple[KeyPath, object]] = {}
    refused: list[tuple[str, object]] = []
    hidden: list[str] = []
    for path, leaf in flatten(value, is_tensor=lambda node: isinstance(node, _TENSORS)):
        key = key_of(path)
        if isinstance(leaf, (MeshTensor, ShardedParts)):
            leaf = leaf.whole() or leaf  # noqa: PLW2901 - the same tensor
        if key in leaves:
            refused.append(("key", f"{key} is there twice: {leaves[key][0]} and {path}"))
        if isinstance(leaf, UnreadableTensor):
            refused.append(("key", f"{key} is {leaf.kind}"))
        elif _holds_tensor(leaf):
            hidden.append(key)
        leaves[key] = path, leaf
    if refused:
        raise FormatError("file holds what cannot be converted", [("file", where), *refused])
    notes = [
        f"{key} is a tuple or set that holds tensors: it cannot be written anywhere"
        for key in hidden
    ]
    return Contents(nbytes, leaves, tuple(notes))


def _holds_tensor(leaf: object) -> bool:
    if isinstance(leaf, dict):
        return any(map(_holds_tensor, leaf.values()))
    if isinstance(leaf, (list, tuple, set, frozenset)):
        return any(isinstance(item, _TENSORS) or _holds_tensor(item) for item in leaf)
    return False


def _catalog(directory: Path, source: Path, files: Mapping[str, Contents]) -> Catalog:
    tensors: dict[str, TensorEntry] = {}
    objects: dict[str, object] = {}
    paths: dict[str, KeyPath] = {}
    tied: dict[str, str] = {}
    for name, contents in files.items():
        owners: dict[object, str] = {}
        for key, (path, leaf) in contents.leaves.items():
            if path != (key,):
                paths[key] = path
            if not isinstance(leaf, StoredTensor):
                objects[key] = leaf
                continue
            tensors[key] = _entry(key, name, leaf)
            region = (leaf.storage_key, leaf.offset, leaf.shape, leaf.strides, leaf.dtype)
            owner = owners.setdefault(region, key)
            if owner != key:
                tied[key] = owner
    return Catalog(
        form="torch",
        path=directory,
        source=source,
        files={name: contents.nbytes for name, contents in files.items()},
        tensors=tensors,
        objects=objects,
        paths=paths,
        tied=tied,
        notes=tuple(note for contents in files.values() for note in contents.notes),
    )


def _entry(key: str, file: str, tensor: StoredTensor) -> TensorEntry:
    chunk = Chunk(
        offsets=(0,) * len(tensor.shape),
        sizes=tensor.shape,
        extent=Extent(file, tensor.offset, tensor.nbytes),
        strides=None if tensor.is_contiguous else tensor.strides,
    )
    return TensorEntry(key, tensor.dtype, tensor.shape, (chunk,))


def _read_shard_files(directory: Path) -> Catalog:
    index = directory / INDEX_FILE
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise FormatError(
            "shard files are missing",
            [("index", index), *(("missing", name) for name in absent)],
            hint="fetch the files that are missing",
        )
    read = {name: _read_file(directory / name) for name in names}
    lost = [(key, name) for key, name in weight_map.items() if key not in read[name].leaves]
    if lost:
        raise FormatError(
            "shard files lack keys that the index lists",
            [("index", index), *(("missing", f"{key} in {name}") for key, name in lost)],
            hint="index and shard files are of different downloads; fetch all of them again",
        )
    files = {
        name: Contents(
            contents.nbytes,
            # the index decides where a key is that several files hold
            {
                key: leaf
                for key, leaf in contents.leaves.items()
                if weight_map.get(key, name) == name
            },
            contents.notes,
        )
        for name, contents in read.items()
    }
    return _catalog(directory, directory, files)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            "index cannot be read",
            [("file", index), ("reason", f"{type(error).__name__}: {error}")],
        ) from error
    unsafe = [name for name in names.values() if not _is_local_name(name)]
    if unsafe or not names:
        raise FormatError(
            "index names no files inside its own directory",
            [("file", index), *(("found", repr(name)) for name in unsafe)],
        )
    return names


def _is_local_name(name: object) -> bool:
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""

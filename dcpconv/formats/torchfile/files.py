"""The ``torch`` form: one ``torch.save`` file, or the shard files of an old Hugging Face model.

Memory: the pickle and its keys, never a payload.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from dcpconv.core.catalog import Catalog, Chunk, Extent, Identity, KeyPath, TensorEntry
from dcpconv.core.errors import DcpconvError, FormatError, NotACheckpointError
from dcpconv.formats.torchfile.archive import StoredTensor, read_archive
from dcpconv.formats.torchfile.contents import (
    LEGACY_MAGIC,
    ZIP_MAGIC,
    Contents,
    read_leaves,
)
from dcpconv.formats.torchfile.pieces import MeshTensor, ShardedParts
from dcpconv.formats.torchfile.roles import is_beside_a_model
from dcpconv.formats.torchfile.writing import outline
from dcpconv.stores.local import OpenFile, identity_of, read_regular

__all__ = ["INDEX_FILE", "SINGLE_FILE", "is_torch_file", "outline", "read_catalog"]

INDEX_FILE: Final = "pytorch_model.bin.index.json"
SINGLE_FILE: Final = "pytorch_model.bin"


_LARGEST_INDEX: Final = 1 << 28
"""Bytes; the index of a 671B model takes 9 MB."""


def is_torch_file(path: Path) -> bool:
    """Whether ``torch.save`` wrote the file, told by its first bytes; cut short or not."""
    try:
        with OpenFile(path) as file:
            start = file.read(0, 4096)
            if start.startswith(LEGACY_MAGIC):
                return True
            if not start.startswith(ZIP_MAGIC):
                return False
            name = start[30 : 30 + int.from_bytes(start[26:28], "little")]
            if name.endswith(b"/data.pkl"):
                return True
            return "data.pkl" in read_archive(file.read, file.nbytes, str(path))
    except (OSError, FormatError):
        return False


def is_one_in_a_directory(path: Path) -> bool:
    """Whether a directory holds one checkpoint of this form, by its usual name or as one file."""
    return path.is_dir() and (
        any((path / name).is_file() for name in (INDEX_FILE, SINGLE_FILE)) or len(_alone(path)) == 1
    )


def _alone(directory: Path) -> list[Path]:
    """Files of the usual ending that may be the one checkpoint in a directory."""
    return [file for file in directory.glob("*.pth") if not is_beside_a_model(file)]


def alone_in(directory: Path) -> Path | None:
    """The one file of a directory that holds its checkpoint; ``None`` where shard files do."""
    if (directory / INDEX_FILE).is_file():
        return None
    if (directory / SINGLE_FILE).is_file():
        return directory / SINGLE_FILE
    found = _alone(directory)
    return found[0] if len(found) == 1 else None


def read_catalog(path: Path, *, problems: list[str] | None = None) -> Catalog:
    """Everything in a ``torch.save`` file, or in a directory that holds such files.

    A directory is read through its ``pytorch_model.bin.index.json``, else as its
    ``pytorch_model.bin``, else as its only ``*.pth`` file.

    Args:
        path: The file or directory.
        problems: Collects what is wrong with shard files and their index instead of raising; the
            keys of sound ones are read.

    Raises:
        NotACheckpointError: There is no such file.
        FormatError: A file is damaged, unsafe, in the form before zip archives, or holds something
            else than a mapping of names to tensors.
    """
    if not path.is_dir():
        return _catalog(path.parent, path, {path.name: _read_file(path)})
    if (path / INDEX_FILE).is_file():
        return _read_shard_files(path, problems)
    candidates = [path / SINGLE_FILE] if (path / SINGLE_FILE).is_file() else _alone(path)
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


def _catalog(
    directory: Path,
    source: Path,
    files: Mapping[str, Contents],
    beside: Mapping[str, Identity] | None = None,
) -> Catalog:
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
        identities={name: contents.identity for name, contents in files.items()}
        | dict(beside or {}),
    )


def _entry(key: str, file: str, tensor: StoredTensor) -> TensorEntry:
    chunk = Chunk(
        offsets=(0,) * len(tensor.shape),
        sizes=tensor.shape,
        extent=Extent(file, tensor.offset, tensor.nbytes),
        strides=None if tensor.is_contiguous else tensor.strides,
    )
    return TensorEntry(key, tensor.dtype, tensor.shape, (chunk,))


def _read_shard_files(directory: Path, problems: list[str] | None) -> Catalog:
    index = directory / INDEX_FILE
    beside = {INDEX_FILE: identity_of(index)}
    weight_map = _weight_map(index)
    found: list[str] = []
    read: dict[str, Contents] = {}
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (directory / name).is_file()]
    found += [f"{name} is named by the index but absent" for name in absent]
    for name in names:
        if name in absent:
            continue
        try:
            read[name] = _read_file(directory / name)
        except DcpconvError as error:
            if problems is None and not absent:
                raise
            found.append(error.in_one_line)
    files_of = {key: name for name, contents in read.items() for key in contents.leaves}
    found += [
        f"the index puts {key} into {name}, which does not hold it"
        for key, name in weight_map.items()
        if name in read and key not in read[name].leaves
    ]
    if problems is None and found:
        raise FormatError(
            "the shard files do not hold what they should",
            [("index", index), *(("problem", text) for text in found)],
            hint="fetch the files that are missing"
            if absent
            else "index and shard files are of different downloads; fetch all of them again",
        )
    if problems is not None:
        problems += found
        problems += [
            f"{name} holds {key}, which the index does not name"
            for key, name in files_of.items()
            if key not in weight_map
        ]
    files = {
        name: Contents(
            contents.identity,
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
    return _catalog(directory, directory, files, beside)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(read_regular(index, most=_LARGEST_INDEX))["weight_map"]
        names = dict(weight_map.items())
    except FormatError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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

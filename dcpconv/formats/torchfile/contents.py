"""What one torch.save file holds: its value, and its leaves by flat key."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dcpconv.core.catalog import Identity, KeyPath
from dcpconv.core.errors import FormatError, NotACheckpointError
from dcpconv.formats.torchfile.archive import (
    Archive,
    ReadAt,
    StoredTensor,
    UnreadableTensor,
    least_nbytes,
    read_archive,
    read_tensors,
)
from dcpconv.formats.torchfile.nesting import flatten, key_of
from dcpconv.formats.torchfile.pieces import MeshTensor, ShardedParts
from dcpconv.stores.local import OpenFile

if TYPE_CHECKING:
    from dcpconv.stores.ranged import Heading

ZIP_MAGIC = b"PK\x03\x04"


LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""``torch/serialization.py`` ``MAGIC_NUMBER``, pickled: the form before zip archives."""


_TENSORS: Final = (StoredTensor, UnreadableTensor, MeshTensor, ShardedParts)


_LARGEST_PICKLE: Final = 1 << 28
"""Bytes to look through for the pickle of a file whose directory is gone; 16x a 671B model's."""


@dataclass(frozen=True, slots=True)
class Contents:
    """One file, flattened.

    Attributes:
        nbytes: Length of the file.
        leaves: Path and value by flat key; a ``StoredTensor`` or ``Piece`` where it was a tensor.
        notes: What a user should know.
    """

    identity: Identity
    leaves: Mapping[str, tuple[KeyPath, object]]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return self.identity[2]


def read_leaves(path: Path) -> Contents:
    """One file, flattened; pieces of distributed tensors are as they are.

    Raises:
        NotACheckpointError: There is no such file.
        FormatError: The file is damaged, unsafe, or holds no mapping.
    """
    with opened(path) as (archive, identity):
        return leaves_in(archive, identity)


def leaves_in(archive: Archive, identity: Identity) -> Contents:
    """What ``read_leaves`` reads, of an archive that is open.

    Raises:
        FormatError: The archive is damaged, unsafe, or holds no mapping.
    """
    value, where = _read_value(archive), archive.where
    if not isinstance(value, dict):
        what = "one tensor" if isinstance(value, StoredTensor) else f"a {type(value).__name__}"
        raise FormatError(
            "file holds no mapping of names to tensors",
            [("file", where), ("expected", "a dict, such as model.state_dict()"), ("found", what)],
            hint="save a state_dict instead",
        )
    return flattened(value, identity, where)


def read_value(path: Path) -> tuple[object, Identity]:
    """What a file holds, with a ``StoredTensor`` or ``Piece`` for every tensor, and its identity.

    Raises:
        NotACheckpointError: There is no such file.
        FormatError: The file is damaged or unsafe.
    """
    with opened(path) as (archive, identity):
        return _read_value(archive), identity


@contextmanager
def opened(path: Path) -> Iterator[tuple[Archive, Identity]]:
    """The archive that a file of ``torch.save`` is, and what the file is.

    Raises:
        NotACheckpointError: There is no such file.
        FormatError: The file is damaged, or of another kind.
    """
    where = str(path)
    try:
        file = OpenFile(path)
    except OSError as error:
        raise NotACheckpointError(
            "file cannot be read", [("file", path), ("reason", error.strerror)]
        ) from error
    with file:
        identity, nbytes, read = file.identity, file.nbytes, file.read
        if read(0, len(LEGACY_MAGIC)) == LEGACY_MAGIC:
            raise FormatError(
                "file is in the form torch.save wrote before version 1.6",
                [("file", path)],
                hint=f"torch reads it: dcpconv convert {shlex.quote(where)} DST --engine torch",
            )
        if nbytes == 0 or read(0, len(ZIP_MAGIC)) != ZIP_MAGIC:
            raise FormatError(
                "file was not written by torch.save",
                [("file", path), ("expected", repr(ZIP_MAGIC)), ("found", repr(read(0, 16)))],
            )
        yield _open_archive(read, nbytes, where, file.expect), identity


def _open_archive(
    read: ReadAt, nbytes: int, where: str, expect: Callable[[Heading], None] | None
) -> Archive:
    try:
        archive = read_archive(read, nbytes, where, expect=expect)
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


def _bytes_needed(read: ReadAt, nbytes: int, where: str) -> int:
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


def flattened(value: dict[object, object], identity: Identity, where: str) -> Contents:
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
    return Contents(identity, leaves, tuple(notes))


def _holds_tensor(leaf: object) -> bool:
    if isinstance(leaf, dict):
        return any(map(_holds_tensor, leaf.values()))
    if isinstance(leaf, (list, tuple, set, frozenset)):
        return any(isinstance(item, _TENSORS) or _holds_tensor(item) for item in leaf)
    return False

"""A checkpoint, in any form, is a set of named boxes of raw bytes at known file offsets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dcpconv.core.dtypes import DType

Form = Literal["hf", "torch", "dcp", "ranks"]
"""How bytes are stored; ``ranks``, one file per process of a run, is only read."""

KeyPath = tuple[str | int, ...]
"""Where a value sits in nested containers: ``("model", "norm.weight")``; an int is a list index."""
Identity = tuple[int, int, int, int]
"""Device, inode, bytes and ``mtime_ns`` of a file: any rewrite of it changes one of them."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in a file.

    Attributes:
        file: Path relative to ``Catalog.path``, with ``/`` between its parts.
        offset: First byte, from the start of the file.
        nbytes: Length in bytes.
    """

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stored box of a tensor.

    Attributes:
        offsets: First element of the box in every dim of the tensor.
        sizes: Length of the box in every dim, in elements.
        extent: Its bytes; element ``(0, ..., 0)`` of the box is at ``extent.offset``.
        strides: Elements to skip per dim, or ``None`` for C order without gaps.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    extent: Extent
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor: what it is, and which boxes of it lie where."""

    key: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def numel(self) -> int:
        """Element count; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor, without gaps."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Catalog:
    """Everything a checkpoint holds, without data.

    Attributes:
        form: How the bytes are stored.
        path: The directory that every ``Extent.file`` is relative to.
        source: What the user named: ``path`` itself, or the one file in it.
        files: Size in bytes of every file that an extent may name.
        tensors: By key, in the order the checkpoint lists them.
        objects: Values that are not tensors (``step``, ``param_groups``), by key.
        paths: How a key is nested, where that is more than ``(key,)``.
        tied: Key -> key of another tensor of this catalog that shares its storage.
        notes: What a user should know about how this was read, one sentence each.
        identities: What every file was when its headers were read, by path relative to ``path``;
            files that name others (an index, ``.metadata``) too.  Empty where files are not here.
    """

    form: Form
    path: Path
    source: Path
    files: Mapping[str, int]
    tensors: Mapping[str, TensorEntry]
    objects: Mapping[str, object] = field(default_factory=dict)
    paths: Mapping[str, KeyPath] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    identities: Mapping[str, Identity] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, a tied pair counted once."""
        return sum(entry.nbytes for key, entry in self.tensors.items() if key not in self.tied)

    def path_of(self, key: str) -> KeyPath:
        """How ``key`` is nested in the containers that were saved."""
        return self.paths.get(key, (key,))


def c_strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Element strides of a box stored in C order without gaps.

    >>> c_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides = [1] * len(sizes)
    for dim in range(len(sizes) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * sizes[dim + 1]
    return tuple(strides)

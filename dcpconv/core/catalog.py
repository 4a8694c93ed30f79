"""A checkpoint, in any form, is a set of named boxes of raw bytes at known file offsets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, overload

from dcpconv.core.dtypes import DType

Form = Literal["hf", "torch", "dcp", "ranks"]
"""How bytes are stored; ``ranks``, one file per process of a run, is only read."""

KeyPath = tuple[str | int, ...]
"""Where a value sits in nested containers: ``("model", "norm.weight")``; an int is a list index."""
Shapes = Mapping[str, tuple[int, ...]]
"""Shape of every tensor of a model, by key."""
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


class MadeChunks(Sequence[Chunk]):
    """Chunks that are made whenever they are asked for: a tensor that a thousand ranks share has
    thousands, and a model hundreds of such tensors.

    Args:
        make: Makes all of them, in the same order every time.
    """

    __slots__ = ("_count", "_make")

    def __init__(self, make: Callable[[], Iterator[Chunk]]) -> None:
        self._make = make
        self._count: int | None = None

    def __iter__(self) -> Iterator[Chunk]:
        return self._make()

    def __len__(self) -> int:
        if self._count is None:
            self._count = sum(1 for _ in self)
        return self._count

    @overload
    def __getitem__(self, index: int) -> Chunk: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Chunk, ...]: ...

    def __getitem__(self, index: int | slice) -> Chunk | tuple[Chunk, ...]:
        return tuple(self)[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


@dataclass(frozen=True, slots=True)
class Lane:
    """Where the rows, or columns, of another tensor lie in this one: they share these axes.

    Attributes:
        here: First index in this tensor.
        there: First index in the other one.
        axes: ``(length, step here, step there)`` of every axis, outermost first.
    """

    here: int
    there: int
    axes: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter does to the matrix W of a stored tensor: ``m * (W + scale * left @ right)``.

    A tensor of one dim is a matrix of one row; one of three is a stack of matrices.  Either the
    two factors are there, or ``given``.

    Attributes:
        scale: Factor on the product.
        left: Rows of the product by ranks, or ``None`` for a single 1.
        right: Ranks by columns of the product.
        is_flipped: The factors are stored as ``(right.T, left.T)``: ``left`` as ranks by rows.
        experts: Matrices in the stack; their factors lie side by side, as PEFT keeps them.
        expert: Which expert's factors are meant, where W is of one and the factors are of all.
        matrix: Which matrix of the stack is changed, where W is of all and the factors of one.
        given: Elements to take instead of W's, of the same shape.
        magnitude: DoRA's m of every row: it is divided by the norm of the row of the sum first.
        by_column: The magnitudes are of columns.
        rows: Which rows of the product W has, where not all of them in the same order.
        columns: Likewise.
    """

    scale: float = 1.0
    left: TensorEntry | None = None
    right: TensorEntry | None = None
    is_flipped: bool = False
    experts: int = 1
    expert: int | None = None
    matrix: int | None = None
    given: TensorEntry | None = None
    magnitude: TensorEntry | None = None
    by_column: bool = False
    rows: Lane | None = None
    columns: Lane | None = None


@dataclass(frozen=True, slots=True)
class Factors:
    """What the elements of a tensor are multiplied by when they are read: one number per block.

    Attributes:
        entry: The numbers; of ``uint8`` they are exponents of two, 127 too high.
        matrix: Rows and columns of each matrix that the tensor is stored as a stack of.
        block: Rows and columns of a block; the last ones may be cut short.
        grid: Blocks down and across each matrix.
    """

    entry: TensorEntry
    matrix: tuple[int, int]
    block: tuple[int, int]
    grid: tuple[int, int]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor: what it is, and which boxes of it lie where.

    Attributes:
        key: As the checkpoint lists it.
        dtype: Element type as stored.
        shape: In elements.
        chunks: Boxes that cover it.
        updates: What adapters do to it when it is read, in order.
        factors: What it is multiplied by when it is read, before that.
    """

    key: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: Sequence[Chunk]
    updates: tuple[Update, ...] = ()
    factors: Factors | None = None

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
        metadata: Entries of safetensors' ``__metadata__`` beyond ``format: pt``.
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
    metadata: Mapping[str, str] = field(default_factory=dict)

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

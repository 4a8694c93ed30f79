"""What a result will look like, byte for byte, before any byte moves.

A plan fills target boxes from source bytes (``Part``, ``Fill``); a form's writer places those boxes
into files (``OutTensor`` in, ``Outline`` out).  All of it is data: nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dcpconv.core.catalog import Chunk, KeyPath, TensorEntry
from dcpconv.core.dtypes import BY_NAME, DType

Loop = tuple[int, int, int]
"""``(count, source_step, target_step)``: how often, and how many elements apart on both sides."""


def run_of(loops: Iterable[Loop]) -> int:
    """Elements of a nest that follow each other on both sides.

    >>> run_of(((4, 10, 3), (3, 1, 1)))
    3
    """
    return next((count for count, *steps in loops if steps == [1, 1]), 1)


def starts_of(loops: Iterable[Loop], itemsize: int) -> list[tuple[int, int]]:
    """``(source, target)`` byte offsets of every iteration, first loop outermost.

    >>> starts_of(((2, 10, 3), (2, 1, 6)), 2)
    [(0, 0), (2, 12), (20, 6), (22, 18)]
    """
    starts = [(0, 0)]
    for count, source_step, step in loops:
        a, b = source_step * itemsize, step * itemsize
        starts = [(s + i * a, t + i * b) for s, t in starts for i in range(count)]
    return starts


def longest_gap(loops: Sequence[Loop], itemsize: int) -> int:
    """Bytes at most between two neighbours of a nest in the source.

    >>> longest_gap(((4, 10, 3), (3, 1, 1)), 2)
    14
    """
    longest, reach = 0, itemsize
    for count, step, _ in sorted(loops, key=lambda loop: loop[1]):
        longest = max(longest, step * itemsize - reach)
        reach += (count - 1) * step * itemsize
    return longest


@dataclass(frozen=True, slots=True)
class Part:
    """One source region that becomes one target region by a nest of loops.

    Element ``(i, j, ...)`` of the nest is read at ``offset + itemsize * (i * source_step_0 + ...)``
    of the source file and becomes element ``target + i * target_step_0 + ...`` of the target box.

    Attributes:
        file: Source file, relative to the source catalog's ``path``.
        offset: Byte in that file of the first element.
        target: Index in the target box, counted in C order, of the first element.
        loops: Outermost first, every count at least 2, no two neighbours that could be merged.
            A contiguous copy of n elements is ``((n, 1, 1),)``; one element is ``()``.
        half: Which half of every byte counts, where two elements share one: 1 is the upper.
    """

    file: str
    offset: int
    target: int
    loops: tuple[Loop, ...]
    half: int = 0

    @property
    def numel(self) -> int:
        """Elements it moves."""
        numel = 1
        for count, _, _ in self.loops:
            numel *= count
        return numel

    @property
    def is_contiguous(self) -> bool:
        """Whether it is one run of bytes on both sides."""
        return not self.loops or (len(self.loops) == 1 and self.loops[0][1:] == (1, 1))


@dataclass(frozen=True, slots=True)
class BlockScale:
    """Factors of a stack of matrices whose elements were divided by one number per block.

    Attributes:
        file: Source file of the matrices.
        offset: Byte of their element 0; they lie in C order without gaps.
        numel: Their elements.
        columns: Columns of each.
        block: Rows and columns of a block; the last ones may be cut short.
        factors_file: Source file of the factors, which lie in C order without gaps.
        factors_offset: Byte of the first factor.
        factors_dtype: Their element type; ``uint8`` is an exponent of two, 127 too high.
        factors_shape: Blocks down and across each matrix.
        rows: Rows of each matrix; 0 where there is but one.
        packed: Elements in a byte: 2 for ``FP4``.
    """

    file: str
    offset: int
    numel: int
    columns: int
    block: tuple[int, int]
    factors_file: str
    factors_offset: int
    factors_dtype: DType
    factors_shape: tuple[int, int]
    rows: int = 0
    packed: int = 1

    def holds(self, part: Part, itemsize: int) -> bool:
        """Whether a part reads from the matrices."""
        nbytes = self.numel * itemsize // self.packed
        return self.file == part.file and 0 <= part.offset - self.offset < nbytes

    def element(self, part: Part, itemsize: int) -> int:
        """Index of a part's first element, in C order of the matrices."""
        return (part.offset - self.offset) // itemsize * self.packed + part.half

    def factor(self, row: int, column: int) -> int:
        """Index of an element's factor; ``row`` counts through all matrices."""
        down, across = self.block
        matrix, row = divmod(row, self.rows) if self.rows else (0, row)
        blocks_down, blocks_across = self.factors_shape
        return (matrix * blocks_down + row // down) * blocks_across + column // across


@dataclass(frozen=True, slots=True)
class Changed:
    """A stored box that adapters change on the way.

    Attributes:
        entry: The tensor, with its updates.
        chunk: The box, in C order without gaps.
    """

    entry: TensorEntry
    chunk: Chunk

    def holds(self, part: Part) -> bool:
        """Whether a part reads from the box."""
        extent = self.chunk.extent
        return part.file == extent.file and 0 <= part.offset - extent.offset < extent.nbytes


@dataclass(frozen=True, slots=True)
class Fill:
    """How one target box, stored in C order without gaps, gets all of its elements.

    Attributes:
        source_dtype: Element type that the parts read.
        target_dtype: Element type of the box; a cast where it differs.
        numel: Elements in the box; the parts cover each exactly once.
        parts: In order of ``target``.
        data: The bytes themselves, for a box that no source holds; there are no parts then.
        scales: Factors that the elements of the parts are multiplied by on the way, for a cast out
            of a type of one byte; every part then reads from one of the matrices.
        changes: Boxes that some of the parts read from and that adapters change.
    """

    source_dtype: DType
    target_dtype: DType
    numel: int
    parts: tuple[Part, ...]
    data: bytes | None = None
    scales: tuple[BlockScale, ...] = ()
    changes: tuple[Changed, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the box as stored."""
        return self.numel * self.target_dtype.itemsize

    @property
    def is_cast(self) -> bool:
        """Whether values change type on the way."""
        return self.source_dtype is not self.target_dtype

    @property
    def is_computed(self) -> bool:
        """Whether its elements are not bytes of the source."""
        return self.is_cast or bool(self.changes)

    @property
    def computed_dtype(self) -> DType:
        """What its elements are while they are computed: wide enough to round only once."""
        is_wide = self.source_dtype.itemsize > 4 or self.target_dtype.itemsize > 4
        return BY_NAME["float64" if is_wide else "float32"]

    def congruence(self, modulus: int) -> int | None:
        """Where the box should start, modulo ``modulus``, so that its first long run lines up with
        the source's blocks; ``None`` where no run is long enough to gain from it."""
        if self.is_computed:
            return None
        itemsize = self.target_dtype.itemsize
        for part in self.parts:
            if part.is_contiguous and part.numel * itemsize >= 2 * modulus:
                return (part.offset - part.target * itemsize) % modulus
        return None


@dataclass(frozen=True, slots=True)
class OutChunk:
    """A box of a target tensor that is stored in one place."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    fill: Fill


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A target tensor: its name, where it nests, and the boxes it is stored as.

    Attributes:
        key: As the target catalog will list it.
        path: How it nests; ``(key,)`` for a flat checkpoint.
        dtype: Element type as stored.
        shape: Whole shape, in elements.
        chunks: Boxes that cover ``shape`` exactly once.
        tied_to: Key of an earlier ``OutTensor`` with the same bytes, for forms that can share.
    """

    key: str
    path: KeyPath
    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[OutChunk, ...]
    tied_to: str | None = None


@dataclass(frozen=True, slots=True)
class OutFile:
    """One file of the result.

    Attributes:
        name: Relative path below the target directory.
        nbytes: Its exact length.
        literals: ``(offset, bytes)`` to write as they are: headers, frames, pickles.
        payloads: ``(offset, fill)`` of every tensor box.  What neither covers is a gap of zeros.
    """

    name: str
    nbytes: int
    literals: tuple[tuple[int, bytes], ...]
    payloads: tuple[tuple[int, Fill], ...]


@dataclass(frozen=True, slots=True)
class Outline:
    """All files of a result; ``commit`` is written last and makes it complete."""

    files: tuple[OutFile, ...]
    commit: tuple[tuple[str, bytes], ...] = ()

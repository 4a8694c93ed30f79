"""Cut the elements of a tile into rows by columns of the matrix that they come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dcpconv.core.outline import Loop

ROWS, COLUMNS = 32, 1024
"""A block of a product: large enough that a call costs little, small enough for narrow shards."""

AREA = 1 << 20
"""Elements of a panel: what a tile needs of a product at a time."""


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """Elements of a tile that are some rows by some columns of a stored matrix.

    Attributes:
        row: First row.
        column: First column.
        target: Where the first element is in the tile.
        down: ``(count, rows, steps in the tile)`` per loop over rows.
        across: Likewise over columns.
    """

    row: int
    column: int
    target: int
    down: tuple[Loop, ...]
    across: tuple[Loop, ...]

    @property
    def height(self) -> int:
        """Rows from the first to the last."""
        return 1 + sum((count - 1) * step for count, step, _ in self.down)

    @property
    def width(self) -> int:
        """Columns from the first to the last."""
        return 1 + sum((count - 1) * step for count, step, _ in self.across)


def grids(first: int, target: int, loops: tuple[Loop, ...], width: int) -> Iterator[BlockGrid]:
    """The elements of a nest as rows by columns of a matrix, few enough for a panel.

    Args:
        first: Index in the matrix, in C order, of the first element.
        target: Its place in the tile.
        loops: As in ``Part``.
        width: Columns of the matrix.

    >>> [(g.row, g.column, g.down, g.across) for g in grids(4, 0, ((7, 1, 1),), 5)]
    [(0, 4, (), ()), (1, 0, (), ((5, 1, 1),)), (2, 0, (), ())]
    """
    row, column = divmod(first, width)
    down = tuple((n, step // width, to) for n, step, to in loops if step % width == 0)
    flat = sorted((loop for loop in loops if loop[1] % width), key=lambda loop: -loop[1])
    if column + sum((n - 1) * step for n, step, _ in flat) < width:
        grid = BlockGrid(row, column, target, down, tuple(flat))
        if grid.height * grid.width <= AREA:
            yield grid
            return
        flat = sorted(loops, key=lambda loop: -(loop[0] - 1) * loop[1])
    (n, step, to), rest = flat[0], [loop for loop in loops if loop is not flat[0]]
    inner = column % step + sum((count - 1) * other for count, other, _ in flat[1:])
    cut = n // 2
    if step < width and width % step == 0 and inner < step and flat[0][1] % width:
        per_row = width // step
        lead = -(column // step) % per_row
        if lead:
            cut = min(lead, n)
        elif n > per_row and n % per_row == 0:
            whole = (n // per_row, width, to * per_row)
            yield from grids(first, target, (whole, (per_row, step, to), *rest), width)
            return
        elif n > per_row:
            cut = n - n % per_row
    for start, stop in ((0, cut), (cut, n)):
        kept = ((stop - start, step, to),) if stop - start > 1 else ()
        if stop > start:
            at = first + start * step, target + start * to
            yield from grids(*at, (*kept, *rest), width)

"""Change stored matrices as adapters say, while a tile of them is in memory: ``W + s * B @ A``.

The product is computed in blocks of ``ROWS`` by ``COLUMNS`` that lie on a grid over the *stored*
matrix, each by the same call on as many elements.  So the bits of an element depend on its row of B
and its column of A alone: not on the tile, the shard, or the order in which the result wants them.

Memory beside the tile: the factors of the matrices in use, and two panels of ``AREA`` elements per
thread.  torch is imported when the first element is changed.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from dcpconv.core.catalog import Lane, TensorEntry, Update
from dcpconv.core.outline import Changed, Fill, Part
from dcpconv.engine.grids import COLUMNS, ROWS, BlockGrid, grids
from dcpconv.engine.rows import as_stack, read_rows
from dcpconv.stores.local import Sources

if TYPE_CHECKING:
    from torch import Tensor

STEP = 32 << 10
"""Elements per torch call, above which torch starts threads of its own."""

_KEPT = 8 << 20
"""Bytes of factors that stay in memory beside those in use: of the matrices that the threads are
at, and a few more."""


def merge(fill: Fill, parts: Iterator[Part], values: Tensor, start: int, sources: Sources) -> None:
    """Change all elements that come from matrices with updates.

    Args:
        fill: Whose boxes are changed.
        parts: Parts that make up the tile.
        values: The tile, flat, in ``fill.computed_dtype``.
        start: Element of the target box that the tile begins with.
        sources: Where files are open; factors are kept as long as it lives.
    """
    kept = _kept(sources)
    with _ALONE:
        for part in parts:
            box = next((changed for changed in fill.changes if changed.holds(part)), None)
            if box is None:
                continue
            first = (part.offset - box.chunk.extent.offset) // box.entry.dtype.itemsize
            width = box.chunk.sizes[-1] if box.chunk.sizes else 1
            for grid in grids(first, part.target - start, part.loops, width):
                for update in box.entry.updates:
                    if update.matrix is not None and update.matrix not in _matrices(box, grid):
                        continue
                    _apply(grid, kept.ready(update, box.entry), box, values)


class _Alone:
    """Keeps torch's products to the thread that asks: ours are enough for all cores, and its own,
    started for every block, wait for one another longer than they compute."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = 1

    def __enter__(self) -> None:
        import torch  # noqa: PLC0415 - only a merge needs it

        with self._lock:
            if not self._inside:
                self._before = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        import torch  # noqa: PLC0415

        with self._lock:
            self._inside -= 1
            torch.set_num_threads(self._before)


_ALONE = _Alone()


def _apply(grid: BlockGrid, ready: _Ready, box: Changed, values: Tensor) -> None:
    loops = (*grid.down, *grid.across)
    counts, steps = [loop[0] for loop in loops], [loop[2] for loop in loops]
    into = values.as_strided(counts, steps, grid.target)
    panel = ready.panel(box, grid)
    width = grid.width
    places = [*(step * width for _, step, _ in grid.down), *(step for _, step, _ in grid.across)]
    change = panel.as_strided(counts, places)
    factors = ready.factors(box, grid)
    if factors is not None:
        by_column = ready.update.by_column
        moves = [
            *(0 if by_column else step for _, step, _ in grid.down),
            *(step if by_column else 0 for _, step, _ in grid.across),
        ]
        factors = factors.as_strided(counts, moves)
    rows = max(1, STEP // max(1, math.prod(counts[1:]))) if counts else 1
    for at in range(0, counts[0] if counts else 1, rows):
        some = slice(at, at + rows) if counts else ...
        if ready.update.given is not None:
            into[some] = change[some]
            continue
        into[some] += change[some]
        if factors is not None:
            into[some] *= factors[some]


@dataclass(slots=True)
class _Kept:
    """Factors in memory, of the matrices last in use."""

    sources: Sources
    found: OrderedDict[int, _Ready] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ready(self, update: Update, entry: TensorEntry) -> _Ready:
        with self.lock:
            # The entry keeps the update alive, so its identity is a safe key.
            ready = self.found.get(id(update))
            if ready is None or ready.entry is not entry:
                ready = self.found[id(update)] = _Ready(update, entry, self.sources)
            self.found.move_to_end(id(update))
            nbytes = sum(one.nbytes for one in self.found.values())
            while nbytes > _KEPT and len(self.found) > 1:
                nbytes -= self.found.popitem(last=False)[1].nbytes
            return ready


_ALL: WeakKeyDictionary[Sources, _Kept] = WeakKeyDictionary()


def _kept(sources: Sources) -> _Kept:
    found = _ALL.get(sources)
    return found if found is not None else _ALL.setdefault(sources, _Kept(sources))


class _Ready:
    """An update of one stored matrix, its factors read."""

    def __init__(self, update: Update, entry: TensorEntry, sources: Sources) -> None:
        import torch  # noqa: PLC0415 - only a merge needs it

        self.update, self.entry, self.sources = update, entry, sources
        self.dtype = torch.float64 if entry.dtype.itemsize > 4 else torch.float32
        self.shape = as_stack(entry.shape)
        self.rows = _indices(update.rows, self.shape[-2])
        self.columns = _indices(update.columns, self.shape[-1])
        self.lock = threading.Lock()
        self.left = self.right = self.magnitude = None
        self.norms: dict[int, Tensor] = {}
        if update.right is not None:
            self.left, self.right = self._factors(update, update.right)
        if update.magnitude is not None:
            numel = update.magnitude.numel
            self.magnitude = read_rows(update.magnitude, 0, 1, sources, self.dtype).view(numel)

    @property
    def nbytes(self) -> int:
        """Memory of the factors."""
        some = (self.left, self.right, self.magnitude)
        return sum(one.nbytes for one in some if one is not None)

    def _factors(self, update: Update, right: TensorEntry) -> tuple[Tensor, Tensor]:
        """``(experts, rows, rank)`` and ``(experts, blocks, rank, COLUMNS)``, padded with zeros."""
        import torch  # noqa: PLC0415

        one = read_rows(right, 0, as_stack(right.shape)[1], self.sources, self.dtype)
        if update.left is None:
            left, columns = torch.ones(1, 1, 1, dtype=self.dtype), one.view(1, 1, -1)
        else:
            rows = as_stack(update.left.shape)[1]
            two = read_rows(update.left, 0, rows, self.sources, self.dtype)
            b, a = (one, two) if update.is_flipped else (two, one)
            experts = update.experts
            columns = a.reshape(experts, -1, a.shape[-1])
            left = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
            if update.expert is not None:
                one_of = slice(update.expert, update.expert + 1)
                columns, left = columns[one_of], left[one_of]
            if update.is_flipped:
                left, columns = columns.transpose(1, 2), left.transpose(1, 2)
        if self.rows is not None:
            here, there = self.rows
            left, some = left.new_zeros(left.shape[0], self.shape[1], left.shape[2]), left
            left[:, here] = some[:, there]
        if self.columns is not None:
            here, there = self.columns
            some = columns
            columns = columns.new_zeros(columns.shape[0], columns.shape[1], self.shape[2])
            columns[:, :, here] = some[:, :, there]
        rank = left.shape[2]
        padded = left.new_zeros(left.shape[0], _up(left.shape[1], ROWS), rank)
        padded[:, : left.shape[1]] = left
        wide = columns.new_zeros(columns.shape[0], rank, _up(columns.shape[2], COLUMNS))
        wide[:, :, : columns.shape[2]] = columns
        blocks = wide.view(len(wide), rank, -1, COLUMNS).transpose(1, 2).contiguous()
        return padded, blocks

    def panel(self, box: Changed, grid: BlockGrid) -> Tensor:
        """What to add to, or take instead of, the rows and columns between a grid's corners."""
        import torch  # noqa: PLC0415

        made = torch.empty(grid.height, grid.width, dtype=self.dtype)
        column = grid.column + (box.chunk.offsets[-1] if box.chunk.offsets else 0)
        for at, expert, row, count in _spans(box, grid.row, grid.height):
            into = made[at : at + count]
            if self.update.given is not None:
                self._take(into, expert, row, column)
            elif self.update.matrix is not None:
                if expert == self.update.matrix:
                    self._multiply(into, 0, row, column)
                else:
                    into.fill_(-0.0)
            else:
                self._multiply(into, expert, row, column)
        return made

    def _multiply(self, into: Tensor, expert: int, row: int, column: int) -> None:
        import torch  # noqa: PLC0415

        assert self.left is not None  # noqa: S101
        assert self.right is not None  # noqa: S101
        left, right = self.left[expert], self.right[expert]
        block = torch.empty(ROWS, COLUMNS, dtype=self.dtype)
        height, width = into.shape
        for top in range(row // ROWS * ROWS, row + height, ROWS):
            rows = slice(max(top - row, 0), min(top + ROWS - row, height))
            for start in range(column // COLUMNS * COLUMNS, column + width, COLUMNS):
                columns = slice(max(start - column, 0), min(start + COLUMNS - column, width))
                place = into[rows, columns]
                factors = left[top : top + ROWS], right[start // COLUMNS]
                if place.shape == block.shape:
                    torch.mm(*factors, out=place)
                    continue
                torch.mm(*factors, out=block)
                down, across = rows.start + row - top, columns.start + column - start
                place.copy_(block[down:, across:][: place.shape[0], : place.shape[1]])
        into.mul_(self.update.scale)
        # Nothing is added where the adapter has nothing: -0.0 leaves every value as it is.
        if self.rows is not None:
            into[_uncovered(self.rows[0], row, height)] = -0.0
        if self.columns is not None:
            into[:, _uncovered(self.columns[0], column, width)] = -0.0

    def _take(self, into: Tensor, expert: int, row: int, column: int) -> None:
        import torch  # noqa: PLC0415

        given = self.update.given
        assert given is not None  # noqa: S101
        height, width = into.shape
        start = expert * self.shape[1] + row
        wanted = torch.arange(start, start + height)
        if self.rows is not None:
            wanted = self.rows[1][torch.searchsorted(self.rows[0], wanted)]
        low, high = int(wanted.min()), int(wanted.max()) + 1
        read = read_rows(given, low, high, self.sources, self.dtype)[wanted - low]
        some = torch.arange(column, column + width)
        if self.columns is not None:
            some = self.columns[1][torch.searchsorted(self.columns[0], some)]
        into.copy_(read[:, some])

    def factors(self, box: Changed, grid: BlockGrid) -> Tensor | None:
        """DoRA's factor of every row, or column, between a grid's corners."""
        import torch  # noqa: PLC0415

        if self.magnitude is None:
            return None
        if self.update.by_column:
            start = grid.column + (box.chunk.offsets[-1] if box.chunk.offsets else 0)
            return self._factor(self._column_norms(), self.columns, start, grid.width)
        made = [
            self._factor(self._row_norms(row, count), self.rows, row, count)
            for _, _, row, count in _spans(box, grid.row, grid.height)
        ]
        return torch.cat(made)

    def _factor(
        self, norms: Tensor, lane: tuple[Tensor, Tensor] | None, start: int, count: int
    ) -> Tensor:
        import torch  # noqa: PLC0415

        assert self.magnitude is not None  # noqa: S101
        if self.update.by_column:
            norms = norms[start : start + count]
        if lane is None:
            return self.magnitude[start : start + count] / norms
        made = torch.ones(count, dtype=self.dtype)
        here, there = lane
        inside = (here >= start) & (here < start + count)
        at = here[inside] - start
        made[at] = self.magnitude[there[inside]] / norms[at]
        return made

    def _sum(self, row: int, count: int) -> Tensor:
        """Whole rows of ``W + s * B @ A``, of the matrix as it is stored."""
        import torch  # noqa: PLC0415

        values = read_rows(self.entry, row, row + count, self.sources, self.dtype)
        change = torch.empty_like(values)
        self._multiply(change, 0, row, 0)
        return values.add_(change)

    def _row_norms(self, row: int, count: int) -> Tensor:
        import torch  # noqa: PLC0415

        blocks = range(row // ROWS, -(-(row + count) // ROWS))
        for block in blocks:
            if block not in self.norms:
                top = block * ROWS
                values = self._sum(top, min(ROWS, self.shape[1] - top))
                self.norms[block] = torch.linalg.norm(values, dim=1)
        every = torch.cat([self.norms[block] for block in blocks])
        return every[row - blocks.start * ROWS :][:count]

    def _column_norms(self) -> Tensor:
        import torch  # noqa: PLC0415

        with self.lock:
            if -1 not in self.norms:
                total = torch.zeros(self.shape[2], dtype=torch.float64)
                for top in range(0, self.shape[1], ROWS):
                    values = self._sum(top, min(ROWS, self.shape[1] - top))
                    total += values.double().square_().sum(0)
                self.norms[-1] = total.sqrt_().to(self.dtype)
        return self.norms[-1]


def _matrices(box: Changed, grid: BlockGrid) -> range:
    """The matrices of a stack between a grid's corners."""
    rows = as_stack(box.chunk.sizes)[1]
    before = box.chunk.offsets[0]
    return range(before + grid.row // rows, before + (grid.row + grid.height - 1) // rows + 1)


def _spans(box: Changed, row: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """``(place, matrix of the stack, row of it, count)`` of rows of a chunk that follow another."""
    sizes = as_stack(box.chunk.sizes)
    offsets = (0,) * (3 - len(box.chunk.offsets)) + box.chunk.offsets
    done = 0
    while done < height:
        expert, at = divmod(row + done, sizes[1])
        count = min(height - done, sizes[1] - at)
        yield done, offsets[0] + expert, offsets[1] + at, count
        done += count


def _indices(lane: Lane | None, length: int) -> tuple[Tensor, Tensor] | None:
    """``(here, there)`` of every row or column that a lane names, by ``here``."""
    import torch  # noqa: PLC0415

    if lane is None:
        return None
    here, there = torch.tensor([lane.here]), torch.tensor([lane.there])
    for count, step, other in lane.axes:
        here = (here.unsqueeze(-1) + step * torch.arange(count)).flatten()
        there = (there.unsqueeze(-1) + other * torch.arange(count)).flatten()
    here, order = here.sort()
    if len(here) == length and bool((here == there[order]).all()):
        return None
    return here, there[order]


def _uncovered(here: Tensor, start: int, count: int) -> Tensor:
    import torch  # noqa: PLC0415

    bare = torch.ones(count, dtype=torch.bool)
    bare[here[(here >= start) & (here < start + count)] - start] = False
    return bare


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit

"""A model as a picture of characters: layers down, slots across, one glyph a cell.

Layers that look alike are one row, so that the one cell that differs is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dcpconv.core.printing import printable
from dcpconv.families.keymaps import keymaps, split_key
from dcpconv.plan.canonical import LAYOUTS

_BAND = 28
"""Columns side by side below staggered heads, which leaves the last head 20 of 80 characters."""
_WIDEST = 24
"""Characters of a column's head."""


class Mark(NamedTuple):
    """What is to be drawn of one key.

    Attributes:
        glyph: A character.
        key: The key.
        slots: What it holds, as far as a table says.
        indices: Layer and expert numbers in it, likewise.
    """

    glyph: str
    key: str
    slots: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()


class Cell(NamedTuple):
    """Where a key is drawn: ``layer`` is ``None`` beside the layers."""

    head: str
    layer: int | None


@dataclass(frozen=True, slots=True)
class Grid:
    """Glyphs by place.

    Attributes:
        columns: Slots of a layer, in the order of the table.
        layers: Layer -> column -> glyph.
        outside: Slot beside the layers -> glyph.
    """

    columns: tuple[str, ...]
    layers: Mapping[int, Mapping[str, str]]
    outside: Mapping[str, str]


class Places:
    """Finds the cells of keys."""

    def __init__(self) -> None:
        self._heads: dict[tuple[str, tuple[str, ...]], str] = {}

    def of(self, key: str, slots: tuple[str, ...], indices: tuple[int, ...]) -> Cell:
        """The cell of a key, of which slots and indices may be unknown."""
        # Splitting is what takes long, and a table has already said which number is the layer.
        template, numbers = ("", indices) if slots and indices else split_key(key)
        head = self._heads.get((template, slots))
        if head is None:
            head = self._heads[template, slots] = _head(template, slots)
        is_inside = slots[0].startswith("layer.") if slots else "{}" in template
        return Cell(head, numbers[0] if is_inside and numbers else None)


def make_grid(marks: Iterable[Mark], glyphs: str, *, table: str = "") -> Grid:
    """Every key in its cell.

    Args:
        marks: What is to be drawn.
        glyphs: Those there are; a cell of several keys shows the one that comes first here.
        table: Naming whose order the columns have.
    """
    layers: dict[int, dict[str, str]] = {}
    outside: dict[str, str] = {}
    severity = {glyph: n for n, glyph in enumerate(glyphs)}
    places = Places()
    for mark in marks:
        head, layer = places.of(mark.key, mark.slots, mark.indices)
        row = outside if layer is None else layers.setdefault(layer, {})
        known = row.get(head)
        if known is None or severity[mark.glyph] < severity[known]:
            row[head] = mark.glyph
    seen = dict.fromkeys(head for row in layers.values() for head in row)
    return Grid(tuple(ordered(seen, table)), layers, outside)


def draw(grid: Grid, legend: Mapping[str, str], *, width: int = 80) -> Iterator[str]:
    """The picture as lines, with a legend of the glyphs in it; none for a grid without keys."""
    if not grid.layers and not grid.outside:
        return
    label = max([5, *(len(name) for name, _ in _runs(grid))])
    if grid.outside:
        yield from _flow([f"{head} {glyph}" for head, glyph in grid.outside.items()], width)
    if grid.layers:
        if grid.outside:
            yield ""
        yield from _table(grid, label, width)
    used = {*grid.outside.values(), *(g for row in grid.layers.values() for g in row.values())}
    yield ""
    yield "  ".join(f"{glyph} {word}" for glyph, word in legend.items() if glyph in used)


def _head(template: str, slots: tuple[str, ...]) -> str:
    """What a column is called: its slots, or the end of a key that has none."""
    if slots:
        name = "|".join(slot.removeprefix("layer.") for slot in slots)
    else:
        _, _, tail = template.rpartition("{}.") if "{}." in template else ("", "", template)
        name = tail.removesuffix(".weight")
    name = printable(name)
    return name if len(name) <= _WIDEST else f"{name[: _WIDEST - 2]}.."


def ordered(heads: Iterable[str], name: str) -> list[str]:
    """Heads as a naming lists its slots, then the others as they came; without a naming of that
    name, as the list of canonical slots has them."""
    table = keymaps().get(name)
    if table is not None:
        listed = [_head(row.pattern.template, row.slots) for row in table.rows]
    else:
        listed = [_head("", (slot,)) for slot in LAYOUTS]
    place = {head: n for n, head in enumerate(listed)}
    return sorted(heads, key=lambda head: place.get(head, len(place)))


def _runs(grid: Grid) -> list[tuple[str, int]]:
    """Layers that look alike, as ``(label, one of them)``."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(grid.layers):
        if runs:
            first, last = runs[-1]
            if last == layer - 1 and grid.layers[first] == grid.layers[layer]:
                runs[-1] = (first, layer)
                continue
        runs.append((layer, layer))
    return [(f"{a}..{b}" if a != b else str(a), a) for a, b in runs]


def _table(grid: Grid, label: int, width: int) -> Iterator[str]:
    if label + sum(2 + len(head) for head in grid.columns) <= width:
        yield f"{'layer':<{label}}  {'  '.join(grid.columns)}"
        for name, layer in _runs(grid):
            row = grid.layers[layer]
            wide = "  ".join(f"{row.get(head, ' '):<{len(head)}}" for head in grid.columns)
            yield f"{name:<{label}}  {wide}".rstrip()
        return
    for start in range(0, len(grid.columns), _BAND):
        if start:
            yield ""
        band = grid.columns[start : start + _BAND]
        for at, head in enumerate(band):
            name = "layer" if at == len(band) - 1 else ""
            yield f"{name:<{label}}  {'| ' * at}{head}"
        for name, layer in _runs(grid):
            row = grid.layers[layer]
            cells = " ".join(row.get(head, " ") for head in band)
            yield f"{name:<{label}}  {cells}".rstrip()


def _flow(words: Sequence[str], width: int) -> Iterator[str]:
    """Words side by side, on as many lines as they need."""
    line = ""
    for word in words:
        if line and len(line) + 3 + len(word) > width:
            yield line
            line = word
        else:
            line = f"{line}   {word}" if line else word
    yield line

"""The coverage as a picture: layers down, slots across, one glyph a cell.

Layers that look alike are one row, so that the one cell that differs is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dcpconv.core.printing import printable
from dcpconv.families.keymaps import keymaps, split_key
from dcpconv.plan.coverage import Coverage

GLYPHS: Mapping[str, str] = {
    "X": "missing",
    "!": "misshapen",
    "?": "unknown",
    "~": "derived",
    "=": "tied",
    ".": "copied",
    "-": "ignored",
}
"""ASCII, so that they survive pipes and logs; a cell of several keys shows the first that applies,
so that one missing expert of 256 is seen."""

_HOW = {"copied": ".", "derived": "~", "tied": "="}
_SEVERITY = {glyph: n for n, glyph in enumerate(GLYPHS)}
_BAND = 28
"""Columns side by side below staggered heads, which leaves the last head 20 of 80 characters."""
_WIDEST = 24
"""Characters of a column's head."""


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


def make_grid(coverage: Coverage) -> Grid:
    """Every key of both sides in its cell."""
    layers: dict[int, dict[str, str]] = {}
    outside: dict[str, str] = {}
    heads: dict[tuple[str, tuple[str, ...]], str] = {}
    for glyph, key, slots, indices in _marks(coverage):
        # Splitting is what takes long, and a table has already said which number is the layer.
        template, numbers = ("", indices) if slots and indices else split_key(key)
        head = heads.get((template, slots))
        if head is None:
            head = heads[template, slots] = _head(template, slots)
        is_inside = slots[0].startswith("layer.") if slots else "{}" in template
        row = layers.setdefault(numbers[0], {}) if is_inside and numbers else outside
        known = row.get(head)
        if known is None or _SEVERITY[glyph] < _SEVERITY[known]:
            row[head] = glyph
    seen = dict.fromkeys(head for row in layers.values() for head in row)
    return Grid(tuple(_ordered(seen, coverage.target)), layers, outside)


def picture(coverage: Coverage, *, width: int = 80) -> Iterator[str]:
    """The picture as lines, with a legend of the glyphs in it; none for a coverage without keys."""
    grid = make_grid(coverage)
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
    yield "  ".join(f"{glyph} {word}" for glyph, word in GLYPHS.items() if glyph in used)


_Mark = tuple[str, str, tuple[str, ...], tuple[int, ...]]


def _marks(coverage: Coverage) -> Iterator[_Mark]:
    """Glyph, key, slots and the numbers in the key, as far as they are known."""
    for target in coverage.targets:
        yield _HOW[target.how], target.key, target.slots, target.indices
    for glyph, faults in (
        ("X", coverage.missing),
        ("!", coverage.misshapen),
        ("?", coverage.unknown),
        ("-", coverage.ignored),
    ):
        for fault in faults:
            yield glyph, fault.key, fault.slots, ()


def _head(template: str, slots: tuple[str, ...]) -> str:
    """What a column is called: its slots, or the end of a key that has none."""
    if slots:
        name = "|".join(slot.removeprefix("layer.") for slot in slots)
    else:
        _, _, tail = template.rpartition("{}.") if "{}." in template else ("", "", template)
        name = tail.removesuffix(".weight")
    name = printable(name)
    return name if len(name) <= _WIDEST else f"{name[: _WIDEST - 2]}.."


def _ordered(heads: Mapping[str, None], target: str) -> list[str]:
    """Heads as the target's table lists its slots, then the others as they came."""
    table = keymaps().get(target)
    rows = table.rows if table is not None else ()
    place = {_head(row.pattern.template, row.slots): n for n, row in enumerate(rows)}
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

"""Layers down, slots across: a coverage or a difference as a grid of cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dcpconv.checking.reports.matrix import GLYPHS
from dcpconv.comparing.records import Diff
from dcpconv.comparing.text import LEGEND, change, glyph_of
from dcpconv.core.printing import printable_lines
from dcpconv.families.keymaps import split_key
from dcpconv.plan.canonical import LAYOUTS
from dcpconv.plan.coverage import Coverage, Fault, Target
from dcpconv.plan.differences import Held, TensorDiff
from dcpconv.plan.matrix import Cell, Places, ordered

_MOST = 400
"""Columns, and cells beside the layers, before the rest is only counted."""

_STRIP = 1024
"""Numbered tensors in a cell before they are only counted."""

_DIFF_STYLES: Mapping[str, str] = {
    **{digit: f"g{digit}" for digit in "0123456789"},
    "!": "bad",
    "a": "more",
    "b": "less",
    "?": "odd",
    "~": "near",
    "=": "plain",
}
_COVERAGE_STYLES: Mapping[str, str] = {
    "X": "bad",
    "!": "odd",
    "*": "more",
    "?": "less",
    "~": "near",
    "=": "near",
    ".": "plain",
    "-": "plain",
}

HOW_TO = "Select a cell for its tensors: click it, or move with the arrow keys and press Enter."


class Item(NamedTuple):
    """What is to be seen of one tensor.

    Attributes:
        glyph: A character, which has a style and words.
        name: What it is called.
        text: What is told when its cell is selected.
        slots: As ``Mark.slots``.
        indices: As ``Mark.indices``.
    """

    glyph: str
    name: str
    text: str
    slots: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()


def of_diff(diff: Diff) -> dict[str, Any]:
    """The heat map of a difference."""
    items = (
        Item(
            glyph_of(tensor),
            tensor.name,
            _told(tensor),
            (tensor.slot,) if tensor.slot in LAYOUTS else (),
            () if tensor.layer is None else (tensor.layer,),
        )
        for tensor in diff.tensors
    )
    return _grid("What changed, by layer and slot", items, LEGEND, _DIFF_STYLES, "")


def of_coverage(coverage: Coverage) -> dict[str, Any]:
    """The matrix of a coverage."""
    items = _covered(coverage)
    return _grid("Every key, by layer and slot", items, GLYPHS, _COVERAGE_STYLES, coverage.target)


def _covered(coverage: Coverage) -> Iterator[Item]:
    how = {"copied": ".", "derived": "~", "tied": "="}
    for target in coverage.targets:
        yield Item(how[target.how], target.key, _made(target), target.slots, target.indices)
    for label, glyph in {word: glyph for glyph, word in GLYPHS.items()}.items():
        faults: tuple[Fault, ...] = getattr(coverage, label, ()) if label != "tied" else ()
        for fault in faults:
            yield Item(glyph, fault.key, f"{fault.key}\n{label}  {fault.why}", fault.slots)


def _made(target: Target) -> str:
    keys = list(dict.fromkeys(piece.entry.key for piece in target.pieces))
    more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
    made = ", ".join(keys[:2]) + more if keys != [target.key] else ""
    shape = f"{target.dtype.label} {list(target.shape)}"
    return "\n".join((target.key, f"{target.how}  {shape}", *([f"from {made}"] if made else [])))


def _told(tensor: TensorDiff) -> str:
    lines = [tensor.name]
    if tensor.apart is not None:
        lines.append(change(tensor).replace("  ", "\n"))
    else:
        lines.append(LEGEND[glyph_of(tensor)])
    lines += [
        f"{side}  {_holds(held)}" for side, held in (("a", tensor.a), ("b", tensor.b)) if held
    ]
    return "\n".join(lines)


def _holds(held: Held) -> str:
    more = f" and {len(held.keys) - 2} more" if len(held.keys) > 2 else ""
    return f"{held.dtype} {list(held.shape)}  {', '.join(held.keys[:2])}{more}"


def _grid(
    title: str,
    items: Iterable[Item],
    legend: Mapping[str, str],
    styles: Mapping[str, str],
    table: str,
) -> dict[str, Any]:
    severity = {glyph: n for n, glyph in enumerate(legend)}
    places = Places()
    cells: dict[Cell, list[Item]] = {}
    for item in items:
        cells.setdefault(places.of(item.name, item.slots, item.indices), []).append(item)
    drawn = {place: _cell(some, severity) for place, some in cells.items()}
    columns = ordered(dict.fromkeys(c.head for c in drawn if c.layer is not None), table)
    outside = [place for place in drawn if place.layer is None]
    outside.sort(key=lambda place: severity[drawn[place][0]])
    layers = sorted({place.layer for place in drawn if place.layer is not None})
    hidden = max(0, len(columns) - _MOST) + max(0, len(outside) - _MOST)
    hint = HOW_TO if not hidden else f"{HOW_TO}  {hidden:,} columns or cells more are not drawn."
    return {
        "kind": "grid",
        "title": title,
        "hint": hint,
        "columns": columns[:_MOST],
        "rows": [
            [str(layer), [drawn.get(Cell(head, layer)) for head in columns[:_MOST]]]
            for layer in layers
        ],
        "outside": [[place.head, drawn[place]] for place in outside[:_MOST]],
        "legend": dict(legend),
        "styles": dict(styles),
    }


def _cell(items: list[Item], severity: Mapping[str, int]) -> list[str]:
    """Glyph, name and text of the tensor that is told; where there are several, all of them."""
    worst = min(items, key=lambda item: severity[item.glyph])
    text = printable_lines(worst.text)
    if len(items) == 1:
        return [worst.glyph, printable_lines(worst.name), text]
    text += f"\nthe first of {len(items):,} tensors in this cell"
    numbered: dict[int, str] = {}
    for item in items:
        numbers = split_key(item.name)[1]
        number = numbers[-1] if numbers else _STRIP
        if number >= _STRIP:
            return [worst.glyph, printable_lines(worst.name), text]
        known = numbered.get(number)
        if known is None or severity[item.glyph] < severity[known]:
            numbered[number] = item.glyph
    strip = "".join(numbered.get(number, " ") for number in range(max(numbered) + 1))
    template = _with_mark(printable_lines(worst.name))
    return [worst.glyph, printable_lines(worst.name), text, strip, template]


def _with_mark(name: str) -> str:
    """A name with ``#`` for its last number.

    >>> _with_mark("layer.3.expert.17.gate")
    'layer.3.expert.#.gate'
    """
    template, numbers = split_key(name)
    parts = template.split("{}")
    filled = [f"{part}{number}" for part, number in zip(parts, numbers[:-1], strict=False)]
    return "".join((*filled, parts[len(numbers) - 1], "#", parts[-1]))

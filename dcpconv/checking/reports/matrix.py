"""The coverage as a picture: layers down, slots across, one glyph a cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dcpconv.plan.coverage import Coverage
from dcpconv.plan.matrix import Mark, draw, make_grid

GLYPHS: Mapping[str, str] = {
    "X": "missing",
    "!": "misshapen",
    "*": "changed",
    "?": "unknown",
    "~": "derived",
    "=": "tied",
    ".": "copied",
    "-": "ignored",
}
"""ASCII, so that they survive pipes and logs; a cell of several keys shows the first that applies,
so that one missing expert of 256 is seen."""

_HOW = {"copied": ".", "derived": "~", "tied": "="}


def picture(coverage: Coverage, *, width: int = 80) -> Iterator[str]:
    """The picture as lines, with a legend of the glyphs in it; none for a coverage without keys."""
    grid = make_grid(marks(coverage), "".join(GLYPHS), table=coverage.target)
    yield from draw(grid, GLYPHS, width=width)


def marks(coverage: Coverage) -> Iterator[Mark]:
    """What is to be drawn of every key of both sides."""
    for target in coverage.targets:
        yield Mark(_HOW[target.how], target.key, target.slots, target.indices)
    for glyph, faults in (
        ("X", coverage.missing),
        ("!", coverage.misshapen),
        ("*", coverage.changed),
        ("?", coverage.unknown),
        ("-", coverage.ignored),
    ):
        for fault in faults:
            yield Mark(glyph, fault.key, fault.slots)

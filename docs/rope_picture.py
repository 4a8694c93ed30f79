"""The picture of ``rope.md``: which channels of a head rotate together, in both layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

CHANNELS = 8
_CELL, _GAP, _TOP = 54, 6, 44
# Okabe and Ito's palette, which colour-blind people tell apart.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7")
_TITLE = (
    "The rows of one head: with (two p) row i rotates with row i + 4, with (p two) row 2i rotates"
    " with row 2i + 1"
)

Place = Callable[[int], tuple[int, str]]
"""Row of a head -> its pair, and ``x`` or ``y``."""


def rope_picture() -> str:
    """The SVG."""
    width, height = 2 * 16 + CHANNELS * (_CELL + _GAP), 330
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    lines = [
        f'{start} aria-labelledby="title" font-family="system-ui, sans-serif" font-size="14">',
        f'<title id="title">{_TITLE}</title>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *_head(_TOP, "(h two p) d: halves rotate together (HF, rotate_half)", _halves),
        *_head(_TOP + 160, "(h p two) d: neighbours rotate together (Meta, Lingua)", _neighbours),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _halves(row: int) -> tuple[int, str]:
    return row % (CHANNELS // 2), "xy"[row // (CHANNELS // 2)]


def _neighbours(row: int) -> tuple[int, str]:
    return row // 2, "xy"[row % 2]


def _head(top: int, title: str, place: Place) -> Iterator[str]:
    yield f'<text x="16" y="{top - 14}" font-weight="600" fill="#111">{title}</text>'
    centres: dict[int, list[int]] = {}
    for row in range(CHANNELS):
        pair, part = place(row)
        left = 16 + row * (_CELL + _GAP)
        centre = left + _CELL // 2
        centres.setdefault(pair, []).append(centre)
        box = f'<rect x="{left}" y="{top}" width="{_CELL}" height="44" rx="6" stroke="#222"'
        yield f'{box} fill="{_COLOURS[pair]}"/>'
        text = f'<text x="{centre}" y="{top + 28}" text-anchor="middle" fill="#111">'
        yield f"{text}{part}{pair}</text>"
    for pair, (first, second) in sorted(centres.items()):
        depth = top + 44 + 12 + pair * 11
        line = f'<path d="M{first} {top + 44} V{depth} H{second} V{top + 44}" fill="none"'
        yield f'{line} stroke="{_COLOURS[pair]}" stroke-width="3"/>'

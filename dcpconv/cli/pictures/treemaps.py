"""What takes the room: nested rectangles as large as the bytes that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dcpconv.core.catalog import Catalog
from dcpconv.core.numbers import size
from dcpconv.core.printing import printable
from dcpconv.families.keymaps import split_key

_WIDTH, _HEIGHT = 960, 420
_MOST = 300
"""Rectangles before the smallest are put together."""

VIRIDIS = (
    *("#fde725", "#b5de2b", "#6ece58", "#35b779", "#1f9e89"),
    *("#26828e", "#31688e", "#3e4989", "#482878", "#440154"),
)
"""Ten colours of matplotlib's viridis, which people who see colours differently can order."""

_DARK_FROM = 5
"""Which of them need light letters."""


class _Share(NamedTuple):
    name: str
    nbytes: int
    tensors: int


def of_catalog(catalog: Catalog) -> dict[str, Any]:
    """A rectangle for all tensors of one name, with a slice for every number in it."""
    found: dict[str, list[int]] = {}
    for key, entry in catalog.tensors.items():
        if key not in catalog.tied:
            found.setdefault(split_key(key)[0].replace("{}", "N"), []).append(entry.nbytes)
    shares = [_Share(name, sum(sizes), len(sizes)) for name, sizes in found.items() if sum(sizes)]
    shares.sort(key=lambda share: -share.nbytes)
    if len(shares) > _MOST:
        rest = shares[_MOST - 1 :]
        joined = _Share(
            f"{len(rest):,} other names",
            sum(share.nbytes for share in rest),
            sum(share.tensors for share in rest),
        )
        shares = [*shares[: _MOST - 1], joined]
    total = sum(share.nbytes for share in shares)
    boxes = _squarified([share.nbytes for share in shares], 0.0, 0.0, _WIDTH, _HEIGHT)
    colours = [min(9, at * 10 // max(1, min(len(shares), 20))) for at in range(len(shares))]
    shapes = []
    for share, (x, y, width, height), colour in zip(shares, boxes, colours, strict=True):
        percent = 100 * share.nbytes / total
        text = (
            f"{printable(share.name)}\n{size(share.nbytes)}, {percent:.1f} % of all\n"
            f"{share.tensors:,} tensor{'' if share.tensors == 1 else 's'}"
        )
        where = [round(value, 1) for value in (x, y, width, height)]
        shapes.append([*where, VIRIDIS[colour], printable(share.name), text, share.tensors])
    return {
        "kind": "treemap",
        "title": f"Bytes by name: {size(total)}",
        "hint": "A rectangle stands for all tensors of one name, and its slices for the layers and"
        " experts.  Select one with a click, or with the arrow keys and Enter.",
        "width": _WIDTH,
        "height": _HEIGHT,
        "shapes": shapes,
        "inks": ["#fff" if colour >= _DARK_FROM else "#000" for colour in colours],
        "halos": [VIRIDIS[colour] for colour in colours],
    }


_Box = tuple[float, float, float, float]


def _squarified(
    sizes: Sequence[int], x: float, y: float, width: float, height: float
) -> list[_Box]:
    """Rectangles of these areas, largest first, as near to squares as rows allow.

    Source: Bruls, Huizing, van Wijk, "Squarified Treemaps" (2000).

    >>> _squarified([6, 2], 0, 0, 4, 2)
    [(0, 0.0, 3.0, 2.0), (3.0, 0, 1.0, 2.0)]
    """
    found: list[_Box] = []
    total = sum(sizes)
    at = 0
    while at < len(sizes):
        scale = width * height / total if total else 0.0
        side = min(width, height)
        count = 1
        while at + count < len(sizes) and _worst(sizes[at : at + count + 1], side, scale) <= _worst(
            sizes[at : at + count], side, scale
        ):
            count += 1
        row = sizes[at : at + count]
        thick = sum(row) * scale / side if side else 0.0
        along = 0.0
        for value in row:
            length = value * scale / thick if thick else 0.0
            if width >= height:
                found.append((x, y + along, thick, length))
            else:
                found.append((x + along, y, length, thick))
            along += length
        if width >= height:
            x, width = x + thick, max(0.0, width - thick)
        else:
            y, height = y + thick, max(0.0, height - thick)
        total -= sum(row)
        at += count
    return found


def _worst(row: Sequence[int], side: float, scale: float) -> float:
    """The least square of a row's rectangles: longer side by shorter."""
    total = sum(row) * scale
    if not total or not side:
        return float("inf")
    thick = total / side
    lengths = [value * scale / thick for value in (row[0], row[-1])]
    return max(max(length / thick, thick / length) if length else 1e9 for length in lengths)

"""Do the chunks of a tensor hold every element exactly once?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

Region = tuple[tuple[int, ...], tuple[int, ...]]
"""``(offsets, sizes)``, in elements."""

_AT_MOST = 3
"""Overlaps named per tensor: a hostile file can hold a quadratic number of them."""


def inspect_boxes(shape: tuple[int, ...], boxes: Sequence[Region]) -> tuple[str, ...]:
    """What keeps ``boxes`` from covering ``shape`` exactly once; empty if nothing does.

    Fast where boxes do not overlap: a sweep along the dim with most distinct offsets.

    Args:
        shape: Of the tensor; ``()`` is one element.
        boxes: Each with as many dims as ``shape``.

    >>> inspect_boxes((8, 4), [((0, 0), (2, 4)), ((6, 0), (2, 4))])
    ('nothing is stored for [2:6, 0:4] of [8, 4]',)
    >>> inspect_boxes((8,), [((0,), (5,)), ((4,), (4,))])
    ('[0:5] and [4:8] both hold [4:5] of [8]',)
    """
    if len(boxes) == 1 and boxes[0] == ((0,) * len(shape), shape):
        return ()
    of = f"of {list(shape)}"
    outside = [
        f"{_text(_spans(box))} reaches outside {list(shape)}"
        for box in boxes
        if any(
            offset + size > length
            for offset, size, length in zip(box[0], box[1], shape, strict=True)
        )
    ]
    if outside:
        return tuple(outside)
    solid = [_spans(box) for box in boxes if 0 not in box[1]]
    problems = [
        f"{_text(one)} and {_text(other)} both hold {_text(_intersection(one, other))} {of}"
        for one, other in _overlaps(solid)
    ]
    stored = sum(math.prod(stop - start for start, stop in spans) for spans in solid)
    if problems or stored != math.prod(shape):
        gap = _first_gap(solid, shape)
        if gap is not None:
            problems.append(f"nothing is stored for {_text(gap)} {of}")
    return tuple(problems)


_Spans = tuple[tuple[int, int], ...]


def _spans(box: Region) -> _Spans:
    return tuple((offset, offset + size) for offset, size in zip(*box, strict=True))


def _text(spans: _Spans) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in spans) + "]"


def _intersection(one: _Spans, other: _Spans) -> _Spans:
    return tuple(
        (max(start, start_), min(stop, stop_))
        for (start, stop), (start_, stop_) in zip(one, other, strict=True)
    )


def _overlaps(boxes: Sequence[_Spans]) -> list[tuple[_Spans, _Spans]]:
    if len(boxes) < 2:
        return []
    if not boxes[0]:
        return [(boxes[0], boxes[1])]  # 0-d: every box is the one element
    dim = max(range(len(boxes[0])), key=lambda dim: len({box[dim][0] for box in boxes}))
    found: list[tuple[_Spans, _Spans]] = []
    active: list[_Spans] = []
    for box in sorted(boxes, key=lambda box: (box[dim][0], box)):
        start = box[dim][0]
        active = [other for other in active if other[dim][1] > start]
        for other in active:
            if all(low < high for low, high in _intersection(other, box)):
                found.append((other, box))
                if len(found) == _AT_MOST:
                    return found
        active.append(box)
    return found


def _first_gap(boxes: Sequence[_Spans], shape: tuple[int, ...]) -> _Spans | None:
    """The first region, in C order, that no box covers."""
    if not shape:
        return None if boxes else ()
    for span, members in _slabs(boxes, shape[0]):
        rest = _first_gap([box[1:] for box in members], shape[1:]) if members else None
        if rest is not None:
            return (span, *rest)
        if not members:
            return (span, *((0, length) for length in shape[1:]))
    return None


def _slabs(
    boxes: Sequence[_Spans], length: int
) -> Iterator[tuple[tuple[int, int], Sequence[_Spans]]]:
    """The first dim cut wherever a box begins or ends, and the boxes that span each piece."""
    cuts = sorted({0, length, *(edge for box in boxes for edge in box[0])})
    waiting = sorted(boxes, key=lambda box: box[0][0], reverse=True)
    active: list[_Spans] = []
    for start, stop in pairwise(cuts):
        active = [box for box in active if box[0][1] > start]
        while waiting and waiting[-1][0][0] == start:
            active.append(waiting.pop())
        yield (start, stop), active

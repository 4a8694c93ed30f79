"""Cut a result into pieces that several processes write, and deal them out.

Where the cuts are follows from the outline alone, and not from the number of processes: another
run, with more or fewer of them, can go on with the pieces that are left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dcpconv.core.outline import Fill, OutFile, Outline
from dcpconv.engine.threads import Stint

SMALLEST = 64 << 20
"""Bytes of a piece at least, unless its file is shorter: far more than a disk or a file server
needs to be fast."""

STEP = 1 << 30
"""Bytes that a process writes before it syncs them and notes that they are done: what a killed one
has to do again at most."""

_COPIED, _RELABELLED, _CAST, _MERGED, _SCALED = 4, 5, 6, 32, 240
"""What a byte of the result costs, by what happens to it: CPU time on one core, of which 0.3 ns for
a plain copy, 2.4 ns for LoRA of rank 16, 18 ns for fp8 in blocks of 128 by 128."""

_SHARED = 16
"""A byte whose block is shared with the source costs this much less than a copied one, or more:
about what opening, syncing and the ends of a run cost."""


@dataclass(frozen=True, slots=True)
class OutPiece:
    """A range of bytes of one file of the result.

    Attributes:
        file: Index in ``Outline.files``.
        start: First byte.
        stop: End.
        payload: Bytes of payloads that have parts in it, as progress counts them.
        cost: Compared with other pieces.
    """

    file: int
    start: int
    stop: int
    payload: int
    cost: int


def cut(outline: Outline, *, border: int, smallest: int, whole: bool) -> tuple[OutPiece, ...]:
    """Every byte of a result in one piece, in order.

    Args:
        outline: The result.
        border: No two pieces of a file meet at anything but a multiple of this many bytes: a page,
            or the stripe of a parallel file system.
        smallest: Bytes of a piece at least, unless its file is shorter.
        whole: One piece for every file, where a file can only be written by one process.
    """
    return tuple(
        piece
        for number, file in enumerate(outline.files)
        for piece in pieces_of(
            number, file, smallest=file.nbytes if whole else smallest, border=border
        )
    )


def deal(
    pieces: Sequence[OutPiece], left: Sequence[int], of: int, *, reflinks: bool
) -> tuple[tuple[int, ...], ...]:
    """Indices of the pieces that each process writes: neighbours, as costly as anybody else's.

    Args:
        pieces: All pieces of the result.
        left: Indices of those that are still to be written.
        of: Processes.
        reflinks: Whether copies share their blocks with the source.

    >>> pieces = [OutPiece(0, at, at + 1, 1, cost) for at, cost in enumerate((9, 30, 10, 10, 10))]
    >>> deal(pieces, (1, 2, 3, 4), 2, reflinks=False)
    ((1,), (2, 3, 4))
    """
    costs = [_cost(pieces[index], reflinks=reflinks) for index in left]
    total = sum(costs)
    shares: list[list[int]] = [[] for _ in range(of)]
    before = 0
    for index, cost in zip(left, costs, strict=True):
        shares[min(of - 1, (2 * before + cost) * of // (2 * total))].append(index)
        before += cost
    return tuple(map(tuple, shares))


def steps(
    outline: Outline, pieces: Sequence[OutPiece], mine: Iterable[int], *, nbytes: int
) -> Iterator[tuple[tuple[int, ...], tuple[Stint, ...]]]:
    """A process's pieces in the order of writing, up to ``nbytes`` at a time.

    Yields:
        Indices of the pieces, and the ranges that they make.
    """
    some: list[int] = []
    held = 0
    for index in mine:
        length = pieces[index].stop - pieces[index].start
        if some and held + length > nbytes:
            yield tuple(some), _stints(outline, [pieces[index] for index in some])
            some, held = [], 0
        some.append(index)
        held += length
    if some:
        yield tuple(some), _stints(outline, [pieces[index] for index in some])


def _stints(outline: Outline, pieces: Iterable[OutPiece]) -> tuple[Stint, ...]:
    joined: list[tuple[int, int, int]] = []
    for piece in pieces:
        if joined and joined[-1][0] == piece.file and joined[-1][2] == piece.start:
            joined[-1] = (piece.file, joined[-1][1], piece.stop)
        else:
            joined.append((piece.file, piece.start, piece.stop))
    return tuple((outline.files[file], (start, stop)) for file, start, stop in joined)


def _cost(piece: OutPiece, *, reflinks: bool) -> int:
    nbytes = piece.stop - piece.start
    # What is only copied costs the same per byte, and is all that can be shared.
    shared = reflinks and piece.cost <= _COPIED * nbytes
    return max(1, piece.cost // _SHARED if shared else piece.cost)


def pieces_of(number: int, file: OutFile, *, smallest: int, border: int) -> Iterator[OutPiece]:
    """The pieces of one file, in order.

    Args:
        number: Its index.
        file: The file.
        smallest: As in ``cut``.
        border: Likewise.
    """
    payloads = sorted(file.payloads, key=lambda item: item[0])
    cuts = [*_cuts(file, payloads, smallest, border), file.nbytes]
    first = 0
    start = 0
    for stop in cuts:
        payload = weighed = 0
        while first < len(payloads) and _end(payloads[first]) <= start:
            first += 1
        for offset, fill in payloads[first:]:
            if offset >= stop:
                break
            inside = min(stop, offset + fill.nbytes) - max(start, offset)
            if inside > 0 and fill.data is None:
                payload += inside
                weighed += inside * _weight(fill)
        yield OutPiece(number, start, stop, payload, weighed + _COPIED * (stop - start - payload))
        start = stop


def _cuts(
    file: OutFile, payloads: Sequence[tuple[int, Fill]], smallest: int, border: int
) -> Iterator[int]:
    first, start = 0, 0
    while True:
        at = -(-(start + smallest) // border) * border
        while first < len(payloads) and payloads[first][0] < at:
            offset, fill = payloads[first]
            end = _end(payloads[first])
            if end > at:
                if (at - offset) % fill.target_dtype.itemsize == 0:
                    break
                at = -(-end // border) * border  # no border lies between two of its elements
            first += 1
        if file.nbytes - at < max(1, smallest):
            return
        yield at
        start = at


def _end(payload: tuple[int, Fill]) -> int:
    return payload[0] + payload[1].nbytes


def _weight(fill: Fill) -> int:
    if fill.changes:
        return _MERGED
    if fill.scales:
        return _SCALED
    if fill.is_cast:
        return _CAST
    return _COPIED if all(part.is_contiguous for part in fill.parts) else _RELABELLED

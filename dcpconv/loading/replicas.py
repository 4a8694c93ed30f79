"""Who holds the same regions as this rank, told by digests, and how they share out the reading.

Ranks do not list their regions to each other.  Regions whose keys differ in numbers alone (layers,
experts) are placed alike, so each rank takes them together as one lot and tells the others the
lot's digest: a few hundred bytes for a model of any size.  Ranks with equal digests hold equal
regions, whether data parallelism, HSDP, norms beside tensor parallelism or a stage of a pipeline is
the reason, and whichever mesh, or none, says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from dcpconv.loading.regions import Wish

TILE = 6 << 20
"""Bytes that travel at a time: below about that, a broadcast costs its latency (145 us on NCCL over
nodes) and not its bytes."""

_ALIGNED = 16
"""Bytes that pieces of a tile begin at multiples of: every element type can be looked at there."""

_NUMBER = re.compile(r"\d+")

Sharing = Literal["all", "host", "once", "rank0"]
"""Which ranks read a region that several hold: all of them; one on every host; one of them; rank 0,
which reads also what it does not hold."""


@dataclass(frozen=True, slots=True)
class Lot:
    """Regions of keys that differ in numbers alone, as a rank tells of them.

    Attributes:
        digest: Of all regions.
        nbytes: Bytes to read for them.
    """

    digest: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that hold some regions all alike.

    Attributes:
        ranks: In order.
        lots: Names of the lots.
        nbytes: Bytes of one copy.
    """

    ranks: tuple[int, ...]
    lots: tuple[str, ...]
    nbytes: int


def lot_of(key: str) -> str:
    """The lot that a key belongs to.

    >>> lot_of("layers.12.experts.3.w1.weight")
    'layers.#.experts.#.w#.weight'
    """
    return _NUMBER.sub("#", key)


def in_lots(wishes: Iterable[Wish]) -> dict[str, list[Wish]]:
    """Regions by the lot that their keys belong to."""
    found: dict[str, list[Wish]] = {}
    for wish in wishes:
        found.setdefault(lot_of(wish.key), []).append(wish)
    return found


def lots_of(held: Mapping[str, Iterable[Wish]], nbytes: Callable[[Wish], int]) -> dict[str, Lot]:
    """What a rank tells of the regions that it holds.

    Args:
        held: Its regions, each once, by lot.
        nbytes: Bytes to read for one.
    """
    return {name: _lot(wishes, nbytes) for name, wishes in held.items()}


def _lot(wishes: Iterable[Wish], nbytes: Callable[[Wish], int]) -> Lot:
    lines, total = list[str](), 0
    for one in wishes:
        lines.append(f"{one.key} {one.offsets} {one.sizes} {one.start} {one.stop}")
        total += nbytes(one)
    return Lot(blake2b("\n".join(sorted(lines)).encode(), digest_size=12).digest(), total)


def groups_of(told: Sequence[Mapping[str, Lot]]) -> tuple[Group, ...]:
    """All replica groups, those of one rank included, ordered by their ranks: the same everywhere.

    Args:
        told: Lots by rank.
    """
    holders: dict[tuple[str, bytes], list[int]] = {}
    for rank, lots in enumerate(told):
        for name, lot in lots.items():
            holders.setdefault((name, lot.digest), []).append(rank)
    found: dict[tuple[int, ...], list[str]] = {}
    for (name, _), ranks in holders.items():
        found.setdefault(tuple(ranks), []).append(name)
    return tuple(
        Group(ranks, tuple(sorted(names)), sum(told[ranks[0]][name].nbytes for name in names))
        for ranks, names in sorted(found.items())
    )


def storage_reads(groups: Iterable[Group], hosts: Sequence[str]) -> tuple[int, int]:
    """``(bytes read once, bytes read once per host)``, over all ranks.

    Args:
        groups: All replica groups.
        hosts: Of every rank.
    """
    once = per_host = 0
    for group in groups:
        once += group.nbytes
        per_host += group.nbytes * len({hosts[rank] for rank in group.ranks})
    return once, per_host


def sharing(
    groups: Sequence[Group], hosts: Sequence[str], how: Sharing
) -> Iterator[tuple[Group, tuple[int, ...], tuple[int, ...]]]:
    """Every group that has something to send, who takes part, and who of them reads, in one order.

    Args:
        groups: All replica groups.
        hosts: Of every rank.
        how: Who reads.
    """
    if how == "rank0":
        for group in groups:
            if group.ranks != (0,):
                yield group, tuple(sorted({0, *group.ranks})), (0,)
    elif how == "once":
        for group in groups:
            if len(group.ranks) > 1:
                yield group, group.ranks, group.ranks
    elif how == "host":
        for group in groups:
            by_host: dict[str, list[int]] = {}
            for rank in group.ranks:
                by_host.setdefault(hosts[rank], []).append(rank)
            for ranks in by_host.values():
                if len(ranks) > 1:
                    yield group, tuple(ranks), tuple(ranks)


@dataclass(frozen=True, slots=True)
class Piece:
    """An interval of a region in a tile.

    Attributes:
        wish: The region.
        start: First element, as ``Wish.start`` counts.
        stop: End of the interval.
        at: Byte of the tile that it begins at.
    """

    wish: Wish
    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class Tile:
    """What travels at a time.

    Attributes:
        pieces: In the order of their bytes.
        nbytes: Where the last piece ends: gaps for alignment are between pieces alone.
    """

    pieces: tuple[Piece, ...]
    nbytes: int


def tiles_of(
    wishes: Iterable[Wish], itemsize: Callable[[Wish], int], *, nbytes: int
) -> Iterator[Tile]:
    """Regions as tiles of one size, the last one excepted.

    Regions are cut between rows where rows are short, so that strided memory takes them as they
    are.

    Args:
        wishes: The regions, in the order to read them.
        itemsize: Bytes per element of one.
        nbytes: Length of a tile, a multiple of what pieces are aligned to.
    """
    pieces: list[Piece] = []
    used = end = 0
    for wish in wishes:
        size = itemsize(wish)
        step = math.prod(wish.sizes[1:]) if has_short_rows(wish, size, nbytes=nbytes) else 1
        at = wish.start
        while at < wish.stop:
            fits = max(0, nbytes - used) // size // step * step
            if not fits:
                yield Tile(tuple(pieces), end)
                pieces, used = [], 0
                continue
            stop = min(wish.stop, at + fits)
            pieces.append(Piece(wish, at, stop, used))
            end = used + (stop - at) * size
            used = end + -end % _ALIGNED
            at = stop
        if used >= nbytes:
            yield Tile(tuple(pieces), end)
            pieces, used = [], 0
    if pieces:
        yield Tile(tuple(pieces), end)


def has_short_rows(wish: Wish, itemsize: int, *, nbytes: int) -> bool:
    """Whether a region is cut between rows: many of them fit into a tile."""
    return 0 < math.prod(wish.sizes[1:]) * itemsize * 8 <= nbytes


def in_turns(count: int, readers: Sequence[int]) -> list[tuple[int, int]]:
    """``(tile, its reader)`` in the order to send: each reader has tiles that follow each other in
    the files, and all readers are at work at any time.

    >>> in_turns(5, [0, 7])
    [(0, 0), (3, 7), (1, 0), (4, 7), (2, 0)]
    """
    each = -(-count // len(readers)) if count else 0
    return [
        (first * each + turn, reader)
        for turn in range(each)
        for first, reader in enumerate(readers)
        if turn < each and first * each + turn < min((first + 1) * each, count)
    ]

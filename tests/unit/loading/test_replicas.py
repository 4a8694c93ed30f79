"""Who shares what, by digests alone, against a comparison of every region of every rank."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from dcpconv.loading.regions import Wish
from dcpconv.loading.replicas import (
    TILE,
    Group,
    groups_of,
    in_lots,
    in_turns,
    lots_of,
    sharing,
    storage_reads,
    tiles_of,
)

SIZE = 2
"""Bytes per element."""


def shard(key: str, rank: int, ranks: int, rows: int = 12) -> Wish:
    """Rows of a matrix, as FSDP2 gives them to a rank."""
    each = rows // ranks
    return Wish(key, (rank * each, 0), (each, 5), 0, each * 5)


def nbytes(wish: Wish) -> int:
    return (wish.stop - wish.start) * SIZE


def hsdp(rank: int) -> list[Wish]:
    """Two replicas of shards over two ranks, and a norm that all hold."""
    layers = [shard(f"layers.{n}.w", rank % 2, 2) for n in range(3)]
    return [*layers, Wish("norm.weight", (0,), (7,), 0, 7)]


def stages(rank: int) -> list[Wish]:
    """Two stages of a pipeline, each on two ranks."""
    return [shard(f"layers.{n}.w", 0, 1) for n in range(2 * (rank // 2), 2 * (rank // 2) + 2)]


def experts(rank: int) -> list[Wish]:
    """Every rank other experts, all the same router."""
    mine = [shard(f"layers.0.experts.{n}.w", 0, 1) for n in (rank, rank + 4)]
    return [*mine, shard("layers.0.router.weight", 0, 1)]


def alone(rank: int) -> list[Wish]:
    return [shard(f"layers.{n}.w", rank, 4) for n in range(3)]


PLACEMENTS = {"hsdp": hsdp, "stages": stages, "experts": experts, "alone": alone}


def by_comparison(wishes: Sequence[Sequence[Wish]]) -> Counter[tuple[int, ...]]:
    """Bytes by the ranks that hold them."""
    holders: dict[Wish, list[int]] = {}
    for rank, some in enumerate(wishes):
        for wish in some:
            holders.setdefault(wish, []).append(rank)
    found: Counter[tuple[int, ...]] = Counter()
    for wish, ranks in holders.items():
        found[tuple(ranks)] += nbytes(wish)
    return found


@pytest.mark.parametrize("name", PLACEMENTS)
def test_digests_tell_what_comparing_all_regions_tells(name: str) -> None:
    wishes = [PLACEMENTS[name](rank) for rank in range(4)]
    random.Random(3).shuffle(wishes[2])  # ranks need not list regions in one order
    groups = groups_of([lots_of(in_lots(some), nbytes) for some in wishes])
    assert {group.ranks: group.nbytes for group in groups} == by_comparison(wishes)


def test_the_told_do_not_grow_with_layers() -> None:
    few = lots_of(in_lots(shard(f"layers.{n}.w", 0, 1) for n in range(3)), nbytes)
    many = lots_of(in_lots(shard(f"layers.{n}.w", 0, 1) for n in range(3000)), nbytes)
    assert [*few] == [*many] == ["layers.#.w"]
    assert few["layers.#.w"].digest != many["layers.#.w"].digest


GROUPS = (Group((0,), ("a",), 10), Group((0, 1, 2, 3), ("b",), 100), Group((1, 2), ("c",), 7))
HOSTS = ("x", "x", "y", "y")


def test_storage_is_asked_once_or_once_per_host() -> None:
    assert storage_reads(GROUPS, HOSTS) == (117, 10 + 200 + 14)
    assert storage_reads(GROUPS, ["x"] * 4) == (117, 117)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("all", []),
        ("once", [((0, 1, 2, 3), (0, 1, 2, 3)), ((1, 2), (1, 2))]),
        ("host", [((0, 1), (0, 1)), ((2, 3), (2, 3))]),
        ("rank0", [((0, 1, 2, 3), (0,)), ((0, 1, 2), (0,))]),
    ],
)
def test_who_reads(how: object, expected: object) -> None:
    found = [(ranks, readers) for _, ranks, readers in sharing(GROUPS, HOSTS, how)]  # type: ignore[arg-type]
    assert found == expected


@pytest.mark.parametrize("seed", range(20))
def test_tiles_hold_every_element_once_and_are_full(seed: int) -> None:
    rng = random.Random(seed)
    wishes = [
        Wish(f"k.{n}", (0, 0), (rows, columns), start, rows * columns)
        for n in range(rng.randint(1, 30))
        for rows, columns in [(rng.randint(1, 40), rng.choice([1, 3, 17, 300]))]
        for start in [rng.choice([0, rng.randrange(rows * columns)])]
    ]
    tiles = [*tiles_of(wishes, lambda _: SIZE, nbytes=1008)]
    taken: dict[str, list[tuple[int, int]]] = {}
    for tile in tiles:
        assert tile.nbytes <= 1008
        end = 0
        for piece in tile.pieces:
            assert piece.at >= end
            assert piece.at % 16 == 0
            end = piece.at + (piece.stop - piece.start) * SIZE
            taken.setdefault(piece.wish.key, []).append((piece.start, piece.stop))
        assert end == tile.nbytes  # a rank may send it from the parameter, which has no more
    for wish in wishes:
        cuts = taken[wish.key]
        assert [start for start, _ in cuts] == [wish.start, *(stop for _, stop in cuts[:-1])]
        assert cuts[-1][1] == wish.stop
    # No tile is left emptier than the next region's row would have needed.
    assert all(tile.nbytes > 1008 - 1008 // 8 - 16 - 2 * SIZE for tile in tiles[:-1])


def test_large_tiles_are_worth_a_broadcast() -> None:
    tiles = [
        *tiles_of([Wish("w", (0, 0), (4096, 4096), 0, 4096 * 4096)], lambda _: SIZE, nbytes=TILE)
    ]
    assert all(tile.nbytes == TILE for tile in tiles[:-1])
    assert TILE >= 6 << 20


@pytest.mark.parametrize("count", range(12))
@pytest.mark.parametrize("readers", [(0,), (3, 5), (0, 1, 2, 3, 4)])
def test_turns_are_fair_and_every_reader_goes_forwards(
    count: int, readers: tuple[int, ...]
) -> None:
    turns = in_turns(count, readers)
    assert sorted(number for number, _ in turns) == [*range(count)]
    by_reader: dict[int, list[int]] = {reader: [] for reader in readers}
    for number, reader in turns:
        by_reader[reader].append(number)
    for numbers in by_reader.values():
        assert numbers == [*range(numbers[0], numbers[0] + len(numbers))] if numbers else True
        assert len(numbers) <= -(-count // len(readers))

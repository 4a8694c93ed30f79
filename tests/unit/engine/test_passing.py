"""Digests of what passes through buffers: those of the same bytes read from the result."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from dcpconv.core.dtypes import BY_NAME, DType
from dcpconv.core.outline import Fill, Part
from dcpconv.engine.copying import Ladder
from dcpconv.engine.desks import Tally
from dcpconv.engine.hashing import digests, finished
from dcpconv.engine.passing import PassingDigests
from dcpconv.stores.local import Sources
from dcpconv.stores.system import SYSTEM

BF16, FP32, U8 = (BY_NAME[name] for name in ("bfloat16", "float32", "uint8"))
FILE = "a.bin"
NBYTES = 7 << 20


def fill(dtype: DType, *parts: Part) -> Fill:
    return Fill(dtype, dtype, sum(part.numel for part in parts), parts)


def run(offset: int, numel: int, target: int = 0) -> Part:
    return Part(FILE, offset, target, ((numel, 1, 1),))


ROWS, HALF, WIDTH = 8, 16, 4096
LAYOUTS = {
    "one chunk": [fill(FP32, run(64, 1000))],
    "chunks": [fill(BF16, run(128, 1_500_000))],
    "neighbours": [fill(BF16, run(0, 700_001)), fill(FP32, run(1_400_004, 500_000))],
    "fused": [
        fill(U8, run(0, 900_000), run(2_000_000, 700_000, 900_000)),
        fill(U8, run(900_000, 1_100_000)),
    ],
    # (h p two) d in the file, (h two p) d in the tensor
    "heads": [
        fill(
            FP32,
            *(
                Part(
                    FILE,
                    4 * half * WIDTH,
                    half * HALF * WIDTH,
                    (
                        (ROWS, 2 * HALF * WIDTH, 2 * HALF * WIDTH),
                        (HALF, 2 * WIDTH, WIDTH),
                        (WIDTH, 1, 1),
                    ),
                )
                for half in range(2)
            ),
        )
    ],
    "turned": [fill(BF16, Part(FILE, 0, 0, ((1100, 1, 1300), (1300, 1100, 1))))],
    "same bytes twice": [fill(BF16, run(0, 800_000)), fill(BF16, run(0, 800_000))],
    "empty": [Fill(FP32, FP32, 0, ())],
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / FILE).write_bytes(os.urandom(3 << 20) + bytes(1 << 20) + os.urandom(3 << 20))
    return tmp_path


def pieces(seed: int) -> list[tuple[int, int]]:
    """All bytes of the file in pieces of any length, in any order."""
    rng = random.Random(seed)
    found, at = [], 0
    while at < NBYTES:
        length = min(rng.choice((4096, 300_000, 1 << 20, 3 << 20)), NBYTES - at)
        found.append((at, length))
        at += length
    rng.shuffle(found)
    return found


def expected(directory: Path, fills: list[Fill]) -> list[bytes]:
    with Sources(directory) as sources:
        return digests(fills, sources=sources)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(4))
def test_pieces_in_any_order_make_the_digests_of_the_whole(
    directory: Path, layout: str, seed: int
) -> None:
    fills = LAYOUTS[layout]
    data = (directory / FILE).read_bytes()
    passing = PassingDigests(fills)
    file = passing.file(FILE)
    for offset, nbytes in pieces(seed):
        some = data[offset : offset + nbytes]
        if any(some):
            file.take(offset, some)
        else:
            file.take_zeros(offset, nbytes)

    assert passing.is_whole
    with Sources(directory / "gone") as nothing:
        assert finished(passing, sources=nothing) == expected(directory, fills)
    assert passing.nbytes == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_there_is_no_room_for_is_read(
    directory: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcpconv.engine.passing.ROOM", 1 << 20)
    fills = LAYOUTS[layout]
    data = (directory / FILE).read_bytes()
    passing = PassingDigests(fills)
    for offset, nbytes in pieces(7):
        passing.file(FILE).take(offset, data[offset : offset + nbytes])
    is_whole = passing.is_whole
    with Sources(directory) as sources:
        assert finished(passing, sources=sources, jobs=2) == expected(directory, fills)
    assert (passing.nbytes == 0) is is_whole
    assert passing.nbytes <= sum(fill.nbytes for fill in fills)


def test_a_piece_that_ends_inside_an_element_does_no_harm(directory: Path) -> None:
    fills = [fill(FP32, run(64, 1_000_000))]
    data = (directory / FILE).read_bytes()
    passing = PassingDigests(fills)
    for start, stop in ((0, 1001), (1001, 3_000_000), (3_000_000, NBYTES)):
        passing.file(FILE).take(start, data[start:stop])
    assert not passing.is_whole
    with Sources(directory) as sources:
        assert finished(passing, sources=sources) == expected(directory, fills)
    assert passing.nbytes == 1 << 20


def test_files_that_hold_no_tensor_are_let_through() -> None:
    passing = PassingDigests(LAYOUTS["one chunk"])
    passing.file("other").take(0, b"header")
    assert not passing.is_whole


def shared(source: int, target: int, source_offset: int, target_offset: int, nbytes: int) -> None:
    """A reflink as far as anybody can read."""
    os.pwrite(target, os.pread(source, nbytes, source_offset), target_offset)


@pytest.mark.parametrize("kind", ["shared", "copied", "sparse"])
def test_a_long_run_is_digested_whatever_way_it_takes(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    with source.open("wb") as written:
        written.write(os.urandom(2 << 20))
        if kind != "sparse":
            written.write(os.urandom(2 << 20))
        written.seek(4 << 20)
        written.write(os.urandom(2 << 20))
    whole = source.stat().st_size
    fills = [Fill(BF16, BF16, whole // 2, (run(0, whole // 2),))]
    passing = PassingDigests(fills)
    system = replace(SYSTEM, clone=shared) if kind == "shared" else SYSTEM
    tally = Tally()
    with (
        Sources(tmp_path, system=system) as sources,
        sources.open("source") as opened,
        (tmp_path / FILE).open("w+b") as target,
    ):
        target.truncate(whole)
        Ladder(4096, system).copy(
            opened,
            target.fileno(),
            source_offset=0,
            target_offset=0,
            nbytes=whole,
            buffer=memoryview(bytearray(1_500_000)),
            tally=tally,
            digests=passing.file(FILE),
        )

    assert (tmp_path / FILE).read_bytes() == source.read_bytes()
    assert tally.copied == 0
    assert passing.is_whole
    assert passing.nbytes == tally.reflinked == (whole if kind == "shared" else 0)
    with Sources(tmp_path) as sources:
        assert finished(passing, sources=sources) == expected(tmp_path, fills)


@pytest.mark.parametrize("layout", ["chunks", "neighbours", "fused"])
def test_pieces_in_order_need_no_room(
    directory: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcpconv.engine.passing.ROOM", 64 << 10)
    fills = LAYOUTS[layout]
    data = (directory / FILE).read_bytes()
    passing = PassingDigests(fills)
    for offset, nbytes in sorted(pieces(2)):
        passing.file(FILE).take(offset, data[offset : offset + nbytes])
    assert passing.is_whole
    assert passing.digests() == expected(directory, fills)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(3))
def test_threads_may_give_pieces_of_one_chunk(directory: Path, layout: str, seed: int) -> None:
    fills = LAYOUTS[layout]
    data = (directory / FILE).read_bytes()
    passing = PassingDigests(fills)

    def give(piece: tuple[int, int]) -> None:
        passing.file(FILE).take(piece[0], data[piece[0] : sum(piece)])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(give, pieces(seed)))
    assert passing.is_whole
    assert passing.digests() == expected(directory, fills)

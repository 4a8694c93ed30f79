"""Every fast way to move bytes against moving them one element at a time."""

from __future__ import annotations

import errno
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.outline import Fill, OutFile, Outline, Part
from dcpconv.engine import strided
from dcpconv.engine.boxes import Box, restrict
from dcpconv.engine.copying import shares_blocks
from dcpconv.engine.execute import Moved, execute, fill
from dcpconv.engine.spans import Assign
from dcpconv.stores.local import Sources
from dcpconv.stores.system import SYSTEM, System
from support.checkpoints.engine_cases import (
    INTEGERS,
    contiguous,
    elements,
    random_fill,
    random_outline,
    slow_file,
    slow_fill,
    store,
)
from support.machine.mounts import tmpfs, xfs

KIB, MIB = 1 << 10, 1 << 20
U8 = BY_NAME["uint8"]


def refuse(*_: object) -> NoReturn:
    raise OSError(errno.EOPNOTSUPP, "refused by the test")


def absent(*_: object) -> NoReturn:
    raise AttributeError("no such call")


RUNGS = [
    pytest.param(SYSTEM, id="whatever-works"),
    pytest.param(replace(SYSTEM, clone=refuse), id="kernel-copy"),
    pytest.param(replace(SYSTEM, clone=refuse, copy=refuse), id="read-and-write"),
    pytest.param(replace(SYSTEM, clone=refuse, copy=absent), id="no-copy-file-range"),
    pytest.param(replace(SYSTEM, clone=refuse, copy=lambda *_: 0), id="copy-that-does-nothing"),
    pytest.param(
        replace(
            SYSTEM,
            clone=refuse,
            copy=lambda a, b, c, d, n: os.copy_file_range(a, b, max(1, n // 3), c, d),
            preadv=lambda fd, views, offset: os.preadv(
                fd, [views[0][: len(views[0]) // 2 + 1]], offset
            ),
            pwrite=lambda fd, data, offset: os.pwrite(fd, memoryview(data)[:4001], offset),
        ),
        id="everything-comes-short",
    ),
]


@pytest.mark.parametrize("itemsize", INTEGERS)
@pytest.mark.parametrize("seed", range(60))
def test_restrict_keeps_exactly_the_elements_of_the_interval(seed: int, itemsize: int) -> None:
    rng = random.Random(seed)
    box, _ = random_fill(rng, dtype=INTEGERS[itemsize])
    start = rng.randint(0, box.numel)
    stop = rng.randint(start, box.numel)
    for part in box.parts:
        pieces = restrict(part, start, stop, itemsize=itemsize)

        every = elements(part, itemsize)
        found: dict[int, int] = {}
        for piece in pieces:
            some = elements(piece, itemsize)
            assert not found.keys() & some.keys()
            found |= some
        assert found == {t: s for t, s in every.items() if start <= t < stop}
        assert all(count > 1 for piece in pieces for count, _, _ in piece.loops)


@pytest.mark.parametrize("itemsize", INTEGERS)
@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("assign", [None, strided.assign], ids=["each-run", "at-once"])
def test_a_box_read_in_tiles_is_the_box(
    tmp_path: Path, seed: int, itemsize: int, assign: Assign | None
) -> None:
    rng = random.Random(seed)
    box, files = random_fill(rng, dtype=INTEGERS[itemsize], widest=rng.choice([6, 6, 150]))
    into = bytearray(rng.randbytes(box.nbytes))
    view = memoryview(into)
    room = memoryview(bytearray(4096))
    with Sources(store(tmp_path, files)) as sources:
        prepared = Box(box)
        step = prepared.tile(rng.choice([16, 100, 5000]))
        for start in range(0, box.numel, step):
            stop = min(start + step, box.numel)
            tile = view[start * itemsize : stop * itemsize]
            prepared.read(
                start, stop, sources=sources, into=tile, scratch=lambda: room, assign=assign
            )

    assert into == slow_fill(box, files)


@pytest.mark.parametrize("seed", range(20))
def test_fill_answers_the_whole_box(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    box, files = random_fill(rng, dtype=INTEGERS[rng.choice([1, 2, 4, 8])], widest=1000)
    into = bytearray(box.nbytes)
    fill(box, source=store(tmp_path, files), into=memoryview(into))

    assert into == slow_fill(box, files)


@pytest.mark.parametrize("system", RUNGS)
@pytest.mark.parametrize("seed", range(8))
def test_every_rung_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, system: System
) -> None:
    monkeypatch.setattr("dcpconv.engine.units.UNIT", 64 * KIB)
    outline, files = random_outline(random.Random(seed))
    source = store(tmp_path / "source", files)
    target = tmp_path / "target"
    target.mkdir()
    done: list[int] = []
    jobs = 1 + seed % 3
    budget = jobs * 48 * KIB
    moved = execute(
        outline,
        source=source,
        target=target,
        jobs=jobs,
        budget=budget,
        progress=done.append,
        system=system,
    )

    for file in outline.files:
        assert (target / file.name).read_bytes() == slow_file(file, files), file.name
    payload = sum(fill.nbytes for file in outline.files for _, fill in file.payloads)
    assert sum(done) == payload == total(moved)
    assert moved.peak_buffer <= budget


def total(moved: Moved) -> int:
    return (
        moved.reflinked
        + moved.copied
        + moved.buffered
        + moved.relabelled
        + moved.cast
        + moved.holes
    )


def free(directory: Path) -> int:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    stat = os.statvfs(directory)
    return stat.f_bfree * stat.f_frsize


def test_reflinks_share_blocks_with_the_source(tmp_path: Path) -> None:
    with xfs(tmp_path / "xfs") as disk:
        data = random.Random(0).randbytes(16 * MIB + 999)
        source = store(disk / "source", {"a": data})
        numel = 16 * MIB - 100
        payload = Fill(U8, U8, numel, (contiguous("a", 77, numel),))
        offset = 4096 + 77
        file = OutFile("o", offset + numel + 5, ((0, b"header"),), ((offset, payload),))
        target = disk / "target"
        target.mkdir()
        assert shares_blocks(source / "a", target)
        assert not shares_blocks(source / "a", tmp_path)
        before = free(disk)
        moved = execute(Outline((file,)), source=source, target=target)
        used = before - free(disk)

        assert (target / "o").read_bytes() == slow_file(file, {"a": data})
    assert moved.reflinked > 15 * MIB
    assert moved.buffered < 2 * 4096
    assert used < MIB


@pytest.mark.parametrize("seed", range(4))
def test_random_outlines_on_a_file_system_with_reflinks(tmp_path: Path, seed: int) -> None:
    with xfs(tmp_path / "xfs") as disk:
        outline, files = random_outline(random.Random(seed))
        target = disk / "target"
        target.mkdir()
        execute(outline, source=store(disk / "source", files), target=target, jobs=2)
        for file in outline.files:
            assert (target / file.name).read_bytes() == slow_file(file, files), file.name


@pytest.mark.parametrize("seed", range(4))
def test_random_outlines_across_devices(tmp_path: Path, seed: int) -> None:
    with tmpfs(tmp_path / "memory", "64m") as memory:
        outline, files = random_outline(random.Random(seed))
        target = tmp_path / "target"
        target.mkdir()
        moved = execute(outline, source=store(memory / "source", files), target=target)

        assert moved.reflinked == 0
        for file in outline.files:
            assert (target / file.name).read_bytes() == slow_file(file, files), file.name


@pytest.mark.parametrize("system", RUNGS)
def test_sparse_sources_stay_sparse(tmp_path: Path, system: System) -> None:
    rows, columns = 2048, 4096
    source = tmp_path / "source"
    source.mkdir()
    with (source / "a").open("wb") as stored:
        stored.truncate(2 * rows * columns)
        stored.seek(3 * MIB)
        stored.write(b"tensor")
    if (source / "a").stat().st_blocks * 512 > MIB:
        pytest.skip("this file system has no holes")
    half = rows * columns
    relabel = ((2, half // 2, columns), (rows // 2, columns, 2 * columns), (columns, 1, 1))
    payloads = (
        (0, Fill(U8, U8, half, (contiguous("a", 0, half),))),
        (half, Fill(U8, U8, half, (Part("a", half, 0, relabel),))),
    )
    file = OutFile("o", 2 * half, (), payloads)
    target = tmp_path / "target"
    target.mkdir()
    moved = execute(Outline((file,)), source=source, target=target, system=system)

    assert (target / "o").read_bytes() == slow_file(
        OutFile("o", 2 * half, (), payloads[:1]), {"a": (source / "a").read_bytes()}
    )
    assert (target / "o").stat().st_blocks * 512 < MIB
    assert moved.holes + moved.reflinked > 2 * half - MIB

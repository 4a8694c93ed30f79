"""Source files and the ladder: what is tried, what is remembered, and who is blamed."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from dcpconv.core.errors import DcpconvError, FormatError, NoSpaceError
from dcpconv.engine.copying import Ladder, write, write_error
from dcpconv.engine.desks import Tally
from dcpconv.stores.local import Sources
from dcpconv.stores.system import SYSTEM, System

BLOCK = 4096


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def raising(number: int, calls: list[int]) -> Callable[..., NoReturn]:
    def call(*_: object) -> NoReturn:
        calls.append(number)
        raise OSError(number, os.strerror(number))

    return call


def copy(directory: Path, ladder: Ladder, *, times: int = 1, nbytes: int = 3 * BLOCK) -> Tally:
    data = os.urandom(nbytes)
    (directory / "source").write_bytes(data)
    tally = Tally()
    with Sources(directory, system=ladder.system) as sources, sources.open("source") as source:
        for _ in range(times):
            with (directory / "target").open("w+b") as target:
                target.truncate(nbytes)
                ladder.copy(
                    source,
                    target.fileno(),
                    source_offset=0,
                    target_offset=0,
                    nbytes=nbytes,
                    buffer=memoryview(bytearray(BLOCK)),
                    tally=tally,
                )
            assert (directory / "target").read_bytes() == data
    return tally


REFUSALS = ["EXDEV", "EINVAL", "EOPNOTSUPP", "ENOTTY", "ENOSYS", "EPERM", "EBADF", "ETXTBSY"]


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_rung_is_left_for_the_next_and_not_tried_again(tmp_path: Path, name: str) -> None:
    number = getattr(errno, name)
    clones: list[int] = []
    copies: list[int] = []
    system = replace(SYSTEM, clone=raising(number, clones), copy=raising(number, copies))
    tally = copy(tmp_path, Ladder(BLOCK, system), times=5)

    assert (len(clones), len(copies)) == (1, 1)
    assert tally.buffered == 5 * 3 * BLOCK


def test_an_error_that_is_no_refusal_is_tried_again_next_time(tmp_path: Path) -> None:
    clones: list[int] = []
    copies: list[int] = []
    system = replace(SYSTEM, clone=raising(errno.EIO, clones), copy=raising(errno.EIO, copies))
    copy(tmp_path, Ladder(BLOCK, system), times=2)

    assert (len(clones), len(copies)) == (2, 2)


@pytest.mark.parametrize("rung", ["clone", "copy"])
def test_a_full_disk_stops_the_climb(tmp_path: Path, rung: str) -> None:
    refused = raising(errno.EOPNOTSUPP, [])
    system = replace(SYSTEM, clone=refused, copy=refused)
    full = raising(errno.ENOSPC, [])
    system = replace(system, clone=full) if rung == "clone" else replace(system, copy=full)
    with pytest.raises(OSError, match="No space") as caught:
        copy(tmp_path, Ladder(BLOCK, system))
    assert caught.value.errno == errno.ENOSPC


def test_runs_off_the_blocks_are_not_offered_for_cloning(tmp_path: Path) -> None:
    clones: list[int] = []
    system = replace(SYSTEM, clone=raising(errno.EINVAL, clones))
    ladder = Ladder(BLOCK, system)
    copy(tmp_path, ladder, nbytes=3 * BLOCK + 1)

    assert not clones
    assert not ladder.refused


def test_a_shortened_source_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(100))
    with (
        Sources(tmp_path) as sources,
        sources.open("a.safetensors") as source,
        pytest.raises(FormatError, match="expected  130 bytes, found 100") as caught,
    ):
        source.read(50, [memoryview(bytearray(80))], 80)
    assert ("file", tmp_path / "a.safetensors") in caught.value.facts


def test_a_disk_that_cannot_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    system = replace(SYSTEM, preadv=raising(errno.EIO, []))
    with (
        Sources(tmp_path, system=system) as sources,
        sources.open("a") as source,
        pytest.raises(FormatError, match="Input/output error"),
    ):
        source.read(0, [memoryview(bytearray(8))], 8)


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with (
        Sources(tmp_path) as sources,
        pytest.raises(FormatError, match=r"absent\.safetensors"),
        sources.open("absent.safetensors"),
    ):
        pass


def test_reading_into_many_views_survives_short_reads(tmp_path: Path) -> None:
    data = os.urandom(1000)
    (tmp_path / "a").write_bytes(data)
    short = replace(SYSTEM, preadv=lambda fd, views, at: os.preadv(fd, [views[0][:7]], at))
    into = bytearray(990)
    view = memoryview(into)
    with Sources(tmp_path, system=short) as sources, sources.open("a") as source:
        source.read(10, [view[:1], view[1:500], view[500:]], 990)
    assert into == data[10:]


def test_files_stay_open_up_to_the_limit_and_lent_ones_beyond(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).write_bytes(name.encode())
    before = open_files()
    with Sources(tmp_path, limit=2) as sources:
        with sources.open("a") as a, sources.open("b"), sources.open("c"):
            assert os.pread(a.fd, 1, 0) == b"a"
            assert open_files() == before + 3
        with sources.open("d"), sources.open("a") as again:
            assert os.pread(again.fd, 1, 0) == b"a"
        assert open_files() == before + 2
    assert open_files() == before


def test_threads_share_few_files_without_reading_the_wrong_one(tmp_path: Path) -> None:
    names = [str(number) for number in range(8)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 100)
    wrong: list[str] = []

    def read(sources: Sources, seed: int) -> None:
        for turn in range(200):
            name = names[(turn * 7 + seed) % len(names)]
            with sources.open(name) as source:
                if os.pread(source.fd, 1, turn % 100) != name.encode():
                    wrong.append(name)

    with Sources(tmp_path, limit=2) as sources:
        threads = [threading.Thread(target=read, args=(sources, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_holes_are_found_and_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(8 << 20)
        file.seek(3 << 20)
        file.write(b"x" * 4096)
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("this file system has no holes")
    system = System(clone=raising(errno.EOPNOTSUPP, []))
    tally = Tally()
    with (
        Sources(tmp_path) as sources,
        sources.open("sparse") as source,
        (tmp_path / "target").open("w+b") as target,
    ):
        assert source.is_hole(0, 1 << 20)
        assert not source.is_hole(3 << 20, 10)
        assert source.is_hole(7 << 20, 1 << 20)
        target.truncate(8 << 20)
        Ladder(BLOCK, system).copy(
            source,
            target.fileno(),
            source_offset=0,
            target_offset=0,
            nbytes=8 << 20,
            buffer=memoryview(bytearray(BLOCK)),
            tally=tally,
        )
    assert (tmp_path / "target").read_bytes() == path.read_bytes()
    assert (tmp_path / "target").stat().st_blocks * 512 < 1 << 20
    assert tally.copied + tally.buffered < 1 << 20
    assert tally.holes > 7 << 20


def test_a_write_that_comes_short_goes_on(tmp_path: Path) -> None:
    system = replace(SYSTEM, pwrite=lambda fd, data, at: os.pwrite(fd, memoryview(data)[:3], at))
    with (tmp_path / "a").open("w+b") as file:
        write(file.fileno(), b"0123456789", 2, system=system)
    assert (tmp_path / "a").read_bytes() == b"\0\x000123456789"


WRITE_ERRORS = [
    pytest.param(errno.ENOSPC, NoSpaceError, "free some space", id="full"),
    pytest.param(errno.EDQUOT, NoSpaceError, "free some space", id="quota"),
    pytest.param(errno.EFBIG, NoSpaceError, "smaller files", id="file-too-long"),
    pytest.param(errno.EIO, DcpconvError, "the source is untouched", id="disk"),
]


@pytest.mark.parametrize(("number", "kind", "hint"), WRITE_ERRORS)
def test_a_failed_write_says_what_to_do(number: int, kind: type[DcpconvError], hint: str) -> None:
    error = write_error(OSError(number, os.strerror(number)), Path("out/a.safetensors"))

    assert type(error) is kind
    assert "out/a.safetensors" in str(error)
    assert hint in str(error)


def test_a_disk_that_cannot_reserve_is_asked_once(tmp_path: Path) -> None:
    calls: list[int] = []
    no_clone, no_reserve = raising(errno.EOPNOTSUPP, []), raising(errno.EOPNOTSUPP, calls)
    ladder = Ladder(BLOCK, replace(SYSTEM, clone=no_clone, reserve=no_reserve))
    tally = copy(tmp_path, ladder, times=3, nbytes=1 << 20)
    assert tally.copied == 3 << 20
    assert calls == [errno.EOPNOTSUPP]


def test_a_disk_that_has_nothing_to_reserve_is_full(tmp_path: Path) -> None:
    no_clone, full = raising(errno.EOPNOTSUPP, []), raising(errno.ENOSPC, [])
    ladder = Ladder(BLOCK, replace(SYSTEM, clone=no_clone, reserve=full))
    with pytest.raises(OSError, match="No space left"):
        copy(tmp_path, ladder, nbytes=1 << 20)


def test_what_is_reserved_lies_where_the_run_goes(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    def reserve(fd: int, offset: int, nbytes: int) -> None:
        SYSTEM.reserve(fd, offset, nbytes)
        asked.append((offset, nbytes))

    system = replace(SYSTEM, clone=raising(errno.EOPNOTSUPP, []), reserve=reserve)
    copy(tmp_path, Ladder(BLOCK, system), nbytes=(1 << 20) + 1)
    assert asked == [(0, (1 << 20) + 1)]

"""A rank that fails before it could come ends the others with the same error."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from dcpconv import convert
from dcpconv.conversion.report import ConversionReport
from dcpconv.core.errors import DcpconvError, NoSpaceError
from dcpconv.engine.publish import FAULTS, staging_directory
from dcpconv.engine.worlds import early
from dcpconv.engine.worlds.faults import GoneRankError
from dcpconv.engine.worlds.meeting import Meeting
from dcpconv.engine.worlds.seats import Seat
from support.checkpoints.check_cases import llama_shapes, write_hf
from support.worlds.conversions import in_threads, make_small, until


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "source", llama_shapes(), files=2)


def age(target: Path, rank: int) -> None:
    """Make the fault of a rank, if it has left one, one of an earlier run."""
    file = staging_directory(target) / FAULTS / str(rank)
    if file.exists():
        before = file.stat().st_mtime_ns - int(2e9 * early.GRACE)
        os.utime(file, ns=(before, before))


FAILS: dict[str, dict[str, Any]] = {
    "source-missing": {"source": "/nowhere/at/all"},
    "type-unknown": {"dtype": "fp12"},
    "family-unknown": {"to": "nobody"},
    "engine": {"engine": "torch"},
}


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("name", FAILS)
def test_all_end_with_the_error_of_the_one_that_failed(
    name: str, rank: int, source: Path, tmp_path: Path
) -> None:
    alone = in_threads(source, tmp_path / "alone", 1, each={0: FAILS[name]})[0]
    found = in_threads(source, tmp_path / "new/out", 3, form="dcp", each={rank: FAILS[name]})
    for error in found:
        assert isinstance(error, DcpconvError)
        assert not isinstance(error, GoneRankError)
        if name != "engine":
            assert isinstance(alone, DcpconvError)
            assert error.headline == alone.headline
    for other in set(range(3)) - {rank}:
        assert dict(found[other].facts)["rank"].startswith(f"{rank} ")  # type: ignore[union-attr]
    assert not (tmp_path / "new/out").exists()
    for one in range(3):
        age(tmp_path / "new/out", one)
    found = in_threads(source, tmp_path / "new/out", 3, form="dcp")
    assert all(isinstance(one, ConversionReport) for one in found), found
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_what_no_one_of_us_expects_is_told_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("what is this")

    monkeypatch.setattr("dcpconv.conversion.worlds.planning.check_space", fail)
    monkeypatch.setattr("dcpconv.conversion.worlds.working.prepare", fail)
    found = in_threads(source, tmp_path / "out", 2, form="dcp")
    assert isinstance(found[0], ZeroDivisionError)
    assert "rank 0 failed: ZeroDivisionError('what is this')" in str(found[1])


def test_a_full_disk_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise NoSpaceError("the result will not fit", [("needed", "much")])

    monkeypatch.setattr("dcpconv.conversion.worlds.planning.check_space", full)
    found = in_threads(source, tmp_path / "out", 3, form="dcp")
    assert [type(error) for error in found] == [NoSpaceError] * 3


def test_one_that_failed_before_rank_0_started(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DcpconvError, match="cannot cast"):
        convert(source, tmp_path / "out", dtype="fp12", rank=1, of=2)
    with pytest.raises(DcpconvError, match="cannot cast"):
        convert(source, tmp_path / "out", rank=0, of=2)
    # Rank 0 has taken note, and leaves its own word for those that come yet.
    with pytest.raises(DcpconvError, match="cannot cast"):
        convert(source, tmp_path / "out", rank=1, of=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_old_fault_is_of_another_run(rank: int, source: Path, tmp_path: Path) -> None:
    with pytest.raises(DcpconvError, match="cannot cast"):
        convert(source, tmp_path / "out", dtype="fp12", rank=rank, of=2)
    age(tmp_path / "out", rank)
    has_looked = threading.Event()  # the other rank starts first, and finds the old fault
    found: list[Any] = []

    def other() -> None:
        with early.telling(tmp_path / "out", Seat(1 - rank, 2)):
            has_looked.set()
        found.append(convert(source, tmp_path / "out", form="dcp", rank=1 - rank, of=2))

    thread = threading.Thread(target=other)
    thread.start()
    assert has_looked.wait(60)
    report = convert(source, tmp_path / "out", form="dcp", rank=rank, of=2)
    thread.join()
    assert isinstance(report, ConversionReport)
    assert [type(one) for one in found] == [ConversionReport]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_what_the_meeting_tells_is_not_told_twice(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(meeting: Meeting, *_: object) -> None:
        until(lambda: meeting.beat_of(1 - meeting.seat.rank) is not None)  # both have come
        raise NoSpaceError("the disk filled up", [("file", "x")])

    monkeypatch.setattr(Meeting, "note_done", full)
    found = in_threads(source, tmp_path / "out", 2, form="dcp")
    assert [type(error) for error in found] == [NoSpaceError] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_target_that_exists_gets_nothing_beside_it(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", form="dcp")
    in_threads(source, tmp_path / "out", 2, form="dcp")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]

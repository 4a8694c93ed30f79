"""Who publishes where rank 0 has ended after its share: one of the others, whoever ends last."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from dcpconv import convert
from dcpconv.conversion.report import ConversionReport
from dcpconv.conversion.worlds.leading import Lead
from dcpconv.core.errors import TargetExistsError
from dcpconv.engine.publish import SHARES, Staging, inherited, staging, staging_directory
from dcpconv.engine.worlds.faults import GoneRankError
from dcpconv.engine.worlds.meeting import Meeting, State, read_beat
from dcpconv.engine.worlds.watching import Watch
from support.checkpoints.check_cases import llama_shapes, write_hf
from support.worlds.conversions import in_threads, make_small, tree


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("hf") / "source", llama_shapes(), files=2)


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, bytes]:
    """What one process makes of it."""
    convert(source, source.parent / "whole", form="dcp")
    return tree(source.parent / "whole")


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each thread has made a result visible."""
    found: Counter[str] = Counter()
    publish = Staging.publish

    def counted(stage: Staging, *args: Any, **options: Any) -> None:
        publish(stage, *args, **options)
        found[threading.current_thread().name] += 1

    monkeypatch.setattr(Staging, "publish", counted)
    return found


def leave(monkeypatch: pytest.MonkeyPatch, *ranks: int) -> None:
    """These ranks are told to end as soon as their shares are done."""
    wait = Watch.wait

    def told(watch: Watch) -> dict[str, Any] | None:
        if watch.meeting.seat.rank in ranks:
            raise KeyboardInterrupt(signal.SIGTERM)
        return wait(watch)

    monkeypatch.setattr(Watch, "wait", told)


def finish_in_order(monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]) -> None:
    """Each rank ends its share once the one before it has."""
    end = Meeting.end
    ended = [threading.Event() for _ in order]

    def in_order(meeting: Meeting, state: State, record: dict[str, Any]) -> None:
        place = order.index(meeting.seat.rank)
        if state == "done" and place:
            assert ended[place - 1].wait(60)
        end(meeting, state, record)
        if state == "done":
            ended[place].set()

    monkeypatch.setattr(Meeting, "end", in_order)


@pytest.mark.parametrize("leaves", [False, True], ids=["rank-0-stays", "rank-0-leaves"])
@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_every_order_of_finishing(
    order: tuple[int, ...],
    source: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    published: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    leaves: bool,
) -> None:
    finish_in_order(monkeypatch, order)
    if leaves:
        leave(monkeypatch, 0)
    found = in_threads(source, tmp_path / "out", 3, form="dcp")
    assert tree(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sum(published.values()) == 1
    reports = [one for one in found if isinstance(one, ConversionReport)]
    assert len(reports) == (2 if leaves else 3), found
    assert len({report.published_by for report in reports}) == 1
    assert (reports[0].published_by == 0) != leaves
    assert [share.rank for share in reports[0].shares] == [0, 1, 2]
    assert sum(share.nbytes for share in reports[0].shares) == reports[0].target.nbytes


def test_the_lead_passes_on_and_on(
    source: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    published: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each rank ends its share once the one before has left; the last one publishes."""
    leave(monkeypatch, 0, 1, 2)
    finish_in_order(monkeypatch, (0, 1, 2, 3))
    found = in_threads(source, tmp_path / "out", 4, form="dcp", fingerprint=True)
    assert [type(one) for one in found[:3]] == [KeyboardInterrupt] * 3
    assert isinstance(found[3], ConversionReport)
    assert found[3].published_by == 3
    assert found[3].fingerprint
    made = tree(tmp_path / "out")
    assert made.pop("dcpconv_fingerprint.json")
    assert made == whole
    assert sum(published.values()) == 1


def test_of_many_that_would_lead_at_once_one_does(
    source: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    published: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leave(monkeypatch, 0)
    succeed = Lead.succeed
    together = threading.Barrier(3)
    met: set[int] = set()  # either thread of a rank may ask first
    leads: list[int] = []

    def at_once(lead: Lead, rank: int) -> bool:
        own = lead.meeting.seat.rank
        if own not in met:
            met.add(own)
            together.wait(60)
        has_succeeded = succeed(lead, rank)
        if has_succeeded:
            leads.append(own)
        return has_succeeded

    monkeypatch.setattr(Lead, "succeed", at_once)
    found = in_threads(source, tmp_path / "out", 4, form="dcp")
    assert all(isinstance(one, ConversionReport) for one in found[1:]), found
    assert len(leads) == 1
    assert sum(published.values()) == 1
    assert tree(tmp_path / "out") == whole


def test_where_there_are_no_locks_one_leads(
    source: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    published: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(*_: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    leave(monkeypatch, 0)
    found = in_threads(source, tmp_path / "out", 4, form="dcp")
    assert all(isinstance(one, ConversionReport) for one in found[1:]), found
    assert sum(published.values()) == 1
    assert tree(tmp_path / "out") == whole


def test_below_torchrun_nobody_leads_after_rank_0(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(monkeypatch, 0)
    found = in_threads(source, tmp_path / "out", 2, form="dcp", run="one")
    assert isinstance(found[1], GoneRankError)
    assert "rank 0 was told to end" in str(found[1])
    assert not (tmp_path / "out").exists()


def test_another_conversion_does_not_come_between(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 is started anew while another rank leads."""
    leave(monkeypatch, 0)
    refused: list[BaseException] = []
    end = Meeting.end

    def meanwhile(meeting: Meeting, state: State, record: dict[str, Any]) -> None:
        if state == "published":
            with pytest.raises(TargetExistsError) as caught:
                convert(source, tmp_path / "other", form="dcp", overwrite=True)
            refused.append(caught.value)
        end(meeting, state, record)

    monkeypatch.setattr(Meeting, "end", meanwhile)
    (tmp_path / "other").symlink_to(tmp_path / "out")
    found = in_threads(source, tmp_path / "out", 2, form="dcp")
    assert isinstance(found[1], ConversionReport)
    assert "another conversion" in str(refused[0])
    assert tree(tmp_path / "out") == whole


def test_what_was_left_is_inherited_by_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staging(target, overwrite=False, is_file=False) as stage:
        (stage.path / "file").write_bytes(b"data")
        stage.keeping = True
    with inherited(target, overwrite=False, is_file=False) as stage:
        with (
            pytest.raises(TargetExistsError, match="another conversion"),
            inherited(target, overwrite=False, is_file=False),
        ):
            pass
        stage.publish()
    assert tree(target) == {"file": b"data"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_started_anew_comes_back(
    rank: int,
    source: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    published: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its share is done; it ends like the others."""
    target = tmp_path / "out"
    back: list[ConversionReport] = []
    others = {0, 1, 2} - {rank}
    has_come = threading.Event()
    end, wait = Meeting.end, Watch.wait

    def again() -> None:
        back.append(convert(source, target, form="dcp", rank=rank, of=3))

    thread = threading.Thread(target=again)

    def last(meeting: Meeting, state: State, record: dict[str, Any]) -> None:
        if meeting.seat.rank == 2 and state == "done":
            deadline = time.monotonic() + 60
            while not has_left(target, rank) or not any(leads(target, one) for one in others):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            thread.start()
            assert has_come.wait(60)
        end(meeting, state, record)

    def told_once(watch: Watch) -> dict[str, Any] | None:
        if watch.meeting.seat.rank == rank:
            if threading.current_thread() is not thread:
                raise KeyboardInterrupt(signal.SIGTERM)
            has_come.set()
        return wait(watch)

    monkeypatch.setattr(Meeting, "end", last)
    monkeypatch.setattr(Watch, "wait", told_once)
    found = in_threads(source, target, 3, form="dcp")
    thread.join()
    assert isinstance(found[rank], KeyboardInterrupt)
    assert isinstance(found[2], ConversionReport), found
    assert replace(back[0], seconds=0.0) == replace(found[2], seconds=0.0)
    assert sum(published.values()) == 1
    assert tree(target) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def leads(target: Path, rank: int) -> bool:
    beat = read_beat(staging_directory(target) / SHARES, rank)
    return beat is not None and beat.leads


def has_left(target: Path, rank: int) -> bool:
    beat = read_beat(staging_directory(target) / SHARES, rank)
    return beat is not None and beat.state == "left"

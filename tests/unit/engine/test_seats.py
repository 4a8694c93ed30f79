"""Which of how many processes one is, and what is said where they do not fit together."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dcpconv.core.errors import DcpconvError, NoSpaceError
from dcpconv.engine.worlds.faults import GoneRankError, from_record, named, to_record
from dcpconv.engine.worlds.seats import ALONE, RankError, Seat, find_seat, started

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "job",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "2",
    "RANK": "3",
    "WORLD_SIZE": "4",
}


def test_torchrun_says_it() -> None:
    assert find_seat(None, None, TORCHRUN) == Seat(3, 4, "job/1/a/2")


def test_another_start_of_torchrun_is_another_run() -> None:
    again = {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}
    assert find_seat(None, None, again) != find_seat(None, None, TORCHRUN)


def test_a_trainer_of_another_launcher_is_alone() -> None:
    assert find_seat(None, None, {"RANK": "3", "WORLD_SIZE": "4"}) == ALONE


def test_what_the_user_says_comes_first() -> None:
    assert find_seat(1, 2, TORCHRUN) == Seat(1, 2)
    assert find_seat(None, 1, TORCHRUN) == ALONE


@pytest.mark.parametrize(("rank", "of"), [(1, None), (None, 2), (2, 2), (-1, 2), (0, 0)])
def test_numbers_that_make_no_sense_are_refused(rank: int | None, of: int | None) -> None:
    with pytest.raises(RankError):
        find_seat(rank, of, {})


def test_a_process_that_has_ended_is_seen_to() -> None:
    assert started(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert started(process.pid) is None  # nobody has asked for its exit code yet
    process.wait()
    assert started(process.pid) is None


def test_an_error_reaches_the_others_as_it_is() -> None:
    error = NoSpaceError("full", [("file", "a")], hint="free some")
    found = from_record(to_record(error, rank=2, host="b"))
    assert type(found) is NoSpaceError
    assert str(found) == str(named(error, rank=2, host="b"))
    assert ("rank", "2 on b") in found.facts


def test_a_rank_is_named_once() -> None:
    error = DcpconvError("no", [("rank", "1 on a")])
    assert named(error, rank=2, host="b").facts == (("rank", "1 on a"),)


@pytest.mark.parametrize(
    ("error", "kind", "keep"),
    [
        (KeyboardInterrupt(), RankError, False),
        (KeyboardInterrupt(15), GoneRankError, True),
        (ZeroDivisionError("x"), RankError, False),
        (GoneRankError("gone"), GoneRankError, True),
        (NoSpaceError("full"), NoSpaceError, False),
    ],
)
def test_what_stays_for_another_run(
    error: BaseException, kind: type[DcpconvError], *, keep: bool
) -> None:
    record = to_record(error, rank=1, host="b")
    assert type(from_record(record)) is kind
    assert record["keep"] is keep

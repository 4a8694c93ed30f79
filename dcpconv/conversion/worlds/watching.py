"""A thread that says that this rank is alive, and looks after the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcpconv.conversion.worlds.faults import GoneRankError, from_record
from dcpconv.conversion.worlds.meeting import Beat, Meeting
from dcpconv.core.errors import DcpconvError

if TYPE_CHECKING:
    from typing_extensions import Self

BEAT = 0.5
"""Seconds between two signs of life."""

LOST_AFTER = 120.0
"""Seconds without a sign of life from another host: file servers may show one a minute late."""

PATIENCE = 3600.0
"""Seconds that ranks wait for one that has not come: jobs of an array do not start together."""

FAREWELL = 10.0
"""Seconds that rank 0 waits at the end for ranks to read how it ended, before it cleans up."""


@dataclass(slots=True)
class _Seen:
    """The last that was seen of a rank, and when, by the clock of this process."""

    beat: Beat | None
    at: float


class Watch:
    """Signs of life, and what they tell.

    Attributes:
        fault: The error that ends the conversion, once there is one.
        verdict: How rank 0 says that it ended, for the others.
        nbytes: Payload bytes that this rank has written.
    """

    def __init__(self, meeting: Meeting, *, progress: Callable[[int], None]) -> None:
        self.meeting = meeting
        self.fault: DcpconvError | None = None
        self.verdict: dict[str, Any] | None = None
        self.nbytes = 0
        self._lock, self._looking = threading.Lock(), threading.Lock()
        seat = meeting.seat
        now = time.monotonic()
        others = range(1, seat.size) if seat.rank == 0 else (0,)
        self._seen = {rank: _Seen(None, now) for rank in others}
        self._progress = progress
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dcpconv-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def advance(self, nbytes: int) -> None:
        """Count what has been written; raises what ends the conversion, if anything does."""
        with self._lock:
            self.nbytes += nbytes
        self.require_all_well()

    def require_all_well(self) -> None:
        """Raises what ends the conversion, if anything does."""
        if self.fault is not None:
            raise self.fault

    def wait_for_all(self) -> list[dict[str, Any]]:
        """Wait until every other rank has done its share; returns what they say of it.

        Raises:
            DcpconvError: One has failed, or is gone.
        """
        for _ in pauses():
            self.look()
            self.require_all_well()
            if all(seen.beat and seen.beat.state == "done" for seen in self._seen.values()):
                ends = [end for rank in self._seen if (end := self.meeting.end_of(rank))]
                if len(ends) == len(self._seen):
                    return ends
        raise AssertionError

    def wait_for_verdict(self) -> dict[str, Any]:
        """Wait until rank 0 says how it ended.

        Raises:
            DcpconvError: Badly.
        """
        for _ in pauses():
            self.look()
            self.require_all_well()
            if self.verdict is not None:
                return self.verdict
        raise AssertionError

    def _run(self) -> None:
        while True:
            with suppress(OSError):  # it shows for the others, and in what this rank writes
                self.meeting.beat(nbytes=self.nbytes)
            self.look()
            if self._closing.wait(BEAT):
                return

    def look(self) -> None:
        """See what the others do."""
        with self._looking:
            if self.fault is None and self.verdict is None:
                try:
                    self._look()
                except DcpconvError as error:
                    self.fault = error

    def _look(self) -> None:
        now = time.monotonic()
        for rank, seen in self._seen.items():
            beat = self.meeting.beat_of(rank)
            if beat is not None and beat != seen.beat:
                seen.beat, seen.at = beat, now
            self._judge(rank, seen, now)
        if self.meeting.seat.rank == 0:
            if (refusal := self.meeting.refusal()) is not None:
                raise from_record(refusal)
            written = (seen.beat.nbytes for seen in self._seen.values() if seen.beat)
            self._progress(self.nbytes + sum(written))

    def _judge(self, rank: int, seen: _Seen, now: float) -> None:
        beat = seen.beat
        if beat is None:
            if now - seen.at > PATIENCE:
                raise GoneRankError(
                    f"rank {rank} has not come",
                    [("rank", rank), ("waited", f"{PATIENCE:.0f} s"), ("at", self.meeting.path)],
                    hint="start all ranks at once; their targets must be one directory",
                )
            return
        if beat.state in {"failed", "published"}:
            record = self.meeting.end_of(rank)
            if record is not None and beat.state == "failed":
                raise from_record(record)
            self.verdict = record
        elif beat.state == "working" or (rank == 0 and beat.state == "done"):
            silent = now - seen.at > LOST_AFTER
            if beat.is_gone or silent:
                how = "does not answer" if silent else "has ended without a word"
                raise GoneRankError(
                    f"rank {rank} {how}",
                    [("rank", f"{rank} on {beat.host}"), ("process", beat.pid)],
                    hint="run the same again: it goes on with what is written",
                )


def pauses() -> Iterator[None]:
    """Wait again and again: shortly where the others are as fast, and no longer than for a sign of
    life, which a file server is asked for by all ranks."""
    pause = 0.01
    while True:
        yield
        time.sleep(min(pause, BEAT))
        pause *= 1.2


def wait_for_farewell(meeting: Meeting) -> None:
    """Wait a little, as rank 0, until every other rank has read how it ended, or is gone."""
    deadline = time.monotonic() + FAREWELL
    for _ in pauses():
        beats = [meeting.beat_of(rank) for rank in range(1, meeting.seat.size)]
        if all(beat and (beat.state in {"failed", "left"} or beat.is_gone) for beat in beats):
            return
        if time.monotonic() > deadline:
            return

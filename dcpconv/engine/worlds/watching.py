"""A thread that says that this rank is alive, and looks after the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcpconv.core.errors import DcpconvError
from dcpconv.engine.worlds.early import this_start
from dcpconv.engine.worlds.faults import GoneRankError, from_record
from dcpconv.engine.worlds.meeting import Beat, Meeting

if TYPE_CHECKING:
    from typing_extensions import Self

BEAT = 0.5
"""Seconds between two signs of life."""

LOST_AFTER = 120.0
"""Seconds without a sign of life from another host: file servers may show one a minute late."""

PATIENCE = 3600.0
"""Seconds that ranks wait for one that has not come: jobs of an array do not start together."""

FAREWELL = 10.0
"""Seconds that the rank that leads waits at the end for the others to read how it ended, before it
cleans up."""


@dataclass(slots=True)
class _Seen:
    """The last that was seen of a rank, and when, by the clock of this process."""

    beat: Beat | None
    at: float


class Watch:
    """Signs of life, and what they tell.

    One rank leads: it looks after all others, and publishes.  The others look after that one.
    Rank 0 leads from the beginning; where it ends once its share is done, another may go on.

    Args:
        meeting: Where the ranks meet.
        progress: Called with the payload bytes that all ranks have written, where this one leads.
        succeed: Called with the rank that led and has ended after its share; tells whether this one
            leads from now on.  ``None`` where nobody may.
        require_no_fault: Raises where one of these ranks has failed before it came; by default
            what it has left beside the target tells.

    Attributes:
        fault: The error that ends the conversion, once there is one.
        verdict: How the rank that leads says that it ended, for the others.
        nbytes: Payload bytes that this rank has written.
    """

    def __init__(
        self,
        meeting: Meeting,
        *,
        progress: Callable[[int], None],
        succeed: Callable[[int], bool] | None = None,
        require_no_fault: Callable[[Iterable[int]], None] | None = None,
    ) -> None:
        self.meeting = meeting
        self.fault: DcpconvError | None = None
        self.verdict: dict[str, Any] | None = None
        self.nbytes = 0
        self._lock, self._looking = threading.Lock(), threading.Lock()
        # A rank 0 that comes back has been followed by another.
        has_come_back = meeting.seat.rank == 0 and not meeting.leads
        self._leader: int | None = None if has_come_back else 0
        self._led: list[int] = [0] if has_come_back else []
        self._since = time.monotonic()
        self._seen: dict[int, _Seen] = {}
        self._progress = progress
        self._require_no_fault = require_no_fault or this_start().require_no_fault
        self._succeed = succeed
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dcpconv-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    @property
    def leads(self) -> bool:
        """Whether this rank does."""
        return self._leader == self.meeting.seat.rank

    def advance(self, nbytes: int) -> None:
        """Count what has been written; raises what ends the conversion, if anything does."""
        with self._lock:
            self.nbytes += nbytes
        self.require_all_well()

    def require_all_well(self) -> None:
        """Raises what ends the conversion, if anything does."""
        if self.fault is not None:
            raise self.fault

    def wait(self) -> dict[str, Any] | None:
        """Wait until the rank that leads says how it ended; ``None`` where this one leads, and all
        others have done their shares.

        Raises:
            DcpconvError: It ended badly, or a rank is gone.
        """
        for _ in pauses():
            self.look()
            self.require_all_well()
            if self.verdict is not None:
                return self.verdict
            if self.leads and all(map(self._has_done, self._others())):
                return None
        raise AssertionError

    def _has_done(self, rank: int) -> bool:
        seen = self._seen.get(rank)
        return (
            seen is not None
            and seen.beat is not None
            and seen.beat.state in {"done", "left"}
            and self.meeting.end_of(rank) is not None
        )

    def _others(self) -> list[int]:
        seat = self.meeting.seat
        return [rank for rank in range(seat.size) if rank != seat.rank]

    def _run(self) -> None:
        while True:
            # It shows for the others, and in what this rank writes.
            with suppress(OSError, DcpconvError):
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
        if self._leader is None:
            self._find_leader(now)
        elif self.leads:
            for rank in self._others():
                self._judge(rank, self._see(rank, now), now)
            if (refusal := self.meeting.refusal()) is not None:
                raise from_record(refusal)
            written = (seen.beat.nbytes for seen in self._seen.values() if seen.beat)
            self._progress(self.nbytes + sum(written))
        else:
            self._follow(self._leader, self._see(self._leader, now), now)

    def _see(self, rank: int, now: float) -> _Seen:
        seen = self._seen.setdefault(rank, _Seen(None, now))
        beat = self.meeting.beat_of(rank)
        if beat is not None and beat != seen.beat:
            seen.beat, seen.at = beat, now
        return seen

    def _judge(self, rank: int, seen: _Seen, now: float) -> None:
        """What this rank makes of another, as the one that leads, or of the one that does."""
        beat = seen.beat
        if beat is None:
            self._require_no_fault([rank])
            if now - seen.at > PATIENCE:
                raise GoneRankError(
                    f"rank {rank} has not come",
                    [("rank", rank), ("waited", f"{PATIENCE:.0f} s"), ("at", self.meeting.path)],
                    hint=self.meeting.together,
                )
        elif beat.state == "failed":
            record = self.meeting.end_of(rank)
            if record is not None and "kind" in record:
                raise from_record(record)
        elif beat.state == "working" and _has_ended(seen, now):
            raise _gone(beat, rank, now - seen.at, self.meeting)

    def _follow(self, rank: int, seen: _Seen, now: float) -> None:
        self._judge(rank, seen, now)
        if seen.beat is None:
            return
        if seen.beat.state == "published":
            record = self.meeting.end_of(rank)
            self.verdict = record if record is not None and "shares" in record else None
        elif seen.beat.state == "left" or (seen.beat.state == "done" and _has_ended(seen, now)):
            if self._succeed is None:
                raise _gone(seen.beat, rank, now - seen.at, self.meeting)
            self._leader, self._since = None, now
            self._led.append(rank)

    def _find_leader(self, now: float) -> None:
        """Follow the rank that leads by now, or lead."""
        for rank in self._others():
            beat = self._see(rank, now).beat
            if beat is not None and beat.leads and rank not in self._led:
                self._leader = rank
                return
        last = self._led[-1]
        if self._succeed is not None and self._succeed(last):
            self._leader = self.meeting.seat.rank
        elif now - self._since > LOST_AFTER:
            raise GoneRankError(
                f"rank {last} has ended, and nobody leads after it",
                [("rank", last), ("at", self.meeting.path)],
                hint="run the same again: it goes on with what is written",
            )


def _has_ended(seen: _Seen, now: float) -> bool:
    return seen.beat is not None and (seen.beat.is_gone or now - seen.at > LOST_AFTER)


def _gone(beat: Beat, rank: int, silent: float, meeting: Meeting) -> GoneRankError:
    how = "does not answer" if silent > LOST_AFTER else "has ended without a word"
    return GoneRankError(
        f"rank {rank} {how}",
        [("rank", f"{rank} on {beat.host}"), ("process", beat.pid)],
        hint=meeting.again,
    )


def pauses() -> Iterator[None]:
    """Wait again and again: each time for a twentieth of what has been waited, and no longer than
    for a sign of life, which a file server is asked for by all ranks."""
    pause = 0.01
    while True:
        yield
        time.sleep(min(pause, BEAT))
        pause *= 1.05


def wait_for_farewell(meeting: Meeting) -> bool:
    """Wait a little, as the rank that leads, until every other one has read how it ended, or is
    gone; tells whether that is so."""
    seat, deadline = meeting.seat, time.monotonic() + FAREWELL
    for _ in pauses():
        beats = [meeting.beat_of(rank) for rank in range(seat.size) if rank != seat.rank]
        if all(beat and (beat.state in {"failed", "left"} or beat.is_gone) for beat in beats):
            return True
        if time.monotonic() > deadline:
            return False
    raise AssertionError

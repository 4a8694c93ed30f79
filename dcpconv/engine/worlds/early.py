"""What fails in one rank before the ranks meet, left where the others look.

A rank that fails while it reads its arguments, or opens the source, never comes; the others would
wait an hour for it.  So it leaves its fault in the staging directory, beside the target.  There is
no clock that all agree on, and nothing that tells one start of an array from the next: a fault that
was there when another rank started is of this run if it is not much older, by the clock of the file
system, and one that comes later always is.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from dcpconv.core.errors import TargetExistsError
from dcpconv.engine.publish import FAULTS, staging_directory
from dcpconv.engine.targets import TargetError
from dcpconv.engine.worlds.faults import GoneRankError, from_record, is_told, to_record
from dcpconv.engine.worlds.meeting import read_record, write_record
from dcpconv.engine.worlds.seats import Seat, host
from dcpconv.stores.schemes import is_remote

GRACE = 5.0
"""Seconds by which a fault may be older than the start of another rank: ranks of one array start
within seconds, and a person who has read an error takes longer to start them again."""

_TRIES = 3
"""Times that a fault is written, where that fails: the others wait for it in vain otherwise."""


class Start:
    """A rank from its start until it has met the others.

    Args:
        target: Where the result goes.
        seat: Which rank this is.

    Attributes:
        has_met: Whether the meeting tells all others from now on what fails here.
    """

    def __init__(self, target: str | os.PathLike[str], seat: Seat) -> None:
        self.has_met = False
        self._seat = seat
        self._path = staging_directory(Path(target)) / FAULTS
        with suppress(OSError):
            self._file(seat.rank).unlink()
        self._old = self._seen()

    def require_no_fault(self, ranks: Iterable[int]) -> None:
        """Fail as one of these ranks has failed, if one has.

        Raises:
            DcpconvError: What it raised.
        """
        for rank in ranks:
            file = self._file(rank)
            try:
                state = file.stat()
            except OSError:
                continue
            record = read_record(file)
            if (
                record
                and record.get("run") == self._seat.run
                and state.st_mtime_ns not in self._old
            ):
                raise from_record(record)

    def leave(self, error: BaseException) -> None:
        """Tell the others, unless they hear of it anyway, or find it out for themselves."""
        heard_anyway = (GoneRankError, TargetError, TargetExistsError)
        if self.has_met or isinstance(error, heard_anyway) or is_told(error):
            return
        rank = self._seat.rank
        record = {**to_record(error, rank=rank, host=host()), "run": self._seat.run}
        for _ in range(_TRIES):
            with suppress(OSError):  # the directory may be removed by another process just now
                self._path.mkdir(parents=True, exist_ok=True)
                write_record(self._file(rank), record)
                return

    def _file(self, rank: int) -> Path:
        return self._path / f"{rank}"

    def _seen(self) -> frozenset[int]:
        """Times of the faults that are too old to be of this run."""
        files = list(self._path.glob("*"))
        if not files:
            return frozenset()
        found: set[int] = set()
        with suppress(OSError), tempfile.TemporaryFile(dir=self._path) as probe:
            probe.write(b"\n")
            probe.flush()
            now = os.fstat(probe.fileno()).st_mtime_ns
            found.update(
                time for file in files if (time := file.stat().st_mtime_ns) < now - GRACE * 1e9
            )
        return frozenset(found)


_start: ContextVar[Start | None] = ContextVar("start", default=None)


def this_start() -> Start:
    """That of the rank that calls this."""
    start = _start.get()
    if start is None:
        raise AssertionError("not one of several ranks")
    return start


@contextmanager
def telling(target: str | os.PathLike[str], seat: Seat) -> Iterator[None]:
    """Leave what fails in this block, before the ranks have met, for the others to find."""
    if is_remote(target):
        yield
        return
    start = Start(target, seat)
    token = _start.set(start)
    try:
        yield
    except BaseException as error:
        start.leave(error)
        raise
    finally:
        _start.reset(token)

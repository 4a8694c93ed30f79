"""The directory where the processes of one conversion meet: files that each of them writes alone.

::

    plan            what rank 0 decided, once the files of the result are there
    rank-N          what rank N does at this moment; written anew several times a second
    seat-TOKEN-N    taken by the process that is rank N of this run
    refused-TOKEN   why a process cannot be the rank that it says
    end-N-TOKEN     what rank N moved, or why it failed; of the one that leads, how all of it ended
    after-N-TOKEN   taken by the process that leads since rank N, which did, has ended
    done-N-TOKEN    the pieces that rank N has written and synced

Nothing here needs a lock, a clock that agrees with another, or a file that two processes write.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dcpconv.engine.copying import write_error
from dcpconv.engine.worlds.seats import RankError, Seat, host, process_space, started

State = Literal["working", "done", "failed", "published", "left"]


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank does at the moment.

    Attributes:
        token: Of the run that it takes part in.
        state: How far it is; ``left`` once it waits no longer.
        count: One more each time: a rank whose count stands still does not run.
        nbytes: Payload bytes that it has written.
        host: Where it runs.
        space: Where its process id means something.
        pid: Its process.
        since: When that process started, as the kernel counts.
        leads: Whether it looks after the others and publishes.
    """

    token: str
    state: State
    count: int
    nbytes: int
    host: str
    space: str
    pid: int
    since: str | None
    leads: bool = False

    @property
    def is_seen(self) -> bool:
        """Whether its process can be looked up from here."""
        return self.since is not None and self.space == process_space()

    @property
    def is_gone(self) -> bool:
        """Whether its process is known to have ended."""
        return self.is_seen and started(self.pid) != self.since

    @property
    def is_here(self) -> bool:
        """Whether its process is known to run."""
        return self.is_seen and started(self.pid) == self.since


class Meeting:
    """The files of one directory, as one rank reads and writes them.

    Args:
        path: The directory, or what people are told of where the ranks meet.
        seat: Which rank this is.
        token: Of this run.
        leads: Whether this rank leads from the beginning.

    Attributes:
        together: What to see to where a rank does not come.
        again: What to do where one is gone.
    """

    together = "start all ranks at once; their targets must be one directory"
    again = "run the same again: it goes on with what is written"

    def __init__(self, path: Path, seat: Seat, token: str, *, leads: bool = False) -> None:
        self.path, self.seat, self.token = path, seat, token
        self._lock = threading.Lock()
        pid = os.getpid()
        since = started(pid)
        self._beat = Beat(token, "working", 0, 0, host(), process_space(), pid, since, leads)

    def take_seat(self) -> None:
        """Become this rank, of which there is one.

        Raises:
            RankError: Another process is.
            DcpconvError: This process cannot write here.
        """
        rank = self.seat.rank
        try:
            self._take(f"seat-{self.token}-{rank}")
        except FileExistsError as error:
            other = self.beat_of(rank)
            facts = [("process", f"{other.pid} on {other.host}")] if other else []
            raise RankError(
                f"rank {rank} is taken by another process",
                [("rank", f"{rank} on {host()}"), *facts],
                hint="give every process a rank of its own",
            ) from error
        except OSError as error:
            raise write_error(error, self.path) from error
        self.beat()

    def claim_lead(self, rank: int) -> bool:
        """Be the one to lead after a rank that did; ``False`` where another process is.

        Raises:
            OSError: This process cannot write here.
        """
        try:
            self._take(f"after-{rank}-{self.token}")
        except FileExistsError:
            return False
        return True

    @property
    def leads(self) -> bool:
        """Whether this rank says that it leads."""
        return self._beat.leads

    @property
    def is_done(self) -> bool:
        """Whether an earlier process was this rank, and has ended once its share was done."""
        beat, end = self.beat_of(self.seat.rank), self.end_of(self.seat.rank)
        has_ended = beat is not None and (beat.state == "left" or beat.is_gone)
        return has_ended and end is not None and "moved" in end

    @property
    def is_succeeded(self) -> bool:
        """Whether another process leads after this one."""
        return (self.path / f"after-{self.seat.rank}-{self.token}").exists()

    def _take(self, name: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        os.close(os.open(self.path / name, flags, 0o666))

    def beat(
        self,
        state: State | None = None,
        nbytes: int | None = None,
        *,
        leads: bool | None = None,
    ) -> None:
        """Say that this rank is alive, and how far.

        Raises:
            OSError: It cannot.
        """
        with self._lock:
            now = self._beat
            self._beat = replace(
                now,
                count=now.count + 1,
                state=state or now.state,
                nbytes=now.nbytes if nbytes is None else nbytes,
                leads=now.leads if leads is None else leads,
            )
            record = {name: getattr(self._beat, name) for name in Beat.__slots__}
            self._show(record)

    def _show(self, record: dict[str, Any]) -> None:
        text = json.dumps(record).encode()
        # In place: what another host has cached of a directory may be old for a minute.
        fd = os.open(self.path / f"rank-{self.seat.rank}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(fd, b"%08x %s\n" % (zlib.crc32(text), text), 0)
        finally:
            os.close(fd)

    def beat_of(self, rank: int) -> Beat | None:
        """What a rank of this run says; ``None`` where it has said nothing, or is saying it."""
        found = self._shown_by(rank)
        return found if found is not None and found.token == self.token else None

    def _shown_by(self, rank: int) -> Beat | None:
        return read_beat(self.path, rank)

    def put(self, name: str, record: dict[str, Any]) -> None:
        """Let the others read a record, whole.

        Raises:
            OSError: It cannot be written.
        """
        write_record(self.path / name, record)

    def get(self, name: str) -> dict[str, Any] | None:
        """The record of that name, if it can be read by now."""
        return read_record(self.path / name)

    def end(self, state: State, record: dict[str, Any]) -> None:
        """Say how it ended for this rank.

        Raises:
            OSError: It cannot.
        """
        self.put(f"end-{self.seat.rank}-{self.token}", record)
        self.beat(state)

    def end_of(self, rank: int) -> dict[str, Any] | None:
        """How it ended for a rank of this run, if that can be read by now."""
        return self.get(f"end-{rank}-{self.token}")

    def refuse(self, record: dict[str, Any]) -> None:
        """Say that a process cannot be a rank of this run, which then ends."""
        self.put(f"refused-{self.token}", record)

    def refusal(self) -> dict[str, Any] | None:
        """Why a process cannot be a rank of this run, if one has said so."""
        return self.get(f"refused-{self.token}")

    def note_done(self, record: dict[str, Any]) -> None:
        """Note what is on disk by now, for a run that has to go on with it."""
        text = json.dumps(record).encode()
        path = self.path / f"done-{self.seat.rank}-{self.token}"
        try:
            with path.open("ab") as file:
                file.write(b"%08x %s\n" % (zlib.crc32(text), text))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(error, path) from error


def read_beat(path: Path, rank: int) -> Beat | None:
    """What a rank of any run said last."""
    try:
        line = (path / f"rank-{rank}").read_bytes().partition(b"\n")[0]
    except OSError:
        return None
    record = _checked(line)
    return None if record is None else Beat(**record)


def read_done(path: Path) -> list[dict[str, Any]]:
    """Everything that ranks of earlier runs noted as done."""
    found = []
    for file in sorted(path.glob("done-*")):
        found += [_checked(line) for line in file.read_bytes().splitlines()]
    return [record for record in found if record is not None]


def forget_others(path: Path, token: str) -> None:
    """Remove what other runs left; what they had done is in the plan by now."""
    for pattern in ("done-*", "seat-*", "end-*", "after-*", "refused-*"):
        for file in path.glob(pattern):
            if token not in file.name:
                file.unlink(missing_ok=True)


def set_up(path: Path, size: int) -> None:
    """Make the directory, and a file for every rank: one that is there already is seen at once on
    every host, and one that was removed is not made again."""
    path.mkdir(exist_ok=True)
    for rank in range(size):
        with (path / f"rank-{rank}").open("ab"):
            pass


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Put a record there, whole, and on disk."""
    beside = path.with_name(f"{path.name}.new")
    with beside.open("w") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record that is there, if any."""
    with suppress(OSError, ValueError):
        record = json.loads(path.read_bytes())
        return record if isinstance(record, dict) else None
    return None


def _checked(line: bytes) -> dict[str, Any] | None:
    """A record that was written to its end."""
    crc, _, text = line.partition(b" ")
    if crc != b"%08x" % zlib.crc32(text):
        return None
    record: dict[str, Any] = json.loads(text)
    return record
